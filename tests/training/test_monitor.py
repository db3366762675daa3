"""Evaluation while training: its numbers are `evaluate`'s, training does not notice it, and what it decides is done."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from support.cli_harness import copy_of, flip_byte
from support.tiny_model import make_model
from support.tiny_runs import Stop, make_base, make_cache, make_samples
from transformers import TrainerCallback

from logitcache.adapters.attach import AdapterSettings
from logitcache.errors import InvalidSettings, NotComparable, TrainingFailed
from logitcache.evaluation.compare import compare, compare_cached
from logitcache.evaluation.held_out import HeldOut
from logitcache.losses.formulas import Objective
from logitcache.models.loading import Source
from logitcache.storage import IdentityMismatch, LogitCache
from logitcache.training.kl_controller import EVERY_EVALUATION, BudgetedWeight
from logitcache.training.run import TrainReport, TrainSettings, train
from logitcache.training.settings import EvalSettings
from logitcache.training.trainer_settings import TrainerSettings

STEPS = 8
ADAPTER = "adapter_model.safetensors"
NEW, PRIOR = make_samples(6, seed=1), make_samples(9, seed=2)
MEASURED = ("new_ce", "prior_ce", "prior_kl", "prior_first_changed")


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> tuple[LogitCache, LogitCache]:
    """Of the samples that are learnt, and of prior text."""
    folder = tmp_path_factory.mktemp("monitor")
    return make_cache(folder / "cache", make_samples()), make_cache(folder / "prior", PRIOR, top_k=32)


def go(
    caches: tuple[LogitCache, LogitCache],
    out: Path,
    *callbacks: TrainerCallback,
    held_out: HeldOut | None = None,
    adapter: AdapterSettings | None = None,
    lr: float = 2e-2,
    objective: Objective | None = None,
    trainer: TrainerSettings | None = None,
    **evaluation: Any,
) -> TrainReport:
    """Train with dropout, so that what is drawn matters, and evaluate every second step unless it is said otherwise."""
    base = replace(make_base(), source=Source("tiny", out.parent / "tiny"))
    base.model.config.save_pretrained(out.parent / "tiny")  # PEFT looks at it when it saves
    chosen = adapter or AdapterSettings(rank=2, alpha=4, dropout=0.2)
    settings = TrainSettings(lr=lr, max_steps=STEPS, batch_size=4, log_every=3)
    watched = HeldOut(NEW, caches[1]) if held_out is None else held_out
    return train(
        *(base, make_samples(), caches[0], out, chosen, objective or Objective(weight=0.5), settings, True, callbacks),
        held_out=watched,
        evaluation=EvalSettings(**{"eval_steps": 2, **evaluation}),
        trainer=trainer,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, caches: tuple[LogitCache, LogitCache]) -> Path:
    """A run that nothing interrupts and nothing stops, to be read only."""
    out = tmp_path_factory.mktemp("whole") / "o"
    go(caches, out)
    return out


def evaluations(out: Path, name: str = "eval_log.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text(encoding="utf-8").splitlines()]


def measured(out: Path, prior: LogitCache) -> dict[str, float]:
    """What `evaluate` finds of the adapter in a folder, loaded anew."""
    adapted = PeftModel.from_pretrained(make_model(), str(out)).eval()
    found = compare_cached(adapted, prior, PRIOR)
    assert found.after is not None and found.kl_nats is not None and found.num_first_changed is not None
    new = compare(adapted, None, NEW).before.ce_nats  # type: ignore[arg-type]
    return dict(zip(MEASURED, (new, found.after.ce_nats, found.kl_nats, found.num_first_changed), strict=True))


class StopAfterCheckpoint(TrainerCallback):
    """The same, once the checkpoint of a step is sealed."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_save or state.global_step == self.step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_the_numbers_are_those_of_evaluate(whole: Path, caches: tuple[LogitCache, LogitCache]) -> None:
    """At step 0 the base's own, at the last step those of the adapter that is saved."""
    log = evaluations(whole)
    assert [entry["step"] for entry in log] == [0, 2, 4, 6, 8]
    assert log[0]["prior_kl"] == pytest.approx(0, abs=1e-6) and log[0]["prior_first_changed"] == 0
    assert log[0]["new_ce"] == pytest.approx(compare(make_model(), None, NEW).before.ce_nats, rel=1e-6)
    found = measured(whole, caches[1])
    assert {name: log[-1][name] for name in MEASURED} == pytest.approx(found, rel=1e-5)
    assert log[-1]["prior_kl"] > 1e-2
    run = json.loads((whole / "run.json").read_text(encoding="utf-8"))
    assert run["result"]["evaluated"] == {name: log[-1][name] for name in MEASURED}
    assert run["result"]["best_step"] is None and run["result"]["stopped"] == ""
    trained = [entry["step"] for entry in evaluations(whole, "train_log.jsonl")]
    assert trained == [1, 2, 3, 4, 6, 8]  # steps that are evaluated have both


def test_training_goes_on_as_if_nothing_were_measured(
    tmp_path: Path, whole: Path, caches: tuple[LogitCache, LogitCache]
) -> None:
    base = replace(make_base(), source=Source("tiny", whole.parent / "tiny"))
    settings = TrainSettings(lr=2e-2, max_steps=STEPS, batch_size=4, log_every=3)
    adapter = AdapterSettings(rank=2, alpha=4, dropout=0.2)
    train(base, make_samples(), caches[0], tmp_path / "o", adapter, Objective(weight=0.5), settings)
    assert (tmp_path / "o" / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    assert not (tmp_path / "o" / "eval_log.jsonl").exists()


def test_a_run_stops_at_the_first_evaluation_that_has_drifted_so_far(
    tmp_path: Path, whole: Path, caches: tuple[LogitCache, LogitCache]
) -> None:
    second, third = (entry["prior_kl"] for entry in evaluations(whole)[1:3])
    assert second < third
    report = go(caches, tmp_path / "o", stop_at_prior_kl=(second + third) / 2)
    assert report.num_steps == 4 and "the KL on prior text was" in report.stopped
    assert evaluations(tmp_path / "o") == evaluations(whole)[:3]
    assert report.evaluated == {name: evaluations(whole)[2][name] for name in MEASURED}
    assert measured(tmp_path / "o", caches[1]) == pytest.approx(report.evaluated, rel=1e-5)
    assert evaluations(tmp_path / "o", "train_log.jsonl")[-1]["step"] == 4
    assert not (tmp_path / "o" / "checkpoints").exists()


def test_with_a_limit_the_best_is_the_best_within_it(tmp_path: Path, caches: tuple[LogitCache, LogitCache]) -> None:
    """Where the limit is above the first evaluation and below the second, the weights are the first's."""
    out = tmp_path / "o"
    found = go(caches, tmp_path / "free", eval_steps=1, best_by="prior-kl")
    assert found.best_step == 1  # at a learning rate of 0
    drifts = [entry["prior_kl"] for entry in evaluations(tmp_path / "free")]
    report = go(caches, out, eval_steps=1, best_by="new-ce", stop_at_prior_kl=(drifts[2] + drifts[3]) / 2)
    assert (report.best_step, report.num_steps) == (2, 3)
    assert measured(out, caches[1]) == pytest.approx(report.evaluated, rel=1e-5)


@pytest.mark.parametrize(("adapter", "lr"), [(None, 0.05), (AdapterSettings("pissa", 2, 4.0), 0.3)])
def test_the_weights_are_those_of_the_best_evaluation(
    adapter: AdapterSettings | None, lr: float, tmp_path: Path, caches: tuple[LogitCache, LogitCache]
) -> None:
    """A learning rate that overshoots, and a patience that ends it: of an adapter that rewrites the base too."""
    out = tmp_path / "o"
    report = go(caches, out, adapter=adapter, lr=lr, eval_steps=1, best_by="new-ce", patience=2)
    log = evaluations(out)[1:]
    best = min(log, key=lambda entry: entry["new_ce"])
    assert report.best_step == best["step"] and report.num_steps == best["step"] + 2 < STEPS
    assert report.stopped == "2 evaluations in a row found no lower new-ce"
    assert measured(out, caches[1]) == pytest.approx({name: best[name] for name in MEASURED}, rel=1e-4, abs=1e-7)
    assert report.evaluated == {name: best[name] for name in MEASURED}


def test_the_best_of_a_whole_model_is_kept(tmp_path: Path, caches: tuple[LogitCache, LogitCache]) -> None:
    out = tmp_path / "o"
    report = go(caches, out, adapter=AdapterSettings("none"), lr=3e-2, eval_steps=1, best_by="prior-ce", patience=2)
    assert report.best_step is not None and report.best_step < report.num_steps
    model = type(make_model()).from_pretrained(out).eval()
    assert compare(model, None, NEW).before.ce_nats == pytest.approx(report.evaluated["new_ce"], rel=1e-5)


@pytest.mark.parametrize(
    "stop", [Stop(1), Stop(3), StopAfterCheckpoint(2), StopAfterCheckpoint(3), StopAfterCheckpoint(4)]
)
def test_a_run_that_goes_on_decides_as_one_that_nothing_interrupts(
    stop: TrainerCallback, tmp_path: Path, caches: tuple[LogitCache, LogitCache]
) -> None:
    """The best at a step before the kill, at it or after it, and a checkpoint of the very step where a run stops."""
    asked: dict[str, Any] = {"lr": 0.05, "eval_steps": 1, "best_by": "new-ce", "patience": 2}
    report = go(caches, tmp_path / "whole", **asked)
    assert (report.best_step, report.num_steps) == (2, 4)
    with pytest.raises(KeyboardInterrupt):
        go(caches, tmp_path / "o", stop, **asked)
    assert go(caches, tmp_path / "o", **asked).stopped == report.stopped
    for name in (ADAPTER, "eval_log.jsonl", "train_log.jsonl"):
        assert (tmp_path / "o" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert {p.name for p in (tmp_path / "o").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}


def test_the_best_stays_as_long_as_a_checkpoint_needs_it(tmp_path: Path, caches: tuple[LogitCache, LogitCache]) -> None:
    """Two checkpoints are kept, and the newer may be lost: the best evaluation of each is there, and no other."""
    asked: dict[str, Any] = {"lr": 0.05, "eval_steps": 1, "best_by": "new-ce"}
    go(caches, tmp_path / "whole", **asked)
    with pytest.raises(KeyboardInterrupt):
        go(caches, tmp_path / "o", StopAfterCheckpoint(2), **asked)
    kept = {path.name for path in (tmp_path / "o" / "checkpoints").iterdir()}
    assert kept == {"checkpoint-1", "checkpoint-2", "best-1", "best-2"}
    flip_byte(tmp_path / "o" / "checkpoints" / "checkpoint-2" / "optimizer.pt")
    go(caches, tmp_path / "o", **asked)
    assert (tmp_path / "o" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()


def test_damaged_weights_of_the_best_are_not_saved(tmp_path: Path, caches: tuple[LogitCache, LogitCache]) -> None:
    asked: dict[str, Any] = {"lr": 0.05, "eval_steps": 1, "best_by": "new-ce", "patience": 2}
    with pytest.raises(KeyboardInterrupt):
        go(caches, tmp_path / "o", StopAfterCheckpoint(3), **asked)
    flip_byte(tmp_path / "o" / "checkpoints" / "best-2" / "weights.safetensors")
    with pytest.raises(TrainingFailed, match="expected what was written at step 2, found that"):
        go(caches, tmp_path / "o", **asked)
    assert not (tmp_path / "o" / ADAPTER).exists()


def test_another_evaluation_is_another_run(tmp_path: Path, whole: Path, caches: tuple[LogitCache, LogitCache]) -> None:
    out = copy_of(whole, tmp_path / "o")
    with pytest.raises(IdentityMismatch, match="evaluation"):
        go(caches, out, eval_steps=3)
    with pytest.raises(IdentityMismatch, match="evaluation"):
        go(caches, out, held_out=HeldOut(NEW[1:], caches[1]))


@pytest.mark.parametrize(
    ("held_out", "asked", "said"),
    [
        (HeldOut(NEW), {"stop_at_prior_kl": 0.1}, "--stop-at-prior-kl is measured on --eval-prior"),
        (HeldOut(NEW), {"best_by": "prior-kl"}, "--best-by prior-kl is measured on --eval-prior"),
        (HeldOut(), {"best_by": "new-ce"}, "--best-by new-ce is measured on --eval-data"),
        (HeldOut(), {}, "--eval-steps is of an evaluation while training"),
        (HeldOut(NEW), {"patience": 2}, "--patience waits for a new lowest --best-by"),
    ],
)
def test_what_needs_a_text_is_refused_without_it(
    held_out: HeldOut, asked: dict[str, Any], said: str, tmp_path: Path, caches: tuple[LogitCache, LogitCache]
) -> None:
    with pytest.raises(InvalidSettings, match=said):
        go(caches, tmp_path / "o", held_out=held_out, **asked)
    assert not (tmp_path / "o").exists()


def test_a_prior_cache_of_another_base_or_without_alternatives_is_refused(
    tmp_path: Path, caches: tuple[LogitCache, LogitCache]
) -> None:
    bare = make_cache(tmp_path / "bare", PRIOR, top_k=0)
    with pytest.raises(NotComparable, match="--top-k 0"):
        go(caches, tmp_path / "o", held_out=HeldOut(None, bare))
    other = make_cache(tmp_path / "other", PRIOR, of=replace(make_base().identity, weights="b" * 32))
    with pytest.raises(IdentityMismatch, match="weights"):
        go(caches, tmp_path / "o", held_out=HeldOut(None, other))
    assert not (tmp_path / "o").exists()


def weights_of(out: Path) -> list[float]:
    return [entry["kl_weight"] for entry in evaluations(out, "train_log.jsonl")]


def test_a_budget_of_prior_text_moves_the_weight_at_evaluations_alone(
    tmp_path: Path, caches: tuple[LogitCache, LogitCache]
) -> None:
    """By the controller's own rule of what every evaluation found; the KL of the steps has no part in it."""
    out, objective = tmp_path / "o", Objective(weight=0.5, kl_budget=5e-3)
    go(caches, out, objective=objective, eval_steps=2, kl_budget_of="prior")
    expected, controller = [0.5], BudgetedWeight(5e-3, 0.5, EVERY_EVALUATION)
    for entry in evaluations(out)[1:-1]:
        expected.append(controller.update(entry["prior_kl"]))
    assert len(set(expected)) == 4 and expected[-1] > 0.5  # what was found is above the budget
    # logged are the means since the last entry: of steps 1; 2; 3; 4; 5 and 6; 7 and 8
    assert weights_of(out) == pytest.approx([expected[i] for i in (0, 0, 1, 1, 2, 3)])


@pytest.mark.training
def test_a_killed_run_with_a_budget_of_prior_text_goes_on_to_the_same_bytes(
    tmp_path: Path, caches: tuple[LogitCache, LogitCache]
) -> None:
    asked: dict[str, Any] = {"objective": Objective(weight=0.5, kl_budget=5e-3), "kl_budget_of": "prior"}
    go(caches, tmp_path / "whole", **asked)
    with pytest.raises(KeyboardInterrupt):
        go(caches, tmp_path / "cut", StopAfterCheckpoint(5), **asked)
    go(caches, tmp_path / "cut", **asked)
    assert (tmp_path / "cut" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()
    assert evaluations(tmp_path / "cut") == evaluations(tmp_path / "whole")


def test_a_budget_of_prior_text_needs_both(tmp_path: Path, caches: tuple[LogitCache, LogitCache]) -> None:
    with pytest.raises(InvalidSettings, match="--kl-budget-of prior is measured on --eval-prior"):
        go(
            caches,
            tmp_path / "o",
            held_out=HeldOut(NEW),
            objective=Objective(kl_budget=0.1),
            kl_budget_of="prior",
        )
    with pytest.raises(InvalidSettings, match="--kl-budget-of prior says what --kl-budget bounds"):
        go(caches, tmp_path / "o", kl_budget_of="prior")


@pytest.mark.parametrize("eval_steps", [STEPS, STEPS + 5])
def test_a_budget_of_prior_text_that_no_evaluation_would_move(
    eval_steps: int, tmp_path: Path, caches: tuple[LogitCache, LogitCache]
) -> None:
    asked: dict[str, Any] = {"objective": Objective(kl_budget=0.1), "kl_budget_of": "prior"}
    with pytest.raises(TrainingFailed, match=f"before the last of 8 steps, found --eval-steps {eval_steps}"):
        go(caches, tmp_path / "o", eval_steps=eval_steps, **asked)


def test_noise_is_refused_beside_a_budget_of_the_steps_alone(
    tmp_path: Path, caches: tuple[LogitCache, LogitCache]
) -> None:
    """Evaluations are measured without it."""
    asked: dict[str, Any] = {"objective": Objective(weight=0.5, kl_budget=5e-3)}
    noisy = TrainerSettings(set=("neftune_noise_alpha=5",))
    with pytest.raises(InvalidSettings, match="neftune_noise_alpha with --kl-budget"):
        go(caches, tmp_path / "new", trainer=noisy, **asked)
    assert go(caches, tmp_path / "prior", trainer=noisy, kl_budget_of="prior", **asked).num_steps == STEPS
