"""Is a model in memory the base of a cache? Its configuration and its weights, before anything is computed.

Owns which checkpoint a model in memory is held against, and the refusals. How weights are compared is
`models.weights_in_memory`'s; what can only be measured is `step_zero`'s. Must not run the model.
"""

import json
from collections.abc import Callable, Collection
from pathlib import Path

from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from logitcache.errors import NotTheBase
from logitcache.models.head import causal_lm_of
from logitcache.models.same_base import config_differences
from logitcache.models.weights_in_memory import (
    WeightsCompared,
    compare_weights,
    fingerprint_in,
    has_weights,
    local_checkpoint,
    own_checkpoint,
)
from logitcache.storage import LogitCache
from logitcache.storage.configs import config_text
from logitcache.storage.identity import differing

_NAMED = 3
"""Tensors that a refusal names."""


def check_config(cache: LogitCache, model: nn.Module, is_padded: bool = False) -> tuple[str, ...]:
    """Raise `NotTheBase` where the configuration in memory is another one than the cache's base has.

    Returns what could not be compared, a phrase each. How weights are packed is `identity_checks.check_precision`'s.
    is_padded: their vocabularies may be padded to different widths.
    """
    causal_lm = causal_lm_of(model)
    leaving_out = ("quantization_config", *(["vocab_size"] if is_padded else []))
    said, why_not = config_said(cache.manifest.model.config, "in the cache", causal_lm, leaving_out)
    if why_not:
        return (f"the configuration ({why_not})",)
    if said:
        raise NotTheBase(
            f"pairing {cache.path} with {_named(causal_lm)}: the cache was made from {cache.manifest.model_name}, and "
            f"the model in memory differs from it in {'; '.join(said)}. It computes other distributions with the same "
            "weights. Load the base as its config.json says, or say that the teacher is another model "
            "(PairingRules(teacher_is_not_base=True))."
        )
    return ()


def config_said(
    stated: str, where: str, causal_lm: PreTrainedModel, leaving_out: Collection[str] = ()
) -> tuple[list[str], str]:
    """Where the configuration in memory differs from the one that is stated `where`, a phrase each; and why it could
    not be compared, "" where it could. leaving_out: fields that may differ."""
    theirs = json.loads(stated)
    if theirs.get("model_type") not in CONFIG_MAPPING:
        return [], f"the one {where} names no model_type that transformers knows"
    try:
        ours = json.loads(config_text(json.loads(causal_lm.config.to_json_string(use_diff=False))))
    except (ValueError, TypeError) as error:
        return [], str(error)
    texts = [config_text({n: v for n, v in fields.items() if n not in leaving_out}) for fields in (theirs, ours)]
    return differing({"config": texts[0]}, {"config": texts[1]}, where, "in memory", config_differences), ""


def check_weights(
    cache: LogitCache, model: nn.Module, folder: Path | None = None, chosen: Callable[[Tensor], bool] = lambda _: True
) -> tuple[str, ...]:
    """Raise `NotTheBase` where weights in memory are others than those of the checkpoint that the cache was made from.

    folder: of that checkpoint, where it is known; else the folder that the model names, or the one that the cache
    does, whichever has the fingerprint. chosen: of the tensors in memory, those to compare. Returns what could not be
    compared, a phrase each. A model that names another checkpoint, and has its weights, is refused too.
    """
    causal_lm = causal_lm_of(model)
    found = _checkpoint(cache, causal_lm) if folder is None else folder
    if folder is not None and not has_weights(folder):
        return (f"weights (there are none in {folder})",)
    if found is None:
        return _check_other(cache, causal_lm, model, chosen)
    compared = compare_weights(model, found, chosen)
    if compared.differing:
        raise NotTheBase(
            f"pairing {cache.path} with {_named(causal_lm)}: expected the weights of {found}, from which the cache was "
            f"made, found others in {_tensors(compared)}. It is not the base any more: an adapter was merged into "
            "it, or it was trained. Load the base anew, or precompute a cache of what you have, saved in a folder; "
            "if it is meant to learn from another model, say so (PairingRules(teacher_is_not_base=True))."
        )
    return (f"weights: {compared.said}",) if compared.said else ()


def _check_other(
    cache: LogitCache, causal_lm: PreTrainedModel, model: nn.Module, chosen: Callable[[Tensor], bool]
) -> tuple[str, ...]:
    """No checkpoint here is the cache's: refuse a model that has the weights of another one."""
    other = own_checkpoint(causal_lm)
    if other is None or fingerprint_in(other) is None:
        looked = " or ".join(repr(name) for name in (causal_lm.name_or_path, cache.manifest.model_name) if name)
        return (f"weights (no checkpoint of the base is here by the name of {looked or 'any'})",)
    packed = getattr(getattr(causal_lm, "hf_quantizer", None), "pre_quantized", False)
    compared = compare_weights(model, other, chosen)
    if compared.num_compared and not compared.differing and not packed:
        raise NotTheBase(
            f"pairing {cache.path} with {_named(causal_lm)}: expected the weights that the cache was made from "
            f"({cache.manifest.model_name}), found those of {other}, which is another checkpoint. Load the base of the "
            "cache, or precompute a cache for this one; if it is meant to learn from another model, say so "
            "(PairingRules(teacher_is_not_base=True))."
        )
    return (f"weights ({other} is not the checkpoint that the cache was made from)",)


def _checkpoint(cache: LogitCache, causal_lm: PreTrainedModel) -> Path | None:
    """A folder with the weights of the cache's base."""
    folders = (own_checkpoint(causal_lm), local_checkpoint(cache.manifest.model_name))
    wanted = cache.manifest.model.weights
    return next((f for f in folders if f is not None and fingerprint_in(f) == wanted), None)


def _named(causal_lm: PreTrainedModel) -> str:
    return f"{type(causal_lm).__name__} {causal_lm.name_or_path or ''}".strip()


def _tensors(compared: WeightsCompared) -> str:
    names, total = compared.differing, compared.num_compared
    more = ", ..." if len(names) > _NAMED else ""
    return f"{len(names)} of {total} tensors that were compared ({', '.join(names[:_NAMED])}{more})"
