"""Random valid samples and manifests for the tests of storage/, and what they compare caches with.

A record is made from the float64 softmax of random logits, so that its partition of the vocabulary is exact up to the
rounding to float32. What makes them uses nothing of the code under test but its data classes, `CacheWriter` and
`LogitCache`.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import numpy as np
import pytest
from numpy.typing import NDArray

from logitcache.storage import (
    BaseLogprobs,
    CachedSample,
    CacheError,
    CacheWriter,
    CaptureIdentity,
    LogitCache,
    Manifest,
    ModelIdentity,
    TokenizerIdentity,
)
from logitcache.storage.encoding import columns_of, decode, encode
from logitcache.storage.manifest import to_bytes

STORES = ("zarr", "arrow")
NO_TOKEN = 2**32 - 1
VOCAB, TOP_K = 40, 5

MAX_ERRORS = {"exact": 0.0, "fine": 1 / 64, "compact": 1 / 32}
"""What docs/format.md promises of an alternative, in nats."""

Shards = Sequence[Sequence[CachedSample]]
AnyPath = TypeVar("AnyPath", Path, str)


def blake(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def make_manifest(
    store: str,
    vocab_size: int = VOCAB,
    top_k: int = TOP_K,
    *,
    precision: str = "exact",
    min_mass: float = 1.0,
    token_groups: NDArray[np.uint8] | None = None,
    num_draws: int = 0,
    group_steps: int = 1,
) -> Manifest:
    """token_groups: uint8 [V], the tail group of each token; what its largest number says is how many there are."""
    features = {"tail-groups": token_groups is not None, "tail-samples": num_draws > 0}
    return Manifest(
        store=store,
        model=ModelIdentity("a" * 32, '{"model_type":"test"}', vocab_size, "bfloat16", "sdpa"),
        tokenizer=TokenizerIdentity("7" * 32),
        capture=CaptureIdentity(
            top_k=top_k,
            max_length=4096,
            min_mass=min_mass,
            precision=precision,
            max_error=MAX_ERRORS[precision],
            num_tail_groups=0 if token_groups is None else int(token_groups.max()) + 1,
            tail_partition="" if token_groups is None else blake(token_groups.tobytes()),
            group_steps_per_nat=0 if token_groups is None else group_steps,
            num_tail_samples=num_draws,
        ),
        model_name="tests/model",
        created_with={"logitcache": "0"},
        reader_features=tuple(name for name, is_there in features.items() if is_there),
    )


def make_groups(rng: np.random.Generator, vocab_size: int, num_groups: int) -> NDArray[np.uint8]:
    """A random partition of the vocabulary; the last group is never empty."""
    groups = rng.integers(0, num_groups, size=vocab_size, dtype=np.uint8)
    groups[rng.integers(vocab_size)] = num_groups - 1
    return groups


def make_record(
    rng: np.random.Generator,
    token_ids: NDArray[np.uint32],
    positions: NDArray[np.int32],
    vocab_size: int,
    top_k: int,
    token_groups: NDArray[np.uint8] | None = None,
    num_draws: int = 0,
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
    left = np.where(kept, 0.0, np.exp(ranked))
    with np.errstate(divide="ignore"):
        groups = None
        if token_groups is not None:
            parts = [
                np.where(token_groups[order] == g, left, 0).sum(axis=1) for g in range(int(token_groups.max()) + 1)
            ]
            groups = np.log(np.stack(parts, axis=1)).astype(np.float32)
        draws = make_draws(rng, order, np.where(kept, -np.inf, ranked), num_draws) if num_draws else (None, None)
        ids = np.where(kept, order, NO_TOKEN)[:, :top_k]
        return BaseLogprobs(
            positions=positions,
            label_ids=labels,
            label_logprobs=logprobs[np.arange(n), labels].astype(np.float32),
            alternative_ids=ids.astype(np.uint32),
            alternative_logprobs=np.where(kept, ranked, -np.inf)[:, :top_k].astype(np.float32),
            tail_logprobs=np.log(left.sum(axis=1)).astype(np.float32),
            tail_group_logprobs=groups,
            tail_sample_ids=draws[0],
            tail_sample_logprobs=draws[1],
        )


def make_draws(
    rng: np.random.Generator, ids: NDArray[np.integer], logprobs: NDArray[np.float64], num_draws: int
) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """Draws with replacement, row by row, from a tail of these tokens [n, V] with these log-probabilities."""
    drawn = np.full((len(ids), num_draws), NO_TOKEN, dtype=np.uint32)
    drawn_logprobs = np.full(drawn.shape, -np.inf, dtype=np.float32)
    for row in np.flatnonzero((logprobs > -np.inf).any(axis=1)):
        p = np.exp(logprobs[row] - logprobs[row].max())
        at = rng.choice(len(p), size=num_draws, p=p / p.sum())
        found = logprobs[row, at].astype(np.float32)
        order = np.lexsort((ids[row, at], -found))
        drawn[row], drawn_logprobs[row] = ids[row, at[order]], found[order]
    return drawn, drawn_logprobs


def make_sample(
    rng: np.random.Generator,
    num_tokens: int,
    vocab_size: int = VOCAB,
    top_k: int = TOP_K,
    positions: Sequence[int] | None = None,
    token_ids: NDArray[np.uint32] | None = None,
    token_groups: NDArray[np.uint8] | None = None,
    num_draws: int = 0,
) -> CachedSample:
    """A random sample. positions: by default about half of those possible, at least one."""
    if token_ids is None:
        token_ids = rng.integers(0, vocab_size, size=num_tokens, dtype=np.uint32)
    if positions is None:
        positions = np.flatnonzero(rng.random(len(token_ids) - 1) < 0.5).tolist() or [len(token_ids) - 2]
    where = np.array(positions, dtype=np.int32)
    record = make_record(rng, token_ids, where, vocab_size, top_k, token_groups, num_draws)
    return CachedSample(token_ids, record, num_tokens_cut=int(rng.integers(0, 3)))


def every_position(
    rng: np.random.Generator,
    num_tokens: int,
    vocab_size: int = VOCAB,
    top_k: int = TOP_K,
    token_groups: NDArray[np.uint8] | None = None,
    num_draws: int = 0,
) -> CachedSample:
    """A random sample of which every position is captured."""
    where = range(num_tokens - 1)
    return make_sample(
        rng, num_tokens, vocab_size, top_k, positions=where, token_groups=token_groups, num_draws=num_draws
    )


def captures(sample: CachedSample, parts: Sequence[Sequence[int]]) -> list[CachedSample]:
    """The sample with these rows of its record each, as several runs would capture it."""
    return [replace(sample, logprobs=sample.logprobs.take(np.array(rows, dtype=np.intp))) for rows in parts]


def flat(shards: Shards) -> list[CachedSample]:
    return [sample for shard in shards for sample in shard]


def make_shards(seed: int, lengths: Sequence[Sequence[int]]) -> list[list[CachedSample]]:
    """Samples of these numbers of tokens, a list a shard."""
    rng = np.random.default_rng(seed)
    return [[make_sample(rng, n) for n in shard] for shard in lengths]


SHARDS = make_shards(1, [[30, 2, 9], [17, 40]])
"""What the fixtures `pristine` and `written` hold."""


def uneven_shards(seed: int, token_groups: NDArray[np.uint8] | None, num_draws: int) -> list[list[CachedSample]]:
    """Three shards of samples of very different lengths: of four, of two and of one."""
    rng = np.random.default_rng(seed)
    return [
        [make_sample(rng, n, token_groups=token_groups, num_draws=num_draws) for n in shard]
        for shard in ([300, 2, 40, 700], [30, 9], [12])
    ]


def write_cache(
    path: AnyPath,
    store: str,
    shards: Shards,
    manifest: Manifest | None = None,
    token_groups: NDArray[np.uint8] | None = None,
) -> AnyPath:
    """A finished cache of these shards."""
    with CacheWriter(path, manifest or make_manifest(store), token_groups) as writer:
        for shard in shards:
            writer.commit(shard)
        writer.finalize()
    return path


def with_record(sample: CachedSample, **changes: object) -> CachedSample:
    """The sample with fields of its record replaced."""
    return replace(sample, logprobs=replace(sample.logprobs, **changes))  # type: ignore[arg-type]


def record_bits(record: BaseLogprobs) -> list[tuple[str, str, tuple[int, ...], bytes]]:
    """Name, dtype, shape and bytes of every field: equal exactly where two records are the same bit for bit."""
    return [(name, a.dtype.str, a.shape, a.tobytes()) for name, a in record.columns().items()]


def sample_bits(sample: CachedSample) -> tuple[object, ...]:
    """The same of a whole sample."""
    return (sample.token_ids.dtype.str, sample.token_ids.tobytes(), sample.num_tokens_cut, record_bits(sample.logprobs))


def cache_bits(path: Path | str) -> list[tuple[object, ...]]:
    """Everything that reading a cache gives."""
    return [sample_bits(sample) for sample in LogitCache.open(path).samples()]


def by_tokens(samples: Sequence[CachedSample]) -> dict[bytes, tuple[object, ...]]:
    """The bits of samples by their tokens, for comparisons that leave the order free."""
    return {s.token_ids.tobytes(): sample_bits(s) for s in samples}


def stored(path: Path | str) -> dict[bytes, tuple[object, ...]]:
    """Every sample of a cache with all its bits, by its tokens."""
    return by_tokens(list(LogitCache.open(path).samples()))


def tree(path: Path | str) -> dict[str, bytes]:
    """Every file below a folder or a URL."""
    if isinstance(path, Path):
        return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    fs, root = fsspec.core.url_to_fs(path, use_listings_cache=False)
    fs.invalidate_cache()
    return {name.removeprefix(f"{root}/"): fs.cat_file(name) for name in fs.find(root)}


def lasting(path: Path | str) -> dict[str, bytes]:
    """The files that make a finished cache, and any stray file.

    All but the lock, which holds nothing, and the indexes of earlier contents, which stay until a repair.
    """
    found = tree(path)
    contents = found.get("contents.json", b"")
    older = {name for name in found if name.startswith("index-") and name.encode() not in contents}
    return {name: data for name, data in found.items() if name != "writer.lock" and not (contents and name in older)}


def refused(error: type[CacheError], reason: str, call: Callable[[], object]) -> str:
    """The message of a refusal of exactly this class and reason."""
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert caught.value.reason == reason
    return str(caught.value)


def identity_of(manifest: Manifest) -> str:
    """The identity of a cache with this manifest, from docs/format.md."""
    body = json.loads(to_bytes(manifest))["body"]
    flat = {"store": body["store"]}
    for group in ("model", "tokenizer", "capture"):
        fields = body[group]
        flat |= {group: None} if fields is None else {f"{group}.{name}": value for name, value in fields.items()}
    return blake(json.dumps(flat, sort_keys=True, separators=(",", ":")).encode())


def unit_of(samples: Sequence[CachedSample], store: str) -> str:
    """The unit of a shard of these samples in a cache of `make_manifest(store)`, from docs/format.md."""
    identity = bytes.fromhex(identity_of(make_manifest(store)))
    ids = b"".join(hashlib.blake2b(s.token_ids.astype("<u4").tobytes(), digest_size=16).digest() for s in samples)
    counts = np.array([len(s.logprobs.positions) for s in samples], dtype="<u4")
    positions = np.concatenate([s.logprobs.positions for s in samples]).astype("<i4")
    return blake(identity + ids + counts.tobytes() + positions.tobytes())


def in_processes(method: str, call: Callable[..., object], jobs: Sequence[tuple[Any, ...]]) -> list[Any]:
    """What a function gives in as many new processes as there are jobs, all at once."""
    with multiprocessing.get_context(method).Pool(len(jobs)) as pool:
        results = [pool.apply_async(call, job) for job in jobs]
        found = [result.get(timeout=120) for result in results]  # a dead worker fails instead of hanging
        pool.close()
        pool.join()  # told to end, they do; SIGTERM, by which a pool ends them, may be some library's own by now
    return found


def assert_round_trip(record: BaseLogprobs, capture: CaptureIdentity) -> None:
    """Encoded, a record has the columns of the format, comes back `within` its bounds, and does not move again."""
    columns = encode(record, capture)
    assert [(n, c.dtype.str, c.shape) for n, c in columns.items()] == [
        (c.name, c.dtype, c.shape(len(record))) for c in columns_of(capture)
    ]
    found = decode(columns, record.positions, record.label_ids, capture)
    within(found, record, MAX_ERRORS[capture.precision], group_steps=capture.group_steps_per_nat or 1)
    again = encode(found, capture)  # what was rounded once
    assert {n: c.tobytes() for n, c in again.items()} == {n: c.tobytes() for n, c in columns.items()}


def within(
    found: BaseLogprobs, given: BaseLogprobs, max_error: float, stated: float | None = None, group_steps: int = 1
) -> None:
    """Assert what docs/format.md promises of a record that was stored, at a precision of this maximum error if not 0.

    stated: the maximum error against the base, which is more where what was given had been rounded before.
    """
    for name in ("positions", "label_ids", "alternative_ids"):
        assert np.array_equal(getattr(found, name), getattr(given, name)), name
    bounds = {"alternative_logprobs": max_error, "label_logprobs": 1 / 2048, "tail_logprobs": 1 / 2048}
    assert (found.tail_group_logprobs is None) == (given.tail_group_logprobs is None)
    if given.tail_group_logprobs is not None:
        bounds["tail_group_logprobs"] = 1 / (2 * group_steps) + 1 / 2048
    assert (found.tail_sample_ids is None) == (given.tail_sample_ids is None)
    if given.tail_sample_ids is not None:
        assert np.array_equal(found.tail_sample_ids, given.tail_sample_ids)  # type: ignore[arg-type]
        bounds["tail_sample_logprobs"] = max_error
    for name, bound in bounds.items():
        a, b = getattr(found, name).astype(np.float64), getattr(given, name).astype(np.float64)
        assert np.array_equal(np.isneginf(a), np.isneginf(b)), name
        assert a.max(initial=0) <= 1e-6, name
        finite = np.isfinite(b)
        off, rounding = np.abs(a[finite] - b[finite]), 2e-6 + 2**-22 * np.abs(b[finite])  # of float32
        assert np.all(off <= (bound + rounding if max_error else 0)), name
    mass = sum(np.exp(getattr(found, f"{n}_logprobs").astype(np.float64)) for n in ("label", "tail"))
    mass = mass + np.exp(found.alternative_logprobs.astype(np.float64)).sum(axis=1)
    error = max_error if stated is None else stated
    if not found.num_alternatives:
        error = min(error, 1 / 2048)
    assert np.abs(mass - 1).max(initial=0) <= np.expm1(error) + 1e-4
