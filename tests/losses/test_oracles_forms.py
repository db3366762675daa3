"""Checks of the oracles of every form: finite differences, identities, 60-digit arithmetic, exact expectations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal, localcontext
from functools import partial
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
from support.oracle_cases import cases, make_logits, rng_of
from support.oracles import (
    PAD_ID,
    FloatArray,
    IntArray,
    ValueAndGradient,
    finite_difference,
    full_kl_bucket_oracle,
    log_softmax,
    log_sum_exp,
    masked_kl_bucket_oracle,
    masked_kl_full_oracle,
    masked_kl_renormalize_oracle,
    record_oracle,
)
from support.oracles_forms import (
    FORMS,
    OUTCOME_TAILS,
    FormsRecord,
    Regularizer,
    Tail,
    complete_record,
    counted_oracle,
    draw_tail_samples,
    keep_fewer,
    regularizer_oracle,
    tail_group_oracle,
)

SHAPES = [(4, 2), (3, 3), (5, 7), (2, 13)]
GROUPS = 3

forms = pytest.mark.parametrize("form", FORMS, ids="/".join)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")


def make(shape: tuple[int, int], scale: str) -> tuple[FloatArray, FloatArray, IntArray, IntArray]:
    """b, z, labels, token_groups. Group 1 of 3 has no token; a small tail leaves others empty too."""
    rng = rng_of(shape, scale)
    return *make_logits(rng, shape, scale), rng.choice([0, 2], size=shape[1])


def make_record(b: FloatArray, labels: IntArray, k: int, token_groups: IntArray, draws: int = 5) -> FormsRecord:
    rng = np.random.default_rng(k)
    return complete_record(b, labels, record_oracle(b, labels, k), token_groups, GROUPS, draws, rng)


def ks(v: int) -> list[int]:
    return sorted({0, 1, v // 2, v - 2, v - 1})


def assert_same(actual: ValueAndGradient, expected: ValueAndGradient) -> None:
    for one, two in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-11, atol=1e-13)


# --- gradients


@forms
@pytest.mark.parametrize("shape", [(3, 2), (3, 3), (2, 7)], ids=lambda s: f"{s[0]}x{s[1]}")
@cases
def test_gradients(shape: tuple[int, int], scale: str, form: tuple[Regularizer, Tail]) -> None:
    b, z, labels, token_groups = make(shape, scale)
    for k in ks(shape[1]):
        record = make_record(b, labels, k, token_groups)
        options: list[dict[str, Any]] = [{}]
        if form[1] == "renormalize":
            options.append({"temperature": 2.5, "weighting": "non-target-mass"})
        for option in options:

            def f(x: FloatArray, record: FormsRecord = record, option: dict[str, Any] = option) -> ValueAndGradient:
                return regularizer_oracle(record, x, labels, *form, token_groups, **option)

            value, gradient = f(z)
            numeric = finite_difference(lambda x, f=f: f(x)[0], z)  # type: ignore[misc]
            assert value.shape == labels.shape and gradient.shape == z.shape
            assert bool(np.all(np.isfinite(value)))
            assert form[1] == "sampled" or bool(np.all(value >= -1e-13))  # a sampled one may be negative
            np.testing.assert_allclose(gradient, numeric, rtol=2e-6, atol=2e-8)
            np.testing.assert_allclose(gradient.sum(axis=1), 0.0, atol=1e-11)
            if form[0] != "full-kl":
                assert bool(np.all(gradient[np.arange(shape[0]), labels] == 0))


# --- values


def decimal_value(
    p: Sequence[Decimal], q: Sequence[Decimal], outcomes: list[list[int]], form: Regularizer, t: Decimal
) -> float:
    """The divergence in probabilities, from unnormalised masses of the tokens; T in 60 digits loses nothing."""
    ps, qs = ([sum((x[c] for c in o), Decimal(0)) ** (1 / t) for o in outcomes] for x in (p, q))
    ps, qs = ([x / sum(xs) for x in xs] for xs in (ps, qs))
    if form == "masked-reverse-kl":
        ps, qs = qs, ps
    if form == "masked-js":
        ms = [(x + y) / 2 for x, y in zip(ps, qs, strict=True)]
        terms = [x * (x / m).ln() / 2 + y * (y / m).ln() / 2 for x, y, m in zip(ps, qs, ms, strict=True)]
    else:
        terms = [x * (x / y).ln() for x, y in zip(ps, qs, strict=True)]
    return float(t * t * sum(terms, Decimal(0)))


@pytest.mark.parametrize("form", [f for f in FORMS if f[1] != "sampled"], ids="/".join)
@cases
def test_values_in_60_digits(scale: str, form: tuple[Regularizer, Tail]) -> None:
    b, z, labels, token_groups = make((3, 7), scale)
    for k in (1, 3, 6):
        record = make_record(b, labels, k, token_groups)
        temperature = 1.5 if form[1] == "renormalize" else 1.0
        value, _ = regularizer_oracle(record, z, labels, *form, token_groups=token_groups, temperature=temperature)
        weighted, _ = regularizer_oracle(record, z, labels, *form, token_groups, temperature, "non-target-mass")
        for i, y in enumerate(labels.tolist()):
            kept = record.alternative_ids[i].tolist()
            rest = [c for c in range(7) if c not in (y, *kept)]
            outcomes = [[c] for c in ([y, *kept] if form[0] == "full-kl" else kept)]
            if form[1] == "bucket" and rest:
                outcomes.append(rest)
            if form[1] == "groups":
                in_groups = [[c for c in rest if token_groups[c] == g] for g in range(GROUPS)]
                outcomes += [tokens for tokens in in_groups if tokens]
            with localcontext() as context:
                context.prec = 60
                p, q = ([Decimal(float(x)).exp() for x in row] for row in (b[i], z[i]))
                expected = decimal_value(p, q, outcomes, form[0], Decimal(temperature))
                mass = float(sum(p[c] for c in range(7) if c != y) / sum(p))
            np.testing.assert_allclose(value[i], expected, rtol=1e-11, atol=1e-15)
            np.testing.assert_allclose(weighted[i], expected * mass, rtol=1e-11, atol=1e-15)


@shapes
@cases
def test_the_older_oracles_agree(shape: tuple[int, int], scale: str) -> None:
    b, z, labels, token_groups = make(shape, scale)
    for k in ks(shape[1]):
        record = make_record(b, labels, k, token_groups)
        both = partial(regularizer_oracle, record, z, labels)
        assert_same(both("masked-kl", "bucket"), masked_kl_bucket_oracle(record, z, labels))
        assert_same(both("masked-kl", "renormalize"), masked_kl_renormalize_oracle(record, z, labels))
        assert_same(both("full-kl", "bucket"), full_kl_bucket_oracle(record, z, labels))


@shapes
@cases
@pytest.mark.parametrize("regularizer", ["masked-kl", "masked-reverse-kl", "masked-js", "full-kl"])
def test_partitions(shape: tuple[int, int], scale: str, regularizer: Regularizer) -> None:
    """One group is the bucket; a group per token is nothing lost; finer is never smaller; k = V - 1 is exact."""
    b, z, labels, _ = make(shape, scale)
    v = shape[1]
    exact = regularizer_oracle(record_oracle(b, labels, v - 1), z, labels, regularizer, "bucket")
    if regularizer == "masked-kl":
        assert_same(exact, masked_kl_full_oracle(b, z, labels))
    for k in ks(v):
        record, rng = record_oracle(b, labels, k), np.random.default_rng(k)
        values = []
        for token_groups in (np.zeros(v, np.int64), np.arange(v) % 2, np.arange(v) % 4, np.arange(v)):
            groups = int(token_groups.max()) + 1
            whole = complete_record(b, labels, record, token_groups, groups, 1, rng)
            np.testing.assert_allclose(
                [log_sum_exp(row) for row in tail_group_oracle(b, labels, record, token_groups, groups)],
                record.tail_logprobs,
                rtol=1e-12,
                atol=1e-13,
            )
            assert whole.tail_group_logprobs is not None
            shifted = replace(whole, tail_group_logprobs=whole.tail_group_logprobs - 3.0)  # only shares are used
            result = regularizer_oracle(shifted, z, labels, regularizer, "groups", token_groups)
            values.append(result[0])
            if len(values) == 1:
                assert_same(result, regularizer_oracle(record, z, labels, regularizer, "bucket"))
        assert_same(result, exact)
        for coarse, fine in pairwise(values):
            assert bool(np.all(coarse <= fine + 1e-12 * (1 + fine)))


@shapes
@cases
def test_directions(shape: tuple[int, int], scale: str) -> None:
    """Reverse KL is KL with base and adapted exchanged; JS is symmetric, at most log 2 and half the KL."""
    b, z, labels, _ = make(shape, scale)
    one, two = (record_oracle(x, labels, shape[1] - 1) for x in (b, z))
    forward = regularizer_oracle(two, b, labels, "masked-kl", "bucket")[0]
    reverse = regularizer_oracle(one, z, labels, "masked-reverse-kl", "bucket")[0]
    np.testing.assert_allclose(reverse, forward, rtol=1e-12, atol=1e-14)
    js = regularizer_oracle(one, z, labels, "masked-js", "bucket")[0]
    np.testing.assert_allclose(js, regularizer_oracle(two, b, labels, "masked-js", "bucket")[0], rtol=1e-12, atol=1e-14)
    assert bool(np.all(js <= math.log(2) + 1e-14)) and bool(np.all(js <= (forward / 2) + 1e-14))


@forms
@shapes
@cases
def test_zero_at_the_base(shape: tuple[int, int], scale: str, form: tuple[Regularizer, Tail]) -> None:
    b, _, labels, token_groups = make(shape, scale)
    for k in ks(shape[1]):
        record = make_record(b, labels, k, token_groups)
        value, gradient = regularizer_oracle(record, b + 2.5, labels, *form, token_groups=token_groups)
        np.testing.assert_allclose(value, 0.0, atol=5e-14)
        if form[1] != "sampled":  # whose gradient is zero on average only
            np.testing.assert_allclose(gradient, 0.0, atol=5e-14)


# --- draws


@pytest.mark.parametrize("regularizer", ["masked-kl", "full-kl"])
@pytest.mark.parametrize("draws", [1, 2])
def test_the_mean_over_every_possible_draw_is_the_exact_kl(regularizer: Regularizer, draws: int) -> None:
    b, z, labels, token_groups = make((1, 7), "plain")
    exact = regularizer_oracle(record_oracle(b, labels, 6), z, labels, regularizer, "bucket")
    for k in (0, 2, 6):
        record = make_record(b, labels, k, token_groups, draws)
        log_p = log_softmax(b[0])
        tail = [c for c in range(7) if c not in (labels[0], *record.alternative_ids[0])]
        if not tail:
            assert_same(regularizer_oracle(record, z, labels, regularizer, "sampled"), exact)
            continue
        value, gradient = np.zeros(1), np.zeros((1, 7))
        for drawn in product(tail, repeat=draws):
            chance = math.exp(sum(log_p[c] - record.tail_logprobs[0] for c in drawn))
            ids = np.array([drawn])
            of_these = replace(record, draw_ids=ids, draw_logprobs=log_p[ids])
            one, slope = regularizer_oracle(of_these, z, labels, regularizer, "sampled")
            value, gradient = value + chance * one, gradient + chance * slope
        assert_same((value, gradient), exact)


def test_draws_are_of_the_tail_in_its_proportions() -> None:
    b, _, labels, _ = make((1, 7), "plain")
    record = record_oracle(b, labels, 2)
    ids, logprobs = draw_tail_samples(b, labels, record, 40_000, np.random.default_rng(0))
    log_p = log_softmax(b[0])
    np.testing.assert_array_equal(logprobs[0], log_p[ids[0]])
    assert bool(np.all(np.diff(logprobs[0]) <= 0))
    counts = np.bincount(ids[0], minlength=7) / 40_000
    expected = np.exp(log_p - record.tail_logprobs[0])
    expected[[labels[0], *record.alternative_ids[0]]] = 0
    assert bool(np.all(np.abs(counts - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / 40_000)))
    whole = record_oracle(b, labels, 6)
    ids, logprobs = draw_tail_samples(b, labels, whole, 3, np.random.default_rng(0))
    assert bool(np.all(ids == PAD_ID)) and bool(np.all(logprobs == -np.inf))


# --- options, padding, tokens that cannot occur, what is not defined


@forms
def test_padded_rows_equal_shorter_rows(form: tuple[Regularizer, Tail]) -> None:
    b, z, labels, token_groups = make((5, 7), "plain")
    keep = [0, 1, 3, 5, 6]
    padded, rng = keep_fewer(record_oracle(b, labels, 6), keep), np.random.default_rng(0)
    record = complete_record(b, labels, padded, token_groups, GROUPS, 4, rng)
    assert record.draw_ids is not None and record.draw_logprobs is not None
    value, gradient = regularizer_oracle(record, z, labels, *form, token_groups=token_groups)
    for i, k in enumerate(keep):
        row = slice(i, i + 1)
        narrow = make_record(b[row], labels[row], k, token_groups)
        narrow = replace(narrow, draw_ids=record.draw_ids[row], draw_logprobs=record.draw_logprobs[row])
        expected = regularizer_oracle(narrow, z[row], labels[row], *form, token_groups=token_groups)
        assert_same((value[row], gradient[row]), expected)


@forms
def test_min_adapted_rest(form: tuple[Regularizer, Tail]) -> None:
    b, z, labels, token_groups = make((5, 7), "plain")
    rest = [math.exp(log_sum_exp(np.delete(log_softmax(row), y))) for row, y in zip(z, labels, strict=True)]
    threshold = float(np.median(rest)) * (1 - 1e-12)
    record = make_record(b, labels, 3, token_groups)
    f = partial(regularizer_oracle, record, z, labels, *form, token_groups=token_groups)
    value, gradient = f(min_adapted_rest=threshold)
    zeroed = [i for i in range(5) if rest[i] < threshold and form[0] != "full-kl"]
    assert len(zeroed) == (2 if form[0] != "full-kl" else 0)
    expected_value, expected_gradient = f()
    expected_value[zeroed], expected_gradient[zeroed] = 0.0, 0.0
    assert_same((value, gradient), (expected_value, expected_gradient))


def test_positions_that_count() -> None:
    rest = np.array([1.1e-4, 0.9e-4, 0.5])
    b = np.log(np.stack([1 - rest, rest * 0.75, rest * 0.25], axis=1))
    for k in range(3):
        record = record_oracle(b, np.zeros(3, np.int64), k)
        assert counted_oracle(record, "masked-js", "bucket", 1e-4).tolist() == [True, False, True]
        assert counted_oracle(record, "masked-kl", "groups", 0.0).tolist() == [True, True, True]
        assert counted_oracle(record, "full-kl", "renormalize", 1e-4).tolist() == [True, True, True]


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("tail", OUTCOME_TAILS)
def test_tokens_that_cannot_occur(tail: Tail, k: int) -> None:
    """p = q = 0 has no term. p = 0 < q is infinite in reverse, and q/2 log 2 in JS; p > 0 = q is infinite forward."""
    b, z, labels, token_groups = np.zeros((1, 5)), np.zeros((1, 5)), np.array([0]), np.array([0, 0, 1, 2, 2])
    b[0, 3:], z[0, 2] = -np.inf, 1.0
    record = make_record(b, labels, k, token_groups)
    rng = np.random.default_rng(0)
    without = complete_record(b[:, :3], labels, record_oracle(b[:, :3], labels, 2), token_groups[:3], GROUPS, 1, rng)
    both_zero = z.copy()
    both_zero[0, 3:] = -np.inf
    for regularizer in ("masked-kl", "masked-reverse-kl", "masked-js", "full-kl"):
        expected = regularizer_oracle(without, z[:, :3], labels, regularizer, tail, token_groups[:3])
        value, gradient = regularizer_oracle(record, both_zero, labels, regularizer, tail, token_groups)
        assert_same((value, gradient[:, :3]), expected)
        assert not gradient[:, 3:].any()
    if tail == "renormalize" and k == 2:
        return  # neither side sees the others
    q_rest = (1 if tail == "renormalize" else 2) / ((2 if tail == "renormalize" else 3) + math.e)
    q = np.array([1, math.e]) / (1 + math.e) * (1 - q_rest)
    terms = [0.25 * math.log(0.5 / m) + x / 2 * math.log(x / m) for x, m in zip(q, (0.5 + q) / 2, strict=True)]
    js = sum(terms) + q_rest / 2 * math.log(2)
    np.testing.assert_allclose(
        regularizer_oracle(record, z, labels, "masked-js", tail, token_groups)[0], js, rtol=1e-12
    )
    assert regularizer_oracle(record, z, labels, "masked-reverse-kl", tail, token_groups)[0][0] == np.inf
    swapped = make_record(np.zeros((1, 5)), labels, k, token_groups)
    gone = np.where(np.arange(5) == swapped.alternative_ids[0, 1], -np.inf, 0.0)[None]
    assert regularizer_oracle(swapped, gone, labels, "masked-kl", tail, token_groups)[0][0] == np.inf


def test_what_is_not_defined_is_refused() -> None:
    b, z, labels, token_groups = make((5, 7), "plain")
    record = make_record(b, labels, 3, token_groups)
    for regularizer in ("masked-reverse-kl", "masked-js"):
        with pytest.raises(ValueError, match="not defined"):
            regularizer_oracle(record, z, labels, regularizer, "sampled")
    for form in FORMS:
        if form[1] != "renormalize":
            with pytest.raises(ValueError, match="not defined"):
                regularizer_oracle(record, z, labels, *form, token_groups, temperature=2.0)
    needy: list[Tail] = ["groups", "sampled"]
    for tail in needy:
        with pytest.raises(ValueError, match=r"groups need|sampled needs"):
            regularizer_oracle(record_oracle(b, labels, 3), z, labels, "masked-kl", tail, token_groups)
    bad = replace(record, tail_group_logprobs=np.zeros((5, GROUPS)))
    with pytest.raises(ValueError, match="has no token"):
        regularizer_oracle(bad, z, labels, "masked-kl", "groups", token_groups)
    bad = replace(record, draw_ids=np.repeat(labels[:, None], 5, axis=1))
    with pytest.raises(ValueError, match="not of its tail"):
        regularizer_oracle(bad, z, labels, "masked-kl", "sampled")
    nothing = regularizer_oracle(record_oracle(b, labels, 0), z, labels, "masked-kl", "renormalize")
    assert not nothing[0].any() and not nothing[1].any()
