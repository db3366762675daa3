"""What the workers of a precompute job say of themselves, and what the commits say of the job.

Owns the files worker-<i>-of-<n>-<job>.json beside the manifest, which readers ignore and the last worker removes. Those
of another job stay: it may fill the same cache, and is finished by its own workers.
They decide nothing but who finishes: lost or stale ones cost a repetition of that, never a number. Units done and their
rate come from the commit records and the times of their files.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .data_sets import Runs, packed_runs, unpacked_runs
from .errors import CorruptCache
from .files import Files, open_files
from .heads import read_manifest, read_record
from .identity import digest, digest_json
from .layout import CONTENTS, SHARDS, commit_unit, is_worker_part, worker_name, worker_of, worker_part_name
from .leftovers import find_leftovers
from .manifest import MAX_JSON_BYTES, Contents, Manifest, from_bytes, read_json, to_bytes
from .plain_text import one_line, shown

RUNNING, FINISHED, FAILED, STOPPED = "running", "finished", "failed", "stopped"
Worker = tuple[int, int, str]
"""Index, number of workers, and their job: see `job_digest`."""

NAME_DIGITS = 16
"""Digits of a job that are of its data set's name: whoever fills the same name later takes its place."""

MAX_SENTENCE = 1000
"""Characters of what a worker says of a unit."""

_MOST = 2**53


@dataclass(frozen=True)
class WorkerRecord:
    """What a worker says of itself."""

    #: running, finished, failed (some units could not be computed) or stopped (asked to, or by an error).
    state: str
    #: `job_digest`, the same for workers of one job.
    job: str
    #: Name of the machine it runs on.
    host: str
    #: Number of its process there.
    pid: int
    #: Seconds since 1970, on the worker's clock.
    started: float
    #: Seconds since 1970, on the worker's clock.
    updated: float
    num_units: int
    num_positions: int
    num_tokens: int
    windows_done: int
    #: Of the data set, -1 where it is not known.
    num_windows: int
    #: Of the file of the samples and positions that it answers for, once it has finished.
    part_checksum: str = ""
    #: Rows of that file.
    num_runs: int = 0
    #: A sentence a unit that could not be computed.
    failures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Status:
    """Of a job: what is committed, and what its workers say."""

    manifest: Manifest
    is_final: bool
    num_listed: int
    num_shards: int
    num_samples: int
    num_positions: int
    num_tokens: int
    num_bytes: int
    #: Between its first commit and its last.
    seconds: float
    tokens_after_first: int
    #: By (index, number of workers, job).
    workers: dict[Worker, WorkerRecord]
    #: Names of what killed writers left, or of what live ones are at.
    leftovers: tuple[str, ...]

    @property
    def tokens_per_second(self) -> float | None:
        """Of the commits after the first one; None where their times say nothing."""
        return self.tokens_after_first / self.seconds if self.seconds > 0 else None

    @property
    def share_done(self) -> float | None:
        """Of the windows of all workers; None where their number is not known."""
        records = self.workers.values()
        if not records or any(r.num_windows < 0 for r in records):
            return None
        started = sum(r.num_windows for r in records)
        expected = max(num for _, num, _ in self.workers)
        total = started * max(1.0, expected / len(records))  # those that have not begun have as many each
        return sum(r.windows_done for r in records) / total if total else None


def job_digest(name: str, cut: object) -> str:
    """What the workers of a job share: the name of its data set, and the data and how they are cut into units."""
    return digest(name.encode())[:NAME_DIGITS] + digest_json(cut)[NAME_DIGITS:]


def write_record(files: Files, index: int, num: int, record: WorkerRecord) -> None:
    """Say how worker `index` of `num` is; of what failed, what may be said to others."""
    said = tuple(one_line(failure, MAX_SENTENCE) for failure in record.failures)
    files.replace(worker_name(index, num, record.job), to_bytes(replace(record, failures=said)))


def read_records(files: Files) -> dict[Worker, WorkerRecord]:
    """What every worker said last."""
    found = {}
    for name in files.names(""):
        worker = worker_of(name)
        if worker:
            try:
                data = files.read(name, MAX_JSON_BYTES)
            except FileNotFoundError:  # the last worker removes them
                continue
            found[worker] = _record(data, worker[-1], f"{files.root}/{name}")
    return dict(sorted(found.items()))


def write_part(files: Files, index: int, num: int, job: str, runs: Runs) -> str:
    """Keep what worker `index` of `num` of a job answers for until the last one finalises; return the file's
    checksum."""
    data = packed_runs(runs)
    files.replace(worker_part_name(index, num, job), data)
    return digest(data)


def read_part(files: Files, index: int, num: int, record: WorkerRecord) -> Runs:
    """What a worker that has finished answers for. Raises `CorruptCache`."""
    return unpacked_runs(files, worker_part_name(index, num, record.job), record.num_runs, record.part_checksum)


def has_part(files: Files, index: int, num: int, record: WorkerRecord) -> bool:
    """Whether the part of a worker that has finished is there: who finalises removes it, maybe before the record."""
    return files.exists(worker_part_name(index, num, record.job))


def _record(data: bytes, job: str, where: str) -> WorkerRecord:
    """What a worker of a job wrote. Raises `CorruptCache` for what none writes, with right checksums or not."""
    record = from_bytes(WorkerRecord, data, where)
    numbers = {name: value for name, value in asdict(record).items() if isinstance(value, (int, float))}
    wrong = [name for name, value in numbers.items() if not (-1 if name == "num_windows" else 0) <= value <= _MOST]
    wrong += [] if record.state in (RUNNING, FINISHED, FAILED, STOPPED) else ["state"]
    wrong += [] if record.job == job else ["job"]
    if wrong:
        raise CorruptCache(
            f"reading {where}: expected what a worker says of itself, found {shown(getattr(record, wrong[0]))} for "
            f"{wrong[0]}. It decides nothing of the cache. Remove the file."
        )
    return record


def record_names(files: Files) -> list[str]:
    """The files of all workers that said something, and what they answer for after that."""
    names = files.names("")
    return [*filter(worker_of, names), *filter(is_worker_part, names)]


def remove_records(files: Files, job: str = "") -> None:
    """Once the cache is final. job: what finished workers of other data sets say stays, for their last one."""
    found = read_records(files) if job else {}
    kept = [w for w, record in found.items() if record.state == FINISHED and w[-1][:NAME_DIGITS] != job[:NAME_DIGITS]]
    stays = {name(*worker) for worker in kept for name in (worker_name, worker_part_name)}
    files.remove(*(name for name in record_names(files) if name not in stays))


def status(path: str | Path) -> Status:
    """How far the job is that fills the cache at `path`. Raises `NotACache`, `CorruptCache`, `UnsupportedFormat`."""
    files = open_files(path)
    manifest = read_manifest(files)
    times = {unit: when for name, when in files.times(SHARDS).items() if (unit := commit_unit(name)) is not None}
    commits = {unit: read_record(files, manifest.identity_digest, unit)[0] for unit in sorted(times)}
    known = sorted((when, commits[unit].num_tokens) for unit, when in times.items() if when is not None)
    listed = set(_listed(files))
    return Status(
        manifest=manifest,
        is_final=bool(listed) and listed == {c.unit for c in commits.values()},
        num_listed=len(listed),
        num_shards=len(commits),
        num_samples=sum(c.num_samples for c in commits.values()),
        num_positions=sum(c.num_positions for c in commits.values()),
        num_tokens=sum(c.num_tokens for c in commits.values()),
        num_bytes=sum(f.size for c in commits.values() for f in c.files),
        seconds=known[-1][0] - known[0][0] if len(known) > 1 else 0.0,
        tokens_after_first=sum(tokens for _, tokens in known[1:]),
        workers=read_records(files),
        leftovers=find_leftovers(files, {c.folder for c in commits.values()}),
    )


def _listed(files: Files) -> Iterator[str]:
    if files.exists(CONTENTS):
        try:
            yield from (entry.unit for entry in read_json(Contents, files, CONTENTS).shards)
        except CorruptCache:
            if files.exists(CONTENTS):
                raise
