"""The batch precompute job through its command line: many workers, one cache, whatever happens to them.

The oracle is the cache of one worker that nothing disturbed, read by `LogitCache`.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.cli_harness import (
    ROWS,
    cache_bytes,
    commits,
    done,
    flip_byte,
    logitcache,
    precompute,
    precompute_line,
    refused,
    shard_folders,
    unchanged,
)
from support.storage_samples import by_tokens
from support.tiny_model import make_tokenizer, text_rows

import logitcache.capture.records as records
from logitcache.capture.pending import PendingRecords
from logitcache.capture.teacher import TransformersTeacher
from logitcache.data.samples import Sample
from logitcache.storage import IncompleteCache, LogitCache, NotACache, repair
from logitcache.storage.arrow_backend import ArrowBackend
from logitcache.storage.job_status import FAILED, FINISHED, status

SMALL: list[object] = ["--window-rows", 10, "--shard-positions", 20, "--batch-tokens", 64]
"""5 windows of several units each."""

PROGRAM = Path(__file__).resolve().parents[1] / "support" / "job_processes.py"
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

Calls = list[list[Sample]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 47 different rows, in three files."""
    folder = tmp_path_factory.mktemp("rows") / "data"
    folder.mkdir()
    rows = text_rows(47, longest=30)
    for number, part in enumerate((rows[30:], rows[:12], rows[12:30])):
        save(folder / f"{number}.jsonl", part)
    return folder


@pytest.fixture(scope="module")
def reference(data: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of one worker."""
    cache = tmp_path_factory.mktemp("caches") / "reference"
    precompute(tiny_model, data, cache, *SMALL)
    assert len(commits(cache)) >= 15
    return cache


def save(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def share(index: int, num: int) -> list[object]:
    return ["--shard-index", index, "--num-shards", num]


def bits(cache: Path | str) -> dict[bytes, tuple[object, ...]]:
    """Every sample of a finished cache, bit for bit, by its tokens."""
    found = list(LogitCache.open(cache).samples())
    by = by_tokens(found)
    assert len(by) == len(found)
    return by


def shard_bytes(cache: Path) -> dict[str, bytes | None]:
    return {name: data for name, data in cache_bytes(cache).items() if name.startswith("shards/")}


def records_left(cache: Path) -> list[str]:
    return sorted(p.name for p in cache.glob("worker-*.json"))


def watch(patch: pytest.MonkeyPatch, before: Callable[[list[Sample]], None] = lambda _: None) -> Calls:
    """The batches that the base is run on from now on."""
    calls: Calls = []
    real = TransformersTeacher.launch

    def watched(self: TransformersTeacher, batch: Any) -> PendingRecords:
        before(list(batch))
        calls.append(list(batch))
        return real(self, batch)

    patch.setattr(TransformersTeacher, "launch", watched)
    return calls


def captured_positions(calls: Calls) -> dict[bytes, list[int]]:
    """What was computed, by tokens; every sample once at most."""
    found: dict[bytes, list[int]] = {}
    for sample in itertools.chain.from_iterable(calls):
        assert sample.token_ids.tobytes() not in found
        found[sample.token_ids.tobytes()] = sample.positions.tolist()
    return found


# many workers, one cache


@pytest.mark.parametrize(
    "order", [(0, 1), (1, 0), (2, 0, 1), tuple(reversed(range(9))), (13, *range(13), *range(14, 20))]
)
def test_workers_in_any_order_make_the_cache_of_one(
    order: tuple[int, ...], tmp_path: Path, tiny_model: Path, data: Path, reference: Path
) -> None:
    cache = tmp_path / "c"
    for place, index in enumerate(order):
        if place:
            with pytest.raises(IncompleteCache):
                LogitCache.open(cache)
            assert len(records_left(cache)) == place
        outcome = precompute(tiny_model, data, cache, *SMALL, *share(index, len(order)))
        assert ("not done" in outcome.out) == (place < len(order) - 1)
    assert bits(cache) == bits(reference)
    assert cache_bytes(cache) == cache_bytes(reference)
    assert records_left(cache) == []
    done("verify", cache)


@pytest.mark.parametrize("last", [0, 5, 11])
def test_the_last_worker_may_have_nothing_to_do(
    last: int, tmp_path: Path, tiny_model: Path, write_rows: Callable[..., Path]
) -> None:
    """Twelve workers for one window of four units: most have no unit, four not even a window to read."""
    path = write_rows(text_rows(9))
    more: list[object] = ["--shard-positions", 60, "--batch-tokens", 64]
    precompute(tiny_model, path, tmp_path / "one", *more)
    assert len(commits(tmp_path / "one")) == 4
    for index in [*(i for i in range(12) if i != last), last]:
        with pytest.raises((IncompleteCache, NotACache)):
            LogitCache.open(tmp_path / "c")
        precompute(tiny_model, path, tmp_path / "c", *more, *share(index, 12))
    assert cache_bytes(tmp_path / "c") == cache_bytes(tmp_path / "one")
    assert records_left(tmp_path / "c") == []


def test_workers_share_the_computing(
    tmp_path: Path, tiny_model: Path, data: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is computed by two, and none is idle."""
    calls = watch(monkeypatch)
    counts = []
    for index in range(3):
        before = len(calls)
        precompute(tiny_model, data, tmp_path / "c", *SMALL, *share(index, 3))
        counts.append(sum(len(s.positions) for batch in calls[before:] for s in batch))
    assert captured_positions(calls).keys() == bits(reference).keys()
    assert min(counts) > sum(counts) / 6


def test_a_worker_that_is_repeated_does_nothing(
    tmp_path: Path, tiny_model: Path, data: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "c"
    precompute(tiny_model, data, cache, *SMALL, *share(0, 2))
    calls = watch(monkeypatch)
    before = shard_bytes(cache)
    outcome = precompute(tiny_model, data, cache, *SMALL, *share(0, 2))
    assert not calls and shard_bytes(cache) == before
    assert "Cached 0 positions of 0 samples" in outcome.out and "there already" in outcome.out
    with pytest.raises(IncompleteCache):
        LogitCache.open(cache)
    precompute(tiny_model, data, cache, *SMALL, *share(1, 2))
    assert cache_bytes(cache) == cache_bytes(reference)


def test_a_record_whose_part_is_gone_is_of_a_worker_that_has_not_finished(
    tmp_path: Path, tiny_model: Path, data: Path, reference: Path
) -> None:
    """Who finalised removed the part of one that began late, before that one had said that it was done."""
    cache = tmp_path / "c"
    precompute(tiny_model, data, cache, *SMALL, *share(0, 2))
    (part,) = cache.glob("worker-0-of-2-*.npy")
    part.unlink()
    precompute(tiny_model, data, cache, *SMALL, *share(1, 2))
    with pytest.raises(IncompleteCache):
        LogitCache.open(cache)
    precompute(tiny_model, data, cache, *SMALL, *share(0, 2))
    assert cache_bytes(cache) == cache_bytes(reference) and records_left(cache) == []


def test_a_worker_that_is_repeated_after_the_end_changes_nothing(
    tmp_path: Path, tiny_model: Path, data: Path, reference: Path
) -> None:
    """It says again that it is finished, which is true, and no matter to readers or to one who works alone."""
    cache = tmp_path / "c"
    for index in (0, 1):
        precompute(tiny_model, data, cache, *SMALL, *share(index, 2))
    outcome = precompute(tiny_model, data, cache, *SMALL, *share(0, 2))
    assert "Cached 0 positions" in outcome.out and "not done" not in outcome.out
    assert cache_bytes(cache) == cache_bytes(reference)
    assert status(cache).is_final
    assert [r.state for r in status(cache).workers.values()] in ([], [FINISHED])
    precompute(tiny_model, data, cache, *SMALL)
    assert cache_bytes(cache) == cache_bytes(reference) and records_left(cache) == []


def test_one_alone_finishes_what_others_left(
    tmp_path: Path, tiny_model: Path, data: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "c"
    for index in (1, 3):
        precompute(tiny_model, data, cache, *SMALL, *share(index, 4))
    there = len(commits(cache))
    calls = watch(monkeypatch)
    outcome = precompute(tiny_model, data, cache, *SMALL)
    assert "not done" not in outcome.out
    assert cache_bytes(cache) == cache_bytes(reference)
    assert records_left(cache) == []
    assert 0 < there < len(commits(cache))
    assert len(captured_positions(calls)) < len(bits(reference))


@pytest.mark.parametrize(
    "other",
    [
        ["--window-rows", 16],
        ["--shard-positions", 90],
        ["--batch-tokens", 200],
        ["--max-length", 20],
        ["--data", "fewer"],
    ],
    ids=lambda o: str(o[0]),
)
def test_workers_of_different_jobs_never_finish_for_one_another(
    other: list[object], tmp_path: Path, tiny_model: Path, data: Path, reference: Path
) -> None:
    """Each takes its share of another plan, so together they have left samples out: the cache must not be final."""
    fewer = save(tmp_path / "fewer.jsonl", text_rows(47, longest=30)[:20])
    more = [fewer if value == "fewer" else value for value in other]
    cache = tmp_path / "c"
    precompute(tiny_model, data, cache, *SMALL, *share(0, 2))
    logitcache(*precompute_line(tiny_model, data, cache, *SMALL, *more, *share(1, 2)))
    try:
        found = LogitCache.open(cache)
    except IncompleteCache:
        found = None
    assert found is None or bits(cache).keys() >= bits(reference).keys(), f"final, with {len(found)} samples"


def test_what_finished_workers_of_fewer_rows_said_finishes_no_larger_job(
    tmp_path: Path, tiny_model: Path, data: Path, reference: Path
) -> None:
    """Of three workers one died; the rows have grown by then, and the one that died comes first."""
    cache, early = tmp_path / "c", tmp_path / "early"
    early.mkdir()
    (early / "0.jsonl").write_bytes((data / "0.jsonl").read_bytes())
    for index in (0, 1):
        precompute(tiny_model, early, cache, *SMALL, *share(index, 3))
    for file in data.iterdir():
        (early / file.name).write_bytes(file.read_bytes())
    precompute(tiny_model, early, cache, *SMALL, *share(2, 3))
    with pytest.raises(IncompleteCache):
        LogitCache.open(cache)
    for index in (0, 1):
        precompute(tiny_model, early, cache, *SMALL, *share(index, 3))
    assert bits(cache).keys() == bits(reference).keys()
    assert records_left(cache) == []


def test_what_a_finished_worker_said_does_not_outlive_its_shards(
    tmp_path: Path, tiny_model: Path, data: Path, reference: Path
) -> None:
    """A shard of a worker that finished is damaged and dropped before the other one is done."""
    cache = tmp_path / "c"
    precompute(tiny_model, data, cache, *SMALL, *share(0, 2))
    flip_byte(next(p for p in sorted(shard_folders(cache)[0].iterdir()) if p.stat().st_size > 500))
    assert "1 bad shard dropped" in done("repair", cache).out
    precompute(tiny_model, data, cache, *SMALL, *share(1, 2))
    with pytest.raises(IncompleteCache):
        LogitCache.open(cache)
    precompute(tiny_model, data, cache, *SMALL, *share(0, 2))
    assert cache_bytes(cache) == cache_bytes(reference)


def test_samples_from_another_cache_are_copied_once_by_all_workers(
    tmp_path: Path, tiny_model: Path, data: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    precompute(tiny_model, save(tmp_path / "some.jsonl", text_rows(47, longest=30)[10:30]), other, *SMALL)
    calls = watch(monkeypatch)
    for index in (1, 0, 2):
        precompute(tiny_model, data, tmp_path / "c", *SMALL, "--samples-from", other, *share(index, 3))
    assert len(captured_positions(calls)) == 27
    assert status(tmp_path / "c").num_samples == 47  # none twice
    found = bits(tmp_path / "c")
    assert found.keys() == bits(reference).keys()
    assert {key: found[key] for key in bits(other)} == bits(other)


def test_rows_without_labels_are_refused_by_the_last_of_many_too(tmp_path: Path, tiny_model: Path) -> None:
    rows = [{"prompt": "abcdefgh" + str(i), "completion": "x"} for i in range(4)]
    path = save(tmp_path / "a.jsonl", rows)
    line = precompute_line(tiny_model, path, tmp_path / "c", "--max-length", 4)
    assert "no supervised token is left" in refused(1, *line)
    outcomes = [logitcache(*line, *share(index, 2)) for index in (0, 1)]
    assert [o.status for o in outcomes] != [0, 0]


# processes


@pytest.fixture(scope="module")
def processes(data: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder in which `job_processes.py` ran, and its report."""
    folder = tmp_path_factory.mktemp("processes")
    line = ["precompute", "--model", tiny_model, "--data", data, "--top-k", 8, "--store", "arrow", *SMALL]
    request = {"line": [str(a) for a in line], "folder": str(folder), "kills": 12, "seed": 0}
    ran = subprocess.run(
        [sys.executable, str(PROGRAM), json.dumps(request)],
        capture_output=True,
        text=True,
        env={**os.environ, **ONE_THREAD},
    )
    assert ran.returncode == 0, ran.stderr
    return folder, json.loads(ran.stdout.splitlines()[-1])


def units_told(events: list[dict[str, Any]]) -> list[str]:
    return [e["unit"] for e in events if e["event"] == "unit-done"]


def test_two_processes_of_the_same_worker_commit_every_unit_once(
    processes: tuple[Path, dict[str, Any]], reference: Path
) -> None:
    folder, report = processes
    assert report["twins"]["statuses"] == [0, 0, 0]
    assert cache_bytes(folder / "twins") == cache_bytes(reference)
    first, second, other = map(units_told, report["twins"]["events"])
    assert {*first, *second, *other} == {c.stem for c in commits(reference)}
    assert not {*first, *second} & {*other}


def test_all_workers_at_once(processes: tuple[Path, dict[str, Any]], reference: Path) -> None:
    folder, report = processes
    assert report["crowd"]["statuses"] == [0] * 5
    assert cache_bytes(folder / "crowd") == cache_bytes(reference)
    told = [unit for events in report["crowd"]["events"] for unit in units_told(events)]
    assert sorted(told) == [c.stem for c in commits(reference)]
    assert records_left(folder / "crowd") == []


def test_workers_that_are_killed_and_repeated_leave_no_trace(
    processes: tuple[Path, dict[str, Any]], reference: Path
) -> None:
    """But the record of one that began when the others had finished, which readers ignore."""
    folder, report = processes
    killed = [count for status, count in report["killed"]["seen"] if status == -9]
    assert len(killed) >= 6  # of live processes
    assert sum(0 < count < len(commits(reference)) for count in killed) >= 4  # inside the work
    assert report["killed"]["statuses"] == [0, 0, 0]
    assert cache_bytes(folder / "killed") == cache_bytes(reference)
    assert not repair(folder / "killed").is_incomplete and not list((folder / "killed").rglob("*.new"))


def test_sigterm_is_143_and_the_same_command_goes_on(
    processes: tuple[Path, dict[str, Any]], tmp_path: Path, tiny_model: Path, data: Path
) -> None:
    folder, report = processes
    stopped = report["stopped"]
    assert stopped["status"] == 143
    assert stopped["seconds"] < 10  # what a scheduler waits for at least
    assert stopped["stderr"] == (
        "logitcache: stopped by SIGTERM. What was committed is kept; the same command goes on.\n"
    )
    assert stopped["record"]["body"]["state"] == "stopped"
    more = [*SMALL, "--window-rows", 100_000]
    precompute(tiny_model, data, tmp_path / "whole", *more)
    assert 2 <= stopped["commits"] < len(commits(tmp_path / "whole"))
    precompute(tiny_model, data, folder / "stopped", *more)
    assert cache_bytes(folder / "stopped") == cache_bytes(tmp_path / "whole")
    assert records_left(folder / "stopped") == []


def test_torchrun(tmp_path: Path, tiny_model: Path, data: Path, reference: Path) -> None:
    line = [str(a) for a in precompute_line(tiny_model, data, tmp_path / "c", *SMALL)]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "-m", "logitcache"]
    ran = subprocess.run(
        [sys.executable, *launch, *line], capture_output=True, text=True, env={**os.environ, **ONE_THREAD}
    )
    assert ran.returncode == 0, ran.stderr
    assert cache_bytes(tmp_path / "c") == cache_bytes(reference)
    assert records_left(tmp_path / "c") == []
    assert ran.stdout.count("Cached ") == 1


# samples that repeat across windows


@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_a_sample_that_repeats_in_the_next_window_is_computed_once(
    seconds: float, tmp_path: Path, tiny_model: Path, write_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long a shard takes to be written: the bytes of a cache are not a matter of luck."""
    real = ArrowBackend.write

    def slow(*arguments: Any) -> Any:
        time.sleep(seconds)
        return real(*arguments)

    rows = text_rows(6)
    path = write_rows([*rows[:3], *rows[1:4], *rows[:3], *rows])
    monkeypatch.setattr(ArrowBackend, "write", slow)
    calls = watch(monkeypatch)
    precompute(tiny_model, path, tmp_path / "c", "--window-rows", 3)
    assert len(captured_positions(calls)) == 6  # none twice
    assert bits(tmp_path / "c").keys() == captured_positions(calls).keys()


# nothing is computed that is there already


def test_more_rows_cost_only_themselves(
    tmp_path: Path, tiny_model: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = text_rows(47, longest=30)
    path = save(tmp_path / "rows.jsonl", rows[5:40])
    cache = tmp_path / "c"
    precompute(tiny_model, path, cache, *SMALL)
    before = shard_bytes(cache)
    assert len(bits(cache)) == 35
    save(path, rows)
    calls = watch(monkeypatch)
    precompute(tiny_model, path, cache, *SMALL)
    new = captured_positions(calls)
    assert len(new) == 12
    assert shard_bytes(cache).items() >= before.items()
    found, expected = bits(cache), bits(reference)
    assert found.keys() == expected.keys()
    close_records(cache, reference)


@pytest.mark.parametrize("num", [1, 2])
def test_another_order_and_other_windows_change_nothing(
    num: int, tmp_path: Path, tiny_model: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "c"
    rows = text_rows(47, longest=30)
    precompute(tiny_model, save(tmp_path / "a.jsonl", rows), cache, *SMALL)
    before = shard_bytes(cache)
    np.random.default_rng(0).shuffle(rows)  # type: ignore[arg-type]
    shuffled = save(tmp_path / "b.jsonl", rows)
    calls = watch(monkeypatch)
    more = ["--window-rows", 7, "--shard-positions", 200, "--batch-tokens", 300]
    for index in range(num):
        outcome = precompute(tiny_model, shuffled, cache, *more, *share(index, num))
        assert "Cached 0 positions of 0 samples" in outcome.out
    assert not calls
    assert shard_bytes(cache) == before
    assert bits(cache).keys() == bits(reference).keys()
    assert records_left(cache) == []


def test_a_sample_that_gains_labels_costs_only_those(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [[n, n + 1, n + 2, n + 3, n + 4, n + 5] for n in range(20)]
    some = [{"input_ids": i, "labels": [-100, i[1], -100, -100, i[4], -100]} for i in ids]
    more = [{"input_ids": i, "labels": [-100, i[1], i[2], -100, i[4], i[5]]} for i in ids[:7]] + some[7:]
    path, cache = tmp_path / "rows.jsonl", tmp_path / "c"
    windows: list[object] = ["--window-rows", 6, "--shard-positions", 6, "--batch-tokens", 24]
    precompute(tiny_model, save(path, some), cache, *windows)
    before = shard_bytes(cache)
    calls = watch(monkeypatch)
    precompute(tiny_model, save(path, more), cache, *windows)
    expected = {np.array(i, dtype=np.uint32).tobytes(): [1, 4] for i in ids[:7]}
    assert captured_positions(calls) == expected
    assert shard_bytes(cache).items() >= before.items()
    precompute(tiny_model, path, tmp_path / "whole", *windows)
    assert bits(cache).keys() == bits(tmp_path / "whole").keys()
    close_records(cache, tmp_path / "whole")
    for sample in LogitCache.open(cache).samples():
        gained = sample.token_ids.tobytes() in expected
        assert sample.logprobs.positions.tolist() == ([0, 1, 3, 4] if gained else [0, 3])


def close_records(cache: Path, other: Path) -> None:
    """The same positions and labels, and the numbers up to the noise of another batch and the step of `fine`."""
    expected = {s.token_ids.tobytes(): s.logprobs for s in LogitCache.open(other).samples()}
    for sample in LogitCache.open(cache).samples():
        wanted = expected[sample.token_ids.tobytes()]
        np.testing.assert_array_equal(sample.logprobs.positions, wanted.positions)
        np.testing.assert_array_equal(sample.logprobs.label_ids, wanted.label_ids)
        np.testing.assert_allclose(sample.logprobs.label_logprobs, wanted.label_logprobs, atol=1 / 1024)


# what goes wrong


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory. Tried."), torch.OutOfMemoryError("out of memory")])
def test_a_batch_that_does_not_fit_is_halved(
    error: Exception, tmp_path: Path, tiny_model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said once; those after it are smaller from the start."""
    most = 80

    def fits(batch: list[Sample]) -> None:
        sizes.append(len(batch) * max(len(s.token_ids) for s in batch))
        if sizes[-1] > most and len(batch) > 1:
            raise error

    sizes: list[int] = []
    line: list[object] = ["--window-rows", 100, "--shard-positions", 200, "--batch-tokens", 128, "--precision", "exact"]
    precompute(tiny_model, data, tmp_path / "whole", *line)
    with monkeypatch.context() as patch:
        calls = watch(patch, fits)
        outcome = precompute(tiny_model, data, tmp_path / "c", *line)
    said = [text for text in outcome.err.splitlines() if "Memory ran out" in text]
    assert len(said) == 1 and re.search(r"on a batch of 1\d\d tokens: from here on (5|6)\d at most", said[0])
    assert sum(size > most for size in sizes) - sum(len(b) == 1 for b in calls) <= 1
    assert captured_positions(calls).keys() == bits(tmp_path / "whole").keys()
    close_records(tmp_path / "c", tmp_path / "whole")
    assert [c.name for c in commits(tmp_path / "c")] == [c.name for c in commits(tmp_path / "whole")]


def test_a_sample_that_does_not_fit_alone_is_1(
    tmp_path: Path, tiny_model: Path, data: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fits(batch: list[Sample]) -> None:
        if max(len(s.token_ids) for s in batch) > 30:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with monkeypatch.context() as patch:
        watch(patch, fits)
        message = refused(1, *precompute_line(tiny_model, data, tmp_path / "c", *SMALL))
    assert "memory ran out" in message and "smaller --batch-tokens" in message
    (record,) = status(tmp_path / "c").workers.values()
    assert record.state == "stopped"
    precompute(tiny_model, data, tmp_path / "c", *SMALL)
    assert cache_bytes(tmp_path / "c") == cache_bytes(reference)


def spoil(patch: pytest.MonkeyPatch, bad: str) -> None:
    """A logit of samples that begin with this text is not finite, at position 2."""
    real = records.slice_record
    wanted = make_tokenizer()(bad)["input_ids"]
    rows: list[int] = []

    def find(batch: list[Sample]) -> None:
        starts = itertools.accumulate((len(s.positions) for s in batch), initial=0)
        rows[:] = [
            start + 2
            for start, sample in zip(starts, batch, strict=False)
            if sample.token_ids[: len(wanted)].tolist() == wanted
        ]

    def spoiled(logits: Any, *more: Any) -> Any:
        logits[rows, 5] = torch.nan
        return real(logits, *more)

    watch(patch, find)
    patch.setattr(records, "slice_record", spoiled)


@pytest.mark.parametrize("num", [1, 2])
def test_logits_that_are_not_finite_leave_out_their_shard_alone(
    num: int, tmp_path: Path, tiny_model: Path, data: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "c"
    outcomes = []
    with monkeypatch.context() as patch:
        spoil(patch, "20 abc")
        for index in range(num):
            outcomes.append(logitcache(*precompute_line(tiny_model, data, cache, *SMALL, *share(index, num))))
    assert sorted(o.status for o in outcomes) == [0, 1][-num:] if num > 1 else [o.status for o in outcomes] == [1]
    (failed,) = [o for o in outcomes if o.status]
    assert "2.jsonl:9, position 2: its logits are not finite" in failed.err  # row 12 + 8
    assert "Traceback" not in failed.err
    found = status(cache)
    assert not found.is_final and found.num_shards == len(commits(reference)) - 1
    states = {r.state for r in found.workers.values()}
    assert FAILED in states and states <= {FAILED, FINISHED}
    (record,) = [r for r in found.workers.values() if r.state == FAILED]
    assert len(record.failures) == 1 and "position 2" in record.failures[0]
    with pytest.raises(IncompleteCache):
        LogitCache.open(cache)
    assert shard_bytes(cache).items() <= shard_bytes(reference).items()
    for index in range(num):
        precompute(tiny_model, data, cache, *SMALL, *share(index, num))
    assert cache_bytes(cache) == cache_bytes(reference)
    assert records_left(cache) == []


@pytest.mark.parametrize("call", [1, 3, 15])
def test_a_full_disk_is_told_by_the_writer_and_the_same_command_goes_on(
    call: int, tmp_path: Path, tiny_model: Path, data: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = ArrowBackend.write, itertools.count(1)

    def full(*arguments: Any) -> Any:
        if next(count) >= call:
            raise OSError(28, "No space left on device", "/disk/file")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ArrowBackend, "write", full)
        message = refused(1, *precompute_line(tiny_model, data, tmp_path / "c", *SMALL, *share(0, 1)))
    assert "No space left on device: /disk/file" in message
    assert len(commits(tmp_path / "c")) == call - 1
    assert not status(tmp_path / "c").is_final
    precompute(tiny_model, data, tmp_path / "c", *SMALL)
    assert cache_bytes(tmp_path / "c") == cache_bytes(reference)


def test_a_full_disk_at_the_last_shard_of_all(
    tmp_path: Path, tiny_model: Path, data: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is written when the base has nothing left to do."""
    real, count, last = ArrowBackend.write, itertools.count(1), len(commits(reference))

    def full(*arguments: Any) -> Any:
        if next(count) == last:
            raise OSError(28, "No space left on device", "/disk/file")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ArrowBackend, "write", full)
        assert "No space left" in refused(1, *precompute_line(tiny_model, data, tmp_path / "c", *SMALL))
    assert len(commits(tmp_path / "c")) == last - 1
    with pytest.raises(IncompleteCache):
        LogitCache.open(tmp_path / "c")


# what it says


def events(err: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in err.splitlines()]
    assert all(isinstance(e["time"], float) and isinstance(e["event"], str) for e in found)
    return found


def test_log_json_says_every_unit(tmp_path: Path, tiny_model: Path, data: Path) -> None:
    outcome = precompute(tiny_model, data, tmp_path / "c", *SMALL, "--log-json")
    units = [e for e in events(outcome.err) if e["event"] == "unit-done"]
    assert sorted(e["unit"] for e in units) == [c.stem for c in commits(tmp_path / "c")]
    found = status(tmp_path / "c")
    sums = [sum(e[name] for e in units) for name in ("positions", "tokens", "bytes")]
    assert sums == [found.num_positions, found.num_tokens, found.num_bytes]
    again = precompute(tiny_model, data, tmp_path / "c", *SMALL, "--log-json")
    assert not [e for e in events(again.err) if e["event"] == "unit-done"]


def test_log_json_says_what_failed_before_the_refusal(
    tmp_path: Path, tiny_model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, "20 abc")
    outcome = logitcache(*precompute_line(tiny_model, data, tmp_path / "c", *SMALL, "--log-json"))
    assert outcome.status == 1
    *lines, last = outcome.err.splitlines()
    found = events("\n".join(lines))
    assert [e for e in found if e["event"] == "unit-failed" and "position 2" in e["why"]]
    assert sum(e["event"] == "unit-done" for e in found) == len(commits(tmp_path / "c"))
    assert last.startswith("logitcache: ")


# --plan


def plan_facts(out: str) -> dict[str, str]:
    return {line[:8].strip(): line[8:].strip() for line in out.splitlines() if line[:8].strip() != "Nothing"}


def numbers(text: str) -> list[int]:
    return [int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*(?![\d.]*\d*\.)", text)]


def test_the_plan_counts_what_the_run_does_and_writes_nothing(
    tmp_path: Path, tiny_model: Path, data: Path, reference: Path
) -> None:
    with unchanged(tmp_path):
        outcome = precompute(tiny_model, data, tmp_path / "c", *SMALL, "--plan")
    assert not (tmp_path / "c").exists()
    plan, found = plan_facts(outcome.out), status(reference)
    assert numbers(plan["rows"])[:2] == [47, 0]
    assert numbers(plan["samples"])[0] == found.num_samples
    assert numbers(plan["tokens"])[:2] == [found.num_tokens, found.num_positions]
    assert numbers(plan["units"])[0] == found.num_shards
    assert outcome.out.endswith("Nothing was written.\n")
    with unchanged(reference):
        again = precompute(tiny_model, data, reference, *SMALL, "--plan")
    assert plan_facts(again.out)["units"] == plan["units"]


@pytest.mark.parametrize("store", ["arrow", "zarr"])
def test_the_planned_size_is_that_of_the_cache(store: str, tmp_path: Path, tiny_model: Path) -> None:
    """Of more positions than the 2,048 that are measured."""
    path = save(tmp_path / "rows.jsonl", text_rows(300, longest=100))
    more: list[object] = ["--store", store, "--top-k", 64, "--shard-positions", 4000, "--window-rows", 150]
    plan = plan_facts(precompute(tiny_model, path, tmp_path / "c", *more, "--plan").out)
    precompute(tiny_model, path, tmp_path / "c", *more)
    found = status(tmp_path / "c")
    assert found.num_positions > 4 * 2048
    match = re.match(r"([\d.]+) (B|KiB|MiB): (\d+) bytes a position, measured on ([\d,]+)", plan["size"])
    assert match is not None
    planned = float(match[1]) * {"B": 1, "KiB": 1024, "MiB": 1024**2}[match[2]]
    assert int(match[4].replace(",", "")) < found.num_positions / 2
    assert abs(planned - found.num_bytes) <= 0.2 * found.num_bytes
    whole = sum(p.stat().st_size for p in (tmp_path / "c").rglob("*") if p.is_file())
    assert abs(planned - whole) <= 0.25 * whole


def test_the_plan_says_time_and_money(tmp_path: Path, tiny_model: Path, data: Path, reference: Path) -> None:
    tokens = status(reference).num_tokens
    line = precompute_line(tiny_model, data, tmp_path / "c", *SMALL, "--plan", "--tokens-per-second", 1000)
    plan = plan_facts(done(*line, "--cost-per-hour", 2).out)
    assert plan["time"] == f"{tokens / 1000:.1f} s of one worker at 1,000 tokens/s (as given)"
    assert plan["cost"] == f"{tokens / 1000 / 3600 * 2:,.2f} at 2 an hour and worker"
    slow = plan_facts(done(*line[:-1], 0.01, "--cost-per-hour", 3.5).out)
    hours = tokens / 0.01 / 3600
    assert slow["time"].startswith(f"{hours:,.1f} h of one worker")
    assert slow["cost"] == f"{hours * 3.5:,.2f} at 3.5 an hour and worker"
    shared = done(*line[:-1], 0.01, *share(1, 4)).out
    assert f"{hours / 4:,.1f} h with 4 workers" in shared
    measured = plan_facts(done(*line[:-2]).out)
    assert measured["time"].endswith("(measured here)")


def test_a_url_has_workers_too(tiny_model: Path, data: Path, reference: Path) -> None:
    url = "memory://job-test/c"
    for index in (1, 0):
        precompute(tiny_model, data, url, *SMALL, *share(index, 2))  # type: ignore[arg-type]
        found = status(url)
        assert found.is_final == (index == 0)
        assert [w[:2] for w in found.workers] == ([(1, 2)] if index else [])
    assert bits(url) == bits(reference)


@pytest.fixture(autouse=True)
def _no_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return


@pytest.mark.parametrize(("rank", "size"), [("1", None), ("3", "2"), ("x", "2"), ("0", "0"), ("-1", "2")])
def test_an_environment_that_is_no_share_is_refused(
    rank: str, size: str | None, tmp_path: Path, tiny_model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    message = refused(2, *precompute_line(tiny_model, data, tmp_path / "c", *SMALL))
    assert "RANK" in message


def test_the_kinds_of_rows_are_those_of_one_window(tmp_path: Path, tiny_model: Path) -> None:
    rows = [row for kind in ROWS.values() for row in kind]
    path = save(tmp_path / "rows.jsonl", rows)
    precompute(tiny_model, path, tmp_path / "one", "--precision", "exact")
    for index in (1, 2, 0):
        precompute(tiny_model, path, tmp_path / "c", "--window-rows", 3, "--precision", "exact", *share(index, 3))
    assert bits(tmp_path / "c").keys() == bits(tmp_path / "one").keys()
