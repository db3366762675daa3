"""Records <-> the columns a shard stores, at a precision with a stated maximum error.

Owns the column names, dtypes, shapes and steps, which docs/format.md specifies. Must not know in which files the
columns are. Trade-offs: label ids are not stored, since the sample's tokens determine them; alternatives stay in their
order, so that a row's log-probabilities are small steps down, which compress better than the values (docs/log.md).
Columns of no width are not stored: without alternatives a row is its label and its tail.
Shapes: P positions, K alternatives, G tail groups, M draws, S samples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import InvalidRecord
from .identity import CaptureIdentity, sample_id
from .records import MASS_TOLERANCE, NO_TOKEN, BaseLogprobs, CachedSample

Columns = dict[str, NDArray[Any]]

ALTERNATIVES = ("alternative_ids", "alternative_logprobs")

NO_DROP = 2**16 - 1
"""Fills drops where an alternative or a draw is absent. In columns of steps the largest number means -inf."""


@dataclass(frozen=True)
class Precision:
    """Steps a nat of quantised log-probabilities; the maximum error is half a step. None: stored as float32."""

    #: Of the kept log-probabilities, and of the draws'.
    alternatives: int
    #: Of the label's and the tail's.
    scalars: int

    @property
    def max_error(self) -> float:
        """Of an alternative's or a draw's log-probability, in nats; the label's and the tail's are smaller."""
        return 0.5 / self.alternatives

    @property
    def max_scalar_error(self) -> float:
        """Of the label's or the tail's log-probability, in nats."""
        return 0.5 / self.scalars


PRECISIONS: dict[str, Precision | None] = {
    "exact": None,
    "fine": Precision(alternatives=32, scalars=1024),
    "compact": Precision(alternatives=16, scalars=1024),
}
"""From the most to the least exact."""

GROUP_STEPS_PER_NAT = (1, 4)
"""Of the tail groups' shares of the tail: what a cache may be stored with at any precision but exact."""


@dataclass(frozen=True)
class Column:
    """A column of one row a position: [P], or [P, width] where width is not 0."""

    name: str
    dtype: str
    width: int = 0

    def shape(self, rows: int) -> tuple[int, ...]:
        """Of this many rows."""
        return (rows, self.width) if self.width else (rows,)


def columns_of(capture: CaptureIdentity) -> tuple[Column, ...]:
    """The columns that a cache with these settings stores a position in."""
    k, g, m = capture.top_k, capture.num_tail_groups, capture.num_tail_samples
    if capture.precision == "exact":
        label, kept = Column("label_logprobs", "<f4"), Column("alternative_logprobs", "<f4", k)
        tail, groups = Column("tail_logprobs", "<f4"), Column("tail_group_logprobs", "<f4", g)
        draws = Column("tail_sample_logprobs", "<f4", m)
    else:
        label, kept = Column("label_steps", "<u4"), Column("alternative_drops", "<u2", k)
        tail, groups = Column("tail_steps", "<u4"), Column("tail_group_steps", "<u2", g)
        draws = Column("tail_sample_drops", "<u2", m)
    columns = [label, *([Column("alternative_ids", "<u4", k), kept] if k else []), tail]
    columns += [groups] if g else []
    columns += [Column("tail_sample_ids", "<u4", m), draws] if m else []
    return tuple(columns)


def mass_tolerance(capture: CaptureIdentity) -> float:
    """How far label + alternatives + tail of a record that was read may be from 1."""
    precision = PRECISIONS[capture.precision]
    alone = precision.max_scalar_error if precision else 0.0
    return float(np.expm1(capture.max_error if capture.top_k else alone)) + MASS_TOLERANCE


def group_error(capture: CaptureIdentity) -> float:
    """Of a tail group's log-probability, in nats: of its share of the tail, and of the tail; 0 if none is rounded."""
    precision = PRECISIONS[capture.precision]
    if precision is None or not capture.num_tail_groups:
        return 0.0
    return 0.5 / capture.group_steps_per_nat + precision.max_scalar_error


def encode(record: BaseLogprobs, capture: CaptureIdentity) -> Columns:
    """The columns of these rows. Raises `InvalidRecord` where a value does not fit, or its promised error is missed."""
    precision = PRECISIONS[capture.precision]
    columns = _quantised(record, precision, capture.group_steps_per_nat) if precision else _exact(record)
    found = {name: (column.dtype.str, column.shape) for name, column in columns.items()}
    expected = {c.name: (c.dtype, c.shape(len(record))) for c in columns_of(capture)}
    if found != expected:
        raise InvalidRecord(f"encoding {len(record)} rows: expected the columns {expected}, found {found}.")
    if precision:
        decoded = decode(columns, record.positions, record.label_ids, capture)
        _check_promise(record, decoded, precision, group_error(capture))
    return columns


def decode(
    columns: Mapping[str, NDArray[Any]],
    positions: NDArray[np.int32],
    label_ids: NDArray[np.uint32],
    capture: CaptureIdentity,
) -> BaseLogprobs:
    """The rows these columns hold. positions int32 [P], label_ids uint32 [P]: what is stored elsewhere."""
    precision = PRECISIONS[capture.precision]
    columns = columns if capture.top_k else {**columns, **_no_alternatives(len(positions), precision)}
    groups: NDArray[np.float32] | None = None
    drawn: tuple[NDArray[np.uint32], NDArray[np.float32]] | tuple[None, None] = (None, None)
    if precision is None:
        label, kept, tail = (columns[f"{name}_logprobs"] for name in ("label", "alternative", "tail"))
        groups = columns["tail_group_logprobs"] if capture.num_tail_groups else None
        absent = _absent(kept)
        if capture.num_tail_samples:
            draws = columns["tail_sample_logprobs"]
            drawn = _present(columns["tail_sample_ids"], _absent(draws)), draws
    else:
        label = _logprobs(columns["label_steps"], precision.scalars)
        tail = _logprobs(columns["tail_steps"], precision.scalars)
        kept, absent = _from_drops(columns["alternative_drops"], precision.alternatives)
        if capture.num_tail_groups:
            groups = _logprobs(columns["tail_group_steps"], capture.group_steps_per_nat)  # shares of the tail
            groups += np.where(tail > -np.inf, tail, 0)[:, None]
        if capture.num_tail_samples:
            draws, nothing = _from_drops(columns["tail_sample_drops"], precision.alternatives)
            drawn = _present(columns["tail_sample_ids"], nothing), draws
    ids = _present(columns["alternative_ids"], absent)
    return BaseLogprobs(positions, label_ids, label, ids, kept, tail, groups, *drawn)


def _no_alternatives(rows: int, precision: Precision | None) -> Columns:
    """The columns that are not stored where a row has none."""
    name, dtype = ("alternative_drops", "<u2") if precision else ("alternative_logprobs", "<f4")
    return {"alternative_ids": np.zeros((rows, 0), dtype="<u4"), name: np.zeros((rows, 0), dtype=dtype)}


def _exact(record: BaseLogprobs) -> Columns:
    left_out = ("positions", "label_ids", *(() if record.num_alternatives else ALTERNATIVES))
    columns = {name: column for name, column in record.columns().items() if name not in left_out}
    return columns | {name: _ids(columns[name]) for name in ("alternative_ids", "tail_sample_ids") if name in columns}


def _quantised(record: BaseLogprobs, precision: Precision, group_steps: int) -> Columns:
    columns: Columns = {"label_steps": _steps(record.label_logprobs, precision.scalars, "<u4", "label")}
    if record.num_alternatives:
        columns["alternative_ids"] = _ids(record.alternative_ids)
        columns["alternative_drops"] = _drops(record.alternative_logprobs, precision.alternatives, "alternative")
    columns["tail_steps"] = _steps(record.tail_logprobs, precision.scalars, "<u4", "tail")
    if record.tail_group_logprobs is not None:
        tail = np.where(record.tail_logprobs > -np.inf, record.tail_logprobs, 0)
        shares = record.tail_group_logprobs - tail[:, None]
        columns["tail_group_steps"] = _steps(shares, group_steps, "<u2", "tail_group")
    if record.tail_sample_ids is not None and record.tail_sample_logprobs is not None:
        columns["tail_sample_ids"] = _ids(record.tail_sample_ids)
        columns["tail_sample_drops"] = _drops(record.tail_sample_logprobs, precision.alternatives, "tail_sample")
    return columns


def _ids(ids: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Ids, 0 where absent: what says so is the log-probability."""
    return np.where(ids == NO_TOKEN, np.uint32(0), ids) if np.any(ids == NO_TOKEN) else ids


def _present(stored: NDArray[Any], absent: NDArray[np.bool_] | None) -> NDArray[np.uint32]:
    """What `_ids` was given. absent: None where nothing is."""
    ids: NDArray[np.uint32] = stored.astype(np.uint32, copy=False)
    return ids if absent is None else np.where(absent, np.uint32(NO_TOKEN), ids)


def _absent(logprobs: NDArray[np.float32]) -> NDArray[np.bool_] | None:
    """Which are absent: they stand at the end of a row, so its last entry tells."""
    return logprobs == -np.inf if np.any(logprobs[:, -1:] == -np.inf) else None


def _steps(logprobs: NDArray[np.float32], steps: int, dtype: str, name: str) -> NDArray[Any]:
    """Whole steps below 0; the largest number is -inf."""
    nothing = np.iinfo(dtype).max
    absent = logprobs == -np.inf
    rounded = np.rint(np.where(absent, 0, logprobs).astype(np.float64) * -steps)
    if rounded.max(initial=0) >= nothing:
        raise InvalidRecord(
            f"{name}_logprobs: {logprobs[~absent].min()} nats is out of the range of this precision. "
            "Use --precision exact."
        )
    return np.where(absent, nothing, np.maximum(rounded, 0)).astype(dtype)


def _logprobs(stored: NDArray[Any], steps: int) -> NDArray[np.float32]:
    values = (stored * (-1.0 / steps)).astype(np.float32)
    values[stored == np.iinfo(stored.dtype).max] = -np.inf
    return values


def _drops(logprobs: NDArray[np.float32], steps: int, name: str) -> NDArray[np.uint16]:
    """Whole steps from the entry before, of the first one from 0; rows are in descending order."""
    rounded = logprobs * np.float32(-steps)
    np.rint(rounded, out=rounded)
    absent = np.isinf(rounded) if np.any(logprobs[:, -1:] == -np.inf) else None
    if absent is not None:
        rounded[absent] = 0
    drops = np.empty(logprobs.shape, dtype=np.float32)
    drops[:, :1] = np.maximum(rounded[:, :1], 0)
    np.subtract(rounded[:, 1:], rounded[:, :-1], out=drops[:, 1:])
    if absent is not None:
        drops[absent] = 0
    if drops.max(initial=0) >= NO_DROP:
        raise InvalidRecord(
            f"{name}_logprobs: a step down of {drops.max() / steps:.0f} nats is out of the range of this precision. "
            "Use --precision exact."
        )
    if absent is not None:
        drops[absent] = NO_DROP
    return drops.astype("<u2")


def _from_drops(drops: NDArray[np.uint16], steps: int) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
    """Log-probabilities, and which are absent: they stand at the end of a row, so its last entry tells."""
    absent = drops == NO_DROP if np.any(drops[:, -1:] == NO_DROP) else None
    down = np.cumsum(drops if absent is None else np.where(absent, 0, drops), axis=1, dtype=np.int32)
    values = np.multiply(down, np.float32(-1.0 / steps), dtype=np.float32)
    if absent is not None:
        values[absent] = -np.inf
    return values, absent


def _check_promise(record: BaseLogprobs, decoded: BaseLogprobs, precision: Precision, for_groups: float) -> None:
    """What is about to be written is what was given, within the errors that the precision states."""
    bounds = {
        "label_logprobs": precision.max_scalar_error,
        "alternative_logprobs": precision.max_error,
        "tail_logprobs": precision.max_scalar_error,
        "tail_group_logprobs": for_groups,
        "tail_sample_logprobs": precision.max_error,
    }
    given, found = record.columns(), decoded.columns()
    names = given.keys() - bounds.keys()  # of integers
    if given.keys() != found.keys() or not all(np.array_equal(given[name], found[name]) for name in names):
        raise InvalidRecord("encoding: the alternatives or the draws do not come back as they were given.")
    for name in bounds.keys() & given.keys():
        with np.errstate(invalid="ignore"):
            off = np.abs(given[name] - found[name])
        if not off.max(initial=0.0) <= bounds[name] + 1e-6:  # 1e-6: a log-probability of that much above 0 is 0
            wrong = ~(off <= bounds[name] + 1e-6) & (given[name] != found[name])  # -inf is equal to itself
            if np.any(wrong):
                raise InvalidRecord(
                    f"encoding {name}: {given[name][wrong][0]} comes back as {found[name][wrong][0]}, expected within "
                    f"{bounds[name]:g} nats."
                )


@dataclass(frozen=True)
class SamplePlace:
    """Where a sample is in its shard: its row, its tokens, its positions."""

    row: int
    tokens: slice
    positions: slice


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

    def places(self) -> list[SamplePlace]:
        """Where each sample's tokens are in `token_ids`, and its rows in `positions` and the position columns."""
        pairs = zip(_slices(self.num_tokens), _slices(self.num_positions), strict=True)
        return [SamplePlace(row, tokens, positions) for row, (tokens, positions) in enumerate(pairs)]


def sample_table(samples: Sequence[CachedSample]) -> SampleTable:
    """The sample table of a shard."""
    return SampleTable(
        sample_ids=np.stack([np.frombuffer(sample_id(s.token_ids), dtype=np.uint8) for s in samples]),
        num_tokens=np.array([len(s.token_ids) for s in samples], dtype="<u4"),
        num_positions=np.array([len(s.logprobs) for s in samples], dtype="<u4"),
        num_tokens_cut=np.array([s.num_tokens_cut for s in samples], dtype="<u4"),
        token_ids=np.concatenate([s.token_ids for s in samples]).astype("<u4", copy=False),
        positions=np.concatenate([s.logprobs.positions for s in samples]).astype("<i4", copy=False),
    )


def _slices(counts: NDArray[np.uint32]) -> list[slice]:
    ends = np.cumsum(counts, dtype=np.int64)
    return [slice(int(end) - int(n), int(end)) for end, n in zip(ends, counts, strict=True)]
