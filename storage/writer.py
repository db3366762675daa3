"""`CacheWriter`: commit shards one by one, so that a process killed at any moment loses at most the shard in work.

A shard is encoded and decoded again in memory, made durable under a name that says its content, and only then committed
by shards/<unit>.json, created only if absent: of several writers of one unit the first wins. `finalize` writes the
index and contents.json; before it, readers see no cache, and after it, exactly what it lists. Any number may write, on
machines that see no lock of one another, so none removes what another made; what is left then `leftovers` lists.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .backend import corrupt
from .captured_index import Captured
from .configs import ConfigDifferences, as_spelt
from .data_sets import DataSet, known_data_sets, record_of, write_data_set
from .encoding import Columns, SampleTable
from .errors import CorruptCache, IdentityMismatch, InvalidRecord, NotACache, UnsupportedFormat
from .files import Files, open_files
from .heads import check_lost_manifest, read_manifest, read_record, read_token_groups
from .identity import digest
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
    MAX_DATA_SETS,
    WRITER_FEATURES,
    Contents,
    DataSetEntry,
    Manifest,
    ShardCommit,
    ShardEntry,
    from_bytes,
    read_bytes,
    read_json,
    to_bytes,
)
from .packing import PackedShard, pack_samples, pack_shard
from .records import CachedSample
from .shard import OpenShard, unit_id, unit_of

T = TypeVar("T")

TABLES_AT_ONCE = 16
"""Sample tables that are read from an object store at once."""


class CacheWriter:
    """Writes a new cache or goes on with an interrupted or finished one of the same identity.

    token_groups: uint8 [V], the tail group of each token, exactly where the manifest has tail groups. configs: how the
    base's config is compared with that of a cache which is there; where they agree, the manifest there is the one that
    counts, however its config is spelt. Use as a context manager. Raises `IdentityMismatch` where the folder holds
    another cache (which is left as it is), `NotACache` where it holds other files, `UnsupportedFormat`, `OSError`. A
    manifest that was lost is written again where the commit records are of its identity.
    """

    def __init__(
        self,
        path: str | Path,
        manifest: Manifest,
        token_groups: NDArray[np.uint8] | None = None,
        configs: ConfigDifferences = as_spelt,
    ) -> None:
        _check_manifest(manifest)
        self._files = open_files(path)
        self.path, self.configs = self._files.root, configs
        _matching_manifest(self._files, manifest, configs)
        partition = _packed_groups(manifest, token_groups)
        self._leave = self._files.join()
        try:
            if partition:
                self._files.create(TOKEN_GROUPS, partition)
                read_token_groups(self._files, manifest)
            if self._files.exists(MANIFEST) or not self._files.create(MANIFEST, to_bytes(manifest)):
                manifest = _matching_manifest(
                    self._files, manifest, configs
                )  # again: another writer may have been first
        except BaseException:
            self.close()
            raise
        self.manifest = manifest
        self._tables: dict[str, tuple[str, SampleTable]] = {}
        self._captured: Captured | None = None
        self._chat_templates: set[str] = set()

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
        """Whether the contents are of this manifest and list every data set and every committed shard as it is, as far
        as this writer has read them, and their index is there."""
        contents = self._contents()
        if contents is None or self._changed(contents):
            return False
        listed = [e.unit for e in contents.shards], contents.data_sets
        return listed == (self._units(), known_data_sets(self._files)) and self._files.exists(contents.index.name)

    def holds(self, data_set: DataSet) -> bool:
        """Whether the contents list exactly this data set under its name, and every shard there is."""
        return record_of(self._files, data_set.name) == data_set.packed()[0] and self.is_final

    def captured(self) -> Captured:
        """What every committed shard holds, when first asked, and what this writer commits from then on.

        Raises `CorruptCache` for what `finalize` would refuse."""
        if self._captured is None:
            self._captured = Captured(lambda unit: self._read_table(unit)[1])
            for unit, (checksum, table) in self._of_each(self._units(), self._read_table):
                self._tables[unit] = checksum, without_tokens(table)
                self._captured.add(unit, table)
            self._check_listed()  # what could not be finished is said before anything is computed
        return self._captured

    @property
    def chat_templates(self) -> frozenset[str]:
        """Digests of the templates that rendered samples of the cache, as far as this writer has read or committed."""
        self.captured()
        return frozenset(self._chat_templates) - {""}

    def is_committed(self, samples: Sequence[tuple[bytes, NDArray[np.int32]]]) -> bool:
        """Whether some writer has committed a shard of exactly these samples and positions, in this order."""
        ids, positions = zip(*samples, strict=True)
        counts = [len(p) for p in positions]
        unit = unit_of(self._identity, b"".join(ids), counts, np.concatenate(positions))
        return self._files.exists(commit_path(unit))

    def commit(self, samples: Sequence[CachedSample], chat_template: str = "") -> ShardCommit:
        """Write one shard and commit it. A shard that is already committed is left as it is.

        chat_template: digest of the one that rendered the samples, "" where none did. Raises `InvalidRecord` before
        anything is written, `CorruptCache` where a codec returns other numbers than it
        was given, `OSError` where the disk refuses the bytes or returns others.
        """
        return self.commit_packed(pack_samples(self.manifest, samples, chat_template))

    def commit_packed(self, packed: PackedShard) -> ShardCommit:
        """`commit` of a shard that is encoded and checked, here or in another process. Raises `OSError`."""
        commit, unit = packed.commit, packed.commit.unit
        if self._files.exists(commit_path(unit)):
            return self._read_commit(unit)
        won = self._publish(commit, packed.files)
        if won is commit:
            self._tables[unit] = digest(to_bytes(commit)), without_tokens(packed.table)
        if self._captured is not None:
            self._captured.add(unit, packed.table)
        return won

    def commit_columns(
        self, table: SampleTable, columns: Columns, kept_mass: float, chat_template: str = ""
    ) -> ShardCommit:
        """`commit` of rows that are encoded at this cache's precision and checked: those of another cache."""
        unit = unit_id(self._identity, table)
        if self._files.exists(commit_path(unit)):
            return self._read_commit(unit)
        return self.commit_packed(pack_shard(self.manifest, table, columns, kept_mass, chat_template))

    def adopt(self, shard: OpenShard) -> ShardCommit:
        """Commit a shard of another cache whose identity does not differ: its files byte for byte, and its record too,
        or one with this cache's digest of that identity."""
        commit = shard.commit_for(self._identity)
        if self._files.exists(commit_path(commit.unit)):
            return self._read_commit(commit.unit)
        return self._publish(commit, {file.name: shard.files.file(file.name) for file in commit.files})

    def finalize(self, data_sets: Sequence[DataSet] = ()) -> Contents:
        """Make the committed shards the contents of the cache, in one atomic step.

        data_sets: each in place of the one of its name; those of other names stay. The record and the files of every
        shard are looked at first, also of those that were written here. Where another writer commits meanwhile it is
        done again, so that whoever is last lists everything. Raises `CorruptCache` for a shard that cannot be listed:
        damaged, of another identity, or not the one of its name that the contents of before list.
        """
        if data_sets:
            names = {entry.name for entry in known_data_sets(self._files)}
            check_num_data_sets(self.path, names | {data_set.name for data_set in data_sets})
        for data_set in data_sets:
            write_data_set(self._files, data_set)
        while True:
            units, known = self._units(), known_data_sets(self._files)
            self._tables |= self._of_each(units, self._table_now)
            self._check_listed()
            contents = write_contents(self._files, {unit: self._tables[unit] for unit in units}, known)
            if (self._units(), known_data_sets(self._files)) == (units, known):
                break
        return contents

    def _contents(self) -> Contents | None:
        """What the cache was finished with; None where it was not, or with another manifest."""
        if not self._files.exists(CONTENTS):
            return None
        contents = read_json(Contents, self._files, CONTENTS)
        return contents if contents.manifest == digest(read_bytes(self._files, MANIFEST)) else None

    def _changed(self, contents: Contents) -> list[ShardEntry]:
        """Shards whose records are not those that were listed, of those that this writer has read."""
        read = self._tables
        return [e for e in contents.shards if e.unit in read and read[e.unit][0] != e.checksum]

    def _check_listed(self) -> None:
        """The contents of before are evidence of what was committed: they are not replaced where records changed."""
        contents = self._contents()
        for entry in self._changed(contents) if contents is not None else ():
            found, where = self._tables[entry.unit][0], f"{self.path}/{commit_path(entry.unit)}"
            raise corrupt(where, f"expected checksum {entry.checksum}, as {CONTENTS} says, found {found}")

    @property
    def _identity(self) -> str:
        return self.manifest.identity_digest

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
        commit, checksum = read_record(self._files, self._identity, unit)
        self._chat_templates.add(commit.chat_template)
        shard = OpenShard(self._files, self.manifest, commit, shard_path(commit.folder))
        sizes = self._files.sizes(shard_path(commit.folder))
        for file in commit.files:
            if sizes.get(file.name) != file.size:
                found = f"found {sizes[file.name]}" if file.name in sizes else "the file is missing"
                raise corrupt(f"{shard.files.where}/{file.name}", f"expected {file.size} bytes, {found}")
        return checksum, shard

    def _publish(self, commit: ShardCommit, files: dict[str, bytes]) -> ShardCommit:
        won = publish_shard(self._files, commit, files)
        self._chat_templates.add(won.chat_template)
        return won

    def _read_commit(self, unit: str) -> ShardCommit:
        return read_record(self._files, self._identity, unit)[0]


def publish_shard(files: Files, commit: ShardCommit, data: Mapping[str, bytes]) -> ShardCommit:
    """Make the files of a shard durable and commit it; return the commit that is there then, this or an earlier one."""
    folder = shard_path(commit.folder)
    files.publish(folder, data)
    if files.create(commit_path(commit.unit), to_bytes(commit)):
        return commit
    winner, _ = read_record(files, commit.identity, commit.unit)
    if winner.folder != commit.folder:
        files.remove(folder)
    return winner


def committed_units(files: Files) -> list[str]:
    """The units of all committed shards, in their order, whether the contents list them or not."""
    return commit_units(files.names(SHARDS))


def check_num_data_sets(where: str, names: Collection[str]) -> None:
    """Raise `InvalidRecord` for more data sets than readers take; best before one too many has a record, which no later
    `finalize` could leave out."""
    if len(names) > MAX_DATA_SETS:
        raise InvalidRecord(
            f"finishing {where}: expected at most {MAX_DATA_SETS} data sets, found {len(names)}. Readers "
            "would refuse it. Give several data one --data-name, or join their files."
        )


def write_contents(
    files: Files, shards: Mapping[str, tuple[str, SampleTable]], data_sets: tuple[DataSetEntry, ...]
) -> Contents:
    """Make these committed shards and data sets the contents of the cache, in one atomic step.

    shards: by unit, in their order, the checksum of the commit record and the sample table, which needs no tokens.
    """
    check_num_data_sets(files.root, {entry.name for entry in data_sets})
    index, data = index_file([table for _, table in shards.values()])
    files.replace(index.name, data)
    entries = tuple(ShardEntry(unit, checksum) for unit, (checksum, _) in shards.items())
    manifest = digest(read_bytes(files, MANIFEST))
    num_samples = sum(len(table) for _, table in shards.values())
    contents = Contents(manifest, num_samples, index, entries, data_sets)
    files.replace(CONTENTS, to_bytes(contents))
    return contents


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


def _matching_manifest(files: Files, manifest: Manifest, configs: ConfigDifferences) -> Manifest:
    """The manifest that is there, if there is one. Raises where it is of another identity."""
    names = {name for name in files.names("") if not name.endswith(UNFINISHED)}
    inside = files.names(SHARDS)
    if not files.exists(MANIFEST):  # asked last: another writer may be making the cache
        if commit_units(inside):
            check_lost_manifest(files, manifest)
        elif names - {SHARDS, LOCK, TOKEN_GROUPS} or inside:
            raise NotACache(
                f"writing to {files.root}: expected an empty folder or a cache, found other files. "
                "Nothing was changed. Choose another folder."
            )
        return manifest
    existing = read_manifest(files)
    differences = manifest.differences(existing, configs=configs)
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
