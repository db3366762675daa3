"""A shard as bytes, before anything is written: samples checked, encoded, packed, decoded again and compared.

Owns what must hold of a record so that it may be stored. A pure function of the manifest and the samples, which
`packing_process` runs beside the base. Must not know where the bytes go.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .backend import Memory, corrupt
from .encoding import Columns, SampleTable, encode, sample_table
from .errors import InvalidRecord
from .identity import CaptureIdentity, digest, sample_id
from .manifest import Manifest, ShardCommit, StoredFile
from .records import BaseLogprobs, CachedSample, check_positions, check_rows, concatenate
from .shard import BACKENDS, OpenShard, unit_id

ROWS_AT_ONCE = 2048
"""Rows checked and encoded together: few enough to stay in a processor's cache."""


@dataclass(frozen=True)
class PackedShard:
    """A shard that can be written: its commit record, its files by name, and its sample table."""

    commit: ShardCommit
    files: dict[str, bytes]
    table: SampleTable


def pack_samples(manifest: Manifest, samples: Sequence[CachedSample], chat_template: str = "") -> PackedShard:
    """The shard of these samples; chat_template: digest of the one that rendered them, "" where none did.

    Raises `InvalidRecord` for a record that is no distribution or not of this manifest, and what `pack_shard` raises.
    """
    if not samples:
        raise InvalidRecord("packing a shard: expected samples, found none.")
    parts, kept_mass = [], 0.0
    for record in _checked(manifest, samples):
        parts.append(encode(record, manifest.capture))
        kept_mass += float(record.kept_mass().sum())
    columns = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    return pack_shard(manifest, sample_table(samples), columns, kept_mass, chat_template)


def pack_shard(
    manifest: Manifest, table: SampleTable, columns: Columns, kept_mass: float, chat_template: str = ""
) -> PackedShard:
    """The shard of rows that are encoded and checked. Raises `CorruptCache` where a codec returns other numbers than it
    was given."""
    unit = unit_id(manifest.identity_digest, table)
    files, blocks = BACKENDS[manifest.store].write(table, columns, manifest.capture)
    commit = ShardCommit(
        unit=unit,
        identity=manifest.identity_digest,
        num_samples=len(table),
        num_positions=int(table.num_positions.sum()),
        num_tokens=int(table.num_tokens.sum()),
        num_tokens_cut=int(table.num_tokens_cut.sum()),
        kept_mass=kept_mass,
        files=tuple(StoredFile(name, len(data), digest(data)) for name, data in sorted(files.items())),
        blocks=blocks,
        chat_template=chat_template,
    )
    _check_read_back(OpenShard(Memory(f"shard {unit}", files), manifest, commit, ""), table, columns)
    return PackedShard(commit, files, table)


def _check_read_back(shard: OpenShard, table: SampleTable, columns: Columns) -> None:
    found, num_positions = shard.table(), shard.commit.num_positions
    same = all(np.array_equal(getattr(found, name), getattr(table, name)) for name in vars(table))
    for start in range(0, num_positions, ROWS_AT_ONCE):
        rows = slice(start, min(start + ROWS_AT_ONCE, num_positions))
        again = shard.reader.rows([rows])
        same = same and all(np.array_equal(again[name], column[rows]) for name, column in columns.items())
    if not same:
        raise corrupt(f"shard {shard.commit.unit}", "the codec returns other numbers than it was given")


def _checked(manifest: Manifest, samples: Sequence[CachedSample]) -> Iterator[BaseLogprobs]:
    """The rows of all samples in order, a few thousand at once. Raises `InvalidRecord`."""
    group: list[BaseLogprobs] = []
    for number, sample in enumerate(samples):
        where, record = f"sample {sample_id(sample.token_ids).hex()}", sample.logprobs
        check_positions(record, sample.token_ids, where)
        _check_widths(record, manifest.capture, where)
        group.append(record)
        if sum(map(len, group)) >= ROWS_AT_ONCE or number == len(samples) - 1:
            joined = concatenate(group)
            check_rows(joined, manifest.model.vocab_size, f"the samples up to {where}")
            _check_min_mass(joined, manifest.capture.min_mass, where)
            yield joined
            group = []


def _check_widths(record: BaseLogprobs, capture: CaptureIdentity, where: str) -> None:
    found = (record.num_alternatives, record.num_tail_groups, record.num_tail_samples)
    if not len(record) or found != (capture.top_k, capture.num_tail_groups, capture.num_tail_samples):
        expected = f"{capture.top_k} alternatives, {capture.num_tail_groups} tail groups and "
        expected += f"{capture.num_tail_samples} draws"
        raise InvalidRecord(f"{where}: expected one row or more of {expected}, found {len(record)} of {found}.")


def _check_min_mass(record: BaseLogprobs, min_mass: float, where: str) -> None:
    if min_mass < 1:
        short = (record.kept_mass() < min_mass - 1e-5) & (record.alternative_logprobs[:, -1] == -np.inf)
        if np.any(short):
            raise InvalidRecord(f"the samples up to {where}: a row keeps less than {min_mass} of the non-target mass.")
