"""A program that runs workers of `logitcache precompute` in forked children. Prints a report in JSON.

    python job_processes.py '{"line": [...], "folder": "...", "kills": 8, "seed": 0}'

line: the arguments of precompute but for --cache and the worker's. Everything is imported once, before the forks and
without threads of torch, so that a child costs a tenth of a second. Below folder: `twins`, filled by two workers of the
same index at once and another; `crowd`, by all workers at once; `killed`, by workers that were killed and repeated;
`stopped`, by one that was asked to stop in the middle and then repeated.
"""

import gc
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

from logitcache.cli import main as program
from logitcache.cli import run
from logitcache.models.loading import find_model, load_base


def main(line: list[str], folder: str, kills: int, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # transformers' bars of loading would leave a thread
    workers = Workers(line, Path(folder))
    assert run([*workers.line, "--cache", str(workers.folder / "none"), "--plan"]) == 0  # imports now, not in a child
    load_base(find_model(line[line.index("--model") + 1]), "auto", torch.device("cpu"))  # so do transformers' tables
    assert threading.active_count() == 1
    gc.freeze()  # a collection in a child would touch, and copy, every page it shares
    return {
        "twins": workers.together("twins", [(0, 2), (0, 2), (1, 2)]),
        "crowd": workers.together("crowd", [(i, 5) for i in range(5)]),
        "killed": workers.killed("killed", 3, kills, random.Random(seed)),
        "stopped": workers.stopped("stopped"),
    }


class Workers:
    """Starts, kills and waits for children."""

    def __init__(self, line: list[str], folder: Path) -> None:
        self.line, self.folder = line, folder

    def together(self, name: str, shares: list[tuple[int, int]]) -> dict[str, Any]:
        """All at once; what each said, and their statuses."""
        children = [self.start(name, index, num, f"{place}") for place, (index, num) in enumerate(shares)]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        return {"statuses": statuses, "events": [self.events(name, f"{place}") for place in range(len(shares))]}

    def killed(self, name: str, num: int, kills: int, rng: random.Random) -> dict[str, Any]:
        """Kill a worker at a random moment, in turn, and then let all finish."""
        seen = []
        for number in range(kills):
            before = self.commits(name)
            child = self.start(name, number % num, num, f"kill-{number}")
            while self.commits(name) <= before and not ended(child):
                time.sleep(0.0005)
            time.sleep(rng.uniform(0, 0.03))
            os.kill(child, signal.SIGKILL)  # of a zombie at worst: it is not reaped yet
            seen.append((os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), self.commits(name)))
        final = self.together(name, [(i, num) for i in range(num)])
        return {"seen": seen, **final}

    def stopped(self, name: str) -> dict[str, Any]:
        """SIGTERM after two commits."""
        child = self.start(name, 0, 1, "stopped", ["--window-rows", "100000"])
        while self.commits(name) < 2 and not ended(child):
            time.sleep(0.0005)
        started = time.perf_counter()
        os.kill(child, signal.SIGTERM)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        seconds = time.perf_counter() - started
        record = json.loads(next((self.folder / name).glob("worker-0-of-1-*.json")).read_text(encoding="utf-8"))
        return {
            "status": status,
            "seconds": seconds,
            "commits": self.commits(name),
            "stderr": (self.folder / f"{name}-stopped.err").read_text(encoding="utf-8"),
            "record": record,
        }

    def start(self, name: str, index: int, num: int, said: str, more: list[str] | None = None) -> int:
        child = os.fork()
        if child:
            return child
        nowhere = os.open(os.devnull, os.O_WRONLY)
        stderr = os.open(self.folder / f"{name}-{said}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(nowhere, 1)
        os.dup2(stderr, 2)
        share = ["--shard-index", str(index), "--num-shards", str(num)]
        as_json, line = [] if more else ["--log-json"], list(self.line)
        if more:  # in place of what the line says of it: no flag may stand twice
            at = line.index(more[0])
            line[at : at + 2] = []
        status = 1
        try:
            program([*line, "--cache", str(self.folder / name), *share, *as_json, *(more or [])])
        except SystemExit as stop:
            status = int(stop.code or 0)
        finally:
            os._exit(status)

    def events(self, name: str, said: str) -> list[dict[str, Any]]:
        text = (self.folder / f"{name}-{said}.err").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def commits(self, name: str) -> int:
        return len(list((self.folder / name).glob("shards/*.json")))


def ended(child: int) -> bool:
    """Whether a child has ended, without reaping it."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


if __name__ == "__main__":
    print(json.dumps(main(**json.loads(sys.argv[1]))))  # noqa: T201
