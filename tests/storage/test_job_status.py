"""Which worker does what, and what a cache says of its job in every state."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from support.storage_samples import make_manifest, make_sample, write_cache

from logitcache.capture.worker import WORKERS_A_WINDOW, Share
from logitcache.storage import CachedSample, CacheWriter, CorruptCache, NotACache
from logitcache.storage.data_sets import DTYPE as RUNS
from logitcache.storage.files import open_files
from logitcache.storage.job_status import (
    FAILED,
    FINISHED,
    RUNNING,
    STOPPED,
    WorkerRecord,
    job_digest,
    read_records,
    remove_records,
    status,
    write_part,
    write_record,
)

RECORD = WorkerRecord(RUNNING, "job", "here", 12, 100.0, 160.5, 3, 200, 300, 2, 5)


@pytest.mark.parametrize("num", range(1, 41))
def test_every_unit_is_one_workers(num: int) -> None:
    for window in range(60):
        owners = [[w for w in range(num) if Share(w, num).has_shard(window, unit)] for unit in range(30)]
        assert all(len(o) == 1 for o in owners)
        for index in range(num):
            if any(o == [index] for o in owners):
                assert Share(index, num).has_window(window)


@pytest.mark.parametrize("num", range(1, 41))
def test_a_window_is_read_by_few(num: int) -> None:
    for window in range(60):
        assert sum(Share(w, num).has_window(window) for w in range(num)) <= WORKERS_A_WINDOW


@pytest.mark.parametrize("units", [1, 2, 3, 5, 8, 11])
@pytest.mark.parametrize("num", [2, 3, 8, 12, 40])
def test_shares_are_about_equal_over_many_windows(num: int, units: int) -> None:
    """However few units a window has: 16,384 short rows are one unit or two."""
    windows = 10 * num
    shares = [
        sum(Share(w, num).has_shard(window, unit) for window in range(windows) for unit in range(units))
        for w in range(num)
    ]
    mean = windows * units / num
    assert 0.75 * mean <= min(shares) and max(shares) <= 1.25 * mean


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where a cache goes: a folder, or a prefix of memory://."""
    if request.param == "local":
        yield str(tmp_path / "cache")
        return
    yield "memory://workers-test/cache"
    fs, _ = fsspec.core.url_to_fs("memory://")
    if fs.exists("/workers-test"):
        fs.rm("/workers-test", recursive=True)


def make_samples(seed: int, count: int = 3) -> list[CachedSample]:
    rng = np.random.default_rng(seed)
    return [make_sample(rng, 6 + i) for i in range(count)]


def positions(*shards: list[CachedSample]) -> int:
    return sum(len(s.logprobs.positions) for shard in shards for s in shard)


def tokens(*shards: list[CachedSample]) -> int:
    return sum(len(s.token_ids) for shard in shards for s in shard)


def test_a_cache_that_was_only_begun(place: str) -> None:
    CacheWriter(place, make_manifest("arrow")).close()
    found = status(place)
    assert not found.is_final
    assert (found.num_shards, found.num_listed, found.num_samples, found.num_bytes) == (0, 0, 0, 0)
    assert found.manifest == make_manifest("arrow")
    assert found.workers == {}
    assert found.tokens_per_second is None and found.share_done is None


def test_commits_before_the_end_and_after(place: str) -> None:
    first, second = make_samples(1), make_samples(2, 4)
    with CacheWriter(place, make_manifest("arrow")) as writer:
        sizes = [sum(f.size for f in writer.commit(first).files)]
        found = status(place)
        assert (found.is_final, found.num_shards, found.num_listed) == (False, 1, 0)
        assert found.seconds == 0 and found.tokens_per_second is None
        sizes.append(sum(f.size for f in writer.commit(second).files))
        found = status(place)
        assert (found.num_shards, found.num_samples) == (2, 7)
        assert found.num_positions == positions(first, second)
        assert found.num_tokens == tokens(first, second)
        assert found.num_bytes == sum(sizes)
        assert found.seconds >= 0
        assert not found.is_final
        writer.finalize()
    found = status(place)
    assert (found.is_final, found.num_listed, found.num_shards) == (True, 2, 2)
    with CacheWriter(place, make_manifest("arrow")) as writer:
        writer.commit(make_samples(3))
    found = status(place)  # it grows
    assert (found.is_final, found.num_listed, found.num_shards) == (False, 2, 3)


def test_the_rate_is_of_what_came_after_the_first_commit(tmp_path: Path) -> None:
    shards = [make_samples(seed, 1 + seed) for seed in range(3)]
    path = write_cache(tmp_path / "cache", "arrow", shards)
    by_size = sorted(path.glob("shards/*.json"))
    for number, commit in enumerate(by_size):
        os.utime(commit, (1000.0, 1000.0 + 10 * number))
    found = status(path)
    assert found.seconds == 20
    with CacheWriter(path, make_manifest("arrow")) as writer:
        units = [writer.commit(shard) for shard in shards]
    first = min(units, key=lambda c: c.unit)
    assert found.tokens_per_second == (tokens(*shards) - first.num_tokens) / 20


def test_records_of_workers(place: str) -> None:
    with CacheWriter(place, make_manifest("arrow")) as writer:
        writer.commit(make_samples(1))
    files = open_files(place)
    said = {
        (0, 4, "job"): RECORD,
        (1, 4, "job"): replace(RECORD, state=FINISHED, windows_done=5),
        (2, 4, "job"): replace(RECORD, state=FAILED, failures=("running the base on a.jsonl:3: no.",)),
        (3, 4, "job"): replace(RECORD, state=STOPPED, windows_done=0),
    }
    for (index, num, _), record in said.items():
        write_record(files, index, num, record)
    assert read_records(files) == said
    found = status(place)
    assert found.workers == said
    assert found.share_done == (2 + 5 + 2 + 0) / 20
    files.remove("worker-1-of-4-job.json")
    files.remove("worker-2-of-4-job.json")
    assert status(place).share_done == 2 / 20  # those that have not begun have as much to do
    write_record(files, 1, 4, replace(RECORD, num_windows=-1))
    assert status(place).share_done is None
    write_record(files, 11, 12, RECORD)
    files.replace("worker-x-of-4-job.json", b"not of ours")
    files.replace("worker-1-of-4-job.json.bak", b"not of ours")
    assert list(read_records(files)) == [(*w, "job") for w in ((0, 4), (1, 4), (3, 4), (11, 12))]
    remove_records(files)
    assert status(place).workers == {}
    assert files.exists("worker-x-of-4-job.json") and files.exists("worker-1-of-4-job.json.bak")
    assert status(place).num_shards == 1


def test_a_record_that_is_damaged_is_named(place: str) -> None:
    CacheWriter(place, make_manifest("arrow")).close()
    files = open_files(place)
    write_record(files, 0, 2, RECORD)
    files.replace("worker-0-of-2-job.json", files.read("worker-0-of-2-job.json").replace(b"running", b"rinning"))
    with pytest.raises(CorruptCache, match=r"worker-0-of-2-job\.json"):
        status(place)


def test_what_is_no_cache(place: str) -> None:
    with pytest.raises(NotACache):
        status(place)
    if "://" not in place:
        Path(place).mkdir()
        (Path(place) / "mine.txt").write_text("mine", encoding="utf-8")
        with pytest.raises(NotACache):
            status(place)


def test_status_changes_nothing(tmp_path: Path) -> None:
    path = write_cache(tmp_path / "cache", "zarr", [make_samples(1)])
    before = {p: p.stat().st_mtime_ns for p in sorted(path.rglob("*"))}
    assert status(path).is_final
    assert {p: p.stat().st_mtime_ns for p in sorted(path.rglob("*"))} == before


def test_the_last_worker_removes_what_is_of_its_data_set(place: str) -> None:
    """An earlier job of that name goes with it, and of another name who has not finished; who has stays."""
    jobs = {name: job_digest(name, cut) for name, cut in (("one", 1), ("two", 1))}
    earlier = job_digest("one", 2)
    assert len({*jobs.values(), earlier}) == 3 and all(len(job) == 32 for job in jobs.values())
    files = open_files(place)
    files.join()()
    for job, state in ((jobs["one"], FINISHED), (earlier, FINISHED), (jobs["two"], FINISHED)):
        runs = np.zeros(0, dtype=RUNS)
        checksum = write_part(files, 0, 2, job, runs)
        write_record(files, 0, 2, replace(RECORD, job=job, state=state, part_checksum=checksum))
    write_record(files, 1, 2, replace(RECORD, job=jobs["two"]))
    remove_records(files, jobs["one"])
    assert list(read_records(files)) == [(0, 2, jobs["two"])]
    assert [name for name in files.names("") if name.endswith(".npy")] == [f"worker-0-of-2-{jobs['two']}.npy"]


def test_a_record_of_another_job_than_its_name_says_is_refused(place: str) -> None:
    """Its job is part of the name of another file, which is read."""
    files = open_files(place)
    files.join()()
    write_record(files, 0, 2, RECORD)
    files.replace("worker-0-of-2-other.json", files.read("worker-0-of-2-job.json"))
    with pytest.raises(CorruptCache, match=r"worker-0-of-2-other\.json"):
        read_records(files)
