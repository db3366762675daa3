"""Checks of the oracles themselves: finite differences, identities, and 60-digit arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal, localcontext
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from support.oracle_cases import SCALES, cases, make_logits, rng_of
from support.oracles import (
    PAD_ID,
    FloatArray,
    IntArray,
    OracleRecord,
    cross_entropy_oracle,
    finite_difference,
    full_kl_bucket_oracle,
    log_softmax,
    log_sum_exp,
    masked_kl_bucket_oracle,
    masked_kl_full_oracle,
    masked_kl_renormalize_oracle,
    online_masked_kl_loss,
    record_oracle,
)

SHAPES = [(1, 2), (4, 2), (3, 3), (5, 7), (2, 13)]
RECORD_ORACLES = [masked_kl_bucket_oracle, masked_kl_renormalize_oracle, full_kl_bucket_oracle]

shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")


def make(shape: tuple[int, int], scale: str) -> tuple[FloatArray, FloatArray, IntArray]:
    return make_logits(rng_of(shape, scale), shape, scale)


def ks(v: int) -> list[int]:
    return sorted({0, 1, v // 2, v - 2, v - 1, v + 3})


def pad(record: OracleRecord, keep: list[int]) -> OracleRecord:
    """Row i keeps its first keep[i] alternatives; the others become padding and their mass joins the tail."""
    ids, logs, tail = (
        record.alternative_ids.copy(),
        record.alternative_logprobs.copy(),
        record.tail_logprobs.copy(),
    )
    for i, k in enumerate(keep):
        tail[i] = log_sum_exp(np.array([*logs[i, k:], tail[i]]))
        ids[i, k:], logs[i, k:] = PAD_ID, -np.inf
    return OracleRecord(record.label_logprobs, ids, logs, tail)


def log_other_mass(x: FloatArray, labels: IntArray) -> FloatArray:
    """log(1 - softmax(x)(y)) [N]."""
    return np.array([log_sum_exp(np.delete(log_softmax(r), y)) for r, y in zip(x, labels, strict=True)])


def full_kl(b: FloatArray, z: FloatArray) -> tuple[FloatArray, FloatArray]:
    """KL(p || q) over the whole vocabulary, and its gradient q - p."""
    log_p, log_q = np.stack([log_softmax(r) for r in b]), np.stack([log_softmax(r) for r in z])
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=1), np.exp(log_q) - np.exp(log_p)


def assert_close(actual: float, expected: float) -> None:
    np.testing.assert_allclose(float(actual), expected, rtol=1e-12, atol=1e-15)


# --- the record


def test_record_by_hand() -> None:
    p = np.array([[1 / 8, 1 / 2, 1 / 8, 1 / 4], [1 / 8, 1 / 2, 1 / 8, 1 / 4]])
    record = record_oracle(np.log(p) + 3.0, np.array([3, 1]), 2)
    assert record.alternative_ids.tolist() == [[1, 0], [3, 0]]
    np.testing.assert_allclose(np.exp(record.label_logprobs), [1 / 4, 1 / 2], rtol=1e-14)
    np.testing.assert_allclose(np.exp(record.alternative_logprobs), [[1 / 2, 1 / 8], [1 / 4, 1 / 8]], rtol=1e-14)
    np.testing.assert_allclose(np.exp(record.tail_logprobs), [1 / 8, 1 / 8], rtol=1e-14)


def test_ties_go_to_the_lowest_id() -> None:
    record = record_oracle(np.array([[0.0, 1.0, 0.0, 1.0, 0.0, 1.0]]), np.array([1]), 4)
    assert record.alternative_ids.tolist() == [[3, 5, 0, 2]]


@shapes
@cases
def test_record_masses(shape: tuple[int, int], scale: str) -> None:
    b, _, labels = make(shape, scale)
    for k in ks(shape[1]):
        record = record_oracle(b, labels, k)
        kept = min(k, shape[1] - 1)
        assert record.alternative_ids.shape == record.alternative_logprobs.shape == (shape[0], kept)
        mass = np.exp(record.label_logprobs) + np.exp(record.alternative_logprobs).sum(axis=1)
        np.testing.assert_allclose(mass + np.exp(record.tail_logprobs), 1.0, rtol=1e-13)
        assert bool(np.all(np.diff(record.alternative_logprobs, axis=1) <= 0))
        assert bool(np.all(record.alternative_ids != labels[:, None]))
        assert bool(np.all((record.tail_logprobs == -np.inf) == (kept == shape[1] - 1)))
        if kept:
            unkept = [
                max([-np.inf, *np.delete(b[i], [labels[i], *ids])]) for i, ids in enumerate(record.alternative_ids)
            ]
            assert bool(np.all(b[np.arange(shape[0]), record.alternative_ids[:, -1]] >= unkept))


def test_one_token_vocabulary() -> None:
    record = record_oracle(np.array([[2.0]]), np.array([0]), 3)
    assert record.alternative_ids.shape == (1, 0)
    assert record.label_logprobs[0] == 0.0 and record.tail_logprobs[0] == -np.inf


@pytest.mark.parametrize("scale", SCALES)
def test_sixty_digits(scale: str) -> None:
    """Record, bucketed and full masked KL, and full bucketed KL against decimal arithmetic."""
    b, z, labels = make((5, 7), scale)
    k = 3
    record = record_oracle(b, labels, k)
    bucket, full = masked_kl_bucket_oracle(record, z, labels), masked_kl_full_oracle(b, z, labels)
    whole, renormalized = (
        full_kl_bucket_oracle(record, z, labels),
        masked_kl_renormalize_oracle(record, z, labels),
    )
    with localcontext() as context:
        context.prec = 160

        def divergence(p: list[Decimal], q: list[Decimal]) -> float:
            p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
            return float(sum((x * (x / w).ln() for x, w in zip(p, q, strict=True)), Decimal(0)))

        for i, y in enumerate(labels.tolist()):
            p = [Decimal(float(x)).exp() for x in b[i]]
            q = [Decimal(float(x)).exp() for x in z[i]]
            order = sorted((c for c in range(7) if c != y), key=lambda c: (-b[i, c], c))
            kept, rest = order[:k], order[k:]
            total = sum(p, Decimal(0))
            assert record.alternative_ids[i].tolist() == kept
            logs = [float((p[c] / total).ln()) for c in [y, *kept]]
            tail = float((sum((p[c] for c in rest), Decimal(0)) / total).ln())
            np.testing.assert_allclose(record.label_logprobs[i], logs[0], rtol=1e-13, atol=0)
            np.testing.assert_allclose(record.alternative_logprobs[i], logs[1:], rtol=1e-13, atol=0)
            np.testing.assert_allclose(record.tail_logprobs[i], tail, rtol=1e-13, atol=0)

            def outcomes(x: list[Decimal], kept: list[int] = kept, rest: list[int] = rest) -> list[Decimal]:
                return [*(x[c] for c in kept), sum((x[c] for c in rest), Decimal(0))]

            assert_close(full[0][i], divergence([p[c] for c in order], [q[c] for c in order]))
            assert_close(bucket[0][i], divergence(outcomes(p), outcomes(q)))
            assert_close(renormalized[0][i], divergence(outcomes(p)[:-1], outcomes(q)[:-1]))
            assert_close(whole[0][i], divergence([p[y], *outcomes(p)], [q[y], *outcomes(q)]))
            q_sum = sum((q[c] for c in order), Decimal(0))
            p_tail, q_tail = outcomes(p)[-1] / sum(outcomes(p)), outcomes(q)[-1] / q_sum
            for c in rest:
                expected = float(q[c] / q_sum * (1 - p_tail / q_tail))
                np.testing.assert_allclose(bucket[1][i, c], expected, rtol=1e-11, atol=1e-16)


# --- gradients


def assert_gradient(f: Callable[[FloatArray], tuple[FloatArray, FloatArray]], z: FloatArray) -> None:
    value, gradient = f(z)
    assert value.shape == z.shape[:1] and gradient.shape == z.shape
    assert bool(np.all(np.isfinite(value))) and bool(np.all(value >= -1e-13))
    np.testing.assert_allclose(gradient, finite_difference(lambda x: f(x)[0], z), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(gradient.sum(axis=1), 0.0, atol=1e-13)


@shapes
@cases
def test_gradients(shape: tuple[int, int], scale: str) -> None:
    b, z, labels = make(shape, scale)
    rows = np.arange(shape[0])
    assert_gradient(lambda x: cross_entropy_oracle(x, labels), z)
    assert_gradient(lambda x: masked_kl_full_oracle(b, x, labels), z)
    assert bool(np.all(masked_kl_full_oracle(b, z, labels)[1][rows, labels] == 0))
    for k in sorted({0, 1, shape[1] // 2, shape[1] - 1}):
        record = record_oracle(b, labels, k)
        for oracle in RECORD_ORACLES:
            assert_gradient(partial(oracle, record, labels=labels), z)
        for oracle in RECORD_ORACLES[:2]:
            assert bool(np.all(oracle(record, z, labels)[1][rows, labels] == 0))


def test_finite_difference_of_a_known_function() -> None:
    z = np.array([[0.5, -1.0], [2.0, 3.0]])
    np.testing.assert_allclose(finite_difference(lambda x: (x**2).sum(axis=1), z), 2 * z, rtol=1e-8)
    product = finite_difference(lambda x: float(x[0, 0] * x[1, 1]), z)
    np.testing.assert_allclose(product, np.array([[3.0, 0.0], [0.0, 0.5]]), atol=1e-8)


# --- identities


@shapes
@cases
def test_bucket_is_full_when_everything_is_kept(shape: tuple[int, int], scale: str) -> None:
    b, z, labels = make(shape, scale)
    value, gradient = masked_kl_full_oracle(b, z, labels)
    record = record_oracle(b, labels, shape[1] - 1)
    for oracle in (masked_kl_bucket_oracle, masked_kl_renormalize_oracle):
        other, other_gradient = oracle(record, z, labels)
        np.testing.assert_allclose(other, value, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(other_gradient, gradient, rtol=1e-12, atol=1e-14)
    whole, whole_gradient = full_kl_bucket_oracle(record, z, labels)
    np.testing.assert_allclose(whole, full_kl(b, z)[0], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(whole_gradient, full_kl(b, z)[1], rtol=1e-12, atol=1e-14)


@shapes
@cases
def test_masked_full_is_softmax_with_the_label_at_minus_infinity(shape: tuple[int, int], scale: str) -> None:
    b, z, labels = make(shape, scale)
    value, gradient = masked_kl_full_oracle(b, z, labels)
    for i, y in enumerate(labels):
        masked_b, masked_z = b[i].copy(), z[i].copy()
        masked_b[y] = masked_z[y] = -np.inf
        log_p, log_q = np.delete(log_softmax(masked_b), y), np.delete(log_softmax(masked_z), y)
        np.testing.assert_allclose(value[i], np.sum(np.exp(log_p) * (log_p - log_q)), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(np.delete(gradient[i], y), np.exp(log_q) - np.exp(log_p), rtol=1e-12, atol=1e-14)


@shapes
@cases
def test_coarser_is_smaller(shape: tuple[int, int], scale: str) -> None:
    b, z, labels = make(shape, scale)
    for oracle, limit in (
        (masked_kl_bucket_oracle, masked_kl_full_oracle(b, z, labels)[0]),
        (full_kl_bucket_oracle, full_kl(b, z)[0]),
    ):
        values = [oracle(record_oracle(b, labels, k), z, labels)[0] for k in range(shape[1])] + [limit]
        for coarse, fine in pairwise(values):
            assert bool(np.all(coarse <= fine + 1e-12 * (1 + fine)))


@shapes
@cases
def test_zero_at_the_base(shape: tuple[int, int], scale: str) -> None:
    b, _, labels = make(shape, scale)
    z = b + 2.5  # the same distribution
    results = [masked_kl_full_oracle(b, z, labels)]
    results += [o(record_oracle(b, labels, k), z, labels) for o in RECORD_ORACLES for k in ks(shape[1])]
    for value, gradient in results:
        np.testing.assert_allclose(value, 0.0, atol=5e-14)
        np.testing.assert_allclose(gradient, 0.0, atol=5e-14)


@shapes
@cases
def test_chain_rule(shape: tuple[int, int], scale: str) -> None:
    """KL(p || q) = binary KL(p(y), q(y)) + (1 - p(y)) KL(p' || q'), in full and over buckets."""
    b, z, labels = make(shape, scale)
    log_p, log_q = (-cross_entropy_oracle(x, labels)[0] for x in (b, z))
    log_not_p, log_not_q = log_other_mass(b, labels), log_other_mass(z, labels)
    binary = np.exp(log_p) * (log_p - log_q) + np.exp(log_not_p) * (log_not_p - log_not_q)
    expected = binary + np.exp(log_not_p) * masked_kl_full_oracle(b, z, labels)[0]
    np.testing.assert_allclose(full_kl(b, z)[0], expected, rtol=1e-12, atol=1e-14)
    for k in ks(shape[1]):
        record = record_oracle(b, labels, k)
        expected = binary + np.exp(log_not_p) * masked_kl_bucket_oracle(record, z, labels)[0]
        np.testing.assert_allclose(full_kl_bucket_oracle(record, z, labels)[0], expected, rtol=1e-12, atol=1e-14)


def test_the_masked_forms_ignore_the_label_logit() -> None:
    b, z, labels = make((5, 7), "plain")
    record, moved = record_oracle(b, labels, 3), z.copy()
    moved[np.arange(5), labels] += 40.0
    for oracle in RECORD_ORACLES[:2]:
        for one, two in zip(oracle(record, z, labels), oracle(record, moved, labels), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(
        masked_kl_full_oracle(b, z, labels)[0], masked_kl_full_oracle(b, moved, labels)[0], rtol=1e-12
    )


# --- padding and malformed input


@cases
def test_padded_rows_equal_shorter_rows(scale: str) -> None:
    b, z, labels = make((5, 7), scale)
    keep = [0, 1, 3, 5, 6]
    record = pad(record_oracle(b, labels, 6), keep)
    unsigned = np.asarray(record.alternative_ids).astype(np.uint32)
    assert unsigned[0, 0] == PAD_ID
    for oracle in RECORD_ORACLES:
        value, gradient = oracle(record, z, labels)
        for i, k in enumerate(keep):
            row = slice(i, i + 1)
            expected, expected_gradient = oracle(record_oracle(b[row], labels[row], k), z[row], labels[row])
            np.testing.assert_allclose(value[row], expected, rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(gradient[row], expected_gradient, rtol=1e-12, atol=1e-14)
        assert_gradient(partial(oracle, record, labels=labels), z)
    assert masked_kl_renormalize_oracle(record, z, labels)[0][0] == 0.0


def test_tokens_that_cannot_occur() -> None:
    """-inf logits: p = 0 terms vanish; q = 0 where p > 0 is an infinite divergence."""
    b, z, labels = np.zeros((1, 4)), np.zeros((1, 4)), np.array([0])
    b[0, 3] = -np.inf
    np.testing.assert_allclose(masked_kl_full_oracle(b, z, labels)[0], math.log(3 / 2))
    for k in (1, 2, 3):
        record = record_oracle(b, labels, k)
        expected = math.log(3 / 2) if k >= 2 else 0.5 * math.log(1.5) + 0.5 * math.log(0.5 / (2 / 3))
        np.testing.assert_allclose(masked_kl_bucket_oracle(record, z, labels)[0], expected)
        assert_gradient(partial(masked_kl_bucket_oracle, record, labels=labels), z)
    assert masked_kl_full_oracle(z, b, labels)[0][0] == np.inf


def test_a_record_that_contradicts_its_labels_is_refused() -> None:
    b, z, labels = make((5, 7), "plain")
    record = record_oracle(b, labels, 6)
    tail = replace(record, tail_logprobs=np.full(5, -3.0))
    twice = replace(record, alternative_ids=np.repeat(record.alternative_ids[:, :1], 6, axis=1))
    for oracle in RECORD_ORACLES:
        for bad_record, bad_labels in ((record, (labels + 1) % 7), (tail, labels), (twice, labels)):
            with pytest.raises(ValueError, match=r"keeps its label|tail mass"):
                oracle(bad_record, z, bad_labels)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        record_oracle(b, labels + 7, 2)


# --- the online loss


def test_online_loss() -> None:
    b, z, labels = make((6, 5), "plain")
    mask = np.array([True, False, True, True, False, True])
    b[2, labels[2]] += 30.0  # saturated and masked in: counts for the cross-entropy alone
    labels[4] = -100  # masked out: never read
    result = online_masked_kl_loss(b, z, labels, mask, 0.7)
    ce, kl = [0, 2, 3, 5], [0, 3, 5]
    expected_ce = cross_entropy_oracle(z[ce], labels[ce])[0].mean()
    expected_kl = masked_kl_full_oracle(b[kl], z[kl], labels[kl])[0].mean()
    assert (result.cross_entropy_count, result.masked_kl_count) == (4, 3)
    np.testing.assert_allclose(result.loss, expected_ce + 0.7 * expected_kl, rtol=1e-14)
    np.testing.assert_allclose([result.cross_entropy, result.masked_kl], [expected_ce, expected_kl], rtol=1e-14)
    numeric = finite_difference(lambda x: online_masked_kl_loss(b, x, labels, mask, 0.7).loss, z)
    np.testing.assert_allclose(result.gradient, numeric, rtol=1e-6, atol=1e-9)
    assert bool(np.all(result.gradient[~mask] == 0))


def test_online_threshold_and_empty_means() -> None:
    p = np.array([1 - 2e-4, 1 - 0.5e-4])
    b = np.log(np.stack([p, 1 - p], axis=1))
    z, labels = np.zeros((2, 2)), np.zeros(2, np.int64)
    assert online_masked_kl_loss(b, z, labels, np.ones(2, np.bool_), 1.0).masked_kl_count == 1
    only = online_masked_kl_loss(b, z, labels, np.array([False, True]), 5.0)
    assert (only.masked_kl, only.masked_kl_count) == (0.0, 0)
    np.testing.assert_allclose(only.loss, math.log(2), rtol=1e-14)
    nothing = online_masked_kl_loss(b, z, labels, np.zeros(2, np.bool_), 5.0)
    assert nothing.loss == 0.0 and not nothing.gradient.any()
