"""The regulariser of a slice of logits in closed form: its values, and its gradient at each outcome.

Owns what `fused` makes of the logits of a slice: the tail in place (`Tail`), the outcomes that are compared and their
gradient (`Compared`), and how a gradient at an outcome is shared out to its tokens. The formulas are those of
`formulas`. Tensors only.
Shapes: n positions of a slice, V vocabulary, K alternatives, G groups, J outcomes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from logitcache.settings import names_function

from .formulas import (
    Objective,
    SparseTargets,
    base_outcomes,
    base_rest,
    divergence,
    regularizer_mask,
    sampled_kl,
    split_label,
    split_tail,
)

LEAST_GROUP_SUM = 1e-30
"""Of exp(z - max): below it a group's sum has lost digits, and the slice goes the plain way."""

CACHED_BYTES = 4 * 2**20
"""Logits that are worked on together on a processor: four passes over more would each come from memory."""

_COLUMNS = 16_384
"""Of a slice whose gradient is made at a time, where it differs by group."""


class Tail:
    """The tokens of a slice that are neither label nor kept: e = exp(z - max z), [n, V], in the buffer of z."""

    def __init__(self, buffer: Tensor) -> None:
        found = [_exponentials(rows) for rows in buffer.split(_rows_together(buffer))]
        tops, sums = zip(*found, strict=True)
        self.buffer, self.top, self.sum = buffer, torch.cat(tops), torch.cat(sums)  # top: -inf where there is no tail
        self.top_from_origin = self.top
        self.groups: Tensor | None = None
        self.group_sums: Tensor | None = None

    def measure_from(self, origin: Tensor) -> None:
        """Give logarithms of sums of exp(z - origin) from now on; origin: [n, 1]."""
        self.top_from_origin = self.top - origin

    @property
    def log_sum(self) -> Tensor:
        """log sum of exp(z), [n, 1]; -inf where there is no tail."""
        return self.top_from_origin + self.sum.log()

    def split(self, groups: Tensor, one_hot: Tensor) -> Tensor:
        """log of the sum in each group, [n, G]."""
        with torch.autocast(self.buffer.device.type, enabled=False):
            self.group_sums = self.buffer @ one_hot
        self.groups = groups
        return self.top_from_origin + self.group_sums.log()

    def first_of_top(self, rows: Tensor) -> Tensor:
        """Of these rows the first token that has the largest logit, [rows]; to be asked before `scale`."""
        return (self.buffer[rows] == 1).int().argmax(dim=1)

    def factors(self, gradient: Tensor, parts: Tensor | None) -> Tensor:
        """By what e is multiplied in `scale`: one number a row, [n, 1], or one a row and group, [n, G]."""
        of_tail = share(gradient, self.sum)
        if parts is None or (self.group_sums is None and not parts.shape[1]):
            return of_tail
        return of_tail + share(parts, self.sum if self.group_sums is None else self.group_sums)

    def scale(self, gradient: Tensor, parts: Tensor | None = None) -> None:
        """e becomes the gradient: `gradient` [n, 1] of T shared out by e, and `parts` of T [n, 1] or its groups."""
        factors = self.factors(gradient, parts)
        if self.groups is None or factors.shape[1] == 1:
            self.buffer.mul_(factors)
            return
        for start in range(0, self.buffer.shape[1], _COLUMNS):
            columns = slice(start, start + _COLUMNS)
            self.buffer[:, columns].mul_(factors.index_select(1, self.groups[columns]))

    def add(self, ids: Tensor, gradient: Tensor, logits: Tensor) -> None:
        """After `scale`: `gradient` [n, 1] more at each drawn token, once a draw. ids, logits: the draws', [n, M]."""
        self.buffer.scatter_add_(1, ids, gradient.expand(ids.shape))


def _exponentials(logits: Tensor) -> tuple[Tensor, Tensor]:
    """z becomes e; the largest z and the sum of e, [n, 1]."""
    top = logits.amax(dim=1, keepdim=True)
    return top, logits.sub_(torch.where(top == -torch.inf, 0.0, top)).exp_().sum(dim=1, keepdim=True)


def _rows_together(buffer: Tensor) -> int:
    """All of a GPU's; of a processor's as many as stay in its cache from one pass to the next."""
    size = max(1, buffer.shape[1] * buffer.element_size())
    return max(1, CACHED_BYTES // size if buffer.device.type == "cpu" else len(buffer))


@dataclass
class Compared:
    """The regulariser of a slice: values [n], its gradient at the logit of each outcome [n, J] and at each draw [n, 1],
    times kl_weight; 0 where a position does not count."""

    values: Tensor
    gradient: Tensor
    drawn: Tensor | None

    @staticmethod
    def of(
        z_kept: Tensor,
        tail: Tail,
        z_drawn: Tensor | None,
        log_rest: Tensor,
        targets: SparseTargets,
        objective: Objective,
        kl_weight: float | Tensor,
        groups: Callable[[], tuple[Tensor, Tensor]],
    ) -> "Compared | None":
        """None where digits would be lost. z_kept: label and alternatives; log_rest: log(1 - q(y)); groups: the group
        of each token, [V], and the same as one-hot rows."""
        log_p = base_outcomes(targets, objective)
        parts = [z_kept[:, 1:] if objective.masked else z_kept]
        if objective.tail == "groups":
            parts.append(tail.split(*groups()))
            if _divides_by_q(objective.regularizer) and tail.group_sums is not None:
                counted = log_p[:, -tail.group_sums.shape[1] :] > -torch.inf
                if bool((counted & (tail.group_sums < LEAST_GROUP_SUM)).any()):
                    return None
        elif objective.tail != "renormalize":
            parts.append(tail.log_sum)
        heated = torch.cat(parts, dim=1) / objective.temperature
        norm = heated.logsumexp(dim=1, keepdim=True)
        log_q = heated - torch.where(norm == -torch.inf, 0.0, norm)
        if objective.tail == "sampled":
            assert z_drawn is not None
            values = sampled_kl(log_p, log_q, z_drawn - norm, targets)
            gradient, drawn = log_q.exp(), -log_p[:, -1:].exp() / z_drawn.shape[1]
            gradient[:, :-1] -= log_p[:, :-1].exp()
        else:
            form = objective.regularizer, objective.part_weight, targets.num_groups
            values = divergence(log_p, log_q, *form) * objective.temperature**2
            gradient = outcome_gradient(log_p, log_q, *form) * objective.temperature
            drawn = None
        counts = regularizer_mask(targets, objective)
        if objective.masked and objective.min_adapted_rest > 0:
            counts = counts & (log_rest >= math.log(objective.min_adapted_rest))
        weights = base_rest(targets).exp() if objective.weighting == "non-target-mass" else torch.ones_like(values)
        scale = (weights * kl_weight)[:, None]
        return Compared(
            torch.where(counts, values * weights, 0.0),
            torch.where(counts[:, None], times(scale, gradient), 0.0),
            None if drawn is None else torch.where(counts[:, None], times(scale, drawn), 0.0),
        )


def outcome_gradient(
    log_p: Tensor, log_q: Tensor, regularizer: str, part_weight: float = 1.0, num_groups: int = 0
) -> Tensor:
    """d divergence / d (logit of each outcome), [n, J], Q being the softmax of these logits.

    KL(P || Q): Q - P. KL(Q || P): Q (log Q/P - KL(Q || P)). JS: Q (log Q/m - KL(Q || m)) / 2, m = (P + Q) / 2. dkd:
    -d at the label and d Q' + Q' - P' beside it, with P' and Q' without the label, normalised, and d = part_weight
    ((1 - Q(y)) - (1 - P(y))). tad: Q - P, and in the tail (part_weight - 1) (P(T) Q' - P) more, Q' within T. A formula
    of one's own: s - Q sum s, with its derivatives s by log Q, by autograd.
    """
    q = log_q.exp()
    if names_function(regularizer):
        with torch.enable_grad():
            leaf = log_q.detach().requires_grad_()
            (slopes,) = torch.autograd.grad(divergence(log_p, leaf, regularizer).sum(), leaf)
        return slopes - q * slopes.sum(dim=1, keepdim=True)
    if regularizer in ("masked-kl", "full-kl"):
        return q - log_p.exp()
    if regularizer == "dkd":
        (of_label, p_rest), (of_label_q, q_rest) = split_label(log_p), split_label(log_q)
        moved = part_weight * (of_label_q[:, 1:].exp() - of_label[:, 1:].exp())
        return torch.cat([-moved, moved * q_rest.exp() + q_rest.exp() - p_rest.exp()], dim=1)
    if regularizer == "tad":
        gradient, p = q - log_p.exp(), log_p[:, -num_groups:].exp()
        within = split_tail(log_q, num_groups)[1].exp()
        gradient[:, -num_groups:] += (part_weight - 1) * (p.sum(dim=1, keepdim=True) * within - p)
        return gradient
    against, factor = log_p, 1.0
    if regularizer == "masked-js":
        against, factor = torch.logaddexp(log_p, log_q) - math.log(2), 0.5
    ratio = torch.where(q > 0, log_q - against, 0.0)
    return factor * q * (ratio - (q * ratio).sum(dim=1, keepdim=True))


def _divides_by_q(regularizer: str) -> bool:
    """Whether the gradient within an outcome divides by its Q, which must then not have underflowed."""
    return regularizer in ("masked-kl", "full-kl", "dkd", "tad") or names_function(regularizer)


def times(weight: float | Tensor, value: Tensor) -> Tensor:
    """weight * value, 0 where the weight is: without a weight an infinite value is nobody's business."""
    weight = torch.as_tensor(weight, dtype=value.dtype, device=value.device)
    return torch.where(weight == 0, 0.0, weight * value)


def share(gradient: Tensor, total: Tensor) -> Tensor:
    """gradient / total, 0 where there is nothing to share it out to."""
    return torch.where(total > 0, gradient / torch.where(total > 0, total, 1.0), 0.0)
