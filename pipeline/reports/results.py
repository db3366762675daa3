"""What a sweep left in its folder: every run with its outcome, its curve or its error, and all of them as results.csv.

Owns reading the folder and refusing what is damaged or contradicts itself: a report of wrong numbers is worse than
none. Takes no means (that is `pareto`), makes no pictures, and must not import torch.
"""

import csv
import io
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from logitcache.errors import InputNotFound, UnreadableSweep
from logitcache.json_files import ADVICE, CheckedJson, read_lines
from logitcache.storage.files import replace_file
from logitcache.storage.plain_text import escaped, one_line, shown
from logitcache.sweeps.config import FIELDS

SWEEP, RUNS, RESULT, FAILED, RUN, LOG = (
    *("sweep.json", "runs", "result.json", "failed.json", "run.json"),
    "train_log.jsonl",
)
FORMAT = 2
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
class RunOutcome:
    """What a finished run came to on new and on prior text, and what it cost."""

    new: HeldOut
    prior: HeldOut
    seconds: float
    num_steps: int
    num_tokens: int
    peak_memory_bytes: int

    @property
    def learning(self) -> float:
        """Fall of cross-entropy on new text, nats a token."""
        return -self.new.ce_rise

    @property
    def forgetting(self) -> float:
        """How far the adapted model is from the base on prior text: the KL, nats a token."""
        return self.prior.kl_nats


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


@dataclass(frozen=True)
class Cost:
    """Measured on one cached run: seconds a step, of the base's forward on the same batches, and once over all."""

    run: str
    step_seconds: float
    live_extra_seconds: float
    capture_seconds: float


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
    cost: Cost | None

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
    if head.values.get("format") != FORMAT:
        raise head.wrong("format", f"{FORMAT}")
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
        cost=None if head.values.get("cost") is None else _cost(head.part("cost")),
    )


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
        )
        return Run(name, method, settings, "finished", outcome, curve=_curve(folder / LOG, whole=True))
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
    outcomes = [(run.name, run.outcome) for run in runs if run.outcome is not None]
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


def _cost(part: CheckedJson) -> Cost:
    return Cost(
        run=part.text("run"),
        step_seconds=part.number("step_seconds", 0, MAX_SECONDS),
        live_extra_seconds=part.number("live_extra_seconds_a_step", 0, MAX_SECONDS),
        capture_seconds=part.number("capture_seconds", 0, MAX_SECONDS),
    )


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


Cell = Callable[[Run], Scalar]


def _measured(value: Callable[[RunOutcome], float | None]) -> Cell:
    return lambda run: None if run.outcome is None else value(run.outcome)


COLUMNS: dict[str, tuple[str, Cell]] = {
    "name": ("folder of the run under runs/", lambda r: r.name),
    "method": ("name of the method", lambda r: r.method),
    "status": ("finished, failed, in progress, not evaluated or not started", lambda r: r.status),
    "error": ("why a failed run failed", lambda r: r.error),
    "error_step": ("optimizer step at which it failed", lambda r: r.error_step),
    "learning_nats": ("new_ce_before_nats - new_ce_after_nats", _measured(lambda o: o.learning)),
    "forgetting_nats": ("mean KL(base || adapted) on prior text", _measured(lambda o: o.forgetting)),
    "prior_first_changed": (
        "documents of prior text whose first supervised token is predicted otherwise",
        _measured(lambda o: o.prior.num_first_changed),
    ),
    "prior_documents": ("documents of prior text", _measured(lambda o: o.prior.num_documents)),
    "prior_ce_rise_nats": ("prior_ce_after_nats - prior_ce_before_nats", _measured(lambda o: o.prior.ce_rise)),
    "new_ce_before_nats": ("cross-entropy of the base on new text, nats a token", _measured(lambda o: o.new.ce_before)),
    "new_ce_after_nats": ("the same of the adapted model", _measured(lambda o: o.new.ce_after)),
    "new_perplexity_before": ("exp(cross-entropy)", _measured(lambda o: o.new.perplexity_before)),
    "new_perplexity_after": ("the same of the adapted model", _measured(lambda o: o.new.perplexity_after)),
    "new_accuracy_before": (
        "share of tokens that are predicted first, 0 to 1",
        _measured(lambda o: o.new.accuracy_before),
    ),
    "new_accuracy_after": ("the same of the adapted model", _measured(lambda o: o.new.accuracy_after)),
    "new_kl_nats": ("mean KL(base || adapted) on new text", _measured(lambda o: o.new.kl_nats)),
    "new_positions": ("predicted tokens of new text", _measured(lambda o: o.new.num_positions)),
    "prior_ce_before_nats": ("cross-entropy of the base on prior text", _measured(lambda o: o.prior.ce_before)),
    "prior_ce_after_nats": ("the same of the adapted model", _measured(lambda o: o.prior.ce_after)),
    "prior_perplexity_before": ("exp(cross-entropy)", _measured(lambda o: o.prior.perplexity_before)),
    "prior_perplexity_after": ("the same of the adapted model", _measured(lambda o: o.prior.perplexity_after)),
    "prior_accuracy_before": ("share of tokens that are predicted first", _measured(lambda o: o.prior.accuracy_before)),
    "prior_accuracy_after": ("the same of the adapted model", _measured(lambda o: o.prior.accuracy_after)),
    "prior_base_ce_nats": ("cross-entropy against the base's distribution", _measured(lambda o: o.prior.base_ce_nats)),
    "prior_agreement": ("share of positions with the same first token", _measured(lambda o: o.prior.agreement)),
    "prior_drift_percent": ("change of perplexity on prior text", _measured(lambda o: o.prior.drift_percent)),
    "prior_positions": ("predicted tokens of prior text", _measured(lambda o: o.prior.num_positions)),
    "train_seconds": ("seconds of training", _measured(lambda o: o.seconds)),
    "num_steps": ("optimizer steps", _measured(lambda o: o.num_steps)),
    "num_tokens": ("tokens trained on, repeats counted", _measured(lambda o: o.num_tokens)),
    "peak_memory_bytes": (
        "peak memory of the process, of the GPU where there is one",
        _measured(lambda o: o.peak_memory_bytes),
    ),
}
"""results.csv: header, meaning and value. Between error_step and learning_nats stand the settings, one column each."""

_LAST_BEFORE_SETTINGS = "error_step"


def setting_names(sweep: Sweep) -> list[str]:
    """Every field of any run's settings: those of `AXES`, then others by name."""
    others = {key for run in sweep.runs for key in run.settings} - set(AXES)
    return [*AXES, *sorted(others)]


def write_csv(sweep: Sweep, path: Path) -> None:
    """One row a run, whatever its status; empty where there is nothing. Numbers in full precision."""
    names = list(COLUMNS)
    cut = names.index(_LAST_BEFORE_SETTINGS) + 1
    extra = setting_names(sweep)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([_cell(name) for name in [*names[:cut], *extra, *names[cut:]]])
    for run in sweep.runs:
        cells = [COLUMNS[name][1](run) for name in names]
        row = [*cells[:cut], *(run.settings.get(key) for key in extra), *cells[cut:]]
        writer.writerow([_cell(value) for value in row])
    replace_file(path, text.getvalue().encode())


def _cell(value: Scalar) -> Scalar:
    """Text as text: a spreadsheet would take what begins with one of these signs for a formula, and run it."""
    if not isinstance(value, str):
        return value
    text = escaped(value)
    return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@")) else text
