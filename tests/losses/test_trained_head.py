"""A trained output head gets the gradient of what it computes with, or training is refused; never none in silence."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.tiny_model import make_model
from support.tiny_runs import make_samples
from torch import nn

from logitcache.data.batches import pad_samples
from logitcache.data.samples import Sample
from logitcache.errors import TrainingFailed
from logitcache.losses.formulas import Objective
from logitcache.pairing.targets import with_targets
from logitcache.training.batch_loss import batch_loss

PLAIN = Objective("none", tokens_per_loss_chunk=5)
# what PEFT says of tied weights; the gradient of both uses is asserted here
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")


def own_gradients(model: nn.Module, samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Of the summed cross-entropy, from the model's own logits."""
    for sample in samples:
        ids = torch.from_numpy(sample.token_ids.astype(np.int64))[None]
        places = torch.from_numpy(sample.positions.astype(np.int64))
        logits = model(input_ids=ids).logits[0, places]
        nn.functional.cross_entropy(logits, ids[0, places + 1], reduction="sum").backward()
    return taken(model)


def our_gradients(model: nn.Module, samples: list[Sample]) -> dict[str, torch.Tensor]:
    batch_loss(model, with_targets(pad_samples(samples), None), PLAIN, 0.0, None).loss.backward()
    return taken(model)


def taken(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


# --- what cannot be right is refused


class Swapped(nn.Linear):
    """Computes with another tensor than the parameter it shows, as a sharding wrapper does within its call."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        inside = self.weight.detach().clone().requires_grad_()
        return nn.functional.linear(hidden, inside, self.bias)


class Hidden(nn.Linear):
    """Computes with a trained tensor that is no parameter of its own as well."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.others = [nn.Parameter(torch.ones(sizes[1]))]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) * self.others[0]


def with_head(kind: Callable[..., nn.Linear], *, trained: bool = True) -> Any:
    model = make_model()
    model.lm_head = kind(*reversed(model.lm_head.weight.shape)).requires_grad_(trained)
    return model


def merged() -> Any:
    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    model.get_base_model().lm_head.merge()
    return model


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "swapped": (lambda: with_head(Swapped), r"no gradient for weight of the output head \(Swapped\)"),
    "merged": (merged, r"no gradient for lora_A\.default\.weight of the output head"),
    "hidden": (lambda: with_head(Hidden), r"found a trained tensor of shape \[260\] that is none of them"),
    "hidden, else frozen": (lambda: with_head(Hidden, trained=False), "that is none of them"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_head_that_would_be_trained_wrongly_is_refused(what: str) -> None:
    make, message = REFUSED[what]
    with pytest.raises(TrainingFailed, match=message):
        our_gradients(make(), make_samples(3))


def test_a_swapped_parameter_that_is_not_trained_is_no_matter() -> None:
    class Copied(nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(hidden, self.weight.detach().clone(), self.bias)

    model = with_head(Copied, trained=False)
    expected = own_gradients(model, make_samples(3))
    found = our_gradients(model, make_samples(3))
    assert found.keys() == expected.keys()


# --- what is right is not refused


def two_loras() -> Any:
    """Two adapters on the head, the second inactive, and trained as far as its flags say."""
    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    model.add_adapter("other", LoraConfig(r=3, target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    return all_adapters_require_gradients(model)


def two_saved() -> Any:
    """Two trained copies of the head, the second inactive."""
    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.add_adapter("other", LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model = all_adapters_require_gradients(model)
    model.get_base_model().lm_head.original_module.requires_grad_(True)
    return model


def only_the_body(**places: Any) -> Any:
    """The active adapter leaves the head alone; another one is on it."""
    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("other", LoraConfig(r=2, **{"target_modules": ["q_proj"], **places}))
    return all_adapters_require_gradients(model)


def disabled() -> Any:
    model = two_loras()
    model.base_model.disable_adapter_layers()
    all_adapters_require_gradients(model).get_base_model().lm_head.base_layer.weight.requires_grad_(True)
    return model


def disabled_saved() -> Any:
    model = two_saved()
    model.base_model.disable_adapter_layers()
    return all_adapters_require_gradients(model)


def trained_tokens() -> Any:
    """Some rows of tied embeddings, which both ends compute with."""
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 50, 99])
    return get_peft_model(make_model(tie_word_embeddings=True), config)


def all_adapters_require_gradients(model: PeftModel) -> PeftModel:
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.requires_grad_(True)
    return model


def with_bias() -> Any:
    return with_head(nn.Linear)


RIGHT: dict[str, Callable[[], Any]] = {
    "whole": make_model,
    "tied": lambda: make_model(tie_word_embeddings=True),
    "bias": with_bias,
    "an untrained adapter, whose A has a gradient of zeros": lambda: get_peft_model(
        make_model(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    ),
    "trained tokens": trained_tokens,
    "an inactive adapter": two_loras,
    "an inactive copy": two_saved,
    "only the body": lambda: only_the_body(target_modules=["lm_head"]),
    "only the body, beside a copy": lambda: only_the_body(modules_to_save=["lm_head"]),
    "disabled": disabled,
    "disabled copies": disabled_saved,
}


@pytest.mark.parametrize("what", RIGHT)
def test_a_trained_head_gets_the_gradients_of_its_own_logits(what: str) -> None:
    """The same parameters have one, too: what is not active stays without, and no optimizer moves it."""
    torch.manual_seed(0)
    model, samples = RIGHT[what](), make_samples(3)
    expected, found = own_gradients(model, samples), our_gradients(model, samples)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_no_position_is_no_reason_to_refuse() -> None:
    model, batch = make_model(), pad_samples(make_samples(2))
    batch["labels"][:] = -100
    batch_loss(model, with_targets(batch, None), PLAIN, 0.0, None).loss.backward()
    assert not model.lm_head.weight.grad.any()
