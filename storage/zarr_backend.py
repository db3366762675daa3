"""Shards as Zarr v3 groups: one array a column, one file an array.

Each array is one Zarr shard of compressed chunks (pcodec, then crc32c), so plain `zarr.open` reads it. Zarr writes the
metadata; the chunks go through numcodecs' codec one by one, since zarr's own pipeline costs more time than the codec
(docs/log.md). Those checksums say that a chunk is whole, not that it belongs here, and Zarr itself reads a missing
file as its fill value: so this reader goes by the blocks in the commit record alone.
"""

import json
import struct
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numcodecs.pcodec import PCodec
from numpy.typing import NDArray
from pcodec import standalone
from zarr.codecs import Crc32cCodec
from zarr.codecs.numcodecs import PCodec as ZarrPCodec
from zarr.errors import ZarrUserWarning
from zarr.storage import MemoryStore

from .backend import Blocks, ShardFiles, corrupt, needed_blocks, rows_per_block, take_slices
from .encoding import PRECISIONS, Column, Columns, SamplePlace, SampleTable, columns_of
from .identity import CaptureIdentity
from .manifest import Block

TABLE_COLUMNS = (
    Column("sample_ids", "<u8", 2),
    Column("num_tokens", "<u4"),
    Column("num_positions", "<u4"),
    Column("num_tokens_cut", "<u4"),
    Column("token_ids", "<u4"),
    Column("positions", "<i4"),
)
_TABLE_BLOCK = 4096
_LEVELS = {
    **{"alternative_ids": 4, "alternative_drops": 6, "alternative_logprobs": 4},
    **{"tail_sample_ids": 4, "tail_sample_drops": 6, "tail_sample_logprobs": 4},
}
_DELTA_ORDERS = {"alternative_logprobs": 1, "tail_sample_logprobs": 1, "positions": 1}
_CRC_BYTES, _INDEX_ENTRY = 4, 16


class ZarrBackend:
    """Writes and opens shards as Zarr groups."""

    def write(self, table: SampleTable, columns: Columns, capture: CaptureIdentity) -> tuple[dict[str, bytes], Blocks]:
        files: dict[str, bytes] = {"zarr.json": _json({"attributes": {}, "zarr_format": 3, "node_type": "group"})}
        blocks: Blocks = {}
        arrays = [(c, _table_array(table, c.name), _TABLE_BLOCK) for c in TABLE_COLUMNS]
        arrays += [(c, columns[c.name], rows_per_block(capture)) for c in columns_of(capture)]
        for column, data, most in arrays:
            rows = min(most, len(data))
            files[f"{column.name}/zarr.json"] = _metadata(column, data.shape, rows, _attributes(column, capture))
            files[_data_file(column)], blocks[column.name] = _write_chunks(column, data, rows)
        return files, blocks

    def open(self, files: ShardFiles, capture: CaptureIdentity) -> "ZarrReader":
        return ZarrReader(files, capture)


class ZarrReader:
    """A shard in the Zarr layout."""

    def __init__(self, files: ShardFiles, capture: CaptureIdentity) -> None:
        self._files, self._columns, self._rows = files, columns_of(capture), rows_per_block(capture)
        commit = files.commit
        self._lengths = {c.name: commit.num_samples for c in TABLE_COLUMNS}
        self._lengths |= {c.name: commit.num_positions for c in self._columns}
        self._lengths |= {"token_ids": commit.num_tokens, "positions": commit.num_positions}
        rows = dict.fromkeys((c.name for c in TABLE_COLUMNS), _TABLE_BLOCK)
        rows |= dict.fromkeys((c.name for c in self._columns), self._rows)
        files.check_blocks({name: -(-length // rows[name]) for name, length in self._lengths.items()})

    def table(self) -> SampleTable:
        read = {c.name: self._read(c, [slice(0, self._lengths[c.name])], _TABLE_BLOCK) for c in TABLE_COLUMNS}
        read["sample_ids"] = np.ascontiguousarray(read["sample_ids"]).view(np.uint8).reshape(-1, 16)
        return SampleTable(**read)

    def token_ids(self) -> NDArray[np.uint32]:
        return self._read(TABLE_COLUMNS[4], [slice(0, self._lengths["token_ids"])], _TABLE_BLOCK)

    def samples(self, places: Sequence[SamplePlace]) -> list[tuple[NDArray[np.uint32], NDArray[np.int32]]]:
        tokens, positions = [p.tokens for p in places], [p.positions for p in places]
        all_tokens = self._read(TABLE_COLUMNS[4], tokens, _TABLE_BLOCK)
        all_positions = self._read(TABLE_COLUMNS[5], positions, _TABLE_BLOCK)
        token_ends = np.cumsum([s.stop - s.start for s in tokens])[:-1]
        position_ends = np.cumsum([s.stop - s.start for s in positions])[:-1]
        return list(zip(np.split(all_tokens, token_ends), np.split(all_positions, position_ends), strict=True))

    def rows(self, rows: Sequence[slice]) -> Columns:
        return {c.name: self._read(c, rows, self._rows) for c in self._columns}

    def column_bytes(self) -> dict[str, int]:
        blocks = self._files.commit.blocks
        return {name: sum(length + _CRC_BYTES for _, length, _ in blocks.get(name, ())) for name in self._lengths}

    def _read(self, column: Column, slices: Sequence[slice], most: int) -> NDArray[Any]:
        rows = min(most, self._lengths[column.name])
        wanted, inside = needed_blocks(slices, rows)
        joined = np.empty((len(wanted) * rows, *column.shape(0)[1:]), dtype=column.dtype)
        flat, size = joined.reshape(-1), rows * max(column.width, 1)
        for i, data in enumerate(self._files.blocks(column.name, _data_file(column), wanted)):
            self._decode(column, data, flat[i * size : (i + 1) * size])
        return take_slices(joined, inside)

    def _decode(self, column: Column, data: bytes, out: NDArray[Any]) -> None:
        """Into an array of the size it must have: what was crafted to be larger is not expanded."""
        where = f"{self._files.where}/{column.name}"
        try:
            progress = standalone.simple_decompress_into(data, out)
        except (RuntimeError, TypeError) as error:
            raise corrupt(where, f"a chunk does not decode ({error})") from error
        if progress.n_processed != len(out) or not progress.finished:
            raise corrupt(where, f"expected a chunk of {len(out)} numbers, found {progress.n_processed} or more")


def _table_array(table: SampleTable, name: str) -> NDArray[Any]:
    if name == "sample_ids":
        return np.ascontiguousarray(table.sample_ids).view("<u8")
    array: NDArray[Any] = getattr(table, name)
    return array


def _data_file(column: Column) -> str:
    """The one file of an array, its only shard."""
    return f"{column.name}/c/0/0" if column.width else f"{column.name}/c/0"


def _codec(name: str) -> dict[str, Any]:
    settings: dict[str, Any] = {"level": _LEVELS.get(name, 8), "mode_spec": "classic", "delta_spec": "none"}
    if name in _DELTA_ORDERS:
        settings |= {"delta_spec": "try_consecutive", "delta_encoding_order": _DELTA_ORDERS[name]}
    return settings


def _write_chunks(column: Column, data: NDArray[Any], rows: int) -> tuple[bytes, tuple[Block, ...]]:
    """The file of an array: chunks, each with its crc32c, then offset and length of each as uint64, and a crc32c."""
    codec = PCodec(**_codec(column.name))
    parts: list[bytes] = []
    blocks: list[Block] = []
    at = 0
    for start in range(0, len(data), rows):
        chunk = data[start : start + rows]
        if len(chunk) < rows:  # Zarr's chunks are of one size
            chunk = np.concatenate([chunk, np.full((rows - len(chunk), *data.shape[1:]), _fill(column), data.dtype)])
        encoded = codec.encode(np.ascontiguousarray(chunk).reshape(-1))
        crc = google_crc32c.value(encoded)
        parts += [encoded, struct.pack("<I", crc)]
        blocks.append((at, len(encoded), crc))
        at += len(encoded) + _CRC_BYTES
    index = b"".join(struct.pack("<QQ", offset, length + _CRC_BYTES) for offset, length, _ in blocks)
    return b"".join([*parts, index, struct.pack("<I", google_crc32c.value(index))]), tuple(blocks)


def _fill(column: Column) -> Any:
    dtype = np.dtype(column.dtype)
    return np.nan if dtype.kind == "f" else np.iinfo(dtype).max


def _attributes(column: Column, capture: CaptureIdentity) -> dict[str, Any]:
    """What a reader without this program has to multiply with."""
    precision = PRECISIONS[capture.precision]
    if precision is None:
        return {}
    steps = {
        "label_steps": precision.scalars,
        "tail_steps": precision.scalars,
        "alternative_drops": precision.alternatives,
        "tail_sample_drops": precision.alternatives,
        "tail_group_steps": capture.group_steps_per_nat,
    }
    return {"steps_per_nat": steps[column.name]} if column.name in steps else {}


def _metadata(column: Column, shape: tuple[int, ...], rows: int, attributes: dict[str, Any]) -> bytes:
    """zarr.json of an array: Zarr's own, with the lengths of this one."""
    metadata: dict[str, Any] = json.loads(_template(column))
    shard = (-(-shape[0] // rows) * rows, *shape[1:])
    metadata["shape"], metadata["attributes"] = list(shape), attributes
    metadata["chunk_grid"]["configuration"]["chunk_shape"] = list(shard)
    metadata["codecs"][0]["configuration"]["chunk_shape"] = [rows, *shape[1:]]
    return _json(metadata)


@cache
def _template(column: Column) -> bytes:
    store = MemoryStore()
    shape = column.shape(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ZarrUserWarning)  # that numcodecs' codecs are not in the specification of v3
        zarr.create_array(
            store,
            shape=shape,
            dtype=column.dtype,
            chunks=shape,
            shards=shape,
            serializer=ZarrPCodec(**_codec(column.name)),
            compressors=(Crc32cCodec(),),
            fill_value=_fill(column),
            zarr_format=3,
        )
    return store._store_dict["zarr.json"].to_bytes()


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2).encode()
