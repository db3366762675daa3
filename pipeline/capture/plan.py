"""Which samples a cache is to hold, in which order, shard by shard; and the filling of one from samples in memory.

Owns the plan. It is a function of the data, the budget and the shard size alone, so a run that is killed and started
again forms the same batches and ends with the same bytes; what is committed is skipped. Must not know how a record is
computed or stored. Data sets that do not fit into memory, and many workers, are in `job`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from logitcache.data.batches import batches_by_length
from logitcache.data.samples import Sample, SampleSet
from logitcache.errors import NonFiniteLogits
from logitcache.events import Progress
from logitcache.models.head import check_head, check_length
from logitcache.models.loading import Base, tokenizer_identity
from logitcache.storage import CacheWriter, CaptureSettings, Manifest, ModelIdentity, sample_id
from logitcache.storage.cache import stored_token_groups
from logitcache.storage.captured_index import Captured
from logitcache.storage.encoding import PRECISIONS
from logitcache.storage.identity import digest
from logitcache.storage.manifest import features_of

from .shard_pipeline import Filler
from .teacher import TransformersTeacher
from .vocab_groups import token_groups


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


@dataclass(frozen=True)
class Counts:
    """Of a data set, or a part of it: rows, what truncation did to them, and what is planned of them."""

    num_rows: int = 0
    num_truncated: int = 0
    num_tokens_cut: int = 0
    num_without_labels: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    num_positions: int = 0
    num_units: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        """Of both parts together."""
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def count(found: SampleSet, plan: Plan) -> Counts:
    """Of rows that were read, and a plan of some or all of their samples."""
    rows = (found.num_rows, found.num_truncated, found.num_tokens_cut, found.num_without_labels)
    return Counts(*rows, plan.num_samples, plan.num_tokens, plan.num_positions, len(plan.shards))


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
    return manifest_of(base.source.name, base.identity, tokenizer, settings, partition)


def manifest_of(
    model_name: str,
    identity: ModelIdentity,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: PrecomputeSettings,
    partition: NDArray[np.uint8] | None = None,
    engine: str = "",
) -> Manifest:
    """`manifest_for` of any engine; one that is not transformers is named, and leaves the tail as 1 minus the rest."""
    if settings.tail_samples and settings.min_mass < 1:
        raise ValueError("tail_samples with min_mass: the draws are from beyond all top_k alternatives")
    packages = ["logitcache", "torch", "transformers", "zarr", "pyarrow", "numcodecs", "pcodec"]
    precision = PRECISIONS[settings.precision]
    fitted = settings.fitted(identity.vocab_size)
    manifest = Manifest(
        store=settings.store,
        model=identity,
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
            tail_from_remainder=bool(engine),
        ),
        model_name=model_name,
        created_with={name: version(name) for name in [*packages, *([engine] if engine else [])]},
    )
    return replace(manifest, reader_features=features_of(manifest.capture, manifest.model))


def make_plan(samples: Sequence[Sample], settings: PrecomputeSettings) -> Plan:
    """Distinct samples in batches of at most `batch_tokens`, longest first, and these in shards."""
    shards: list[tuple[tuple[Sample, ...], ...]] = []
    batches: list[tuple[Sample, ...]] = []
    num_positions = 0
    for batch in batches_by_length(samples, settings.batch_tokens):
        batches.append(batch)
        num_positions += sum(len(sample.positions) for sample in batch)
        if num_positions >= settings.shard_positions:
            shards.append(tuple(batches))
            batches, num_positions = [], 0
    if batches:
        shards.append(tuple(batches))
    return Plan(tuple(shards))


def without_captured(plan: Plan, captured: Captured) -> Plan:
    """The plan less what a cache holds: positions, samples, batches and shards, in the same order."""
    samples = list(plan.samples)
    missing = captured.missing([sample_id(s.token_ids) for s in samples], [s.positions for s in samples])
    left = iter([_at(sample, positions) for sample, positions in zip(samples, missing, strict=True)])
    shards = []
    for shard in plan.shards:
        batches = [tuple(found for _ in batch if (found := next(left)) is not None) for batch in shard]
        if any(batches):
            shards.append(tuple(b for b in batches if b))
    return Plan(tuple(shards))


def teacher_of(base: Base, manifest: Manifest, partition: NDArray[np.uint8] | None) -> TransformersTeacher:
    """The base as the teacher of a cache with this manifest."""
    groups = None if partition is None else torch.from_numpy(partition.copy())
    return TransformersTeacher(base.model, manifest.capture.top_k, groups, manifest.capture.num_tail_samples)


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
    with CacheWriter(path, manifest, partition) as writer:
        missing = without_captured(plan, writer.captured())
        progress(plan.num_tokens - missing.num_tokens)
        with Filler(writer, teacher_of(base, manifest, partition), partition, progress) as filler:
            for shard in missing.shards:
                filler.shard(shard)
        if filler.filled.failures:
            raise NonFiniteLogits(failed_text(filler.filled.failures))
        if not writer.is_final:
            writer.finalize()
    return PrecomputeReport(
        num_samples=missing.num_samples,
        num_positions=missing.num_positions,
        num_tokens=missing.num_tokens,
        num_samples_found=plan.num_samples - missing.num_samples,
    )


def failed_text(failures: Sequence[str]) -> str:
    """What is said of shards that could not be computed."""
    others = f" {len(failures) - 1} more shards could not be computed either." if len(failures) > 1 else ""
    return failures[0] + others


def _at(sample: Sample, positions: NDArray[np.int32]) -> Sample | None:
    """A sample of which only these positions are wanted; None where there are none."""
    if len(positions) == len(sample.positions):
        return sample
    if not len(positions):
        return None
    supervised = np.zeros_like(sample.supervised)
    supervised[positions + 1] = True
    return replace(sample, supervised=supervised)
