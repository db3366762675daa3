"""What a model's own forward adds to its cross-entropy: AdaLoRA's term is served, every other is refused.

The oracle of the term is its formula in float64, and PEFT's own `model(labels=...).loss`.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from support.families import FAMILIES, make_family
from support.plug_ins import Cached, arguments, cached, lora, make_sft, mixture
from support.tiny_model import make_model
from support.tiny_runs import V, gradients_after_one_step, make_base
from transformers import LlamaForCausalLM, TrainerCallback

from logitcache.adapters.attach import AdapterSettings
from logitcache.data.batches import pad_samples
from logitcache.data.samples import Sample
from logitcache.errors import TrainingFailed
from logitcache.losses.formulas import Objective
from logitcache.training.custom_loop import CachedLoss
from logitcache.training.run import TrainSettings, train
from logitcache.training.trainer import CachedKLTrainer

__all__ = ["cached"]  # the fixture

WEIGHT = 0.5
"""PEFT's default orth_reg_weight."""


def adalora(weight: float = WEIGHT) -> PeftModel:
    torch.manual_seed(0)
    config = AdaLoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj", "down_proj"],
        init_r=6,
        target_r=4,
        lora_alpha=8,
        total_step=100,
        orth_reg_weight=weight,
    )
    return get_peft_model(make_model(), config)


def term_of(model: PeftModel) -> float:
    """mean ||P P^T - I||_F over all A and B^T."""
    norms = []
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            rows = parameter.detach().double()
            rows = rows if ".lora_A." in name else rows.T
            norms.append((rows @ rows.T - torch.eye(len(rows), dtype=torch.float64)).norm())
    assert len(norms) == 12
    return float(torch.stack(norms).mean())


def by_peft(model: PeftModel, samples: Sequence[Sample]) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss that the model itself returns, and its gradients."""
    loss = model(**pad_samples(samples)).loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return float(loss.detach()), gradients


def trainer_of(model: Any, data: Sequence[Sample], out: Path, **changes: Any) -> CachedKLTrainer:
    names = ("cache", "objective", "check", "callbacks")
    of_trainer = {name: changes.pop(name) for name in names if name in changes}
    return CachedKLTrainer(
        model=model,
        args=arguments(out, remove_unused_columns=False, **changes),
        train_dataset=list(data),
        data_collator=pad_samples,
        **of_trainer,
    )


# AdaLoRA's term


def test_adalora_in_a_loop_has_the_loss_that_peft_gives_it(cached: Cached) -> None:
    samples, cache = cached
    model = adalora()
    own, expected = by_peft(model, samples[:6])
    found = CachedLoss(cache, Objective(weight=0.0))(model, pad_samples(samples[:6]))
    found.loss.backward()
    assert float(found.loss.detach()) == pytest.approx(own, rel=1e-5)
    assert float(found.loss.detach()) - float(found.ce) == pytest.approx(WEIGHT * term_of(model), rel=1e-5)
    assert term_of(model) > 2
    for name, gradient in expected.items():
        found_gradient = model.get_parameter(name).grad
        assert found_gradient is not None
        torch.testing.assert_close(found_gradient, gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_in_a_loop_the_term_is_counted_once_a_step(cached: Cached) -> None:
    """Three micro-batches of the counts of one step, against all samples in one."""
    samples, cache = cached
    model, anchored = adalora(), CachedLoss(cache)
    whole = anchored(model, pad_samples(samples[:9]))
    whole.loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    batches = [pad_samples(samples[i : i + 3]) for i in (0, 3, 6)]
    counts = torch.stack([anchored.count(batch) for batch in batches]).sum(0)
    losses = [anchored(model, batch, counts).loss for batch in batches]
    total = torch.stack(losses).sum()
    total.backward()
    assert float(total.detach()) == pytest.approx(float(whole.loss.detach()), rel=1e-5)
    for name, gradient in expected.items():
        found = model.get_parameter(name).grad
        assert found is not None
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_adalora_in_a_trainer_has_the_loss_and_the_gradient_that_peft_gives_it(
    accumulate: int, cached: Cached, tmp_path: Path
) -> None:
    samples, cache = cached
    model = adalora()
    own, expected = by_peft(model, samples[:6])
    returned: list[float] = []

    class Watched(CachedKLTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            returned.append(float(loss))
            return loss

    trainer = Watched(
        model=model,
        args=arguments(
            tmp_path,
            remove_unused_columns=False,
            per_device_train_batch_size=6 // accumulate,
            gradient_accumulation_steps=accumulate,
        ),
        train_dataset=samples[:6],
        data_collator=pad_samples,
        cache=cache,
        objective=Objective(weight=0.0),
    )
    term = term_of(model)
    found = gradients_after_one_step(trainer)
    assert len(returned) == accumulate and sum(returned) == pytest.approx(own, rel=1e-5)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    (logged,) = [entry for entry in trainer.state.log_history if "ce" in entry]
    assert logged["orthogonality"] == pytest.approx(term, rel=1e-5)
    assert logged["loss"] == pytest.approx(logged["ce"] + WEIGHT * term, rel=1e-5)


@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")  # PEFT, of a base without a folder
@pytest.mark.parametrize("regularizer", ["masked-kl", "none"])
def test_the_command_logs_the_term_as_part_of_the_loss(regularizer: str, cached: Cached, tmp_path: Path) -> None:
    samples, cache = cached
    given = cache if regularizer != "none" else None
    settings = TrainSettings(max_steps=2, batch_size=4, log_every=1, grad_accum=2)
    adapter = AdapterSettings("adalora", 4, 8.0)
    report = train(make_base(), samples, given, tmp_path / "o", adapter, Objective(regularizer), settings)  # type: ignore[arg-type]
    lines = (tmp_path / "o" / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    assert len(entries) == 2 and all(entry["orthogonality"] > 2 for entry in entries)
    assert report.final["orthogonality"] == entries[-1]["orthogonality"]
    for entry in entries:
        total = entry["ce"] + entry["kl_weight"] * entry["kl"] + WEIGHT * entry["orthogonality"]
        assert entry["loss"] == pytest.approx(total, rel=1e-5)


def test_without_the_term_nothing_of_it_is_logged(cached: Cached, tmp_path: Path) -> None:
    samples, cache = cached
    trainer = trainer_of(get_peft_model(make_model(), lora()), samples, tmp_path, cache=cache)
    trainer.train()
    assert "orthogonality" not in trainer.state.log_history[0]


# What is refused


class ZLoss(LlamaForCausalLM):
    """As a model from the Hub may have it: nothing in its configuration says so."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if output.loss is not None:
            output.loss = output.loss + 1e-3 * output.logits.logsumexp(-1).square().mean()
        return output


def with_a_z_loss() -> Any:
    model = make_model()
    model.__class__ = ZLoss
    return model


def with_a_loss_of_its_own() -> Any:
    model = make_model()
    model.loss_function = lambda logits, labels, **_: logits.float().mean()
    return model


def with_a_router() -> Any:
    model = mixture()
    model.config.output_router_logits = True
    return model


def bamba() -> Any:
    from transformers import BambaConfig, BambaForCausalLM

    torch.manual_seed(0)
    config = BambaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_expand=2,
        z_loss_coefficient=1e-4,
        attn_layer_indices=[0],
    )
    return BambaForCausalLM(config)


def shadow() -> Any:
    config = peft.ShadowConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    return get_peft_model(make_model(), config)


def plain(make: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: get_peft_model(make(), lora(target_modules=["q_proj"]))


REFUSED: dict[str, tuple[Callable[[], Any], bool, str]] = {
    "z-loss of a stranger": (
        plain(with_a_z_loss),
        True,
        r"expected the loss of its own forward to be the cross-entropy, 6\.\d+.*found 6\.",
    ),
    "its own loss function": (plain(with_a_loss_of_its_own), False, "loss_function"),
    "a router": (plain(with_a_router), False, "auxiliary loss.*output_router_logits=False"),
    "Bamba's z-loss": (plain(bamba), False, "z_loss_coefficient"),
}
if hasattr(peft, "ShadowConfig"):
    REFUSED["PEFT's Shadow"] = (shadow, False, "auxiliary_loss_weight")


@pytest.mark.parametrize("plug_in", ["trainer", "loop", "SFTTrainer"])
@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_a_term_that_nobody_serves_is_refused(what: str, plug_in: str, cached: Cached, tmp_path: Path) -> None:
    samples, cache = cached
    make, checked, message = REFUSED[what]
    if what == "a router" and plug_in == "SFTTrainer":
        pytest.skip("TRL sets output_router_logits itself: test_plug_in.py")
    steps: list[int] = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            steps.append(1)

    def run(model: Any, check: bool) -> None:
        if plug_in == "loop":
            CachedLoss(cache, check=check)(model, pad_samples(samples[:4]))
        elif plug_in == "trainer":
            trainer_of(model, samples, tmp_path, cache=cache, check=check, callbacks=[Watch()]).train()
        else:
            make_sft(tmp_path, samples, cache, model, check=check, callbacks=[Watch()]).train()

    for check in (True,) if checked else (True, False):
        with pytest.raises(TrainingFailed, match=message):
            run(make(), check)
    assert not steps


def test_a_coefficient_of_zero_adds_nothing() -> None:
    from logitcache.training.own_loss import check_own_loss

    model = bamba()
    model.z_loss_coefficient = 0.0
    for other in (model, mixture()):
        check_own_loss(other)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_a_family_is_its_cross_entropy(family: str) -> None:
    from logitcache.training.own_loss import check_own_loss, probe_own_loss

    for dtype in (torch.float32, torch.bfloat16):
        model = make_family(family).to(dtype)
        check_own_loss(model)
        probe_own_loss(model)


@pytest.mark.parametrize("weight", [WEIGHT, 0.0, 7.0])
def test_the_probe_knows_the_term_that_is_served(weight: float) -> None:
    from logitcache.training.own_loss import probe_own_loss

    model = adalora(weight)
    probe_own_loss(model)
    assert not model.get_base_model().training and all(p.grad is None for p in model.parameters())


def test_the_probe_leaves_the_random_numbers_and_the_mode() -> None:
    from logitcache.training.own_loss import probe_own_loss

    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5)).train()
    state = torch.get_rng_state()
    probe_own_loss(model)
    assert torch.equal(torch.get_rng_state(), state) and model.training


def test_a_configuration_of_tuples_is_probed_and_left() -> None:
    from logitcache.training.own_loss import probe_own_loss

    for make in (make_model, with_a_z_loss):
        model = make()
        model.config.return_dict = False
        if make is make_model:
            probe_own_loss(model)
        else:
            with pytest.raises(TrainingFailed, match="its own forward"):
                probe_own_loss(model)
        assert model.config.return_dict is False


def test_a_model_that_takes_no_labels_has_no_loss_to_compare(cached: Cached) -> None:
    """Only the hidden states and the head are used of it."""
    samples, cache = cached

    class Bare(LlamaForCausalLM):
        def forward(self, input_ids: Any = None, attention_mask: Any = None, use_cache: bool = False) -> Any:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    model = make_model()
    model.__class__ = Bare
    assert float(CachedLoss(cache)(model, pad_samples(samples[:4])).ce) > 0
