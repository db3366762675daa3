"""What `train --plan` reckons against what is counted in a real step: kept for the backward, and the peak of all.

Owns docs/benchmarks/train_plan.csv. A whole step is run: a model of the shape in bfloat16, LoRA of rank 16 on all its
layers, the loss in the head, backward, AdamW. Kept: each storage once, by autograd's own hooks around the body. Peak:
all storages that are alive at once, by a dispatch mode that sees every tensor that is made, in forward and backward. A
row is of real tensors on a CPU, or of a shape that does not fit there of tensors without numbers (torch's fakes), which
go through the same code of model, head and loss. Nothing in it is a time.

    python scripts/table_train_plan.py                 writes the table: some minutes on two idle cores
    python scripts/table_train_plan.py --only 7B       cases with this in their names, printed
"""

from __future__ import annotations

import argparse
import csv
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from bench_common import BENCHMARKS
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from logitcache import AdapterSettings, Objective, TrainSettings
from logitcache.adapters.attach import attach
from logitcache.data.batches import pad_samples
from logitcache.data.samples import Sample
from logitcache.models.checkpointing import checkpoint_layers
from logitcache.models.head import body_of, causal_lm_of
from logitcache.models.without_weights import faked
from logitcache.pairing.targets import CachedCollator
from logitcache.training.batch_loss import batch_loss
from logitcache.training.memory import StepMemory, step_memory

OUT = BENCHMARKS / "train_plan.csv"
QWEN = {
    **{"vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14},
    **{"num_key_value_heads": 2, "tie_word_embeddings": True},
}
QWEN_7B = {
    **{"vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944, "num_attention_heads": 28},
    **{"num_key_value_heads": 4, "tie_word_embeddings": False},
}


@dataclass(frozen=True)
class Case:
    """A shape, and how much of it is run."""

    name: str
    config: dict[str, Any]
    layers: int
    rows: int
    width: int
    real: bool


CASES = (
    Case("Qwen2.5-0.5B, 4 of its layers", QWEN, 4, 2, 64, real=True),
    Case("Qwen2.5-0.5B", QWEN, 24, 2, 1024, real=False),
    Case("Qwen2.5-7B", QWEN_7B, 28, 2, 1024, real=False),
)


@dataclass(frozen=True)
class Row:
    """A line of the table; bytes."""

    shape: str
    tensors: str
    tokens: str
    checkpointed: bool
    kept_planned: int
    kept_counted: int
    kept_ratio: float
    peak_planned: int
    peak_counted: int
    peak_ratio: float


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that are alive, and their peak since it was reset."""

    def __init__(self, there: Sequence[Tensor]) -> None:
        super().__init__()
        self._known: set[int] = set()
        self.alive = self.peak = 0
        self.add(*there)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return found

    def add(self, *tensors: Tensor) -> None:
        """Storages that are there."""
        for storage in (tensor.untyped_storage() for tensor in tensors):
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known:
                self._known.add(key)
                self.alive += size
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


@contextmanager
def counting_kept(model: nn.Module, found: list[int]) -> Iterator[None]:
    """Within, what autograd keeps is counted, each storage once, beside what the model holds."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
    found.append(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))


def config_of(case: Case) -> Any:
    """transformers' configuration."""
    sizes = {"max_position_embeddings": 32_768, "num_hidden_layers": case.layers, **case.config}
    return AutoConfig.for_model("qwen2", **sizes)


@torch.no_grad()
def student_of(case: Case, checkpointed: bool) -> Any:
    """The model with its adapter, on the meta device, or its weights one small number: nothing depends on values."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(case), dtype=torch.bfloat16)
    if case.real:
        model = model.to_empty(device="cpu")
        model.tie_weights()
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(0.01)
    student = attach(model, AdapterSettings(), "").train()
    if checkpointed:
        checkpoint_layers(student)
    return student


def batch_of(case: Case) -> dict[str, Any]:
    """Rows of the width, the last one a little shorter, so that there is padding."""
    lengths = [case.width] * (case.rows - 1) + [case.width - 3]
    ids = [np.arange(n, dtype=np.uint32) % 1000 for n in lengths]
    samples = [Sample(i, np.ones(len(i), dtype=np.bool_), "random") for i in ids]
    return CachedCollator(pad_samples, None)(samples)


def counted(case: Case, checkpointed: bool) -> tuple[int, int]:
    """Kept, and the peak of a step."""
    student, batch = student_of(case, checkpointed), batch_of(case)
    with nullcontext() if case.real else faked(student):
        if not case.real:
            batch = {name: torch.ones(t.shape, dtype=t.dtype) for name, t in batch.items()}
        return step(student, batch)


def step(student: Any, batch: dict[str, Any]) -> tuple[int, int]:
    """The step, with what a step before it has left: gradients and AdamW's state."""
    kept: list[int] = []
    with torch.autocast("cpu", torch.bfloat16), counting_kept(student, kept):
        body = body_of(causal_lm_of(student))
        body(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    live = LiveBytes([*student.parameters(), *student.buffers(), *(p.grad for p in trained)])
    for state in optimizer.state.values():
        live.add(state["exp_avg"], state["exp_avg_sq"])
    with live:
        with torch.autocast("cpu", torch.bfloat16):
            loss = batch_loss(student, batch, Objective("none"), 0.0, None, scale=1 / len(batch["base_rows"])).loss
        loss.backward()
        optimizer.step()
    return kept[0], live.peak


def planned(case: Case, checkpointed: bool) -> StepMemory:
    """As `train --plan` has it."""
    settings = TrainSettings(
        batch_size=case.rows, batch_tokens=case.rows * case.width, gradient_checkpointing=checkpointed
    )
    return step_memory(config_of(case), torch.bfloat16, AdapterSettings(), settings, case.width, device="cpu")


def row_of(case: Case, checkpointed: bool) -> Row:
    """One line."""
    kept, peak = counted(case, checkpointed)
    plan = planned(case, checkpointed)
    one = plan.kept // case.layers  # the layer that is run again is in the peak alone
    expected = (plan.kept_checkpointed - one) if checkpointed else plan.kept
    return Row(
        *(case.name, "on a CPU" if case.real else "without numbers", f"{case.rows} x {case.width}", checkpointed),
        *(expected, kept, round(expected / kept, 3)),
        *(plan.total, peak, round(plan.total / peak, 3)),
    )


def main() -> None:
    """The table."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--only", default="", help="cases with this in their names, printed")
    args = arguments.parse_args()
    torch.set_num_threads(1)
    rows = []
    for case in (case for case in CASES if args.only in case.name):
        for checkpointed in (False, True):
            rows.append(row_of(case, checkpointed))
            print(rows[-1], flush=True)
    if args.only:
        return
    with OUT.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


if __name__ == "__main__":
    main()
