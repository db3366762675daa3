"""Shards as Zarr v3 groups: one array a column, one file an array.

Each array is one Zarr shard of compressed chunks (zstd, then crc32c; the shard's index carries a crc32c too), so any
reader of Zarr v3 can open it. Those checksums say that a chunk is whole, not that it belongs here, and Zarr itself
reads a missing file as its fill value. So the commit keeps the size and checksum of each file, compared at open for the
metadata and the sample table, and a crc32c of each chunk, compared at every read; fill values are NaN and the largest
integer.
"""

from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec
from zarr.storage import LocalStore

from .backend import ROWS_PER_CHUNK, Blocks, check_sizes, corrupt, read_blocks, read_checked
from .encoding import POSITION_DTYPES, WIDE_COLUMNS, Columns, SampleTable
from .manifest import ShardCommit

_TABLE_DTYPES = {
    "sample_ids": "|u1",
    "num_tokens": "<u4",
    "num_positions": "<u4",
    "num_tokens_cut": "<u4",
    "token_ids": "<u4",
    "positions": "<i4",
}
_TABLE_CHUNK = 65_536


class ZarrBackend:
    """Writes and opens shards as Zarr groups."""

    def write(self, folder: Path, table: SampleTable, columns: Columns) -> Blocks:
        group = zarr.open_group(LocalStore(folder), mode="w-", zarr_format=3)
        with zarr.config.set({"array.write_empty_chunks": True}):
            for name, dtype in _TABLE_DTYPES.items():
                _write_array(group, name, getattr(table, name).astype(dtype, copy=False), _TABLE_CHUNK)
            for name, dtype in POSITION_DTYPES.items():
                _write_array(group, name, columns[name].astype(dtype, copy=False), ROWS_PER_CHUNK)
        num_chunks = -(-len(table.positions) // ROWS_PER_CHUNK)
        return tuple(block for name in POSITION_DTYPES for block in _blocks(folder / _data_file(name), num_chunks))

    def open(self, folder: Path, commit: ShardCommit, top_k: int) -> "ZarrReader":
        return ZarrReader(folder, commit, top_k)


class ZarrReader:
    """An open shard in the Zarr layout."""

    def __init__(self, folder: Path, commit: ShardCommit, top_k: int) -> None:
        check_sizes(folder, commit)
        for name in ["zarr.json", *(f"{column}/zarr.json" for column in (*_TABLE_DTYPES, *POSITION_DTYPES))]:
            read_checked(folder, commit, name)
        group = zarr.open_group(LocalStore(folder, read_only=True), mode="r", zarr_format=3)
        self._folder, self._commit = folder, commit
        self._arrays: dict[str, zarr.Array[Any]] = dict(group.arrays())
        self._check_shapes(commit, top_k)
        self._num_blocks = -(-commit.num_positions // ROWS_PER_CHUNK) + 1
        if len(commit.blocks) != len(POSITION_DTYPES) * self._num_blocks:
            raise corrupt(folder, "the commit does not list as many blocks as the positions need")

    def table(self) -> SampleTable:
        for name in _TABLE_DTYPES:
            read_checked(self._folder, self._commit, _data_file(name))
        return SampleTable(**{name: self._read(name, slice(None)) for name in _TABLE_DTYPES})

    def rows(self, rows: slice) -> Columns:
        first, last = rows.start // ROWS_PER_CHUNK, -(-rows.stop // ROWS_PER_CHUNK)
        for i, name in enumerate(POSITION_DTYPES):
            *chunks, index = self._commit.blocks[i * self._num_blocks : (i + 1) * self._num_blocks]
            read_blocks(self._folder / _data_file(name), (*chunks[first:last], index))
        return {name: self._read(name, rows) for name in POSITION_DTYPES}

    def _read(self, name: str, rows: slice) -> NDArray[Any]:
        try:
            return np.asarray(self._arrays[name][rows])
        except Exception as error:  # a codec raises whatever its library raises on damaged bytes
            raise corrupt(self._folder / name, f"a chunk does not decode ({error})") from error

    def _check_shapes(self, commit: ShardCommit, top_k: int) -> None:
        lengths = dict.fromkeys(POSITION_DTYPES, commit.num_positions)
        lengths |= dict.fromkeys(_TABLE_DTYPES, commit.num_samples)
        lengths |= {"token_ids": commit.num_tokens, "positions": commit.num_positions}
        widths = dict.fromkeys(WIDE_COLUMNS, (top_k,)) | {"sample_ids": (16,)}
        dtypes = _TABLE_DTYPES | POSITION_DTYPES
        for name, length in lengths.items():
            array, shape = self._arrays.get(name), (length, *widths.get(name, ()))
            if array is None or array.shape != shape or array.dtype != np.dtype(dtypes[name]):
                raise corrupt(self._folder / name, f"expected {dtypes[name]} {shape}, found {array}")


def _data_file(name: str) -> str:
    """The one file of an array, its only shard."""
    return f"{name}/c/0/0" if name in (*WIDE_COLUMNS, "sample_ids") else f"{name}/c/0"


def _blocks(path: Path, num_chunks: int) -> Blocks:
    """Each chunk of a file, then the index at its end: offset and length of each chunk as uint64, and a crc32c.

    All without the crc32c that ends them and that Zarr compares: the crc32c of bytes and their crc32c is a constant.
    """
    data = path.read_bytes()
    start = len(data) - 16 * num_chunks - 4
    index = np.frombuffer(data, "<u8", count=2 * num_chunks, offset=start).reshape(-1, 2)
    spans = [(at, length - 4) for at, length in [*index.tolist(), (start, len(data) - start)]]
    return tuple((at, length, google_crc32c.value(data[at : at + length])) for at, length in spans)


def _write_array(group: zarr.Group, name: str, data: NDArray[Any], rows_per_chunk: int) -> None:
    chunk = (min(rows_per_chunk, len(data)), *data.shape[1:])
    shard = (-(-len(data) // chunk[0]) * chunk[0], *data.shape[1:])
    array = group.create_array(
        name,
        shape=data.shape,
        dtype=data.dtype,
        chunks=chunk,
        shards=shard,
        serializer=BytesCodec(endian="little" if data.dtype.itemsize > 1 else None),
        compressors=(ZstdCodec(level=3), Crc32cCodec()),
        fill_value=np.nan if data.dtype.kind == "f" else np.iinfo(data.dtype).max,
    )
    array[...] = data
