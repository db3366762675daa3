"""The formulas, as plain as the paper: cross-entropy and the regularisers, per position, in nats.

Tensors only: knows neither storage nor models. Everything is float32 at least and in log space, since 1 - p(label)
cancels; masking is by `where`, never by multiplication. docs/loss.md derives what stands here.
Shapes: N positions, V vocabulary, K alternatives. p the base, q the adapted distribution, y the label, S the kept
alternatives, T the tail (neither y nor in S).
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Regularizer = Literal["masked-kl", "full-kl", "none"]
Tail = Literal["bucket", "renormalize"]

LEAST_LOG_MASS = -9.210340
"""log 1e-4: below it the base leaves nothing beside the label to compare, and masked KL skips the position
(arXiv 2605.29498; 0.1 to 0.2 % of positions there)."""


@dataclass(frozen=True)
class SparseTargets:
    """What the base says at N positions.

    label_ids: int64 [N]; label_logprobs: float32 [N]; alternative_ids: int64 [N, K], the label's id where a row keeps
    fewer; alternative_logprobs: float32 [N, K], -inf there; tail_logprobs: float32 [N].
    """

    label_ids: Tensor
    label_logprobs: Tensor
    alternative_ids: Tensor
    alternative_logprobs: Tensor
    tail_logprobs: Tensor

    def __len__(self) -> int:
        return len(self.label_ids)

    def split(self, num_rows: int) -> list["SparseTargets"]:
        """Consecutive slices of at most num_rows positions."""
        fields = (
            self.label_ids,
            self.label_logprobs,
            self.alternative_ids,
            self.alternative_logprobs,
            self.tail_logprobs,
        )
        return [SparseTargets(*parts) for parts in zip(*(f.split(num_rows) for f in fields), strict=True)]


def cross_entropy(logits: Tensor, label_ids: Tensor) -> Tensor:
    """-log q(y), float32 [N]. logits: [N, V], any float dtype; label_ids: int64 [N]."""
    return F.cross_entropy(logits.float(), label_ids, reduction="none")


def regularizer_mask(targets: SparseTargets, regularizer: Regularizer) -> Tensor:
    """Positions that count, bool [N]: all for full KL; for masked KL those with 1 - p(y) >= 1e-4.

    1 - p(y) is the mass of alternatives and tail, which a quantised cache holds to a relative error; log p(y), in steps
    of 1/1024 nat, could not tell 1 - 4e-4 from 1.
    """
    if regularizer == "full-kl":
        return torch.ones_like(targets.label_ids, dtype=torch.bool)
    others = torch.cat([targets.alternative_logprobs, targets.tail_logprobs[:, None]], dim=1).float()
    counts: Tensor = others.logsumexp(dim=1) >= LEAST_LOG_MASS
    return counts


def masked_kl(logits: Tensor, targets: SparseTargets, tail: Tail) -> Tensor:
    """KL(p without y || q without y) over the kept alternatives, float32 [N].

    p'(c) = p(c) / (1 - p(y)) for c != y, q' likewise (arXiv 2605.29498, eq. 1).
    bucket: outcomes S and T, over V without y; a lower bound of the exact value, equal to it for K = V - 1.
    renormalize: outcomes S only, each side renormalised on S; says nothing about T.
    Value 0 and gradient 0 at q = p; no gradient at the label. logits: [N, V], any float dtype.
    """
    labels = targets.label_ids[:, None]
    q = logits.float().scatter(1, labels, -torch.inf)
    present = targets.alternative_logprobs > -torch.inf
    p_s, q_s = targets.alternative_logprobs.float(), q.gather(1, targets.alternative_ids)
    if tail == "renormalize":
        p_norm = _logsumexp(p_s)
        q_norm = _logsumexp(torch.where(present, q_s, -torch.inf))
        return _kl_terms(p_s - p_norm, q_s - q_norm, present).sum(dim=1)
    p_norm = _logsumexp(torch.cat([p_s, targets.tail_logprobs[:, None].float()], dim=1))
    q_norm = _logsumexp(q)
    kept = _kl_terms(p_s - p_norm, q_s - q_norm, present).sum(dim=1)
    return kept + _tail_term(q, targets, p_norm, q_norm)


def full_kl(logits: Tensor, targets: SparseTargets, tail: Tail) -> Tensor:
    """KL(p || q) with the label an outcome like any other, float32 [N].

    bucket: outcomes y, S and T; a lower bound of the exact value, equal to it for K = V - 1.
    renormalize: outcomes y and S only, each side renormalised on them.
    """
    q = logits.float()
    labels = targets.label_ids[:, None]
    present = F.pad(targets.alternative_logprobs > -torch.inf, (1, 0), value=True)
    p_s = torch.cat([targets.label_logprobs[:, None], targets.alternative_logprobs], dim=1).float()
    q_s = q.gather(1, torch.cat([labels, targets.alternative_ids], dim=1))
    if tail == "renormalize":
        p_norm = _logsumexp(p_s)
        q_norm = _logsumexp(torch.where(present, q_s, -torch.inf))
        return _kl_terms(p_s - p_norm, q_s - q_norm, present).sum(dim=1)
    p_norm = _logsumexp(torch.cat([p_s, targets.tail_logprobs[:, None].float()], dim=1))  # rounded rows miss 1 a little
    q_norm = _logsumexp(q)
    kept = _kl_terms(p_s - p_norm, q_s - q_norm, present).sum(dim=1)
    return kept + _tail_term(q.scatter(1, labels, -torch.inf), targets, p_norm, q_norm)


def regularizer_values(logits: Tensor, targets: SparseTargets, regularizer: Regularizer, tail: Tail) -> Tensor:
    """The regulariser at every position, float32 [N]; zeros for `none`."""
    if regularizer == "none":
        return torch.zeros(len(targets), device=logits.device)
    return (masked_kl if regularizer == "masked-kl" else full_kl)(logits, targets, tail)


def _tail_term(q: Tensor, targets: SparseTargets, p_norm: Tensor, q_norm: Tensor) -> Tensor:
    """p'_T (log p'_T - log q'_T), [N]; q: logits with the label at -inf. 0 where the base has no tail."""
    p_tail = (targets.tail_logprobs.float()[:, None] - p_norm).squeeze(1)
    has_tail = targets.tail_logprobs > -torch.inf
    rest = q.scatter(1, targets.alternative_ids, -torch.inf)
    rest = torch.where(has_tail[:, None], rest, 0.0)  # keeps the gradient of an empty logsumexp out
    q_tail = rest.logsumexp(dim=1) - q_norm.squeeze(1)
    return _kl_terms(p_tail, q_tail, has_tail)


def _kl_terms(p: Tensor, q: Tensor, present: Tensor) -> Tensor:
    """p (log p - log q) of log-probabilities, 0 where an outcome is absent, and no gradient there."""
    p, q = torch.where(present, p, 0.0), torch.where(present, q, 0.0)
    return torch.where(present, p.exp() * (p - q), 0.0)


def _logsumexp(values: Tensor) -> Tensor:
    """Over the last dimension, kept; 0 and no gradient where every value is -inf."""
    empty = (values == -torch.inf).all(dim=-1, keepdim=True)
    return torch.where(empty, 0.0, torch.where(empty, 0.0, values).logsumexp(dim=-1, keepdim=True))
