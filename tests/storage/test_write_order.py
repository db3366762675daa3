"""Every verb that writes a cache keeps the order that a power failure needs; the recorder sees one that does not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.backend_suite import other_record
from support.storage_samples import (
    SHARDS,
    cache_bits,
    make_groups,
    make_manifest,
    make_sample,
    make_shards,
    write_cache,
)
from support.write_order import WriteOrder, in_order

from logitcache.storage import (
    CacheWriter,
    LogitCache,
    convert,
    export_parquet,
    local_files,
    merge,
    prune,
    repair,
    sample_id,
    writer,
)
from logitcache.storage.files import LocalFiles, replace_file
from logitcache.storage.job_status import FINISHED, WorkerRecord, remove_records, status, write_record

pytest_plugins = ["support.storage_fixtures"]
pytestmark = pytest.mark.usefixtures("no_fsync")

RECORD = WorkerRecord(FINISHED, "job", "here", 1, 0.0, 0.0, 1, 1, 1, 1, 1)


def test_a_new_cache_in_new_folders_and_one_that_grows(tmp_path: Path, store: str) -> None:
    groups = make_groups(np.random.default_rng(1), 40, 4)
    shards = [[make_sample(np.random.default_rng(2 + n), 9, token_groups=groups)] for n in range(3)]
    manifest = make_manifest(store, token_groups=groups)
    path = tmp_path / "new" / "folders" / "cache"
    for part in (shards[:2], shards[2:]):
        with in_order(tmp_path), CacheWriter(path, manifest, groups) as cache:
            write_record(cache.files, 0, 1, RECORD)
            for shard in part:
                cache.commit(shard)
            cache.finalize()
            remove_records(cache.files)
    assert len(cache_bits(path)) == 3


def test_what_another_made_before_it_was_killed_is_synced_by_who_builds_on_it(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders that are there already may not be on the disk yet."""
    made = tmp_path / "new"

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with WriteOrder(tmp_path) as order:
        for moment in ("_sync_name", "sync_folder"):
            with monkeypatch.context() as patch:
                patch.setattr(local_files, moment, dies)
                with pytest.raises(KeyboardInterrupt):
                    write_cache(made / "cache", store, SHARDS)
        write_cache(made / "cache", store, SHARDS)
    assert order.faults == [] and len(cache_bits(made / "cache")) == 5


def test_of_two_writers_of_one_unit_the_later_one_removes_its_folder(tmp_path: Path, store: str) -> None:
    path = tmp_path / "cache"
    mine, theirs = SHARDS[0][:1], [other_record(SHARDS[0][0], 18)]
    with in_order(tmp_path), CacheWriter(path, make_manifest(store)) as first:
        publish = first._files.publish

        def late(folder: str, files: dict[str, bytes]) -> None:
            publish(folder, files)
            first._files.publish = publish  # type: ignore[method-assign]
            with CacheWriter(path, make_manifest(store)) as second:
                second.commit(theirs)

        first._files.publish = late  # type: ignore[method-assign]
        first.commit(mine)
        first.finalize()
    assert status(path).leftovers == ()


def test_repair_of_damage_and_of_what_killed_writers_left(written: Path, tmp_path: Path) -> None:
    next(path for path in sorted((written / "shards").glob("*-*/**/*")) if path.is_file()).unlink()
    (written / "shards" / f"{'0' * 32}-{'1' * 16}").mkdir()
    (written / f"index-{'0' * 32}.npy").write_bytes(b"older")
    (written / f"contents.json.{'0' * 32}.new").write_bytes(b"half")
    with in_order(tmp_path):
        report = repair(written)
    assert len(report.dropped) == 1 and len(report.leftovers) == 5
    assert status(written).leftovers == ()


def test_prune(written: Path, tmp_path: Path) -> None:
    stays = {sample_id(SHARDS[0][0].token_ids), sample_id(SHARDS[1][1].token_ids)}
    with in_order(tmp_path):
        prune(written, stays)
    assert len(cache_bits(written)) == 2 and status(written).leftovers == ()


def test_merge_and_convert(written: Path, tmp_path: Path, store: str) -> None:
    other = write_cache(tmp_path / "other", store, make_shards(3, [[11]]))
    with in_order(tmp_path):
        merge([written, other], tmp_path / "new" / "merged")
        convert(written, tmp_path / "new" / "converted", precision="compact")
    assert (
        len(cache_bits(tmp_path / "new" / "merged")) == 6 and len(LogitCache.open(tmp_path / "new" / "converted")) == 5
    )


def test_export_and_what_a_killed_one_left(written: Path, tmp_path: Path) -> None:
    left, foreign = f"all.parquet.{'0' * 32}.new", f"other.parquet.{'0' * 32}.new"
    for name in (left, foreign):
        (tmp_path / name).write_bytes(b"half")
    with in_order(tmp_path):
        export_parquet(written, tmp_path / "all.parquet")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all.parquet", "cache", foreign]


# --- the recorder itself ----------------------------------------------------------------------------------------------


@contextmanager
def patched(target: Any, name: str, value: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, value)
        yield


def unsynced_data(original: Callable[..., None]) -> Callable[..., None]:
    """Write a file without its sync."""

    def write(at: int, name: str, data: bytes) -> None:
        with patched(os, "fsync", lambda _: None):
            original(at, name, data)

    return write


def record_first(files: Any, commit: Any, data: Any) -> Any:
    files._make("shards")
    files.create(f"shards/{commit.unit}.json", writer.to_bytes(commit))
    files.publish(f"shards/{commit.folder}", data)
    return commit


def unsynced_removal(files: LocalFiles, *names: str) -> None:
    for name in names:
        path = Path(files.root) / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


WRONG: dict[str, tuple[Any, str, Any, str]] = {
    "names are not synced": (local_files, "sync_folder", lambda *_: None, "not on the disk"),
    "bytes are not synced": (
        local_files,
        "_write_synced",
        unsynced_data(local_files._write_synced),
        "named before all of it is synced",
    ),
    "the record comes before its shard": (writer, "publish_shard", record_first, "which is not on the disk"),
    "new folders are not synced": (local_files, "_sync_name", lambda *_: None, "in a folder that is not on the disk"),
    "removals are not synced": (LocalFiles, "remove", unsynced_removal, "may be there"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_the_recorder_sees_a_wrong_order(kind: str, tmp_path: Path, store: str) -> None:
    target, name, value, expected = WRONG[kind]
    with WriteOrder(tmp_path) as order, patched(target, name, value):
        write_cache(tmp_path / "new" / "cache", store, SHARDS)
        prune(tmp_path / "new" / "cache", {sample_id(SHARDS[0][0].token_ids)})
    assert any(expected in fault for fault in order.faults), order.faults


def test_the_recorder_sees_bytes_that_change_after_their_sync(tmp_path: Path) -> None:
    with WriteOrder(tmp_path) as order:
        replace_file(tmp_path / "a", b"x")
        assert order.faults == []
        handle = os.open(tmp_path / "b.new", os.O_CREAT | os.O_WRONLY)
        os.fsync(handle)
        os.write(handle, b"late")
        os.close(handle)
        (tmp_path / "b.new").rename(tmp_path / "b")
    assert len(order.faults) == 2
