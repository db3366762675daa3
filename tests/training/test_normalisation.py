"""The loss of a step is the mean over all its positions, once: whatever Trainer divides it, and over what processes."""

import json
import math
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.version import Version
from support.tensor_parallel_training_rank import found_in
from support.tiny_model import make_model
from support.tiny_runs import gradients_after_one_step, make_cache, make_samples
from support.two_processes import run_under_torchrun
from transformers import Trainer, TrainerCallback

from logitcache.adapters.attach import AdapterSettings, attach
from logitcache.data.batches import pad_samples
from logitcache.data.samples import Sample
from logitcache.errors import TrainingFailed
from logitcache.losses.formulas import Objective
from logitcache.storage import LogitCache
from logitcache.training.penalties import Penalty
from logitcache.training.run import TrainSettings, trainer_arguments
from logitcache.training.trainer import CachedKL, check_supported

WEIGHT = 2.0

Cached = tuple[list[Sample], LogitCache]


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Cached:
    samples = make_samples(12)
    return samples, make_cache(tmp_path_factory.mktemp("normalisation") / "c", samples)


class SilentAboutLosses(Trainer):
    """As axolotl's: for PEFT models it says in its own `__init__` that they take no `num_items_in_batch`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False


class OlderTrainer(Trainer):
    """`training_step` of transformers 5.0 to 5.18, which do not know `loss_is_scaled_for_ga`."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)
        loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        if (not self.model_accepts_loss_kwargs or num_items_in_batch is None) and self.compute_loss_func is None:
            loss = loss / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()


class OlderSilent(OlderTrainer, SilentAboutLosses):
    """Both."""


class OlderTRL(OlderTrainer):
    """As TRL 1.16 over transformers before 5.19: what its class says becomes what those read."""

    loss_is_scaled_for_ga: bool | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.loss_is_scaled_for_ga is not None:
            self.model_accepts_loss_kwargs = False
            if self.loss_is_scaled_for_ga:
                self.compute_loss_func = "non-None value to disable scaling"


BASES = [Trainer, SilentAboutLosses, OlderTrainer, OlderSilent, OlderTRL]


def trainer_over(base: type[Trainer], out: Path, samples: Sequence[Sample], cache: LogitCache, **changes: Any) -> Any:
    """`CachedKL` over it, with an adapter that does not start as identity; `changes`: of its arguments, or its own."""
    torch.manual_seed(0)
    model = attach(make_model(), AdapterSettings(rank=4, alpha=8), "")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    args = trainer_arguments(out, TrainSettings(lr=1e-2, max_steps=1), torch.device("cpu"))
    args.save_strategy, args.logging_steps = "no", 1
    own = {name: changes.pop(name) for name in ("objective", "penalty") if name in changes}
    for name, value in changes.items():
        setattr(args, name, value)
    mixed = type("Mixed", (CachedKL, base), {})
    more = {"objective": Objective(weight=WEIGHT), "cache": cache, "check": False, **own}
    return mixed(model=model, args=args, train_dataset=list(samples), data_collator=pad_samples, **more)


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.__name__)
def test_micro_batches_give_the_loss_of_one_batch(base: type[Trainer], cached: Cached, tmp_path: Path) -> None:
    samples, cache = cached
    found = []
    for batch, accumulate in ((6, 1), (3, 2), (2, 3)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate}
        trainer = trainer_over(base, tmp_path, samples[:6], cache, **sizes)
        gradients = gradients_after_one_step(trainer)
        log = trainer.state.log_history[0]
        assert log["loss"] == pytest.approx(log["ce"] + WEIGHT * log["kl"], rel=1e-5)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        found.append((log["loss"], log["ce"], log["kl"], norm))
    for other in found[1:]:
        assert [a / b for a, b in zip(other, found[0], strict=True)] == pytest.approx([1.0] * 4, abs=1e-5)


def test_evaluation_finds_what_the_trainer_has_set(cached: Cached, tmp_path: Path) -> None:
    samples, cache = cached
    trainer = trainer_over(SilentAboutLosses, tmp_path, samples, cache)
    seen = []

    class Looks(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seen.append((trainer.model_accepts_loss_kwargs, "loss_is_scaled_for_ga" in vars(trainer)))

    trainer.add_callback(Looks())
    trainer.train()
    assert seen == [(False, False)]


class Scaling(Trainer):
    """Scales every loss, whatever is said. At micro-batch `fails_at` the memory is full, once."""

    scale, fails_at = 0.5, -1

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self.fails_at -= 1
        if self.fails_at == 0:
            raise RuntimeError("CUDA out of memory.")
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        loss = loss * self.scale
        self.accelerator.backward(loss)
        return loss.detach()


class HidesTheStep(Trainer):
    """Does not pass on how many positions the step has, so that each micro-batch is a mean of its own."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        return super().training_step(model, inputs)


NUMBERS = re.compile(r"expected a loss of (\S+) .*, found (\S+) in what .* returned and (\S+) in the log")


@pytest.mark.parametrize("penalised", [False, True], ids=["", "with a penalty"])
@pytest.mark.parametrize("base", [Scaling, HidesTheStep], ids=lambda base: base.__name__)
def test_another_normalisation_stops_the_run_before_its_first_step(
    base: type[Trainer], penalised: bool, cached: Cached, tmp_path: Path
) -> None:
    samples, cache = cached
    sizes = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    right, wrong = (trainer_over(b, tmp_path, samples[:6], cache, **sizes) for b in (Trainer, base))
    for trainer in (right, wrong) if penalised else ():
        trainer.penalty = Penalty(trainer.model, 0.3)
    right.train()
    before = {name: p.detach().clone() for name, p in wrong.model.named_parameters()}
    with pytest.raises(TrainingFailed, match="training, step 1: ") as caught:
        wrong.train()
    expected, returned, in_log = map(float, NUMBERS.search(str(caught.value)).groups())  # type: ignore[union-attr]
    assert expected == pytest.approx(right.state.log_history[0]["loss"], rel=1e-5)
    if base is Scaling:
        assert (returned, in_log) == pytest.approx((expected / 2, expected), rel=1e-5)
    else:  # a sum of two means
        assert in_log > 1.5 * expected - 0.3 * penalised
    assert all(torch.equal(before[name], p) for name, p in wrong.model.named_parameters())


def test_a_step_without_positions_leaves_the_question_to_the_next(cached: Cached, tmp_path: Path) -> None:
    samples, cache = cached
    nothing = [Sample(s.token_ids, s.supervised & False, "nothing") for s in samples[:4]]
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    sizes |= {"train_sampling_strategy": "sequential"}
    half = [*nothing[:2], *samples[:2]]  # a micro-batch without any, and one with
    for data, steps in ((half, 1), ([*nothing, *half], 2)):
        trainer = trainer_over(Trainer, tmp_path, data, cache, max_steps=steps, **sizes)
        trainer.train()
        assert [log["ce"] > 0 for log in trainer.state.log_history if "ce" in log] == [False] * (steps - 1) + [True]
    with pytest.raises(TrainingFailed, match="training, step 2: expected a loss of"):
        trainer_over(Scaling, tmp_path, [*nothing, *half], cache, max_steps=2, **sizes).train()


@pytest.mark.parametrize(
    "objective",
    [
        Objective("none", label_smoothing=0.2),
        Objective("full-kl", "renormalize", weight=0.0),
        Objective("masked-reverse-kl", "renormalize", weight=50.0, temperature=2.0),
        Objective(weight=3.0, kl_budget=0.01),
    ],
    ids=["smoothed", "weight of 0", "reverse", "budget"],
)
def test_every_objective_passes(objective: Objective, cached: Cached, tmp_path: Path) -> None:
    samples, cache = cached
    sizes = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 2}
    trainer = trainer_over(OlderSilent, tmp_path, samples, cache, objective=objective, **sizes)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "ce" in log]
    assert len(logs) == 2
    for log in logs:
        assert log["loss"] == pytest.approx(log["ce"] + log["kl_weight"] * log["kl"], rel=1e-5)


def test_every_run_is_asked(cached: Cached, tmp_path: Path) -> None:
    samples, cache = cached
    trainer = trainer_over(Scaling, tmp_path, samples, cache, save_strategy="steps", save_steps=1)
    trainer.scale = 1.0
    trainer.train()
    checkpoint = str(tmp_path / "checkpoints" / "checkpoint-1")
    again = trainer_over(Scaling, tmp_path, samples, cache, max_steps=2)
    with pytest.raises(TrainingFailed, match="training, step 2: expected a loss of"):
        again.train(resume_from_checkpoint=checkpoint)
    trainer.scale = 0.5
    with pytest.raises(TrainingFailed, match="training, step 1: expected a loss of"):
        trainer.train()


def test_a_loop_that_does_not_announce_its_steps_is_asked_after_the_first(
    cached: Cached, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, cache = cached
    trainer = trainer_over(Scaling, tmp_path, samples, cache, max_steps=2, per_device_train_batch_size=6)
    monkeypatch.setattr(trainer.callback_handler, "on_pre_optimizer_step", lambda args, state, control: control)
    with pytest.raises(TrainingFailed, match="training, step 1: expected a loss of"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_a_try_after_one_without_memory_is_asked_anew(cached: Cached, tmp_path: Path) -> None:
    samples, cache = cached
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "auto_find_batch_size": True}
    trainer = trainer_over(Scaling, tmp_path, samples, cache, max_steps=2, **sizes)
    trainer.scale, trainer.fails_at = 1.0, 2  # the second micro-batch of the first step
    trainer.train()
    assert trainer.fails_at < 0 and trainer.state.global_step == 2 and trainer._train_batch_size < 4
    trainer.fails_at, trainer.scale = 4, 0.5
    with pytest.raises(TrainingFailed, match="training, step 1: expected a loss of"):
        trainer.train()


def test_a_loss_that_is_not_finite_is_told_as_such(cached: Cached, tmp_path: Path) -> None:
    samples, cache = cached
    trainer = trainer_over(Trainer, tmp_path, samples, cache)
    with torch.no_grad():
        next(p for n, p in trainer.model.named_parameters() if "lora_B" in n).fill_(torch.nan)
    with pytest.raises(TrainingFailed, match="the loss is not finite"):
        trainer.train()


# Several processes that hold one model together


def run_two_ranks(folder: Path) -> list[dict[str, Any]]:
    """What `tensor_parallel_training_rank` wrote on each of two processes."""
    run_under_torchrun("tensor_parallel_training_rank.py", folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.skipif(
    Version(version("accelerate")) < Version("1.15"),
    reason="transformers refuses accelerate before 1.12 where a Trainer divides a model, and 1.12 to 1.14 fail there",
)
def test_a_divided_model_trains_as_one_process_does(tmp_path: Path) -> None:
    make_cache(tmp_path / "c", make_samples())
    model = make_model()
    torch.manual_seed(1)
    for parameter in model.parameters():  # so that the KL is not 0
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(tmp_path / "m")
    expected = found_in(tmp_path)
    assert min(log["kl"] for log in expected["full"][:2]) > 1e-2 and expected["full"][2] != expected["full"][0]
    for found in run_two_ranks(tmp_path):
        for kind, logs in expected.items():
            for ours, theirs in zip(found[kind], logs, strict=True):
                ratios = {name: ours[name] / theirs[name] for name in theirs}
                assert ratios == pytest.approx(dict.fromkeys(theirs, 1.0), abs=1e-5), (kind, ratios)


@pytest.mark.parametrize("penalised", [False, True], ids=["PEFT did not divide it", "a penalty"])
def test_what_a_divided_model_cannot_be_trained_with(penalised: bool, cached: Cached, tmp_path: Path) -> None:
    samples, cache = cached
    divided = type("Divided", (Trainer,), {"get_tp_size": lambda _: 2})
    penalty = Penalty(attach(make_model(), AdapterSettings(rank=4, alpha=8), ""), 0.3) if penalised else None
    message = "divided over 2 processes" if penalised else "2 processes hold it together.* an adapter of its own"
    with pytest.raises(TrainingFailed, match=message):
        trainer_over(divided, tmp_path, samples, cache, penalty=penalty)


@pytest.mark.parametrize("kind", ["tp", "cp"])
def test_what_accelerate_was_told_counts_where_the_trainer_does_not_know(
    kind: str, cached: Cached, tmp_path: Path
) -> None:
    samples, cache = cached
    trainer = trainer_over(Trainer, tmp_path, samples, cache)  # transformers 5.16 does not see that a model is divided
    trainer.get_tp_size = trainer.get_cp_size = lambda: 1
    sizes = SimpleNamespace(tp_size=1, cp_size=1, sp_size=1)
    alone = {"num_processes": 1, "distributed_type": "NO"}
    trainer.accelerator = SimpleNamespace(parallelism_config=sizes, state=trainer.accelerator.state, **alone)
    check_supported(trainer)
    setattr(sizes, f"{kind}_size", 2)
    with pytest.raises(TrainingFailed, match={"tp": "2 processes hold it together", "cp": "Set cp_size=1"}[kind]):
        check_supported(trainer)


class OwnLoader(CachedKL, Trainer):
    """Makes its batches by itself, without anything of the cache in them."""

    def get_train_dataloader(self) -> Any:
        return Trainer.get_train_dataloader(self)


def test_batches_of_another_loader_are_looked_up_where_they_arrive(cached: Cached, tmp_path: Path) -> None:
    samples, cache = cached
    sizes = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    expected = gradients_after_one_step(trainer_over(Trainer, tmp_path, samples[:6], cache, **sizes))
    trainer = trainer_over(Trainer, tmp_path, samples[:6], cache, **sizes)
    trainer.__class__ = type("Mixed", (OwnLoader,), {})
    found = gradients_after_one_step(trainer)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
