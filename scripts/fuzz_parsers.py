"""100,000 inputs that nobody should trust, for every parser of what others wrote: one sentence, or a right value.

Owns the counts and the table; the parsers and the inputs are in tests/support/fuzz_parsers.py and fuzz_inputs.py, of
which tests/house/test_fuzz.py runs a sample. Memory is what a parser takes above what the process held, for every large
input; CPU is the process's own, whatever else runs.

    python scripts/fuzz_parsers.py            writes docs/benchmarks/fuzz.csv; 10 minutes on one core
    python scripts/fuzz_parsers.py --quick    a taste, which writes nothing
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.fuzz_parsers import Tally, parsers, run  # noqa: E402

DEFAULT_OUT = ROOT / "docs" / "benchmarks" / "fuzz.csv"
INPUTS = 101_600
MOST_MB = 256
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
COLUMNS = ("parser", "inputs", "refused", "right_value", "tracebacks", "hangs", "peak_mb", "slowest_cpu_s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a hundredth of it, nothing is written")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--only", default="", help="parsers whose name contains this; nothing is written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    tallies = fuzz(INPUTS // 100 if args.quick else INPUTS, args.seed, args.jobs, args.only)
    if not (args.quick or args.only):
        save(args.out, tallies)
        print(f"{args.out} written")
    return int(any(t.tracebacks or t.hangs or t.peak_mb > MOST_MB for t in tallies))


def fuzz(count: int, seed: int, jobs: int, only: str = "") -> list[Tally]:
    """At least so many inputs in all, divided among the parsers by their shares, each parser in one process."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        shares = {parser.name: parser.share for parser in parsers(Path(folder))}
    total, tallies = sum(shares.values()), []
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        asked = {n: pool.submit(of_name, n, 1 + int(count * s / total), seed) for n, s in shares.items() if only in n}
        for name, done in asked.items():
            try:
                tallies.append(done.result())
            except BrokenProcessPool:  # of what is C++: it ended without a word
                tallies.append(Tally(name, tracebacks=1, examples=["the process ended"]))
            show(tallies[-1])
    return tallies


def of_name(name: str, count: int, seed: int) -> Tally:
    """The inputs of one parser, with files of its own."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        (parser,) = (parser for parser in parsers(Path(folder)) if parser.name == name)
        return run(parser, count, seed)


def show(tally: Tally) -> None:
    print(
        f"{tally.parser:24} {tally.inputs:6} inputs {tally.refused:6} refused {tally.right_value:6} right values "
        f"{tally.tracebacks:3} tracebacks {tally.hangs:2} hangs {tally.peak_mb:5.0f} MB {tally.slowest_cpu_s:5.2f} s",
        flush=True,
    )
    for example in list(dict.fromkeys(tally.examples))[:8]:
        print(f"    {example[:900]}", flush=True)


def save(path: Path, tallies: list[Tally]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        for t in tallies:
            counts = (t.inputs, t.refused, t.right_value, t.tracebacks, t.hangs)
            table.writerow([t.parser, *counts, f"{t.peak_mb:.0f}", f"{t.slowest_cpu_s:.2f}"])


if __name__ == "__main__":
    sys.exit(main())
