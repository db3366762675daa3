"""A model held in 4 bits by bitsandbytes, and the same weights as floats again, for an oracle."""

import tempfile
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
"""A test of a quantised base: the extra `test` installs it."""


def quantised(model: Any, storage: torch.dtype = torch.uint8) -> Any:
    """The model as transformers loads it in 4 bits on a CPU. storage: the dtype that packed weights are shown in."""
    from transformers import BitsAndBytesConfig

    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=storage,
    )
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)  # of a group of processes, save_pretrained would write on the first alone
        save_file(model.state_dict(), f"{folder}/model.safetensors", metadata={"format": "pt"})
        return (
            type(model)
            .from_pretrained(folder, quantization_config=how, device_map={"": "cpu"}, dtype=torch.float32)
            .eval()
        )


def dequantised(model: Any) -> Any:
    """The model with the weights that it computes with, float32."""
    from bitsandbytes import functional

    for name, layer in list(model.named_modules()):
        if type(layer).__name__ == "Linear4bit":
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
            plain.weight.data = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
            model.set_submodule(name, plain.requires_grad_(False))
    model.hf_quantizer, model.is_quantized = None, False
    return model
