"""The base, run by transformers -> `BaseLogprobs`.

Owns one body forward of a padded batch, of which the supervised positions alone reach the head (`records`), and what a
teacher is to a job. Must not know what is kept of a distribution.
Shapes: B samples, T time, V vocabulary, K alternatives, G groups.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from logitcache.data.batches import pad_batch
from logitcache.data.samples import Sample
from logitcache.models.causal import needs_mask
from logitcache.models.device_map import head_device
from logitcache.models.head import OutputHead, hidden_states, logits_width
from logitcache.models.loading import Base
from logitcache.storage import BaseLogprobs

from .cache_spec import CacheSpec
from .pending import PendingRecords
from .records import Kept, one_hot, record_hidden


class Teacher(Protocol):
    """Whatever runs the base."""

    def __call__(self, batch: Sequence[Sample], /) -> list[BaseLogprobs]:
        """The record of every supervised position of each sample, in their order."""
        ...


class Records(Protocol):
    """What gives the records of a batch, once: waits for them where they are still being made."""

    def records(self) -> list[BaseLogprobs]:
        """Of each sample, in their order. Raises `NonFiniteLogits` with sample and position."""
        ...


@runtime_checkable
class LaunchingTeacher(Protocol):
    """A teacher that is asked for a batch before the one before is done."""

    @property
    def num_ahead(self) -> int:
        """How many batches it is asked for before the records of the first are wanted."""
        ...

    def launch(self, batch: Sequence[Sample], /) -> Records:
        """What gives the records later."""
        ...


@dataclass(frozen=True)
class TransformersTeacher:
    """Records by transformers: the same numerics as the student's. groups: one-hot, float32 [V, G], where the head is;
    the others: those of `capture`."""

    model: PreTrainedModel
    top_k: int
    groups: Tensor | None = None
    num_tail_samples: int = 0
    masked: bool = True
    num_ahead: int = 1

    def __call__(self, batch: Sequence[Sample]) -> list[BaseLogprobs]:
        """`capture` of one padded batch."""
        return self.launch(batch).records()

    @torch.inference_mode()
    def launch(self, batch: Sequence[Sample]) -> PendingRecords:
        """What gives the same, without waiting for a GPU."""
        device = head_device(self.model)
        padded = pad_batch(batch, device)
        hidden = hidden_states(self.model, **padded.inputs(self.masked)).flatten(0, 1)
        hidden = hidden.index_select(0, padded.rows)
        kept = Kept(self.top_k, self.groups, self.num_tail_samples)
        return record_hidden(hidden, padded.label_ids, OutputHead(self.model), logits_width(self.model), batch, kept)


def launched(teacher: Teacher, batch: Sequence[Sample]) -> Callable[[], list[BaseLogprobs]]:
    """What gives the records of a batch, which something may be making still."""
    if isinstance(teacher, LaunchingTeacher):
        return teacher.launch(batch).records
    found = teacher(batch)
    return lambda: found


def teacher_of(base: Base, cache_spec: CacheSpec) -> TransformersTeacher:
    """The base as the teacher of a cache."""
    kept, groups = cache_spec.manifest.capture, cache_spec.token_groups
    split = None if groups is None else one_hot(torch.from_numpy(groups.copy()), head_device(base.model))
    return TransformersTeacher(base.model, kept.top_k, split, kept.num_tail_samples, needs_mask(base.model))


def capture(
    model: PreTrainedModel,
    batch: Sequence[Sample],
    top_k: int,
    token_groups: Tensor | None = None,
    num_tail_samples: int = 0,
    masked: bool = True,
) -> list[BaseLogprobs]:
    """The record of every supervised position of a batch, with K = min(top_k, V - 1).

    log p(c) = z_c - logsumexp(z) in float32 over the whole vocabulary; the tail is summed directly over the tokens that
    are neither label nor kept. token_groups: int [V], to split the tail by, or [V, n], n partitions whose groups then
    stand side by side; num_tail_samples: draws from the tail, the same for a position of a sample whenever it is
    captured; masked: hide the padding behind samples, which a model that is causal by itself (`needs_mask`) does not
    see. Raises `NonFiniteLogits` with the sample and the position.
    """
    split = None if token_groups is None else one_hot(token_groups, head_device(model))
    return TransformersTeacher(model, top_k, split, num_tail_samples, masked)(batch)
