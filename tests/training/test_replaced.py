"""The trainer below `CachedKL`: whose loss may be replaced, and what of TRL's log is made again.

The oracle of the metrics is TRL's own SFTTrainer on the same batches, and an argmax over dense logits.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft.helpers
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import get_peft_model
from support.numerics_cases import make_case
from support.plug_ins import ON_A_CPU, Cached, CachedSFTTrainer, arguments, cached, logs_of, lora, rows_of
from support.tiny_model import make_model, make_tokenizer
from support.tiny_runs import make_samples
from torch import Tensor
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer
from trl import SFTConfig, SFTTrainer

from logitcache.data.batches import pad_samples
from logitcache.errors import TrainingFailed
from logitcache.losses.formulas import Objective
from logitcache.training.replaced import TokenMetrics
from logitcache.training.trainer import CachedKL, CachedKLTrainer

__all__ = ["cached"]  # the fixture

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


class Weighted(Trainer):
    """A loss of a user's own."""

    calls = 0

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        Weighted.calls += 1
        return 3 * super().compute_loss(model, inputs, *args, **kwargs)


class WeightedSFT(SFTTrainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("not in training")


class Counting(Trainer):
    def _get_num_items_in_batch(self, *args: Any, **kwargs: Any) -> Any:
        return 17


class Between:
    """A mixin that a user has put on the wrong side."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return 3 * super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]


class CachedWeighted(CachedKL, Weighted): ...


class CachedWeightedSFT(CachedKL, WeightedSFT): ...


class CachedCounting(CachedKL, Counting): ...


class CachedBetween(CachedKL, Between, Trainer): ...


BELOW: list[tuple[Any, str]] = [
    (CachedWeighted, "Weighted.compute_loss"),
    (CachedWeightedSFT, "WeightedSFT.compute_loss"),
    (CachedBetween, "Between.compute_loss"),
    (CachedCounting, "Counting._get_num_items_in_batch"),
]
if hasattr(peft.helpers, "MontecloraTrainerMixin"):  # since PEFT 0.21

    class CachedMonteclora(CachedKL, peft.helpers.MontecloraTrainerMixin, Trainer): ...

    BELOW.append((CachedMonteclora, "MontecloraTrainerMixin.compute_loss"))


class CachedSeq2Seq(CachedKL, Seq2SeqTrainer): ...


class Further(CachedSFTTrainer):
    """Where a loss of one's own belongs: above."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) + 5.0


class Bare(Trainer):
    """Nothing of its own."""


class CachedBare(CachedKL, Bare): ...


def one_step(kind: Any, cached: Cached, out: Path, **more: Any) -> Any:
    """A trainer of this class after a step or, made from SFTTrainer, three."""
    samples, cache = cached
    if issubclass(kind, SFTTrainer):
        trainer = sft_trainer(kind, samples, out, cache=cache, **more)
    else:
        trainer = kind(
            cache=cache,
            model=get_peft_model(make_model(), lora()),
            args=arguments(out, remove_unused_columns=False),
            train_dataset=list(samples),
            data_collator=pad_samples,
            **more,
        )
    trainer.train()
    return trainer


@pytest.mark.parametrize(("kind", "named"), BELOW)
def test_a_loss_of_its_own_below_the_mixin_is_refused_unless_it_is_to_be_replaced(
    kind: Any, named: str, cached: Cached, tmp_path: Path
) -> None:
    with pytest.raises(TrainingFailed, match=rf"{kind.__name__}.*found {named}.*replace_loss=True"):
        one_step(kind, cached, tmp_path)
    Weighted.calls = 0
    trainer = one_step(kind, cached, tmp_path, replace_loss=True)
    entry = logs_of(trainer)[0]
    assert entry["loss"] == pytest.approx(entry["ce"] + entry["kl"], rel=1e-5)
    assert not Weighted.calls


def sft_trainer(kind: Any, samples: Any, out: Path, model: Any = None, **more: Any) -> Any:
    """A trainer of three steps of 4 rows over all data, one row shorter than its batches."""
    names = ("cache", "objective", "check", "replace_loss", "eval_dataset")
    of_trainer = {name: more.pop(name) for name in names if name in more}
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "max_steps": 3,
        "max_length": 64,
        "learning_rate": 1e-2,
        **ON_A_CPU,
        "gradient_checkpointing": False,
    }
    torch.manual_seed(0)
    return kind(
        model=make_model() if model is None else model,
        args=SFTConfig(**{**settings, **more}),
        train_dataset=Dataset.from_list(rows_of(samples)),
        peft_config=lora(),
        processing_class=make_tokenizer(),
        **of_trainer,
    )


@pytest.mark.parametrize("kind", [CachedKLTrainer, CachedBare, CachedSeq2Seq])
def test_a_trainer_without_a_loss_of_its_own_is_known(kind: Any, cached: Cached, tmp_path: Path) -> None:
    if kind is CachedSeq2Seq:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("support.plug_ins.TrainingArguments", Seq2SeqTrainingArguments)
            trainer = one_step(kind, cached, tmp_path)
    else:
        trainer = one_step(kind, cached, tmp_path)
    (entry,) = logs_of(trainer)
    assert "mean_token_accuracy" not in entry and "num_tokens" not in entry


def test_a_loss_above_the_mixin_is_the_users_own(cached: Cached, tmp_path: Path) -> None:
    (entry, *_) = logs_of(one_step(Further, cached, tmp_path))
    assert entry["loss"] == pytest.approx(entry["ce"] + entry["kl"] + 5.0, rel=1e-5)


def test_a_loss_that_was_put_on_the_trainer_itself_stays_for_every_step(cached: Cached, tmp_path: Path) -> None:
    """As some libraries do; the check of the first step puts its own there for that step."""
    samples, cache = cached
    trainer = sft_trainer(CachedSFTTrainer, samples, tmp_path, cache=cache)
    inner = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: inner(*args, **kwargs) + 5.0
    trainer.train()
    logs = logs_of(trainer)
    assert len(logs) == 3
    for entry in logs:
        assert entry["loss"] == pytest.approx(entry["ce"] + entry["kl"] + 5.0, rel=1e-5)


class Skipping(Trainer):
    """Its loader skips batches when it is asked to, and has no `dataset`."""

    asked: tuple[int, ...] = ()

    def get_train_dataloader(self, skip_batches: int = 0) -> Any:
        Skipping.asked += (skip_batches,)
        return iter([*super().get_train_dataloader()][skip_batches:])


class CachedSkipping(CachedKL, Skipping): ...


def test_what_a_trainer_says_to_its_loader_arrives(cached: Cached, tmp_path: Path) -> None:
    samples, cache = cached
    args = arguments(tmp_path, per_device_train_batch_size=4, remove_unused_columns=False)
    args.loss_type = None  # a framework's name for the model's own
    model = get_peft_model(make_model(), lora())
    trainer = CachedSkipping(
        cache=cache, model=model, args=args, train_dataset=list(samples), data_collator=pad_samples
    )
    Skipping.asked = ()
    every, rest = list(trainer.get_train_dataloader()), list(trainer.get_train_dataloader(skip_batches=2))
    assert Skipping.asked == (0, 2) and len(rest) == len(every) - 2 > 0
    assert all("base_rows" in batch for batch in every + rest)


def test_a_loss_that_a_library_has_put_into_a_known_class_is_refused(
    cached: Cached, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = SFTTrainer.compute_loss
    monkeypatch.setattr(SFTTrainer, "compute_loss", lambda *args, **kwargs: 3 * original(*args, **kwargs))
    with pytest.raises(TrainingFailed, match=r"SFTTrainer\.compute_loss of \S*test_replaced"):
        one_step(CachedSFTTrainer, cached, tmp_path)


def test_processes_that_do_not_see_one_another_are_refused(
    cached: Cached, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun where there is no GPU, without use_cpu: accelerate counts them and reduces nothing."""
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda _: 2))
    with pytest.raises(TrainingFailed, match=r"processes were started that do not see one another.*use_cpu=True"):
        one_step(CachedBare, cached, tmp_path)


def test_a_smoother_that_was_set_by_hand_is_refused(cached: Cached, tmp_path: Path) -> None:
    class Smoothed(Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.label_smoother = lambda *_args, **_kwargs: torch.zeros(())

    class CachedSmoothed(CachedKL, Smoothed): ...

    with pytest.raises(TrainingFailed, match="label smoothing"):
        one_step(CachedSmoothed, cached, tmp_path)


# TRL's metrics


SETTINGS: list[dict[str, Any]] = [
    {},
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "logging_steps": 2, "max_steps": 5},
    {"packing": True, "per_device_train_batch_size": 1, "learning_rate": 0.03, "max_steps": 8},
    {"padding_free": True, "max_length": None},
    {"bf16": True},
    {"padding_free": True, "max_length": None, "pad_to_multiple_of": 32, "num_train_epochs": 2, "max_steps": -1},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_metrics_are_those_of_trl(settings: dict[str, Any], cached: Cached, tmp_path: Path) -> None:
    samples, cache = cached
    evaluated = {"eval_dataset": Dataset.from_list(rows_of(make_samples(5, seed=3))), "eval_strategy": "steps"}
    evaluated |= {"eval_steps": 1}
    plain = sft_trainer(SFTTrainer, samples[:14], tmp_path / "a", **evaluated, **settings)
    ours = sft_trainer(
        CachedSFTTrainer,
        samples[:14],
        tmp_path / "b",
        cache=cache,
        objective=Objective(weight=0.0),
        **evaluated,
        **settings,
    )
    for trainer in (plain, ours):
        trainer.train()
    logs = [[entry for entry in t.state.log_history if "loss" in entry] for t in (plain, ours)]
    assert len(logs[0]) == len(logs[1]) >= 2
    tolerance = 1e-6 if not settings.get("bf16") else 0.02
    for theirs, entry in zip(*logs, strict=True):
        assert entry["loss"] == pytest.approx(theirs["loss"], rel=1e-4 if not settings.get("bf16") else 0.02)
        assert entry["num_tokens"] == theirs["num_tokens"]
        assert entry["mean_token_accuracy"] == pytest.approx(theirs["mean_token_accuracy"], abs=tolerance)
    assert any(0 < entry["mean_token_accuracy"] < 1 for entry in logs[1])
    ends = [{name: t.state.log_history[-1].get(name) for name in ("train_loss", "num_tokens")} for t in (plain, ours)]
    assert ends[0]["num_tokens"] == ends[1]["num_tokens"] and ends[1]["train_loss"] is not None
    evaluations = [[entry for entry in t.state.log_history if "eval_loss" in entry] for t in (plain, ours)]
    for theirs, entry in zip(*evaluations, strict=True):
        assert entry["eval_num_tokens"] == theirs["eval_num_tokens"]
        assert entry["eval_mean_token_accuracy"] == pytest.approx(theirs["eval_mean_token_accuracy"], abs=tolerance)


def test_trl_averages_over_micro_batches_and_so_do_we(cached: Cached, tmp_path: Path) -> None:
    """One with many positions counts for as much as one with few, as TRL has it."""
    samples, cache = cached
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 14, "max_steps": 1}
    ours = sft_trainer(CachedSFTTrainer, samples[:14], tmp_path, cache=cache, **settings)
    ours.train()
    plain = sft_trainer(SFTTrainer, samples[:14], tmp_path, **settings)
    plain.train()
    (entry,), (theirs,) = ([e for e in t.state.log_history if "loss" in e] for t in (ours, plain))
    assert entry["mean_token_accuracy"] == pytest.approx(theirs["mean_token_accuracy"], abs=1e-6) != 0
    assert entry["num_tokens"] == sum(len(s.token_ids) for s in samples[:14])


@pytest.mark.parametrize("logging_steps", [1, 3])
def test_a_resumed_run_counts_on(logging_steps: int, cached: Cached, tmp_path: Path) -> None:
    """Tokens that were seen before the checkpoint, and logged after it."""
    samples, cache = cached
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": logging_steps}
    found = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        trainer = sft_trainer(CachedSFTTrainer, samples, tmp_path, cache=cache, **settings)
        trainer.train(resume_from_checkpoint=checkpoint)
        found.append([entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry])
    assert found[0][-2:] == found[1][-2:] and found[0][-1] == sum(len(s.token_ids) for s in samples)


def test_a_checkpoint_of_the_plain_trainer_is_gone_on_from(cached: Cached, tmp_path: Path) -> None:
    samples, cache = cached
    settings = {"save_strategy": "steps", "save_steps": 1}
    sft_trainer(SFTTrainer, samples, tmp_path, **settings, max_steps=1).train()
    trainer = sft_trainer(CachedSFTTrainer, samples, tmp_path, cache=cache, check=False, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    again = sft_trainer(CachedSFTTrainer, samples, tmp_path, cache=cache, **{**settings, "max_steps": 4})
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    seen = [[e["num_tokens"] for e in t.state.log_history if "loss" in e and "ce" in e] for t in (trainer, again)]
    assert len(seen[0]) == 2 and seen[1][:2] == seen[0] and seen[1][2] > seen[0][1] > seen[0][0]


def test_counts_are_of_all_processes_and_a_tensor_parallel_group_counts_once() -> None:
    """Two processes by a reduction that adds what another one has seen."""
    others = torch.tensor([[3, 4, 40], [0, 0, 10]])

    def reduce(table: Tensor, reduction: str) -> Tensor:
        assert reduction == "sum"
        return table + others

    trainer = SimpleNamespace(accelerator=SimpleNamespace(reduce=reduce), get_tp_size=lambda: 2, _total_train_tokens=7)
    metrics = TokenMetrics(trainer)
    assert metrics.logged() == {}
    padded = {"input_ids": torch.ones(2, 8), "attention_mask": torch.ones(2, 8).tril(3)}
    metrics.add({**padded, "base_label_ids": torch.arange(6)}, torch.tensor(2))
    metrics.add({"input_ids": torch.ones(1, 30), "base_label_ids": torch.arange(0)}, torch.tensor(0))
    seen = 7 + (9 + 40) // 2 + (30 + 10) // 2
    assert metrics.logged() == {"num_tokens": seen, "mean_token_accuracy": (5 / 10 + 0) / 2}
    assert metrics.logged() == {} and trainer._total_train_tokens == seen


# The count of positions whose label has the largest logit


FORMS = [
    Objective(),
    Objective("full-kl", tail="renormalize"),
    Objective("masked-js", tail="groups"),
    Objective(tail="groups"),
    Objective(tail="sampled"),
    Objective("none"),
    Objective("none", label_smoothing=0.1),
]


def tied_case(seed: int, spread: float, objective: Objective) -> tuple[Tensor, Tensor, Any]:
    """Logits [96, 50] of 7 values, the label's often one of the largest; label ids; targets, where there are any."""
    case, rng = make_case((96, 50, 8), 1.0), np.random.default_rng(seed)
    logits, labels = rng.integers(-3, 4, size=(96, 50)).astype(np.float32), case.labels
    raised = rng.random(96) < 0.6
    logits[raised, labels[raised]] = 3
    assert ((logits == 3).sum(axis=1) > 1).mean() > 0.9
    targets = None if objective.regularizer == "none" else case.targets
    return torch.from_numpy(logits * spread), torch.from_numpy(labels), targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", FORMS, ids=lambda o: f"{o.regularizer}-{o.tail}-{o.label_smoothing}")
def test_labels_with_the_largest_logit_are_counted_as_argmax_does(objective: Objective, dtype: torch.dtype) -> None:
    """Logits of few values, so that most largest ones are there twice: the first counts."""
    from logitcache.losses.fused import linear_loss

    for seed, spread in ((0, 1.0), (1, 2.0), (2, 0.3), (3, 200.0)):
        logits, labels, targets = tied_case(seed, spread, objective)
        top1, expected = torch.zeros((), dtype=torch.int64), int((logits.argmax(1) == labels).sum())
        results = []
        for counter in (None, top1):
            hidden = logits.to(dtype).requires_grad_()
            found = linear_loss(hidden, torch.nn.Identity(), labels, targets, objective, 1.0, top1=counter)
            found.loss.backward()
            results.append([*found, hidden.grad])
        assert int(top1) == expected > 0
        for without, counted in zip(*results, strict=True):
            assert without is not None and counted is not None and torch.equal(without, counted)
        with torch.no_grad():
            linear_loss(logits.to(dtype), torch.nn.Identity(), labels, targets, objective, 1.0, top1=top1)
        assert int(top1) == 2 * expected
