"""What an adversarial read of the storage found: inputs for which it was silently wrong, or lost data."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.storage_samples import make_manifest, make_sample

from logitcache.losses.formulas import Objective, regularizer_values
from logitcache.pairing.targets import sparse_targets
from logitcache.storage import BaseLogprobs, CachedSample, CacheWriter, LogitCache, repair, verify
from logitcache.storage.records import keep_mass


def peaked(gap: float, vocab: int = 12) -> CachedSample:
    """Rows in which the label is `gap` nats above everything else, which is of equal probability."""
    tokens = np.array([0, 1, 2, 3], dtype=np.uint32)
    rest = np.float64(-gap) - np.log1p((vocab - 1) * np.exp(-gap))
    ids = np.array([[c for c in range(vocab) if c != t][:4] for t in (1, 2, 3)], dtype=np.uint32)
    return CachedSample(
        tokens,
        BaseLogprobs(
            positions=np.arange(3, dtype=np.int32),
            label_ids=tokens[1:],
            label_logprobs=np.full(3, -np.log1p((vocab - 1) * np.exp(-gap)), dtype=np.float32),
            alternative_ids=ids,
            alternative_logprobs=np.full((3, 4), rest, dtype=np.float32),
            tail_logprobs=np.full(3, rest + np.log(vocab - 5), dtype=np.float32),
        ),
    )


@pytest.mark.parametrize("gap", [10.0, 95.0, 200.0, 800.0])
def test_kept_mass_of_confident_rows_does_not_underflow(gap: float) -> None:
    record = peaked(gap).logprobs
    np.testing.assert_allclose(record.kept_mass(), 4 / 11, rtol=1e-4)
    less = keep_mass(record, 0.25)
    assert (less.alternative_logprobs > -np.inf).sum(axis=1).tolist() == [3, 3, 3]
    np.testing.assert_allclose(less.tail_logprobs - record.tail_logprobs, np.log(8 / 7), atol=1e-3)


def test_a_confident_sample_is_written_with_min_mass(tmp_path: Path) -> None:
    manifest = make_manifest("zarr", vocab_size=12, top_k=4)
    manifest = replace(manifest, capture=replace(manifest.capture, min_mass=0.3))
    sample = peaked(200.0)
    sample = replace(sample, logprobs=keep_mass(sample.logprobs, 0.3))
    with CacheWriter(tmp_path / "c", manifest) as writer:
        writer.commit([sample])
        writer.finalize()
    assert verify(tmp_path / "c").is_intact


@pytest.mark.parametrize("precision", ["fine", "compact"])
@pytest.mark.parametrize("regularizer", ["masked-kl", "full-kl"])
def test_a_quantised_cache_gives_a_kl_that_is_small_and_not_negative_at_the_base(
    precision: str, regularizer: str, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    error = {"fine": 1 / 64, "compact": 1 / 32}[precision]
    manifest = make_manifest("zarr", vocab_size=200, top_k=16)
    manifest = replace(manifest, capture=replace(manifest.capture, precision=precision, max_error=error))
    logits = rng.normal(size=(400, 200)) * 3
    tokens = rng.integers(200, size=401).astype(np.uint32)
    sample = CachedSample(tokens, exact_record(logits, tokens))
    with CacheWriter(tmp_path / "c", manifest) as writer:
        writer.commit([sample])
        writer.finalize()
    targets = sparse_targets([LogitCache.open(tmp_path / "c").lookup(tokens)])
    values = regularizer_values(torch.from_numpy(logits), targets, Objective(regularizer))  # type: ignore[arg-type]
    assert float(values.min()) > -1e-6
    assert float(values.mean()) < error**2 / 3


def exact_record(logits: np.ndarray, tokens: np.ndarray) -> BaseLogprobs:
    """The best 16 beside the label, from the softmax in float64."""
    rows, labels = np.arange(len(logits)), tokens[1:]
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    others = logprobs.copy()
    others[rows, labels] = -np.inf
    order = np.argsort(-others, axis=1)
    ranked = np.take_along_axis(others, order, axis=1)
    return BaseLogprobs(
        positions=rows.astype(np.int32),
        label_ids=labels,
        label_logprobs=logprobs[rows, labels].astype(np.float32),
        alternative_ids=order[:, :16].astype(np.uint32),
        alternative_logprobs=ranked[:, :16].astype(np.float32),
        tail_logprobs=np.log(np.exp(ranked[:, 16:]).sum(axis=1)).astype(np.float32),
    )


def test_a_prefix_unites_all_samples_that_begin_so(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    tokens = [np.array([1, 2, 3, 4, 5, last], dtype=np.uint32) for last in (6, 9)]
    samples = [make_sample(rng, 6, token_ids=t, positions=p) for t, p in zip(tokens, ([4], [0, 1, 2]), strict=True)]
    with CacheWriter(tmp_path / "c", make_manifest("arrow")) as writer:
        writer.commit(samples)
        writer.finalize()
    cache, prefix = LogitCache.open(tmp_path / "c"), tokens[0][:5]
    assert cache.lookup(prefix).equals(samples[1].logprobs)
    cache.require(prefix, np.array([0, 2]))


def test_repair_of_a_url_that_reads_as_a_pattern_touches_no_other_cache() -> None:
    rng = np.random.default_rng(2)
    urls = ["memory://pattern1/c", "memory://pattern[1]/c"]
    for url in urls:
        with CacheWriter(url, make_manifest("arrow")) as writer:
            writer.commit([make_sample(rng, 30)])
            writer.finalize()
    files = LogitCache.open(urls[1])._files
    (unit,) = [name for name in files.names("shards") if name.endswith(".json")]
    files.replace(f"shards/{unit}", b"{}")
    assert repair(urls[1]).dropped == (unit.removesuffix(".json"),)
    assert verify(urls[0]).is_intact


def test_an_open_cache_survives_a_change_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = make_sample(np.random.default_rng(3), 20)
    monkeypatch.chdir(tmp_path)
    with CacheWriter("c", make_manifest("zarr")) as writer:
        writer.commit([sample])
        writer.finalize()
    cache = LogitCache.open("c")
    os.chdir("/")
    assert cache.lookup(sample.token_ids).equals(sample.logprobs)


def test_a_manifest_that_readers_would_refuse_is_not_written(tmp_path: Path) -> None:
    base = make_manifest("zarr")
    for change in ({"min_mass": 1}, {"precision": "fine"}, {"max_length": 1}, {"top_k": np.int64(5)}):
        with pytest.raises(ValueError, match="readers would refuse it"):
            CacheWriter(tmp_path / "c", replace(base, capture=replace(base.capture, **change)))  # type: ignore[arg-type]
    assert not (tmp_path / "c").exists()


def test_a_writer_leaves_other_peoples_files_alone(tmp_path: Path) -> None:
    sample = make_sample(np.random.default_rng(4), 20)
    with CacheWriter(tmp_path, make_manifest("zarr")) as writer:
        writer.commit([sample])
    mine = ["mine.new", "index-of-authors.npy", "worker-notes.json", "staging/notes.txt", "shards/notes/a.txt"]
    for name in mine:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine", encoding="utf-8")
    for _ in range(2):
        with CacheWriter(tmp_path, make_manifest("zarr")) as writer:
            writer.finalize()
        assert [name for name in mine if not (tmp_path / name).is_file()] == []
        next((tmp_path / "shards").glob("*-*/zarr.json")).unlink()
        assert len(repair(tmp_path).dropped) == 1
        assert [name for name in mine if not (tmp_path / name).is_file()] == []
        with CacheWriter(tmp_path, make_manifest("zarr")) as writer:
            writer.commit([sample])
