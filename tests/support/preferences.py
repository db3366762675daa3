"""Preference data and TRL's trainers of them, on a tiny base on disk, with what each step was recorded."""

from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from support.plug_ins import ON_A_CPU
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaModel
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from logitcache import CachedReference


class Recorded:
    """Keeps the loss of every micro-batch."""

    losses: list[float]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)  # type: ignore[misc]
        self.losses = [*getattr(self, "losses", []), float(loss.detach())]
        return loss


class PlainDPO(Recorded, DPOTrainer):
    """With the reference that TRL runs."""


class PlainKTO(Recorded, KTOTrainer):
    """With the reference that TRL runs."""


class CachedDPO(Recorded, CachedReference, DPOTrainer):
    """As a user would write it."""


class CachedKTO(Recorded, CachedReference, KTOTrainer):
    """As a user would write it."""


def text_pairs(count: int = 8) -> Dataset:
    """prompt, chosen, rejected; lengths differ."""
    return Dataset.from_list(
        [
            {"prompt": f"{i} is ", "chosen": "abc " * (1 + i % 3), "rejected": f"not {i * 7} " * (1 + i % 2)}
            for i in range(count)
        ]
    )


def chat_pairs(count: int = 8) -> Dataset:
    """The same as chats."""

    def turn(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    return Dataset.from_list(
        [
            {
                "prompt": turn("user", f"What is {i}?"),
                "chosen": turn("assistant", f"It is {i} " * (1 + i % 3)),
                "rejected": turn("assistant", "Who knows"),
            }
            for i in range(count)
        ]
    )


def adapter(rank: int = 8, **changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes})


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def make(kind: Any, folder: Path, out: Path, data: Dataset, cache: Any = None, **changes: Any) -> Any:
    """A trainer of this kind; changes are of its config, or its own where that is what they are."""
    names = ("model", "peft_config", "eval_dataset", "ref_model", "data_collator")
    names += ("rules", "check", "fill", "capture")
    of_trainer = {name: changes.pop(name) for name in names if name in changes}
    is_cached = issubclass(kind, CachedReference)
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        **ON_A_CPU,
        "precompute_ref_log_probs": is_cached,
    }
    config = KTOConfig if issubclass(kind, KTOTrainer) else DPOConfig
    given = {"model": load(folder), "peft_config": adapter(), **of_trainer}
    if is_cached:
        given["cache"] = cache
    return kind(
        args=config(**{**settings, **changes}),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(folder),
        **given,
    )


class Forwards:
    """Counts how often the body of a Llama is run, and how often without an adapter or with it off."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.num, self.num_of_base = 0, 0
        original = LlamaModel.forward

        @wraps(original)
        def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
            layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
            self.num += 1
            self.num_of_base += not layers or any(layer.disable_adapters for layer in layers)
            return original(model, *args, **kwargs)

        patch.setattr(LlamaModel, "forward", forward)
