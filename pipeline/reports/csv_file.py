"""All runs of a sweep as results.csv: a row a run, a column a setting or a number, in full precision.

Owns the columns and their meanings. Reads nothing but `results`; must not import torch.
"""

import csv
import io
from collections.abc import Callable
from pathlib import Path

from logitcache.storage.files import replace_file
from logitcache.storage.plain_text import escaped

from .results import AXES, Run, RunOutcome, Scalar, Sweep

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
    "step_seconds": ("seconds a step, the median", _measured(lambda o: o.cost.step_seconds)),
    "base_step_seconds": ("what a live base would have added to a step", _measured(lambda o: o.cost.base_step_seconds)),
    "measured_alone": ("whether nothing else wanted a core of the machine", _measured(lambda o: o.cost.alone)),
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
