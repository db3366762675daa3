"""The curve between the base and a plain run, and the line that makes a run again: against the verbs themselves."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.cli_harness import done, precompute, snapshot
from support.tiny_model import text_rows

from logitcache.errors import UnsupportedModel
from logitcache.reports.answer import answers, for_nothing
from logitcache.reports.results import read_sweep
from logitcache.reports.tables import view_of
from logitcache.sweeps.command import train_command
from logitcache.sweeps.config import make_config

pytestmark = pytest.mark.training

GRID = {"lr": 2e-2, "max_steps": 3, "batch_size": 2, "rank": 2, "log_every": 1}
METHODS = {"plain": {"regularizer": "none"}, "masked": {"weight": 0.5, "top_k": 4, "alpha": 3}}


@pytest.fixture(scope="module")
def place(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep with anchors, and what it is of."""
    folder = tmp_path_factory.mktemp("scaled")
    texts = {"train": text_rows(6), "new": text_rows(9)[6:], "prior": [{"text": f"other {i} words"} for i in range(3)]}
    for name, rows in texts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    for name in ("train", "prior"):
        precompute(tiny_model, folder / f"{name}.jsonl", folder / f"{name}-cache")
    write(folder, tiny_model, scales="0,.5,1")
    done("sweep", "--config", folder / "sweep.yaml", "--out", folder / "out")
    return folder


def write(folder: Path, model: Path, **keys: Any) -> Path:
    paths = {"model": str(model), "cache": str(folder / "train-cache"), "data": str(folder / "train.jsonl")}
    paths |= {name: str(folder / f"{name}.jsonl") for name in ("new", "prior")}
    held = {"anchor_cache": str(folder / "prior-cache"), "grid": {**GRID, "anchor_batch": 2}}
    methods = {"plain": {**METHODS["plain"], "anchor_weight": 0}, "masked": {**METHODS["masked"], "anchor_weight": 2}}
    whole = {**paths, **held, "methods": methods, "probe_top_k": 259, **keys}  # all of the vocabulary
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")
    return path


def test_a_part_of_the_change_is_what_evaluate_says_of_it(place: Path, tiny_model: Path) -> None:
    """Against `evaluate --scales` with two models in memory and the whole vocabulary."""
    (path,) = (place / "out").glob("runs/*/scales.json")
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["method"] == "plain" and [point["scale"] for point in found["points"]] == [0.5]
    line = ["evaluate", "--model", tiny_model, "--adapter", path.parent, "--data", place / "new.jsonl", "--json"]
    expected = json.loads(done(*line, "--prior", place / "prior.jsonl", "--scales", ".5").out)["scales"][0]
    for text in ("new", "prior"):
        for side in ("before", "after"):
            mine, theirs = (each[text][side]["ce_nats"] for each in (found["points"][0], expected))
            assert mine == pytest.approx(theirs, abs=1e-5)
        assert found["points"][0][text]["kl_nats"] == pytest.approx(expected[text]["kl_nats"], abs=1e-5)
        assert found["points"][0][text]["kl_nats"] > 1e-4


def test_a_point_is_measured_once_and_more_may_be_asked_for(place: Path, tiny_model: Path, tmp_path: Path) -> None:
    before = snapshot(place / "out" / "runs")
    done("sweep", "--config", write(place, tiny_model, scales=[0.5]), "--out", place / "out")
    assert snapshot(place / "out" / "runs") == before
    done("sweep", "--config", write(place, tiny_model, scales=[0.5, 2], scales_of="all"), "--out", place / "out")
    found = [json.loads(path.read_text(encoding="utf-8")) for path in (place / "out").glob("runs/*/scales.json")]
    scales = {f["method"]: [point["scale"] for point in f["points"]] for f in found}
    assert scales == {"plain": [0.5, 2], "masked": [0.5, 2]}
    after = snapshot(place / "out" / "runs")
    assert {k: v for k, v in after.items() if not k.endswith("scales.json")} == {
        k: v for k, v in before.items() if not k.endswith("scales.json")
    }
    done("report", place / "out", "--out", tmp_path)
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert page.count("parts of its change (nothing trained)") == 2 and "| masked | - | 2 |" in page


def test_a_run_that_has_no_curve_says_why_and_counts(
    place: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise UnsupportedModel("scaling an adapter of kind LORA: no merging here.")

    monkeypatch.setattr("logitcache.sweeps.scaled.models_between", refuse)
    path = write(place, tiny_model, methods={"plain": {"regularizer": "none", "anchor_weight": 0}})
    outcome = done("sweep", "--config", path, "--out", tmp_path / "out")
    assert "No curve between base and adapter: scaling an adapter of kind LORA: no merging here." in outcome.err
    assert "1 of 1 runs finished, 0 failed" in outcome.out
    done("report", tmp_path / "out")
    assert "no merging here" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_a_curve_that_fails_is_no_failed_run(
    place: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run stays finished, its folder has no failed.json, and the same command measures what is left."""
    path = write(place, tiny_model, methods={"plain": {"regularizer": "none", "anchor_weight": 0}}, scales=[0.5])
    with monkeypatch.context() as patched:
        patched.setattr("logitcache.sweeps.scaled.models_between", _no_memory)
        for _ in range(2):  # after training, and of a run that was finished before
            outcome = done("sweep", "--config", path, "--out", tmp_path / "out")
            assert "the curve between base and adapter, not the run: no memory" in outcome.out
            assert "1 of 1 runs finished, 0 failed" in outcome.out
            assert not list((tmp_path / "out").glob("runs/*/failed.json"))
    done("sweep", "--config", path, "--out", tmp_path / "out")
    (found,) = (tmp_path / "out").glob("runs/*/scales.json")
    assert [point["scale"] for point in json.loads(found.read_text(encoding="utf-8"))["points"]] == [0.5]


def _no_memory(*_: Any) -> Any:
    raise RuntimeError("no memory")


def test_the_line_of_the_answer_makes_the_run_again(place: Path, tmp_path: Path) -> None:
    """Each run's line, word for word through a shell's parser: the same bytes as the sweep's."""
    sweep = read_sweep(place / "out")
    weights = "adapter_model.safetensors"
    for run in sweep.finished:
        program, *line = shlex.split(train_command(sweep.given, run.settings, str(tmp_path / run.name)))
        assert program == "logitcache"
        done(*line)
        assert (tmp_path / run.name / weights).read_bytes() == (sweep.folder / "runs" / run.name / weights).read_bytes()
    view = view_of(sweep)
    assert answers(view)[0].command == train_command(sweep.given, answers(view)[0].run.settings, "adapter")
    assert for_nothing(view) is not None


PATHS = {"model": "m", "cache": "c", "new": "n", "prior": "p"}


def line_of(method: dict[str, Any], data: tuple[str, ...] | None = ("d 1", "d2"), **keys: Any) -> str:
    config = make_config({**PATHS, "grid": {"lr": 1e-3}, "methods": {"a": method}, **keys}, "s")
    given = {"model": "my base", "cache": "c", "data": data, "anchor_cache": ["x"], **config.shared}
    return train_command(given, config.runs[0].settings, "out")


def test_a_line_has_what_differs_from_the_defaults_and_nothing_else() -> None:
    start = "logitcache train --model 'my base' --cache c --data 'd 1' --data d2"
    assert line_of({"regularizer": "none"}) == f"{start} --regularizer none --lr 0.001 --out out"
    assert line_of({}) == f"{start} --tail bucket --lr 0.001 --out out"
    assert line_of({"rank": 8, "alpha": 16}) == f"{start} --tail bucket --rank 8 --lr 0.001 --out out"
    said = f"{start} --regularizer l2-sp --weight 0.1 --ce-weight stm --ce-weight-value 2.5 --lr 0.001 --out out"
    assert line_of({"regularizer": "l2-sp", "weight": 0.1, "ce_weight": "stm"}) == said
    anchored = line_of({"regularizer": "none", "anchor_weight": 2}, anchor_cache="x")
    assert anchored == f"{start} --anchor-cache x --regularizer none --anchor-weight 2.0 --lr 0.001 --out out"
    of_rows = {"split": "train", "supervise": "all", "skip_bad_rows": True, "chat_template": "f"}
    assert line_of({}, **of_rows).startswith(f"{start} --split train --skip-bad-rows --supervise all --chat-template f")
    assert line_of({}, None, **of_rows).startswith("logitcache train --model 'my base' --cache c --chat-template f --")
    shared = line_of({}, teacher_is_not_base=True, load_in="4bit", split="train")
    assert "--load-in 4bit" in shared and "--teacher-is-not-base --" in shared


def test_which_runs_have_a_curve_is_the_configuration_s() -> None:
    def scaled(**keys: Any) -> dict[str, list[float]]:
        methods = {
            "plain": {"regularizer": "none"},
            "smooth": {"regularizer": "none", "label_smoothing": 0.1},
            "kl": {},
        }
        found = make_config({**PATHS, "grid": {"lr": 1e-3}, "methods": methods, **keys}, "s")
        return {run.method: found.scales_of(run) for run in found.runs}

    inner = [0.25, 0.5, 0.75]
    assert scaled() == {"plain": inner, "smooth": [], "kl": []}
    assert scaled(scales_of="all", scales="0, .5,1,1.5") == {name: [0.5, 1.5] for name in ("plain", "smooth", "kl")}
    assert scaled(scales_of="none") == {"plain": [], "smooth": [], "kl": []}
