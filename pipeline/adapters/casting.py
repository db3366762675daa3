"""The input of an adapter's layer: cast to the adapter's float32 by PEFT, but not under autocast.

Autocast would cast it back to 16 bits, and keep that copy for the backward of every adapted layer, though query, key
and value read one input. The numbers are the same to the last bit. DoRA is cast as ever: it takes the norms of W + s B
A in the format of its input, so that without autocast, as it is used, it would be another model. Must not know the
trainer.
"""

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


class _UnlessAutocast:
    """What PEFT asks at each call whether to cast: true where autocast will not."""

    def __bool__(self) -> bool:
        return not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"))


def cast_outside_autocast(adapted: nn.Module) -> None:
    """From here on an adapter's layers, but DoRA's, take their input as it is wherever autocast is on."""
    for module in adapted.modules():
        if len(getattr(module, "lora_magnitude_vector", ())):
            continue
        if isinstance(module, BaseTunerLayer) and hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = _UnlessAutocast()
