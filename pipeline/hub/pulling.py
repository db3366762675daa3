"""CACHE.pulling: the folder of a download until it is whole, taken up again where it was interrupted.

Owns which folder that may be (a real one of this user, with a marker that `pull` wrote, and in it nothing but what
`pull` wrote) and what is removed from it. It follows no link: what is another's is neither read, nor overwritten, nor
removed. Must not know the Hub. Trade-off: the marker lists the names of all files, some 80 bytes each.
"""

import errno
import json
import os
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from logitcache.storage import LinkRefused
from logitcache.storage.checked_json import check_density
from logitcache.storage.files import LocalFiles, is_unfinished

PARTIAL = ".pulling"
"""What the name of a folder ends in until it is whole and verified."""

MARKER = ".logitcache-pull.json"
"""Says that `pull` made the folder, and which names it may have written there; gone when the folder has its name."""

MAX_MARKER_BYTES = 2**25
"""Of the marker: 80 bytes a file, of which a cache has two a shard."""

_FORMAT = "logitcache pull 1"
_NOTES = ".cache/huggingface"
"""What the Hub's client keeps of a download, in the folder of it."""


@dataclass(frozen=True)
class Download:
    """A folder that is downloaded to, for a cache that will be at `target`."""

    repo_id: str
    folder: Path
    target: Path
    #: All that `pull` may have written.
    names: frozenset[str]

    def drop(self, names: Collection[str]) -> None:
        """Remove these of the files that were written, to be had anew."""
        _remove(self.folder, self.names.intersection(names))

    def finish(self, keep: Collection[str]) -> None:
        """Leave of what was written only these files, and give the folder its name.

        Raises FileExistsError where something else has come into the folder meanwhile.
        """
        self.check()
        notes = {name for name, _ in _entries(self.folder) if name.startswith(_NOTES) or is_unfinished(name, MARKER)}
        _remove(self.folder, (self.names | notes) - {*keep})
        self.folder.rename(self.target)
        release(self.target)

    def check(self) -> None:
        """Raise FileExistsError where there is a link in the folder, or anything that no `pull` has written."""
        folders = {above for name in (*self.names, f"{_NOTES}/x") for above in _above(name)}
        for name, mode in _entries(self.folder):
            if stat.S_ISLNK(mode):
                raise _refused(self.repo_id, self.target, f"a symbolic link in it ({name})")
            ours = name in folders if stat.S_ISDIR(mode) else name in self.names or name == MARKER
            if not (ours or name.startswith(f"{_NOTES}/") or is_unfinished(name, MARKER)):
                raise _refused(self.repo_id, self.target, f"a folder with something that no pull wrote ({name})")


def claim(repo_id: str, target: Path, wanted: Iterable[str]) -> Download:
    """Make the folder of a download of these names, or take up that of one that was interrupted.

    Raises FileExistsError, and nothing is changed, where something else is there: a link, a folder of another user, one
    that `pull` did not make, or in which there is something that it did not write. An empty folder is taken.
    """
    target = _behind_link(repo_id, target)
    folder = partial_of(target)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        folder.mkdir()
    found = folder.lstat()
    if stat.S_ISLNK(found.st_mode):
        raise _refused(repo_id, target, f"a symbolic link to {folder.readlink()}")
    if not stat.S_ISDIR(found.st_mode):
        raise _refused(repo_id, target, "a file")
    if found.st_uid != os.geteuid():
        raise _refused(repo_id, target, f"a folder of another user, {found.st_uid}")
    try:
        earlier = _read_marker(folder)
    except (LinkRefused, ValueError) as error:
        raise _refused(repo_id, target, f"a folder whose {MARKER} no pull wrote") from error
    if earlier is not None:
        Download(repo_id, folder, target, earlier).check()
    elif any(not is_unfinished(name, MARKER) for name, _ in _entries(folder)):
        raise _refused(repo_id, target, f"a folder without {MARKER}")
    names = frozenset(wanted) | (earlier or frozenset())
    LocalFiles(folder).replace(MARKER, json.dumps({"format": _FORMAT, "names": sorted(names)}).encode())
    return Download(repo_id, folder, target, names)


def partial_of(target: Path) -> Path:
    """Where a cache is downloaded before it is at `target`."""
    return target.with_name(target.name + PARTIAL)


def release(target: Path) -> None:
    """Remove the marker from a cache that has its name: the last step of a pull, which may have been killed before."""
    with suppress(FileNotFoundError, LinkRefused, ValueError):
        if _read_marker(target) is not None:
            LocalFiles(target).remove(MARKER)


def _behind_link(repo_id: str, target: Path) -> Path:
    """The folder itself where a link stands for it: no folder can be renamed to a link, nor to another file system."""
    if not target.is_symlink():
        return target
    folder = Path(os.path.realpath(target))
    if not folder.is_dir():
        raise FileExistsError(
            errno.EEXIST,
            f"pulling {repo_id}: expected a new folder, found that {target} is a symbolic link to {target.readlink()}, "
            "where there is none. Nothing was downloaded. Make that folder, or choose another one.",
        )
    return folder


def _read_marker(folder: Path) -> frozenset[str] | None:
    """The names in the marker; None where there is none. Raises `LinkRefused`, ValueError where it is no pull's."""
    try:
        data = LocalFiles(folder).read(MARKER, MAX_MARKER_BYTES)
        check_density(data)
        found = json.loads(data) if len(data) <= MAX_MARKER_BYTES else None
    except FileNotFoundError:
        return None
    except RecursionError as error:
        raise ValueError(f"{folder / MARKER}: expected the names of a pull") from error
    names = found.get("names") if isinstance(found, dict) and found.get("format") == _FORMAT else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{folder / MARKER}: expected the names of a pull")
    return frozenset(names)


def _entries(folder: Path) -> Iterator[tuple[str, int]]:
    """Names and modes of all files and folders below one, without following links."""
    for path, folders, files, at in os.fwalk(folder, follow_symlinks=False):
        for name in (*folders, *files):
            with suppress(FileNotFoundError):  # a lock of the client, which it removes
                yield _named(folder, path, name), os.stat(name, dir_fd=at, follow_symlinks=False).st_mode


def _remove(folder: Path, names: Collection[str]) -> None:
    """Remove files and, where they are empty then, the folders above them, each in the folder that was walked to."""
    emptied = {parent for name in names for parent in _above(name)}.union(names)
    for path, folders, files, at in os.fwalk(folder, topdown=False, follow_symlinks=False):
        for name in files:
            if _named(folder, path, name) in names:
                os.unlink(name, dir_fd=at)
        for name in folders:
            if _named(folder, path, name) in emptied:
                try:
                    os.rmdir(name, dir_fd=at)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise


def _named(folder: Path, path: str, name: str) -> str:
    return (Path(path) / name).relative_to(folder).as_posix()


def _above(name: str) -> set[str]:
    """The folders that lead to a name, but the first."""
    return {parent.as_posix() for parent in PurePosixPath(name).parents} - {"."}


def _refused(repo_id: str, target: Path, found: str) -> FileExistsError:
    return FileExistsError(
        errno.EEXIST,
        f"pulling {repo_id}: expected nothing at {partial_of(target)}, or what an interrupted pull of this user left, "
        f"found {found}. Nothing was removed from it, and nothing put at {target}. Move it away, or choose another "
        "folder.",
    )
