"""`logitcache sweep`: a grid of runs against one cache."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .common import note, quiet_libraries, runtime_options, say, say_lines
from .help_page import heading, verb
from .options import Whole
from .terminal import terminated_softly

if TYPE_CHECKING:
    from logitcache.sweeps.config import RunSpec
    from logitcache.sweeps.run import Done


@verb(
    "Train and evaluate a grid of settings against one cache.",
    example="logitcache sweep --config sweep.yaml --out sweep/ --dry-run\n"
    "logitcache sweep --config sweep.yaml --out sweep/\n"
    "logitcache report sweep/",
)
@heading("Runs")
@click.option(
    "--config",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="YAML file: model, cache, new, prior, grid, methods (docs/how-to/sweep.md).",
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder for the runs and results."
)
@click.option(
    "--jobs",
    type=Whole(min=1),
    default=1,
    show_default=True,
    help="Processes at once, one a GPU where there are GPUs; each holds the base.",
)
@click.option("--retry-failed", is_flag=True, help="Do again what failed before.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check everything as a sweep does, list the runs and what is done of them, and stop.",
)
@runtime_options
def sweep(config: Path, out: Path, jobs: int, retry_failed: bool, dry_run: bool, dtype: str, device: str) -> int:
    """Train and evaluate every run of a grid against one cache; `logitcache report` then shows what came out.

    Killed and started again, it does what is left. Several of these commands may work on one --out at the same time,
    on one machine or on many that share the folder. A run that fails is recorded, and the others go on; the exit status
    is then 1.
    """
    stop = click.get_current_context().with_resource(terminated_softly("Finished runs are kept"))
    quiet_libraries()
    from logitcache.evaluation.table import table
    from logitcache.models.loading import pick_device
    from logitcache.sweeps.config import read_config
    from logitcache.sweeps.folder import RUNS, SWEEP, state_of
    from logitcache.sweeps.prepare import check, prepare
    from logitcache.sweeps.processes import run_in_processes
    from logitcache.sweeps.run import run_all

    asked = read_config(config)
    states = [state_of(out / RUNS / run.name) for run in asked.runs]
    for doubt in dict.fromkeys(doubt for run in asked.runs for doubt in asked.run_of(run).doubts()):
        note(doubt)
    if dry_run:
        check(asked, out, dtype, pick_device(device), note)
        varied = _varied(asked.runs)
        rows = [["method", *varied, "state"]]
        for run, state in zip(asked.runs, states, strict=True):
            rows.append([run.method, *(_shown(run.settings[n]) for n in varied), state])
        say_lines(table(rows))
        finished = states.count("finished")
        say(f"{len(asked.runs):,} runs, {finished:,} of them finished. All were checked, and nothing was done.")
        return 0
    left = sum(state not in ("finished", *(() if retry_failed else ("failed",))) for state in states)
    note(f"{len(asked.runs):,} runs, {left:,} of them to do.")
    prepared = prepare(asked, out, dtype, pick_device(device), note)
    if jobs == 1:
        doing = run_all(prepared, retry_failed, stop)
    else:
        doing = run_in_processes(asked, out, dtype, device, jobs, retry_failed, quiet_libraries)
    axes = {method: _varied([run for run in asked.runs if run.method == method]) for method in asked.methods}
    for number, done in enumerate(doing, 1):
        spec = done.spec
        what = ", ".join(f"{name} {_shown(spec.settings[name])}" for name in axes[spec.method]) or "one setting"
        for sentence in done.told:
            note(f"{spec.name}: {sentence}")
        say(f"{number}/{left} {spec.method} ({what}): {_outcome(done)}")
    failed = sum(state_of(out / RUNS / run.name) == "failed" for run in asked.runs)
    finished = sum(state_of(out / RUNS / run.name) == "finished" for run in asked.runs)
    say(f"{finished:,} of {len(asked.runs):,} runs finished, {failed:,} failed: {out / SWEEP}")
    say(f"Next: logitcache report {out}")
    return 1 if failed else 0


def _varied(runs: "Sequence[RunSpec]") -> list[str]:
    """The fields in which runs differ."""
    return [name for name in runs[0].settings if len({str(run.settings[name]) for run in runs}) > 1]


def _outcome(done: "Done") -> str:
    from logitcache.evaluation.table import outcome_words

    if done.found is None or done.seconds is None:
        return f"failed: {done.error}"
    return f"{outcome_words(done.found)}; trained in {done.seconds:.0f} s"


def _shown(value: object) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
