"""Whether two models are one base: the answer of every gate, of caches, adapters, null spaces, calibrations and runs.

Owns the comparison of two configs by what transformers makes of them, so that spellings of several versions, and fields
that are left out, are one model. Imports transformers only where two configs are spelt differently. Must not load one.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from logitcache.storage import ModelIdentity
from logitcache.storage.configs import as_spelt, config_text
from logitcache.storage.identity import differing

BASE = ("weights", "config", "vocab_size")
"""The fields of `ModelIdentity` that say which model it is; the others say how it was run."""


def config_differences(mine: str, theirs: str) -> dict[str, tuple[object, object]]:
    """The `storage.configs.ConfigDifferences` of transformers: both are loaded by it, and all fields must agree but
    those that touch no logits; a missing one is its class's default. As they are spelt where it loads no such config.
    """
    spelt = as_spelt(mine, theirs)
    if not spelt:
        return {}
    try:
        return as_spelt(_resolved(mine), _resolved(theirs))
    except Exception:  # a config is anybody's: whatever transformers raises, it does not say that the two are one
        return spelt


def _resolved(text: str) -> str:
    from transformers import CONFIG_MAPPING

    fields: dict[str, Any] = json.loads(text)
    with warnings.catch_warnings(action="ignore"):  # of old spellings, which are what is compared here
        config = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
        return config_text(json.loads(config.to_json_string(use_diff=False)))


def base_differences(
    theirs: Mapping[str, object], ours: ModelIdentity, there: str = "there", here: str = "here"
) -> list[str]:
    """Where a base differs from ours, a phrase each. theirs: the known fields of `ModelIdentity`, by name."""
    mine = asdict(ours)
    return differing(theirs, {name: mine.get(name) for name in theirs}, there, here, config_differences)


def described_differences(mine: Mapping[str, Any], theirs: Mapping[str, Any], model: str) -> list[str]:
    """Which parts of two descriptions of jobs, in JSON, differ; of the part `model`, an identity, which fields."""
    said = [name for name in mine if name != model and mine[name] != theirs.get(name)]
    ours, other = mine.get(model), theirs.get(model)
    if not isinstance(ours, dict) or not isinstance(other, dict):
        return said if ours == other else [model, *said]
    return [*(f"{model} {part}" for part in differing(ours, other, configs=config_differences)), *said]


def base_of(identity: ModelIdentity) -> dict[str, object]:
    """What `base_differences` takes of a model: which it is, and not how it was run."""
    return {name: getattr(identity, name) for name in BASE}
