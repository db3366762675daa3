"""Decoupled KD: both parts against the float64 oracles of each, in slices and by autograd."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support import oracles
from support.exact_head import ExactHead
from support.numerics_cases import Case, make_case, saturated_case
from support.oracles import FloatArray, ValueAndGradient

from logitcache.errors import InvalidSettings
from logitcache.losses import compared
from logitcache.losses.formulas import Objective, regularizer_mask, regularizer_values
from logitcache.losses.fused import linear_loss

KL_WEIGHT = 0.7


def label_part(case: Case) -> ValueAndGradient:
    """KL of (p(y), 1 - p(y)) against q's [N], p as recorded; its gradient by z: q(y) - p(y) at y, minus that times the
    share of c in the rest elsewhere."""
    values, gradient = np.zeros(len(case.labels)), np.zeros_like(case.adapted)
    record = case.record
    for i, (z, y) in enumerate(zip(case.adapted, case.labels, strict=True)):
        parts = np.array([*record.alternative_logprobs[i], record.tail_logprobs[i]])
        log_p = oracles.log_softmax(np.array([record.label_logprobs[i], oracles.log_sum_exp(parts)]))
        log_q = oracles.log_softmax(z)
        others = np.delete(np.arange(len(z)), y)
        pair = np.array([log_q[y], oracles.log_sum_exp(log_q[others])])
        values[i] = float(np.sum(np.exp(log_p) * (log_p - pair)))
        moved = np.exp(pair[1]) - np.exp(log_p[1])
        gradient[i, y] = -moved
        gradient[i, others] = moved * np.exp(log_q[others] - pair[1])
    return values, gradient


def expected(case: Case, tail: str, label_weight: float) -> tuple[FloatArray, FloatArray, Any]:
    """Values [N], gradients [N, V] and which positions count."""
    of_rest, by_rest = case.expected(("masked-kl", tail))
    of_label, by_label = label_part(case)
    return label_weight * of_label + of_rest, label_weight * by_label + by_rest, case.counted(("masked-kl", tail))


@pytest.mark.parametrize("label_weight", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("tail", ["bucket", "groups"])
@pytest.mark.parametrize("shape", [(7, 2, 1), (13, 50, 8), (4, 123, 122), (9, 252, 64)], ids=str)
def test_values_and_gradients_are_the_oracles(
    shape: tuple[int, int, int], tail: Any, label_weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(shape, 1.5)
    values, gradient, counted = expected(case, tail, label_weight)
    objective = Objective("dkd", tail, label_weight=label_weight)
    leaf = case.logits.requires_grad_()
    found = regularizer_values(leaf, case.targets, objective)
    np.testing.assert_allclose(found.detach().numpy(), values, rtol=1e-5, atol=1e-6)
    (by_autograd,) = torch.autograd.grad(found.sum(), leaf)
    np.testing.assert_allclose(by_autograd.numpy(), gradient, rtol=1e-5, atol=1e-6)
    assert regularizer_mask(case.targets, objective).tolist() == counted.tolist()
    _, ce_gradient = oracles.cross_entropy_oracle(case.adapted, case.labels)
    total = ce_gradient + KL_WEIGHT * np.where(counted[:, None], gradient, 0.0)
    for chunk in (1, 4, None, "plainly"):
        if chunk == "plainly":
            monkeypatch.setattr(compared, "LEAST_GROUP_SUM", 1e30)
        rows = None if chunk == "plainly" else chunk
        head = ExactHead(case)
        chosen = Objective("dkd", tail, label_weight=label_weight, tokens_per_loss_chunk=rows)  # type: ignore[arg-type]
        result = linear_loss(head.hidden, head.linear, torch.from_numpy(case.labels), case.targets, chosen, KL_WEIGHT)
        assert float(result.kl) == pytest.approx(values[counted].sum(), rel=1e-6, abs=1e-6)
        result.loss.backward()
        np.testing.assert_allclose(head.to_logits(head.hidden.grad), total, rtol=1e-5, atol=2e-6)


def test_a_sure_base_leaves_its_positions_out() -> None:
    case = saturated_case()
    objective = Objective("dkd")
    assert not regularizer_mask(case.targets, objective).any()
    head = ExactHead(case)
    found = linear_loss(head.hidden, head.linear, torch.from_numpy(case.labels), case.targets, objective, KL_WEIGHT)
    found.loss.backward()
    assert float(found.kl) == 0 and bool(torch.isfinite(head.hidden.grad).all())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"regularizer": "dkd", "tail": "renormalize"}, "dkd with tail renormalize"),
        ({"regularizer": "dkd", "tail": "sampled"}, "dkd with tail sampled"),
        ({"regularizer": "dkd", "weighting": "non-target-mass"}, "dkd with weighting non-target-mass"),
        ({"label_weight": 2.0}, "--label-weight 2 with --regularizer masked-kl: it is of dkd"),
        ({"regularizer": "dkd", "label_weight": -1.0}, "label_weight: expected a number of 0 or more"),
    ],
)
def test_what_is_not_defined_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidSettings, match=said):
        Objective(**given)
