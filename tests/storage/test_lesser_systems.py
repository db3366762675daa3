"""File systems without locks, hard links or the sync of a folder: the same caches, one warning for each, first wins."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.storage_samples import SHARDS, cache_bits, lasting, make_manifest, make_shards, refused, write_cache

from logitcache.storage import (
    CacheWriter,
    IncompleteCache,
    LogitCache,
    export_parquet,
    lesser_systems,
    prune,
    repair,
    sample_id,
    verify,
)
from logitcache.storage.files import LocalFiles, open_files
from logitcache.storage.job_status import status

pytest_plugins = ["support.storage_fixtures"]

CLAIM = f"a.json.{'0' * 32}.new"


@pytest.fixture(autouse=True)
def told() -> Iterator[None]:
    """As a new process, which has said nothing yet."""
    lesser_systems._told.clear()
    yield
    lesser_systems._told.clear()


def failing(number: int) -> Callable[..., Any]:
    def call(*_: object, **__: object) -> Any:
        raise OSError(number, os.strerror(number))

    return call


def without_folder_sync(number: int) -> Callable[[int], None]:
    sync = os.fsync

    def call(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").is_dir():
            failing(number)()
        sync(handle)

    return call


LESSER: dict[str, tuple[Any, str, Callable[[int], Callable[..., Any]], tuple[int, ...]]] = {
    "flock": (fcntl, "flock", failing, (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)),
    "link": (os, "link", failing, (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)),
    "fsync": (os, "fsync", without_folder_sync, (errno.EINVAL, errno.EBADF, errno.ENOTSUP)),
}
CASES = [(call, number) for call, (_, _, _, numbers) in LESSER.items() for number in numbers]


@pytest.mark.parametrize(("call", "number"), CASES, ids=lambda value: str(value))
def test_a_cache_is_the_same_and_one_warning_names_the_call_and_the_folder(
    call: str,
    number: int,
    path: Path,
    pristine: Path,
    store: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    target, name, stub, _ = LESSER[call]
    monkeypatch.setattr(target, name, stub(number))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            write_cache(path, store, SHARDS)
        assert repair(path).leftovers == ()
        export_parquet(path, path.with_name("all.parquet"))
        assert lasting(path) == lasting(pristine) and verify(path).is_intact
        prune(path, {sample_id(SHARDS[0][0].token_ids)})
    assert len(cache_bits(path)) == 1 and not list(path.parent.rglob("*.new"))
    (message,) = caplog.messages
    assert call in message and os.strerror(number) in message and str(path.parent) in message


@pytest.mark.parametrize("call", LESSER)
def test_other_errors_are_not_taken_for_a_lesser_file_system(
    call: str, path: Path, store: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    target, name, stub, _ = LESSER[call]
    monkeypatch.setattr(target, name, stub(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write_cache(path, store, SHARDS)
    assert caplog.messages == []


def test_a_file_that_does_not_sync_is_an_error(path: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    def call(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").is_file():
            failing(errno.EINVAL)()
        sync(handle)

    monkeypatch.setattr(os, "fsync", call)
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        write_cache(path, store, SHARDS)


# --- without hard links -----------------------------------------------------------------------------------------------


@pytest.fixture
def no_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", failing(errno.EPERM))


@pytest.mark.usefixtures("no_link")
def test_of_many_creators_one_wins_and_the_file_is_whole(tmp_path: Path) -> None:
    for number in range(20):
        name = f"{number}.json"
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda i, n=name: LocalFiles(tmp_path).create(n, bytes([i]) * 1000), range(8)))
        assert won.count(True) == 1
        assert (tmp_path / name).read_bytes() == bytes([won.index(True)]) * 1000
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".new")] == []


@pytest.mark.usefixtures("no_link")
@pytest.mark.parametrize("step", ["replace", "unlink"])
def test_who_is_killed_at_a_claim_leaves_it_and_no_half_file(
    tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the file has its name it stops others, who say what to remove; after that it stops nobody."""
    original = getattr(os, step)

    def dies(name: str, *args: Any, **more: Any) -> None:
        if step == "replace" or name == CLAIM:
            monkeypatch.setattr(os, "unlink", lambda *_, **__: None)
            raise KeyboardInterrupt
        original(name, *args, **more)

    files, unlink = LocalFiles(tmp_path), os.unlink
    with monkeypatch.context() as patch:
        patch.setattr(os, step, dies)
        with pytest.raises(KeyboardInterrupt):
            files.create("a.json", b"mine")
    monkeypatch.setattr(os, "unlink", unlink)
    monkeypatch.setattr(lesser_systems, "CLAIM_PAUSE", 0)
    assert (tmp_path / CLAIM).exists()
    if step == "replace":
        with pytest.raises(OSError, match="if none is alive any more, remove this one") as refusal:
            files.create("a.json", b"theirs")
        assert refusal.value.errno == errno.EBUSY and str(refusal.value.filename).endswith(CLAIM)
        assert not files.exists("a.json")
        files.remove(CLAIM)
        assert files.create("a.json", b"theirs") and files.read("a.json") == b"theirs"
        return
    assert not files.create("a.json", b"theirs") and files.read("a.json") == b"mine"


@pytest.mark.usefixtures("no_link")
def test_a_claim_that_was_left_at_a_shard_is_listed_and_removed_by_repair(
    path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lesser_systems, "CLAIM_PAUSE", 0)
    with CacheWriter(path, make_manifest(store)) as writer:
        unit = writer.commit(SHARDS[0]).unit
    claim = f"shards/{unit}.json.{'0' * 32}.new"
    (path / "shards" / f"{unit}.json").rename(path / claim)
    with CacheWriter(path, make_manifest(store)) as writer:
        with pytest.raises(OSError, match="remove this one") as refusal:
            writer.commit(SHARDS[0])
        assert refusal.value.filename == f"{path}/{claim}"
    refused(IncompleteCache, "incomplete", lambda: LogitCache.open(path))
    assert claim in status(path).leftovers and claim in repair(path).leftovers
    assert len(cache_bits(write_cache(path, store, SHARDS))) == 5


def test_without_locks_prune_and_repair_take_the_callers_word(
    path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cache(path, store, SHARDS)
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    with CacheWriter(path, make_manifest(store)) as writer, open_files(path).exclusive():
        writer.commit(make_shards(5, [[6]])[0])
        writer.finalize()
    assert len(cache_bits(path)) == 6
