"""`logitcache report`: what a sweep came to, as pages, pictures and a table."""

from pathlib import Path

import click

from .common import config_option, quiet_libraries, say, say_lines
from .help_page import heading, verb


@verb(
    "What a sweep came to: report.html, report.md, results.csv and pictures.",
    example="logitcache report sweep/",
)
@config_option
@heading("Output")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), metavar="DIR")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Folder for the report.  [default: that of the sweep]",
)
def report(folder: Path, out: Path | None) -> None:
    """Compare the runs of a sweep: learning against forgetting, budgets, hypervolume, curves and cost.

    A sweep that is still running, or that has failed runs, is reported as far as it has come. report.html is one file
    and needs no network.
    """
    quiet_libraries()
    from logitcache.evaluation.table import table
    from logitcache.reports.build import write_sweep_report

    written = write_sweep_report(folder, folder if out is None else out)
    for line in written.answer:
        say(line)
    if written.rows:
        say("")
        say(
            "Most learning within a budget of forgetting (KL to the base on prior text), nats a token, means over "
            "seeds:"
        )
        say_lines("\n" + table(written.rows) + "\n")
    for sentence in written.sentences:
        say(sentence)
    say("")
    say("Wrote " + "  ".join(str(path) for path in written.files))
