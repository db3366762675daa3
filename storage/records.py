"""`BaseLogprobs`, the numpy record of one sample, and what must hold for it.

Owns the invariants: label, alternatives and tail are a partition of the vocabulary. Numpy only.
Shapes: P positions, K alternatives, V vocabulary. All logarithms are natural (nats).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from .errors import InvalidRecord

NO_TOKEN = 2**32 - 1
"""Fills `alternative_ids` where a row keeps fewer than K; its log-probability is -inf."""

MASS_TOLERANCE = 1e-4
"""How far label + alternatives + tail may be from 1. Float32 sums over a vocabulary: below 2e-6 (docs/log.md)."""


@dataclass(frozen=True)
class BaseLogprobs:
    """What the base predicts at the captured positions of one sample, in nats.

    Position t (0-based) holds the prediction of token t+1, its *label*, from tokens 0..t.

    positions:             int32 [P], ascending
    label_ids:             uint32 [P], token t+1
    label_logprobs:        float32 [P], log p(label)
    alternative_ids:       uint32 [P, K], the most probable tokens other than the label, most probable first
    alternative_logprobs:  float32 [P, K], log p, same normaliser; -inf with id 2**32-1 where a row keeps fewer
    tail_logprobs:         float32 [P], log of the mass of everything else; -inf where there is nothing else
    """

    positions: NDArray[np.int32]
    label_ids: NDArray[np.uint32]
    label_logprobs: NDArray[np.float32]
    alternative_ids: NDArray[np.uint32]
    alternative_logprobs: NDArray[np.float32]
    tail_logprobs: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def num_alternatives(self) -> int:
        """K, the width of the rows."""
        return int(self.alternative_ids.shape[1])

    def take(self, rows: NDArray[np.intp]) -> "BaseLogprobs":
        """The record at these rows (not positions), in the order given."""
        return BaseLogprobs(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def equals(self, other: "BaseLogprobs") -> bool:
        """Equality of every field, value for value."""
        return all(np.array_equal(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    def kept_mass(self) -> NDArray[np.float64]:
        """Share of the non-target mass 1 - p(label) that the alternatives hold, [P]; 1 where there is none."""
        kept = np.exp(self.alternative_logprobs.astype(np.float64)).sum(axis=1)
        rest = kept + np.exp(self.tail_logprobs.astype(np.float64))
        return np.where(rest > 0, kept / np.where(rest > 0, rest, 1), 1.0)


@dataclass(frozen=True)
class CachedSample:
    """A sample as the cache stores it: its tokens, its record, and how many tokens truncation cut off."""

    token_ids: NDArray[np.uint32]
    logprobs: BaseLogprobs
    num_tokens_cut: int = 0


def concatenate(parts: Sequence[BaseLogprobs]) -> BaseLogprobs:
    """One record of several captures of the same sample, ordered by position, each position once."""
    joined = BaseLogprobs(**{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(BaseLogprobs)})
    _, first = np.unique(joined.positions, return_index=True)
    return joined.take(first)


def check_record(record: BaseLogprobs, token_ids: NDArray[np.uint32], vocab_size: int, where: str) -> None:
    """Raise `InvalidRecord` unless every invariant of the record holds.

    Checked: shapes and dtypes; positions ascending and inside the sample; label = next token; ids < V, unique
    in a row, never the label, absent exactly where the log-probability is -inf; rows in descending order;
    nothing NaN or positive; label + alternatives + tail masses sum to 1 within `MASS_TOLERANCE`.
    """
    _check_shapes(record, where)
    positions, labels = record.positions, record.label_ids
    if len(positions) and (positions[0] < 0 or positions[-1] >= len(token_ids) - 1):
        raise InvalidRecord(
            f"positions in {where}: expected 0 to {len(token_ids) - 2}, found {positions[0]} to {positions[-1]}."
        )
    if np.any(np.diff(positions) <= 0):
        raise InvalidRecord(f"positions in {where}: expected strictly ascending order.")
    if not np.array_equal(labels, token_ids[positions + 1]):
        raise InvalidRecord(f"label_ids in {where}: expected the token after each position.")
    _check_ids(record, vocab_size, where)
    _check_masses(record, where)


def _check_shapes(record: BaseLogprobs, where: str) -> None:
    rows, width = len(record.positions), record.alternative_ids.shape[-1]
    expected = {
        "positions": (np.int32, (rows,)),
        "label_ids": (np.uint32, (rows,)),
        "label_logprobs": (np.float32, (rows,)),
        "alternative_ids": (np.uint32, (rows, width)),
        "alternative_logprobs": (np.float32, (rows, width)),
        "tail_logprobs": (np.float32, (rows,)),
    }
    for name, (dtype, shape) in expected.items():
        array = getattr(record, name)
        if array.dtype != dtype or array.shape != shape:
            raise InvalidRecord(
                f"{name} in {where}: expected {np.dtype(dtype)} {shape}, found {array.dtype} {array.shape}."
            )


def _check_ids(record: BaseLogprobs, vocab_size: int, where: str) -> None:
    ids, logprobs = record.alternative_ids, record.alternative_logprobs
    absent = ids == NO_TOKEN
    if np.any(record.label_ids >= vocab_size) or np.any((ids >= vocab_size) & ~absent):
        raise InvalidRecord(f"token ids in {where}: expected ids below {vocab_size}.")
    if np.any(ids == record.label_ids[:, None]):
        raise InvalidRecord(f"alternative_ids in {where}: the label stands among its own alternatives.")
    ordered = np.sort(ids, axis=1)
    if np.any((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != NO_TOKEN)):
        raise InvalidRecord(f"alternative_ids in {where}: an id stands twice in one row.")
    if np.any(absent != (logprobs == -np.inf)):
        raise InvalidRecord(f"alternative_logprobs in {where}: expected -inf exactly where the id is absent.")


def _check_masses(record: BaseLogprobs, where: str) -> None:
    label, kept, tail = record.label_logprobs, record.alternative_logprobs, record.tail_logprobs
    for name, array in (("label", label), ("alternative", kept), ("tail", tail)):
        if np.any(np.isnan(array)) or np.any(array > 1e-6):
            raise InvalidRecord(f"{name}_logprobs in {where}: expected log-probabilities, found NaN or above 0.")
    if np.any(kept[:, 1:] > kept[:, :-1]):
        raise InvalidRecord(f"alternative_logprobs in {where}: expected most probable first.")
    mass = np.exp(label.astype(np.float64)) + np.exp(tail.astype(np.float64))
    mass += np.exp(kept.astype(np.float64)).sum(axis=1)
    worst = float(np.abs(mass - 1).max(initial=0.0))
    if worst > MASS_TOLERANCE:
        row = int(np.abs(mass - 1).argmax())
        raise InvalidRecord(
            f"masses in {where}, position {record.positions[row]}: label + alternatives + tail are "
            f"{mass[row]:.6f}, expected 1 within {MASS_TOLERANCE}. The record is not a distribution."
        )
