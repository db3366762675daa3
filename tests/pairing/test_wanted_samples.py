"""Pruning: what stays is the same bit for bit, what goes is gone, and a reader sees the old contents or the new."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.breadth import some_of
from support.cli_harness import copy_of, done, facts, precompute, precompute_line, text_data, unchanged
from support.cli_harness import refused as refused_verb
from support.storage_faults import fork, status_of
from support.storage_faults_writers import Steps, chosen, count_steps
from support.storage_forging import body_of, canonical, sealed
from support.storage_samples import (
    MAX_ERRORS,
    VOCAB,
    Shards,
    by_tokens,
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
from support.tiny_model import CHAT_TEMPLATE, make_tokenizer

from logitcache.storage import (
    CachedSample,
    CacheWriter,
    CorruptCache,
    IdentityMismatch,
    IncompleteCache,
    LogitCache,
    NotACache,
    PruneReport,
    local_files,
    prune,
    sample_id,
    verify,
)
from logitcache.storage.files import open_files

pytest_plugins = ["support.storage_fixtures"]
pytestmark = pytest.mark.usefixtures("no_fsync")

GROUPS = make_groups(np.random.default_rng(70), VOCAB, 4)
THREE = make_shards(71, [[30, 4, 21], [60, 7], [8, 25]])
"""Three shards, of which most tests keep one whole, a part of one, and nothing of one."""


def ids(samples: Sequence[CachedSample]) -> set[bytes]:
    return {sample_id(s.token_ids) for s in samples}


def only(found: dict[bytes, tuple[object, ...]], samples: Sequence[CachedSample]) -> dict[bytes, tuple[object, ...]]:
    """Of a cache's samples these."""
    return {s.token_ids.tobytes(): found[s.token_ids.tobytes()] for s in samples}


def units(path: Path | str) -> list[str]:
    return sorted(name.split("/")[1][:32] for name in tree(path) if name.startswith("shards/") and name.count("/") == 1)


# --- what stays and what goes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", MAX_ERRORS)
@pytest.mark.parametrize("kind", ["plain", "groups", "draws"])
def test_what_stays_is_the_same_bit_for_bit(path: Path, store: str, precision: str, kind: str) -> None:
    groups, num_draws = GROUPS if kind == "groups" else None, 7 if kind == "draws" else 0
    shards = uneven_shards(72, groups, num_draws)
    manifest = make_manifest(store, precision=precision, token_groups=groups, num_draws=num_draws)
    write_cache(path, store, shards, manifest, groups)
    before = stored(path)
    stays = [shards[0][1], shards[0][3], *shards[1]]
    report = prune(path, ids(stays))
    assert stored(path) == only(before, stays)
    assert verify(path).is_intact and LogitCache.open(path).manifest == manifest
    assert (report.num_samples, report.num_samples_kept) == (3, 4)
    assert report.num_positions == sum(len(s.logprobs) for s in (shards[0][0], shards[0][2], shards[2][0]))
    assert (report.num_shards_dropped, report.num_shards_rewritten, report.num_shards_kept) == (1, 1, 1)


def test_whole_shards_are_untouched_and_nothing_is_left_behind(path: Path, store: str) -> None:
    write_cache(path, store, THREE)
    before = lasting(path)
    stays = [*THREE[0], THREE[1][1]]
    report = prune(path, ids(stays))
    after = lasting(path)
    whole = {name: data for name, data in before.items() if name.startswith(f"shards/{unit_of(THREE[0], store)}")}
    assert whole and whole.items() <= after.items()
    assert units(path) == sorted([unit_of(THREE[0], store), unit_of([THREE[1][1]], store)])
    assert after == lasting(write_cache(path.with_name("at once"), store, [THREE[0], [THREE[1][1]]]))
    sizes = [sum(len(d) for n, d in files.items() if n.count("/") > 1) for files in (before, after)]
    assert report.num_bytes == sizes[0] - sizes[1]


def test_leftovers_of_several_shards_are_packed_together(path: Path, store: str) -> None:
    rng = np.random.default_rng(73)
    shards = [[every_position(rng, 11), every_position(rng, 21)] for _ in range(7)]  # 10 and 20 positions
    write_cache(path, store, shards)
    stays = [shard[0] for shard in shards]
    order = sorted(shards, key=lambda shard: unit_of(shard, store))
    prune(path, ids(stays))
    expected = [[shard[0] for shard in part] for part in (order[:3], order[3:6], order[6:])]
    assert units(path) == sorted(unit_of(part, store) for part in expected)
    assert stored(path) == by_tokens(stays) and verify(path).is_intact


def test_pruning_nothing_changes_nothing(path: Path, store: str) -> None:
    write_cache(path, store, THREE)
    before = lasting(path)
    for wanted in (ids(flat(THREE)), ids(flat(THREE)) | {b"x" * 16}):
        report = prune(path, wanted)
        assert (report.num_samples, report.num_positions, report.num_bytes, report.num_shards_kept) == (0, 0, 0, 3)
        assert lasting(path) == before
    write_cache(path.with_name("empty"), store, [])
    assert prune(path.with_name("empty"), set()) == PruneReport(0, 0, 0, 0, 0, 0, 0)


def test_a_dry_run_says_what_would_go_and_writes_nothing(path: Path, store: str) -> None:
    write_cache(path, store, THREE)
    (path / "writer.lock").unlink()
    before = tree(path)
    wanted = ids([*THREE[0], THREE[1][1]])
    said = prune(path, wanted, dry_run=True)
    assert tree(path) == before
    real = prune(path, wanted)
    for name in vars(said).keys() - {"num_bytes"}:
        assert getattr(said, name) == getattr(real, name), name
    assert 0 < said.num_bytes < sum(len(data) for data in before.values())


def test_pruned_samples_can_be_precomputed_again(path: Path, store: str) -> None:
    write_cache(path, store, THREE)
    before = stored(path)
    prune(path, ids(THREE[0][:1]))
    with CacheWriter(path, make_manifest(store)) as writer:
        keys = sorted(ids([s for shard in THREE for s in shard]))
        found = writer.captured().missing(keys, [np.arange(1, dtype=np.int32)] * len(keys))
        assert len(writer.captured()) == 1 and found
        writer.commit([*THREE[0][1:], *THREE[1], *THREE[2]])
        writer.finalize()
    assert stored(path) == before and verify(path).is_intact


# --- several captures of a sample -------------------------------------------------------------------------------------


def overlapping(seed: int) -> tuple[Shards, list[CachedSample]]:
    """Shards with samples that stand in several of them, with other numbers in each; and all different samples."""
    rng = np.random.default_rng(seed)
    samples = [every_position(rng, int(n)) for n in rng.integers(15, 30, size=5)]
    shards = []
    for _ in range(int(rng.integers(2, 6))):
        shard = []
        for at in rng.choice(5, size=int(rng.integers(1, 6))):  # with repetition: twice in one
            again = make_sample(rng, 0, token_ids=samples[at].token_ids)
            shard.append(replace(again, num_tokens_cut=int(at)))
        shards.append(shard)
    held = {s.token_ids.tobytes(): s for s in flat(shards)}
    return shards, list(held.values())


@settings(deadline=None, max_examples=60, database=None)
@given(seed=st.integers(0, 2**32 - 1), picked=st.lists(st.integers(0, 4), min_size=1, max_size=3))
def test_the_capture_that_counted_counts(
    tmp_path_factory: pytest.TempPathFactory, store: str, seed: int, picked: list[int]
) -> None:
    """Shards get other names, and names decide which of two captures of a position counts: the numbers stay."""
    shards, held = overlapping(seed)
    path = write_cache(tmp_path_factory.mktemp("several") / "cache", store, shards)
    before = stored(path)
    stays = [held[i % len(held)] for i in picked]
    prune(path, ids(stays))
    assert stored(path) == only(before, stays)
    assert verify(path).is_intact


@settings(deadline=None, max_examples=40, database=None)
@given(seed=st.integers(0, 2**32 - 1), picked=st.lists(st.integers(0, 4), min_size=1, max_size=3))
def test_commits_that_an_interrupted_writer_left_do_not_change_what_counts(
    tmp_path_factory: pytest.TempPathFactory, store: str, seed: int, picked: list[int]
) -> None:
    """They join the contents; where they overlap with what readers see, that counts."""
    shards, held = overlapping(seed)
    path = write_cache(tmp_path_factory.mktemp("unlisted") / "cache", store, shards[:-1])
    before = stored(path)
    with CacheWriter(path, make_manifest(store)) as writer:
        writer.commit(shards[-1])
    stays = [held[i % len(held)] for i in picked]
    prune(path, ids(stays))
    cache = LogitCache.open(path)
    for tokens in {s.token_ids.tobytes(): s.token_ids for s in stays}.values():
        same = [s.logprobs.positions for s in flat(shards[:-1]) if np.array_equal(s.token_ids, tokens)]
        if same:
            found = cache.lookup(tokens, np.unique(np.concatenate(same)))
            assert record_bits(found) == before[tokens.tobytes()][-1]
    assert verify(path).is_intact


def test_the_interrupted_run_of_a_finished_cache_is_kept_where_it_is_wanted(path: Path, store: str) -> None:
    write_cache(path, store, THREE[:1])
    with CacheWriter(path, make_manifest(store)) as writer:
        writer.commit(THREE[1])
        writer.commit(THREE[2])
    prune(path, ids([*THREE[0][:2], *THREE[1]]))
    assert stored(path) == by_tokens([*THREE[0][:2], *THREE[1]])
    assert len(units(path)) == 2


def test_what_an_interrupted_writer_left_does_not_come_before_what_is_listed(path: Path, store: str) -> None:
    whole = every_position(np.random.default_rng(76), 25)
    listed = captures(whole, [[2, 3, 4]])[0]
    rng = np.random.default_rng(77)
    others = (make_sample(rng, 0, positions=[3, last], token_ids=whole.token_ids) for last in range(5, 24))
    left = next(sample for sample in others if unit_of([sample], store) < unit_of([listed], store))
    write_cache(path, store, [[listed], THREE[0]])
    with CacheWriter(path, make_manifest(store)) as writer:
        writer.commit([left])
    prune(path, ids([whole, THREE[0][0]]))
    found = LogitCache.open(path).lookup(whole.token_ids)
    assert found.positions.tolist() == [2, 3, 4, left.logprobs.positions[1]]
    assert record_bits(found.take(slice(0, 3))) == record_bits(listed.logprobs)
    assert record_bits(found.take(slice(3, 4))) == record_bits(left.logprobs.take(slice(1, 2)))


def test_a_sample_that_stands_twice_in_a_shard_is_written_once(path: Path, store: str) -> None:
    first = every_position(np.random.default_rng(77), 25)
    second = make_sample(np.random.default_rng(78), 0, token_ids=first.token_ids)
    write_cache(path, store, [[first, second, THREE[0][0]]])
    prune(path, ids([first]))
    assert stored(path) == by_tokens([first])
    assert LogitCache.open(path).num_positions == 24


def test_of_rows_that_are_committed_already_the_commit_is_taken_whole(path: Path, store: str) -> None:
    """The shard to be made has the name of one that another writer left: the index is of what is there."""
    mine = replace(every_position(np.random.default_rng(79), 25), num_tokens_cut=1)
    other = make_sample(np.random.default_rng(80), 0, token_ids=mine.token_ids, positions=range(24))
    theirs = replace(other, num_tokens_cut=2)
    write_cache(path, store, [[mine, THREE[0][0]]])
    with CacheWriter(path, make_manifest(store)) as writer:
        writer.commit([theirs])
    prune(path, ids([mine]))
    assert stored(path) == by_tokens([theirs])
    assert verify(path).is_intact and units(path) == [unit_of([mine], store)]


# --- killed -----------------------------------------------------------------------------------------------------------


class Scene:
    """A cache with two captures of one sample, what pruning it comes to, and copies of it to kill a prune of."""

    def __init__(self, folder: Path, store: str) -> None:
        twice = every_position(np.random.default_rng(74), 25)
        first, second = captures(twice, [[1, 4, 9], [0, 4, 20]])
        shards = [[*THREE[0][:2], first], [second, *THREE[1]], THREE[2], [*make_shards(75, [[5]])[0], THREE[0][2]]]
        self.wanted = ids([THREE[0][0], twice, THREE[1][1], THREE[0][2]])
        self.start, self.path = write_cache(folder / "start", store, shards), folder / "cache"
        self.before = stored(self.start)
        shutil.copytree(self.start, folder / "undisturbed")
        self.moments = count_steps(lambda: prune(folder / "undisturbed", self.wanted))
        self.after, self.files = stored(folder / "undisturbed"), lasting(folder / "undisturbed")
        assert 0 < len(self.after) < len(self.before)

    def killed(self, at: int) -> LogitCache:
        """A copy of which a prune was killed at a moment; and the copy as it was opened before."""
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self.start, self.path)
        reader = LogitCache.open(self.path)
        assert status_of(fork(lambda: self.die(at))) == -signal.SIGKILL
        return reader

    def die(self, at: int) -> None:
        with Steps(lambda number, _: os.kill(os.getpid(), signal.SIGKILL) if number == at else None):
            prune(self.path, self.wanted)


def check_old_reader(reader: LogitCache, before: dict[bytes, tuple[object, ...]]) -> int:
    """Every sample that was opened before comes as it was, or not at all; returns how many came."""
    came = 0
    for tokens, bits in before.items():
        try:
            found = reader.lookup(np.frombuffer(tokens, dtype=np.uint32))
        except CorruptCache:
            continue
        assert record_bits(found) == bits[-1]
        came += 1
    return came


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_killed_at_any_step_it_is_the_old_or_the_new_and_again_finishes(tmp_path: Path, store: str) -> None:
    scene = Scene(tmp_path, store)
    seen = []
    for at in some_of(chosen(len(scene.moments), 13 if store == "zarr" else 3), 12):
        reader = scene.killed(at)
        found = stored(scene.path)
        assert found in (scene.before, scene.after), scene.moments[at]
        assert verify(scene.path).is_intact
        seen.append(found == scene.after)
        came = check_old_reader(reader, scene.before)
        assert came == len(scene.before) or seen[-1]
        if at % 3:
            prune(scene.path, scene.wanted)
            assert lasting(scene.path) == scene.files, scene.moments[at]
            continue
        write_cache(scene.path, store, [])  # a writer in between lists again what it finds, with the same numbers
        between = stored(scene.path)
        assert scene.after.items() <= between.items() <= scene.before.items()
        prune(scene.path, scene.wanted)
        assert stored(scene.path) == scene.after and verify(scene.path).is_intact
    assert sorted(seen) == seen and 0 < sum(seen) < len(seen)


class Cut(Exception):
    """The connection is gone."""


@pytest.mark.parametrize("place", ["local", "memory"])
def test_cut_off_before_any_change_it_is_the_old_or_the_new_and_again_finishes(
    place: str, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = str(tmp_path) if place == "local" else f"memory://prune-{store}-cut"
    stays = [*THREE[0], THREE[1][1]]
    undisturbed = write_cache(f"{where}/undisturbed", store, THREE)
    prune(undisturbed, ids(stays))
    expected = lasting(Path(undisturbed) if place == "local" else undisturbed)
    seen = []
    for at in range(1000):
        path = write_cache(f"{where}/{at}", store, THREE)
        with monkeypatch.context() as patch:
            cut_before(patch, at, type(open_files(path)))
            try:
                prune(path, ids(stays))
                break
            except Cut:
                pass
        found = stored(path)
        assert found in (by_tokens(flat(THREE)), by_tokens(stays))
        seen.append(found == by_tokens(stays))
        prune(path, ids(stays))
        assert lasting(Path(path) if place == "local" else path) == expected
    assert sorted(seen) == seen and len(seen) >= 6
    assert 0 < sum(seen) < len(seen)


def cut_before(patch: pytest.MonkeyPatch, at: int, files: type) -> None:
    """Make the call with this number that changes files fail, and all later ones."""
    count = 0

    def failing(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal count
            count += 1
            if count > at:
                raise Cut
            return original(*args)

        return call

    for name in ("create", "replace", "publish", "remove"):
        patch.setattr(files, name, failing(getattr(files, name)))


# --- beside others ----------------------------------------------------------------------------------------------------


def test_who_had_the_cache_open_gets_an_error_or_the_same_numbers(path: Path, store: str) -> None:
    write_cache(path, store, THREE)
    before = stored(path)
    fresh, used = LogitCache.open(path), LogitCache.open(path)
    list(used.samples())
    prune(path, ids([*THREE[0], THREE[1][1]]))
    for reader in (fresh, used):
        assert check_old_reader(reader, before) == len(THREE[0])
        refused(CorruptCache, "corrupt", lambda r=reader: r.lookup(THREE[1][1].token_ids))  # type: ignore[misc]


def test_a_cache_that_another_writes_to_is_refused(path: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cache(path, store, THREE)
    before = lasting(path)
    with CacheWriter(path, make_manifest(store)), pytest.raises(OSError, match="another process is writing"):
        prune(path, ids(THREE[0]))
    assert lasting(path) == before
    other = CacheWriter(path, make_manifest(store))
    lock_alone = local_files.lock_alone

    def asked(handle: int, root: str) -> bool:
        was_alone = lock_alone(handle, root)
        monkeypatch.undo()
        other.close()
        return was_alone

    monkeypatch.setattr(local_files, "lock_alone", asked)
    with pytest.raises(OSError, match="another process is writing"):
        prune(path, ids(THREE[0]))  # alone once it was refused: too late
    assert lasting(path) == before


def test_a_writer_that_begins_meanwhile_has_to_wait(path: Path, store: str) -> None:
    write_cache(path, store, THREE)
    refusals = []

    def try_to_join(_number: int, _name: str) -> None:
        handle = os.open(path / "writer.lock", os.O_RDWR)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            refusals.append(False)
        except BlockingIOError:
            refusals.append(True)
        finally:
            os.close(handle)

    with Steps(try_to_join):
        prune(path, ids(THREE[0][:1]))
    changes = [is_refused for is_refused, _ in itertools.groupby(refusals)]
    assert True in changes and sum(refusals) >= 20
    assert changes[-2:] in ([True], [True, False], [False, True])
    assert stored(path) == by_tokens(THREE[0][:1])


# --- refused ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_pruned_is_refused_and_unchanged(path: Path, store: str) -> None:
    refused(NotACache, "not-a-cache", lambda: prune(path, set()))
    assert not path.exists()
    write_cache(path, store, THREE)
    before = lasting(path)
    for wanted in (set(), {b"x" * 16}):
        for dry_run in (False, True):
            message = refused(
                IdentityMismatch,
                "identity-mismatch",
                lambda w=wanted, d=dry_run: prune(path, w, d),  # type: ignore[misc]
            )
            assert "none of its 7 samples" in message
    assert lasting(path) == before
    (path / "contents.json").unlink()
    refused(IncompleteCache, "incomplete", lambda: prune(path, ids(THREE[0])))


def test_a_damaged_shard_is_refused_before_readers_see_a_change(path: Path, store: str) -> None:
    write_cache(path, store, THREE)
    for file in (path / "shards").glob(f"{unit_of(THREE[1], store)}-*/**/*"):
        if file.is_file() and file.suffix != ".json":
            data = bytearray(file.read_bytes())
            data[len(data) // 3] ^= 1
            file.write_bytes(data)
    contents = (path / "contents.json").read_bytes()
    refused(CorruptCache, "corrupt", lambda: prune(path, ids([*THREE[0], THREE[1][1]])))
    assert (path / "contents.json").read_bytes() == contents


def test_a_commit_that_the_contents_do_not_mean_is_refused(path: Path, store: str) -> None:
    """Whole, but not the one that the cache was finished with: pruning must not make it so."""
    write_cache(path, store, THREE)
    body = body_of(path, "commit")
    record = path / "shards" / f"{body['unit']}.json"
    record.write_bytes(sealed(canonical(body | {"kept_mass": 1.5})))
    before = lasting(path)
    for samples in THREE:
        message = refused(CorruptCache, "corrupt", lambda s=samples: prune(path, ids(s)))  # type: ignore[misc]
        assert "expected checksum" in message
    assert lasting(path) == before


# --- object stores ----------------------------------------------------------------------------------------------------


def test_object_stores(url: str, store: str, tmp_path: Path) -> None:
    root: Any = url if "://" in url else Path(url)
    write_cache(url, store, THREE)
    stays = [*THREE[0], THREE[1][1]]
    prune(url, ids(stays), dry_run=True)
    assert stored(url) == by_tokens(flat(THREE))
    prune(url, ids(stays))
    assert stored(url) == by_tokens(stays) and verify(url).is_intact
    assert lasting(root) == lasting(write_cache(tmp_path / "at once", store, [THREE[0], [THREE[1][1]]]))
    before = lasting(root)
    prune(url, ids(stays))
    assert lasting(root) == before


# --- on the command line ----------------------------------------------------------------------------------------------

ALONE = ["--shard-positions", 60, "--batch-tokens", 1]
"""Several shards, and every sample a batch of its own: so its record does not depend on what is beside it."""


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A cache of 12 text rows, to be read only."""
    folder = tmp_path_factory.mktemp("prune")
    precompute(tiny_model, text_data(folder), folder / "cache", *ALONE)
    return folder / "cache"


@pytest.fixture(scope="session")
def tokenizer_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of the tiny model without anything else."""
    folder = tmp_path_factory.mktemp("models") / "tokenizer"
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("source", ["model", "tokenizer"])
def test_prune_leaves_the_samples_of_the_data(
    source: str, tmp_path: Path, cached: Path, tiny_model: Path, tokenizer_only: Path
) -> None:
    cache, part = copy_of(cached, tmp_path / "c"), text_data(tmp_path, 4, 9)
    line = ["prune", cache, "--data", part, "--model", tiny_model if source == "model" else tokenizer_only]
    with unchanged(cache):
        said = done(*line, "--dry-run").out
    assert said.startswith("Would remove 7 of 12 samples, ") and said.endswith("Nothing was written.\n")
    outcome = done(*line)
    assert outcome.out.startswith("Removed 7 of 12 samples, ") and outcome.out.count("\n") == 1
    assert outcome.err == f"5 rows: 5 distinct samples, 0 of them not in {cache}.\n"
    precompute(tiny_model, part, tmp_path / "fresh", *ALONE)
    assert stored(cache) == stored(tmp_path / "fresh")
    assert json.loads(done("verify", cache, "--json").out)["intact"]
    assert facts(cache)["contents"]["num_samples"] == 5
    with unchanged(cache):
        assert "nothing was changed" in done(*line).out
    assert "Cached 0 positions" in precompute(tiny_model, part, cache, *ALONE).out


def test_prune_cuts_as_the_cache_was_cut(tmp_path: Path, tiny_model: Path) -> None:
    data = text_data(tmp_path)
    precompute(tiny_model, data, tmp_path / "c", "--max-length", 16, *ALONE)
    with unchanged(tmp_path / "c"):
        outcome = done("prune", tmp_path / "c", "--data", data, "--model", tiny_model)
    assert "nothing was changed" in outcome.out and ", 0 of them not in " in outcome.err


def test_prune_says_what_of_the_data_is_missing(tmp_path: Path, tiny_model: Path) -> None:
    precompute(tiny_model, text_data(tmp_path, 0, 6), tmp_path / "c", *ALONE)
    outcome = done("prune", tmp_path / "c", "--data", text_data(tmp_path, 4, 9), "--model", tiny_model)
    assert outcome.err.startswith("5 rows: 5 distinct samples, 3 of them not in ")
    assert outcome.out.startswith("Removed 4 of 6 samples")


def test_prune_of_token_ids_needs_no_tokenizer(
    tmp_path: Path, tiny_model: Path, write_rows: Callable[..., Path]
) -> None:
    bare = copy_of(tiny_model, tmp_path / "bare", lambda folder: [f.unlink() for f in folder.glob("*token*")])
    rows = [{"input_ids": [1, 2, 3, i]} for i in range(9)]
    precompute(bare, write_rows(rows), tmp_path / "c", *ALONE)
    kept = write_rows(rows[2:5], "kept.jsonl")
    assert "(fingerprint)" in refused_verb(4, "prune", tmp_path / "c", "--data", kept, "--model", tiny_model)
    done("prune", tmp_path / "c", "--data", kept)
    assert {s.token_ids.tolist()[3] for s in LogitCache.open(tmp_path / "c").samples()} == {2, 3, 4}


@pytest.mark.parametrize(
    ("case", "status", "named"),
    [
        ("another tokenizer", 4, "(fingerprint)"),
        ("no tokenizer", 4, "another or none"),
        ("no --model", 2, "needs --model"),
        ("no such model", 2, "no such folder"),
        ("no such data", 2, "no such file"),
        ("broken data", 1, "line 1 is not JSON"),
        ("other data", 4, "none of its 12 samples"),
        ("unfinished", 5, "was interrupted"),
        ("no cache", 2, "expected a logit cache"),
        ("damaged", 3, "be trusted"),
        ("unknown protocol", 2, "Protocol not known: foo"),
    ],
)
def test_prune_refuses(
    case: str,
    status: int,
    named: str,
    tmp_path: Path,
    cached: Path,
    tokenizer_only: Path,
    write_rows: Callable[..., Path],
) -> None:
    cache: Any = copy_of(cached, tmp_path / "c")
    data: Any = text_data(tmp_path, 4, 9)
    model: Any = tokenizer_only
    if case == "another tokenizer":
        model = copy_of(tokenizer_only, tmp_path / "t", other_end)
    elif case == "no tokenizer":
        model = tmp_path
    elif case == "no such model":
        model = tmp_path / "none"
    elif case == "no such data":
        data = tmp_path / "none.jsonl"
    elif case == "broken data":
        data = tmp_path / "broken.jsonl"
        data.write_text("{", encoding="utf-8")
    elif case == "other data":
        data = write_rows([{"text": "something else"}])
    elif case == "unfinished":
        (cache / "contents.json").unlink()
    elif case == "no cache":
        cache = tmp_path / "none"
    elif case == "damaged":
        (cache / "shards" / units(cache)[0]).with_suffix(".json").write_bytes(b"{}")
    elif case == "unknown protocol":
        cache = "foo://x"
    line = ["prune", cache, "--data", data, *([] if case == "no --model" else ["--model", model])]
    with unchanged(tmp_path):
        for more in ([], ["--dry-run"]):
            assert named in refused_verb(status, *line, *more)


def test_prune_of_chats_needs_their_template(tmp_path: Path, tiny_model: Path, tokenizer_only: Path) -> None:
    """With another one all of them would look as if they were gone; text goes with any."""
    turns = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b!"}]
    chats, text = tmp_path / "chats.jsonl", text_data(tmp_path, 0, 6)
    chats.write_text(json.dumps({"messages": turns}) + "\n" + text.read_text(encoding="utf-8"), encoding="utf-8")
    precompute(tiny_model, chats, tmp_path / "c", *ALONE)
    other = CHAT_TEMPLATE.replace("<{{ m.role }}>", "<{{ m.role }}> ")
    model = copy_of(tokenizer_only, tmp_path / "t", lambda f: (f / "chat_template.jinja").write_text(other))
    with unchanged(tmp_path):
        told = refused_verb(4, "prune", tmp_path / "c", "--data", chats, "--model", model)
    assert "chat_template: " in told and "precompute a cache with this one" in told
    done("prune", tmp_path / "c", "--data", text, "--model", model)
    assert len(LogitCache.open(tmp_path / "c")) == 6


def other_end(folder: Path) -> None:
    """Another end of text, and no template."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.add_tokens(["xyz"])
    shutil.rmtree(folder)
    tokenizer.save_pretrained(folder)


def test_prune_at_a_url(tmp_path: Path, tiny_model: Path, tokenizer_only: Path) -> None:
    url = "memory://prune-cli/cache"
    done(*precompute_line(tiny_model, text_data(tmp_path), url, *ALONE))
    done("prune", url, "--data", text_data(tmp_path, 4, 9), "--model", tokenizer_only)
    assert facts(url)["contents"]["num_samples"] == 5 and verify(url).is_intact
