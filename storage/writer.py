"""`CacheWriter`: commit shards one by one, so that a process killed at any moment loses at most the shard in work.

A shard is encoded and decoded again in memory, made durable under a name that says its content, and only then committed
by shards/<unit>.json, created only if absent: of several writers of one unit the first wins. `finalize` writes the
index and contents.json; before it, readers see no cache, and after it, exactly what it lists. Any number may write, on
machines that see no lock of one another, so none removes what another made; what is left then `leftovers` lists.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .backend import Memory, corrupt
from .cache import read_manifest, read_token_groups
from .captured_index import Captured
from .encoding import Columns, SampleTable, encode, sample_table
from .errors import CorruptCache, IdentityMismatch, InvalidRecord, NotACache, UnsupportedFormat
from .files import Files, open_files
from .identity import digest, sample_id
from .index import index_file, npy_header
from .layout import (
    CONTENTS,
    LOCK,
    MANIFEST,
    SHARDS,
    TOKEN_GROUPS,
    UNFINISHED,
    commit_path,
    commit_units,
    shard_path,
)
from .manifest import (
    WRITER_FEATURES,
    Contents,
    Manifest,
    ShardCommit,
    ShardEntry,
    StoredFile,
    from_bytes,
    read_bytes,
    read_json,
    to_bytes,
)
from .records import BaseLogprobs, CachedSample, check_positions, check_rows, concatenate
from .shard import BACKENDS, OpenShard

T = TypeVar("T")

TABLES_AT_ONCE = 16
"""Sample tables that are read from an object store at once."""

ROWS_AT_ONCE = 2048
"""Rows checked and encoded together: few enough to stay in a processor's cache."""


class CacheWriter:
    """Writes a new cache or goes on with an interrupted or finished one of the same identity.

    token_groups: uint8 [V], the tail group of each token, exactly where the manifest has tail groups.
    Use as a context manager. Raises `IdentityMismatch` where the folder holds another cache (which is left as it is),
    `NotACache` where it holds other files, `UnsupportedFormat`, `OSError`.
    """

    def __init__(self, path: str | Path, manifest: Manifest, token_groups: NDArray[np.uint8] | None = None) -> None:
        _check_manifest(manifest)
        self._files = open_files(path)
        self.path = self._files.root
        _matching_manifest(self._files, manifest)
        partition = _packed_groups(manifest, token_groups)
        self._leave = self._files.join()
        try:
            if partition:
                self._files.create(TOKEN_GROUPS, partition)
                read_token_groups(self._files, manifest)
            if self._files.exists(MANIFEST) or not self._files.create(MANIFEST, to_bytes(manifest)):
                manifest = _matching_manifest(self._files, manifest)  # again: another writer may have been first
        except BaseException:
            self.close()
            raise
        self.manifest = manifest
        self._tables: dict[str, tuple[str, SampleTable]] = {}
        self._captured: Captured | None = None

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Cease to be a writer. What is committed stays."""
        leave, self._leave = self._leave, lambda: None
        leave()

    def abandon(self) -> None:
        """Cease when the process ends, and not before: a thread of it may still be writing."""
        self._leave = lambda: None

    @property
    def files(self) -> Files:
        """Where it writes, for the records of workers."""
        return self._files

    @property
    def has_shards(self) -> bool:
        """Whether anybody has committed anything."""
        return bool(self._units())

    @property
    def is_final(self) -> bool:
        """Whether the contents list every committed shard, and their index is there."""
        if not self._files.exists(CONTENTS):
            return False
        contents = read_json(Contents, self._files, CONTENTS)
        return [e.unit for e in contents.shards] == self._units() and self._files.exists(contents.index.name)

    def captured(self) -> Captured:
        """What every committed shard holds, when first asked, and what this writer commits from then on."""
        if self._captured is None:
            self._captured = Captured(lambda unit: self._read_table(unit)[1])
            for unit, (checksum, table) in self._of_each(self._units(), self._read_table):
                self._tables[unit] = checksum, without_tokens(table)
                self._captured.add(unit, table)
        return self._captured

    def is_committed(self, samples: Sequence[tuple[bytes, NDArray[np.int32]]]) -> bool:
        """Whether some writer has committed a shard of exactly these samples and positions, in this order."""
        ids, positions = zip(*samples, strict=True)
        unit = unit_of(b"".join(ids), [len(p) for p in positions], np.concatenate(positions))
        return self._files.exists(commit_path(unit))

    def commit(self, samples: Sequence[CachedSample]) -> ShardCommit:
        """Write one shard and commit it. A shard that is already committed is left as it is.

        Raises `InvalidRecord` before anything is written, `CorruptCache` where a codec returns other numbers than it
        was given, `OSError` where the disk refuses the bytes or returns others.
        """
        if not samples:
            raise InvalidRecord(f"writing to {self.path}: expected samples for a shard, found none.")
        parts, kept_mass = [], 0.0
        for record in self._checked(samples):
            parts.append(encode(record, self.manifest.capture))
            kept_mass += float(record.kept_mass().sum())
        columns = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        return self.commit_columns(sample_table(samples), columns, kept_mass)

    def commit_columns(self, table: SampleTable, columns: Columns, kept_mass: float) -> ShardCommit:
        """`commit` of rows that are encoded at this cache's precision and checked: those of another cache."""
        unit = unit_id(table)
        if self._files.exists(commit_path(unit)):
            return self._read_commit(unit)
        commit, files = pack_shard(self.manifest, unit, table, columns, kept_mass)
        won = self._publish(commit, files)
        if won is commit:
            self._tables[unit] = digest(to_bytes(commit)), without_tokens(table)
        if self._captured is not None:
            self._captured.add(unit, table)
        return won

    def adopt(self, commit: ShardCommit, files: dict[str, bytes]) -> ShardCommit:
        """Commit a shard of another cache of the same identity and store, byte for byte."""
        if self._files.exists(commit_path(commit.unit)):
            return self._read_commit(commit.unit)
        return self._publish(commit, files)

    def finalize(self) -> Contents:
        """Make the committed shards the contents of the cache, in one atomic step.

        The record and the files of every one are looked at first, also of those that were written here. Where another
        writer commits meanwhile it is done again, so that whoever is last lists everything. Raises `CorruptCache`.
        """
        while True:
            units = self._units()
            self._tables |= self._of_each(units, self._table_now)
            contents = write_contents(self._files, {unit: self._tables[unit] for unit in units})
            if self._units() == units:
                break
        return contents

    def _units(self) -> list[str]:
        return committed_units(self._files)

    def _of_each(self, units: Sequence[str], call: Callable[[str], T]) -> Iterator[tuple[str, T]]:
        """What a call that reads a shard gives of each; of an object store many at once, since each of them is several
        requests one after the other."""
        if self._files.is_local:
            yield from ((unit, call(unit)) for unit in units)
            return
        with ThreadPoolExecutor(TABLES_AT_ONCE) as pool:
            for start in range(0, len(units), TABLES_AT_ONCE):
                part = units[start : start + TABLES_AT_ONCE]
                yield from zip(part, pool.map(call, part), strict=True)

    def _read_table(self, unit: str) -> tuple[str, SampleTable]:
        """The checksum of a commit record, and the sample table of its shard, all of whose files are there."""
        checksum, shard = self._look_at(unit)
        return checksum, shard.table()

    def _table_now(self, unit: str) -> tuple[str, SampleTable]:
        """The same without tokens. Of a shard that is known its record and its files are looked at again."""
        checksum, shard = self._look_at(unit)
        known = self._tables.get(unit)
        return known if known is not None and known[0] == checksum else (checksum, without_tokens(shard.table()))

    def _look_at(self, unit: str) -> tuple[str, OpenShard]:
        data = read_bytes(self._files, commit_path(unit))
        commit = from_bytes(ShardCommit, data, f"{self.path}/{commit_path(unit)}")
        shard = OpenShard(self._files, self.manifest, commit, shard_path(commit.folder))
        sizes = self._files.sizes(shard_path(commit.folder))
        for file in commit.files:
            if sizes.get(file.name) != file.size:
                found = f"found {sizes[file.name]}" if file.name in sizes else "the file is missing"
                raise corrupt(f"{shard.files.where}/{file.name}", f"expected {file.size} bytes, {found}")
        return digest(data), shard

    def _checked(self, samples: Sequence[CachedSample]) -> Iterator[BaseLogprobs]:
        """The rows of all samples in order, a few thousand at once. Raises `InvalidRecord`."""
        capture = self.manifest.capture
        group: list[BaseLogprobs] = []
        for number, sample in enumerate(samples):
            where, record = f"sample {sample_id(sample.token_ids).hex()}", sample.logprobs
            check_positions(record, sample.token_ids, where)
            found = (record.num_alternatives, record.num_tail_groups, record.num_tail_samples)
            if not len(record) or found != (capture.top_k, capture.num_tail_groups, capture.num_tail_samples):
                expected = f"{capture.top_k} alternatives, {capture.num_tail_groups} tail groups and "
                expected += f"{capture.num_tail_samples} draws"
                raise InvalidRecord(f"{where}: expected one row or more of {expected}, found {len(record)} of {found}.")
            group.append(record)
            if sum(map(len, group)) >= ROWS_AT_ONCE or number == len(samples) - 1:
                joined = concatenate(group)
                check_rows(joined, self.manifest.model.vocab_size, f"the samples up to {where}")
                _check_min_mass(joined, capture.min_mass, where)
                yield joined
                group = []

    def _publish(self, commit: ShardCommit, files: dict[str, bytes]) -> ShardCommit:
        return publish_shard(self._files, commit, files)

    def _read_commit(self, unit: str) -> ShardCommit:
        return read_json(ShardCommit, self._files, commit_path(unit))


def publish_shard(files: Files, commit: ShardCommit, data: Mapping[str, bytes]) -> ShardCommit:
    """Make the files of a shard durable and commit it; return the commit that is there then, this or an earlier one."""
    folder = shard_path(commit.folder)
    files.publish(folder, data)
    if files.create(commit_path(commit.unit), to_bytes(commit)):
        return commit
    winner = read_json(ShardCommit, files, commit_path(commit.unit))
    if winner.folder != commit.folder:
        files.remove(folder)
    return winner


def committed_units(files: Files) -> list[str]:
    """The units of all committed shards, in their order, whether the contents list them or not."""
    return commit_units(files.names(SHARDS))


def write_contents(files: Files, shards: Mapping[str, tuple[str, SampleTable]]) -> Contents:
    """Make these committed shards the contents of the cache, in one atomic step.

    shards: by unit, in their order, the checksum of the commit record and the sample table, which needs no tokens.
    """
    index, data = index_file([table for _, table in shards.values()])
    files.replace(index.name, data)
    entries = tuple(ShardEntry(unit, checksum) for unit, (checksum, _) in shards.items())
    manifest = digest(read_bytes(files, MANIFEST))
    contents = Contents(manifest, sum(len(table) for _, table in shards.values()), index, entries)
    files.replace(CONTENTS, to_bytes(contents))
    return contents


def _check_min_mass(record: BaseLogprobs, min_mass: float, where: str) -> None:
    if min_mass < 1:
        short = (record.kept_mass() < min_mass - 1e-5) & (record.alternative_logprobs[:, -1] == -np.inf)
        if np.any(short):
            raise InvalidRecord(f"the samples up to {where}: a row keeps less than {min_mass} of the non-target mass.")


def unit_id(table: SampleTable) -> str:
    """The name of a shard: a hash of its samples and their positions, so that repeated work meets itself."""
    return unit_of(table.sample_ids.tobytes(), table.num_positions, table.positions)


def unit_of(sample_ids: bytes, num_positions: ArrayLike, positions: NDArray[np.int32]) -> str:
    """`unit_id` of a table with these columns, all ids and all positions one after the other."""
    counts = np.ascontiguousarray(num_positions, dtype="<u4").tobytes()
    return digest(sample_ids + counts + np.ascontiguousarray(positions, dtype="<i4").tobytes())


def pack_shard(
    manifest: Manifest, unit: str, table: SampleTable, columns: Columns, kept_mass: float
) -> tuple[ShardCommit, dict[str, bytes]]:
    """The files of a shard and its commit record, decoded again and compared. Raises `CorruptCache`."""
    files, blocks = BACKENDS[manifest.store].write(table, columns, manifest.capture)
    commit = ShardCommit(
        unit=unit,
        num_samples=len(table),
        num_positions=int(table.num_positions.sum()),
        num_tokens=int(table.num_tokens.sum()),
        num_tokens_cut=int(table.num_tokens_cut.sum()),
        kept_mass=kept_mass,
        files=tuple(StoredFile(name, len(data), digest(data)) for name, data in sorted(files.items())),
        blocks=blocks,
    )
    shard = OpenShard(Memory(f"shard {unit}", files), manifest, commit, "")
    found = shard.table()
    same = all(np.array_equal(getattr(found, name), getattr(table, name)) for name in vars(table))
    for start in range(0, commit.num_positions, ROWS_AT_ONCE):
        rows = slice(start, min(start + ROWS_AT_ONCE, commit.num_positions))
        again = shard.reader.rows([rows])
        same = same and all(np.array_equal(again[name], column[rows]) for name, column in columns.items())
    if not same:
        raise corrupt(f"shard {unit}", "the codec returns other numbers than it was given")
    return commit, files


def _check_manifest(manifest: Manifest) -> None:
    """Raise ValueError where readers would refuse it."""
    try:
        from_bytes(Manifest, to_bytes(manifest), "the manifest")
    except (CorruptCache, TypeError) as error:
        raise ValueError(f"writing a cache with this manifest: readers would refuse it: {error}") from error


def _packed_groups(manifest: Manifest, groups: NDArray[np.uint8] | None) -> bytes | None:
    """The .npy file of a partition. Raises ValueError where it is not the one that the manifest names."""
    capture, vocab_size = manifest.capture, manifest.model.vocab_size
    if groups is None and not capture.num_tail_groups:
        return None
    whole = groups is not None and groups.dtype == np.uint8 and groups.shape == (vocab_size,)
    if groups is None or not whole or int(groups.max()) >= capture.num_tail_groups:
        raise ValueError(f"token_groups: expected uint8 [{vocab_size}] below {capture.num_tail_groups}")
    if digest(groups.tobytes()) != capture.tail_partition:
        raise ValueError(f"token_groups: expected the partition {capture.tail_partition}")
    return npy_header(groups.dtype, vocab_size) + groups.tobytes()


def without_tokens(table: SampleTable) -> SampleTable:
    """A table with what an index needs: ids and counts."""
    return replace(table, token_ids=table.token_ids[:0].copy(), positions=table.positions[:0].copy())  # views hold on


def _matching_manifest(files: Files, manifest: Manifest) -> Manifest:
    names = {name for name in files.names("") if not name.endswith(UNFINISHED)}
    inside = files.names(SHARDS)
    if not files.exists(MANIFEST):  # asked last: another writer may be making the cache
        if names - {SHARDS, LOCK, TOKEN_GROUPS} or inside:
            raise NotACache(
                f"writing to {files.root}: expected an empty folder or a cache, found other files. "
                "Nothing was changed. Choose another folder."
            )
        return manifest
    existing = read_manifest(files)
    differences = manifest.differences(existing)
    if differences:
        raise IdentityMismatch(
            f"writing to {files.root}: it holds a cache of another identity ({'; '.join(differences)}). "
            "Nothing was changed. Choose another folder, or use the settings of that cache."
        )
    unknown = set(existing.writer_features) - WRITER_FEATURES
    if unknown:
        raise UnsupportedFormat(
            f"writing to {files.root}: it needs the writer features {sorted(unknown)}. Nothing was changed. It can be "
            "read; install a newer logitcache to write to it."
        )
    return existing
