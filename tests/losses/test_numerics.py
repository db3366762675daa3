"""The regularisers per position against the float64 oracles: every form, ragged shapes, extremes, properties."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracles
from support.numerics_cases import (
    SHAPES,
    Shape,
    assert_near,
    case_of,
    float32,
    forms,
    found,
    make_case,
    objective,
    plain_values,
    rounded,
    saturated_case,
    scales,
    shapes,
)
from support.oracles import FloatArray, log_softmax, log_sum_exp
from support.oracles_forms import FORMS

from logitcache.losses.formulas import SparseTargets, cross_entropy, regularizer_mask, regularizer_values

OUTCOME_FORMS = [form for form in FORMS if form[1] != "sampled"]
MASKED_FORMS = [form for form in FORMS if form[0] != "full-kl"]
EXACT_TAILS = ("bucket", "renormalize", "groups", "sampled")  # one and the same where K = V - 1

masked_forms = pytest.mark.parametrize("form", MASKED_FORMS, ids="/".join)
outcome_forms = pytest.mark.parametrize("form", OUTCOME_FORMS, ids="/".join)


# --- against the oracles


@forms
@shapes
@scales
def test_values_and_gradients(form: Any, shape: Shape, scale: float) -> None:
    for groups in (2, 16) if form[1] == "groups" else (16,):
        case = make_case(shape, scale, groups)
        assert_near(found(case, form), case.expected(form), case.unit())


@forms
@scales
def test_the_plain_form_is_the_oracle(form: Any, scale: float) -> None:
    """What the errors are compared with elsewhere is right itself, in float64."""
    for shape in SHAPES:
        case = make_case(shape, scale)
        leaf = torch.from_numpy(case.adapted).requires_grad_()
        values = plain_values(leaf, case, form)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
        expected = case.expected(form)
        np.testing.assert_allclose(values.detach().numpy(), expected[0], rtol=1e-11, atol=1e-11)
        np.testing.assert_allclose(gradient.numpy(), expected[1], rtol=1e-11, atol=1e-11)


@shapes
@scales
def test_cross_entropy(shape: Shape, scale: float) -> None:
    case = make_case(shape, scale)
    leaf = case.logits.requires_grad_()
    values = cross_entropy(leaf, torch.from_numpy(case.labels))
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    assert values.dtype == torch.float32
    actual = values.detach().double().numpy(), gradient.double().numpy()
    assert_near(actual, oracles.cross_entropy_oracle(case.adapted, case.labels), case.unit())


@forms
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_rows_that_keep_fewer(form: Any, scale: float) -> None:
    """Rows with 0 to K alternatives; without a tail where K = V - 1 of them are kept."""
    for shape, keep in (((6, 30, 8), [0, 1, 3, 7, 8, 8]), ((5, 9, 8), [8, 8, 0, 2, 7]), ((3, 2, 1), [0, 1, 0])):
        case = make_case(shape, scale, keep=keep)
        assert_near(found(case, form), case.expected(form), case.unit())


@forms
def test_the_weighting_by_the_mass_beside_the_label(form: Any) -> None:
    case = make_case((13, 50, 8), 6.0)
    expected = case.expected(form, weighting="non-target-mass")
    assert_near(found(case, form, weighting="non-target-mass"), expected, case.unit())
    saturated = saturated_case()  # rest near exp(-40): a one-minus-sum would be 0 or noise
    value, gradient = found(saturated, form, weighting="non-target-mass")
    expected = saturated.expected(form, weighting="non-target-mass")
    assert 0 < np.abs(expected[0]).max() < 1e-12
    mass = np.exp(
        [
            log_sum_exp(np.append(*x))
            for x in zip(saturated.record.alternative_logprobs, saturated.record.tail_logprobs, strict=True)
        ]
    )
    assert bool(np.all(np.abs(value - expected[0]) <= 4 * saturated.unit() * mass))
    assert bool(np.all(np.abs(gradient - expected[1]) <= 4 * saturated.unit() * mass[:, None]))


@pytest.mark.parametrize("regularizer", ["masked-kl", "masked-reverse-kl", "masked-js", "full-kl"])
@pytest.mark.parametrize("temperature", [0.5, 2.0, 7.0])
def test_temperature(regularizer: str, temperature: float) -> None:
    form = (regularizer, "renormalize")
    for shape in ((13, 50, 8), (4, 123, 122), (5, 3, 2)):
        case = make_case(shape, 6.0)
        expected = case.expected(form, temperature=temperature)
        unit = case.unit() * max(temperature, 1) ** 2 / min(temperature, 1)
        assert_near(found(case, form, temperature=temperature), expected, unit)
        if shape[2] > 1:  # over a single outcome there is nothing to change
            assert np.abs(expected[0] - case.expected(form)[0]).max() > 100 * unit


@forms
def test_min_adapted_rest(form: Any) -> None:
    case = make_case((13, 50, 8), 1.0)
    case.adapted[np.arange(13), case.labels] += np.linspace(-2, 12, 13)  # from most to nothing beside the label
    case = replace(case, adapted=float32(case.adapted))
    rest = [log_sum_exp(np.delete(log_softmax(z), y)) for z, y in zip(case.adapted, case.labels, strict=True)]
    ordered = np.sort(np.exp(rest))
    for least in [0.0, *((ordered[[2, 6]] + ordered[[3, 7]]) / 2), 0.999999]:
        options = {"min_adapted_rest": float(least)}
        value, gradient = found(case, form, **options)
        assert_near((value, gradient), case.expected(form, **options), case.unit())
        gone = np.exp(rest) < least if form[0] != "full-kl" else np.zeros(13, np.bool_)
        assert not value[gone].any() and not gradient[gone].any()
        assert bool(np.all(gradient[~gone].any(axis=1)))
        mask = regularizer_mask(case.targets, objective(form, **options)).numpy()
        np.testing.assert_array_equal(mask, case.counted(form))


@forms
def test_positions_that_count(form: Any) -> None:
    """By the mass of alternatives and tail: log p(y) in float32 cannot tell these apart."""
    rest = np.array([1.1e-4, 0.9e-4, 3e-9, 1e-12, 0.5])
    base = np.log(np.concatenate([(1 - rest)[:, None], rest[:, None] * [[0.5, 0.3, 0.2]]], axis=1))
    for k in range(4):
        case = case_of(base, base, np.zeros(5, np.int64), oracles.record_oracle(base, np.zeros(5, np.int64), k))
        for least in (1e-4, 1e-3, 2e-9, 0.0):
            mask = regularizer_mask(case.targets, objective(form, min_base_rest=least))
            assert mask.dtype == torch.bool
            enough = (rest >= least) & (form[1] != "renormalize" or k >= 2)
            assert mask.tolist() == (enough | (form[0] == "full-kl")).tolist()


@forms
def test_narrow_types_are_widened(form: Any) -> None:
    """int32 ids and float16 log-probabilities: the numbers they hold, computed in full."""
    case = make_case((6, 30, 8), 3.0, keep=[8, 8, 3, 0, 1, 8])
    half = rounded(case.record, lambda x: np.asarray(x).astype(np.float16).astype(np.float64))
    case = replace(case, record=half)
    wide = case.targets
    narrow = {
        name: x.half() if x.dtype.is_floating_point else x.int()
        for name, x in vars(wide).items()
        if isinstance(x, torch.Tensor)
    }
    leaf = case.logits.requires_grad_()
    values = regularizer_values(leaf, type(wide)(**narrow), objective(form))
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    actual = values.detach().double().numpy(), gradient.double().numpy()
    assert_near(actual, case.expected(form), case.unit())
    mask = regularizer_mask(type(wide)(**narrow), objective(form)).numpy()
    np.testing.assert_array_equal(mask, case.counted(form))


@forms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits(form: Any, dtype: torch.dtype) -> None:
    """Rounded no further than they are; the gradient comes back in their type."""
    case = make_case((9, 40, 8), 6.0)
    half = case.logits.to(dtype)
    value, gradient = found(case, form, half)
    expected = case.expected(form, half.double().numpy())
    assert_near((value, expected[1]), expected, case.unit())
    np.testing.assert_allclose(gradient, expected[1], rtol=torch.finfo(dtype).eps, atol=4 * case.unit())


# --- properties


@outcome_forms
@shapes
@scales
def test_zero_at_the_base(form: Any, shape: Shape, scale: float) -> None:
    case = make_case(shape, scale)
    case = replace(case, adapted=case.base)
    value, gradient = found(case, form)
    assert np.abs(value).max() <= 4 * case.unit()
    assert np.abs(gradient).max() <= 4 * case.unit()


@settings(deadline=None, max_examples=60, database=None, derandomize=True)
@given(data=st.data())
def test_coarser_is_smaller(data: st.DataObject) -> None:
    """Over ever finer partitions the divergence grows: bucket <= groups <= finer groups <= exact; and so in k."""
    v = data.draw(st.integers(2, 9), label="V")
    logit = st.floats(-20, 20, width=16)
    rows = st.lists(logit, min_size=v, max_size=v)
    base, adapted = (np.array([data.draw(rows, label=name)]) for name in ("base", "adapted"))
    labels = np.array([data.draw(st.integers(0, v - 1), label="label")])
    fine = np.array(data.draw(st.lists(st.integers(0, 5), min_size=v, max_size=v), label="groups"))
    merge = np.array(data.draw(st.lists(st.integers(0, 2), min_size=6, max_size=6), label="merged groups"))
    regularizer = data.draw(st.sampled_from(["masked-kl", "masked-reverse-kl", "masked-js", "full-kl"]))

    def value(k: int, tail: str, token_groups: Any = None) -> float:
        record = oracles.record_oracle(base, labels, k)
        token_groups = np.zeros(v, np.int64) if token_groups is None else token_groups
        case = case_of(base, adapted, labels, record, 6, 1, token_groups)
        return float(found(case, (regularizer, tail))[0][0])

    k = data.draw(st.integers(0, v - 1), label="k")
    exact = value(v - 1, "bucket")
    ladder = [value(k, "bucket"), value(k, "groups", merge[fine]), value(k, "groups", fine), exact]
    in_k = [value(j, "bucket") for j in range(v)]
    for values in (ladder, in_k):
        assert values[0] >= -1e-5
        for coarse, finer in pairwise(values):
            assert coarse <= finer + 2e-5 + 1e-6 * abs(finer)


@forms
@pytest.mark.parametrize("constant", [-3.0, 1024.0, 8192.0])
def test_a_constant_added_to_the_logits(form: Any, constant: float) -> None:
    """Logits that stay exact when the constant is added: only their differences matter, to the last digits."""
    case = make_case((9, 40, 8), 3.0)
    case = replace(case, adapted=np.round(case.adapted * 64) / 64)
    moved = torch.from_numpy(case.adapted + constant).float()
    np.testing.assert_array_equal(moved.double().numpy() - constant, case.adapted)
    assert_near(found(case, form, moved), case.expected(form), case.unit())


@pytest.mark.parametrize("tail", EXACT_TAILS)
@scales
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_all_kept_is_decoupled_kd(tail: str, scale: float, temperature: float) -> None:
    """masked-kl at K = V - 1 = NCKD of Decoupled Knowledge Distillation (Zhao et al. 2022), as its code has it."""
    if temperature != 1 and tail != "renormalize":
        pytest.skip("a temperature goes with renormalize only")
    for shape in ((6, 2, 1), (8, 60, 59)):
        case = make_case(shape, scale)
        student = torch.from_numpy(case.adapted).requires_grad_()
        teacher = torch.from_numpy(case.base)
        mask = torch.nn.functional.one_hot(torch.from_numpy(case.labels), shape[1])
        p = torch.softmax(teacher / temperature - 1000.0 * mask, dim=1)
        log_q = torch.log_softmax(student / temperature - 1000.0 * mask, dim=1)
        nckd = torch.nn.functional.kl_div(log_q, p, reduction="none").sum(1) * temperature**2
        (gradient,) = torch.autograd.grad(nckd.sum(), student)
        expected = nckd.detach().numpy(), gradient.numpy()
        unit = case.unit() * temperature**2
        assert_near(found(case, ("masked-kl", tail), temperature=temperature), expected, unit, 8)


@masked_forms
@shapes
def test_the_label_has_no_part_in_masked_forms(form: Any, shape: Shape) -> None:
    """No gradient at its logit, and 200 more or less there changes nothing: what is left out is never formed."""
    case = make_case(shape, 3.0)
    rows, expected = np.arange(shape[0]), case.expected(form)
    for added in (0.0, 200.0, -200.0):
        moved = case.adapted.copy()
        moved[rows, case.labels] += added
        value, gradient = found(case, form, torch.from_numpy(moved).float())
        assert bool(np.all(gradient[rows, case.labels] == 0))
        assert_near((value, gradient), expected, case.unit())


def test_only_the_shares_of_the_groups_are_used() -> None:
    case = make_case((9, 252, 64), 3.0)
    groups = case.record.tail_group_logprobs
    assert groups is not None
    moved = replace(case, record=replace(case.record, tail_group_logprobs=float32(groups - 5.0)))
    for form in FORMS:
        assert_near(found(moved, form), case.expected(form), case.unit())


def test_the_order_of_draws_does_not_matter_and_repeats_do() -> None:
    case = make_case((4, 30, 3), 3.0, draws=8)
    ids, logs = case.record.draw_ids, case.record.draw_logprobs
    assert ids is not None and logs is not None
    assert any(len(set(row)) < 8 for row in ids.tolist())
    record = replace(case.record, draw_ids=ids[:, ::-1].copy(), draw_logprobs=logs[:, ::-1].copy())
    once = case.record
    once = replace(once, draw_ids=ids[:, :1].copy(), draw_logprobs=logs[:, :1].copy())
    for regularizer in ("masked-kl", "full-kl"):
        form = (regularizer, "sampled")
        assert_near(found(replace(case, record=record), form), case.expected(form), case.unit())
        alone = replace(case, record=once)
        assert_near(found(alone, form), alone.expected(form), case.unit())
        assert np.abs(alone.expected(form)[0] - case.expected(form)[0]).min() > 1e-3


# --- draws


def within(samples: FloatArray, exact: FloatArray) -> bool:
    """Whether the mean over the first axis is within 4.5 standard errors of `exact`, entry by entry."""
    error = samples.std(axis=0, ddof=1) / np.sqrt(samples.shape[0])
    return bool(np.all(np.abs(samples.mean(axis=0) - exact) <= 4.5 * error + 2e-6))


@pytest.mark.parametrize("regularizer", ["masked-kl", "full-kl"])
@pytest.mark.parametrize("draws", [1, 4])
def test_draws_are_unbiased(regularizer: str, draws: int) -> None:
    """The mean over many records of one position is its exact KL, in value and gradient; wrong draws are told."""
    n, v, form = 20_000, 12, (regularizer, "sampled")
    case, rng = make_case((1, v, 3), 1.5, draws=draws), np.random.default_rng(draws)
    log_p, kept, label = log_softmax(case.base[0]), case.record.alternative_ids[0], case.labels[0]
    tail = np.array([c for c in range(v) if c not in (label, *kept)])
    whole = case_of(case.base, case.adapted, case.labels, oracles.record_oracle(case.base, case.labels, v - 1))
    exact_value, exact_gradient = whole.expected((regularizer, "bucket"))

    def estimates(chances: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Values [n] and gradients [n, V] for draws with these chances over the tail."""
        ids = rng.choice(tail, size=(n, draws), p=chances / chances.sum())
        columns = {
            name: x if name == "token_groups" else x.expand(n, *x.shape[1:]) for name, x in vars(case.targets).items()
        }
        columns |= {"draw_ids": torch.from_numpy(ids), "draw_logprobs": torch.from_numpy(log_p[ids]).float()}
        leaf = case.logits.expand(n, v).clone().requires_grad_()
        values = regularizer_values(leaf, SparseTargets(**columns), objective(form))
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
        return values.detach().double().numpy(), gradient.double().numpy()

    value, gradient = estimates(np.exp(log_p[tail]))
    assert within(value, exact_value[0]) and within(gradient, exact_gradient[0])
    # That this can fail: draws from another distribution, and draws that count in full, without p'_T.
    value_of_uniform, gradient_of_uniform = estimates(np.ones(tail.size))
    assert not within(value_of_uniform, exact_value[0]) and not within(gradient_of_uniform, exact_gradient[0])
    scope = [c for c in range(v) if regularizer == "full-kl" or c != label]
    log_p, log_q = (np.where(np.isin(np.arange(v), scope), x, -np.inf) for x in (case.base[0], case.adapted[0]))
    log_p, log_q = log_softmax(log_p), log_softmax(log_q)
    p = np.exp(log_p)
    exactly = [c for c in scope if c not in tail]  # the part that is not drawn, which no share weighs
    value_there = float(np.sum(p[exactly] * (log_p[exactly] - log_q[exactly])))
    gradient_there = np.exp(log_q) * p[exactly].sum() - np.where(np.isin(np.arange(v), exactly), p, 0)
    share = p[tail].sum()
    assert not within(value_there + (value - value_there) / share, exact_value[0])
    assert not within(gradient_there + (gradient - gradient_there) / share, exact_gradient[0])


# --- what is not defined


def test_what_is_not_defined_is_refused() -> None:
    for regularizer in ("masked-reverse-kl", "masked-js"):
        with pytest.raises(ValueError, match="sampled"):
            objective((regularizer, "sampled"))
    for form in FORMS:
        if form[1] != "renormalize":
            with pytest.raises(ValueError, match="temperature"):
                objective(form, temperature=2.0)
        objective(form, temperature=1.0)


def test_a_record_without_groups_or_draws_is_refused() -> None:
    case = make_case((5, 30, 4), 1.0)
    for missing, tail in (
        ("tail_group_logprobs", "groups"),
        ("token_groups", "groups"),
        ("draw_ids", "sampled"),
        ("draw_logprobs", "sampled"),
    ):
        targets = replace(case.targets, **{missing: None})
        for regularizer in {r for r, t in FORMS if t == tail}:
            with pytest.raises(ValueError, match=r"group|draw|sample"):
                regularizer_values(case.logits, targets, objective((regularizer, tail)))
