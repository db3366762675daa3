"""What a sweep came to as rows of text and as sentences: the same for the terminal, the pages and any method.

Owns how numbers are said: digits, dashes for what is absent, names of settings. Compares by `pareto`; knows nothing
of pages, pictures and files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .pareto import (
    SEED,
    Budgets,
    Estimate,
    Setting,
    best_within,
    budgets_of,
    by_method,
    hypervolume,
    least_forgetting_at,
    pareto_front,
    prevented_by,
    reference_forgetting,
    representative,
    scaled_settings,
    settings_of,
    varying,
)
from .results import Run, RunOutcome, Scalar, Sweep

Rows = list[list[str]]
FIRST, CE = "first tokens changed", "cross-entropy on prior"
"""Columns that stand beside the forgetting."""

SCALED = "parts of its change (nothing trained)"
"""What the curve between base and adapted model is called in tables and legends."""

STATUSES = ("finished", "failed", "in progress", "not evaluated", "not started")


@dataclass(frozen=True)
class View:
    """A sweep and what is compared in it: settings by method, and the budgets and limit that are common to all."""

    sweep: Sweep
    settings: list[Setting]
    groups: dict[str, list[Setting]]
    budgets: Budgets
    limit: float

    def label(self, values: dict[str, Scalar], method: str) -> str:
        """The settings in which a method's runs differ, with their values."""
        names = varying([run for run in self.sweep.runs if run.method == method])
        return ", ".join(f"{name} {value_text(values.get(name))}" for name in names)

    def of(self, setting: Setting) -> str:
        """' at lr 0.001', or nothing where the method has but one setting."""
        label = self.label(setting.values, setting.method)
        return f" at {label}" if label else ""


def view_of(sweep: Sweep) -> View:
    """What is compared in a sweep that has a finished run."""
    settings = settings_of(sweep.runs)
    limit = reference_forgetting(settings)
    return View(sweep, settings, by_method(settings, sweep.methods), budgets_of(settings), limit)


def counts_sentence(sweep: Sweep) -> str:
    """How many runs there are, and how many of them count."""
    counts = {status: sum(run.status == status for run in sweep.runs) for status in STATUSES}
    others = "".join(f", {n} {status}" for status, n in counts.items() if n and status != "finished")
    return f"{count(len(sweep.runs), 'run')}: {counts['finished']} finished{others}. Only finished runs count."


def main_rows(view: View) -> Rows:
    """A row a method: its settings and seeds, the most learning within each budget of forgetting, hypervolume; and a
    row for the parts of a method's change, where these were measured."""
    budgets = view.budgets
    heads = [f"≤ {b:.3g} ({100 * s:.0f} %)" for b, s in zip(budgets.nats, budgets.shares, strict=True)]
    rows = [["method", "settings", "seeds each", *heads, "hypervolume, nats²"]]
    for method in view.sweep.methods:
        settings = view.groups.get(method, [])
        bests = [best_within(settings, budget) for budget in budgets.nats]
        cells = ["-" if best is None else nats(best.learning.mean) for best in bests]
        area = hypervolume([(s.learning.mean, s.forgetting.mean) for s in settings], view.limit)
        rows.append([method, str(len(settings)), _seeds_each(settings), *cells, f"{area:.4f}" if settings else "-"])
        points = [point for s in settings for point in scaled_settings(s)]
        if points:
            within = [[p.learning.mean for p in points if p.forgetting.mean <= budget] for budget in budgets.nats]
            cells = ["-" if not found or max(found) <= 0 else nats(max(found)) for found in within]
            area = hypervolume([(p.learning.mean, p.forgetting.mean) for p in points], view.limit)
            rows.append([f"{method}, {SCALED}", str(len(points)), _seeds_each(settings), *cells, f"{area:.4f}"])
    return rows


def scaled_rows(view: View) -> Rows:
    """A row a measured part of a setting's change, the base and the whole among them."""
    rows = [["method", "setting", "part of the change", "learning", "forgetting", FIRST, CE]]
    for point in (point for s in view.settings for point in scaled_settings(s)):
        s = point.setting
        changed = f"{point.first_changed:.4g} of {s.outcomes[0].prior.num_documents:,}"
        both = [_interval(point.learning), _interval(point.forgetting)]
        label = view.label(s.values, s.method) or "-"
        rows.append([s.method, label, f"{point.scale:g}", *both, changed, _interval(point.ce_rise, "+")])
    return rows


def equal_learning_sentences(view: View) -> list[str]:
    """For each method's own learning, what every method forgets at least to learn as much; in the same form for all."""
    sentences = []
    for method, settings in view.groups.items():
        chosen = representative(settings, view.budgets)
        found = {m: least_forgetting_at(members, chosen.learning.mean) for m, members in view.groups.items()}
        reached = sorted((s.forgetting.mean, m) for m, s in found.items() if s is not None)
        parts = [f"{m} {nats(value)}{view.of(s)}" for value, m in reached if (s := found[m]) is not None]
        missed = [m for m, s in found.items() if s is None]
        not_reached = f". Not learnt so much at any setting: {', '.join(missed)}" if missed else ""
        sentences.append(
            f"At a learning of {nats(chosen.learning.mean)} or more ({method}{view.of(chosen)}), "
            f"the least forgetting is: {'; '.join(parts)}{not_reached}."
        )
    return sentences


def method_rows(sweep: Sweep) -> Rows:
    """What all methods share, what each keeps fixed, and what it was tried with."""
    rows = [["method", "the same in all its runs", "varied", "seeds"]]
    shared = _shared(sweep)
    if shared:
        rows.append(["all of them", ", ".join(f"{k} {value_text(v)}" for k, v in shared.items()), "-", "-"])
    for method in sweep.methods:
        runs = [run for run in sweep.runs if run.method == method]
        varied = varying(runs)
        names = [k for k in (runs[0].settings if runs else {}) if k != SEED and k not in varied and k not in shared]
        fixed = [f"{k} {value_text(runs[0].settings[k])}" for k in names if runs[0].settings[k] not in (None, "")]
        ranges = [f"{k} {', '.join(_distinct(runs, k))}" for k in varied]
        rows.append(
            [method, ", ".join(fixed) or "-", "; ".join(ranges) or "-", ", ".join(_distinct(runs, SEED)) or "-"]
        )
    return rows


def _shared(sweep: Sweep) -> dict[str, Any]:
    """The settings that are the same in every run of several methods, less those that say nothing."""
    if len({run.method for run in sweep.runs}) < 2:
        return {}
    first, others = sweep.runs[0].settings, [run.settings for run in sweep.runs[1:]]
    same = {k: v for k, v in first.items() if k != SEED and all(k in o and o[k] == v for o in others)}
    return {k: v for k, v in same.items() if v not in (None, "")}


def _distinct(runs: Sequence[Run], name: str) -> list[str]:
    return list(dict.fromkeys(value_text(run.settings.get(name)) for run in runs))


def budget_rows(view: View) -> Rows:
    """A row a method: its best setting within each budget of forgetting."""
    rows = [["method", *(f"forgetting ≤ {budget:.3g}" for budget in view.budgets.nats)]]
    for method, settings in view.groups.items():
        bests = [best_within(settings, budget) for budget in view.budgets.nats]
        said = [
            "-" if b is None else f"{nats(b.learning.mean)}, forgets {nats(b.forgetting.mean)}{view.of(b)}"
            for b in bests
        ]
        rows.append([method, *said])
    return rows


def front_rows(view: View) -> Rows:
    """The Pareto front, from the least learning to the most."""
    rows = [["method", "setting", "learning", "forgetting", FIRST, CE, "seeds"]]
    for s in pareto_front(view.settings):
        beside = [_first_tokens(s), _interval(s.ce_rise, "+")]
        rows.append([s.method, view.label(s.values, s.method) or "-", *_both(s), *beside, str(s.learning.num_seeds)])
    return rows


def setting_rows(view: View) -> Rows:
    """A row a setting: means over its seeds."""
    columns: dict[str, Callable[[Setting], str]] = {
        "method": lambda s: s.method,
        "setting": lambda s: view.label(s.values, s.method) or "-",
        "seeds": lambda s: str(s.learning.num_seeds),
        "learning": lambda s: _both(s)[0],
        "forgetting": lambda s: _both(s)[1],
        FIRST: _first_tokens,
        CE: lambda s: _interval(s.ce_rise, "+"),
        "prevented": lambda s: _percent(prevented_by(s, view.settings)),
        "prior perplexity": lambda s: _signed(s.mean(lambda o: o.prior.drift_percent), " %"),
        "KL on new": lambda s: _or_dash(s.mean(lambda o: o.new.kl_nats)),
        "same first token": lambda s: _percent(s.mean(lambda o: o.prior.agreement)),
        "s a run": lambda s: f"{s.mean(lambda o: o.seconds) or 0:.3g}",
    }
    return [list(columns), *([cell(s) for cell in columns.values()] for s in view.settings)]


def run_rows(sweep: Sweep) -> Rows:
    """A row a run, whatever its status."""
    columns: dict[str, Callable[[RunOutcome], str]] = {
        "learning": lambda o: nats(o.learning),
        "forgetting": lambda o: nats(o.forgetting),
        FIRST: lambda o: f"{o.prior.num_first_changed:,} of {o.prior.num_documents:,}",
        CE: lambda o: nats(o.prior.ce_rise, "+"),
        "new perplexity": lambda o: f"{o.new.perplexity_after:.4g}",
        "prior perplexity": lambda o: f"{o.prior.perplexity_after:.4g}",
        "prior perplexity, change": lambda o: _signed(o.prior.drift_percent, " %"),
        "steps": lambda o: f"{o.num_steps:,}",
        "s": lambda o: f"{o.seconds:.3g}",
        "peak GiB": lambda o: f"{o.peak_memory_bytes / 2**30:.2f}",
    }
    rows = [["run", "method", "status", *columns]]
    for run in sweep.runs:
        o = run.outcome
        rows.append([run.name, run.method, run.status, *("-" if o is None else cell(o) for cell in columns.values())])
    return rows


def _seeds_each(settings: Sequence[Setting]) -> str:
    counts = sorted({s.learning.num_seeds for s in settings})
    return "-" if not counts else f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _both(setting: Setting) -> list[str]:
    return [_interval(setting.learning), _interval(setting.forgetting)]


def _first_tokens(setting: Setting) -> str:
    changed = setting.mean(lambda o: o.prior.num_first_changed)
    assert changed is not None
    return f"{changed:.4g} of {setting.outcomes[0].prior.num_documents:,}"


def _interval(value: Estimate, sign: str = "") -> str:
    if value.low is None or value.high is None:
        return nats(value.mean, sign)
    return f"{nats(value.mean, sign)} [{nats(value.low, sign)}, {nats(value.high, sign)}]"


def count(number: int, noun: str) -> str:
    """How many, with the noun in its number: 1 run, 2 runs."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def nats(value: float, sign: str = "") -> str:
    """Three decimals, and no minus sign on what rounds to zero."""
    return f"{round(value, 3) + 0.0:{sign}.3f}"


def _or_dash(value: float | None) -> str:
    return "-" if value is None else nats(value)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{round(100 * share) + 0:d} %" if abs(share) < 1e6 else f"{100 * share:.2g} %"


def _signed(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{round(value, 1) + 0.0:+.1f}{unit}"


def value_text(value: Scalar) -> str:
    """A setting, as it was written."""
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
