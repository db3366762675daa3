"""Slow float64 references for every regulariser and tail, written from the formulas alone (see oracles.py).

One position: label y, kept alternatives S, T everything else. A form first says which outcomes there are, an
outcome being a set of tokens and its recorded log mass:

    renormalize   each token of S
    bucket        each token of S; T
    groups        each token of S; T ∩ g for each group g that has a token in T
    (full-kl)     y, before these

P = the recorded masses normalised over the outcomes; Q = the adapted masses, likewise. With L_j = log sum exp of
z over outcome j, Q = softmax(L), so that the gradient by z_c is d value / d L_j times the share of c in outcome j:

    masked-kl, full-kl    sum P log(P/Q)                               d / d L_j = Q_j - P_j
    masked-reverse-kl     sum Q log(Q/P)                               d / d L_j = Q_j (log(Q_j/P_j) - value)
    masked-js             1/2 KL(P || m) + 1/2 KL(Q || m), m=(P+Q)/2   d / d L_j = Q_j/2 (log(Q_j/m_j) - KL(Q || m))

`sampled` has no outcomes: q is exact over the vocabulary (without y if masked), the weights are p on S and p_T / M
on each of the M draws from T. Nothing here imports the code under test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from support.oracles import (
    PAD_ID,
    FloatArray,
    IntArray,
    OracleRecord,
    ValueAndGradient,
    _checked,
    _divergence,
    _Row,
    _rows,
    log_softmax,
    log_sum_exp,
)

Regularizer = Literal["masked-kl", "masked-reverse-kl", "masked-js", "full-kl"]
Tail = Literal["bucket", "renormalize", "groups", "sampled"]
Weighting = Literal["uniform", "non-target-mass"]

OUTCOME_TAILS: tuple[Tail, ...] = ("renormalize", "bucket", "groups")
FORMS: list[tuple[Regularizer, Tail]] = [
    *(("masked-kl", tail) for tail in (*OUTCOME_TAILS, "sampled")),
    *(("masked-reverse-kl", tail) for tail in OUTCOME_TAILS),
    *(("masked-js", tail) for tail in OUTCOME_TAILS),
    *(("full-kl", tail) for tail in (*OUTCOME_TAILS, "sampled")),
]  # every form that is defined


@dataclass(frozen=True)
class FormsRecord(OracleRecord):
    """A record with what `groups` and `sampled` need besides: [N, G], [N, M] and [N, M]."""

    tail_group_logprobs: FloatArray | None = None
    draw_ids: IntArray | None = None
    draw_logprobs: FloatArray | None = None


def tail_group_oracle(
    base_logits: ArrayLike, labels: ArrayLike, record: OracleRecord, token_groups: ArrayLike, groups: int
) -> FloatArray:
    """log of the base's mass on T ∩ g [N, G], -inf where there is none; token_groups int [V] in [0, groups)."""
    b, y = _checked(base_logits, labels)
    group_of = _checked_groups(token_groups, b.shape[1], groups)
    masses = np.zeros((y.shape[0], groups))
    for i, row in enumerate(_rows(record, y, b.shape[1])):
        log_p = log_softmax(b[i])
        for g in range(groups):
            masses[i, g] = log_sum_exp(log_p[[c for c in row.tail if group_of[c] == g]])
    return masses


def draw_tail_samples(
    base_logits: ArrayLike, labels: ArrayLike, record: OracleRecord, draws: int, rng: np.random.Generator
) -> tuple[IntArray, FloatArray]:
    """Tokens drawn from p on T with replacement [N, M], most probable first, and their log p [N, M].

    Log p is normalised over the whole vocabulary. Where the base has no mass on T: PAD_ID and -inf.
    """
    b, y = _checked(base_logits, labels)
    ids = np.full((y.shape[0], draws), PAD_ID, np.int64)
    logprobs = np.full((y.shape[0], draws), -np.inf)
    for i, row in enumerate(_rows(record, y, b.shape[1])):
        log_p = log_softmax(b[i])
        if log_sum_exp(log_p[row.tail]) == -math.inf:
            continue
        drawn = rng.choice(np.array(row.tail), size=draws, p=np.exp(log_softmax(log_p[row.tail])))
        ids[i] = drawn[np.lexsort((drawn, -log_p[drawn]))]
        logprobs[i] = log_p[ids[i]]
    return ids, logprobs


def complete_record(
    base_logits: ArrayLike,
    labels: ArrayLike,
    record: OracleRecord,
    token_groups: ArrayLike,
    groups: int,
    draws: int,
    rng: np.random.Generator,
) -> FormsRecord:
    """The record with the tail's groups and draws added."""
    ids, logprobs = draw_tail_samples(base_logits, labels, record, draws, rng)
    return FormsRecord(
        record.label_logprobs,
        record.alternative_ids,
        record.alternative_logprobs,
        record.tail_logprobs,
        tail_group_oracle(base_logits, labels, record, token_groups, groups),
        ids,
        logprobs,
    )


def counted_oracle(
    record: OracleRecord, regularizer: Regularizer, tail: Tail, min_base_rest: float
) -> NDArray[np.bool_]:
    """Positions of the mean [N]: masked forms leave out those with less than min_base_rest on S and T together, and
    renormalised those that keep one alternative or none, since one outcome alone always has probability 1."""
    if regularizer == "full-kl":
        return np.ones(np.shape(record.tail_logprobs)[0], np.bool_)
    rest = [
        log_sum_exp(np.append(s, t)) for s, t in zip(record.alternative_logprobs, record.tail_logprobs, strict=True)
    ]
    enough = [math.exp(r) >= min_base_rest for r in rest]
    several = [np.count_nonzero(np.asarray(ids) != PAD_ID) >= 2 for ids in record.alternative_ids]
    return np.array(enough, np.bool_) & (np.array(several, np.bool_) | (tail != "renormalize"))


def regularizer_oracle(
    record: OracleRecord,
    z: ArrayLike,
    labels: ArrayLike,
    regularizer: Regularizer,
    tail: Tail,
    token_groups: ArrayLike | None = None,
    temperature: float = 1.0,
    weighting: Weighting = "uniform",
    min_adapted_rest: float = 0.0,
) -> ValueAndGradient:
    """Value [N] and gradient [N, V] of one form; z [N, V], labels [N].

    Temperature t: P ∝ recorded^(1/t), Q from z / t, value times t^2 (the gradient by z then times t). Weighting
    non-target-mass: times the recorded mass of S and T. Masked forms: value and gradient 0 where the adapted
    mass beside y, of z itself, is below min_adapted_rest. No outcome at all: 0. Outcomes without any recorded
    mass have no P: nan.
    """
    if (regularizer, tail) not in FORMS or (temperature != 1.0 and tail != "renormalize"):
        raise ValueError(f"not defined: {regularizer} with {tail} at temperature {temperature}")
    adapted, y = _checked(z, labels)
    group_of = None if token_groups is None else _checked_groups(token_groups, adapted.shape[1], None)
    value, gradient = np.zeros(y.shape[0]), np.zeros_like(adapted)
    for i, row in enumerate(_rows(record, y, adapted.shape[1])):
        label = int(y[i])
        if regularizer != "full-kl" and min_adapted_rest > 0:
            rest = log_sum_exp(np.delete(adapted[i], label)) - log_sum_exp(adapted[i])
            if math.exp(rest) < min_adapted_rest:
                continue
        if tail == "sampled":
            value[i], gradient[i] = _sampled_row(row, label, adapted[i], regularizer == "full-kl", *_draws(record, i))
        else:
            outcomes = _outcomes(row, tail, group_of, record, i)
            if regularizer == "full-kl":
                outcomes.insert(0, _Outcome([label], row.log_p_label))
            value[i], gradient[i] = _outcomes_row(outcomes, adapted[i] / temperature, temperature, regularizer)
        factor = 1.0
        if weighting == "non-target-mass":
            factor = math.exp(log_sum_exp(np.array([*row.log_p_kept, row.log_p_tail])))
        value[i] *= factor * temperature**2
        gradient[i] *= factor * temperature  # temperature**2, and d (z / t) / d z
    return value, gradient


@dataclass(frozen=True)
class _Outcome:
    tokens: list[int]
    log_p: float  # recorded


def _checked_groups(token_groups: ArrayLike, vocabulary: int, groups: int | None) -> IntArray:
    group_of = np.asarray(token_groups, dtype=np.int64)
    if group_of.shape != (vocabulary,) or (group_of < 0).any() or (groups is not None and (group_of >= groups).any()):
        raise ValueError("token_groups is not an int [V] in [0, groups)")
    return group_of


def _outcomes(row: _Row, tail: Tail, group_of: IntArray | None, record: OracleRecord, i: int) -> list[_Outcome]:
    """The outcomes of S and T; those of T only where the vocabulary leaves them a token."""
    outcomes = [_Outcome([c], log_p) for c, log_p in zip(row.kept, row.log_p_kept, strict=True)]
    if not row.tail or tail == "renormalize":
        return outcomes
    if tail == "bucket":
        return [*outcomes, _Outcome(row.tail, row.log_p_tail)]
    if group_of is None or not isinstance(record, FormsRecord) or record.tail_group_logprobs is None:
        raise ValueError("groups need token_groups and the record's tail_group_logprobs")
    recorded = np.asarray(record.tail_group_logprobs, dtype=np.float64)[i]
    if row.log_p_tail == -math.inf:
        masses = np.full(recorded.shape, -math.inf)
    else:
        masses = row.log_p_tail + log_softmax(recorded)  # only their shares are used
    for g, log_p in enumerate(masses.tolist()):
        tokens = [c for c in row.tail if group_of[c] == g]
        if tokens:
            outcomes.append(_Outcome(tokens, log_p))
        elif log_p != -math.inf:
            raise ValueError(f"row {i} has mass in group {g}, which has no token in its tail")
    return outcomes


def _outcomes_row(
    outcomes: Sequence[_Outcome], z: FloatArray, temperature: float, regularizer: Regularizer
) -> tuple[float, FloatArray]:
    """The divergence over outcomes and its gradient by z [V], z already divided by the temperature."""
    gradient = np.zeros_like(z)
    if not outcomes:
        return 0.0, gradient
    recorded = np.array([outcome.log_p for outcome in outcomes]) / temperature
    if np.max(recorded) == -np.inf:
        return math.nan, np.full_like(z, math.nan)
    log_p = log_softmax(recorded)
    log_q = log_softmax(np.array([log_sum_exp(z[outcome.tokens]) for outcome in outcomes]))
    value, slopes = _divergence_and_slopes(log_p, log_q, regularizer)
    for outcome, log_mass, slope in zip(outcomes, log_q, slopes, strict=True):
        if log_mass != -np.inf:
            gradient[outcome.tokens] = slope * np.exp(log_softmax(z[outcome.tokens]))
    return value, gradient


def _divergence_and_slopes(log_p: FloatArray, log_q: FloatArray, regularizer: Regularizer) -> tuple[float, list[float]]:
    """The divergence of P, Q [J] and its derivative by each L_j, for Q = softmax(L)."""
    pairs = list(zip(log_p.tolist(), log_q.tolist(), strict=True))
    if regularizer in ("masked-kl", "full-kl"):
        return _divergence(log_p.tolist(), log_q.tolist()), [math.exp(lq) - math.exp(lp) for lp, lq in pairs]
    if regularizer == "masked-reverse-kl":
        value = _divergence(log_q.tolist(), log_p.tolist())
        return value, [math.exp(lq) * (lq - lp - value) if lq != -math.inf else 0.0 for lp, lq in pairs]
    log_m = [log_sum_exp(np.array(pair)) - math.log(2) for pair in pairs]
    from_p, from_q = _divergence(log_p.tolist(), log_m), _divergence(log_q.tolist(), log_m)
    slopes = [
        math.exp(lq) * (lq - lm - from_q) / 2 if lq != -math.inf else 0.0
        for (_, lq), lm in zip(pairs, log_m, strict=True)
    ]
    return (from_p + from_q) / 2, slopes


def _draws(record: OracleRecord, i: int) -> tuple[list[int], list[float]]:
    if not isinstance(record, FormsRecord) or record.draw_ids is None or record.draw_logprobs is None:
        raise ValueError("sampled needs the record's draws")
    ids, logprobs = np.asarray(record.draw_ids), np.asarray(record.draw_logprobs, dtype=np.float64)
    return [int(c) for c in ids[i]], [float(x) for x in logprobs[i]]


def _sampled_row(
    row: _Row, label: int, z: FloatArray, full: bool, draws: list[int], draw_logprobs: list[float]
) -> tuple[float, FloatArray]:
    """sum_S p (log p - log q) + p_T / M sum_i (log p(c_i) - log q(c_i)), in full with y as one of S.

    Gradient [V]: q_c times the weights' sum, minus the weight of c (p_c on S, p_T / M for each time c is drawn).
    """
    kept, log_p_kept = (
        (row.kept, row.log_p_kept) if not full else ([label, *row.kept], [row.log_p_label, *row.log_p_kept])
    )
    total = log_sum_exp(np.array([*log_p_kept, row.log_p_tail]))
    if total == -math.inf:
        return math.nan, np.full_like(z, math.nan)
    log_q = log_softmax(z if full else np.where(np.arange(z.shape[0]) == label, -np.inf, z))
    weighted = [(c, math.exp(lp - total), lp - total) for c, lp in zip(kept, log_p_kept, strict=True)]
    if row.log_p_tail != -math.inf:
        if not draws or not set(draws) <= set(row.tail):
            raise ValueError("a row with a tail has no draw, or one that is not of its tail")
        share = math.exp(row.log_p_tail - total) / len(draws)
        weighted += [(c, share, lp - total) for c, lp in zip(draws, draw_logprobs, strict=True)]
    weighted = [(c, weight, lp) for c, weight, lp in weighted if weight > 0]
    value = math.fsum(weight * (lp - float(log_q[c])) for c, weight, lp in weighted)
    gradient = np.exp(log_q) * math.fsum(weight for _, weight, _ in weighted)
    for c, weight, _ in weighted:
        gradient[c] -= weight
    return value, gradient


def keep_fewer(record: OracleRecord, keep: Sequence[int]) -> OracleRecord:
    """Row i keeps its first keep[i] alternatives; the others become padding and their mass joins the tail.

    Groups and draws of the wider record do not hold for it: add them afterwards with complete_record.
    """
    ids, logs, tail = record.alternative_ids.copy(), record.alternative_logprobs.copy(), record.tail_logprobs.copy()
    for i, k in enumerate(keep):
        tail[i] = log_sum_exp(np.append(logs[i, k:], tail[i]))
        ids[i, k:], logs[i, k:] = PAD_ID, -np.inf
    return OracleRecord(record.label_logprobs, ids, logs, tail)
