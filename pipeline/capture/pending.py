"""The record of a batch on its way from the device to main memory, while the device is at the next one.

Owns that a batch is one copy, into memory that a GPU writes to while nobody waits, and what the columns become there:
a record a sample, all of it finite. Must not know how a number was made.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitcache.data.samples import Sample
from logitcache.errors import NonFiniteLogits
from logitcache.storage import BaseLogprobs

IDS = ("alternative_ids", "tail_sample_ids")
"""Columns of token ids, -1 where there is none; the others are float32."""


class PendingRecords:
    """Columns of a batch, each of a row a supervised position, which some device may still be making."""

    def __init__(self, batch: Sequence[Sample], columns: Mapping[str, Tensor]) -> None:
        self._batch = batch
        self._shapes = {name: tuple(column.shape) for name, column in columns.items()}
        numbers = [column.int() if name in IDS else column.view(torch.int32) for name, column in columns.items()]
        flat = torch.cat([column.reshape(-1) for column in numbers])
        self._arrived: torch.cuda.Event | None = None
        self._host = flat
        if flat.is_cuda:
            self._host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            self._host.copy_(flat, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(flat.device))

    def records(self) -> list[BaseLogprobs]:
        """Of each sample, in their order, when they have arrived. Raises `NonFiniteLogits` with sample and position."""
        columns = self._columns()
        _check_finite(columns["label_logprobs"], self._batch)
        found, start = [], 0
        for sample in self._batch:
            rows = slice(start, start + len(sample.positions))
            start = rows.stop
            labels = sample.token_ids[sample.positions + 1]
            found.append(BaseLogprobs(sample.positions, labels, **{n: column[rows] for n, column in columns.items()}))
        return found

    def _columns(self) -> dict[str, NDArray[Any]]:
        host = self._host
        if self._arrived is not None:
            self._arrived.synchronize()
            host = host.clone()  # pinned memory is for the next batch
        sizes = [int(np.prod(shape)) for shape in self._shapes.values()]
        parts = zip(self._shapes.items(), host.split(sizes), strict=True)
        return {
            name: part.numpy().view(np.uint32 if name in IDS else np.float32).reshape(shape)  # -1 becomes NO_TOKEN
            for (name, shape), part in parts
        }


def _check_finite(label_logprobs: NDArray[Any], batch: Sequence[Sample]) -> None:
    bad = np.flatnonzero(np.isnan(label_logprobs))
    if not len(bad):
        return
    row = int(bad[0])
    for sample in batch:
        if row < len(sample.positions):
            raise NonFiniteLogits(
                f"running the base on {sample.origin}, position {sample.positions[row]}: its logits are not finite "
                f"({len(bad)} positions of this batch). Nothing of this batch was cached. "
                "Try --dtype float32, or look at this row."
            )
        row -= len(sample.positions)
