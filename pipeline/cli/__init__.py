"""The command line: `logitcache VERB`. The only place that prints, and exits.

Owns exit statuses: 0 done; 1 failed; 2 wrong usage; 3 corrupt data; 4 the cache does not belong to this model,
tokenizer or data; 5 cache incomplete; 130 interrupted; 143 stopped by SIGTERM. One file a verb; torch is imported when
a verb runs.
"""

import io
import os
import re
import sys
import traceback
from collections.abc import Sequence

import click

from logitcache.errors import (
    InputNotFound,
    InvalidSettings,
    NotComparable,
    NotTheBase,
    PipelineError,
    UnreadableSweep,
    UnsuitableAdapter,
    is_file_failure,
    is_out_of_memory,
)
from logitcache.events import Terminated
from logitcache.storage import (
    AmbiguousData,
    CacheError,
    CorruptCache,
    IdentityMismatch,
    IncompleteCache,
    LinkRefused,
    NotACache,
    PositionNotCaptured,
    SampleNotCached,
)

from .answers import answers
from .calibrate import calibrate
from .common import note, say_lines
from .convert import convert
from .demo import demo
from .evaluate import evaluate
from .export import export
from .inspect import inspect
from .merge import merge
from .nullspace import nullspace
from .options import Verbs
from .precompute import precompute
from .prune import prune
from .pull import pull
from .push import push
from .repair import repair
from .report import report
from .status import status
from .sweep import sweep
from .train import train
from .verify import verify

STATUSES: dict[type[Exception], int] = {
    CorruptCache: 3,
    IdentityMismatch: 4,
    AmbiguousData: 4,
    SampleNotCached: 4,
    PositionNotCaptured: 4,
    NotTheBase: 4,
    NotComparable: 4,
    IncompleteCache: 5,
    NotACache: 2,
    LinkRefused: 2,
    UnreadableSweep: 3,
    InputNotFound: 2,
    InvalidSettings: 2,
    UnsuitableAdapter: 2,
}
"""Exit status by class; every other refusal is 1."""

_LINES = re.compile(r"\s*\n\s*")
"""A refusal is one line, whatever it quotes."""


@click.group(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="logitcache precompute --model base/ --data train.jsonl --cache cache/\n"
    "logitcache train --model base/ --cache cache/ --out adapter/\n"
    "logitcache evaluate --model base/ --adapter adapter/ --data new.jsonl --prior prior.jsonl",
)
@click.version_option(package_name="logitcache")
def cli() -> None:
    """Fine-tune with LoRA against a cache of the base model's own predictions.

    \b
    Exit status: 0 done; 1 failed; 2 wrong usage; 3 corrupt data; 4 the cache does not belong
    to this model, tokenizer or data; 5 cache incomplete; 130 interrupted; 143 SIGTERM.
    """


for _verb in (
    *(calibrate, precompute, status, inspect, verify, repair, prune, merge, convert, export, push, pull),
    *(nullspace, train, answers, evaluate, sweep, report, demo),
):
    cli.add_command(_verb)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a verb and exit with its status. A defect of this program shows its traceback, as everything: escaped."""
    try:
        status = run(arguments)
    except Exception:
        say_lines(traceback.format_exc().rstrip(), err=True)
        status = 1
    if status in (130, 143):  # at once: a thread may still be writing, and what it leaves is no harm
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return its status; a refusal is one sentence on stderr, never a traceback."""
    try:
        status = cli.main(args=arguments, prog_name="logitcache", standalone_mode=False)
    except click.ClickException as error:
        told = io.StringIO()
        error.show(told)
        say_lines(told.getvalue().rstrip("\n"), err=True)
        return error.exit_code
    except Terminated as stopped:
        note(f"logitcache: stopped by SIGTERM. {stopped.kept}; {stopped.goes_on}.")
        return 143
    except (click.Abort, KeyboardInterrupt):
        note(
            "logitcache: interrupted. What was committed is kept; run the same command again to go on "
            "(train: with --resume)."
        )
        return 130
    except (CacheError, PipelineError) as error:
        note(f"logitcache: {_LINES.sub(' ', str(error))}")
        return STATUSES.get(type(error), 1)
    except Exception as error:
        failure = _tell(error)
        if failure is None:
            raise  # a defect of this program: its traceback is what a report of it needs
        note(f"logitcache: {failure}")
        return 1
    return status if isinstance(status, int) else 0


def _tell(error: Exception) -> str | None:
    """A sentence about a refusal of the machine: of its disk or its memory."""
    what = " ".join(str(error).split()).rstrip(".")
    if is_out_of_memory(error):
        return (
            f"memory ran out ({what[:200]}). What was committed is kept. Run the same command again with a smaller "
            "--batch-tokens (answers: --batch-size; train: into a new --out)."
        )
    if is_file_failure(error):
        if isinstance(error, OSError) and error.strerror:
            what = error.strerror + (f": {error.filename}" if error.filename else "")
        return (
            f"reading or writing a file failed ({what[:400]}). What was committed is kept. "
            "Put that right and run the same command again (train: with --resume)."
        )
    return None


__all__ = ["STATUSES", "cli", "main", "run"]
