"""CPU seconds of `verify` and of a first miss, on very many very short samples.

Owns the measurements behind docs/benchmarks/verify.csv. A cache of samples of 4 tokens is written to a folder for
temporary files, from some rows of the synthetic teacher over and over in other orders; what is timed runs in a process
of its own, on one core, files in the page cache. What it is held against in the same run: the samples of one shard
read one by one, as by a reader that asks for each alone, which decodes the same blocks again and again; and opening.

    python scripts/bench_verify.py            a million samples in both stores, about 3 minutes
    python scripts/bench_verify.py --quick    a taste, which writes nothing
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bench_common import BENCHMARKS, provenance, read_csv, run_child, set_up, write_csv
from bench_storage import manifest
from synthetic_teacher import VOCABULARY_SIZE, rows, samples

from logitcache.storage import CacheWriter, LogitCache, SampleNotCached, sample_id, verify
from logitcache.storage.encoding import SampleTable, encode
from logitcache.storage.records import concatenate

DEFAULT_OUT = BENCHMARKS / "verify.csv"
POSITIONS, TOP_K, MADE_ROWS, SHARD_POSITIONS = 3, 64, 3072, 32_768
PROBED = 50
"""Samples that are read one by one."""


def write(path: str, store: str, num_samples: int) -> None:
    """A cache of so many samples of `POSITIONS` + 1 tokens."""
    made = rows(MADE_ROWS, TOP_K, seed=0)
    settings = manifest(store, "fine", TOP_K)
    columns = encode(concatenate([s.logprobs for s in samples(made, POSITIONS)]), settings.capture)
    rng = np.random.default_rng(0)
    a_shard = SHARD_POSITIONS // POSITIONS
    os.fsync = lambda _: None  # in this process, which measures nothing: the cache is for a minute
    with CacheWriter(path, settings) as writer:
        for start in range(0, num_samples, a_shard):
            count = min(a_shard, num_samples - start)
            at = rng.integers(MADE_ROWS, size=count * POSITIONS)
            first = rng.integers(VOCABULARY_SIZE, size=(count, 1), dtype=np.uint32)
            tokens = np.concatenate([first, made.label_ids[at].reshape(count, POSITIONS)], axis=1)
            table = SampleTable(
                sample_ids=np.frombuffer(b"".join(map(sample_id, tokens)), np.uint8).reshape(-1, 16),
                num_tokens=np.full(count, POSITIONS + 1, "<u4"),
                num_positions=np.full(count, POSITIONS, "<u4"),
                num_tokens_cut=np.zeros(count, "<u4"),
                token_ids=tokens.reshape(-1),
                positions=np.tile(np.arange(POSITIONS, dtype="<i4"), count),
            )
            writer.commit_columns(table, {name: column[at] for name, column in columns.items()}, float(len(at)))
        writer.finalize()


def cpu_seconds(call: Callable[[], object]) -> float:
    """Of this process, all its threads."""
    began = time.process_time()
    call()
    return time.process_time() - began


def measure(job: dict[str, Any]) -> dict[str, float]:
    """All of one store, in this process."""
    set_up(1)
    if job["method"] == "verify":
        problems: list[object] = []
        took = cpu_seconds(lambda: problems.extend(verify(job["path"]).problems))
        if problems:
            raise RuntimeError(f"expected an intact cache, found {problems[0]}")
        return {"verify": took}
    if job["method"] == "miss":
        opened = cpu_seconds(lambda: LogitCache.open(job["path"]))
        cache, absent = LogitCache.open(job["path"]), np.full(4, VOCABULARY_SIZE, np.uint32)
        return {
            "open": opened,
            "first_miss": cpu_seconds(lambda: miss(cache, absent)),
            "next_miss": cpu_seconds(lambda: miss(cache, absent)),
        }
    cache = LogitCache.open(job["path"])
    some = np.random.default_rng(0).permutation(len(cache))[:PROBED].tolist()
    cache.sample(some[0])
    return {"one_by_one": cpu_seconds(lambda: [cache.sample(i) for i in some]) / PROBED * len(cache)}


def miss(cache: LogitCache, tokens: np.ndarray) -> None:
    """Ask for what is not there."""
    try:
        cache.lookup(tokens)
    except SampleNotCached:
        return
    raise RuntimeError("expected a miss, found a sample")


def main() -> None:
    """Measure, print, and write the CSV."""
    parser = argparse.ArgumentParser(description="CPU seconds of verify and of a first miss.")
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--stores", nargs="+", default=["zarr", "arrow"], choices=["zarr", "arrow"])
    parser.add_argument("--quick", action="store_true", help="20,000 samples; nothing is written")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(measure(args.job)))
        return
    about = provenance(__file__, "cpu", ["numpy", "pcodec", "pyarrow", "logitcache"])
    num_samples = 20_000 if args.quick else args.samples
    lines = []
    for store in args.stores:
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "cache")
            write(path, store, num_samples)
            found: dict[str, float] = {}
            for method in ("verify", "miss", "one_by_one"):
                said = run_child(__file__, {"method": method, "path": path}, 1)
                if said is None:
                    raise RuntimeError(f"{method} ran out of memory")
                found |= said
        shown = {f"{name}_cpu_seconds": f"{value:.3g}" for name, value in found.items()}
        shown["one_by_one_against_verify"] = f"{found['one_by_one'] / found['verify']:.3g}"
        line = {"store": store, "num_samples": str(num_samples), "tokens_a_sample": str(POSITIONS + 1)}
        lines.append({**line, "top_k": str(TOP_K), **shown, **about})
        print(store, shown, flush=True)
    if not args.quick:
        others = [line for line in read_csv(args.out) if line["store"] not in args.stores]
        write_csv([*others, *lines], args.out)


if __name__ == "__main__":
    main()
