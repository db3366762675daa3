"""A program that runs `logitcache precompute` in forked children and kills them with SIGKILL. Prints a report in JSON.

    python precompute_killer.py '{"mode": "random", "line": [...], "folder": "...", "kills": 20, "seed": 0}'

line: the arguments of precompute but for --cache; folder: where the caches go: `reference` of a run that nothing
interrupted, and `killed-0`, `killed-1`, ... of runs that were killed and then finished.
Everything is imported once, before the forks and without threads of torch, so that a child costs a tenth of a second.
"""

import gc
import importlib
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from logitcache.cli import run
from logitcache.models.loading import find_model, load_base

SHARED_STEPS = ("fsync", "link", "rename", "replace", "unlink", "mkdir", "rmdir")
"""The calls by which a writer changes what is on disk for good."""


def main(mode: str, line: list[str], folder: str, kills: int = 0, seed: int = 0, stride: int = 1) -> dict[str, Any]:
    torch.set_num_threads(1)
    killer = Killer(line, Path(folder))
    tqdm.monitor_interval = 0  # transformers' bars of loading would leave a thread
    importlib.import_module("logitcache.capture.worker")  # now, not in every child
    load_base(find_model(line[line.index("--model") + 1]), "auto", torch.device("cpu"))  # so do transformers' tables
    assert threading.active_count() == 1
    gc.freeze()  # a collection in a child would touch, and copy, every page it shares
    return killer.at_random(kills, seed) if mode == "random" else killer.at_every_step(stride)


class Killer:
    """Starts, kills and finishes children."""

    def __init__(self, line: list[str], folder: Path) -> None:
        self.line, self.folder = line, folder

    def at_random(self, kills: int, seed: int) -> dict[str, Any]:
        """Kill at moments chosen relative to what the victim has committed; a finished cache starts another."""
        rng = random.Random(seed)
        reference = self.folder / "reference"
        started = time.perf_counter()
        child = self.start(self.line_for(reference))
        first = self.wait_for(child, reference, 1) - started
        assert os.waitpid(child, 0)[1] == 0
        num_shards = commits(reference)
        pace = (time.perf_counter() - started - first) / num_shards
        seen: list[int] = []
        rounds = 1
        while len(seen) < kills:
            cache = self.folder / f"killed-{rounds - 1}"
            ahead = rng.choice([0, 1, 1])
            child = self.start(self.line_for(cache))
            self.wait_for(child, cache, commits(cache) + ahead)
            time.sleep(rng.uniform(0, pace if ahead else first))
            if kill(child):
                seen.append(commits(cache))
            else:
                rounds += 1
        for number in range(rounds):
            self.finish(self.line_for(self.folder / f"killed-{number}"))
        return {"num_shards": num_shards, "rounds": rounds, "commits_at_kills": seen}

    def at_every_step(self, stride: int) -> dict[str, Any]:
        """Kill before the first step of a run, before the one `stride` later of another, and so on."""
        self.finish(self.line_for(self.folder / "reference"))
        number = 0
        while True:
            line = self.line_for(self.folder / f"killed-{number}")
            child = self.start(line, die_before=number * stride + 1)
            status = os.waitpid(child, 0)[1]
            if not os.WIFSIGNALED(status):
                assert status == 0
                return {"num_shards": commits(self.folder / "reference"), "kills": number}
            self.finish(line)
            number += 1

    def line_for(self, cache: Path) -> list[str]:
        return [*self.line, "--cache", str(cache)]

    def start(self, line: list[str], die_before: int = 0) -> int:
        child = os.fork()
        if child:
            return child
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        if die_before:
            die_before_step(die_before)
        status = 1
        try:
            status = run(line)
        finally:
            os._exit(status)

    def finish(self, line: list[str]) -> None:
        status = os.waitpid(self.start(line), 0)[1]
        assert status == 0, status

    def wait_for(self, child: int, cache: Path, num_commits: int) -> float:
        """When this many shards are committed, or the child has ended."""
        while commits(cache) < num_commits and not ended(child):
            time.sleep(0.0005)
        return time.perf_counter()


def commits(cache: Path) -> int:
    return len(list(cache.glob("shards/*.json")))


def ended(child: int) -> bool:
    """Whether a child has ended, without reaping it."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def kill(child: int) -> bool:
    """Kill a child; whether it was alive."""
    os.kill(child, signal.SIGKILL)  # of a zombie at worst: it is not reaped yet
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return os.WIFSIGNALED(status)


def die_before_step(number: int) -> None:
    """Make the number-th call of `SHARED_STEPS` from now kill this process instead."""
    count = 0

    def dying(step: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*args, **kwargs)

        return call

    for name in SHARED_STEPS:
        setattr(os, name, dying(getattr(os, name)))


if __name__ == "__main__":
    print(json.dumps(main(**json.loads(sys.argv[1]))))  # noqa: T201
