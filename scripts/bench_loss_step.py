"""One loss step: what everybody is given, their quantities by definition in float64, and a step measured in a process.

Owns what scripts/bench_loss.py (ours) and bench_loss_peers.py (the others, each in its own environment) have in common,
so that all are measured by the same lines. Must not import `logitcache`, which those environments do not have.
Shapes: N positions, D hidden, V vocabulary, K tokens of the teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from bench_common import PeakMemory, timed
from torch import Tensor

CHECKED_ROWS = 64
ROWS_AT_ONCE = 64
LEAST_REST = 1e-4
NEAR = {"float32": 1e-4, "bfloat16": 3e-2}
"""What a gradient may be off by, of the largest, before it counts as another quantity's; the loss too, of itself."""

Loss = Callable[[Tensor], Tensor]
"""hidden [N, D] -> float scalar."""
Regularizer = Callable[[Tensor, Tensor, "Inputs"], Tensor]
"""(log q, log p, inputs) -> [n], from dense float64 [n, V]."""


@dataclass(frozen=True)
class Teacher:
    """What a peer is given of the teacher at N positions: a live one its hidden states (its head is the student's), an
    offline one the K most probable tokens whether the label is among them or not, int64 and float32 [N, K]."""

    hidden: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


@dataclass(frozen=True)
class Inputs:
    """hidden [N, D] and weight [V, D] in the run's dtype; labels int64 [N]; the teacher as peers get it, and as we do:
    `SparseTargets`, None where ours is not measured."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    teacher: Teacher
    targets: Any = None

    def first(self, num: int) -> Inputs:
        """The first positions."""
        return self.rows(slice(num))

    def rows(self, rows: slice) -> Inputs:
        """Some of the positions."""
        teacher = replace(self.teacher, **_rows_of(self.teacher, rows))
        targets = None if self.targets is None else replace(self.targets, **_rows_of(self.targets, rows))
        return Inputs(self.hidden[rows], self.weight, self.labels[rows], teacher, targets)


def _rows_of(table: Any, rows: slice) -> dict[str, Tensor]:
    columns = {f.name: getattr(table, f.name) for f in fields(table) if f.name != "token_groups"}
    return {name: column[rows] for name, column in columns.items() if column is not None}


def load_inputs(path: Path, device: str, targets: Callable[..., Any] | None = None) -> Inputs:
    """What was saved `asdict`, on the device; targets: what makes `Inputs.targets` of their columns."""
    made: dict[str, Any] = torch.load(path, map_location=device)
    ours = targets(**made["targets"]) if targets else None
    return Inputs(**made | {"teacher": Teacher(**made["teacher"]), "targets": ours})


# Quantities by definition, from dense log-probabilities


def full_kl(log_q: Tensor, log_p: Tensor, _inputs: Inputs) -> Tensor:
    """KL(p || q), [n]."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def cross_entropy_of_teacher(log_q: Tensor, log_p: Tensor, _inputs: Inputs) -> Tensor:
    """KL(p || q) + H(p), [n]."""
    return -(log_p.exp() * log_q).sum(dim=1)


def jensen_shannon(log_q: Tensor, log_p: Tensor, inputs: Inputs) -> Tensor:
    """Half KL(p || m) and half KL(q || m), m their mean, [n]."""
    log_m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).log()
    return full_kl(log_m, log_p, inputs) / 2 + full_kl(log_m, log_q, inputs) / 2


def top_k_both_renormalised(log_q: Tensor, log_p: Tensor, inputs: Inputs) -> Tensor:
    """KL over the top-k, each side renormalised on it, [n]."""
    p, q = (log.gather(1, inputs.teacher.top_ids).log_softmax(dim=1) for log in (log_p, log_q))
    return (p.exp() * (p - q)).sum(dim=1)


def top_k_zero_tail(log_q: Tensor, log_p: Tensor, inputs: Inputs) -> Tensor:
    """KL from the teacher renormalised on its top-k to the student as it is, [n]."""
    p = log_p.gather(1, inputs.teacher.top_ids).log_softmax(dim=1)
    return (p.exp() * (p - log_q.gather(1, inputs.teacher.top_ids))).sum(dim=1)


def masked_kl(log_q: Tensor, log_p: Tensor, targets: Any, tail: str) -> Tensor:
    """Ours: KL(p without y || q without y) over the outcomes of a tail, [n]; targets: the columns of `SparseTargets`,
    of which only ids are read; 0 where the teacher leaves the label less than 1e-4."""
    labels, kept = targets.label_ids.long()[:, None], targets.alternative_ids.long()
    p, q = (log.scatter(1, labels, -torch.inf).log_softmax(dim=1).exp() for log in (log_p, log_q))
    p_kept, q_kept = p.gather(1, kept), q.gather(1, kept)
    p_tail, q_tail = (x.scatter(1, kept, 0.0) for x in (p, q))
    if tail == "renormalize":
        p_kept, q_kept = (x / x.sum(dim=1, keepdim=True) for x in (p_kept, q_kept))
    values = _kl(p_kept, q_kept)
    if tail == "bucket":
        values = values + _kl(p_tail.sum(dim=1, keepdim=True), q_tail.sum(dim=1, keepdim=True))
    if tail == "groups":
        index = targets.token_groups.long()
        zero = p.new_zeros(len(p), targets.tail_group_logprobs.shape[1])
        values = values + _kl(zero.index_add(1, index, p_tail), zero.index_add(1, index, q_tail))
    if tail == "sampled":
        draws = targets.draw_ids.long()
        values = values + p_tail.sum(dim=1) * (p.gather(1, draws) / q.gather(1, draws)).log().mean(dim=1)
    rest = log_p.scatter(1, labels, -torch.inf).logsumexp(dim=1).exp()
    return torch.where(rest >= LEAST_REST, values, 0.0)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """sum p log(p / q), of probabilities, [n]."""
    return torch.where(p > 0, p * (p / q).log(), 0.0).sum(dim=1)


QUANTITIES: dict[str, tuple[bool, Regularizer | None]] = {
    "CE": (True, None),
    "full KL": (False, full_kl),
    "JSD": (False, jensen_shannon),
    "CE + full KL": (True, full_kl),
    "CE + JSD": (True, jensen_shannon),
    "CE + full KL + H(p)": (True, cross_entropy_of_teacher),
    "CE + top-k KL, both renormalised": (True, top_k_both_renormalised),
    "CE + top-k KL, zero tail": (True, top_k_zero_tail),
}
"""By name, whether the label's cross-entropy is in it and what else; both as means over N, with weight 1."""


def definition(inputs: Inputs, ce: bool, regularizer: Regularizer | None) -> tuple[float, Tensor]:
    """The mean loss and its gradient [N, D] in float64, a block of rows at a time; a label of -100 has no CE."""
    weight, num, loss, gradients = inputs.weight.double(), len(inputs.labels), 0.0, []
    for start in range(0, num, ROWS_AT_ONCE):
        part = inputs.rows(slice(start, start + ROWS_AT_ONCE))
        hidden = part.hidden.detach().double().requires_grad_()
        log_q = (hidden @ weight.T).log_softmax(dim=1)
        values = F.nll_loss(log_q, part.labels, reduction="sum") if ce else log_q.new_zeros(())
        if regularizer is not None:
            log_p = (part.teacher.hidden.double() @ weight.T).log_softmax(dim=1)
            values = values + regularizer(log_q, log_p, part).sum()
        (values / num).backward()
        assert hidden.grad is not None
        loss += values.item() / num
        gradients.append(hidden.grad)
    return loss, torch.cat(gradients)


# Measurement, in a process of its own


def take_step(loss: Loss, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient."""
    hidden.grad = None
    value = loss(hidden)
    value.backward()
    assert hidden.grad is not None
    return value.detach(), hidden.grad


def measure_step(
    job: dict[str, Any],
    inputs: Inputs,
    tiny: Inputs,
    loss_of: Callable[[Inputs], Loss],
    by_definition: Callable[[Inputs], tuple[float, Tensor]],
    compiles: bool = False,
) -> dict[str, Any]:
    """The errors where the job asks for them, and {seconds, growth} where it has timed steps.

    The tiny step finds out whether the method runs at all, and starts what a process starts once. Errors come before
    time, or a method that fails there would lose it; of timed steps they are those of the first positions. Compiled
    code is forgotten in between, or the next would be made for any shape and not for its own.
    """
    take_step(loss_of(tiny), tiny.hidden.requires_grad_())
    torch.compiler.reset()
    result: dict[str, Any] = {}
    if job["check"]:
        checked = inputs.first(CHECKED_ROWS) if job["inner"] else inputs
        result |= errors(checked, loss_of(checked), by_definition(checked))
        torch.compiler.reset()
    if job["inner"]:
        loss, hidden = loss_of(inputs), inputs.hidden.requires_grad_()
        for _ in range(2 if job["device"] == "cuda" else int(compiles)):  # kernels are chosen or compiled by shape
            take_step(loss, hidden)
        hidden.grad = None
        with PeakMemory(job["device"]) as peak:
            seconds = [timed(lambda: take_step(loss, hidden), job["device"]) for _ in range(job["inner"])]
        result |= {"seconds": median(seconds), "growth": peak.growth}
    return result


def errors(inputs: Inputs, loss: Loss, expected: tuple[float, Tensor]) -> dict[str, float]:
    """Largest differences from the definition, and what they are to be compared with."""
    value, gradient = take_step(loss, inputs.hidden.detach().requires_grad_())
    return {
        "loss_error": abs(value.item() - expected[0]),
        "gradient_error": (gradient.double() - expected[1]).abs().max().item(),
        "largest_gradient": expected[1].abs().max().item(),
        "loss": expected[0],
    }


def is_another_quantity(found: dict[str, Any], dtype: str) -> bool:
    """Whether a method's errors are larger than what its dtype explains."""
    near = NEAR[dtype]
    return bool(
        not found["loss_error"] <= near * abs(found["loss"])
        or not found["gradient_error"] <= near * found["largest_gradient"]
    )
