"""What checksums of blocks cost beside reading them: crc32c, and what could stand in its place.

Owns the measurement behind docs/benchmarks/checksums.csv. A shard of the synthetic teacher is read through
`LogitCache`, sample by sample and in batches of 8, and every block that this reads is hashed once more by each
function, in the same process; what counts is the share of the seconds of reading, which include one crc32c. Hashes of
packages that are not installed are left out: none of them is a dependency (`pip install blake3 xxhash`).

    python scripts/bench_checksums.py            about a minute
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from bench_common import BENCHMARKS, provenance, set_up, write_csv
from bench_storage import BATCH, SAMPLE_TOKENS, manifest
from synthetic_teacher import rows, samples

from logitcache.storage import CachedSample, CacheWriter, LogitCache
from logitcache.storage.backend import ShardFiles

TOP_K, ROWS, REPEATS = 64, 16_384, 25

Hash = Callable[[bytes], object]


def hashes() -> dict[str, Hash]:
    """By name."""
    found: dict[str, Hash] = {
        "crc32c": google_crc32c.value,
        "sha1": lambda data: hashlib.sha1(data).digest(),
        "sha256": lambda data: hashlib.sha256(data).digest(),
        "blake2b-128": lambda data: hashlib.blake2b(data, digest_size=16).digest(),
    }
    if find_spec("xxhash"):
        found["xxh3-128"] = import_module("xxhash").xxh3_128_digest
    if find_spec("blake3"):
        blake3 = import_module("blake3").blake3
        found["blake3-128"] = lambda data: blake3(data).digest(length=16)
    return found


def seconds(call: Callable[[], object]) -> float:
    """CPU seconds, the least of several times."""
    times = []
    for _ in range(REPEATS):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return min(times)


def blocks_of(call: Callable[[], object]) -> list[bytes]:
    """Every block that a call reads."""
    seen: list[bytes] = []
    read = ShardFiles.blocks

    def spied(files: ShardFiles, *of: Any) -> list[bytes]:
        found = read(files, *of)
        seen.extend(found)
        return found

    ShardFiles.blocks = spied  # type: ignore[method-assign]
    try:
        call()
    finally:
        ShardFiles.blocks = read  # type: ignore[method-assign]
    return seen


def measure(store: str, folder: str, whole: list[CachedSample]) -> Iterator[dict[str, str]]:
    """A line for each way of reading."""
    with CacheWriter(folder, manifest(store, "fine", TOP_K)) as writer:
        writer.commit(whole)
        writer.finalize()
    cache = LogitCache.open(folder)
    asked = [whole[i].token_ids for i in np.random.default_rng(0).permutation(len(whole))]
    for batch in (1, BATCH):
        parts = [asked[i : i + batch] for i in range(0, len(asked), batch)]

        def read(parts: Sequence[Sequence[Any]] = parts) -> None:
            for part in parts:
                cache.lookup_batch(part)

        read()
        blocks, reading = blocks_of(read), seconds(read)
        line = {"store": store, "samples_a_read": str(batch), "blocks": str(len(blocks))}
        line |= {"bytes": str(sum(map(len, blocks))), "reading_seconds": f"{reading:.4g}"}
        for name, function in hashes().items():

            def every(function: Hash = function, blocks: Sequence[bytes] = blocks) -> None:
                for block in blocks:
                    function(block)

            line[f"{name}_percent"] = f"{100 * seconds(every) / reading:.2f}"
        yield line


def main() -> None:
    """Measure, print, and write the CSV."""
    parser = argparse.ArgumentParser(description="What checksums of blocks cost beside reading them.")
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "checksums.csv")
    args = parser.parse_args()
    set_up(1)
    installed = [name for name in ("blake3", "xxhash") if find_spec(name)]
    about = provenance(__file__, "cpu", ["numpy", "google-crc32c", *installed, "logitcache"])
    lines, whole = [], samples(rows(ROWS, TOP_K, seed=0), SAMPLE_TOKENS)
    for store in ("zarr", "arrow"):
        with tempfile.TemporaryDirectory() as folder:
            for line in measure(store, f"{folder}/cache", whole):
                print(line, flush=True)
                lines.append({**line, **about})
    write_csv(lines, args.out)


if __name__ == "__main__":
    main()
