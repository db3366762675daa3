"""Data sets of a cache: runs and positions, names, what each verb of storage does with them, and every refusal.

The oracle of runs is a dict of positions.
"""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.storage_samples import SHARDS, flat, make_manifest, tree, write_cache

from logitcache.storage import (
    AmbiguousData,
    CachedSample,
    CacheWriter,
    CorruptCache,
    DataSet,
    IdentityMismatch,
    IncompleteCache,
    InvalidRecord,
    LogitCache,
    convert,
    data_samples,
    merge,
    prune,
    repair,
    sample_id,
    verify,
)
from logitcache.storage.data_sets import (
    DTYPE,
    joined,
    kept_apart,
    known_data_sets,
    name_of,
    packed_runs,
    positions_of,
    read_data_set,
    record_name,
    runs_of,
)
from logitcache.storage.files import open_files
from logitcache.storage.inventory import take_inventory
from logitcache.storage.manifest import Contents, DataSetEntry, read_json, to_bytes

Counted = dict[int, bool]
SAMPLES = flat(SHARDS)

counted = st.dictionaries(st.integers(0, 12), st.booleans(), min_size=1, max_size=8)
parts = st.lists(st.dictionaries(st.integers(0, 4), counted, max_size=3), max_size=4)


def key_of(number: int) -> bytes:
    return sample_id(np.array([number], dtype=np.uint32))


def runs(samples: dict[bytes, Counted]) -> Any:
    at = [np.array(sorted(counts), dtype=np.int32) for counts in samples.values()]
    counts = [np.array([found[p] for p in sorted(found)]) for found in samples.values()]
    return runs_of(list(samples), at, counts)


def plain(data_set: DataSet) -> dict[bytes, Counted]:
    return {key: dict(zip(*map(list, positions_of(part)), strict=True)) for key, part in data_set.samples()}


def data_set(name: str, *samples: CachedSample, positions: list[int] | None = None) -> DataSet:
    """Of these samples, at all of their positions or at these."""
    at = [s.logprobs.positions if positions is None else np.array(positions) for s in samples]
    return joined(name, [runs_of([sample_id(s.token_ids) for s in samples], at)])


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache of five samples with two data sets, which share a sample; one of the samples is in neither."""
    path = write_cache(tmp_path / "cache", "arrow", SHARDS)
    with CacheWriter(path, LogitCache.open(path).manifest) as writer:
        writer.finalize([data_set("b", *SAMPLES[1:3]), data_set("a", *SAMPLES[2:4])])
    return path


def finalize(path: Path, *data_sets: DataSet) -> None:
    with CacheWriter(path, LogitCache.open(path).manifest) as writer:
        writer.finalize(data_sets)


def learnt(path: Path) -> dict[bytes, list[int]]:
    found = data_samples(LogitCache.open(path)).samples
    return {sample_id(s.token_ids): s.positions.tolist() for s in found}


def whole(*samples: CachedSample) -> dict[bytes, list[int]]:
    return {sample_id(s.token_ids): s.logprobs.positions.tolist() for s in samples}


@given(parts)
@settings(max_examples=200, deadline=None)
def test_joined_is_the_union(found: list[dict[int, Counted]]) -> None:
    """In any parts; cross-entropy counts where it does in some part. Its bytes do not depend on the parts' order."""
    expected: dict[bytes, Counted] = {}
    for part in found:
        for number, counts in part.items():
            union = expected.setdefault(key_of(number), {})
            union.update({p: counted or union.get(p, False) for p, counted in counts.items()})
    arrays = [runs({key_of(n): counts for n, counts in part.items()}) for part in found]
    made = joined("n", arrays)
    assert plain(made) == expected
    assert [key for key, _ in made.samples()] == sorted(expected)
    assert packed_runs(made.runs) == packed_runs(joined("n", arrays[::-1]).runs)
    assert (made.num_samples, made.num_positions) == (len(expected), sum(map(len, expected.values())))


@pytest.mark.parametrize(
    ("given_name", "kept"),
    [
        ("train.jsonl", "train.jsonl"),
        ("owner/name", "owner/name"),
        ("s3://key:se/cr?et@bucket/a.jsonl", "s3://***@bucket/a.jsonl"),
        ("s3://key:secret@bucket/a.jsonl", "s3://***@bucket/a.jsonl"),
        ("s3://key:se?cr#et@bucket/a.jsonl", "s3://***@bucket/a.jsonl"),
        ("https://host/a.jsonl?X-Amz-Signature=abc", "https://host/a.jsonl?***"),
        ("simplecache::s3://u:p@b/a.jsonl?x=1", "simplecache::s3://***@b/a.jsonl?***"),
        ("what?.jsonl", "what?.jsonl"),
    ],
)
def test_a_name_is_what_was_given_without_secrets(given_name: str, kept: str) -> None:
    assert name_of(given_name) == kept


@pytest.mark.parametrize("text", ["", "a\x1b[31m\rb", "x" * 500, "\udc80", "‮live"])
def test_a_name_is_printable_short_and_its_own(text: str) -> None:
    name = name_of(text)
    assert name.isprintable() and 1 <= len(name) <= 200
    assert name != name_of(text + "y") and name == name_of(text)


def test_the_union_is_learnt_and_the_rest_is_told(cache: Path) -> None:
    found = data_samples(LogitCache.open(cache))
    assert learnt(cache) == whole(*SAMPLES[1:4])
    assert [entry.name for entry in found.data_sets] == ["a", "b"]
    others = [SAMPLES[0], SAMPLES[4]]
    assert (found.num_other_samples, found.num_other_positions) == (2, sum(len(s.logprobs) for s in others))
    order = [sample_id(s.token_ids) for s in LogitCache.open(cache).stored_samples()]
    assert list(learnt(cache)) == [key for key in order if key in learnt(cache)]


def test_the_same_name_again_replaces(cache: Path) -> None:
    finalize(cache, data_set("b", SAMPLES[0], positions=[0, 1]))
    assert learnt(cache) == {**whole(*SAMPLES[2:4]), sample_id(SAMPLES[0].token_ids): [0, 1]}
    found = data_samples(LogitCache.open(cache))
    expected = sum(len(s.logprobs) for s in (SAMPLES[0], SAMPLES[1], SAMPLES[4])) - 2
    assert (found.num_other_samples, found.num_other_positions) == (2, expected)
    assert verify(cache).is_intact
    assert len(list(cache.glob("data-*.npy"))) == 3 and len(list(cache.glob("data-*.json"))) == 2  # the older one stays
    assert [name for name in repair(cache).leftovers if name.startswith("data-")] != []
    assert len(list(cache.glob("data-*.npy"))) == 2 and verify(cache).is_intact


def test_a_cache_without_data_sets_is_learnt_whole(tmp_path: Path) -> None:
    path = write_cache(tmp_path / "c", "zarr", SHARDS)
    assert learnt(path) == whole(*SAMPLES)
    assert data_samples(LogitCache.open(path)).data_sets == ()


def test_two_ways_to_supervise_one_sample_are_refused(cache: Path) -> None:
    finalize(cache, data_set("c", SAMPLES[3], positions=[0]))
    with pytest.raises(AmbiguousData, match=r"'a'.*'c'.*--data"):
        data_samples(LogitCache.open(cache))
    counts = [np.zeros(len(SAMPLES[3].logprobs), dtype=np.bool_)]
    without_ce = runs_of([sample_id(SAMPLES[3].token_ids)], [SAMPLES[3].logprobs.positions], counts)
    finalize(cache, DataSet("c", without_ce))
    with pytest.raises(AmbiguousData):
        data_samples(LogitCache.open(cache))


@pytest.mark.parametrize("missing", ["sample", "position"])
def test_what_the_cache_lacks_is_an_error(cache: Path, missing: str) -> None:
    lacking = joined("c", [runs_of([key_of(7)], [np.array([0])])])
    if missing == "position":
        lacking = data_set("c", SAMPLES[4], positions=[0, 1, len(SAMPLES[4].token_ids) - 1])
    finalize(cache, lacking)
    with pytest.raises(IncompleteCache, match="of 'c' the cache lacks"):
        data_samples(LogitCache.open(cache))


def test_prune_takes_samples_out_of_data_sets(cache: Path) -> None:
    stays = {sample_id(s.token_ids) for s in (SAMPLES[3], SAMPLES[4])}
    prune(cache, stays)
    assert [entry.name for entry in LogitCache.open(cache).data_sets] == ["a"]
    assert learnt(cache) == whole(SAMPLES[3])
    assert verify(cache).is_intact and len(list(cache.glob("data-*"))) == 2
    finalize(cache)
    assert learnt(cache) == whole(SAMPLES[3])


def test_a_prune_that_is_refused_leaves_the_data_sets(cache: Path) -> None:
    """A row of what stays cannot be read: what the next writer lists is what was there."""
    (shard, *_) = [s for s in LogitCache.open(cache).shards() if s.commit.num_samples == 3]
    (path,) = cache.glob(f"shards/{shard.commit.folder}/logprobs.arrow")
    path.write_bytes(path.read_bytes()[:600] + bytes(200) + path.read_bytes()[800:])
    before = known_data_sets(open_files(cache))
    with pytest.raises(CorruptCache):
        prune(cache, {sample_id(SAMPLES[1].token_ids), sample_id(SAMPLES[0].token_ids)})
    assert known_data_sets(open_files(cache)) == before == LogitCache.open(cache).data_sets


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_prune_that_leaves_no_data_set_is_refused(cache: Path, dry_run: bool) -> None:
    """Before, the cache was learnt whole then: what no data set had, and prompts where all positions are captured."""
    before = tree(cache)
    with pytest.raises(IdentityMismatch, match="none of its 2 data sets has a sample that stays"):
        prune(cache, {sample_id(SAMPLES[0].token_ids)}, dry_run)
    assert {name: data for name, data in tree(cache).items() if name != "writer.lock"} == {
        name: data for name, data in before.items() if name != "writer.lock"
    }
    finalize(cache, data_set("c", SAMPLES[0]))
    prune(cache, {sample_id(SAMPLES[0].token_ids)})
    assert learnt(cache) == whole(SAMPLES[0])


def test_prune_of_data_sets_alone(cache: Path) -> None:
    """They name a sample that the cache does not hold, and nothing of the shards goes."""
    finalize(cache, joined("c", [runs_of([key_of(7)], [np.array([0])])]))
    prune(cache, {sample_id(s.token_ids) for s in SAMPLES})
    assert [entry.name for entry in LogitCache.open(cache).data_sets] == ["a", "b"]
    assert learnt(cache) == whole(*SAMPLES[1:4])


def test_convert_carries_data_sets(cache: Path, tmp_path: Path) -> None:
    convert(cache, tmp_path / "z", "zarr", "compact")
    assert LogitCache.open(tmp_path / "z").data_sets == LogitCache.open(cache).data_sets
    assert learnt(tmp_path / "z") == learnt(cache)


def test_merge_keeps_all(cache: Path, tmp_path: Path) -> None:
    """Two of one name that differ are both kept, one that is the same is there once; again changes nothing."""
    other = write_cache(tmp_path / "other", "arrow", [SHARDS[1]])
    finalize(other, data_set("a", SAMPLES[4]), data_set("b", SAMPLES[4]), data_set("b (2)", SAMPLES[3]))
    for _ in range(2):
        merge([cache, other, other], tmp_path / "all")
        entries = LogitCache.open(tmp_path / "all").data_sets
        assert [entry.name for entry in entries] == ["a", "a (2)", "b", "b (2)", "b (2) (2)"]
    assert learnt(tmp_path / "all") == whole(*SAMPLES[1:])
    merge([other], cache)
    assert [entry.name for entry in LogitCache.open(cache).data_sets] == [entry.name for entry in entries]


def test_names_that_are_kept_apart_stay_short() -> None:
    made = kept_apart([data_set("x" * 200, SAMPLES[i]) for i in range(3)])
    assert len({d.name for d in made}) == 3 and all(len(d.name) <= 200 for d in made)


def test_an_inventory_has_the_data_sets_under_other_names(cache: Path, tmp_path: Path) -> None:
    """What is copied by it is a whole cache."""
    inventory = take_inventory(cache)
    copy = tmp_path / "copy"
    heads = inventory.heads("base", {"a": "z", "b": "b"})
    for name in inventory.sizes:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((cache / name).read_bytes())
    for name, data in heads.items():
        (copy / name).write_bytes(data)
    assert verify(copy).is_intact
    assert [entry.name for entry in LogitCache.open(copy).data_sets] == ["b", "z"]
    assert learnt(copy) == learnt(cache)
    assert {p.name for p in copy.glob("data-*.json")} == {record_name("z"), record_name("b")}


def test_writers_that_finalise_at_once_list_all(tmp_path: Path) -> None:
    path = write_cache(tmp_path / "c", "arrow", SHARDS)
    wait = threading.Barrier(4)

    def one(number: int) -> None:
        wait.wait()
        finalize(path, data_set(f"d{number}", SAMPLES[number]))

    threads = [threading.Thread(target=one, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [entry.name for entry in LogitCache.open(path).data_sets] == ["d0", "d1", "d2", "d3"]


def test_a_writer_knows_what_is_listed(cache: Path) -> None:
    mine = data_set("a", *SAMPLES[2:4])
    with CacheWriter(cache, LogitCache.open(cache).manifest) as writer:
        assert writer.is_final and writer.holds(mine)
        assert not writer.holds(data_set("a", SAMPLES[2])) and not writer.holds(data_set("c", SAMPLES[2]))
        (cache / record_name("b")).unlink()
        assert not writer.is_final and not writer.holds(mine)


def test_more_data_sets_than_readers_take_are_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logitcache.storage.writer.MAX_DATA_SETS", 2)
    before = tree(cache)
    with pytest.raises(InvalidRecord, match="at most 2 data sets"):
        finalize(cache, data_set("c", SAMPLES[0]))
    assert tree(cache) == before
    finalize(cache, data_set("b", SAMPLES[0]))  # which a record of the third would forbid for good
    assert learnt(cache) == whole(SAMPLES[0], *SAMPLES[2:4])


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def test_every_flipped_bit_of_a_data_set_is_found(cache: Path) -> None:
    """None gives other samples or positions."""
    entry = LogitCache.open(cache).data_sets[0]
    path = cache / entry.file.name
    pristine = path.read_bytes()
    for at in range(len(pristine)):
        flip(path, at)
        with pytest.raises(CorruptCache):
            learnt(cache)
        assert [p.what for p in verify(cache).problems if entry.file.name in p.what]
        path.write_bytes(pristine)


@pytest.mark.parametrize("change", ["truncate", "grow", "remove"])
def test_a_file_that_was_changed_is_found_and_repaired(cache: Path, change: str) -> None:
    """The data set is dropped, the other one stays, and the cache is unfinished until it is written again."""
    entry = LogitCache.open(cache).data_sets[0]
    path = cache / entry.file.name
    if change == "remove":
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes(data[:-1] if change == "truncate" else data + b"x")
    assert verify(cache).is_corrupt
    report = repair(cache)
    assert report.is_incomplete and report.num_data_sets_dropped == 1 and report.data_sets == ("b",)
    with pytest.raises(IncompleteCache):
        LogitCache.open(cache)
    with CacheWriter(cache, make_manifest("arrow")) as writer:
        writer.finalize([data_set("a", *SAMPLES[2:4])])
    assert verify(cache).is_intact and learnt(cache) == whole(*SAMPLES[1:4])


@pytest.mark.parametrize("change", [Path.unlink, lambda path: flip(path, 20)])
def test_a_lost_record_is_written_again(cache: Path, change: Callable[[Path], None]) -> None:
    change(cache / record_name("b"))
    assert verify(cache).is_corrupt
    report = repair(cache)
    assert not report.is_incomplete and report.num_records_restored == 1
    assert verify(cache).is_intact and learnt(cache) == whole(*SAMPLES[1:4])


def test_data_sets_outlive_lost_contents(cache: Path) -> None:
    """And a shard that is dropped is missed by those that have samples of it."""
    (cache / "contents.json").unlink()
    flip(next(cache.glob("shards/*/samples.arrow")), 400)
    report = repair(cache)
    assert len(report.dropped) == 1 and report.data_sets == ("a", "b")
    with CacheWriter(cache, make_manifest("arrow")) as writer:
        writer.finalize()
    with pytest.raises(IncompleteCache, match="the cache lacks"):
        learnt(cache)


ENTRY = DataSetEntry("a", data_set("a", *SAMPLES[2:4]).packed()[0].file, 2, 2, 40)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""},
        {"name": "a\x1b[2J"},
        {"name": "a\nb"},
        {"name": "x" * 201},
        {"num_samples": 0},
        {"num_runs": 1},
        {"num_positions": 1},
        {"num_positions": 2**40},
        {"file": replace(ENTRY.file, name="../x.npy")},
        {"file": replace(ENTRY.file, name="data-" + "0" * 32 + ".npy")},
        {"file": replace(ENTRY.file, size=-1)},
    ],
)
def test_an_entry_out_of_bounds_is_refused(cache: Path, changes: dict[str, Any]) -> None:
    files = open_files(cache)
    contents = read_json(Contents, files, "contents.json")
    (cache / "contents.json").write_bytes(to_bytes(replace(contents, data_sets=(replace(ENTRY, **changes),))))
    with pytest.raises(CorruptCache):
        LogitCache.open(cache)
    (cache / record_name("a")).write_bytes(to_bytes(replace(ENTRY, **changes)))
    with pytest.raises(CorruptCache):
        known_data_sets(files)


@pytest.mark.parametrize("names", [("b", "a"), ("a", "a")])
def test_entries_out_of_order_are_refused(cache: Path, names: tuple[str, str]) -> None:
    contents = read_json(Contents, open_files(cache), "contents.json")
    entries = tuple(replace(ENTRY, name=name) for name in names)
    (cache / "contents.json").write_bytes(to_bytes(replace(contents, data_sets=entries)))
    with pytest.raises(CorruptCache):
        LogitCache.open(cache)


@pytest.mark.parametrize("fault", ["order", "overlap", "adjacent", "empty", "flag", "far", "counts", "size"])
def test_runs_that_no_writer_made_are_refused(cache: Path, fault: str) -> None:
    """With right checksums: forged."""
    rows = np.zeros(3, dtype=DTYPE)
    rows["sample_id"] = np.frombuffer(key_of(1) * 3, dtype="<u8").reshape(3, 2)
    rows["first"], rows["num_positions"], rows["cross_entropy"] = [0, 5, 9], [2, 2, 2], 1
    entry = replace(DataSet("a", rows).packed()[0])
    if fault == "order":
        rows = rows[[1, 0, 2]]
    elif fault == "overlap":
        rows["first"][1] = 1
    elif fault == "adjacent":
        rows["first"][1] = 2
    elif fault == "empty":
        rows["num_positions"][1] = 0
    elif fault == "flag":
        rows["cross_entropy"][1] = 2
    elif fault == "far":
        rows["first"][2] = 2**31 - 2
    forged, data = DataSet("a", rows).packed()
    entry = replace(entry, file=forged.file)
    if fault == "counts":
        entry = replace(entry, num_positions=7)
    if fault == "size":
        entry = replace(entry, num_runs=2**31)
    (cache / entry.file.name).write_bytes(data)
    with pytest.raises(CorruptCache):
        read_data_set(open_files(cache), entry)
