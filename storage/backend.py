"""The protocol between a cache and the stores, and what the stores share: files, sizes, checksums.

A store writes one shard into an empty folder and reads it back. It never decides what is committed.
Every byte that a reader returns has been compared with a checksum; a missing file is an error, never zeros.
"""

import hashlib
import os
from pathlib import Path
from typing import BinaryIO, Protocol

import google_crc32c

from .encoding import Columns, SampleTable
from .errors import CorruptCache
from .identity import digest
from .manifest import ShardCommit, StoredFile

ROWS_PER_CHUNK = 512
"""Positions in one compressed unit: a read of a 512-token sample touches at most two."""

Blocks = tuple[tuple[int, int, int], ...]


class ShardReader(Protocol):
    """An open shard."""

    def table(self) -> SampleTable:
        """The samples of the shard."""
        ...

    def rows(self, rows: slice) -> Columns:
        """These rows of every position column."""
        ...


class Backend(Protocol):
    """A store: where the bytes of a shard are."""

    def write(self, folder: Path, table: SampleTable, columns: Columns) -> Blocks:
        """Write a shard into an empty folder; return what the commit has to keep for reading it."""
        ...

    def open(self, folder: Path, commit: ShardCommit, top_k: int) -> ShardReader:
        """Open a shard whose rows hold top_k alternatives.

        Raises `CorruptCache` where a file is missing or not of the committed size.
        """
        ...


def describe_files(folder: Path) -> tuple[StoredFile, ...]:
    """Name, size and checksum of every file below a folder, in the order of the names."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return tuple(StoredFile(n, (folder / n).stat().st_size, file_checksum(folder / n)) for n in names)


def file_checksum(path: Path) -> str:
    """128-bit BLAKE2b of a file, in hexadecimal."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def check_sizes(folder: Path, commit: ShardCommit) -> None:
    """Raise `CorruptCache` unless every committed file is there with its committed size."""
    for file in commit.files:
        path = folder / file.name
        if path.is_symlink() or not path.is_file():
            raise corrupt(path, "the file is missing")
        if path.stat().st_size != file.size:
            raise corrupt(path, f"expected {file.size} bytes, found {path.stat().st_size}")


def read_checked(folder: Path, commit: ShardCommit, name: str) -> bytes:
    """A whole file, compared with its committed checksum."""
    expected = next((f.checksum for f in commit.files if f.name == name), None)
    if expected is None:
        raise corrupt(folder / name, "the file is not part of the commit")
    data = (folder / name).read_bytes()
    found = digest(data)
    if found != expected:
        raise corrupt(folder / name, f"expected checksum {expected}, found {found}")
    return data


def read_blocks(path: Path, blocks: Blocks) -> list[bytes]:
    """These spans (offset, length, crc32c) of a file, each compared with its committed crc32c."""
    try:
        with path.open("rb") as f:
            return [_read_block(f, path, *block) for block in blocks]
    except FileNotFoundError as error:
        raise corrupt(path, "the file is missing") from error


def _read_block(file: BinaryIO, path: Path, at: int, length: int, expected: int) -> bytes:
    if at + length > os.fstat(file.fileno()).st_size:
        raise corrupt(path, f"expected a block of {length} bytes at {at}, found the end of the file")
    file.seek(at)
    data = file.read(length)
    if google_crc32c.value(data) != expected:
        raise corrupt(path, f"the block at {at} does not match its crc32c")
    return data


def corrupt(where: object, what: str) -> CorruptCache:
    """The error of a shard whose bytes cannot be trusted."""
    return CorruptCache(
        f"reading {where}: {what}. Its log-probabilities cannot be trusted. "
        "Run `logitcache verify` to see what is affected, delete the shard's .json, and precompute again."
    )
