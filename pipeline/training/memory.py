"""What a training step takes, in bytes, reckoned from the config alone, before any weight is read.

Owns the parts of the sum: weights, adapter, gradients and AdamW's state by counting parameters; what is kept for the
backward by a forward without memory (`models.without_weights`); the output head by the size of a slice. Not in it: what
a kernel needs for a moment, what an allocator leaves unused, CUDA's context (about .5 GiB). Must not load weights, nor
know the trainer.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from logitcache.adapters.attach import attach, check_whole_modules, target_layers
from logitcache.adapters.registry import KINDS, NO_ADAPTER
from logitcache.adapters.settings import AdapterSettings
from logitcache.errors import InvalidSettings
from logitcache.losses.fused import LOSS_SLICE_BYTES
from logitcache.losses.kernels.choice import num_rows
from logitcache.models.checkpointing import checkpoint_layers
from logitcache.models.head import body_of, causal_lm_of, logits_width
from logitcache.models.without_weights import bytes_kept, from_config

from .settings import TrainSettings
from .trainer_settings import ADAMW, TrainerSettings

BYTES_PACKED = {"8bit": 1.0, "4bit": 0.5 + 1 / 64}
"""Of a weight with its scales; one of 4 bits shares a byte with 64 others."""


_OF_FEWER_BITS = ("adamw_torch_4bit", "adamw_torch_8bit")


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step, and what they are of."""

    #: Parameters of the base.
    num_weights: int
    #: Those that are trained, which are float32.
    num_trained: int
    #: The base's weights as they are held; none of those that are trained.
    weights: int
    #: What is trained.
    trained: int
    #: Of all that is trained.
    gradients: int
    #: AdamW's two moments.
    optimizer: int
    #: The Fisher information of ewc, a float32 of each adapted weight; else 0.
    fisher: int
    #: Tokens of the largest micro-batch: rows, and columns of each.
    rows: int
    width: int
    #: Tokens of the anchors that may go with it.
    anchor_tokens: int
    #: Kept for the backward of all of these, without checkpointed layers.
    kept: int
    #: The same with them: the inputs of all layers, and all that one of them keeps while it is run again; of a family
    #: that cannot have them as without.
    kept_checkpointed: int
    #: A slice of the loss: its logits, what is made of them, and the gradient of all hidden states.
    head: int
    #: Whether the run checkpoints its layers.
    checkpointed: bool

    @property
    def said(self) -> str:
        """All of it in a sentence, without its full stop."""
        kept = self.kept_checkpointed if self.checkpointed else self.kept
        tokens = f"{self.rows} x {self.width:,} tokens" + (f" and {self.anchor_tokens:,}" if self.anchor_tokens else "")
        parts = f"{_gib(self.weights)} of weights, {_gib(self.held - self.weights)} of what is trained with its state, "
        parts += f"{_gib(kept)} kept of {tokens} and {_gib(self.head)} of the output head: {_gib(self.total)}"
        return parts if self.checkpointed else f"{parts}, or {_gib(self.total_with)} with --gradient-checkpointing"

    @property
    def held(self) -> int:
        """What is there whatever the batch."""
        return self.weights + self.trained + self.gradients + self.optimizer + self.fisher

    @property
    def total(self) -> int:
        """All of it, as the run is set."""
        return self.total_with if self.checkpointed else self.total_without

    @property
    def total_without(self) -> int:
        """All of it without checkpointed layers."""
        return self.held + self.kept + self.head

    @property
    def total_with(self) -> int:
        """All of it with them."""
        return self.held + self.kept_checkpointed + self.head


def step_memory(
    config: Any,
    dtype: torch.dtype,
    adapter: AdapterSettings,
    settings: TrainSettings,
    max_length: int,
    *,
    load_in: str | None = None,
    device: str = "cuda",
    anchor_tokens: int = 0,
    with_fisher: bool = False,
    attention: str | None = None,
) -> StepMemory:
    """What a step of a run takes. config: transformers' of the base; dtype: of its weights. max_length: tokens of the
    longest sample. load_in: a row of `quantization.LOAD_IN`. device: its kind, which says how large a slice is.
    anchor_tokens: of all anchors of a step, which are kept beside the micro-batch. with_fisher: whether ewc holds what
    is adapted. attention: how it is computed; eager keeps every weight of it, all others none.

    Raises what attaching the adapter raises.
    """
    rows, width = largest_micro_batch(settings, max_length)
    plain = _student(config, dtype, adapter, "eager" if attention == "eager" else None)
    causal_lm: PreTrainedModel = causal_lm_of(plain)
    trained = [p for p in plain.parameters() if p.requires_grad]
    num_trained = sum(p.numel() for p in trained)
    autocast, body = dtype == torch.bfloat16, body_of(causal_lm)
    per_head = _head_bytes(causal_lm, rows * width, dtype, device)
    share = 1 + anchor_tokens / (rows * width)
    kept = round(share * bytes_kept(plain, body, rows, width, autocast))
    one_more = kept // max(_num_layers(config), 1)
    checkpointable = bool(getattr(causal_lm, "supports_gradient_checkpointing", False))
    if checkpointable:
        checkpoint_layers(plain)
    inputs = round(share * bytes_kept(plain, body, rows, width, autocast)) + one_more if checkpointable else kept
    whole = adapter.kind == NO_ADAPTER
    return StepMemory(
        num_weights=sum(p.numel() for p in plain.parameters()) - (0 if whole else num_trained),
        num_trained=num_trained,
        weights=0 if whole else _weight_bytes(plain, load_in),
        trained=4 * num_trained,
        gradients=4 * num_trained,
        optimizer=8 * num_trained,
        fisher=4 * _num_adapted(causal_lm, adapter) if with_fisher else 0,
        rows=rows,
        width=width,
        anchor_tokens=anchor_tokens,
        kept=kept,
        kept_checkpointed=inputs,
        head=per_head,
        checkpointed=settings.gradient_checkpointing,
    )


def check_reckonable(trainer: TrainerSettings) -> None:
    """Raise `InvalidSettings` for an optimizer whose state is not AdamW's two moments."""
    chosen = trainer.fields.get("optim", ADAMW)
    if not chosen.startswith(ADAMW) or chosen in _OF_FEWER_BITS:
        raise InvalidSettings(
            f"--plan with --set optim={chosen}: it reckons with AdamW's two moments, 8 bytes of what is trained. Leave "
            "--set optim out here, and count this optimizer's own bytes instead of those."
        )


def largest_micro_batch(settings: TrainSettings, max_length: int) -> tuple[int, int]:
    """Rows and columns of a micro-batch of samples that are all as long as the longest."""
    return max(1, min(settings.batch_tokens // max_length, settings.batch_size)), max_length


def _num_adapted(causal_lm: PreTrainedModel, adapter: AdapterSettings) -> int:
    """Weights below the adapter."""
    layers = (m for m in causal_lm.modules() if isinstance(m, BaseTunerLayer))
    return 0 if adapter.kind == NO_ADAPTER else sum(layer.get_base_layer().weight.numel() for layer in layers)


def _student(config: Any, dtype: torch.dtype, adapter: AdapterSettings, attention: str | None) -> nn.Module:
    """What is trained, on the meta device, in training mode."""
    model = from_config(config, dtype, attention)
    student: nn.Module = model
    if adapter.kind == NO_ADAPTER:
        student.to(torch.float32).requires_grad_(True)
    else:
        kind = KINDS[adapter.kind]
        as_lora = kind.decomposes or kind.needs_samples  # whose first values are made of weights; the shapes are LoRA's
        check_whole_modules(model, target_layers(model, adapter), adapter)
        settings = replace(AdapterSettings(), **_shape_of(adapter)) if as_lora else adapter
        student = attach(model, settings, "")
    student.train()
    return student


def _shape_of(adapter: AdapterSettings) -> dict[str, Any]:
    """What LoRA has of the settings of a kind like it."""
    names = ("rank", "alpha", "dropout", "target_modules", "modules_to_save")
    return {name: getattr(adapter, name) for name in names}


def _weight_bytes(student: nn.Module, load_in: str | None) -> int:
    """Of what is frozen, packed where it is a linear layer below an adapter, or would be without one."""
    frozen = {id(p): p for p in student.parameters() if not p.requires_grad}
    total = sum(p.numel() * p.element_size() for p in frozen.values())
    if load_in is None:
        return total
    head = causal_lm_of(student).get_output_embeddings()
    linear = [m.weight for m in student.modules() if isinstance(m, nn.Linear) and m is not head]
    packed = [w for w in linear if id(w) in frozen]
    return int(total + sum(w.numel() * (BYTES_PACKED[load_in] - w.element_size()) for w in packed))


def _head_bytes(causal_lm: PreTrainedModel, num_positions: int, dtype: torch.dtype, device: str) -> int:
    """Of a slice: float32 logits, and in 16 bits those that the head made, or these alone of the larger slices that
    kernels have, whichever is more; and of all positions the hidden states that the head is given and their gradient.
    """
    vocab = logits_width(causal_lm)
    num_bytes = LOSS_SLICE_BYTES.get(device, LOSS_SLICE_BYTES["cuda"])
    rows = min(num_positions, max(1, num_bytes // (4 * vocab)))
    width = causal_lm.get_output_embeddings().weight.shape[1]
    each = 2 if dtype in (torch.bfloat16, torch.float16) else 0
    by_kernels = min(num_positions, num_rows(num_bytes, vocab, dtype)) * vocab * dtype.itemsize
    of_slice = max(rows * vocab * (4 + each), by_kernels if device == "cuda" else 0)
    return int(of_slice + 2 * num_positions * width * (each or 4))


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"


def _num_layers(config: Any) -> int:
    return int(getattr(config.get_text_config(), "num_hidden_layers", 1))
