"""Being the only writer: refused beside another, and others wait; on an object store the caller answers for it."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest
from support.storage_samples import SHARDS, lasting, make_manifest, write_cache

from logitcache.storage import CacheWriter, repair
from logitcache.storage.files import open_files

pytest_plugins = ["support.storage_fixtures"]
pytestmark = pytest.mark.usefixtures("no_fsync")


def may_join(path: Path) -> bool:
    """Whether another writer would get the lock without waiting."""
    handle = os.open(path / "writer.lock", os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


def test_others_wait_until_its_end_however_it_ends(tmp_path: Path) -> None:
    files = open_files(tmp_path)
    with files.exclusive():
        assert not may_join(tmp_path)
    assert may_join(tmp_path)
    with pytest.raises(KeyError), files.exclusive():
        raise KeyError
    assert may_join(tmp_path)


def test_beside_a_writer_or_another_one_it_is_refused(tmp_path: Path) -> None:
    files = open_files(tmp_path)
    leave = files.join()
    with pytest.raises(OSError, match="another process is writing") as refusal, files.exclusive():
        raise AssertionError("two writers")
    assert refusal.value.errno == errno.EBUSY and refusal.value.filename == str(tmp_path)
    leave()
    with files.exclusive(), pytest.raises(OSError, match="another process is writing"), files.exclusive():
        raise AssertionError("two writers")
    assert may_join(tmp_path)


def test_nobody_who_begins_removes_what_others_left(tmp_path: Path) -> None:
    left = tmp_path / f"contents.json.{'0' * 32}.new"
    left.write_bytes(b"half")
    files = open_files(tmp_path)
    files.join()()
    with files.exclusive():
        assert left.exists()
    assert left.exists()


@pytest.mark.parametrize("umask", [0o002, 0o077])
def test_the_lock_follows_the_umask(tmp_path: Path, umask: int) -> None:
    """A group that shares a cache shares its lock."""
    before = os.umask(umask)
    try:
        open_files(tmp_path / "cache").join()()
    finally:
        os.umask(before)
    assert (tmp_path / "cache" / "writer.lock").stat().st_mode & 0o777 == 0o666 & ~umask


def test_what_is_local_has_a_lock() -> None:
    local, remote = open_files("cache"), open_files("memory://exclusive-test/cache")
    assert local.is_local and not remote.is_local
    leave = remote.join()
    with remote.exclusive(), remote.exclusive():
        remote.replace("a", b"x")
    leave()
    assert remote.read("a") == b"x"
    remote.remove("a")


def test_repair_beside_a_writer_is_refused(path: Path) -> None:
    write_cache(path, "arrow", SHARDS)
    before = lasting(path)
    with CacheWriter(path, make_manifest("arrow")), pytest.raises(OSError, match="another process is writing"):
        repair(path)
    assert lasting(path) == before and not repair(path).is_incomplete


def test_who_begins_to_write_waits_for_the_end_of_a_repair(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cache(path, "arrow", SHARDS)
    joined = []
    original = os.open

    def asked(name: str, *args: int, **options: int) -> int:
        if str(name).endswith(".arrow"):
            monkeypatch.undo()
            joined.append(may_join(path))
        return original(name, *args, **options)

    monkeypatch.setattr(os, "open", asked)
    repair(path)
    assert joined == [False]
