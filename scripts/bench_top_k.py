"""Processor time of exact top-k in two stages against torch's own, of random logits on one thread.

Owns the measurements behind docs/benchmarks/top_k.csv. Rows are as many as capture works on together on a processor.
The two go round in turn, and what counts is the ratio of their medians; thread time, so that others on the machine
disturb little. `us_a_row` includes the order of equal values by id.

    python scripts/bench_top_k.py            a minute
    python scripts/bench_top_k.py --quick    a taste, which writes nothing
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_common import BENCHMARKS, provenance, write_csv

from logitcache.capture.records import CACHED_BYTES
from logitcache.capture.top_k import top_k

OUT = BENCHMARKS / "top_k.csv"
WIDTHS, KEPT = (4_096, 32_000, 49_152, 151_936, 262_144), (8, 64, 256)


def seconds(function: Callable[[], object]) -> float:
    """Of this thread, once."""
    started = time.thread_time()
    function()
    return time.thread_time() - started


def measured(width: int, k: int, repeats: int) -> dict[str, Any]:
    """Both ways on the same rows."""
    num_rows = max(1, CACHED_BYTES["cpu"] // (4 * width))
    logits = 4 * torch.randn(num_rows, width, generator=torch.Generator().manual_seed(0))
    assert torch.equal(top_k(logits, k)[0], logits.topk(k, dim=1).values)
    rounds = [(seconds(lambda: logits.topk(k, dim=1)), seconds(lambda: top_k(logits, k))) for _ in range(repeats)]
    torchs, ours = (median(times) / num_rows * 1e6 for times in zip(*rounds[1:], strict=True))
    found = {"vocabulary": width, "k": k, "rows": num_rows, "torch_us_a_row": round(torchs, 1)}
    return {**found, "us_a_row": round(ours, 1), "ratio": round(ours / torchs, 2)}


def main() -> None:
    """A line for each width and k."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repeats; writes nothing")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    about, lines = provenance(__file__, "cpu", ["torch", "logitcache"]), []
    for width in WIDTHS:
        for k in KEPT:
            lines.append({**measured(width, k, 4 if args.quick else 30), **about})
            print({name: value for name, value in lines[-1].items() if name not in about}, flush=True)
    if not args.quick:
        write_csv(lines, args.out)


if __name__ == "__main__":
    main()
