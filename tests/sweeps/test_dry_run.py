"""A dry run refuses what a sweep refuses, with the same words, and neither leaves a folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.cli_harness import done, logitcache, precompute
from support.quantised_base import bitsandbytes
from support.tiny_model import make_model, make_tokenizer, text_rows

from logitcache.pairing.view import CacheView
from logitcache.sweeps.config import read_config

GRID = {"lr": 1e-3, "max_steps": 2, "batch_size": 2, "rank": 2}
Keys = dict[str, Any]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def place(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's caches, good and bad, and texts."""
    folder = tmp_path_factory.mktemp("dry-run")
    write(folder / "train.jsonl", text_rows(6))
    write(folder / "other.jsonl", [{"text": "other words"}, {"text": "and others yet"}])
    write(folder / "tokens.jsonl", [{"input_ids": [1], "labels": [1]}])
    write(folder / "weighed.jsonl", [{**_ids(row["text"]), "weights": 0.5} for row in text_rows(6)])
    write(folder / "odd.jsonl", [{"neither": "text"}])
    (folder / "broken.py").write_text("def f(log_p, log_q):\n    return log_q.detach().sum(1)\n", encoding="utf-8")
    make_model(seed=3).save_pretrained(folder / "other")
    make_tokenizer().save_pretrained(folder / "other")
    for name in ("cache", "damaged", "labels"):
        precompute(tiny_model, folder / "train.jsonl", folder / name, *(["--top-k", 0] if name == "labels" else []))
    precompute(folder / "other", folder / "other.jsonl", folder / "foreign")
    precompute(tiny_model, folder / "other.jsonl", folder / "few")
    (folder / "damaged" / "manifest.json").write_text("{", encoding="utf-8")
    done(
        "nullspace",
        "--model",
        folder / "other",
        "--data",
        folder / "train.jsonl",
        "--out",
        folder / "null",
        "--rank",
        2,
    )
    return folder


def _ids(text: str) -> dict[str, list[int]]:
    return {"input_ids": [int(i) for i in make_tokenizer()(text)["input_ids"]]}


def config(place: Path, model: Path, out: Path, keys: Keys) -> Path:
    """A configuration; texts of `keys` that begin with @ are in `place`."""

    def at(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: at(v) for k, v in value.items()}
        return str(place / value[1:]) if isinstance(value, str) and value.startswith("@") else value

    paths = {"model": str(model), "cache": "@cache", "new": "@other.jsonl", "prior": "@other.jsonl"}
    path = out / "sweep.yaml"
    methods = {"plain": {"regularizer": "none"}, "masked": {}}
    whole = {**paths, "grid": GRID, "methods": methods, **keys}
    path.write_text(yaml.safe_dump(at(whole), sort_keys=False), encoding="utf-8")
    return path


REFUSED: dict[str, tuple[Keys, int, str]] = {
    "no model": ({"model": "@nowhere"}, 2, "nowhere"),
    "no cache": ({"cache": "@nowhere"}, 2, "nowhere"),
    "unreadable cache": ({"cache": "@damaged"}, 3, "manifest.json"),
    "another's cache": ({"cache": "@foreign"}, 4, "weights"),
    "no alternatives": ({"cache": "@labels"}, 1, "or a cache with a larger --top-k"),
    "more alternatives": ({"methods": {"a": {"top_k": 9}}}, 1, "holds 8 alternatives"),
    "no groups": ({"methods": {"a": {"tail": "groups"}}}, 1, "--tail-groups"),
    "no data": ({"data": "@nowhere.jsonl"}, 2, "nowhere"),
    "no new text": ({"new": "@nowhere.jsonl"}, 2, "nowhere"),
    "no prior text": ({"prior": "@nowhere.jsonl"}, 2, "nowhere"),
    "rows of nothing": ({"prior": "@odd.jsonl"}, 1, "odd.jsonl"),
    "nothing to predict": ({"prior": "@tokens.jsonl"}, 1, "supervised token"),
    "not cached": ({"data": "@other.jsonl"}, 4, "other.jsonl"),
    "weights that nobody reads": ({"data": "@weighed.jsonl"}, 1, "--ce-weight data"),
    "no weights": ({"methods": {"a": {"ce_weight": "data"}}}, 1, "expected a weight for every token"),
    "broken formula": ({"methods": {"a": {"regularizer": "@broken.py:f"}}}, 1, "gradient"),
    "no formula": ({"methods": {"a": {"ce_weight": "@nowhere.py:f"}}}, 2, "nowhere.py"),
    "rank": ({"methods": {"a": {"adapter": "pissa", "rank": 64}}}, 2, "allows a rank of at most 32"),
    "no such layer": ({"grid": {**GRID, "target_modules": "q_proj,nowhere"}}, 2, "name no layer"),
    "no linear layer": ({"grid": {**GRID, "target_modules": "input_layernorm"}}, 2, "name no layer"),
    "no penalty of an embedding": (
        {
            "grid": {**GRID, "target_modules": "embed_tokens"},
            "methods": {"plain": {"regularizer": "none"}, "a": {"regularizer": "l2-sp"}},
        },
        2,
        "model.embed_tokens: it is no linear layer",
    ),
    "no null space": ({"methods": {"a": {"adapter": "lora-null", "nullspace": "@nowhere"}}}, 2, "nowhere"),
    "another's null space": ({"methods": {"a": {"adapter": "lora-null", "nullspace": "@null"}}}, 4, "null"),
    "another's anchors": ({"anchor_cache": "@foreign"}, 4, "foreign"),
    "too few anchors": ({"anchor_cache": "@few"}, 1, "expected as many"),
    "more probes than tokens": ({"probe_top_k": 260}, 2, "expected at most 259"),
    "half precision": ({}, 1, "float16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_dry_run_refuses_what_a_sweep_refuses(case: str, place: Path, tiny_model: Path, tmp_path: Path) -> None:
    keys, status, said = REFUSED[case]
    line = ["sweep", "--config", config(place, tiny_model, tmp_path, keys), "--out", tmp_path / "out"]
    line += ["--dtype", "float16"] if case == "half precision" else []
    dry, real = logitcache(*line, "--dry-run"), logitcache(*line)
    assert (dry.status, real.status) == (status, status), dry.err + real.err
    assert said in dry.err and dry.err.splitlines()[-1] == real.err.splitlines()[-1]
    assert dry.out == real.out == "" and "Traceback" not in dry.err
    assert not (tmp_path / "out").exists()


@bitsandbytes
def test_a_dry_run_refuses_a_base_in_another_format(place: Path, tiny_model: Path, tmp_path: Path) -> None:
    path = config(place, tiny_model, tmp_path, {"load_in": "8bit"})
    outcome = logitcache("sweep", "--config", path, "--out", tmp_path / "out", "--dry-run")
    assert outcome.status == 4 and "the model has 8bit" in outcome.err


def test_a_dry_run_refuses_an_adapter_that_the_installed_peft_lacks(
    place: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logitcache.adapters.attach.version", lambda _: "0.18.1")
    path = config(place, tiny_model, tmp_path, {"methods": {"a": {"adapter": "mica"}}})
    outcome = logitcache("sweep", "--config", path, "--out", tmp_path / "out", "--dry-run")
    assert outcome.status == 2 and "expected PEFT 0.20 or later" in outcome.err


def test_a_dry_run_refuses_a_sweep_of_something_else_and_runs_of_others(
    place: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """What is in the folder is checked as well: the sweep there, and files in the folder of a run."""
    out = tmp_path / "out"
    path = config(place, tiny_model, tmp_path, {})
    first, *_ = read_config(path).runs
    (out / "runs" / first.name).mkdir(parents=True)
    (out / "runs" / first.name / "mine.txt").touch()
    outcome = logitcache("sweep", "--config", path, "--out", out, "--dry-run")
    assert outcome.status == 1 and "expected an empty folder, found files" in outcome.err
    (out / "runs" / first.name / "mine.txt").unlink()
    done("sweep", "--config", path, "--out", out)
    assert "2 runs, 2 of them finished" in done("sweep", "--config", path, "--out", out, "--dry-run").out
    other = config(place, tiny_model, tmp_path, {"prior": "@train.jsonl"})
    outcome = logitcache("sweep", "--config", other, "--out", out, "--dry-run")
    assert outcome.status == 4 and "the sweep there differs in texts" in outcome.err


def test_the_checks_take_no_part_in_what_is_drawn(place: Path, tiny_model: Path, tmp_path: Path) -> None:
    """A run has the same adapter by `train`, which checks one run, as in a sweep, which has checked them all."""
    keys = {"methods": {"plain": {"regularizer": "none", "adapter": ["lora", "vera"]}}}
    path = config(place, tiny_model, tmp_path, {"grid": {**GRID, "seed": 1}, **keys})
    done("sweep", "--config", path, "--out", tmp_path / "out")
    (vera,) = (run for run in read_config(path).runs if run.settings["adapter"] == "vera")
    line = ["train", "--model", tiny_model, "--cache", place / "cache", "--regularizer", "none", "--adapter", "vera"]
    line += ["--lr", 1e-3, "--max-steps", 2, "--batch-size", 2, "--rank", 2, "--seed", 1, "--out", tmp_path / "alone"]
    done(*line)
    weights = "adapter_model.safetensors"
    ours = (tmp_path / "out" / "runs" / vera.name / weights).read_bytes()
    assert ours == (tmp_path / "alone" / weights).read_bytes()


def test_the_base_is_measured_once_by_whatever_the_weights_of_a_loss(
    place: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the cache without the true token, with it, and by the anchors: three times in eighteen losses."""
    measured: list[str] = []
    original = CacheView.step_zero

    def step_zero(view: CacheView, *args: Any) -> Any:
        measured.append(f"{Path(view.cache.path).name} {view.objective.regularizer}")
        return original(view, *args)

    monkeypatch.setattr(CacheView, "step_zero", step_zero)
    grid = {**GRID, "weight": [0.5, 1.0, 2.0], "anchor_weight": [0, 1, 2], "anchor_batch": 1}
    methods = {"masked": {}, "full": {"regularizer": "full-kl"}}
    keys = {"grid": grid, "methods": methods, "anchor_cache": "@few"}
    path = config(place, tiny_model, tmp_path, keys)
    done("sweep", "--config", path, "--out", tmp_path / "out", "--dry-run")
    assert measured == ["cache masked-kl", "few full-kl", "cache full-kl"]
