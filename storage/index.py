"""The index of a finished cache: which shard holds which sample, for a million samples in 32 MB.

Owns the file index-<checksum>.npy (numpy's own format, one structured array, readable with `np.load`) and the search by
sample id. Rows are in the order of the shards and of the samples in them, so that offsets follow by summation.
Trade-off: it is read whole at open and sorted then, which takes a quarter of a second a million; lookups are O(1).
"""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backend import corrupt
from .encoding import SamplePlace, SampleTable
from .files import Files, how_missing
from .identity import digest
from .layout import index_name
from .manifest import Contents, StoredFile

DTYPE = np.dtype(
    [("sample_id", "<u8", (2,)), ("shard", "<u4"), ("num_tokens", "<u4"), ("num_positions", "<u4"), ("num_cut", "<u4")]
)


def index_file(tables: Sequence[SampleTable]) -> tuple[StoredFile, bytes]:
    """The index of shards with these sample tables, in this order."""
    rows = np.zeros(sum(len(t) for t in tables), dtype=DTYPE)
    start = 0
    for shard, table in enumerate(tables):
        part = rows[start : start + len(table)]
        part["sample_id"] = np.ascontiguousarray(table.sample_ids).view("<u8")
        part["shard"] = shard
        part["num_tokens"], part["num_positions"] = table.num_tokens, table.num_positions
        part["num_cut"] = table.num_tokens_cut
        start += len(table)
    data = npy_header(DTYPE, len(rows)) + rows.tobytes()
    return StoredFile(index_name(digest(data)), len(data), digest(data)), data


class SampleIndex:
    """Every stored sample by number (in storage order) and by sample id."""

    def __init__(self, rows: NDArray[Any], num_shards: int) -> None:
        self._rows = rows
        self._token_starts = np.concatenate([[0], np.cumsum(rows["num_tokens"], dtype=np.int64)])
        self._position_starts = np.concatenate([[0], np.cumsum(rows["num_positions"], dtype=np.int64)])
        self.first_rows = np.searchsorted(rows["shard"], np.arange(num_shards + 1))
        high, low = rows["sample_id"][:, 0], rows["sample_id"][:, 1]
        self._order = np.lexsort((low, high)) if len(rows) else np.zeros(0, dtype=np.intp)
        self._high = np.ascontiguousarray(high[self._order])
        self._low = np.ascontiguousarray(low[self._order])
        bits = max(1, len(rows).bit_length())
        self._shift = np.uint64(64 - bits)
        self._starts = np.searchsorted(self._high >> self._shift, np.arange((1 << bits) + 1, dtype=np.uint64))
        new = np.ones(len(rows), dtype=np.bool_)
        new[1:] = (self._high[1:] != self._high[:-1]) | (self._low[1:] != self._low[:-1])
        self.distinct = np.sort(np.minimum.reduceat(self._order, np.flatnonzero(new))) if len(rows) else self._order

    @classmethod
    def read(cls, files: Files, contents: Contents) -> "SampleIndex":
        """The index that these contents name. Raises `CorruptCache`."""
        where = f"{files.root}/{contents.index.name}"
        header = npy_header(DTYPE, contents.num_samples)
        if contents.index.size != len(header) + DTYPE.itemsize * contents.num_samples:
            raise corrupt(where, f"expected {contents.num_samples} rows, found {contents.index.size} bytes")
        try:
            data = files.read(contents.index.name, contents.index.size)
        except FileNotFoundError as error:
            raise corrupt(where, how_missing(error)) from error
        size = contents.index.size
        if len(data) != size or digest(data) != contents.index.checksum or data[: len(header)] != header:
            raise corrupt(where, f"expected an index with checksum {contents.index.checksum}, found {digest(data)}")
        rows = np.frombuffer(data, dtype=DTYPE, offset=len(header))
        shards = rows["shard"].astype(np.int64)
        if np.any(np.diff(shards) < 0) or shards.max(initial=-1) >= len(contents.shards):
            raise corrupt(where, "its rows are not in the order of the shards")
        return cls(rows, len(contents.shards))

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, key: bytes) -> list[int]:
        """The numbers of all stored samples with this id, ascending: none, one, or several captures."""
        high, low = np.frombuffer(key, dtype="<u8")
        bucket = int(high >> self._shift)
        at = range(int(self._starts[bucket]), int(self._starts[bucket + 1]))
        return sorted(int(self._order[i]) for i in at if self._high[i] == high and self._low[i] == low)

    def sample_id(self, number: int) -> bytes:
        """The id of a stored sample."""
        return bytes(self._rows["sample_id"][number].tobytes())

    def shard(self, number: int) -> int:
        """The shard that holds it."""
        return int(self._rows["shard"][number])

    def num_tokens_cut(self, number: int) -> int:
        """How many tokens truncation took off its end."""
        return int(self._rows["num_cut"][number])

    def place(self, number: int) -> SamplePlace:
        """Where it is in its shard."""
        first = int(self.first_rows[self.shard(number)])
        token, position = int(self._token_starts[first]), int(self._position_starts[first])
        tokens = slice(int(self._token_starts[number]) - token, int(self._token_starts[number + 1]) - token)
        positions = slice(
            int(self._position_starts[number]) - position, int(self._position_starts[number + 1]) - position
        )
        return SamplePlace(number - first, tokens, positions)

    def tokens_of_distinct(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where the tokens of each different sample begin among those of all shards, and how many they are."""
        starts = self._token_starts
        return starts[self.distinct], starts[self.distinct + 1] - starts[self.distinct]

    def counts(self, shard: int) -> tuple[int, int, int]:
        """Samples, positions and tokens of a shard, for comparison with its commit."""
        first, last = self.first_rows[shard], self.first_rows[shard + 1]
        positions = self._position_starts[last] - self._position_starts[first]
        return int(last - first), int(positions), int(self._token_starts[last] - self._token_starts[first])

    @property
    def num_positions(self) -> int:
        """Of all stored samples."""
        return int(self._position_starts[-1])

    @property
    def num_tokens(self) -> int:
        """Of all stored samples."""
        return int(self._token_starts[-1])


def npy_header(dtype: np.dtype[Any], num_rows: int) -> bytes:
    """The header of a .npy file of one dimension, the same bytes for the same dtype and length."""
    out = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (num_rows,)}
    np.lib.format.write_array_header_1_0(out, description)
    return out.getvalue()
