"""Every kind of adapter with its settings, as tests of adapters share them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model_state_dict
from support.tiny_runs import make_base, make_samples
from torch import Tensor
from transformers import TrainerCallback

from logitcache.adapters.attach import AdapterSettings
from logitcache.adapters.null_space import NullSpaceSettings, compute_null_space
from logitcache.adapters.registry import (
    KINDS,
)
from logitcache.adapters.settings import VARIANTS
from logitcache.data.samples import Sample

RANK = 4


CASES = [
    *((kind, "v1") for kind in KINDS),
    *(("lora-null", variant) for variant in VARIANTS[1:]),
    ("oft", "exact"),
]
"""Kinds, and what one kind alone has beside its first form."""


IDS = [kind if variant == "v1" else f"{kind}-{variant}" for kind, variant in CASES]


SAMPLES = make_samples(64)


@pytest.fixture(scope="module")
def null_space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter-null") / "n"
    compute_null_space(make_base(), SAMPLES, NullSpaceSettings(rank=RANK)).save(folder)
    return folder


def settings_of(kind: str, variant: str, null_space: Path, **changes: Any) -> AdapterSettings:
    own = {"nullspace": str(null_space), "variant": variant} if kind == "lora-null" else {}
    own |= {"cayley": variant} if variant == "exact" else {}
    return sized(kind, **own, **changes)


def sized(kind: str, size: int = RANK, **changes: Any) -> AdapterSettings:
    """Settings of this rank, or of blocks as large for the kind that has no rank."""
    own = {"block_size": size} if kind == "oft" else {"rank": size}
    return AdapterSettings(kind, **{**own, **changes})  # type: ignore[arg-type]


@torch.no_grad()
def logits(model: Any, samples: list[Sample] | None = None) -> Tensor:
    """[N, V] of some samples one after the other."""
    parts = [torch.from_numpy(s.token_ids.astype(np.int64))[None] for s in samples or SAMPLES[:6]]
    return torch.cat([model(input_ids=ids).logits[0] for ids in parts])


class Keep(TrainerCallback):
    """Keeps what the trained model computes, and stops it as by ctrl-c at the end of a step."""

    def __init__(self, stop_at: int = 0) -> None:
        self.stop_at, self.logits = stop_at, torch.zeros(0)
        self.weights: dict[str, Tensor] = {}
        self.factors: list[dict[str, Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights = {n: p.detach().clone() for n, p in kwargs["model"].named_parameters() if "base_layer" in n}
        self._keep_factors(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.stop_at:
            raise KeyboardInterrupt

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.logits = logits(kwargs["model"].eval())
        self._keep_factors(kwargs["model"])

    def _keep_factors(self, model: Any) -> None:
        """Before the first step and after the last one."""
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
        self.factors.append({name: factor.detach().clone() for name, factor in state.items()})
