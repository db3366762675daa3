"""An engine in a process of its own: what it answers, how it ends, and what is said when it fails."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.hidden_engine import in_place_of_vllm
from support.processes import assert_gone, is_there, stop
from support.tiny_model import make_model
from support.tiny_runs import make_samples

from logitcache.capture.engines import process as process_module
from logitcache.capture.engines.process import EngineProcess
from logitcache.capture.engines.serving import reason_of
from logitcache.capture.engines.vllm import VllmBase, vllm_identity, vllm_teacher
from logitcache.capture.engines.vllm_told import arguments_of, engine_device, engine_environment, visible_devices
from logitcache.capture.settings import EngineSettings
from logitcache.capture.teacher import capture
from logitcache.errors import EngineFailed, InputNotFound, InvalidSettings, UnsupportedModel
from logitcache.models.loading import find_model, load_base
from logitcache.storage import BaseLogprobs

CPU = torch.device("cpu")
SAMPLES = make_samples(11)


def base_of(model: Path, max_length: int = 64) -> VllmBase:
    source = find_model(str(model))
    return VllmBase(source, vllm_identity(source, "float32"), "0.32.0", EngineSettings(), max_length, 512, CPU)


def started(model: Path) -> EngineProcess:
    return base_of(model).start()


def teacher(process: EngineProcess, model: Path, *kept: Any) -> Any:
    return vllm_teacher(process, base_of(model).head(), *kept)


def assert_same(found: BaseLogprobs, expected: BaseLogprobs) -> None:
    for name, column in expected.columns().items():
        other = getattr(found, name)
        if column.dtype.kind == "f":
            np.testing.assert_allclose(other, column, atol=2e-6)
        else:
            np.testing.assert_array_equal(other, column)


def test_records_are_those_of_transformers_with_groups_and_draws(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_place_of_vllm(monkeypatch)
    model = load_base(find_model(str(tiny_model)), "float32", CPU).model
    groups = (np.arange(260) % 5).astype(np.uint8)
    with started(tiny_model) as process:
        engine = teacher(process, tiny_model, 8, groups, 3)
        launched = [engine.launch(SAMPLES[i : i + 4]) for i in range(0, 11, 4)]  # all before the first is fetched
        found = [record for one in launched for record in one.records()]
    expected = capture(model, SAMPLES, 8, torch.from_numpy(groups), 3)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)
    assert_gone(process.pid)


def failure(model: Path, patch: pytest.MonkeyPatch, fault: str) -> str:
    """What is said where an engine fails so; its process is gone then."""
    in_place_of_vllm(patch, fault)
    pids: list[int] = []

    def run() -> None:
        with started(model) as process:
            pids.append(process.pid)
            teacher(process, model, 8)(SAMPLES)

    with pytest.raises(EngineFailed) as raised:
        run()
    assert_gone(*pids, seconds=0)
    return str(raised.value)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("does not start", "starting vLLM: the model is cursed. Nothing was run."),
        ("dies at the start", "ended with status 3 (the last words)"),
        ("dies", "was killed by signal 9"),
        ("fails", "running vLLM: a kernel failed. Nothing of it was cached"),
        ("runs out of memory", "memory ran out (CUDA out of memory"),
        ("refuses a sample", f"on {SAMPLES[0].origin}: the prompt is too long. Nothing of it was cached"),
    ],
)
def test_what_fails_is_said(fault: str, said: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = failure(tiny_model, monkeypatch, fault)
    assert said in found
    assert "--max-length" not in found


def test_an_engine_that_says_nothing_is_ended(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "SILENT_SECONDS", 2.0)
    monkeypatch.setattr(process_module, "LEAVING_SECONDS", 0.5)
    found = failure(tiny_model, monkeypatch, "is silent")
    assert "has answered nothing for" in found and "11 samples" in found


def test_one_that_is_stopped_is_ended(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_place_of_vllm(monkeypatch)
    monkeypatch.setattr(process_module, "SILENT_SECONDS", 2.0)
    monkeypatch.setattr(process_module, "LEAVING_SECONDS", 0.5)
    with started(tiny_model) as process:
        stop(process.pid)
        with pytest.raises(EngineFailed, match="has answered nothing for"):
            teacher(process, tiny_model, 8)(SAMPLES)
    assert_gone(process.pid, seconds=0)


def test_more_than_the_pipe_holds_is_asked_of_one_that_is_stopped(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_place_of_vllm(monkeypatch)
    monkeypatch.setattr(process_module, "SILENT_SECONDS", 2.0)
    monkeypatch.setattr(process_module, "LEAVING_SECONDS", 0.5)
    (long,) = make_samples(1)
    long = replace(long, token_ids=np.zeros(500_000, np.uint32))
    with started(tiny_model) as process:
        stop(process.pid)
        with pytest.raises(EngineFailed, match="has answered nothing for"):
            process.ask([long])
    assert_gone(process.pid, seconds=0)


def test_answers_that_nobody_fetches_count_for_nothing(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither as memory that is held, nor as work that is waited for."""
    in_place_of_vllm(monkeypatch)
    monkeypatch.setattr(process_module, "SILENT_SECONDS", 3.0)
    with started(tiny_model) as process:
        engine = teacher(process, tiny_model, 8)
        dropped = [engine.launch(SAMPLES[i : i + 2]) for i in (0, 2)]
        kept = engine.launch(SAMPLES[4:6])
        del dropped
        time.sleep(4)  # longer than it may be silent: it has nothing to do
        later = engine.launch(SAMPLES[6:8])
        assert len(kept.records()) == len(later.records()) == 2
        assert not process._arrived and not process._origins
        process.close()
        with pytest.raises(EngineFailed, match="it was ended"):
            process.ask(SAMPLES)


@pytest.mark.parametrize("fault", ["starts another", "does not leave"])
def test_nothing_is_left_of_it(fault: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_place_of_vllm(monkeypatch, fault)
    monkeypatch.setattr(process_module, "LEAVING_SECONDS", 0.5)
    with started(tiny_model) as process:
        process.ask(SAMPLES)
        assert is_there(process.pid)
    assert_gone(process.pid, process.facts.get("other", process.pid), seconds=0)


JOB = """
import sys
from pathlib import Path
import pytest
sys.path.insert(0, sys.argv[1])
from capture.test_engine_process import SAMPLES, started
from support.hidden_engine import in_place_of_vllm
in_place_of_vllm(pytest.MonkeyPatch(), sys.argv[3])
process = started(Path(sys.argv[2]))
process.ask(SAMPLES)
print(process.pid, process.facts.get("other", process.pid), flush=True)
process.fetch([0])
input()
"""


@pytest.mark.parametrize("fault", ["", "starts another", "does not leave"])
def test_nothing_is_left_where_the_job_is_killed(fault: str, tiny_model: Path) -> None:
    arguments = [sys.executable, "-c", JOB, str(Path(__file__).parents[1]), str(tiny_model), fault]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        pids = [int(pid) for pid in job.stdout.readline().split()]
        assert all(map(is_there, pids))
        job.kill()
    assert_gone(*pids, seconds=15)


def test_variables_of_torchrun_are_not_the_engines() -> None:
    ours = {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x", "HOME": "/h", "CUDA_VISIBLE_DEVICES": "0,1"}
    found = engine_environment(ours, ["1"])
    assert found.keys() & ours.keys() == {"HOME", "CUDA_VISIBLE_DEVICES"} and found["CUDA_VISIBLE_DEVICES"] == "1"
    assert found["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert found["VLLM_FLOAT32_MATMUL_PRECISION"] == "highest"
    assert engine_environment({}, [])["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    ("visible", "rank", "num", "expected"),
    [("", "0", 2, ["0", "1"]), ("", "1", 2, ["2", "3"]), ("5,7,6", "2", 1, ["6"]), ("GPU-a,GPU-b", "0", 2, None)],
)
def test_each_worker_has_its_own_devices(
    visible: str, rank: str, num: int, expected: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("LOCAL_RANK", rank)
    cuda = torch.device("cuda", 0)
    assert visible_devices(num, cuda) == (expected or visible.split(","))
    with pytest.raises(InputNotFound, match="Start fewer processes"):
        visible_devices(5, cuda)
    assert visible_devices(num, CPU) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert engine_device("cuda", num).index == int(rank) * num


def test_arguments_of_vllms_own() -> None:
    found = arguments_of(["gpu-memory-utilization=0.7", "enforce_eager=true", "kv_cache_dtype=fp8"])
    assert found == {"gpu_memory_utilization": 0.7, "enforce_eager": True, "kv_cache_dtype": "fp8"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["enforce_eager"], "expected name=value"),
        (["=1"], "expected name=value"),
        (["max_model_len=5"], "use --max-length"),
        (["tensor-parallel-size=2"], "use --tensor-parallel"),
        (["hf_overrides={}"], "set here"),
        (["a=1", "a=2"], "given twice"),
    ],
)
def test_arguments_that_are_refused(given: list[str], said: str) -> None:
    with pytest.raises(InvalidSettings, match=said):
        arguments_of(given)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("one line.", "one line"),
        ("", "ValueError"),
        ("first\nsecond", "first"),
        (
            "2 validation errors for M\n  Value error, too long (7). [type=value_error, input_value=3]\nmore",
            "too long (7)",
        ),
        ("1 validation error for M\nfield\n  Input should be 1 [type=x]", "Input should be 1"),
    ],
)
def test_reason_is_the_line_that_says_it(text: str, said: str) -> None:
    assert reason_of(ValueError(text)) == said


def test_weights_beside_those_that_are_fingerprinted_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "m")
    shutil.copy(tiny_model / "model.safetensors", tmp_path / "m" / "consolidated.safetensors")
    with pytest.raises(EngineFailed, match=r"found consolidated\.safetensors beside it"):
        started(tmp_path / "m")


def test_frequencies_that_depend_on_the_length_are_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    make_model(rope_parameters=rope).save_pretrained(tmp_path / "m")
    base_of(tmp_path / "m").head()
    longer = base_of(tmp_path / "m", 65)
    with pytest.raises(UnsupportedModel, match="Use --max-length 64"):
        longer.head()
