"""Training: normalisation over batches and processes, alignment, and equality with an online implementation."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_model import make_model
from support.tiny_runs import (
    Step,
    V,
    assert_same_step,
    gradients_after_one_step,
    make_base,
    make_cache,
    make_samples,
    make_trainer,
    run,
    step_of,
)
from support.two_processes import in_two_processes
from torch.utils.data import DataLoader

from logitcache.adapters.attach import AdapterSettings, attach
from logitcache.data.batches import pad_samples
from logitcache.data.samples import Sample
from logitcache.errors import NotTheBase, TrainingFailed
from logitcache.losses.formulas import Objective
from logitcache.pairing.step_zero import Probe, probe_step_zero
from logitcache.pairing.targets import CachedCollator, count_positions, samples_of, with_targets
from logitcache.storage import LogitCache, PositionNotCaptured, SampleNotCached
from logitcache.training.run import TrainSettings
from logitcache.training.trainer import CachedKLTrainer


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Sample], LogitCache]:
    samples = make_samples()
    return samples, make_cache(tmp_path_factory.mktemp("cache") / "c", samples)


@pytest.mark.parametrize("form", [("masked-kl", "bucket"), ("full-kl", "renormalize"), ("none", "bucket")])
def test_gradients_do_not_depend_on_how_a_batch_is_accumulated(
    tmp_path: Path, cached: tuple[list[Sample], LogitCache], form: Any
) -> None:
    samples, cache = cached
    results = []
    for batch, accumulate in ((16, 1), (4, 4), (1, 16)):
        objective = Objective(*form, weight=1.0 if form[0] == "none" else 2.0)
        trainer = make_trainer(
            tmp_path,
            samples,
            cache,
            objective,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
        )
        results.append(gradients_after_one_step(trainer))
    assert results[0] and max(float(g.abs().max()) for g in results[0].values()) > 1e-2
    for other in results[1:]:
        for name, gradient in results[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-5, atol=1e-5)


def _step_of_a_rank(_rank: int, folder: str) -> Step:
    samples = make_samples()
    trainer = make_trainer(
        Path(folder) / "out",
        samples,
        LogitCache.open(Path(folder) / "c"),
        Objective(weight=2.0),
        per_device_train_batch_size=8,
    )
    return step_of(trainer)


def test_two_processes_give_the_gradient_of_one(tmp_path: Path) -> None:
    samples = make_samples()
    cache = make_cache(tmp_path / "c", samples)
    trainer = make_trainer(tmp_path / "one", samples, cache, Objective(weight=2.0), per_device_train_batch_size=16)
    expected = step_of(trainer)
    assert_same_step(in_two_processes(_step_of_a_rank, str(tmp_path))[0], expected, ("loss", "ce", "kl"))


def online_losses(samples: Sequence[Sample], order: Sequence[Sequence[int]], weight: float, lr: float) -> list[float]:
    """An implementation of its own: the base runs live in every step, dense logits, losses as the paper has them."""
    base = make_model()
    torch.manual_seed(0)
    student = attach(make_model(), AdapterSettings(rank=4, alpha=8), "tiny")
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    losses = []
    for step in order:
        ce, kl = [], []
        for index in step:
            ids = torch.from_numpy(samples[index].token_ids.astype(np.int64))[None]
            mask = torch.from_numpy(samples[index].supervised[1:])
            labels = ids[0, 1:][mask]
            z = student(input_ids=ids).logits[0, :-1][mask]
            with torch.no_grad():
                b = base(input_ids=ids).logits[0, :-1][mask]
            ce.append(torch.nn.functional.cross_entropy(z, labels, reduction="none"))
            hole = torch.nn.functional.one_hot(labels, V).bool()
            p = b.masked_fill(hole, -torch.inf).log_softmax(-1)
            q = z.masked_fill(hole, -torch.inf).log_softmax(-1)
            terms = torch.where(hole, 0.0, p.exp() * (p.masked_fill(hole, 0.0) - q.masked_fill(hole, 0.0))).sum(-1)
            kl.append(terms[b.softmax(-1).gather(1, labels[:, None])[:, 0] <= 1 - 1e-4])
        loss = torch.cat(ce).mean() + weight * torch.cat(kl).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_all_alternatives_train_like_an_online_teacher(tmp_path: Path) -> None:
    """K = V - 1 in float32: the loss of every step within 1e-5 of the online implementation's."""
    samples, weight, lr, steps = make_samples(24), 1.5, 3e-3, 12
    cache = make_cache(tmp_path / "c", samples, top_k=V - 1)
    seen: list[list[int]] = []

    class Recording(list[Sample]):
        def __getitem__(self, index: Any) -> Any:
            seen.append([index])
            return super().__getitem__(index)

    torch.manual_seed(0)
    model = attach(make_model(), AdapterSettings(rank=4, alpha=8), "tiny")
    from logitcache.training.run import trainer_arguments

    args = trainer_arguments(
        tmp_path / "o", TrainSettings(lr=lr, max_steps=steps, batch_size=4, log_every=1), torch.device("cpu")
    )
    args.save_strategy, args.lr_scheduler_type, args.warmup_steps, args.max_grad_norm = "no", "constant", 0, 0.0
    trainer = CachedKLTrainer(
        model=model,
        args=args,
        train_dataset=Recording(samples),
        data_collator=pad_samples,
        cache=cache,
        objective=Objective(weight=weight),
        check=False,
    )
    trainer.train()
    order = [[i for (i,) in seen[4 * s : 4 * s + 4]] for s in range(steps)]
    expected = online_losses(samples, order, weight, lr)
    found = [entry["loss"] for entry in trainer.state.log_history if "ce" in entry]
    assert len(found) == steps
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert trainer.state.log_history[steps - 1]["kl"] > 0.01  # the adapter has moved: the KL is not trivially zero


def test_dense_gradient_equals_the_online_one(tmp_path: Path) -> None:
    samples = make_samples(6)
    cache = make_cache(tmp_path / "c", samples, top_k=V - 1)
    trainer = make_trainer(tmp_path, samples, cache, Objective(weight=3.0), per_device_train_batch_size=6)
    found = gradients_after_one_step(trainer)
    base = make_model()
    student = make_trainer(tmp_path, samples, cache, Objective(weight=3.0)).model
    ce, kl = [], []
    for sample in samples:
        ids = torch.from_numpy(sample.token_ids.astype(np.int64))[None]
        mask = torch.from_numpy(sample.supervised[1:])
        labels = ids[0, 1:][mask]
        z = student(input_ids=ids).logits[0, :-1][mask].double()
        b = base(input_ids=ids).logits[0, :-1][mask].double().detach()
        ce.append(torch.nn.functional.cross_entropy(z, labels, reduction="none"))
        for row, label in enumerate(labels.tolist()):
            rest = [c for c in range(V) if c != label]
            p, q = b[row, rest].log_softmax(0), z[row, rest].log_softmax(0)
            if b[row].softmax(0)[label] <= 1 - 1e-4:
                kl.append((p.exp() * (p - q)).sum())
    (torch.cat(ce).mean() + 3.0 * torch.stack(kl).mean()).backward()
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_saturated_positions_do_not_count(tmp_path: Path) -> None:
    """A base that is certain of some labels: these are in the CE's mean and not in the KL's."""
    samples = make_samples()
    cache = make_cache(tmp_path / "c", samples)
    batch = with_targets(pad_samples(samples[:4]), cache)

    def counts(regularizer: Any) -> list[int]:
        found: list[int] = count_positions(batch, Objective(regularizer)).tolist()
        return found

    num_ce, num_kl = counts("masked-kl")
    assert num_ce == num_kl == sum(len(s.positions) for s in samples[:4])
    for name in ("base_alternative_logprobs", "base_tail_logprobs"):
        batch[name].view(torch.float32)[:3] = -14.0
    assert counts("masked-kl") == counts("masked-js") == [num_ce, num_kl - 3]
    assert counts("full-kl") == [num_ce, num_ce]
    assert counts("none") == [num_ce, 0]


def test_targets_are_aligned_with_the_label_shift(cached: tuple[list[Sample], LogitCache]) -> None:
    """Row i of a batch: hidden state at position t, label token t+1, and the record of position t of that sample."""
    samples, cache = cached
    batch = with_targets(pad_samples([samples[i] for i in (3, 0, 5)]), cache)
    length = batch["input_ids"].shape[1]
    for row, flat in enumerate(batch["base_rows"].tolist()):
        sample, position = [samples[i] for i in (3, 0, 5)][flat // length], flat % length
        assert batch["base_label_ids"][row] == sample.token_ids[position + 1]
        record = cache.lookup(sample.token_ids, np.array([position]))
        assert float(batch["base_label_logprobs"].view(torch.float32)[row]) == record.label_logprobs[0]
        assert batch["base_alternative_ids"][row].tolist() == record.alternative_ids[0].tolist()


def test_unused_column_removal_takes_nothing_from_a_batch(
    tmp_path: Path, cached: tuple[list[Sample], LogitCache]
) -> None:
    samples, cache = cached
    results = [
        gradients_after_one_step(make_trainer(tmp_path, samples, cache, Objective(), remove_unused_columns=remove))
        for remove in (False, True)
    ]
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=0, atol=0)


def test_training_runs_the_body_once_a_micro_batch(
    tmp_path: Path, cached: tuple[list[Sample], LogitCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No second forward of the base, and no dense logits from the model's own forward."""
    from transformers import LlamaForCausalLM, LlamaModel

    samples, cache = cached
    trainer = make_trainer(tmp_path, samples, cache, Objective(), per_device_train_batch_size=4)
    calls, original = [], LlamaModel.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(torch.is_grad_enabled())
        return original(self, *args, **kwargs)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("dense logits were asked for")

    monkeypatch.setattr(LlamaModel, "forward", counted)
    monkeypatch.setattr(LlamaForCausalLM, "forward", refuse)
    trainer.train()
    assert calls == [True]


def test_step_zero_is_at_the_noise_floor(tmp_path: Path, cached: tuple[list[Sample], LogitCache]) -> None:
    samples, cache = cached
    report = run(make_base(), samples, cache, tmp_path / "o", max_steps=1, adapter=AdapterSettings(dropout=0.5))
    assert report.step_zero is not None
    assert report.step_zero.num_positions > 50
    assert abs(report.step_zero.kl_nats) < 1e-6 and report.step_zero.label_error_nats < 1e-5


@pytest.mark.parametrize("regularizer", ["masked-kl", "full-kl"])
def test_step_zero_refuses_a_model_that_is_not_the_base(
    cached: tuple[list[Sample], LogitCache], regularizer: Any
) -> None:
    samples, cache = cached
    with pytest.raises(NotTheBase, match=r"row \d+ at position \d+"):
        probe_step_zero(make_model(seed=1), Probe(cache, Objective(regularizer)), samples)


def test_step_zero_leaves_the_mode_of_the_model(cached: tuple[list[Sample], LogitCache]) -> None:
    samples, cache = cached
    model = make_model().train()
    probe_step_zero(model, Probe(cache, Objective()), samples)
    assert model.training


def test_a_sample_that_is_not_cached_stops_before_the_first_step(
    tmp_path: Path, cached: tuple[list[Sample], LogitCache]
) -> None:
    samples, cache = cached
    stranger = Sample(np.array([9, 8, 7], dtype=np.uint32), np.ones(3, dtype=np.bool_), "stranger:1")
    with pytest.raises(SampleNotCached, match=r"stranger:1"):
        run(make_base(), [*samples, stranger], cache, tmp_path / "o", max_steps=1)
    wider = Sample(samples[1].token_ids, np.ones(len(samples[1].token_ids), dtype=np.bool_), "wider:1")
    with pytest.raises(PositionNotCaptured, match=r"wider:1"):
        run(make_base(), [*samples, wider], cache, tmp_path / "o2", max_steps=1)


def test_training_is_bitwise_repeatable(tmp_path: Path, cached: tuple[list[Sample], LogitCache]) -> None:
    samples, cache = cached
    for name in ("a", "b"):
        run(make_base(), samples, cache, tmp_path / name, max_steps=3, lr=1e-3)
    first, second = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in "ab")
    assert first == second
    logs = [(tmp_path / n / "train_log.jsonl").read_text() for n in "ab"]
    assert logs[0] == logs[1]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, cached: tuple[list[Sample], LogitCache]) -> None:
    samples, cache = cached
    with pytest.raises(TrainingFailed, match="not finite"):
        run(make_base(), samples, cache, tmp_path / "o", max_steps=50, lr=1e30, log_every=1)
    assert json.loads((tmp_path / "o" / "run.json").read_text())["status"] == "started"


def test_dataparallel_and_label_smoothing_are_refused(tmp_path: Path, cached: tuple[list[Sample], LogitCache]) -> None:
    samples, cache = cached
    with pytest.raises(TrainingFailed, match="torchrun"):
        make_trainer(tmp_path, samples, cache, Objective(), _n_gpu=2)
    with pytest.raises(TrainingFailed, match="label smoothing"):
        make_trainer(tmp_path, samples, cache, Objective(), label_smoothing_factor=0.1)


def test_samples_of_a_cache_are_those_that_were_captured(cached: tuple[list[Sample], LogitCache]) -> None:
    samples, cache = cached
    found = {s.token_ids.tobytes(): s.positions.tolist() for s in samples_of(cache)}
    assert found == {s.token_ids.tobytes(): s.positions.tolist() for s in samples}


def test_trained_adapter_loads_and_regularization_holds_it_near_the_base(tmp_path: Path) -> None:
    """The point of it all, on a tiny model: the same steps with masked KL drift less from the base than without."""
    samples = make_samples(16)
    cache = make_cache(tmp_path / "c", samples, top_k=64)
    drift = {}
    for regularizer in ("none", "masked-kl"):
        out = tmp_path / regularizer
        objective = Objective("none") if regularizer == "none" else Objective(weight=3.0)
        run(make_base(), samples, cache, out, max_steps=30, lr=3e-3, objective=objective)
        from peft import PeftModel

        model = PeftModel.from_pretrained(make_model(), str(out))
        base, kl = make_model(), []
        for sample in make_samples(8, seed=9):
            ids = torch.from_numpy(sample.token_ids.astype(np.int64))[None]
            with torch.no_grad():
                p, q = base(input_ids=ids).logits.log_softmax(-1), model(input_ids=ids).logits.log_softmax(-1)
            kl.append((p.exp() * (p - q)).sum(-1).mean())
        drift[regularizer] = float(torch.stack(kl).mean())
    assert 0 < drift["masked-kl"] < 0.8 * drift["none"]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_read_the_same_batches(tmp_path: Path, method: str) -> None:
    samples = make_samples()
    collate = CachedCollator(pad_samples, make_cache(tmp_path / "c", samples))
    here = list(DataLoader(samples, 4, collate_fn=collate))  # type: ignore[arg-type]  # a list serves
    there = list(
        DataLoader(samples, 4, collate_fn=collate, num_workers=2, multiprocessing_context=method)  # type: ignore[arg-type]
    )
    assert len(here) == len(there) > 1
    for mine, theirs in zip(here, there, strict=True):
        assert mine.keys() == theirs.keys() and "base_alternative_ids" in mine
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
