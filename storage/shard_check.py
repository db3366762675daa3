"""One committed shard, checked whole: every file is read once, every block decoded once, every row and id looked at.

Owns what `verify` and `repair` say of a shard. Must not know what lists shards. Trade-off: the files of one shard are
held in memory, as its writer held them, so that nothing is read again for the next sample of the same block.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .backend import Memory, corrupt, rows_per_block
from .encoding import Columns, SampleTable
from .errors import CorruptCache
from .files import Files
from .identity import sample_id
from .layout import shard_path
from .manifest import Manifest, ShardCommit
from .shard import OpenShard, checked_rows

ROWS_AT_ONCE = 2048
"""Rows that are decoded and checked together, in whole blocks; where something in them is bad, block by block."""


@dataclass(frozen=True)
class Problem:
    """Something bad."""

    #: "": none in particular.
    shard: str
    #: None: the whole shard.
    sample: str | None
    #: What is wrong, in words.
    what: str
    #: That of the error that a reader gets, `corrupt` or `link-refused`.
    reason: str = CorruptCache.reason


def check_shard(
    files: Files, manifest: Manifest, commit: ShardCommit
) -> tuple[tuple[Problem, ...], SampleTable | None]:
    """What is bad in a shard, and its sample table, None where that cannot be read. Raises `LinkRefused`."""
    try:
        stored = OpenShard(files, manifest, commit, shard_path(commit.folder))
    except CorruptCache as error:
        return (Problem(commit.unit, None, error.fact),), None
    held: dict[str, bytes] = {}
    problems = []
    for file in commit.files:
        try:
            held[file.name] = stored.files.whole(file.name)
            stored.files.compare(file.name, held[file.name])
        except CorruptCache as error:
            problems.append(Problem(commit.unit, None, error.fact))
    shard = OpenShard(Memory(stored.files.where, held), manifest, commit, "")
    try:
        table = shard.table()
    except CorruptCache as error:
        return (*problems, Problem(commit.unit, None, error.fact)), None
    found = sorted([*_wrong_ids(table), *_Rows(shard, manifest, table).problems().items()], key=lambda p: p[0])
    problems += [Problem(commit.unit, table.sample_ids[row].tobytes().hex(), what) for row, what in found]
    return tuple(problems), table


def _wrong_ids(table: SampleTable) -> Iterator[tuple[int, str]]:
    """The rows of the samples whose id is not that of their tokens."""
    ends = np.cumsum(table.num_tokens, dtype=np.int64).tolist()
    for row, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if sample_id(table.token_ids[start:end]) != table.sample_ids[row].tobytes():
            yield row, "the tokens are not those of the sample id"


class _Rows:
    """The rows of a shard, which samples they are of, and what is bad in them.

    P rows, S samples: sample [P], the row in the table of the sample of each row; label_ids uint32 [P]; misplaced
    bool [S], the samples whose positions do not ascend inside them and so have no labels.
    """

    def __init__(self, shard: OpenShard, manifest: Manifest, table: SampleTable) -> None:
        self._shard, self._manifest, self._positions = shard, manifest, table.positions
        num_tokens = table.num_tokens.astype(np.int64)
        self._sample = np.repeat(np.arange(len(table)), table.num_positions)
        positions = table.positions.astype(np.int64)
        right = (positions >= 0) & (positions < num_tokens[self._sample] - 1)
        right[1:] &= (positions[1:] > positions[:-1]) | (self._sample[1:] != self._sample[:-1])
        self._misplaced = np.zeros(len(table), dtype=np.bool_)
        self._misplaced[self._sample[~right]] = True
        labels = (np.cumsum(num_tokens) - num_tokens)[self._sample] + positions + 1
        self._label_ids = table.token_ids[np.where(right, labels, 0)]
        self._bad: dict[int, str] = {}

    def problems(self) -> dict[int, str]:
        """By the row of a sample in the table what is bad first in its rows."""
        what = corrupt(self._shard.files.where, "the positions of a sample do not ascend inside it").fact
        self._bad = {int(row): what for row in np.flatnonzero(self._misplaced)}
        block = rows_per_block(self._manifest.capture)
        step = block * max(1, ROWS_AT_ONCE // block)
        for start in range(0, len(self._positions), step):
            rows = slice(start, min(start + step, len(self._positions)))
            if not self._is_good(rows):
                for at in range(rows.start, rows.stop, block):
                    self._blame(slice(at, min(at + block, rows.stop)))
        return self._bad

    def _is_good(self, rows: slice) -> bool:
        try:
            self._check(self._shard.reader.rows([rows]), rows)
        except CorruptCache:
            return False
        return True

    def _blame(self, rows: slice) -> None:
        """Find the samples of one block that are bad: all of them, where it cannot be decoded."""
        samples = np.unique(self._sample[rows])
        try:
            columns = self._shard.reader.rows([rows])
        except CorruptCache as error:
            for row in samples.tolist():
                self._bad.setdefault(row, error.fact)
            return
        for row in samples.tolist():
            first, last = np.searchsorted(self._sample[rows], [row, row + 1])
            part = slice(rows.start + int(first), rows.start + int(last))
            try:
                self._check({name: column[first:last] for name, column in columns.items()}, part)
            except CorruptCache as error:
                self._bad.setdefault(row, error.fact)

    def _check(self, columns: Columns, rows: slice) -> None:
        """Raise `CorruptCache` unless these rows, of samples that have labels, are distributions."""
        misplaced: NDArray[np.bool_] = self._misplaced[self._sample[rows]]
        positions, label_ids = self._positions[rows], self._label_ids[rows]
        if np.any(misplaced):
            columns = {name: column[~misplaced] for name, column in columns.items()}
            positions, label_ids = positions[~misplaced], label_ids[~misplaced]
        checked_rows(columns, positions, label_ids, self._manifest, self._shard.files.where)
