"""`logitcache answers`: what a model itself says, as the prior text on which forgetting shows."""

from pathlib import Path
from typing import Any

import click

from logitcache.evaluation.settings import AnswerSettings
from logitcache.models.settings import LoadSettings

from .common import config_option, model_option, note, progress_bar, quiet_libraries, say
from .help_page import heading, verb
from .options import options_of, settings_from


@verb(
    "Let a model answer prompts, and write the chats: prior text to measure forgetting on.",
    example="logitcache answers --model base/ --out prior.jsonl",
)
@config_option
@heading("Model, prompts and output")
@model_option
@click.option(
    "--adapter", metavar="DIR", help="Folder of a trained adapter, or model, that answers in the base's place."
)
@click.option(
    "--prompts",
    metavar="FILE",
    help="A text file with a prompt a line, or rows with prompt or messages.  [default: 100 everyday prompts]",
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="JSONL file to write."
)
@options_of(AnswerSettings)
@options_of(LoadSettings)
def answers(model: str, adapter: str | None, prompts: str | None, out: Path, **values: Any) -> None:
    """Let a model answer prompts greedily and write rows of messages, in the order of the prompts.

    A base's own answers are the prior text on which forgetting shows first: give the file to evaluate --prior, or to a
    sweep. An answer that reaches --max-new-tokens ends there and is kept; an empty one is left out. Both are told.
    """
    settings, loading = settings_from(AnswerSettings, values), settings_from(LoadSettings, values)
    quiet_libraries()
    from logitcache.evaluation.answers import answers as job
    from logitcache.evaluation.prompts import everyday_prompts, read_prompts

    chats = everyday_prompts() if prompts is None else read_prompts(prompts, note)
    with progress_bar("answers", len(chats), unit=" prompts") as bar:
        try:
            answered = job(model, chats, out, adapter=adapter, settings=settings, loading=loading, progress=bar.update)
        except FileExistsError as error:
            raise click.UsageError(f"{out} exists. Choose another file, or remove it.") from error
    if answered.num_cut:
        note(
            f"{answered.num_cut:,} of {len(chats):,} answers reached --max-new-tokens {settings.max_new_tokens:,} and "
            "end there."
        )
    if answered.num_empty:
        note(f"{answered.num_empty:,} of {len(chats):,} answers were empty and are left out.")
    num_tokens = sum(answer.num_tokens for answer in answered.kept)
    say(f"Wrote {len(answered.kept):,} answers of {num_tokens:,} tokens: {out}")
