"""The `logitcache train` that makes a run of a sweep again, as its settings and sweep.json say it.

Owns which flags a run needs: those whose value is not train's default. Must not import torch.
"""

import shlex
from collections.abc import Mapping
from typing import Any

from logitcache.data.settings import OF_TEMPLATE, DataSettings
from logitcache.settings import line_settings
from logitcache.training.settings import PENALTIES, run_settings

from .config import OF_ANCHORS, SETTINGS, SHARED

DEFAULTS: dict[str, Any] = {**{name: s.default for name, s in {**SETTINGS, **SHARED}.items()}, "tail": "auto"}
"""Of `train`, by the names of its flags."""

OF_ROWS = tuple(s.key for s in line_settings(DataSettings) if s.name not in OF_TEMPLATE)
"""What only rows have: where a run learns the samples of the cache, the sweep's are of the held-out texts alone."""


def train_command(given: Mapping[str, Any], settings: Mapping[str, Any], out: str) -> str:
    """The line for a shell. given: that of sweep.json; settings: of the run; out: the folder that it is to write."""
    anchored = bool(settings.get("anchor_weight"))
    words = ["logitcache", "train"]
    for name in ("model", "cache", "data", *(["anchor_cache"] if anchored else [])):
        values = given.get(name) or []
        for value in [values] if isinstance(values, str) else values:
            words += [f"--{name.replace('_', '-')}", value]
    left_out = () if given.get("data") else OF_ROWS
    known = {**SETTINGS, **SHARED, **run_settings("loading")}
    for name, value in {**given, **settings}.items():
        if name in known and name not in left_out and _is_needed(name, value, settings, anchored):
            words += [known[name].flag] if value is True else [known[name].flag, str(value)]
    return shlex.join([*words, "--out", out])


def _is_needed(name: str, value: Any, settings: Mapping[str, Any], anchored: bool) -> bool:
    """Whether a run is another without the flag, which `train` would take."""
    if value is None or value == DEFAULTS.get(name):
        return False
    if name in OF_ANCHORS:
        return anchored
    if name == "alpha":
        return bool(value != 2 * settings["rank"])
    has_regularizer = settings["regularizer"] not in ("none", *PENALTIES)
    return has_regularizer or name not in (("weight", "tail") if settings["regularizer"] == "none" else ("tail",))
