"""Shards as two Arrow IPC files: samples.arrow, one row a sample, and logprobs.arrow, one row a position.

Plain `pyarrow.ipc.open_file` reads both. Columns of K, G or M integers are stored as two, their low and their high
bytes, which zstd packs a quarter better and unpacks twice as fast as whole integers (docs/log.md). Arrow has no
checksums of its own: the commit keeps a crc32c of each record batch, compared at every read, and the batches' header is
never read.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .arrow_sizes import check_sizes
from .backend import Blocks, ShardFiles, corrupt, needed_blocks, rows_per_block, take_slices
from .encoding import Column, Columns, SamplePlace, SampleTable, columns_of
from .identity import CaptureIdentity
from .manifest import Block

SAMPLES, LOGPROBS = "samples.arrow", "logprobs.arrow"
SAMPLES_PER_BLOCK = 16
_OPTIONS = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", 1))
_SLACK = 2**16
"""Bytes of padding, offsets and ids that a batch may have beside its numbers."""

_ONE_THREAD = pa.ipc.IpcReadOptions(use_threads=False)
"""For a batch of this size threads cost more than they save."""

_ONLY_TOKENS = pa.ipc.IpcReadOptions(use_threads=False, included_fields=[1])
"""Unpacks the buffers of one column of `samples.arrow`, which is most of the time that its small batches take."""

_SAMPLES_SCHEMA = pa.schema(
    {
        "sample_id": pa.binary(16),
        "token_ids": pa.list_(pa.uint32()),
        "positions": pa.list_(pa.int32()),
        "num_tokens_cut": pa.uint32(),
    }
)
_PLANES = {"<u4": (16, "<u2", "<u1"), "<u2": (8, "<u1", "<u1")}
"""Of a wide column of integers: bits of the low plane, and the types of the low and the high one."""


class ArrowBackend:
    """Writes and opens shards as Arrow IPC files."""

    def write(self, table: SampleTable, columns: Columns, capture: CaptureIdentity) -> tuple[dict[str, bytes], Blocks]:
        samples, sample_blocks = _write_file(_SAMPLES_SCHEMA, _sample_batches(table))
        logprobs, row_blocks = _write_file(_schema(capture), _batches(columns, capture))
        return {SAMPLES: samples, LOGPROBS: logprobs}, {SAMPLES: sample_blocks, LOGPROBS: row_blocks}

    def open(self, files: ShardFiles, capture: CaptureIdentity) -> "ArrowReader":
        return ArrowReader(files, capture)


class ArrowReader:
    """A shard in the Arrow layout."""

    def __init__(self, files: ShardFiles, capture: CaptureIdentity) -> None:
        self._files, self._capture = files, capture
        self._rows = rows_per_block(capture)
        self._schema = _schema(capture)  # not the file's own: no checksum covers its header
        commit = files.commit
        counts = {SAMPLES: -(-commit.num_samples // SAMPLES_PER_BLOCK)}
        files.check_blocks(counts | {LOGPROBS: -(-commit.num_positions // self._rows)})
        widths = (np.dtype(c.dtype).itemsize * max(c.width, 1) for c in columns_of(capture))
        self._row_bytes = self._rows * sum(widths) + _SLACK
        self._sample_bytes = 4 * (commit.num_tokens + commit.num_positions) + _SLACK

    def table(self) -> SampleTable:
        samples = pa.Table.from_batches(self._all_samples(), _SAMPLES_SCHEMA).combine_chunks()
        tokens, positions = (samples[name].combine_chunks() for name in ("token_ids", "positions"))
        ids = b"".join(samples["sample_id"].to_pylist())
        return SampleTable(
            sample_ids=np.frombuffer(ids, dtype=np.uint8).reshape(-1, 16),
            num_tokens=np.diff(tokens.offsets.to_numpy()).astype(np.uint32),
            num_positions=np.diff(positions.offsets.to_numpy()).astype(np.uint32),
            num_tokens_cut=samples["num_tokens_cut"].to_numpy(),
            token_ids=tokens.flatten().to_numpy(),
            positions=positions.flatten().to_numpy(),
        )

    def token_ids(self) -> NDArray[np.uint32]:
        lists = [batch.column("token_ids").flatten().to_numpy() for batch in self._all_samples(_ONLY_TOKENS)]
        return np.concatenate(lists)

    def samples(self, places: Sequence[SamplePlace]) -> list[tuple[NDArray[np.uint32], NDArray[np.int32]]]:
        wanted = sorted({p.row // SAMPLES_PER_BLOCK for p in places})
        batches = dict(zip(wanted, self._sample_batches(wanted), strict=True))
        found = []
        for place in places:
            batch, row = batches[place.row // SAMPLES_PER_BLOCK], place.row % SAMPLES_PER_BLOCK
            found.append(tuple(_list_item(batch.column(name), row) for name in ("token_ids", "positions")))
        return found  # type: ignore[return-value]

    def rows(self, rows: Sequence[slice]) -> Columns:
        wanted, inside = needed_blocks(rows, self._rows)
        blocks = self._row_batches(wanted)
        columns: Columns = {}
        for column in columns_of(self._capture):
            parts = [_take(block, column) for block in blocks]
            joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
            columns[column.name] = take_slices(joined, inside)
        return columns

    def column_bytes(self) -> dict[str, int]:
        """By the share of each column in the first record batches, written alone."""
        samples, rows = self._sample_batches([0])[0], self._row_batches([0])[0]
        sizes = {f.name: f.size for f in self._files.commit.files}
        found: dict[str, int] = {}
        for batch, name in ((samples, SAMPLES), (rows, LOGPROBS)):
            alone = {c: _size(batch, c) for c in batch.schema.names}
            total = sum(alone.values())
            found |= {column: round(sizes[name] * size / total) for column, size in alone.items()}
        return found

    def _all_samples(self, options: pa.ipc.IpcReadOptions = _ONE_THREAD) -> list[pa.RecordBatch]:
        return self._sample_batches(range(-(-self._files.commit.num_samples // SAMPLES_PER_BLOCK)), options)

    def _sample_batches(
        self, wanted: Sequence[int], options: pa.ipc.IpcReadOptions = _ONE_THREAD
    ) -> list[pa.RecordBatch]:
        parts = self._files.blocks(SAMPLES, SAMPLES, list(wanted))
        rows = [min(SAMPLES_PER_BLOCK, self._files.commit.num_samples - i * SAMPLES_PER_BLOCK) for i in wanted]
        return self._decode(parts, _SAMPLES_SCHEMA, rows, self._sample_bytes, options)

    def _row_batches(self, wanted: Sequence[int]) -> list[pa.RecordBatch]:
        parts = self._files.blocks(LOGPROBS, LOGPROBS, list(wanted))
        rows = [min(self._rows, self._files.commit.num_positions - i * self._rows) for i in wanted]
        return self._decode(parts, self._schema, rows, self._row_bytes)

    def _decode(
        self,
        parts: Sequence[bytes],
        schema: pa.Schema,
        num_rows: Sequence[int],
        most: int,
        options: pa.ipc.IpcReadOptions = _ONE_THREAD,
    ) -> list[pa.RecordBatch]:
        """Record batches of so many rows each, as one stream: opening one for each takes longer than reading it."""
        batches = []
        try:
            for data in parts:
                check_sizes(data, _num_buffers(schema), most)
            with pa.ipc.open_stream(b"".join([_schema_message(schema), *parts]), options=options) as stream:
                for rows in num_rows:
                    batch = stream.read_next_batch()
                    batch.validate(full=True)
                    _check_batch(batch, rows)
                    batches.append(batch)
        except (pa.ArrowException, ValueError, OSError, StopIteration, MemoryError) as error:
            raise corrupt(self._files.where, f"a record batch is not as the manifest says ({error})") from error
        return batches


def _check_batch(batch: pa.RecordBatch, num_rows: int) -> None:
    """Raise ValueError unless a batch has the rows, the widths and the values that it must have."""
    if batch.num_rows != num_rows:
        raise ValueError(f"expected {num_rows} rows, found {batch.num_rows}")
    for field, column in zip(batch.schema, batch.columns, strict=True):
        values = column.values if hasattr(column, "values") else column
        if column.null_count or values.null_count:
            raise ValueError(f"{field.name} has nulls")
        width = getattr(field.type, "list_size", 0)
        if width and len(values) != width * num_rows:
            raise ValueError(f"{field.name} is not {width} wide")


def _write_file(schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> tuple[bytes, tuple[Block, ...]]:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema, options=_OPTIONS) as writer:
        ends = []
        for batch in batches:
            writer.write_batch(batch)
            ends.append(sink.tell())
    data = sink.getvalue().to_pybytes()
    spans = zip([_end_of_schema(data), *ends], ends, strict=False)
    return data, tuple((at, end - at, google_crc32c.value(data[at:end])) for at, end in spans)


@cache
def _schema_message(schema: pa.Schema) -> bytes:
    message: bytes = schema.serialize().to_pybytes()
    return message


@cache
def _num_buffers(schema: pa.Schema) -> int:
    """Buffers of a record batch: what is valid, and values or offsets, of each field and of what is in its lists."""
    empty = schema.empty_table().to_batches() or [pa.RecordBatch.from_pylist([], schema)]
    return sum(len(column.buffers()) for column in empty[0].columns)


def _end_of_schema(data: bytes) -> int:
    """Where the first record batch begins: after the 8 bytes of magic and the schema message."""
    reader = pa.BufferReader(data)
    reader.seek(8)
    pa.ipc.read_message(reader)
    return int(reader.tell())


def _sample_batches(table: SampleTable) -> Iterator[pa.RecordBatch]:
    ids = pa.array([row.tobytes() for row in table.sample_ids], pa.binary(16))
    tokens, positions = _lists(table.token_ids, table.num_tokens), _lists(table.positions, table.num_positions)
    whole = pa.table([ids, tokens, positions, pa.array(table.num_tokens_cut)], schema=_SAMPLES_SCHEMA)
    return iter(whole.to_batches(max_chunksize=SAMPLES_PER_BLOCK))


def _lists(values: NDArray[Any], lengths: NDArray[np.uint32]) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))


def _list_item(column: Any, row: int) -> NDArray[Any]:
    start, stop = column.offsets[row].as_py(), column.offsets[row + 1].as_py()
    item: NDArray[Any] = column.values.slice(start, stop - start).to_numpy()
    return item


def _schema(capture: CaptureIdentity) -> pa.Schema:
    fields = []
    for column in columns_of(capture):
        if column.width and column.dtype in _PLANES:
            _, low, high = _PLANES[column.dtype]
            fields += [(f"{column.name}_low", low, column.width), (f"{column.name}_high", high, column.width)]
        else:
            fields.append((column.name, column.dtype, column.width))
    types = ((name, pa.from_numpy_dtype(np.dtype(dtype)), width) for name, dtype, width in fields)
    return pa.schema([pa.field(n, pa.list_(t, w) if w else t, nullable=False) for n, t, w in types])


def _batches(columns: Columns, capture: CaptureIdentity) -> Iterator[pa.RecordBatch]:
    schema = _schema(capture)
    num_rows, rows = len(next(iter(columns.values()))), rows_per_block(capture)
    for start in range(0, num_rows, rows):
        arrays = []
        for column in columns_of(capture):
            data = columns[column.name][start : start + rows]
            for plane in _split(data, column):
                flat = pa.array(np.ascontiguousarray(plane).reshape(-1))
                arrays.append(pa.FixedSizeListArray.from_arrays(flat, column.width) if column.width else flat)
        yield pa.record_batch(arrays, schema=schema)


def _split(data: NDArray[Any], column: Column) -> list[NDArray[Any]]:
    if not column.width or column.dtype not in _PLANES:
        return [data]
    bits, low, high = _PLANES[column.dtype]
    return [(data & np.array((1 << bits) - 1, data.dtype)).astype(low), (data >> bits).astype(high)]


def _take(batch: pa.RecordBatch, column: Column) -> NDArray[Any]:
    if not column.width:
        data: NDArray[Any] = batch.column(column.name).to_numpy(zero_copy_only=False)
        return data
    if column.dtype not in _PLANES:
        return _wide(batch, column.name, column.width)
    bits, _, _ = _PLANES[column.dtype]
    low = _wide(batch, f"{column.name}_low", column.width).astype(column.dtype)
    high = _wide(batch, f"{column.name}_high", column.width)
    if high.any():
        low |= high.astype(column.dtype) << np.array(bits, column.dtype)
    return low


def _wide(batch: pa.RecordBatch, name: str, width: int) -> NDArray[Any]:
    flat: NDArray[Any] = batch.column(name).values.to_numpy(zero_copy_only=False)
    return flat.reshape(batch.num_rows, width)


def _size(batch: pa.RecordBatch, name: str) -> int:
    sink = pa.BufferOutputStream()
    alone = batch.select([name])
    with pa.ipc.new_stream(sink, alone.schema, options=_OPTIONS) as writer:
        writer.write_batch(alone)
    return int(sink.getvalue().size)
