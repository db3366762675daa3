"""Adapters on a model: attached, kept for a resumed run, and saved for the original base.

Owns what PEFT leaves open: a kind that rewrites the base's weights is saved as a change of the original ones. What
kinds there are is in `registry`. Trade-off: a rewriting kind costs a copy of the adapted weights in main memory while
it is attached, so that what is taken out of a weight is, to its last bit, what the adapter holds, now and when a run is
resumed. Must not know the trainer. Shapes: W [out, in] base weight, A [r, in], B [out, r]; s = alpha / r (rslora: alpha
/ sqrt(r)).
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.pytorch_utils import Conv1D

from logitcache.data.samples import Sample
from logitcache.errors import TrainingFailed, UnsuitableAdapter, release_of
from logitcache.models.quantization import LOAD_IN, held_in

from .adalora import AdaLoraCallback
from .casting import cast_outside_autocast
from .covariances import linear_layers
from .registry import (
    KINDS,
    NAME,
    Layers,
    keeps_start,
    lora_layers,
    matrix_shape,
    rewrites_base,
    targets_of,
)
from .settings import AdapterSettings

_WEIGHTS, _FROZEN = "adapter_model.safetensors", "lora_A"

_KEEPS_FROZEN = "0.20"
"""The first PEFT whose layers know factors that stay frozen."""

__all__ = [
    "AdapterSettings",
    "adapter_callbacks",
    "attach",
    "check_attachable",
    "check_whole_modules",
    "save",
    "save_start",
    "target_layers",
]


def attach(
    model: PreTrainedModel,
    settings: AdapterSettings,
    base_name: str,
    samples: Sequence[Sample] = (),
    start: Path | None = None,
) -> PeftModel:
    """The model with an untrained adapter; its base weights are frozen. base_name: where PEFT finds the base again.

    samples: for kinds that are initialised by them (eva, corda, lora-ga). start: what `save_start` kept of an earlier
    run, in place of an initialisation. Factors are drawn from torch's generator: seed it before. Raises ValueError
    where a name fits no layer, `UnsuitableAdapter` where the kind cannot be had, `InputNotFound`, `TrainingFailed`.
    """
    kind, layers = KINDS[settings.kind], _checked_layers(model, settings)
    rewritten = layers if rewrites_base(settings) else {}
    originals = {name: layer.weight.detach().cpu().clone() for name, layer in rewritten.items()}
    if start is not None:
        adapted = _restored(model, start)
    else:
        _check_samples(settings, samples)
        config = kind.config(settings, layers)
        config.modules_to_save = settings.whole_modules or None
        with _initialising(settings):
            if kind.before is not None:
                kind.before(model, config, samples)
        adapted = get_peft_model(model, config, low_cpu_mem_usage=settings.kind == "eva")  # what PEFT advises for it
        _check_names(adapted.targeted_module_names, settings)
        with _initialising(settings):
            if kind.after is not None:
                kind.after(adapted, settings, samples)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # as PEFT does, but not of what is set later
    _measure_magnitudes(adapted)
    for name, original in originals.items():
        _take_out(adapted.base_model.model.get_submodule(name), original)
    if _freezes_a(settings):
        for _, layer in lora_layers(adapted):
            layer.frozen_peft_weight_names = {NAME: (_FROZEN,)}  # what PEFT looks at when it sets trainable weights
            layer.lora_A[NAME].requires_grad_(False)
    if keeps_start(settings):
        _as_plain_lora(adapted.peft_config[NAME])
    adapted.peft_config[NAME].base_model_name_or_path = base_name
    cast_outside_autocast(adapted)
    return adapted


def check_attachable(model: PreTrainedModel, settings: AdapterSettings, samples: Sequence[Sample] = ()) -> None:
    """Raise what `attach` raises of a model and settings, but for what only the values of weights and inputs tell.

    PEFT is asked on a copy of the model without memory. Takes from torch's generator.
    """
    kind, layers = KINDS[settings.kind], _checked_layers(model, settings)
    _check_samples(settings, samples)
    found = list(layers)
    if not kind.decomposes and held_in(model) is None:  # else PEFT computes with weights, of which the copy has none
        found = get_peft_model(_without_memory(model), kind.config(settings, layers)).targeted_module_names
    _check_names(found, settings)


def adapter_callbacks(adapted: PeftModel, settings: AdapterSettings) -> list[TrainerCallback]:
    """What the kind needs done while it is trained."""
    return [AdaLoraCallback(adapted)] if settings.kind == "adalora" else []


def save_start(adapted: PeftModel, folder: Path) -> None:
    """Keep the first factors of an untrained adapter in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, get_peft_model_state_dict(adapted, save_embedding_layers=False), adapted.peft_config[NAME])


def save(
    adapted: PeftModel,
    out: Path,
    settings: AdapterSettings,
    base_name: str,
    start: Path | None = None,
    revision: str | None = None,
) -> None:
    """An adapter folder from which `PeftModel.from_pretrained`, on the original base, makes what was trained.

    revision: of the base on the hub, where it is not main.
    start: what `save_start` kept; needed where W is now W - s B0 A0. The change of the original weights is saved then:
    s (B A - B0 A0) = s [B | -B0] [A; A0], of rank 2 r; where A was frozen s (B - B0) A, of rank r.
    """
    config = adapted.peft_config[NAME]
    config.base_model_name_or_path, config.revision = base_name, revision
    if not rewrites_base(settings):
        adapted.save_pretrained(str(out), save_embedding_layers=False)  # no vocabulary is ever resized here
        return
    assert start is not None
    first = _read_start(start)
    state = {k: v.cpu() for k, v in get_peft_model_state_dict(adapted, save_embedding_layers=False).items()}
    config = copy.deepcopy(config)
    if _freezes_a(settings):
        state = {k: v - first[k] if "lora_B" in k else v for k, v in state.items()}
    else:
        state = {
            k: torch.cat([v, -first[k]], dim=1) if "lora_B" in k else torch.cat([v, first[k]], dim=0)
            for k, v in state.items()
        }
        config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
    out.mkdir(parents=True, exist_ok=True)
    adapted.create_or_update_model_card(str(out))
    _write(out, state, config)


@contextmanager
def _initialising(settings: AdapterSettings) -> Iterator[None]:
    """What PEFT or a decomposition says of samples and weights that it cannot start from, as a refusal."""
    try:
        yield
    except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        said = " ".join(str(error).split()).rstrip(".")
        raise UnsuitableAdapter(
            f"initialising {settings.kind} of rank {settings.rank}: {said}. Use another kind, or other samples."
        ) from error


def _freezes_a(settings: AdapterSettings) -> bool:
    return settings.kind == "lora-null" and settings.variant == "v2"


def _restored(model: PreTrainedModel, start: Path) -> PeftModel:
    try:
        adapted: PeftModel = PeftModel.from_pretrained(model, str(start), is_trainable=True)
    except Exception as error:  # peft and safetensors raise many kinds
        raise _no_start(start) from error
    return adapted


def _read_start(start: Path) -> dict[str, Tensor]:
    try:
        factors: dict[str, Tensor] = load_file(start / _WEIGHTS)
    except Exception as error:  # safetensors raises many kinds
        raise _no_start(start) from error
    return factors


def _no_start(start: Path) -> TrainingFailed:
    return TrainingFailed(
        f"going on from {start}: the first factors of this run are missing or damaged, and without them its "
        "checkpoints are of no use. Start again with another --out."
    )


def _write(folder: Path, state: dict[str, Tensor], config: PeftConfig) -> None:
    save_file({k: v.cpu().contiguous() for k, v in state.items()}, folder / _WEIGHTS, metadata={"format": "pt"})
    config = copy.deepcopy(config)
    config.inference_mode = True
    config.save_pretrained(str(folder))


def _as_plain_lora(config: PeftConfig) -> None:
    """Once initialised, how is forgotten: who loads the adapter must not rewrite weights, or look for samples."""
    config.init_lora_weights = True
    for name in ("corda_config", "eva_config", "lora_ga_config"):
        setattr(config, name, None)


def target_layers(model: PreTrainedModel, settings: AdapterSettings) -> Layers:
    """The layers that these settings adapt, by their names in the base (eva may leave some of them as they are)."""
    wanted = targets_of(settings)
    if wanted == "all-linear":
        return linear_layers(model)
    fits = {n: m for n, m in model.named_modules() if any(n == name or n.endswith(f".{name}") for name in wanted)}
    return {n: m for n, m in fits.items() if getattr(m, "weight", None) is not None}


def _without_memory(model: PreTrainedModel) -> PreTrainedModel:
    """The same modules with parameters and buffers on the meta device."""
    kept: dict[int, Any] = {id(t): t.detach().to("meta") for t in model.buffers()}
    kept |= {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in model.parameters()}
    found: PreTrainedModel = copy.deepcopy(model, kept)
    return found


def _checked_layers(model: PreTrainedModel, settings: AdapterSettings) -> Layers:
    """The layers to adapt, of a model that can have such an adapter."""
    _check_installed(settings)
    _check_quantized(model, settings)
    layers = target_layers(model, settings)
    _check_layers(model, layers, settings)
    check_whole_modules(model, layers, settings)
    return layers


def check_whole_modules(model: PreTrainedModel, layers: Layers, settings: AdapterSettings) -> None:
    """Raise `UnsuitableAdapter` for modules that cannot be trained whole beside this adapter."""
    names = [name for name, _ in model.named_modules() if name]
    for wanted in settings.whole_modules:
        found = [name for name in names if name == wanted or name.endswith(f".{wanted}")]
        others = [name for name in names if name.endswith(wanted) and name not in found]
        why = "" if found else "no module is called so"
        if any(layer == name or layer.startswith(f"{name}.") for layer in layers for name in found):
            why = "the adapter is on it, and would be on a weight that moves. Leave it out of --target-modules"
        elif found and others:  # PEFT compares the ends of names, wherever a word begins
            why = f"PEFT would train {others[0]} too, whose name ends so. Give more of the name, as in {found[0]}"
        elif any(isinstance(model.get_submodule(name), (nn.ModuleList, nn.ModuleDict)) for name in found):
            why = "it is a list of modules, which PEFT does not copy. Name those in it"
        if rewrites_base(settings):
            why = f"{settings.kind} is saved as the change of weights that it rewrote. Use lora, or another kind"
        if why:
            raise UnsuitableAdapter(f"training {wanted!r} whole beside {settings.kind}: {why}.")


def _check_samples(settings: AdapterSettings, samples: Sequence[Sample]) -> None:
    if KINDS[settings.kind].needs_samples and not samples:
        raise UnsuitableAdapter(f"attaching {settings.kind}: it is initialised by samples, and there are none.")


def _check_installed(settings: AdapterSettings) -> None:
    """Raise `UnsuitableAdapter` for a kind that the installed PEFT lacks."""
    first = _KEEPS_FROZEN if _freezes_a(settings) else KINDS[settings.kind].since
    found = version("peft")
    if release_of(found) < release_of(first):
        raise UnsuitableAdapter(
            f"attaching {settings.kind}: expected PEFT {first} or later, which brought what it is made with, found "
            f"PEFT {found}. Upgrade it (pip install -U peft), or use another --adapter."
        )


def _check_quantized(model: PreTrainedModel, settings: AdapterSettings) -> None:
    held = held_in(model)
    if held is None:
        return
    what = f"attaching {settings.kind} to weights of {held}"
    if held in KINDS[settings.kind].quantized:
        first, found = KINDS[settings.kind].quantized_since, version("peft")
        if release_of(found) < release_of(first):
            raise UnsuitableAdapter(
                f"{what}: expected PEFT {first} or later, whose layer stands on packed weights, found PEFT {found}. "
                "Upgrade it (pip install -U peft), or leave --load-in out."
            )
        return
    if held not in LOAD_IN:
        raise UnsuitableAdapter(
            f"{what}: expected weights that are unquantised, or held in {' or '.join(LOAD_IN)}; no adapter has been "
            "trained here on others. Use the unquantised checkpoint with --load-in 4bit, or attach PEFT's adapter "
            "yourself (docs/how-to/plug-in.md)."
        )
    able = ", ".join(name for name, kind in KINDS.items() if held in kind.quantized)
    why = (
        "it takes part of each weight out, and what is left would be quantised again, which starts elsewhere"
        if rewrites_base(settings)
        else "its first values are made from the weights, and these are packed"
    )
    raise UnsuitableAdapter(f"{what}: {why}. Use {able or 'another model'}, or leave --load-in out.")


def _check_layers(model: PreTrainedModel, layers: Layers, settings: AdapterSettings) -> None:
    kind, what = KINDS[settings.kind], f"attaching {settings.kind} of rank {settings.rank}"
    if settings.kind == "oft":
        _check_blocks(layers, settings)
    for name, layer in layers.items():
        if kind.decomposes and not isinstance(layer, (nn.Linear, Conv1D)):
            raise UnsuitableAdapter(
                f"{what}: {name} is no linear layer, and only of these are its factors defined. "
                "Leave it out of --target-modules."
            )
        if settings.kind == "olora" and isinstance(layer, Conv1D):
            raise UnsuitableAdapter(
                f"{what}: {name} keeps its weight transposed (Conv1D), which PEFT's OLoRA takes for the weight itself. "
                "Use pissa, or lora."
            )
        sides = matrix_shape(layer) if layer.weight.dim() == 2 else ()  # of others, PEFT says what it thinks
        if sides and kind.rank_sides * settings.rank > min(sides):
            raise UnsuitableAdapter(
                f"{what}: {name} has a weight of {sides[0]} x {sides[1]}, which allows a rank of at most "
                f"{min(sides) // kind.rank_sides}. Use a lower --rank."
            )
        if kind.rewrites_base and sum(m._parameters.get("weight") is layer.weight for m in model.modules()) > 1:
            raise UnsuitableAdapter(
                f"{what}: the weight of {name} is another module's too (tied embeddings), which rewriting it would "
                "change. Leave it out of --target-modules."
            )


def _check_blocks(layers: Layers, settings: AdapterSettings) -> None:
    """Raise `UnsuitableAdapter` where a layer's inputs are not whole blocks: PEFT would take blocks of another size."""
    assert settings.block_size is not None
    what, inputs = f"attaching oft in blocks of {settings.block_size}", dict[str, int]()
    for name, layer in layers.items():
        if isinstance(layer, Conv1D):
            raise UnsuitableAdapter(
                f"{what}: {name} keeps its weight transposed (Conv1D), which PEFT's OFT does not know. "
                "Use lora, or another kind."
            )
        if layer.weight.dim() == 2:  # of others, PEFT says what it thinks
            inputs[name] = matrix_shape(layer)[1]
    for name, count in inputs.items():
        if count % settings.block_size:
            raise UnsuitableAdapter(
                f"{what}: expected whole blocks of the inputs of {name}, found {count} inputs. PEFT would give it "
                f"blocks of another size. Use a --block-size that divides {math.gcd(*inputs.values())}, or leave it "
                "out of --target-modules."
            )


def _check_names(found: Sequence[str], settings: AdapterSettings) -> None:
    """Raise ValueError for a name that fits none of these layers: PEFT is content with one of them."""
    wanted = targets_of(settings)
    for name in [] if wanted == "all-linear" else wanted:
        if not any(module == name or module.endswith(f".{name}") for module in found):
            raise ValueError(f"no layer is called {name!r}")


@torch.no_grad()
def _measure_magnitudes(adapted: PeftModel) -> None:
    """DoRA's magnitudes from weights of 16 bits, as float32: PEFT rounds them to 16, and W m / |W| would not be W."""
    for _, layer in lora_layers(adapted):
        if NAME not in getattr(layer, "lora_magnitude_vector", {}):
            continue
        vector, weight = layer.lora_magnitude_vector[NAME], dequantize_module_weight(layer.get_base_layer())
        if type(vector) is DoraLinearLayer and weight.dtype != torch.float32:
            norms = vector.get_weight_norm(weight.float(), torch.zeros((), device=weight.device), 1.0)
            vector.weight.data = norms.to(vector.weight.device)


def _take_out(layer: LoraLayer, original: Tensor) -> None:
    """W - s B A as the layer's weight, from the original weight and the factors as they are now."""
    base = layer.get_base_layer()
    b, a = (m[NAME].weight.detach().double() for m in (layer.lora_B, layer.lora_A))
    taken = layer.scaling[NAME] * (b @ a)
    original = original.to(base.weight.device)
    base.weight.data = (original.double() - (taken.T if isinstance(base, Conv1D) else taken)).to(original.dtype)
