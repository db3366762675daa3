"""How two records of the same positions differ, position by position: for whoever compares engines, or a cache.

Owns which numbers are compared with which. Must not judge: bounds are the caller's. All logarithms are natural (nats).
Shapes: P positions, K alternatives.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from logitcache.storage import BaseLogprobs
from logitcache.storage.records import NO_TOKEN


@dataclass(frozen=True)
class RecordDifferences:
    """Of two records of P positions, without signs."""

    #: float64 [P], of log p(label).
    label: NDArray[np.float64]
    #: float64 [number of them], of log p of the alternatives that both keep, by token id.
    alternatives: NDArray[np.float64]
    #: float64 [P], of log p(tail); 0 where neither has one, infinite where one has.
    tail: NDArray[np.float64]
    #: float64 [P], the share of the kept alternatives that both keep.
    overlap: NDArray[np.float64]
    #: float64 [P], KL(first || second) over what both tell apart: the label, those alternatives, everything else.
    kl: NDArray[np.float64]


def differences(a: BaseLogprobs, b: BaseLogprobs) -> RecordDifferences:
    """The differences of two records. Raises ValueError where they are of other positions or labels."""
    if not (np.array_equal(a.positions, b.positions) and np.array_equal(a.label_ids, b.label_ids)):
        raise ValueError("comparing records: expected the same positions and labels in both")
    of_a, of_b = _shared(a, b)
    same_a, same_b = of_a > -np.inf, of_b > -np.inf
    both = same_a & same_b
    label_a, label_b = a.label_logprobs.astype(np.float64), b.label_logprobs.astype(np.float64)
    tail_a, tail_b = a.tail_logprobs.astype(np.float64), b.tail_logprobs.astype(np.float64)
    kept = np.minimum((a.alternative_ids != NO_TOKEN).sum(axis=1), (b.alternative_ids != NO_TOKEN).sum(axis=1))
    overlap = np.where(kept > 0, both.sum(axis=1) / np.maximum(kept, 1), 1.0)  # of nothing all is shared
    alternatives = np.abs(of_a[both] - of_b[both])
    of_a, of_b = np.where(both, of_a, -np.inf), np.where(both, of_b, -np.inf)
    outcomes = []
    for record, label, shared in ((a, label_a, of_a), (b, label_b, of_b)):
        masses = np.exp(record.alternative_logprobs.astype(np.float64))
        unshared = np.exp(record.tail_logprobs.astype(np.float64)) + masses.sum(axis=1) - np.exp(shared).sum(axis=1)
        unshared = np.maximum(unshared, 0)
        outcomes.append(np.concatenate([np.exp(label)[:, None], np.exp(shared), unshared[:, None]], axis=1))
    return RecordDifferences(
        label=_apart(label_a, label_b),
        alternatives=alternatives,
        tail=_apart(tail_a, tail_b),
        overlap=overlap,
        kl=_kl(*outcomes),
    )


def _apart(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):
        return np.where(a == b, 0.0, np.abs(a - b))  # -inf is equal to itself


def _shared(a: BaseLogprobs, b: BaseLogprobs) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Log-probabilities of a's alternatives, [P, K], by a and by b; -inf where b does not keep them."""
    order = np.argsort(b.alternative_ids, axis=1)
    ids = np.take_along_axis(b.alternative_ids, order, axis=1)
    logprobs = np.take_along_axis(b.alternative_logprobs, order, axis=1).astype(np.float64)
    by_b = np.full(a.alternative_ids.shape, -np.inf)
    for row in range(len(a) if ids.shape[1] else 0):
        place = np.minimum(np.searchsorted(ids[row], a.alternative_ids[row]), ids.shape[1] - 1)
        hit = (ids[row, place] == a.alternative_ids[row]) & (a.alternative_ids[row] != NO_TOKEN)
        by_b[row, hit] = logprobs[row, place[hit]]
    return a.alternative_logprobs.astype(np.float64), by_b


def _kl(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL of masses [P, J], each normalised by its sum; 0 log 0 = 0, infinite where q lacks what p has."""
    p, q = p / p.sum(axis=1, keepdims=True), q / q.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0)
    kl: NDArray[np.float64] = np.maximum(terms.sum(axis=1), 0)
    return kl
