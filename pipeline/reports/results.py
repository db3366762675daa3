"""What a sweep left in its folder: every run with its outcome, its curves or its error.

Owns reading the folder and refusing what is damaged or contradicts itself: a report of wrong numbers is worse than
none. Takes no means (that is `pareto`), makes no pictures, and must not import torch.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from logitcache.errors import InputNotFound, UnreadableSweep
from logitcache.json_files import ADVICE, CheckedJson, read_lines
from logitcache.storage.plain_text import one_line, shown
from logitcache.sweeps.config import FIELDS
from logitcache.sweeps.folder import FAILED, LOG, RESULT, RUN, SCALES, SWEEP, VERSION
from logitcache.sweeps.folder import RUNS as RUNS
from logitcache.sweeps.run_cost import RunCost as RunCost

AXES = FIELDS
"""Settings that every run has, in the order of the columns; None where one does not apply."""

MAX_NAME = 500
"""Characters of the name of a method, a run, a setting."""

MAX_NATS, MAX_LOGGED, MAX_SECONDS = 1e6, 1e30, 1e12
"""Of a mean over text; of a line of a log, where a run may have diverged; of any time."""

SAME_TEXT_NATS = 0.01
"""How far the untouched base's cross-entropy may differ between runs of a sweep: rounding on other machines."""

_ABSOLUTE = re.compile(r"(?:file|local)://(?=/)|(?<![^\s'\"(\[=,:])(?<!:/)~?/(?:[^\s/'\"]+/)*(?=[^\s/'\"])")

Scalar = str | int | float | bool | None
Status = Literal["finished", "failed", "in progress", "not evaluated", "not started"]


@dataclass(frozen=True)
class HeldOut:
    """One held-out text under the untouched base and the adapted model: means over positions, in nats."""

    num_positions: int
    ce_before: float
    ce_after: float
    perplexity_before: float
    perplexity_after: float
    accuracy_before: float
    accuracy_after: float
    #: KL(base || adapted), over the base's most probable tokens with the rest as one outcome.
    kl_nats: float
    #: The adapted model's cross-entropy against the base's distribution.
    base_ce_nats: float
    #: Share of positions where both predict the same token first.
    agreement: float
    #: Documents at whose first supervised position they predict another token first.
    num_first_changed: int
    num_documents: int
    #: Change of perplexity; None beyond the range of a float.
    drift_percent: float | None

    @property
    def ce_rise(self) -> float:
        """Cross-entropy after less before, nats a token."""
        return self.ce_after - self.ce_before


@dataclass(frozen=True)
class Outcome:
    """What a model came to on new and on prior text."""

    new: HeldOut
    prior: HeldOut

    @property
    def learning(self) -> float:
        """Fall of cross-entropy on new text, nats a token."""
        return -self.new.ce_rise

    @property
    def forgetting(self) -> float:
        """How far the adapted model is from the base on prior text: the KL, nats a token."""
        return self.prior.kl_nats


@dataclass(frozen=True)
class ScaledOutcome(Outcome):
    """Of a part of the change between the base and a run: 0 would be the base, 1 is the run."""

    scale: float


@dataclass(frozen=True)
class RunOutcome(Outcome):
    """What a finished run came to, and what it cost."""

    seconds: float
    num_steps: int
    num_tokens: int
    peak_memory_bytes: int
    cost: RunCost


@dataclass(frozen=True)
class CurvePoint:
    """A line of train_log.jsonl: means over the steps since the one before, nats a position."""

    step: int
    ce: float
    kl: float | None


@dataclass(frozen=True)
class Run:
    """One run."""

    name: str
    method: str
    settings: dict[str, Scalar]
    status: Status
    #: Of finished runs only.
    outcome: RunOutcome | None = None
    #: Of failed ones only.
    error: str | None = None
    #: Of failed ones only.
    error_step: int | None = None
    curve: tuple[CurvePoint, ...] = ()
    #: Between base and run, where it was measured, by rising scale.
    scaled: tuple[ScaledOutcome, ...] = ()
    #: Why it could not be.
    not_scaled: str | None = None


@dataclass(frozen=True)
class Sweep:
    """A sweep folder: what was compared on what, and every run of it in the order of the configuration."""

    folder: Path
    model: str
    cache: str | None
    new: str
    prior: str
    num_train_tokens: int
    num_train_positions: int
    methods: tuple[str, ...]
    runs: tuple[Run, ...]
    #: What a `logitcache train` of a run is given beside its settings, by the names of the flags.
    given: dict[str, Any]

    @property
    def finished(self) -> tuple[Run, ...]:
        """The runs that count."""
        return tuple(run for run in self.runs if run.outcome is not None)


def read_sweep(folder: Path) -> Sweep:
    """The sweep in a folder, as far as it has come.

    Raises `InputNotFound` where there is no sweep, `UnreadableSweep` where a file is damaged, half-written, of another
    format, or says something else than another one.
    """
    if not (folder / SWEEP).is_file():
        raise InputNotFound(
            f"reading the sweep in {folder}: expected {SWEEP} in it, found none. Give the --out folder of a sweep."
        )
    head = CheckedJson.of(folder / SWEEP)
    if head.values.get("format") != VERSION:
        raise head.wrong("format", f"{VERSION}")
    methods = tuple(head.texts("methods"))
    if any(method != one_line(method, MAX_NAME) for method in methods):
        raise head.wrong("methods", f"names of at most {MAX_NAME} characters that can be shown")
    plans = [_plan(part.only(("name", "method", "settings")), methods) for part in head.parts("runs")]
    names = [name for name, _, _ in plans]
    seen: dict[str, str] = {}
    for name, method, settings in plans:
        other = seen.setdefault(json.dumps([method, settings], sort_keys=True), name)
        if names.count(name) > 1 or other != name:
            raise head.wrong("runs", "each run and each combination of settings once", f"{name} and {other}")
    runs = tuple(_read_run(folder / RUNS / name, *plan) for plan in plans for name in [plan[0]])
    _check_same_text(runs)
    return Sweep(
        folder=folder,
        model=_place(head.text("model")),
        cache=None if head.values.get("cache") is None else _place(head.text("cache")),
        new=_place(head.text("new")),
        prior=_place(head.text("prior")),
        num_train_tokens=head.whole("num_train_tokens"),
        num_train_positions=head.whole("num_train_positions"),
        methods=methods,
        runs=runs,
        given=_given(head.part("given")),
    )


def _given(part: CheckedJson) -> dict[str, Any]:
    """Plain values, paths as they were given."""
    for name in ("model", "cache"):
        part.text(name)
    for name, value in part.values.items():
        values = value if isinstance(value, list) else [value]
        if not all(v is None or isinstance(v, (str, int, float)) for v in values) or name != one_line(name, MAX_NAME):
            raise part.wrong(shown(name).strip("'"), "a plain value, or a list of them")
    return dict(part.values)


def _place(name: str) -> str:
    """A path, URL or hub id as a page shows it to others: of a path that is absolute the last part, no secret."""
    return without_folders(one_line(name, 500))


def without_folders(text: str) -> str:
    """A text in which of every absolute path only the last part is left."""
    return _ABSOLUTE.sub("", _ABSOLUTE.sub("", text))


def _settings(part: CheckedJson) -> dict[str, Scalar]:
    values = part.part("settings").values
    odd = [key for key, v in values.items() if not (v is None or isinstance(v, (str, int, float, bool)))]
    odd += [key for key, v in values.items() if isinstance(v, (int, float)) and not abs(v) <= sys.float_info.max]
    odd += [
        key for key, v in values.items() if key != one_line(key, MAX_NAME) or (isinstance(v, str) and len(v) > 1000)
    ]
    if odd:
        raise part.wrong("settings", f"one plain value for {one_line(odd[0], MAX_NAME)}", shown(values[odd[0]]))
    return {**dict.fromkeys(AXES), **values}


def _plan(part: CheckedJson, methods: tuple[str, ...]) -> tuple[str, str, dict[str, Scalar]]:
    """Name, method and settings of a run that sweep.json lists."""
    name, method, settings = part.text("name"), part.text("method"), _settings(part)
    if Path(name).name != name or "\\" in name or name == ".." or name != one_line(name, MAX_NAME):
        raise part.wrong("name", "the name of a folder")
    if method not in methods:
        raise part.wrong("method", f"one of {', '.join(methods)[:200]}")
    if settings["seed"] is None:
        raise part.wrong("settings", "a seed")
    return name, method, settings


def _check_is(part: CheckedJson, name: str, method: str, settings: dict[str, Scalar]) -> None:
    """Raise `UnreadableSweep` where this file is of another run than sweep.json says."""
    mine, found = (name, method), (part.text("name"), part.text("method"))
    if mine != found:
        raise part.wrong("name", " of ".join(mine), " of ".join(found))
    own = _settings(part)
    differs = [key for key, value in settings.items() if own.get(key) != value]
    if differs:
        key = differs[0]
        raise part.wrong(f"settings.{key}", f"{shown(settings[key])}, as in {SWEEP}", shown(own.get(key)))


def _read_run(folder: Path, name: str, method: str, settings: dict[str, Scalar]) -> Run:
    if (folder / RESULT).exists():
        result = CheckedJson.of(folder / RESULT)
        _check_is(result, name, method, settings)
        outcome = RunOutcome(
            new=_held_out(result.part("new")),
            prior=_held_out(result.part("prior")),
            seconds=result.number("seconds", 0, MAX_SECONDS),
            num_steps=result.whole("num_steps"),
            num_tokens=result.whole("num_tokens"),
            peak_memory_bytes=result.whole("peak_memory_bytes"),
            cost=_cost(result.part("cost")),
        )
        scaled, reason = _scaled(folder / SCALES, name, method, settings)
        curve = _curve(folder / LOG, whole=True)
        return Run(name, method, settings, "finished", outcome, curve=curve, scaled=scaled, not_scaled=reason)
    if (folder / FAILED).exists():
        failure = CheckedJson.of(folder / FAILED)
        _check_is(failure, name, method, settings)
        step = None if failure.values.get("step") is None else failure.whole("step")
        error = without_folders(one_line(failure.text("error")))
        return Run(name, method, settings, "failed", None, error, step, _curve(folder / LOG, whole=False))
    status: Status = "not started"
    if (folder / RUN).exists():
        status = "not evaluated" if CheckedJson.of(folder / RUN).text("status") == "finished" else "in progress"
    return Run(name, method, settings, status, curve=_curve(folder / LOG, whole=False))


def _check_same_text(runs: tuple[Run, ...]) -> None:
    """Raise `UnreadableSweep` where two runs were not evaluated with the same base on the same text."""
    outcomes: list[tuple[str, Outcome]] = [(run.name, run.outcome) for run in runs if run.outcome is not None]
    outcomes += [(f"{run.name} at {point.scale:g}", point) for run in runs for point in run.scaled]
    for name, outcome in outcomes:
        first_name, first = outcomes[0]
        for kind, one, other in (("new", first.new, outcome.new), ("prior", first.prior, outcome.prior)):
            differs = abs(one.ce_before - other.ce_before) > SAME_TEXT_NATS
            sizes = [(text.num_positions, text.num_documents) for text in (one, other)]
            if differs or sizes[0] != sizes[1]:
                raise UnreadableSweep(
                    f"comparing runs {first_name} and {name}: expected the untouched base to be the same on {kind} "
                    f"text, found {one.ce_before:.4f} nats at {one.num_positions:,} positions and "
                    f"{other.ce_before:.4f} at {other.num_positions:,}. They were evaluated on other data or with "
                    "another base, and do not compare. Evaluate one of them again."
                )


def _held_out(part: CheckedJson) -> HeldOut:
    before, after = part.part("before"), part.part("after")
    if before.whole("num_positions") != after.whole("num_positions"):
        raise after.wrong("num_positions", f"{before.whole('num_positions')}, as before")
    if part.whole("num_first_changed") > part.whole("num_documents"):
        raise part.wrong("num_first_changed", f"at most the {part.whole('num_documents'):,} documents")
    return HeldOut(
        num_positions=before.whole("num_positions"),
        ce_before=before.number("ce_nats", 0, MAX_NATS),
        ce_after=after.number("ce_nats", 0, MAX_NATS),
        perplexity_before=before.number("perplexity", 0),
        perplexity_after=after.number("perplexity", 0),
        accuracy_before=before.number("token_accuracy", 0, 1),
        accuracy_after=after.number("token_accuracy", 0, 1),
        kl_nats=part.number("kl_nats", -MAX_NATS, MAX_NATS),
        base_ce_nats=part.number("base_ce_nats", -MAX_NATS, MAX_NATS),
        agreement=part.number("agreement", 0, 1),
        num_first_changed=part.whole("num_first_changed"),
        num_documents=part.whole("num_documents"),
        drift_percent=part.number_or_none("drift_percent"),
    )


def _cost(part: CheckedJson) -> RunCost:
    return RunCost(
        step_seconds=part.number_or_none("step_seconds", 0, MAX_SECONDS),
        base_step_seconds=part.number_or_none("base_step_seconds", 0, MAX_SECONDS),
        base_once_seconds=part.number_or_none("base_once_seconds", 0, MAX_SECONDS),
        load=part.number_or_none("load", 0, MAX_SECONDS),
        own_threads=part.whole("own_threads"),
    )


def _scaled(
    path: Path, name: str, method: str, settings: dict[str, Scalar]
) -> tuple[tuple[ScaledOutcome, ...], str | None]:
    """The curve between the base and a run, by rising scale, and why there is none."""
    if not path.exists():
        return (), None
    found = CheckedJson.of(path)
    _check_is(found, name, method, settings)
    points = [
        ScaledOutcome(_held_out(p.part("new")), _held_out(p.part("prior")), p.number("scale", 0, 2))
        for p in found.parts("points")
    ]
    if len({point.scale for point in points}) < len(points):
        raise found.wrong("points", "each scale once")
    reason = None if found.values.get("error") is None else without_folders(one_line(found.text("error")))
    return tuple(sorted(points, key=lambda point: point.scale)), reason


def _curve(path: Path, whole: bool) -> tuple[CurvePoint, ...]:
    """Points by step. Unless the run is finished (`whole`), its last line may be one that was being written."""
    if not path.exists():
        return ()
    points: dict[int, CurvePoint] = {}
    try:
        entries = [CheckedJson(path, v, f"line {i}, ") for i, v in enumerate(read_lines(path, not whole), 1)]
    except ValueError as error:
        raise UnreadableSweep(f"reading {path}: {error}. {ADVICE}") from error
    for entry in entries:
        kl = entry.number_or_none("kl", -MAX_LOGGED, MAX_LOGGED)
        point = CurvePoint(entry.whole("step"), entry.number("ce", -MAX_LOGGED, MAX_LOGGED), kl)
        points[point.step] = point
    return tuple(points[step] for step in sorted(points))
