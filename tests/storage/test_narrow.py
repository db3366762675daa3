"""A record read with fewer alternatives is the one that a capture of so many would have made.

The oracle captures a distribution by the definition, in Python's own numbers; `narrow` and `keep_mass` see records.
"""

from __future__ import annotations

import math
import pickle
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.storage_samples import (
    MAX_ERRORS,
    NO_TOKEN,
    TOP_K,
    VOCAB,
    every_position,
    make_groups,
    make_manifest,
    make_sample,
    record_bits,
    within,
    write_cache,
)
from support.storage_strategies import many, relaxed, seeds

from logitcache.storage import BaseLogprobs, CachedSample, LogitCache, verify
from logitcache.storage.records import check_rows, concatenate, keep_mass, narrow

pytest_plugins = ["support.storage_fixtures"]
pytestmark = pytest.mark.usefixtures("no_fsync")

Floats = NDArray[np.float64]
FLOAT32 = 1e-3
"""Nats that rounding to float32 costs, thousands of nats down."""


# --- against the definition -------------------------------------------------------------------------------------------


def log_of_sum(logprobs: list[float]) -> float:
    top = max(logprobs, default=-math.inf)
    return top if top == -math.inf else top + math.log(math.fsum(math.exp(x - top) for x in logprobs))


def capture(logprobs: Floats, labels: list[int], top_k: int, groups: NDArray[np.uint8] | None) -> BaseLogprobs:
    """The record of distributions [P, V] in nats: label, the top_k most probable others, and the rest."""
    num_groups = 0 if groups is None else int(groups.max()) + 1
    kept, tails, by_group = [], [], []
    for row, label in zip(logprobs.tolist(), labels, strict=True):
        ranked = sorted((c for c in range(len(row)) if c != label), key=lambda c: -row[c])
        kept.append(ranked[:top_k])
        rest = ranked[top_k:]
        tails.append(log_of_sum([row[c] for c in rest]))
        by_group.append([log_of_sum([row[c] for c in rest if groups[c] == g]) for g in range(num_groups)])  # type: ignore[index]
    ids = np.array(kept, dtype=np.uint32)
    return BaseLogprobs(
        positions=np.arange(len(labels), dtype=np.int32),
        label_ids=np.array(labels, dtype=np.uint32),
        label_logprobs=logprobs[np.arange(len(labels)), labels].astype(np.float32),
        alternative_ids=ids,
        alternative_logprobs=np.take_along_axis(logprobs, ids.astype(np.int64), axis=1).astype(np.float32),
        tail_logprobs=np.array(tails, dtype=np.float32),
        tail_group_logprobs=np.array(by_group, dtype=np.float32) if num_groups else None,
    )


def distributions(rng: np.random.Generator, num_rows: int, vocab: int) -> tuple[Floats, list[int]]:
    """Flat and peaked ones, down to thousands of nats, and a label each."""
    logits = rng.normal(size=(num_rows, vocab)) * rng.choice([0.1, 2.0, 60.0, 2000.0], size=(num_rows, 1))
    logprobs = logits - np.logaddexp.reduce(logits, axis=1)[:, None]
    return logprobs, rng.integers(0, vocab, size=num_rows).tolist()


def assert_close(found: BaseLogprobs, expected: BaseLogprobs) -> None:
    """Equal up to float32: of what was captured, a dropped alternative and the tail are rounded, then their sum."""
    assert found.columns().keys() == expected.columns().keys()
    for name, values in found.columns().items():
        other = getattr(expected, name)
        assert values.dtype == other.dtype and values.shape == other.shape, name
        if name in ("tail_logprobs", "tail_group_logprobs"):
            np.testing.assert_array_equal(np.isneginf(values), np.isneginf(other), name)
            present = np.isfinite(other)
            np.testing.assert_allclose(values[present], other[present], rtol=3e-7, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(values, other, name)


@many
@given(
    seed=seeds,
    vocab=st.integers(2, 40),
    top_k=st.integers(0, 39),
    narrower=st.integers(0, 39),
    num_groups=st.none() | st.integers(2, 9),
)
def test_narrowing_equals_a_capture_of_fewer(
    seed: int, vocab: int, top_k: int, narrower: int, num_groups: int | None
) -> None:
    """K = V - 1, where the tail grows from nothing, and probabilities that underflow."""
    rng = np.random.default_rng(seed)
    groups = None if num_groups is None else make_groups(rng, vocab, num_groups)
    top_k = min(top_k, vocab - 1)
    narrower = min(narrower, top_k)
    logprobs, labels = distributions(rng, 12, vocab)
    whole = capture(logprobs, labels, top_k, groups)
    found = narrow(whole, narrower, groups)
    assert_close(found, capture(logprobs, labels, narrower, groups))
    check_rows(found, vocab, "what was narrowed", 2e-6, FLOAT32)  # masses, and groups against the tail
    between = (narrower + top_k) // 2
    assert_close(narrow(narrow(whole, between, groups), narrower, groups), found)
    assert np.all(found.tail_logprobs >= whole.tail_logprobs)
    assert np.all(narrow(whole, between, groups).tail_logprobs <= found.tail_logprobs)
    if groups is not None:
        assert np.all(found.tail_group_logprobs >= whole.tail_group_logprobs)  # type: ignore[operator]
    assert found.alternative_ids.flags.c_contiguous and found.alternative_logprobs.flags.c_contiguous


@many
@given(seed=seeds, top_k=st.integers(0, TOP_K), num_groups=st.none() | st.integers(2, 9))
@example(seed=98530, top_k=TOP_K, num_groups=None)  # a tail of 2e-16 nats, in a record that stays as it is
def test_rows_that_keep_fewer_are_narrowed_too(seed: int, top_k: int, num_groups: int | None) -> None:
    """Absent alternatives, and rows from which nothing is dropped: these stay as they are, bit for bit."""
    rng = np.random.default_rng(seed)
    groups = None if num_groups is None else make_groups(rng, VOCAB, num_groups)
    record = make_sample(rng, 40, token_groups=groups).logprobs
    found = narrow(record, top_k, groups)
    check_rows(found, VOCAB, "what was narrowed", 2e-6, FLOAT32)
    same = (record.alternative_ids != NO_TOKEN).sum(axis=1) <= top_k
    for name in found.columns().keys() - {"alternative_ids", "alternative_logprobs"}:
        values = getattr(record, name)[same]
        values = np.minimum(values, 0) if name.startswith("tail") and top_k < TOP_K else values
        np.testing.assert_array_equal(getattr(found, name)[same], values)
    assert np.array_equal(found.alternative_ids, record.alternative_ids[:, :top_k])
    assert narrow(record, TOP_K, groups) is record and narrow(record, TOP_K) is record


@many
@given(seed=seeds, min_mass=st.floats(1e-6, 0.999), num_groups=st.integers(2, 9))
def test_keep_mass_moves_what_it_drops_into_the_groups(seed: int, min_mass: float, num_groups: int) -> None:
    """Row by row it is what `narrow` gives for as many as the row keeps, at the width that it had."""
    rng = np.random.default_rng(seed)
    groups = make_groups(rng, VOCAB, num_groups)
    logprobs, labels = distributions(rng, 12, VOCAB)
    whole = capture(logprobs, labels, 9, groups)
    found = keep_mass(whole, min_mass, groups)
    check_rows(found, VOCAB, "what was kept", 2e-6, FLOAT32)
    without = keep_mass(replace(whole, tail_group_logprobs=None), min_mass)
    assert record_bits(replace(found, tail_group_logprobs=None)) == record_bits(without)
    counts = (found.alternative_ids != NO_TOKEN).sum(axis=1).tolist()
    rows = [narrow(whole.take(slice(i, i + 1)), n, groups) for i, n in enumerate(counts)]
    for name in ("tail_logprobs", "tail_group_logprobs"):
        np.testing.assert_array_equal(getattr(found, name), np.concatenate([getattr(r, name) for r in rows]))


def test_what_is_dropped_far_down_is_not_lost() -> None:
    """In log space: e^-1000 is 0 as a number, and the tail of two such tokens is e^-1000 times 2."""
    record = BaseLogprobs(
        positions=np.zeros(1, dtype=np.int32),
        label_ids=np.ones(1, dtype=np.uint32),
        label_logprobs=np.full(1, math.log(0.5), dtype=np.float32),
        alternative_ids=np.array([[2, 3]], dtype=np.uint32),
        alternative_logprobs=np.array([[math.log(0.5), -1000.0]], dtype=np.float32),
        tail_logprobs=np.array([-1000.0], dtype=np.float32),
        tail_group_logprobs=np.array([[-1000.0, -np.inf, -5000.0]], dtype=np.float32),
    )
    groups = np.array([0, 0, 0, 1, 2], dtype=np.uint8)
    for found in (narrow(record, 1, groups), keep_mass(record, 0.9, groups)):
        np.testing.assert_allclose(found.tail_logprobs, -1000 + math.log(2), rtol=1e-7)
        assert found.tail_group_logprobs is not None
        assert found.tail_group_logprobs.tolist() == [[-1000.0, -1000.0, -5000.0]]


def test_masses_that_were_rounded_up_do_not_give_more_than_1() -> None:
    """Of a quantised cache the parts may sum to e^(1/32); a log-probability above 0 would not be one."""
    record = BaseLogprobs(
        positions=np.zeros(1, dtype=np.int32),
        label_ids=np.ones(1, dtype=np.uint32),
        label_logprobs=np.full(1, -np.inf, dtype=np.float32),
        alternative_ids=np.array([[2, 3]], dtype=np.uint32),
        alternative_logprobs=np.array([[-5.0, -5.0]], dtype=np.float32),
        tail_logprobs=np.zeros(1, dtype=np.float32),
        tail_group_logprobs=np.array([[0.0, -np.inf]], dtype=np.float32),
    )
    found = narrow(record, 1, np.zeros(4, dtype=np.uint8))
    assert found.tail_logprobs.tolist() == [0.0] and found.tail_group_logprobs is not None
    assert found.tail_group_logprobs.tolist() == [[0.0, -np.inf]]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [-1, TOP_K + 1, 10**6])
def test_more_than_there_is_and_fewer_than_none_are_refused(top_k: int) -> None:
    record = every_position(np.random.default_rng(70), 9).logprobs
    with pytest.raises(ValueError, match=f"{top_k} alternatives: expected 0 to {TOP_K}"):
        narrow(record, top_k)


def test_groups_are_not_guessed() -> None:
    groups = make_groups(np.random.default_rng(71), VOCAB, 4)
    record = every_position(np.random.default_rng(72), 20, token_groups=groups).logprobs
    for call in (lambda: narrow(record, 2), lambda: keep_mass(record, 0.5)):
        with pytest.raises(ValueError, match="expected token_groups"):
            call()


def test_draws_are_of_the_smaller_tail_and_not_narrowed() -> None:
    record = every_position(np.random.default_rng(73), 20, num_draws=4).logprobs
    for call in (lambda: narrow(record, 2), lambda: keep_mass(record, 0.5)):
        with pytest.raises(ValueError, match="4 draws"):
            call()
    assert narrow(record, TOP_K) is record and keep_mass(record, 1.0) is record
    found = narrow(replace(record, tail_sample_ids=None, tail_sample_logprobs=None), 2)
    assert found.num_tail_samples == 0 and found.num_alternatives == 2


# --- from caches ------------------------------------------------------------------------------------------------------


@relaxed
@given(seed=seeds, top_k=st.integers(0, TOP_K), num_groups=st.none() | st.integers(2, 9))
@pytest.mark.parametrize("precision", MAX_ERRORS)
def test_lookup_of_fewer_is_lookup_narrowed(
    store: str, precision: str, seed: int, top_k: int, num_groups: int | None
) -> None:
    """One by one, in batches, at some positions, and from a cache that has been pickled."""
    rng = np.random.default_rng(seed)
    groups = None if num_groups is None else make_groups(rng, VOCAB, num_groups)
    samples = [every_position(rng, n, token_groups=groups) for n in (3, 30)]
    manifest = make_manifest(store, precision=precision, token_groups=groups)
    with tempfile.TemporaryDirectory() as folder:
        cache = LogitCache.open(write_cache(Path(folder) / "cache", store, [samples], manifest, groups))
        expected = [narrow(cache.lookup(s.token_ids), top_k, groups) for s in samples]
        tokens = [s.token_ids for s in samples]
        for opened in (cache, pickle.loads(pickle.dumps(cache))):
            batch = opened.lookup_batch(tokens, top_k=top_k)
            assert list(map(record_bits, batch)) == list(map(record_bits, expected))
            assert record_bits(opened.lookup(tokens[0], top_k=top_k)) == record_bits(expected[0])
        rows = np.array([0, 4, 20])
        found = cache.lookup_batch(tokens[1:], [rows], top_k=top_k)
        assert record_bits(found[0]) == record_bits(expected[1].take(rows))


@pytest.mark.parametrize("precision", MAX_ERRORS)
def test_a_cache_of_fewer_holds_the_same(tmp_path: Path, store: str, precision: str) -> None:
    """Against a cache that was captured narrower: within what both promise."""
    rng = np.random.default_rng(74)
    groups = make_groups(rng, VOCAB, 4)
    logprobs, _ = distributions(rng, 30, VOCAB)
    logprobs = np.maximum(logprobs, -600)
    logprobs -= np.logaddexp.reduce(logprobs, axis=1)[:, None]
    tokens = rng.integers(0, VOCAB, size=31, dtype=np.uint32)
    labels = tokens[1:].tolist()
    samples = {k: CachedSample(tokens, capture(logprobs, labels, k, groups)) for k in (9, 3)}
    caches = {}
    for k, sample in samples.items():
        manifest = make_manifest(store, VOCAB, k, precision=precision, token_groups=groups)
        caches[k] = LogitCache.open(write_cache(tmp_path / str(k), store, [[sample]], manifest, groups))
    found, expected = caches[9].lookup(tokens, top_k=3), caches[3].lookup(tokens)
    within(expected, samples[3].logprobs, MAX_ERRORS[precision])
    assert np.array_equal(found.alternative_ids, expected.alternative_ids)
    assert np.array_equal(found.alternative_logprobs, expected.alternative_logprobs)
    error = 2 * MAX_ERRORS[precision] + 2e-4  # some 1e-5 for 600 nats in float32
    np.testing.assert_allclose(found.tail_logprobs, expected.tail_logprobs, atol=error)
    there = np.isfinite(expected.tail_group_logprobs)  # type: ignore[arg-type]
    off = np.abs(found.tail_group_logprobs[there] - expected.tail_group_logprobs[there])  # type: ignore[index]
    assert off.max() <= (1 + error if precision != "exact" else error)


def test_what_was_kept_with_groups_is_written_and_read(path: Path, store: str) -> None:
    rng = np.random.default_rng(75)
    groups = make_groups(rng, VOCAB, 4)
    logprobs, _ = distributions(rng, 30, VOCAB)
    tokens = rng.integers(0, VOCAB, size=31, dtype=np.uint32)
    whole = capture(logprobs, tokens[1:].tolist(), TOP_K, groups)
    sample = CachedSample(tokens, keep_mass(whole, 0.7, groups))
    manifest = make_manifest(store, min_mass=0.7, token_groups=groups)
    cache = LogitCache.open(write_cache(path, store, [[sample]], manifest, groups))
    assert record_bits(cache.lookup(tokens)) == record_bits(sample.logprobs)
    assert verify(path).is_intact


def test_lookup_refuses_what_cannot_be_had(path: Path, store: str) -> None:
    sample = every_position(np.random.default_rng(76), 20)
    cache = LogitCache.open(write_cache(path / "a", store, [[sample]]))
    for top_k in (-1, TOP_K + 1):
        for call in (cache.lookup, lambda t, **k: cache.lookup_batch([t], **k)):
            with pytest.raises(ValueError, match=f"expected 0 to {TOP_K}") as caught:
                call(sample.token_ids, top_k=top_k)
            assert str(path) in str(caught.value)
    drawn = every_position(np.random.default_rng(77), 20, num_draws=4)
    cache = LogitCache.open(write_cache(path / "b", store, [[drawn]], make_manifest(store, num_draws=4)))
    with pytest.raises(ValueError, match="found 4") as caught:
        cache.lookup(drawn.token_ids, top_k=TOP_K - 1)
    assert str(path) in str(caught.value)
    assert record_bits(cache.lookup(drawn.token_ids, top_k=TOP_K)) == record_bits(drawn.logprobs)


def test_an_empty_record_is_narrowed() -> None:
    record = every_position(np.random.default_rng(78), 9).logprobs
    nothing = record.take(slice(0, 0))
    found = narrow(nothing, 2)
    assert len(found) == 0 and found.num_alternatives == 2
    assert concatenate([found, narrow(record, 2)]).equals(narrow(record, 2))
