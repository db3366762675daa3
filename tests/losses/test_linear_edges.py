"""linear_loss at the edges of what it may be given, in the dtypes of a head, against the float64 oracles.

By PyTorch's slices; `scripts/test-kernels` runs it by Triton's kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support import oracles
from support.numerics_cases import EPSILON, Case, case_of, expected_loss, float32, forms, make_case, objective
from support.oracles import FloatArray

from logitcache.losses.fused import linear_loss

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def changed(change: Callable[[Case, FloatArray], None], shape: tuple[int, int, int] = (5, 131, 6)) -> Case:
    """A case whose student's logits were changed in place; 131 columns are no multiple of any tile."""
    case = make_case(shape, 1.0)
    logits = case.adapted.copy()
    change(case, logits)
    return replace(case, adapted=float32(logits))


def of_labels(case: Case, logits: FloatArray, by: float) -> None:
    logits[np.arange(len(logits)), case.labels] += by


def of_best(case: Case, logits: FloatArray, by: float) -> None:
    logits[np.arange(len(logits)), case.record.alternative_ids[:, 0]] += by


def of_one_in_the_tail(case: Case, logits: FloatArray, by: float) -> None:
    kept = {*case.labels, *case.record.alternative_ids.flat}
    logits[:, next(c for c in range(logits.shape[1] - 1, 0, -1) if c not in kept)] += by


def of_a_group(case: Case, logits: FloatArray, by: float) -> None:
    logits[:, case.token_groups == case.token_groups[0]] += by


def of_all(_case: Case, logits: FloatArray, by: float) -> None:
    logits += by


def labels_at_both_ends() -> Case:
    case = make_case((4, 131, 6), 1.0)
    labels = np.array([0, 130, 0, 130])
    record = oracles.record_oracle(case.base, labels, 6)
    return case_of(case.base, case.adapted, labels, record)


EDGES: dict[str, Callable[[], Case]] = {
    "labels at both ends": labels_at_both_ends,
    "no alternatives": lambda: make_case((4, 131, 0), 1.0),
    "all alternatives": lambda: make_case((4, 131, 130), 1.0),
    "one row": lambda: make_case((1, 131, 6), 1.0),
    "labels far above": lambda: changed(lambda c, z: of_labels(c, z, 200.0)),
    "labels far below": lambda: changed(lambda c, z: of_labels(c, z, -200.0)),
    "an alternative far above": lambda: changed(lambda c, z: of_best(c, z, 200.0)),
    "a token of the tail far above": lambda: changed(lambda c, z: of_one_in_the_tail(c, z, 200.0)),
    "a group at the last digit": lambda: changed(lambda c, z: of_a_group(c, z, -66.0)),
    "a group below the last digit": lambda: changed(lambda c, z: of_a_group(c, z, -70.0)),
    "a group that underflows": lambda: changed(lambda c, z: of_a_group(c, z, -120.0)),
    "all at ten thousand": lambda: changed(lambda c, z: of_all(c, z, 1e4)),
    "all at minus ten thousand": lambda: changed(lambda c, z: of_all(c, z, -1e4)),
}


@pytest.mark.parametrize("weight", [0.0, 0.7, 1e4])
@forms
@pytest.mark.parametrize("edge", EDGES)
def test_value_and_gradient(edge: str, form: Any, weight: float) -> None:
    made = EDGES[edge]()
    for dtype in DTYPES:
        z = made.logits.to(dtype).requires_grad_()
        case = replace(made, adapted=z.detach().double().numpy())
        ce, kl, gradient = expected_loss(case, form, weight)
        labels, targets = case.targets.label_ids, case.targets
        found = linear_loss(z, lambda h: h * 1, labels, targets, objective(form, tokens_per_loss_chunk=3), weight)
        (by_logits,) = torch.autograd.grad(found.loss, z)
        unit = replace(case, adapted=case.adapted - case.adapted.max(axis=1, keepdims=True)).unit()  # size costs none
        rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
        for actual, expected in ((found.ce, ce), (found.kl, kl)):
            assert abs(float(actual) - expected) <= 4 * len(labels) * unit + 8 * EPSILON * abs(expected)
        bound = 4 * unit * max(1.0, weight) + (8 * EPSILON + rounding) * np.abs(gradient)
        largest = float(torch.finfo(dtype).max)
        actual = by_logits.double().numpy()
        assert bool((np.abs(actual - np.clip(gradient, -largest, largest)) <= bound).all()), dtype
