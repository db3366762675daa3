"""Read every byte of a cache and say which shards and samples are bad; drop what is bad.

Owns the full check, of which `shard_check` has the shards; `LogitCache` checks the same things for what it reads. What
a symbolic link keeps from being read is not bad: it is named, and `repair` changes nothing while there is one.
"""

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from .data_sets import known_data_sets, read_data_set, record_name, record_of
from .encoding import SampleTable
from .errors import CorruptCache, IdentityMismatch, IncompleteCache, LinkRefused, NotACache
from .files import Files, open_files
from .heads import check_lost_manifest, read_commit, read_contents, read_manifest, read_record, read_token_groups
from .identity import digest
from .index import SampleIndex, index_file
from .job_status import record_names
from .layout import CONTENTS, MANIFEST, SHARDS, TOKEN_GROUPS, commit_path, commit_units, is_data_record
from .leftovers import remove_leftovers
from .manifest import Contents, DataSetEntry, Manifest, ShardCommit, read_bytes, read_json, to_bytes
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
    #: Whether readers refuse the cache until precompute has finished it again.
    is_incomplete: bool
    #: Names of what killed writers had left, and of the folders of dropped shards: all of it is removed.
    leftovers: tuple[str, ...] = ()
    #: Data sets that were dropped, whose names are lost.
    num_data_sets_dropped: int = 0
    #: Names of those that are left, some of whose samples may be among what was dropped.
    data_sets: tuple[str, ...] = ()
    #: Records of data sets that were lost and are written again, as the contents have them.
    num_records_restored: int = 0
    #: Whether the manifest was lost, and is written again.
    wrote_manifest: bool = False


def verify(path: str | Path) -> VerifyReport:
    """Check every checksum, every record and every sample id of a finished cache.

    Raises `NotACache`, `IncompleteCache`, `UnsupportedFormat`, and `CorruptCache` or `LinkRefused` where that is so of
    the manifest or the contents, so that the shards cannot even be told; everything below that is in the report.
    """
    files = open_files(path)
    manifest, contents = read_manifest(files), read_contents(files)
    identity = manifest.identity_digest
    problems: list[Problem] = []
    commits: list[ShardCommit] = []
    tables: list[SampleTable | None] = []
    try:
        committed = commit_units(files.names(SHARDS))
    except LinkRefused as error:  # of all shards at once
        return VerifyReport(0, 0, 0, 0, (_unread(error),))
    for number, entry in enumerate(contents.shards):
        table = None
        try:
            commit = read_commit(files, identity, contents, number)
            commits.append(commit)
            found, table = check_shard(files, manifest, commit)
            problems += found
        except CorruptCache as error:
            problems.append(Problem(entry.unit, None, error.fact))
        except LinkRefused as error:
            problems.append(_unread(error, entry.unit))
        tables.append(table)
    problems += _verify_unlisted(files, identity, set(committed) - {entry.unit for entry in contents.shards})
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


def repair(path: str | Path, manifest_from: str | Path | None = None) -> RepairReport:
    """Drop every shard that is bad, and where a listed one is the contents, so that precompute makes only those again.

    Bad is what is damaged, what is of another identity than the manifest, and, where the contents can be read and are
    of this manifest, a record that is not the one of its name that they list: they are the evidence of what was
    committed. What they do not list and is whole stays: it is of a run that goes on. Nothing is dropped where no
    shard at all is of the manifest's identity, or where shards/ is a link to a folder with another cache's. What killed
    writers left is removed.

    manifest_from: another cache, whose manifest is written where this one's is lost, damaged or a stranger's; it must
    be of the identity of every record. No other process may write to the cache, on any machine: on this one, one that
    does is found, and `OSError` (EBUSY) raised. Until precompute has run, readers see an incomplete cache and no wrong
    one. Raises `NotACache`, `UnsupportedFormat`, and `CorruptCache` where the manifest itself is bad;
    `IdentityMismatch` where manifest and shards do not belong together; `LinkRefused`, and nothing is dropped, where
    anything that it would read or remove is a symbolic link that is not followed.
    """
    files = open_files(path)
    lost = None if manifest_from is None else _lost_manifest(files, manifest_from)
    manifest = lost or read_manifest(files)
    with files.exclusive():
        if lost is not None:
            check_lost_manifest(files, lost)
            files.replace(MANIFEST, to_bytes(lost))
            _keep_contents(files, lost)
        report = _repair(files, manifest)
        return replace(report, wrote_manifest=lost is not None, leftovers=remove_leftovers(files))


def _lost_manifest(files: Files, manifest_from: str | Path) -> Manifest | None:
    """The manifest to be written; None where the cache has one of that identity."""
    other = read_manifest(open_files(manifest_from))
    check_lost_manifest(files, other)
    try:
        own = read_manifest(files)
    except (CorruptCache, NotACache):
        return other
    return None if own.identity_digest == other.identity_digest else other


def _keep_contents(files: Files, manifest: Manifest) -> None:
    """Contents that list these very records are those of the manifest that was lost: they name the one that is there
    now. Others are left to be dropped."""
    try:
        contents = replace(read_json(Contents, files, CONTENTS), manifest=digest(read_bytes(files, MANIFEST)))
        for number in range(len(contents.shards)):
            read_commit(files, manifest.identity_digest, contents, number)
    except CorruptCache:
        return
    files.replace(CONTENTS, to_bytes(contents))


def _repair(files: Files, manifest: Manifest) -> RepairReport:
    restored = _restore_records(files)
    listed = _listed(files)
    units = commit_units(files.names(SHARDS))
    _check_some_own(files, manifest.identity_digest, units)
    tables: dict[str, SampleTable | None] = {}
    unlisted = {unit for unit in units if listed is not None and unit not in listed}  # of those the bad ones go first
    for unit in units:
        try:
            commit, checksum = read_record(files, manifest.identity_digest, unit)
            problems, table = check_shard(files, manifest, commit)
            if listed is not None and listed.get(unit, checksum) != checksum:
                unlisted.add(unit)
            elif not problems:
                tables[unit] = table
        except CorruptCache:
            pass
    dropped = [unit for unit in units if unit not in tables]
    lost_partition = bool(_verify_partition(files, manifest))
    lost_data = _bad_records(files)
    is_whole = not lost_partition and not lost_data and _has_good_contents(files, manifest.identity_digest, tables)
    if is_whole and not dropped:
        return RepairReport((), False, num_records_restored=restored)
    strange = [unit for unit in dropped if unit in unlisted]
    steps = (
        record_names(files),  # who had finished has something to do again
        [commit_path(unit) for unit in strange],  # as long as one is there the contents are the evidence against it
        [] if is_whole else [CONTENTS],  # whose index is left over then
        [*(commit_path(unit) for unit in dropped if unit not in unlisted), *lost_data],
        [TOKEN_GROUPS] if lost_partition else [],  # a writer, who is given it, makes it again
    )
    for name in (name for step in steps for name in step):
        files.exists(name)  # before anything is removed: it raises where that is a link
    for step in steps:
        files.remove(*step)
    left = tuple(entry.name for entry in known_data_sets(files))
    return RepairReport(
        tuple(dropped),
        not is_whole,
        num_data_sets_dropped=len(lost_data),
        data_sets=left,
        num_records_restored=restored,
    )


def _listed(files: Files) -> dict[str, str] | None:
    """The checksums of the records by unit, as the contents say; None where they are lost, damaged or a stranger's."""
    try:
        return {entry.unit: entry.checksum for entry in read_contents(files).shards}
    except (CorruptCache, IncompleteCache):
        return None


def _check_some_own(files: Files, identity: str, units: Sequence[str]) -> None:
    """Raise `IdentityMismatch` where the manifest may be the stranger, or the shards another cache's: not for one that
    came into a cache, which is dropped."""
    found = {}
    for unit in units:
        with suppress(CorruptCache):
            found[unit] = read_json(ShardCommit, files, commit_path(unit)).identity
    others = [unit for unit in found if found[unit] != identity]
    is_link = files.is_local and Path(files.root, SHARDS).is_symlink()
    if not others or (len(others) < len(found) and not is_link):
        return
    facts = (
        f"repairing {files.root}: expected shards of identity {identity}, that of its {MANIFEST}, found "
        f"{len(others):,} of {len(found):,} of another base or capture, {commit_path(others[0])} of identity "
        f"{found[others[0]]}"
    )
    if is_link:
        raise IdentityMismatch(
            f"{facts}. {SHARDS}/ is a symbolic link, and they may be another cache's that links to the same folder. "
            "Nothing was changed. Give each cache a folder of its own: copy what is its own there."
        )
    raise IdentityMismatch(
        f"{facts}. Either the shards or the {MANIFEST} came from another cache. Nothing was changed. Use the {SHARDS}/ "
        f"that belongs to it, or its own {MANIFEST} (--manifest-from another cache of that base and capture)."
    )


def _unread(error: LinkRefused, shard: str = "") -> Problem:
    return Problem(shard, None, error.fact, error.reason)


def _verify_unlisted(files: Files, identity: str, units: Collection[str]) -> list[Problem]:
    """Records that no reader looks at, and the next writer would: of interrupted writers, or of a stranger."""
    problems = []
    for unit in sorted(units):
        try:
            read_record(files, identity, unit)
        except CorruptCache as error:
            problems.append(Problem(unit, None, error.fact))
        except LinkRefused as error:
            problems.append(_unread(error, unit))
    return problems


def _has_good_contents(files: Files, identity: str, tables: dict[str, SampleTable | None]) -> bool:
    """Whether readers find all that the contents list, as it was committed."""
    try:
        contents = read_contents(files)
        for number, entry in enumerate(contents.shards):
            read_commit(files, identity, contents, number)
            if entry.unit not in tables:
                return False
    except (CorruptCache, IncompleteCache):
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
