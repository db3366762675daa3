"""The pipeline of shards: packed by processes or a thread, with a batch asked for when the next one is under way."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from pathlib import Path

import pytest
from support.processes import stop
from support.tiny_model import text_rows

from logitcache.capture import shard_pipeline
from logitcache.capture.loaded import Loaded, load
from logitcache.capture.pending import PendingRecords
from logitcache.capture.plan import Plan
from logitcache.capture.settings import CaptureSettings, JobSpec
from logitcache.capture.shard_pipeline import Filled, ShardPipeline
from logitcache.capture.teacher import TransformersTeacher
from logitcache.capture.worker import Share, plans
from logitcache.data.samples import Sample
from logitcache.storage import BaseLogprobs, CacheWriter
from logitcache.storage.errors import PackingStopped
from logitcache.storage.manifest import ShardCommit
from logitcache.storage.packing import PackedShard
from logitcache.storage.packing_process import PackingProcess

Job = tuple[Loaded, Plan]


@pytest.fixture(scope="module")
def job(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A base and five shards or more, of several batches each."""
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "{row["text"]}"}}\n' for row in text_rows(40)))
    settings = CaptureSettings(8, batch_tokens=64, shard_positions=100)
    spec = JobSpec(str(tiny_model), (str(rows),), "", settings)
    loaded = load(spec)
    ((_, _, plan),) = plans(spec, loaded, Share())
    assert len(plan.shards) >= 5 and all(len(shard) > 1 for shard in plan.shards[:-1])
    return loaded, plan


def fill(job: Job, folder: Path, num_processes: int) -> Filled:
    loaded, plan = job
    with loaded.cache_spec.writer(folder) as writer:
        with ShardPipeline(writer, loaded.teacher, loaded.cache_spec, num_processes=num_processes) as pipeline:
            for shard in plan.shards:
                pipeline.shard(shard)
        writer.finalize()
    return pipeline.filled


def bytes_of(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("num_processes", [1, 2])
def test_shards_packed_by_processes_have_the_bytes_of_those_of_a_thread(
    num_processes: int, job: Job, tmp_path: Path
) -> None:
    ours, theirs = fill(job, tmp_path / "thread", 0), fill(job, tmp_path / "processes", num_processes)
    assert ours == theirs and ours.num_shards == len(job[1].shards)
    assert bytes_of(tmp_path / "thread") == bytes_of(tmp_path / "processes")


def test_a_packing_process_that_is_killed_ends_the_job_and_what_is_committed_stays(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = PackingProcess.pack, []

    def killed(self: PackingProcess, *more: object) -> object:
        calls.append(self.pid)
        if len(calls) == 3:
            os.kill(self.pid, signal.SIGKILL)
        return real(self, *more)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(PackingProcess, "pack", killed)
        with pytest.raises(PackingStopped, match="what was committed before stays"):
            fill(job, tmp_path / "c", 1)
    committed = len(list((tmp_path / "c" / "shards").glob("*.json")))
    assert committed == 2
    fill(job, tmp_path / "c", 1)
    fill(job, tmp_path / "whole", 0)
    assert bytes_of(tmp_path / "c") == bytes_of(tmp_path / "whole")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[PackingProcess]:
    """The packing processes that a test starts."""
    found: list[PackingProcess] = []
    real = PackingProcess.__init__

    def noted(self: PackingProcess, *more: object) -> None:
        real(self, *more)  # type: ignore[arg-type]
        found.append(self)

    monkeypatch.setattr(PackingProcess, "__init__", noted)
    return found


def has_ended(process: PackingProcess) -> bool:
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_no_process_is_left(job: Job, tmp_path: Path, started: list[PackingProcess]) -> None:
    fill(job, tmp_path / "c", 2)
    assert 1 <= len(started) <= 2 and all(map(has_ended, started))


def test_no_process_is_left_by_who_was_asked_to_stop(job: Job, tmp_path: Path, started: list[PackingProcess]) -> None:
    loaded, plan = job

    def stopped_after(num: int, pipeline: ShardPipeline) -> None:
        with pipeline:
            for shard in plan.shards[:num]:
                pipeline.shard(shard)
            raise KeyboardInterrupt

    with loaded.cache_spec.writer(tmp_path / "c") as writer:
        for num in (2, 3):
            with pytest.raises(KeyboardInterrupt):
                stopped_after(num, ShardPipeline(writer, loaded.teacher, loaded.cache_spec, num_processes=2))
        assert len(list((tmp_path / "c" / "shards").glob("*.json"))) == 3
    assert len(started) >= 2 and all(map(has_ended, started))


@pytest.mark.parametrize("where", ["within", "at the end"])
def test_a_shard_that_is_being_written_is_waited_for_by_who_was_asked_to_stop_while_waiting_for_it(
    where: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[PackingProcess]
) -> None:
    """A key is pressed while the main thread waits, as it mostly does where packing is what takes long."""
    loaded, plan = job
    packing, go_on = threading.Event(), threading.Event()
    commit = CacheWriter.commit_packed

    def slowly(self: CacheWriter, packed: PackedShard) -> ShardCommit:
        packing.set()
        assert go_on.wait(60)
        return commit(self, packed)

    def interrupted(_: Future[ShardCommit]) -> ShardCommit:
        assert packing.wait(60)
        raise KeyboardInterrupt

    def waited(shards: Sequence[Future[ShardCommit]], _: float) -> None:
        assert len(shards) == 1 and not shards[0].done()
        go_on.set()
        wait(shards, 60)

    def filled(writer: CacheWriter) -> None:
        with ShardPipeline(writer, loaded.teacher, loaded.cache_spec, num_processes=1) as pipeline:
            for shard in plan.shards[: 2 if where == "within" else 1]:
                pipeline.shard(shard)

    monkeypatch.setattr(CacheWriter, "commit_packed", slowly)
    monkeypatch.setattr(Future, "result", interrupted)
    monkeypatch.setattr(shard_pipeline, "wait", waited)
    with loaded.cache_spec.writer(tmp_path / "c") as writer:
        with pytest.raises(KeyboardInterrupt):
            filled(writer)
        assert go_on.is_set()
    assert len(list((tmp_path / "c" / "shards").glob("*.json"))) == 1
    (process,) = started
    deadline = time.monotonic() + 60
    while not has_ended(process) and time.monotonic() < deadline:  # by the thread that it packed for
        time.sleep(0.01)
    assert has_ended(process)


def test_a_dead_process_costs_its_own_shard_and_not_the_next(
    job: Job, tmp_path: Path, started: list[PackingProcess]
) -> None:
    loaded, plan = job

    def filled(writer: CacheWriter) -> None:
        with ShardPipeline(writer, loaded.teacher, loaded.cache_spec, num_processes=2) as pipeline:
            pipeline.shard(plan.shards[0])
            pipeline.settle()
            os.kill(started[0].pid, signal.SIGKILL)
            pipeline.shard(plan.shards[1])
            wait(pipeline._writing)
            pipeline.shard(plan.shards[2])

    with loaded.cache_spec.writer(tmp_path / "c") as writer, pytest.raises(PackingStopped):
        filled(writer)
    assert len(list((tmp_path / "c" / "shards").glob("*.json"))) == 2
    assert len(started) == 2 and all(map(has_ended, started))


def test_where_no_interpreter_can_be_started_a_thread_packs(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[PackingProcess]
) -> None:
    """In a program that has one within."""
    monkeypatch.setattr(sys, "executable", "")
    assert fill(job, tmp_path / "c", 2).num_shards == len(job[1].shards) and not started


def test_a_batch_is_asked_for_when_the_next_is_under_way(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a GPU works while the records before are made."""
    done: list[str] = []
    launch, records = TransformersTeacher.launch, PendingRecords.records

    def launched(self: TransformersTeacher, batch: Sequence[Sample]) -> PendingRecords:
        done.append("launch")
        return launch(self, batch)

    def asked(self: PendingRecords) -> list[BaseLogprobs]:
        done.append("records")
        return records(self)

    monkeypatch.setattr(TransformersTeacher, "launch", launched)
    monkeypatch.setattr(PendingRecords, "records", asked)
    loaded, plan = job
    with (
        CacheWriter(tmp_path / "c", loaded.cache_spec.manifest) as writer,
        ShardPipeline(writer, loaded.teacher, loaded.cache_spec) as pipeline,
    ):
        pipeline.shard(plan.shards[0])
    num = len(plan.shards[0])
    assert done == ["launch"] + ["launch", "records"] * (num - 1) + ["records"]


def test_a_process_that_does_not_answer_holds_up_nobody_who_was_asked_to_stop(
    job: Job, tmp_path: Path, started: list[PackingProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread is waited for at the end of the interpreter."""
    monkeypatch.setattr(shard_pipeline, "LEAVING_SECONDS", 0.5)
    loaded, plan = job
    pipelines: list[ShardPipeline] = []

    def filled(writer: CacheWriter) -> None:
        with ShardPipeline(writer, loaded.teacher, loaded.cache_spec, num_processes=1) as pipeline:
            pipelines.append(pipeline)
            pipeline.shard(plan.shards[0])
            pipeline.settle()
            stop(started[0].pid)
            pipeline.shard(plan.shards[1])
            raise KeyboardInterrupt

    with loaded.cache_spec.writer(tmp_path / "c") as writer, pytest.raises(KeyboardInterrupt):
        filled(writer)
    (shard,) = pipelines[0]._writing
    with pytest.raises(PackingStopped, match="status -9"):
        shard.result(60)
    assert len(list((tmp_path / "c" / "shards").glob("*.json"))) == 1 and has_ended(started[0])
