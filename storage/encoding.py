"""Records <-> the flat columns a shard stores.

Owns the column names, dtypes and shapes, which docs/format.md specifies. The one precision so far is exact (float32):
what is read equals what was written, bit for bit. Must not know in which files the columns are.
Trade-off: label ids are not stored, since the sample's tokens determine them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .identity import sample_id
from .records import BaseLogprobs, CachedSample

Columns = dict[str, NDArray[Any]]

POSITION_DTYPES: dict[str, str] = {
    "label_logprobs": "<f4",
    "alternative_ids": "<u4",
    "alternative_logprobs": "<f4",
    "tail_logprobs": "<f4",
}
WIDE_COLUMNS = ("alternative_ids", "alternative_logprobs")
"""Columns of shape [positions, top_k]; the others are [positions]."""


@dataclass(frozen=True)
class SampleTable:
    """One row a sample of a shard.

    sample_ids uint8 [S, 16]; num_tokens, num_positions, num_tokens_cut uint32 [S]; token_ids uint32, all samples
    one after the other; positions int32, likewise. Offsets follow by summation.
    """

    sample_ids: NDArray[np.uint8]
    num_tokens: NDArray[np.uint32]
    num_positions: NDArray[np.uint32]
    num_tokens_cut: NDArray[np.uint32]
    token_ids: NDArray[np.uint32]
    positions: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.num_tokens)

    def token_slices(self) -> list[slice]:
        """Where each sample's tokens are in `token_ids`."""
        return _slices(self.num_tokens)

    def position_slices(self) -> list[slice]:
        """Where each sample's rows are in `positions` and in the position columns."""
        return _slices(self.num_positions)


def encode(samples: Sequence[CachedSample]) -> tuple[SampleTable, Columns]:
    """The sample table and the position columns of a shard."""
    records = [s.logprobs for s in samples]
    table = SampleTable(
        sample_ids=np.stack([np.frombuffer(sample_id(s.token_ids), dtype=np.uint8) for s in samples]),
        num_tokens=np.array([len(s.token_ids) for s in samples], dtype="<u4"),
        num_positions=np.array([len(r) for r in records], dtype="<u4"),
        num_tokens_cut=np.array([s.num_tokens_cut for s in samples], dtype="<u4"),
        token_ids=np.concatenate([s.token_ids for s in samples]).astype("<u4", copy=False),
        positions=np.concatenate([r.positions for r in records]).astype("<i4", copy=False),
    )
    columns: Columns = {
        name: np.concatenate([getattr(r, name) for r in records]).astype(dtype, copy=False)
        for name, dtype in POSITION_DTYPES.items()
    }
    return table, columns


def decode(columns: Columns, positions: NDArray[np.int32], token_ids: NDArray[np.uint32]) -> BaseLogprobs:
    """The record of one sample from its rows of the columns, its positions and its tokens."""
    return BaseLogprobs(
        positions=positions,
        label_ids=token_ids[positions + 1],
        label_logprobs=columns["label_logprobs"].astype(np.float32),
        alternative_ids=columns["alternative_ids"].astype(np.uint32),
        alternative_logprobs=columns["alternative_logprobs"].astype(np.float32),
        tail_logprobs=columns["tail_logprobs"].astype(np.float32),
    )


def _slices(counts: NDArray[np.uint32]) -> list[slice]:
    ends = np.cumsum(counts, dtype=np.int64)
    return [slice(int(end) - int(n), int(end)) for end, n in zip(ends, counts, strict=True)]
