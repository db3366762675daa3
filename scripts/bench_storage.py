"""Size and speed of this project's stores, beside two peers' layouts in the same run, on the synthetic teacher.

Owns the measurements behind docs/benchmarks/storage_size.csv and storage_speed.csv. One core, files in the page cache;
speeds are medians, and what counts are the ratios of one run. Tokens are supervised positions.

    python scripts/bench_storage.py            all of it, about 6 minutes
    python scripts/bench_storage.py size       only bytes a token
    python scripts/bench_storage.py speed      only speeds
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
from bench_common import BENCHMARKS, PeakMemory, timed, write_csv
from bench_size_peers import Top, axolotl, distillkit
from synthetic_teacher import VOCABULARY_SIZE, Rows, rows, samples

from logitcache.storage import CachedSample, CacheWriter, CaptureIdentity, LogitCache, Manifest, ModelIdentity
from logitcache.storage.encoding import PRECISIONS, SampleTable, encode, sample_table
from logitcache.storage.files import open_files
from logitcache.storage.identity import digest
from logitcache.storage.index import index_file
from logitcache.storage.layout import CONTENTS, MANIFEST
from logitcache.storage.manifest import TAIL_GROUPS, Contents, ShardEntry, to_bytes
from logitcache.storage.packing import pack_shard
from logitcache.storage.packing_process import PackingProcess
from logitcache.storage.records import concatenate, keep_mass

CORES = sorted(os.sched_getaffinity(0))[-2:]
"""The others have one of them."""

NUM_ROWS = 8192
SAMPLE_TOKENS = 512
BATCH = 8
SIZES = [(8, 0), (32, 0), (64, 0), (128, 0), (16, 64), (8, 64)]
"""Alternatives and tail groups."""


@dataclass(frozen=True)
class Speed:
    """One measurement; `against_axolotl`: how many times the speed of axolotl's rows in the same run."""

    what: str
    store: str
    value: float
    unit: str
    against_axolotl: float | None = None
    remark: str = ""


def manifest(store: str, precision: str, top_k: int, groups: Rows | None = None, min_mass: float = 1.0) -> Manifest:
    """A manifest of the synthetic teacher."""
    steps = PRECISIONS[precision]
    capture = CaptureIdentity(top_k, 4096, min_mass, precision, steps.max_error if steps else 0.0)
    features: tuple[str, ...] = ()
    if groups is not None:
        partition = digest(groups.token_groups.tobytes())
        num_groups = groups.tail_group_logprobs.shape[1]
        capture = replace(capture, num_tail_groups=num_groups, tail_partition=partition, group_steps_per_nat=1)
        features = (TAIL_GROUPS,)
    model = ModelIdentity("a" * 32, '{"model_type":"test"}', VOCABULARY_SIZE, "float32", "sdpa")
    return Manifest(store, model, None, capture, "synthetic teacher", {}, features)


def sizes(num_rows: int) -> Iterator[dict[str, str]]:
    """Bytes a token of every store and precision: of the record's columns, and of all files of the shard."""
    for top_k, num_groups in SIZES:
        made = rows(num_rows, top_k, seed=0, num_groups=num_groups)
        whole = samples(made, SAMPLE_TOKENS)
        for store in ("zarr", "arrow"):
            for precision in PRECISIONS:
                for min_mass in (1.0, 0.99) if not num_groups else (1.0,):
                    yield size_of(store, precision, min_mass, made, whole, top_k, num_groups)


def size_of(
    store: str, precision: str, min_mass: float, made: Rows, whole: list[CachedSample], top_k: int, num_groups: int
) -> dict[str, str]:
    """One line of the table."""
    kept = [replace(s, logprobs=keep_mass(s.logprobs, min_mass)) for s in whole]
    record = concatenate([s.logprobs for s in kept])
    for_groups = made if num_groups else None
    settings = manifest(store, precision, top_k, for_groups, min_mass)
    table, columns = sample_table(kept), encode(record, settings.capture)
    files = pack_shard(settings, table, columns, 0.0).files
    total = sum(map(len, files.values()))
    # what is left without the rows: the sample table, and a fixed part
    alone = sum(len(data) for name, data in files.items() if name.split("/")[0] in TABLE_FILES)
    return {
        "store": store,
        "precision": precision,
        "top_k": str(top_k),
        "tail_groups": str(num_groups),
        "min_mass": f"{min_mass:g}",
        "kept_k": f"{(record.alternative_logprobs > -np.inf).sum(axis=1).mean():.1f}",
        "bytes_a_token": f"{(total - alone) / len(record):.1f}",
        "with_tokens_and_positions": f"{total / len(record):.1f}",
        "max_error_nats": f"{settings.capture.max_error:g}",
    }


TABLE_FILES = {
    "samples.arrow",
    *("sample_ids", "num_tokens", "num_positions", "num_tokens_cut", "token_ids", "positions"),
}
"""Files of a shard that hold the samples and not the record."""


def speeds(num_rows: int) -> Iterator[Speed]:
    """Writing, random reads one by one and in batches, and two peers' reads, at k = 64."""
    made = rows(num_rows, 64, seed=0)
    whole = samples(made, SAMPLE_TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        axolotl_speed, peers = peer_reads(made, Path(folder))
        yield from peers
        for store in ("zarr", "arrow"):
            path, settings = Path(folder) / store, manifest(store, "fine", 64)
            many = whole * (1 + 2**17 // num_rows)
            many = [replace(s, token_ids=_renamed(s.token_ids, i)) for i, s in enumerate(many)]
            yield Speed("encode, check, decode again, in memory", store, encode_speed(settings, whole), "tokens/s")
            yield Speed(
                "commit: the same, and written, synced and read back",
                store,
                commit_speed(settings, many, path),
                "tokens/s",
                remark=f"{len(many) * SAMPLE_TOKENS:,} tokens a shard",
            )
            yield Speed(
                "two processes pack, one writer commits: on two cores",
                store,
                processes_speed(settings, many, path.with_name(f"{store}-processes")),
                "tokens/s",
                remark=f"{len(many) * SAMPLE_TOKENS:,} tokens a shard",
            )
            cache = LogitCache.open(path)
            keys = [s.token_ids for s in many]
            one = read_speed(lambda i, cache=cache, keys=keys: cache.lookup(keys[i[0]]), len(keys), 1)
            batch = read_speed(
                lambda i, cache=cache, keys=keys: cache.lookup_batch([keys[j] for j in i]), len(keys), BATCH
            )
            yield Speed("random reads, one sample", store, one, "tokens/s", one / axolotl_speed)
            yield Speed(f"random reads, {BATCH} samples at once", store, batch, "tokens/s", batch / axolotl_speed)


def _renamed(token_ids: np.ndarray, number: int) -> np.ndarray:
    """The same labels behind another first token: another sample."""
    renamed = token_ids.copy()
    renamed[0] = number
    return renamed


def peer_reads(made: Rows, folder: Path) -> tuple[float, list[Speed]]:
    """Random reads of 512-token samples in two peers' layouts, k = 64."""
    ids = np.concatenate([made.alternative_ids], axis=1).astype(np.int64)
    top = Top(ids, made.alternative_logprobs)
    measured = {m.layout: m for m in [*distillkit(top, folder), *axolotl(top, folder)]}
    found = [
        Speed("random reads, one sample", m.layout, m.read_tokens_per_second, "tokens/s", None, "re-implemented layout")
        for m in measured.values()
        if m.read_tokens_per_second
    ]
    base = next(s.value for s in found if "axolotl" in s.store)
    return base, [replace(s, against_axolotl=s.value / base) for s in found]


def encode_speed(settings: Manifest, whole: list[CachedSample]) -> float:
    """Tokens a second from records to files in memory."""

    def once() -> None:
        parts = [
            encode(concatenate([s.logprobs for s in whole[i : i + 4]]), settings.capture)
            for i in range(0, len(whole), 4)
        ]
        columns = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        pack_shard(settings, sample_table(whole), columns, 0.0)

    return len(whole) * SAMPLE_TOKENS / median_seconds(once)


def commit_speed(settings: Manifest, whole: list[CachedSample], path: Path) -> float:
    """Tokens a second of `CacheWriter.commit`; the last cache stays at `path`."""
    seconds = []
    for attempt in range(3):
        target = path if attempt == 2 else path.with_name(f"{path.name}-{attempt}")
        with CacheWriter(target, settings) as writer:
            start = time.perf_counter()
            writer.commit(whole)
            seconds.append(time.perf_counter() - start)
            writer.finalize()
    return len(whole) * SAMPLE_TOKENS / min(seconds)


def processes_speed(settings: Manifest, whole: list[CachedSample], path: Path) -> float:
    """Tokens a second of two processes that pack, as beside a GPU, and of one writer that commits what they return."""
    shards = [[replace(s, token_ids=_renamed(s.token_ids, 1000 * (i + 1))) for s in whole] for i in range(8)]
    one_core = os.sched_getaffinity(0)
    os.sched_setaffinity(0, CORES)  # which the processes inherit
    with (
        CacheWriter(path, settings) as writer,
        ThreadPoolExecutor(2) as pool,
        PackingProcess(settings) as one,
        PackingProcess(settings) as other,
    ):

        def work(process: PackingProcess, mine: list[list[CachedSample]]) -> None:
            for shard in mine:
                writer.commit_packed(process.pack(shard))

        list(pool.map(work, (one, other), (shards[:1], shards[1:2])))  # they start
        start = time.perf_counter()
        list(pool.map(work, (one, other), (shards[2:5], shards[5:])))
        seconds = time.perf_counter() - start
    os.sched_setaffinity(0, one_core)
    return 6 * len(whole) * SAMPLE_TOKENS / seconds


def read_speed(read: Callable[[list[int]], object], num_samples: int, batch: int) -> float:
    """Tokens a second, samples drawn at random."""
    rng = np.random.default_rng(0)
    read([0] * batch)
    found = []
    for _ in range(5):
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < 0.7:
            read(rng.integers(num_samples, size=batch).tolist())
            count += batch
        found.append(count * SAMPLE_TOKENS / (time.perf_counter() - start))
    return median(found)


def median_seconds(function: Callable[[], object]) -> float:
    """Of 5 calls after one."""
    return median([timed(function, "cpu") for _ in range(6)][1:])


def write_index(path: Path, num_samples: int) -> None:
    """A cache of which only the manifest, the contents and the index exist: what opening reads."""
    rng, num_shards = np.random.default_rng(0), max(1, num_samples // 64)
    counts = np.full(num_shards, num_samples // num_shards)
    counts[: num_samples % num_shards] += 1
    nothing = np.zeros(0, dtype=np.uint32)

    def table(count: int) -> SampleTable:
        tokens = rng.integers(100, 1024, count, dtype=np.uint32)
        ids = rng.integers(0, 256, (count, 16), dtype=np.uint8)
        return SampleTable(ids, tokens, tokens - 1, tokens * 0, nothing, nothing.astype(np.int32))

    files = open_files(path)
    files.join()()
    files.create(MANIFEST, to_bytes(manifest("zarr", "fine", 64)))
    index, data = index_file([table(int(count)) for count in counts])
    files.replace(index.name, data)
    entries = tuple(ShardEntry(f"{i:032x}", "0" * 32) for i in range(num_shards))
    files.replace(CONTENTS, to_bytes(Contents(digest(files.read(MANIFEST)), num_samples, index, entries, ())))


def opening() -> Iterator[Speed]:
    """Seconds and memory to open, and seconds a search, as the number of samples grows; each in its own process."""
    for num_samples in (1_000, 100_000, 1_000_000):
        with tempfile.TemporaryDirectory() as folder:
            write_index(Path(folder) / "c", num_samples)
            line = [sys.executable, __file__, "--open", f"{folder}/c"]
            out = subprocess.run(line, capture_output=True, text=True, check=True).stdout
        seconds, megabytes, find = map(float, out.split())
        remark = f"{max(1, num_samples // 64):,} shards; index only"
        yield Speed(f"open a cache of {num_samples:,} samples", "both", seconds, "s", None, remark)
        yield Speed(f"memory of {num_samples:,} open samples", "both", megabytes, "MB", None, "growth of the peak")
        yield Speed(f"find one of {num_samples:,} samples", "both", find * 1e6, "us", None, "by its id")


def measure_open(path: str) -> None:
    """What the child of `opening` prints."""
    import logitcache.storage.index  # imports are not the opening

    with PeakMemory("cpu") as memory:
        start = time.perf_counter()
        cache = LogitCache.open(path)
        seconds = time.perf_counter() - start
    index: logitcache.storage.index.SampleIndex = cache._index
    numbers = np.random.default_rng(0).integers(len(index), size=20_000).tolist()
    keys = [index.sample_id(number) for number in numbers]
    start = time.perf_counter()
    found = [index.find(key) for key in keys]
    each = (time.perf_counter() - start) / len(keys)
    if [f[0] for f in found] != numbers:
        raise ValueError("searching the index: expected each sample at its place, found others")
    print(seconds, memory.growth, each)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["all", "size", "speed"], default="all")
    parser.add_argument("--open", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if args.open:
        measure_open(args.open)
        return
    if args.part != "speed":
        lines = []
        for line in sizes(NUM_ROWS):
            print("  ".join(f"{key} {value}" for key, value in line.items()), flush=True)
            lines.append(line)
        write_csv(lines, BENCHMARKS / "storage_size.csv")
    if args.part != "size":
        table = []
        for speed in [*opening(), *speeds(NUM_ROWS)]:
            ratio = f"{speed.against_axolotl:.1f}" if speed.against_axolotl else ""
            value = f"{speed.value:.0f}" if speed.value >= 1000 else f"{speed.value:.3g}"
            print(f"{speed.what:55} {speed.store:45} {value:>9} {speed.unit:9} {ratio:>6} {speed.remark}", flush=True)
            named = {"what": speed.what, "store": speed.store, "value": value, "unit": speed.unit}
            table.append(named | {"times_axolotl": ratio, "remark": speed.remark})
        write_csv(table, BENCHMARKS / "storage_speed.csv")


if __name__ == "__main__":
    main()
