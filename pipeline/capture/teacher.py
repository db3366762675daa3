"""The base -> `BaseLogprobs`, chunk by chunk.

Owns the record's numbers: one body forward of a padded batch, then the head on slices of supervised positions only.
[batch, time, vocabulary] is never held; one slice of logits in float32 is.
Shapes: B samples, T time, N positions of the batch, n of a slice, V vocabulary, K alternatives, G groups,
M draws, D hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from logitcache.data.batches import moved, pad_batch
from logitcache.data.samples import Sample
from logitcache.models.causal import needs_mask
from logitcache.models.device_map import head_device
from logitcache.models.head import LOGITS_BYTES, OutputHead, head_rows, hidden_states, rows_at_once
from logitcache.models.loading import Base
from logitcache.storage import BaseLogprobs, sample_id

from .cache_spec import CacheSpec
from .pending import PendingRecords
from .top_k import top_k as top_k_of

CACHED_BYTES = {"cpu": 4 * 2**20, "cuda": LOGITS_BYTES["cuda"]}
"""Logits whose record is made together on a processor: larger temporaries leave its cache, and come from the system
anew each time, which takes longer than the arithmetic (2.6 times at V = 151,936)."""

LEAST_MASS = 1e-25
"""Tail, as a share of the largest token's probability, below which float32 may lose tokens of it: it is summed anew."""


class Teacher(Protocol):
    """Whatever runs the base."""

    def __call__(self, batch: Sequence[Sample], /) -> list[BaseLogprobs]:
        """The record of every supervised position of each sample, in their order."""
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
        head, num_rows = OutputHead(self.model), head_rows(self.model)
        uniforms = moved(torch.from_numpy(_uniforms(batch, self.num_tail_samples)), device)
        slices = zip(*(column.split(num_rows) for column in (hidden, padded.label_ids, uniforms)), strict=True)
        num_together = rows_at_once(self.model, CACHED_BYTES)
        parts = []
        for h, labels, u in slices:
            together = zip(*(c.split(num_together) for c in (head(h).float(), labels, u)), strict=True)
            parts += [slice_record(z, y, self.top_k, self.groups, v) for z, y, v in together]
        return PendingRecords(batch, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def launched(teacher: Teacher, batch: Sequence[Sample]) -> Callable[[], list[BaseLogprobs]]:
    """What gives the records of a batch, which a GPU may be making still; an engine has made them."""
    if isinstance(teacher, TransformersTeacher):
        return teacher.launch(batch).records
    found = teacher(batch)
    return lambda: found


def teacher_of(base: Base, cache_spec: CacheSpec) -> TransformersTeacher:
    """The base as the teacher of a cache."""
    kept, groups = cache_spec.manifest.capture, cache_spec.token_groups
    split = None if groups is None else one_hot(torch.from_numpy(groups.copy()), base.model)
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
    split = None if token_groups is None else one_hot(token_groups, model)
    return TransformersTeacher(model, top_k, split, num_tail_samples, masked)(batch)


def slice_record(
    logits: Tensor, labels: Tensor, top_k: int, groups: Tensor | None = None, uniforms: Tensor | None = None
) -> dict[str, Tensor]:
    """The columns of `BaseLogprobs` that float32 logits [n, V] determine; the logits stay as they are.

    groups: one-hot, float32 [V, G]. uniforms: float64 [n, M] in [0, 1), M draws from the tail by inversion. A row with
    a logit that is not finite comes back as NaN in its log p(label).
    """
    k = min(top_k, logits.shape[1] - 1)
    top = logits.amax(dim=1, keepdim=True)
    finite = (logits.amin(dim=1) > -torch.inf) & (top.squeeze(1) < torch.inf)  # NaN fails both
    rest = logits - top  # first, so that the size of the logits costs no digits
    masses = rest.exp()
    normaliser = masses.sum(dim=1, keepdim=True).log()
    label = (rest.gather(1, labels[:, None]) - normaliser).squeeze(1)
    kept, ids = top_k_of(rest.scatter_(1, labels[:, None], -torch.inf), k)
    rest.scatter_(1, ids, -torch.inf)
    left = masses.scatter_(1, labels[:, None], 0.0).scatter_(1, ids, 0.0).sum(dim=1)
    tail = left.log() - normaliser.squeeze(1)
    if (tiny := left < LEAST_MASS).is_cuda or bool(tiny.any()):  # asking a GPU takes longer than what may be saved
        tail = torch.where(tiny, rest.logsumexp(dim=1) - normaliser.squeeze(1), tail)
    columns = {
        "label_logprobs": label.where(finite, torch.nan),
        "alternative_ids": ids,
        "alternative_logprobs": kept - normaliser,
        "tail_logprobs": tail,
    }
    if groups is None and (uniforms is None or not uniforms.shape[1]):
        return columns
    most = rest.amax(dim=1, keepdim=True)
    most = torch.where(most > -torch.inf, most, 0.0)
    masses = (rest - most).exp()
    if groups is not None:
        columns["tail_group_logprobs"] = (masses @ groups).log() + (most - normaliser)
    if uniforms is not None and uniforms.shape[1]:
        drawn = _draw(masses, uniforms)
        logprobs = rest.gather(1, drawn) - normaliser
        order = logprobs.argsort(dim=1, descending=True, stable=True)  # of ids in ascending order
        nothing = (tail == -torch.inf)[:, None]
        columns["tail_sample_ids"] = torch.where(nothing, -1, drawn.gather(1, order))
        columns["tail_sample_logprobs"] = torch.where(nothing, -torch.inf, logprobs.gather(1, order))
    return columns


def one_hot(groups: Tensor, model: PreTrainedModel) -> Tensor:
    """float32 [V, G], where the model's head is, of the group of each token, [V]; of n partitions, [V, n], with the
    groups of all side by side."""
    partitions = groups.long().reshape(len(groups), -1).unbind(dim=1)
    rows = torch.cat([torch.nn.functional.one_hot(partition) for partition in partitions], dim=1).float()
    return rows.to(head_device(model))


def _draw(masses: Tensor, uniforms: Tensor) -> Tensor:
    """Indices, ascending, int64 [n, M]: the first whose cumulative mass exceeds the uniform's share of the whole."""
    cumulative = masses.double().cumsum(dim=1)
    total = cumulative[:, -1:]
    below = total.nextafter(torch.zeros_like(total))  # a uniform next to 1 times the total may round to it
    drawn = torch.searchsorted(cumulative, torch.minimum(uniforms * total, below), right=True)
    return drawn.clamp_(max=masses.shape[1] - 1).sort(dim=1).values  # beyond the end only where there is no tail


def _uniforms(batch: Sequence[Sample], num_draws: int) -> NDArray[np.float64]:
    """float64 [N, M] in [0, 1) of the supervised positions: a function of tokens and position, not of the batch."""
    parts = []
    for sample in batch:
        seed = int.from_bytes(sample_id(sample.token_ids), "little")
        stream = np.random.Generator(np.random.Philox(key=seed))
        parts.append(stream.random((len(sample.token_ids), num_draws))[sample.positions])
    return np.concatenate(parts)
