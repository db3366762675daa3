"""What `fine` and `compact` promise of each number, and which alternatives `min_mass` keeps.

The bounds are those of docs/format.md, the oracle of `keep_mass` is a plain loop over its definition.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.storage_samples import (
    MAX_ERRORS,
    NO_TOKEN,
    TOP_K,
    VOCAB,
    assert_round_trip,
    every_position,
    make_groups,
    make_manifest,
    make_record,
    make_sample,
    record_bits,
    refused,
    tree,
    within,
    write_cache,
)
from support.storage_strategies import many, relaxed, seeds

from logitcache.storage import BaseLogprobs, CachedSample, CacheWriter, InvalidRecord, LogitCache, sample_id, verify
from logitcache.storage.records import keep_mass

pytest_plugins = ["support.storage_fixtures"]
pytestmark = pytest.mark.usefixtures("no_fsync")

COARSE = ("fine", "compact")


@pytest.fixture(params=COARSE, scope="module")
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def row(
    label: float, kept: Sequence[float], tail: float, groups: Sequence[float] | None = None, top_k: int = TOP_K
) -> CachedSample:
    """A sample of one position with these log-probabilities, the rest of its K alternatives absent."""
    fill = top_k - len(kept)
    record = BaseLogprobs(
        positions=np.zeros(1, dtype=np.int32),
        label_ids=np.ones(1, dtype=np.uint32),
        label_logprobs=np.array([label], dtype=np.float32),
        alternative_ids=np.array([[*range(2, 2 + len(kept)), *[NO_TOKEN] * fill]], dtype=np.uint32),
        alternative_logprobs=np.array([[*kept, *[-np.inf] * fill]], dtype=np.float32),
        tail_logprobs=np.array([tail], dtype=np.float32),
        tail_group_logprobs=None if groups is None else np.array([groups], dtype=np.float32),
    )
    return CachedSample(np.array([0, 1], dtype=np.uint32), record)


# --- round trip within the stated error -------------------------------------------------------------------------------


@many
@given(
    seed=seeds,
    vocab=st.integers(2, 60),
    top_k=st.integers(0, 59),
    num_groups=st.none() | st.integers(2, 16),
    steps=st.sampled_from([1, 4]),
    num_rows=st.integers(1, 60),
)
def test_every_number_comes_back_within_its_bound(
    precision: str, seed: int, vocab: int, top_k: int, num_groups: int | None, steps: int, num_rows: int
) -> None:
    """K = 0 and V - 1, tails of -inf, short rows, labels and alternatives hundreds of nats down."""
    rng = np.random.default_rng(seed)
    groups = None if num_groups is None else make_groups(rng, vocab, num_groups)
    top_k = min(top_k, vocab - 1)
    tokens = rng.integers(0, vocab, size=num_rows + 1, dtype=np.uint32)
    given_ = make_record(rng, tokens, np.arange(num_rows, dtype=np.int32), vocab, top_k, groups)
    manifest = make_manifest("zarr", vocab, top_k, precision=precision, token_groups=groups, group_steps=steps)
    assert_round_trip(given_, manifest.capture)


@relaxed
@given(seed=seeds, vocab=st.integers(2, 60), top_k=st.integers(0, 59), num_groups=st.none() | st.integers(2, 16))
def test_caches_hold_what_they_promise(
    store: str, precision: str, seed: int, vocab: int, top_k: int, num_groups: int | None
) -> None:
    rng = np.random.default_rng(seed)
    groups = None if num_groups is None else make_groups(rng, vocab, num_groups)
    top_k = min(top_k, vocab - 1)
    manifest = make_manifest(store, vocab, top_k, precision=precision, token_groups=groups)
    shards = [[every_position(rng, n, vocab, top_k, groups) for n in shard] for shard in ([2, 270], [30])]
    with tempfile.TemporaryDirectory() as folder:
        path = write_cache(Path(folder) / "cache", store, shards, manifest, groups)
        cache = LogitCache.open(path)
        for sample in (s for shard in shards for s in shard):
            found = cache.lookup(sample.token_ids)
            within(found, sample.logprobs, MAX_ERRORS[precision])
        assert verify(path).is_intact


def test_a_cache_of_256_groups_and_one_of_exact_groups(path: Path, store: str) -> None:
    rng = np.random.default_rng(30)
    groups = np.arange(300).astype(np.uint8)
    samples = [every_position(rng, n, 300, 20, groups) for n in (4, 300)]
    exact = LogitCache.open(
        write_cache(path / "a", store, [samples], make_manifest(store, 300, 20, token_groups=groups), groups)
    )
    manifest = make_manifest(store, 300, 20, precision="fine", token_groups=groups)
    fine = LogitCache.open(write_cache(path / "b", store, [samples], manifest, groups))
    for sample in samples:
        assert record_bits(exact.lookup(sample.token_ids)) == record_bits(sample.logprobs)
        within(fine.lookup(sample.token_ids), sample.logprobs, 1 / 64)


def test_a_higher_stated_error_is_accepted_and_a_lower_one_is_not(path: Path, store: str) -> None:
    manifest = make_manifest(store, precision="compact")
    stated = replace(manifest, capture=replace(manifest.capture, max_error=3 / 64))
    write_cache(path, store, [[every_position(np.random.default_rng(31), 20)]], stated)
    assert LogitCache.open(path).manifest.capture.max_error == 3 / 64


# --- ranges -----------------------------------------------------------------------------------------------------------


def stored(
    path: Path, store: str, precision: str, sample: CachedSample, groups: NDArray[np.uint8] | None
) -> BaseLogprobs:
    """A sample written to a cache of this precision and read again."""
    manifest = make_manifest(store, precision=precision, token_groups=groups)
    cache = LogitCache.open(write_cache(path, store, [[sample]], manifest, groups))
    return cache.lookup(sample.token_ids)


def not_stored(path: Path, store: str, precision: str, sample: CachedSample, groups: NDArray[np.uint8] | None) -> str:
    """The refusal of a sample, of which nothing may stay."""
    with CacheWriter(path, make_manifest(store, precision=precision, token_groups=groups), groups) as writer:
        before = tree(path)
        good = every_position(np.random.default_rng(32), 12, token_groups=groups)
        message = refused(InvalidRecord, "invalid-record", lambda: writer.commit([good, sample]))
        assert tree(path) == before
        assert not list(path.rglob("*.new"))
    return message


@pytest.mark.parametrize("nats", [-63.9, -64.1, -500, -7777.7, -1e5, -4194303.5, -np.inf])
@pytest.mark.parametrize("field", ["label", "tail"])
def test_labels_and_tails_far_down_are_stored(path: Path, store: str, precision: str, field: str, nats: float) -> None:
    sample = row(nats, [0.0], -np.inf) if field == "label" else row(0.0, [], nats)
    within(stored(path, store, precision, sample, None), sample.logprobs, MAX_ERRORS[precision])


@pytest.mark.parametrize("nats", [-4194304.0, -4194305.0, -8388608.0, -1e30, -3e38])
@pytest.mark.parametrize("field", ["label", "tail"])
def test_labels_and_tails_beyond_the_range_are_refused(
    path: Path, store: str, precision: str, field: str, nats: float
) -> None:
    sample = row(nats, [0.0], -np.inf) if field == "label" else row(0.0, [], nats)
    assert "exact" in not_stored(path, store, precision, sample, None)


STEPS = {"fine": 32, "compact": 16}


@pytest.mark.parametrize("first", [0, 40])
@pytest.mark.parametrize("steps", [65533, 65534])
def test_the_largest_drop_is_stored(path: Path, store: str, precision: str, steps: int, first: int) -> None:
    down = -steps / STEPS[precision]
    sample = row(0.0, [-first + down, -first + 2 * down] if first == 0 else [-first, -first + down], -np.inf)
    within(stored(path, store, precision, sample, None), sample.logprobs, MAX_ERRORS[precision])


@pytest.mark.parametrize("steps", [65535, 65536, 65537, 2 * 65536, 2 * 65536 + 3, 2**24, 2**31, 2**32 + 5, 2**33, 1e38])
@pytest.mark.parametrize("at", ["first", "between", "last"])
def test_a_larger_drop_is_refused_and_does_not_wrap(
    path: Path, store: str, precision: str, steps: float, at: str
) -> None:
    down = -steps / STEPS[precision]
    kept = {"first": [down], "between": [-1.0, -1.0 + down, -1.0 + down], "last": [-1.0, -2.0, -3.0, -4.0, -4.0 + down]}
    label = math.log1p(-sum(math.exp(k) for k in kept[at]))
    assert "exact" in not_stored(path, store, precision, row(label, kept[at], -np.inf), None)


GROUPS = make_groups(np.random.default_rng(33), VOCAB, 3)


@pytest.mark.parametrize("nats", [-0.7, -64.1, -32767.0, -65534.0, -np.inf])
def test_tail_groups_far_down_are_stored(path: Path, store: str, precision: str, nats: float) -> None:
    tail = np.logaddexp(-1.0, nats)
    sample = row(math.log1p(-math.exp(tail)), [], tail, [-1.0, nats, -np.inf])
    within(stored(path, store, precision, sample, GROUPS), sample.logprobs, MAX_ERRORS[precision])


@pytest.mark.parametrize("nats", [-65536.0, -65537.0, -131072.0, -1e30])
def test_tail_groups_beyond_the_range_are_refused(path: Path, store: str, precision: str, nats: float) -> None:
    sample = row(math.log1p(-math.exp(-1.0)), [], -1.0, [-1.0, nats, -np.inf])
    assert "exact" in not_stored(path, store, precision, sample, GROUPS)


@pytest.mark.parametrize("tail", [-100.0, -740.0, -1000.0])
@pytest.mark.parametrize("kind", ["exact", *COARSE])
def test_groups_of_a_tail_that_underflows_are_stored(path: Path, store: str, kind: str, tail: float) -> None:
    """exp(-1000) is 0 in float64, and the groups' sum is still the tail."""
    sample = row(0.0, [], tail, [tail + math.log(0.5), tail + math.log(0.3), tail + math.log(0.2)])
    within(stored(path, store, kind, sample, GROUPS), sample.logprobs, MAX_ERRORS[kind])


def test_what_cannot_be_stored_within_the_promise_is_refused(path: Path, store: str, precision: str) -> None:
    """Drops that each fit and whose sum does not: 33,000 of 2,040 nats."""
    top_k, steps = 33_000, {"fine": 2040, "compact": 4080}[precision]
    sample = row(0.0, [-steps * (n + 1) for n in range(top_k)], -np.inf, top_k=top_k)
    with CacheWriter(path, make_manifest(store, 2 * top_k, top_k, precision=precision)) as writer:
        before = tree(path)
        refused(InvalidRecord, "invalid-record", lambda: writer.commit([sample]))
        assert tree(path) == before


# --- min_mass ---------------------------------------------------------------------------------------------------------


def fewest(kept: Sequence[float], tail: float, min_mass: float) -> int:
    """How many of a row's alternatives hold the share: the definition, in float64."""
    masses = [math.exp(k) for k in kept]
    total = sum(masses) + math.exp(tail)
    held = 0.0
    for n, mass in enumerate(masses):
        if n and held >= min_mass * total:
            return n
        held += mass
    return len(masses)


@many
@given(seed=seeds, vocab=st.integers(2, 60), top_k=st.integers(1, 59), min_mass=st.floats(1e-6, 1.0))
def test_keep_mass_keeps_the_fewest_alternatives_that_hold_the_share(
    seed: int, vocab: int, top_k: int, min_mass: float
) -> None:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, size=31, dtype=np.uint32)
    whole = make_record(rng, tokens, np.arange(30, dtype=np.int32), vocab, min(top_k, vocab - 1))
    found = keep_mass(whole, min_mass)
    counts = (found.alternative_ids != NO_TOKEN).sum(axis=1).tolist()
    for i, count in enumerate(counts):
        kept = [float(k) for k in whole.alternative_logprobs[i] if k > -np.inf]
        tail = float(whole.tail_logprobs[i])
        least, most = (fewest(kept, tail, min_mass * (1 + off)) for off in (-1e-12, 1e-12))  # another order of sums
        assert least <= count <= most if min_mass < 1 else count == len(kept)
        moved = sum(math.exp(k) for k in kept[count:]) + math.exp(tail)
        assert math.isclose(math.exp(float(found.tail_logprobs[i])), moved, rel_tol=1e-4, abs_tol=1e-300)
        assert found.alternative_ids[i, :count].tolist() == whole.alternative_ids[i, :count].tolist()
        assert found.alternative_logprobs[i, :count].tolist() == whole.alternative_logprobs[i, :count].tolist()
        assert np.isneginf(found.alternative_logprobs[i, count:]).all()
    for name in ("positions", "label_ids", "label_logprobs"):
        assert getattr(found, name).tobytes() == getattr(whole, name).tobytes()


@relaxed
@given(seed=seeds, min_mass=st.floats(0.01, 0.999))
def test_a_writer_takes_what_keep_mass_gives(store: str, seed: int, min_mass: float) -> None:
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        for kind in MAX_ERRORS:
            sample = long_rows(rng)
            sample = replace(sample, logprobs=keep_mass(sample.logprobs, min_mass))
            manifest = make_manifest(store, precision=kind, min_mass=min_mass)
            path = write_cache(Path(folder) / kind, store, [[sample]], manifest)
            cache = LogitCache.open(path)
            within(cache.lookup(sample.token_ids), sample.logprobs, MAX_ERRORS[kind])
            assert verify(path).is_intact
            (shard,) = cache.shards()
            kept = np.exp(sample.logprobs.alternative_logprobs.astype(np.float64)).sum(axis=1)
            share = kept / (kept + np.exp(sample.logprobs.tail_logprobs.astype(np.float64)))
            assert math.isclose(shard.commit.kept_mass, float(share.sum()), rel_tol=1e-6)


def long_rows(rng: np.random.Generator) -> CachedSample:
    """A random sample whose rows keep all K."""
    while True:
        sample = every_position(rng, 40)
        full = np.flatnonzero((sample.logprobs.alternative_ids != NO_TOKEN).all(axis=1))
        if len(full):
            return replace(sample, logprobs=sample.logprobs.take(full))


@pytest.mark.parametrize(
    ("kept", "is_taken"),
    [([0.3], False), ([0.3, 0.1], False), ([0.3, 0.1, 0.05], True), ([0.1, 0.05, 0.05, 0.05, 0.05], True), ([], False)],
    ids=["less", "a little less", "the share", "less with all K", "none"],
)
def test_a_row_that_keeps_less_than_the_share_is_refused(
    path: Path, store: str, kept: list[float], is_taken: bool
) -> None:
    """Half of the mass is the label's, so 0.9 of the rest is 0.45."""
    sample = row(math.log(0.5), [math.log(k) for k in kept], math.log(0.5 - sum(kept)))
    with CacheWriter(path, make_manifest(store, min_mass=0.9)) as writer:
        before = tree(path)
        if is_taken:
            assert math.isclose(writer.commit([sample]).kept_mass, sum(kept) / 0.5, rel_tol=1e-5)
            return
        refused(InvalidRecord, "invalid-record", lambda: writer.commit([sample]))
        assert tree(path) == before


def test_keep_mass_does_not_guess_tail_groups() -> None:
    groups = make_groups(np.random.default_rng(34), VOCAB, 4)
    record = make_sample(np.random.default_rng(35), 20, token_groups=groups).logprobs
    assert keep_mass(record, 1.0) is record
    with pytest.raises(ValueError, match="tail groups"):
        keep_mass(record, 0.9)


# --- with other tools, as docs/format.md says -------------------------------------------------------------------------


def the_shard(path: Path) -> Path:
    (shard,) = (p for p in (path / "shards").iterdir() if p.is_dir())
    return shard


@pytest.mark.filterwarnings("ignore:.*Numcodecs codecs are not in the Zarr:zarr.errors.ZarrUserWarning")
@pytest.mark.parametrize("kind", MAX_ERRORS)
def test_plain_zarr_reads_a_shard(path: Path, kind: str) -> None:
    groups = make_groups(np.random.default_rng(36), VOCAB, 4)
    sample = every_position(np.random.default_rng(37), 600, token_groups=groups)
    write_cache(path, "zarr", [[sample]], make_manifest("zarr", precision=kind, token_groups=groups), groups)
    group: Any = zarr.open_group(the_shard(path), mode="r")
    record = LogitCache.open(path).lookup(sample.token_ids)
    assert np.array_equal(group["token_ids"][:], sample.token_ids)
    assert group["sample_ids"][:].tobytes() == sample_id(sample.token_ids)
    assert np.array_equal(group["positions"][:], record.positions)
    if kind == "exact":
        assert np.array_equal(group["alternative_logprobs"][:], record.alternative_logprobs)
        return
    steps = group["alternative_drops"].attrs["steps_per_nat"]
    drops = group["alternative_drops"][:].astype(np.int64)
    absent = drops == 65535
    logprobs = np.where(absent, -np.inf, -np.cumsum(drops, axis=1) / steps)
    assert np.array_equal(logprobs.astype(np.float32), record.alternative_logprobs)
    assert np.array_equal(np.where(absent, NO_TOKEN, group["alternative_ids"][:]), record.alternative_ids)
    label, tail, shares = (from_steps(group[f"{name}_steps"]) for name in ("label", "tail", "tail_group"))
    assert np.array_equal(label, record.label_logprobs) and np.array_equal(tail, record.tail_logprobs)
    assert record.tail_group_logprobs is not None
    assert np.array_equal(shares + tail[:, None], record.tail_group_logprobs)


def from_steps(array: Any) -> NDArray[np.float32]:
    whole = array[:]
    values: NDArray[np.float64] = np.where(
        whole == np.iinfo(whole.dtype).max, -np.inf, whole / -array.attrs["steps_per_nat"]
    )
    return values.astype(np.float32)


@pytest.mark.parametrize("kind", COARSE)
def test_plain_pyarrow_reads_a_shard(path: Path, kind: str) -> None:
    sample = every_position(np.random.default_rng(37), 40, 70_000, 8)  # ids beyond 16 bits
    write_cache(path, "arrow", [[sample]], make_manifest("arrow", 70_000, 8, precision=kind))
    rows = pa.ipc.open_file(the_shard(path) / "logprobs.arrow").read_all().to_pandas()
    ids = np.stack(rows["alternative_ids_low"]) + 65536 * np.stack(rows["alternative_ids_high"]).astype(np.uint32)
    drops = np.stack(rows["alternative_drops_low"]) + 256 * np.stack(rows["alternative_drops_high"]).astype(np.int64)
    record = LogitCache.open(path).lookup(sample.token_ids)
    absent = drops == 65535
    logprobs = np.where(absent, -np.inf, -np.cumsum(drops, axis=1) / STEPS[kind])
    assert np.array_equal(logprobs.astype(np.float32), record.alternative_logprobs)
    assert np.array_equal(np.where(absent, NO_TOKEN, ids), record.alternative_ids)
    samples = pa.ipc.open_file(the_shard(path) / "samples.arrow").read_all().to_pylist()
    assert [s["token_ids"] for s in samples] == [sample.token_ids.tolist()]
    assert [s["sample_id"] for s in samples] == [sample_id(sample.token_ids)]
