"""What a sweep is: a configuration -> the runs that it asks for, each with all its settings.

Owns the fields that can be swept, their defaults, and that every run is a run that `training` takes: a wrong one is
refused here, before anything is trained. Must not load models or train.
"""

import itertools
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from logitcache.data.settings import DataSettings
from logitcache.errors import InputNotFound, InvalidData, InvalidSettings
from logitcache.evaluation.settings import ScaleSettings
from logitcache.settings import Setting, Settings, line_settings, names_function, option
from logitcache.storage.identity import digest_json
from logitcache.storage.plain_text import one_line, shown
from logitcache.training.settings import NO_ADAPTER as NO_ADAPTER
from logitcache.training.settings import NO_PLACE, PENALTIES, RECIPES, RunSettings, run_settings, without_place
from logitcache.yaml_files import at_home, read_as, read_yaml

SETTINGS = run_settings("objective", "anchor", "adapter", "training")
FIELDS = tuple(SETTINGS)
"""What can be swept, by the names of train's flags."""

OBJECTIVE = (*run_settings("objective", "anchor"), "top_k")
"""What a run's loss is: all else equal, two runs that differ here compare two objectives."""

OF_A_REGULARIZER = tuple(
    name
    for name in run_settings("objective")
    if name not in ("regularizer", "weight", "kl_budget", "label_smoothing", "ce_weight", "ce_weight_value")
)
"""What only a loss has that compares with the base's predictions."""

OF_ANCHORS = tuple(run_settings("anchor"))
"""What only a run with anchors has; one of anchor_weight 0 has none, whatever the sweep's caches."""

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
MAX_METHOD = 200
"""Characters of a method's name."""


@dataclass(frozen=True)
class ProbeSettings(Settings):
    """What is kept of the base on the held-out text."""

    probe_top_k: int | None = option(
        None,
        "Alternatives that are kept of the base on the held-out text.  [default: 256, or all of a smaller vocabulary]",
        at_least=1,
    )

    def top_k(self, vocab_size: int) -> int:
        """That many of a base with this vocabulary."""
        return min(256, vocab_size - 1) if self.probe_top_k is None else self.probe_top_k


@dataclass(frozen=True)
class CurveSettings(Settings):
    """Of which runs the curve between base and adapted model is measured."""

    scales_of: Literal["plain", "all", "none"] = option(
        "plain", "Runs of which `scales` are measured: those of plain cross-entropy, all, or none."
    )


SHARED = {
    **{name: s for name, s in run_settings("pairing", "loading").items() if name not in ("dtype", "device")},
    **{s.key: s for s in line_settings(ProbeSettings, ScaleSettings, CurveSettings, DataSettings)},
}
"""What all runs of a sweep have in common, by the names of train's flags; dtype and device stand on the line."""


@dataclass(frozen=True)
class RunSpec:
    """One run: the name of its folder, the method it counts for, and every setting by the names of `FIELDS`."""

    name: str
    method: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class SweepConfig:
    """What a sweep is of, and its runs."""

    #: Folder or hub id of the base.
    model: str
    cache: str
    #: Held-out rows of the new data.
    new: tuple[str, ...]
    #: Held-out rows of what the base knew.
    prior: tuple[str, ...]
    #: Rows to train on; by default the samples of the cache.
    data: tuple[str, ...] | None = None
    #: Caches of what the base says elsewhere: anchors of every run but those of anchor_weight 0.
    anchor_cache: tuple[str, ...] = ()
    #: What all runs have in common, by the names of `SHARED`.
    shared: dict[str, Any] = field(default_factory=dict)
    #: In the order in which they are done.
    runs: tuple[RunSpec, ...] = field(default=())

    @property
    def common(self) -> RunSettings:
        """How the model is held and how the cache belongs to it; the rest is a run's."""
        return RunSettings.of({name: self.shared.get(name) for name in run_settings("pairing", "loading")})

    @property
    def probe(self) -> ProbeSettings:
        """What is kept of the base on the held-out text."""
        return ProbeSettings(self.shared.get("probe_top_k"))

    def scales_of(self, spec: RunSpec) -> list[float]:
        """The parts of a run's change at which it is to be measured: none of a run that is not to have a curve.

        0, the base, and 1, the run itself, are known without.
        """
        whose = CurveSettings(self.shared.get("scales_of", "plain")).scales_of
        if whose == "none" or (whose == "plain" and not is_plain(spec.settings)):
            return []
        settings = ScaleSettings(self.shared["scales"]) if "scales" in self.shared else ScaleSettings()
        return [scale for scale in settings.scales if scale not in (0, 1)]

    @property
    def how(self) -> DataSettings:
        """How the rows of data, new and prior are found, read and rendered."""
        return DataSettings(**{s.name: self.shared[s.key] for s in line_settings(DataSettings) if s.key in self.shared})

    def run_of(self, spec: RunSpec, has_groups: bool = False) -> RunSettings:
        """A run as `training` takes it. has_groups: whether the cache has tail groups, for the tail auto."""
        return RunSettings.of({**self.shared, **spec.settings}, has_groups)

    @property
    def methods(self) -> list[str]:
        """Their names, in the order of the configuration."""
        return list(dict.fromkeys(run.method for run in self.runs))


def is_plain(values: Mapping[str, Any]) -> bool:
    """Whether a run, by its settings, is plain cross-entropy: nothing holds it to the base, and every token counts."""
    others = ("label_smoothing", "anchor_weight")
    is_weighed = values.get("ce_weight") not in (None, "none")
    return values.get("regularizer") == "none" and not is_weighed and not any(values.get(name) for name in others)


def read_config(path: Path) -> SweepConfig:
    """A sweep from a YAML file. Raises `InvalidData`, `InputNotFound`, with the key that is wrong."""
    try:
        loaded = read_yaml(path)
    except OSError as error:
        raise InputNotFound(f"reading {path}: {error.strerror or error}. Check the path.") from error
    except yaml.YAMLError as error:
        raise InvalidData(f"reading {path}: it is not YAML ({error}).") from error
    return make_config(loaded, str(path))


def make_config(loaded: Any, origin: str) -> SweepConfig:
    """A sweep from what its file says. origin: for messages."""
    top = _mapping(loaded, origin, "a mapping of keys to values")
    known = ("model", "cache", "new", "prior", "data", "anchor_cache", *SHARED, "grid", "methods")
    _refuse_unknown(top, known, origin)
    for name in ("model", "cache"):
        if not isinstance(top.get(name), str):
            raise InvalidData(f"reading {origin}: expected {name}, a path, found {shown(top.get(name))}.")
    texts = {name: _names(top.get(name), name, origin) for name in ("new", "prior")}
    data = None if top.get("data") is None else _names(top["data"], "data", origin)
    anchors = () if top.get("anchor_cache") is None else _names(top["anchor_cache"], "anchor_cache", origin)
    shared = {name: _checked(s, top[name], origin) for name, s in SHARED.items() if name in top}
    _check_curve(shared, origin)
    grid = _axes(_mapping(top.get("grid", {}), f"{origin}, grid", "fields and their values"), f"{origin}, grid")
    named = top.get("methods", METHODS)
    methods = _mapping(METHODS if named is None else named, f"{origin}, methods", "names of methods and their fields")
    if not methods:
        raise InvalidData(f"reading {origin}: expected at least one method, found none: there is nothing to train.")
    runs: list[RunSpec] = []
    for method, fields in methods.items():
        where = f"{origin}, method {shown(method)}"
        if not isinstance(method, str) or not method.strip() or method != one_line(method, MAX_METHOD):
            raise InvalidData(f"reading {where}: expected a name of at most {MAX_METHOD} characters that can be shown.")
        own = _axes(_with_recipe(_mapping(fields or {}, where, "fields and their values"), where), where)
        if "weight" in own and own.get("regularizer") == ["none"]:
            raise InvalidData(f"reading {where}: weight with regularizer none: there is no regulariser to weigh.")
        axes = {**{"lr": list(LEARNING_RATES)}, **grid, **own}
        if not anchors and any(name in axes for name in OF_ANCHORS):
            name = next(name for name in OF_ANCHORS if name in axes)
            raise InvalidData(
                f"reading {where}: {name} is of an anchor cache, found none. Give anchor_cache, or leave it out."
            )
        axes |= {} if anchors else {"anchor_weight": [0.0]}
        runs += _runs(method, axes, own, shared, where)
        _check_count(len(runs), origin)
    _check_distinct(runs, origin)
    _check_read(grid, runs, origin)
    model, cache = (at_home(top[name]) for name in ("model", "cache"))
    return SweepConfig(model, cache, texts["new"], texts["prior"], data, anchors, shared, tuple(runs))


def _check_read(grid: Mapping[str, list[Any]], runs: Sequence[RunSpec], origin: str) -> None:
    """Raise `InvalidData` for what the grid says of an adapter and no run's kind has."""
    for name, values in grid.items():
        if any(value is not None for value in values) and all(run.settings[name] is None for run in runs):
            kind = runs[0].settings["adapter"]
            if name in NO_PLACE.get(kind, ()):
                raise InvalidData(f"reading {origin}, grid: {without_place(kind, name).rstrip('.')}.")


def _check_curve(shared: Mapping[str, Any], origin: str) -> None:
    """Raise `InvalidData` for scales that could not be measured of any run."""
    try:
        ScaleSettings(shared.get("scales", ScaleSettings.scales))
    except InvalidSettings as error:
        raise InvalidData(f"reading {origin}: {str(error).rstrip('.')}.") from error


def _names(value: Any, name: str, origin: str) -> tuple[str, ...]:
    """One path or several in a list."""
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(v, str) for v in values):
        raise InvalidData(f"reading {origin}: expected {name}, a path or a list of them, found {shown(value)}.")
    return tuple(map(at_home, values))


def _runs(
    method: str, axes: Mapping[str, list[Any]], own: Collection[str], shared: dict[str, Any], where: str
) -> list[RunSpec]:
    count = 1
    for values in axes.values():
        count *= len(values)
    _check_count(count, where)
    defaults = {name: setting.default for name, setting in SETTINGS.items()}
    runs: dict[str, RunSpec] = {}  # a grid's weights are one run without a regulariser
    for chosen in itertools.product(*axes.values()):
        given = dict(zip(axes, chosen, strict=True))
        settings = {**defaults, **_in_place(given, own, where)}
        regularizer = settings["regularizer"]
        if regularizer in ("none", *PENALTIES):  # what it does not have is not a setting of it
            settings |= {name: defaults[name] for name in OF_A_REGULARIZER}
            if not _weight_reads_top_k(settings["ce_weight"]):
                settings["top_k"] = defaults["top_k"]
        if regularizer == "none":
            settings |= {"weight": 0.0, "kl_budget": None}
        settings = _complete(settings, shared, where)
        if settings["anchor_weight"] == 0:
            settings |= {**dict.fromkeys(OF_ANCHORS), "anchor_weight": 0.0}
        runs.setdefault(digest_json(settings), RunSpec(_name(method, settings), method, settings))
    return list(runs.values())


def _in_place(given: Mapping[str, Any], own: Collection[str], where: str) -> dict[str, Any]:
    """What is given, without what the kind of adapter does not have: of the grid that is for others. Raises
    `InvalidData` where the method itself says it (own), be it the default's value."""
    kind = given.get("adapter", SETTINGS["adapter"].default)
    without = [name for name in NO_PLACE.get(kind, ()) if given.get(name) is not None]
    for name in without:
        if name in own:
            raise InvalidData(f"reading {where}: {without_place(kind, name).rstrip('.')}.")
    return {name: value for name, value in given.items() if name not in without}


def _weight_reads_top_k(ce_weight: Any) -> bool:
    """Whether a weight depends on how many alternatives are read: EAFT's takes 20 or is refused, others none."""
    return isinstance(ce_weight, str) and names_function(ce_weight)


def _check_count(count: int, where: str) -> None:
    if count > MAX_RUNS:
        found = f"{count:,}" if count < 10**30 else shown(count)
        raise InvalidData(f"reading {where}: {found} runs are more than {MAX_RUNS:,}. Leave out some values.")


def _complete(settings: Mapping[str, Any], shared: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Settings with what follows from them. Raises `InvalidData` for a run that training would not take."""
    found = {name: _checked(SETTINGS[name], value, where) for name, value in settings.items()}
    try:
        run = RunSettings.of({**shared, **found})
    except InvalidSettings as error:
        raise InvalidData(f"reading {where}: {str(error).rstrip('.')}.") from error
    adapter = run.adapter.plain()
    made: dict[str, Any] = {name: adapter[name] for name in ("alpha", "variant", "block_size", "cayley")}
    made |= dict.fromkeys(run.adapter.no_place)  # nor is a default a setting of it
    return {**found, **made, "ce_weight_value": run.objective.plain()["ce_weight_value"]}


def _checked(setting: Setting, value: Any, where: str) -> Any:
    """A value as its field has it."""
    try:
        return setting.checked(read_as(setting.kind, value))
    except ValueError as error:
        raise InvalidData(f"reading {where}: {setting.wrong(value)}.") from error


def _with_recipe(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of a method, those of its recipe among them where it has one; what it says itself wins."""
    own = {name: value for name, value in fields.items() if name != "recipe"}
    if "recipe" not in fields:
        return own
    recipe = fields["recipe"]
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise InvalidData(f"reading {where}: recipe: expected one of {', '.join(RECIPES)}, found {shown(recipe)}.")
    return {**RECIPES[recipe], **own}


def _axes(fields: Mapping[str, Any], where: str) -> dict[str, list[Any]]:
    """Each field with the list of its values."""
    _refuse_unknown(fields, FIELDS, where)
    listed = {name: value if isinstance(value, list) else [value] for name, value in fields.items()}
    axes = {name: [_checked(SETTINGS[name], v, where) for v in values] for name, values in listed.items()}
    for name, values in axes.items():
        if not values:
            raise InvalidData(f"reading {where}: {name} has no values, so there is nothing to train. Give one or more.")
        repeated = [v for v, times in Counter(values).items() if times > 1]
        if repeated:
            raise InvalidData(f"reading {where}: {name} has {shown(repeated[0])} twice.")
    return axes


def _mapping(value: Any, where: str, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidData(f"reading {where}: expected {what}, found {type(value).__name__}.")
    return value


def _refuse_unknown(found: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    unknown = sorted(shown(name) for name in found if name not in known)
    if unknown:
        raise InvalidData(f"reading {where}: unknown key {unknown[0]}. Known keys: {', '.join(sorted(known))}.")


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
