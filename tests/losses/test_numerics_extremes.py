"""The regularisers per position where floating point is hardest, against the float64 oracles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support import oracles
from support.numerics_cases import (
    EPSILON,
    Shape,
    assert_near,
    case_of,
    float32,
    forms,
    found,
    make_case,
    objective,
    saturated_case,
    shapes,
)

from logitcache.losses.formulas import regularizer_mask


@forms
def test_a_saturated_label(form: Any) -> None:
    """p'(c) comes from the recorded masses, near exp(-40): 1 - exp(label_logprob) is 0."""
    case = saturated_case()
    assert float(np.exp(np.float32(case.record.label_logprobs)).min()) == 1.0
    expected = case.expected(form)
    assert_near(found(case, form), expected, case.unit())
    if form[0] != "full-kl" and form[1] != "sampled":
        assert expected[0].min() > 1e-4 and float(np.abs(expected[1]).max()) > 1e-2


@forms
@pytest.mark.parametrize("peak", ["kept", "tail"])
def test_an_adapted_token_200_above_all_else(form: Any, peak: str) -> None:
    """The other masses, of exp(-200), still have their shares."""
    case = make_case((9, 40, 8), 1.0)
    rows = np.arange(9)
    ids = case.record.alternative_ids
    at = ids[:, 2] if peak == "kept" else np.argsort(np.isin(np.arange(40), [*ids.flat, *case.labels]))[:1].repeat(9)
    case.adapted[rows, at] += 200.0
    case = replace(case, adapted=float32(case.adapted))
    assert_near(found(case, form), case.expected(form), case.unit())


@forms
@pytest.mark.parametrize("k", [0, 2, 5, 7, 11])
def test_tokens_that_cannot_occur(form: Any, k: int) -> None:
    """Logits of -inf where the base has no mass: among those kept, in part of the tail, and in all of it."""
    rng = np.random.default_rng(k)
    base, adapted = (float32(rng.normal(size=(8, 12)) * 2) for _ in range(2))
    labels = np.arange(8)
    for i in range(8):
        gone = rng.choice(np.delete(np.arange(12), labels[i]), size=6, replace=False)
        base[i, gone] = adapted[i, gone] = -np.inf
    case = case_of(base, adapted, labels, oracles.record_oracle(base, labels, k), 4, 5, np.arange(12) % 4)
    assert (k < 5) == bool(np.isfinite(case.record.tail_logprobs).all())
    expected = case.expected(form)
    assert bool(np.isfinite(expected[0]).all() and np.isfinite(expected[1]).all())
    assert_near(found(case, form), expected, case.unit())


@forms
@pytest.mark.parametrize("k", [1, 3, 5])
def test_a_one_hot_base(form: Any, k: int) -> None:
    """All mass on one token beside the label: log (1/q') forward, infinite in reverse, a finite JS."""
    base = np.full((4, 6), -np.inf)
    labels, peak = np.arange(4), np.array([5, 0, 4, 2])
    base[np.arange(4), peak] = 0.0
    adapted = float32(np.random.default_rng(0).normal(size=(4, 6)))
    case = case_of(base, adapted, labels, oracles.record_oracle(base, labels, k), 3, 4, np.arange(6) % 3)
    value, gradient = found(case, form)
    expected = case.expected(form)
    if form[0] == "masked-reverse-kl" and not (form[1] == "renormalize" and k == 1):
        np.testing.assert_array_equal(value[expected[0] == np.inf], np.inf)
        np.testing.assert_allclose(value, expected[0], rtol=1e-6)
        assert (expected[0] == np.inf).any()
        return
    assert_near((value, gradient), expected, case.unit())


@forms
def test_a_one_hot_adapted_distribution(form: Any) -> None:
    """q = 0 where p > 0 is infinite forward; in reverse and JS the vanished tokens just have no gradient."""
    case = make_case((4, 6, 2), 1.0)
    adapted = np.full((4, 6), -np.inf)
    rows, first = np.arange(4), case.record.alternative_ids[:, 0]
    adapted[rows, first] = 1.0
    adapted[rows, case.labels] = 0.5
    case = replace(case, adapted=adapted)
    expected = case.expected(form)
    value, gradient = found(case, form)
    if form[0] in ("masked-kl", "full-kl"):
        assert bool(np.all(expected[0] == np.inf)) and bool(np.all(value == np.inf))
    else:
        assert_near((value, gradient), expected, case.unit())


@forms
@shapes
def test_logits_of_ten_thousand(form: Any, shape: Shape) -> None:
    case = make_case(shape, 1.0)
    case = replace(case, adapted=float32(case.adapted * 1e4))
    expected = case.expected(form)
    value, gradient = found(case, form)
    assert bool(np.isfinite(value).all() and np.isfinite(gradient).all())
    np.testing.assert_allclose(value, expected[0], rtol=1e-6, atol=4 * case.unit())
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-5, atol=EPSILON * 64)


@forms
@pytest.mark.parametrize("shape", [(0, 7, 3), (0, 2, 1)])
def test_no_positions(form: Any, shape: Shape) -> None:
    case = make_case(shape, 1.0)
    value, gradient = found(case, form)
    assert value.shape == (0,) and gradient.shape == shape[:2]
    assert regularizer_mask(case.targets, objective(form)).shape == (0,)
