"""The samples of a finished cache that its data sets name, as they are now: what is learnt where no data are given.

Owns the union of the data sets, what of the cache is in none of them, and the refusal of what has no right answer: a
sample that a data set names and the cache lacks, and, where it is to be learnt, one that two data sets supervise in two
ways. Must not read records.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .cache import LogitCache
from .data_sets import DataSet, Runs, joined, positions_of
from .errors import AmbiguousData, IncompleteCache
from .identity import sample_id
from .manifest import DataSetEntry
from .shard import StoredSample


@dataclass(frozen=True)
class DataSample:
    """A sample of a data set."""

    #: uint32 [n].
    token_ids: NDArray[np.uint32]
    #: int32 [P], ascending.
    positions: NDArray[np.int32]
    #: bool [P], whether cross-entropy counts at each.
    cross_entropy: NDArray[np.bool_]
    #: Digest of the template that rendered it, "" where none did.
    chat_template: str


@dataclass(frozen=True)
class DataSamples:
    """The samples of all data sets of a cache, in the order in which the cache stores them."""

    samples: list[DataSample]
    data_sets: tuple[DataSetEntry, ...]
    #: Different samples of the cache that are in no data set.
    num_other_samples: int
    #: Stored positions of the cache that are in no data set, those of the samples before included.
    num_other_positions: int


def data_samples(cache: LogitCache, *, either: bool = False) -> DataSamples:
    """What the data sets of a cache name; of a cache that has none, all that it holds, as it was captured.

    either: a sample that two data sets supervise in two ways has the positions of both, and is not refused: for who
    compares with the base wherever one of them does, and learns none of the labels.
    Raises `AmbiguousData`, `IncompleteCache`, and what reading raises.
    """
    data_sets = [cache.data_set(entry) for entry in cache.data_sets]
    wanted = _union(cache, data_sets, either)
    samples, num_others, num_positions = [], 0, 0
    for stored in cache.stored_samples():
        if not data_sets:
            samples.append(_as_captured(stored))
            continue
        runs = wanted.pop(sample_id(stored.token_ids), None)
        if runs is None:
            num_others, num_positions = num_others + 1, num_positions + len(stored.positions)
            continue
        positions, cross_entropy = positions_of(runs)
        if not np.isin(positions, stored.positions).all():
            raise _lacking(cache, data_sets, sample_id(stored.token_ids), "some positions of sample")
        num_positions += len(stored.positions) - len(positions)
        samples.append(DataSample(stored.token_ids, positions, cross_entropy, stored.chat_template))
    if wanted:
        raise _lacking(cache, data_sets, next(iter(wanted)), f"{len(wanted):,} of its samples, among them")
    return DataSamples(samples, cache.data_sets, num_others, num_positions)


def _union(cache: LogitCache, data_sets: Sequence[DataSet], either: bool) -> dict[bytes, Runs]:
    """The runs of every sample by its id. Raises `AmbiguousData` unless the positions of either are wanted."""
    union = dict(joined("", [found.runs for found in data_sets]).samples())
    for found in () if either else data_sets:
        for key, runs in found.samples():
            if not np.array_equal(runs, union[key]):
                raise _ambiguous(cache, data_sets, key)
    return union


def _as_captured(stored: StoredSample) -> DataSample:
    every = np.ones(len(stored.positions), dtype=np.bool_)
    return DataSample(stored.token_ids, stored.positions, every, stored.chat_template)


def _ambiguous(cache: LogitCache, data_sets: Sequence[DataSet], key: bytes) -> AmbiguousData:
    ways: list[tuple[str, Runs]] = [(d.name, runs) for d in data_sets for found, runs in d.samples() if found == key]
    name, first = ways[0]
    other, second = next((n, runs) for n, runs in ways if not np.array_equal(runs, first))
    counts = [int(runs["num_positions"].sum()) for runs in (first, second)]
    return AmbiguousData(
        f"reading the data sets of {cache.path}: sample {key.hex()} is supervised at {counts[0]} positions in {name!r} "
        f"and at {counts[1]}, or others, in {other!r}. Which of them are to be learnt cannot be told. Name the data to "
        "be learnt with --data."
    )


def _lacking(cache: LogitCache, data_sets: Sequence[DataSet], key: bytes, what: str) -> IncompleteCache:
    name = next(d.name for d in data_sets for found, _ in d.samples() if found == key)
    return IncompleteCache(
        f"reading the data sets of {cache.path}: of {name!r} the cache lacks {what} {key.hex()}. They would not be "
        "learnt. Run `logitcache precompute` with that data again, which makes only what is missing."
    )
