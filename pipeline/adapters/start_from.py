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
from .reloadable import INITIALISATIONS
from .settings import AdapterSettings

KINDS_THAT_START = ("lora", "dora", "rslora", "gaussian", "orthogonal")
"""LoRA on weights that stay as they are, whose factors are all in the file."""

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_ON_THE_BASE = INITIALISATIONS - {"pissa", "olora"}
"""Texts of `init_lora_weights` after which the weights below are the base's."""

_ELSEWHERE = frozenset(
    {
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("rank_pattern", "modules_to_save", "bias", "lora_bias", "lora_dropout", "fan_in_fan_out"),
        *("init_lora_weights", "eva_config", "megatron_core", "qalora_group_size", "runtime_config"),
    }
)
"""Of a LoRA's configuration, what the names and shapes of its tensors tell, what only training has, and what is held
against the base otherwise; of all else, what the run's own adapter does not have would compute something else."""

_FLAGS = {"r": "--rank", "lora_alpha": "--alpha", "use_dora": "--adapter dora", "use_rslora": "--adapter rslora"}


def check_start_kind(settings: AdapterSettings, folder: Path) -> None:
    """Raise `UnsuitableAdapter` for a kind that cannot be started from an adapter."""
    if settings.kind not in KINDS_THAT_START:
        raise UnsuitableAdapter(
            f"starting from {folder}: expected --adapter {', '.join(KINDS_THAT_START[:-1])} or {KINDS_THAT_START[-1]}, "
            f"found {settings.kind}, whose first weights are its own. Use one of these."
        )


def check_start_weights(folder: Path) -> None:
    """Raise `UnsuitableAdapter` where an adapter was trained on weights that its initialisation had rewritten."""
    start = _config_of(folder).get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in _ON_THE_BASE:
        raise UnsuitableAdapter(
            f"starting from {folder}: expected a LoRA of the untouched base, found init_lora_weights {start!r:.80}, "
            "which took a part out of the base's weights. Without that its weights are another adapter's. Save it as a "
            "plain LoRA where it was trained (PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...))"
            ", or start from one of `logitcache train`."
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
    asked = [*_FLAGS, *(name for name, value in config.items() if value and name not in {*_FLAGS, *_ELSEWHERE})]
    differs = [
        f"{_FLAGS.get(name, name)}: {config.get(name)!s:.200} there, {getattr(own, name, None)!s:.200} here"
        for name in asked
        if config.get(name) != getattr(own, name, None)
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
        flag = "--target-modules" if "lora_" in strange[0] else "--modules-to-save"
        differs = [f"{flag}: {strange[0]} is in one of the two alone"]
    if not differs:
        sizes = ((n, list(weights[n].shape), list(t.shape)) for n, t in expected.items())
        differs = [f"{n}: {there} there, {here} here" for n, there, here in sizes if there != here][:1]
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
