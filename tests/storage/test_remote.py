"""The core of what a cache promises, on a local disk, in memory:// and on an S3 server."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from support.storage_samples import (
    SHARDS,
    by_tokens,
    cache_bits,
    captures,
    every_position,
    flat,
    in_processes,
    lasting,
    make_groups,
    make_manifest,
    make_sample,
    make_shards,
    record_bits,
    refused,
    sample_bits,
    tree,
    unit_of,
    within,
    write_cache,
)

from logitcache.storage import (
    CachedSample,
    CacheError,
    CacheWriter,
    CorruptCache,
    IdentityMismatch,
    IncompleteCache,
    LogitCache,
    NotACache,
    SampleNotCached,
    convert,
    export_parquet,
    merge,
    repair,
    verify,
)
from logitcache.storage.files import open_files

pytest_plugins = ["support.storage_fixtures"]
pytestmark = [
    pytest.mark.usefixtures("no_fsync"),
    # the S3 server and its clients, not this project
    pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]

light = pytest.mark.parametrize(
    ("url", "store"),
    [("local", "arrow"), ("memory", "zarr"), ("memory", "arrow"), ("s3", "arrow")],
    indirect=True,
)
"""Without Zarr on S3: a shard of it is 27 objects, and the server of these tests takes its time."""


def put(url: str, name: str, data: bytes | None) -> None:
    """Write a file behind the cache's back, or remove it."""
    fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    if data is None:
        fs.rm(f"{path}/{name}")
    else:
        fs.makedirs(f"{path}/{name}".rsplit("/", 1)[0], exist_ok=True)
        fs.pipe_file(f"{path}/{name}", data)


def root(url: str) -> Path | str:
    return url if "://" in url else Path(url)


# --- files ------------------------------------------------------------------------------------------------------------


def test_of_two_creators_of_a_file_the_first_wins(url: str) -> None:
    first, second = open_files(url), open_files(url)
    assert first.names("") == [] and not first.exists("a.json")
    first.publish("folder", {"file": b""})
    assert first.create("a.json", b"first")
    assert not second.create("a.json", b"second")
    assert not first.create("a.json", b"first")
    assert second.read("a.json") == b"first"
    assert tree(root(url)) == {"a.json": b"first", "folder/file": b""}
    second.remove("a.json")
    assert second.create("a.json", b"second") and first.read("a.json") == b"second"
    first.replace("a.json", b"third")
    assert second.read("a.json") == b"third" and first.names("") == ["a.json", "folder"]
    second.remove("a.json")
    assert not first.exists("a.json")
    with pytest.raises(FileNotFoundError):
        first.read("a.json")


@pytest.mark.parametrize("limit", [None, 1, 3, 5, 6, 100])
def test_reads_are_bounded(url: str, limit: int | None) -> None:
    files = open_files(url)
    files.publish("folder", {"a/b": b"12345", "empty": b""})
    assert files.read("folder/a/b", limit) == b"12345"[: None if limit is None else limit + 1]
    assert files.read("folder/empty", limit) == b""
    assert files.read_spans("folder/a/b", [(0, 2), (3, 2), (1, 1)]) == [b"12", b"45", b"2"]
    assert files.read_spans("folder/a/b", [(3, 9), (5, 2), (100, 2)]) == [b"45", b"", b""]
    assert files.names("folder") == ["a", "empty"] and files.names("none") == []
    for name in ("folder/none", "none/b"):
        with pytest.raises(FileNotFoundError):
            files.read(name, limit)
        with pytest.raises(FileNotFoundError):
            files.read_spans(name, [(0, 2), (3, 2)])


# --- round trip and lookup --------------------------------------------------------------------------------------------


def test_round_trip(url: str, store: str) -> None:
    rng = np.random.default_rng(40)
    shards = [[every_position(rng, n) for n in shard] for shard in ([30, 600], [2, 258])]
    cache = LogitCache.open(write_cache(url, store, shards))
    assert cache.path == url and cache.manifest == make_manifest(store)
    assert by_tokens(list(cache.samples())) == by_tokens(flat(shards))
    for sample in flat(shards):
        assert record_bits(cache.lookup(sample.token_ids)) == record_bits(sample.logprobs)
        rows = np.array([0, len(sample.logprobs) - 1][: len(sample.logprobs)])
        found = cache.lookup(sample.token_ids, sample.logprobs.positions[rows])
        assert record_bits(found) == record_bits(sample.logprobs.take(rows))
        inside = sample.logprobs.take(slice(0, len(sample.token_ids) - 2))
        assert record_bits(cache.lookup(sample.token_ids[:-1])) == record_bits(inside)
    tokens = [sample.token_ids for sample in flat(shards)]
    assert list(map(record_bits, cache.lookup_batch(tokens))) == [record_bits(s.logprobs) for s in flat(shards)]
    refused(SampleNotCached, "sample-not-cached", lambda: cache.lookup(tokens[0][::-1]))
    report = verify(url)
    assert report.is_intact and report.num_samples == 4
    assert record_bits(pickle.loads(pickle.dumps(cache)).lookup(tokens[0])) == record_bits(flat(shards)[0].logprobs)


@light
@pytest.mark.parametrize("precision", ["exact", "compact"])
def test_tail_groups(url: str, store: str, precision: str) -> None:
    rng = np.random.default_rng(41)
    groups = make_groups(rng, 40, 5)
    sample = every_position(rng, 30, token_groups=groups)
    manifest = make_manifest(store, token_groups=groups, precision=precision)
    cache = LogitCache.open(write_cache(url, store, [[sample]], manifest, groups))
    within(cache.lookup(sample.token_ids), sample.logprobs, {"exact": 0, "compact": 1 / 32}[precision])
    found = cache.token_groups()
    assert found is not None and np.array_equal(found, groups)


@light
@pytest.mark.parametrize("precision", ["exact", "compact"])
def test_draws(url: str, store: str, precision: str) -> None:
    sample = every_position(np.random.default_rng(41), 300, num_draws=9)
    manifest = make_manifest(store, precision=precision, num_draws=9)
    cache = LogitCache.open(write_cache(url, store, [[sample]], manifest))
    within(cache.lookup(sample.token_ids), sample.logprobs, {"exact": 0, "compact": 1 / 32}[precision])
    assert verify(url).is_intact


def test_every_place_holds_the_same_bytes(url: str, store: str, tmp_path: Path) -> None:
    here = write_cache(tmp_path / "here", store, SHARDS)
    write_cache(url, store, SHARDS)
    assert lasting(root(url)) == lasting(here)


@light
def test_captures_are_united(url: str, store: str) -> None:
    whole = every_position(np.random.default_rng(42), 25)
    first, second = captures(whole, [[1, 4, 9], [0, 4, 20]])
    cache = LogitCache.open(write_cache(url, store, [[first, *SHARDS[0]], [second]]))
    assert len(cache) == 4
    expected = whole.logprobs.take(np.array([0, 1, 4, 9, 20]))
    assert record_bits(cache.lookup(whole.token_ids)) == record_bits(expected)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize(("url", "store"), [("s3", "arrow")], indirect=True)
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_a_cache_on_an_object_store(url: str, store: str, method: str) -> None:
    cache = LogitCache.open(write_cache(url, store, SHARDS))
    here = [sample_bits(sample) for sample in cache.samples()]
    assert in_processes(method, bits_of, [(cache,)]) == [here]


def bits_of(cache: LogitCache) -> list[tuple[object, ...]]:
    return [sample_bits(sample) for sample in cache.samples()]


# --- commit, resume, finalize -----------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_to_the_same_bytes(url: str, store: str, tmp_path: Path) -> None:
    undisturbed = write_cache(tmp_path / "undisturbed", store, SHARDS)
    refused(NotACache, "not-a-cache", lambda: LogitCache.open(url))
    with CacheWriter(url, make_manifest(store)) as writer:
        assert "after 0 committed" in refused(IncompleteCache, "incomplete", lambda: LogitCache.open(url))
        writer.commit(SHARDS[0])
    assert "after 1 committed" in refused(IncompleteCache, "incomplete", lambda: LogitCache.open(url))
    with CacheWriter(url, make_manifest(store)) as writer:
        assert len(writer.captured()) == 3
        before = tree(root(url))
        writer.commit(SHARDS[0])
        assert tree(root(url)) == before
        writer.commit(SHARDS[1])
        writer.finalize()
        assert writer.is_final
    assert lasting(root(url)) == lasting(undisturbed)


@light
def test_a_finished_cache_grows(url: str, store: str) -> None:
    before = cache_bits(write_cache(url, store, SHARDS))
    reader = LogitCache.open(url)
    more = make_shards(43, [[21, 60]])[0]
    with CacheWriter(url, make_manifest(store)) as writer:
        writer.commit(more)
        assert cache_bits(url) == before and not writer.is_final
        writer.finalize()
    assert by_tokens(list(LogitCache.open(url).samples())) == by_tokens(flat([*SHARDS, more]))
    assert by_tokens(list(reader.samples())) == by_tokens(flat(SHARDS))
    names = tree(root(url))
    assert sum(name.startswith("index-") for name in names) == 2  # the older one stays until a repair


@light
def test_another_identity_is_refused_and_nothing_changes(url: str, store: str) -> None:
    write_cache(url, store, SHARDS)
    before = lasting(root(url))
    for other in (make_manifest(store, top_k=6), make_manifest(store, precision="fine")):
        refused(IdentityMismatch, "identity-mismatch", lambda o=other: CacheWriter(url, o))  # type: ignore[misc]
    assert lasting(root(url)) == before


@light
def test_other_files_are_no_cache(url: str, store: str) -> None:
    put(url, "notes.txt", b"mine")
    refused(NotACache, "not-a-cache", lambda: LogitCache.open(url))
    refused(NotACache, "not-a-cache", lambda: CacheWriter(url, make_manifest(store)))
    assert tree(url) == {"notes.txt": b"mine"}


def other_record(sample: CachedSample) -> CachedSample:
    """The sample with other numbers at the same positions: the same unit in other bytes."""
    positions = sample.logprobs.positions.tolist()
    other = make_sample(np.random.default_rng(44), 0, token_ids=sample.token_ids, positions=positions)
    return replace(sample, logprobs=other.logprobs)


def test_a_writer_whose_unit_another_committed_takes_the_winner_and_leaves_nothing(
    url: str, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, theirs = SHARDS[0][0], other_record(SHARDS[0][0])
    with CacheWriter(url, make_manifest(store)) as first, CacheWriter(url, make_manifest(store)) as second:
        publish, won = first._files.publish, []

        def late(folder: str, files: dict[str, bytes]) -> None:
            publish(folder, files)
            won.append(second.commit([theirs]))

        monkeypatch.setattr(first._files, "publish", late)
        assert first.commit([mine]) == won[0]
        first.finalize()
    assert cache_bits(url) == [sample_bits(theirs)]
    names = {name.split("/")[1] for name in tree(root(url)) if name.startswith("shards/")}
    assert names == {f"{won[0].unit}.json", won[0].folder}
    assert verify(url).is_intact


@light
def test_two_writers_of_the_same_bytes_meet(url: str, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with CacheWriter(url, make_manifest(store)) as first, CacheWriter(url, make_manifest(store)) as second:
        publish = first._files.publish

        def late(folder: str, files: dict[str, bytes]) -> None:
            second.commit(SHARDS[0])
            publish(folder, files)

        monkeypatch.setattr(first._files, "publish", late)
        first.commit(SHARDS[0])
        first.finalize()
    assert by_tokens(list(LogitCache.open(url).samples())) == by_tokens(SHARDS[0])
    assert verify(url).is_intact


def write_part(url: str, store: str, order: list[int]) -> None:
    with CacheWriter(url, make_manifest(store)) as writer:
        for i in order:
            writer.commit(SHARDS[i])
        writer.finalize()


@pytest.mark.parametrize(("url", "store"), [("s3", "arrow")], indirect=True)
def test_writers_at_once_end_with_one_cache(url: str, store: str) -> None:
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(write_part, url, store, order) for order in ([0, 1], [1, 0], [0, 1])]
    for job in jobs:
        job.result()
    assert by_tokens(list(LogitCache.open(url).samples())) == by_tokens(flat(SHARDS))
    assert verify(url).is_intact


def between(call: Callable[..., Any], then: Callable[[], None]) -> Callable[..., Any]:
    """The function, with something happening once before it."""
    once = [then]

    def wrapped(*args: Any) -> Any:
        while once:
            once.pop()()
        return call(*args)

    return wrapped


@light
def test_a_writer_that_finishes_does_not_remove_what_another_has_finished(
    url: str, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the index of the first and its contents, the second commits and finishes."""
    with CacheWriter(url, make_manifest(store)) as first, CacheWriter(url, make_manifest(store)) as second:
        first.commit(SHARDS[0])
        replace, grown = first._files.replace, []

        def late(name: str, data: bytes) -> None:
            if name == "contents.json" and not grown:
                grown.append(name)
                second.commit(SHARDS[1])
                second.finalize()
            replace(name, data)

        monkeypatch.setattr(first._files, "replace", late)
        first.finalize()
        assert grown
    assert by_tokens(list(LogitCache.open(url).samples())) == by_tokens(flat(SHARDS))


@light
def test_a_cache_can_be_opened_while_it_grows(url: str, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between reading the contents and the index that they name, a writer replaces both."""
    write_cache(url, store, SHARDS[:1])
    files = type(open_files(url))
    read = files.read

    def late(self: Any, name: str, limit: int | None = None) -> bytes:
        if name.startswith("index-"):
            monkeypatch.undo()
            write_cache(url, store, SHARDS[1:])
        return read(self, name, limit)

    monkeypatch.setattr(files, "read", late)
    assert len(LogitCache.open(url)) in (3, 5)


# --- damage -----------------------------------------------------------------------------------------------------------


ABSENT: tuple[type[CacheError], str] = (IncompleteCache, "incomplete")
CORRUPT: tuple[type[CacheError], str] = (CorruptCache, "corrupt")


@light
@pytest.mark.parametrize("damage", ["missing", "short", "empty", "altered"])
def test_every_damaged_file_is_refused_and_can_be_repaired(url: str, store: str, damage: str) -> None:
    """test_storage_faults damages every byte of a local cache; here what a store answers for each kind of damage."""
    write_cache(url, store, SHARDS)
    before, expected = lasting(root(url)), cache_bits(url)
    first = unit_of(SHARDS[0], store)
    data_files = [name for name in before if name.startswith(f"shards/{first}-")]
    largest = sorted(data_files, key=lambda name: len(before[name]))[-2:]
    index = next(name for name in before if name.startswith("index-"))
    for name in ("contents.json", index, f"shards/{first}.json", *largest):
        data, half = before[name], len(before[name]) // 2
        altered = data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :]
        put(url, name, {"short": data[:half], "empty": b"", "altered": altered}.get(damage))
        if name == "contents.json":
            error, reason = ABSENT if damage == "missing" else CORRUPT
            refused(error, reason, lambda: verify(url))
        else:
            assert not verify(url).is_intact, name
        if name.endswith("zarr.json"):
            assert cache_bits(url) == expected  # lookups do without it
        elif name != "contents.json":
            refused(*CORRUPT, lambda: cache_bits(url))
        report = repair(url)
        lost = not name.startswith("shards/") or (name.count("/") == 1 and damage == "missing")  # no record, no shard
        assert report.is_incomplete and report.dropped == (() if lost else (first,))
        refused(*ABSENT, lambda: LogitCache.open(url))
        write_cache(url, store, SHARDS)
        assert lasting(root(url)) == before, name


@light
def test_a_damaged_manifest_is_refused(url: str, store: str) -> None:
    write_cache(url, store, SHARDS)
    for data in (b"", b"{}", b"x" * 70):
        put(url, "manifest.json", data)
        for call in (LogitCache.open, verify, repair):
            refused(CorruptCache, "corrupt", lambda c=call: c(url))  # type: ignore[misc]
    put(url, "manifest.json", None)
    refused(NotACache, "not-a-cache", lambda: LogitCache.open(url))


@light
def test_repair_leaves_a_whole_cache_as_it_is(url: str, store: str) -> None:
    write_cache(url, store, SHARDS)
    before = lasting(root(url))
    assert repair(url).dropped == () and not repair(url).is_incomplete
    assert lasting(root(url)) == before


# --- between places ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("url", "store"), [("memory", "zarr"), ("s3", "arrow")], indirect=True)
def test_caches_go_from_place_to_place(url: str, store: str, tmp_path: Path) -> None:
    here = write_cache(tmp_path / "here", store, SHARDS[:1])
    write_cache(f"{url}/a", store, SHARDS[1:])
    merged = merge([here, f"{url}/a"], f"{url}/b")
    assert by_tokens(list(merged.samples())) == by_tokens(flat(SHARDS))
    back = convert(f"{url}/b", tmp_path / "back")
    assert lasting(tmp_path / "back") == lasting(f"{url}/b")
    assert export_parquet(f"{url}/b", tmp_path / "all.parquet") == len(back)


def test_an_unknown_protocol_is_told_at_once() -> None:
    for call in (LogitCache.open, verify, repair):
        message = refused(NotACache, "not-a-cache", lambda c=call: c("nonsense://bucket/cache"))  # type: ignore[misc]
        assert "nonsense" in message
