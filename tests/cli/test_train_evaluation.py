"""Evaluation while training on the command line: what is printed, logged and drawn, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.cli_harness import done, precompute, refused, text_data
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

MEASURED = ("new_ce", "prior_ce", "prior_kl", "prior_first_changed")


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("evaluation")
    found = {"data": text_data(folder, 0, 8), "new": text_data(folder, 8, 12)}
    prior = folder / "prior.jsonl"
    prior.write_text("".join(json.dumps({"text": f"say {i} yes" * (1 + i % 4)}) + "\n" for i in range(9)))
    for name, data in (("cache", found["data"]), ("prior", prior)):
        precompute(tiny_model, data, folder / name)
        found[name] = folder / name
    return found


def line_of(model: Path, caches: dict[str, Path], out: Path, *more: object) -> list[object]:
    short = ["--rank", 2, "--lr", 1e-2, "--max-steps", 10, "--batch-size", 4]
    return ["train", "--model", model, "--cache", caches["cache"], "--out", out, *short, *more]


def logged(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "eval_log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_run_stops_where_it_has_drifted_and_says_so(
    tmp_path: Path, tiny_model: Path, caches: dict[str, Path]
) -> None:
    limit = ["--eval-prior", caches["prior"], "--eval-data", caches["new"], "--eval-steps", 2]
    outcome = done(*line_of(tiny_model, caches, tmp_path / "o", *limit, "--stop-at-prior-kl", 0.02))
    last = logged(tmp_path / "o")[-1]
    assert last["prior_kl"] >= 0.02 and last["step"] < 10
    assert all(entry["prior_kl"] < 0.02 for entry in logged(tmp_path / "o")[:-1])
    assert outcome.out.startswith(f"Trained {last['step']} steps")
    words = f"new CE {last['new_ce']:.4f}, prior KL {last['prior_kl']:.4f}, prior CE {last['prior_ce']:.4f}, "
    words += f"{last['prior_first_changed']:.0f} first tokens changed."
    told = outcome.err.splitlines()
    assert f"Step {last['step']}: {words}" in told
    assert told[-2].startswith(f"Stopped at step {last['step']}: the KL on prior text was ")
    assert told[-1] == f"The weights are of step {last['step']}: {words}"


def test_tensorboard_has_the_curves_and_json_the_events(
    tmp_path: Path, tiny_model: Path, caches: dict[str, Path]
) -> None:
    more = ["--eval-prior", caches["prior"], "--eval-data", caches["new"], "--best-by", "new-ce", "--log-json"]
    outcome = done(*line_of(tiny_model, caches, tmp_path / "o", *more, "--eval-steps", 4))
    found = logged(tmp_path / "o")
    assert [entry["step"] for entry in found] == [0, 4, 8, 10]
    events = EventAccumulator(str(tmp_path / "o" / "tensorboard"))
    events.Reload()
    for name in MEASURED:
        drawn = [(e.step, e.value) for e in events.Scalars(f"eval/{name}")]
        assert drawn == [(entry["step"], pytest.approx(entry[name], rel=1e-6)) for entry in found], name
    told = [json.loads(line) for line in outcome.err.splitlines()]
    assert {"data-note", "log", "evaluation", "trained"} == {event["event"] for event in told}
    evaluated = [event for event in told if event["event"] == "evaluation"]
    assert [e["values"] for e in evaluated] == [{name: entry[name] for name in MEASURED} for entry in found]
    best = min(found[1:], key=lambda entry: entry["new_ce"])
    assert (told[-1]["best_step"], told[-1]["evaluated"]) == (best["step"], evaluated[found.index(best)]["values"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--eval-steps", 2], "--eval-steps is of an evaluation while training: give --eval-data or --eval-prior"),
        (["--stop-at-prior-kl", 0.1], "--stop-at-prior-kl is measured on --eval-prior"),
        (["--best-by", "new-ce"], "--best-by new-ce is measured on --eval-data"),
        (["--best-by", "prior-kl"], "--best-by prior-kl is measured on --eval-prior"),
        (["--eval-split", "test"], "--eval-split is of --eval-data"),
        (["--patience", 2], "--patience waits for a new lowest --best-by"),
    ],
)
def test_what_needs_a_text_is_2_without_it(
    more: list[object], said: str, tmp_path: Path, tiny_model: Path, caches: dict[str, Path]
) -> None:
    assert said in refused(2, *line_of(tiny_model, caches, tmp_path / "o", *more))
    assert not (tmp_path / "o").exists()


def test_a_missing_text_is_told_before_weights_are_read(tmp_path: Path, caches: dict[str, Path]) -> None:
    (tmp_path / "empty").mkdir()
    nowhere = ["--eval-data", tmp_path / "none.jsonl"]
    assert "no such file" in refused(2, *line_of(tmp_path / "empty", caches, tmp_path / "o", *nowhere))
    assert refused(2, *line_of(tmp_path / "empty", caches, tmp_path / "o", "--eval-prior", tmp_path / "none"))
