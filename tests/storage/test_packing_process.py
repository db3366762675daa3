"""Shards packed in another process: the same bytes and the same refusals, and no process that outlives who asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.storage_samples import SHARDS, VOCAB, make_groups, make_manifest, uneven_shards

from logitcache.storage import CacheWriter, InvalidRecord, LogitCache
from logitcache.storage.errors import PackingStopped
from logitcache.storage.packing import PackedShard, pack_samples
from logitcache.storage.packing_process import PackingProcess

MANIFEST = make_manifest("zarr")
GROUPS = make_groups(np.random.default_rng(5), VOCAB, 3)


@pytest.fixture
def process() -> Iterator[PackingProcess]:
    with PackingProcess(MANIFEST) as opened:
        yield opened


def bits(packed: PackedShard) -> object:
    return packed.commit, packed.files, [array.tobytes() for array in vars(packed.table).values()]


@pytest.mark.parametrize("store", ["zarr", "arrow"])
@pytest.mark.parametrize("precision", ["exact", "fine"])
@pytest.mark.parametrize(("groups", "draws"), [(None, 0), (GROUPS, 5)])
def test_the_bytes_are_those_of_packing_here(store: str, precision: str, groups: np.ndarray | None, draws: int) -> None:
    manifest = make_manifest(store, precision=precision, token_groups=groups, num_draws=draws)
    with PackingProcess(manifest) as process:
        for shard in uneven_shards(3, groups, draws):
            assert bits(process.pack(shard, "b" * 32)) == bits(pack_samples(manifest, shard, "b" * 32))


def test_what_is_refused_here_is_refused_there_and_the_next_shard_is_packed(process: PackingProcess) -> None:
    good = SHARDS[0]
    record = good[1].logprobs
    bad = [good[0], replace(good[1], logprobs=replace(record, label_logprobs=record.label_logprobs + np.float32(1)))]
    for shard in (bad, []):
        with pytest.raises(InvalidRecord) as here:
            pack_samples(MANIFEST, shard)
        with pytest.raises(InvalidRecord) as there:
            process.pack(shard)
        assert str(there.value) == str(here.value)
    assert bits(process.pack(good)) == bits(pack_samples(MANIFEST, good))


def test_records_that_a_frame_cannot_tell_apart_are_refused(process: PackingProcess) -> None:
    good, record = SHARDS[0], SHARDS[0][1].logprobs
    narrower = {name: getattr(record, name)[:, :-1] for name in ("alternative_ids", "alternative_logprobs")}
    shorter = {"tail_logprobs": record.tail_logprobs[:-1]}
    wider = {"label_logprobs": record.label_logprobs.astype(np.float64)}
    one_more = {"tail_group_logprobs": np.zeros((len(record), 2), dtype=np.float32)}
    for changes in (narrower, shorter, wider, one_more):
        for order in (1, -1):
            shard = [good[0], replace(good[1], logprobs=replace(record, **changes))][::order]
            with pytest.raises(InvalidRecord):
                process.pack(shard)
    assert bits(process.pack(good)) == bits(pack_samples(MANIFEST, good))


def test_a_cache_of_shards_that_others_packed_opens(process: PackingProcess, tmp_path: Path) -> None:
    with CacheWriter(tmp_path / "c", MANIFEST) as writer:
        for shard in SHARDS:
            first = writer.commit_packed(process.pack(shard))
            assert writer.commit_packed(process.pack(shard)) == first == writer.commit(shard)
        writer.finalize()
    cache = LogitCache.open(tmp_path / "c")
    assert len(cache) == sum(map(len, SHARDS))
    for sample in (s for shard in SHARDS for s in shard):
        found = cache.lookup(sample.token_ids).columns()
        assert all(np.array_equal(found[name], column) for name, column in sample.logprobs.columns().items())


def test_a_process_that_was_killed_is_told_and_nothing_waits() -> None:
    with PackingProcess(MANIFEST) as process:
        process.pack(SHARDS[0])
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(PackingStopped, match=rf"process {process.pid}.* ended with status -9.*--shard-positions"):
            process.pack(SHARDS[1])


def test_keys_and_signals_of_who_asked_do_not_end_it(process: PackingProcess) -> None:
    """Both reach the whole group; the shard in work may still be wanted."""
    process.pack(SHARDS[0])
    for name in (signal.SIGINT, signal.SIGTERM):
        os.kill(process.pid, name)
    assert bits(process.pack(SHARDS[1])) == bits(pack_samples(MANIFEST, SHARDS[1]))


KILLED = """
import os, signal, sys
from support.storage_samples import SHARDS, make_manifest
from logitcache.storage.packing_process import PackingProcess
process = PackingProcess(make_manifest("zarr"))
process.pack(SHARDS[0])
print(process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_it_ends_with_who_asked_even_where_that_was_killed() -> None:
    paths = os.pathsep.join(path for path in sys.path if path)
    run = subprocess.run(
        [sys.executable, "-c", KILLED], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths}, check=False
    )
    assert run.returncode == -signal.SIGKILL
    pid, started = int(run.stdout), time.monotonic()
    while runs(pid) and time.monotonic() < started + 60:
        time.sleep(0.05)
    assert not runs(pid)


def runs(pid: int) -> bool:
    """Whether a process is there and not a zombie that nobody has asked about."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
