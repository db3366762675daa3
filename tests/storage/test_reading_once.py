"""`verify` reads each file once, decodes each block once, and names what is bad all the same; threads share a cache."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.storage_samples import (
    SHARDS,
    TOP_K,
    VOCAB,
    flat,
    make_manifest,
    make_record,
    make_sample,
    record_bits,
    refused,
    write_cache,
)

from logitcache.storage import CachedSample, CorruptCache, LogitCache, SampleNotCached, repair, verify
from logitcache.storage import arrow_backend as arrow_module
from logitcache.storage import cache as cache_module
from logitcache.storage import zarr_backend as zarr_module
from logitcache.storage.files import LocalFiles, open_files
from logitcache.storage.layout import is_shard_folder
from logitcache.storage.manifest import Block, Contents, ShardCommit, read_json
from logitcache.storage.shard import BACKENDS

pytest_plugins = ["support.storage_fixtures"]
pytestmark = pytest.mark.usefixtures("no_fsync")

NUM_SAMPLES = 400
"""Of 4 tokens: five blocks of rows, and many samples in each."""


def short_samples(num_samples: int, seed: int = 0) -> list[CachedSample]:
    """Samples of 4 tokens with all their positions, made together."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, size=(num_samples, 4), dtype=np.uint32)
    rows = np.arange(4 * num_samples, dtype=np.int32).reshape(num_samples, 4)[:, :3]
    record = make_record(rng, tokens.reshape(-1), rows.reshape(-1), VOCAB, TOP_K)
    parts = [record.take(slice(3 * i, 3 * i + 3)) for i in range(num_samples)]
    for part in parts:
        part.positions[:] = [0, 1, 2]
    return [CachedSample(*pair) for pair in zip(tokens, parts, strict=True)]


@pytest.fixture
def short(path: Path, store: str) -> Path:
    samples = short_samples(NUM_SAMPLES)
    return write_cache(path, store, [samples[:300], samples[300:]], make_manifest(store, precision="fine"))


class Reads:
    """How often each file of a shard was read, and how many blocks were decoded."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.files: Counter[str] = Counter()
        self.decoded = 0
        read, spans = LocalFiles.read, LocalFiles.read_spans
        decompress, decode = zarr_module.standalone.simple_decompress_into, arrow_module.check_sizes

        def counted_read(this: LocalFiles, name: str, limit: int | None = None) -> bytes:
            self.files[name] += 1
            return read(this, name, limit)

        def counted_spans(this: LocalFiles, name: str, wanted: Any) -> list[bytes]:
            self.files[name] += 1
            return spans(this, name, wanted)

        def counted_chunk(data: bytes, out: Any) -> Any:
            self.decoded += 1
            return decompress(data, out)

        def counted_batch(*of: Any) -> None:
            self.decoded += 1
            decode(*of)

        patch.setattr(LocalFiles, "read", counted_read)
        patch.setattr(LocalFiles, "read_spans", counted_spans)
        patch.setattr(zarr_module.standalone, "simple_decompress_into", counted_chunk)
        patch.setattr(arrow_module, "check_sizes", counted_batch)

    def of_shards(self) -> Counter[str]:
        parts = {name: name.split("/") for name in self.files}
        return Counter({n: self.files[n] for n, p in parts.items() if len(p) > 2 and is_shard_folder(p[1])})


def commits(path: Path) -> list[ShardCommit]:
    files = open_files(path)
    entries = read_json(Contents, files, "contents.json").shards
    return [read_json(ShardCommit, files, f"shards/{entry.unit}.json") for entry in entries]


@pytest.mark.parametrize("check", [verify, repair])
def test_each_file_is_read_once_and_each_block_decoded_once(short: Path, check: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        reads = Reads(patch)
        check(short)
    files = {f"shards/{commit.folder}/{file.name}" for commit in commits(short) for file in commit.files}
    assert reads.of_shards() == Counter(files)
    assert reads.decoded == sum(len(blocks) for commit in commits(short) for blocks in commit.blocks.values())


def test_a_first_miss_decodes_no_row_and_the_next_reads_nothing(short: Path) -> None:
    cache, absent = LogitCache.open(short), np.array([VOCAB - 1] * 3, np.uint32)
    with pytest.MonkeyPatch.context() as patch:
        reads = Reads(patch)
        assert absent not in cache
        rows = ("label", "alternative", "tail", "logprobs")
        assert reads.of_shards() and not any(
            row in name.split("/", 2)[2] for name in reads.files for row in rows if name.count("/") > 1
        )
        before = reads.files.copy()
        assert absent[:2] not in cache
        again = reads.files - before
        assert again.total() <= 2, again  # the nearest sample, for the message


def blocks_of_rows(commit: ShardCommit) -> dict[str, tuple[str, tuple[Block, ...]]]:
    """Of a shard's streams of rows the file and the blocks."""
    if "logprobs.arrow" in commit.blocks:
        return {"logprobs.arrow": ("logprobs.arrow", commit.blocks["logprobs.arrow"])}
    names = {"label_steps": "c/0", "alternative_ids": "c/0/0", "alternative_drops": "c/0/0", "tail_steps": "c/0"}
    return {name: (f"{name}/{file}", commit.blocks[name]) for name, file in names.items()}


def unreadable(path: Path) -> set[str]:
    """Ids of the samples that a reader refuses, asked one by one."""
    cache, bad = LogitCache.open(path), set()
    for stored in cache.stored_samples():
        try:
            cache.lookup(stored.token_ids)
        except CorruptCache:
            bad.add(cache_module.sample_id(stored.token_ids).hex())
    return bad


def test_a_damaged_block_names_its_samples_and_no_others(short: Path) -> None:
    commit = max(commits(short), key=lambda c: c.num_samples)
    for name, blocks in blocks_of_rows(commit).values():
        file = short / "shards" / commit.folder / name
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[blocks[1][0] + blocks[1][1] // 2] ^= 1
        file.write_bytes(damaged)
        problems, bad = verify(short).problems, unreadable(short)
        assert {p.sample for p in problems if p.sample} == bad and 80 < len(bad) < 90
        assert [p.sample for p in problems].count(None) == 1  # the file
        assert sorted(set(problems), key=problems.index) == list(problems)
        file.write_bytes(whole)
    assert verify(short).is_intact


def test_bad_rows_name_their_samples_and_no_others(path: Path, store: str) -> None:
    """Rows that are no distributions, with every checksum as it must be: who wrote them meant it."""
    samples, wrong = short_samples(300), (5, 84, 85, 299)
    manifest = make_manifest(store)
    backend = BACKENDS[store]
    write = type(backend).write

    def lying(this: Any, table: Any, columns: Any, capture: Any) -> Any:
        changed = {**columns, "tail_logprobs": columns["tail_logprobs"].copy()}
        changed["tail_logprobs"][[3 * i + 1 for i in wrong]] = -0.01
        columns.update(changed)
        return write(this, table, changed, capture)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(backend), "write", lying)
        write_cache(path, store, [samples], manifest)
    problems = verify(path).problems
    assert {p.sample for p in problems} == unreadable(path)
    assert {p.sample for p in problems} == {cache_module.sample_id(samples[i].token_ids).hex() for i in wrong}
    assert all("position 1: label + alternatives + tail" in p.what for p in problems)


def test_one_cache_serves_threads_at_once(path: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards come and go in the one memory of open shards while others read, and all miss at once at the beginning."""
    rng = np.random.default_rng(3)
    shards = [[make_sample(rng, int(rng.integers(3, 30))) for _ in range(3)] for _ in range(6)]
    write_cache(path, store, [*shards, *SHARDS])
    monkeypatch.setattr(cache_module, "MAX_OPEN_SHARDS", 2)
    samples = flat([*shards, *SHARDS])
    expected = [record_bits(s.logprobs) for s in samples]
    absent = np.array([VOCAB - 1] * 50, np.uint32)
    cache, failed = LogitCache.open(path), []
    barrier = threading.Barrier(8)

    def read(seed: int) -> None:
        barrier.wait()
        try:
            message = refused(SampleNotCached, "sample-not-cached", lambda: cache.lookup(absent))
            assert "not cached. The nearest cached sample" in message
            for i in np.random.default_rng(seed).integers(len(samples), size=150).tolist():
                assert record_bits(cache.lookup(samples[i].token_ids)) == expected[i]
                start = samples[i].token_ids[:-1]
                assert cache.lookup(start).label_logprobs.tobytes() == _inside(samples[i], len(start))
        except BaseException as error:
            failed.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert failed == []


def _inside(sample: CachedSample, num_tokens: int) -> bytes:
    """The label's log-probabilities at the positions whose label is among the first tokens."""
    record = sample.logprobs
    return record.label_logprobs[record.positions < num_tokens - 1].tobytes()
