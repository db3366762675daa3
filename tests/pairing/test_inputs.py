"""What of a batch reaches the model, and what nobody reads: refused by name, in every plug-in."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.plug_ins import Cached, arguments, cached, lora, make_exact_cache
from support.tiny_model import make_model
from support.tiny_runs import V, make_samples
from transformers import DataCollatorWithFlattening, GPT2Config, GPT2LMHeadModel, GPT2Model, TrainerCallback
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from logitcache.data.batches import pad_samples
from logitcache.data.samples import Sample
from logitcache.errors import InvalidBatch, TrainingFailed
from logitcache.losses.formulas import Objective
from logitcache.storage import LogitCache
from logitcache.training.custom_loop import CachedLoss
from logitcache.training.trainer import CachedKLTrainer

__all__ = ["cached"]  # the fixture

UNREAD = ("loss_scale", "loss_weights", "weights", "shift_labels", "loss_mask", "domain_ids", "text", "logits_to_keep")
HARMLESS = ("length", "seq_lengths", "num_items_in_batch", "token_type_ids", "special_tokens_mask")


def bringing(name: str, batch: dict[str, Any]) -> dict[str, Any]:
    ids = batch["input_ids"]
    value: Any = torch.ones(ids.shape) if name != "shift_labels" else batch["labels"].roll(-1, 1)
    if name in ("length", "seq_lengths"):
        value = torch.full((len(ids),), ids.shape[1])
    elif name == "token_type_ids":
        value = torch.ones_like(ids)
    elif name in ("num_items_in_batch", "logits_to_keep"):
        value = 3
    elif name == "text":
        value = ["a row"] * len(ids)
    return {**batch, name: value}


class Segmented(GPT2Model):
    """A body that names its segments, and has no **kwargs for others."""

    def forward(
        self,
        input_ids: Any = None,
        cache: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        use_cache: bool = True,
        return_dict: bool = True,
        past_key_values: Any = None,  # cache, before transformers 5.24
        output_attentions: Any = None,
        output_hidden_states: Any = None,
    ) -> Any:
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, use_cache=use_cache
        )


def segmented() -> Any:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=32, n_layer=1, n_head=4, n_positions=64)).eval()
    model.transformer.__class__ = Segmented
    return model


def seen_by(module: torch.nn.Module) -> list[dict[str, Any]]:
    """The keyword arguments of every call from now on."""
    seen: list[dict[str, Any]] = []
    module.register_forward_pre_hook(lambda _module, _args, kwargs: seen.append(dict(kwargs)), with_kwargs=True)
    return seen


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch hides its own, in compiling
@pytest.mark.parametrize("wrapper", ["plain", "PEFT", "compiled"])
@pytest.mark.parametrize("name", UNREAD)
def test_a_loop_refuses_what_nothing_reads(name: str, wrapper: str, cached: Cached) -> None:
    samples, cache = cached
    model: Any = make_model() if wrapper == "plain" else get_peft_model(make_model(), lora())
    model = torch.compile(model, backend="eager") if wrapper == "compiled" else model
    batch = pad_samples(samples[:4])
    for check in (True, False):
        anchored = CachedLoss(cache, check=check)
        with pytest.raises(TrainingFailed, match=f"the batch brings {name}, which .*LlamaModel"):
            anchored(model, bringing(name, batch))
        assert anchored(model, {**batch, name: None}).ce > 0  # brings nothing


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("name", ["loss_scale", "shift_labels"])
def test_a_trainer_refuses_it_before_its_first_step(name: str, check: bool, cached: Cached, tmp_path: Path) -> None:
    samples, cache = cached
    steps: list[int] = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            steps.append(1)

    def collate(rows: Sequence[Any]) -> dict[str, Any]:
        return bringing(name, pad_samples(rows))

    trainer = CachedKLTrainer(
        model=get_peft_model(make_model(), lora()),
        args=arguments(tmp_path, remove_unused_columns=False),
        train_dataset=list(samples),
        data_collator=collate,
        cache=cache,
        check=check,
        callbacks=[Watch()],
    )
    with pytest.raises(TrainingFailed, match=f"the batch brings {name}, which "):
        trainer.train()
    assert not steps


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_harmless_changes_nothing_and_stays_outside(name: str, cached: Cached) -> None:
    samples, cache = cached
    model, batch = get_peft_model(make_model(), lora()), pad_samples(samples[:4])
    plain = CachedLoss(cache)(model, batch)
    seen = seen_by(model.get_base_model().model)
    found = CachedLoss(cache)(model, bringing(name, batch))
    assert [torch.equal(a, b) for a, b in zip(plain, found, strict=True)] == [True] * 3
    assert seen and not any(name in kwargs for kwargs in seen)


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("change", ["cut", "padded"])
def test_a_batch_that_is_changed_after_its_lookup_is_refused(change: str, check: bool, cached: Cached) -> None:
    """As context parallelism cuts it, or who trims what a collator has padded: its rows are other tokens' then."""
    samples, cache = cached
    anchored, model = CachedLoss(cache, check=check), get_peft_model(make_model(), lora())
    batch = anchored.looked_up(pad_samples(samples[:4]))
    for name in ("input_ids", "labels", "attention_mask"):
        batch[name] = batch[name][:, :-2] if change == "cut" else torch.nn.functional.pad(batch[name], (2, 0))
    with pytest.raises(InvalidBatch, match="as they were looked up"):
        anchored(model, batch)


def test_a_model_without_room_for_more_is_given_what_it_names(tmp_path: Path) -> None:
    """Where even what is harmless would be an error."""
    base, samples = segmented(), [Sample(s.token_ids % V, s.supervised, s.origin) for s in make_samples(4)]
    cache: LogitCache = make_exact_cache(tmp_path / "c", base, samples)
    batch, anchored = pad_samples(samples), CachedLoss(cache, Objective(), check=False)
    plain = anchored(base, batch)
    for name in HARMLESS:
        found = anchored(base, bringing(name, batch))
        assert (found.ce == plain.ce) == (name != "token_type_ids"), name
    with pytest.raises(TrainingFailed, match=r"the batch brings cu_seq_lens_k, cu_seq_lens_q, which .*Segmented"):
        anchored(base, {**batch, "cu_seq_lens_q": torch.zeros(2), "cu_seq_lens_k": torch.zeros(2)})


FLASH = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@pytest.mark.parametrize("collator", ["transformers", "TRL"])
def test_what_attention_reads_reaches_it(collator: str, cached: Cached) -> None:
    samples, cache = cached
    rows = [{"input_ids": s.token_ids.astype("int64").tolist(), "labels": None} for s in samples[:3]]
    for row, sample in zip(rows, samples, strict=False):
        row["labels"] = [int(t) if on else -100 for t, on in zip(sample.token_ids, sample.supervised, strict=True)]
    batch: dict[str, Any]
    if collator == "TRL":
        batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(rows)
    else:
        batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(rows)
    assert {*FLASH, "seq_idx"} <= batch.keys()
    model = get_peft_model(make_model(), lora())
    seen = seen_by(model.get_base_model().model)
    CachedLoss(cache)(model, batch)
    assert len(seen) >= 2  # the check and the step
    for kwargs in seen[-2:]:
        for name in (*FLASH, "seq_idx"):
            assert kwargs[name] is batch[name] or torch.equal(
                torch.as_tensor(kwargs[name]), torch.as_tensor(batch[name])
            )


def test_what_peft_reads_reaches_it(cached: Cached) -> None:
    """In training PEFT itself refuses adapter_names, which it would not have seen."""
    samples, cache = cached
    model = get_peft_model(make_model(), lora()).train()
    batch = {**pad_samples(samples[:2]), "adapter_names": ["default", "default"]}
    with pytest.raises(ValueError, match="adapter_names"):
        CachedLoss(cache, check=False)(model, batch)


def test_a_forward_that_was_replaced_names_what_it_reads(cached: Cached) -> None:
    samples, cache = cached
    model, read = make_model(), []
    body = model.model
    original = body.forward

    def forward(input_ids: Any = None, domain_ids: Any = None, **kwargs: Any) -> Any:
        read.append(domain_ids)
        return original(input_ids=input_ids, **kwargs)

    body.forward = forward
    batch = bringing("domain_ids", pad_samples(samples[:4]))
    CachedLoss(cache, check=False)(model, batch)
    assert len(read) == 1 and torch.equal(read[0], batch["domain_ids"])
