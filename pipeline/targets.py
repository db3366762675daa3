"""Joins samples with what the cache says of them: records -> `SparseTargets`, and the collator of training batches.

Owns alignment: row i of the targets is row i of the batch's supervised positions. Must not know models or losses'
formulas.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from logitcache.storage import BaseLogprobs, LogitCache
from logitcache.storage.records import NO_TOKEN

from .losses import Regularizer, SparseTargets, regularizer_mask
from .samples import Sample, pad_batch

TARGET_FIELDS = ("label_logprobs", "alternative_ids", "alternative_logprobs", "tail_logprobs")


@dataclass(frozen=True)
class TrainingSet(Dataset[tuple[Sample, BaseLogprobs | None]]):
    """Samples, each with its record where there is a cache. Records are read when an item is asked for."""

    samples: Sequence[Sample]
    cache: LogitCache | None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Sample, BaseLogprobs | None]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Sample, BaseLogprobs | None]]:
        """A batch at once, which a `DataLoader` asks for where it can."""
        samples = [self.samples[i] for i in indices]
        if self.cache is None:
            return [(sample, None) for sample in samples]
        records = self.cache.lookup_batch([s.token_ids for s in samples], [s.positions for s in samples])
        return list(zip(samples, records, strict=True))


def samples_of(cache: LogitCache) -> list[Sample]:
    """The samples a cache holds, with the captured positions as their supervised ones."""
    samples = []
    for i, stored in enumerate(cache.stored_samples()):
        supervised = np.zeros(len(stored.token_ids), dtype=np.bool_)
        supervised[stored.positions + 1] = True
        samples.append(Sample(stored.token_ids, supervised, f"{cache.path}, sample {i}"))
    return samples


def sparse_targets(records: Sequence[BaseLogprobs]) -> SparseTargets:
    """Records one after the other as tensors on the CPU."""
    labels = np.concatenate([r.label_ids for r in records]).astype(np.int64)
    ids = np.concatenate([r.alternative_ids for r in records]).astype(np.int64)
    ids = np.where(ids == NO_TOKEN, labels[:, None], ids)
    rest = (np.concatenate([getattr(r, n) for r in records]) for n in TARGET_FIELDS if n != "alternative_ids")
    label_logprobs, alternative_logprobs, tail_logprobs = (torch.from_numpy(a.astype(np.float32)) for a in rest)
    return SparseTargets(
        torch.from_numpy(labels), label_logprobs, torch.from_numpy(ids), alternative_logprobs, tail_logprobs
    )


def collate(items: Sequence[tuple[Sample, BaseLogprobs | None]]) -> dict[str, Any]:
    """A training batch as a flat dict of tensors: `PaddedBatch`, and `SparseTargets` where there are records."""
    padded = pad_batch([sample for sample, _ in items])
    batch: dict[str, Any] = {
        "input_ids": padded.input_ids,
        "attention_mask": padded.attention_mask,
        "rows": padded.rows,
        "label_ids": padded.label_ids,
    }
    records = [record for _, record in items if record is not None]
    if records:
        targets = sparse_targets(records)
        if not torch.equal(targets.label_ids, padded.label_ids):
            raise ValueError("collating a batch: the labels of the records are not those of the samples")
        batch |= {name: getattr(targets, name) for name in TARGET_FIELDS}
    return batch


def targets_of(batch: dict[str, Any]) -> SparseTargets | None:
    """The targets that `collate` put into a batch."""
    if TARGET_FIELDS[0] not in batch:
        return None
    return SparseTargets(batch["label_ids"], *(batch[name] for name in TARGET_FIELDS))


def count_positions(batch: dict[str, Any], regularizer: Regularizer) -> tuple[int, int]:
    """Positions of a batch that count for the cross-entropy, and for the regulariser."""
    targets = targets_of(batch)
    if targets is None or regularizer == "none":
        return len(batch["label_ids"]), 0
    return len(batch["label_ids"]), int(regularizer_mask(targets, regularizer).sum())
