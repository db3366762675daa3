"""How far data lie from what the base would say itself: the log-probability of their labels, and its entropy there.

Owns the two numbers, and that they are over the same outcomes where data are held against a cache. Must not load a
model, nor judge: that a cache is of the base in hand has been checked before. Shapes: P positions, K alternatives.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from logitcache.storage import BaseLogprobs, LogitCache
from logitcache.storage.records import concatenate, keep_mass, narrow

from .against_model import plain
from .calibration import choose_cached


@dataclass(frozen=True)
class Predicted:
    """What the base says of the positions of some text, in nats, means over positions."""

    num_positions: int
    #: log p(label).
    label_logprob: float
    #: Of its distribution: of label, alternatives and the rest as one, so at most that over all tokens.
    entropy: float


@dataclass(frozen=True)
class Distance:
    """Of data, and of a cache of the base's own text where one was given, over outcomes of the same kind."""

    data: Predicted
    own: Predicted | None
    #: Alternatives that the entropies are over.
    num_alternatives: int


def distance(records: Sequence[BaseLogprobs], probe: LogitCache | None = None, num_positions: int = 2048) -> Distance:
    """Of data whose records these are. probe: at most about so many positions of it are read; the records are taken
    with as many alternatives as both have, and as few as it keeps by --min-mass. Raises what reading a cache raises.
    """
    ours, theirs = plain(concatenate(records)), None
    top_k = ours.num_alternatives
    if probe is not None:
        kept = probe.manifest.capture
        held = [plain(record) for record in choose_cached(probe, num_positions, at_least=1).records]
        top_k = min(top_k, kept.top_k)
        theirs = _predicted(narrow(concatenate(held), top_k))
        ours = keep_mass(narrow(ours, top_k), kept.min_mass)
    return Distance(_predicted(narrow(ours, top_k)), theirs, top_k)


def entropies(record: BaseLogprobs) -> NDArray[np.float64]:
    """-sum p log p over label, alternatives and the tail as one outcome, [P], in nats; their masses made to sum to 1,
    which quantised ones do only within their errors."""
    parts = (record.label_logprobs[:, None], record.alternative_logprobs, record.tail_logprobs[:, None])
    log_p = np.concatenate(parts, axis=1).astype(np.float64)
    log_p -= np.logaddexp.reduce(log_p, axis=1, keepdims=True)
    terms = np.exp(log_p) * np.where(log_p > -np.inf, log_p, 0)
    found: NDArray[np.float64] = -terms.sum(axis=1)
    return found


def _predicted(record: BaseLogprobs) -> Predicted:
    return Predicted(len(record), float(record.label_logprobs.mean(dtype=np.float64)), float(entropies(record).mean()))
