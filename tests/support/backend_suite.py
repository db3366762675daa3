"""`BackendTests`: what every store promises on a local disk, for a new one to subclass.

What is written is read, and committing survives what interrupts it. A file that subclasses it names
"support.storage_fixtures" in its `pytest_plugins`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from support.storage_samples import (
    SHARDS,
    by_tokens,
    cache_bits,
    every_position,
    flat,
    in_processes,
    lasting,
    make_manifest,
    make_sample,
    make_shards,
    record_bits,
    refused,
    sample_bits,
    tree,
    unit_of,
    write_cache,
)

from logitcache.storage import (
    CachedSample,
    CacheWriter,
    CorruptCache,
    IncompleteCache,
    LogitCache,
    NotACache,
    RepairReport,
    SampleNotCached,
    repair,
    sample_id,
    verify,
)
from logitcache.storage.files import LocalFiles
from logitcache.storage.job_status import status


def is_final(writer: CacheWriter) -> bool:
    """The property, without mypy taking it for a constant."""
    return writer.is_final


def other_record(sample: CachedSample, seed: int) -> CachedSample:
    """The sample with other numbers at the same positions: the same unit in other bytes."""
    positions = sample.logprobs.positions.tolist()
    other = make_sample(np.random.default_rng(seed), 0, token_ids=sample.token_ids, positions=positions)
    return replace(sample, logprobs=other.logprobs)


def write_all(path: Path, store: str, order: Sequence[int]) -> None:
    """The shards of a small cache, in this order."""
    shards = make_shards(19, [[30], [600, 5], [7, 8, 9], [20], [40, 41], [3]])
    write_cache(path, store, [shards[i] for i in order])


class BackendTests:
    """A subclass, whose name begins with Test, gives `name`: of the store, in the manifest."""

    name: ClassVar[str]

    unread: ClassVar[frozenset[str]] = frozenset()
    """Names of files in a shard's folder that lookups do not read."""

    @pytest.fixture(scope="class")
    @classmethod
    def store(cls) -> str:
        return cls.name

    @pytest.fixture(scope="class")
    @classmethod
    def pristine(cls, store: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A finished cache of SHARDS, to be left as it is."""
        return write_cache(tmp_path_factory.mktemp("pristine") / "cache", store, SHARDS)

    def largest_file(self, path: Path, shard: Sequence[CachedSample], store: str) -> Path:
        """Of the shard with these samples, among those that lookups read."""
        (folder,) = (p for p in (path / "shards").glob(f"{unit_of(shard, store)}-*") if p.is_dir())
        files = [p for p in folder.rglob("*") if p.is_file() and p.name not in self.unread]
        return max(files, key=lambda p: p.stat().st_size)

    # --- round trip ---------------------------------------------------------------------------------------------------

    def test_round_trip_over_shards_and_chunks_is_bit_exact(self, path: Path, store: str) -> None:
        rng = np.random.default_rng(2)
        rows = [[1, 511, 1, 700], [512], [513], [1024, 1], [3, 1600, 2], [1025]]
        shards = [[every_position(rng, n + 1) for n in shard] for shard in rows]
        shards += make_shards(3, [[50, 2, 1300], [600] * 4])
        write_cache(path, store, shards)
        cache = LogitCache.open(path)
        assert by_tokens(list(cache.samples())) == by_tokens(flat(shards))
        for sample in flat(shards):
            assert record_bits(cache.lookup(sample.token_ids)) == record_bits(sample.logprobs)

    @pytest.mark.parametrize(("vocab", "top_k"), [(2, 1), (6, 5), (300, 1), (300, 299), (300, 0), (2, 0)])
    def test_round_trip_of_narrow_and_wide_rows(self, path: Path, store: str, vocab: int, top_k: int) -> None:
        rng = np.random.default_rng(vocab)
        samples = [every_position(rng, n, vocab, top_k) for n in (2, 90, 600)]
        write_cache(path, store, [samples], make_manifest(store, vocab, top_k))
        assert cache_bits(path) == [sample_bits(s) for s in samples]

    def test_counts_and_access_by_index(self, written: Path) -> None:
        cache = LogitCache.open(written)
        samples = list(cache.samples())
        assert len(cache) == len(samples) == 5
        assert cache.num_positions == sum(len(s.logprobs) for s in flat(SHARDS))
        assert cache.num_tokens == sum(len(s.token_ids) for s in flat(SHARDS))
        assert cache.num_shards == len(list(cache.shards())) == 2
        assert cache.num_bytes == sum(len(data) for name, data in tree(written / "shards").items() if "/" in name)
        for i, sample in enumerate(samples):
            assert sample_bits(cache.sample(i)) == sample_bits(sample)
            assert cache.sample_id(i) == sample_id(sample.token_ids)
        for shard in cache.shards():
            assert np.array_equal(shard.token_ids(), shard.table().token_ids)
        with pytest.raises(IndexError):
            cache.sample(5)

    def test_the_contents_checksum_tells_contents_apart(self, path: Path, pristine: Path, store: str) -> None:
        first = LogitCache.open(pristine).contents_checksum
        assert LogitCache.open(write_cache(path, store, SHARDS[1:])).contents_checksum != first
        assert LogitCache.open(write_cache(path, store, SHARDS)).contents_checksum == first

    def test_a_path_alone_opens_it_and_gives_the_manifest_back(self, written: Path, store: str) -> None:
        for name in (written, str(written), f"file://{written}"):
            cache = LogitCache.open(name)
            assert cache.manifest == make_manifest(store)
            assert cache.path == str(written) and cache.token_groups() is None

    def test_a_moved_cache_is_the_same_cache(self, written: Path, tmp_path: Path) -> None:
        before = cache_bits(written)
        assert cache_bits(written.rename(tmp_path / "elsewhere")) == before

    def test_reading_and_verifying_write_nothing(self, written: Path) -> None:
        before = tree(written)
        cache_bits(written)
        report = verify(written)
        assert report.is_intact and report.num_shards == 2 and report.num_samples == 5
        assert report.num_positions == sum(len(s.logprobs) for s in flat(SHARDS))
        assert tree(written) == before

    def test_two_caches_of_the_same_samples_have_the_same_bytes(self, path: Path, pristine: Path, store: str) -> None:
        assert lasting(write_cache(path, store, SHARDS)) == lasting(pristine)

    def test_the_order_of_the_shards_does_not_matter(self, path: Path, pristine: Path, store: str) -> None:
        assert lasting(write_cache(path, store, SHARDS[::-1])) == lasting(pristine)

    def test_a_cache_without_samples_has_no_hits(self, path: Path, store: str) -> None:
        cache = LogitCache.open(write_cache(path, store, []))
        assert len(cache) == 0 and cache.num_positions == 0
        refused(SampleNotCached, "sample-not-cached", lambda: cache.lookup(np.array([1, 2])))
        assert np.array([1, 2]) not in cache

    # --- commit, resume, finalize, repair -----------------------------------------------------------------------------

    def test_before_finalize_there_is_no_cache(self, path: Path, store: str) -> None:
        with CacheWriter(path, make_manifest(store)) as writer:
            assert "after 0 committed shards" in refused(IncompleteCache, "incomplete", lambda: LogitCache.open(path))
            writer.commit(SHARDS[0])
            assert "after 1 committed shards" in refused(IncompleteCache, "incomplete", lambda: LogitCache.open(path))
            refused(IncompleteCache, "incomplete", lambda: verify(path))
            assert not is_final(writer)
            writer.finalize()
            assert is_final(writer)
        assert len(LogitCache.open(path)) == 3

    def test_an_interrupted_run_goes_on_to_the_same_bytes(self, tmp_path: Path, store: str) -> None:
        shards = make_shards(10, [[30], [600, 5], [7, 8, 9], [20]])
        undisturbed = write_cache(tmp_path / "a", store, shards)
        path = tmp_path / "b"
        for count in (0, 1, 3):
            with CacheWriter(path, make_manifest(store)) as writer:
                for shard in shards[:count]:
                    writer.commit(shard)
        write_cache(path, store, shards)
        assert lasting(path) == lasting(undisturbed)

    def test_committing_a_unit_twice_changes_nothing(self, path: Path, store: str) -> None:
        with CacheWriter(path, make_manifest(store)) as writer:
            first = writer.commit(SHARDS[0])
            before = tree(path)
            assert writer.commit(SHARDS[0]) == first
            assert tree(path) == before
        with CacheWriter(path, make_manifest(store)) as writer:
            assert writer.commit(SHARDS[0]) == first
            assert tree(path) == before

    def test_the_first_record_of_a_unit_stays(self, path: Path, store: str) -> None:
        first = SHARDS[0][0]
        write_cache(path, store, [[first], [other_record(first, 13)]])
        assert cache_bits(path) == [sample_bits(first)]

    def test_finalizing_twice_changes_nothing(self, path: Path, store: str) -> None:
        with CacheWriter(path, make_manifest(store)) as writer:
            writer.commit(SHARDS[0])
            contents = writer.finalize()
            before = tree(path)
            assert writer.finalize() == contents
            assert tree(path) == before

    def test_a_finished_cache_can_grow_and_shows_the_old_contents_until_finalized(
        self, written: Path, store: str
    ) -> None:
        before = cache_bits(written)
        reader = LogitCache.open(written)
        more = make_shards(14, [[21, 600]])[0]
        with CacheWriter(written, make_manifest(store)) as writer:
            assert is_final(writer)
            writer.commit(more)
            assert not is_final(writer)
            assert cache_bits(written) == before
            assert verify(written).num_samples == 5
        assert cache_bits(written) == before
        with CacheWriter(written, make_manifest(store)) as writer:
            assert not is_final(writer)
            writer.finalize()
        cache = LogitCache.open(written)
        assert by_tokens(list(cache.samples())) == by_tokens(flat([*SHARDS, more]))
        assert by_tokens(list(reader.samples())) == by_tokens(flat(SHARDS))

    def test_a_grown_cache_has_the_bytes_of_one_written_at_once(
        self, written: Path, store: str, tmp_path: Path
    ) -> None:
        more = make_shards(14, [[21, 600]])
        write_cache(written, store, more)
        assert lasting(written) == lasting(write_cache(tmp_path / "at once", store, [*SHARDS, *more]))

    def test_a_damaged_shard_is_refused_when_it_is_read_and_repaired_as_its_error_says(
        self, written: Path, store: str
    ) -> None:
        before, whole = lasting(written), cache_bits(written)
        data = self.largest_file(written, SHARDS[0], store)
        data.write_bytes(bytes(data.stat().st_size))
        cache = LogitCache.open(written)
        assert "logitcache repair" in refused(CorruptCache, "corrupt", lambda: cache.lookup(SHARDS[0][0].token_ids))
        assert record_bits(cache.lookup(SHARDS[1][0].token_ids)) == record_bits(SHARDS[1][0].logprobs)
        refused(CorruptCache, "corrupt", lambda: cache_bits(written))
        assert {problem.shard for problem in verify(written).problems} == {unit_of(SHARDS[0], store)}
        report = repair(written)
        assert report.dropped == (unit_of(SHARDS[0], store),) and report.is_incomplete
        assert "after 1 committed shards" in refused(IncompleteCache, "incomplete", lambda: LogitCache.open(written))
        write_cache(written, store, SHARDS)
        assert lasting(written) == before
        assert cache_bits(written) == whole and verify(written).is_intact

    def test_repair_leaves_a_whole_cache_as_it_is(self, written: Path) -> None:
        before = tree(written)
        report = repair(written)
        assert report.dropped == () and not report.is_incomplete
        assert tree(written) == before

    @pytest.mark.parametrize("lost", ["contents.json", "index", "contents damaged", "index damaged"])
    def test_repair_drops_no_shard_for_a_lost_index(self, written: Path, store: str, lost: str) -> None:
        before = lasting(written)
        file = written / "contents.json" if "contents" in lost else next(written.glob("index-*.npy"))
        file.write_bytes(file.read_bytes()[:-9]) if "damaged" in lost else file.unlink()
        report = repair(written)
        assert report.dropped == () and report.is_incomplete
        refused(IncompleteCache, "incomplete", lambda: LogitCache.open(written))
        with CacheWriter(written, make_manifest(store)) as writer:
            writer.finalize()
        assert lasting(written) == before

    def test_an_unfinished_cache_is_repaired_too(self, path: Path, store: str) -> None:
        with CacheWriter(path, make_manifest(store)) as writer:
            for shard in SHARDS:
                writer.commit(shard)
        self.largest_file(path, SHARDS[1], store).unlink()
        (path / "shards" / f"{unit_of(SHARDS[0], store)}.json").write_bytes(b"{")
        assert set(repair(path).dropped) == {unit_of(shard, store) for shard in SHARDS}
        assert len(cache_bits(write_cache(path, store, SHARDS))) == 5

    @pytest.mark.parametrize(
        "leftover",
        [
            f"shards/{'0' * 32}-{'0' * 16}.{'0' * 32}.new/c/0",
            f"contents.json.{'0' * 32}.new",
            f"manifest.json.{'0' * 32}.new",
            f"shards/{'0' * 32}.json.{'0' * 32}.new",
            f"shards/{'0' * 32}-{'0' * 16}/data",
        ],
    )
    def test_leftovers_of_a_killed_run_are_listed_and_removed_by_repair_alone(
        self, path: Path, pristine: Path, store: str, leftover: str
    ) -> None:
        """A writer cannot know that they are not of one that is alive on another machine."""
        with CacheWriter(path, make_manifest(store)) as writer:
            writer.commit(SHARDS[0])
        (path / leftover).parent.mkdir(parents=True, exist_ok=True)
        (path / leftover).write_bytes(b"half")
        write_cache(path, store, SHARDS)
        assert lasting(path) == {**lasting(pristine), leftover: b"half"}
        (left,) = status(path).leftovers
        assert leftover == left or leftover.startswith(f"{left}/")
        assert repair(path) == RepairReport((), False, (left,)) and status(path).leftovers == ()
        assert lasting(path) == lasting(pristine)

    def test_older_indexes_are_listed_and_removed_by_repair_alone(self, written: Path, store: str) -> None:
        (older,) = written.glob("index-*.npy")
        write_cache(written, store, make_shards(14, [[21, 600]]))
        assert status(written).leftovers == (older.name,) and older.is_file()
        assert repair(written).leftovers == (older.name,) and not older.exists()
        assert len(cache_bits(written)) == 7 and verify(written).is_intact

    def test_a_run_killed_before_its_manifest_was_committed_starts_again(self, path: Path, store: str) -> None:
        (path / "shards").mkdir(parents=True)
        (path / "writer.lock").touch()
        (path / f"manifest.json.{'0' * 32}.new").write_bytes(b"half")
        refused(NotACache, "not-a-cache", lambda: LogitCache.open(path))
        write_cache(path, store, SHARDS)
        assert repair(path).leftovers == (f"manifest.json.{'0' * 32}.new",)
        assert len(cache_bits(path)) == 5

    def test_an_uncommitted_shard_folder_does_not_exist(self, written: Path, store: str) -> None:
        before = cache_bits(written)
        orphan = written / "shards" / f"{unit_of(make_shards(15, [[9]])[0], store)}-{'0' * 16}"
        orphan.mkdir()
        (orphan / "half").write_bytes(b"x")
        assert cache_bits(written) == before
        write_cache(written, store, make_shards(15, [[9]]))
        assert len(cache_bits(written)) == 6

    # --- several writers ----------------------------------------------------------------------------------------------

    def test_a_writer_starts_beside_others_and_readers_see_what_was_finished(self, written: Path, store: str) -> None:
        with CacheWriter(written, make_manifest(store)) as first, CacheWriter(written, make_manifest(store)) as second:
            assert len(cache_bits(written)) == 5
            first.commit(make_shards(16, [[5]])[0])
            assert not is_final(second)
            second.commit(make_shards(16, [[5, 6]])[0])
            assert len(cache_bits(written)) == 5
            first.finalize()
            assert is_final(second)
        assert len(cache_bits(written)) == 7 and verify(written).is_intact

    def test_a_writer_does_not_remove_what_another_is_writing(self, path: Path, store: str) -> None:
        with CacheWriter(path, make_manifest(store)):
            work = path / "shards" / f"{'0' * 32}-{'0' * 16}.{'0' * 32}.new"
            work.mkdir(parents=True)
            (path / "shards" / f"half.json.{'0' * 32}.new").write_bytes(b"half")
            with CacheWriter(path, make_manifest(store)) as other:
                other.commit(SHARDS[0])
                assert work.is_dir() and f"shards/half.json.{'0' * 32}.new" in tree(path)
        with CacheWriter(path, make_manifest(store)):
            assert work.is_dir() and f"shards/half.json.{'0' * 32}.new" in tree(path)

    @pytest.mark.parametrize("known", [True, False], ids=["written here", "read here"])
    def test_who_finalises_looks_at_the_files_of_every_shard(self, path: Path, store: str, known: bool) -> None:
        """So that nobody reports success where a shard was lost."""
        with CacheWriter(path, make_manifest(store)) as writer:
            commits = [writer.commit(shard) for shard in SHARDS]
            last = writer if known else CacheWriter(path, make_manifest(store))
            self.largest_file(path, SHARDS[1], store).unlink()
            assert commits[1].folder in refused(CorruptCache, "corrupt", last.finalize)
            assert not (path / "contents.json").exists()
            last.close()

    def test_of_two_writers_of_one_unit_the_first_wins_and_the_other_leaves_nothing(
        self, path: Path, store: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mine = SHARDS[0][:1]
        theirs = [other_record(mine[0], 18)]
        with CacheWriter(path, make_manifest(store)) as first, CacheWriter(path, make_manifest(store)) as second:
            publish = first._files.publish
            won = []

            def late(folder: str, files: dict[str, bytes]) -> None:
                publish(folder, files)
                won.append(second.commit(theirs))

            monkeypatch.setattr(first._files, "publish", late)
            assert [first.commit(mine)] == won
            first.finalize()
        assert cache_bits(path) == [sample_bits(theirs[0])]
        assert [p.name for p in (path / "shards").iterdir() if p.is_dir()] == [won[0].folder]

    def test_a_folder_that_another_writer_removes_meanwhile_is_written_again(
        self, path: Path, store: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two writers publish one folder; a third commits the unit in other bytes.

        The first of the two removes it then.
        """
        with CacheWriter(path, make_manifest(store)) as writer:
            commit = writer.commit(SHARDS[0])
            (path / "shards" / f"{commit.unit}.json").unlink()
            settle = LocalFiles._settle

            def late(files: LocalFiles, at: int, staging: str, folder: str, content: dict[str, bytes]) -> None:
                shutil.rmtree(path / folder)
                settle(files, at, staging, folder, content)

            monkeypatch.setattr(LocalFiles, "_settle", late)
            assert writer.commit(SHARDS[0]) == commit
            writer.finalize()
        assert len(cache_bits(path)) == 3 and verify(path).is_intact

    def test_a_writer_that_starts_while_another_makes_the_cache_joins_it(
        self, path: Path, store: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Between its looking for a manifest and at the folder, the other one makes both."""
        names = LocalFiles.names

        def late(files: LocalFiles, folder: str) -> list[str]:
            monkeypatch.undo()
            write_cache(path, store, SHARDS[:1])
            return names(files, folder)

        monkeypatch.setattr(LocalFiles, "names", late)
        write_cache(path, store, SHARDS[1:])
        assert by_tokens(list(LogitCache.open(path).samples())) == by_tokens(flat(SHARDS))

    @pytest.mark.parametrize("num_writers", [2, 8])
    def test_threads_that_commit_the_same_units_end_with_one_cache(
        self, tmp_path: Path, store: str, num_writers: int
    ) -> None:
        write_all(tmp_path / "alone", store, range(6))
        orders = np.random.default_rng(num_writers)
        with ThreadPoolExecutor(num_writers) as pool:
            jobs = [
                pool.submit(write_all, tmp_path / "cache", store, orders.permutation(6).tolist())
                for _ in range(num_writers)
            ]
        for job in jobs:
            job.result()
        assert lasting(tmp_path / "cache") == lasting(tmp_path / "alone")
        assert verify(tmp_path / "cache").is_intact

    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
    def test_processes_that_commit_the_same_units_end_with_one_cache(self, tmp_path: Path, store: str) -> None:
        write_all(tmp_path / "alone", store, range(6))
        orders = [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [3, 0, 5, 1, 4, 2]]
        in_processes("fork", write_all, [(tmp_path / "cache", store, order) for order in orders])
        assert lasting(tmp_path / "cache") == lasting(tmp_path / "alone")
