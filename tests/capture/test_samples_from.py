"""`copy_samples`: what another cache of the same identity holds comes as it is stored there, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support.storage_samples import (
    MAX_ERRORS,
    STORES,
    VOCAB,
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
    stored,
    tree,
    uneven_shards,
    unit_of,
    write_cache,
)

from logitcache.storage import (
    CachedSample,
    CacheWriter,
    Copied,
    CorruptCache,
    IdentityMismatch,
    IncompleteCache,
    LogitCache,
    Manifest,
    check_same_capture,
    convert,
    copy_samples,
    prune,
    sample_id,
    verify,
)
from logitcache.storage.encoding import SampleTable, sample_table

pytest_plugins = ["support.storage_fixtures"]
pytestmark = pytest.mark.usefixtures("no_fsync")

GROUPS = make_groups(np.random.default_rng(80), VOCAB, 4)
THREE = make_shards(81, [[30, 4, 21], [60, 7], [8, 25]])

Wanted = dict[bytes, NDArray[np.int32]]


def wanted_of(samples: Sequence[CachedSample]) -> Wanted:
    """All captured positions of these samples."""
    return {sample_id(s.token_ids): s.logprobs.positions for s in samples}


def copy(
    source: Path | str,
    target: Path | str,
    wanted: Wanted,
    manifest: Manifest | None = None,
    groups: NDArray[np.uint8] | None = None,
    max_positions: int = 32_768,
) -> Copied:
    """A finished cache at `target` with what came."""
    cache = LogitCache.open(source)
    with CacheWriter(target, manifest or cache.manifest, groups) as writer:
        copied = copy_samples(writer, cache, wanted, max_positions)
        writer.finalize()
    return copied


def shard_sizes(path: Path | str) -> list[int]:
    return sorted(shard.commit.num_positions for shard in LogitCache.open(path).shards())


# --- what comes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target_store", STORES)
@pytest.mark.parametrize("precision", MAX_ERRORS)
@pytest.mark.parametrize("kind", ["plain", "groups", "draws"])
def test_samples_come_bit_for_bit(tmp_path: Path, store: str, target_store: str, precision: str, kind: str) -> None:
    groups, num_draws = GROUPS if kind == "groups" else None, 7 if kind == "draws" else 0
    shards = uneven_shards(82, groups, num_draws)

    def manifest(where: str) -> Manifest:
        return make_manifest(where, precision=precision, token_groups=groups, num_draws=num_draws)

    write_cache(tmp_path / "b", store, shards, manifest(store), groups)
    before = tree(tmp_path / "b")
    comes = [shards[0][1], shards[0][3], *shards[1]]
    copied = copy(tmp_path / "b", tmp_path / "a", wanted_of(comes), manifest(target_store), groups)
    theirs = stored(tmp_path / "b")
    assert stored(tmp_path / "a") == {s.token_ids.tobytes(): theirs[s.token_ids.tobytes()] for s in comes}
    assert copied == Copied(4, sum(len(s.logprobs) for s in comes))
    assert verify(tmp_path / "a").is_intact and LogitCache.open(tmp_path / "a").manifest == manifest(target_store)
    assert tree(tmp_path / "b") == before


@pytest.mark.parametrize("precision", ["fine", "compact"])
@pytest.mark.parametrize("kind", ["plain", "groups", "draws"])
def test_of_an_exact_cache_rows_are_rounded_once_as_a_capture_would(
    tmp_path: Path, store: str, precision: str, kind: str
) -> None:
    rng = np.random.default_rng(83)
    groups, num_draws = GROUPS if kind == "groups" else None, 7 if kind == "draws" else 0
    samples = [every_position(rng, n, token_groups=groups, num_draws=num_draws) for n in (300, 2, 40)]
    exact = make_manifest(store, token_groups=groups, num_draws=num_draws)
    coarse = make_manifest(store, precision=precision, token_groups=groups, num_draws=num_draws)
    write_cache(tmp_path / "b", store, [samples], exact, groups)
    write_cache(tmp_path / "captured", store, [samples], coarse, groups)
    assert copy(tmp_path / "b", tmp_path / "a", wanted_of(samples), coarse, groups).num_samples == 3
    assert stored(tmp_path / "a") == stored(tmp_path / "captured")
    assert verify(tmp_path / "a").is_intact


def test_positions_come_that_are_wanted_and_there(tmp_path: Path, store: str) -> None:
    whole = every_position(np.random.default_rng(84), 25)
    half = captures(whole, [[1, 4, 9, 12]])[0]
    write_cache(tmp_path / "b", store, [[half, *THREE[0]]])
    wanted = {
        sample_id(whole.token_ids): np.array([0, 4, 12, 20], dtype=np.int32),
        sample_id(THREE[0][0].token_ids): np.array([], dtype=np.int32),
        b"x" * 16: np.array([0], dtype=np.int32),
    }
    assert copy(tmp_path / "b", tmp_path / "a", wanted) == Copied(1, 2)
    cache = LogitCache.open(tmp_path / "a")
    assert len(cache) == 1 and cache.sample(0).num_tokens_cut == whole.num_tokens_cut
    assert record_bits(cache.lookup(whole.token_ids)) == record_bits(whole.logprobs.take(np.array([4, 12])))
    assert verify(tmp_path / "a").is_intact


def test_of_several_captures_comes_the_one_that_counts_each_row_once(tmp_path: Path, store: str) -> None:
    rng = np.random.default_rng(85)
    samples = [every_position(rng, n) for n in (12, 20, 7)]
    shards = [[make_sample(rng, 0, token_ids=s.token_ids) for s in samples for _ in range(2)] for _ in range(4)]
    write_cache(tmp_path / "b", store, shards)
    theirs = LogitCache.open(tmp_path / "b")
    wanted = wanted_of(list(theirs.samples()))
    copied = copy(tmp_path / "b", tmp_path / "a", wanted)
    assert copied == Copied(3, sum(map(len, wanted.values())))
    ours = LogitCache.open(tmp_path / "a")
    assert ours.num_positions == copied.num_positions < theirs.num_positions
    assert stored(tmp_path / "a") == stored(tmp_path / "b")


def test_what_is_there_already_stays_beside_what_comes(tmp_path: Path, store: str) -> None:
    whole = every_position(np.random.default_rng(86), 25)
    mine, rest = captures(whole, [[0, 1, 2], list(range(3, 24))])
    write_cache(tmp_path / "a", store, [[mine, *THREE[0]]])
    write_cache(tmp_path / "b", store, [[whole], *THREE])
    copy(tmp_path / "b", tmp_path / "a", wanted_of([rest, *THREE[1]]))
    assert stored(tmp_path / "a") == by_tokens([whole, *THREE[0], *THREE[1]])
    assert verify(tmp_path / "a").is_intact


def test_nothing_wanted_or_nothing_there_is_nothing(tmp_path: Path, store: str) -> None:
    write_cache(tmp_path / "b", store, THREE[:1])
    for name, wanted in (("none", {}), ("others", wanted_of(THREE[1]))):
        assert copy(tmp_path / "b", tmp_path / name, wanted) == Copied(0, 0)
        assert len(LogitCache.open(tmp_path / name)) == 0


# --- shards -----------------------------------------------------------------------------------------------------------


def test_shards_are_of_bounded_size_across_those_of_the_source(tmp_path: Path, store: str) -> None:
    rng = np.random.default_rng(87)
    shards = [[every_position(rng, 11) for _ in range(7)] for _ in range(3)]  # of 10 positions
    shards.append([every_position(rng, 101)])
    write_cache(tmp_path / "b", store, shards)
    copy(tmp_path / "b", tmp_path / "a", wanted_of(flat(shards)), max_positions=45)
    assert sum(shard_sizes(tmp_path / "a")) == 310 and shard_sizes(tmp_path / "a")[-1] == 100
    assert max(shard_sizes(tmp_path / "a")[:-1]) == 40 and shard_sizes(tmp_path / "a").count(40) >= 4
    assert stored(tmp_path / "a") == by_tokens(flat(shards))
    copy(tmp_path / "b", tmp_path / "one", wanted_of(flat(shards)))
    assert shard_sizes(tmp_path / "one") == [310]
    order = flat([shard for _, shard in sorted((unit_of(s, store), s) for s in shards)])
    assert [s.commit.unit for s in LogitCache.open(tmp_path / "one").shards()] == [unit_of(order, store)]


@pytest.mark.parametrize("num_commits", range(5))
def test_interrupted_and_made_again_it_comes_to_the_same_bytes(
    tmp_path: Path, store: str, num_commits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(88)
    shards = [[every_position(rng, int(n)) for n in rng.integers(3, 40, size=6)] for _ in range(4)]
    source = LogitCache.open(write_cache(tmp_path / "b", store, shards))
    wanted = wanted_of([s for i, s in enumerate(flat(shards)) if i % 5])
    copy(tmp_path / "b", tmp_path / "undisturbed", wanted, max_positions=60)
    assert len(shard_sizes(tmp_path / "undisturbed")) > 5
    with CacheWriter(tmp_path / "a", source.manifest) as writer:
        stop_after(monkeypatch, writer, num_commits)
        with pytest.raises(KeyboardInterrupt):
            copy_samples(writer, source, wanted, 60)
    with CacheWriter(tmp_path / "a", source.manifest) as writer:
        have = writer.captured()
        missing = have.missing(list(wanted), list(wanted.values()))
        left = {key: positions for key, positions in zip(wanted, missing, strict=True) if len(positions)}
        assert len(left) < len(wanted) or not num_commits
        assert copy_samples(writer, source, left, 60).num_samples == len(left)
        writer.finalize()
    assert lasting(tmp_path / "a") == lasting(tmp_path / "undisturbed")


def stop_after(patch: pytest.MonkeyPatch, writer: CacheWriter, num_commits: int) -> None:
    """Interrupt a writer that has committed so many shards."""
    original: Callable[..., object] = writer.commit_columns
    count = 0

    def commit_columns(*args: object) -> object:
        nonlocal count
        if count == num_commits:
            raise KeyboardInterrupt
        count += 1
        return original(*args)

    patch.setattr(writer, "commit_columns", commit_columns)


def test_object_stores(url: str, store: str) -> None:
    write_cache(f"{url}/b", store, THREE)
    copied = copy(f"{url}/b", f"{url}/a", wanted_of([*THREE[0], THREE[1][0]]))
    assert copied.num_samples == 4
    assert stored(f"{url}/a") == by_tokens([*THREE[0], THREE[1][0]]) and verify(f"{url}/a").is_intact


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("difference", "named"),
    [
        ("top_k", "capture.top_k: 4 wanted, 5 in "),
        ("wider", "capture.top_k: 6 wanted, 5 in "),
        ("min_mass", "capture.min_mass"),
        ("groups", "capture.num_tail_groups"),
        ("draws", "capture.num_tail_samples"),
        ("vocab", "model.vocab_size"),
    ],
)
def test_another_identity_is_refused_before_anything_is_written(
    tmp_path: Path, store: str, difference: str, named: str
) -> None:
    write_cache(tmp_path / "b", store, THREE)
    groups = GROUPS if difference == "groups" else None
    manifest = {
        "top_k": make_manifest(store, top_k=4),
        "wider": make_manifest(store, top_k=6),
        "min_mass": make_manifest(store, min_mass=0.5),
        "groups": make_manifest(store, token_groups=groups),
        "draws": make_manifest(store, num_draws=3),
        "vocab": make_manifest(store, vocab_size=VOCAB + 1),
    }[difference]
    source = LogitCache.open(tmp_path / "b")
    with CacheWriter(tmp_path / "a", manifest, groups) as writer:
        before = tree(tmp_path)
        for call in (
            lambda: copy_samples(writer, source, wanted_of(THREE[0])),
            lambda: check_same_capture(manifest, source),
        ):
            assert named in refused(IdentityMismatch, "identity-mismatch", call)
        assert tree(tmp_path) == before


def test_a_coarser_source_or_one_that_was_rounded_twice_is_refused(tmp_path: Path, store: str) -> None:
    write_cache(tmp_path / "exact", store, THREE)
    convert(tmp_path / "exact", tmp_path / "fine", precision="fine")
    convert(tmp_path / "fine", tmp_path / "twice", precision="compact")
    for source, precision, named in (
        ("fine", "exact", "capture.precision: exact wanted, fine in "),
        ("fine", "compact", "capture.max_error: 0.03125 wanted, 0.046875 in "),
        ("twice", "compact", "capture.max_error: 0.03125 wanted, 0.046875 in "),
    ):
        cache = LogitCache.open(tmp_path / source)
        manifest = make_manifest(store, precision=precision)
        message = refused(
            IdentityMismatch,
            "identity-mismatch",
            lambda m=manifest, c=cache: check_same_capture(m, c),  # type: ignore[misc]
        )
        assert named in message
    check_same_capture(make_manifest(store, precision="fine"), LogitCache.open(tmp_path / "fine"))


@pytest.mark.parametrize("kind", ["flipped", "short", "missing"])
def test_a_damaged_source_is_an_error_and_what_came_before_is_whole(tmp_path: Path, store: str, kind: str) -> None:
    """Each file of a shard in turn; a file that reading does not need (Zarr's own metadata) may be anything."""
    write_cache(tmp_path / "b", store, THREE)
    wanted, num_refused = wanted_of(flat(THREE)), 0
    files = [p for p in (tmp_path / "b" / "shards").glob(f"{unit_of(THREE[1], store)}-*/**/*") if p.is_file()]
    for number, file in enumerate(files):
        data = file.read_bytes()
        flipped = bytes([*data[: len(data) // 3], data[len(data) // 3] ^ 1, *data[len(data) // 3 + 1 :]])
        if kind == "missing":
            file.unlink()
        else:
            file.write_bytes(flipped if kind == "flipped" else data[: len(data) // 2])
        source = LogitCache.open(tmp_path / "b")
        with CacheWriter(tmp_path / f"a{number}", source.manifest) as writer:
            try:
                copied = copy_samples(writer, source, wanted, 50)
                assert copied.num_samples == 7
            except CorruptCache:
                num_refused += 1
            writer.finalize()
        assert stored(tmp_path / f"a{number}").items() <= by_tokens(flat(THREE)).items()
        assert verify(tmp_path / f"a{number}").is_intact
        file.write_bytes(data)
    assert num_refused >= (5 if store == "zarr" else 2)


def test_tokens_under_the_id_of_another_sample_are_refused(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With checksums that match: by a defect of who wrote it, or by someone who means it."""

    def swapped(samples: Sequence[CachedSample]) -> SampleTable:
        table = sample_table(samples)
        return replace(table, sample_ids=table.sample_ids[::-1].copy())

    with monkeypatch.context() as patch:
        patch.setattr("logitcache.storage.packing.sample_table", swapped)
        write_cache(tmp_path / "b", store, THREE[:1])
    source, wanted = LogitCache.open(tmp_path / "b"), wanted_of(THREE[0][:1])
    wanted = {key: np.arange(30, dtype=np.int32) for key in wanted}
    with CacheWriter(tmp_path / "a", source.manifest) as writer:
        message = refused(CorruptCache, "corrupt", lambda: copy_samples(writer, source, wanted))
        assert "are not those of its id" in message and not writer.captured()
    before = tree(tmp_path / "b")
    message = refused(CorruptCache, "corrupt", lambda: prune(tmp_path / "b", set(wanted)))
    assert "are not those of its id" in message and tree(tmp_path / "b") == before


def test_an_unfinished_source_cannot_be_opened(tmp_path: Path, store: str) -> None:
    write_cache(tmp_path / "b", store, THREE)
    (tmp_path / "b" / "contents.json").unlink()
    refused(IncompleteCache, "incomplete", lambda: LogitCache.open(tmp_path / "b"))


def test_a_target_that_is_finished_says_what_came_only_when_it_is_finished_again(tmp_path: Path, store: str) -> None:
    write_cache(tmp_path / "a", store, THREE[:1])
    write_cache(tmp_path / "b", store, THREE)
    before = cache_bits(tmp_path / "a")
    with CacheWriter(tmp_path / "a", make_manifest(store)) as writer:
        copy_samples(writer, LogitCache.open(tmp_path / "b"), wanted_of(THREE[1]))
        assert cache_bits(tmp_path / "a") == before
        writer.finalize()
    assert stored(tmp_path / "a") == by_tokens([*THREE[0], *THREE[1]])
