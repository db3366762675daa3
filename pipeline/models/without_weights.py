"""A model without its weights: its modules from the config alone, and what a forward of it would keep.

Owns that nothing of it takes memory: parameters are on the meta device, and become fakes on a CPU for a forward, which
chooses its kernels as a real one does. Must not know adapters, losses or trainers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, PreTrainedModel


def from_config(config: Any, dtype: torch.dtype, attention: str | None = None) -> PreTrainedModel:
    """The model of a config, on the meta device. attention: how it is computed; None: as transformers chooses."""
    chosen = {} if attention is None else {"attn_implementation": attention}
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, **chosen)
    return model


def bytes_kept(model: nn.Module, body: nn.Module, rows: int, width: int, autocast: bool) -> int:
    """Bytes that autograd keeps of a forward of [rows, width] tokens, each storage once, beside what the model holds.

    model: on the meta device, in the mode (training, with checkpointed layers or not) that is asked about; body: the
    part of it that makes hidden states. autocast: to bfloat16.
    """
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)  # which keeps the storage, and so its address
        return tensor

    with faked(model):
        ids, mask = (torch.ones(rows, width, dtype=torch.int64) for _ in range(2))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), saved_tensors_hooks(pack, lambda t: t):
            found = body(input_ids=ids, attention_mask=mask, use_cache=False)
        own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        del found
    return sum(tensor.untyped_storage().nbytes() for storage, tensor in kept.items() if storage not in own)


@contextmanager
def faked(model: nn.Module) -> Iterator[None]:
    """Within, what is computed has shapes and no numbers, and so have the parameters and buffers, tied ones once."""
    with FakeTensorMode():
        restore = _with_fakes(model)
        try:
            yield
        finally:
            restore()


def _with_fakes(model: nn.Module) -> Callable[[], None]:
    """Put a fake in the place of every parameter and buffer; what puts them back."""
    fakes: dict[int, Tensor] = {}
    before: list[tuple[dict[str, Any], str, Tensor]] = []
    for module in model.modules():
        all_held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for held in all_held:
            for name, tensor in held.items():
                if tensor is not None:
                    before.append((held, name, tensor))
    for held, name, tensor in before:
        if id(tensor) not in fakes:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype)
            fakes[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
        held[name] = fakes[id(tensor)]

    def restore() -> None:
        for held, name, tensor in before:
            held[name] = tensor

    return restore
