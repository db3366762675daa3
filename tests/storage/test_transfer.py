"""Merging, converting and exporting caches: the same numbers, byte for byte or within the stated error."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.storage_samples import (
    MAX_ERRORS,
    NO_TOKEN,
    SHARDS,
    STORES,
    VOCAB,
    Shards,
    by_tokens,
    cache_bits,
    captures,
    every_position,
    flat,
    lasting,
    make_groups,
    make_manifest,
    make_sample,
    make_shards,
    record_bits,
    refused,
    tree,
    within,
    write_cache,
)

from logitcache.storage import (
    CachedSample,
    CacheWriter,
    CorruptCache,
    IdentityMismatch,
    IncompleteCache,
    LogitCache,
    NotACache,
    convert,
    copy_samples,
    export_parquet,
    merge,
    prune,
    sample_id,
    verify,
)

pytest_plugins = ["support.storage_fixtures"]
pytestmark = pytest.mark.usefixtures("no_fsync")

GROUPS = make_groups(np.random.default_rng(50), VOCAB, 4)
ORDER = list(MAX_ERRORS)
"""Precisions from the most to the least exact."""


def grouped_shards(seed: int, lengths: Sequence[Sequence[int]]) -> list[list[CachedSample]]:
    rng = np.random.default_rng(seed)
    return [[every_position(rng, n, token_groups=GROUPS) for n in shard] for shard in lengths]


def write(path: Path, store: str, shards: Shards, precision: str = "exact", groups: bool = False) -> Path:
    partition = GROUPS if groups else None
    manifest = make_manifest(store, precision=precision, token_groups=partition)
    return write_cache(path, store, shards, manifest, partition)


def damage(path: Path) -> None:
    """Cut the largest file that lookups read."""
    files = [p for p in (path / "shards").rglob("*") if p.suffix != ".json" and p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


# --- merge ------------------------------------------------------------------------------------------------------------


def test_merged_shards_are_the_same_to_the_byte(tmp_path: Path, store: str) -> None:
    parts = make_shards(51, [[30, 4], [600], [7, 8], [25]])
    sources = [write(tmp_path / "a", store, parts[:2]), write(tmp_path / "b", store, parts[1:3])]
    sources.append(write(tmp_path / "c", store, parts[3:]))
    before = [tree(source) for source in sources]
    merged = merge(sources, tmp_path / "merged")
    assert merged.num_shards == 4  # the one that two of them hold is taken once
    assert lasting(tmp_path / "merged") == lasting(write(tmp_path / "at once", store, parts))
    assert by_tokens(list(merged.samples())) == by_tokens(flat(parts))
    assert [tree(source) for source in sources] == before
    assert verify(tmp_path / "merged").is_intact


def test_merging_one_cache_copies_it(tmp_path: Path, store: str) -> None:
    source = write(tmp_path / "a", store, SHARDS)
    merge([source], tmp_path / "b")
    assert lasting(tmp_path / "b") == lasting(source)


def test_a_cache_gains_what_is_merged_into_it(tmp_path: Path, store: str) -> None:
    target, other = write(tmp_path / "a", store, SHARDS[:1]), write(tmp_path / "b", store, SHARDS[1:])
    merge([other], target)
    assert lasting(target) == lasting(write(tmp_path / "at once", store, SHARDS))
    before = lasting(target)
    merge([target, other], target)
    assert lasting(target) == before


def test_a_base_that_is_spelt_otherwise_is_merged_where_it_is_one(tmp_path: Path, store: str) -> None:
    """By a comparison that knows the class of the model: its rows go into shards of the first cache's identity."""
    parts = make_shards(53, [[30, 4], [60, 3]])
    manifest = make_manifest(store)
    spelt = replace(manifest, model=replace(manifest.model, config='{"model_type":"test","use":1}'))
    sources = [write(tmp_path / "a", store, parts[:1]), write_cache(tmp_path / "b", store, parts[1:], spelt)]
    told = refused(IdentityMismatch, "identity-mismatch", lambda: merge(sources, tmp_path / "c"))
    assert "model.config.use: none in " in told and not (tmp_path / "c").exists()
    merge(sources, tmp_path / "c", lambda mine, theirs: {})
    assert lasting(tmp_path / "c") == lasting(write(tmp_path / "at once", store, parts))


def test_chats_of_two_templates_do_not_merge(tmp_path: Path, store: str) -> None:
    """As `precompute` refuses to add them: the same chats would be learnt twice. What none rendered goes with any."""
    parts, templates = make_shards(56, [[30], [9], [7]]), ["a" * 32, "b" * 32, ""]
    paths = [tmp_path / str(number) for number in range(3)]
    for path, part, template in zip(paths, parts, templates, strict=True):
        with CacheWriter(path, make_manifest(store)) as writer:
            writer.commit(part, template)
            writer.finalize()
    told = refused(IdentityMismatch, "identity-mismatch", lambda: merge(paths[:2], tmp_path / "c"))
    assert f"{'b' * 32} in {paths[1]}, {'a' * 32} in {paths[0]}" in told and not (tmp_path / "c").exists()
    merge(paths[::2], tmp_path / "c")
    before = lasting(tmp_path / "c")
    refused(IdentityMismatch, "identity-mismatch", lambda: merge(paths[1:2], tmp_path / "c"))
    assert lasting(tmp_path / "c") == before


def test_the_chat_template_of_a_shard_goes_with_its_samples(tmp_path: Path, store: str) -> None:
    """Through every way from cache to cache; samples of two templates never come to share a shard."""
    parts, templates = make_shards(54, [[30, 4], [9], [7, 8]]), ["a" * 32, "", "b" * 32]
    with CacheWriter(tmp_path / "a", make_manifest(store)) as writer:
        for part, template in zip(parts, templates, strict=True):
            writer.commit(part, template)
        assert writer.chat_templates == {"a" * 32, "b" * 32}
        writer.finalize()
    of = {sample_id(s.token_ids): t for part, t in zip(parts, templates, strict=True) for s in part}
    convert(tmp_path / "a", tmp_path / "converted", precision="fine")
    merge([tmp_path / "a"], tmp_path / "merged")
    with CacheWriter(tmp_path / "copied", make_manifest(store)) as writer:
        copy_samples(
            writer, LogitCache.open(tmp_path / "a"), {sample_id(s.token_ids): s.logprobs.positions for s in flat(parts)}
        )
        writer.finalize()
    prune(tmp_path / "merged", {key for key in of if key != sample_id(parts[0][0].token_ids)})
    for name, num in (("a", 5), ("converted", 5), ("merged", 4), ("copied", 5)):
        cache = LogitCache.open(tmp_path / name)
        found = {sample_id(s.token_ids): s.chat_template for s in cache.stored_samples()}
        assert len(found) == num and found.items() <= of.items()
        assert cache.chat_templates() == {"a" * 32, "b" * 32}
        assert cache.chat_templates([sample_id(parts[1][0].token_ids)]) == frozenset()


def test_a_sample_that_is_also_stored_as_text_was_not_rendered(tmp_path: Path, store: str) -> None:
    (part,) = make_shards(55, [[30]])
    record = part[0].logprobs
    halves = [replace(part[0], logprobs=record.take(rows)) for rows in (slice(0, 10), slice(10, len(record)))]
    with CacheWriter(tmp_path / "c", make_manifest(store)) as writer:
        writer.commit(halves[:1], "a" * 32)
        writer.commit(halves[1:])
        writer.finalize()
    (stored,) = LogitCache.open(tmp_path / "c").stored_samples()
    assert stored.chat_template == "" and len(stored.positions) == len(record)


def test_captures_in_several_caches_are_united(tmp_path: Path, store: str) -> None:
    whole = every_position(np.random.default_rng(52), 25)
    first, second = captures(whole, [[1, 4, 9], [0, 4, 20]])
    sources = [write(tmp_path / "a", store, [[first]]), write(tmp_path / "b", store, [[second, *SHARDS[0]]])]
    merged = merge(sources, tmp_path / "merged")
    assert len(merged) == 4
    expected = whole.logprobs.take(np.array([0, 1, 4, 9, 20]))
    assert record_bits(merged.lookup(whole.token_ids)) == record_bits(expected)


def test_caches_of_nothing_merge_into_nothing(tmp_path: Path, store: str) -> None:
    merged = merge([write(tmp_path / "a", store, []), write(tmp_path / "b", store, [])], tmp_path / "c")
    assert len(merged) == 0 and verify(tmp_path / "c").is_intact
    with pytest.raises(ValueError, match="source"):
        merge([], tmp_path / "d")
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("where", ["source", "target"])
@pytest.mark.parametrize("difference", ["top_k", "store", "precision", "min_mass", "tail_groups"])
def test_another_identity_is_refused_before_anything_is_written(
    tmp_path: Path, store: str, where: str, difference: str
) -> None:
    rng = np.random.default_rng(53)
    source = write(tmp_path / "a", store, SHARDS)
    manifest, groups = {
        "top_k": (make_manifest(store, top_k=6), None),
        "store": (make_manifest("arrow" if store == "zarr" else "zarr"), None),
        "precision": (make_manifest(store, precision="fine"), None),
        "min_mass": (make_manifest(store, min_mass=0.5), None),
        "tail_groups": (make_manifest(store, token_groups=GROUPS), GROUPS),
    }[difference]
    sample = every_position(rng, 9, top_k=manifest.capture.top_k, token_groups=groups)
    shards = [] if difference == "min_mass" else [[sample]]
    other = write_cache(tmp_path / "b", manifest.store, shards, manifest, groups)
    before = tree(tmp_path)
    if where == "source":
        refused(IdentityMismatch, "identity-mismatch", lambda: merge([source, source, other], tmp_path / "target"))
        assert not (tmp_path / "target").exists()
    else:
        refused(IdentityMismatch, "identity-mismatch", lambda: merge([source], other))
    assert tree(tmp_path) == before


def test_a_source_that_is_no_finished_cache_is_refused_before_anything_is_written(tmp_path: Path, store: str) -> None:
    source, other = write(tmp_path / "a", store, SHARDS), write(tmp_path / "b", store, SHARDS)
    (other / "contents.json").unlink()
    refused(IncompleteCache, "incomplete", lambda: merge([source, other], tmp_path / "target"))
    refused(NotACache, "not-a-cache", lambda: merge([source, tmp_path / "none"], tmp_path / "target"))
    assert not (tmp_path / "target").exists()


def test_a_damaged_source_is_refused_and_the_target_is_no_cache(tmp_path: Path, store: str) -> None:
    source = write(tmp_path / "a", store, SHARDS)
    damage(source)
    for call in (lambda t: merge([source], t), lambda t: convert(source, t, precision="compact")):
        refused(CorruptCache, "corrupt", lambda c=call: c(tmp_path / "target"))  # type: ignore[misc]
        refused(IncompleteCache, "incomplete", lambda: LogitCache.open(tmp_path / "target"))
        for file in (tmp_path / "target").glob("manifest.json"):
            file.parent.rename(tmp_path / f"failed {len(list(tmp_path.iterdir()))}")


def test_tail_groups_survive_merging(tmp_path: Path, store: str) -> None:
    shards = grouped_shards(54, [[30], [20, 9]])
    sources = [write(tmp_path / f"{n}", store, [shard], groups=True) for n, shard in enumerate(shards)]
    merged = merge(sources, tmp_path / "merged")
    assert same_groups(merged.token_groups())
    assert by_tokens(list(merged.samples())) == by_tokens(flat(shards))


def same_groups(found: NDArray[np.uint8] | None) -> bool:
    return found is not None and np.array_equal(found, GROUPS)


# --- convert ----------------------------------------------------------------------------------------------------------

ALLOWED = [(a, b) for a, b in itertools.product(ORDER, ORDER) if ORDER.index(b) >= ORDER.index(a)]


@pytest.mark.parametrize("target_store", STORES)
@pytest.mark.parametrize(("precision", "to"), ALLOWED)
@pytest.mark.parametrize("groups", [False, True], ids=["plain", "groups"])
def test_converted_numbers_are_within_the_stated_error(
    tmp_path: Path, store: str, target_store: str, precision: str, to: str, groups: bool
) -> None:
    shards = grouped_shards(55, [[30, 300], [2]]) if groups else make_shards(55, [[30, 300], [2]])
    source = write(tmp_path / "a", store, shards, precision, groups)
    before = tree(source)
    cache = convert(source, tmp_path / "b", target_store, to)
    capture = cache.manifest.capture
    added = MAX_ERRORS[to] if to != precision else 0.0
    assert (cache.manifest.store, capture.precision) == (target_store, to)
    assert capture.max_error == MAX_ERRORS[precision] + added
    assert cache.contents_checksum == LogitCache.open(tmp_path / "b").contents_checksum
    original = LogitCache.open(source)
    assert len(cache) == len(original) and cache.num_shards == original.num_shards
    given = {s.token_ids.tobytes(): s for s in original.samples()}
    for found in cache.samples():  # in another order: units have other names
        given_ = given.pop(found.token_ids.tobytes())
        assert found.num_tokens_cut == given_.num_tokens_cut
        within(found.logprobs, given_.logprobs, added, capture.max_error)
    assert not given
    for sample in flat(shards):
        within(cache.lookup(sample.token_ids), sample.logprobs, capture.max_error)
    assert same_groups(cache.token_groups()) == groups
    assert verify(tmp_path / "b").is_intact
    assert tree(source) == before


def overlapping(seed: int) -> list[list[CachedSample]]:
    """Shards of which three hold some of the same positions of a sample, with other numbers, and one all of them."""
    rng = np.random.default_rng(seed)
    whole = make_sample(rng, 25)
    parts = ([2, 3, 4], [3, 4, 9], [3], [1, 2, 3, 4, 9], [4, 7])
    again = [make_sample(rng, 0, positions=list(p), token_ids=whole.token_ids) for p in parts]
    *alone, last = [replace(sample, num_tokens_cut=0) for sample in again]
    return [*([sample] for sample in alone), [make_sample(rng, 12), last]]


def stored(path: Path) -> dict[bytes, tuple[object, ...]]:
    return by_tokens(list(LogitCache.open(path).samples()))


@pytest.mark.parametrize("seed", range(4))
def test_rows_that_count_count_after_a_conversion_though_units_have_another_order(
    tmp_path: Path, store: str, seed: int
) -> None:
    source = write(tmp_path / "a", store, overlapping(seed))
    other = "arrow" if store == "zarr" else "zarr"
    convert(source, tmp_path / "b", other)
    assert stored(tmp_path / "b") == stored(source)
    assert verify(tmp_path / "b").is_intact
    before = lasting(tmp_path / "b")
    (tmp_path / "b" / "contents.json").unlink()
    next((tmp_path / "b" / "shards").glob("*.json")).unlink()
    convert(source, tmp_path / "b", other)  # killed, and again
    assert lasting(tmp_path / "b") == before


def test_fine_to_compact_states_both_errors(tmp_path: Path, store: str) -> None:
    shards = make_shards(56, [[300, 40]])
    fine = convert(write(tmp_path / "a", store, shards), tmp_path / "b", precision="fine")
    compact = convert(fine.path, tmp_path / "c", precision="compact")
    assert compact.manifest.capture.max_error == 3 / 64
    for sample in flat(shards):
        within(compact.lookup(sample.token_ids), sample.logprobs, 3 / 64)
    again = convert(compact.path, tmp_path / "d", precision="compact")
    assert again.manifest.capture.max_error == 3 / 64
    assert lasting(tmp_path / "d") == lasting(tmp_path / "c")


@settings(deadline=None, max_examples=15, database=None)
@given(seed=st.integers(0, 2**32 - 1), vocab=st.integers(2, 60), top_k=st.integers(1, 59))
def test_two_conversions_stay_within_both_errors(
    tmp_path_factory: pytest.TempPathFactory, store: str, seed: int, vocab: int, top_k: int
) -> None:
    rng = np.random.default_rng(seed)
    top_k = min(top_k, vocab - 1)
    samples = [every_position(rng, 60, vocab, top_k)]
    path = tmp_path_factory.mktemp("converted")
    write_cache(path / "a", store, [samples], make_manifest(store, vocab, top_k))
    convert(path / "a", path / "b", precision="fine")
    cache = convert(path / "b", path / "c", "arrow" if store == "zarr" else "zarr", "compact")
    within(cache.lookup(samples[0].token_ids), samples[0].logprobs, 3 / 64)


@pytest.mark.parametrize("precision", ORDER)
def test_converting_to_the_same_is_a_copy_and_there_and_back_too(tmp_path: Path, store: str, precision: str) -> None:
    source = write(tmp_path / "a", store, SHARDS, precision)
    convert(source, tmp_path / "b")
    assert lasting(tmp_path / "b") == lasting(source)
    convert(source, tmp_path / "c", "arrow" if store == "zarr" else "zarr")
    convert(tmp_path / "c", tmp_path / "d", store)
    assert lasting(tmp_path / "d") == lasting(source)


@pytest.mark.parametrize(("precision", "to"), [p for p in itertools.product(ORDER, ORDER) if p not in ALLOWED])
def test_a_finer_precision_is_refused(tmp_path: Path, store: str, precision: str, to: str) -> None:
    source = write(tmp_path / "a", store, SHARDS, precision)
    with pytest.raises(ValueError, match="finer"):
        convert(source, tmp_path / "b", precision=to)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("settings_", [{"precision": "float16"}, {"store": "parquet"}])
def test_what_is_no_precision_or_store_is_refused(tmp_path: Path, store: str, settings_: dict[str, str]) -> None:
    source = write(tmp_path / "a", store, SHARDS)
    with pytest.raises(ValueError, match=next(iter(settings_))):
        convert(source, tmp_path / "b", **settings_)
    assert not (tmp_path / "b").exists()


def test_a_conversion_goes_on_where_it_was_interrupted_and_takes_no_other_target(tmp_path: Path, store: str) -> None:
    source = write(tmp_path / "a", store, SHARDS)
    convert(source, tmp_path / "b", precision="fine")
    before = lasting(tmp_path / "b")
    (tmp_path / "b" / "contents.json").unlink()
    next((tmp_path / "b" / "shards").glob("*.json")).unlink()
    convert(source, tmp_path / "b", precision="fine")
    assert lasting(tmp_path / "b") == before
    refused(IdentityMismatch, "identity-mismatch", lambda: convert(source, tmp_path / "b", precision="compact"))
    assert lasting(tmp_path / "b") == before


def test_captures_survive_conversion(tmp_path: Path, store: str) -> None:
    whole = every_position(np.random.default_rng(57), 25)
    first, second = captures(whole, [[1, 4, 9], [0, 4, 20]])
    cache = convert(write(tmp_path / "a", store, [[first], [second, *SHARDS[0]]]), tmp_path / "b", precision="fine")
    assert len(cache) == 4
    within(cache.lookup(whole.token_ids), whole.logprobs.take(np.array([0, 1, 4, 9, 20])), 1 / 64)


# --- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ORDER)
def test_exported_values_are_those_that_a_reader_gets(tmp_path: Path, store: str, precision: str) -> None:
    whole = every_position(np.random.default_rng(58), 25)
    first, second = captures(whole, [[1, 4, 9], [0, 4, 20]])
    shards = [[first], [second], *make_shards(59, [[30, 300, 2], [9] * 70])]
    path = write(tmp_path / "a", store, shards, precision)
    samples = list(LogitCache.open(path).samples())
    assert export_parquet(path, tmp_path / "all.parquet") == len(samples) == 74
    rows = pq.read_table(tmp_path / "all.parquet").to_pylist()
    assert len(rows) == len(samples)
    for row, sample in zip(rows, samples, strict=True):
        record = sample.logprobs
        assert row["sample_id"] == sample_id(sample.token_ids).hex()
        assert row["token_ids"] == sample.token_ids.tolist()
        assert row["num_tokens_cut"] == sample.num_tokens_cut
        assert row["tail_group_logprobs"] == [[]] * len(record)
        for name in ("positions", "label_ids", "label_logprobs", "tail_logprobs"):
            assert row[name] == getattr(record, name).tolist(), name
        present = [ids != NO_TOKEN for ids in record.alternative_ids]
        for name in ("alternative_ids", "alternative_logprobs"):
            kept = [values[where].tolist() for values, where in zip(getattr(record, name), present, strict=True)]
            assert row[name] == kept, name


def test_duckdb_reads_an_export(tmp_path: Path, store: str) -> None:
    path = write(tmp_path / "a", store, SHARDS)
    file = tmp_path / "all.parquet"
    export_parquet(path, file)
    with duckdb.connect() as connection:
        query = f"select sum(len(positions)), sum(len(token_ids)) from '{file}'"
        found = connection.execute(query).fetchall()
    cache = LogitCache.open(path)
    assert found == [(cache.num_positions, cache.num_tokens)]


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path, store: str) -> None:
    path = write(tmp_path / "a", store, SHARDS)
    file = tmp_path / "mine"
    file.write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        export_parquet(path, file)
    assert file.read_bytes() == b"mine"


def test_a_cache_of_nothing_exports_nothing(tmp_path: Path, store: str) -> None:
    assert export_parquet(write(tmp_path / "a", store, []), tmp_path / "all.parquet") == 0
    assert pq.read_table(tmp_path / "all.parquet").num_rows == 0


def test_a_failed_export_leaves_no_file_that_looks_whole(tmp_path: Path, store: str) -> None:
    path = write(tmp_path / "a", store, make_shards(60, [[9] * 70, [200]]))
    damage(path)
    refused(CorruptCache, "corrupt", lambda: export_parquet(path, tmp_path / "all.parquet"))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    with pytest.raises(NotACache):
        export_parquet(tmp_path / "none", tmp_path / "all.parquet")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_tail_groups_are_exported(tmp_path: Path, store: str) -> None:
    path = write(tmp_path / "a", store, grouped_shards(61, [[30]]), groups=True)
    export_parquet(path, tmp_path / "all.parquet")
    (row,) = pq.read_table(tmp_path / "all.parquet").to_pylist()
    (sample,) = LogitCache.open(path).samples()
    assert sample.logprobs.tail_group_logprobs is not None
    assert row["tail_group_logprobs"] == sample.logprobs.tail_group_logprobs.tolist()


def test_reading_an_export_of_a_converted_cache(tmp_path: Path, store: str) -> None:
    """What goes through a conversion and an export is still within the stated error."""
    source = write(tmp_path / "a", store, SHARDS)
    convert(source, tmp_path / "b", precision="compact")
    export_parquet(tmp_path / "b", tmp_path / "all.parquet")
    assert cache_bits(source) != cache_bits(tmp_path / "b")
    rows = {row["sample_id"]: row for row in pq.read_table(tmp_path / "all.parquet").to_pylist()}
    for sample in flat(SHARDS):
        found = rows[sample_id(sample.token_ids).hex()]["label_logprobs"]
        assert np.abs(np.array(found) - sample.logprobs.label_logprobs).max() <= 1 / 2048 + 2e-6
