"""Cases for the numerical tests: logits, a record rounded to float32 as it is stored, and the loss written plainly.

The oracles are given the rounded record and the very float32 logits, so that what is left is the error of the
code under test, not of its input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from support import oracles
from support.oracles import FloatArray, IntArray, OracleRecord, ValueAndGradient
from support.oracles_forms import (
    FORMS,
    FormsRecord,
    _outcomes,
    complete_record,
    counted_oracle,
    keep_fewer,
    regularizer_oracle,
)
from torch import Tensor

from logitcache.losses.formulas import Objective, SparseTargets, regularizer_values

EPSILON = 2.0**-23
Shape = tuple[int, int, int]  # N, V, K
SHAPES: list[Shape] = [(7, 2, 1), (5, 3, 2), (13, 50, 8), (4, 123, 122), (9, 252, 64), (3, 507, 1), (6, 20, 0)]
SCALES = [1.0, 6.0, 30.0]

forms = pytest.mark.parametrize("form", FORMS, ids="/".join)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
scales = pytest.mark.parametrize("scale", SCALES)


@dataclass(frozen=True)
class Case:
    """Base and adapted logits [N, V], exact in float32; labels; the record as stored; the group of each token."""

    base: FloatArray
    adapted: FloatArray
    labels: IntArray
    record: FormsRecord
    token_groups: IntArray

    @property
    def logits(self) -> Tensor:
        return torch.from_numpy(self.adapted).float()

    @property
    def targets(self) -> SparseTargets:
        return as_targets(self.record, self.labels, self.token_groups)

    def expected(self, form: Sequence[Any], adapted: FloatArray | None = None, **options: Any) -> ValueAndGradient:
        z = self.adapted if adapted is None else adapted
        return regularizer_oracle(self.record, z, self.labels, form[0], form[1], self.token_groups, **options)

    def counted(self, form: Sequence[Any], min_base_rest: float = 1e-4) -> Any:
        return counted_oracle(self.record, form[0], form[1], min_base_rest)

    def unit(self) -> float:
        """One rounding error of the largest logit or recorded log-probability."""
        r = self.record
        columns = (self.adapted, r.label_logprobs, r.alternative_logprobs, r.tail_logprobs)
        return EPSILON * max(1.0, *(float(np.abs(c[np.isfinite(c)]).max(initial=0.0)) for c in columns))


def float32(x: FloatArray | None) -> Any:
    return None if x is None else np.asarray(x).astype(np.float32).astype(np.float64)


def rounded(record: FormsRecord, to: Any = float32) -> FormsRecord:
    """The record with its log-probabilities rounded as storage does."""
    return FormsRecord(
        to(record.label_logprobs),
        record.alternative_ids,
        to(record.alternative_logprobs),
        to(record.tail_logprobs),
        to(record.tail_group_logprobs),
        record.draw_ids,
        to(record.draw_logprobs),
    )


def as_targets(record: FormsRecord, labels: IntArray, token_groups: IntArray) -> SparseTargets:
    """The record as tensors: the id of what is absent is the label's."""

    def ids(x: Any) -> Tensor:
        return torch.from_numpy(np.where(np.asarray(x) == oracles.PAD_ID, labels[:, None], x))

    def logs(x: Any) -> Tensor:
        return torch.from_numpy(np.asarray(x)).float()

    return SparseTargets(
        label_ids=torch.from_numpy(labels),
        label_logprobs=logs(record.label_logprobs),
        alternative_ids=ids(record.alternative_ids),
        alternative_logprobs=logs(record.alternative_logprobs),
        tail_logprobs=logs(record.tail_logprobs),
        tail_group_logprobs=logs(record.tail_group_logprobs),
        token_groups=torch.from_numpy(token_groups),
        draw_ids=ids(record.draw_ids),
        draw_logprobs=logs(record.draw_logprobs),
    )


def case_of(
    base: FloatArray,
    adapted: FloatArray,
    labels: IntArray,
    record: OracleRecord,
    groups: int = 16,
    draws: int = 6,
    token_groups: IntArray | None = None,
) -> Case:
    """The case with groups and draws added. Of 16 groups 3 and 7 are empty, 15 has but row 0's first alternative."""
    rng = np.random.default_rng(groups)
    if token_groups is None:
        token_groups = rng.choice([g for g in range(groups) if g not in (3, 7, 15)], size=base.shape[1])
        if groups == 16 and record.alternative_ids.size and record.alternative_ids[0, 0] != oracles.PAD_ID:
            token_groups[record.alternative_ids[0, 0]] = 15
    whole = complete_record(base, labels, record, token_groups, groups, draws, rng)
    return Case(base, adapted, labels, rounded(whole), token_groups)


def make_case(shape: Shape, scale: float, groups: int = 16, draws: int = 6, keep: Sequence[int] | None = None) -> Case:
    """Random logits of this scale, the adapted ones near the base; keep: how many alternatives each row keeps."""
    n, v, k = shape
    rng = np.random.default_rng([*shape, int(scale)])
    base = float32(rng.normal(size=(n, v)) * scale)
    adapted = float32(base + rng.normal(size=(n, v)) * (1 + scale / 5))
    labels = rng.integers(0, v, n)
    record = oracles.record_oracle(base, labels, k)
    if keep is not None:
        record = keep_fewer(record, keep)
    return case_of(base, adapted, labels, record, groups, draws)


def saturated_case() -> Case:
    """Base and adapted with all but exp(-40) on the label."""
    case = make_case((9, 40, 8), 1.0)
    base, adapted = case.base.copy(), case.adapted.copy()
    for x in (base, adapted):
        x[np.arange(9), case.labels] += 44.0
    return case_of(base, float32(adapted), case.labels, oracles.record_oracle(base, case.labels, 8))


def objective(form: Sequence[Any], **options: Any) -> Objective:
    return Objective(regularizer=form[0], tail=form[1], **options)


def found(case: Case, form: Sequence[Any], logits: Tensor | None = None, **options: Any) -> ValueAndGradient:
    """Values and d(sum)/d(logits) of the code under test."""
    leaf = (case.logits if logits is None else logits).clone().requires_grad_()
    values = regularizer_values(leaf, case.targets, objective(form, **options))
    assert values.dtype == torch.float32 and values.shape == case.labels.shape
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach().double().numpy(), gradient.double().numpy()


def assert_near(actual: ValueAndGradient, expected: ValueAndGradient, unit: float, roundings: float = 4.0) -> None:
    """Values and gradients [N, V], each row within some rounding errors of the numbers it is made of."""
    for one, two in zip(actual, expected, strict=True):
        assert one.shape == two.shape
        bound = roundings * (unit + EPSILON * np.abs(two))
        wrong = ~(np.abs(one - two) <= bound)
        assert not wrong.any(), f"at {np.argwhere(wrong)[:5].tolist()}: {one[wrong][:5]} is not {two[wrong][:5]}"


# --- the plain form: full logits, autograd, any dtype


def plain_values(logits: Tensor, case: Case, form: Sequence[Any], temperature: float = 1.0) -> Tensor:
    """The formulas as anyone would write them, row by row; for records without zeros."""
    values = []
    for i, row in enumerate(oracles._rows(case.record, case.labels, logits.shape[1])):
        x, label, full = logits[i] / temperature, int(case.labels[i]), form[0] == "full-kl"
        if form[1] == "sampled":
            values.append(_plain_sampled(x, case.record, i, row, label, full))
            continue
        outcomes = [(o.tokens, o.log_p) for o in _outcomes(row, form[1], case.token_groups, case.record, i)]
        outcomes = ([([label], row.log_p_label)] if full else []) + outcomes
        if not outcomes:
            values.append(x.sum() * 0)
            continue
        log_p = torch.tensor([p for _, p in outcomes], dtype=x.dtype).div(temperature).log_softmax(0)
        log_q = x[[c for tokens, _ in outcomes for c in tokens]].log_softmax(0)
        singles = sum(len(tokens) == 1 for tokens, _ in outcomes)
        if singles != len(outcomes):
            parts = log_q.split([len(tokens) for tokens, _ in outcomes])
            log_q = torch.stack([part.logsumexp(0) for part in parts])
        values.append(temperature**2 * _plain_divergence(log_p, log_q, form[0]))
    return torch.stack(values)


def _plain_divergence(log_p: Tensor, log_q: Tensor, regularizer: str) -> Tensor:
    if regularizer == "masked-reverse-kl":
        return (log_q.exp() * (log_q - log_p)).sum()
    if regularizer == "masked-js":
        log_m = torch.logaddexp(log_p, log_q) - float(np.log(2))
        return (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum() / 2
    return (log_p.exp() * (log_p - log_q)).sum()


def _plain_sampled(x: Tensor, record: FormsRecord, i: int, row: Any, label: int, full: bool) -> Tensor:
    kept, logs = ([label], [row.log_p_label]) if full else ([], [])
    kept, logs = kept + row.kept, logs + row.log_p_kept
    total = torch.tensor([*logs, row.log_p_tail], dtype=x.dtype).logsumexp(0)
    scope = [c for c in range(x.shape[0]) if full or c != label]
    log_q = torch.zeros_like(x).index_add(0, torch.tensor(scope), x[scope].log_softmax(0))
    log_p = torch.tensor(logs, dtype=x.dtype) - total
    value = (log_p.exp() * (log_p - log_q[kept])).sum()
    if row.tail and record.draw_ids is not None and record.draw_logprobs is not None:
        drawn = torch.tensor(record.draw_logprobs[i], dtype=x.dtype) - total
        share = (torch.tensor(row.log_p_tail, dtype=x.dtype) - total).exp() / drawn.shape[0]
        value = value + share * (drawn - log_q[record.draw_ids[i].tolist()]).sum()
    return value


def plain_loss(logits: Tensor, case: Case, form: Sequence[Any], kl_weight: float) -> Tensor:
    """sum of -log q(y) + kl_weight * sum over the positions that count."""
    ce = -logits.log_softmax(1)[torch.arange(len(case.labels)), torch.from_numpy(case.labels)].sum()
    return ce + kl_weight * plain_values(logits, case, form)[torch.from_numpy(case.counted(form))].sum()


def expected_loss(
    case: Case, form: Sequence[Any], kl_weight: float, logits: FloatArray | None = None, **options: Any
) -> tuple[float, float, FloatArray]:
    """ce, kl and the gradient [N, V] of ce + kl_weight * kl by the logits, from the oracles."""
    z = case.adapted if logits is None else logits
    ce, ce_gradient = oracles.cross_entropy_oracle(z, case.labels)
    counted = case.counted(form, options.pop("min_base_rest", 1e-4))
    kl, kl_gradient = case.expected(form, z, **options)
    gradient = ce_gradient + kl_weight * np.where(counted[:, None], kl_gradient, 0.0)
    return float(ce.sum()), float(kl[counted].sum()), gradient
