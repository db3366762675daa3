"""Training that starts from an adapter that is there: its weights, into one that was attached untrained.

Owns which adapters may be such a start: a LoRA that adapts the same layers with the same rank and scale, on weights
that no kind rewrites. Must not know the trainer. Trade-off: rank, scale and layers are said again by the settings of
the run, and held against the file, so that a run is described by its settings alone.
"""

import json
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

from logitcache.errors import UnsuitableAdapter
from logitcache.models.loading import first_line
from logitcache.storage.identity import digest

from .registry import NAME
from .settings import AdapterSettings

KINDS_THAT_START = ("lora", "dora", "rslora", "gaussian", "orthogonal")
"""LoRA on weights that stay as they are, whose factors are all in the file."""

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_FLAGS = {"r": "--rank", "lora_alpha": "--alpha", "use_dora": "--adapter dora", "use_rslora": "--adapter rslora"}


def check_start_kind(settings: AdapterSettings, folder: Path) -> None:
    """Raise `UnsuitableAdapter` for a kind that cannot be started from an adapter."""
    if settings.kind not in KINDS_THAT_START:
        raise UnsuitableAdapter(
            f"starting from {folder}: expected --adapter {', '.join(KINDS_THAT_START[:-1])} or {KINDS_THAT_START[-1]}, "
            f"found {settings.kind}, whose first weights are its own. Use one of these."
        )


def start_digest(folder: Path) -> str:
    """Of the weights of an adapter. Raises `UnsuitableAdapter` where they cannot be read."""
    try:
        return digest((folder / _WEIGHTS).read_bytes())
    except OSError as error:
        raise UnsuitableAdapter(
            f"starting from {folder}: {_WEIGHTS} cannot be read ({first_line(error)}). Give a folder with an adapter."
        ) from error


def start_from(adapted: PeftModel, folder: Path) -> None:
    """Give an untrained adapter the weights of the one in a folder.

    Raises `UnsuitableAdapter` where that is of another shape, scale, or other layers.
    """
    config, own = _config_of(folder), adapted.peft_config[NAME]
    differs = [
        f"{flag}: {config.get(name)} there, {getattr(own, name)} here"
        for name, flag in _FLAGS.items()
        if config.get(name) != getattr(own, name)
    ]
    try:
        weights = load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # safetensors and torch raise many kinds
        raise UnsuitableAdapter(
            f"starting from {folder}: its weights cannot be read ({first_line(error)}). Train it again."
        ) from error
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    strange = sorted(weights.keys() ^ expected.keys())
    if strange and not differs:
        differs = [f"--target-modules: {strange[0]} is in one of the two alone"]
    differs += [] if differs else [n for n, tensor in expected.items() if weights[n].shape != tensor.shape]
    if differs:
        raise UnsuitableAdapter(
            f"starting from {folder}: expected an adapter as the one that is to be trained, found "
            f"{'; '.join(differs)}. Its weights would have no place. Give the settings that it was trained with."
        )
    set_peft_model_state_dict(adapted, weights)


def _config_of(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        raise UnsuitableAdapter(
            f"starting from {folder}: expected {_CONFIG} of a LoRA, found none. Give the folder of a LoRA."
        )
    return found
