"""Tail-aware distillation: KL of head and tail, and what is within the tail with a weight of its own."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from support import oracles
from support.exact_head import ExactHead
from support.numerics_cases import Case, make_case

from logitcache.errors import InvalidSettings
from logitcache.losses import compared
from logitcache.losses.formulas import Objective, divergence, regularizer_values
from logitcache.losses.fused import linear_loss

KL_WEIGHT = 0.7


def expected(case: Case, tail_weight: float) -> oracles.ValueAndGradient:
    """KL with the tail as one, and tail_weight times what groups add to it (the chain rule), both from their oracles:
    values [N], gradients [N, V]."""
    as_one, by_one = case.expected(("full-kl", "bucket"))
    in_groups, by_groups = case.expected(("full-kl", "groups"))
    return as_one + tail_weight * (in_groups - as_one), by_one + tail_weight * (by_groups - by_one)


@pytest.mark.parametrize("tail_weight", [0.3, 1.0, 20.0])
@pytest.mark.parametrize("shape", [(7, 2, 1), (13, 50, 8), (4, 123, 122), (9, 252, 64), (6, 20, 0)], ids=str)
def test_values_and_gradients_are_the_oracles(
    shape: tuple[int, int, int], tail_weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(shape, 1.5)
    values, gradient = expected(case, tail_weight)
    scale = max(1.0, tail_weight)
    objective = Objective("tad", "groups", tail_weight=tail_weight)
    leaf = case.logits.requires_grad_()
    found = regularizer_values(leaf, case.targets, objective)
    np.testing.assert_allclose(found.detach().numpy(), values, rtol=1e-5, atol=1e-6 * scale)
    (by_autograd,) = torch.autograd.grad(found.sum(), leaf)
    np.testing.assert_allclose(by_autograd.numpy(), gradient, rtol=1e-5, atol=1e-6 * scale)
    _, ce_gradient = oracles.cross_entropy_oracle(case.adapted, case.labels)
    for chunk in (1, 4, None, "plainly"):
        if chunk == "plainly":
            monkeypatch.setattr(compared, "LEAST_GROUP_SUM", 1e30)
        rows = None if chunk == "plainly" else chunk
        head = ExactHead(case)
        chosen = Objective("tad", "groups", tail_weight=tail_weight, tokens_per_loss_chunk=rows)  # type: ignore[arg-type]
        result = linear_loss(head.hidden, head.linear, torch.from_numpy(case.labels), case.targets, chosen, KL_WEIGHT)
        assert float(result.kl) == pytest.approx(values.sum(), rel=1e-6, abs=1e-6 * scale)
        result.loss.backward()
        total = ce_gradient + KL_WEIGHT * gradient
        np.testing.assert_allclose(head.to_logits(head.hidden.grad), total, rtol=1e-5, atol=2e-6 * scale)


def test_one_position_by_hand() -> None:
    """Label .5, an alternative .3, a tail of .2 that lies in two groups as 3 to 1; the student has it as 1 to 1."""
    p, q = [0.5, 0.3, 0.15, 0.05], [0.4, 0.2, 0.2, 0.2]
    head = 0.5 * math.log(0.5 / 0.4) + 0.3 * math.log(0.3 / 0.2) + 0.2 * math.log(0.2 / 0.4)
    within = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    found = divergence(*(torch.tensor([x], dtype=torch.float64).log() for x in (p, q)), "tad", 7.0, 2)
    assert float(found) == pytest.approx(head + 7.0 * 0.2 * within, abs=1e-12)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"regularizer": "tad", "tail": "bucket", "tail_weight": 2.0}, "tad with tail bucket"),
        ({"regularizer": "tad", "tail": "groups"}, "tad without --tail-weight"),
        (
            {"regularizer": "tad", "tail": "groups", "tail_weight": 2.0, "weighting": "non-target-mass"},
            "tad with weighting non-target-mass",
        ),
        ({"tail_weight": 2.0}, "--tail-weight 2 with --regularizer masked-kl: it is of tad"),
        ({"regularizer": "tad", "tail": "groups", "tail_weight": 0.0}, "tail_weight: expected a number above 0"),
    ],
)
def test_what_is_not_defined_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidSettings, match=said):
        Objective(**given)
