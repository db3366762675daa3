"""Slow float64 references for the records and the regularisers, written from the formulas alone.

Legend: N positions, V vocabulary, K alternatives; natural logs. For every position: label y, base logits
b[V] and adapted logits z[V]; p = softmax(b), q = softmax(z). Every regulariser returns one value per position
[N] and its gradient with respect to z [N, V]: row i is d value[i] / d z[i]. Nothing here imports the code
under test. Sums over tokens are made in log space, never as one minus another sum.

Logits may hold -inf (a token that cannot occur), not nan or +inf. A divergence term with p = 0 is 0; one with
p > 0 and q = 0 makes the value inf, and the gradient of that row is then meaningless.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
ValueAndGradient = tuple[FloatArray, FloatArray]

PAD_ID = 2**32 - 1  # the id of an absent alternative, in rows that keep fewer than K


class RecordLike(Protocol):
    """What the record-based oracles read. Shapes: [N], [N, K], [N, K], [N]."""

    @property
    def label_logprobs(self) -> ArrayLike: ...
    @property
    def alternative_ids(self) -> ArrayLike: ...
    @property
    def alternative_logprobs(self) -> ArrayLike: ...
    @property
    def tail_logprobs(self) -> ArrayLike: ...


@dataclass(frozen=True)
class OracleRecord:
    """A record of N positions: [N], [N, K'], [N, K'], [N]; see record_oracle."""

    label_logprobs: FloatArray
    alternative_ids: IntArray
    alternative_logprobs: FloatArray
    tail_logprobs: FloatArray


@dataclass(frozen=True)
class OnlineLoss:
    """loss = cross_entropy + weight * masked_kl (two means, each with its count); gradient [N, V] of loss."""

    loss: float
    gradient: FloatArray
    cross_entropy: float
    masked_kl: float
    cross_entropy_count: int
    masked_kl_count: int


def log_softmax(x: FloatArray) -> FloatArray:
    """x_c - log sum exp(x), for x [M] with a finite entry; accurate where one entry dominates too."""
    if x.size == 0 or np.max(x) == -np.inf:
        raise ValueError("log_softmax of nothing: no entry has mass")
    top = int(np.argmax(x))
    shifted: FloatArray = x - x[top]
    return shifted - math.log1p(math.fsum(np.exp(np.delete(shifted, top))))


def log_sum_exp(x: FloatArray) -> float:
    """log sum_c exp(x_c) of x [M]; -inf when M = 0 or every entry is -inf."""
    if x.size == 0 or np.max(x) == -np.inf:
        return -math.inf
    top = int(np.argmax(x))
    return float(x[top] - log_softmax(x)[top])


def entropy_oracle(logits: ArrayLike) -> FloatArray:
    """-sum over the vocabulary of p(c) log p(c), in nats: [N] of logits [N, V]."""
    rows = [log_softmax(row) for row in np.asarray(logits, dtype=np.float64)]
    return np.array([-math.fsum(math.exp(x) * x for x in row if x > -math.inf) for row in rows])


def _divergence(log_p: Sequence[float], log_q: Sequence[float]) -> float:
    """sum_j p_j (log p_j - log q_j) over paired outcomes, with 0 log 0 = 0."""
    terms: list[float] = []
    for lp, lq in zip(log_p, log_q, strict=True):
        if lp == -math.inf:
            continue
        if lq == -math.inf:
            return math.inf
        terms.append(math.exp(lp) * (lp - lq))
    return math.fsum(terms)


def _checked(logits: ArrayLike, labels: ArrayLike) -> tuple[FloatArray, IntArray]:
    """Logits as float64 [N, V] and labels as int64 [N], every label in [0, V)."""
    z = np.asarray(logits, dtype=np.float64)
    y = np.asarray(labels, dtype=np.int64)
    if z.ndim != 2 or y.shape != z.shape[:1]:
        raise ValueError(f"logits {z.shape} and labels {y.shape} are not [N, V] and [N]")
    if np.isnan(z).any() or (z == np.inf).any():
        raise ValueError("logits hold nan or +inf")
    if ((y < 0) | (y >= z.shape[1])).any():
        raise ValueError("a label lies outside the vocabulary")
    return z, y


def record_oracle(base_logits: ArrayLike, labels: ArrayLike, k: int) -> OracleRecord:
    """The record of each position, from b [N, V] and y [N]; K' = min(k, V - 1).

    label_logprobs [N] = log p(y). alternative_ids [N, K'] = the K' most probable tokens other than y, most
    probable first, of equals the lowest id first; alternative_logprobs [N, K'] = log p of these, normalised
    over the whole vocabulary. tail_logprobs [N] = log sum of p over tokens neither y nor kept; -inf if none.
    """
    b, y = _checked(base_logits, labels)
    if k < 0:
        raise ValueError("k must not be negative")
    n, vocabulary = b.shape
    kept = min(k, vocabulary - 1)
    record = OracleRecord(np.zeros(n), np.zeros((n, kept), np.int64), np.zeros((n, kept)), np.zeros(n))
    for i in range(n):
        log_p = log_softmax(b[i])
        order = np.argsort(-b[i], kind="stable")
        others = order[order != y[i]]
        record.label_logprobs[i] = log_p[y[i]]
        record.alternative_ids[i] = others[:kept]
        record.alternative_logprobs[i] = log_p[others[:kept]]
        record.tail_logprobs[i] = log_sum_exp(log_p[others[kept:]])
    return record


@dataclass(frozen=True)
class _Row:
    """One position of a record, padding removed: S with its log p, T (all else but y) with its log mass."""

    kept: list[int]
    log_p_kept: list[float]
    tail: list[int]
    log_p_tail: float
    log_p_label: float


def _rows(record: RecordLike, y: IntArray, vocabulary: int) -> list[_Row]:
    """The N rows of a record; a record that contradicts the labels or the vocabulary is a ValueError."""
    ids = np.asarray(record.alternative_ids, dtype=np.int64)
    log_p = np.asarray(record.alternative_logprobs, dtype=np.float64)
    label = np.asarray(record.label_logprobs, dtype=np.float64)
    tail = np.asarray(record.tail_logprobs, dtype=np.float64)
    if ids.ndim != 2 or log_p.shape != ids.shape or not label.shape == tail.shape == y.shape == ids.shape[:1]:
        raise ValueError("the record's shapes are not [N], [N, K], [N, K], [N]")
    rows: list[_Row] = []
    for i in range(y.shape[0]):
        present = [j for j in range(ids.shape[1]) if ids[i, j] != PAD_ID]
        kept = [int(ids[i, j]) for j in present]
        named = {int(y[i]), *kept}
        if len(named) != len(kept) + 1 or min(named) < 0 or max(named) >= vocabulary:
            raise ValueError(f"row {i} keeps its label, a token twice, or a token outside the vocabulary")
        rest = [c for c in range(vocabulary) if c not in named]
        if not rest and tail[i] != -math.inf:
            raise ValueError(f"row {i} has tail mass but no token is left for it")
        rows.append(_Row(kept, [float(log_p[i, j]) for j in present], rest, float(tail[i]), float(label[i])))
    return rows


def _bucket_row(
    log_q: FloatArray, kept: list[int], log_p_kept: list[float], tail: list[int], log_p_tail: float
) -> tuple[float, FloatArray]:
    """KL(p || q) over the kept outcomes and, where it holds a token, the tail T; log_q [V] is -inf elsewhere.

    Gradient [V]: q_j - p_j on kept; q_j (1 - p_T / q_T) = q_j - p_T (q_j / q_T) on tail; 0 elsewhere.
    """
    gradient = np.zeros_like(log_q)
    outcomes_p, outcomes_q = list(log_p_kept), [float(log_q[c]) for c in kept]
    for c, lp in zip(kept, log_p_kept, strict=True):
        gradient[c] = math.exp(log_q[c]) - math.exp(lp)
    if tail:
        log_q_tail = log_sum_exp(log_q[tail])
        outcomes_p.append(log_p_tail)
        outcomes_q.append(log_q_tail)
        for c in tail:
            if log_q[c] != -math.inf:
                gradient[c] = math.exp(log_q[c]) - math.exp(log_p_tail + (log_q[c] - log_q_tail))
    return _divergence(outcomes_p, outcomes_q), gradient


def masked_kl_full_oracle(b: ArrayLike, z: ArrayLike, labels: ArrayLike) -> ValueAndGradient:
    """KL(p\\y || q\\y) with p\\y(c) = p(c) / (1 - p(y)) for c != y, and q likewise (arXiv 2605.29498, eq. 1).

    b [N, V], z [N, V], labels [N] -> value [N], gradient [N, V]: q\\y(c) - p\\y(c) for c != y, 0 at y.
    1 - p(y) is the sum of p over c != y.
    """
    base, y = _checked(b, labels)
    adapted, _ = _checked(z, labels)
    if base.shape != adapted.shape:
        raise ValueError("base and adapted logits differ in shape")
    value, gradient = np.zeros(y.shape[0]), np.zeros_like(adapted)
    for i in range(y.shape[0]):
        others = [c for c in range(base.shape[1]) if c != y[i]]
        if not others:
            continue
        log_p, log_q = log_softmax(base[i])[others], log_softmax(adapted[i])[others]
        log_p, log_q = log_p - log_sum_exp(log_p), log_q - log_sum_exp(log_q)
        value[i] = _divergence(log_p.tolist(), log_q.tolist())
        gradient[i, others] = np.exp(log_q) - np.exp(log_p)
    return value, gradient


def masked_kl_bucket_oracle(record: RecordLike, z: ArrayLike, labels: ArrayLike) -> ValueAndGradient:
    """KL(p' || q') over each kept alternative j in S and T = all that is neither y nor in S.

    p'_j = p_j / (1 - p(y)), p'_T = tail / (1 - p(y)); q' from z over c != y. 1 - p(y) is the recorded mass of
    S and T added up: 1 - exp(label_logprob) is 0 at a saturated label. z [N, V], labels [N] -> value [N],
    gradient [N, V]: q'_j - p'_j on S; q'_j (1 - p'_T / q'_T) on T; 0 at y. A T without tokens has no term.
    """
    adapted, y = _checked(z, labels)
    value, gradient = np.zeros(y.shape[0]), np.zeros_like(adapted)
    for i, row in enumerate(_rows(record, y, adapted.shape[1])):
        if not row.kept and not row.tail:
            continue
        log_p = log_softmax(np.array([*row.log_p_kept, row.log_p_tail])).tolist()
        log_q = log_softmax(np.where(np.arange(adapted.shape[1]) == y[i], -np.inf, adapted[i]))
        value[i], gradient[i] = _bucket_row(log_q, row.kept, log_p[:-1], row.tail, log_p[-1])
    return value, gradient


def masked_kl_renormalize_oracle(record: RecordLike, z: ArrayLike, labels: ArrayLike) -> ValueAndGradient:
    """KL(p_S || q_S), p and q restricted to the kept alternatives S and each renormalised there.

    z [N, V], labels [N] -> value [N], gradient [N, V]: q_S - p_S on S, 0 elsewhere. An empty S gives 0.
    """
    adapted, y = _checked(z, labels)
    value, gradient = np.zeros(y.shape[0]), np.zeros_like(adapted)
    for i, row in enumerate(_rows(record, y, adapted.shape[1])):
        if row.kept:
            log_p, log_q = log_softmax(np.array(row.log_p_kept)), log_softmax(adapted[i, row.kept])
            value[i] = _divergence(log_p.tolist(), log_q.tolist())
            gradient[i, row.kept] = np.exp(log_q) - np.exp(log_p)
    return value, gradient


def full_kl_bucket_oracle(record: RecordLike, z: ArrayLike, labels: ArrayLike) -> ValueAndGradient:
    """KL(p || q) over the label, each kept alternative, and the tail T; p as recorded, nothing removed.

    z [N, V], labels [N] -> value [N], gradient [N, V]: q_j - p_j on y and S; q_j (1 - p_T / q_T) on T.
    """
    adapted, y = _checked(z, labels)
    value, gradient = np.zeros(y.shape[0]), np.zeros_like(adapted)
    for i, row in enumerate(_rows(record, y, adapted.shape[1])):
        kept, log_p = [int(y[i]), *row.kept], [row.log_p_label, *row.log_p_kept]
        value[i], gradient[i] = _bucket_row(log_softmax(adapted[i]), kept, log_p, row.tail, row.log_p_tail)
    return value, gradient


def cross_entropy_oracle(z: ArrayLike, labels: ArrayLike) -> ValueAndGradient:
    """-log q(y); z [N, V], labels [N] -> value [N], gradient [N, V]: q(c) for c != y, minus that sum at y."""
    adapted, y = _checked(z, labels)
    value, gradient = np.zeros(y.shape[0]), np.zeros_like(adapted)
    for i, label in enumerate(y.tolist()):
        log_q = log_softmax(adapted[i])
        value[i] = -log_q[label]
        gradient[i] = np.exp(log_q)
        gradient[i, label] = -math.exp(log_sum_exp(np.delete(log_q, label)))
    return value, gradient


def online_masked_kl_loss(
    base_logits: ArrayLike,
    logits: ArrayLike,
    labels: ArrayLike,
    mask: ArrayLike,
    weight: float,
    saturation: float = 1e-4,
) -> OnlineLoss:
    """mean of -log q(y) over A + weight * mean of KL(p\\y || q\\y) over B, as with a live base.

    A = positions with mask; B = those of A with p(y) <= 1 - saturation; a mean has its own count, and over
    nothing is 0. base_logits, logits [N, V], labels [N], mask bool [N]; a label outside A is never read.
    """
    chosen = np.asarray(mask, dtype=np.bool_)
    b, y = _checked(base_logits, np.where(chosen, np.asarray(labels, dtype=np.int64), 0))
    z, _ = _checked(logits, y)
    in_a = [i for i in range(y.shape[0]) if chosen[i]]
    in_b = [i for i in in_a if math.exp(log_softmax(b[i])[y[i]]) <= 1.0 - saturation]
    gradient = np.zeros_like(z)
    ce, ce_gradient = cross_entropy_oracle(z[in_a], y[in_a])
    kl, kl_gradient = masked_kl_full_oracle(b[in_b], z[in_b], y[in_b])
    gradient[in_a] += ce_gradient / max(len(in_a), 1)
    gradient[in_b] += weight * kl_gradient / max(len(in_b), 1)
    ce_mean, kl_mean = math.fsum(ce) / max(len(in_a), 1), math.fsum(kl) / max(len(in_b), 1)
    return OnlineLoss(ce_mean + weight * kl_mean, gradient, ce_mean, kl_mean, len(in_a), len(in_b))


def finite_difference(f: Callable[[FloatArray], ArrayLike], z: FloatArray, step: float = 1e-5) -> FloatArray:
    """Central differences of sum(f(z)) by each entry of z [N, V] -> [N, V]; f returns [N] or a scalar."""
    gradient = np.zeros_like(z)
    for at in np.ndindex(*z.shape):
        up, down = z.copy(), z.copy()
        up[at] += step
        down[at] -= step
        change = np.asarray(f(up), dtype=np.float64) - np.asarray(f(down), dtype=np.float64)
        gradient[at] = float(np.sum(change)) / float(up[at] - down[at])
    return gradient
