"""`prune`: take samples out of a finished cache, so that it opens with the old contents or the new at any moment.

Owns what goes, what stays and the order of the steps: shards of which a part stays are packed into new ones and
committed, the contents are replaced, and only then what they do not list any more is removed. A reader that had the old
contents open finds files missing, which is an error, never other numbers. Killed before the end, the same call again
comes to the same cache. Rows are copied as they are stored.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .data_sets import DataSet, known_data_sets, read_data_set, remove_data_set, write_data_set
from .encoding import SampleTable
from .errors import IdentityMismatch, UnsupportedFormat
from .files import Files, open_files
from .heads import read_commit, read_contents, read_manifest, read_record
from .identity import digest
from .job_status import remove_records
from .layout import commit_path, shard_path
from .leftovers import remove_leftovers
from .manifest import WRITER_FEATURES, Manifest, ShardCommit, to_bytes
from .packing import pack_shard
from .repack import Part, Pick, Source, pack
from .shard import OpenShard
from .writer import committed_units, publish_shard, without_tokens, write_contents


@dataclass(frozen=True)
class PruneReport:
    """What went, or would go: different samples, their positions, bytes; and what became of the shards."""

    num_samples: int
    #: Different samples that stay.
    num_samples_kept: int
    num_positions: int
    #: Of the shards; before anything is rewritten an estimate.
    num_bytes: int
    num_shards_dropped: int
    num_shards_rewritten: int
    num_shards_kept: int


@dataclass(frozen=True)
class _Capture:
    """Rows of a sample that stays, in one shard: those of later shards may not come to count in their place."""

    positions: NDArray[np.int32]
    unit: str
    is_rewritten: bool


@dataclass
class _Plan:
    """Of every committed unit what becomes of it, in the order in which they count: those that are listed first.

    kept: whole shards with what an index needs of them; picks: of the shards to be rewritten; dropped: with nothing
    that stays; commits: of all; gone: ids of samples that go; captures: of those that stay.
    """

    kept: dict[str, tuple[str, SampleTable]] = field(default_factory=dict)
    picks: dict[str, list[Pick]] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    commits: dict[str, ShardCommit] = field(default_factory=dict)
    gone: set[bytes] = field(default_factory=set)
    num_positions_gone: int = 0
    captures: dict[bytes, list[_Capture]] = field(default_factory=dict)

    @property
    def max_positions(self) -> int:
        """Of any shard that there is: none that is made is larger."""
        return max(commit.num_positions for commit in self.commits.values())

    @property
    def removed(self) -> list[str]:
        """Units that are not to stay as they are."""
        return [*self.picks, *self.dropped]


def prune(path: str | Path, wanted: Collection[bytes], dry_run: bool = False) -> PruneReport:
    """Remove from a finished cache every sample whose id is not among these.

    wanted: sample ids, best as a set. dry_run: only say what would go. Shards that are wanted whole stay byte for byte,
    those of which nothing is wanted go, and of the others the wanted rows are packed into new shards. Needs the memory
    of a few shards, and of all positions. No other process may write to the cache; on this machine one that does is
    found, and one that is about to begin waits. Raises `IncompleteCache`; `IdentityMismatch` where nothing would be
    left, of the samples or of the data sets; `CorruptCache` before anything is changed for readers;
    `UnsupportedFormat`; `OSError`.
    """
    files = open_files(path)
    manifest = read_manifest(files)
    if set(manifest.writer_features) - WRITER_FEATURES:
        raise UnsupportedFormat(
            f"pruning {files.root}: it needs the writer features {sorted(manifest.writer_features)}. Nothing was "
            "changed. Install a newer logitcache."
        )
    if dry_run:
        plan = _plan(files, manifest, wanted)
        _data_sets_left(files, wanted)
        return _estimate(plan)
    with files.exclusive():
        return _prune(files, manifest, wanted)


def _prune(files: Files, manifest: Manifest, wanted: Collection[bytes]) -> PruneReport:
    plan = _plan(files, manifest, wanted)
    left = _data_sets_left(files, wanted)
    if not plan.removed and not left and read_contents(files).data_sets == known_data_sets(files):
        remove_leftovers(files)
        return _estimate(plan)
    shards, commits = dict(plan.kept), {unit: plan.commits[unit] for unit in plan.kept}
    for part in pack(_picks(files, manifest, plan), plan.max_positions):
        commit = _commit(files, manifest, part)  # the one that is there, where these very rows are committed already
        table = part.table if commit.unit not in plan.commits else _open(files, manifest, commit).table()
        shards[commit.unit] = digest(to_bytes(commit)), without_tokens(table)
        commits[commit.unit] = commit
    for name, data_set in left.items():  # not before: what cannot be packed leaves everything as it was
        if data_set.num_samples:
            write_data_set(files, data_set)
        else:
            remove_data_set(files, name)
    remove_records(files)  # who had finished may have something to do again
    write_contents(files, dict(sorted(shards.items())), known_data_sets(files))
    files.remove(*(commit_path(unit) for unit in plan.removed if unit not in shards))
    remove_leftovers(files)  # the folders of those, the older index and data sets among them
    sizes = [sum(c.num_bytes for c in held.values()) for held in (plan.commits, commits)]
    return _report(plan, sizes[0] - sizes[1])


def _data_sets_left(files: Files, wanted: Collection[bytes]) -> dict[str, DataSet]:
    """Of the data sets that lose samples, by their names, what is left: some are left without any.

    Raises `IdentityMismatch` where all are: a cache without any is learnt whole.
    """
    known = [read_data_set(files, entry) for entry in known_data_sets(files)]
    left = {found.name: found.of_samples(wanted) for found in known}
    if known and not any(found.num_samples for found in left.values()):
        raise IdentityMismatch(
            f"pruning {files.root}: none of its {len(known):,} data sets has a sample that stays, the first being "
            f"{known[0].name!r}. Without a data set all that it holds would be learnt, at every position that was "
            "captured. Nothing was changed. Run `logitcache precompute` with the data that stay, and then prune."
        )
    return {found.name: left[found.name] for found in known if left[found.name].num_samples < found.num_samples}


def _plan(files: Files, manifest: Manifest, wanted: Collection[bytes]) -> _Plan:
    contents, plan = read_contents(files), _Plan()
    identity = manifest.identity_digest
    commits = [read_commit(files, identity, contents, number) for number in range(len(contents.shards))]
    unlisted = set(committed_units(files)) - {commit.unit for commit in commits}  # of writers that were interrupted
    commits += [read_record(files, identity, unit)[0] for unit in sorted(unlisted)]
    for commit in commits:
        plan.commits[commit.unit] = commit
        _plan_shard(plan, commit, Source(_open(files, manifest, commit)), wanted)
    if plan.gone and not plan.captures:
        raise IdentityMismatch(
            f"pruning {files.root}: none of its {len(plan.gone):,} samples is wanted. Nothing was changed: the data "
            "are not those of this cache, or are tokenized in another way. Check them; or delete the cache."
        )
    return plan


def _plan_shard(plan: _Plan, commit: ShardCommit, source: Source, wanted: Collection[bytes]) -> None:
    """Enter one more shard. It can stay where all its samples are wanted, and no row of it would come to count.

    Of rows that several shards hold those in the first count. That order is of the units, and a shard that is packed
    anew has another: so what it holds is taken out of the later ones, and never written twice.
    """
    unit, picks = commit.unit, list[Pick]()
    here: dict[bytes, list[_Capture]] = {}
    can_stay = True
    for row, (key, positions) in enumerate(source.samples()):
        if key not in wanted:
            plan.gone.add(key)
            plan.num_positions_gone += len(positions)
            can_stay = False
            continue
        before, again = plan.captures.get(key, []), here.setdefault(key, [])
        if any(c.is_rewritten or c.unit > unit for c in before):
            can_stay &= not _is_taken(positions, before).any()
        left = np.flatnonzero(~_is_taken(positions, (*before, *again)))
        again.append(_Capture(positions, unit, False))
        if len(left):
            picks.append(Pick(row, left))
    for key, captures in here.items():
        entered = [c if can_stay else replace(c, is_rewritten=True) for c in captures]
        plan.captures.setdefault(key, []).extend(entered)
    if can_stay:
        plan.kept[unit] = digest(to_bytes(commit)), without_tokens(source.table)
    elif picks:
        plan.picks[unit] = picks
    else:
        plan.dropped.append(unit)


def _is_taken(positions: NDArray[np.int32], captures: Sequence[_Capture]) -> NDArray[np.bool_]:
    if not captures:
        return np.zeros(len(positions), dtype=np.bool_)
    return np.isin(positions, np.concatenate([c.positions for c in captures]))


def _picks(files: Files, manifest: Manifest, plan: _Plan) -> Iterator[tuple[Source, Pick]]:
    for unit, picks in plan.picks.items():
        source = Source(_open(files, manifest, plan.commits[unit]))
        for pick in picks:
            yield source, pick


def _open(files: Files, manifest: Manifest, commit: ShardCommit) -> OpenShard:
    return OpenShard(files, manifest, commit, shard_path(commit.folder))


def _commit(files: Files, manifest: Manifest, part: Part) -> ShardCommit:
    packed = pack_shard(manifest, part.table, part.columns, part.kept_mass, part.chat_template)
    return publish_shard(files, packed.commit, packed.files)


def _estimate(plan: _Plan) -> PruneReport:
    """Before anything is rewritten: of a shard that will be, the share of its bytes that its rows have."""
    num_bytes = sum(plan.commits[unit].num_bytes for unit in plan.dropped)
    for unit, picks in plan.picks.items():
        commit = plan.commits[unit]
        num_rows = sum(len(pick.rows) for pick in picks)
        num_bytes += commit.num_bytes * (commit.num_positions - num_rows) // commit.num_positions
    return _report(plan, num_bytes)


def _report(plan: _Plan, num_bytes: int) -> PruneReport:
    return PruneReport(
        num_samples=len(plan.gone),
        num_samples_kept=len(plan.captures),
        num_positions=plan.num_positions_gone,
        num_bytes=num_bytes,
        num_shards_dropped=len(plan.dropped),
        num_shards_rewritten=len(plan.picks),
        num_shards_kept=len(plan.kept),
    )
