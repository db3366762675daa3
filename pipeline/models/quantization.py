"""Quantised weights: of a checkpoint, or quantised by bitsandbytes while it is loaded, below an adapter (QLoRA).

Owns what transformers and bitsandbytes are told, telling such a model from others, and the names of formats, whichever
engine runs the model. A cache says how its base was held; how far a model that is held otherwise is from it is what
step 0 measures (`pairing.step_zero`). Which adapters may stand on such weights is in `adapters.registry`. Why
bitsandbytes: torchao's 4-bit formats need a GPU (docs/log.md).
"""

from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from logitcache.errors import InputNotFound, UnsupportedModel, install_line, release_of

LOAD_IN = ("8bit", "4bit")
"""8bit: LLM.int8(), arXiv 2208.07339. 4bit: NormalFloat with quantised constants, as QLoRA, arXiv 2305.14314."""

BLOCK = 64
"""Weights that share a scale, in 4 bits."""

SETTINGS_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Where ModelOpt, AutoGPTQ and AutoAWQ say how a checkpoint is quantised, if config.json does not."""

GRADIENT_TOLERANCE = 0.2
"""Of a step along it, relative: 8-bit layers round their inputs too. Without a gradient the error is 1."""


def quantization(load_in: str, dtype: torch.dtype, name: str) -> Any:
    """transformers' configuration for `load_in`. dtype: what 4-bit weights are multiplied in; name: for messages.

    Raises `InputNotFound` where bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise InputNotFound(
            f"loading model {name!r} in {load_in}: expected the package bitsandbytes, found none. "
            f"Install it by `{install_line('quantized')}`, or leave --load-in out."
        )
    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def format_of(settings: Any) -> str:
    """The name of a format, from the `quantization_config` of a config.json or of a model: a row of `LOAD_IN` for
    bitsandbytes, else the name of the method; "" where none is said."""
    for load_in in LOAD_IN:
        if _said(settings, f"load_in_{load_in}"):
            return load_in
    method = _said(settings, "quant_method") or ""
    return str(getattr(method, "value", method))  # an Enum's own str() names its class too


def stated_format(config: Any, folder: Path, name: str) -> str:
    """The format that a checkpoint is quantised in, by its files alone; "" for none.

    A model of it is held in it, whichever engine runs it, unless it is unpacked while it is loaded. config:
    transformers' of the folder; name: for messages. Raises `UnsupportedModel` where transformers would take packed
    weights for weights.
    """
    parts = (config, config.get_text_config(decoder=True))
    settings = next((s for part in parts if (s := getattr(part, "quantization_config", None)) is not None), None)
    found = format_of(settings) if settings is not None else ""
    if (f"bitsandbytes_{found}" if found in LOAD_IN else found) in AUTO_QUANTIZATION_CONFIG_MAPPING:
        return found
    places = [file for file in SETTINGS_FILES if (folder / file).is_file()]
    places += ["compression_config" for part in parts if getattr(part, "compression_config", None) is not None]
    if settings is None and not places:
        return ""
    told = f"{places[0]}, where it does not look" if settings is None else f"quant_method {found or 'none'!r}"
    raise UnsupportedModel(
        f"loading model {name!r}: expected quantised weights that transformers knows by the quantization_config of "
        f"{folder / 'config.json'}, found {told}. It would take packed weights for weights. Give a checkpoint that is "
        "unquantised, or quantised otherwise."
    )


def remedy(stated: str) -> str:
    """What to do where transformers itself cannot load a checkpoint of this format; "" where nothing is known.

    transformers 5.16 looks up tensor parallel plans by an experts implementation, and fails where that is None
    (`FineGrainedFP8HfQuantizer.update_tp_plan`).
    """
    if stated == "fp8" and release_of(version("transformers")) == (5, 16):
        return (
            "transformers 5.16 fails so on fp8 checkpoints that are whole. Install transformers 5.17 or later, or give "
            "a checkpoint that is unquantised, or quantised otherwise."
        )
    return ""


def held_in(model: PreTrainedModel) -> str | None:
    """How the linear layers of a model are held: a row of `LOAD_IN`, the name of another method, or None."""
    quantizer = getattr(model, "hf_quantizer", None)
    return None if quantizer is None else format_of(quantizer.quantization_config) or "unknown"


def quantization_of(model: PreTrainedModel) -> str | None:
    """A row of `LOAD_IN`; None for a model that is what its files say, be they quantised or not."""
    held = held_in(model)
    return held if held in LOAD_IN and not model.hf_quantizer.pre_quantized else None


def make_trainable(model: PreTrainedModel, name: str) -> None:
    """Let gradients pass the quantised layers, and see that they do. Raises `UnsupportedModel` where they do not."""
    keep_trainable(model, f"loading model {name!r}")
    layers = _quantised_layers(model)
    for kind in {type(layer) for layer in layers}:
        layer = next(layer for layer in layers if type(layer) is kind)
        if not _has_gradient(layer, layer.weight.device, model.dtype):
            raise UnsupportedModel(
                f"loading model {name!r} in {held_in(model)}: the gradient does not pass its {kind.__name__} "
                "layers on this machine. It would train something else. Try another version of bitsandbytes, or leave "
                "--load-in out."
            )


def keep_trainable(model: PreTrainedModel, doing: str = "") -> None:
    """Keep bitsandbytes from packing 4-bit weights for inference. Raises `UnsupportedModel` where it has, or reads them
    wrongly. doing: begins the sentence; training it, by default.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 packs them as soon as they are used in evaluation mode, as the checks
    before training do; from then on the layer has no gradient with respect to its input, in training mode too, and says
    nothing. There, too, it reads 4-bit weights wrongly where a row is not a whole number of blocks.
    """
    doing = doing or f"training {type(model).__name__}"
    for layer in _quantised_layers(model):
        layer.support_avx512bf16_for_cpu = False
        if type(layer).__name__ != "Linear4bit":
            continue
        if layer.weight.device.type == "cpu" and layer.in_features % BLOCK:
            raise UnsupportedModel(
                f"{doing} in 4bit on a CPU: expected layers with a multiple of {BLOCK} inputs, found "
                f"{layer.in_features}. bitsandbytes would compute with other weights. Use --load-in 8bit, or a GPU."
            )
        states = (getattr(layer.weight, "quant_state", None), getattr(layer, "quant_state", None))
        if any(getattr(state, "packing_format_for_cpu", False) for state in states):
            raise UnsupportedModel(
                f"{doing} in 4bit on a CPU: expected weights that gradients pass, found some that bitsandbytes has "
                "packed for inference, when the model ran in evaluation mode. What is below them would not be trained, "
                "and nothing would say so. Load the model anew, and do not run it before the trainer does."
            )


def _quantised_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__ in ("Linear4bit", "Linear8bitLt")]


def _said(settings: Any, name: str) -> Any:
    return settings.get(name) if isinstance(settings, Mapping) else getattr(settings, name, None)


def _has_gradient(layer: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a step along the gradient with respect to a layer's input changes its output as the gradient says."""
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(4, layer.in_features, generator=draws).to(device, dtype)
    towards = torch.randn(4, layer.out_features, generator=draws).to(device)
    with torch.no_grad():
        layer(x)  # in evaluation mode, as the checks before training are
    layer.train()
    x.requires_grad_(True)
    value = (layer(x).float() * towards).sum()
    if not value.requires_grad:
        return False
    (gradient,) = torch.autograd.grad(value, x, materialize_grads=True)
    layer.eval()
    if not gradient.any():
        return False
    step = gradient * (x.norm() / gradient.norm())
    with torch.no_grad():
        change = (layer(x + step).float() * towards).sum() - value
    expected = (step.float() * gradient.float()).sum()
    return bool((change - expected).abs() <= GRADIENT_TOLERANCE * expected)
