"""Samples side by side: padded batches, and samples sorted by length into batches of so many tokens.

Owns padding and the order in which samples are batched. Must not know tokenizers, models or caches.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitcache.storage import sample_id

from .files import IGNORED
from .samples import Sample, distinct
from .tokenize import WEIGHTS


@dataclass(frozen=True)
class PaddedBatch:
    """Samples side by side, padded on the right."""

    #: [B, T].
    input_ids: Tensor
    #: [B, T], 0 where it is padding.
    attention_mask: Tensor
    #: [N], of the flattened [B * T] those that predict a supervised token.
    rows: Tensor
    #: [N], that token.
    label_ids: Tensor

    def inputs(self, masked: bool) -> dict[str, Tensor]:
        """Of a model's forward; the mask only where the model needs it."""
        mask = {"attention_mask": self.attention_mask} if masked else {}
        return {"input_ids": self.input_ids, **mask}


def pad_batch(batch: Sequence[Sample], device: torch.device | str = "cpu") -> PaddedBatch:
    """Samples side by side, padded on the right with token 0, which the attention mask hides."""
    length = max(len(s.token_ids) for s in batch)
    input_ids = np.zeros((len(batch), length), dtype=np.int64)
    mask = np.zeros((len(batch), length), dtype=np.int64)
    for i, sample in enumerate(batch):
        input_ids[i, : len(sample.token_ids)] = sample.token_ids
        mask[i, : len(sample.token_ids)] = 1
    rows = np.concatenate([i * length + s.positions.astype(np.int64) for i, s in enumerate(batch)])
    arrays = (input_ids, mask, rows, label_ids(batch))
    return PaddedBatch(*(moved(torch.from_numpy(a), torch.device(device)) for a in arrays))


def label_ids(batch: Sequence[Sample]) -> NDArray[np.int64]:
    """The token after each supervised position, [N], of the samples one after the other."""
    return np.concatenate([s.token_ids[s.positions + 1] for s in batch]).astype(np.int64)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of main memory on a device. CUDA takes it from pinned memory, for which the host does not wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def pad_samples(samples: Sequence[Sample], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Samples as any collator would have them: input_ids, attention_mask and labels, int64 [B, T]."""
    padded = pad_batch(samples, device)
    labels = torch.full_like(padded.input_ids, IGNORED)
    labels.view(-1)[padded.rows + 1] = padded.label_ids
    return {"input_ids": padded.input_ids, "attention_mask": padded.attention_mask, "labels": labels}


def pad_weighted(samples: Sequence[Sample], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """`pad_samples`, and the weights that they bring as loss_scale, float32 [B, T], aligned as labels are."""
    batch = pad_samples(samples, device)
    weights = torch.zeros(batch["labels"].shape, dtype=torch.float32)
    for row, sample in zip(weights, samples, strict=True):
        assert sample.weights is not None  # `pairing.samples.check_weights` has refused the others
        row[: len(sample.weights)] = torch.from_numpy(sample.weights)
    return {**batch, WEIGHTS[0]: weights.to(device)}


def batches_by_length(samples: Iterable[Sample], batch_tokens: int) -> Iterator[tuple[Sample, ...]]:
    """Distinct samples, longest first (memory runs out at once or never), in batches of at most `batch_tokens`.

    batch_tokens: with padding; a longer sample is a batch of its own. The order is one for any order of the samples:
    equal lengths are ordered by sample_id.
    """
    yield from _cut(sorted(distinct(samples), key=lambda s: (-len(s.token_ids), sample_id(s.token_ids))), batch_tokens)


def cut_by_length(samples: Iterable[Sample], batch_tokens: int) -> Iterator[tuple[Sample, ...]]:
    """All samples, also equal ones, in batches as `batches_by_length` makes them; equal lengths in the order given."""
    yield from _cut(sorted(samples, key=lambda s: -len(s.token_ids)), batch_tokens)


def _cut(samples: Iterable[Sample], batch_tokens: int) -> Iterator[tuple[Sample, ...]]:
    """One after the other, the longest first."""
    batch: list[Sample] = []
    for sample in samples:
        if batch and (len(batch) + 1) * len(batch[0].token_ids) > batch_tokens:
            yield tuple(batch)
            batch = []
        batch.append(sample)
    if batch:
        yield tuple(batch)
