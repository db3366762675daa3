"""Under autocast a head's frozen float32 weight is cast once a call, whatever the head is, to the same numbers."""

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.quantised_base import bitsandbytes
from support.tiny_model import make_model
from support.tiny_runs import make_samples
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from logitcache.data.batches import pad_samples
from logitcache.losses.formulas import Objective
from logitcache.models import head_layer
from logitcache.models.cast_once import CastOnce
from logitcache.models.head import causal_lm_of
from logitcache.models.inside_forward import inside_forward
from logitcache.pairing.targets import with_targets
from logitcache.training.batch_loss import batch_loss

ROWS = 5
"""Of a slice: a batch of the samples below has more than ten such."""


class Casts(TorchDispatchMode):
    """How often each tensor is cast to another dtype, by where its numbers are."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype != args[0].dtype:
            self.of[args[0].data_ptr()] += 1
        return out


class Leaves(nn.Linear):
    """Computes in float32 whatever surrounds it, as some models' heads do."""

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(hidden.float())


class Scaled(nn.Linear):
    """Computes with a tensor that it makes of its weight, another one each time."""

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.weight * 2, self.bias)


def adapted(head: str = "q_proj", **options: Any) -> Any:
    """The tiny model with a LoRA on its attention, and on its head where that is named."""
    settings = LoraConfig(r=2, target_modules=sorted({"q_proj", head}), init_lora_weights=False, **options)
    torch.manual_seed(1)
    return get_peft_model(make_model(), settings)


def with_head(kind: type[nn.Linear]) -> Any:
    model = make_model()
    weight = model.lm_head.weight
    model.lm_head = kind(*reversed(weight.shape), bias=False)
    model.lm_head.weight.data.copy_(weight.data)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))


def tied() -> Any:
    return get_peft_model(make_model(tie_word_embeddings=True), LoraConfig(r=2, target_modules=["q_proj"]))


def weight_of(model: Any) -> Tensor:
    """What the head computes with."""
    layer = head_layer.layer_of(causal_lm_of(model).get_output_embeddings())
    weight: Tensor = getattr(layer, "base_layer", layer).weight
    return weight


def of_a_call(model: Any, training: bool = True) -> tuple[Counter[int], Tensor, list[Tensor]]:
    """Casts, loss and gradients of one call."""
    batch, plain = with_targets(pad_samples(make_samples()), None), Objective("none", tokens_per_loss_chunk=ROWS)
    assert len(batch["base_rows"]) > 10 * ROWS
    with Casts() as casts, torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(training):
        loss = batch_loss(model, batch, plain, 0.0, None).loss
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = list(torch.autograd.grad(loss, trained)) if training else []
    return casts.of, loss.detach(), gradients


MODELS: dict[str, tuple[Callable[[], Any], int]] = {
    "frozen": (adapted, 1),
    "LoRA on the head": (lambda: adapted("lm_head"), 1),
    "DoRA on the head": (lambda: adapted("lm_head", use_dora=True), 1),
    "copied and trained": (lambda: adapted(modules_to_save=["lm_head"]), 1),
    "all trained": (make_model, 1),
    "tied": (tied, 1),
    "leaves autocast": (lambda: with_head(Leaves), 0),
    "computes with another": (lambda: with_head(Scaled), 0),
    "bfloat16": (lambda: adapted().to(torch.bfloat16), 0),
}


@pytest.mark.parametrize("what", MODELS)
def test_once_a_call(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, once = MODELS[what]
    model = make()
    at = weight_of(model).data_ptr()
    casts, loss, gradients = of_a_call(model)
    assert casts[at] == once
    monkeypatch.setattr(head_layer, "CastOnce", nullcontext)
    before, same_loss, same_gradients = of_a_call(model)
    frozen = not weight_of(model).requires_grad
    assert before[at] > 10 if once and frozen else before[at] == once
    assert torch.equal(loss, same_loss) and len(gradients) == len(same_gradients) > 0
    assert all(torch.equal(one, two) for one, two in zip(gradients, same_gradients, strict=True))


@pytest.mark.parametrize("what", ["frozen", "LoRA on the head", "all trained"])
def test_without_a_gradient_too(what: str) -> None:
    model = MODELS[what][0]()
    assert of_a_call(model, training=False)[0][weight_of(model).data_ptr()] == 1


def test_a_weight_that_changes_between_calls_is_cast_anew() -> None:
    model = adapted()
    first = of_a_call(model)[1]
    with torch.no_grad():
        weight_of(model).mul_(0.5)
    second = of_a_call(model)[1]
    model = adapted()
    with torch.no_grad():
        weight_of(model).mul_(0.5)
    assert torch.equal(second, of_a_call(model)[1]) and not torch.equal(second, first)


def test_a_parameter_with_another_storage_is_cast_anew() -> None:
    """As one that is gathered for each call of its layer."""
    layer, hidden, casts = nn.Linear(4, 6).requires_grad_(False), torch.randn(3, 4), CastOnce()
    for _ in range(2):
        layer.weight.data = torch.randn(6, 4)
        with torch.autocast("cpu", torch.bfloat16):
            with casts:
                found = layer(hidden)
            assert torch.equal(found, layer(hidden))


def test_nothing_is_kept_of_a_parameter_that_is_gone() -> None:
    """As of weights that are brought from elsewhere for each slice."""
    casts, hidden = CastOnce(), torch.randn(3, 4)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16), casts:
            nn.Linear(4, 6).requires_grad_(False)(hidden)
    assert len(casts._casts) == 0


@bitsandbytes
def test_a_quantised_weight_is_left_to_its_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    model = make_model()
    head = Linear4bit(32, 260, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    head.weight = Params4bit(model.lm_head.weight.data, requires_grad=False, quant_type="nf4", module=head)
    model.lm_head = head.to("cpu")
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert weight_of(model).dtype == torch.uint8
    _, loss, gradients = of_a_call(model)
    monkeypatch.setattr(head_layer, "CastOnce", nullcontext)
    _, same_loss, same_gradients = of_a_call(model)
    assert torch.equal(loss, same_loss)
    assert all(torch.equal(one, two) for one, two in zip(gradients, same_gradients, strict=True))


def test_a_device_without_autocast_is_no_error() -> None:
    layer, hidden = nn.Linear(4, 6, device="meta").requires_grad_(False), torch.randn(3, 4, device="meta")
    with torch.autocast("cpu", torch.bfloat16), CastOnce():
        assert layer(hidden).dtype == torch.float32


def test_a_call_outside_autocast_casts_nothing() -> None:
    model, seen = adapted(), list[torch.dtype]()

    def work(hidden: Tensor, layer: head_layer.HeadLayer) -> Tensor:
        seen.append(layer.logits_of(hidden).dtype)
        return hidden.sum()

    ids = torch.arange(24).reshape(2, 12)
    with Casts() as casts:
        inside_forward(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, None, work)
    assert seen == [torch.float32] and casts.of[weight_of(model).data_ptr()] == 0
