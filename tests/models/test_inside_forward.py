"""Work inside the forward of the head: the model's own weights and hooks, and nothing of it left behind."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftMixedModel, get_peft_model
from support.tiny_model import make_model
from support.tiny_runs import make_samples
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from logitcache.data.batches import pad_samples
from logitcache.errors import TrainingFailed, UnsupportedModel
from logitcache.losses.formulas import Objective
from logitcache.models.head import OutputHead, causal_lm_of, check_head, hidden_states
from logitcache.models.head_layer import HeadLayer
from logitcache.models.inside_forward import check_head_inside, inside_forward
from logitcache.pairing.targets import with_targets
from logitcache.training.batch_loss import batch_loss

PLAIN = Objective("none", tokens_per_loss_chunk=5)


def inputs() -> dict[str, torch.Tensor]:
    ids = torch.arange(24).reshape(2, 12)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def adapted(**changes: Any) -> Any:
    settings = {"r": 2, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False, **changes}
    return get_peft_model(make_model(), LoraConfig(**settings))


MODELS: dict[str, Callable[[], Any]] = {
    "plain": make_model,
    "LoRA on the head": adapted,
    "copied head": lambda: adapted(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "compiled": lambda: torch.compile(adapted(), backend="eager"),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch hides its own, in compiling
@pytest.mark.parametrize("what", MODELS)
def test_the_layer_makes_the_logits_of_the_rows_that_are_wanted(what: str) -> None:
    model, rows, found = MODELS[what](), torch.tensor([3, 20, 4]), list[torch.Tensor]()
    causal_lm = causal_lm_of(model)
    own = model(**inputs()).logits.flatten(0, 1)[rows]

    def work(hidden: torch.Tensor, layer: HeadLayer) -> torch.Tensor:
        found.extend(OutputHead(causal_lm, layer=layer)(part) for part in hidden.split(2))
        return hidden.sum()

    inside_forward(model, inputs(), rows, work)
    torch.testing.assert_close(torch.cat(found), own)
    again = model(**inputs()).logits.flatten(0, 1)[rows]
    assert torch.equal(again, own)
    check_head_inside(model)


def test_what_was_patched_in_is_there_again_also_after_an_error() -> None:
    model = make_model()
    own = model.lm_head.forward
    model.lm_head.forward = lambda hidden: own(hidden) * 2
    patched = model.lm_head.forward

    def fails(_hidden: torch.Tensor, layer: HeadLayer) -> torch.Tensor:
        raise ArithmeticError(f"{layer.untouched}")

    with pytest.raises(ArithmeticError, match="False"):
        inside_forward(model, inputs(), None, fails)
    assert vars(model.lm_head)["forward"] is patched and "forward" not in vars(model)


def test_hooks_that_are_meant_for_logits_see_logits() -> None:
    """And change them, as they do in the model's own forward."""
    model, seen, batch = make_model(), list[tuple[int, ...]](), with_targets(pad_samples(make_samples(3)), None)
    plain = batch_loss(model, batch, PLAIN, 0.0, None).loss
    handle = model.lm_head.register_forward_hook(lambda _m, _i, output: seen.append(tuple(output.shape)) or output / 2)
    halved = batch_loss(model, batch, PLAIN, 0.0, None).loss
    assert len(model.lm_head._forward_hooks) == 1 and {shape[1] for shape in seen} == {260}
    handle.remove()
    model.lm_head.weight.data /= 2
    torch.testing.assert_close(halved, batch_loss(model, batch, PLAIN, 0.0, None).loss)
    assert abs(float((plain - halved).detach())) > 1


def test_hooks_that_begin_and_end_something_do_so_once_a_call() -> None:
    """As those of TRL's activation offloading on the head do, whatever the number of slices; 0 too."""
    model, calls = make_model(), list[str]()
    model.lm_head.register_forward_pre_hook(lambda *_: calls.append("begun"))
    model.lm_head.register_forward_hook(lambda *_: calls.append("ended"), always_call=True)
    for count in (3, 1):
        batch = with_targets(pad_samples(make_samples(count)), None)
        batch_loss(model, batch, PLAIN, 0.0, None)
    batch["labels"][:] = -100
    nothing = with_targets({n: v for n, v in batch.items() if not n.startswith("base_")}, None)
    batch_loss(model, nothing, PLAIN, 0.0, None)
    assert calls == ["begun", "ended"] * 3
    assert len(model.lm_head._forward_hooks) == len(model.lm_head._forward_pre_hooks) == 1


def test_a_hook_that_is_always_called_may_not_change_the_loss() -> None:
    model, batch = make_model(), with_targets(pad_samples(make_samples(3)), None)
    model.lm_head.register_forward_hook(lambda _m, _i, output: output / 2, always_call=True)
    with pytest.raises(UnsupportedModel, match="always_call=True"):
        batch_loss(model, batch, PLAIN, 0.0, None)


def test_sequences_that_a_hook_cuts_are_refused() -> None:
    """The rows of the batch would be those of other tokens."""
    model, batch = make_model(), with_targets(pad_samples(make_samples(3)), None)

    def first_half(_module: Any, args: Any, kwargs: Any) -> Any:
        half = kwargs["input_ids"].shape[1] // 2
        return args, {n: v[:, :half] if isinstance(v, torch.Tensor) else v for n, v in kwargs.items()}

    model.register_forward_pre_hook(first_half, with_kwargs=True)
    with pytest.raises(UnsupportedModel, match="cut sequences"):
        batch_loss(model, batch, PLAIN, 0.0, None)


@pytest.mark.parametrize("around", ["model", "head"])
def test_a_checkpoint_that_would_make_logits_again_is_refused(around: str) -> None:
    model = make_model()
    if around == "model":
        wrapped: nn.Module = checkpoint_wrapper(model)
    else:
        model.lm_head, wrapped = checkpoint_wrapper(model.lm_head), model
    with pytest.raises(UnsupportedModel, match="activation checkpointing is around"):
        batch_loss(wrapped, with_targets(pad_samples(make_samples(3)), None), PLAIN, 0.0, None)


def test_a_mixed_peft_model_has_the_gradients_of_an_unmixed_one() -> None:
    batch = with_targets(pad_samples(make_samples(3)), None)
    config = {"r": 2, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False}
    gradients = []
    for mixed in (False, True):
        base = make_model()
        torch.manual_seed(0)
        model = get_peft_model(base, LoraConfig(**config), mixed=mixed)
        assert isinstance(model, PeftMixedModel) == mixed and causal_lm_of(model) is base
        batch_loss(model, batch, PLAIN, 0.0, None).loss.backward()
        gradients.append({n: p.grad for n, p in base.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and any("lm_head" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_a_scale_is_in_the_gradient_before_a_wrapper_rounds_it() -> None:
    """As FSDP2 does, whose `output_dtype` casts what a model returns."""

    class Rounding(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.module = inner

        def forward(self, **kwargs: Any) -> dict[str, torch.Tensor]:
            return {name: value.bfloat16() for name, value in self.module(**kwargs).items()}

    batch, found = with_targets(pad_samples(make_samples(3)), None), []
    for wrapper in (nn.Identity, Rounding):
        model = make_model()
        called = Rounding(model) if wrapper is Rounding else model
        loss = batch_loss(called, batch, PLAIN, 0.0, None, scale=1 / 37).loss
        loss.backward()
        found.append((loss.detach(), model.model.layers[0].mlp.up_proj.weight.grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch hides its own, in compiling
def test_nothing_is_compiled_after_the_first_steps() -> None:
    torch._dynamo.reset()
    compiled = list[int]()

    def backend(graph: Any, _inputs: Any) -> Any:
        compiled.append(1)
        return graph

    model = torch.compile(adapted(), backend=backend)
    samples = make_samples(12)
    counts = []
    for begin in (0, 3, 6, 9, 0, 3):
        batch_loss(model, with_targets(pad_samples(samples[begin : begin + 3]), None), PLAIN, 0.0, None).loss.backward()
        counts.append(len(compiled))
    assert counts[0] > 0 and counts[-1] == counts[2]


def test_the_split_is_checked_against_the_models_own_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    check_head(model)
    monkeypatch.setattr(OutputHead, "__call__", lambda self, hidden: hidden @ model.lm_head.weight.T * 2)
    for check in (check_head, check_head_inside):
        with pytest.raises(UnsupportedModel, match="its own logits differ"):
            check(model)


def test_a_head_of_parts_refuses_a_merged_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    model.get_base_model().lm_head.merge()
    monkeypatch.setattr(HeadLayer, "has_parts", True)
    with pytest.raises(TrainingFailed, match="an adapter is merged into it"):
        batch_loss(model, with_targets(pad_samples(make_samples(3)), None), PLAIN, 0.0, None)


def test_a_head_of_parts_has_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, gradients = with_targets(pad_samples(make_samples(3)), None), []
    for has_parts in (False, True):
        torch.manual_seed(0)
        model = adapted()
        monkeypatch.setattr(HeadLayer, "has_parts", has_parts)
        batch_loss(model, batch, PLAIN, 0.0, None).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)


def test_hidden_states_are_those_of_the_body() -> None:
    model, found = make_model(), list[torch.Tensor]()
    inside_forward(model, inputs(), None, lambda hidden, _layer: found.append(hidden) or hidden.sum())
    assert torch.equal(found[0], hidden_states(model, **inputs()).flatten(0, 1))
