"""The files of a cache in a folder of a local or network file system.

Owns durability there, and that a file is created whole or not at all. What is unfinished has a name ending in .new
beside the name it will get, so that nothing is renamed from one file system to another. Nobody removes what another
made but by `remove`: locks may stop at the machine, so that no writer can know that it is alone. Which links are
followed `links` says: a folder that is changed is held by its descriptor, one that is read was asked about once; what
a file system may refuse, `lesser_systems`. Must not know what the files mean.
"""

import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

from .layout import LOCK, temporary_name
from .lesser_systems import lock_alone, lock_shared, name_first, sync_folder
from .links import is_link, opened, refused

MAX_PLAIN_FOLDERS = 65_536
"""Folders that are remembered to be no links."""

NOT_PLAIN = "expected a plain file, found a folder, a pipe or a device"
"""Why a name that is there is not read."""


class LocalFiles:
    """A folder of a local or network file system. All raise `LinkRefused` where a link is met that is not followed."""

    is_local: bool = True

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self._path = root.absolute()  # whoever changes the working directory later
        self._plain: set[str] = set()
        self._made: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_plain": set(), "_made": set()}

    def read(self, name: str, limit: int | None = None) -> bytes:
        with os.fdopen(self._descriptor(name), "rb") as f:
            size = os.fstat(f.fileno()).st_size  # Python allocates what it is asked to read
            return f.read(size + 1 if limit is None else min(limit, size) + 1)

    def read_spans(self, name: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        handle = self._descriptor(name)
        try:
            size = os.fstat(handle).st_size  # Python allocates what it is asked to read
            return [os.pread(handle, max(0, min(length, size - at)), at) for at, length in spans]
        finally:
            os.close(handle)

    def exists(self, name: str) -> bool:
        try:
            self._check_folder(_parted(name)[0])
            mode = os.lstat(f"{self._path}/{name}").st_mode
        except (FileNotFoundError, NotADirectoryError):
            self._look_again(name)
            return False
        if stat.S_ISLNK(mode):
            raise refused(self._path, name)
        return stat.S_ISREG(mode)

    def names(self, folder: str) -> list[str]:
        try:
            with opened(self._path, folder) as at:
                return sorted(_names(at))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def sizes(self, folder: str) -> dict[str, int]:
        try:
            with opened(self._path, folder) as at:
                return dict(_walk(self._path, folder, at))
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def times(self, folder: str) -> dict[str, float | None]:
        found: dict[str, float | None] = {}
        try:
            with opened(self._path, folder) as at:
                for name in _names(at):
                    with suppress(FileNotFoundError):
                        found[name] = os.stat(name, dir_fd=at, follow_symlinks=False).st_mtime
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return found

    def create(self, name: str, data: bytes) -> bool:
        folder, base = _parted(name)
        with opened(self._path, folder) as at:
            with _written(at, base, data) as temporary:
                created = name_first(at, temporary, base, f"{self.root}/{folder}".rstrip("/"))
                if not created:
                    self._check_plain(at, name)
            sync_folder(at, self.root)  # also for the loser, whose next file may name the winner's
        return created

    def replace(self, name: str, data: bytes) -> None:
        folder, base = _parted(name)
        with opened(self._path, folder) as at:
            with _written(at, base, data) as temporary:
                self._check_plain(at, name)
                os.replace(temporary, base, src_dir_fd=at, dst_dir_fd=at)
            sync_folder(at, self.root)

    def publish(self, folder: str, files: Mapping[str, bytes]) -> None:
        above, base = _parted(folder)
        self._make(above)
        with opened(self._path, above) as at:
            staging = temporary_name(base)
            try:
                self._write_tree(at, staging, files)
                try:
                    os.rename(staging, base, src_dir_fd=at, dst_dir_fd=at)
                except OSError as error:
                    self._check_plain(at, folder)
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                    self._settle(at, staging, folder, files)
            finally:
                shutil.rmtree(staging, ignore_errors=True, dir_fd=at)
            sync_folder(at, self.root)

    def remove(self, *names: str) -> None:
        for folder, group in groupby(names, key=lambda name: _parted(name)[0]):
            with suppress(FileNotFoundError, NotADirectoryError), opened(self._path, folder) as at:
                for name in group:
                    self._remove(at, name)
                sync_folder(at, self.root)

    def join(self) -> Callable[[], None]:
        handle = self._open_lock()
        try:
            lock_shared(handle, self.root)
        except BaseException:
            os.close(handle)
            raise
        return partial(os.close, handle)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """The writers' lock, held alone."""
        handle = self._open_lock()
        try:
            if not lock_alone(handle, self.root):
                raise OSError(errno.EBUSY, "another process is writing to this cache", self.root)
            yield
        finally:
            os.close(handle)

    def _remove(self, at: int, name: str) -> None:
        base = _parted(name)[1]
        with suppress(FileNotFoundError):
            mode = os.stat(base, dir_fd=at, follow_symlinks=False).st_mode
            if stat.S_ISLNK(mode):
                raise refused(self._path, name)
            if stat.S_ISDIR(mode):
                shutil.rmtree(base, dir_fd=at)  # which follows no link, and refuses to begin at one
            else:
                os.unlink(base, dir_fd=at)

    def _open_lock(self) -> int:
        """A descriptor of the writers' lock, which dies with its process."""
        self._make("")
        with opened(self._path, "") as at:
            try:
                return os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666, dir_fd=at)
            except OSError:
                self._check_plain(at, LOCK)
                raise

    def _make(self, folder: str) -> None:
        """The root and a folder below it, each named durably in the one above, whoever made it."""
        if not self._made:
            _make_folders(self._path)
        above = ""
        for part in folder.split("/") if folder else ():
            below = f"{above}/{part}" if above else part
            with opened(self._path, above) as at:
                with suppress(FileExistsError):
                    os.mkdir(part, dir_fd=at)
                    self._made.discard(below)
                if below not in self._made:  # its maker may have been killed before its sync
                    sync_folder(at, self.root)
            above = below
            self._made.add(below)
        self._made.add("")

    def _descriptor(self, name: str) -> int:
        """Of a plain file; one that is none (a pipe, a folder) is not there."""
        path = f"{self._path}/{name}"
        try:
            self._check_folder(_parted(name)[0])
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
                raise
            self._look_again(name)
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise FileNotFoundError(errno.ENOENT, NOT_PLAIN, path)
        return handle

    def _check_folder(self, folder: str) -> None:
        """Once a folder, since every read of a file would cost several calls: only allowed links lead to it."""
        if not folder or folder in self._plain:
            return
        self._check_folder(_parted(folder)[0])
        if stat.S_ISLNK(os.lstat(f"{self._path}/{folder}").st_mode):
            with opened(self._path, folder):
                pass
        if len(self._plain) >= MAX_PLAIN_FOLDERS:
            self._plain.clear()
        self._plain.add(folder)

    def _look_again(self, name: str) -> None:
        """Raise `LinkRefused` where a link is why a file is not there: one that was allowed may lead nowhere by now."""
        self._plain.clear()
        folder = _parted(name)[0]
        with suppress(FileNotFoundError, NotADirectoryError), opened(self._path, folder) as at:
            self._check_plain(at, name)

    def _check_plain(self, at: int, name: str) -> None:
        """Raise `LinkRefused` where a name in an open folder is a link."""
        if is_link(_parted(name)[1], at):
            raise refused(self._path, name)

    def _write_tree(self, at: int, folder: str, files: Mapping[str, bytes]) -> None:
        """A new folder of files, all of it synced."""
        os.mkdir(folder, dir_fd=at)
        with _entered(at, folder) as inside:
            made: dict[str, None] = {}
            for name, data in files.items():
                above = ""
                for part in name.split("/")[:-1]:
                    above = f"{above}/{part}" if above else part
                    if above not in made:
                        os.mkdir(above, dir_fd=inside)
                        made[above] = None
                _write_synced(inside, name, data)
            for path in made:
                with _entered(inside, path) as handle:
                    sync_folder(handle, self.root)
            sync_folder(inside, self.root)

    def _settle(self, at: int, staging: str, folder: str, files: Mapping[str, bytes]) -> None:
        """The folder was there already: another writer's with the same content, or what a crash left of one."""
        base = _parted(folder)[1]
        try:
            self._check_written(at, folder, files)
        except OSError:
            broken = temporary_name(base)
            with suppress(FileNotFoundError):  # who had written it lost the unit to a third, and has removed it
                os.rename(base, broken, src_dir_fd=at, dst_dir_fd=at)
            os.rename(staging, base, src_dir_fd=at, dst_dir_fd=at)
            shutil.rmtree(broken, ignore_errors=True, dir_fd=at)

    def _check_written(self, at: int, folder: str, files: Mapping[str, bytes]) -> None:
        with _entered(at, _parted(folder)[1]) as inside:
            for _ in _walk(self._path, folder, inside):
                pass  # it raises where there is a link in it
            for name, data in files.items():
                _check_bytes(inside, name, data)


def _parted(name: str) -> tuple[str, str]:
    """The folder of a name, "" the root, and its last part."""
    folder, _, base = name.rpartition("/")
    return folder, base


def _names(at: int) -> list[str]:
    """What is in an open folder."""
    with os.scandir(at) as entries:
        return [entry.name for entry in entries]


@contextmanager
def _entered(at: int, name: str) -> Iterator[int]:
    """A descriptor of a folder in an open one."""
    handle = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
    try:
        yield handle
    finally:
        os.close(handle)


def _walk(root: Path, folder: str, at: int) -> Iterator[tuple[str, int]]:
    """Names and sizes of all files below an open folder. Raises `LinkRefused` at a link."""
    for name in _names(at):
        try:
            found = os.stat(name, dir_fd=at, follow_symlinks=False)
            if stat.S_ISDIR(found.st_mode):
                with _entered(at, name) as inside:
                    yield from ((f"{name}/{n}", size) for n, size in _walk(root, f"{folder}/{name}", inside))
                continue
        except FileNotFoundError:  # another writer tidies
            continue
        if stat.S_ISLNK(found.st_mode):
            raise refused(root, f"{folder}/{name}" if folder else name)
        yield name, found.st_size


@contextmanager
def _written(at: int, base: str, data: bytes) -> Iterator[str]:
    """The temporary name of a file with these bytes, which is gone at the end."""
    temporary = temporary_name(base)
    try:
        _write_synced(at, temporary, data)
        yield temporary
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=at)


def _write_synced(at: int, name: str, data: bytes) -> None:
    with open(name, "xb", opener=partial(_open_new, at)) as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    _check_bytes(at, name, data)


def _open_new(at: int, name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NOFOLLOW, 0o666, dir_fd=at)


def _check_bytes(at: int, name: str, data: bytes) -> None:
    handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
    with os.fdopen(handle, "rb") as f:
        if f.read() != data:
            raise OSError(errno.EIO, "reads back other than it was written", name)


def replace_file(path: Path, data: bytes) -> None:
    """Create a local file or replace it, on the disk before this returns: whole or not at all, whatever is killed.

    A link at `path` is replaced, not followed; until then the file has a name that nobody else's file has.
    """
    with _folder_of(path) as at:
        with _written(at, path.name, data) as temporary:
            os.replace(temporary, path.name, src_dir_fd=at, dst_dir_fd=at)
        sync_folder(at, str(path.parent))


def name_file(temporary: Path, path: Path) -> None:
    """Give a local file that is written its name in the same folder, on the disk before this returns.

    Raises FileExistsError where the name is taken.
    """
    sync_path(temporary)
    with _folder_of(path) as at:
        if not name_first(at, temporary.name, path.name, str(path.parent)):
            raise FileExistsError(errno.EEXIST, "the file exists", str(path))
        temporary.unlink(missing_ok=True)
        sync_folder(at, str(path.parent))


def sync_path(path: Path) -> None:
    """What was written to a local file, or which names a local folder has, is on the disk before this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            sync_folder(handle, str(path))
        else:
            os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _folder_of(path: Path) -> Iterator[int]:
    handle = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield handle
    finally:
        os.close(handle)


def _make_folders(path: Path) -> None:
    """A folder and those above it, each named durably in the one above before there is one below it.

    So of those that are there only the last one's name may not be on the disk: who made it may have been killed.
    """
    folders = (path, *path.parents)
    missing = list(takewhile(lambda folder: not folder.exists(), folders))
    last = Path(os.path.realpath(folders[len(missing)]))
    if os.access(last.parent, os.R_OK):  # who may not look into a folder cannot sync it
        _sync_name(last, path)
    for folder in reversed(missing):
        with suppress(FileExistsError):  # of a link that leads nowhere, which `opened` looks at; or of another process
            folder.mkdir()
        _sync_name(folder, path)


def _sync_name(path: Path, root: Path) -> None:
    with _folder_of(path) as at:
        sync_folder(at, str(root))
