"""Lookup by tokens: exact, by prefix, of positions, in batches, over several captures, in other processes."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.storage_samples import (
    NO_TOKEN,
    SHARDS,
    TOP_K,
    VOCAB,
    captures,
    every_position,
    flat,
    in_processes,
    make_manifest,
    make_sample,
    record_bits,
    refused,
    sample_bits,
    unit_of,
    write_cache,
)

from logitcache.storage import (
    CachedSample,
    CacheError,
    CacheWriter,
    LogitCache,
    PositionNotCaptured,
    SampleNotCached,
    sample_id,
)

pytest_plugins = ["support.storage_fixtures"]
pytestmark = pytest.mark.usefixtures("no_fsync")

# --- by tokens --------------------------------------------------------------------------------------------------------


def test_membership(written: Path) -> None:
    cache = LogitCache.open(written)
    for sample in flat(SHARDS):
        changed = sample.token_ids.copy()
        changed[-1] = (changed[-1] + 1) % VOCAB
        assert sample.token_ids in cache
        assert changed not in cache
        assert np.append(sample.token_ids, 0) not in cache


@pytest.mark.parametrize("dtype", [np.uint32, np.int32, np.int64, np.uint64, np.uint8])
def test_lookup_takes_tokens_of_any_integer_type(written: Path, dtype: type[np.integer[Any]]) -> None:
    sample = SHARDS[0][0]
    found = LogitCache.open(written).lookup(sample.token_ids.astype(dtype))
    assert record_bits(found) == record_bits(sample.logprobs)


@pytest.mark.parametrize(
    "tokens",
    [np.zeros((2, 2), dtype=np.int64), np.array([0.0, 1.0]), np.array([True]), np.array([0, -1])],
    ids=["2d", "float", "bool", "negative"],
)
def test_lookup_refuses_what_is_not_a_list_of_tokens(written: Path, tokens: NDArray[Any]) -> None:
    cache = LogitCache.open(written)
    with pytest.raises(ValueError, match="token_ids"):
        cache.lookup(tokens)


def test_a_token_beyond_32_bits_is_not_the_token_it_wraps_to(written: Path) -> None:
    cache = LogitCache.open(written)
    tokens = SHARDS[0][0].token_ids.astype(np.int64)
    tokens[3] += 2**32
    with pytest.raises(ValueError, match="token_ids"):
        cache.lookup(tokens)


def test_lookup_of_positions_gives_their_rows(written: Path) -> None:
    cache = LogitCache.open(written)
    record = SHARDS[1][1].logprobs
    for rows in ([0], [len(record) - 1], [0, 2, 3], list(range(len(record))), []):
        wanted = record.positions[rows]
        found = cache.lookup(SHARDS[1][1].token_ids, wanted)
        assert record_bits(found) == record_bits(record.take(np.array(rows, dtype=np.intp)))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int64, np.uint64])
def test_positions_of_a_narrow_type_do_not_overflow(path: Path, store: str, dtype: type[np.integer[Any]]) -> None:
    sample = every_position(np.random.default_rng(5), 400)
    cache = LogitCache.open(write_cache(path, store, [[sample]]))
    last = np.array([min(255, np.iinfo(dtype).max)], dtype=dtype)
    label = int(last[0]) + 1
    assert np.array_equal(cache.lookup(sample.token_ids[: label + 1], last).positions, last)
    refused(PositionNotCaptured, "position-not-captured", lambda: cache.lookup(sample.token_ids[:label], last))


def test_position_not_captured(written: Path) -> None:
    cache = LogitCache.open(written)
    sample = SHARDS[1][1]
    missing = np.setdiff1d(np.arange(len(sample.token_ids) - 1), sample.logprobs.positions)
    for wanted in ([missing[0]], [*sample.logprobs.positions[:2], missing[-1]], missing, [-1], [39], [10**6]):
        refused(
            PositionNotCaptured,
            "position-not-captured",
            lambda w=wanted: cache.lookup(sample.token_ids, np.sort(np.array(w))),  # type: ignore[misc]
        )
    message = refused(PositionNotCaptured, "position-not-captured", lambda: cache.lookup(sample.token_ids, missing[:3]))
    assert f"position {missing[0]} and 2 more" in message


def test_a_causal_prefix_gives_the_rows_whose_label_is_inside(written: Path) -> None:
    cache = LogitCache.open(written)
    for sample in flat(SHARDS):
        for n in range(1, len(sample.token_ids) + 1):
            rows = np.flatnonzero(sample.logprobs.positions + 1 < n)
            found = cache.lookup(sample.token_ids[:n])
            assert record_bits(found) == record_bits(sample.logprobs.take(rows))
            assert sample.token_ids[:n] in cache


def test_a_prefix_of_one_token_is_a_hit_without_rows(written: Path) -> None:
    cache = LogitCache.open(written)
    for sample in flat(SHARDS):
        found = cache.lookup(sample.token_ids[:1])
        assert len(found) == 0 and found.num_alternatives == TOP_K


def test_a_position_whose_label_is_outside_the_prefix_is_not_captured(written: Path) -> None:
    cache = LogitCache.open(written)
    sample = SHARDS[0][0]
    position = sample.logprobs.positions[3:4]
    n = int(position[0]) + 1
    refused(PositionNotCaptured, "position-not-captured", lambda: cache.lookup(sample.token_ids[:n], position))
    assert np.array_equal(cache.lookup(sample.token_ids[: n + 1], position).positions, position)


def test_a_sample_that_is_a_prefix_of_another_keeps_its_own_record(path: Path, store: str) -> None:
    rng = np.random.default_rng(6)
    longer = every_position(rng, 30)
    shorter = make_sample(rng, 0, token_ids=longer.token_ids[:12], positions=[1, 5])
    cache = LogitCache.open(write_cache(path, store, [[longer, shorter]]))
    assert record_bits(cache.lookup(shorter.token_ids)) == record_bits(shorter.logprobs)
    assert record_bits(cache.lookup(longer.token_ids)) == record_bits(longer.logprobs)


@pytest.mark.parametrize("at", [0, 1, 7, 28, 29])
def test_a_miss_names_the_nearest_sample_and_the_token_where_it_departs(written: Path, at: int) -> None:
    sample = SHARDS[0][0]
    tokens = sample.token_ids.copy()
    tokens[at] = VOCAB + 5  # no cached sample has it
    cache = LogitCache.open(written)
    message = refused(SampleNotCached, "sample-not-cached", lambda: cache.lookup(tokens))
    assert f"departs at token {at}: expected token {VOCAB + 5}, " in message
    if at:
        assert sample_id(sample.token_ids).hex() in message
        assert f"found token {sample.token_ids[at]}." in message


def test_a_miss_beyond_the_end_says_so(written: Path) -> None:
    sample = SHARDS[1][0]
    tokens = np.append(sample.token_ids, [3, 4])
    cache = LogitCache.open(written)
    message = refused(SampleNotCached, "sample-not-cached", lambda: cache.lookup(tokens))
    assert "departs at token 17: expected token 3, found its end after 17 tokens" in message
    assert sample_id(sample.token_ids).hex() in message


def test_positions_are_known_without_reading_records(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = LogitCache.open(written)
    samples = list(cache.samples())
    monkeypatch.setattr(LogitCache, "_records", None)
    for stored, sample in zip(cache.stored_samples(), samples, strict=True):
        assert np.array_equal(stored.token_ids, sample.token_ids)
        assert np.array_equal(stored.positions, sample.logprobs.positions)
        assert np.array_equal(stored.label_ids, sample.logprobs.label_ids)
        cache.require(sample.token_ids, sample.logprobs.positions)
        cache.require(sample.token_ids[:1], np.array([], dtype=np.int32))
    tokens, captured = SHARDS[1][1].token_ids, SHARDS[1][1].logprobs.positions
    missing = np.setdiff1d(np.arange(len(tokens) - 1), captured)
    refused(PositionNotCaptured, "position-not-captured", lambda: cache.require(tokens, missing[:1]))
    refused(
        PositionNotCaptured, "position-not-captured", lambda: cache.require(tokens[: captured[3] + 1], captured[:4])
    )
    refused(SampleNotCached, "sample-not-cached", lambda: cache.require(tokens + 1, captured))


# --- several captures of a sample -------------------------------------------------------------------------------------


PARTS = ([1, 4, 9, 20], [0, 4, 5, 9, 23], [2])
UNION = [0, 1, 2, 4, 5, 9, 20, 23]


def test_captures_of_a_sample_are_united(path: Path, store: str) -> None:
    rng = np.random.default_rng(7)
    whole, other = every_position(rng, 25), make_sample(rng, 12)
    first, second, third = captures(whole, PARTS)
    cache = LogitCache.open(write_cache(path, store, [[first], [other, second], [third]]))
    expected = whole.logprobs.take(np.array(UNION))
    assert len(cache) == 2 and cache.num_positions == 10 + len(other.logprobs)
    assert record_bits(cache.lookup(whole.token_ids)) == record_bits(expected)
    for rows in ([4, 20, 23], [2], [0, 23]):
        found = cache.lookup(whole.token_ids, np.array(rows))
        assert record_bits(found) == record_bits(whole.logprobs.take(np.array(rows)))
    inside = whole.logprobs.take(np.array([0, 1, 2, 4]))
    assert record_bits(cache.lookup(whole.token_ids[:6])) == record_bits(inside)
    cache.require(whole.token_ids, np.array([1, 2, 23]))
    refused(PositionNotCaptured, "position-not-captured", lambda: cache.require(whole.token_ids, np.array([3])))
    index = next(i for i in range(2) if len(cache.sample(i).token_ids) == 25)
    assert record_bits(cache.sample(index).logprobs) == record_bits(expected)
    assert list(cache.stored_samples())[index].positions.tolist() == UNION


def test_the_same_sample_twice_in_one_shard_is_united(path: Path, store: str) -> None:
    whole = every_position(np.random.default_rng(8), 25)
    cache = LogitCache.open(write_cache(path, store, [captures(whole, [[3, 4], [0, 4]])]))
    assert len(cache) == 1
    assert record_bits(cache.lookup(whole.token_ids)) == record_bits(whole.logprobs.take(np.array([0, 3, 4])))


def test_where_captures_overlap_the_first_shard_of_the_contents_counts(path: Path, store: str) -> None:
    """A shard's place follows from its positions, so some of these come in the order they are written, some do not."""
    rng = np.random.default_rng(23)
    whole = every_position(rng, 25)
    others = [every_position(rng, 25).logprobs for _ in range(4)]
    parts = [
        replace(whole, logprobs=replace(other, label_ids=whole.logprobs.label_ids).take(np.arange(n + 3)))
        for n, other in enumerate(others)
    ]
    parts = [legal(part) for part in parts]
    write_cache(path, store, [[part] for part in parts])
    cache = LogitCache.open(path)
    first = {unit_of([part], store): part for part in parts}
    order = [first[shard.commit.unit].logprobs for shard in cache.shards()]
    expected = [next(r.take(np.array([t])) for r in order if t < len(r)) for t in range(max(map(len, order)))]
    found = cache.lookup(whole.token_ids)
    assert [record_bits(found.take(np.array([t]))) for t in range(len(found))] == [record_bits(r) for r in expected]


def legal(sample: CachedSample) -> CachedSample:
    """A record whose labels were exchanged, made valid: rows where one stands among the alternatives lose these."""
    record = sample.logprobs
    clash = (record.alternative_ids == record.label_ids[:, None]).any(axis=1)
    with np.errstate(divide="ignore"):
        everything = np.log1p(-np.exp(record.label_logprobs.astype(np.float64))).astype(np.float32)
    changed = replace(
        record,
        alternative_ids=np.where(clash[:, None], np.uint32(NO_TOKEN), record.alternative_ids),
        alternative_logprobs=np.where(clash[:, None], np.float32(-np.inf), record.alternative_logprobs),
        tail_logprobs=np.where(clash, everything, record.tail_logprobs),
    )
    return replace(sample, logprobs=changed)


def test_the_writer_knows_what_is_captured(path: Path, store: str) -> None:
    whole = every_position(np.random.default_rng(9), 25)
    parts = captures(whole, [[3, 4], [0, 4]])
    with CacheWriter(path, make_manifest(store)) as writer:
        meanwhile = writer.captured()
        assert len(meanwhile) == 0
        writer.commit(parts[:1])
        writer.commit([parts[1], *SHARDS[0]])
    expected = {sample_id(s.token_ids): s.logprobs.positions.tolist() for s in SHARDS[0]}
    expected[sample_id(whole.token_ids)] = [0, 3, 4]
    asked = [*expected, bytes(16)]
    every = np.arange(max(map(len, (s.token_ids for s in [whole, *SHARDS[0]]))), dtype=np.int32)
    with CacheWriter(path, make_manifest(store)) as writer:
        for found in (meanwhile, writer.captured()):
            left = found.missing(asked, [every] * len(asked))
            there = [sorted(set(every.tolist()) - set(positions.tolist())) for positions in left]
            assert there == [*expected.values(), []]
            assert [
                len(p) for p in found.missing(list(expected), [np.array(p, np.int32) for p in expected.values()])
            ] == [0] * len(expected)


# --- batches and the index --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(store: str, tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    """Samples in four shards, one of three captures, two that share their start, one inside another."""
    rng = np.random.default_rng(24)
    whole, other = every_position(rng, 25), every_position(rng, 300)
    fork = make_sample(rng, 0, token_ids=np.append(whole.token_ids[:9], np.arange(20, dtype=np.uint32)))
    inner = make_sample(rng, 0, token_ids=other.token_ids[:40])
    first, second, third = captures(whole, PARTS)
    shards = [[first, *SHARDS[0]], [other, second], [fork, third], [inner, *SHARDS[1]]]
    return LogitCache.open(write_cache(tmp_path_factory.mktemp("library") / "cache", store, shards))


def one_by_one(cache: LogitCache, asked: Sequence[NDArray[Any]], positions: Sequence[NDArray[Any]] | None) -> object:
    """The bits that `lookup` gives for each, or the first refusal."""
    try:
        wanted = [None] * len(asked) if positions is None else positions
        return [record_bits(cache.lookup(tokens, where)) for tokens, where in zip(asked, wanted, strict=True)]
    except CacheError as error:
        return type(error)


def chosen_rows(n: int) -> st.SearchStrategy[NDArray[np.bool_]]:
    return st.lists(st.booleans(), min_size=n, max_size=n).map(lambda rows: np.array(rows, dtype=np.bool_))


@settings(deadline=None, max_examples=60, database=None)
@given(data=st.data())
def test_a_batch_equals_its_lookups_one_by_one(library: LogitCache, data: st.DataObject) -> None:
    samples = list(library.samples())
    chosen = data.draw(st.lists(st.sampled_from(range(len(samples))), max_size=8))
    ends = [data.draw(st.one_of(st.none(), st.integers(1, len(samples[i].token_ids)))) for i in chosen]
    asked = [samples[i].token_ids[:end] for i, end in zip(chosen, ends, strict=True)]
    positions = None
    if data.draw(st.booleans()):
        captured = [samples[i].logprobs.positions for i in chosen]
        inside = [where[where + 1 < len(tokens)] for where, tokens in zip(captured, asked, strict=True)]
        positions = [where[data.draw(chosen_rows(len(where)))] for where in inside]
    expected = one_by_one(library, asked, positions)
    try:
        found: object = [record_bits(record) for record in library.lookup_batch(asked, positions)]
    except CacheError as error:
        found = type(error)
    assert found == expected


def test_a_batch_of_nothing_is_nothing(library: LogitCache) -> None:
    assert library.lookup_batch([]) == library.lookup_batch([], []) == []


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_batch_with_one_miss_is_refused(library: LogitCache, at: int) -> None:
    asked = [library.sample(i).token_ids for i in range(3)]
    asked[at] = np.append(asked[at], VOCAB)
    refused(SampleNotCached, "sample-not-cached", lambda: library.lookup_batch(asked))
    where = [library.sample(i).logprobs.positions for i in range(3)]
    where[at] = np.append(where[at], 10**6)
    tokens = [library.sample(i).token_ids for i in range(3)]
    refused(PositionNotCaptured, "position-not-captured", lambda: library.lookup_batch(tokens, where))


def test_numpy_alone_reads_the_index(written: Path) -> None:
    (file,) = written.glob("index-*.npy")
    rows = np.load(file)
    cache = LogitCache.open(written)
    samples = list(cache.stored_samples())
    assert [row["sample_id"].tobytes() for row in rows] == [sample_id(s.token_ids) for s in samples]
    assert rows["num_tokens"].tolist() == [len(s.token_ids) for s in samples]
    assert rows["num_positions"].tolist() == [len(s.positions) for s in samples]
    assert rows["num_cut"].tolist() == [s.num_tokens_cut for s in cache.samples()]


# --- other processes --------------------------------------------------------------------------------------------------

_inherited: list[LogitCache] = []


def inherited_bits() -> list[tuple[object, ...]]:
    (cache,) = _inherited
    return [sample_bits(sample) for sample in cache.samples()]


def given_bits(cache: LogitCache) -> list[tuple[object, ...]]:
    return [sample_bits(sample) for sample in cache.samples()]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_a_cache_that_is_open_here(written: Path, method: str) -> None:
    cache = LogitCache.open(written)
    here = given_bits(cache)
    assert cache.lookup(SHARDS[0][0].token_ids[:4]) is not None  # what a prefix reads is not sent along
    assert in_processes(method, given_bits, [(cache,)]) == [here]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_worker_reads_the_cache_it_inherits(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = LogitCache.open(written)
    here = given_bits(cache)
    monkeypatch.setattr(f"{__name__}._inherited", [cache])
    assert in_processes("fork", inherited_bits, [(), ()]) == [here, here]
    assert inherited_bits() == here


def test_a_pickled_cache_is_small_and_reads_the_same(written: Path) -> None:
    cache = LogitCache.open(written)
    _ = cache.contents_checksum, cache.manifest.identity_digest  # which are kept
    fresh = len(pickle.dumps(cache))
    here = given_bits(cache)
    _ = cache.lookup(SHARDS[0][0].token_ids[:4])
    data = pickle.dumps(cache)
    assert len(data) == fresh
    assert given_bits(pickle.loads(data)) == here
