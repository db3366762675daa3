"""The batch job that fills a cache: which samples are missing, in which order, shard by shard.

Owns the plan. It is a function of the data, the budget and the shard size alone, so a run that is killed and started
again forms the same batches and ends with the same bytes; what is committed is skipped. Must not know how a record is
computed or stored.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from logitcache.storage import CachedSample, CacheWriter, CaptureSettings, Manifest, sample_id
from logitcache.storage.cache import stored_token_groups
from logitcache.storage.encoding import PRECISIONS, columns_of
from logitcache.storage.identity import digest
from logitcache.storage.manifest import features_of
from logitcache.storage.records import keep_mass

from .head import check_head, check_length
from .models import Base, tokenizer_identity
from .partition import token_groups
from .samples import Sample, distinct
from .teacher import capture

Progress = Callable[[int], None]
"""Called with the number of tokens done since the last call."""

BYTES_A_SAMPLE_TABLE_ROW = 28


@dataclass(frozen=True)
class PrecomputeSettings:
    """top_k: alternatives a position; max_length: tokens a sample; batch_tokens: padded tokens a
    forward; shard_positions: positions a shard, the most that a kill can lose; store: zarr or arrow; precision: exact,
    fine or compact; min_mass: keep the fewest alternatives with this share of the non-target mass (1: all top_k);
    tail_groups: parts of the vocabulary to split the tail by (0: none); tail_samples: draws from the tail (0: none)."""

    top_k: int = 64
    max_length: int = 1024
    batch_tokens: int = 8192
    shard_positions: int = 32_768
    store: str = "zarr"
    precision: str = "fine"
    min_mass: float = 1.0
    tail_groups: int = 0
    tail_samples: int = 0

    def fitted(self, vocab_size: int) -> "PrecomputeSettings":
        """top_k and tail_groups no larger than the vocabulary allows; no groups where there is no tail."""
        top_k = min(self.top_k, vocab_size - 1)
        groups = min(self.tail_groups, vocab_size) if top_k < vocab_size - 1 else 0
        return replace(self, top_k=top_k, tail_groups=groups)


@dataclass(frozen=True)
class Plan:
    """Batches, longest samples first, grouped into shards."""

    shards: tuple[tuple[tuple[Sample, ...], ...], ...]

    @property
    def samples(self) -> Iterator[Sample]:
        """Every sample of the plan."""
        return (sample for shard in self.shards for batch in shard for sample in batch)

    @property
    def num_samples(self) -> int:
        """Different token sequences."""
        return sum(1 for _ in self.samples)

    @property
    def num_tokens(self) -> int:
        """Tokens the base will see, without padding."""
        return sum(len(s.token_ids) for s in self.samples)

    @property
    def num_positions(self) -> int:
        """Records the cache will gain."""
        return sum(len(s.positions) for s in self.samples)

    def num_bytes(self, settings: PrecomputeSettings) -> int:
        """Size of its records and tokens before compression."""
        kept = CaptureSettings(
            settings.top_k,
            2,
            precision=settings.precision,
            num_tail_groups=settings.tail_groups,
            num_tail_samples=settings.tail_samples,
        )
        columns = columns_of(kept)
        rows = self.num_positions * sum(np.dtype(c.dtype).itemsize * max(c.width, 1) for c in columns)
        return rows + 4 * self.num_tokens + BYTES_A_SAMPLE_TABLE_ROW * self.num_samples


@dataclass(frozen=True)
class PrecomputeReport:
    """What one run did: samples and positions it added, and shards that were there already."""

    num_samples: int
    num_positions: int
    num_tokens: int
    num_samples_found: int


def partition_for(base: Base, settings: PrecomputeSettings, path: str | Path) -> NDArray[np.uint8] | None:
    """The tail group of each token, uint8 [V]: that of the cache at `path` if it was begun, or made from the base.

    None without tail groups, or without a tail.
    """
    num_groups = settings.fitted(base.identity.vocab_size).tail_groups
    if not num_groups:
        return None
    stored = stored_token_groups(path)
    return token_groups(base.model, num_groups) if stored is None else stored


def manifest_for(
    base: Base,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: PrecomputeSettings,
    partition: NDArray[np.uint8] | None = None,
) -> Manifest:
    """The manifest of a cache of this base with these settings, with tail groups where there is a partition.

    partition: as `partition_for` gives it.
    Raises ValueError for tail samples with min_mass: the draws are from beyond all top_k alternatives.
    """
    if settings.tail_samples and settings.min_mass < 1:
        raise ValueError("tail_samples with min_mass: the draws are from beyond all top_k alternatives")
    packages = ("logitcache", "torch", "transformers", "zarr", "pyarrow", "numcodecs", "pcodec")
    precision = PRECISIONS[settings.precision]
    fitted = settings.fitted(base.identity.vocab_size)
    manifest = Manifest(
        store=settings.store,
        model=base.identity,
        tokenizer=tokenizer_identity(tokenizer),
        capture=CaptureSettings(
            top_k=fitted.top_k,
            max_length=settings.max_length,
            min_mass=settings.min_mass,
            precision=settings.precision,
            max_error=precision.max_error if precision else 0.0,
            num_tail_groups=0 if partition is None else fitted.tail_groups,
            tail_partition="" if partition is None else digest(partition.tobytes()),
            num_tail_samples=settings.tail_samples,
        ),
        model_name=base.source.name,
        created_with={name: version(name) for name in packages},
    )
    return replace(manifest, reader_features=features_of(manifest.capture, manifest.model))


def make_plan(samples: Sequence[Sample], settings: PrecomputeSettings) -> Plan:
    """Distinct samples, longest first (memory runs out at once or never), in batches of at most `batch_tokens`."""
    ordered = sorted(distinct(samples), key=lambda s: (-len(s.token_ids), sample_id(s.token_ids)))
    shards: list[tuple[tuple[Sample, ...], ...]] = []
    batches: list[tuple[Sample, ...]] = []
    batch: list[Sample] = []
    num_positions = 0
    for sample in ordered:
        if batch and (len(batch) + 1) * len(batch[0].token_ids) > settings.batch_tokens:
            batches.append(tuple(batch))
            batch = []
            if num_positions >= settings.shard_positions:
                shards.append(tuple(batches))
                batches, num_positions = [], 0
        batch.append(sample)
        num_positions += len(sample.positions)
    if batch:
        shards.append((*batches, tuple(batch)))
    return Plan(tuple(shards))


def without_captured(plan: Plan, captured: Mapping[bytes, NDArray[np.int32]]) -> Plan:
    """The plan less what a cache holds: positions, samples, batches and shards, in the same order."""
    shards = []
    for shard in plan.shards:
        batches = [tuple(left for s in batch if (left := _missing(s, captured)) is not None) for batch in shard]
        if any(batches):
            shards.append(tuple(b for b in batches if b))
    return Plan(tuple(shards))


def precompute(
    base: Base,
    manifest: Manifest,
    plan: Plan,
    path: str | Path,
    progress: Progress = lambda _: None,
    partition: NDArray[np.uint8] | None = None,
) -> PrecomputeReport:
    """Fill the cache at `path` with the samples of a plan, and finalise it.

    Runs the base once over every sample that is missing. partition: that of the manifest. Raises what `CacheWriter` and
    `capture` raise; what was committed before stays, and a later call goes on from there.
    """
    check_head(base.model)
    check_length(base.model, max((len(s.token_ids) for s in plan.samples), default=0))
    kept = manifest.capture
    groups = None if partition is None else torch.from_numpy(partition.copy())
    with CacheWriter(path, manifest, partition) as writer:
        missing = without_captured(plan, writer.captured())
        progress(plan.num_tokens - missing.num_tokens)
        for shard in missing.shards:
            cached: list[CachedSample] = []
            for batch in shard:
                records = capture(base.model, batch, kept.top_k, groups, kept.num_tail_samples)
                for sample, record in zip(batch, records, strict=True):
                    fewer = keep_mass(record, kept.min_mass, partition)
                    cached.append(CachedSample(sample.token_ids, fewer, sample.num_tokens_cut))
                progress(sum(len(s.token_ids) for s in batch))
            writer.commit(cached)
        if not writer.is_final:
            writer.finalize()
    return PrecomputeReport(
        num_samples=missing.num_samples,
        num_positions=missing.num_positions,
        num_tokens=missing.num_tokens,
        num_samples_found=plan.num_samples - missing.num_samples,
    )


def _missing(sample: Sample, captured: Mapping[bytes, NDArray[np.int32]]) -> Sample | None:
    have = captured.get(sample_id(sample.token_ids))
    if have is None:
        return sample
    supervised = sample.supervised.copy()
    supervised[have + 1] = False
    left = replace(sample, supervised=supervised)
    return left if len(left.positions) else None
