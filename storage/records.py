"""`BaseLogprobs`, the numpy record of one sample, and what must hold for it.

Owns the invariants: label, alternatives and tail are a partition of the vocabulary. Numpy only.
Shapes: P positions, K alternatives, G tail groups, M draws, V vocabulary. All logarithms are natural (nats).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

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
    """

    #: int32 [P], ascending.
    positions: NDArray[np.int32]
    #: uint32 [P], token t+1.
    label_ids: NDArray[np.uint32]
    #: float32 [P], log p(label).
    label_logprobs: NDArray[np.float32]
    #: uint32 [P, K], the most probable tokens other than the label, most probable first.
    alternative_ids: NDArray[np.uint32]
    #: float32 [P, K], log p, same normaliser; -inf with id 2**32-1 where a row keeps fewer.
    alternative_logprobs: NDArray[np.float32]
    #: float32 [P], log of the mass of everything else; -inf where there is nothing else.
    tail_logprobs: NDArray[np.float32]
    #: float32 [P, G], the tail's mass split over a fixed partition of the vocabulary into G groups; their logsumexp is
    #: tail_logprobs. None where the cache has no groups.
    tail_group_logprobs: NDArray[np.float32] | None = None
    #: uint32 [P, M], draws with replacement from the base's distribution on the tail: a token that was drawn n times
    #: stands n times. Most probable first, then ascending, so that equal ones stand together; 2**32-1 in the whole row
    #: where the tail is -inf. None without draws.
    tail_sample_ids: NDArray[np.uint32] | None = None
    #: float32 [P, M], log p of those, same normaliser; -inf where the tail is. None without draws.
    tail_sample_logprobs: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def num_alternatives(self) -> int:
        """K, the width of the rows."""
        return int(self.alternative_ids.shape[1])

    @property
    def num_tail_groups(self) -> int:
        """G, 0 where the tail is not split."""
        return 0 if self.tail_group_logprobs is None else int(self.tail_group_logprobs.shape[1])

    @property
    def num_tail_samples(self) -> int:
        """M, 0 where the tail was not drawn from."""
        return 0 if self.tail_sample_ids is None else int(self.tail_sample_ids.shape[-1])

    def take(self, rows: NDArray[np.intp] | slice) -> "BaseLogprobs":
        """The record at these rows (not positions), in the order given."""
        return BaseLogprobs(**{name: column[rows] for name, column in self.columns().items()})

    def equals(self, other: "BaseLogprobs") -> bool:
        """Equality of every field, value for value."""
        mine, theirs = self.columns(), other.columns()
        return mine.keys() == theirs.keys() and all(np.array_equal(mine[n], theirs[n]) for n in mine)

    def columns(self) -> dict[str, NDArray[Any]]:
        """The fields that are there, by name."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    def kept_mass(self) -> NDArray[np.float64]:
        """Share of the non-target mass 1 - p(label) that the alternatives hold, [P]; 1 where there is none."""
        masses, tail = _masses(self, np.float32)
        kept = masses.sum(axis=1, dtype=np.float64)
        rest = kept + tail
        return np.where(rest > 0, kept / np.where(rest > 0, rest, 1), 1.0)


@dataclass(frozen=True)
class CachedSample:
    """A sample as the cache stores it: its tokens, its record, and how many tokens truncation cut off."""

    token_ids: NDArray[np.uint32]
    logprobs: BaseLogprobs
    num_tokens_cut: int = 0


def concatenate(parts: Sequence[BaseLogprobs]) -> BaseLogprobs:
    """Records of the same columns, one after the other."""
    if len(parts) == 1:
        return parts[0]
    columns = [part.columns() for part in parts]
    return BaseLogprobs(**{name: np.concatenate([c[name] for c in columns]) for name in columns[0]})


def unite(parts: Sequence[BaseLogprobs]) -> BaseLogprobs:
    """One record of several captures of the same sample, ordered by position, each position once."""
    joined = concatenate(parts)
    return joined if len(parts) == 1 else joined.take(np.unique(joined.positions, return_index=True)[1])


def keep_mass(record: BaseLogprobs, min_mass: float, token_groups: NDArray[np.uint8] | None = None) -> BaseLogprobs:
    """The record with the fewest alternatives that hold `min_mass` of the non-target mass 1 - p(label), row by row.

    What is dropped moves into the tail, and into its groups (see `narrow`). Where all alternatives together hold less,
    all are kept. min_mass: in (0, 1].
    """
    if min_mass >= 1:
        return record
    mass, tail = _masses(record, np.float64)
    before = np.cumsum(mass, axis=1) - mass
    dropped = before >= min_mass * (mass.sum(axis=1) + tail)[:, None]
    dropped[:, :1] = False
    return _into_tail(record, dropped, token_groups)


def narrow(record: BaseLogprobs, top_k: int, token_groups: NDArray[np.uint8] | None = None) -> BaseLogprobs:
    """The record as a capture of fewer alternatives would have made it, up to the errors of what is stored.

    top_k: 0 to K. The least probable alternatives move into the tail, log(p(tail) + sum of p(dropped)), and each into
    its tail group likewise. token_groups: uint8 [V], the tail group of each token; needed where the record has groups.
    Raises ValueError, also for a record with draws: they are of the smaller tail, and none of the dropped alternatives.
    """
    if not 0 <= top_k <= record.num_alternatives:
        raise ValueError(
            f"narrowing a record to {top_k} alternatives: expected 0 to {record.num_alternatives}, which is all it "
            "keeps. What was not captured cannot be had. Ask for fewer, or precompute with a larger --top-k."
        )
    if top_k == record.num_alternatives:
        return record
    dropped = np.broadcast_to(np.arange(record.num_alternatives) >= top_k, record.alternative_ids.shape)
    moved = _into_tail(record, dropped, token_groups)
    return replace(
        moved,
        alternative_ids=np.ascontiguousarray(moved.alternative_ids[:, :top_k]),
        alternative_logprobs=np.ascontiguousarray(moved.alternative_logprobs[:, :top_k]),
    )


def keep_first(
    record: BaseLogprobs, num_kept: NDArray[np.integer], token_groups: NDArray[np.uint8] | None = None
) -> BaseLogprobs:
    """The record with the first so many alternatives of each row, [P]; what is dropped moves into the tail."""
    dropped = np.arange(record.num_alternatives) >= num_kept[:, None]
    return _into_tail(record, dropped, token_groups) if dropped.any() else record


def _into_tail(
    record: BaseLogprobs, dropped: NDArray[np.bool_], token_groups: NDArray[np.uint8] | None
) -> BaseLogprobs:
    """The record with these alternatives, bool [P, K], in its tail, and in its groups where it has some."""
    if record.num_tail_samples:
        raise ValueError(
            f"dropping alternatives of a record with {record.num_tail_samples} draws: the draws are from the tail "
            "without them. Drop the draws too, or draw from the larger tail."
        )
    logprobs = np.where(dropped, record.alternative_logprobs.astype(np.float64), -np.inf)
    tail = record.tail_logprobs.astype(np.float64)
    top = np.maximum(logprobs.max(axis=1, initial=-np.inf), tail)
    top[top == -np.inf] = 0
    with np.errstate(divide="ignore"):
        tail = np.log(np.exp(tail - top) + np.exp(logprobs - top[:, None]).sum(axis=1)) + top
    return replace(
        record,
        alternative_ids=np.where(dropped, np.uint32(NO_TOKEN), record.alternative_ids),
        alternative_logprobs=np.where(dropped, np.float32(-np.inf), record.alternative_logprobs),
        tail_logprobs=np.minimum(tail, 0).astype(np.float32),  # rounded masses may come to more than 1
        tail_group_logprobs=_into_groups(record, logprobs, token_groups),
    )


def _into_groups(
    record: BaseLogprobs, dropped_logprobs: NDArray[np.float64], token_groups: NDArray[np.uint8] | None
) -> NDArray[np.float32] | None:
    """The tail groups with what is dropped in them. dropped_logprobs: [P, K], -inf where an alternative stays."""
    if record.tail_group_logprobs is None:
        return None
    if token_groups is None:
        raise ValueError("dropping alternatives of a record with tail groups: expected token_groups, found None")
    groups = record.tail_group_logprobs.astype(np.float64)
    rows = np.arange(len(record))
    for column in np.flatnonzero((dropped_logprobs > -np.inf).any(axis=0)):
        moved = dropped_logprobs[:, column]
        into = rows, token_groups[np.where(moved > -np.inf, record.alternative_ids[:, column], 0)]
        groups[into] = np.logaddexp(groups[into], moved)
    return np.minimum(groups, 0).astype(np.float32)


def _masses(record: BaseLogprobs, dtype: type) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """exp of alternatives [P, K] and tail [P], both times a factor a row, so that no row underflows as a whole."""
    kept: NDArray[Any] = record.alternative_logprobs.astype(dtype, copy=False)
    tail = record.tail_logprobs
    top = np.maximum(kept.max(axis=1, initial=-np.inf), tail)
    top = np.where(top > -np.inf, top, 0)
    return np.exp(kept - top[:, None].astype(dtype)), np.exp(tail.astype(np.float64) - top)


def check_positions(record: BaseLogprobs, token_ids: NDArray[np.uint32], where: str) -> None:
    """Raise `InvalidRecord` unless shapes, dtypes, positions and labels are those of a sample with these tokens."""
    _check_shapes(record, where)
    positions = record.positions
    if len(positions) and (positions.min() < 0 or positions.max() >= len(token_ids) - 1):
        raise InvalidRecord(
            f"positions in {where}: expected 0 to {len(token_ids) - 2}, found {positions[0]} to {positions[-1]}."
        )
    if np.any(np.diff(positions) <= 0):
        raise InvalidRecord(f"positions in {where}: expected strictly ascending order.")
    if not np.array_equal(record.label_ids, token_ids[positions + 1]):
        raise InvalidRecord(f"label_ids in {where}: expected the token after each position.")


def check_rows(
    record: BaseLogprobs,
    vocab_size: int,
    where: str,
    mass_tolerance: float = MASS_TOLERANCE,
    group_error: float = 0.0,
    draw_error: float = 0.0,
) -> None:
    """Raise `InvalidRecord` unless every row is a distribution, whichever samples the rows are of.

    Checked: ids < V, unique in a row, never the label, absent exactly where the log-probability is -inf; rows in
    descending order; nothing NaN or positive; label + alternatives + tail masses sum to 1 within `mass_tolerance`; the
    logsumexp of the tail groups is the tail's log-probability within group_error + mass_tolerance nats. Of draws: ids
    < V, never the label nor an alternative, equal ones together and of one log-probability; descending, and none above
    the tail's log-probability by more than draw_error + 1e-4 nats; absent exactly in rows where the tail is -inf.
    """
    _check_order(record, where)
    _check_ids(record, vocab_size, where)
    _check_masses(record, where, mass_tolerance)
    if record.tail_group_logprobs is not None:
        _check_groups(record, where, group_error + mass_tolerance)
    if record.tail_sample_ids is not None and record.tail_sample_logprobs is not None:
        draws = record.tail_sample_ids, record.tail_sample_logprobs
        _check_draw_order(record, *draws, where, draw_error + MASS_TOLERANCE)
        _check_draw_ids(record, *draws, vocab_size, where)


def _check_shapes(record: BaseLogprobs, where: str) -> None:
    rows, width = len(record.positions), record.alternative_ids.shape[-1]
    expected: dict[str, tuple[type, tuple[int, ...]]] = {
        "positions": (np.int32, (rows,)),
        "label_ids": (np.uint32, (rows,)),
        "label_logprobs": (np.float32, (rows,)),
        "alternative_ids": (np.uint32, (rows, width)),
        "alternative_logprobs": (np.float32, (rows, width)),
        "tail_logprobs": (np.float32, (rows,)),
    }
    if record.tail_group_logprobs is not None:
        expected["tail_group_logprobs"] = (np.float32, (rows, record.tail_group_logprobs.shape[-1]))
    if (record.tail_sample_ids is None) != (record.tail_sample_logprobs is None):
        raise InvalidRecord(f"tail_sample_ids and tail_sample_logprobs in {where}: expected both or none.")
    if record.tail_sample_ids is not None:
        draws = (rows, record.num_tail_samples)
        expected |= {"tail_sample_ids": (np.uint32, draws), "tail_sample_logprobs": (np.float32, draws)}
    for name, (dtype, shape) in expected.items():
        array = getattr(record, name)
        if array.dtype != dtype or array.shape != shape:
            raise InvalidRecord(
                f"{name} in {where}: expected {np.dtype(dtype)} {shape}, found {array.dtype} {array.shape}."
            )


def _check_order(record: BaseLogprobs, where: str) -> None:
    kept = record.alternative_logprobs
    first = kept[:, 0] if kept.shape[1] else record.label_logprobs
    for name, array in (("label", record.label_logprobs), ("tail", record.tail_logprobs), ("alternative", first)):
        if not np.all(array <= 1e-6):  # NaN fails
            raise InvalidRecord(f"{name}_logprobs in {where}: expected log-probabilities, found NaN or above 0.")
    if not np.all(kept[:, 1:] <= kept[:, :-1]):
        raise InvalidRecord(f"alternative_logprobs in {where}: expected most probable first, and nothing NaN.")


def _check_ids(record: BaseLogprobs, vocab_size: int, where: str) -> None:
    """Of rows in descending order, where what is absent stands at the end."""
    ids, logprobs = record.alternative_ids, record.alternative_logprobs
    some_absent = bool(np.any(logprobs[:, -1:] == -np.inf))
    absent = logprobs == -np.inf if some_absent else np.zeros(1, dtype=np.bool_)
    if some_absent and np.any((ids == NO_TOKEN) != absent):
        raise InvalidRecord(f"alternative_logprobs in {where}: expected -inf exactly where the id is absent.")
    present = np.where(absent, 0, ids) if some_absent else ids
    if record.label_ids.max(initial=0) >= vocab_size or present.max(initial=0) >= vocab_size:
        raise InvalidRecord(f"token ids in {where}: expected ids below {vocab_size}.")
    if np.any(ids == record.label_ids[:, None]):
        raise InvalidRecord(f"alternative_ids in {where}: the label stands among its own alternatives.")
    ordered = np.sort(ids, axis=1)
    twice = ordered[:, 1:] == ordered[:, :-1]
    if np.any(twice & (ordered[:, 1:] != NO_TOKEN) if some_absent else twice):
        raise InvalidRecord(f"alternative_ids in {where}: an id stands twice in one row.")


def _check_masses(record: BaseLogprobs, where: str, tolerance: float) -> None:
    mass = np.exp(record.label_logprobs) + np.exp(record.tail_logprobs)
    mass += np.exp(record.alternative_logprobs).sum(axis=1)  # float32: 2e-6 at most, far below any tolerance
    off = np.abs(mass - 1)
    if off.max(initial=0.0) > tolerance:
        row = int(off.argmax())
        raise InvalidRecord(
            f"masses in {where}, position {record.positions[row]}: label + alternatives + tail are "
            f"{mass[row]:.6f}, expected 1 within {tolerance:g}. The record is not a distribution."
        )


def _check_groups(record: BaseLogprobs, where: str, tolerance: float) -> None:
    groups = record.tail_group_logprobs
    assert groups is not None
    if not np.all(groups <= 1e-6):
        raise InvalidRecord(f"tail_group_logprobs in {where}: expected log-probabilities, found NaN or above 0.")
    with np.errstate(divide="ignore", invalid="ignore"):
        off = np.abs(np.logaddexp.reduce(groups, axis=1, dtype=np.float64) - record.tail_logprobs)
    off[np.isnan(off)] = 0  # both -inf
    if off.max(initial=0.0) > tolerance:
        row = int(off.argmax())
        raise InvalidRecord(
            f"tail_group_logprobs in {where}, position {record.positions[row]}: their sum differs from the tail by "
            f"{off[row]:.4f} nats, expected at most {tolerance:g}."
        )


def _check_draw_order(
    record: BaseLogprobs, ids: NDArray[np.uint32], logprobs: NDArray[np.float32], where: str, tolerance: float
) -> None:
    tail = record.tail_logprobs[:, None]
    if not np.all(logprobs[:, :1] <= tail + np.float32(tolerance)):  # NaN fails
        raise InvalidRecord(
            f"tail_sample_logprobs in {where}: expected at most the tail's log-probability, and nothing NaN."
        )
    if not np.all(logprobs[:, 1:] <= logprobs[:, :-1]):
        raise InvalidRecord(f"tail_sample_logprobs in {where}: expected most probable first, and nothing NaN.")
    nothing = tail == -np.inf
    if np.any((logprobs == -np.inf) != nothing) or np.any((ids == NO_TOKEN) != nothing):
        raise InvalidRecord(f"draws in {where}: expected a whole row of them, absent exactly where there is no tail.")


def _check_draw_ids(
    record: BaseLogprobs, ids: NDArray[np.uint32], logprobs: NDArray[np.float32], vocab_size: int, where: str
) -> None:
    """Of rows in descending order. What is absent has NO_TOKEN."""
    if np.any((ids >= vocab_size) & (ids != NO_TOKEN)):
        raise InvalidRecord(f"tail_sample_ids in {where}: expected ids below {vocab_size}.")
    if np.any(ids == record.label_ids[:, None]):
        raise InvalidRecord(f"tail_sample_ids in {where}: the label stands among the draws from the tail.")
    again = ids[:, 1:] == ids[:, :-1]
    if np.any(again & (logprobs[:, 1:] != logprobs[:, :-1])):
        raise InvalidRecord(f"tail_sample_logprobs in {where}: a token has two log-probabilities.")
    once = ids.copy()
    once[:, 1:][again] = NO_TOKEN
    ordered = np.sort(np.concatenate([record.alternative_ids, once], axis=1), axis=1)
    if np.any((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != NO_TOKEN)):
        raise InvalidRecord(
            f"tail_sample_ids in {where}: an alternative of the row stands among the draws, or equal draws are apart."
        )
