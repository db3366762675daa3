"""The protocol between a cache and the stores, and what the stores share: blocks, checksums, plain metadata.

A store turns the columns of one shard into files, in memory, and reads them back. It never decides what is committed,
nor where the files are. Every byte that a reader returns has been compared with a checksum; what is missing is an
error, never zeros.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from .encoding import Columns, SamplePlace, SampleTable
from .errors import CorruptCache
from .files import Files, how_missing
from .identity import CaptureIdentity, digest
from .manifest import Block, ShardCommit, StoredFile

ROWS_PER_BLOCK, ENTRIES_PER_BLOCK = 256, 2**20
"""Positions in one compressed block, which is what is read at least; fewer where K + M is in the thousands."""


def rows_per_block(capture: CaptureIdentity) -> int:
    """Positions in one block of a cache with these settings."""
    return max(1, min(ROWS_PER_BLOCK, ENTRIES_PER_BLOCK // max(1, capture.top_k + capture.num_tail_samples)))


T = TypeVar("T")

Blocks = dict[str, tuple[Block, ...]]


class ShardReader(Protocol):
    """A shard that can be read. All raise `CorruptCache`."""

    def table(self) -> SampleTable:
        """The samples of the shard."""
        ...

    def token_ids(self) -> NDArray[np.uint32]:
        """The tokens of all samples, one after the other: of the table what a search by tokens needs."""
        ...

    def samples(self, places: Sequence[SamplePlace]) -> list[tuple[NDArray[np.uint32], NDArray[np.int32]]]:
        """Token ids and positions of each of these samples."""
        ...

    def rows(self, rows: Sequence[slice]) -> Columns:
        """These rows of every position column, one slice after the other."""
        ...

    def column_bytes(self) -> dict[str, int]:
        """Stored bytes of each column, for people; where the layout does not part columns, an estimate."""
        ...


class Backend(Protocol):
    """A store: how the columns of a shard become files."""

    def write(self, table: SampleTable, columns: Columns, capture: CaptureIdentity) -> tuple[dict[str, bytes], Blocks]:
        """The files of a shard by name, and the blocks of them that are read apart."""
        ...

    def open(self, files: "ShardFiles", capture: CaptureIdentity) -> ShardReader:
        """A shard of these files. Reads nothing yet."""
        ...


class Memory:
    """The files of one shard before they are written: what `Files` offers a reader."""

    def __init__(self, root: str, files: Mapping[str, bytes]) -> None:
        self.root = root
        self._files = files

    def read(self, name: str, limit: int | None = None) -> bytes:
        """A whole file."""
        return self._files[name]

    def read_spans(self, name: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """Parts of a file."""
        return [self._files[name][at : at + length] for at, length in spans]


class ShardFiles:
    """The files of one committed shard, read with their checksums."""

    def __init__(self, files: "Files | Memory", commit: ShardCommit, folder: str) -> None:
        self.commit = commit
        self.where = f"{files.root}/{folder}" if folder else files.root
        self._files, self._prefix = files, f"{folder}/" if folder else ""

    def file(self, name: str) -> bytes:
        """A whole file, compared with its committed checksum."""
        data = self.whole(name)
        self.compare(name, data)
        return data

    def whole(self, name: str) -> bytes:
        """A whole file, not compared; of one that is longer than was committed, a byte more than that."""
        size = self._committed(name).size
        return self._reading(name, lambda: self._files.read(self._prefix + name, size))

    def compare(self, name: str, data: bytes) -> None:
        """Raise `CorruptCache` unless this is the committed content of a file."""
        expected = self._committed(name)
        if len(data) != expected.size:
            found = "more" if len(data) > expected.size else str(len(data))
            raise corrupt(f"{self.where}/{name}", f"expected {expected.size} bytes, found {found}")
        checksum = digest(data)
        if checksum != expected.checksum:
            raise corrupt(f"{self.where}/{name}", f"expected checksum {expected.checksum}, found {checksum}")

    def _committed(self, name: str) -> StoredFile:
        found = next((f for f in self.commit.files if f.name == name), None)
        if found is None:
            raise corrupt(f"{self.where}/{name}", "the file is not part of the commit")
        return found

    def check_blocks(self, counts: Mapping[str, int]) -> None:
        """That every stream has as many blocks as the counts of the commit need, before anything of their size is."""
        found = {stream: len(blocks) for stream, blocks in self.commit.blocks.items()}
        if found != counts:
            raise corrupt(self.where, f"the commit lists {found} blocks, its counts need {dict(counts)}")

    def blocks(self, stream: str, name: str, wanted: Sequence[int]) -> list[bytes]:
        """These blocks of a stream, which is in the file `name`, each compared with its committed crc32c."""
        committed = self.commit.blocks.get(stream, ())
        if wanted and wanted[-1] >= len(committed):
            raise corrupt(f"{self.where}/{name}", "the commit does not list as many blocks as the counts need")
        if not wanted:
            return []
        blocks = [committed[i] for i in wanted]
        spans = [(at, length) for at, length, _ in blocks]
        if len(wanted) == len(committed):  # all of them: one request instead of one a block
            start, stop = min(at for at, _ in spans), max(at + length for at, length in spans)
            (whole,) = self._reading(name, lambda: self._files.read_spans(self._prefix + name, [(start, stop - start)]))
            parts = [whole[at - start : at - start + length] for at, length in spans]
        else:
            parts = self._reading(name, lambda: self._files.read_spans(self._prefix + name, spans))
        for (at, length, expected), data in zip(blocks, parts, strict=True):
            if len(data) != length:
                found = f"expected {length} bytes at {at}, found the end of the file"
                raise corrupt(f"{self.where}/{name}", found)
            if google_crc32c.value(data) != expected:
                raise corrupt(f"{self.where}/{name}", f"the block at {at} does not match its crc32c")
        return parts

    def _reading(self, name: str, read: Callable[[], T]) -> T:
        try:
            return read()
        except KeyError as error:
            raise corrupt(f"{self.where}/{name}", "the file is missing") from error
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise corrupt(f"{self.where}/{name}", how_missing(error)) from error


def needed_blocks(slices: Sequence[slice], length: int) -> tuple[list[int], list[slice]]:
    """Which blocks of `length` entries these slices touch, ascending, and the slices within those blocks joined."""
    ranges = [range(s.start // length, -(-s.stop // length)) for s in slices]
    blocks = sorted({block for r in ranges for block in r})
    place = {block: i * length for i, block in enumerate(blocks)}
    inside = []
    for s, r in zip(slices, ranges, strict=True):
        start = place[r.start] + s.start - r.start * length if len(r) else 0
        inside.append(slice(start, start + s.stop - s.start))
    return blocks, inside


def take_slices(array: NDArray[Any], slices: Sequence[slice]) -> NDArray[Any]:
    """The slices of an array, one after the other."""
    parts = [array[s] for s in slices]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def corrupt(where: object, what: str) -> CorruptCache:
    """The error of a shard whose bytes cannot be trusted."""
    return CorruptCache(
        f"reading {where}: {what}. Its log-probabilities cannot be trusted. "
        "Run `logitcache verify` to see what is affected, `logitcache repair` to drop it, and precompute again.",
        f"{where}: {what}",
    )
