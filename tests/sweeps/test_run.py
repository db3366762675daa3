"""A grid of runs against one cache: each done once, whatever happens to the process that does it."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from support.breadth import some_of
from support.cli_harness import done, flip_byte, logitcache, precompute, refused, snapshot
from support.tiny_model import make_model, make_tokenizer, text_rows
from transformers import AutoModelForCausalLM

from logitcache.data.rows import read_rows
from logitcache.data.samples import make_samples
from logitcache.evaluation.compare import compare, load_adapter
from logitcache.json_files import line_of
from logitcache.models.loading import find_model, load_base, load_tokenizer
from logitcache.sweeps.config import read_config
from logitcache.sweeps.folder import state_of
from logitcache.sweeps.run import _last_step
from logitcache.training import run_folder

Write = Callable[..., Path]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def inputs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model, its cache, and held-out text; what every configuration here begins with."""
    folder = tmp_path_factory.mktemp("sweep-inputs")
    texts = {"train": text_rows(8), "new": text_rows(12)[8:], "prior": [{"text": f"other {i} words"} for i in range(3)]}
    for name, rows in texts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    precompute(tiny_model, folder / "train.jsonl", folder / "cache")
    paths = {"cache": folder / "cache", "new": folder / "new.jsonl", "prior": folder / "prior.jsonl"}
    return {"model": str(tiny_model), **{name: str(path) for name, path in paths.items()}}


GRID = {"lr": [1e-3, 2e-3], "max_steps": 2, "batch_size": 2, "rank": 2, "log_every": 1}
METHODS = {"plain": {"regularizer": "none"}, "masked": {"top_k": 4}}


def write_config(folder: Path, inputs: dict[str, Any], **keys: Any) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(
        yaml.safe_dump({**inputs, "grid": GRID, "methods": METHODS, **keys}, sort_keys=False), encoding="utf-8"
    )
    return path


def results(out: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("runs/*/result.json"))]
    return {result["name"]: result for result in found}


@pytest.fixture(scope="module")
def swept(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("swept")
    outcome = done("sweep", "--config", write_config(folder, inputs), "--out", folder / "out")
    assert "4 of 4 runs finished, 0 failed" in outcome.out
    assert outcome.out.count("learnt") == 4 and "masked (lr 0.001): learnt" in outcome.out
    return folder / "out"


def test_every_run_is_there_with_what_it_came_to(swept: Path, inputs: dict[str, Any]) -> None:
    """Learning and forgetting are those of the saved adapter on the untouched base, by another way."""
    source = find_model(inputs["model"])
    samples = {
        name: make_samples(read_rows(inputs[name]), load_tokenizer(source), 1024, 260).samples
        for name in ("new", "prior")
    }
    base = load_base(source, "float32", CPU)
    for name, result in results(swept).items():
        assert state_of(swept / "runs" / name) == "finished"
        adapted = load_adapter(load_base(source, "float32", CPU).model, str(swept / "runs" / name))
        for text, held_out in samples.items():
            expected = compare(base.model, adapted, held_out)
            assert expected.after is not None and expected.kl_nats is not None
            assert result[text]["before"]["ce_nats"] == pytest.approx(expected.before.ce_nats, abs=1e-5)
            assert result[text]["after"]["ce_nats"] == pytest.approx(expected.after.ce_nats, abs=1e-5)
            assert result[text]["kl_nats"] == pytest.approx(expected.kl_nats, abs=1e-5)  # 256 of 259 alternatives
            assert result[text]["num_first_changed"] == expected.num_first_changed
            assert result[text]["num_documents"] == len(held_out)
        assert result["num_steps"] == 2
        assert not (swept / "runs" / name / "checkpoints").exists()
    masked = [r for r in results(swept).values() if r["method"] == "masked"]
    assert len(masked) == 2 and len(results(swept)) == 4
    run = json.loads((swept / "runs" / masked[0]["name"] / "run.json").read_text(encoding="utf-8"))
    assert run["settings"]["top_k"] == 4


def test_a_run_is_what_train_does_alone(swept: Path, inputs: dict[str, Any], tmp_path: Path) -> None:
    """The base is shared by the runs of a process, and none of them changes it for the next."""
    masked = [r for r in results(swept).values() if r["method"] == "masked"][-1]
    lr = masked["settings"]["lr"]
    line = ["train", "--model", inputs["model"], "--cache", inputs["cache"], "--out", tmp_path / "alone", "--lr", lr]
    done(*line, "--top-k", 4, "--max-steps", 2, "--batch-size", 2, "--rank", 2, "--log-every", 1)
    ours, alone = (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(inputs["model"]), str(folder)).state_dict()
        for folder in (swept / "runs" / masked["name"], tmp_path / "alone")
    )
    assert all(torch.equal(ours[name], alone[name]) for name in alone)


def test_a_base_that_runs_rewrite_is_the_same_for_the_next(inputs: dict[str, Any], tmp_path: Path) -> None:
    grid = {**GRID, "lr": 1e-3, "adapter": ["pissa", "lora"]}
    config = write_config(tmp_path, inputs, grid=grid, methods={"masked": {}})
    done("sweep", "--config", config, "--out", tmp_path / "out")
    alone = write_config(tmp_path, inputs, grid={**grid, "adapter": "lora"}, methods={"masked": {}})
    done("sweep", "--config", alone, "--out", tmp_path / "alone")
    (single,) = results(tmp_path / "alone").values()
    assert results(tmp_path / "out")[single["name"]]["new"] == single["new"]


def test_nothing_finished_is_repeated(swept: Path, inputs: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(swept, out)
    removed = sorted(results(out))[0]
    shutil.rmtree(out / "runs" / removed)
    before = snapshot(out / "runs")
    outcome = done("sweep", "--config", write_config(tmp_path, inputs), "--out", out)
    assert "4 runs, 1 of them to do." in outcome.err and outcome.out.count("learnt") == 1
    after = snapshot(out / "runs")
    assert {k: after[k] for k in before} == before
    assert results(out)[removed]["new"] == results(swept)[removed]["new"]
    assert snapshot(out / "probe") == snapshot(swept / "probe")


def test_a_grid_may_grow(swept: Path, inputs: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(swept, out)
    config = write_config(tmp_path, inputs, grid={**GRID, "lr": 1e-3, "seed": [0, 1]})
    done("sweep", "--config", config, "--out", out)
    assert len(results(out)) == 6
    listed = json.loads((out / "sweep.json").read_text(encoding="utf-8"))
    assert {r["name"] for r in listed["runs"]} == results(out).keys()


def test_a_damaged_sweep_is_not_gone_on_with(swept: Path, inputs: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(swept, tmp_path / "out")
    head = tmp_path / "out" / "sweep.json"
    head.write_bytes(head.read_bytes().replace(b'"num_train_tokens": ', b'"num_train_tokens": 1'))
    said = refused(3, "sweep", "--config", write_config(tmp_path, inputs), "--out", tmp_path / "out")
    assert f"reading {head}: expected the checksum" in said and "choose another --out" in said


def test_the_last_step_of_a_damaged_log_is_not_known(tmp_path: Path) -> None:
    assert _last_step(tmp_path) is None
    log, lines = tmp_path / "train_log.jsonl", [line_of({"step": step}) for step in (1, 2)]
    log.write_bytes(b"".join(lines) + lines[0][:9])
    assert _last_step(tmp_path) == 2
    log.write_bytes(b"".join(lines).replace(b'"step": 2', b'"step": 7'))
    assert _last_step(tmp_path) is None


def test_a_failed_run_is_recorded_and_the_others_go_on(inputs: dict[str, Any], tmp_path: Path) -> None:
    """And the sweep's exit status is 1, also where the run failed before this command."""
    config = write_config(
        tmp_path, inputs, grid={**GRID, "lr": 1e-3}, methods={"mad": {"lr": 1e35}, "sane": {"regularizer": "none"}}
    )
    line = ["sweep", "--config", config, "--out", tmp_path / "out"]
    outcome = logitcache(*line)
    assert outcome.status == 1 and "1 of 2 runs finished, 1 failed" in outcome.out
    (path,) = (tmp_path / "out").glob("runs/*/failed.json")
    failed = json.loads(path.read_text(encoding="utf-8"))
    assert failed["method"] == "mad" and "not finite" in failed["error"] and "traceback" not in failed
    again = logitcache(*line)
    assert again.status == 1 and "2 runs, 0 of them to do." in again.err and "1 failed" in again.out
    retried = logitcache(*line, "--retry-failed")
    assert retried.status == 1 and "2 runs, 1 of them to do." in retried.err and "1 failed" in retried.out
    sane = write_config(tmp_path, inputs, grid={**GRID, "lr": 1e-3}, methods={"sane": {"regularizer": "none"}})
    assert "1 of 1 runs finished, 0 failed" in done("sweep", "--config", sane, "--out", tmp_path / "out").out


def test_a_run_that_is_trained_by_hand_is_left_to_it(inputs: dict[str, Any], tmp_path: Path) -> None:
    config, out = write_config(tmp_path, inputs, grid={**GRID, "lr": 1e-3}, methods={"masked": {}}), tmp_path / "out"
    (spec,) = read_config(config).runs
    with run_folder.held(out / "runs" / spec.name):
        said = done("sweep", "--config", config, "--out", out)
    assert "0 of 1 runs finished, 0 failed" in said.out and state_of(out / "runs" / spec.name) == "waiting"
    assert "1 of 1 runs finished, 0 failed" in done("sweep", "--config", config, "--out", out).out


def test_a_run_that_goes_on_says_what_it_left(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = write_config(tmp_path, inputs, grid={**GRID, "lr": 1e-3}, methods={"masked": {}}), tmp_path / "out"
    (spec,) = read_config(config).runs

    def stop(*event: Any, **_: Any) -> None:
        if event[2].global_step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("logitcache.training.logs.JsonLog.on_step_end", stop)
        assert logitcache("sweep", "--config", config, "--out", out).status == 130
    flip_byte(out / "runs" / spec.name / "checkpoints" / "checkpoint-1" / "optimizer.pt")
    said = done("sweep", "--config", config, "--out", out)
    assert f"{spec.name}: checkpoint-1 was left: optimizer.pt is not what was written." in said.err.splitlines()
    assert "1 of 1 runs finished" in said.out


def test_a_full_disk_stops_the_sweep_with_one_sentence(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was finished before it stays, so that the same command does the rest."""
    import logitcache.sweeps.run as module

    config, out = write_config(tmp_path, inputs), tmp_path / "out"
    write, count = module.write_checked, 0

    def full(path: Path, value: dict[str, Any]) -> None:
        nonlocal count
        count += path.name == "result.json"
        if path.name == "result.json" and count == 2:
            raise OSError(28, "No space left on device", str(path))
        write(path, value)

    monkeypatch.setattr(module, "write_checked", full)
    outcome = logitcache("sweep", "--config", config, "--out", out)
    assert outcome.status == 1 and "No space left on device" in outcome.err.splitlines()[-1]
    assert len(results(out)) == 1 and not list(out.glob("runs/*/failed.json"))
    monkeypatch.undo()
    assert "3 of them to do" in done("sweep", "--config", config, "--out", out).err
    assert len(results(out)) == 4


def test_a_damaged_cache_stops_the_sweep(inputs: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(inputs["cache"], tmp_path / "cache")
    (victim,) = (tmp_path / "cache").glob("shards/*/logprobs.arrow")
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 255
    victim.write_bytes(content)
    config = write_config(tmp_path, {**inputs, "cache": str(tmp_path / "cache")}, methods={"masked": {}})
    outcome = logitcache("sweep", "--config", config, "--out", tmp_path / "out")
    assert outcome.status == 3, outcome.err
    assert not list((tmp_path / "out").glob("runs/*/failed.json"))


def test_killed_at_any_moment_it_goes_on(inputs: dict[str, Any], swept: Path, tmp_path: Path) -> None:
    """kill -9 at one of three times, or at each; in the end the same results, and no run twice."""
    config, out = write_config(tmp_path, inputs), tmp_path / "out"
    line = [sys.executable, "-m", "logitcache", "sweep", "--config", str(config), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for enough in some_of((1, 2, 3), 1):
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        while process.poll() is None and len(list(out.glob("runs/*/run.json"))) < enough:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done("sweep", "--config", config, "--out", out)
    expected = results(swept)
    found = results(out)
    assert found.keys() == expected.keys()
    for name, result in found.items():
        assert result["new"] == expected[name]["new"] and result["prior"] == expected[name]["prior"]


def test_what_another_process_is_at_is_left_to_it(inputs: dict[str, Any], swept: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "runs").mkdir(parents=True)
    busy = sorted(results(swept))[0]
    with (out / "runs" / f"{busy}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        outcome = done("sweep", "--config", write_config(tmp_path, inputs), "--out", out)
    assert "3 of 4 runs finished" in outcome.out and results(out).keys() == results(swept).keys() - {busy}


def test_two_processes_share_the_runs(inputs: dict[str, Any], swept: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = done("sweep", "--config", write_config(tmp_path, inputs), "--out", out, "--jobs", 2)
    assert outcome.out.count("learnt") == 4 and "4 of 4 runs finished" in outcome.out
    expected = results(swept)
    for name, result in results(out).items():
        assert result["new"]["after"]["ce_nats"] == pytest.approx(expected[name]["new"]["after"]["ce_nats"], abs=1e-6)


def test_every_run_says_what_it_cost_and_what_a_live_base_would_have_added(swept: Path) -> None:
    for name, result in results(swept).items():
        cost = result["cost"]
        assert cost["step_seconds"] > 0 and cost["load"] >= 0 and cost["own_threads"] == torch.get_num_threads()
        if name.startswith("plain"):
            assert cost["base_step_seconds"] is None and cost["base_once_seconds"] is None
        else:
            assert cost["base_once_seconds"] > cost["base_step_seconds"] > 0  # 8 samples against 2


def test_a_dry_run_lists_and_does_nothing(swept: Path, inputs: dict[str, Any], tmp_path: Path) -> None:
    config = write_config(tmp_path, inputs)
    outcome = done("sweep", "--config", config, "--out", tmp_path / "none", "--dry-run")
    assert "4 runs, 0 of them finished" in outcome.out and not (tmp_path / "none").exists()
    assert "4 runs, 4 of them finished" in done("sweep", "--config", config, "--out", swept, "--dry-run").out


def test_bad_inputs_are_one_sentence(
    swept: Path, inputs: dict[str, Any], tmp_path: Path, other_model: Path, write_rows: Write
) -> None:
    config = write_config(tmp_path, inputs)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "expected an empty folder or a sweep" in refused(1, "sweep", "--config", config, "--out", tmp_path / "full")
    other = write_config(tmp_path, {**inputs, "model": str(other_model)})
    assert "differs in weights" in refused(4, "sweep", "--config", other, "--out", tmp_path / "out")
    text = write_config(tmp_path, {**inputs, "prior": str(write_rows([{"text": "something else"}]))})
    assert "the sweep there differs in texts" in refused(4, "sweep", "--config", text, "--out", swept)
    wide = write_config(tmp_path, inputs, methods={"masked": {"top_k": 9}})
    assert "holds 8 alternatives a position" in refused(1, "sweep", "--config", wide, "--out", tmp_path / "out")
    groups = write_config(tmp_path, inputs, methods={"masked": {"tail": "groups"}})
    assert "--tail-groups" in refused(1, "sweep", "--config", groups, "--out", tmp_path / "out")
    unknown = write_config(tmp_path, inputs, methods={"masked": {"adapter": "lorra"}})
    assert "expected one of" in refused(1, "sweep", "--config", unknown, "--out", tmp_path / "out")
    gone = write_config(tmp_path, {**inputs, "new": str(tmp_path / "gone.jsonl")})
    assert "gone.jsonl" in refused(2, "sweep", "--config", gone, "--out", tmp_path / "out")
    assert refused(2, "sweep", "--config", tmp_path / "no.yaml", "--out", tmp_path / "out")


# --- what all runs share ---------------------------------------------------------------------------------------------

ONE = {"grid": {**GRID, "lr": 1e-3}, "methods": {"masked": {"tail": "auto"}}}


def run_json(out: Path) -> dict[str, Any]:
    (path,) = out.glob("runs/*/run.json")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


@pytest.mark.filterwarnings("ignore")  # bitsandbytes on a processor
def test_a_sweep_of_a_quantised_base(inputs: dict[str, Any], tmp_path: Path) -> None:
    """The run, the base it is measured against and the pairing are those that were asked for."""
    pytest.importorskip("bitsandbytes")
    config = write_config(tmp_path, inputs, **ONE, load_in="8bit")
    assert "unquantised weights, the model has 8bit" in refused(4, "sweep", "--config", config, "--out", tmp_path / "a")
    config = write_config(tmp_path, inputs, **ONE, load_in="8bit", other_precision=True)
    done("sweep", "--config", config, "--out", tmp_path / "b")
    rules = {"teacher_is_not_base": False, "ignore_padding": False, "other_precision": True, "max_start_kl": None}
    assert run_json(tmp_path / "b")["pairing"] == {**rules, "load_in": "8bit"}
    assert run_json(tmp_path / "b")["model"]["quantization"] == "8bit"
    probe = json.loads((tmp_path / "b" / "probe" / "prior" / "manifest.json").read_text(encoding="utf-8"))
    assert "8bit" in json.dumps(probe)


def test_a_sweep_that_learns_from_another_model(inputs: dict[str, Any], other_model: Path, tmp_path: Path) -> None:
    """The cache is the teacher's; what is learnt and forgotten is measured against the student's own base."""
    precompute(other_model, Path(inputs["new"]), tmp_path / "lessons")
    taught = {**inputs, "cache": str(tmp_path / "lessons")}
    config = write_config(tmp_path, taught, **ONE)
    assert "teacher-is-not-base" in refused(4, "sweep", "--config", config, "--out", tmp_path / "a")
    config = write_config(tmp_path, taught, **ONE, teacher_is_not_base=True, device_map="auto")
    done("sweep", "--config", config, "--out", tmp_path / "b")
    found = run_json(tmp_path / "b")
    assert found["pairing"]["teacher_is_not_base"] and found["result"]["step_zero"] is None
    assert found["objective"]["tail"] == "bucket"
    (result,) = results(tmp_path / "b").values()
    assert result["cost"]["step_seconds"] > 0 and result["cost"]["base_step_seconds"] is None
    config = write_config(tmp_path, {**inputs, "probe_top_k": 260}, **ONE)
    assert "--top-k 260: expected at most 259" in refused(2, "sweep", "--config", config, "--out", tmp_path / "c")


# --- anchors ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def anchors(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Anchor caches of the base, and of another model."""
    folder = tmp_path_factory.mktemp("sweep-anchors")
    rows = [{"text": f"far {i} away " * (1 + i % 3)} for i in range(6)]
    (folder / "far.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    make_model(seed=3).save_pretrained(folder / "other")
    make_tokenizer().save_pretrained(folder / "other")
    for name, model in (("own", Path(inputs["model"])), ("foreign", folder / "other")):
        precompute(model, folder / "far.jsonl", folder / name)
    return {name: folder / name for name in ("own", "foreign")}


def test_anchors_are_those_of_train_and_of_the_runs_that_weigh_them(
    inputs: dict[str, Any], anchors: dict[str, Path], tmp_path: Path
) -> None:
    """The same bytes as `train` with the same flags; plain runs beside them have none; another cache is refused."""
    grid = {**GRID, "lr": 1e-2}
    methods = {"plain": {"regularizer": "none", "anchor_weight": [0, 2], "anchor_batch": 3}}
    keys = {"anchor_cache": str(anchors["own"]), "grid": grid, "methods": methods}
    out = tmp_path / "out"
    done("sweep", "--config", write_config(tmp_path, inputs, **keys), "--out", out)
    found = {each["settings"]["anchor_weight"]: each for each in results(out).values()}
    assert found.keys() == {0, 2}
    logs = {w: (out / "runs" / r["name"] / "train_log.jsonl").read_text(encoding="utf-8") for w, r in found.items()}
    assert "anchor_kl" in logs[2] and "anchor_kl" not in logs[0]
    line = ["train", "--model", inputs["model"], "--cache", inputs["cache"], "--regularizer", "none", "--lr", 1e-2]
    line += ["--max-steps", 2, "--batch-size", 2, "--rank", 2, "--log-every", 1, "--out", tmp_path / "alone"]
    done(*line, "--anchor-cache", anchors["own"], "--anchor-weight", 2, "--anchor-batch", 3)
    weights = "adapter_model.safetensors"
    assert (tmp_path / "alone" / weights).read_bytes() == (out / "runs" / found[2]["name"] / weights).read_bytes()
    done("report", out)
    assert "anchor_weight" in (out / "report.md").read_text(encoding="utf-8")
    del keys["anchor_cache"]
    del methods["plain"]["anchor_weight"], methods["plain"]["anchor_batch"]
    without = write_config(tmp_path, inputs, **keys)
    assert "differs in anchors" in refused(4, "sweep", "--config", without, "--out", out)


def test_a_foreign_anchor_stops_a_sweep_before_it_trains(
    inputs: dict[str, Any], anchors: dict[str, Path], tmp_path: Path
) -> None:
    config = write_config(tmp_path, inputs, anchor_cache=[str(anchors["own"]), str(anchors["foreign"])])
    assert str(anchors["foreign"]) in refused(4, "sweep", "--config", config, "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "runs").exists()
