"""What a shard costs in bytes, files and requests by its size, and what 100 B tokens come to: numbers of scaling.md.

Owns docs/benchmarks/scaling.csv. Nothing in it is a time: shards of the synthetic teacher (k = 64, fine, samples of
1,024 positions, a few rows again and again in other orders) are committed to fsspec's memory:// as to an object store,
and every request that reaches it is counted by its kind, one read of one span each, as s3fs sends them. `resume` is
what a second writer asks for, a shard, before it can finalise or go on. The totals are multiplied, not measured.

    python scripts/table_scaling.py
    python scripts/table_scaling.py --shard-positions 32768 --rows 1024      less of it
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import fsspec
import numpy as np
from bench_common import BENCHMARKS, out_of, provenance, write_csv
from bench_storage import TABLE_FILES, manifest
from fsspec.implementations.memory import MemoryFileSystem
from synthetic_teacher import rows, samples

from logitcache.storage import CachedSample, CacheWriter, files
from logitcache.storage.index import DTYPE
from logitcache.storage.layout import commit_path, index_name
from logitcache.storage.manifest import MAX_JSON_BYTES, Contents, ShardEntry, StoredFile, to_bytes

DEFAULT_OUT = BENCHMARKS / "scaling.csv"
TOTAL_TOKENS, SAMPLE_POSITIONS, TOP_K = 100_000_000_000, 1024, 64
KINDS = {"pipe_file": "put", "cat_file": "get", "isfile": "head", "exists": "head", "ls": "list", "find": "list"}


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Requests to memory:// by kind; what one of them calls to do its work is not another."""
    found: Counter[str] = Counter()
    inside: list[str] = []

    def counting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            found[KINDS[name]] += not inside
            inside.append(name)
            try:
                return method(*args, **kwargs)
            finally:
                inside.pop()

        return call

    patches: list[Any] = [patch.object(MemoryFileSystem, n, counting(n, getattr(MemoryFileSystem, n))) for n in KINDS]
    patches.append(patch.object(files, "OBJECT_STORES", files.OBJECT_STORES | {"memory"}))  # which have no folders
    for each in patches:
        each.start()
    try:
        yield found
    finally:
        for each in patches:
            each.stop()


def tiled(made: list[CachedSample], num: int) -> list[CachedSample]:
    """So many samples, each of the rows of one of these in an order of its own, and so with tokens of its own."""
    found, rng = [], np.random.default_rng(0)
    for number in range(num):
        sample = made[number % len(made)]
        order = rng.permutation(len(sample.logprobs))
        tokens = np.concatenate([sample.token_ids[:1], sample.logprobs.label_ids[order]])
        record = replace(sample.logprobs.take(order), positions=sample.logprobs.positions)
        found.append(replace(sample, token_ids=tokens, logprobs=record))
    return found


def entry_bytes() -> float:
    """Of contents.json, by shard."""

    def size(num: int) -> int:
        entry, index = ShardEntry("0" * 32, "0" * 32), StoredFile(index_name("0" * 32), 2**32, "0" * 32)
        return len(to_bytes(Contents("0" * 32, 2**27, index, (entry,) * num, ())))

    return (size(1001) - size(1)) / 1000


def shard(store: str, positions: int, made: list[CachedSample]) -> dict[str, float]:
    """Bytes, files and requests of one shard, and of the same writer's finalisation and a second one's."""
    root = f"memory://scaling-{store}-{positions}"
    settings = manifest(store, "fine", TOP_K)
    whole = tiled(made, positions // SAMPLE_POSITIONS)
    with CacheWriter(root, settings) as writer:
        with counted() as committing:
            commit = writer.commit(whole)
        writer.finalize()
    with CacheWriter(root, settings) as second, counted() as resuming:
        second.captured()
    fs = fsspec.filesystem("memory")
    record = fs.cat_file(f"{root}/{commit_path(commit.unit)}")
    if commit.num_positions != positions:
        raise ValueError(f"expected a shard of {positions} positions, found {commit.num_positions}")
    table = sum(f.size for f in commit.files if f.name.split("/")[0] in TABLE_FILES)
    rows_alone = sum(f.size for f in commit.files) - table
    fs.rm(root, recursive=True)
    return {
        "files": len(commit.files),
        "row_bytes": rows_alone,
        "table_bytes": table,
        "commit_bytes": len(record),
        "bytes_a_position": (rows_alone + table + len(record)) / positions,
        "most_positions_a_commit": MAX_JSON_BYTES / len(record) * positions,
        **{f"commit_{kind}s": committing[kind] for kind in ("put", "get", "head", "list")},
        **{f"resume_{kind}s": resuming[kind] for kind in ("put", "get", "head", "list")},
    }


def totals(found: dict[str, float], positions: int, entry: float) -> dict[str, float]:
    """Of 100 B positions in samples of 1,024: multiplied."""
    num = TOTAL_TOKENS / positions
    return {
        "shards": num,
        "terabytes": found["bytes_a_position"] * TOTAL_TOKENS / 1e12,
        "objects": num * (found["files"] + 1),
        "contents_bytes": num * entry,
        "contents_over_limit": num * entry / MAX_JSON_BYTES,
        "index_gigabytes": TOTAL_TOKENS / SAMPLE_POSITIONS * DTYPE.itemsize / 1e9,
        "puts": num * found["commit_puts"],
        "gets_to_commit": num * found["commit_gets"],
        "gets_to_resume": num * found["resume_gets"],
        "gigabytes_to_resume": num * (found["table_bytes"] + found["commit_bytes"]) / 1e9,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096, help="of the synthetic teacher, tiled")
    parser.add_argument("--shard-positions", type=int, nargs="+", default=[32_768, 131_072, 1_048_576])
    parser.add_argument("--out", type=Path, help="default: docs/benchmarks/scaling.csv")
    args = parser.parse_args()
    out = out_of(parser, args, DEFAULT_OUT)
    about = provenance(__file__, "cpu", ["numpy", "zarr", "pcodec", "pyarrow", "fsspec", "logitcache"])
    made = samples(rows(args.rows, TOP_K, seed=0), SAMPLE_POSITIONS)
    entry = entry_bytes()
    print(f"{entry:.1f} bytes of contents.json a shard: at most {MAX_JSON_BYTES / entry:,.0f} shards")
    lines = []
    for store in ("zarr", "arrow"):
        for positions in args.shard_positions:
            found = shard(store, positions, made)
            found |= totals(found, positions, entry)
            shown = {name: f"{value:.4g}" if value % 1 else f"{value:.0f}" for name, value in found.items()}
            print(f"{store}, {positions:,} positions a shard: {shown}", flush=True)
            lines.append({"store": store, "shard_positions": str(positions), **shown, **about})
    write_csv(lines, out)


if __name__ == "__main__":
    main()
