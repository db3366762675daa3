"""Read every byte of a cache and say which shards and samples are bad; drop what is bad.

Owns the full check; `LogitCache` checks the same things for what it reads. What a symbolic link keeps from being read
is not bad: it is named, and `repair` changes nothing while there is one.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from .cache import read_commit, read_contents, read_manifest, read_token_groups
from .data_sets import known_data_sets, read_data_set, record_name, record_of
from .encoding import SampleTable
from .errors import CorruptCache, IncompleteCache, LinkRefused
from .files import Files, open_files
from .identity import sample_id
from .index import SampleIndex, index_file
from .job_status import record_names
from .layout import CONTENTS, SHARDS, TOKEN_GROUPS, commit_path, commit_units, is_data_record, is_index, shard_path
from .leftovers import remove_leftovers
from .manifest import Contents, DataSetEntry, Manifest, ShardCommit, read_json, to_bytes
from .shard import OpenShard


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


@dataclass(frozen=True)
class VerifyReport:
    """What was read and what was bad."""

    num_shards: int
    num_samples: int
    num_positions: int
    num_bytes: int
    problems: tuple[Problem, ...]

    @property
    def is_intact(self) -> bool:
        """No problem found."""
        return not self.problems

    @property
    def is_corrupt(self) -> bool:
        """Something is damaged, and not only kept from being read by links."""
        return any(problem.reason == CorruptCache.reason for problem in self.problems)


@dataclass(frozen=True)
class RepairReport:
    """What was dropped, and what is to do."""

    #: Units of shards.
    dropped: tuple[str, ...]
    #: Whether the cache has to be finished by precompute again.
    is_incomplete: bool
    #: Names of what killed writers had left, and of the folders of dropped shards: all of it is removed.
    leftovers: tuple[str, ...] = ()
    #: Data sets that were dropped, whose names are lost.
    num_data_sets_dropped: int = 0
    #: Names of those that are left, some of whose samples may be among what was dropped.
    data_sets: tuple[str, ...] = ()
    #: Records of data sets that were lost and are written again, as the contents have them.
    num_records_restored: int = 0


def verify(path: str | Path) -> VerifyReport:
    """Check every checksum, every record and every sample id of a finished cache.

    Raises `NotACache`, `IncompleteCache`, `UnsupportedFormat`, and `CorruptCache` or `LinkRefused` where that is so of
    the manifest or the contents, so that the shards cannot even be told; everything below that is in the report.
    """
    files = open_files(path)
    manifest, contents = read_manifest(files), read_contents(files)
    problems: list[Problem] = []
    commits: list[ShardCommit] = []
    tables: list[SampleTable | None] = []
    try:
        files.names(SHARDS)
    except LinkRefused as error:  # of all shards at once
        return VerifyReport(0, 0, 0, 0, (_unread(error),))
    for number, entry in enumerate(contents.shards):
        table = None
        try:
            commit = read_commit(files, contents, number)
            commits.append(commit)
            found, table = _verify_shard(files, manifest, commit)
            problems += found
        except CorruptCache as error:
            problems.append(Problem(entry.unit, None, error.fact))
        except LinkRefused as error:
            problems.append(_unread(error, entry.unit))
        tables.append(table)
    checks = (
        partial(_verify_index, files, contents, tables),
        partial(_verify_data_sets, files, contents),
        partial(_verify_partition, files, manifest),
    )
    for check in checks:
        try:
            problems += check()
        except LinkRefused as error:
            problems.append(_unread(error))
    return VerifyReport(
        num_shards=len(contents.shards),
        num_samples=contents.num_samples,
        num_positions=sum(c.num_positions for c in commits),
        num_bytes=sum(c.num_bytes for c in commits),
        problems=tuple(problems),
    )


def repair(path: str | Path) -> RepairReport:
    """Drop every shard that is bad, and where there is one the contents, so that precompute makes only those again.

    What killed writers left is removed. No other process may write to the cache, on any machine: on this one, one that
    does is found, and `OSError` (EBUSY) raised. Until precompute has run, readers see an incomplete cache and no
    wrong one. Raises `NotACache`, `UnsupportedFormat`, and `CorruptCache` where the manifest itself is bad;
    `LinkRefused`, and nothing is dropped, where anything that it would read or remove is a symbolic link that is not
    followed.
    """
    files = open_files(path)
    manifest = read_manifest(files)
    with files.exclusive():
        report = _repair(files, manifest)
        return replace(report, leftovers=remove_leftovers(files))


def _repair(files: Files, manifest: Manifest) -> RepairReport:
    restored = _restore_records(files)
    dropped = []
    tables: dict[str, SampleTable | None] = {}
    for unit in commit_units(files.names(SHARDS)):
        try:
            commit = read_json(ShardCommit, files, commit_path(unit))
            problems, table = _verify_shard(files, manifest, commit)
            if commit.unit == unit and not problems:
                tables[unit] = table
                continue
        except CorruptCache:
            pass
        dropped.append(unit)
    lost_partition = bool(_verify_partition(files, manifest))
    lost_data = _bad_records(files)
    if not dropped and not lost_partition and not lost_data and _has_good_contents(files, tables):
        return RepairReport((), False, num_records_restored=restored)
    gone = record_names(files)  # first: who had finished has something to do again
    gone += [name for name in files.names("") if name == CONTENTS or is_index(name)]
    gone += [TOKEN_GROUPS] if lost_partition else []  # a writer, who is given it, makes it again
    gone += [commit_path(unit) for unit in dropped]
    gone += lost_data
    for name in gone:
        files.exists(name)  # before anything is removed: it raises where that is a link
    files.remove(*(name for name in gone if not is_index(name)))  # which go after the contents that name them
    left = tuple(entry.name for entry in known_data_sets(files))
    return RepairReport(
        tuple(dropped), True, num_data_sets_dropped=len(lost_data), data_sets=left, num_records_restored=restored
    )


def _unread(error: LinkRefused, shard: str = "") -> Problem:
    return Problem(shard, None, error.fact, error.reason)


def _has_good_contents(files: Files, tables: dict[str, SampleTable | None]) -> bool:
    if not files.exists(CONTENTS):
        return False
    try:
        contents = read_contents(files)
        for number in range(len(contents.shards)):
            read_commit(files, contents, number)
    except CorruptCache:
        return False
    if _verify_data_sets(files, contents):
        return False
    return not _verify_index(files, contents, [tables.get(entry.unit) for entry in contents.shards])


def _verify_partition(files: Files, manifest: Manifest) -> list[Problem]:
    try:
        if manifest.capture.num_tail_groups:
            read_token_groups(files, manifest)
    except CorruptCache as error:
        return [Problem("", None, str(error))]
    return []


def _verify_index(files: Files, contents: Contents, tables: list[SampleTable | None]) -> list[Problem]:
    try:
        SampleIndex.read(files, contents)
    except CorruptCache as error:
        return [Problem("", None, error.fact)]
    readable = [table for table in tables if table is not None]
    if len(readable) == len(tables) and index_file(readable)[0] != contents.index:
        return [Problem("", None, f"{contents.index.name} is not the index of these shards")]
    return []


def _verify_data_sets(files: Files, contents: Contents) -> list[Problem]:
    """Every data set that the contents list, and that writers know one of its name too."""
    problems = []
    for entry in contents.data_sets:
        try:
            read_data_set(files, entry)
            if record_of(files, entry.name) is None:
                problems.append(Problem("", None, f"{record_name(entry.name)}: the file is missing"))
        except CorruptCache as error:
            problems.append(Problem("", None, error.fact))
    return problems


def _restore_records(files: Files) -> int:
    """Write again what writers know of the data sets that the contents list, where that is missing or damaged."""
    try:
        entries = read_contents(files).data_sets
    except (CorruptCache, IncompleteCache):
        return 0
    restored = 0
    for entry in entries:
        try:
            if record_of(files, entry.name) is not None:
                continue
        except CorruptCache:
            pass
        files.replace(record_name(entry.name), to_bytes(entry))
        restored += 1
    return restored


def _bad_records(files: Files) -> list[str]:
    """The records of data sets that are damaged, or whose file is."""
    bad = []
    for name in filter(is_data_record, files.names("")):
        try:
            entry = read_json(DataSetEntry, files, name)
            read_data_set(files, entry)
            if name == record_name(entry.name):
                continue
        except CorruptCache:
            pass
        bad.append(name)
    return bad


def _verify_shard(files: Files, manifest: Manifest, commit: ShardCommit) -> tuple[list[Problem], SampleTable | None]:
    try:
        shard = OpenShard(files, manifest, commit, shard_path(commit.folder))
    except CorruptCache as error:
        return [Problem(commit.unit, None, error.fact)], None
    problems = []
    for file in commit.files:
        try:
            shard.files.file(file.name)
        except CorruptCache as error:
            problems.append(Problem(commit.unit, None, error.fact))
    try:
        table = shard.table()
    except CorruptCache as error:
        return [*problems, Problem(commit.unit, None, error.fact)], None
    for row, place in enumerate(table.places()):
        name = bytes(table.sample_ids[row])
        if sample_id(table.token_ids[place.tokens]) != name:
            problems.append(Problem(commit.unit, name.hex(), "the tokens are not those of the sample id"))
        try:
            shard.record(shard.columns([place]), shard.samples([place]))
        except CorruptCache as error:
            problems.append(Problem(commit.unit, name.hex(), error.fact))
    return problems, table
