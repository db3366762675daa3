"""Read every byte of a cache and say which shards and samples are bad.

Owns the full check; `LogitCache` checks the same things for what it reads. Must not change anything.
"""

from dataclasses import dataclass
from pathlib import Path

from .backend import file_checksum
from .cache import SHARDS, OpenShard, read_contents, read_manifest
from .errors import CorruptCache
from .identity import sample_id
from .manifest import Manifest, ShardCommit


@dataclass(frozen=True)
class Problem:
    """Something bad: in which shard, which sample (None: the whole shard), and what."""

    shard: str
    sample: str | None
    what: str


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


def verify(path: str | Path) -> VerifyReport:
    """Check every checksum, every record and every sample id of a finished cache.

    Raises `NotACache`, `IncompleteCache`, `UnsupportedFormat`, and `CorruptCache` where the manifest, the contents or a
    commit record is bad, so that the shards cannot even be told; everything below that is in the report.
    """
    root = Path(path)
    manifest, commits = read_manifest(root), read_contents(root)
    problems = [problem for commit in commits for problem in _verify_shard(root, manifest, commit)]
    return VerifyReport(
        num_shards=len(commits),
        num_samples=sum(c.num_samples for c in commits),
        num_positions=sum(c.num_positions for c in commits),
        num_bytes=sum(c.num_bytes for c in commits),
        problems=tuple(problems),
    )


def _verify_shard(root: Path, manifest: Manifest, commit: ShardCommit) -> list[Problem]:
    try:
        shard = OpenShard(root, manifest, commit)
    except CorruptCache as error:
        return [Problem(commit.unit, None, str(error))]
    problems = []
    for file in commit.files:
        if file_checksum(root / SHARDS / commit.unit / file.name) != file.checksum:
            problems.append(Problem(commit.unit, None, f"{file.name} does not match its checksum"))
    for row in range(len(shard)):
        name = shard.sample_id(row)
        if sample_id(shard.token_ids(row)) != name:
            problems.append(Problem(commit.unit, name.hex(), "the tokens are not those of the sample id"))
        try:
            shard.read(row)
        except CorruptCache as error:
            problems.append(Problem(commit.unit, name.hex(), str(error)))
    return problems
