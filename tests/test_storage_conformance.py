"""What every store promises: one suite for zarr and arrow."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from storage_samples import (
    NO_TOKEN,
    STORES,
    TOP_K,
    VOCAB,
    Shards,
    by_tokens,
    cache_bits,
    lasting,
    make_manifest,
    make_sample,
    make_shards,
    record_bits,
    sample_bits,
    tree,
    with_record,
    write_cache,
)

from logitcache.storage import (
    BaseLogprobs,
    CachedSample,
    CacheError,
    CacheLocked,
    CacheWriter,
    CaptureSettings,
    CorruptCache,
    IdentityMismatch,
    IncompleteCache,
    InvalidRecord,
    LogitCache,
    Manifest,
    ModelIdentity,
    NotACache,
    PositionNotCaptured,
    SampleNotCached,
    TokenizerIdentity,
    UnsupportedFormat,
    sample_id,
    verify,
)
from logitcache.storage import writer as writer_module

SHARDS = make_shards(1, [[30, 2, 9], [17, 40]])


@pytest.fixture(params=STORES, scope="module")
def store(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True, scope="module")
def _no_fsync() -> Iterator[None]:
    """A test cannot see whether bytes have reached a disk, and waiting for it is slow; test_storage_faults does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def pristine(store: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache of SHARDS, to be left as it is."""
    return write_cache(tmp_path_factory.mktemp("pristine") / "cache", store, SHARDS)


@pytest.fixture
def written(path: Path, pristine: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(pristine, path))


def flat(shards: Shards) -> list[CachedSample]:
    return [sample for shard in shards for sample in shard]


def every_position(rng: np.random.Generator, num_tokens: int, vocab: int = VOCAB, top_k: int = TOP_K) -> CachedSample:
    return make_sample(rng, num_tokens, vocab, top_k, positions=range(num_tokens - 1))


def refused(error: type[CacheError], reason: str, call: Callable[[], object]) -> str:
    """The message of a refusal of exactly this class and reason."""
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert caught.value.reason == reason
    return str(caught.value)


# --- round trip -------------------------------------------------------------------------------------------------------


def test_round_trip_over_shards_and_chunks_is_bit_exact(path: Path, store: str) -> None:
    rng = np.random.default_rng(2)
    rows = [[1, 511, 1, 700], [512], [513], [1024, 1], [3, 1600, 2], [1025]]
    shards = [[every_position(rng, n + 1) for n in shard] for shard in rows]
    shards += make_shards(3, [[50, 2, 1300], [600] * 4])
    write_cache(path, store, shards)
    cache = LogitCache.open(path)
    assert by_tokens(list(cache.samples())) == by_tokens(flat(shards))
    for sample in flat(shards):
        assert record_bits(cache.lookup(sample.token_ids)) == record_bits(sample.logprobs)


@pytest.mark.parametrize(("vocab", "top_k"), [(2, 1), (6, 5), (300, 1), (300, 299)])
def test_round_trip_of_narrow_and_wide_rows(path: Path, store: str, vocab: int, top_k: int) -> None:
    rng = np.random.default_rng(vocab)
    samples = [every_position(rng, n, vocab, top_k) for n in (2, 90, 600)]
    write_cache(path, store, [samples], make_manifest(store, vocab, top_k))
    assert cache_bits(path) == [sample_bits(s) for s in samples]


def test_samples_have_tails_of_minus_infinity_and_short_rows() -> None:
    sample = every_position(np.random.default_rng(4), 200, 6, 5)
    record = sample.logprobs
    assert np.isneginf(record.tail_logprobs).any() and np.isfinite(record.tail_logprobs).any()
    assert (record.alternative_ids == NO_TOKEN).any() and (record.alternative_ids != NO_TOKEN).all(axis=1).any()


def test_counts_and_access_by_index(written: Path) -> None:
    cache = LogitCache.open(written)
    samples = list(cache.samples())
    assert len(cache) == len(samples) == 5
    assert cache.num_positions == sum(len(s.logprobs) for s in flat(SHARDS))
    assert cache.num_tokens == sum(len(s.token_ids) for s in flat(SHARDS))
    assert cache.num_bytes == sum(len(v) for k, v in tree(written / "shards").items() if "/" in k)
    for i, sample in enumerate(samples):
        assert sample_bits(cache.sample(i)) == sample_bits(sample)
        assert np.array_equal(cache.token_ids(i), sample.token_ids)
    with pytest.raises(IndexError):
        cache.sample(5)


def test_positions_are_known_without_reading_records(written: Path) -> None:
    cache = LogitCache.open(written)
    for i, sample in enumerate(cache.samples()):
        assert cache.positions(i).tolist() == sample.logprobs.positions.tolist()
        cache.require(sample.token_ids, sample.logprobs.positions)
        cache.require(sample.token_ids[:1], np.array([], dtype=np.int32))
    tokens, captured = SHARDS[1][1].token_ids, SHARDS[1][1].logprobs.positions
    missing = np.setdiff1d(np.arange(len(tokens) - 1), captured)
    refused(PositionNotCaptured, "position-not-captured", lambda: cache.require(tokens, missing[:1]))
    refused(
        PositionNotCaptured, "position-not-captured", lambda: cache.require(tokens[: captured[3] + 1], captured[:4])
    )
    refused(SampleNotCached, "sample-not-cached", lambda: cache.require(tokens + 1, captured))


def test_the_contents_checksum_tells_contents_apart(path: Path, pristine: Path, store: str) -> None:
    first = LogitCache.open(pristine).contents_checksum
    assert LogitCache.open(write_cache(path, store, SHARDS[1:])).contents_checksum != first
    assert LogitCache.open(write_cache(path, store, SHARDS)).contents_checksum == first


def test_a_path_alone_opens_it_and_gives_the_manifest_back(written: Path, store: str) -> None:
    assert LogitCache.open(str(written)).manifest == make_manifest(store)


def test_a_moved_cache_is_the_same_cache(written: Path, tmp_path: Path) -> None:
    before = cache_bits(written)
    assert cache_bits(written.rename(tmp_path / "elsewhere")) == before


def test_reading_and_verifying_write_nothing(written: Path) -> None:
    before = tree(written)
    cache_bits(written)
    report = verify(written)
    assert report.is_intact and report.num_shards == 2 and report.num_samples == 5
    assert report.num_positions == sum(len(s.logprobs) for s in flat(SHARDS))
    assert tree(written) == before


def test_two_caches_of_the_same_samples_have_the_same_bytes(path: Path, pristine: Path, store: str) -> None:
    assert lasting(write_cache(path, store, SHARDS)) == lasting(pristine)


def test_the_order_of_the_shards_does_not_matter(path: Path, pristine: Path, store: str) -> None:
    assert lasting(write_cache(path, store, SHARDS[::-1])) == lasting(pristine)


def test_a_cache_without_samples_has_no_hits(path: Path, store: str) -> None:
    cache = LogitCache.open(write_cache(path, store, []))
    assert len(cache) == 0 and cache.num_positions == 0
    refused(SampleNotCached, "sample-not-cached", lambda: cache.lookup(np.array([1, 2])))
    assert np.array([1, 2]) not in cache


# --- lookup -----------------------------------------------------------------------------------------------------------


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


def test_two_captures_of_a_sample_are_united(path: Path, store: str) -> None:
    rng = np.random.default_rng(7)
    whole = every_position(rng, 25)
    parts = [[1, 4, 9, 20], [0, 4, 5, 9, 23], [2]]
    captures = [replace(whole, logprobs=whole.logprobs.take(np.array(rows))) for rows in parts]
    other = make_sample(rng, 12)
    cache = LogitCache.open(write_cache(path, store, [[captures[0]], [other, captures[1]], [captures[2]]]))
    expected = whole.logprobs.take(np.array([0, 1, 2, 4, 5, 9, 20, 23]))
    assert len(cache) == 2
    assert record_bits(cache.lookup(whole.token_ids)) == record_bits(expected)
    assert record_bits(cache.lookup(whole.token_ids, np.array([4, 20, 23]))) == record_bits(
        whole.logprobs.take(np.array([4, 20, 23]))
    )
    index = next(i for i in range(2) if len(cache.token_ids(i)) == 25)
    assert record_bits(cache.sample(index).logprobs) == record_bits(expected)


def test_the_same_sample_twice_in_one_shard_is_united(path: Path, store: str) -> None:
    whole = every_position(np.random.default_rng(8), 25)
    captures = [replace(whole, logprobs=whole.logprobs.take(np.array(rows))) for rows in ([3, 4], [0, 4])]
    cache = LogitCache.open(write_cache(path, store, [captures]))
    assert len(cache) == 1
    assert record_bits(cache.lookup(whole.token_ids)) == record_bits(whole.logprobs.take(np.array([0, 3, 4])))


def test_the_writer_knows_what_is_captured(path: Path, store: str) -> None:
    whole = every_position(np.random.default_rng(9), 25)
    captures = [replace(whole, logprobs=whole.logprobs.take(np.array(rows))) for rows in ([3, 4], [0, 4])]
    with CacheWriter(path, make_manifest(store)) as writer:
        assert writer.captured() == {}
        writer.commit(captures[:1])
        writer.commit([captures[1], *SHARDS[0]])
    with CacheWriter(path, make_manifest(store)) as writer:
        found = writer.captured()
    expected = {sample_id(s.token_ids): s.logprobs.positions.tolist() for s in SHARDS[0]}
    expected[sample_id(whole.token_ids)] = [0, 3, 4]
    assert {key: positions.tolist() for key, positions in found.items()} == expected


# --- commit, resume, finalize -----------------------------------------------------------------------------------------


def is_final(writer: CacheWriter) -> bool:
    """The property, without mypy taking it for a constant."""
    return writer.is_final


def test_before_finalize_there_is_no_cache(path: Path, store: str) -> None:
    with CacheWriter(path, make_manifest(store)) as writer:
        assert "after 0 committed shards" in refused(IncompleteCache, "incomplete", lambda: LogitCache.open(path))
        writer.commit(SHARDS[0])
        assert "after 1 committed shards" in refused(IncompleteCache, "incomplete", lambda: LogitCache.open(path))
        refused(IncompleteCache, "incomplete", lambda: verify(path))
        assert not is_final(writer)
        writer.finalize()
        assert is_final(writer)
    assert len(LogitCache.open(path)) == 3


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path: Path, store: str) -> None:
    shards = make_shards(10, [[30], [600, 5], [7, 8, 9], [20]])
    undisturbed = write_cache(tmp_path / "a", store, shards)
    path = tmp_path / "b"
    for count in (0, 1, 3):
        with CacheWriter(path, make_manifest(store)) as writer:
            for shard in shards[:count]:
                writer.commit(shard)
    write_cache(path, store, shards)
    assert lasting(path) == lasting(undisturbed)


def test_committing_a_unit_twice_changes_nothing(path: Path, store: str) -> None:
    with CacheWriter(path, make_manifest(store)) as writer:
        first = writer.commit(SHARDS[0])
        before = tree(path)
        assert writer.commit(SHARDS[0]) == first
        assert tree(path) == before
    with CacheWriter(path, make_manifest(store)) as writer:
        assert writer.commit(SHARDS[0]) == first
        assert tree(path) == before


def test_the_first_record_of_a_unit_stays(path: Path, store: str) -> None:
    first, second = (make_sample(np.random.default_rng(s), 0, token_ids=SHARDS[0][0].token_ids) for s in (11, 12))
    second = replace(second, logprobs=make_sample_like(first, np.random.default_rng(13)))
    write_cache(path, store, [[first], [second]])
    assert cache_bits(path) == [sample_bits(first)]


def make_sample_like(sample: CachedSample, rng: np.random.Generator) -> BaseLogprobs:
    """Another record of the same positions."""
    positions = sample.logprobs.positions.tolist()
    return make_sample(rng, 0, token_ids=sample.token_ids, positions=positions).logprobs


def test_finalizing_twice_changes_nothing(path: Path, store: str) -> None:
    with CacheWriter(path, make_manifest(store)) as writer:
        writer.commit(SHARDS[0])
        contents = writer.finalize()
        before = tree(path)
        assert writer.finalize() == contents
        assert tree(path) == before


def test_a_finished_cache_can_grow_and_shows_the_old_contents_until_finalized(written: Path, store: str) -> None:
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


def test_a_grown_cache_has_the_bytes_of_one_written_at_once(written: Path, store: str, tmp_path: Path) -> None:
    more = make_shards(14, [[21, 600]])
    write_cache(written, store, more)
    assert lasting(written) == lasting(write_cache(tmp_path / "at once", store, [*SHARDS, *more]))


def test_a_damaged_shard_is_repaired_as_its_error_says(written: Path, store: str) -> None:
    before = lasting(written)
    unit = writer_module.unit_id(SHARDS[0])
    data = max((written / "shards" / unit).rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    data.write_bytes(bytes(data.stat().st_size))
    refused(CorruptCache, "corrupt", lambda: cache_bits(written))
    (written / "shards" / f"{unit}.json").unlink()
    refused(CorruptCache, "corrupt", lambda: cache_bits(written))
    write_cache(written, store, SHARDS)
    assert lasting(written) == before
    assert verify(written).is_intact


@pytest.mark.parametrize(
    "leftover",
    ["staging/x/data", "contents.json.new", "manifest.json.new", "shards/a.json.new", f"shards/{'0' * 32}/data"],
)
def test_leftovers_of_a_killed_run_vanish(path: Path, pristine: Path, store: str, leftover: str) -> None:
    with CacheWriter(path, make_manifest(store)) as writer:
        writer.commit(SHARDS[0])
    (path / leftover).parent.mkdir(parents=True, exist_ok=True)
    (path / leftover).write_bytes(b"half")
    write_cache(path, store, SHARDS)
    assert lasting(path) == lasting(pristine)


def test_a_run_killed_before_its_manifest_was_committed_starts_again(path: Path, store: str) -> None:
    (path / "shards").mkdir(parents=True)
    (path / "writer.lock").touch()
    (path / "manifest.json.new").write_bytes(b"half")
    refused(NotACache, "not-a-cache", lambda: LogitCache.open(path))
    write_cache(path, store, SHARDS)
    assert "manifest.json.new" not in tree(path)
    assert len(cache_bits(path)) == 5


def test_an_uncommitted_shard_folder_does_not_exist(written: Path, store: str) -> None:
    before = cache_bits(written)
    orphan = written / "shards" / writer_module.unit_id(make_shards(15, [[9]])[0])
    orphan.mkdir()
    (orphan / "half").write_bytes(b"x")
    assert cache_bits(written) == before
    write_cache(written, store, make_shards(15, [[9]]))
    assert len(cache_bits(written)) == 6


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_not_a_cache(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name in ("missing", "empty", "file"):
        for call in (LogitCache.open, verify):
            assert name in refused(NotACache, "not-a-cache", lambda n=name, c=call: c(tmp_path / n))  # type: ignore[misc]


def other_identities(store: str) -> dict[str, Manifest]:
    base = make_manifest(store)
    model, tokenizer = base.model, base.tokenizer
    assert tokenizer is not None
    return {
        "store": replace(base, store="arrow" if store == "zarr" else "zarr"),
        "model.weights": replace(base, model=replace(model, weights="x" * 32)),
        "model.config": replace(base, model=replace(model, config="x" * 32)),
        "model.vocab_size": replace(base, model=replace(model, vocab_size=VOCAB + 1)),
        "model.dtype": replace(base, model=replace(model, dtype="float32")),
        "model.attention": replace(base, model=replace(model, attention="eager")),
        "tokenizer": replace(base, tokenizer=None),
        "tokenizer.fingerprint": replace(base, tokenizer=replace(tokenizer, fingerprint="x" * 32)),
        "tokenizer.chat_template": replace(base, tokenizer=replace(tokenizer, chat_template="x" * 32)),
        "capture.top_k": replace(base, capture=replace(base.capture, top_k=TOP_K + 1)),
        "capture.max_length": replace(base, capture=replace(base.capture, max_length=4097)),
    }


IDENTITY_FIELDS = [
    "store",
    *(f"model.{name}" for name in ModelIdentity.__dataclass_fields__),
    "tokenizer",
    *(f"tokenizer.{name}" for name in TokenizerIdentity.__dataclass_fields__),
    *(f"capture.{name}" for name in CaptureSettings.__dataclass_fields__),
]


@pytest.mark.parametrize("field", IDENTITY_FIELDS)
def test_another_identity_is_refused_and_nothing_changes(written: Path, store: str, field: str) -> None:
    before = tree(written)
    other = other_identities(store)[field]
    message = refused(IdentityMismatch, "identity-mismatch", lambda: CacheWriter(written, other))
    assert field in message
    assert tree(written) == before


def test_another_identity_is_refused_by_an_unfinished_cache(path: Path, store: str) -> None:
    with CacheWriter(path, make_manifest(store)) as writer:
        writer.commit(SHARDS[0])
    before = tree(path)
    for other in other_identities(store).values():
        refused(IdentityMismatch, "identity-mismatch", lambda o=other: CacheWriter(path, o))  # type: ignore[misc]
    assert tree(path) == before


def test_what_is_for_people_is_not_identity(written: Path, store: str) -> None:
    renamed = replace(make_manifest(store), model_name="another/name", created_with={"logitcache": "9"})
    before = lasting(written)
    with CacheWriter(written, renamed) as writer:
        assert writer.manifest == make_manifest(store)
        writer.finalize()
    assert lasting(written) == before


def test_a_writer_that_loses_the_race_to_create_a_cache_checks_the_identity(
    path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_lock = writer_module._take_lock

    def late(lock: Path) -> int:
        monkeypatch.undo()
        write_cache(path, store, SHARDS)  # another process, between the check and the lock
        return take_lock(lock)

    monkeypatch.setattr(writer_module, "_take_lock", late)
    other = other_identities(store)["model.weights"]
    refused(IdentityMismatch, "identity-mismatch", lambda: CacheWriter(path, other))
    with CacheWriter(path, make_manifest(store)):
        pass


@pytest.mark.parametrize("name", ["notes.txt", "contents.json", "staging/mine.txt", "shards/mine.txt", ".hidden"])
def test_a_folder_with_foreign_files_is_refused_and_nothing_changes(path: Path, store: str, name: str) -> None:
    (path / name).parent.mkdir(parents=True)
    (path / name).write_text("mine")
    refused(NotACache, "not-a-cache", lambda: CacheWriter(path, make_manifest(store)))
    assert tree(path) == {name: b"mine"}


def test_a_cache_that_lost_its_manifest_is_not_given_another(path: Path, store: str) -> None:
    with CacheWriter(path, make_manifest(store)) as writer:
        writer.commit(SHARDS[0])
    (path / "manifest.json").unlink()
    before = tree(path)
    refused(NotACache, "not-a-cache", lambda: CacheWriter(path, other_identities(store)["model.weights"]))
    assert tree(path) == before


def test_an_empty_folder_is_welcome(path: Path, store: str) -> None:
    path.mkdir()
    assert len(cache_bits(write_cache(path, store, SHARDS))) == 5


def test_a_second_writer_is_refused_and_readers_are_not(written: Path, store: str) -> None:
    with CacheWriter(written, make_manifest(store)) as writer:
        before = tree(written)
        refused(CacheLocked, "locked", lambda: CacheWriter(written, make_manifest(store)))
        assert tree(written) == before
        assert len(cache_bits(written)) == 5
        writer.commit(make_shards(16, [[5]])[0])
    with CacheWriter(written, make_manifest(store)) as writer:
        writer.finalize()


def test_a_writer_that_fails_to_start_lets_the_lock_go(path: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer_module, "_write_synced", full)
    with pytest.raises(OSError, match="No space"):
        CacheWriter(path, make_manifest(store))
    monkeypatch.undo()
    assert len(cache_bits(write_cache(path, store, SHARDS))) == 5


# --- records that are not distributions -------------------------------------------------------------------------------


def valid_sample() -> CachedSample:
    """Positions 0, 3, 7 of 9 tokens, K full alternatives in each row, all masses finite."""
    token_ids = np.arange(9, dtype=np.uint32)
    ids = np.tile(np.arange(20, 20 + TOP_K, dtype=np.uint32), (3, 1))
    positions = np.array([0, 3, 7], dtype=np.int32)
    kept = np.array([0.2, 0.15, 0.1, 0.05, 0.05])
    record = BaseLogprobs(
        positions=positions,
        label_ids=token_ids[positions + 1],
        label_logprobs=np.log(np.full(3, 0.25)).astype(np.float32),
        alternative_ids=ids,
        alternative_logprobs=np.log(np.tile(kept, (3, 1))).astype(np.float32),
        tail_logprobs=np.log(np.full(3, 0.2)).astype(np.float32),
    )
    return CachedSample(token_ids, record)


def put(field: str, where: Any, value: Any) -> Callable[[CachedSample], CachedSample]:
    """Change some elements of a field of the record."""

    def change(sample: CachedSample) -> CachedSample:
        array = getattr(sample.logprobs, field).copy()
        array[where] = value
        return with_record(sample, **{field: array})

    return change


def cast(field: str, dtype: str) -> Callable[[CachedSample], CachedSample]:
    return lambda s: with_record(s, **{field: getattr(s.logprobs, field).astype(dtype)})


def shape(field: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Callable[[CachedSample], CachedSample]:
    return lambda s: with_record(s, **{field: change(getattr(s.logprobs, field))})


def narrower(sample: CachedSample) -> CachedSample:
    """K - 1 alternatives, the last one's mass in the tail: a valid record of another top_k."""
    record = sample.logprobs
    return with_record(
        sample,
        alternative_ids=record.alternative_ids[:, :-1],
        alternative_logprobs=record.alternative_logprobs[:, :-1],
        tail_logprobs=np.log(np.full(3, 0.25)).astype(np.float32),
    )


def without_mass(sample: CachedSample) -> CachedSample:
    """An alternative of a known id and no mass, which is in the tail instead."""
    kept, tail = sample.logprobs.alternative_logprobs.copy(), sample.logprobs.tail_logprobs.copy()
    kept[1, 4], tail[1] = -np.inf, np.log(0.25)
    return with_record(sample, alternative_logprobs=kept, tail_logprobs=tail)


def label_outside_vocabulary(sample: CachedSample) -> CachedSample:
    tokens, labels = sample.token_ids.copy(), sample.logprobs.label_ids.copy()
    tokens[4] = labels[1] = VOCAB
    return replace(with_record(sample, label_ids=labels), token_ids=tokens)


FIELDS = list(BaseLogprobs.__dataclass_fields__)
FLOATS = ["label_logprobs", "alternative_logprobs", "tail_logprobs"]
INVALID: dict[str, Callable[[CachedSample], CachedSample]] = {
    **{f"{name} of another type": cast(name, "<i8" if "log" not in name else "<f8") for name in FIELDS},
    **{f"{name} of half precision": cast(name, "<f2") for name in FLOATS},
    **{f"{name} one row short": shape(name, lambda a: a[:-1]) for name in FIELDS},
    **{f"{name} of one dimension more": shape(name, lambda a: a[..., None]) for name in FIELDS},
    "alternative_ids flat": shape("alternative_ids", lambda a: a[:, 0]),
    "alternative_logprobs one column short": shape("alternative_logprobs", lambda a: a[:, :-1]),
    "fewer columns than top_k": narrower,
    "no positions": lambda s: replace(s, logprobs=s.logprobs.take(np.array([], dtype=np.intp))),
    "a negative position": put("positions", 0, -1),
    "the position of the last token": put("positions", 2, 8),
    "a position beyond the sample": put("positions", 2, 10**6),
    "the largest position": put("positions", 2, 2**31 - 1),
    "a middle position beyond the sample": put("positions", 1, 2**31 - 1),
    "positions that descend": put("positions", slice(None), [3, 0, 7]),
    "a position twice": put("positions", slice(None), [0, 7, 7]),
    "a label that is not the next token": put("label_ids", 1, 5),
    "a label outside the vocabulary": label_outside_vocabulary,
    "an id outside the vocabulary": put("alternative_ids", (1, 2), VOCAB),
    "an id of almost 2^32": put("alternative_ids", (1, 2), NO_TOKEN - 1),
    "the label among the alternatives": put("alternative_ids", (1, 4), 4),
    "an id twice": put("alternative_ids", (1, slice(0, 5, 4)), 30),
    "an absent id with mass": put("alternative_ids", (1, 4), NO_TOKEN),
    "an id without mass": without_mass,
    "alternatives that ascend": put("alternative_logprobs", (1, slice(0, 2)), np.log([0.15, 0.2])),
    **{f"NaN in {name}": put(name, (1, ...), np.nan) for name in FLOATS},
    **{f"{name} above 0": put(name, (1, ...), 1e-3) for name in FLOATS},
    **{f"infinite {name}": put(name, (1, ...), np.inf) for name in FLOATS},
    "a mass too large": put("tail_logprobs", 2, np.log(0.2 + 2e-4)),
    "a mass too small": put("label_logprobs", 2, np.log(0.25 - 2e-4)),
    "no mass": put("label_logprobs", 1, -np.inf),
}


def test_the_sample_that_the_invalid_ones_are_made_from_is_valid(path: Path, store: str) -> None:
    write_cache(path, store, [[valid_sample()]])
    assert cache_bits(path) == [sample_bits(valid_sample())]


@pytest.mark.parametrize("change", INVALID.values(), ids=INVALID.keys())
def test_an_invalid_record_is_refused_and_nothing_is_written(
    path: Path, store: str, change: Callable[[CachedSample], CachedSample]
) -> None:
    good = make_shards(17, [[12]])[0]
    with CacheWriter(path, make_manifest(store)) as writer:
        before = tree(path)
        refused(InvalidRecord, "invalid-record", lambda: writer.commit([*good, change(valid_sample())]))
        assert tree(path) == before
        assert not (path / "staging").exists()


def test_a_shard_of_no_samples_is_refused_and_nothing_is_written(path: Path, store: str) -> None:
    with CacheWriter(path, make_manifest(store)) as writer:
        before = tree(path)
        refused(InvalidRecord, "invalid-record", lambda: writer.commit([]))
        assert tree(path) == before


# --- hostile files ----------------------------------------------------------------------------------------------------


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def blake(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def sealed(body: bytes) -> bytes:
    """A JSON file of a cache with a checksum that matches: written by someone who means it."""
    return b'{"body":' + body + b',"checksum":"' + blake(body).encode() + b'"}\n'


def forge(path: Path, file: str, body: bytes) -> None:
    """Replace the manifest, the contents or the first shard's commit, with every checksum made to match."""
    if file != "commit":
        (path / f"{file}.json").write_bytes(sealed(body))
        return
    contents = json.loads((path / "contents.json").read_bytes())["body"]
    entry = contents["shards"][0]
    (path / "shards" / f"{entry['unit']}.json").write_bytes(sealed(body))
    entry["checksum"] = blake(sealed(body))
    (path / "contents.json").write_bytes(sealed(canonical(contents)))


def body_of(path: Path, file: str) -> Any:
    if file == "commit":
        unit = body_of(path, "contents")["shards"][0]["unit"]
        return json.loads((path / "shards" / f"{unit}.json").read_bytes())["body"]
    return json.loads((path / f"{file}.json").read_bytes())["body"]


def assign(body: Any, keys: Sequence[str | int], value: object) -> None:
    for key in keys[:-1]:
        body = body[key]
    body[keys[-1]] = value


NAMES = ["../../x", "..", "a/../b", "/etc/passwd", "a\0b", "", "a//b", "a/", "a\nb", "a\\b", "\ud800", "a" * 5000]
WRONG_TYPES: list[object] = [None, True, "1", 1.5, [], {}, [[]]]
COUNTS: list[object] = [0, -1, 1, 2**31, 2**39, 2**40, 10**30, *WRONG_TYPES]
HOSTILE: dict[tuple[str, tuple[str | int, ...]], list[object]] = {
    ("commit", ("files", 0, "name")): [*NAMES, None, 5],
    ("commit", ("files", 0, "size")): [-1, 2**50, 10**30, 2**49, *WRONG_TYPES],
    ("commit", ("files", 0, "checksum")): [None, 5, [], {}],
    ("commit", ("num_samples",)): COUNTS,
    ("commit", ("num_positions",)): COUNTS,
    ("commit", ("num_tokens",)): COUNTS,
    ("commit", ("num_tokens_cut",)): [-1, 2**40, 10**30, *WRONG_TYPES],
    ("commit", ("kept_mass",)): [None, "1", 1, 10**400, [], {}],
    ("commit", ("files",)): [None, {}, "x", 5, [], [None], [[]], [{}]],
    ("commit", ("blocks",)): [None, {}, "x", 5, [None], [[]], [[1, 2]], [[1, 2, 3, 4]]],
    ("commit", ("blocks", 0)): [
        [-1, 8, 0],
        [0, 0, 0],
        [0, -8, 0],
        [0, 8, 0],
        [0, 2**39, 0],
        [2**49, 8, 0],
        [2**60, 8, 0],
        ["0", 8, 0],
    ],
    ("commit", ("unit",)): ["0" * 32, "../../x", "A" * 32, "", None, 5, "0" * 32 + "\n"],
    ("contents", ("shards", 0, "unit")): ["0" * 32, "../../x", "A" * 32, "", None, 5, "0" * 32 + "\n"],
    ("contents", ("shards", 0, "checksum")): [None, 5, [], "0" * 32],
    ("contents", ("shards",)): [None, {}, "x", 5, [None], [[]], [{}]],
    ("manifest", ("store",)): ["", "parquet", "../zarr", None, 5, ["zarr"]],
    ("manifest", ("model", "vocab_size")): [-1, 0, 1, 5, 2**24 + 1, 10**30, *WRONG_TYPES],
    ("manifest", ("capture", "top_k")): [-1, 0, VOCAB, 4, 6, 39, 10**30, *WRONG_TYPES],
    ("manifest", ("capture", "max_length")): [-1, 0, 1, *WRONG_TYPES],
    ("manifest", ("model",)): [None, [], "x", {}],
    ("manifest", ("tokenizer",)): [[], "x", {}, 5],
    ("manifest", ("created_with",)): [None, [], "x", {"a": 5}, {"a": {}}],
    ("manifest", ("model_name",)): [None, 5, []],
    ("manifest", ("features",)): [None, 5, [[]], [{}], [5, "x"]],
    ("manifest", ("format_version",)): [True, 1.0],
}


@pytest.mark.parametrize("file", ["manifest", "contents", "commit"])
def test_hostile_values_are_refused_as_corrupt(written: Path, file: str) -> None:
    honest = body_of(written, file)
    before = tree(written)
    for keys, value in [(keys, v) for (name, keys), values in HOSTILE.items() if name == file for v in values]:
        body = json.loads(canonical(honest))
        assign(body, keys, value)
        forge(written, file, canonical(body))
        for read in (cache_bits, verify_strictly):
            with pytest.raises(CacheError) as caught:
                read(written)
            assert type(caught.value) is CorruptCache, (keys, value)
    forge(written, file, canonical(honest))
    assert tree(written) == before


def verify_strictly(path: Path) -> None:
    """`verify`, with a problem as an error."""
    report = verify(path)
    if not report.is_intact:
        raise CorruptCache(str(report.problems))


@pytest.mark.parametrize("file", ["manifest", "contents", "commit"])
def test_missing_and_extra_fields_are_refused(written: Path, file: str) -> None:
    honest = body_of(written, file)
    for name in honest:
        if file == "manifest" and name == "format_version":
            continue
        forge(written, file, canonical({k: v for k, v in honest.items() if k != name}))
        refused(CorruptCache, "corrupt", lambda: cache_bits(written))
    forge(written, file, canonical(honest | {"extra": 1}))
    refused(CorruptCache, "corrupt", lambda: cache_bits(written))


@pytest.mark.parametrize("file", ["manifest", "contents", "commit"])
@pytest.mark.parametrize(
    "body",
    [
        b"null",
        b"[]",
        b"[1]",
        b"5",
        b'"x"',
        b'{"format_version":1}',
        b"true",
        b"NaN",
        b"1e999",
        b"9" * 5000,
        b'"\\ud800"',
    ],
)
def test_another_kind_of_json_is_refused(written: Path, file: str, body: bytes) -> None:
    forge(written, file, body)
    refused(CorruptCache, "corrupt", lambda: cache_bits(written))


@pytest.mark.parametrize("file", ["manifest", "contents", "commit"])
def test_deep_nesting_is_refused(written: Path, file: str) -> None:
    honest = canonical(body_of(written, file)).decode()
    key = {"manifest": "model_name", "contents": "shards", "commit": "files"}[file]
    for depth in (100, *range(600, 1000, 20), 5000, 200_000):
        deep = "[" * depth + "]" * depth
        inside = honest.replace(f'"{key}":', f'"{key}":{deep},"zzz":', 1)
        for body in (deep, inside, '{"features":' + deep + "}"):
            forge(written, file, body.encode())
            refused(CorruptCache, "corrupt", lambda: cache_bits(written))


@pytest.mark.parametrize("file", ["manifest", "contents", "commit"])
@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff\xfe", b"\0" * 100, b"[]", b"{}", b'{"body":{}}', b'{"body":{},"checksum":5}', b"\xef\xbb\xbf{}"],
)
def test_what_is_not_the_envelope_is_refused(written: Path, file: str, data: bytes) -> None:
    unit = body_of(written, "contents")["shards"][0]["unit"]
    name = f"shards/{unit}.json" if file == "commit" else f"{file}.json"
    (written / name).write_bytes(data)
    refused(CorruptCache, "corrupt", lambda: cache_bits(written))


def test_an_absurdly_large_manifest_is_not_read(written: Path) -> None:
    with (written / "manifest.json").open("r+b") as f:
        f.truncate(2**40)  # a hole: takes no space
    assert "bytes" in refused(CorruptCache, "corrupt", lambda: LogitCache.open(written))


@pytest.mark.parametrize(("field", "value"), [("format_version", 2), ("format_version", 0), ("features", ["int8"])])
def test_an_unknown_format_is_refused_by_readers_and_writers(
    written: Path, store: str, field: str, value: object
) -> None:
    forge(written, "manifest", canonical(body_of(written, "manifest") | {field: value, "new_field": {}}))
    before = tree(written)
    for call in (LogitCache.open, verify, lambda p: CacheWriter(p, make_manifest(store))):
        message = refused(UnsupportedFormat, "unsupported-format", lambda c=call: c(written))  # type: ignore[misc]
        assert str(value) in message
    assert tree(written) == before


def test_a_shard_listed_twice_is_refused(written: Path) -> None:
    body = body_of(written, "contents")
    forge(written, "contents", canonical({"shards": body["shards"] + body["shards"][:1]}))
    refused(CorruptCache, "corrupt", lambda: LogitCache.open(written))


def test_a_file_listed_twice_is_refused(written: Path) -> None:
    body = body_of(written, "commit")
    forge(written, "commit", canonical(body | {"files": body["files"] + body["files"][:1]}))
    refused(CorruptCache, "corrupt", lambda: LogitCache.open(written))


def test_a_file_that_the_commit_does_not_list_is_not_trusted(written: Path) -> None:
    honest = body_of(written, "commit")
    unit = body_of(written, "contents")["shards"][0]["unit"]
    for i, file in enumerate(honest["files"]):
        forge(written, "commit", canonical(honest | {"files": honest["files"][:i] + honest["files"][i + 1 :]}))
        kept = (written / "shards" / unit / file["name"]).rename(written / "kept")
        refused(CorruptCache, "corrupt", lambda: cache_bits(written))
        kept.rename(written / "shards" / unit / file["name"])


def test_two_commits_exchanged_are_refused(written: Path) -> None:
    first, second = (written / "shards" / f"{e['unit']}.json" for e in body_of(written, "contents")["shards"])
    first.rename(written / "kept")
    second.rename(first)
    (written / "kept").rename(second)
    refused(CorruptCache, "corrupt", lambda: LogitCache.open(written))


def test_a_symlinked_file_is_refused(written: Path, tmp_path: Path) -> None:
    for file in [p for p in (written / "shards").rglob("*") if p.is_file() and p.parent.name != "shards"]:
        kept = file.rename(tmp_path / "kept")
        file.symlink_to(kept)
        refused(CorruptCache, "corrupt", lambda: cache_bits(written))
        file.unlink()
        kept.rename(file)
    assert verify(written).is_intact


# --- processes --------------------------------------------------------------------------------------------------------

_inherited: list[LogitCache] = []


def inherited_bits() -> list[tuple[object, ...]]:
    (cache,) = _inherited
    return [sample_bits(sample) for sample in cache.samples()]


def in_process(method: str, call: Callable[..., object], *args: object) -> object:
    with multiprocessing.get_context(method).Pool(1) as pool:
        return pool.apply_async(call, args).get(timeout=120)  # a dead worker fails instead of hanging


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_a_cache_that_is_open_here(written: Path, method: str) -> None:
    here = cache_bits(written)
    assert in_process(method, cache_bits, written) == here


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_worker_reads_the_cache_it_inherits(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = LogitCache.open(written)
    here = [sample_bits(sample) for sample in cache.samples()]
    monkeypatch.setattr(f"{__name__}._inherited", [cache])
    assert in_process("fork", inherited_bits) == here
    assert inherited_bits() == here
