"""The precompute job with other teachers and sources: a divided model, a quantised one, samples of another cache."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from support.cli_harness import done, facts, precompute, refused
from support.quantised_base import bitsandbytes
from support.tiny_model import text_rows

from logitcache.capture.pending import PendingRecords
from logitcache.capture.teacher import TransformersTeacher
from logitcache.data.samples import Sample
from logitcache.storage import CachedSample, LogitCache, sample_id

SMALL = ("--batch-tokens", 128, "--shard-positions", 100, "--window-rows", 10)


def by_id(path: Path) -> dict[bytes, CachedSample]:
    return {sample_id(s.token_ids): s for s in LogitCache.open(path).samples()}


def test_two_processes_that_hold_one_model_are_one_worker(
    tmp_path: Path, tiny_model: Path, write_rows: Callable[..., Path]
) -> None:
    data = write_rows(text_rows(24))
    precompute(tiny_model, data, tmp_path / "whole", *SMALL, "--precision", "exact", "--top-k", 16)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    line += ["-m", "logitcache", "precompute", "--model", tiny_model, "--data", data]
    line += ["--cache", tmp_path / "divided", *SMALL, "--precision", "exact", "--top-k", 16, "--tensor-parallel", 2]
    ended = subprocess.run(
        [str(argument) for argument in line],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count("Cached ") == 1  # one of them speaks
    whole, divided = by_id(tmp_path / "whole"), by_id(tmp_path / "divided")
    assert whole.keys() == divided.keys() and len(whole) == 24
    for key, sample in whole.items():
        ours, theirs = sample.logprobs, divided[key].logprobs
        assert np.array_equal(ours.positions, theirs.positions)
        np.testing.assert_allclose(ours.label_logprobs, theirs.label_logprobs, rtol=0, atol=1e-4)
        np.testing.assert_allclose(ours.tail_logprobs, theirs.tail_logprobs, rtol=0, atol=1e-4)


def test_samples_of_another_cache_are_copied_and_the_base_runs_on_the_rest(
    tmp_path: Path, tiny_model: Path, write_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = text_rows(24)
    precompute(tiny_model, write_rows(rows), tmp_path / "whole", *SMALL)
    precompute(tiny_model, write_rows(rows[5:15]), tmp_path / "other", "--store", "arrow")
    seen: list[int] = []
    original = TransformersTeacher.launch

    def counted(self: TransformersTeacher, batch: Sequence[Sample]) -> PendingRecords:
        seen.append(len(batch))
        return original(self, batch)

    monkeypatch.setattr(TransformersTeacher, "launch", counted)
    outcome = precompute(tiny_model, write_rows(rows), tmp_path / "c", *SMALL, "--samples-from", tmp_path / "other")
    assert sum(seen) == 14
    assert "10 were copied from" in outcome.out
    whole, copied = by_id(tmp_path / "whole"), by_id(tmp_path / "c")
    assert whole.keys() == copied.keys()
    for key, sample in whole.items():  # other batches, other padding: float noise may move a step of 1/32 nat
        np.testing.assert_allclose(
            sample.logprobs.label_logprobs, copied[key].logprobs.label_logprobs, rtol=0, atol=2 / 1024
        )
    done("verify", tmp_path / "c")


def test_a_cache_of_other_settings_gives_no_samples(
    tmp_path: Path, tiny_model: Path, write_rows: Callable[..., Path]
) -> None:
    data = write_rows(text_rows(6))
    precompute(tiny_model, data, tmp_path / "other", "--top-k", 4)
    line = ["precompute", "--model", tiny_model, "--data", data, "--cache", tmp_path / "c", "--top-k", 8]
    message = refused(4, *line, "--samples-from", tmp_path / "other")
    assert "top_k" in message and not (tmp_path / "c").exists()


@pytest.mark.parametrize("flags", [["--shard-index", 0, "--num-shards", 2], ["--num-shards", 2]])
def test_processes_that_hold_one_model_have_no_shares(flags: list[object], tmp_path: Path) -> None:
    line = [
        "precompute",
        "--model",
        "m",
        "--data",
        "d.jsonl",
        "--cache",
        tmp_path / "c",
        "--tensor-parallel",
        2,
        *flags,
    ]
    assert "leave --shard-index out" in refused(2, *line)


def test_more_shards_than_a_cache_can_list_are_refused_before_the_work(
    tmp_path: Path, tiny_model: Path, write_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(text_rows(24))
    job = importlib.import_module("logitcache.capture.worker")
    precompute(tiny_model, data, tmp_path / "whole", *SMALL)
    num_units = facts(tmp_path / "whole")["contents"]["num_shards"]
    line = ["precompute", "--model", tiny_model, "--data", data, "--cache", tmp_path / "c", *SMALL]
    monkeypatch.setattr(job, "MAX_SHARDS", num_units // 4)
    for more in ([], ["--plan"]):
        message = refused(1, *line, *more)
        assert "It could not be finished. Use --shard-positions" in message
        assert not (tmp_path / "c").exists()
    done(*line, "--shard-positions", 4000, "--window-rows", 100)


@bitsandbytes
def test_a_quantised_base_says_so(tmp_path: Path, tiny_model: Path, write_rows: Callable[..., Path]) -> None:
    data = write_rows(text_rows(6))
    precompute(tiny_model, data, tmp_path / "c", "--load-in", "8bit")
    assert facts(tmp_path / "c")["model"]["quantization"] == "8bit"
    again = ["precompute", "--model", tiny_model, "--data", data, "--cache", tmp_path / "c"]
    assert "quantization" in refused(4, *again)
    train = ["train", "--model", tiny_model, "--cache", tmp_path / "c", "--out", tmp_path / "o", "--max-steps", 1]
    assert "--other-precision" in refused(4, *train)
    assert "--max-start-kl is 0.1" in done(*train, "--other-precision", "--batch-size", 2).err
