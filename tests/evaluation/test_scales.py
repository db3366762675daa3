"""The curve between base and adapted model: its ends, its middle, and what has none."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.adapter_cases import sized
from support.quantised_base import bitsandbytes, quantised
from support.tiny_model import make_model
from torch import Tensor, nn

from logitcache.adapters.attach import attach
from logitcache.adapters.registry import KINDS
from logitcache.errors import UnsupportedModel
from logitcache.evaluation.scales import models_between

IDS = torch.arange(40, 52)[None]
PLAIN = [kind for kind, row in KINDS.items() if not row.rewrites_base and kind not in ("corda", "eva", "lora-ga")]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits[0].double()
    return found


def moved(kind: str, seed: int = 0, **settings: Any) -> Any:
    """An adapter of a kind on the tiny base, all of it a little off where it began."""
    model = attach(make_model(), sized(kind, **settings), "tiny").eval()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("kind", PLAIN)
def test_the_ends_are_base_and_adapted_model_of_every_kind(kind: str) -> None:
    base, adapted = make_model().eval(), moved(kind)
    expected = {0.0: logits(base), 1.0: logits(adapted)}
    assert (expected[1.0] - expected[0.0]).abs().max() > 1e-3
    found = {scale: logits(model) for scale, model in models_between(base, adapted, [1, 0])}
    assert torch.equal(found[0], expected[0.0])
    torch.testing.assert_close(found[1], expected[1.0], rtol=0, atol=2e-5)


def test_half_of_a_lora_is_the_merge_at_half_alpha() -> None:
    full, half = moved("lora", alpha=8).double(), moved("lora", alpha=4).double().merge_and_unload()
    for scale, model in models_between(make_model().double().eval(), full, [0.5]):
        assert scale == 0.5
        torch.testing.assert_close(logits(model), logits(half), rtol=0, atol=1e-6)


def test_every_scale_begins_at_the_base_again() -> None:
    base, adapted = make_model().eval(), moved("lora")
    again = [logits(model) for _, model in models_between(base, adapted, [0.25, 2, 0.25])]
    assert torch.equal(again[0], again[2]) and not torch.equal(again[0], again[1])
    assert torch.equal(logits(base), logits(make_model().eval()))


def test_a_model_trained_as_a_whole_has_a_curve_too() -> None:
    base = make_model().double().eval()
    other: nn.Module = copy.deepcopy(base)
    torch.manual_seed(0)
    for parameter in other.parameters():
        parameter.data.add_(0.01 * torch.randn_like(parameter))
    middle = copy.deepcopy(base)
    for mine, a, b in zip(middle.parameters(), base.parameters(), other.parameters(), strict=True):
        mine.data.copy_((a + b) / 2)
    for _, model in models_between(base, other, [0.5]):
        torch.testing.assert_close(logits(model), logits(middle), rtol=0, atol=1e-6)


def test_what_does_not_merge_is_refused_with_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = moved("lora")

    def refuse(**_: Any) -> None:
        raise ValueError("no merging here")

    monkeypatch.setattr(adapted, "merge_and_unload", refuse)
    with pytest.raises(UnsupportedModel, match=r"kind LORA: PEFT does not merge it .*no merging here"):
        next(models_between(make_model(), adapted, [0.5]))


def test_weights_that_only_one_of_them_has_are_refused() -> None:
    other = make_model()
    other.model.embed_tokens = nn.Embedding(300, other.config.hidden_size)
    with pytest.raises(UnsupportedModel, match=r"or that are of another size, the first model\.embed_tokens\.weight"):
        next(models_between(make_model(), other, [0.5]))


@pytest.mark.filterwarnings("ignore:(?s).*tie_word_embeddings:UserWarning")  # PEFT, when the adapter is attached
@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_an_adapter_on_one_of_two_tied_weights_changes_that_one_alone(module: str) -> None:
    base, tied = (make_model(tie_word_embeddings=True).eval() for _ in range(2))
    adapted = get_peft_model(tied, LoraConfig(r=4, target_modules=[module], ensure_weight_tying=False)).eval()
    torch.manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    expected = {0.0: logits(base), 1.0: logits(adapted)}
    assert (expected[1.0] - expected[0.0]).abs().max() > 1e-2
    for scale, model in models_between(base, adapted, [1, 0]):
        torch.testing.assert_close(logits(model), expected[scale], rtol=0, atol=2e-5)


@bitsandbytes
def test_packed_weights_have_nothing_in_between() -> None:
    base, second = quantised(make_model()), quantised(make_model())
    adapted = get_peft_model(second, LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(UnsupportedModel, match=r"numbers in memory, found a base held in 4bit"):
        next(models_between(base, adapted, [0.5]))
