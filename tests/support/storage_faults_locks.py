"""Jobs of three workers on machines that see no lock of one another, over a disk that is slow to sync.

Simulated in processes: flock does nothing, as with Lustre's localflock, BeeGFS, NFS nolock or sshfs, and a sync takes
20 ms. A worker does with a cache what one of `logitcache precompute` does: it joins, commits its units, says that it
has finished, and the last one finalises. In some jobs one is killed and started again, in some all do all units. Each
must end with one right cache and exit statuses 0; then `repair` leaves nothing of the killed, and all of the cache.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from support.storage_faults import SAME, Counts, Seen, Tally, fork, status_of
from support.storage_faults_crowds import Versions

from logitcache.storage import CacheWriter, repair, sample_id
from logitcache.storage.job_status import (
    FINISHED,
    RUNNING,
    WorkerRecord,
    read_records,
    remove_records,
    status,
    write_record,
)

NUM_WORKERS, AT_ONCE = 3, 6
SLOW_SYNC = 0.02
"""Seconds."""

KINDS = ("each its units", "one is killed and started again", "all do all units")


def locks_off(store: str, folder: Path, counts: Counts) -> Iterator[Tally]:
    """As many jobs as are asked for, some of them at once, since they mostly wait."""
    tally = Tally("three workers that see no lock", store)
    versions = Versions(store, folder, NUM_WORKERS, lengths=((9, 14), (40,), (5, 5, 8), (30, 3), (12,), (7, 21)))
    running: dict[int, int] = {}
    for number in range(counts.jobs):
        if len(running) == AT_ONCE:
            _end(running, folder, tally)
        running[fork(partial(_job, versions, folder / f"job-{number}", number))] = number
    while running:
        _end(running, folder, tally)
    yield tally


def _end(running: dict[int, int], folder: Path, tally: Tally) -> None:
    """Take what the oldest of the jobs came to."""
    child = next(iter(running))
    number, code = running.pop(child), status_of(child)
    label = f"job {number}: {KINDS[number % len(KINDS)]}"
    if code:
        tally.add(label, Seen("defect", f"the driver of the job ended with {code}"))
        return
    found = json.loads((folder / f"job-{number}" / "seen.json").read_text(encoding="utf-8"))
    tally.notes["killed"] += found["killed"]
    tally.notes["with leftovers"] += found["leftovers"] > 0
    tally.add(label, Seen(found["kind"], found["what"]))


def _job(versions: Versions, folder: Path, number: int) -> None:
    """One job, from the start of its workers to the repair; what was seen goes into seen.json."""
    folder.mkdir()
    rng = np.random.default_rng([9, number])
    path, kind = folder / "cache", number % len(KINDS)
    seeds = rng.integers(1 << 30, size=NUM_WORKERS).tolist()
    start = [partial(_work, versions, i, path, kind == 2, seed) for i, seed in enumerate(seeds)]
    children = [fork(call) for call in start]
    victim, killed = int(rng.integers(NUM_WORKERS)), 0
    if kind == 1:
        time.sleep(rng.uniform(0.05, 1.2))
        os.kill(children[victim], signal.SIGKILL)  # not reaped yet, so it is still ours
        killed = status_of(children[victim]) == -signal.SIGKILL
        children[victim] = fork(start[victim])
    statuses = [status_of(child) for child in children]
    seen, num_leftovers = _judge(versions, path, statuses)
    found = {"kind": seen.kind, "what": seen.what, "killed": int(killed), "leftovers": num_leftovers}
    (folder / "seen.json").write_text(json.dumps(found), encoding="utf-8")


def _judge(versions: Versions, path: Path, statuses: list[int]) -> tuple[Seen, int]:
    """What the job came to; and how much `status` called left over."""
    if any(statuses):
        errors = [p.read_text(encoding="utf-8") for p in sorted(path.parent.glob("error-*"))]
        return Seen("defect", f"exit statuses {statuses}: {'; '.join(errors)}"[:300]), 0
    seen = versions.judge(path)
    if seen is not SAME:
        return Seen("wrong", f"three exit statuses 0, but {seen.what}"), 0
    leftovers = status(path).leftovers
    report = repair(path)
    if report.is_incomplete or report.leftovers != leftovers or status(path).leftovers or list(path.rglob("*.new")):
        return Seen("defect", f"{report} after {leftovers}"[:300]), len(leftovers)
    return versions.judge(path), len(leftovers)


def _work(versions: Versions, index: int, path: Path, is_greedy: bool, seed: int) -> None:
    """A worker, as one of precompute's is."""
    fcntl.flock = lambda *_: None
    os.fsync = lambda _: time.sleep(SLOW_SYNC)
    rng = np.random.default_rng(seed)
    shards = versions.shards[index]
    order = rng.permutation(len(shards)) if is_greedy else range(index, len(shards), NUM_WORKERS)
    try:
        time.sleep(rng.uniform(0, 0.5))  # machines start one after the other
        with CacheWriter(path, versions.manifest) as writer:
            write_record(writer.files, index, NUM_WORKERS, _record(RUNNING))
            writer.captured()
            for number in order:
                time.sleep(rng.exponential(0.02))  # it computes
                shard = shards[number]
                if not writer.is_committed([(sample_id(s.token_ids), s.logprobs.positions) for s in shard]):
                    writer.commit(shard)
                write_record(writer.files, index, NUM_WORKERS, _record(RUNNING))
            write_record(writer.files, index, NUM_WORKERS, _record(FINISHED))
            records = read_records(writer.files).values()
            if [r.state for r in records] == [FINISHED] * NUM_WORKERS:
                if not writer.is_final:
                    writer.finalize()
                remove_records(writer.files)
    except BaseException as error:
        (path.parent / f"error-{os.getpid()}").write_text(repr(error), encoding="utf-8")
        raise


def _record(state: str) -> WorkerRecord:
    return WorkerRecord(state, "job", "here", os.getpid(), 0.0, 0.0, 0, 0, 0, 0, 0)


FAULTS = (locks_off,)
