"""Weights of the cross-entropy: by what -log q(y) of each token is multiplied.

    L_CE = (1/N) sum over supervised t of w_t * -log q(y_t)

Owns a function a form, with its formula and source, and N: all supervised tokens, or those that a form keeps, as its
source has it (`num_weighed`). Every weight is a constant for the gradient, which is w_t (q - 1_y). Tensors only: what
the forms are called is in `objective`. Must not know storage or models.
Shapes: N positions, n of a slice, V vocabulary, K alternatives. p the base, q the adapted distribution, y the label.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from logitcache.errors import TrainingFailed
from logitcache.settings import names_function

from .formula_files import formula
from .formulas import Objective, SparseTargets

TOP = 20
"""Tokens over which EAFT takes the entropy."""


def dft(log_q: Tensor) -> Tensor:
    """q(y): Dynamic Fine-Tuning (arXiv 2508.05629), [n]. log_q: log q(y), [n]. N: all supervised tokens."""
    return log_q.exp()


def stm(log_p: Tensor, perplexity: float) -> Tensor:
    """0 where 1 / p(y) > perplexity, else 1: Selective Token Masking (arXiv 2501.14315), [n].

    log_p: log p(y), [n]. N: the tokens that are kept; in the paper a dropped one has the label -100.
    """
    return (log_p >= -math.log(perplexity)).float()


def eaft(top: Tensor, power: float) -> Tensor:
    """(H / ln K)^power, [n], H = -sum r log r with r = softmax(top): Entropy-Adaptive Fine-Tuning (arXiv 2601.02151).

    top: logits or log-probabilities of the K = 20 most probable tokens, [n, K], or all of a smaller vocabulary; -inf
    where a token cannot occur. N: all supervised tokens.
    """
    if top.shape[1] < 2:
        return torch.zeros(len(top), device=top.device)
    entropy: Tensor = torch.special.entr(top.float().softmax(dim=1)).sum(dim=1)
    return (entropy / math.log(top.shape[1])).clamp(min=0).pow(power)


def eaft_base(targets: SparseTargets, power: float) -> Tensor:
    """`eaft` of the base's K most probable tokens, as they are recorded: label and alternatives, [n]."""
    recorded = torch.cat([targets.label_logprobs.float()[:, None], targets.alternative_logprobs.float()], dim=1)
    return eaft(recorded.topk(min(TOP, recorded.shape[1]), dim=1).values, power)


def rho1(excess: Tensor, documents: Tensor, supervised: Tensor, share: float) -> Tensor:
    """1 for the share of each document's tokens with the largest excess loss, else 0: Rho-1 (arXiv 2404.07965), [N].

    excess: -log q(y) + log p(y), [N], of equal ones the first; documents: which document each position is of, numbered
    from 0, ascending, int [N]; supervised: bool [N]. Kept of n tokens: share * n, rounded up. N: those that are kept.
    The paper ranks the tokens of a batch; a document's do not depend on how a step is divided.
    """
    documents = documents.long()
    scores = torch.where(supervised, excess, -torch.inf)
    by_score = scores.argsort(descending=True, stable=True)
    order = by_score[documents[by_score].argsort(stable=True)]  # document by document, the largest first
    first = torch.cat([documents.new_zeros(1), _per_document(torch.ones_like(documents), documents).cumsum(0)])
    ranks = torch.empty_like(documents)
    ranks[order] = torch.arange(len(order), device=order.device) - first[documents[order]]
    kept = _num_kept(documents, supervised, share)[documents]
    return (supervised & (ranks < kept)).float()


def num_weighed(
    objective: Objective, supervised: Tensor, targets: SparseTargets | None, for_ce: Tensor | None
) -> Tensor:
    """N of the mean: supervised positions, of which a form that drops some counts those that it keeps; int64 scalar.

    supervised: bool [N]; targets: of these positions, None where the batch has none; for_ce: as `weigher_of` has it.
    Known before the student has run.
    """
    name, value = objective.ce_weight, objective.ce_weight_value
    if not objective.weight_form.over_kept or not len(supervised):
        return supervised.sum()
    if name == "stm":
        return (supervised & (stm(_base_of(targets, name).label_logprobs.float(), _number(value)) > 0)).sum()
    if name == "rho1":
        return _num_kept(_brought(for_ce, name).long(), supervised, _number(value)).sum()
    return (supervised & (_as_weights(_brought(for_ce, name)) > 0)).sum()


@dataclass(frozen=True)
class Tokens:
    """What a weight of one's own may read of n tokens, natural logarithms without a gradient, float32 [n]."""

    #: log q(y): what the student says of the token.
    log_q: Tensor
    #: log p(y): what the base says of it.
    log_p: Tensor
    #: log p of the most probable tokens beside it, most probable first, [n, K]; -inf where a row keeps fewer.
    log_p_alternatives: Tensor
    #: log of the base's mass on all others.
    log_p_tail: Tensor

    @property
    def base_entropy(self) -> Tensor:
        """Of the base, in nats, over token, alternatives and all others as one: a lower bound of the whole."""
        parts = [self.log_p[:, None], self.log_p_alternatives, self.log_p_tail[:, None]]
        entropy: Tensor = torch.special.entr(torch.cat(parts, dim=1).exp()).sum(dim=1)
        return entropy


def own_weights(name: str, tokens: Tokens) -> Tensor:
    """A formula of the user's own, [n]. Raises `TrainingFailed` unless it gives a number of 0 or more a token."""
    found = formula(name).function(tokens)
    if not isinstance(found, Tensor) or found.shape != tokens.log_q.shape:
        what = f"a tensor of shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise TrainingFailed(
            f"weighing the cross-entropy by {name}: expected a tensor with a number for each of {len(tokens.log_q)} "
            f"tokens, found {what}. Return one of the shape of tokens.log_q."
        )
    if bool((found < 0).any()):  # also where random distributions did not show it; what is not finite stops the run
        raise TrainingFailed(
            f"weighing the cross-entropy by {name}: expected weights of 0 or more, found {float(found.min()):.3g}. A "
            "token would be unlearnt. Give another formula."
        )
    return found.detach().float()


@dataclass(frozen=True)
class Weigher:
    """The weights of N tokens, slice by slice. Make one with `weigher_of`."""

    objective: Objective
    #: What does not wait for the logits of a slice, float32 [N].
    known: Tensor | None = None
    #: Of all N positions, where a formula of the user's own reads them.
    targets: SparseTargets | None = None

    def of(self, rows: slice, log_q: Tensor, top: Tensor | None) -> Tensor:
        """float32 [n]. log_q: log q(y) of these rows, [n]; top: as `top_logits` has it."""
        if self.known is not None:
            return self.known[rows]
        if top is not None:
            return eaft(top, _number(self.objective.ce_weight_value))
        if self.targets is None:
            return dft(log_q)
        part = self.targets.rows(rows)
        logprobs = (part.label_logprobs, part.alternative_logprobs, part.tail_logprobs)
        return own_weights(self.objective.ce_weight, Tokens(log_q, *(column.float() for column in logprobs)))


def weigher_of(
    objective: Objective,
    label_ids: Tensor,
    targets: SparseTargets | None,
    supervised: Tensor | None,
    for_ce: Tensor | None,
    log_q_of: Callable[[], Tensor],
) -> Weigher | None:
    """The weights of N positions; None where all have the weight 1.

    targets: of the same positions, None where the batch has none; supervised: bool [N], None: all; for_ce: [N], what a
    batch brings: for `data` the weights, as the bits of float32 in int32, for `rho1` the number of each position's
    document; log_q_of gives log q(y) of all N, at the price of another pass, for `rho1` alone.
    Raises `TrainingFailed` where the batch lacks what the form reads.
    """
    name, value = objective.ce_weight, objective.ce_weight_value
    if name == "none":
        return None
    if not len(label_ids):
        return Weigher(objective, torch.zeros(0, device=label_ids.device))
    if name in ("dft", "eaft"):
        return Weigher(objective)
    if name == "data":
        return Weigher(objective, _as_weights(_brought(for_ce, name)))
    base = _base_of(targets, name)
    if names_function(name):
        return Weigher(objective, targets=base)
    if name == "stm":
        return Weigher(objective, stm(base.label_logprobs.float(), _number(value)))
    if name == "eaft-base":
        return Weigher(objective, eaft_base(base, _number(value)))
    counted = torch.ones_like(label_ids, dtype=torch.bool) if supervised is None else supervised
    excess = base.label_logprobs.float() - log_q_of()
    return Weigher(objective, rho1(excess, _brought(for_ce, name), counted, _number(value)))


def top_logits(logits: Tensor, objective: Objective) -> Tensor | None:
    """The largest logits of each row, [n, min(20, V)], where the weight is of their entropy; else None."""
    return logits.topk(min(TOP, logits.shape[1]), dim=1).values if objective.ce_weight == "eaft" else None


def _num_kept(documents: Tensor, supervised: Tensor, share: float) -> Tensor:
    """How many tokens of each document are kept, int64 [N], 0 beyond the last document."""
    counts = _per_document(supervised.long(), documents)
    return (counts.double() * share - 1e-9).ceil().long().clamp(min=0)


def _per_document(values: Tensor, documents: Tensor) -> Tensor:
    """Sums by document, int64 [N]: there are at most as many documents as positions."""
    return torch.zeros_like(documents).scatter_add(0, documents, values)


def _as_weights(bits: Tensor) -> Tensor:
    return bits.view(torch.float32) if bits.dtype == torch.int32 else bits


def _number(value: float | None) -> float:
    assert value is not None  # the published one, where none was given
    return float(value)


def _base_of(targets: SparseTargets | None, name: str) -> SparseTargets:
    if targets is None:
        raise TrainingFailed(
            f"weighing the cross-entropy by {name}: expected what the base says of each token, found a batch without a "
            "cache. Give the cache."
        )
    return targets


def _brought(for_ce: Tensor | None, name: str) -> Tensor:
    if for_ce is None:
        raise TrainingFailed(
            f"weighing the cross-entropy by {name}: expected a batch that was looked up with this objective, found one "
            "that was looked up with another. Look it up by the collator of the view or loss that trains."
        )
    return for_ce
