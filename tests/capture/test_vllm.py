"""vLLM itself as the teacher (`scripts/test-vllm` installs it): its records, and that nothing of it stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from support.cli_harness import commits, done, facts, refused, train_line
from support.processes import assert_gone
from support.tiny_model import make_model, make_tokenizer, text_rows

from logitcache.capture.calibration import compare, read_calibration
from logitcache.storage import LogitCache

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
KEPT = ["--top-k", 16, "--tail-groups", 8, "--tail-samples", 4, "--precision", "exact", "--max-length", 100]
TOLD = ["--engine-arg", "enforce_eager=true"]
SLOWLY = ["--batch-tokens", 128, "--shard-positions", 128]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with heads of 32, which vLLM's attention on a CPU knows."""
    folder = tmp_path_factory.mktemp("models") / "base"
    make_model(hidden_size=64, num_attention_heads=2, num_key_value_heads=1).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in text_rows(60)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory, model: Path, data: Path) -> Path:
    out = tmp_path_factory.mktemp("calibration") / "c.json"
    done("calibrate", "--model", model, "--data", data, "--out", out, "--max-length", 100, *TOLD)
    return out


def line(model: Path, data: Path, cache: Path, calibration: Path, *more: object) -> list[object]:
    engine = ["--engine", "vllm", "--calibration", calibration, *TOLD]
    return ["precompute", "--model", model, "--data", data, "--cache", cache, *KEPT, *engine, *more]


def test_it_says_what_transformers_says(calibrated: Path) -> None:
    found = read_calibration(calibrated)
    told = ("device=cpu", "max_model_len=100", "tensor_parallel_size=1", "enforce_eager=true")
    assert found.engine.arguments == told
    assert found.found.mean_kl_nats <= 1e-10 and found.found.max_tail_nats <= 1e-4 and found.found.mean_overlap == 1


def test_a_cache_with_groups_and_draws_trains(model: Path, data: Path, calibrated: Path, tmp_path: Path) -> None:
    """Its draws are those of transformers' cache but where a float's last digit decides."""
    done(*line(model, data, tmp_path / "by-vllm", calibrated))
    done("precompute", "--model", model, "--data", data, "--cache", tmp_path / "by-transformers", *KEPT)
    ours, theirs = (LogitCache.open(tmp_path / name) for name in ("by-vllm", "by-transformers"))
    ids = [ours.sample(i).token_ids for i in range(len(ours))]
    pairs = [(ours.lookup(i), theirs.lookup(i)) for i in ids]
    found = compare([b for _, b in pairs], [a for a, _ in pairs])
    assert found.mean_kl_nats <= 1e-10 and found.max_tail_nats <= 1e-4
    for name in ("tail_group_logprobs", "tail_sample_logprobs"):
        one, other = (np.concatenate([getattr(pair[i], name) for pair in pairs]) for i in (0, 1))
        assert (np.abs(one - other) < 1e-4).mean() > 0.999
    assert facts(tmp_path / "by-vllm")["model"]["attention"] == "vllm"
    done(*train_line(model, tmp_path / "by-vllm", tmp_path / "adapter"))


def test_ray_s_workers_run_it(model: Path, data: Path, calibrated: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    ray = ["--engine", "ray", "--num-workers", 1]
    done(*[a for a in line(model, data, tmp_path / "c", calibrated) if a not in ("--engine", "vllm")], *ray)
    assert facts(tmp_path / "c")["model"]["attention"] == "vllm"


def test_what_it_refuses_is_said(model: Path, data: Path, calibrated: Path, tmp_path: Path) -> None:
    out = ["--model", model, "--data", data, "--out", tmp_path / "c.json"]
    assert "no argument of that name" in refused(1, "calibrate", *out, "--engine-arg", "enforce_eagre=true")
    said = refused(1, "calibrate", *out, "--max-length", 4096, *TOLD)
    assert "starting vLLM" in said and "4096" in said and "max_model_len" in said
    differs = refused(1, *line(model, data, tmp_path / "c", calibrated, "--engine-arg", "block_size=32"))
    assert "block_size=32" in differs


@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL", "SIGKILL of the engine"])
def test_nothing_of_it_stays(how: str, model: Path, data: Path, calibrated: Path, tmp_path: Path) -> None:
    """And the same command goes on."""
    arguments = list(map(str, line(model, data, tmp_path / "c", calibrated, *SLOWLY)))
    job = subprocess.Popen([sys.executable, "-m", "logitcache", *arguments], stderr=subprocess.PIPE, text=True)
    engine = engine_of(job)
    while not (tmp_path / "c").is_dir() or (not commits(tmp_path / "c") and job.poll() is None):
        time.sleep(0.05)
    os.kill(engine if how.endswith("engine") else job.pid, getattr(signal, how.split()[0]))
    _, said = job.communicate(timeout=60)
    expected = {"SIGTERM": 143, "SIGKILL": -9, "SIGKILL of the engine": 1}[how]
    assert job.returncode in (expected, 0), said  # 0: it was done before
    assert_gone(engine, job.pid)
    if how.endswith("engine") and job.returncode:
        assert "was killed by signal 9" in said


def engine_of(job: subprocess.Popen[str]) -> int:
    """Its process, when it is there: a child that leads a session."""
    while job.poll() is None:
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        for pid in map(int, children):
            if os.getsid(pid) == pid:
                return pid
        time.sleep(0.02)
    raise AssertionError(job.communicate())
