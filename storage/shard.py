"""One committed shard, open for reading: samples, records, and the check of every record that leaves it.

Must not know how shards are found or committed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .arrow_backend import ArrowBackend
from .backend import Backend, Memory, ShardFiles, corrupt
from .encoding import PRECISIONS, Columns, SamplePlace, SampleTable, decode, group_error, mass_tolerance
from .errors import InvalidRecord
from .files import Files
from .identity import digest
from .manifest import Manifest, ShardCommit
from .records import BaseLogprobs, check_rows
from .zarr_backend import ZarrBackend

BACKENDS: dict[str, Backend] = {"zarr": ZarrBackend(), "arrow": ArrowBackend()}


@dataclass(frozen=True)
class StoredSample:
    """A sample as a shard holds it."""

    #: uint32 [n].
    token_ids: NDArray[np.uint32]
    #: int32 [P].
    positions: NDArray[np.int32]
    #: Digest of the chat template that rendered it, "" where none did, or some capture of it was not rendered.
    chat_template: str = ""

    @property
    def label_ids(self) -> NDArray[np.uint32]:
        """uint32 [P], the token after each position."""
        return self.token_ids[self.positions + 1]


class OpenShard:
    """A shard of a cache, or of what is about to become one. Nothing is read before it is asked for."""

    def __init__(self, files: Files | Memory, manifest: Manifest, commit: ShardCommit, folder: str) -> None:
        self.commit = commit
        self.files = ShardFiles(files, commit, folder)
        self._manifest = manifest
        self.reader = BACKENDS[manifest.store].open(self.files, manifest.capture)

    def table(self) -> SampleTable:
        """All samples, with the counts of the commit, in the order that its unit names."""
        table = self.reader.table()
        counts = (len(table), int(table.num_positions.sum()), int(table.num_tokens.sum()))
        lengths = (len(table.positions), len(table.token_ids))
        commit = self.commit
        if counts[1:] != lengths or counts != (commit.num_samples, commit.num_positions, commit.num_tokens):
            raise corrupt(self.files.where, f"the sample table counts {counts}, its commit says otherwise")
        if unit_id(commit.identity, table) != commit.unit:
            raise corrupt(self.files.where, f"the samples are not those of unit {commit.unit}")
        return table

    def commit_for(self, identity: str) -> ShardCommit:
        """The commit record of the very files in a cache of this identity digest: the same where that is its own."""
        if identity == self.commit.identity:
            return self.commit
        return replace(self.commit, identity=identity, unit=unit_id(identity, self.table()))

    def token_ids(self) -> NDArray[np.uint32]:
        """The tokens of all samples, one after the other, as many as the commit counts."""
        token_ids = self.reader.token_ids()
        if len(token_ids) != self.commit.num_tokens:
            raise corrupt(self.files.where, f"it holds {len(token_ids)} tokens, its commit says otherwise")
        return token_ids

    def samples(self, places: Sequence[SamplePlace]) -> list[StoredSample]:
        """Tokens and positions of these samples."""
        found = [self._stored(*pair) for pair in self.reader.samples(places)]
        for place, sample in zip(places, found, strict=True):
            tokens, positions = sample.token_ids, sample.positions
            expected = (place.tokens.stop - place.tokens.start, place.positions.stop - place.positions.start)
            if (len(tokens), len(positions)) != expected:
                raise corrupt(self.files.where, f"sample {place.row} is not of the length that the index says")
        return found

    def all_samples(self, table: SampleTable) -> list[StoredSample]:
        """Tokens and positions of all samples, from the table."""
        return [self._stored(table.token_ids[p.tokens], table.positions[p.positions]) for p in table.places()]

    def _stored(self, tokens: NDArray[np.uint32], positions: NDArray[np.int32]) -> StoredSample:
        inside = (positions >= 0) & (positions < len(tokens) - 1)
        if not np.all(inside) or np.any(np.diff(positions) <= 0):
            raise corrupt(self.files.where, "the positions of a sample do not ascend inside it")
        return StoredSample(tokens, positions)

    def columns(self, places: Sequence[SamplePlace]) -> Columns:
        """The rows of these samples, one after the other, as they are stored."""
        return self.reader.rows([place.positions for place in places])

    def record(self, columns: Columns, samples: Sequence[StoredSample]) -> BaseLogprobs:
        """The checked record of these samples' rows, one after the other. Raises `CorruptCache`."""
        return checked_record(columns, samples, self._manifest, self.files.where)


def unit_id(identity: str, table: SampleTable) -> str:
    """The name of a shard: a hash of whose it is, of its samples and their positions; so repeated work meets itself."""
    return unit_of(identity, table.sample_ids.tobytes(), table.num_positions, table.positions)


def unit_of(identity: str, sample_ids: bytes, num_positions: ArrayLike, positions: NDArray[np.int32]) -> str:
    """`unit_id` of a table with these columns, all ids and all positions one after the other."""
    counts = np.ascontiguousarray(num_positions, dtype="<u4").tobytes()
    packed = np.ascontiguousarray(positions, dtype="<i4").tobytes()
    return digest(bytes.fromhex(identity) + sample_ids + counts + packed)


def checked_record(columns: Columns, samples: Sequence[StoredSample], manifest: Manifest, where: str) -> BaseLogprobs:
    """`checked_rows` of these samples, one after the other."""
    positions = np.concatenate([s.positions for s in samples])
    return checked_rows(columns, positions, np.concatenate([s.label_ids for s in samples]), manifest, where)


def checked_rows(
    columns: Columns, positions: NDArray[np.int32], label_ids: NDArray[np.uint32], manifest: Manifest, where: str
) -> BaseLogprobs:
    """Rows as they are stored -> a record whose rows are distributions. Raises `CorruptCache`.

    positions int32 [P], label_ids uint32 [P], of one sample or of several.
    """
    capture = manifest.capture
    record = decode(columns, positions, label_ids, capture)
    precision = PRECISIONS[capture.precision]
    for_groups = group_error(capture) + (precision.max_error if precision else 0.0)
    for_draws = capture.max_error + precision.max_scalar_error if precision else 0.0
    try:
        check_rows(record, manifest.model.vocab_size, where, mass_tolerance(capture), for_groups, for_draws)
    except InvalidRecord as error:
        raise corrupt(where, str(error)) from error
    return record
