"""Reading a sweep folder: what is taken from it, what is refused, and results.csv."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.cli_harness import edit_sealed
from support.sweep_folders import Method, write_sweep

from logitcache.errors import InputNotFound, UnreadableSweep
from logitcache.json_files import line_of
from logitcache.reports.csv_file import COLUMNS, setting_names, write_csv
from logitcache.reports.results import read_sweep
from logitcache.sweeps.config import FIELDS

FAILED, RUNNING = "m1-lr0.0005-seed1", "m2-lr0.002-seed0"
FIRST = "runs/m0-lr0.0005-seed0"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three methods at three learning rates with two seeds; one run failed, one goes on."""
    write_sweep(tmp_path / "sweep", failed=[FAILED], in_progress=[RUNNING])
    return tmp_path / "sweep"


def test_everything_of_a_run_is_read(folder: Path) -> None:
    sweep = read_sweep(folder)
    assert (sweep.model, sweep.cache, sweep.new, sweep.prior) == ("demo base", "cache", "new.jsonl", "prior.jsonl")
    assert (sweep.num_train_tokens, sweep.num_train_positions) == (87_364, 86_964)
    assert sweep.methods == ("plain LoRA", "masked KL", "full KL")
    assert sweep.given["dtype"] == "float32"
    for run in sweep.finished:
        told = json.loads((folder / "runs" / run.name / "result.json").read_text())
        outcome = run.outcome
        assert outcome is not None
        assert outcome.learning == told["new"]["before"]["ce_nats"] - told["new"]["after"]["ce_nats"]
        assert outcome.forgetting == told["prior"]["kl_nats"]
        assert outcome.prior.ce_rise == told["prior"]["after"]["ce_nats"] - told["prior"]["before"]["ce_nats"]
        assert outcome.prior.num_first_changed == told["prior"]["num_first_changed"]
        assert outcome.prior.num_documents == told["prior"]["num_documents"] == 60
        assert outcome.prior.perplexity_after == told["prior"]["after"]["perplexity"]
        assert outcome.prior.drift_percent == told["prior"]["drift_percent"]
        assert outcome.cost.base_step_seconds == told["cost"]["base_step_seconds"] and outcome.cost.alone
        assert outcome.new.kl_nats == told["new"]["kl_nats"]
        assert run.settings == {**dict.fromkeys(FIELDS), **told["settings"]}
        log = folder / "runs" / run.name / "train_log.jsonl"
        logged = [json.loads(line) for line in log.read_text().splitlines()]
        assert [(p.step, p.ce, p.kl) for p in run.curve] == [(e["step"], e["ce"], e["kl"]) for e in logged]


def test_statuses(folder: Path) -> None:
    waiting, trained = folder / "runs/m0-lr0.001-seed0", folder / "runs/m0-lr0.001-seed1"
    for path in waiting.iterdir():
        path.unlink()
    (trained / "result.json").unlink()
    by_name = {run.name: run for run in read_sweep(folder).runs}
    assert by_name[FAILED].status == "failed" and by_name[FAILED].outcome is None
    assert (by_name[FAILED].error, by_name[FAILED].error_step) == ("training, step 21: the loss is not finite.", 21)
    assert by_name[RUNNING].status == "in progress" and len(by_name[RUNNING].curve) == 3
    assert by_name[waiting.name].status == "not started"
    assert by_name[trained.name].status == "not evaluated"
    assert sum(run.status == "finished" for run in by_name.values()) == 14 == len(read_sweep(folder).finished)


def test_a_drift_beyond_the_range_of_a_float_is_none(folder: Path) -> None:
    edit_sealed(folder / FIRST / "result.json", lambda told: told["prior"].update(drift_percent=None))
    outcome = read_sweep(folder).runs[0].outcome
    assert outcome is not None and outcome.prior.drift_percent is None


def test_a_line_that_is_being_written_is_not_damage(folder: Path) -> None:
    log = folder / "runs" / RUNNING / "train_log.jsonl"
    log.write_text(log.read_text() + '{"step": 21, "ce"')
    assert [p.step for run in read_sweep(folder).runs if run.name == RUNNING for p in run.curve] == [1, 10, 20]


Damage = Callable[[Path], None]


def set_value(path: str, *keys: str | int, to: object) -> Damage:
    def damage(folder: Path) -> None:
        def change(value: Any) -> None:
            for key in keys[:-1]:
                value = value[key]
            value[keys[-1]] = to

        edit_sealed(folder / path, change)

    return damage


def text(path: str, content: str) -> Damage:
    return lambda folder: (folder / path).write_text(content) and None


def lines(path: str, *entries: dict[str, Any], end: str = "") -> Damage:
    content = b"".join(line_of(entry) for entry in entries) + end.encode()
    return lambda folder: (folder / path).write_bytes(content) and None


def twice(key: str) -> Damage:
    """The second run of sweep.json takes the name or the settings of the first."""
    return lambda folder: edit_sealed(folder / "sweep.json", lambda v: v["runs"][1].update({key: v["runs"][0][key]}))


def method_of_run(to: str) -> Damage:
    return lambda folder: edit_sealed(folder / "sweep.json", lambda v: v["runs"][0].update(method=to))


def name_of_run(to: str) -> Damage:
    return lambda folder: edit_sealed(folder / "sweep.json", lambda v: v["runs"][0].update(name=to))


RESULT, LOG = f"{FIRST}/result.json", f"{FIRST}/train_log.jsonl"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "sweep.json is half-written": (text("sweep.json", '{"format": 1, '), "sweep.json: expected a JSON object"),
    "sweep.json is a list": (text("sweep.json", "[]"), "expected a JSON object"),
    "another format": (set_value("sweep.json", "format", to=1), "expected 3 at format, found 1"),
    "no runs": (set_value("sweep.json", "runs", to=None), "expected a list of objects at runs"),
    "a run that is no object": (set_value("sweep.json", "runs", to=[3]), "expected a list of objects at runs"),
    "a method twice": (set_value("sweep.json", "methods", to=["a", "a"]), "expected each name once"),
    "a count that is text": (
        set_value("sweep.json", "num_train_tokens", to="9"),
        "a finite number at num_train_tokens",
    ),
    "a count that is negative": (set_value("sweep.json", "num_train_tokens", to=-1), "a count at num_train_tokens"),
    "a cost that is no number": (
        set_value(RESULT, "cost", "step_seconds", to="long"),
        "a finite number at cost.step_seconds",
    ),
    "two runs of a name": (twice("name"), "each run and each combination of settings once"),
    "two runs of the same settings": (twice("settings"), "each run and each combination of settings once"),
    "an unknown method": (method_of_run("x"), r"one of plain LoRA, masked KL, full KL at runs\[0\].method, found 'x'"),
    "a name that leads elsewhere": (name_of_run("../x"), "expected the name of a folder"),
    "result.json is empty": (text(RESULT, ""), "result.json: expected a JSON object"),
    "result.json is half-written": (text(RESULT, '{"name": "m0'), "result.json: expected a JSON object"),
    "no number": (set_value(RESULT, "new", "after", "ce_nats", to="low"), "a finite number at new.after.ce_nats"),
    "NaN": (set_value(RESULT, "new", "after", "ce_nats", to=math.nan), "at new.after.ce_nats, found nan"),
    "no KL": (set_value(RESULT, "prior", "kl_nats", to=None), "a finite number at prior.kl_nats"),
    "more first tokens than documents": (
        set_value(RESULT, "prior", "num_first_changed", to=61),
        "expected at most the 60 documents at prior.num_first_changed",
    ),
    "other documents": (set_value(RESULT, "prior", "num_documents", to=61), "do not compare"),
    "infinite": (set_value(RESULT, "prior", "kl_nats", to=math.inf), "at prior.kl_nats, found inf"),
    "too large a number": (set_value(RESULT, "seconds", to=10**400), "a finite number at seconds"),
    "true for a number": (set_value(RESULT, "seconds", to=True), "a finite number at seconds, found True"),
    "not evaluated after": (set_value(RESULT, "prior", "after", to=None), "expected an object at prior.after"),
    "half a step": (set_value(RESULT, "num_steps", to=1.5), "expected a count at num_steps"),
    "other positions after": (set_value(RESULT, "new", "after", "num_positions", to=3), "expected 4000, as before"),
    "another run's result": (set_value(RESULT, "name", to="m0-lr0.0005-seed1"), "found m0-lr0.0005-seed1 of plain"),
    "another learning rate": (set_value(RESULT, "settings", "lr", to=0.1), "0.0005, as in sweep.json at settings.lr"),
    "a list among the settings": (set_value(RESULT, "settings", "lr", to=[1]), "one plain value for lr"),
    "another base or text": (
        set_value(RESULT, "new", "before", "ce_nats", to=4.5),
        "the untouched base to be the same",
    ),
    "damage within a log": (text(LOG, '{"step": 1\n{"step": 2, "ce": 1}\n'), "expected JSON in line 1"),
    "a finished log cut short": (lines(LOG, {"step": 1, "ce": 1}, end='{"st'), "expected JSON in line 2"),
    "a log line that is a number": (text(LOG, "3\n"), "expected JSON in line 1"),
    "a log line without a value": (lines(LOG, {"step": 1}), "a finite number at line 1, ce"),
    "failed.json without an error": (set_value(f"runs/{FAILED}/failed.json", "error", to=""), "expected text at error"),
    "bytes that are no text": (
        lambda folder: (folder / RESULT).write_bytes(b"\xff\xfe{}") and None,
        "found other bytes",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_sentence_that_names_the_place(folder: Path, name: str) -> None:
    damage, said = DAMAGES[name]
    damage(folder)
    with pytest.raises(UnreadableSweep, match=said) as refusal:
        read_sweep(folder)
    assert "\n" not in str(refusal.value) and str(refusal.value).endswith(".")
    assert refusal.value.reason == "unreadable-sweep"


def test_a_folder_without_a_sweep(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputNotFound, match=r"expected sweep\.json in it, found none"):
            read_sweep(path)


def test_csv_has_a_row_a_run_and_every_number_in_full(folder: Path, tmp_path: Path) -> None:
    sweep = read_sweep(folder)
    write_csv(sweep, tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == [
        *("name", "method", "status", "error", "error_step", *FIELDS),
        *(name for name in COLUMNS if name not in ("name", "method", "status", "error", "error_step")),
    ]
    assert setting_names(sweep) == list(FIELDS)
    assert [row["name"] for row in rows] == [run.name for run in sweep.runs]
    for row, run in zip(rows, sweep.runs, strict=True):
        assert row["status"] == run.status
        assert row["error"] == (run.error or "")
        assert float(row["lr"]) == run.settings["lr"] and row["kl_budget"] == ""
        if run.outcome is None:
            assert row["learning_nats"] == row["train_seconds"] == ""
        else:
            assert float(row["learning_nats"]) == run.outcome.learning
            assert float(row["prior_perplexity_after"]) == run.outcome.prior.perplexity_after
            assert float(row["forgetting_nats"]) == run.outcome.forgetting == run.outcome.prior.kl_nats
            rise = float(row["prior_ce_after_nats"]) - float(row["prior_ce_before_nats"])
            assert float(row["prior_ce_rise_nats"]) == rise
            assert (row["prior_first_changed"], row["prior_documents"]) == (
                str(run.outcome.prior.num_first_changed),
                "60",
            )


def test_csv_keeps_any_text(folder: Path, tmp_path: Path) -> None:
    said = 'a "b", <c>;\nand a second line'
    failed = folder / "runs" / FAILED / "failed.json"
    edit_sealed(failed, lambda v: v.update(error=said))
    write_csv(read_sweep(folder), tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as f:
        assert [row["error"] for row in csv.DictReader(f) if row["error"]] == [" ".join(said.split())]


@pytest.mark.parametrize("name", ["=1+1", "+x", "-x", "@x", " =1"])
def test_text_is_no_formula_and_numbers_stay_numbers(tmp_path: Path, name: str) -> None:
    write_sweep(tmp_path, [Method(name.strip(), {}, -0.5, -0.1)], lrs=(1e-3,), seeds=(0,))
    write_csv(read_sweep(tmp_path), tmp_path / "results.csv")
    (row,) = csv.DictReader((tmp_path / "results.csv").read_text(encoding="utf-8").splitlines())
    assert row["method"] == f"'{name.strip()}"
    assert float(row["learning_nats"]) < 0


SCALES = f"{FIRST}/scales.json"
DAMAGED_SCALES: dict[str, tuple[Damage, str]] = {
    "empty": (text(SCALES, ""), "scales.json: expected a JSON object"),
    "of another run": (set_value(SCALES, "name", to="x"), "scales.json: expected m0-lr0.0005-seed0"),
    "no list": (set_value(SCALES, "points", to=None), "expected a list of objects at points"),
    "a scale beyond": (set_value(SCALES, "points", 0, "scale", to=3), r"a number from 0 to 2 at points\[0\]\.scale"),
    "a scale twice": (set_value(SCALES, "points", 0, "scale", to=0.5), "each scale once at points"),
    "no number": (set_value(SCALES, "points", 1, "new", "after", "ce_nats", to=None), "at points.1..new.after.ce_nats"),
    "another text": (
        set_value(SCALES, "points", 1, "prior", "before", "ce_nats", to=9.0),
        "the untouched base to be the same on prior text",
    ),
}


@pytest.mark.parametrize("name", DAMAGED_SCALES)
def test_a_damaged_curve_is_refused(tmp_path: Path, name: str) -> None:
    write_sweep(tmp_path, lrs=(5e-4,), scaled=("plain LoRA",))
    assert [point.scale for point in read_sweep(tmp_path).runs[0].scaled] == [0.25, 0.5, 0.75]
    damage, said = DAMAGED_SCALES[name]
    damage(tmp_path)
    with pytest.raises(UnreadableSweep, match=said):
        read_sweep(tmp_path)


def test_why_there_is_no_curve_is_read(tmp_path: Path) -> None:
    write_sweep(tmp_path, lrs=(5e-4,), scaled=("plain LoRA",))
    edit_sealed(tmp_path / SCALES, lambda v: v.update(points=[], error="no merging in /home/me/base here"))
    first = read_sweep(tmp_path).runs[0]
    assert first.scaled == () and first.not_scaled == "no merging in base here"
