"""One run of scripts/bench_gpu.py: its deadline, its sizes, and its lines, each on disk as soon as it is known.

Owns how a line is measured, checked and written, and what it says where there is none: skipped, failed, not installed.
Measures nothing of the product itself, and must not import `logitcache`.
"""

from __future__ import annotations

import csv
import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_common import QUICK, SHAPES, PeakMemory, Shape, timed

WARM_UP_CALLS = 3
"""Before the timed ones: kernels are chosen, compiled and cached."""

HOST_BOUND = 0.9
"""Of a call's time by the card's events, that the host needs to launch it: from there on they show the host."""

LEAST_SECONDS = 30.0
"""Left of a run, for another measurement to begin: with the imports before it, the whole stays within its minutes."""

WRONG, FAILED, SKIPPED, ABSENT, RIGHT = "wrong", "failed", "skipped", "not installed", "right"
"""Verdicts; "" where a line is a measurement."""

COLUMNS = (
    *("section", "what", "shape", "device", "seconds", "seconds_min", "seconds_max", "ratio", "ratio_to"),
    *("peak_growth_mib", "value", "unit", "verdict", "remark"),
)


@dataclass(frozen=True)
class LossSize:
    """Of a loss: positions N, hidden size D, vocabulary V."""

    num_positions: int
    hidden_size: int
    vocab_size: int

    def __str__(self) -> str:
        return f"N {self.num_positions} D {self.hidden_size} V {self.vocab_size}"


@dataclass(frozen=True)
class Sizes:
    """How large everything is: what a card is asked, or a taste of it."""

    checked: LossSize
    losses: tuple[LossSize, ...]
    slice_rows: tuple[int, ...]
    top_k_rows: tuple[int, ...]
    small: Shape
    large: Shape
    noise_tokens: int
    batch_size: int
    length: int
    loader_steps: int
    capture_samples: int
    repeats: int


FULL = Sizes(
    checked=LossSize(96, 896, 151_936),
    losses=(LossSize(8192, 3584, 152_064), LossSize(8192, 896, 151_936)),
    slice_rows=(1024, 1536, 2048, 3072, 4096),
    top_k_rows=(256, 1765),
    small=SHAPES["0.5b"][0],
    large=SHAPES["7b"][0],
    noise_tokens=512,
    batch_size=4,
    length=1024,
    loader_steps=20,
    capture_samples=2048,
    repeats=8,
)
TINY = Sizes(
    checked=LossSize(24, 32, 1003),
    losses=(LossSize(64, 32, 1003),),
    slice_rows=(16, 48),
    top_k_rows=(8,),
    small=QUICK[0],
    large=QUICK[0],
    noise_tokens=32,
    batch_size=2,
    length=16,
    loader_steps=3,
    capture_samples=8,
    repeats=2,
)


def is_simulated() -> bool:
    """Whether the device that torch shows as CUDA is none: this torch was built without CUDA."""
    return torch.version.cuda is None and torch.version.hip is None


def free_gib() -> float:
    """Memory of the card that nobody holds."""
    gc.collect()
    torch.cuda.empty_cache()
    return float(torch.cuda.mem_get_info()[0]) / 2**30


def said(error: BaseException) -> str:
    """An error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def launched_and_done(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds until the host has launched a call, and those that it took by the card's events."""
    launched = 0.0

    def launch() -> None:
        nonlocal launched
        began = time.perf_counter()
        work()
        launched = time.perf_counter() - began

    done = timed(launch, "cuda")
    return launched, done


@dataclass
class Run:
    """deadline: of `time.monotonic`; about: the same for every line; path: None writes nothing."""

    sizes: Sizes
    seed: int
    deadline: float
    about: dict[str, str]
    path: Path | None
    section: str = ""
    lines: list[dict[str, str]] = field(default_factory=list)
    _seconds: dict[tuple[str, str, str], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerow([*COLUMNS, *self.about])

    def seconds_left(self) -> float:
        """Until the deadline."""
        return self.deadline - time.monotonic()

    def say(self, what: str, shape: object = "", **cells: Any) -> None:
        """A line, written and printed. cells: of `COLUMNS`; numbers are shortened."""
        texts = {name: f"{cell:.5g}" if isinstance(cell, float) else str(cell) for name, cell in cells.items()}
        device = "simulated" if is_simulated() else "cuda"
        line = dict.fromkeys(COLUMNS, "") | {"section": self.section, "what": what, "shape": str(shape)}
        line = line | {"device": device} | texts
        self.lines.append(line)
        if self.path is not None:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerow([*line.values(), *self.about.values()])
        print("  ".join(cell for cell in line.values() if cell), flush=True)

    def measure(
        self, what: str, shape: object, work: Callable[[], object], against: str = "", remark: str = ""
    ) -> float | None:
        """Median seconds of a call by the card's events, after calls that do not count; None where there are none.

        against: another measurement of this section and shape, for the ratio. Memory is the peak over what is held
        before. remark: beside what the line itself has to say, that the host was too slow for the card.
        """
        if self.seconds_left() < LEAST_SECONDS:
            self.say(what, shape, verdict=SKIPPED, remark="no time is left")
            return None
        try:
            for _ in range(WARM_UP_CALLS):
                work()
            torch.cuda.synchronize()
            with PeakMemory("cuda") as peak:
                found = [launched_and_done(work) for _ in range(self.sizes.repeats)]
        except Exception as error:  # of a peer, of memory, of a compiler: the next measurement is made all the same
            self.say(what, shape, verdict=FAILED, remark=said(error))
            return None
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        seconds = [done for _, done in found]
        is_host_bound = median(launched for launched, _ in found) >= HOST_BOUND * median(seconds)
        remarks = [remark, "bound by the host" if is_host_bound else ""]
        cells = {"peak_growth_mib": float(peak.growth), "remark": "; ".join(filter(None, remarks))}
        self.time(what, shape, seconds, against, **cells)
        return median(seconds)

    def time(self, what: str, shape: object, found: list[float], against: str = "", **cells: Any) -> None:
        """A line of seconds that were measured; against: as of `measure`."""
        self._seconds[self.section, str(shape), what] = middle = median(found)
        base = self._seconds.get((self.section, str(shape), against))
        ratio = {} if base is None else {"ratio": middle / base, "ratio_to": against}
        self.say(what, shape, seconds=middle, seconds_min=min(found), seconds_max=max(found), **ratio, **cells)

    def check(self, what: str, shape: object, error: float, allowed: float, unit: str) -> None:
        """A line of correctness: an error, which must be a number and not above what is allowed."""
        is_right = math.isfinite(error) and error <= allowed
        verdict = RIGHT if is_right else WRONG
        self.say(what, shape, value=error, unit=unit, verdict=verdict, remark=f"at most {allowed:.3g}")

    def num_wrong(self) -> int:
        """Lines that were checked and are wrong, or of a check that could not be made."""
        return sum(line["verdict"] == WRONG for line in self.lines)
