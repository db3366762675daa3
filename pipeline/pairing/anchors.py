"""Anchor samples: what a cache says of samples of its own, which are compared with the base and not learnt.

Owns which samples of an anchor cache these are, which of them a step has, and batches of them with their targets. No
data file, collator or label has a part in it. Must not know the loss, nor the model but as a `CacheView` does.
Shapes: N positions of a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from logitcache.data.batches import pad_batch
from logitcache.data.samples import Sample
from logitcache.losses.formulas import Tail, regularizer_mask
from logitcache.storage import BaseLogprobs, LogitCache, data_samples

from .targets import PREFIX, Batch, sent, sparse_targets, target_columns
from .view import CacheView


@dataclass(frozen=True)
class AnchorSamples:
    """Samples that a step, or a part of it, has of an anchor cache, with their records."""

    samples: Sequence[Sample]
    records: Sequence[BaseLogprobs]
    #: Positions of each sample at which the regulariser counts.
    counted: Sequence[int]

    @property
    def num_counted(self) -> int:
        """Of all samples together."""
        return sum(self.counted)

    def part(self, index: int, of: int) -> "AnchorSamples":
        """The samples index, index + of, ...: one of `of` parts, some of which may be empty. Raises ValueError for one
        that there is not."""
        if not 0 <= index < of:
            raise ValueError(f"part {index} of {of} parts of a step: expected one from 0 to {of - 1}")
        return AnchorSamples(self.samples[index::of], self.records[index::of], self.counted[index::of])

    def batch(self, device: torch.device, tail: Tail | None = None) -> Batch:
        """They as `targets.with_targets` has a batch, padded on the right; no position has a cross-entropy.

        tail: how the tail is compared, as `CachedCollator` has it.
        """
        padded = pad_batch(self.samples)
        added = {
            "rows": padded.rows,
            "label_ids": padded.label_ids.int(),
            "preceded": torch.zeros(0, dtype=torch.int64),
            "supervised": torch.zeros(len(padded.rows), dtype=torch.bool),
            **{name: torch.from_numpy(column) for name, column in target_columns(self.records, tail=tail).items()},
        }
        batch = {"input_ids": padded.input_ids, "attention_mask": padded.attention_mask}
        return sent({**batch, **{f"{PREFIX}{name}": column for name, column in added.items()}}, device)


def anchor_samples(cache: LogitCache) -> list[Sample]:
    """The samples of the data sets of a cache, or all that it holds where it has none, at every position they have.

    Positions of a prompt count where they were captured, and those of either of two data sets that a sample is in.
    """
    found = []
    for i, part in enumerate(data_samples(cache, either=True).samples):
        compared = np.zeros(len(part.token_ids), dtype=np.bool_)
        compared[part.positions + 1] = True
        found.append(Sample(part.token_ids, compared, f"{cache.path}, sample {i}", chat_template=part.chat_template))
    return found


def drawn(num_samples: int, step: int, batch: int, seed: int) -> NDArray[np.int64]:
    """Numbers of the samples of the step-th step with anchors, from 0: int64 [batch].

    The steps follow one another through a permutation of the samples, then another: each is seen as often as any other.
    It depends on nothing but these four numbers, so that a run that goes on finds the samples of its next step.
    """
    places = np.arange(step * batch, (step + 1) * batch)
    rounds = {int(n): np.random.default_rng([seed, int(n)]).permutation(num_samples) for n in {*places // num_samples}}
    return np.array([rounds[int(place) // num_samples][place % num_samples] for place in places], dtype=np.int64)


def looked_up(view: CacheView, samples: Sequence[Sample]) -> AnchorSamples:
    """Samples with what the cache says of them. Raises what reading a cache raises."""
    records = view.cache.lookup_batch([s.token_ids for s in samples], [s.positions for s in samples], view.top_k)
    counts = regularizer_mask(sparse_targets(records), view.objective).numpy()
    ends = np.cumsum([len(sample.positions) for sample in samples])
    return AnchorSamples(samples, records, [int(part.sum()) for part in np.split(counts, ends[:-1])])
