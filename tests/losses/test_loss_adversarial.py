"""What a hostile reading of the loss, the trainer and the checks found: each a run that was silently other than it
said, or that ended in a traceback nobody can use."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.breadth import some_of
from support.tiny_model import make_model
from support.tiny_runs import V, make_base, make_cache, make_samples
from support.two_processes import in_two_processes
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from logitcache.capture.settings import CaptureSettings
from logitcache.capture.worker import precompute
from logitcache.data.batches import pad_samples
from logitcache.data.samples import Sample
from logitcache.errors import InvalidBatch, NotTheBase, TrainingFailed
from logitcache.losses.compared import Tail
from logitcache.losses.formulas import Objective, SparseTargets, regularizer_values
from logitcache.losses.fused import linear_loss
from logitcache.models.head import check_head
from logitcache.pairing.step_zero import Probe, probe_step_zero
from logitcache.pairing.targets import CachedCollator, count_positions, with_targets
from logitcache.storage import LogitCache
from logitcache.training.callbacks import BudgetCallback
from logitcache.training.custom_loop import CachedLoss
from logitcache.training.kl_controller import BudgetedWeight
from logitcache.training.trainer import CachedKLTrainer

Cached = tuple[list[Sample], LogitCache]


class Stream(torch.utils.data.IterableDataset[Any]):
    """Samples without a length."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Cached:
    samples = make_samples()
    return samples, make_cache(tmp_path_factory.mktemp("adversarial") / "c", samples)


def adapted(model: Any = None, **changes: Any) -> Any:
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes}
    return get_peft_model(make_model() if model is None else model, LoraConfig(**settings))


def trainer_of(out: Path, data: Any, cache: LogitCache, **changes: Any) -> CachedKLTrainer:
    """Four samples a micro-batch; `changes` are of TrainingArguments, or of the trainer where that knows the name."""
    names = ("model", "objective", "check", "top_k", "data_collator", "eval_dataset")
    of_trainer = {name: changes.pop(name) for name in names if name in changes}
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
    }
    return CachedKLTrainer(
        args=TrainingArguments(**{**settings, **changes}),
        train_dataset=data,
        cache=cache,
        **{"model": adapted(), "objective": Objective(), "data_collator": pad_samples, **of_trainer},
    )


def logs_of(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "ce" in entry]


def capture_of(path: Path, model: Any, samples: Sequence[Sample], **settings: Any) -> LogitCache:
    base = replace(make_base(), model=model)
    chosen = CaptureSettings(**{"top_k": 8, "max_length": 64, "precision": "exact", **settings})
    precompute(base, samples, path, chosen)
    return LogitCache.open(path)


# The loss of a step, and what is logged of it


def _train(_rank: int, folder: str, head: dict[str, Any]) -> int:
    model = adapted(**head) if head else make_model()
    cache = LogitCache.open(Path(folder) / "c")
    trainer = trainer_of(Path(folder) / "o", make_samples(), cache, model=model, max_steps=2)
    trainer.train()
    return int(trainer.state.global_step)


SAVED_HEAD = pytest.param({"modules_to_save": ["lm_head"]}, id="saved lm_head")
FULL = pytest.param({}, id="full training")


@pytest.mark.parametrize("head", some_of([FULL, SAVED_HEAD], 1))
def test_two_processes_train_a_head_with_the_trainers_defaults(head: dict[str, Any], tmp_path: Path) -> None:
    """DDP looks for unused parameters in what its forward returns, which is before the head."""
    make_cache(tmp_path / "c", make_samples())
    assert in_two_processes(_train, str(tmp_path), head) == [2, 2]


def test_the_log_of_a_stream_that_ends_is_the_loss(cached: Cached, tmp_path: Path) -> None:
    """4 batches and 12 steps: the Trainer asks for 12 steps' batches in each of its epochs."""
    samples, cache = cached
    trainer = trainer_of(tmp_path, Stream(samples), cache, max_steps=12, logging_steps=4)
    trainer.train()
    logs = logs_of(trainer)
    assert len(logs) == 3
    for entry in logs:
        assert entry["loss"] == pytest.approx(entry["ce"] + entry["kl"], rel=1e-4)


def test_the_short_last_step_of_a_stream_does_not_double_the_next(cached: Cached, tmp_path: Path) -> None:
    """4 batches, 3 a step: what is left over is no step, but its gradient stays (in the plain Trainer too)."""
    samples, cache = cached
    settings: dict[str, Any] = {"max_steps": 3, "gradient_accumulation_steps": 3, "learning_rate": 1e-6}
    trainer = trainer_of(tmp_path, Stream(samples), cache, **settings)
    trainer.train()
    losses = [entry["loss"] for entry in logs_of(trainer)]
    assert losses == pytest.approx([losses[0]] * 3, rel=0.1)


def test_a_second_train_logs_its_own_steps(cached: Cached, tmp_path: Path) -> None:
    samples, cache = cached
    trainer = trainer_of(tmp_path, samples, cache, logging_steps=3)  # the fourth step is not logged
    for _ in range(2):
        trainer.train()
    for entry in logs_of(trainer):
        assert entry["loss"] == pytest.approx(entry["ce"] + entry["kl"], rel=1e-4)


@pytest.mark.parametrize("logging", [{"logging_strategy": "no"}, {"logging_steps": 500}], ids=str)
def test_a_run_that_is_not_finite_does_not_end_as_if_it_were(
    logging: dict[str, Any], cached: Cached, tmp_path: Path
) -> None:
    samples, cache = cached
    trainer = trainer_of(tmp_path, samples, cache, max_steps=20, learning_rate=1e30, **logging)

    def train_and_save() -> None:
        trainer.train()
        trainer.save_model(str(tmp_path / "adapter"))

    with pytest.raises(TrainingFailed, match="not finite"):
        train_and_save()


def test_a_supervised_token_under_the_mask_is_not_dropped_in_silence(cached: Cached) -> None:
    """mask = input_ids != pad, where the padding token is the end of text: the end would never be learnt."""
    samples, cache = cached
    batch = pad_samples(samples[:2])
    batch["attention_mask"][0, len(samples[0].token_ids) - 1] = 0
    with pytest.raises(InvalidBatch):
        with_targets(batch, cache)


# What is checked


def test_a_base_that_is_certain_everywhere_is_still_compared(tmp_path: Path) -> None:
    """No position counts for the masked KL, so its mean is 0 for any model; log p(label) is off by 6 nats."""
    sure = make_model()
    sure.lm_head.weight.data.mul_(60)
    samples = []
    rng = np.random.default_rng(0)
    for i in range(8):
        ids = rng.integers(0, 256, 3).tolist()
        with torch.no_grad():
            for _ in range(12):
                ids.append(int(sure(torch.tensor([ids])).logits[0, -1].argmax()))
            logprobs = sure(torch.tensor([ids])).logits[0].log_softmax(-1)
        supervised = np.array([t >= 3 and float(logprobs[t - 1, ids[t]]) > -1e-5 for t in range(len(ids))])
        if supervised.any():
            samples.append(Sample(np.array(ids, dtype=np.uint32), supervised, f"row {i}"))
    cache = capture_of(tmp_path / "c", sure, samples)
    with pytest.raises(NotTheBase):
        probe_step_zero(make_model(seed=1), Probe(cache, Objective()), samples)


def test_bfloat16_autocast_is_judged_as_bfloat16(tmp_path: Path) -> None:
    """TRL's default over a float32 checkpoint: noise of 1e-4 to 1e-2 nats, held to float32's 1e-5."""
    samples, model = make_samples(), make_model()
    for parameter in model.parameters():
        parameter.data.mul_(2.0)
    cache = capture_of(tmp_path / "c", model, samples)
    trainer_of(tmp_path / "o", samples, cache, model=adapted(model), max_steps=1, bf16=True).train()


def test_a_model_in_training_mode_is_split_like_any_other() -> None:
    """Dropout differs between two forwards; the message says that the head does something more."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=V, **sizes, bos_token_id=1, eos_token_id=2)).train()
    check_head(model)
    assert model.training


def test_the_check_leaves_the_mode_of_every_layer(cached: Cached) -> None:
    samples, cache = cached
    model = make_model().train()
    model.model.layers[0].eval()
    CachedLoss(cache)(model, pad_samples(samples[:4]))
    assert model.training and not model.model.layers[0].training


def test_one_alternative_read_and_renormalised_is_refused(cached: Cached, tmp_path: Path) -> None:
    """The cache has 16, but top_k=1 reads one: the KL is 0 whatever the student does."""
    samples, cache = cached
    with pytest.raises(TrainingFailed, match="one alternative"):
        trainer_of(tmp_path, samples, cache, objective=Objective(tail="renormalize"), top_k=1).train()


def test_rows_of_one_alternative_renormalised_do_not_count_as_agreement(tmp_path: Path) -> None:
    """min_mass keeps one alternative in many rows here, whose KL is 0 whatever the student does."""
    samples = make_samples()
    cache = capture_of(tmp_path / "c", make_model(), samples, top_k=16, min_mass=0.1)
    batch = with_targets(pad_samples(samples), cache)
    records = cache.lookup_batch([s.token_ids for s in samples], [s.positions for s in samples])
    several = sum(int((np.isfinite(r.alternative_logprobs).sum(axis=1) >= 2).sum()) for r in records)
    num_ce, num_kl = count_positions(batch, Objective(tail="renormalize")).tolist()
    assert 0 < several == num_kl < num_ce


@pytest.mark.parametrize("name", ["min_base_rest", "min_adapted_rest"])
def test_thresholds_of_a_probability_above_1_are_refused(name: str) -> None:
    """Every position would be left out: the regulariser is switched off. The CLI refuses them."""
    changes: dict[str, Any] = {name: 2.0}
    with pytest.raises(ValueError, match=name):
        replace(Objective(), **changes)


# The budget


def _budget(trainer: CachedKLTrainer) -> BudgetedWeight:
    (callback,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, BudgetCallback))
    return callback._weight


def test_a_budget_given_on_resuming_is_the_one_that_is_met(cached: Cached, tmp_path: Path) -> None:
    samples, cache = cached
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    trainer_of(tmp_path, samples, cache, objective=Objective(kl_budget=1e-3), **settings).train()
    resumed = trainer_of(tmp_path, samples, cache, objective=Objective(kl_budget=5.0), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert _budget(resumed).kl_budget == 5.0


def test_callbacks_are_restored_where_that_is_asked_for(cached: Cached, tmp_path: Path) -> None:
    samples, cache = cached
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "objective": Objective(kl_budget=1e-3)}
    whole = trainer_of(tmp_path, samples, cache, **settings)
    whole.train()
    resumed = trainer_of(tmp_path, samples, cache, restore_callback_states_from_checkpoint=True, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.kl_weight == whole.kl_weight


def test_a_step_in_which_nothing_counts_says_nothing_of_the_budget(cached: Cached, tmp_path: Path) -> None:
    """Its KL is no measurement of 0 nats."""
    samples, cache = cached
    objective = Objective(min_base_rest=1.0, kl_budget=0.01)
    trainer = trainer_of(tmp_path, samples, cache, objective=objective, check=False)
    trainer.train()
    assert trainer.kl_weight == 1.0


def test_a_budget_starts_near_a_weight_of_0() -> None:
    weight = BudgetedWeight(kl_budget=1.0, weight=0.0)
    assert weight.update(0.0) < 0.01


# Heads and plain forms


def test_logits_that_a_hook_keeps_stay_logits(cached: Cached) -> None:
    """A plain product does not need its output for the backward; someone else may."""
    samples, cache = cached
    model, seen = adapted(), []
    model.get_base_model().lm_head.register_forward_hook(lambda _module, inputs, output: seen.append((*inputs, output)))
    CachedLoss(cache, check=False)(model, pad_samples(samples[:4]))
    weight = model.get_base_model().lm_head.weight
    for hidden, logits in seen:
        torch.testing.assert_close(logits.detach(), (hidden @ weight.T).detach())


class Keeping(torch.nn.Linear):
    """A linear layer that keeps what it returned, without a hook."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.seen = hidden, super().forward(hidden)
        return self.seen[1]


@pytest.mark.parametrize("patched", [False, True])
def test_logits_that_the_head_itself_keeps_stay_logits(patched: bool) -> None:
    """Only of a plain nn.Linear is it known that nobody holds its result; any other head is copied from."""
    torch.manual_seed(0)
    head: Any = torch.nn.Linear(4, 9) if patched else Keeping(4, 9)

    def keep(hidden: torch.Tensor) -> torch.Tensor:
        head.seen = hidden, torch.nn.functional.linear(hidden, head.weight, head.bias)
        return head.seen[1]

    if patched:
        head.forward = keep
    hidden, labels = torch.randn(3, 4, requires_grad=True), torch.tensor([1, 8, 0])
    linear_loss(hidden, head, labels, None, Objective("none"), 0.0, list(head.parameters())).loss.backward()
    inputs, logits = head.seen
    torch.testing.assert_close(logits, torch.nn.functional.linear(inputs, head.weight, head.bias), rtol=0, atol=0)


def test_bodies_that_return_tuples(cached: Cached) -> None:
    samples, cache = cached
    model = make_model()
    model.config.return_dict = False
    assert abs(float(CachedLoss(cache)(model, pad_samples(samples[:4])).kl)) < 1e-6


def test_evaluation_with_a_collator_that_looks_up(cached: Cached, tmp_path: Path) -> None:
    """`CachedLoss.collator` given to a trainer: "iteration over a 0-d tensor"."""
    samples, cache = cached
    settings: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": samples[:4]}
    trainer = trainer_of(tmp_path, samples, cache, data_collator=CachedCollator(pad_samples, cache), **settings)
    trainer.train()
    for entry in logs_of(trainer):
        assert entry["loss"] == pytest.approx(entry["ce"] + entry["kl"], rel=1e-4)


def _far_group() -> tuple[torch.Tensor, SparseTargets]:
    """The base's second group is so far down that its mass is stored as 0; the student's underflows too."""
    logits = torch.tensor([[0.0, 2.0, 1.0, -300.0]])
    targets = SparseTargets(
        label_ids=torch.tensor([0]),
        label_logprobs=torch.tensor([-2.4076]),
        alternative_ids=torch.tensor([[1]]),
        alternative_logprobs=torch.tensor([[-0.4076]]),
        tail_logprobs=torch.tensor([-1.4076]),
        tail_group_logprobs=torch.tensor([[-1.4076, -torch.inf]]),
        token_groups=torch.tensor([0, 0, 0, 1]),
    )
    return logits, targets


def test_reverse_kl_of_a_group_that_neither_side_can_hold_is_finite() -> None:
    """0 times inf in the plain form, where the fused one is right."""
    logits, targets = _far_group()
    objective = Objective("masked-reverse-kl", "groups")
    z = logits.clone().requires_grad_()
    values = regularizer_values(z, targets, objective)
    values.sum().backward()
    fused = linear_loss(logits, torch.nn.Identity(), targets.label_ids, targets, objective, 1.0)
    assert float(values.detach()) == pytest.approx(float(fused.kl), abs=1e-6)
    assert z.grad is not None and z.grad.isfinite().all()


def test_a_weight_of_0_switches_an_infinite_regulariser_off() -> None:
    logits, targets = _far_group()
    logits[0, 3] = 0.0  # reverse KL is inf by its formula
    objective = Objective("masked-reverse-kl", "groups")
    found = linear_loss(logits, torch.nn.Identity(), targets.label_ids, targets, objective, 0.0)
    assert found.loss == found.ce


@pytest.mark.parametrize("together", [1, 3, 1000])
def test_rows_that_a_processor_works_on_together_do_not_change_a_bit(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row is a row, whichever others stay in the cache beside it; one without a tail too."""
    logits = 4 * torch.randn(11, 700, generator=torch.Generator().manual_seed(0))
    logits[5] = -torch.inf
    whole = Tail(logits.clone())
    monkeypatch.setattr("logitcache.losses.compared.CACHED_BYTES", together * 4 * 700)
    parts = Tail(logits.clone())
    for name in ("buffer", "top", "sum"):
        assert torch.equal(getattr(parts, name), getattr(whole, name)), name
