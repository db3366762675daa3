"""Symbolic links in a cache on a local disk: followed at its root and at shards/, refused everywhere below.

Owns the way from the root to a folder, by descriptors: the folder that was looked at is the folder that is used,
whatever its name is made to mean meanwhile. Readers and writers come here, so that neither follows what the other
refuses. Must not know what the files mean. Trade-off: two system calls a part of the path; who reads a folder often
remembers that it was allowed.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import LinkRefused
from .layout import MANIFEST, SHARDS

LINKABLE = SHARDS
"""The one folder below the root that may be a link: people move it to a larger disk."""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@contextmanager
def opened(root: Path, folder: str) -> Iterator[int]:
    """A descriptor of a folder below the root, "" the root itself, to which only allowed links lead.

    Raises `LinkRefused`, FileNotFoundError, NotADirectoryError.
    """
    at = _open_root(root)
    try:
        entered = ""
        for part in folder.split("/") if folder else ():
            entered = f"{entered}/{part}" if entered else part
            below = _enter(root, at, entered)
            os.close(at)
            at = below
        yield at
    finally:
        os.close(at)


def is_link(name: str, at: int) -> bool:
    """Whether this name in an open folder is a symbolic link, wherever it leads."""
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=at, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def refused(root: Path, name: str) -> LinkRefused:
    """The error of a link below the root that nobody follows."""
    fact = f"{root}/{name}: expected a file or folder of the cache, found a symbolic link{_target(root / name)}"
    return LinkRefused(
        f"using {fact}. Links are followed at a cache's root and at its {LINKABLE}/ only; nothing behind this one was "
        f"read or changed. Copy what it leads to in its place; or move all of {LINKABLE}/ and link that.",
        fact,
    )


def _open_root(root: Path) -> int:
    try:
        return os.open(root, _FOLDER)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP) or not root.is_symlink():
            raise
        raise _leads_nowhere(root) from error


def _enter(root: Path, at: int, folder: str) -> int:
    """The folder of this path from the root, in the folder above it, which is open."""
    name = folder.rsplit("/", 1)[-1]
    try:
        return os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=at)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOTDIR) or not is_link(name, at):
            raise
    if folder != LINKABLE:
        raise refused(root, folder)
    return _follow(root, at)


def _follow(root: Path, at: int) -> int:
    """The folder that the link at shards/ leads to, which must be this cache's alone."""
    try:
        found = os.open(LINKABLE, _FOLDER, dir_fd=at)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        raise _leads_nowhere(root / LINKABLE) from error
    if _is_of_another_cache(found, at):
        os.close(found)
        link = root / LINKABLE
        fact = f"{link}: expected a folder of this cache alone, found a symbolic link{_target(link)} in another cache"
        raise LinkRefused(
            f"using {fact}. What is written or repaired here would be changed there; nothing was read or changed. "
            "Use that cache by its own path, or give this one a folder of its own.",
            fact,
        )
    return found


def _is_of_another_cache(found: int, root: int) -> bool:
    """Whether an open folder is the root of a cache, or lies in the root of one that is not this."""
    if _holds(found, MANIFEST):
        return True
    return _holds(found, f"../{MANIFEST}") and not os.path.samestat(os.stat("..", dir_fd=found), os.fstat(root))


def _holds(folder: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except OSError:  # none, or none that this user may see
        return False
    return True


def _leads_nowhere(link: Path) -> LinkRefused:
    fact = f"{link}: expected a folder, found a symbolic link{_target(link)}, where there is none"
    return LinkRefused(
        f"using {fact}. What was there is not called lost by that, and nothing was changed. Mount its disk, or make "
        "the link lead to the folder, and run the same command again.",
        fact,
    )


def _target(link: Path) -> str:
    """' to ...', where the link is still there to be asked."""
    try:
        return f" to {link.readlink()}"
    except OSError:
        return ""
