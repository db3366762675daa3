"""What some file systems refuse (a lock, a hard link, the sync of a folder), and what is done there instead.

Owns the three calls, and one warning a process for each. What is lost is the safety from another fault, which the
warning names, never a number: whoever creates a file is still the first or not, and the file is whole. Must not know
what the files mean.
"""

import errno
import fcntl
import logging
import os
import time
from contextlib import suppress

from .layout import claim_name

logger = logging.getLogger(__name__)

_UNKNOWN = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
NO_LOCK = {*_UNKNOWN, errno.ENOLCK}
NO_LINK = {*_UNKNOWN, errno.EPERM}
NO_FOLDER_SYNC = {*_UNKNOWN, errno.EINVAL, errno.EBADF}
"""How they say it."""

CLAIM_TRIES, CLAIM_PAUSE = 1000, 0.01
"""How often who wants to create a file looks whether another has come to the end of it, and the seconds between."""

BEING_CREATED = "another process creates the file that this one is beside; if none is alive any more, remove this one"
"""Why a file whose creation was claimed is not there after all that time."""

_told: set[str] = set()


def lock_alone(handle: int, root: str) -> bool:
    """Hold the lock on an open file alone; False where somebody holds it. True where there are no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        _tell_of_locks(root, error)
    return True


def lock_shared(handle: int, root: str) -> None:
    """Hold the lock on an open file with others, and wait for one who holds it alone."""
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)
    except OSError as error:
        _tell_of_locks(root, error)


def sync_folder(at: int, root: str) -> None:
    """Which names an open folder has is on the disk before this returns."""
    try:
        os.fsync(at)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
        _tell("fsync of a folder", root, error, "after a power failure files may be missing; `logitcache verify` says")


def name_first(at: int, temporary: str, name: str, root: str) -> bool:
    """Give a whole file in an open folder its name; False where that is taken: the first one wins.

    Without hard links the file is renamed while a claim beside it, created only if absent, keeps others from that. Who
    is killed between leaves the claim. Raises `OSError` (EBUSY) where it stays and the file does not come.
    """
    try:
        os.link(temporary, name, src_dir_fd=at, dst_dir_fd=at, follow_symlinks=False)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINK:
            raise
        _tell(
            "link", root, error, "a writer killed while it names a file leaves a claim, which `logitcache status` lists"
        )
    claim = claim_name(name)
    for _ in range(CLAIM_TRIES):
        if _is_there(at, name):
            return False
        try:
            os.close(os.open(claim, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=at))
        except FileExistsError:
            time.sleep(CLAIM_PAUSE)
            continue
        try:
            if _is_there(at, name):
                return False
            os.replace(temporary, name, src_dir_fd=at, dst_dir_fd=at)
            return True
        finally:
            with suppress(FileNotFoundError):
                os.unlink(claim, dir_fd=at)
    raise OSError(errno.EBUSY, BEING_CREATED, f"{root}/{claim}")


def _is_there(at: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=at, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _tell_of_locks(root: str, error: OSError) -> None:
    if error.errno not in NO_LOCK:
        raise error
    _tell("flock", root, error, "nothing keeps `logitcache prune` or `repair` from running beside a writer: see to it")


def _tell(call: str, root: str, error: OSError, cost: str) -> None:
    """Once a process for each call: thousands of files would say the same."""
    if call not in _told:
        _told.add(call)
        logger.warning(
            "writing to %s: its file system refuses %s (%s). The cache is written without; %s.",
            root,
            call,
            error.strerror,
            cost,
        )
