"""Faults of several writers: a second one at each step of a first, and crowds of processes that are killed.

Writers of one unit may have slightly different numbers, as nondeterministic GPUs give them. All must end in one intact
cache, each shard wholly from one of them; a writer that is not killed must not fail, and who reported success must not
lose what it committed.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from support.storage_faults import (
    LENGTHS,
    SAME,
    Bits,
    Counts,
    Seen,
    Tally,
    attempt,
    fork,
    manifest_for,
    sample_bits,
    samples_of,
    status_of,
    write,
)
from support.storage_faults_writers import Steps, chosen, count_steps

from logitcache.storage import CachedSample, CacheWriter, IncompleteCache, LogitCache, NotACache, repair, verify

Shards = Sequence[Sequence[CachedSample]]


class Versions:
    """The same tokens and positions with slightly different numbers, as nondeterministic GPUs give them."""

    def __init__(self, store: str, folder: Path, num: int, lengths: Sequence[Sequence[int]] = LENGTHS) -> None:
        self.manifest = manifest_for(store, "exact")
        self.shards = [samples_of(7, version, lengths=lengths) for version in range(num)]
        alone = [write(folder / f"alone-{v}", self.manifest, shards) for v, shards in enumerate(self.shards)]
        self.bits = [_by_tokens(path) for path in alone]

    def judge(self, path: Path, complete: bool = True) -> Seen:
        """One intact cache of all shards, each shard from one writer."""
        seen, found = attempt(lambda: _by_tokens(path), path)
        if seen is not SAME:
            return Seen("wrong" if complete else seen.kind, f"writers reported success, but {seen.what}")
        assert isinstance(found, dict)
        if found.keys() - self.bits[0].keys() or (complete and found.keys() != self.bits[0].keys()):
            return Seen("wrong", f"{len(found)} samples, expected {len(self.bits[0])}")
        for shard in self.shards[0]:
            keys = [sample.token_ids.tobytes() for sample in shard if sample.token_ids.tobytes() in found]
            if not any(all(found[key] == version[key] for key in keys) for version in self.bits):
                return Seen("wrong", "a shard is not of one writer")
        said, problems = attempt(lambda: verify(path).problems, path)
        if said is not SAME or problems:
            return Seen("defect", f"verify: {said.what or problems}"[:300])
        return SAME


def _by_tokens(path: Path) -> dict[bytes, Bits]:
    return {sample.token_ids.tobytes(): sample_bits(sample) for sample in LogitCache.open(path).samples()}


def meeting_writers(store: str, folder: Path, counts: Counts) -> Iterator[Tally]:
    """At each step of one writer a second one starts, writes, finishes and ends: all of it, or only a part."""
    versions = Versions(store, folder, 2)
    mine, theirs = versions.shards
    path = folder / "cache"
    plays: dict[str, tuple[Shards, Shards]] = {
        "the same shards": (mine, theirs),
        "other shards": (mine[:1], theirs[1:]),
        "equal bytes": (mine, mine),
        "nothing": (mine, ()),
    }
    for play, (first, second) in plays.items():
        tally = Tally(f"a second writer at a step: {play}", store)
        shutil.rmtree(path, ignore_errors=True)
        moments = count_steps(partial(write, path, versions.manifest, first), looks=True)
        for number in chosen(len(moments), 3 * counts.stride):
            shutil.rmtree(path, ignore_errors=True)
            met: list[int] = []

            def other(at: int, _: str, number: int = number, second: Shards = second, met: list[int] = met) -> None:
                if at == number:
                    met.append(number)
                    if second:
                        write(path, versions.manifest, second)
                    else:
                        CacheWriter(path, versions.manifest).close()

            with Steps(other, looks=True):
                ended = attempt(partial(write, path, versions.manifest, first), path)[0]
            seen = versions.judge(path) if ended is SAME else Seen("defect", f"the first writer: {ended.what}"[:300])
            if met:
                tally.add(f"{number} {moments[number]}", seen)
        yield tally


def crowds(store: str, folder: Path, counts: Counts) -> Iterator[Tally]:
    """2 to 8 processes at once on the same units, dawdling at random steps; in every other round some are killed.

    A reader looks all the time. Where nobody was killed no writer may fail, and nobody tidies up after them.
    """
    tally, rng = Tally("2 to 8 writers at once", store), np.random.default_rng(8)
    versions = Versions(store, folder, 8)
    for number in range(counts.rounds):
        path, num = folder / "cache", int(rng.integers(2, 9))
        shutil.rmtree(path, ignore_errors=True)
        children = [fork(partial(_write_slowly, versions, v, path, int(rng.integers(1 << 30)))) for v in range(num)]
        victims = [c for c in children if rng.random() < 0.4] if number % 2 else []
        reader = _watch(versions, path, children, victims, rng)
        statuses = [status_of(child) for child in children]
        tally.notes["writers"] += num
        tally.notes["killed"] += sum(status == -signal.SIGKILL for status in statuses)
        failed = [c for c, s in zip(children, statuses, strict=True) if s not in (0, -signal.SIGKILL)]
        seen = reader
        if failed:
            errors = [(folder / f"error-{child}").read_text(encoding="utf-8") for child in failed]
            seen = Seen("defect", f"{len(failed)} of {num} writers failed: {errors[0]}"[:300])
        elif seen.kind not in ("wrong", "defect") and 0 in statuses:
            seen = versions.judge(path)
        if seen.kind not in ("wrong", "defect"):
            write(path, versions.manifest, versions.shards[0])
            last = versions.judge(path)
            seen = last if last is not SAME else seen
            if repair(path).is_incomplete or list(path.rglob("*.new")):
                seen = Seen("defect", "repair leaves files of those that died, or drops what is whole")
        tally.add(f"round {number}: {num} writers, {len(victims)} to be killed", seen)
    yield tally


def _write_slowly(versions: Versions, version: int, path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shards = [versions.shards[version][i] for i in rng.permutation(len(versions.shards[version]))]
    try:
        with Steps(lambda *_: time.sleep(rng.exponential(0.002) if rng.random() < 0.1 else 0), looks=True):
            write(path, versions.manifest, shards)
    except BaseException as error:
        (path.parent / f"error-{os.getpid()}").write_text(repr(error), encoding="utf-8")
        raise


def _watch(versions: Versions, path: Path, children: list[int], victims: list[int], rng: np.random.Generator) -> Seen:
    """Read until all writers have ended, and kill the victims one after the other."""
    victims, worst = list(victims), SAME
    while any(os.waitid(os.P_PID, c, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None for c in children):
        time.sleep(rng.uniform(0, 0.01))
        if victims and rng.random() < 0.3:
            os.kill(victims.pop(), signal.SIGKILL)  # not reaped yet, so it is still ours
        seen = versions.judge(path, complete=False)
        early = any(f"{error.reason}:" in seen.what for error in (NotACache, IncompleteCache))
        if seen.kind == "refused" and not early:
            seen = Seen("defect", f"a reader meanwhile: {seen.what}"[:300])
        worst = seen if worst.kind not in ("wrong", "defect") else worst
    return worst if worst.kind in ("wrong", "defect") else SAME


FAULTS = (meeting_writers, crowds)
