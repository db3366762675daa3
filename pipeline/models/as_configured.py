"""Do the modules of a model in memory compute what its configuration says? Held against fresh ones without weights.

Owns what neither weights nor configuration show: an epsilon or a scale set by hand, and buffers that no checkpoint has,
such as the rotary frequencies that `model.half()` rounds, and `from_pretrained(dtype=...)` does not. Must not know
caches. Trade-off: numbers and buffers; a forward that was replaced is not seen.
"""

import copy
import re
from collections.abc import Iterator

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .weights_in_memory import without_wrappers

_TRAINING_ONLY = re.compile("drop")
"""In the names of numbers that evaluation mode ignores."""

_RELATIVE = 1e-5
"""By which a buffer may differ, as one does that was computed on another device."""


def unlike_configured(causal_lm: PreTrainedModel) -> list[str]:
    """Which numbers and buffers of its modules are others than in a fresh model of its configuration, a phrase each."""
    with init_empty_weights(include_buffers=False):
        fresh = AutoModelForCausalLM.from_config(copy.deepcopy(causal_lm.config), dtype=causal_lm.dtype)
    here = {without_wrappers(name): module for name, module in causal_lm.named_modules()}  # the innermost of a name
    found = []
    for name, module in fresh.named_modules():
        ours = here.get(name)
        found += [name] if ours is None else [f"{name}.{said}".lstrip(".") for said in _unlike(module, ours)]
    return found


def _unlike(module: nn.Module, ours: nn.Module) -> Iterator[str]:
    for field, value in vars(module).items():
        number = isinstance(value, float) and not isinstance(module, nn.Dropout) and not _TRAINING_ONLY.search(field)
        if number and vars(ours).get(field) != value:
            yield f"{field}: {value:g} by its configuration, {vars(ours).get(field)} in memory"
    for field in sorted(module._non_persistent_buffers_set):
        buffer, mine = module._buffers[field], ours._buffers.get(field)
        if buffer is not None and not (mine is not None and _is_same(buffer, mine)):
            yield f"{field}, a buffer that no checkpoint has"


def _is_same(buffer: Tensor, ours: Tensor) -> bool:
    if (buffer.dtype, buffer.shape) != (ours.dtype, ours.shape):
        return False
    if not buffer.is_floating_point():
        return torch.equal(buffer, ours.cpu())
    return torch.allclose(buffer, ours.cpu(), rtol=_RELATIVE, atol=0.0)
