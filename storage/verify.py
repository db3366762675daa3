"""Read every byte of a cache and say which shards and samples are bad; drop what is bad.

Owns the full check, of which `shard_check` has the shards; `LogitCache` checks the same things for what it reads. What
a symbolic link keeps from being read is not bad: it is named, and `repair` changes nothing while there is one.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .cache import read_commit, read_contents, read_manifest, read_token_groups
from .encoding import SampleTable
from .errors import CorruptCache, LinkRefused
from .files import Files, open_files
from .index import SampleIndex, index_file
from .job_status import record_names
from .layout import CONTENTS, SHARDS, TOKEN_GROUPS, commit_path, commit_units, is_index
from .manifest import Contents, Manifest, ShardCommit, read_json
from .shard_check import Problem, check_shard


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
            found, table = check_shard(files, manifest, commit)
            problems += found
        except CorruptCache as error:
            problems.append(Problem(entry.unit, None, error.fact))
        except LinkRefused as error:
            problems.append(_unread(error, entry.unit))
        tables.append(table)
    for check in (partial(_verify_index, files, contents, tables), partial(_verify_partition, files, manifest)):
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

    No other process may write to the cache. Until precompute has run, readers see an incomplete cache and no wrong one.
    Raises `NotACache`, `UnsupportedFormat`, and `CorruptCache` where the manifest itself is bad; `LinkRefused`, and
    nothing is dropped, where anything that it would read or remove is a symbolic link that is not followed.
    """
    files = open_files(path)
    manifest = read_manifest(files)
    with files.exclusive():
        return _repair(files, manifest)


def _repair(files: Files, manifest: Manifest) -> RepairReport:
    dropped = []
    tables: dict[str, SampleTable | None] = {}
    for unit in commit_units(files.names(SHARDS)):
        try:
            commit = read_json(ShardCommit, files, commit_path(unit))
            problems, table = check_shard(files, manifest, commit)
            if commit.unit == unit and not problems:
                tables[unit] = table
                continue
        except CorruptCache:
            pass
        dropped.append(unit)
    lost_partition = bool(_verify_partition(files, manifest))
    if not dropped and not lost_partition and _has_good_contents(files, tables):
        return RepairReport((), False)
    gone = record_names(files)  # first: who had finished has something to do again
    gone += [name for name in files.names("") if name == CONTENTS or is_index(name)]
    gone += [TOKEN_GROUPS] if lost_partition else []  # a writer, who is given it, makes it again
    gone += [commit_path(unit) for unit in dropped]
    for name in gone:
        files.exists(name)  # before anything is removed: it raises where that is a link
    for name in gone:
        files.remove(name)
    return RepairReport(tuple(dropped), True)


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
