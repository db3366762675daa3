"""Padding on the right: whether a model needs its mask, asked of the model, and who leaves it out then."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from support.families import FAMILIES, SIZES, make_family
from support.tiny_model import make_model
from support.tiny_runs import make_base, make_cache, make_samples
from transformers import BertConfig, BertLMHeadModel

from logitcache import (
    AdapterSettings,
    Anchor,
    CaptureSettings,
    LogitCache,
    Objective,
    TrainSettings,
    precompute,
)
from logitcache.capture.teacher import capture
from logitcache.models.causal import needs_mask
from logitcache.training.run import train


def bidirectional() -> BertLMHeadModel:
    """A model under a causal head whose tokens see those behind them."""
    torch.manual_seed(0)
    return BertLMHeadModel(BertConfig(**SIZES, is_decoder=False)).eval()


def counting_the_mask() -> Any:
    """A model whose hidden states depend on how many tokens a mask hides."""
    model = make_model()
    forward = model.model.forward

    def counted(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        found = forward(*args, attention_mask=attention_mask, **kwargs)
        if attention_mask is not None:
            found.last_hidden_state = found.last_hidden_state * (1 + (attention_mask == 0).sum())
        return found

    model.model.forward = counted
    return model


def with_little_room() -> Any:
    """A model with a layer that has room for 16 tokens of a batch, the first; no padding takes any of it where a mask
    says which that is."""
    model = make_model()
    forward = model.model.forward

    def dropping(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        found = forward(*args, attention_mask=attention_mask, **kwargs)
        hidden = found.last_hidden_state
        present = torch.ones(hidden.shape[:2]) if attention_mask is None else attention_mask
        place = present.flatten().cumsum(0).reshape(present.shape)
        found.last_hidden_state = hidden * (place <= 16)[..., None]
        return found

    model.model.forward = dropping
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_causal_families_need_none(family: str, dtype: torch.dtype) -> None:
    model = make_family(family).to(dtype).train()
    assert not needs_mask(model)
    assert model.training and all(module.training for module in model.modules())
    if dtype == torch.float32:
        assert not needs_mask(get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")))


def test_who_sees_what_stands_behind_needs_one() -> None:
    assert needs_mask(bidirectional())


def test_who_reads_more_than_padding_from_it_needs_one() -> None:
    assert needs_mask(counting_the_mask())


def test_whose_padding_takes_the_room_of_the_rows_behind_it_needs_one() -> None:
    assert needs_mask(with_little_room())


def test_a_model_of_numbers_that_are_none_needs_one() -> None:
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    assert needs_mask(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_records_are_the_same_without(family: str) -> None:
    model, samples = make_family(family), [s for s in make_samples(5) if max(s.token_ids) < 211] or make_samples(5)
    for sample in samples:
        sample.token_ids[:] = sample.token_ids % 211
    with_mask, without = (capture(model, samples, 8, masked=masked) for masked in (True, False))
    for one, other in zip(with_mask, without, strict=True):
        np.testing.assert_allclose(one.label_logprobs, other.label_logprobs, atol=1e-6)
        np.testing.assert_allclose(one.alternative_logprobs, other.alternative_logprobs, atol=1e-6)
        np.testing.assert_allclose(one.tail_logprobs, other.tail_logprobs, atol=1e-5)


@pytest.mark.parametrize("needed", [False, True])
def test_precompute_gives_one_to_who_needs_it(needed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base, seen = make_base(), list[bool]()
    monkeypatch.setattr("logitcache.capture.teacher.needs_mask", lambda _: needed)
    base.model.model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given.get("attention_mask") is not None), with_kwargs=True
    )
    samples = make_samples(6)
    precompute(base, samples, tmp_path / "cache", CaptureSettings(8, batch_tokens=128))
    assert seen[-1] is needed and len({len(s.token_ids) for s in samples}) > 1
    assert LogitCache.open(tmp_path / "cache").num_positions == sum(len(s.positions) for s in samples)


def masks_seen(monkeypatch: pytest.MonkeyPatch, needed: bool | None, out: Path) -> list[bool]:
    """Of every forward in training mode: whether the body was given a mask. needed: said instead of asked."""
    seen: list[bool] = []
    base = make_base()
    base.model.model.register_forward_pre_hook(
        lambda body, _, given: seen.append(given.get("attention_mask") is not None) if body.training else None,
        with_kwargs=True,
    )
    if needed is not None:
        monkeypatch.setattr("logitcache.training.run.needs_mask", lambda _: needed)
    samples, anchors = make_samples(), make_samples(6, seed=3)
    cache, anchor = make_cache(out / "cache", samples), Anchor(make_cache(out / "anchors", anchors))
    base.model.config.save_pretrained(out / "tiny")
    train(
        *(base, samples, cache, out / "o", AdapterSettings(rank=2), Objective(weight=0.5)),
        TrainSettings(max_steps=2, batch_size=4),
        anchors=[anchor],
    )
    return seen


def test_training_leaves_it_out_of_new_samples_and_anchors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = masks_seen(monkeypatch, None, tmp_path / "a")
    assert len(seen) == 4 and not any(seen)  # the new samples and the anchors of each step
    assert all(masks_seen(monkeypatch, True, tmp_path / "b"))
    without, with_mask = (load_file(tmp_path / run / "o" / "adapter_model.safetensors") for run in "ab")
    assert without.keys() == with_mask.keys()
    for name, tensor in without.items():
        torch.testing.assert_close(tensor, with_mask[name])
