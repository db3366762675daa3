"""The budgeted weight: the controller on models of how KL answers a weight, in training, and across a resume."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cli_harness import done, precompute, refused, text_data, train_line

from logitcache.cli.progress import TrainBar
from logitcache.training.kl_controller import BudgetedWeight


def settled(budget: float, start: float, answer: Any, steps: int = 200, noise: float = 0.1) -> tuple[float, float]:
    """Mean KL and weight over the second half, of a plant in which KL follows answer(weight) with a delay."""
    rng = np.random.default_rng(0)
    controller, kl, found = BudgetedWeight(budget, start), 0.0, []
    for _ in range(steps):
        kl += 0.1 * (answer(controller.weight) - kl)
        measured = kl * math.exp(noise * rng.normal())
        found.append((measured, controller.weight))
        controller.update(measured)
    half = np.array(found[steps // 2 :]).mean(axis=0)
    return float(half[0]), float(half[1])


@pytest.mark.parametrize("budget", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("start", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_the_mean_meets_the_budget_from_wherever_it_starts(budget: float, start: float, power: float) -> None:
    kl, weight = settled(budget, start, lambda w: 0.1 / w**power, steps=800)
    assert kl == pytest.approx(budget, rel=0.1)
    assert weight == pytest.approx((0.1 / budget) ** (1 / power), rel=0.3)


def test_a_budget_that_is_never_reached_lets_the_weight_fall_to_its_bound() -> None:
    _, weight = settled(1.0, 1.0, lambda _: 0.01, steps=2000)
    assert weight == pytest.approx(1e-4, rel=0.01)


def test_a_budget_that_cannot_be_kept_drives_the_weight_to_its_bound() -> None:
    _, weight = settled(0.01, 1.0, lambda _: 1.0, steps=2000)
    assert weight == pytest.approx(1e4, rel=0.01)


def test_the_start_at_zero_does_not_push_the_weight_down() -> None:
    controller = BudgetedWeight(0.1, 1.0)
    for _ in range(5):
        controller.update(0.0)
    assert 0.8 < controller.weight < 1.0


def test_a_kl_that_is_not_finite_leaves_the_weight_alone() -> None:
    controller = BudgetedWeight(0.1, 2.0)
    assert controller.update(math.nan) == controller.update(math.inf) == 2.0


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("budget")
    precompute(tiny_model, text_data(folder), folder / "cache")
    return tiny_model, folder / "cache"


BUDGET = ["--kl-budget", 0.1, "--lr", 3e-3, "--log-every", 1, "--batch-size", 4]


def log_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]


def test_training_holds_the_budget(tmp_path: Path, setting: tuple[Path, Path]) -> None:
    model, cache = setting
    means = []
    for budget in (0.1, 0.3):
        out = tmp_path / str(budget)
        done(*train_line(model, cache, out, *BUDGET, "--max-steps", 80, "--kl-budget", budget))
        log = log_of(out)
        means.append(float(np.mean([entry["kl"] for entry in log[40:]])))
        weights = [entry["kl_weight"] for entry in log]
        assert weights[0] == 1.0 and len(set(weights)) > 30
        for entry in log:
            assert entry["loss"] == pytest.approx(entry["ce"] + entry["kl_weight"] * entry["kl"], rel=1e-4)
    assert means == pytest.approx([0.1, 0.3], rel=0.25)


def test_a_resumed_run_goes_on_with_the_weight_it_had(
    tmp_path: Path, setting: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache = setting
    done(*train_line(model, cache, tmp_path / "whole", *BUDGET, "--max-steps", 10))
    original = TrainBar.on_step_end

    def on_step_end(self: TrainBar, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 6:
            raise KeyboardInterrupt
        original(self, args, state, control, **kwargs)

    line = train_line(model, cache, tmp_path / "cut", *BUDGET, "--max-steps", 10)
    with monkeypatch.context() as patch:
        patch.setattr(TrainBar, "on_step_end", on_step_end)
        refused(130, *line)
    done(*line, "--resume")
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    name = "adapter_model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("flags", [("--kl-budget", 0), ("--kl-budget", -1), ("--kl-budget", "nan")])
def test_a_budget_that_is_none_is_2(tmp_path: Path, setting: tuple[Path, Path], flags: tuple[object, ...]) -> None:
    refused(2, *train_line(*setting, tmp_path / "o", *flags))


def test_a_budget_without_a_regularizer_is_2(tmp_path: Path, setting: tuple[Path, Path]) -> None:
    message = refused(2, *train_line(*setting, tmp_path / "o", "--kl-budget", 1, "--regularizer", "none"))
    assert "--kl-budget needs a KL regularizer" in message
