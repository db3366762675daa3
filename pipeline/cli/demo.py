"""`logitcache demo`: the main job on an embedded default."""

from pathlib import Path
from time import perf_counter

import click

from .common import config_option, note, quiet_libraries, say, say_lines


@click.command(short_help="Show the effect on a small embedded model.")
@config_option
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo-output"),
    show_default=True,
    help="Folder for data, cache, sweep, report and picture; an interrupted demo goes on there.",
)
def demo(out: Path) -> None:
    """Show the effect on a small embedded model: plain LoRA against masked KL from a cache. A few seconds on 2 cores.

    The base knows Python's documentation; the new domain is the standard library's source code, taken from this Python.
    Trains plain LoRA at two learning rates and masked-KL LoRA, two seeds each, and writes report.md and frontier.png.
    """
    started = perf_counter()
    quiet_libraries()
    from logitcache.demo.run import DemoSettings, relative_sentences, run_demo, summary_rows
    from logitcache.evaluation.table import table

    try:
        sweep = run_demo(out, DemoSettings(), note)
    except FileNotFoundError as error:
        raise click.ClickException(str(error)) from error
    say_lines("\n" + table(summary_rows(sweep)) + "\n")
    for sentence in relative_sentences(sweep):
        say(sentence)
    seconds = f"{perf_counter() - started:.0f} s in all."
    say_lines(
        "\nNats a token on held-out text, means over seeds ± half the range. Forgot: KL to the base on prior text. "
        f"{seconds}"
    )
    say(f"Report: {out / 'report.md'}  Picture: {out / 'frontier.png'}")
