"""Shards as two Arrow IPC files: samples.arrow, one row a sample, and logprobs.arrow, one row a position.

Plain `pyarrow.ipc.open_file` reads both. Arrow has no checksums of its own: the commit keeps a crc32c of each record
batch of logprobs.arrow (compared at every read) and a checksum of the whole of samples.arrow.
"""

from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .backend import ROWS_PER_CHUNK, Blocks, check_sizes, corrupt, read_blocks, read_checked
from .encoding import POSITION_DTYPES, WIDE_COLUMNS, Columns, SampleTable
from .manifest import ShardCommit

_SAMPLES, _LOGPROBS = "samples.arrow", "logprobs.arrow"
_OPTIONS = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", 3))


class ArrowBackend:
    """Writes and opens shards as Arrow IPC files."""

    def write(self, folder: Path, table: SampleTable, columns: Columns) -> Blocks:
        samples = _samples_batch(table)
        with pa.ipc.new_file(folder / _SAMPLES, samples.schema, options=_OPTIONS) as writer:
            writer.write_batch(samples)
        batch = _logprobs_batch(columns)
        ends = []
        with (
            pa.OSFile(str(folder / _LOGPROBS), "wb") as sink,
            pa.ipc.new_file(sink, batch.schema, options=_OPTIONS) as writer,
        ):
            for start in range(0, batch.num_rows, ROWS_PER_CHUNK):
                writer.write_batch(batch.slice(start, ROWS_PER_CHUNK))
                ends.append(sink.tell())
        data = (folder / _LOGPROBS).read_bytes()
        spans = zip([_end_of_schema(data), *ends], ends, strict=False)
        return tuple((at, end - at, google_crc32c.value(data[at:end])) for at, end in spans)

    def open(self, folder: Path, commit: ShardCommit, top_k: int) -> "ArrowReader":
        return ArrowReader(folder, commit, top_k)


class ArrowReader:
    """An open shard in the Arrow layout."""

    def __init__(self, folder: Path, commit: ShardCommit, top_k: int) -> None:
        check_sizes(folder, commit)
        self._folder, self._commit = folder, commit
        self._schema = _schema(top_k)  # not the file's own: no checksum covers its header
        self._path = folder / _LOGPROBS
        if len(commit.blocks) != -(-commit.num_positions // ROWS_PER_CHUNK):
            raise corrupt(self._path, "the commit does not list as many blocks as the positions need")

    def table(self) -> SampleTable:
        data = read_checked(self._folder, self._commit, _SAMPLES)
        samples = pa.ipc.open_file(pa.py_buffer(data)).read_all().combine_chunks()
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

    def rows(self, rows: slice) -> Columns:
        first, last = rows.start // ROWS_PER_CHUNK, -(-rows.stop // ROWS_PER_CHUNK)
        blocks = [self._batch(data) for data in read_blocks(self._path, self._commit.blocks[first:last])]
        start = first * ROWS_PER_CHUNK
        whole = {name: np.concatenate([b[name] for b in blocks]) for name in POSITION_DTYPES}
        return {name: column[rows.start - start : rows.stop - start] for name, column in whole.items()}

    def _batch(self, data: bytes) -> Columns:
        try:
            batch = pa.ipc.read_record_batch(pa.py_buffer(data), self._schema)
            return {name: _to_numpy(batch.column(name)) for name in POSITION_DTYPES}
        except ValueError as error:  # of which ArrowInvalid is one
            raise corrupt(self._path, f"a record batch is not of the manifest's top_k ({error})") from error


def _end_of_schema(data: bytes) -> int:
    """Where the first record batch begins: after the 8 bytes of magic and the schema message."""
    reader = pa.BufferReader(data)
    reader.seek(8)
    pa.ipc.read_message(reader)
    return int(reader.tell())


def _samples_batch(table: SampleTable) -> pa.RecordBatch:
    columns = {
        "sample_id": pa.array([row.tobytes() for row in table.sample_ids], pa.binary(16)),
        "token_ids": _lists(table.token_ids, table.num_tokens),
        "positions": _lists(table.positions, table.num_positions),
        "num_tokens_cut": pa.array(table.num_tokens_cut),
    }
    return pa.record_batch(columns)


def _lists(values: NDArray[Any], lengths: NDArray[np.uint32]) -> pa.LargeListArray:
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return pa.LargeListArray.from_arrays(offsets, pa.array(values))


def _schema(top_k: int) -> pa.Schema:
    flat = {name: pa.from_numpy_dtype(np.dtype(dtype)) for name, dtype in POSITION_DTYPES.items()}
    return pa.schema({n: pa.list_(t, top_k) if n in WIDE_COLUMNS else t for n, t in flat.items()})


def _logprobs_batch(columns: Columns) -> pa.RecordBatch:
    arrays = []
    for name in POSITION_DTYPES:
        data: NDArray[Any] = columns[name]
        flat = pa.array(np.ascontiguousarray(data).reshape(-1))
        arrays.append(pa.FixedSizeListArray.from_arrays(flat, data.shape[1]) if name in WIDE_COLUMNS else flat)
    return pa.record_batch(arrays, schema=_schema(columns["alternative_ids"].shape[1]))


def _to_numpy(column: Any) -> NDArray[Any]:
    if isinstance(column, pa.FixedSizeListArray):
        flat: NDArray[Any] = column.values.to_numpy(zero_copy_only=False)  # all of them: a wrong width is an error
        return flat.reshape(len(column), column.type.list_size)
    data: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return data
