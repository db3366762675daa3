"""Where the files of a cache are: a local folder, or any store that fsspec knows (s3://, gs://, memory://, ...).

Owns durability: a file is created whole or not at all, the first creator wins, and a folder of files is on the disk,
read back and synced before anybody is told of it. Names are relative, with "/". Must not know what the files mean.
Trade-off: local folders are POSIX (fsync, hard links, flock); object stores need conditional puts, which S3, GCS and
Azure have and which their fsspec implementations take as mode="create".
"""

import errno
import fcntl
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

import fsspec

from .errors import CacheError, NotACache

MAX_PLAIN_FOLDERS = 65_536
"""Folders that are remembered to be no links."""

_UNFINISHED_NAME = re.compile(r"\.[0-9a-f]{32}\.new$")
_NOT_A_URL = re.compile(r"^[a-z][a-z0-9+.-]+:/(?!/)")

P = ParamSpec("P")
R = TypeVar("R")

STAGING, LOCK, UNFINISHED = "staging", "writer.lock", ".new"

OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"}
"""Protocols whose stores have no folders to make."""

Span = tuple[int, int]
"""Offset and length of a part of a file."""


class Files(Protocol):
    """The files below one root. A missing file is `FileNotFoundError`; what a disk or a network refuses, `OSError`."""

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


class LocalFiles:
    """A folder of a local or network file system."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self._path = root.absolute()  # whoever changes the working directory later
        self._plain: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_plain": set()}

    def read(self, name: str, limit: int | None = None) -> bytes:
        with os.fdopen(self._descriptor(name), "rb") as f:
            size = os.fstat(f.fileno()).st_size  # Python allocates what it is asked to read
            return f.read(size + 1 if limit is None else min(limit, size) + 1)

    def read_spans(self, name: str, spans: Sequence[Span]) -> list[bytes]:
        handle = self._descriptor(name)
        try:
            size = os.fstat(handle).st_size  # Python allocates what it is asked to read
            return [os.pread(handle, max(0, min(length, size - at)), at) for at, length in spans]
        finally:
            os.close(handle)

    def exists(self, name: str) -> bool:
        return (self._path / name).is_file()

    def names(self, folder: str) -> list[str]:
        try:
            return sorted(p.name for p in (self._path / folder).iterdir())
        except (FileNotFoundError, NotADirectoryError):  # asked first, it may go in between: another writer tidies
            return []

    def sizes(self, folder: str) -> dict[str, int]:
        path = self._path / folder
        return {p.relative_to(path).as_posix(): p.lstat().st_size for p in path.rglob("*") if not p.is_dir()}

    def times(self, folder: str) -> dict[str, float | None]:
        found: dict[str, float | None] = {}
        for name in self.names(folder):
            with suppress(FileNotFoundError):
                found[name] = (self._path / folder / name).stat().st_mtime
        return found

    def create(self, name: str, data: bytes) -> bool:
        path, temporary = self._path / name, self._temporary(name)
        try:
            _write_synced(temporary, data)
            os.link(temporary, path)
            created = True
        except FileExistsError:
            created = False
        finally:
            temporary.unlink(missing_ok=True)
        _sync(path.parent)  # also for the loser, whose next file may name the winner's
        return created

    def replace(self, name: str, data: bytes) -> None:
        temporary = self._temporary(name)
        try:
            _write_synced(temporary, data)
            temporary.replace(self._path / name)
        finally:
            temporary.unlink(missing_ok=True)
        _sync((self._path / name).parent)

    def publish(self, folder: str, files: Mapping[str, bytes]) -> None:
        staging, final = self._path / STAGING / uuid.uuid4().hex, self._path / folder
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            for name, data in files.items():
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                _write_synced(staging / name, data)
            for path in [p for p in staging.rglob("*") if p.is_dir()]:
                _sync(path)
            _sync(staging)
            try:
                staging.rename(final)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                self._settle(staging, final, files)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        _sync(final.parent)

    def remove(self, name: str) -> None:
        path = self._path / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def join(self, tidy: Callable[[], None]) -> Callable[[], None]:
        self._path.mkdir(parents=True, exist_ok=True)
        _sync(self._path.absolute().parent)
        handle = os.open(self._path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)  # the lock dies with its process
        try:
            if _is_alone(handle):
                self._tidy()
                tidy()
            fcntl.flock(handle, fcntl.LOCK_SH)  # with the other writers; waits only while one of them tidies
        except BaseException:
            os.close(handle)
            raise
        return lambda: self._leave(handle, tidy)

    def _leave(self, handle: int, tidy: Callable[[], None]) -> None:
        try:
            with suppress(OSError, CacheError):  # what is left now the next writer removes, or names as damaged
                if _is_alone(handle):
                    self._tidy()
                    tidy()
        finally:
            os.close(handle)

    def _tidy(self) -> None:
        """Remove what killed writers left: nothing of it was ever named by a commit."""
        shutil.rmtree(self._path / STAGING, ignore_errors=True)
        for path in [*self._path.iterdir(), *(self._path / "shards").glob("*")]:
            if _UNFINISHED_NAME.search(path.name):
                path.unlink(missing_ok=True)

    def _descriptor(self, name: str) -> int:
        """Of a plain file below the root, to which no symbolic link leads; anything else is not there."""
        path = f"{self._path}/{name}"
        if "/" in name:
            self._check_folder(name.rsplit("/", 1)[0])
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                raise
            raise FileNotFoundError(errno.ENOENT, "not a plain file", path) from error
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise FileNotFoundError(errno.ENOENT, "not a plain file", path)
        return handle

    def _check_folder(self, folder: str) -> None:
        """Once a folder, since every read of a file would cost several calls: no part of its path is a link."""
        if folder in self._plain:
            return
        path = str(self._path)
        for part in folder.split("/"):
            path = f"{path}/{part}"
            if stat.S_ISLNK(os.lstat(path).st_mode):
                raise FileNotFoundError(errno.ENOENT, "a symbolic link", path)
        if len(self._plain) >= MAX_PLAIN_FOLDERS:
            self._plain.clear()
        self._plain.add(folder)

    def _temporary(self, name: str) -> Path:
        """Of a file until it is whole."""
        return self._path / f"{name}.{uuid.uuid4().hex}{UNFINISHED}"

    def _settle(self, staging: Path, final: Path, files: Mapping[str, bytes]) -> None:
        """The folder was there already: another writer's with the same content, or what a crash left of one."""
        try:
            _check_written(final, files)
        except OSError:
            broken = self._path / STAGING / uuid.uuid4().hex
            with suppress(FileNotFoundError):  # who had written it lost the unit to a third, and has removed it
                final.rename(broken)
            staging.rename(final)
            shutil.rmtree(broken, ignore_errors=True)


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


def replace_file(path: Path, data: bytes) -> None:
    """Create a local file or replace it, on the disk before this returns: whole or not at all, whatever is killed."""
    temporary = path.with_name(f"{path.name}{UNFINISHED}")
    try:
        _write_synced(temporary, data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def sync_path(path: Path) -> None:
    """What was written to a local file, or which names a local folder has, is on the disk before this returns."""
    _sync(path)


def _is_alone(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    if path.read_bytes() != data:
        raise OSError(errno.EIO, "reads back other than it was written", str(path))


def _check_written(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        if (folder / name).read_bytes() != data:
            raise OSError(errno.EIO, "reads back other than it was written", str(folder / name))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
