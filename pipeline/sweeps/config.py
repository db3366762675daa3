"""What a sweep is: a configuration -> the runs that it asks for, each with all its settings.

Owns the fields that can be swept, their defaults, and that every run is a run that `training` takes: a wrong one is
refused here, before anything is trained. Must not load models or train.
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from logitcache.adapters.registry import AdapterSettings, check_settings
from logitcache.errors import InputNotFound, InvalidData, UnsuitableAdapter
from logitcache.losses.formulas import Objective
from logitcache.storage.identity import digest_json
from logitcache.training.penalties import PENALTIES, PenaltySettings
from logitcache.training.run import TrainSettings

OBJECTIVE = (
    *("tail", "weight", "temperature", "weighting", "min_base_rest", "min_adapted_rest", "kl_budget"),
    "label_smoothing",
)
ADAPTER = ("rank", "alpha", "dropout", "target_modules", "nullspace", "variant")
TRAINING = ("lr", "epochs", "max_steps", "batch_size", "grad_accum", "seed", "log_every", "top_k")
FIELDS = ("regularizer", *OBJECTIVE, "adapter", *ADAPTER, *TRAINING)
"""What can be swept, by the names of train's flags."""

LEARNING_RATES = (1e-4, 2e-4, 5e-4)
"""Of every method, plain cross-entropy too, where a sweep names none: one learning rate alone compares nothing."""

METHODS: dict[str, dict[str, Any]] = {
    "plain CE": {"regularizer": "none"},
    "masked KL": {"regularizer": "masked-kl"},
    "full KL": {"regularizer": "full-kl"},
    "label smoothing": {"regularizer": "none", "label_smoothing": 0.1},
    "L2-SP": {"regularizer": "l2-sp", "weight": [0.01, 0.1]},
    "EWC": {"regularizer": "ewc", "weight": [1.0, 10.0]},
}
"""Where a sweep names none. The weights of L2-SP and EWC have other units than that of a KL: sweep them."""

MAX_RUNS = 10_000


@dataclass(frozen=True)
class RunSpec:
    """One run: the name of its folder, the method it counts for, and every setting by the names of `FIELDS`."""

    name: str
    method: str
    settings: dict[str, Any]

    @property
    def objective(self) -> Objective:
        """What its loss is, besides a penalty."""
        regularizer = self.settings["regularizer"]
        positional = regularizer not in PENALTIES
        chosen = {name: self.settings[name] for name in OBJECTIVE if positional or name != "weight"}
        return Objective(regularizer=regularizer if positional else "none", **chosen)

    @property
    def penalty(self) -> PenaltySettings | None:
        """What pulls its weights to the base's."""
        regularizer = self.settings["regularizer"]
        return PenaltySettings(regularizer, self.settings["weight"]) if regularizer in PENALTIES else None

    @property
    def adapter(self) -> AdapterSettings:
        """Its adapter; alpha is twice the rank unless it is given."""
        chosen = {name: self.settings[name] for name in ADAPTER}
        alpha = 2.0 * chosen["rank"] if chosen["alpha"] is None else chosen["alpha"]
        return AdapterSettings(self.settings["adapter"], **{**chosen, "alpha": alpha})

    @property
    def training(self) -> TrainSettings:
        """How it is trained."""
        return TrainSettings(**{name: self.settings[name] for name in TRAINING})


@dataclass(frozen=True)
class SweepConfig:
    """model: folder or hub id of the base; cache; data: rows to train on, by default the samples of the cache; new,
    prior: held-out rows of the new data and of what the base knew; probe_top_k: alternatives that are kept of the base
    on these; runs: in the order in which they are done."""

    model: str
    cache: str
    new: str
    prior: str
    data: str | None = None
    probe_top_k: int = 256
    runs: tuple[RunSpec, ...] = field(default=())

    @property
    def methods(self) -> list[str]:
        """Their names, in the order of the configuration."""
        return list(dict.fromkeys(run.method for run in self.runs))


def read_config(path: Path) -> SweepConfig:
    """A sweep from a YAML file. Raises `InvalidData`, `InputNotFound`, with the key that is wrong."""
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputNotFound(f"reading {path}: {error.strerror or error}. Check the path.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidData(f"reading {path}: it is not YAML ({' '.join(str(error).split())}).") from error
    return make_config(loaded, str(path))


def make_config(loaded: Any, origin: str) -> SweepConfig:
    """A sweep from what its file says. origin: for messages."""
    top = _mapping(loaded, origin, "a mapping of keys to values")
    known = ("model", "cache", "new", "prior", "data", "probe_top_k", "grid", "methods")
    _refuse_unknown(top, known, origin)
    for name in ("model", "cache", "new", "prior"):
        if not isinstance(top.get(name), str):
            raise InvalidData(f"reading {origin}: expected {name}, a path, found {top.get(name)!r}.")
    if top.get("data") is not None and not isinstance(top["data"], str):
        raise InvalidData(f"reading {origin}: expected data, a path, found {top['data']!r}.")
    probe_top_k = top.get("probe_top_k", 256)
    if type(probe_top_k) is not int or probe_top_k < 1:
        raise InvalidData(f"reading {origin}: expected probe_top_k, a whole number from 1, found {probe_top_k!r}.")
    grid = _axes(_mapping(top.get("grid", {}), f"{origin}, grid", "fields and their values"), f"{origin}, grid")
    named = top.get("methods", METHODS)
    methods = _mapping(METHODS if named is None else named, f"{origin}, methods", "names of methods and their fields")
    if not methods:
        raise InvalidData(f"reading {origin}: expected at least one method, found none: there is nothing to train.")
    runs: list[RunSpec] = []
    for method, fields in methods.items():
        where = f"{origin}, method {method!r}"
        own = _axes(_mapping(fields or {}, where, "fields and their values"), where)
        runs += _runs(str(method), {**{"lr": list(LEARNING_RATES)}, **grid, **own}, where)
    _check_distinct(runs, origin)
    paths = {name: top[name] for name in ("model", "cache", "new", "prior")}
    return SweepConfig(**paths, data=top.get("data"), probe_top_k=probe_top_k, runs=tuple(runs))


def _runs(method: str, axes: Mapping[str, list[Any]], where: str) -> list[RunSpec]:
    count = 1
    for values in axes.values():
        count *= len(values)
    if count > MAX_RUNS:
        raise InvalidData(f"reading {where}: {count:,} runs are more than {MAX_RUNS:,}. Leave out some values.")
    runs: list[RunSpec] = []
    for chosen in itertools.product(*axes.values()):
        settings = {**_defaults(), **dict(zip(axes, chosen, strict=True))}
        if settings["regularizer"] == "none":  # what it does not have is not a setting of it
            settings |= {"weight": 0.0, "tail": "bucket", "top_k": None, "kl_budget": None}
        _check(RunSpec("", method, settings), where)
        if all(earlier.settings != settings for earlier in runs):  # a grid's weights are one run without a regulariser
            runs.append(RunSpec(_name(method, settings), method, settings))
    return runs


def _defaults() -> dict[str, Any]:
    found: dict[str, Any] = {**asdict(Objective()), **asdict(AdapterSettings()), **asdict(TrainSettings())}
    found |= {"adapter": found["kind"], "alpha": None}
    return {name: found[name] for name in FIELDS}


def _check(run: RunSpec, where: str) -> None:
    """Raise `InvalidData` for a run that training would not take."""
    try:
        _check_types(run.settings)
        objective, training = run.objective, run.training
        check_settings(run.adapter)
        if run.penalty is not None and objective.kl_budget is not None:
            raise ValueError("kl_budget: a penalty of the weights has no KL to hold to it")
        if training.max_steps == 0 or training.epochs <= 0 or training.batch_size < 1 or training.grad_accum < 1:
            raise ValueError("max_steps, epochs, batch_size, grad_accum: this would train nothing")
        if training.top_k is not None and training.top_k < 1:
            raise ValueError(f"top_k: expected 1 or more, found {training.top_k}")
    except (ValueError, TypeError, UnsuitableAdapter) as error:
        raise InvalidData(f"reading {where}: {str(error).rstrip('.')}.") from error


def _check_types(settings: Mapping[str, Any]) -> None:
    """Raise ValueError for a text where a number belongs, and the like; YAML reads 1e-3 as a text."""
    for name, default in _defaults().items():
        value = settings[name]
        if value is None and name in ("kl_budget", "top_k", "alpha"):
            continue
        if name in ("kl_budget", "alpha") or isinstance(default, float):
            right = type(value) in (int, float)
        elif name == "top_k" or isinstance(default, int):
            right = type(value) is int
        else:
            right = isinstance(value, str)
        if not right:
            hint = " (YAML wants a point in it: 1.0e-3)" if isinstance(value, str) and re.match(r"\d+e", value) else ""
            wanted = "a text" if isinstance(default, str) else "a number"
            raise ValueError(f"{name}: expected {wanted}, found {value!r}{hint}")


def _axes(fields: Mapping[str, Any], where: str) -> dict[str, list[Any]]:
    """Each field with the list of its values."""
    _refuse_unknown(fields, FIELDS, where)
    axes = {name: value if isinstance(value, list) else [value] for name, value in fields.items()}
    for name, values in axes.items():
        if not values:
            raise InvalidData(f"reading {where}: {name} has no values, so there is nothing to train. Give one or more.")
        repeated = [v for i, v in enumerate(values) if v in values[:i]]
        if repeated:
            raise InvalidData(f"reading {where}: {name} has {repeated[0]!r} twice.")
    return axes


def _mapping(value: Any, where: str, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidData(f"reading {where}: expected {what}, found {type(value).__name__}.")
    return value


def _refuse_unknown(found: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    unknown = sorted(str(name) for name in found if name not in known)
    if unknown:
        raise InvalidData(f"reading {where}: unknown key {unknown[0]!r}. Known keys: {', '.join(sorted(known))}.")


def _check_distinct(runs: list[RunSpec], origin: str) -> None:
    seen: dict[str, RunSpec] = {}
    for run in runs:
        key = digest_json(run.settings)
        if key in seen:
            raise InvalidData(
                f"reading {origin}: methods {seen[key].method!r} and {run.method!r} have a run in common, with the "
                f"same settings (lr {run.settings['lr']:g}, seed {run.settings['seed']}). Leave it out of one."
            )
        seen[key] = run


def _name(method: str, settings: Mapping[str, Any]) -> str:
    """Folder of a run: readable, and one for each method and settings."""
    readable = re.sub(r"[^a-z0-9]+", "-", method.lower()).strip("-")[:40] or "method"
    content = digest_json([method, dict(settings)])[:8]
    return f"{readable}-lr{settings['lr']:g}-seed{settings['seed']}-{content}"
