"""Trainers, loops and batches of users, as tests of the plug-ins share them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import (
    LoraConfig,
    PeftModel,
)
from support.tiny_model import make_model, make_tokenizer
from support.tiny_runs import V, make_cache, make_samples
from transformers import (
    DataCollatorForSeq2Seq,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from logitcache.capture.settings import CaptureSettings
from logitcache.capture.worker import precompute
from logitcache.data.samples import Sample
from logitcache.models.loading import Base, Source
from logitcache.storage import LogitCache, ModelIdentity
from logitcache.training.trainer import CachedKL

Cached = tuple[list[Sample], LogitCache]

ON_A_CPU: dict[str, Any] = {
    "bf16": False,
    "use_cpu": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
}
"""Arguments of a trainer of TRL's that computes in float32, logs every step, and leaves no files."""


class CachedSFTTrainer(CachedKL, SFTTrainer):
    """As a user would write it."""


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Cached:
    samples = make_samples()
    return samples, make_cache(tmp_path_factory.mktemp("plug-in") / "c", samples)


def rows_of(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Rows of `input_ids` and `labels`."""
    ids = [s.token_ids.astype(np.int64) for s in samples]
    return [
        {"input_ids": i.tolist(), "labels": np.where(s.supervised, i, -100).tolist()}
        for i, s in zip(ids, samples, strict=True)
    ]


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes})


def make_sft(out: Path, data: Any, cache: Any, model: Any = None, **changes: Any) -> CachedSFTTrainer:
    """A trainer of one step over all rows; `changes` are of SFTConfig, or of the trainer where that knows the name."""
    names = ("objective", "check", "peft_config", "processing_class", "compute_loss_func", "eval_dataset", "callbacks")
    names += ("fill", "capture")
    of_trainer = {name: changes.pop(name) for name in names if name in changes}
    if not isinstance(model, PeftModel):
        of_trainer = {"peft_config": lora(), **of_trainer}
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "per_device_train_batch_size": 16,
        "max_steps": 1,
        "max_length": 64,
        "learning_rate": 1e-2,
        **ON_A_CPU,
    }
    return CachedSFTTrainer(
        cache=cache,
        model=make_model() if model is None else model,
        args=SFTConfig(**{**settings, **changes}),
        train_dataset=Dataset.from_list(rows_of(data)) if isinstance(data, list) else data,
        **{"processing_class": make_tokenizer(), **of_trainer},
    )


def logs_of(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "ce" in entry]


def on_the_left(rows: Sequence[Any], *, counted: bool = False) -> dict[str, Any]:
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    batch = dict(DataCollatorForSeq2Seq(tokenizer)([{**r, "attention_mask": [1] * len(r["input_ids"])} for r in rows]))
    if counted:
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).masked_fill(batch["attention_mask"] == 0, 1)
    return batch


def packed_by_hand(rows: Sequence[Any]) -> dict[str, Any]:
    """Several rows of several documents, with padding after them, as no mask but the position_ids say."""
    halves = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    width = 3 + max(sum(len(r["input_ids"]) for r in half) for half in halves)
    batch = {name: torch.zeros(2, width, dtype=torch.int64) for name in ("input_ids", "labels", "position_ids")}
    batch["labels"] -= 100
    for i, half in enumerate(halves):
        at = 0
        for row in half:
            n = len(row["input_ids"])
            for name in ("input_ids", "labels"):
                batch[name][i, at : at + n] = torch.tensor(row[name])
            batch["position_ids"][i, at : at + n] = torch.arange(n)
            at += n
    return batch


def trl(rows: Sequence[Any], **options: Any) -> dict[str, Any]:
    batch: dict[str, Any] = DataCollatorForLanguageModeling(pad_token_id=0, **options)(list(rows))
    return batch


def mixture() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=V, **sizes, **heads, num_experts=4, num_experts_per_tok=2))


def arguments(out: Path, **changes: Any) -> TrainingArguments:
    settings = {"per_device_train_batch_size": 16, "max_steps": 1, "use_cpu": True, "save_strategy": "no"}
    settings |= {"report_to": [], "disable_tqdm": True, "logging_steps": 1}
    return TrainingArguments(str(out), **{**settings, **changes})


def make_exact_cache(path: Path, model: Any, samples: Sequence[Sample]) -> LogitCache:
    """Every alternative in float32, so that nothing is left for the tail."""
    vocab_size = model.config.vocab_size
    settings = CaptureSettings(top_k=vocab_size - 1, max_length=64, precision="exact")
    base = Base(Source("tiny", path), model, ModelIdentity("a" * 32, "{}", vocab_size, "float32", "sdpa"))
    precompute(base, samples, path, settings)
    return LogitCache.open(path)
