"""What a cache is made of, for people: bytes by column, kept mass and tail, alternatives and different draws of a row.

Owns the sums; a large cache is sampled evenly over its shards. Must not decide anything.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .cache import LogitCache
from .records import NO_TOKEN, BaseLogprobs

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


@dataclass(frozen=True)
class Statistics:
    """Of a cache, or of a sample of it."""

    #: Rows that were read.
    num_positions: int
    #: Not all rows were read.
    is_sampled: bool
    #: Of all shards, by name, in order.
    bytes_by_column: dict[str, int]
    #: One value a row read.
    kept_mass: NDArray[np.float64]
    #: One value a row read: the base's mass beyond label and alternatives.
    tail_mass: NDArray[np.float64]
    #: One value a row read.
    num_alternatives: NDArray[np.int64]
    #: One value a row read; 0 without draws.
    num_distinct_draws: NDArray[np.int64]
    #: Of the first, second, ... alternative: its share of the non-target mass, the mean over the rows read.
    mass_by_rank: NDArray[np.float64]

    def kept_mass_percentiles(self) -> dict[int, float]:
        """Of the share of the non-target mass that a row keeps."""
        return self._percentiles(self.kept_mass)

    def num_alternatives_percentiles(self) -> dict[int, float]:
        """Of the alternatives that a row keeps."""
        return self._percentiles(self.num_alternatives)

    def num_distinct_draws_percentiles(self) -> dict[int, float]:
        """Of the different tokens among a row's draws."""
        return self._percentiles(self.num_distinct_draws)

    @staticmethod
    def _percentiles(values: NDArray[np.floating] | NDArray[np.integer]) -> dict[int, float]:
        if not len(values):
            return {}
        found = np.percentile(values, PERCENTILES)
        return {p: float(v) for p, v in zip(PERCENTILES, found, strict=True)}


def describe(cache: LogitCache, max_positions: int = 1_000_000) -> Statistics:
    """Statistics of a cache; of about max_positions rows, evenly over its samples, where it has more."""
    columns: dict[str, int] = {}
    for shard in cache.shards():
        for name, size in shard.reader.column_bytes().items():
            columns[name] = columns.get(name, 0) + size
    step = max(1, -(-cache.num_positions // max_positions))
    records = [_slim(cache.sample(i).logprobs) for i in range(0, len(cache), step)]
    if not records:
        nothing = np.zeros(0, dtype=np.int64)
        empty = nothing.astype(np.float64)
        return Statistics(0, False, columns, empty, empty, nothing, nothing, empty)
    kept, tail, alternatives, draws = (np.concatenate(values) for values in zip(*(r for r, _ in records), strict=True))
    by_rank = np.zeros(max(len(mass) for _, mass in records))
    for _, mass in records:
        by_rank[: len(mass)] += mass
    return Statistics(
        num_positions=len(kept),
        is_sampled=step > 1,
        bytes_by_column=columns,
        kept_mass=kept,
        tail_mass=tail,
        num_alternatives=alternatives,
        num_distinct_draws=draws,
        mass_by_rank=by_rank / max(len(kept), 1),
    )


_Rows = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]


def _slim(record: BaseLogprobs) -> tuple[_Rows, NDArray[np.float64]]:
    """Kept mass, tail, alternatives and different draws of each row; and the mass of each rank, summed over rows."""
    draws = np.zeros(len(record), dtype=np.int64)
    if record.tail_sample_ids is not None:
        ids = record.tail_sample_ids
        draws = (ids[:, 1:] != ids[:, :-1]).sum(axis=1) + (ids[:, 0] != NO_TOKEN)
    kept, mass = record.kept_mass(), np.exp(record.alternative_logprobs.astype(np.float64))
    of_row = mass.sum(axis=1, keepdims=True)
    shares = kept[:, None] * np.divide(mass, of_row, out=np.zeros_like(mass), where=of_row > 0)
    tail = np.exp(record.tail_logprobs.astype(np.float64))
    return (kept, tail, (record.alternative_logprobs > -np.inf).sum(axis=1), draws), shares.sum(axis=0)
