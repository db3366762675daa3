"""Samples of committed shards, picked and packed into other shards, their rows as they are stored.

Nothing is rounded again: what leaves here holds the very numbers that went in. Owns the check of every row on the way,
and the size of the shards. Must not know which samples are wanted, nor write.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from .backend import corrupt
from .encoding import Columns, SampleTable
from .identity import sample_id
from .shard import OpenShard, StoredSample


@dataclass(frozen=True)
class Pick:
    """A sample of a shard, and which of its positions."""

    #: Its row in the sample table.
    row: int
    #: Places in its positions, ascending, one or more.
    rows: NDArray[np.intp]


@dataclass(frozen=True)
class Part:
    """What a shard is made of: sample table, columns as they are stored, the sum of the kept mass of its rows, and the
    digest of the chat template that rendered its samples ("": none).

    kept_mass is that of the rows as they are read, since those before rounding are not there any more.
    """

    table: SampleTable
    columns: Columns
    kept_mass: float
    chat_template: str = ""

    @property
    def label_ids(self) -> NDArray[np.uint32]:
        """uint32 [P], the token after each position."""
        starts = np.cumsum(self.table.num_tokens, dtype=np.int64) - self.table.num_tokens
        return self.table.token_ids[np.repeat(starts, self.table.num_positions) + self.table.positions + 1]


class Source:
    """A shard to pick from, with its sample table in memory."""

    def __init__(self, shard: OpenShard) -> None:
        self._shard, self.table = shard, shard.table()
        self._places = self.table.places()
        self._samples = shard.all_samples(self.table)
        self.chat_template = shard.commit.chat_template

    def samples(self) -> Iterator[tuple[bytes, NDArray[np.int32]]]:
        """Id and positions of every sample, in order."""
        for row, sample in enumerate(self._samples):
            yield self.table.sample_ids[row].tobytes(), sample.positions

    def take(self, picks: Sequence[Pick]) -> Part:
        """These samples with these rows, checked. Raises `CorruptCache`."""
        samples = self._picked(picks)
        wanted = np.concatenate([self._places[p.row].positions.start + p.rows for p in picks])
        columns = self._shard.reader.rows(_runs(wanted))
        record = self._shard.record(columns, samples)
        return Part(self.table_of(picks), columns, float(record.kept_mass().sum()), self.chat_template)

    def table_of(self, picks: Sequence[Pick]) -> SampleTable:
        """The sample table of what `take` gives, which reads no rows."""
        samples, numbers = self._picked(picks), [pick.row for pick in picks]
        return SampleTable(
            sample_ids=self.table.sample_ids[numbers],
            num_tokens=np.array([len(s.token_ids) for s in samples], dtype="<u4"),
            num_positions=np.array([len(s.positions) for s in samples], dtype="<u4"),
            num_tokens_cut=self.table.num_tokens_cut[numbers],
            token_ids=np.concatenate([s.token_ids for s in samples]),
            positions=np.concatenate([s.positions for s in samples]),
        )

    def _picked(self, picks: Sequence[Pick]) -> list[StoredSample]:
        samples = []
        for pick in picks:
            sample = self._samples[pick.row]
            if sample_id(sample.token_ids) != self.table.sample_ids[pick.row].tobytes():
                name = self.table.sample_ids[pick.row].tobytes().hex()
                raise corrupt(self._shard.files.where, f"the tokens of sample {name} are not those of its id")
            samples.append(StoredSample(sample.token_ids, sample.positions[pick.rows]))
        return samples


def pack(picks: Iterable[tuple[Source, Pick]], max_positions: int) -> Iterator[Part]:
    """The picked samples in their order, in parts of at most max_positions positions, or of one sample that has more.

    Where parts are taken from its front, the rest is packed into those that were left. Samples of different chat
    templates do not share a part. Reads a part at a time.
    """
    parts: list[Part] = []
    group: list[Pick] = []
    source: Source | None = None
    num_positions = 0
    for origin, pick in picks:
        is_full = num_positions and num_positions + len(pick.rows) > max_positions
        if source is not None and source.chat_template != origin.chat_template:
            is_full = True
        if source is not None and group and (is_full or origin is not source):
            parts.append(source.take(group))
            group = []
        if is_full:
            yield _joined(parts)
            parts, num_positions = [], 0
        source = origin
        group.append(pick)
        num_positions += len(pick.rows)
    if source is not None and group:
        parts.append(source.take(group))
    if parts:
        yield _joined(parts)


def _joined(parts: Sequence[Part]) -> Part:
    if len(parts) == 1:
        return parts[0]
    tables = [part.table for part in parts]
    names = [field.name for field in fields(SampleTable)]
    return Part(
        SampleTable(**{name: np.concatenate([getattr(t, name) for t in tables]) for name in names}),
        {name: np.concatenate([p.columns[name] for p in parts]) for name in parts[0].columns},
        sum(part.kept_mass for part in parts),
        parts[0].chat_template,
    )


def _runs(rows: NDArray[np.intp]) -> list[slice]:
    """Ascending numbers as slices, one for each run of consecutive ones."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    starts, stops = np.concatenate([[0], breaks]), np.concatenate([breaks, [len(rows)]])
    return [slice(int(rows[a]), int(rows[b - 1]) + 1) for a, b in zip(starts, stops, strict=True)]
