"""SIGTERM: a checkpoint where something is trained, a sentence, 143, and the same end when it goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.cli_harness import done, logitcache, precompute, text_data

import logitcache.evaluation.compare as logitcache_compare
from logitcache.cli.progress import TrainBar
from logitcache.events import StopRequest, Terminated
from logitcache.sweeps.cost import StepClock

ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sigterm")
    found = {"data": text_data(folder, 0, 8), "held": text_data(folder, 8, 12)}
    for name, data in (("cache", found["data"]), ("prior", found["held"])):
        precompute(tiny_model, data, folder / name)
        found[name] = folder / name
    return found


def terminate_in(patch: pytest.MonkeyPatch, callback: type, step: int) -> None:
    """SIGTERM to this process in a step of training, which is told of at its end, by one of its callbacks."""
    original = callback.on_step_end  # type: ignore[attr-defined]

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, args, state, control, **kwargs)

    patch.setattr(callback, "on_step_end", on_step_end)


def test_train_writes_a_checkpoint_and_goes_on_to_the_same_bytes(
    caches: dict[str, Path], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With evaluation and a best one; of 20 steps a checkpoint would be written every second."""
    line = ["train", "--model", tiny_model, "--cache", caches["cache"], "--rank", 2, "--lr", 0.1, "--max-steps", 20]
    line += ["--batch-size", 4, "--eval-prior", caches["prior"], "--eval-data", caches["held"], "--eval-steps", 2]
    line += ["--best-by", "new-ce"]
    done(*line, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch:
        terminate_in(patch, TrainBar, 4)
        stopped = logitcache(*line, "--out", tmp_path / "o")
    assert stopped.status == 143 and stopped.out == ""
    assert stopped.err.splitlines()[-1] == (
        "logitcache: stopped by SIGTERM. A checkpoint of step 5 was written; the same command with --resume goes on."
    )
    assert (tmp_path / "o" / "checkpoints" / "checkpoint-5" / "files.json").is_file()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert "Going on from checkpoint-5." in done(*line, "--out", tmp_path / "o", "--resume").err
    for name in (ADAPTER, "eval_log.jsonl"):
        assert (tmp_path / "o" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_train_that_is_asked_in_its_last_step_ends(
    caches: dict[str, Path], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminate_in(monkeypatch, TrainBar, 2)
    line = ["train", "--model", tiny_model, "--cache", caches["cache"], "--out", tmp_path / "o", "--max-steps", 2]
    assert done(*line).out.startswith("Trained 2 steps")


def test_evaluate_says_that_nothing_was_written(
    caches: dict[str, Path], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def terminated(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it goes on")

    monkeypatch.setattr(logitcache_compare, "_document_sums", terminated)
    stopped = logitcache("evaluate", "--model", tiny_model, "--data", caches["held"])
    assert (stopped.status, stopped.out) == (143, "")
    assert stopped.err.splitlines()[-1] == (
        "logitcache: stopped by SIGTERM. Nothing was written; the same command begins anew."
    )


def sweep_line(caches: dict[str, Path], model: Path, folder: Path, steps: int) -> list[str]:
    config = {"model": str(model), "cache": str(caches["cache"]), "new": str(caches["held"])}
    config |= {"prior": str(caches["held"]), "scales_of": "none", "methods": {"plain CE": {"regularizer": "none"}}}
    config["grid"] = {"lr": [0.01, 0.02], "rank": 2, "max_steps": steps}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return ["sweep", "--config", str(folder / "sweep.yaml"), "--out", str(folder / "s")]


def test_sweep_leaves_a_checkpoint_and_goes_on(
    caches: dict[str, Path], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = sweep_line(caches, tiny_model, tmp_path, 3)
    with monkeypatch.context() as patch:
        terminate_in(patch, StepClock, 1)
        stopped = logitcache(*line)
    assert stopped.status == 143
    assert stopped.err.splitlines()[-1] == (
        "logitcache: stopped by SIGTERM. A checkpoint of step 2 was written; the same command goes on."
    )
    assert len(list((tmp_path / "s").glob("runs/*/checkpoints/checkpoint-2/files.json"))) == 1
    again = done(*line)
    assert "Going on from checkpoint-2." in again.err and "2 of 2 runs finished, 0 failed" in again.out


def test_the_processes_of_a_sweep_stop_too(caches: dict[str, Path], tiny_model: Path, tmp_path: Path) -> None:
    """Each of two runs leaves a checkpoint, and no process stays behind."""
    line = [sys.executable, "-m", "logitcache", *sweep_line(caches, tiny_model, tmp_path, 100_000), "--jobs", "2"]
    with subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        while len(list(tmp_path.glob("s/runs/*/train_log.jsonl"))) < 2 and started.poll() is None:
            time.sleep(0.1)
        started.terminate()
        out, err = started.communicate()
    assert started.returncode == 143, err
    # not the last line in any case: Python's tracker of semaphores may have a word after it on a busy machine
    said = "logitcache: stopped by SIGTERM. Finished runs are kept; the same command goes on."
    assert err.splitlines().count(said) == 1 and "Traceback" not in err, err
    assert "failed" not in out
    assert len(list(tmp_path.glob("s/runs/*/checkpoints/checkpoint-*/files.json"))) == 2
    states = [json.loads(path.read_text(encoding="utf-8"))["status"] for path in tmp_path.glob("s/runs/*/run.json")]
    assert states == ["started", "started"]


def test_who_asks_twice_does_not_want_to_wait() -> None:
    stop = StopRequest("kept", "goes on")
    with stop.looked_for():
        stop.ask()
        assert stop.is_asked
        with pytest.raises(Terminated, match="kept"):
            stop.ask()
    with pytest.raises(Terminated):
        StopRequest("kept", "goes on").ask()
    patient = StopRequest("kept", "goes on", is_patient=True)
    patient.ask()
    patient.ask()
    assert patient.is_asked
