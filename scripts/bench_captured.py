"""Memory and seconds of the index by which a precompute job knows what a cache holds, on simulated samples.

Owns the measurements behind docs/benchmarks/captured.csv. N stored samples with random ids come in as a run's shards
do, a block of rows at a time through `Captured.add_rows`; each N in a fresh process. peak_growth is what the process
had at most over what it had before, while it was built; held what is left when it is. Then windows of samples are asked
for, all of them stored (each with its 1,024 positions hashed) and all of them new. No shard is read: a job that goes on
reads the sample tables of all shards before, which is not in here. `add` is the same for whole tables, hashing
included. Likewise `index`: what `finalize` holds, the sample tables without their tokens and the index made of them.

    python scripts/bench_captured.py            1, 10 and 100 million samples; 6 GB, or 20
    python scripts/bench_captured.py --quick    a taste, which writes nothing
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from bench_common import BENCHMARKS, MIB, PeakMemory, out_of, provenance, resident_mib, run_child, set_up, write_csv

from logitcache.storage.captured_index import DTYPE, Captured, fingerprint64
from logitcache.storage.encoding import SampleTable
from logitcache.storage.index import DTYPE as INDEX_DTYPE
from logitcache.storage.index import SampleIndex, index_file

DEFAULT_OUT = BENCHMARKS / "captured.csv"
SIZES = (1_000_000, 10_000_000, 100_000_000)
WINDOW, POSITIONS, TABLES = 16_384, 1_024, 64
INDEX_BYTES_A_SAMPLE = 200
"""What `finalised` needs at most: without it free, a size goes without."""

POSITIONS_OF_ALL = np.arange(POSITIONS, dtype=np.int32)


def blocks(num_samples: int, block: int, known: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Rows of random samples, `block` at a time; those in `known` among them, evenly spread."""
    places = np.linspace(0, num_samples - 1, len(known)).astype(np.int64)
    for shard, start in enumerate(range(0, num_samples, block)):
        rows = np.zeros(min(block, num_samples - start), dtype=DTYPE)
        rows["key"], rows["fingerprint"] = rng.integers(2**64, size=(2, len(rows)), dtype=np.uint64)
        first, last = np.searchsorted(places, [start, start + len(rows)])
        rows[places[first:last] - start] = known[first:last]
        rows["shard"], rows["row"] = shard, np.arange(len(rows))
        yield rows


def sample_ids(num: int, rng: np.random.Generator) -> list[bytes]:
    """As many random ids."""
    return [row.tobytes() for row in rng.integers(2**64, size=(num, 2), dtype=np.uint64)]


def never(unit: str) -> SampleTable:
    """No shard is to be read."""
    raise ValueError(f"shard {unit} was read")


def child(job: dict[str, Any]) -> dict[str, float]:
    """One size: seconds, memory and the windows."""
    set_up(1)
    rng = np.random.default_rng(job["seed"])
    stored, new = (sample_ids(min(WINDOW, job["num_samples"]), rng) for _ in range(2))
    known = np.zeros(len(stored), dtype=DTYPE)
    known["key"] = np.frombuffer(b"".join(stored), dtype="<u8")[::2]
    known["fingerprint"] = [fingerprint64(key, POSITIONS_OF_ALL) for key in stored]
    captured, seconds = Captured(never), 0.0
    with PeakMemory("cpu") as memory:
        for rows in blocks(job["num_samples"], job["block"], known, rng):
            start = time.perf_counter()
            captured.add_rows(rows)
            seconds += time.perf_counter() - start
    held = resident_mib() - memory.before
    if len(captured) != job["num_samples"]:
        raise ValueError(f"expected {job['num_samples']} samples, found {len(captured)}")
    return {
        "build_seconds": seconds,
        "peak_growth_mib": memory.growth,
        "held_mib": held,
        "seconds_all_stored": asked(captured, stored, 0, job["repeats"]),
        "seconds_all_new": asked(captured, new, POSITIONS, job["repeats"]),
        "add_us_a_sample": add_seconds(rng, job["block"]) * 1e6,
    }


def asked(captured: Captured, keys: list[bytes], expected: int, repeats: int) -> float:
    """Median seconds of a window of which so many positions a sample are missing."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        missing = captured.missing(keys, [POSITIONS_OF_ALL] * len(keys))
        found.append(time.perf_counter() - start)
        if any(len(positions) != expected for positions in missing):
            raise ValueError(f"expected {expected} positions of every sample to be missing, found others")
    return median(found)


def add_seconds(rng: np.random.Generator, block: int) -> float:
    """Seconds a sample of `Captured.add` of whole tables, their positions hashed; without reading them."""
    tables = [
        SampleTable(
            sample_ids=rng.integers(256, size=(block, 16), dtype=np.uint8),
            num_tokens=np.full(block, POSITIONS + 1, dtype=np.uint32),
            num_positions=np.full(block, POSITIONS, dtype=np.uint32),
            num_tokens_cut=np.zeros(block, dtype=np.uint32),
            token_ids=np.zeros(0, dtype=np.uint32),
            positions=np.tile(POSITIONS_OF_ALL, block),
        )
        for _ in range(TABLES)
    ]
    captured = Captured(never)
    start = time.perf_counter()
    for number, table in enumerate(tables):
        captured.add(str(number), table)
    return (time.perf_counter() - start) / len(captured)


def finalised(job: dict[str, Any]) -> dict[str, float]:
    """What `finalize` holds: the tables of all shards without tokens, then their index; and what opening it takes."""
    set_up(1)
    rng, block = np.random.default_rng(job["seed"]), job["block"]
    nothing = {"token_ids": np.zeros(0, dtype=np.uint32), "positions": np.zeros(0, dtype=np.int32)}

    def table() -> SampleTable:
        counts = {name: np.full(block, POSITIONS, dtype=np.uint32) for name in ("num_tokens", "num_positions")}
        cut = np.zeros(block, dtype=np.uint32)
        return SampleTable(rng.integers(256, size=(block, 16), dtype=np.uint8), **counts, num_tokens_cut=cut, **nothing)

    num_shards = -(-job["num_samples"] // block)
    with PeakMemory("cpu") as tables_memory:
        tables = [table() for _ in range(num_shards)]
    with PeakMemory("cpu") as index_memory:
        start = time.perf_counter()
        _, data = index_file(tables)
        seconds = time.perf_counter() - start
    del tables
    rows = np.frombuffer(data, dtype=INDEX_DTYPE, offset=len(data) - num_shards * block * INDEX_DTYPE.itemsize)
    with PeakMemory("cpu") as open_memory:
        start = time.perf_counter()
        index = SampleIndex(rows, num_shards)
        open_seconds = time.perf_counter() - start
    return {
        "num_samples": float(len(index)),
        "tables_mib": tables_memory.growth,
        "index_growth_mib": index_memory.growth,
        "index_seconds": seconds,
        "open_growth_mib": len(data) / MIB + open_memory.growth,
        "open_seconds": open_seconds,
    }


def available_bytes() -> int:
    """Memory that is free, so that nobody else is killed for a measurement."""
    return int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="stored samples")
    parser.add_argument("--block", type=int, default=64, help="samples a shard: 65,536 positions of 1,024 a sample")
    parser.add_argument("--repeats", type=int, default=5, help="windows of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="100,000 samples; nothing is written")
    parser.add_argument("--out", type=Path, help="default: docs/benchmarks/captured.csv")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps((finalised if args.job["method"] == "index" else child)(args.job)))
        return
    out = out_of(parser, args, DEFAULT_OUT, taste=args.quick)
    about = provenance(__file__, "cpu", ["numpy", "logitcache"])
    rows = []
    for num_samples in (100_000,) if args.quick else args.sizes:
        job = {"num_samples": num_samples, "block": args.block, "repeats": args.repeats, "seed": args.seed}
        found = run_child(__file__, job | {"method": "captured"}, 1)
        if found is None:
            sys.exit(
                f"{num_samples:,} samples: not enough memory. Nothing was written. Use smaller --sizes, with --out."
            )
        found["peak_bytes_a_sample"] = found["peak_growth_mib"] * MIB / num_samples
        indexed = None
        if available_bytes() > INDEX_BYTES_A_SAMPLE * num_samples:
            indexed = run_child(__file__, job | {"method": "index"}, 1)
        if indexed is not None:
            made = indexed.pop("num_samples")
            found |= indexed | {
                "index_bytes_a_sample": (indexed["tables_mib"] + indexed["index_growth_mib"]) * MIB / made,
                "open_bytes_a_sample": indexed["open_growth_mib"] * MIB / made,
            }
        shown = {name: f"{value:.4g}" for name, value in found.items()}
        print(f"{num_samples:,} samples: {shown}", flush=True)
        rows.append({"num_samples": str(num_samples), "block": str(args.block), **shown, **about})
    if out:
        every = max(rows, key=len)
        write_csv([dict.fromkeys(every, "") | row for row in rows], out)


if __name__ == "__main__":
    main()
