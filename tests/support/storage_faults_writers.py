"""Faults of single writers: they die at any step, and the disk refuses or shortens what they write.

A *step* is a call that changes what is on the disk, with a moment before it and one after, and for a write one in the
middle. `Steps` counts these moments in this process; what happens at one is up to the fault. Whatever happened, a new
writer and a repair must end with the bytes of an undisturbed run, and no reader may see other numbers meanwhile.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from support.storage_faults import (
    GROUPS,
    SAME,
    Counts,
    Seen,
    Tally,
    attempt,
    fork,
    manifest_for,
    read_all,
    samples_of,
    status_of,
    tree,
    write,
)

from logitcache.storage import CachedSample, CacheWriter, IncompleteCache, NotACache, RepairReport, repair

CALLS = ("fsync", "link", "rename", "replace", "unlink", "rmdir", "mkdir")
LOOKS = ("listdir", "scandir", "stat", "open")
"""Calls that only look at a folder or open a file: between them others may change it."""

Act = Callable[[int, str], None]
Shards = Sequence[Sequence[CachedSample]]


class Steps:
    """While it is entered, call `act` with number and name at every moment of a step on the disk."""

    def __init__(self, act: Act, looks: bool = False) -> None:
        self.count, self._act, self._busy = 0, act, False
        self._calls = ((os, (*CALLS, *LOOKS) if looks else CALLS), (shutil, ("rmtree",)))
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> Steps:
        for module, names in self._calls:
            for name in names:
                call = partial(self._called, name, getattr(module, name))
                self._patches.enter_context(mock.patch.object(module, name, call))
        self._patches.enter_context(mock.patch.object(builtins, "open", partial(self._opened, open)))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def moment(self, name: str) -> None:
        if not self._busy:
            self._busy, number = True, self.count
            self.count += 1
            try:
                self._act(number, name)
            finally:
                self._busy = False

    def _called(self, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.moment(f"before {name}")
        result = original(*args, **kwargs)
        if name not in LOOKS:
            self.moment(f"after {name}")
        return result

    def _opened(self, original: Callable[..., Any], file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not set(mode) & set("wxa+"):
            return original(file, mode, *args, **kwargs)
        self.moment("before open")
        opened = Slow(original(file, mode, *args, **kwargs), self)
        try:
            self.moment("after open")
        except BaseException:
            opened.close()
            raise
        return opened


class Slow:
    """A file that is written in two halves, with a moment between them."""

    def __init__(self, file: Any, steps: Steps) -> None:
        self._file, self._steps = file, steps

    def write(self, data: bytes) -> int:
        half = len(data) // 2
        self._file.write(data[:half])
        self._file.flush()
        try:
            self._steps.moment("half of a write")
        except Shortened:
            return len(data)
        self._file.write(data[half:])
        return len(data)

    def __enter__(self) -> Slow:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class Shortened(Exception):
    """Half of a write was enough: say that all was written."""


def count_steps(call: Callable[[], object], looks: bool = False) -> list[str]:
    """The names of all moments of an undisturbed call."""
    names: list[str] = []
    with Steps(lambda _, name: names.append(name), looks):
        call()
    return names


def chosen(total: int, stride: int) -> list[int]:
    """Every step; or one in `stride`, and ten times as many of those that begin and finish a cache."""
    edge = max(1, stride // 10)
    return [n for n in range(total) if n % stride == 0 or ((n < 20 or n >= total - 40) and n % edge == 0)]


class Scene:
    """An undisturbed run of a writer on a new cache, or on one that it extends, and what readers may see of it."""

    def __init__(self, store: str, folder: Path, grows: bool) -> None:
        self.manifest, self.shards = manifest_for(store, "fine", groups=True), samples_of(5, groups=True)
        self.start, self.path, undisturbed = folder / "start", folder / "cache", folder / "undisturbed"
        self.name = "grown" if grows else "new"
        folder.mkdir(parents=True, exist_ok=True)
        if grows:
            write(self.start, self.manifest, self.shards[:1])
        self.reset(undisturbed)
        self.before = read_all(self.start) if grows else None
        self.moments = count_steps(partial(write, undisturbed, self.manifest, self.shards))
        repair(undisturbed)  # of the index of the contents before
        self.after, self.files = read_all(undisturbed), tree(undisturbed)

    def reset(self, path: Path) -> Path:
        shutil.rmtree(path, ignore_errors=True)
        if self.start.exists():
            shutil.copytree(self.start, path)
        return path

    def run(self) -> None:
        write(self.path, self.manifest, self.shards)

    def judge(self) -> Seen:
        """What a reader sees between: nothing yet, where there was nothing; else the state before or after."""
        seen, found = attempt(lambda: read_all(self.path), self.path)
        if seen is SAME:
            return SAME if found in (self.before, self.after) else Seen("wrong", "other numbers between")
        early = any(f"{error.reason}:" in seen.what for error in (NotACache, IncompleteCache))
        if seen.kind == "refused" and (self.before is not None or not early):
            return Seen("wrong", f"what was finished before cannot be read: {seen.what}")
        return seen

    def finish(self, seen: Seen) -> Seen:
        """Let a new writer finish; the outcome is what a reader saw before, if the bytes are those expected."""
        ended, _ = attempt(self.run, self.path)
        if ended is not SAME:
            return Seen("defect", f"the next writer fails: {ended.what}")
        return self.compare(seen)

    def compare(self, seen: Seen) -> Seen:
        """Once what the dead left is removed, which no writer does."""
        repaired, report = attempt(partial(repair, self.path), self.path)
        if not isinstance(report, RepairReport) or report.is_incomplete:
            return Seen("defect", f"repair, where all is whole: {repaired.what or report}"[:300])
        found = tree(self.path)
        if found != self.files:
            names = sorted(n for n in found.keys() | self.files.keys() if found.get(n) != self.files.get(n))
            return Seen("wrong", f"other bytes than an undisturbed run: {names[:4]}")
        return seen


# --- 1. killed --------------------------------------------------------------------------------------------------------


def killed_at_every_step(store: str, folder: Path, counts: Counts) -> Iterator[Tally]:
    tally = Tally("killed at a step", store)
    for grows in (False, True):
        scene = Scene(store, folder / str(grows), grows)
        for number in chosen(len(scene.moments), counts.stride):
            scene.reset(scene.path)
            status = status_of(fork(partial(_die_at, number, scene.run)))
            seen = scene.judge() if status == -signal.SIGKILL else Seen("defect", f"not killed, but {status}")
            tally.add(f"{scene.name}, {number} {scene.moments[number]}", scene.finish(seen))
    yield tally


def _die_at(at: int, call: Callable[[], object]) -> None:
    with Steps(lambda number, _: os.kill(os.getpid(), signal.SIGKILL) if number == at else None):
        call()


def killed_at_any_time(store: str, folder: Path, counts: Counts) -> Iterator[Tally]:
    """From outside, while a child writes shards in a loop; half of the time what it left is used again."""
    tally, rng = Tally("killed at a random time", store), np.random.default_rng(6)
    scene = Scene(store, folder, grows=False)
    begun = time.perf_counter()
    status_of(fork(scene.run))
    duration = time.perf_counter() - begun
    scene.reset(scene.path)
    for case in range(counts.kills):
        child = fork(scene.run)
        time.sleep(rng.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        tally.notes["of a live writer"] += status_of(child) == -signal.SIGKILL
        committed = len(list(scene.path.glob("shards/*.json")))
        tally.notes["amid the shards"] += 0 < committed < len(scene.shards)
        seen = scene.judge()
        if case % 2:
            tally.add(f"kill {case}", seen)
            continue
        tally.add(f"kill {case}", scene.finish(seen))
        scene.reset(scene.path)
    yield tally


# --- 2. refused by the disk -------------------------------------------------------------------------------------------

ERRORS = {
    "ENOSPC": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "EIO": OSError(errno.EIO, os.strerror(errno.EIO)),
    "short write, silent": Shortened(),
}


def failing_disk(store: str, folder: Path, counts: Counts) -> Iterator[Tally]:
    """A step fails; the same writer tries again at once, and ends with the bytes of an undisturbed run."""
    for fault, error in ERRORS.items():
        tally = Tally(fault, store)
        for grows in (False, True):
            scene = Scene(store, folder / fault / str(grows), grows)
            halves = [n for n, name in enumerate(scene.moments) if name == "half of a write"]
            steps = [n for n, name in enumerate(scene.moments) if "rmtree" not in name]  # which ignores its errors
            numbers = halves if isinstance(error, Shortened) else steps
            for number in [numbers[i] for i in chosen(len(numbers), counts.stride)]:
                scene.reset(scene.path)
                label = f"{scene.name}, {number} {scene.moments[number]}"
                tally.add(label, _failing(scene, number, error))
        yield tally


def _failing(scene: Scene, at: int, error: Exception) -> Seen:
    done = False

    def act(number: int, _: str) -> None:
        nonlocal done
        if number == at:
            done = True
            raise error

    seen: list[Seen] = []

    def persist(call: Callable[[], Any]) -> Any:
        """Once more where it fails; between, a reader looks."""
        first, result = attempt(call, scene.path)
        if first is SAME:
            return result
        seen.append(first if first.kind == "defect" else scene.judge())
        return call()

    with Steps(act):
        start = partial(CacheWriter, scene.path, scene.manifest, GROUPS)
        again, writer = attempt(partial(persist, start), scene.path)
        if isinstance(writer, CacheWriter):
            with writer:
                for shard in scene.shards:
                    again = attempt(partial(persist, partial(writer.commit, shard)), scene.path)[0]
                    if again is not SAME:
                        break
                else:
                    again = attempt(partial(persist, writer.finalize), scene.path)[0]
    if not done:
        return Seen("defect", "the step was not reached")
    if again is not SAME:
        return Seen("defect", f"trying again fails: {again.what}")
    bad = next((s for s in seen if s.kind in ("wrong", "defect")), None)
    if bad:
        return bad
    final = scene.judge()
    if final is not SAME:
        return Seen("wrong", f"the writer reported success, but {final.what}")
    return scene.compare(seen[0] if seen else SAME)


FAULTS = (killed_at_every_step, killed_at_any_time, failing_disk)
