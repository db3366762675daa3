"""Trainers with a cache that fills itself, on a tiny base on disk, and what `precompute` makes of the same samples."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from support.plug_ins import arguments, lora, make_sft, rows_of
from support.tiny_runs import make_samples
from transformers import AutoModelForCausalLM, AutoTokenizer

from logitcache.capture.settings import CaptureSettings
from logitcache.capture.worker import precompute
from logitcache.data.batches import pad_samples
from logitcache.data.samples import Sample
from logitcache.training.fill import FILLED
from logitcache.training.trainer import CachedKLTrainer

SAMPLES = make_samples()
SMALL: dict[str, Any] = {"shard_positions": 40, "batch_tokens": 64}
"""Several shards of them."""


def load(folder: Path, dtype: str = "float32", **how: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **how)


def make_trainer(out: Path, folder: Path, cache: Any, samples: Sequence[Sample] = SAMPLES, **changes: Any) -> Any:
    """An SFTTrainer over rows of tokens, as `make_sft` makes it, with a cache that fills itself."""
    given = {"model": None, "processing_class": AutoTokenizer.from_pretrained(folder), "fill": True, **changes}
    model = given.pop("model")
    return make_sft(out, list(samples), cache, load(folder) if model is None else model, **given)


def plain_trainer(folder: Path, model: Any) -> CachedKLTrainer:
    """transformers' own, of samples, with no tokenizer."""
    args = arguments(folder / "o", remove_unused_columns=False)
    data: dict[str, Any] = {"train_dataset": SAMPLES, "data_collator": pad_samples}
    return CachedKLTrainer(cache=folder / "c", fill=True, model=model, args=args, **data)


def precomputed(folder: Path, samples: Sequence[Sample], path: Path, **settings: Any) -> Path:
    """What `precompute` makes of the same token ids in a file."""
    data = path.with_suffix(".jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows_of(samples)), encoding="utf-8")
    precompute(str(folder), str(data), path, CaptureSettings(**settings), data_name=FILLED)
    return path


def moved(model: Any) -> Any:
    """Some steps of LoRA."""
    adapted = get_peft_model(model, lora())
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(1e-2 * torch.randn_like(parameter).sign())
    return adapted


def padded(rows: Sequence[Any]) -> dict[str, torch.Tensor]:
    ids = [np.array(row["input_ids"], dtype=np.uint32) for row in rows]
    masks = [np.array(row["labels"]) != -100 for row in rows]
    return pad_samples([Sample(i, m, "row") for i, m in zip(ids, masks, strict=True)])
