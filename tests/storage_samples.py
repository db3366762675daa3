"""Random valid samples and manifests for the tests of storage/, and what they compare caches with.

A record is made from the float64 softmax of random logits, so that its partition of the vocabulary is exact up to the
rounding to float32. Nothing here uses the code under test beyond its data classes, `CacheWriter` and `LogitCache`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from logitcache.storage import (
    BaseLogprobs,
    CachedSample,
    CacheWriter,
    CaptureSettings,
    LogitCache,
    Manifest,
    ModelIdentity,
    TokenizerIdentity,
)

STORES = ("zarr", "arrow")
NO_TOKEN = 2**32 - 1
VOCAB, TOP_K = 40, 5

Shards = Sequence[Sequence[CachedSample]]


def make_manifest(store: str, vocab_size: int = VOCAB, top_k: int = TOP_K) -> Manifest:
    return Manifest(
        store=store,
        model=ModelIdentity("w" * 32, "c" * 32, vocab_size, "bfloat16", "sdpa"),
        tokenizer=TokenizerIdentity("t" * 32, "f" * 32),
        capture=CaptureSettings(top_k=top_k, max_length=4096),
        model_name="tests/model",
        created_with={"logitcache": "0"},
    )


def make_record(
    rng: np.random.Generator, token_ids: NDArray[np.uint32], positions: NDArray[np.int32], vocab_size: int, top_k: int
) -> BaseLogprobs:
    """A record of these positions. Some rows are peaked, some keep fewer than K; with k = V - 1 a full row's tail
    is -inf."""
    n = len(positions)
    labels = token_ids[positions + 1]
    logits = rng.normal(size=(n, vocab_size)) * rng.choice([0.1, 2.0, 60.0], size=(n, 1), p=[0.2, 0.6, 0.2])
    peak = logits.max(axis=1, keepdims=True)
    logprobs = logits - peak - np.log(np.exp(logits - peak).sum(axis=1, keepdims=True))
    others = logprobs.copy()
    others[np.arange(n), labels] = -np.inf
    order = np.argsort(-others, axis=1, kind="stable")
    ranked = np.take_along_axis(others, order, axis=1)
    num_kept = np.where(rng.random(n) < 0.2, rng.integers(0, top_k + 1, size=n), top_k)[:, None]
    kept = np.arange(vocab_size) < num_kept
    with np.errstate(divide="ignore"):
        ids = np.where(kept, order, NO_TOKEN)[:, :top_k]
        return BaseLogprobs(
            positions=positions,
            label_ids=labels,
            label_logprobs=logprobs[np.arange(n), labels].astype(np.float32),
            alternative_ids=ids.astype(np.uint32),
            alternative_logprobs=np.where(kept, ranked, -np.inf)[:, :top_k].astype(np.float32),
            tail_logprobs=np.log(np.where(kept, 0.0, np.exp(ranked)).sum(axis=1)).astype(np.float32),
        )


def make_sample(
    rng: np.random.Generator,
    num_tokens: int,
    vocab_size: int = VOCAB,
    top_k: int = TOP_K,
    positions: Sequence[int] | None = None,
    token_ids: NDArray[np.uint32] | None = None,
) -> CachedSample:
    """A random sample. positions: by default about half of those possible, at least one."""
    if token_ids is None:
        token_ids = rng.integers(0, vocab_size, size=num_tokens, dtype=np.uint32)
    if positions is None:
        positions = np.flatnonzero(rng.random(len(token_ids) - 1) < 0.5).tolist() or [len(token_ids) - 2]
    record = make_record(rng, token_ids, np.array(positions, dtype=np.int32), vocab_size, top_k)
    return CachedSample(token_ids, record, num_tokens_cut=int(rng.integers(0, 3)))


def make_shards(seed: int, lengths: Sequence[Sequence[int]]) -> list[list[CachedSample]]:
    """Samples of these numbers of tokens, a list a shard."""
    rng = np.random.default_rng(seed)
    return [[make_sample(rng, n) for n in shard] for shard in lengths]


def write_cache(path: Path, store: str, shards: Shards, manifest: Manifest | None = None) -> Path:
    """A finished cache of these shards."""
    with CacheWriter(path, manifest or make_manifest(store)) as writer:
        for shard in shards:
            writer.commit(shard)
        writer.finalize()
    return path


def with_record(sample: CachedSample, **changes: object) -> CachedSample:
    """The sample with fields of its record replaced."""
    return replace(sample, logprobs=replace(sample.logprobs, **changes))  # type: ignore[arg-type]


def record_bits(record: BaseLogprobs) -> list[tuple[str, str, tuple[int, ...], bytes]]:
    """Name, dtype, shape and bytes of every field: equal exactly where two records are the same bit for bit."""
    arrays = [(f.name, getattr(record, f.name)) for f in fields(record)]
    return [(name, a.dtype.str, a.shape, a.tobytes()) for name, a in arrays]


def sample_bits(sample: CachedSample) -> tuple[object, ...]:
    """The same of a whole sample."""
    return (sample.token_ids.dtype.str, sample.token_ids.tobytes(), sample.num_tokens_cut, record_bits(sample.logprobs))


def cache_bits(path: Path) -> list[tuple[object, ...]]:
    """Everything that reading a cache gives."""
    return [sample_bits(sample) for sample in LogitCache.open(path).samples()]


def by_tokens(samples: Sequence[CachedSample]) -> dict[bytes, tuple[object, ...]]:
    """The bits of samples by their tokens, for comparisons that leave the order free."""
    return {s.token_ids.tobytes(): sample_bits(s) for s in samples}


def tree(path: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def lasting(path: Path) -> dict[str, bytes]:
    """The files that make a finished cache, and any stray file: all but the lock, which holds nothing."""
    return {name: data for name, data in tree(path).items() if name != "writer.lock"}
