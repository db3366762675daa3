"""The formulas, as plain as the paper: cross-entropy and the regularisers, per position, in nats.

Tensors only: knows neither storage nor models. Everything is float32 at least and in log space, since 1 - p(label)
cancels; masking is by `where`, never by multiplication. docs/loss.md derives what stands here; `fused` has the same
numbers without [N, V] memory. Gradients here are autograd's.
Shapes: N positions, V vocabulary, K alternatives, G groups, M draws, J outcomes. p the base, q the adapted
distribution, y the label, S the kept alternatives, T the tail (neither y nor in S).
"""

import math
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from logitcache.errors import TrainingFailed
from logitcache.settings import names_function

from .formula_files import formula
from .objective import Objective as Objective
from .objective import Regularizer as Regularizer
from .objective import Tail as Tail
from .objective import Weighting as Weighting

NO_MASS = -1e4
"""The logarithm of the mass 0, as a formula of one's own is given it: its exponential is 0 and its square a number."""


@dataclass(frozen=True)
class SparseTargets:
    """What the base says at N positions. Ids int32 or int64, log-probabilities float16 or float32.

    label_ids [N]; label_logprobs [N]; alternative_ids [N, K], the label's id where a row keeps fewer;
    alternative_logprobs [N, K], -inf there; tail_logprobs [N], -inf where there is no tail.
    For tail `groups`: tail_group_logprobs [N, G] and token_groups [V], the group of each token, of all positions.
    For tail `sampled`: draw_ids [N, M] and draw_logprobs [N, M], tokens drawn from T with replacement, and their log p.
    """

    label_ids: Tensor
    label_logprobs: Tensor
    alternative_ids: Tensor
    alternative_logprobs: Tensor
    tail_logprobs: Tensor
    tail_group_logprobs: Tensor | None = None
    token_groups: Tensor | None = None
    draw_ids: Tensor | None = None
    draw_logprobs: Tensor | None = None

    def __len__(self) -> int:
        return len(self.label_ids)

    @property
    def num_groups(self) -> int:
        """G; 0 without groups."""
        return 0 if self.tail_group_logprobs is None else self.tail_group_logprobs.shape[1]

    def rows(self, rows: slice) -> "SparseTargets":
        """These positions."""
        columns = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "token_groups"}
        return replace(self, **{name: column[rows] for name, column in columns.items() if column is not None})


def cross_entropy(logits: Tensor, label_ids: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-log q(y), float32 [N]. logits: [N, V], any float dtype; label_ids: [N].

    With label smoothing e (Szegedy et al. 2016, arXiv 1512.00567): -(1 - e) log q(y) - e mean_c log q(c) over all V
    tokens, y among them; +inf where a token cannot occur (a logit of -inf).
    """
    return F.cross_entropy(logits.float(), label_ids.long(), reduction="none", label_smoothing=label_smoothing)


def regularizer_mask(targets: SparseTargets, objective: Objective) -> Tensor:
    """Positions that count, bool [N]: all for full KL; for masked forms and dkd those with 1 - p(y) >= min_base_rest.

    Renormalised, also those alone that keep two alternatives: one outcome always has probability 1.
    """
    if not objective.compares_rest:
        return torch.ones_like(targets.label_ids, dtype=torch.bool)
    counts: Tensor = base_rest(targets) >= math.log(max(objective.min_base_rest, 1e-300))
    if objective.tail == "renormalize":
        counts = counts & ((targets.alternative_ids != targets.label_ids[:, None]).sum(dim=1) >= 2)
    return counts


def base_rest(targets: SparseTargets) -> Tensor:
    """log(1 - p(y)), float32 [N]: the mass of alternatives and tail, which a quantised cache holds to a relative error;
    log p(y), in steps of 1/1024 nat, could not tell 1 - 4e-4 from 1."""
    others = torch.cat([targets.alternative_logprobs.float(), targets.tail_logprobs.float()[:, None]], dim=1)
    return others.logsumexp(dim=1)


def base_outcomes(targets: SparseTargets, objective: Objective) -> Tensor:
    """log P, float32 [N, J], over the outcomes that are compared: y for full KL, S, and T or its groups.

    Normalised by the recorded masses themselves, since those of a quantised cache miss 1 a little.
    """
    _check_tail(targets, objective)
    parts = [] if objective.masked else [targets.label_logprobs.float()[:, None]]
    parts.append(targets.alternative_logprobs.float())
    if objective.tail == "groups":
        assert targets.tail_group_logprobs is not None
        shares = targets.tail_group_logprobs.float()  # rounded more coarsely than the tail: only their shares count
        parts.append(targets.tail_logprobs.float()[:, None] + _normalized(shares))
    elif objective.tail != "renormalize":
        parts.append(targets.tail_logprobs.float()[:, None])
    return _normalized(torch.cat(parts, dim=1) / objective.temperature)


def regularizer_values(logits: Tensor, targets: SparseTargets, objective: Objective) -> Tensor:
    """The regulariser at every position, float32 [N], in nats; zeros for `none`. logits: [N, V], any float dtype.

    masked-kl with bucket is a lower bound of the exact value, with groups a tighter one (data processing), equal to it
    for K = V - 1; sampled is unbiased for it; renormalize says nothing about T. Value 0 and gradient 0 at q = p
    (sampled: the gradient only in expectation). No masked form has a gradient at the label. A formula of one's own
    compares the outcomes of full KL, the label first.
    """
    if objective.regularizer == "none":
        return torch.zeros(len(targets), device=logits.device)
    log_p = base_outcomes(targets, objective)
    labels = targets.label_ids.long()[:, None]
    z = logits.float()
    top = z.detach().scatter(1, labels, -torch.inf).amax(dim=1, keepdim=True)
    z = z - torch.where(top == -torch.inf, 0.0, top)  # the size of the logits would cost digits
    rest = z.scatter(1, labels, -torch.inf)
    log_q, norm = _adapted_outcomes(z, rest, targets, objective)
    if objective.tail == "sampled":
        assert targets.draw_ids is not None
        values = sampled_kl(log_p, log_q, rest.gather(1, targets.draw_ids.long()) - norm, targets)
    else:
        form = objective.regularizer, objective.part_weight, targets.num_groups
        values = divergence(log_p, log_q, *form) * objective.temperature**2
    if objective.weighting == "non-target-mass":
        values = values * base_rest(targets).exp()
    if objective.masked and objective.min_adapted_rest > 0:
        log_rest = (rest.logsumexp(dim=1) - z.logsumexp(dim=1)).detach()
        values = torch.where(log_rest >= math.log(objective.min_adapted_rest), values, 0.0)
    return values


def divergence(log_p: Tensor, log_q: Tensor, regularizer: str, part_weight: float = 1.0, num_groups: int = 0) -> Tensor:
    """KL(P || Q), KL(Q || P) or JS(P, Q), [N], of log-probabilities [N, J] over outcomes; 0 log 0 = 0.

    dkd: part_weight * KL of (P(y), 1 - P(y)) + KL without the label, which is the first outcome. tad: KL(P || Q) with
    T, the last num_groups outcomes, as one + part_weight * P(T) * KL within T. Or a formula of the user's own
    (FILE.py:FUNCTION), which is given -1e4 for -inf. Raises `TrainingFailed` unless that gives a number a position.
    """
    if names_function(regularizer):
        return own_divergence(log_p, log_q, regularizer)
    if regularizer == "dkd":
        of_label, of_rest = zip(split_label(log_p), split_label(log_q), strict=True)
        return part_weight * _kl(*of_label) + _kl(*of_rest)
    if regularizer == "tad":
        (of_head, within), (of_head_q, within_q) = split_tail(log_p, num_groups), split_tail(log_q, num_groups)
        return _kl(of_head, of_head_q) + part_weight * of_head[:, -1].exp() * _kl(within, within_q)
    if regularizer == "masked-reverse-kl":
        return _kl(log_q, log_p)
    if regularizer == "masked-js":
        log_m = torch.logaddexp(_finite(log_p), _finite(log_q)) - math.log(2)
        return (_kl(log_p, log_m) + _kl(log_q, log_m)) / 2
    return _kl(log_p, log_q)


def split_label(logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Of log P [N, J], the label first: the log of (P(y), 1 - P(y)), [N, 2], and log P without y, [N, J - 1]."""
    rest = _logsumexp(logprobs[:, 1:], empty=-torch.inf)
    return torch.cat([logprobs[:, :1], rest], dim=1), logprobs[:, 1:] - torch.where(rest == -torch.inf, 0.0, rest)


def split_tail(logprobs: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Of log P [N, J], T the last G = num_groups outcomes: log P with T as one, [N, J - G + 1]; within T, [N, G]."""
    tail = _logsumexp(logprobs[:, -num_groups:], empty=-torch.inf)
    within = logprobs[:, -num_groups:] - torch.where(tail == -torch.inf, 0.0, tail)
    return torch.cat([logprobs[:, :-num_groups], tail], dim=1), within


def own_divergence(log_p: Tensor, log_q: Tensor, name: str) -> Tensor:
    """A formula of the user's own, [N]; log_p and log_q: [N, J], where an outcome without mass has -1e4."""
    found = formula(name).function(*(torch.where(x > NO_MASS, x, NO_MASS) for x in (log_p, log_q)))
    if not isinstance(found, Tensor) or found.shape != log_p.shape[:1]:
        what = f"a tensor of shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise TrainingFailed(
            f"regularising by {name}: expected a tensor with a number for each of {len(log_p)} positions, found {what}"
            ". Sum over the outcomes, the last dimension, and over nothing else."
        )
    return found


def group_logsumexp(values: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """logsumexp of values [N, V] within each group, [N, G]; groups: [V]. -inf, and no gradient, where nothing is."""
    index = groups.long().expand_as(values)
    top = values.new_full((len(values), num_groups), -torch.inf)
    top = top.scatter_reduce(1, index, values.detach(), "amax")
    top = torch.where(top > -torch.inf, top, 0.0)
    sums = torch.zeros_like(top).scatter_add(1, index, (values - top.gather(1, index)).exp())
    return torch.where(sums > 0, top + torch.where(sums > 0, sums, 1.0).log(), -torch.inf)


def _adapted_outcomes(z: Tensor, rest: Tensor, targets: SparseTargets, objective: Objective) -> tuple[Tensor, Tensor]:
    """log Q [N, J] over the outcomes of `base_outcomes`, and what normalises it [N, 1]. rest: z with -inf at y."""
    labels, kept = targets.label_ids.long()[:, None], targets.alternative_ids.long()
    present = kept != labels
    parts = [] if objective.masked else [z.gather(1, labels)]
    parts.append(torch.where(present, z.gather(1, kept), -torch.inf))
    beyond = rest.scatter(1, kept, -torch.inf)
    if objective.tail == "groups":
        assert targets.token_groups is not None and targets.tail_group_logprobs is not None
        parts.append(group_logsumexp(beyond, targets.token_groups, targets.tail_group_logprobs.shape[1]))
    elif objective.tail != "renormalize":
        parts.append(_logsumexp(beyond, empty=-torch.inf))
    outcomes = torch.cat(parts, dim=1) / objective.temperature
    norm = _logsumexp(outcomes)
    return outcomes - norm, norm


def sampled_kl(log_p: Tensor, log_q: Tensor, log_q_draws: Tensor, targets: SparseTargets) -> Tensor:
    """Kept outcomes exactly, the tail by its draws: sum_S P log(P/Q) + P_T / M sum_i log(P(c_i) / Q(c_i)), [N].

    log_p, log_q: [N, J], the last outcome T; log_q_draws: log Q(c_i), [N, M].
    """
    assert targets.draw_logprobs is not None
    has_tail = targets.tail_logprobs[:, None] > -torch.inf
    within = targets.draw_logprobs.float() - torch.where(has_tail, targets.tail_logprobs.float()[:, None], 0.0)
    log_p_draws = torch.where(has_tail, log_p[:, -1:] + within, 0.0)
    log_q_draws = torch.where(has_tail, log_q_draws, 0.0)
    return _kl(log_p[:, :-1], log_q[:, :-1]) + log_p[:, -1].exp() * (log_p_draws - log_q_draws).mean(dim=1)


def _check_tail(targets: SparseTargets, objective: Objective) -> None:
    needed = {"groups": ("tail_group_logprobs", "token_groups"), "sampled": ("draw_ids", "draw_logprobs")}
    for name in needed.get(objective.tail, ()):
        if getattr(targets, name) is None:
            raise ValueError(f"tail {objective.tail}: expected targets with {name}, found none")


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum p (log p - log q), [N]; outcomes with p = 0 have no term and no gradient."""
    present = log_p.exp() > 0  # what underflows has no mass either: 0 times inf is NaN
    p, q = torch.where(present, log_p, 0.0), torch.where(present, log_q, 0.0)
    return torch.where(present, p.exp() * (p - q), 0.0).sum(dim=1)


def _finite(logprobs: Tensor) -> Tensor:
    """-inf as a number that no mass reaches, without a gradient: logaddexp of two -inf has none."""
    return torch.where(logprobs > -torch.inf, logprobs, -1e30)


def _normalized(logprobs: Tensor) -> Tensor:
    """Over the last dimension, so that the masses sum to 1; -inf stays."""
    return logprobs - _logsumexp(logprobs)


def _logsumexp(values: Tensor, empty: float = 0.0) -> Tensor:
    """Over the last dimension, kept; `empty`, and no gradient, where every value is -inf."""
    nothing = (values == -torch.inf).all(dim=-1, keepdim=True)
    return torch.where(nothing, empty, torch.where(nothing, 0.0, values).logsumexp(dim=-1, keepdim=True))
