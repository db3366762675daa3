"""What a cache holds already, so that nothing is computed twice: 24 bytes a stored sample, searched by sample id.

Owns the question which positions of a sample are missing. A sample whose positions are exactly those of one stored
sample is recognised by a fingerprint, without reading; only for others the table of a shard is read. Any number of
samples may be added while others are asked for.
"""

import threading
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from .encoding import SampleTable
from .identity import digest

DTYPE = np.dtype([("key", "<u8"), ("fingerprint", "<u8"), ("shard", "<u4"), ("row", "<u4")])
"""key: first half of the sample id. fingerprint: of the whole id and the positions. shard, row: where it is stored."""

SMALL = 4096
"""Rows below which parts are joined at once."""


class Captured:
    """The positions captured so far. read_table: the sample table of a committed shard, checked."""

    def __init__(self, read_table: Callable[[str], SampleTable]) -> None:
        self._read_table, self._lock = read_table, threading.Lock()
        self._parts: list[NDArray[np.void]] = []
        self._shards: list[str] = []
        self._table: tuple[str, SampleTable] | None = None

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    def add(self, shard: str, table: SampleTable) -> None:
        """The samples of a committed shard."""
        rows = np.zeros(len(table), dtype=DTYPE)
        rows["key"] = np.ascontiguousarray(table.sample_ids).view("<u8")[:, 0]
        positions = np.ascontiguousarray(table.positions, dtype="<i4")
        ids = [row.tobytes() for row in table.sample_ids]
        ends = np.cumsum(table.num_positions, dtype=np.int64)
        rows["fingerprint"] = [
            fingerprint64(key, positions[int(end) - int(n) : int(end)])
            for key, end, n in zip(ids, ends, table.num_positions, strict=True)
        ]
        rows["row"] = np.arange(len(table))
        with self._lock:
            rows["shard"] = len(self._shards)
            self._shards.append(shard)
            self.add_rows(rows)

    def add_rows(self, rows: NDArray[np.void]) -> None:
        """Rows of `DTYPE`, in any order. Parts are joined so that there are about log2 of the samples of them."""
        self._parts.append(rows[np.argsort(rows["key"], kind="stable")])
        while len(self._parts) > 1 and len(self._parts[-2]) < max(SMALL, 2 * len(self._parts[-1])):
            joined = np.concatenate([self._parts.pop(-2), self._parts.pop()])
            self._parts.append(joined[np.argsort(joined["key"], kind="stable")])

    def missing(self, sample_ids: Sequence[bytes], positions: Sequence[NDArray[np.int32]]) -> list[NDArray[np.int32]]:
        """Of each sample the positions that are not captured, ascending; empty where all are."""
        if not sample_ids:
            return []
        keys = np.frombuffer(b"".join(sample_ids), dtype="<u8").reshape(-1, 2)[:, 0]
        with self._lock:
            parts, shards = list(self._parts), list(self._shards)
        spans = [
            (part, np.searchsorted(part["key"], keys, "left"), np.searchsorted(part["key"], keys, "right"))
            for part in parts
        ]
        left = []
        for number, (key, wanted) in enumerate(zip(sample_ids, positions, strict=True)):
            found = [part[int(first[number]) : int(last[number])] for part, first, last in spans]
            stored = np.concatenate(found) if found else np.zeros(0, dtype=DTYPE)
            left.append(wanted if not len(stored) else self._not_in(key, wanted, stored, shards))
        return left

    def _not_in(
        self, key: bytes, wanted: NDArray[np.int32], stored: NDArray[np.void], shards: Sequence[str]
    ) -> NDArray[np.int32]:
        if np.any(stored["fingerprint"] == fingerprint64(key, wanted)):
            return wanted[:0]
        left = wanted
        for row in stored:
            table = self._table_of(shards[int(row["shard"])])
            place = int(row["row"])
            if table.sample_ids[place].tobytes() == key:
                end = int(table.num_positions[: place + 1].sum(dtype=np.int64))
                have = table.positions[end - int(table.num_positions[place]) : end]
                left = np.setdiff1d(left, have, assume_unique=True)
        return left

    def _table_of(self, shard: str) -> SampleTable:
        with self._lock:
            held = self._table
        if held is None or held[0] != shard:
            held = shard, self._read_table(shard)
            with self._lock:
                self._table = held
        return held[1]


def fingerprint64(key: bytes, positions: NDArray[np.int32]) -> int:
    """64 bits of the hash of a sample id and its positions, by which equal ones are recognised without reading."""
    packed = np.ascontiguousarray(positions, dtype="<i4").tobytes()
    return int(digest(key + packed)[:16], 16)
