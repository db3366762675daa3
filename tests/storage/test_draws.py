"""Draws from the tail: stored and read within their bounds, refused where they cannot be draws, whoever wrote them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support import format_reader
from support.storage_forging import body_of, canonical, forge
from support.storage_samples import (
    MAX_ERRORS,
    NO_TOKEN,
    TOP_K,
    VOCAB,
    assert_round_trip,
    captures,
    every_position,
    make_groups,
    make_manifest,
    make_record,
    record_bits,
    refused,
    tree,
    with_record,
    within,
    write_cache,
)
from support.storage_strategies import many, relaxed, seeds

from logitcache.storage import (
    BaseLogprobs,
    CachedSample,
    CacheWriter,
    CorruptCache,
    IdentityMismatch,
    InvalidRecord,
    LogitCache,
    convert,
    export_parquet,
    merge,
    verify,
)
from logitcache.storage.backend import rows_per_block
from logitcache.storage.encoding import encode, sample_table
from logitcache.storage.manifest import to_bytes
from logitcache.storage.records import concatenate
from logitcache.storage.statistics import describe

pytest_plugins = ["support.storage_fixtures"]
pytestmark = pytest.mark.usefixtures("no_fsync")

PRECISIONS = tuple(MAX_ERRORS)
NUM_DRAWS = 4


# --- round trip -------------------------------------------------------------------------------------------------------


@many
@given(
    seed=seeds,
    vocab=st.integers(2, 60),
    top_k=st.integers(1, 59),
    num_groups=st.none() | st.integers(2, 16),
    num_draws=st.integers(1, 70),
    precision=st.sampled_from(PRECISIONS),
)
def test_every_draw_comes_back_within_its_bound(
    seed: int, vocab: int, top_k: int, num_groups: int | None, num_draws: int, precision: str
) -> None:
    """K = V - 1, where there is no tail, and K = V - 2, where every draw is the one token of it."""
    rng = np.random.default_rng(seed)
    groups = None if num_groups is None else make_groups(rng, vocab, num_groups)
    top_k = min(top_k, vocab - 1)
    tokens = rng.integers(0, vocab, size=31, dtype=np.uint32)
    given_ = make_record(rng, tokens, np.arange(30, dtype=np.int32), vocab, top_k, groups, num_draws)
    manifest = make_manifest("zarr", vocab, top_k, precision=precision, token_groups=groups, num_draws=num_draws)
    assert_round_trip(given_, manifest.capture)


@relaxed
@given(seed=seeds, vocab=st.integers(2, 60), top_k=st.integers(1, 59), num_draws=st.integers(1, 9))
@pytest.mark.parametrize("precision", PRECISIONS)
def test_caches_hold_what_they_promise(
    store: str, precision: str, seed: int, vocab: int, top_k: int, num_draws: int
) -> None:
    """By the package and by the independent reader."""
    rng = np.random.default_rng(seed)
    top_k = min(top_k, vocab - 1)
    manifest = make_manifest(store, vocab, top_k, precision=precision, num_draws=num_draws)
    shards = [[every_position(rng, n, vocab, top_k, num_draws=num_draws) for n in part] for part in ([2, 270], [30])]
    with tempfile.TemporaryDirectory() as folder:
        path = write_cache(Path(folder) / "cache", store, shards, manifest)
        cache = LogitCache.open(path)
        assert cache.manifest == manifest
        for sample in (s for shard in shards for s in shard):
            within(cache.lookup(sample.token_ids), sample.logprobs, MAX_ERRORS[precision])
        assert verify(path).is_intact
        assert sum(len(s.positions) for s in format_reader.open_cache(path).samples()) == 299


@pytest.mark.parametrize(
    ("top_k", "num_draws", "rows"),
    [
        *[(1, 0, 256), (64, 0, 256), (4096, 0, 256), (4097, 0, 255), (2**17, 0, 8), (2**18 - 1, 0, 4)],
        *[(64, 64, 256), (1, 4096, 255), (4096, 4096, 128), (2**18 - 1, 4096, 3)],
    ],
)
def test_rows_of_a_block(top_k: int, num_draws: int, rows: int) -> None:
    """The numbers of docs/format.md; without draws those of caches that are there."""
    capture = make_manifest("zarr", 2**20, top_k, num_draws=num_draws).capture
    assert rows_per_block(capture) == rows
    stated = {"top_k": top_k} | ({"num_tail_samples": num_draws} if num_draws else {})
    assert format_reader.rows_per_block(stated) == rows


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_most_draws(path: Path, store: str, precision: str) -> None:
    """4,096 of them, in blocks of fewer rows."""
    sample = every_position(np.random.default_rng(60), 260, num_draws=4096)
    write_cache(path, store, [[sample]], make_manifest(store, precision=precision, num_draws=4096))
    within(LogitCache.open(path).lookup(sample.token_ids), sample.logprobs, MAX_ERRORS[precision])
    (found,) = format_reader.open_cache(path).samples()
    assert found.tail_sample_ids is not None and found.tail_sample_ids.shape == (259, 4096)


def test_a_manifest_without_draws_is_as_it_was(store: str) -> None:
    assert b"num_tail_samples" not in to_bytes(make_manifest(store))
    assert b'"num_tail_samples":4' in to_bytes(make_manifest(store, num_draws=4))


def test_rows_are_taken_joined_and_compared_with_their_draws() -> None:
    record = every_position(np.random.default_rng(61), 20, num_draws=NUM_DRAWS).logprobs
    assert record.num_tail_samples == NUM_DRAWS and replace_draws(record, None, None).num_tail_samples == 0
    assert set(record.columns()) >= {"tail_sample_ids", "tail_sample_logprobs"}
    parts = [record.take(slice(0, 7)), record.take(slice(7, 19))]
    assert concatenate(parts).equals(record)
    assert record.tail_sample_ids is not None
    other = record.tail_sample_ids.copy()
    other[3, 2] += 1
    assert not replace(record, tail_sample_ids=other).equals(record)
    assert not replace_draws(record, None, None).equals(record)


def replace_draws(record: BaseLogprobs, ids: Any, logprobs: Any) -> BaseLogprobs:
    return replace(record, tail_sample_ids=ids, tail_sample_logprobs=logprobs)


def test_where_captures_overlap_the_draws_of_one_count(path: Path, store: str) -> None:
    """Draws of two captures are never mixed in one row."""
    rng = np.random.default_rng(62)
    tokens = rng.integers(0, VOCAB, size=20, dtype=np.uint32)
    everywhere = np.arange(19, dtype=np.int32)
    wholes = [
        CachedSample(tokens, make_record(np.random.default_rng(63), tokens, everywhere, VOCAB, TOP_K, None, m))
        for m in (NUM_DRAWS, NUM_DRAWS + 1)
    ]
    again = wholes[1].logprobs  # the same rows, drawn from again
    assert again.tail_sample_ids is not None and again.tail_sample_logprobs is not None
    drawn = with_record(
        wholes[0],
        tail_sample_ids=again.tail_sample_ids[:, 1:].copy(),
        tail_sample_logprobs=again.tail_sample_logprobs[:, 1:].copy(),
    )
    (first,), (second,) = captures(wholes[0], [range(0, 12)]), captures(drawn, [range(6, 19)])
    write_cache(path, store, [[first], [second]], make_manifest(store, num_draws=NUM_DRAWS))
    found = LogitCache.open(path).lookup(tokens)
    assert len(found) == 19
    sources = [record_bits(r) for part in (first, second) for r in rows_of(part.logprobs)]
    assert all(record_bits(row) in sources for row in rows_of(found))
    (other,) = format_reader.open_cache(path).samples()
    present = np.isfinite(found.tail_logprobs)
    assert other.tail_sample_ids is not None and found.tail_sample_ids is not None
    assert np.array_equal(other.tail_sample_ids[present], found.tail_sample_ids[present])


def rows_of(record: BaseLogprobs) -> list[BaseLogprobs]:
    return [record.take(slice(i, i + 1)) for i in range(len(record))]


# --- conversion, merging, export, statistics --------------------------------------------------------------------------


def test_draws_survive_conversion_and_merging(tmp_path: Path, store: str) -> None:
    other = "arrow" if store == "zarr" else "zarr"
    rng = np.random.default_rng(64)
    samples = [every_position(rng, n, num_draws=NUM_DRAWS) for n in (300, 12)]
    write_cache(tmp_path / "exact", store, [samples], make_manifest(store, num_draws=NUM_DRAWS))
    convert(tmp_path / "exact", tmp_path / "same", store=other)
    convert(tmp_path / "same", tmp_path / "fine", store=store, precision="fine")
    convert(tmp_path / "fine", tmp_path / "compact", precision="compact")
    more = every_position(rng, 9, num_draws=NUM_DRAWS)
    fine = make_manifest(store, precision="fine", num_draws=NUM_DRAWS)
    write_cache(tmp_path / "more", store, [[more]], fine)
    merge([tmp_path / "fine", tmp_path / "more"], tmp_path / "merged")
    for name, error in (("same", 0), ("fine", 1 / 64), ("compact", 3 / 64), ("merged", 1 / 64)):
        cache = LogitCache.open(tmp_path / name)
        for sample in samples if name != "merged" else [*samples, more]:
            within(cache.lookup(sample.token_ids), sample.logprobs, error)
        assert verify(tmp_path / name).is_intact
        assert len(list(format_reader.open_cache(tmp_path / name).captures())) == len(cache)


def test_another_number_of_draws_is_another_identity(tmp_path: Path, store: str) -> None:
    for m in (0, 4, 5):
        sample = every_position(np.random.default_rng(m), 9, num_draws=m)
        write_cache(tmp_path / str(m), store, [[sample]], make_manifest(store, num_draws=m))
    for a, b in ((0, 4), (4, 5), (5, 0)):
        both = [tmp_path / str(a), tmp_path / str(b)]
        message = refused(IdentityMismatch, "identity-mismatch", lambda both=both: merge(both, tmp_path / "new"))  # type: ignore[misc]
        stated = f"{a} in" if a else "none in"
        assert f"capture.num_tail_samples: {stated}" in message and not (tmp_path / "new").exists()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_draws_are_exported(tmp_path: Path, store: str, precision: str) -> None:
    sample = no_tail_in_some_rows()
    path = write_cache(
        tmp_path / "cache", store, [[sample]], make_manifest(store, precision=precision, num_draws=NUM_DRAWS)
    )
    export_parquet(path, tmp_path / "table.parquet")
    (row,) = pq.read_table(tmp_path / "table.parquet").to_pylist()
    record = LogitCache.open(path).lookup(sample.token_ids)
    assert record.tail_sample_ids is not None and record.tail_sample_logprobs is not None
    assert row["tail_sample_ids"] == [record.tail_sample_ids[0].tolist(), [], record.tail_sample_ids[2].tolist()]
    assert [len(r) for r in row["tail_sample_logprobs"]] == [NUM_DRAWS, 0, NUM_DRAWS]
    assert row["tail_sample_logprobs"][2] == record.tail_sample_logprobs[2].tolist()


def test_statistics_count_different_draws(path: Path, store: str) -> None:
    sample = no_tail_in_some_rows()
    write_cache(path, store, [[sample]], make_manifest(store, precision="fine", num_draws=NUM_DRAWS))
    found = describe(LogitCache.open(path))
    assert found.num_distinct_draws.tolist() == [3, 0, 3]
    assert found.num_distinct_draws_percentiles()[50] == 3
    assert any(name.startswith("tail_sample_ids") for name in found.bytes_by_column)
    assert any(name.startswith("tail_sample_drops") for name in found.bytes_by_column)


# --- what cannot be draws ---------------------------------------------------------------------------------------------


def no_tail_in_some_rows() -> CachedSample:
    """Positions 0, 3, 7 of 9 tokens; rows 0 and 2 have a tail of 0.2, of which 30 is drawn twice, row 1 has none."""
    token_ids = np.arange(9, dtype=np.uint32)
    positions = np.array([0, 3, 7], dtype=np.int32)
    kept = np.tile(np.array([0.2, 0.15, 0.1, 0.05, 0.05]), (3, 1))
    kept[1, 0] += 0.2
    tails, draws = np.array([0.2, 0, 0.2]), np.tile(np.array([0.08, 0.08, 0.05, 0.01]), (3, 1))
    draws[1] = 0
    ids = np.tile(np.array([30, 30, 31, 32], dtype=np.uint32), (3, 1))
    ids[1] = NO_TOKEN
    with np.errstate(divide="ignore"):
        record = BaseLogprobs(
            positions=positions,
            label_ids=token_ids[positions + 1],
            label_logprobs=np.log(np.full(3, 0.25)).astype(np.float32),
            alternative_ids=np.tile(np.arange(20, 20 + TOP_K, dtype=np.uint32), (3, 1)),
            alternative_logprobs=np.log(kept).astype(np.float32),
            tail_logprobs=np.log(tails).astype(np.float32),
            tail_sample_ids=ids,
            tail_sample_logprobs=np.log(draws).astype(np.float32),
        )
    return CachedSample(token_ids, record)


Change = Callable[[NDArray[Any], NDArray[Any]], None]
"""Of the draws' ids and log-probabilities [3, M], in place."""


def put(ids: Sequence[int] | None = None, masses: Sequence[float] | None = None, row: int = 2) -> Change:
    """Another row of draws."""

    def change(all_ids: NDArray[Any], logprobs: NDArray[Any]) -> None:
        if ids is not None:
            all_ids[row] = ids
        if masses is not None:
            with np.errstate(divide="ignore"):
                logprobs[row] = np.log(np.array(masses))

    return change


def changed(sample: CachedSample, change: Change) -> CachedSample:
    assert sample.logprobs.tail_sample_ids is not None and sample.logprobs.tail_sample_logprobs is not None
    ids, logprobs = sample.logprobs.tail_sample_ids.copy(), sample.logprobs.tail_sample_logprobs.copy()
    change(ids, logprobs)
    return with_record(sample, tail_sample_ids=ids, tail_sample_logprobs=logprobs)


NAN = float("nan")
NO_DRAWS: dict[str, Change] = {
    "the label": put([30, 30, 31, 8]),
    "the label alone": put([8, 8, 8, 8], [0.08] * 4),
    "an alternative": put([30, 30, 31, 24]),
    "the best alternative": put([20, 30, 31, 32]),
    "an id outside the vocabulary": put([30, 30, VOCAB, 32]),
    "an id of almost 2^24": put([30, 30, 2**24 - 1, 32]),
    "above the tail": put([30] * 4, [0.2 * np.exp(4e-2)] * 4),
    "one above the tail": put([29, 30, 31, 32], [0.3, 0.08, 0.05, 0.01]),
    "above 0": put([30] * 4, [1.1] * 4),
    "that ascend": put([30, 31, 32, 33], [0.05, 0.08, 0.05, 0.01]),
    "of which equal ones are apart": put([30, 31, 30, 32], [0.08, 0.08, 0.08, 0.01]),
    "of which a token has two log-probabilities": put([30, 30, 31, 32], [0.1, 0.05, 0.05, 0.01]),
    "one of them absent": put([30, 30, 31, NO_TOKEN], [0.08, 0.08, 0.05, 0]),
    "all absent": put([NO_TOKEN] * 4, [0] * 4),
    "an id without mass": put([30, 30, 31, 32], [0.08, 0.08, 0.05, 0]),
    "draws of nothing": put([30] * 4, [1e-9] * 4, row=1),
}
IN_FLOATS: dict[str, Change] = {
    "NaN at first": put(None, [NAN, 0.08, 0.05, 0.01]),
    "NaN between": put(None, [0.08, 0.08, NAN, 0.01]),
    "NaN at last": put(None, [0.08, 0.08, 0.05, NAN]),
    "NaN": put(None, [NAN] * 4),
    "infinite": put(None, [np.inf] * 4),
    "a little above the tail": put([30] * 4, [0.2 * np.exp(2e-4)] * 4),
}
NOT_STORED: dict[str, Change] = {
    "an id of almost 2^32": put([30, 30, NO_TOKEN - 1, 32]),
    "an absent id with mass": put([30, 30, 31, NO_TOKEN]),
    "ids of nothing": put([30] * 4, None, row=1),
}
"""What the columns cannot say."""


def shaped(change: Callable[[NDArray[Any]], NDArray[Any]], *names: str) -> Callable[[CachedSample], CachedSample]:
    return lambda s: with_record(s, **{name: change(getattr(s.logprobs, name)) for name in names})


BOTH = ("tail_sample_ids", "tail_sample_logprobs")
OTHER_SHAPES: dict[str, Callable[[CachedSample], CachedSample]] = {
    **{f"no {name}": lambda s, n=name: with_record(s, **{n: None}) for name in BOTH},
    **{f"{name} one row short": shaped(lambda a: a[:-1], name) for name in BOTH},
    **{f"{name} one column short": shaped(lambda a: a[:, :-1], name) for name in BOTH},
    **{f"{name} of one dimension more": shaped(lambda a: a[..., None], name) for name in BOTH},
    **{f"{name} flat": shaped(lambda a: a[:, 0], name) for name in BOTH},
    "ids of another type": shaped(lambda a: a.astype(np.int64), "tail_sample_ids"),
    "logprobs of another type": shaped(lambda a: a.astype(np.float64), "tail_sample_logprobs"),
    "one draw less": shaped(lambda a: a[:, :-1], *BOTH),
    "no columns": shaped(lambda a: a[:, :0], *BOTH),
    "none": lambda s: with_record(s, tail_sample_ids=None, tail_sample_logprobs=None),
}


def by(change: Change) -> Callable[[CachedSample], CachedSample]:
    return lambda s: changed(s, change)


INVALID = {name: by(change) for name, change in (NO_DRAWS | IN_FLOATS | NOT_STORED).items()} | OTHER_SHAPES


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_sample_that_the_invalid_ones_are_made_from_is_valid(path: Path, store: str, precision: str) -> None:
    sample = no_tail_in_some_rows()
    write_cache(path, store, [[sample]], make_manifest(store, precision=precision, num_draws=NUM_DRAWS))
    within(LogitCache.open(path).lookup(sample.token_ids), sample.logprobs, MAX_ERRORS[precision])


@pytest.mark.parametrize("precision", ["exact", "fine"])
@pytest.mark.parametrize("change", INVALID.values(), ids=INVALID.keys())
def test_invalid_draws_are_refused_and_nothing_is_written(
    path: Path, store: str, change: Callable[[CachedSample], CachedSample], precision: str
) -> None:
    with CacheWriter(path, make_manifest(store, precision=precision, num_draws=NUM_DRAWS)) as writer:
        before = tree(path)
        refused(InvalidRecord, "invalid-record", lambda: writer.commit([change(no_tail_in_some_rows())]))
        assert tree(path) == before


def test_draws_where_the_manifest_has_none_are_refused(path: Path, store: str) -> None:
    with CacheWriter(path, make_manifest(store)) as writer:
        refused(InvalidRecord, "invalid-record", lambda: writer.commit([no_tail_in_some_rows()]))
        empty = shaped(lambda a: a[:, :0], *BOTH)(no_tail_in_some_rows())
        refused(InvalidRecord, "invalid-record", lambda: writer.commit([empty]))


@pytest.mark.parametrize("precision", ["fine", "compact"])
def test_draws_beyond_the_range_are_refused(path: Path, store: str, precision: str) -> None:
    """65,535 steps or more below 0 are not a drop."""
    deep = no_tail_in_some_rows().logprobs.take(slice(0, 1))
    nats = -65_535 / {"fine": 32, "compact": 16}[precision]
    deep = replace(
        deep,
        label_logprobs=np.log(np.full(1, 0.45, dtype=np.float32)),
        tail_logprobs=np.full(1, nats, dtype=np.float32),
        tail_sample_logprobs=np.full((1, NUM_DRAWS), nats, dtype=np.float32),
        tail_sample_ids=np.full((1, NUM_DRAWS), 30, dtype=np.uint32),
    )
    sample = CachedSample(no_tail_in_some_rows().token_ids, deep)
    with CacheWriter(path / "a", make_manifest(store, precision=precision, num_draws=NUM_DRAWS)) as writer:
        message = refused(InvalidRecord, "invalid-record", lambda: writer.commit([sample]))
        assert "tail_sample_logprobs" in message and "exact" in message
    write_cache(path / "b", store, [[sample]], make_manifest(store, num_draws=NUM_DRAWS))


def forged(path: Path, store: str, precision: str, change: Change) -> Path:
    """A cache of which every checksum is right, with draws that no writer would take."""
    manifest = make_manifest(store, precision=precision, num_draws=NUM_DRAWS)
    sample = no_tail_in_some_rows()
    columns = encode(sample.logprobs, manifest.capture)
    bad = changed(sample, change).logprobs
    assert bad.tail_sample_ids is not None and bad.tail_sample_logprobs is not None
    columns["tail_sample_ids"] = np.where(bad.tail_sample_ids == NO_TOKEN, np.uint32(0), bad.tail_sample_ids)
    logprobs = bad.tail_sample_logprobs
    if precision == "exact":
        columns["tail_sample_logprobs"] = logprobs
    else:
        nothing = logprobs == -np.inf
        steps = np.rint(np.where(nothing, 0, logprobs) * -{"fine": 32, "compact": 16}[precision])
        drops = np.diff(np.maximum(steps, 0), axis=1, prepend=0)
        columns["tail_sample_drops"] = np.where(nothing, 65535, np.maximum(drops, 0)).astype("<u2")
    with CacheWriter(path, manifest) as writer, pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "array_equal", lambda a, b: True)  # NaN is not what was given
        writer.commit_columns(sample_table([sample]), columns, 1.0)
        writer.finalize()
    return path


NOT_IN_STEPS = {"that ascend", "above 0"}
FORGED = [
    *(("exact", name) for name in NO_DRAWS | IN_FLOATS),
    *((precision, name) for precision in ("fine", "compact") for name in NO_DRAWS if name not in NOT_IN_STEPS),
]


@pytest.mark.parametrize(("precision", "name"), FORGED)
def test_hostile_draws_under_valid_checksums_are_refused(path: Path, store: str, precision: str, name: str) -> None:
    forged(path, store, precision, (NO_DRAWS | IN_FLOATS)[name])
    sample = no_tail_in_some_rows()
    refused(CorruptCache, "corrupt", lambda: LogitCache.open(path).lookup(sample.token_ids))
    refused(CorruptCache, "corrupt", lambda: convert(path, path.with_name("other"), precision="compact"))
    assert len(verify(path).problems) == 1
    with pytest.raises(format_reader.FormatError):
        list(format_reader.open_cache(path).samples())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_forger_writes_a_cache_where_nothing_is_changed(path: Path, store: str, precision: str) -> None:
    forged(path, store, precision, lambda ids, logprobs: None)
    within(LogitCache.open(path).lookup(np.arange(9)), no_tail_in_some_rows().logprobs, MAX_ERRORS[precision])
    assert verify(path).is_intact and list(format_reader.open_cache(path).samples())


# --- manifest ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, 0, -1, 3, 5, 4097, 10**30, "4", 4.0, True, [4], {}])
def test_a_forged_number_of_draws_is_refused(path: Path, store: str, value: object) -> None:
    """Also the field left out (None), where the feature says that it is there."""
    write_cache(path, store, [[no_tail_in_some_rows()]], make_manifest(store, num_draws=NUM_DRAWS))
    body = body_of(path, "manifest")
    del body["capture"]["num_tail_samples"]
    if value is not None:
        body["capture"]["num_tail_samples"] = value
    forge(path, "manifest", canonical(body))
    refused(CorruptCache, "corrupt", lambda: LogitCache.open(path).sample(0))
    with pytest.raises((format_reader.FormatError, ValueError, KeyError)):
        list(format_reader.open_cache(path).samples())


def test_the_feature_is_there_exactly_with_the_field(path: Path, store: str) -> None:
    write_cache(path, store, [[no_tail_in_some_rows()]], make_manifest(store, num_draws=NUM_DRAWS))
    honest = body_of(path, "manifest")
    for features in ([], ["tail-groups"], ["tail-groups", "tail-samples"]):
        forge(path, "manifest", canonical(honest | {"reader_features": features}))
        refused(CorruptCache, "corrupt", lambda: LogitCache.open(path))
        with pytest.raises(format_reader.FormatError):
            format_reader.open_cache(path)


@pytest.mark.parametrize("num_draws", [-1, 4097, 2**40])
def test_a_writer_refuses_a_number_of_draws_out_of_bounds(path: Path, store: str, num_draws: int) -> None:
    manifest = make_manifest(store, num_draws=4)
    manifest = replace(manifest, capture=replace(manifest.capture, num_tail_samples=num_draws))
    with pytest.raises(ValueError, match="num_tail_samples"):
        CacheWriter(path, manifest)
    assert not path.exists()
