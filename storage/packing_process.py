"""Shards packed in a process of its own: what feeds a GPU does not wait for an interpreter that is encoding.

Owns both ends of that process, and what goes between them through its standard input and a pipe of their own, since
anything may print on standard output: frames of a header in JSON and of arrays as they lie in memory. Nothing is
pickled. The process only computes: who asked writes to the disk, so it may die at any moment, and is killed where a
frame was left unfinished, since the next one would be read as the rest of it. Must not know where the bytes go.
"""

import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from .encoding import sample_table
from .errors import CorruptCache, InvalidRecord, PackingStopped
from .manifest import Manifest, ShardCommit, from_bytes, to_bytes
from .packing import PackedShard, pack_samples
from .records import BaseLogprobs, CachedSample

_LENGTH = struct.Struct("<Q")
_REFUSALS = {error.__name__: error for error in (CorruptCache, InvalidRecord)}
_BUFFER = 2**20
_SERVE = "import sys; sys.path[:] = sys.argv[2:]; from logitcache.storage.packing_process import serve; serve()"
"""Arguments: the descriptor that answers go to, and where to import from: what this interpreter imports, not what lies
in the folder that it works in."""
LEAVING_SECONDS = 5.0
"""How long a process that was told that nothing more comes is waited for."""


class PackingProcess:
    """A process that packs shards of one cache, one at a time. Use as a context manager, from one thread at a time."""

    def __init__(self, manifest: Manifest) -> None:
        answers, theirs = os.pipe()
        self._from = os.fdopen(answers, "rb", _BUFFER)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _SERVE, str(theirs), *_IMPORT_PATHS],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                bufsize=_BUFFER,
                pass_fds=(theirs,),
            )
        except BaseException:
            self._from.close()
            raise
        finally:
            os.close(theirs)
        assert self._process.stdin is not None
        self._to = self._process.stdin
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
        if (answer := _received(self._from)) is None:
            raise self._stopped()
        data = [self._from.read(size) for size in answer["sizes"]]
        if list(map(len, data)) != answer["sizes"]:
            raise self._stopped()
        return answer, data

    def _send(self, header: dict[str, Any], arrays: Iterable[NDArray[Any]]) -> None:
        try:
            _write(self._to, header, arrays)
        except BrokenPipeError:
            raise self._stopped() from None

    def _stopped(self) -> PackingStopped:
        self._end()
        return PackingStopped(
            f"packing a shard: expected an answer of process {self._process.pid}, found that it ended with status "
            f"{self._process.returncode}. The shard was not written; what was committed before stays. Call again; "
            "where memory ran out, use a smaller --shard-positions."
        )


def _absolute(paths: Sequence[str]) -> list[str]:
    found = []
    for path in paths:
        with suppress(FileNotFoundError):  # relative to a folder that is gone: nothing is imported from there either
            found.append(str(Path(path).absolute()))
    return found


_IMPORT_PATHS = _absolute(sys.path)
"""What this was imported from, before anybody goes to another folder."""


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
    source, sink = sys.stdin.buffer, os.fdopen(int(sys.argv[1]), "wb", _BUFFER)
    first = _received(source)
    if first is None:
        return
    manifest = from_bytes(Manifest, first["manifest"].encode(), "the manifest of a cache that is written")
    with suppress(BrokenPipeError):  # who asked is gone
        while (header := _received(source)) is not None and (samples := _samples(source, header)) is not None:
            _answer(sink, manifest, samples, header["chat_template"])


def _answer(sink: IO[bytes], manifest: Manifest, samples: Sequence[CachedSample], chat_template: str) -> None:
    try:
        packed = pack_samples(manifest, samples, chat_template)
    except CorruptCache as error:
        _write(sink, {"refusal": "CorruptCache", "arguments": [str(error), error.fact], "sizes": []}, ())
    except InvalidRecord as error:
        _write(sink, {"refusal": "InvalidRecord", "arguments": [str(error)], "sizes": []}, ())
    else:
        files = [np.frombuffer(packed.files[file.name], np.uint8) for file in packed.commit.files]
        _write(sink, {"commit": to_bytes(packed.commit).decode(), "sizes": list(map(len, files))}, files)


def _samples(source: IO[bytes], header: dict[str, Any]) -> list[CachedSample] | None:
    """Of the arrays that follow a header; None where they end early."""
    num_tokens, num_positions = header["num_tokens"], header["num_positions"]
    columns: dict[str, NDArray[Any]] = {}
    for name, dtype, shape in header["columns"]:
        rows = sum(num_tokens if name == "token_ids" else num_positions)
        columns[name] = np.empty((rows, *shape), dtype=dtype)
        if not _fill(source, columns[name].reshape(-1).view(np.uint8).data):
            return None
    tokens = np.split(columns.pop("token_ids"), np.cumsum(num_tokens)[:-1]) if columns else []
    ends = np.cumsum(num_positions, dtype=np.int64)
    found = []
    for number, end in enumerate(ends):
        rows = slice(int(end) - num_positions[number], int(end))
        record = BaseLogprobs(**{name: column[rows] for name, column in columns.items()})
        found.append(CachedSample(tokens[number], record, header["num_tokens_cut"][number]))
    return found


def _write(sink: IO[bytes], header: dict[str, Any], arrays: Iterable[NDArray[Any]]) -> None:
    data = json.dumps(header).encode()
    sink.write(_LENGTH.pack(len(data)) + data)
    for array in arrays:
        sink.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    sink.flush()


def _received(source: IO[bytes]) -> dict[str, Any] | None:
    """The next header; None where nothing more comes, or not all of it."""
    length = source.read(_LENGTH.size)
    if len(length) < _LENGTH.size:
        return None
    (size,) = _LENGTH.unpack(length)
    data = source.read(size)
    return json.loads(data) if len(data) == size else None


def _fill(source: IO[bytes], wanted: memoryview) -> bool:
    at = 0
    while at < len(wanted):
        if not (num := source.readinto(wanted[at:])):  # type: ignore[attr-defined]
            return False
        at += num
    return True
