"""What the scripts that measure share: models, memory, seconds, a process of its own, and the CSVs of docs/benchmarks.

Owns where results go, what every row says of its machine, versions and commit, and the random models. Measures nothing
itself, and must not import `logitcache`: scripts that measure others do not load it.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "docs" / "benchmarks"
MIB = 2**20
LOGIT_STD = 4.0
OUT_OF_MEMORY = ("OutOfMemory", "not enough memory", "can't allocate memory", "bad_alloc")
"""What says so: torch on a GPU, on a CPU of either kind, and C++."""
Line = dict[str, str]
"""A row of a CSV."""


def demo_base() -> Any:
    """The demo's embedded base, for `as_file`."""
    return files("logitcache.demo").joinpath("base")


# Models


@dataclass(frozen=True)
class Shape:
    """A random model: its configuration in transformers. `demo` stands for the demo's own base instead."""

    name: str
    kind: str = "llama"
    vocab_size: int = 151_936
    hidden_size: int = 512
    intermediate_size: int = 2816
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    tie_word_embeddings: bool = False


DEMO = Shape("demo")
SHAPES = {
    "cpu": [DEMO, Shape("random, V = 151,936")],
    "7b": [Shape("random, as Qwen2.5-7B", "qwen2", 152_064, 3584, 18_944, 28, 28, 4)],
    "0.5b": [Shape("random, as Qwen2.5-0.5B", "qwen2", 151_936, 896, 4864, 24, 14, 2, True)],
}
QUICK = [replace(SHAPES["cpu"][1], name="random, tiny", vocab_size=2000, hidden_size=64, num_hidden_layers=2)]


@torch.no_grad()
def random_model(shape: Shape, length: int, seed: int, device: str, dtype: torch.dtype) -> Any:
    """Random weights, the head scaled so that logits have a standard deviation of 4, not of nearly 0."""
    from transformers import AutoConfig, AutoModelForCausalLM  # which most children do without

    values = {name: value for name, value in asdict(shape).items() if name not in ("name", "kind")}
    config = AutoConfig.for_model(shape.kind, **values, max_position_embeddings=length, use_cache=False)
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    head = model.get_output_embeddings().weight
    head.mul_(LOGIT_STD / (config.initializer_range * shape.hidden_size**0.5))
    return model


def make_model(shape: Shape, folder: Path, job: dict[str, Any]) -> None:
    """`random_model`, in a folder."""
    model = random_model(shape, job["length"], job["seed"], job["device"], getattr(torch, job["dtype"]))
    model.save_pretrained(folder)


# Memory and seconds


class PeakMemory:
    """MiB by which memory grew at its peak within `with`: of the allocator on a GPU; else of the resident set, by the
    kernel's high-water mark where it can be reset, or looked at every millisecond."""

    def __init__(self, device: str) -> None:
        self.cuda, self.before, self.growth = device == "cuda", 0.0, 0.0

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / MIB
            return self
        if hasattr(ctypes.CDLL(None), "malloc_trim"):
            ctypes.CDLL(None).malloc_trim(0)  # so that what was freed before does not serve unseen
        self.before = self.peak = resident_mib()
        self.marked = reset_high_water_mark()
        self.ended = threading.Event()
        if not self.marked:
            threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.cuda:
            self.growth = torch.cuda.max_memory_allocated() / MIB - self.before
            return
        self.ended.set()
        self.growth = (high_water_mark_mib() if self.marked else self.peak) - self.before

    def _look(self) -> None:
        while not self.ended.wait(0.001):
            self.peak = max(self.peak, resident_mib())


def resident_mib() -> float:
    """Memory of this process that is in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB


def high_water_mark_mib() -> float:
    """The most it has been since the mark was reset, or the process began."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def reset_high_water_mark() -> bool:
    """Whether the mark could be reset to what is resident now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return high_water_mark_mib() - resident_mib() < 4
    except (OSError, IndexError):
        return False


def timed(function: Callable[[], object], device: str) -> float:
    """Seconds, by the GPU's own events on a GPU."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1000
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


# A process of its own


def set_up(threads: int) -> None:
    """This process on so many cores and threads."""
    torch.set_num_threads(threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[-threads:]))


class ChildFailed(RuntimeError):
    """A process of a script ended without an answer; said: why, on one line. The message has all that it printed."""

    def __init__(self, method: str, said: str, stderr: str) -> None:
        super().__init__(f"{method} in a process of its own: {said}\n{stderr}")
        self.said = said


def ran_out(text: str) -> bool:
    """Whether an error speaks of memory that could not be had."""
    return any(words in text for words in OUT_OF_MEMORY)


def run_child(
    script: str,
    job: dict[str, Any],
    threads: int,
    python: str | Path = sys.executable,
    longest: float | None = None,
) -> dict[str, Any] | None:
    """What a fresh process of the script prints last, as JSON; None where memory ran out in it. longest: seconds after
    which it is ended. `ChildFailed` where it gives no answer."""
    line = [str(python), script, "--job", json.dumps(job)]
    environment = {"CUDA_VISIBLE_DEVICES": "0"} | os.environ | {"OMP_NUM_THREADS": str(threads)}
    method = str(job.get("method"))
    try:
        done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=longest)
    except subprocess.TimeoutExpired as error:
        printed = (error.stderr or b"").decode(errors="replace")  # bytes, even where text was asked for
        raise ChildFailed(method, f"no answer in {error.timeout:.0f} s", printed) from error
    if done.returncode and (done.returncode == -9 or ran_out(done.stderr)):
        return None
    last = (done.stderr.strip().splitlines() or [""])[-1]
    if done.returncode:
        raise ChildFailed(method, f"ended with {done.returncode}: {last}", done.stderr)
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise ChildFailed(method, f"ended without an answer: {last}", done.stderr) from error
    return found


def provenance(script: str, device: str, packages: Sequence[str]) -> dict[str, str]:
    """Machine, versions, commit and command line, the same for every row."""
    machine = platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        machine = f"{found[1].strip() if found else machine}, {os.cpu_count()} cores"
    if device == "cuda":
        machine = f"{torch.cuda.get_device_name()}; {machine}"
    versions = [f"python {platform.python_version()}", *(version_of(package) for package in packages)]
    changed = " with changes" if git("status", "--short") else ""
    return {
        "machine": machine,
        "versions": ", ".join(versions),
        "commit": (git("rev-parse", "--short", "HEAD") or "unknown") + changed,
        "command": shlex.join(["python", f"scripts/{Path(script).name}", *sys.argv[1:]]),
    }


def version_of(package: str) -> str:
    """Its name and version; on a path alone, without having been installed, it has none."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} not installed"


def git(*arguments: str) -> str:
    """What git says of the checkout; nothing where there is no git, or no checkout."""
    try:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


# CSVs


def out_of(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    default: Path,
    free: Sequence[str] = (),
    taste: bool = False,
) -> Path | None:
    """Where a script writes: --out, or the committed table; nowhere, None, for a taste of it. That table is of the
    options as they are by default: one that was turned, and is not among the `free`, which change nothing that the
    table is of, wants --out, or a part would be written over the whole."""
    if taste:
        if args.out is not None:
            parser.error(f"expected no --out for a taste, which writes nothing, found {args.out}")
        return None
    if args.out is not None:
        return Path(args.out)

    def as_given(value: object) -> object:
        return list(value) if isinstance(value, tuple) else value

    by_default = {name: as_given(parser.get_default(name)) for name in vars(args)}
    turned = [name for name, value in vars(args).items() if name not in free and as_given(value) != by_default[name]]
    if turned:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in turned)
        parser.error(f"expected --out beside {options}: {default} is of the defaults, and would be written over")
    return default


def check_models(parser: argparse.ArgumentParser, out: Path, models: Collection[str]) -> None:
    """End the script where the table that is there has models that it would be written without."""
    lost = {row["model"] for row in read_csv(out)} - set(models)
    if lost:
        parser.error(f"expected --model for {', '.join(sorted(lost))} or another --out: {out} would lose their rows")


def read_csv(path: Path) -> list[Line]:
    """The lines of a CSV, none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One line a measurement; all of them, or the file stays as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.new")
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    unfinished.replace(path)
