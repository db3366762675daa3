"""Where the files of a cache are: a local folder, or any store that fsspec knows (s3://, gs://, memory://, ...).

Owns what all of them promise: a file is created whole or not at all, the first creator wins, and a folder of files is
on the disk, read back and synced before anybody is told of it. Names are relative, with "/". Must not know what the
files mean. Trade-off: local folders (`local_files`) are POSIX; object stores need conditional puts, which S3, GCS and
Azure have and which their fsspec implementations take as mode="create".
"""

import errno
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

import fsspec

from .errors import CacheError, NotACache
from .layout import is_unfinished
from .local_files import NOT_PLAIN, LocalFiles, replace_file, sync_path

__all__ = [
    "Files",
    "LocalFiles",
    "ObjectFiles",
    "Span",
    "how_missing",
    "is_unfinished",
    "open_files",
    "replace_file",
    "sync_path",
]

_NOT_A_URL = re.compile(r"^[a-z][a-z0-9+.-]+:/(?!/)")

P = ParamSpec("P")
R = TypeVar("R")

OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"}
"""Protocols whose stores have no folders to make."""

Span = tuple[int, int]
"""Offset and length of a part of a file."""


class Files(Protocol):
    """The files below one root. A missing file is `FileNotFoundError`; what a disk or a network refuses, `OSError`.

    On a local disk all raise `LinkRefused` where they meet a symbolic link that is not followed.
    """

    root: str

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

    def remove(self, name: str) -> None:
        """Remove a file or a folder with all it holds, if it is there."""
        ...

    def join(self, tidy: Callable[[], None]) -> Callable[[], None]:
        """Become one of the writers; return what leaves. Where no other is, `tidy` runs, on joining and on leaving."""
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
        raise NotACache(f"opening {text}: expected a folder or a URL such as s3://bucket/cache or file:///folder.")
    if not separator:
        return LocalFiles(Path(text).expanduser())
    return LocalFiles(Path(rest)) if protocol in ("file", "local") else ObjectFiles(f"{protocol}://{rest}")


def _as_os_error(method: Callable[P, R]) -> Callable[P, R]:
    """What a store's client raises of its own (no credentials, no connection) becomes an OSError that says so."""

    @wraps(method)
    def told(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(*args, **kwargs)
        except (OSError, CacheError):
            raise
        except Exception as error:  # any client, any class
            where = getattr(args[0], "root", None)
            raise OSError(errno.EIO, f"{type(error).__name__}: {error}", where) from error

    return told


class ObjectFiles:
    """A prefix of an object store, or any other file system of fsspec."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._connect()  # now, so that a wrong URL is told at once

    def _connect(self) -> tuple[Any, str]:
        """fsspec keeps one instance a process, and makes another after a fork."""
        try:
            fs, path = fsspec.core.url_to_fs(self.root, use_listings_cache=False)
        except (ImportError, ValueError, TypeError, AttributeError) as error:
            raise NotACache(
                f"opening {self.root}: expected a folder or a URL that fsspec knows, found that it does not ({error}). "
                "Install the package for it, or use another path."
            ) from error
        return fs, path.rstrip("/")

    @_as_os_error
    def read(self, name: str, limit: int | None = None) -> bytes:
        fs, path = self._connect()
        try:
            bounds = {} if limit is None else {"start": 0, "end": limit + 1}
            data: bytes = fs.cat_file(f"{path}/{name}", **bounds)
        except FileNotFoundError:
            raise
        except OSError:  # an empty object has no range
            data = fs.cat_file(f"{path}/{name}")
        return data

    @_as_os_error
    def read_spans(self, name: str, spans: Sequence[Span]) -> list[bytes]:
        fs, path = self._connect()
        paths = [f"{path}/{name}"] * len(spans)
        starts, ends = [at for at, _ in spans], [at + length for at, length in spans]
        try:
            parts: list[bytes] = fs.cat_ranges(paths, starts, ends, on_error="raise")
        except FileNotFoundError:
            raise
        except OSError:  # a range beyond the end of an object that was cut short is an error of some stores
            parts = []
        if [len(part) for part in parts] != [length for _, length in spans]:  # some stores know no ranges
            data = self.read(name)
            parts = [data[start:end] for start, end in zip(starts, ends, strict=True)]
        return parts

    @_as_os_error
    def exists(self, name: str) -> bool:
        fs, path = self._connect()
        fs.invalidate_cache()
        return bool(fs.isfile(f"{path}/{name}"))

    @_as_os_error
    def names(self, folder: str) -> list[str]:
        fs, path = self._connect()
        fs.invalidate_cache()
        try:
            found = fs.ls(f"{path}/{folder}".rstrip("/"), detail=False)
        except FileNotFoundError:
            return []
        return sorted({name.rstrip("/").rsplit("/", 1)[-1] for name in found} - {""})

    @_as_os_error
    def sizes(self, folder: str) -> dict[str, int]:
        fs, path = self._connect()
        fs.invalidate_cache()
        start = f"{path}/{folder}/"
        found = fs.find(start, detail=True)
        return {name[name.index(start.lstrip("/")) + len(start.lstrip("/")) :]: e["size"] for name, e in found.items()}

    @_as_os_error
    def times(self, folder: str) -> dict[str, float | None]:
        fs, path = self._connect()
        fs.invalidate_cache()
        try:
            found = fs.ls(f"{path}/{folder}", detail=True)
        except FileNotFoundError:
            return {}
        return {entry["name"].rstrip("/").rsplit("/", 1)[-1]: _time_of(entry) for entry in found}

    @_as_os_error
    def create(self, name: str, data: bytes) -> bool:
        fs, path = self._connect()
        _make_parents(fs, f"{path}/{name}")
        try:
            fs.pipe_file(f"{path}/{name}", data, mode="create")
            _check_stored(fs, f"{path}/{name}", data)
        except FileExistsError:
            return False
        except OSError as error:  # each client says it in its way: whether it is there decides
            if error.errno != errno.EEXIST and "precondition" not in str(error).lower():
                raise
            if not self.exists(name):
                raise
            return False
        return True

    @_as_os_error
    def replace(self, name: str, data: bytes) -> None:
        fs, path = self._connect()
        _make_parents(fs, f"{path}/{name}")
        fs.pipe_file(f"{path}/{name}", data)
        _check_stored(fs, f"{path}/{name}", data)

    @_as_os_error
    def publish(self, folder: str, files: Mapping[str, bytes]) -> None:
        fs, path = self._connect()
        for name, data in files.items():
            _make_parents(fs, f"{path}/{folder}/{name}")
            fs.pipe_file(f"{path}/{folder}/{name}", data)
        for name, data in files.items():
            _check_stored(fs, f"{path}/{folder}/{name}", data)

    @_as_os_error
    def remove(self, name: str) -> None:
        fs, path = self._connect()
        fs.invalidate_cache()
        target = f"{path}/{name}"
        for found in [target] if fs.isfile(target) else fs.find(target):  # never fs.rm, which takes names for patterns
            fs.rm_file(found)

    def join(self, tidy: Callable[[], None]) -> Callable[[], None]:
        return lambda: None  # there are no locks: nobody knows to be alone, so nobody tidies


def _time_of(entry: Mapping[str, Any]) -> float | None:
    """Each client has its own name for it."""
    for name in ("LastModified", "last_modified", "updated", "mtime", "created"):
        when = entry.get(name)
        if isinstance(when, str):
            when = datetime.fromisoformat(when.replace("Z", "+00:00"))
        if isinstance(when, datetime):
            return when.timestamp()
        if isinstance(when, (int, float)):
            return float(when)
    return None


def _make_parents(fs: Any, path: str) -> None:
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if not protocols & OBJECT_STORES:
        fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)


def _check_stored(fs: Any, path: str, data: bytes) -> None:
    if fs.cat_file(path) != data:
        raise OSError(errno.EIO, "reads back other than it was written", path)
