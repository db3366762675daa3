"""The samples of a batch in micro-batches of at most so many tokens, those of similar length together.

Owns the batch that carries them through a Trainer's loop, which calls `training_step` once a batch:
what the loop reads of it (ids and mask, to count tokens), and the micro-batches beside. Which samples go together is
`data.batches`'. Must not know the trainer, or losses.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from logitcache.data.batches import cut_by_length
from logitcache.data.samples import Sample
from logitcache.pairing.targets import Batch, Collator

PARTS = "micro_batches"
"""Where a batch has them."""


@dataclass(frozen=True)
class MicroBatches:
    """Another collator, of each micro-batch of its samples; runs in the workers of a `DataLoader`."""

    collator: Collator
    batch_tokens: int

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """One batch: all tokens in a row with their mask, and the micro-batches."""
        parts = [self.collator(part) for part in cut_by_length(samples, self.batch_tokens)]
        whole = {name: torch.cat([part[name].flatten() for part in parts]) for name in ("input_ids", "attention_mask")}
        return {**whole, PARTS: parts}


def parts_of(batch: Batch) -> list[Batch]:
    """The micro-batches of a batch; itself, where it has none."""
    found: list[Batch] = batch.get(PARTS, [batch])
    return found
