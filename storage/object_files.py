"""The files of a cache under a prefix of an object store, or of any other file system of fsspec.

Owns what differs from client to client: how ranges, conflicts and times are said, and which errors are raised. Must not
know what the files mean. Trade-off: "created whole, by the first" needs conditional puts, which S3, GCS and Azure have
and which their fsspec implementations take as mode="create"; there are no locks.
"""

import errno
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import fsspec

from .errors import CacheError, NotACache
from .plain_text import without_secrets

P = ParamSpec("P")
R = TypeVar("R")

OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"}
"""Protocols whose stores have no folders to make."""


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
            raise OSError(errno.EIO, without_secrets(f"{type(error).__name__}: {error}"), where) from error

    return told


class ObjectFiles:
    """A prefix of an object store, or any other file system of fsspec."""

    is_local: bool = False

    def __init__(self, root: str) -> None:
        self._url, self.root = root, without_secrets(root)
        self._connect()  # now, so that a wrong URL is told at once

    def _connect(self) -> tuple[Any, str]:
        """fsspec keeps one instance a process, and makes another after a fork."""
        try:
            fs, path = fsspec.core.url_to_fs(self._url, use_listings_cache=False)
        except (ImportError, ValueError, TypeError, AttributeError) as error:
            raise NotACache(
                f"opening {self.root}: expected a folder or a URL that fsspec knows, found that it does not "
                f"({without_secrets(str(error))}). Install the package for it, or use another path."
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
    def read_spans(self, name: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        fs, path = self._connect()
        paths = [f"{path}/{name}"] * len(spans)
        starts, ends = [at for at, _ in spans], [at + length for at, length in spans]
        try:
            parts = _whole(fs.cat_ranges(paths, starts, ends, on_error="raise"))
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
    def remove(self, *names: str) -> None:
        fs, path = self._connect()
        fs.invalidate_cache()
        for name in names:
            target = f"{path}/{name}"
            found = [target] if fs.isfile(target) else fs.find(target)
            for each in found:  # never fs.rm, which takes names for patterns
                fs.rm_file(each)

    def join(self) -> Callable[[], None]:
        return lambda: None  # there are no locks

    def exclusive(self) -> AbstractContextManager[None]:
        """Nothing, as there are no locks."""
        return nullcontext()


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


def _whole(parts: Sequence[bytes | BaseException]) -> list[bytes]:
    """What `cat_ranges` gave. Some versions of s3fs list an error among the parts instead of raising it."""
    for part in parts:
        if isinstance(part, BaseException):
            raise part
    return [part for part in parts if not isinstance(part, BaseException)]


def _make_parents(fs: Any, path: str) -> None:
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if not protocols & OBJECT_STORES:
        fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)


def _check_stored(fs: Any, path: str, data: bytes) -> None:
    if fs.cat_file(path) != data:
        raise OSError(errno.EIO, "reads back other than it was written", path)
