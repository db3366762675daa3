"""Properties of every store over random samples: round trip, prefix lookup, content addressing."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.storage_samples import by_tokens, make_manifest, make_record, make_sample, record_bits, write_cache
from support.storage_strategies import relaxed, seeds

from logitcache.storage import CachedSample, LogitCache, SampleNotCached, sample_id, verify
from logitcache.storage.encoding import SampleTable
from logitcache.storage.index import SampleIndex, index_file

pytest_plugins = ["support.storage_fixtures"]
pytestmark = pytest.mark.usefixtures("no_fsync")

many = settings(deadline=None, max_examples=200, database=None)


@relaxed
@given(
    seed=seeds,
    vocab=st.integers(2, 200),
    top_k=st.integers(1, 199),
    lengths=st.lists(st.lists(st.integers(2, 40) | st.integers(500, 540), min_size=1, max_size=4), max_size=3),
)
def test_round_trip(store: str, seed: int, vocab: int, top_k: int, lengths: list[list[int]]) -> None:
    rng = np.random.default_rng(seed)
    top_k = min(top_k, vocab - 1)
    shards = [[make_sample(rng, n, vocab, top_k) for n in shard] for shard in lengths]
    expected: dict[bytes, CachedSample] = {}
    for sample in (s for shard in shards for s in shard):
        expected.setdefault(sample.token_ids.tobytes(), sample)
    assume(len(expected) == sum(map(len, shards)))  # captures of the same tokens are united: tested below
    with tempfile.TemporaryDirectory() as folder:
        path = write_cache(Path(folder) / "cache", store, shards, make_manifest(store, vocab, top_k))
        cache = LogitCache.open(path)
        assert by_tokens(list(cache.samples())) == by_tokens(list(expected.values()))
        for sample in expected.values():
            assert record_bits(cache.lookup(sample.token_ids)) == record_bits(sample.logprobs)
        assert verify(path).is_intact


def starts_with(sample: CachedSample, tokens: NDArray[np.uint32]) -> bool:
    return sample.token_ids[: len(tokens)].tobytes() == tokens.tobytes()


def departure(sample: CachedSample, tokens: NDArray[np.uint32]) -> int:
    """Number of tokens that both have at their start."""
    return next(n for n in range(len(tokens), -1, -1) if starts_with(sample, tokens[:n]))


@relaxed
@given(
    seed=seeds,
    tokens=st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=7), min_size=1, max_size=12, unique_by=tuple),
    asked=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), max_size=12),
)
def test_prefix_lookup_equals_a_scan_of_all_samples(
    store: str, seed: int, tokens: list[list[int]], asked: list[list[int]]
) -> None:
    rng = np.random.default_rng(seed)
    samples = [make_sample(rng, 0, 3, 2, token_ids=np.array(t, dtype=np.uint32)) for t in tokens]
    half = (len(samples) + 1) // 2
    with tempfile.TemporaryDirectory() as folder:
        shards = [part for part in (samples[:half], samples[half:]) if part]
        cache = LogitCache.open(write_cache(Path(folder) / "cache", store, shards, make_manifest(store, 3, 2)))
        for prefix in [*asked, *(t[:n] for t in tokens for n in range(1, len(t) + 1))]:
            check_against_scan(cache, samples, np.array(prefix, dtype=np.uint32))


def check_against_scan(cache: LogitCache, samples: list[CachedSample], tokens: NDArray[np.uint32]) -> None:
    """A hit is the record of that very sample, else the rows inside of all that start so; a miss names the nearest."""
    exact = [s for s in samples if s.token_ids.tobytes() == tokens.tobytes()]
    hits = exact or [s for s in samples if starts_with(s, tokens)]
    assert (tokens in cache) == bool(hits)
    if hits:
        inside = [s.logprobs.take(np.flatnonzero(s.logprobs.positions + 1 < len(tokens))) for s in hits]
        found = cache.lookup(tokens)
        assert found.positions.tolist() == sorted({p for record in inside for p in record.positions.tolist()})
        for row, position in enumerate(found.positions):
            rows = [r.take(np.flatnonzero(r.positions == position)) for r in inside]
            assert record_bits(found.take(np.array([row]))) in [record_bits(r) for r in rows]
        return
    with pytest.raises(SampleNotCached) as caught:
        cache.lookup(tokens)
    assert f"departs at token {max(departure(s, tokens) for s in samples)}: " in str(caught.value)


@relaxed
@given(seed=seeds, parts=st.lists(st.sets(st.integers(0, 8), min_size=1), min_size=1, max_size=4, unique_by=frozenset))
def test_captures_of_one_sample_are_united(store: str, seed: int, parts: list[set[int]]) -> None:
    rng = np.random.default_rng(seed)
    token_ids = rng.integers(0, 30, size=10, dtype=np.uint32)
    whole = make_record(rng, token_ids, np.arange(9, dtype=np.int32), 30, 4)
    shards = [[CachedSample(token_ids, whole.take(np.array(sorted(part))))] for part in parts]
    with tempfile.TemporaryDirectory() as folder:
        cache = LogitCache.open(write_cache(Path(folder) / "cache", store, shards, make_manifest(store, 30, 4)))
        union = sorted(set().union(*parts))
        assert len(cache) == 1
        assert record_bits(cache.lookup(token_ids)) == record_bits(whole.take(np.array(union)))
        assert next(cache.stored_samples()).positions.tolist() == union


@many
@given(tokens=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=30), data=st.data())
def test_any_change_of_the_tokens_changes_the_sample_id(tokens: list[int], data: st.DataObject) -> None:
    array = np.array(tokens, dtype=np.uint32)
    at = data.draw(st.integers(0, len(tokens) - 1))
    other = data.draw(st.integers(0, 2**32 - 1).filter(lambda t: t != tokens[at]))
    changed = array.copy()
    changed[at] = other
    ids = [changed, array[:-1], np.append(array, array[-1]), np.append(array, np.uint32(0)), np.insert(array, 0, 0)]
    assert sample_id(array) not in [sample_id(a) for a in ids]
    assert sample_id(array) == sample_id(array.astype(np.int64)) == sample_id(array.astype(">u4"))
    if sorted(set(tokens)) != [tokens[0]]:
        rotated = np.roll(array, 1)
        assert (sample_id(rotated) == sample_id(array)) == np.array_equal(rotated, array)


def table_of(ids: NDArray[np.uint64]) -> SampleTable:
    """A sample table of these ids with samples of two tokens."""
    n = len(ids)
    ones = np.ones(n, dtype=np.uint32)
    return SampleTable(ids.view(np.uint8).reshape(n, 16), 2 * ones, ones, ones * 0, ones[:0], np.zeros(0, np.int32))


@settings(deadline=None, max_examples=100, database=None)
@given(
    shards=st.lists(
        st.lists(
            st.tuples(
                st.sampled_from([0, 1, 2**63, 2**64 - 1, 2**64 - 2, 2**61, 7]), st.sampled_from([0, 1, 2**64 - 1])
            ),
            max_size=6,
        ),
        max_size=5,
    )
)
def test_the_index_finds_every_capture_and_nothing_else(shards: list[list[tuple[int, int]]]) -> None:
    """Ids that fall into the same buckets, in the first and the last one, and share one half."""
    tables = [table_of(np.array(ids, dtype="<u8").reshape(-1, 2)) for ids in shards]
    stored, data = index_file(tables)
    rows = np.load(io.BytesIO(data))
    index = SampleIndex(rows, len(shards))
    everything = [pair for ids in shards for pair in ids]
    assert stored.size == len(data) and len(index) == len(everything)
    for pair in {*everything, (5, 5), (2**64 - 1, 5)}:
        key = np.array(pair, dtype="<u8").tobytes()
        assert index.find(key) == [i for i, other in enumerate(everything) if other == pair]
    assert index.distinct.tolist() == sorted({everything.index(pair) for pair in everything})
    starts = np.cumsum([0, *map(len, shards)])
    for shard, start in enumerate(starts[:-1]):
        for number in range(start, starts[shard + 1]):
            place = index.place(number)
            assert index.shard(number) == shard and place.row == number - start
            assert place.tokens == slice(2 * place.row, 2 * place.row + 2)
