"""Where the files of a cache are: a local folder, or any store that fsspec knows (s3://, gs://, memory://, ...).

Owns what all of them promise: a file is created whole or not at all, the first creator wins, and a folder of files is
on the disk, read back and synced before anybody is told of it. Names are relative, with "/". Must not know what the
files mean. Trade-off: local folders (`local_files`) are POSIX; object stores (`object_files`) need conditional puts.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from .errors import NotACache
from .layout import is_unfinished
from .local_files import NOT_PLAIN, LocalFiles, name_file, replace_file, sync_path
from .object_files import ObjectFiles
from .plain_text import without_secrets

__all__ = [
    "Files",
    "LocalFiles",
    "ObjectFiles",
    "Span",
    "how_missing",
    "is_unfinished",
    "name_file",
    "open_files",
    "replace_file",
    "sync_path",
]

_NOT_A_URL = re.compile(r"^[a-z][a-z0-9+.-]+:/(?!/)")

Span = tuple[int, int]
"""Offset and length of a part of a file."""


class Files(Protocol):
    """The files below one root. A missing file is `FileNotFoundError`; what a disk or a network refuses, `OSError`.

    On a local disk all raise `LinkRefused` where they meet a symbolic link that is not followed.
    """

    root: str
    """For people: of a URL without its password and its query."""
    is_local: bool
    """Whether they are a folder of this machine, whose `root` is its path, and which may have locks."""

    def read(self, name: str, limit: int | None = None) -> bytes:
        """A whole file; of one longer than `limit`, the first limit + 1 bytes."""
        ...

    def read_spans(self, name: str, spans: Sequence[Span]) -> list[bytes]:
        """Parts of a file, each as long as the file allows."""
        ...

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""
        ...

    def names(self, folder: str) -> list[str]:
        """The names in a folder, files and folders, sorted; none where there is no folder."""
        ...

    def sizes(self, folder: str) -> dict[str, int]:
        """The sizes of all files below a folder, by their names in it."""
        ...

    def times(self, folder: str) -> dict[str, float | None]:
        """When each file in a folder was changed last, in seconds since 1970; None where the store does not say."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Create a file, whole or not at all. False, and nothing is changed, where it exists: the first one wins."""
        ...

    def replace(self, name: str, data: bytes) -> None:
        """Create a file or replace it, in one atomic step."""
        ...

    def publish(self, folder: str, files: Mapping[str, bytes]) -> None:
        """Make a folder of files durable. Its name says its content, so that whoever was first wrote the same.

        Raises `OSError` where they do not read back as they were written.
        """
        ...

    def remove(self, *names: str) -> None:
        """Remove files, and folders with all they hold, where they are there, in this order.

        They are gone for good before this returns, those of one folder before those of the next.
        """
        ...

    def join(self) -> Callable[[], None]:
        """Become one of the writers; return what leaves. Waits for the end of `exclusive`."""
        ...

    def exclusive(self) -> AbstractContextManager[None]:
        """To be the only writer: others, of this process too, wait for its end, so none may be opened in it.

        Raises `OSError` (EBUSY) where another writes already, on this machine: locks may reach no further. An object
        store has none. So the caller answers for nobody else writing.
        """
        ...


def how_missing(error: OSError) -> str:
    """What is to be said of a file that cannot be had: that it is missing, or what is in its place."""
    return NOT_PLAIN if error.strerror == NOT_PLAIN else "the file is missing"


def open_files(path: str | Path) -> Files:
    """The files at a path or URL. Raises `NotACache` where fsspec does not know the URL or lacks its package."""
    text = str(path)
    protocol, separator, rest = text.partition("://")
    protocol = protocol.lower()
    if _NOT_A_URL.match(text) or (separator and protocol in ("file", "local") and not rest.startswith("/")):
        raise NotACache(
            f"opening {without_secrets(text)}: expected a folder or a URL such as s3://bucket/cache or file:///folder."
        )
    if not separator:
        return LocalFiles(Path(text).expanduser())
    return LocalFiles(Path(rest)) if protocol in ("file", "local") else ObjectFiles(f"{protocol}://{rest}")
