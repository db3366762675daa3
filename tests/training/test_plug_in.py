"""Where it plugs in: `CachedKL` over Trainer and TRL's SFTTrainer, `CachedLoss` in a loop of one's own.

The oracles here know nothing of the code: documents are searched for in a batch token by token, and losses are made
from dense logits of a live base. docs/how-to/plug-in.md and the scripts it shows are run.
"""

import copy
import importlib.util
import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import (
    IA3Config,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from support.families import V as FAMILY_V
from support.families import make_family
from support.plug_ins import (
    Cached,
    arguments,
    logs_of,
    lora,
    make_exact_cache,
    make_sft,
    mixture,
    on_the_left,
    packed_by_hand,
    rows_of,
    trl,
)
from support.plug_ins import cached as cached
from support.tiny_model import make_model, make_tokenizer, text_rows
from support.tiny_runs import V, gradients_after_one_step, make_cache, make_samples, make_trainer, moved_adapter
from support.trl_chats import template_texts
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer, pack_dataset

from logitcache.cli import run
from logitcache.data.batches import pad_samples
from logitcache.data.samples import Sample
from logitcache.data.samples import make_samples as samples_of_rows
from logitcache.errors import InvalidBatch, NotTheBase, TrainingFailed, UnsupportedModel
from logitcache.losses.formulas import Objective
from logitcache.pairing.targets import with_targets
from logitcache.storage import LogitCache, PositionNotCaptured, SampleNotCached
from logitcache.training.custom_loop import CachedLoss
from logitcache.training.trainer import CachedKLTrainer

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "how-to" / "plug-in.md"
CHAT = "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>\
{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
WEIGHT = 2.0

# TRL's SFTConfig sets gradient_checkpointing, whose name transformers 5.23 has changed
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


# Layouts


def bfd(rows: Sequence[Any], **options: Any) -> dict[str, Any]:
    packed = pack_dataset(Dataset.from_list(list(rows)), 64, "bfd")
    assert any(len(row["seq_lengths"]) > 1 for row in packed)
    return trl(list(packed), padding_free=True, **options)


LAYOUTS: dict[str, Callable[[Sequence[Any]], dict[str, Any]]] = {
    "left": on_the_left,
    "left with position_ids": lambda rows: on_the_left(rows, counted=True),
    "right": trl,
    "right with position_ids": lambda rows: trl(rows, return_position_ids=True),
    "right to a multiple": lambda rows: trl(rows, pad_to_multiple_of=64),
    "padding-free": lambda rows: trl(rows, padding_free=True),
    "padding-free to a multiple": lambda rows: trl(rows, padding_free=True, pad_to_multiple_of=64),
    "bfd": bfd,
    "bfd to a multiple": lambda rows: bfd(rows, pad_to_multiple_of=64),
    "flattened by transformers": lambda rows: DataCollatorWithFlattening(return_flash_attn_kwargs=True)(list(rows)),
    "rows of several documents": packed_by_hand,
}


def found_by_search(batch: Any, samples: Sequence[Sample]) -> dict[int, tuple[Sample, int]]:
    """Flattened place -> (sample, position), by looking for each sample's tokens everywhere."""
    found = {}
    width = batch["input_ids"].shape[1]
    for row, tokens in enumerate(batch["input_ids"].numpy().astype(np.uint32)):
        for sample in samples:
            n = len(sample.token_ids)
            for at in range(width - n + 1):
                if np.array_equal(tokens[at : at + n], sample.token_ids):
                    found |= {row * width + at + int(p): (sample, int(p)) for p in sample.positions}
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_position_gets_the_record_of_its_own_document(layout: str, cached: Cached) -> None:
    samples, cache = cached
    unsupervised = Sample(np.arange(7, dtype=np.uint32), np.zeros(7, dtype=np.bool_), "nothing to learn")
    given = [samples[3], unsupervised, samples[0], samples[5], samples[9], samples[3]]
    batch = with_targets(LAYOUTS[layout](rows_of(given)), cache)
    expected = found_by_search(batch, [samples[i] for i in (3, 0, 5, 9)])
    assert sorted(batch["base_rows"].tolist()) == sorted(expected)
    assert len(expected) == sum(len(s.positions) for s in given)
    for i, place in enumerate(batch["base_rows"].tolist()):
        sample, position = expected[place]
        record = cache.lookup(sample.token_ids, np.array([position]))
        assert batch["base_label_ids"][i] == sample.token_ids[position + 1]
        assert batch["base_alternative_ids"][i].tolist() == record.alternative_ids[0].tolist()
        logprobs = batch["base_alternative_logprobs"][i].view(torch.float32)
        assert logprobs.tolist() == record.alternative_logprobs[0].tolist()
        assert float(batch["base_label_logprobs"][i].view(torch.float32)) == record.label_logprobs[0]


def test_a_batch_with_nothing_supervised_has_no_loss(cached: Cached) -> None:
    samples, cache = cached
    anchored, model = CachedLoss(cache), get_peft_model(make_model(), lora())
    empty = pad_samples(samples[:2])
    empty["labels"][:] = -100
    found = anchored(model, empty)
    found.loss.backward()
    assert found.loss == found.ce == found.kl == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    with pytest.raises(NotTheBase):  # the check waits for a batch that says something
        anchored(make_model(seed=1), pad_samples(samples[:4]))


def spoilt(batch: dict[str, Any], how: str) -> dict[str, Any]:
    """A batch of padded samples, made wrong."""
    ids, mask, width = batch["input_ids"], batch["attention_mask"], batch["input_ids"].shape[1]
    counted = torch.arange(width).expand_as(ids).clone()
    if how == "a hole":
        mask[0, 1] = 0
    elif how == "numbered":
        mask[0] *= 2
    elif how == "4-dimensional":
        batch["attention_mask"] = torch.ones(len(ids), 1, width, width, dtype=torch.bool).tril()
    elif how == "shifted":
        batch["labels"] = batch["labels"].roll(-1, dims=1)
    elif how == "no labels":
        del batch["labels"]
    elif how == "packed with a mask":
        counted[0, 2:] = torch.arange(width - 2)
        batch["position_ids"] = counted
    elif how == "from 1":
        batch["position_ids"] = counted + 1
    elif how == "jumping":
        counted[0, 2:] += 5
        batch["position_ids"] = counted
    elif how == "an image":
        batch["pixel_values"] = torch.zeros(1, 3, 8, 8)
    elif how == "one for all":
        batch["position_ids"] = counted[:1]
    elif how == "flat":
        batch |= {name: batch[name][0] for name in ("input_ids", "labels", "attention_mask")}
    return batch


SPOILT = {
    "a hole": "ones with padding at the ends.*need position_ids",
    "numbered": "ones with padding at the ends.*need position_ids",
    "4-dimensional": r"attention_mask of that shape, found \(2, \d+\) and \(2, 1,",
    "shifted": "row 0.*expected labels equal to input_ids.*not shifted",
    "no labels": "expected labels in it, found attention_mask, input_ids",
    "packed with a mask": "row 0.*2 documents.*Leave attention_mask out",
    "from 1": "row 0.*position_ids that count up",
    "jumping": "row 0.*position_ids that count up",
    "an image": "expected tokens alone, found pixel_values too.*Leave out the rows with images",
    "one for all": "position_ids of that shape",
    "flat": r"expected input_ids \[rows, time\]",
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_batch_that_cannot_be_taken_apart_is_refused(how: str, cached: Cached) -> None:
    samples, cache = cached
    with pytest.raises(InvalidBatch, match=SPOILT[how]):
        with_targets(spoilt(pad_samples(samples[:2]), how), cache)


# SFTTrainer


@pytest.fixture(scope="module")
def expected_gradients(cached: Cached, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Of the first step over all samples, by logitcache's own trainer on padded samples."""
    samples, cache = cached
    out = tmp_path_factory.mktemp("own")
    found = gradients_after_one_step(
        make_trainer(out, samples, cache, Objective(weight=WEIGHT), per_device_train_batch_size=16)
    )
    assert max(float(g.abs().max()) for g in found.values()) > 1e-2
    return found


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # PyTorch's way to make workers
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"attn": "eager", "gradient_checkpointing": False},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16},
        {"padding_free": True, "max_length": None},
        {"padding_free": True, "max_length": None, "attn": "eager"},
        {"packing": True},
        {"packing": True, "attn": "eager"},
        {"packing": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8},
        {"packing": True, "pad_to_multiple_of": 32},
        {"dataloader_num_workers": 1},
        {"streamed": True},
    ],
    ids=str,
)
def test_the_gradient_is_the_same_in_every_layout(
    settings: dict[str, Any], cached: Cached, expected_gradients: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    samples, cache = cached
    settings = dict(settings)
    model = moved_adapter(attn_implementation=settings.pop("attn", "sdpa"))
    rows = Dataset.from_list(rows_of(samples))
    data = rows.to_iterable_dataset() if settings.pop("streamed", False) else rows
    trainer = make_sft(tmp_path, data, cache, model, objective=Objective(weight=WEIGHT), check=False, **settings)
    found = gradients_after_one_step(trainer)
    assert found.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"packing": True}, {"padding_free": True, "max_length": None}], ids=str)
def test_sft_learns_and_logs_both_terms(settings: dict[str, Any], cached: Cached, tmp_path: Path) -> None:
    samples, cache = cached
    trainer = make_sft(tmp_path, samples, str(cache.path), max_steps=8, **settings)
    trainer.train()
    logs = logs_of(trainer)
    assert len(logs) == 8 and all(entry["kl_weight"] == 1 for entry in logs)
    assert abs(logs[0]["kl"]) < 1e-6 < 1e-2 < logs[-1]["kl"]
    assert logs[-1]["ce"] < logs[0]["ce"] - 0.3
    for entry in logs:
        assert entry["loss"] == pytest.approx(entry["ce"] + entry["kl"], rel=1e-5)


def chats(count: int = 6) -> list[dict[str, Any]]:
    turns = ("user", "hello {}"), ("assistant", "good day {}"), ("user", "and {}?"), ("assistant", "{} it is")
    return [{"messages": [{"role": r, "content": c.format(i * 37)} for r, c in turns]} for i in range(count)]


DATA: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "text": (text_rows(6), {}),
    "completions": ([{"prompt": f"{i} + {i} =", "completion": f" {2 * i}, so it is"} for i in range(6)], {}),
    "chats": (chats(), {"assistant_only_loss": True}),
    "chats, packed": (chats(), {"assistant_only_loss": True, "packing": True, "max_length": 256}),
    "chats, Qwen3": (chats(), {"assistant_only_loss": True}),
    "completions of turns, Qwen3": (
        [{"prompt": row["messages"][:3], "completion": row["messages"][3:]} for row in chats()],
        {"assistant_only_loss": True},
    ),
    "chats, cut": (chats(), {"assistant_only_loss": True, "max_length": 30}),
    "text, cut": (text_rows(6), {"max_length": 11}),
    "text, cut and packed": (text_rows(6), {"max_length": 11, "packing": True}),
}


def make_cache_of_rows(path: Path, rows: Sequence[dict[str, Any]], tokenizer: Any) -> tuple[list[Sample], LogitCache]:
    samples = samples_of_rows(((f"row {i}", row) for i, row in enumerate(rows)), tokenizer, 256, V).samples
    return samples, make_cache(path, samples)


@pytest.mark.parametrize("data", DATA)
def test_trl_makes_the_tokens_of_precompute(data: str, tmp_path: Path) -> None:
    """All that TRL makes of the same rows is found, and supervised in the same places, cut as it may be."""
    rows, settings = DATA[data]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template_texts()["qwen3"] if "Qwen3" in data else CHAT  # without markers: TRL has others
    samples, cache = make_cache_of_rows(tmp_path / "c", rows, tokenizer)
    settings = {"max_length": 256, **settings}
    trainer = make_sft(tmp_path / "o", Dataset.from_list(rows), cache, processing_class=tokenizer, **settings)
    batches = list(trainer.get_train_dataloader())
    expected = [len(s.positions[s.positions < settings["max_length"] - 1]) for s in samples]
    assert sum(expected) > 20
    assert sum(len(batch["base_rows"]) for batch in batches) == sum(expected)
    trainer.train()
    assert abs(logs_of(trainer)[0]["kl"]) < 1e-6


def test_a_cache_of_the_trainers_own_tokens(tmp_path: Path, tiny_model: Path) -> None:
    """Chats learnt as a whole, which precompute would supervise in the assistant's turns only."""
    tokenizer = make_tokenizer()
    rows = Dataset.from_list(chats())
    _, cache = make_cache_of_rows(tmp_path / "assistant", chats(), tokenizer)
    with pytest.raises(PositionNotCaptured, match=r"row 0 of the training data.*not supervised.*--supervise") as told:
        make_sft(tmp_path / "a", rows, cache, max_length=256).train()
    assert "its own input_ids and labels as --data" in str(told.value)
    with pytest.raises(PositionNotCaptured, match=r"not supervised.*--supervise.*its own input_ids and labels"):
        make_sft(tmp_path / "b", rows, cache, max_length=256, check=False).train()  # told when the batch comes
    path, tokens = str(tmp_path / "c"), str(tmp_path / "tokens.parquet")
    args = SFTConfig(str(tmp_path / "plain"), use_cpu=True, bf16=False, report_to=[])
    plain = SFTTrainer(make_model(), args, train_dataset=rows, processing_class=tokenizer)
    plain.train_dataset.select_columns(["input_ids", "labels"]).to_parquet(tokens)
    assert run(["precompute", "--model", str(tiny_model), "--data", tokens, "--cache", path]) == 0
    for packing in (False, True):
        trainer = make_sft(tmp_path / "o", rows, path, packing=packing, max_length=256)
        found = sum(len(batch["base_rows"]) for batch in trainer.get_train_dataloader())
        assert found == sum(len(ids) - 1 for ids in plain.train_dataset["input_ids"])
        trainer.train()


def test_evaluation_is_the_trainers_own_and_changes_nothing(cached: Cached, tmp_path: Path) -> None:
    samples, cache = cached
    settings = {"max_steps": 3, "per_device_train_batch_size": 4, "gradient_checkpointing": False}
    plain = make_sft(tmp_path / "a", samples, cache, **settings)
    strangers = make_samples(5, seed=3)
    evaluated = make_sft(
        tmp_path / "b",
        samples,
        cache,
        eval_dataset=Dataset.from_list(rows_of(strangers)),  # not in the cache
        eval_strategy="steps",
        eval_steps=1,
        **settings,
    )
    for trainer in (plain, evaluated):
        trainer.train()
    for (name, p), q in zip(plain.model.named_parameters(), evaluated.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert logs_of(plain)[-1]["kl"] == logs_of(evaluated)[-1]["kl"] > 0
    losses = [entry["eval_loss"] for entry in evaluated.state.log_history if "eval_loss" in entry]
    with torch.no_grad():
        ce, _ = dense_parts(evaluated.model.eval(), make_model(), strangers)
    assert len(losses) == 3 and losses[-1] == pytest.approx(float(ce), rel=1e-4)


def test_a_run_goes_on_from_its_checkpoint(cached: Cached, tmp_path: Path) -> None:
    samples, cache = cached
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_sft(tmp_path / "a", samples, cache, **settings)
    whole.train()
    resumed = make_sft(tmp_path / "a", samples, cache, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for (name, p), q in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert logs_of(whole)[2:] == logs_of(resumed)[2:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sft_in_bfloat16_as_trl_sets_it(dtype: torch.dtype, cached: Cached, tmp_path: Path) -> None:
    samples, cache = cached
    kinds = set()
    model = make_model().to(dtype)
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: kinds.add(output.dtype))
    trainer = make_sft(tmp_path, samples, cache, model, max_steps=3, bf16=True)
    kinds.clear()
    trainer.train()
    logs = logs_of(trainer)
    exact = make_sft(tmp_path, samples, cache, max_steps=3)
    exact.train()
    for entry, other in zip(logs, logs_of(exact), strict=True):
        assert entry["ce"] == pytest.approx(other["ce"], abs=0.05)
        assert entry["kl"] == pytest.approx(other["kl"], abs=0.02)
    assert logs[-1]["kl"] > 1e-3
    assert kinds == ({torch.bfloat16, torch.float32} if dtype == torch.float32 else {torch.bfloat16})


# What is refused


VIRTUAL_TOKENS = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "wrapped": (
        {"packing": True, "packing_strategy": "wrapped", "max_length": 16},
        SampleNotCached,
        r"row 1 of the training data.*packing_strategy='wrapped'.*use 'bfd'",
    ),
    "bfd_split": (
        {"packing": True, "packing_strategy": "bfd_split", "max_length": 16},
        SampleNotCached,
        r"row \d+ of the training data.*packing_strategy='bfd_split'.*use 'bfd'",
    ),
    "keep_end": (
        {"truncation_mode": "keep_end", "max_length": 16},
        SampleNotCached,
        r"row \d of the training data.*truncation_mode='keep_end'.*use 'keep_start'",
    ),
    "dft": ({"loss_type": "dft"}, TrainingFailed, "loss_type other than nll.*Leave it at its default"),
    "smoothing": ({"label_smoothing_factor": 0.1}, TrainingFailed, "Set label_smoothing_factor=0"),
    "compute_loss_func": (
        {"compute_loss_func": lambda *_: torch.zeros(())},
        TrainingFailed,
        "compute_loss_func.*Leave it at its default",
    ),
    "noise in the budget": (
        {"neftune_noise_alpha": 5.0, "objective": Objective(kl_budget=0.1)},
        TrainingFailed,
        "neftune_noise_alpha.*kl_budget.*Leave one of them out",
    ),
    "other weights": ({"model": lambda: make_model(seed=1)}, NotTheBase, r"step 0.*row \d+ of the first batch at col"),
    "wider": ({"model": lambda: make_model(vocab_size=300)}, NotTheBase, "over 260 tokens, found 300. Use the model"),
    "narrower": ({"model": lambda: make_model(vocab_size=258), "check": False}, NotTheBase, "found 258. Use the model"),
    "virtual tokens": (
        {"peft_config": VIRTUAL_TOKENS},
        UnsupportedModel,
        "virtual tokens.*such as LoRA",
    ),
    "virtual tokens, unchecked": (
        {"peft_config": VIRTUAL_TOKENS, "check": False},
        UnsupportedModel,
        "virtual tokens.*such as LoRA",
    ),
    "prefix": (
        {"peft_config": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)},
        NotTheBase,
        "an adapter that starts as identity",
    ),
    "a moved adapter": ({"peft_config": lora(init_lora_weights=False)}, NotTheBase, "starts as identity"),
    "no cache": ({"cache": None}, TrainingFailed, "a cache is needed. Give cache="),
    "groups": ({"objective": Objective(tail="groups")}, TrainingFailed, "precompute a cache with --tail-groups"),
    "draws": ({"objective": Objective(tail="sampled")}, TrainingFailed, "precompute a cache with --tail-samples"),
    "a router": (
        {"model": mixture, "peft_config": lora(target_modules=["q_proj"])},
        TrainingFailed,
        "auxiliary loss.*router_aux_loss_coef=0",
    ),
}


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # what TRL will refuse itself one day
@pytest.mark.parametrize("what", REFUSED)
def test_sft_is_refused_before_its_first_step(what: str, cached: Cached, tmp_path: Path) -> None:
    samples, cache = cached
    changes, error, message = REFUSED[what]
    steps: list[int] = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            steps.append(1)

    def train(model: Callable[[], Any] = make_model, **settings: Any) -> None:
        make_sft(tmp_path, samples, model=model(), callbacks=[Watch()], **settings).train()

    with pytest.raises(error, match=message):
        train(**{"cache": cache, **changes})
    assert not steps
    if what == next(iter(REFUSED)):  # without any of the changes it is trained
        train(cache=cache)
        assert steps


def test_what_is_refused_is_all_that_is_wrong(cached: Cached, tmp_path: Path) -> None:
    """The same settings where they cut nothing, or are switched off, are no reason to refuse."""
    samples, cache = cached
    router = {"model": mixture(), "peft_config": lora(target_modules=["q_proj"]), "router_aux_loss_coef": 0.0}
    for settings in (
        {"packing": True, "packing_strategy": "bfd_split", "max_length": 64},
        {"cache": None, "objective": Objective("none")},
        {"peft_config": lora(use_dora=True)},
        {"peft_config": lora(init_lora_weights="pissa")},
        {"peft_config": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])},
        {"check": False, **router},
    ):
        make_sft(tmp_path, samples, **{"cache": cache, **settings}).train()


NOT_THE_BASE: dict[str, tuple[Callable[[], Any], type[Exception]]] = {
    "other weights": (lambda: make_model(seed=1), NotTheBase),
    "narrower": (lambda: make_model(vocab_size=258), NotTheBase),
    "wider": (lambda: make_model(vocab_size=300), NotTheBase),
    "a moved adapter": (lambda: get_peft_model(make_model(), lora(init_lora_weights=False)), NotTheBase),
    "virtual tokens": (lambda: get_peft_model(make_model(), VIRTUAL_TOKENS), UnsupportedModel),
}


@pytest.mark.parametrize("what", NOT_THE_BASE)
def test_a_loop_is_told_that_its_model_is_not_the_base(what: str, cached: Cached) -> None:
    samples, cache = cached
    make, error = NOT_THE_BASE[what]
    anchored = CachedLoss(cache)
    with pytest.raises(error):
        anchored(make(), pad_samples(samples[:4]))
    anchored(make_model(), pad_samples(samples[:4]))


# transformers' Trainer


class Stream(torch.utils.data.IterableDataset[Any]):
    """Samples without a length."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch hides its own, in compiling
@pytest.mark.parametrize("how", ["streamed", "columns of text", "compiled"])
def test_trainer_sees_every_position(
    how: str,
    cached: Cached,
    expected_gradients: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    samples, cache = cached
    data: Any = list(samples)
    collator: Any = pad_samples
    settings: dict[str, Any] = {"remove_unused_columns": False}
    if how == "streamed":
        data = Stream(samples)
    elif how == "columns of text":
        data = [{**row, "text": "of no use", "attention_mask": [1] * len(row["input_ids"])} for row in rows_of(samples)]
        collator, settings = DataCollatorForSeq2Seq(make_tokenizer()), {}
    else:
        settings |= {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    trainer = CachedKLTrainer(
        model=moved_adapter(),
        args=arguments(tmp_path, **settings),
        train_dataset=data,
        data_collator=collator,
        cache=cache,
        objective=Objective(weight=WEIGHT),
        check=how != "compiled",
    )
    monkeypatch.setattr("logitcache.pairing.view.check_first_batch", lambda *_: None)  # the adapter has moved
    found = {name.replace("_orig_mod.", ""): g for name, g in gradients_after_one_step(trainer).items()}
    assert found.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def test_a_stranger_in_a_stream_stops_the_run(cached: Cached, tmp_path: Path) -> None:
    samples, cache = cached
    stranger = Sample(np.array([9, 8, 7], dtype=np.uint32), np.ones(3, dtype=np.bool_), "stranger")
    trainer = CachedKLTrainer(
        model=get_peft_model(make_model(), lora()),
        args=arguments(tmp_path, remove_unused_columns=False, per_device_train_batch_size=8, max_steps=3),
        train_dataset=Stream([*samples, stranger]),
        data_collator=pad_samples,
        cache=cache,
    )
    with pytest.raises(SampleNotCached, match="departs at token 0: expected token 9"):
        trainer.train()


def test_trainer_evaluates_what_is_not_cached(cached: Cached, tmp_path: Path) -> None:
    samples, cache = cached
    strangers = make_samples(5, seed=3)
    trainer = CachedKLTrainer(
        model=get_peft_model(make_model(), lora()),
        args=arguments(
            tmp_path, remove_unused_columns=False, eval_strategy="steps", eval_steps=1, max_steps=2, learning_rate=1e-2
        ),
        train_dataset=list(samples),
        eval_dataset=strangers,
        data_collator=pad_samples,
        cache=cache,
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    with torch.no_grad():
        ce, _ = dense_parts(trainer.model.eval(), make_model(), strangers)
    assert len(losses) == 2 and losses[-1] == pytest.approx(float(ce), rel=1e-4) and losses[0] != losses[1]


def test_full_training_under_autocast_runs_the_body_in_it(cached: Cached, tmp_path: Path) -> None:
    """The trainer wraps the forward of the model itself, which the loss goes around."""
    samples, cache = cached
    model, seen = make_model(), []
    model.model.layers[0].mlp.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    trainer = CachedKLTrainer(
        model=model,
        args=arguments(tmp_path, remove_unused_columns=False, bf16=True),
        train_dataset=list(samples),
        data_collator=pad_samples,
        cache=cache,
        check=False,
    )
    trainer.train()
    assert seen == [torch.bfloat16]


# A loop of one's own, against dense logits of a live base


def dense_parts(student: Any, base: Any, samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy and mean masked KL, from the models' own logits, the label's column taken out."""
    ce, kl = [], []
    for sample in samples:
        ids = torch.from_numpy(sample.token_ids.astype(np.int64))[None]
        places = torch.from_numpy(sample.positions.astype(np.int64))
        labels = ids[0, places + 1]
        z = student(input_ids=ids).logits[0, places].float()
        with torch.no_grad():
            b = base(input_ids=ids).logits[0, places].float()
        ce.append(z.logsumexp(1) - z[torch.arange(len(z)), labels])
        others = torch.arange(z.shape[1])[None] != labels[:, None]
        p, q = (x[others].view(len(z), -1).log_softmax(1) for x in (b, z))
        counts = b.softmax(1)[others].view(len(z), -1).sum(1) >= 1e-4
        kl.append((p.exp() * (p - q)).sum(1)[counts])
    return torch.cat(ce).mean(), torch.cat(kl).mean()


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    found = {n.replace("_orig_mod.", ""): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def trained_whole(base: Any) -> Any:
    """A copy of the base, every weight moved a little, and all trained."""
    torch.manual_seed(1)
    student = copy.deepcopy(base)
    for parameter in student.parameters():
        parameter.data += 0.2 * parameter.data.abs().mean() * torch.randn_like(parameter)
    return student


def adapted(base: Any, **config: Any) -> Any:
    torch.manual_seed(1)
    return get_peft_model(copy.deepcopy(base), lora(init_lora_weights=False, **config))


def saved_head(base: Any) -> Any:
    """A trained copy of the head, and LoRA elsewhere."""
    student = adapted(base, target_modules=["q_proj"], modules_to_save=["lm_head"])
    student.get_output_embeddings().weight.data.mul_(1.1)
    return student


HEADS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "LoRA on lm_head": (make_model, lambda base: adapted(base, target_modules=["q_proj", "lm_head"])),
    "saved lm_head": (make_model, saved_head),
    "tied": (lambda: make_model(tie_word_embeddings=True), trained_whole),
    "tied, LoRA on lm_head": (
        lambda: make_model(tie_word_embeddings=True),
        lambda base: adapted(base, target_modules=["q_proj", "lm_head"]),
    ),
    "bias": (lambda: make_family("Phi"), trained_whole),
    "soft-capped": (lambda: make_family("Gemma2"), trained_whole),
    "soft-capped, LoRA on lm_head": (
        lambda: make_family("Gemma2"),
        lambda base: adapted(base, target_modules=["q_proj", "lm_head"]),
    ),
    "divided": (lambda: make_family("Granite"), trained_whole),
    "multiplied": (lambda: make_family("Cohere"), trained_whole),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # PEFT, on merging
@pytest.mark.parametrize("head", HEADS)
def test_gradients_equal_those_of_dense_logits(head: str, tmp_path: Path) -> None:
    make, student_of = HEADS[head]
    base = make()
    samples = [Sample(s.token_ids % FAMILY_V, s.supervised, s.origin) for s in make_samples(5)]
    cache = make_exact_cache(tmp_path / "c", base, samples)
    student = student_of(base)
    ce, kl = dense_parts(student, base, samples)
    (ce + WEIGHT * kl).backward()
    expected = gradients_of(student)
    anchored = CachedLoss(cache, Objective(weight=WEIGHT, tokens_per_loss_chunk=7), check=False)
    found = anchored(student, pad_samples(samples))
    found.loss.backward()
    gradients = gradients_of(student)
    assert float(kl.detach()) > 1e-3 and float(found.kl) == pytest.approx(float(kl.detach()), rel=1e-3, abs=1e-6)
    assert float(found.ce) == pytest.approx(float(ce.detach()), rel=1e-5)
    assert gradients.keys() == expected.keys()
    assert any("lm_head" in name or "embed" in name for name in gradients)
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert scale > 0
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=2e-5 * max(scale, 1.0), msg=name)


@pytest.mark.parametrize("head", ["LoRA on lm_head", "saved lm_head"])
def test_trainer_trains_an_adapted_head_as_dense_logits_do(head: str, tmp_path: Path) -> None:
    make, student_of = HEADS[head]
    base, samples = make(), make_samples(6)
    cache = make_exact_cache(tmp_path / "c", base, samples)
    student = student_of(base)
    ce, kl = dense_parts(student, base, samples)
    (ce + WEIGHT * kl).backward()
    expected = gradients_of(student)
    trainer = CachedKLTrainer(
        model=student,
        args=arguments(
            tmp_path, remove_unused_columns=False, per_device_train_batch_size=3, gradient_accumulation_steps=2
        ),
        train_dataset=samples,
        data_collator=pad_samples,
        cache=cache,
        objective=Objective(weight=WEIGHT),
        check=False,
    )
    found = gradients_after_one_step(trainer)
    assert found.keys() == expected.keys() and any("lm_head" in name for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")  # as above
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # as above
@pytest.mark.parametrize("how", ["checkpointing", "reentrant checkpointing", "compiled", "accumulated", "looked up"])
def test_what_surrounds_a_model_leaves_its_gradient(how: str, tmp_path: Path) -> None:
    base, samples = make_model(), make_samples(6)
    cache = make_exact_cache(tmp_path / "c", base, samples)
    student = adapted(base, target_modules=["q_proj", "down_proj", "lm_head"])
    anchored = CachedLoss(cache, Objective(weight=WEIGHT), check=False)
    anchored(student, pad_samples(samples)).loss.backward()
    expected = gradients_of(student)
    batches = list(DataLoader(samples, 2 if how == "accumulated" else 6, collate_fn=anchored.collator(pad_samples)))  # type: ignore[arg-type]
    model = student
    if "checkpointing" in how:
        student.train()
        student.enable_input_require_grads()
        student.get_base_model().gradient_checkpointing_enable({"use_reentrant": how.startswith("reentrant")})
    elif how == "compiled":
        model = torch.compile(student, backend="aot_eager")
    elif how == "looked up":
        batches = [pad_samples(samples)]
    counts = torch.stack([anchored.count(batch) for batch in batches]).sum(0)
    assert counts.tolist()[0] == sum(len(s.positions) for s in samples)
    for batch in batches:
        anchored(model, batch, counts).loss.backward()
    found = gradients_of(student)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", ["LoRA on lm_head", "saved lm_head"])
def test_autocast_gradients_are_as_near_as_those_of_dense_logits(head: str, tmp_path: Path) -> None:
    """bfloat16 autocast, its first call checked: no further from float32 than the dense loss in the same precision."""
    make, student_of = HEADS[head]
    base, samples = make(), make_samples(6)
    cache = make_exact_cache(tmp_path / "c", base, samples)
    start, student = get_peft_model(copy.deepcopy(base), lora()), student_of(base)
    ce, kl = dense_parts(student, base, samples)
    (ce + WEIGHT * kl).backward()
    exact = gradients_of(student)
    with torch.autocast("cpu", torch.bfloat16):
        z = dense_parts(student, base, samples)
    (z[0] + WEIGHT * z[1]).backward()
    dense = gradients_of(student)
    anchored = CachedLoss(cache, Objective(weight=WEIGHT, tokens_per_loss_chunk=9))
    with torch.autocast("cpu", torch.bfloat16):
        first = anchored(start, pad_samples(samples))  # which checks step 0
        found = anchored(student, pad_samples(samples))
    first.loss.backward()
    assert all(g.any() for name, g in gradients_of(start).items() if "lora_B" in name)
    found.loss.backward()
    gradients = gradients_of(student)
    assert gradients.keys() == exact.keys()
    for name, gradient in exact.items():
        error, naive = ((g[name] - gradient).norm() / gradient.norm() for g in (gradients, dense))
        assert error < max(2 * naive, 0.02), name


# The scripts and the page


def load_script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def workplace(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, train.jsonl, cache/, and adapters that `logitcache train` makes of them."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "base").symlink_to(tiny_model)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text_rows(44)), encoding="utf-8")
    common = ["--model", str(folder / "base"), "--data", str(folder / "train.jsonl"), "--cache", str(folder / "cache")]
    assert run(["precompute", *common]) == 0
    for regularizer in ("masked-kl", "none"):
        out = ["--out", str(folder / regularizer), "--lr", "3e-3", "--regularizer", regularizer]
        assert run(["train", *common, *out]) == 0
    return folder


def run_script(name: str, workplace: Path, out: Path, *more: str) -> dict[str, torch.Tensor]:
    """The adapter that an example script makes."""
    flags = {"model": "base", "cache": "cache", "data": "train.jsonl"}
    load_script(name).main([*(f"--{k}={workplace / v}" for k, v in flags.items()), f"--out={out}", *more])
    adapter: dict[str, torch.Tensor] = load_file(out / "adapter_model.safetensors")
    return adapter


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")  # the scripts are for GPUs too
@pytest.mark.parametrize("script", ["transformers_trainer", "trl_sft", "own_loop"])
def test_example_script_trains_the_adapter_of_logitcache_train(script: str, workplace: Path, tmp_path: Path) -> None:
    found = run_script(script, workplace, tmp_path, "--lr=3e-3")
    expected, plain = (load_file(workplace / name / "adapter_model.safetensors") for name in ("masked-kl", "none"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
    assert max(float((plain[name] - expected[name]).abs().max()) for name in expected) > 1e-3  # the KL does something


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")
def test_trl_script_packs(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = run_script("trl_sft", workplace, tmp_path, "--packing")
    assert adapter and "'kl'" in capsys.readouterr().out


def test_the_page_runs(workplace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert [kind for kind, _ in blocks] == ["python"] * 6 + [""]
    for name in ("base", "cache"):
        (tmp_path / name).symlink_to(workplace / name)
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer()
    scope: dict[str, Any] = {
        "DataLoader": DataLoader,
        "SFTTrainer": SFTTrainer,
        "Trainer": Trainer,
        "collator": DataCollatorForSeq2Seq(tokenizer),
        "dataset": Dataset.from_list(text_rows(44)),
        "peft_config": lora(),
        "sft_config": SFTConfig("sft", use_cpu=True, bf16=False, report_to=[], max_steps=2, logging_steps=1),
        "tokenizer": tokenizer,
        "training_args": arguments(Path("trainer"), max_steps=2),
    }
    ids = [tokenizer(row["text"])["input_ids"] for row in text_rows(44)]
    scope["rows"] = [{"input_ids": i, "labels": i} for i in ids]
    for kind, code in blocks:
        if kind == "python":
            scope["model"] = make_model() if "SFTTrainer" in code else get_peft_model(make_model(), lora())
            exec(code, scope)
        else:
            assert run(shlex.split(code)[1:]) == 0
    assert "ce" in scope["trainer"].state.log_history[0] and float(scope["kl"]) < 1e-3
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (PAGE.parent / target).exists(), target
    for anchor in re.findall(r"\]\(#([^)]+)\)", text):
        assert anchor in {heading.lower().replace(" ", "-") for heading in re.findall(r"^## (.+)$", text, re.MULTILINE)}


def test_a_loop_outside_the_autocast_that_accelerate_switches_on_is_refused(cached: Cached) -> None:
    """accelerate's wrapper is the forward of a bare model, in place of which the loss is made."""
    samples, cache = cached
    AcceleratorState._reset_state(True)  # of a trainer before
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    try:
        model = accelerator.prepare_model(make_model())
        anchored, batch = CachedLoss(cache, Objective(weight=WEIGHT), check=False), pad_samples(samples[:2])
        with pytest.raises(TrainingFailed, match="expected autocast to be on, found it off"):
            anchored(model, batch)
        with accelerator.autocast():
            half = anchored(model, batch).loss
    finally:
        AcceleratorState._reset_state(True)
    whole = anchored(make_model(), batch).loss
    assert 1e-5 < abs(float((half / whole).detach()) - 1) < 0.02
