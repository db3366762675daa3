"""Runs and sweeps with weights, recipes and formulas of one's own: what is trained, said in run.json, and refused."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.cli_harness import done, precompute, refused, train_line

from logitcache.storage import IdentityMismatch
from logitcache.sweeps.config import make_config
from logitcache.sweeps.run import sweep

IDS = [list(range(5 + i, 25 + 2 * i)) for i in range(6)]


def rows(weights: bool = False) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"input_ids": ids} for ids in IDS]
    return [{**r, "loss_scale": [0.5 * (i % 3) for i in r["input_ids"]]} for r in found] if weights else found


def logged(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]


def test_train_weighs_by_a_recipe_by_rows_and_by_a_formula(
    tmp_path: Path, tiny_model: Path, write_rows: Callable[..., Path]
) -> None:
    cache, steps = tmp_path / "c", ["--batch-size", 3, "--lr", "1e-3", "--max-steps", 2]
    data, weighed = write_rows(rows()), write_rows(rows(weights=True), "weighed.jsonl")
    precompute(tiny_model, data, cache)

    def trained(name: str, *more: object) -> dict[str, Any]:
        done(*train_line(tiny_model, cache, tmp_path / name, *steps, *more))
        said: dict[str, Any] = json.loads((tmp_path / name / "run.json").read_text())
        return said

    asft = trained("asft", "--recipe", "asft")["objective"]
    assert (asft["regularizer"], asft["ce_weight"], asft["weight"]) == ("full-kl", "dft", 0.05)
    assert trained("heavier", "--recipe", "asft", "--weight", "0.1")["objective"]["weight"] == 0.1
    spelt = trained("spelt", "--regularizer", "full-kl", "--ce-weight", "dft", "--weight", "0.05")
    assert spelt["objective"] == asft and spelt["formulas"] == {}
    assert logged(tmp_path / "spelt")[-1] == logged(tmp_path / "asft")[-1]
    by_rows = trained("rows", "--data", weighed, "--ce-weight", "data")
    plain = trained("plain", "--data", data)
    assert by_rows["data"]["fingerprint"] != plain["data"]["fingerprint"]
    assert logged(tmp_path / "rows")[0]["ce"] != pytest.approx(logged(tmp_path / "plain")[0]["ce"], rel=1e-3)
    text = "def f(log_p, log_q):\n    return (log_p.exp() * (log_p - log_q)).sum(dim=1)\n\n\n"
    text += "def g(tokens):\n    return tokens.log_q.exp()\n"
    file = tmp_path / "my.py"
    file.write_text(text, encoding="utf-8")
    own = trained("own", "--regularizer", f"{file}:f", "--ce-weight", f"{file}:g", "--weight", "0.05")
    assert {name: entry["text"] for name, entry in own["formulas"].items()} == {f"{file}:f": text, f"{file}:g": text}
    for name in ("ce", "kl", "loss"):
        assert logged(tmp_path / "own")[-1][name] == pytest.approx(logged(tmp_path / "asft")[-1][name], rel=1e-4)

    said = refused(1, *train_line(tiny_model, cache, tmp_path / "no", "--data", weighed))
    assert "brings weights" in said and "--ce-weight data" in said
    said = refused(1, *train_line(tiny_model, cache, tmp_path / "no", "--ce-weight", "data"))
    assert "expected a weight for every token" in said
    line = ["train", "--model", tiny_model, "--data", data, "--out", tmp_path / "no", "--regularizer", "none"]
    assert "--ce-weight stm needs --cache" in refused(2, *line, "--ce-weight", "stm")
    assert not (tmp_path / "no").exists()
    file.write_text(text.replace("tokens.log_q", "2 * tokens.log_q"), encoding="utf-8")
    resumed = ["--regularizer", f"{file}:f", "--ce-weight", f"{file}:g", "--weight", "0.05", "--resume"]
    said = refused(4, *train_line(tiny_model, cache, tmp_path / "own", *steps, *resumed))
    assert "the run there differs in formulas" in said


def test_a_sweep_compares_weights_recipes_and_formulas(
    tmp_path: Path, tiny_model: Path, write_rows: Callable[..., Path]
) -> None:
    data, cache, file = write_rows(rows(weights=True)), tmp_path / "c", tmp_path / "my.py"
    precompute(tiny_model, data, cache)
    file.write_text("def g(tokens):\n    return (tokens.log_q - tokens.log_p).exp()\n", encoding="utf-8")
    config = {
        **{"model": str(tiny_model), "cache": str(cache), "data": str(data), "new": str(data), "prior": str(data)},
        "grid": {"lr": 1e-3, "max_steps": 1, "rank": 2, "batch_size": 3},
        "methods": {
            "plain": {"regularizer": "none"},
            "ASFT": {"recipe": "asft", "weight": [0.05, 0.1]},
            "STM": {"regularizer": "none", "ce_weight": "stm", "ce_weight_value": [400.0, 2000.0]},
            "rows": {"regularizer": "none", "ce_weight": "data"},
            "own": {"regularizer": "none", "ce_weight": f"{file}:g"},
        },
    }
    made = make_config(config, "sweep.yaml")
    assert [run.settings["ce_weight_value"] for run in made.runs] == [None, None, None, 400.0, 2000.0, None, None]
    finished = sweep(made, tmp_path / "out")
    assert [d.error for d in finished] == [None] * 7
    found = {
        d.spec.name: json.loads((tmp_path / "out" / "runs" / d.spec.name / "run.json").read_text()) for d in finished
    }
    assert {r["objective"]["ce_weight"] for r in found.values()} == {"none", "dft", "stm", "data", f"{file}:g"}
    file.write_text("def g(tokens):\n    return tokens.log_q.exp()\n", encoding="utf-8")
    with pytest.raises(IdentityMismatch, match=r"the file of the formula .*my\.py:g has changed since"):
        sweep(made, tmp_path / "out")


def test_the_page_on_formulas_does_what_it_says(
    tmp_path: Path, tiny_model: Path, write_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file is taken without a word of warning, its commands run, and its methods are methods."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "how-to" / "your-own-loss.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"^```(\w*)\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL))
    monkeypatch.chdir(tmp_path)
    Path("my.py").write_text(blocks["python"], encoding="utf-8")
    Path("base").symlink_to(tiny_model)
    precompute(tiny_model, write_rows(rows()), "cache")
    lines = [shlex.split(line)[1:] for line in blocks[""].splitlines()]
    assert len(lines) == 2
    for line in lines:
        assert "pulls away from the base" not in done(*line, "--max-steps", 1, "--target-modules", "q_proj").err
        assert json.loads((Path(line[line.index("--out") + 1]) / "run.json").read_text())["formulas"]
    methods = yaml.safe_load(blocks["yaml"])["methods"]
    paths = {"model": "base", "cache": "cache", "new": "data.jsonl", "prior": "data.jsonl"}
    assert make_config({**paths, "methods": methods}, "sweep.yaml").methods == ["masked KL", "no conflicts", "Jeffreys"]


def test_a_formula_that_pulls_at_the_base_is_told_once(
    tmp_path: Path, tiny_model: Path, write_rows: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """By `train` itself, before weights are read, and not again by the trainer that it makes."""
    cache, file = tmp_path / "c", tmp_path / "pulls.py"
    precompute(tiny_model, write_rows(rows()), cache)
    file.write_text("def f(log_p, log_q):\n    return -(log_p.exp() * log_q[:, :1]).sum(dim=1)\n", encoding="utf-8")
    told = done(*train_line(tiny_model, cache, tmp_path / "o", "--max-steps", 1, "--regularizer", f"{file}:f")).err
    assert told.count("pulls away from the base too") == 1
    assert "pulls away from the base" not in caplog.text
