"""Shards packed in a process of its own: what feeds a GPU does not wait for an interpreter that is encoding.

Owns both ends of that process (`child_process`), and what goes between them. It only computes: who asked writes to the
disk, so it may die at any moment, and is killed where a frame was left unfinished. Must not know where the bytes go.
"""

import signal
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from .child_process import ends_of_child, read_array, read_header, start_child, write_frame
from .encoding import sample_table
from .errors import CorruptCache, InvalidRecord, PackingStopped
from .manifest import Manifest, ShardCommit, from_bytes, to_bytes
from .packing import PackedShard, pack_samples
from .records import BaseLogprobs, CachedSample

_REFUSALS = {error.__name__: error for error in (CorruptCache, InvalidRecord)}
LEAVING_SECONDS = 5.0
"""How long a process that was told that nothing more comes is waited for."""


class PackingProcess:
    """A process that packs shards of one cache, one at a time. Use as a context manager, from one thread at a time."""

    def __init__(self, manifest: Manifest) -> None:
        child = start_child(__name__, "serve")
        self._process, self._to, self._from = child.process, child.to, child.answers
        try:
            self._send({"manifest": to_bytes(manifest).decode()}, ())
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def __enter__(self) -> "PackingProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def pack(self, samples: Sequence[CachedSample], chat_template: str = "") -> PackedShard:
        """What `pack_samples` gives of them. Raises what it raises, and `PackingStopped` where the process is dead."""
        arrays = _arrays(samples)
        header = {
            "chat_template": chat_template,
            "num_tokens": [len(sample.token_ids) for sample in samples],
            "num_positions": [len(sample.logprobs) for sample in samples],
            "num_tokens_cut": [int(sample.num_tokens_cut) for sample in samples],
            "columns": [[name, parts[0].dtype.str, parts[0].shape[1:]] for name, parts in arrays.items()],
        }
        try:
            answer, data = self._answered(header, (part for parts in arrays.values() for part in parts))
        except BaseException:
            self._process.kill()
            raise
        if "refusal" in answer:
            raise _REFUSALS[answer["refusal"]](*answer["arguments"])
        commit = from_bytes(ShardCommit, answer["commit"].encode(), "the commit of a packed shard")
        return PackedShard(
            commit, {file.name: d for file, d in zip(commit.files, data, strict=True)}, sample_table(samples)
        )

    def kill(self) -> None:
        """End it now: a shard that is waited for is refused with `PackingStopped`."""
        self._process.kill()

    def close(self) -> None:
        """Let the process end, which it does by itself where this one was killed."""
        with suppress(BrokenPipeError):
            self._to.close()
        self._from.close()
        self._end()

    def _end(self) -> None:
        try:
            self._process.wait(LEAVING_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answered(self, header: dict[str, Any], arrays: Iterable[NDArray[Any]]) -> tuple[dict[str, Any], list[bytes]]:
        """The header of the answer to a frame, and what follows it."""
        if self._process.poll() is not None:
            raise self._stopped()
        self._send(header, arrays)
        if (answer := read_header(self._from)) is None:
            raise self._stopped()
        data = [self._from.read(size) for size in answer["sizes"]]
        if list(map(len, data)) != answer["sizes"]:
            raise self._stopped()
        return answer, data

    def _send(self, header: dict[str, Any], arrays: Iterable[NDArray[Any]]) -> None:
        try:
            write_frame(self._to, header, arrays)
        except BrokenPipeError:
            raise self._stopped() from None

    def _stopped(self) -> PackingStopped:
        self._end()
        return PackingStopped(
            f"packing a shard: expected an answer of process {self._process.pid}, found that it ended with status "
            f"{self._process.returncode}. The shard was not written; what was committed before stays. Call again; "
            "where memory ran out, use a smaller --shard-positions."
        )


def _arrays(samples: Sequence[CachedSample]) -> dict[str, list[NDArray[Any]]]:
    """What a frame carries, by name, of each sample. Raises `InvalidRecord` where it could not be told apart again."""
    if not samples:
        return {}
    columns = [sample.logprobs.columns() for sample in samples]
    found: dict[str, list[NDArray[Any]]] = {"token_ids": [sample.token_ids for sample in samples]}
    found |= {name: [column.get(name, np.empty(0)) for column in columns] for name in columns[0]}
    for name, parts in found.items():
        lengths = [len(s.token_ids if name == "token_ids" else s.logprobs) for s in samples]
        shapes = [(part.dtype, part.shape) for part in parts]
        expected = [(parts[0].dtype, (length, *parts[0].shape[1:])) for length in lengths]
        objects = parts[0].dtype.hasobject  # addresses, which mean nothing to another process
        if objects or shapes != expected or any(column.keys() != columns[0].keys() for column in columns):
            raise InvalidRecord(
                f"packing a shard: expected records of the same columns of numbers, found {name} of others."
            )
    return found


def serve() -> None:
    """The process: pack what comes, until nothing more does."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)  # of who asks; it may still want the shard in work
    source, sink = ends_of_child()
    first = read_header(source)
    if first is None:
        return
    manifest = from_bytes(Manifest, first["manifest"].encode(), "the manifest of a cache that is written")
    with suppress(BrokenPipeError):  # who asked is gone
        while (header := read_header(source)) is not None and (samples := _samples(source, header)) is not None:
            _answer(sink, manifest, samples, header["chat_template"])


def _answer(sink: IO[bytes], manifest: Manifest, samples: Sequence[CachedSample], chat_template: str) -> None:
    try:
        packed = pack_samples(manifest, samples, chat_template)
    except CorruptCache as error:
        write_frame(sink, {"refusal": "CorruptCache", "arguments": [str(error), error.fact], "sizes": []}, ())
    except InvalidRecord as error:
        write_frame(sink, {"refusal": "InvalidRecord", "arguments": [str(error)], "sizes": []}, ())
    else:
        files = [np.frombuffer(packed.files[file.name], np.uint8) for file in packed.commit.files]
        write_frame(sink, {"commit": to_bytes(packed.commit).decode(), "sizes": list(map(len, files))}, files)


def _samples(source: IO[bytes], header: dict[str, Any]) -> list[CachedSample] | None:
    """Of the arrays that follow a header; None where they end early."""
    num_tokens, num_positions = header["num_tokens"], header["num_positions"]
    columns: dict[str, NDArray[Any]] = {}
    for name, dtype, shape in header["columns"]:
        rows = sum(num_tokens if name == "token_ids" else num_positions)
        if (column := read_array(source, dtype, (rows, *shape))) is None:
            return None
        columns[name] = column
    tokens = np.split(columns.pop("token_ids"), np.cumsum(num_tokens)[:-1]) if columns else []
    ends = np.cumsum(num_positions, dtype=np.int64)
    found = []
    for number, end in enumerate(ends):
        rows = slice(int(end) - num_positions[number], int(end))
        record = BaseLogprobs(**{name: column[rows] for name, column in columns.items()})
        found.append(CachedSample(tokens[number], record, header["num_tokens_cut"][number]))
    return found
