"""The config.json of a base, as a cache keeps it, and where two of them differ.

Owns which fields touch no logits, the canonical text without them, and its bound. What a missing field is, only the
class of the model knows, so two texts that differ here may still be one model: who can import transformers brings a
comparison of its own (`ConfigDifferences`). Must not import it.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

CONFIG = "config.json"
MAX_CONFIG_BYTES = 2**18

_NO_LOGITS = """
_name_or_path _commit_hash transformers_version transformers.js_config unsloth_version unsloth_fixed
architectures auto_map tokenizer_class transformers_weights
dtype torch_dtype use_bfloat16 attn_implementation _attn_implementation _attn_implementation_autoset
experts_implementation _experts_implementation
use_cache cache_implementation return_dict output_attentions output_hidden_states output_router_logits torchscript
gradient_checkpointing router_aux_loss_coef initializer_range initializer_factor init_std
bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id
id2label label2id num_labels problem_type finetuning_task task_specific_params prefix
max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
"""
NO_LOGITS = frozenset(_NO_LOGITS.split())
"""Fields that touch no logits: names, versions, classes and files (a checkpoint is hashed, whatever its name); dtype
and attention, which `ModelIdentity` has; what only training, sampling or other heads read; and special tokens, of which
a model reads none but padding."""

_DROPOUT = re.compile(r"dropout|pdrop|layerdrop|drop_path")
"""Names of probabilities (numbers: `token_dropout` is a switch, and is no such thing) that evaluation mode ignores."""

_PLACES_FROM_PADDING = frozenset(
    (
        *("camembert", "data2vec-text", "prophetnet", "roberta", "roberta-prelayernorm", "xglm"),
        *("xlm-roberta", "xlm-roberta-xl", "xmod"),
    )
)
"""Types of model that number positions from pad_token_id on, or leave its row out of their table: there it counts."""

ConfigDifferences: TypeAlias = Callable[[str, str], dict[str, tuple[object, object]]]
"""Two texts of `config_text` -> the fields that differ, each with both values; empty where both are one model."""


def config_text(config: Mapping[str, Any]) -> str:
    """Canonical JSON (ASCII, sorted keys, no spaces) of a config without the fields that touch no logits.

    Raises ValueError where it is larger than MAX_CONFIG_BYTES or is not JSON.
    """
    text = _canonical(_counting(config))
    if len(text) > MAX_CONFIG_BYTES:
        raise ValueError(f"{CONFIG}: expected at most {MAX_CONFIG_BYTES:,} bytes, found {len(text):,}")
    return text


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json in this folder. Raises OSError, and ValueError where it is not a JSON object."""
    found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{folder / CONFIG}: expected a JSON object, found {type(found).__name__}")
    return found


def check_config_text(text: str) -> None:
    """Raise ValueError, or RecursionError, where it is too large or not canonical. Any fields will do: the list of
    those that touch no logits may grow."""
    found = json.loads(text) if len(text) <= MAX_CONFIG_BYTES else None
    if not isinstance(found, dict) or _canonical(found) != text:
        raise ValueError(
            f"model.config: expected a canonical JSON object of at most {MAX_CONFIG_BYTES} bytes, found {text!r:.80}"
        )


def as_spelt(mine: str, theirs: str) -> dict[str, tuple[object, object]]:
    """Which fields of two texts differ, as they are written: a missing one differs from one that is there."""
    if mine == theirs:
        return {}
    a, b = _fields(mine), _fields(theirs)
    return {name: (a.get(name), b.get(name)) for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)}


def _canonical(config: Mapping[str, Any]) -> str:
    return json.dumps(config, sort_keys=True, separators=(",", ":"))


def _counting(config: Mapping[str, Any]) -> dict[str, Any]:
    dropped = NO_LOGITS - {"pad_token_id"} if config.get("model_type") in _PLACES_FROM_PADDING else NO_LOGITS
    kept = {name: value for name, value in config.items() if name not in dropped and not _is_dropout(name, value)}
    parts = [name for name, value in kept.items() if name.endswith("_config") and isinstance(value, Mapping)]
    return kept | {name: _counting(kept[name]) for name in parts if name != "quantization_config"}


def _is_dropout(name: str, value: object) -> bool:
    is_number = value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
    return is_number and _DROPOUT.search(name) is not None


def _fields(text: str) -> dict[str, object]:
    """Values by their dotted names; of what is no JSON object, all of it."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = text
    return dict(_leaves(found, "")) if isinstance(found, dict) else {"": found}


def _leaves(value: object, name: str) -> list[tuple[str, object]]:
    if not isinstance(value, dict) or not value:
        return [(name, json.dumps(value))]  # as text: 1 and 1.0 are not one spelling, and NaN equals itself
    return [leaf for key, part in value.items() for leaf in _leaves(part, f"{name}.{key}" if name else str(key))]
