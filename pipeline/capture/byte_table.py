"""What other numbers of alternatives and tail groups would take and keep, of a sample that is captured once.

Owns which they are, how a smaller one is made of the widest, and which of them is advised for so many bytes. The advice
rests on what their gradients are worth as measured elsewhere (docs/loss.md): of data on which nothing was trained there
is no gradient yet. Must not choose the sample, nor print.
Shapes: V vocabulary, P positions, G groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from logitcache.data.samples import Sample
from logitcache.errors import UnsupportedModel
from logitcache.models.device_map import head_device
from logitcache.models.loading import Base
from logitcache.storage import BaseLogprobs, CachedSample
from logitcache.storage.encoding import encode, sample_table
from logitcache.storage.packing import pack_shard
from logitcache.storage.records import concatenate, narrow

from .cache_spec import CacheSpec, cache_spec
from .records import one_hot
from .settings import CaptureSettings
from .teacher import TransformersTeacher
from .vocab_groups import token_groups

KEPT = (8, 16, 32, 64, 128, 256)
"""Alternatives a position, as far as the vocabulary has them."""

GROUPS = (0, 16, 64)
"""Of the tail, beside each of them."""

GRADIENT_COSINES: dict[tuple[int, int], float] = {
    (8, 0): 0.940,
    (8, 16): 0.975,
    (8, 64): 0.983,
    (16, 0): 0.964,
    (16, 16): 0.982,
    (16, 64): 0.990,
    (32, 0): 0.979,
    (32, 16): 0.990,
    (32, 64): 0.994,
    (64, 0): 0.989,
    (64, 16): 0.994,
    (64, 64): 0.996,
    (128, 0): 0.994,
    (128, 16): 0.997,
    (128, 64): 0.998,
    (256, 0): 0.997,
    (256, 16): 0.998,
    (256, 64): 0.999,
}
"""Of the adapter's gradient with that of the exact masked KL, by alternatives and groups: mean over three students of
the demo's base and three of SmolLM2-135M-Instruct (docs/loss.md)."""


@dataclass(frozen=True)
class Choice:
    """A way of keeping a position. bytes_per_position: as stored, the samples' tokens included; kept_mass: the share of
    the non-target mass that the alternatives hold, mean over positions; keeps_all: they are all that there are."""

    top_k: int
    tail_groups: int
    bytes_per_position: float
    kept_mass: float
    keeps_all: bool = False

    @property
    def gradient_cosine(self) -> float:
        """Of `GRADIENT_COSINES`: measured on another model and other data; 1 where no tail is left."""
        return 1.0 if self.keeps_all else GRADIENT_COSINES[self.top_k, self.tail_groups]


@dataclass(frozen=True)
class WideCapture:
    """Samples with as many alternatives as any choice has, and the tail by every partition that one has."""

    samples: list[Sample]
    #: Without groups.
    records: list[BaseLogprobs]
    #: By G: the group of each token, uint8 [V].
    partitions: dict[int, NDArray[np.uint8]]
    #: By G: log of the tail's mass in each group, float32 [P, G] a sample.
    by_group: dict[int, list[NDArray[np.float32]]]

    def kept(self, top_k: int, num_groups: int) -> list[BaseLogprobs]:
        """The records as a capture of so many alternatives and groups makes them, up to float32 sums of the tail."""
        records, partition = self.records, self.partitions.get(num_groups)
        if num_groups:
            pairs = zip(records, self.by_group[num_groups], strict=True)
            records = [replace(record, tail_group_logprobs=groups) for record, groups in pairs]
        return [narrow(record, top_k, partition) for record in records]


def capture_wide(base: Base, batches: Sequence[Sequence[Sample]], spec: CacheSpec) -> WideCapture:
    """One forward of the base a batch. spec: of the cache that is planned, whose own partition serves where its number
    of groups is among the choices. Without groups where the base's output embedding cannot be split."""
    vocab_size = base.identity.vocab_size
    top_k = max([k for k in KEPT if k < vocab_size], default=vocab_size - 1)
    partitions = _partitions(base, spec)
    stacked = torch.from_numpy(np.stack(list(partitions.values()), axis=1)) if partitions else None
    groups = None if stacked is None else one_hot(stacked, head_device(base.model))
    teacher = TransformersTeacher(base.model, top_k, groups)
    samples, records = [s for b in batches for s in b], [r for b in batches for r in teacher(b)]
    ends = np.cumsum(list(partitions)).tolist()
    by_group = {
        count: [_columns(record, end - count, end) for record in records]
        for count, end in zip(partitions, ends, strict=True)
    }
    return WideCapture(samples, [replace(r, tail_group_logprobs=None) for r in records], partitions, by_group)


def choices_of(
    wide: WideCapture,
    base: Base,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: CaptureSettings,
    positions_per_shard: float,
) -> tuple[Choice, ...]:
    """Every choice that the vocabulary allows, at the precision, the store and the step of groups of the settings;
    without their --min-mass and draws. positions_per_shard: of the cache that is planned, mean."""
    found = []
    for top_k in (k for k in KEPT if k < base.identity.vocab_size):
        keeps_all = top_k == base.identity.vocab_size - 1
        for num_groups in (0, *wide.partitions):
            if num_groups and keeps_all:
                continue  # no tail is left
            spec = cache_spec(
                base.source.name,
                base.identity,
                tokenizer,
                with_choice(settings, top_k, num_groups),
                wide.partitions.get(num_groups),
            )
            records = wide.kept(top_k, num_groups)
            cached = spec.stored(zip(wide.samples, records, strict=True))
            kept = float(np.concatenate([record.kept_mass() for record in records]).mean())
            size = bytes_per_position(cached, spec, positions_per_shard)
            found.append(Choice(top_k, num_groups, size, kept, keeps_all))
    return tuple(found)


def with_choice(settings: CaptureSettings, top_k: int, num_groups: int) -> CaptureSettings:
    """The settings with so many alternatives and groups, the same in every row, and no draws."""
    step = settings.tail_group_step if num_groups else CaptureSettings.tail_group_step
    chosen = {"top_k": top_k, "tail_groups": num_groups, "tail_group_step": step}
    return replace(settings, **chosen, min_mass=1.0, tail_samples=0)  # type: ignore[arg-type]


def bytes_per_position(cached: Sequence[CachedSample], spec: CacheSpec, positions_per_shard: float) -> float:
    """Of shards of so many positions of samples as these, encoded and packed as they would be written.

    A shard of n positions takes F + b n bytes; F, some kB of headers, weighs more in these few than in a shard. Both
    follow from all of the samples and every second one.
    """
    whole, n = _packed_bytes(cached, spec)
    if len(cached) == 1:
        return whole / n
    part, m = _packed_bytes(cached[::2], spec)
    each = (whole - part) / (n - m)
    return each + max(whole - each * n, 0.0) / positions_per_shard


def _packed_bytes(cached: Sequence[CachedSample], spec: CacheSpec) -> tuple[int, int]:
    """Bytes of a shard of these samples, and its positions."""
    manifest = spec.manifest
    columns = encode(concatenate([c.logprobs for c in cached]), manifest.capture)
    packed = pack_shard(manifest, sample_table(cached), columns, 0.0)
    return sum(map(len, packed.files.values())), packed.commit.num_positions


def best_within(choices: Sequence[Choice], max_bytes: float) -> Choice | None:
    """Of those that take at most so many bytes a position the one whose gradient is truest, of equal ones the smallest;
    None where none does."""
    fitting = [choice for choice in choices if choice.bytes_per_position <= max_bytes]
    return max(fitting, key=lambda c: (c.gradient_cosine, -c.bytes_per_position), default=None)


def _partitions(base: Base, spec: CacheSpec) -> dict[int, NDArray[np.uint8]]:
    given, known = spec.token_groups, spec.manifest.capture.num_tail_groups
    counts = [count for count in GROUPS if 0 < count <= base.identity.vocab_size]
    try:
        return {
            count: given if given is not None and count == known else token_groups(base.model, count)
            for count in counts
        }
    except UnsupportedModel:  # packed: its rows are no tokens, so that no cache of this base has groups
        return {}


def _columns(record: BaseLogprobs, start: int, end: int) -> NDArray[np.float32]:
    assert record.tail_group_logprobs is not None
    return np.ascontiguousarray(record.tail_group_logprobs[:, start:end])
