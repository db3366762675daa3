"""`logitcache train`: an adapter or a whole model, regularised by a cache, or taught by it."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from logitcache.adapters.settings import NO_PLACE, AdapterSettings, without_place
from logitcache.data.settings import OF_TEMPLATE, DataSettings
from logitcache.events import DataNoted, Trained
from logitcache.training.settings import (
    MEMORY,
    PENALTIES,
    RECIPES,
    AnchorSettings,
    EvalSettings,
    RunSettings,
    run_settings,
    without_base,
)

from .common import CachePath, config_option, data_option, log_json_option, quiet_libraries, say
from .evaluation_words import evaluation_words
from .help_page import heading, verb
from .options import Whole, as_usage, check_has_rows, options_of, settings_from, was_given
from .terminal import Console, terminated_softly
from .train_plan import print_plan

if TYPE_CHECKING:
    from logitcache.models.loading import Base
    from logitcache.pairing.step_zero import StepZero
    from logitcache.storage import LogitCache
    from logitcache.training.anchors import Anchor
    from logitcache.training.run import TrainReport

ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Of transformers; what is not installed here, it says."""

ANCHORS_OWN = tuple(run_settings("anchor"))
"""What has no place where there is no anchor cache."""

ANCHOR_WEIGHT = (
    "Weight of the KL on the samples of the anchor cache; given once for each, or once for all.  "
    f"[default: {AnchorSettings().weight}]"
)
"""Its help on the line, where it may be given several times."""


@verb(
    "Train an adapter, or a model, against the cached base or teacher.",
    example="logitcache train --model base/ --cache cache/ --out adapter/ --plan\n"
    "logitcache train --model base/ --cache cache/ --out adapter/\n"
    "logitcache train --model base/ --cache cache/ --out adapter/ --resume",
)
@config_option
@heading("Model, data and output")
@click.option(
    "--student",
    "--model",
    "model",
    required=True,
    metavar="M",
    help="Model to train: the base of the cache, or a student of it. A local folder or a hub id.",
)
@click.option(
    "--cache",
    type=CachePath(),
    metavar="DIR",
    help="Cache made by precompute; not needed with --regularizer none, l2-sp or ewc, unless --ce-weight reads it.",
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder for the adapter or model."
)
@data_option("Data set to train on; by default all data sets of the cache.")
@options_of(DataSettings)
@heading("Anchors")
@click.option(
    "--anchor-cache",
    type=CachePath(),
    metavar="DIR",
    multiple=True,
    help="Cache of what the base says elsewhere: on its samples the model is held to it (docs/how-to/anchors.md). May "
    "be given several times.",
)
@heading(EvalSettings.heading)
@data_option(
    "Held-out text of the new task: its cross-entropy is measured while training (docs/how-to/train.md).", "eval-data"
)
@click.option(
    "--eval-prior",
    type=CachePath(),
    metavar="DIR",
    help="Cache of held-out prior text: cross-entropy, KL to the base and changed first tokens are measured on it "
    "while training, and the base is not run.",
)
@options_of(
    run_settings().values(),
    types={"nullspace": click.Path(path_type=Path, file_okay=False)},
    tail={"default": "auto"},
    anchor_weight={"multiple": True, "default": None, "show_default": False, "help": ANCHOR_WEIGHT},
    load_in={
        "help": "Quantise the linear layers below the adapter, by bitsandbytes (docs/how-to/distil.md).  "
        "[default: as stored]"
    },
)
@heading("Loss")
@click.option(
    "--recipe",
    type=click.Choice(tuple(RECIPES)),
    help="A published method as settings; what is given beside it wins. asft: --regularizer full-kl --weight .05 "
    "--ce-weight dft.",
)
@heading("Rows of the data")
@click.option(
    "--max-length",
    type=Whole(min=2),
    default=None,
    help="Tokens a sample of --data, at most those of the cache.  [default: that of the cache; 1024 without one]",
)
@heading(AdapterSettings.heading)
@click.option(
    "--modules-to-save",
    default="",
    metavar="NAMES",
    help="Modules that are trained whole beside the adapter and saved with it, separated by commas: lm_head, say.",
)
@heading("Model, data and output")
@click.option(
    "--revision", metavar="R", help="Branch, tag or commit of a model that is a hub id.  [default: its main branch]"
)
@click.option(
    "--attn-implementation",
    type=click.Choice(ATTENTIONS),
    help="How attention is computed; another one than the cache's base had moves the KL before step 1.  [default: as "
    "transformers chooses]",
)
@heading(AdapterSettings.heading)
@click.option(
    "--start-from",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="ADAPTER",
    help="Folder of a LoRA of the same rank, scale and layers, whose weights training starts from.",
)
@heading(MEMORY)
@click.option("--plan", is_flag=True, help="Print what a step takes, by the model's config alone, and stop")
@heading("Model, data and output")
@click.option("--resume", is_flag=True, help="Go on with the run in --out from its last whole checkpoint.")
@log_json_option
def train(
    model: str,
    cache: str | None,
    out: Path,
    data: tuple[str, ...] | None,
    anchor_cache: tuple[str, ...],
    eval_data: tuple[str, ...] | None,
    eval_prior: str | None,
    recipe: str | None,
    max_length: int | None,
    plan: bool,
    modules_to_save: str,
    revision: str | None,
    attn_implementation: str | None,
    start_from: Path | None,
    resume: bool,
    log_json: bool,
    **values: Any,
) -> None:
    """Train an adapter on loss = cross-entropy + weight * KL to the cached base. The base is not run again.

    Baselines: --regularizer l2-sp or ewc, a penalty on the weights, and --label-smoothing (docs/loss.md). --ce-weight
    weighs the cross-entropy of each token.

    --eval-data and --eval-prior measure held-out text while training; by --best-by, --patience and --stop-at-prior-kl
    what is found decides which weights are kept, and when to stop.

    Writes an adapter that PeftModel.from_pretrained reads (--adapter none: a model), files.json (its checksums),
    run.json (what was run), train_log.jsonl and tensorboard/. Interrupted, it goes on with --resume.
    Several GPUs: torchrun --nproc-per-node N -m logitcache train ...
    """
    how = settings_from(DataSettings, values)
    weights = _anchor_weights(anchor_cache, values.pop("anchor_weight"))
    ctx = click.get_current_context()
    stop = ctx.with_resource(terminated_softly("The last checkpoint is kept", "the same command with --resume goes on"))
    values |= {name: value for name, value in RECIPES.get(recipe or "", {}).items() if not was_given(ctx, name)}
    values["set"] = values["set"] or None
    _check_usage(values, cache, data, anchor_cache)
    with as_usage():
        settings = RunSettings.of(values)
        settings = replace(settings, adapter=replace(settings.adapter, modules_to_save=modules_to_save))
        settings.evaluation.check_texts(eval_data is not None, eval_prior is not None)
    quiet_libraries()
    from logitcache.data.skipped import listed_beside
    from logitcache.evaluation.held_out import HeldOut
    from logitcache.models.loading import find_model, load_as, load_tokenizer
    from logitcache.pairing.samples import samples_for
    from logitcache.storage import LogitCache
    from logitcache.training.job import Job, check_before_loading
    from logitcache.training.run import run

    from .progress import TrainBar, TrainEvents

    opened = None if cache is None else LogitCache.open(cache)
    anchors = _anchors(anchor_cache, weights, settings)
    if opened is not None and opened.manifest.capture.num_tail_groups:
        with as_usage():
            tail = RunSettings.of(values, has_groups=True).objective
            settings = replace(settings, objective=tail)
    if plan:
        print_plan(model, settings, max_length, opened, anchors, revision, attn_implementation)
        return
    speaks = os.environ.get("RANK", "0") == "0"  # torchrun: one process does
    console = Console(log_json, speaks)
    for doubt in settings.doubts():
        console.note(doubt)

    def tell_user(sentence: str) -> None:
        if speaks:
            console.on_event(DataNoted(sentence))

    rows = check_before_loading(
        data,
        opened,
        out,
        settings.objective,
        top_k=settings.training.top_k,
        max_length=max_length,
        resume=resume,
        how=how,
        on_message=tell_user,
    )
    held_out = None
    if eval_data is not None or eval_prior is not None:
        given = HeldOut(eval_data, eval_prior, max_length, settings.evaluation.eval_split)
        held_out = given.opened(how, str(out), tell_user)
    how = listed_beside(how, str(out))  # the list of an earlier run stays where this one is refused
    source = find_model(model, revision)
    tokenizer = load_tokenizer(source)
    base = load_as(source, settings.loading, attn_implementation)
    job = Job(
        base,
        samples_for(rows, opened, tokenizer, base.identity.vocab_size, max_length, tell_user, how),
        opened,
        out,
        settings.adapter,
        settings.objective,
        settings.training,
        settings.penalty,
        settings.pairing,
        tokenizer,
        of_cache=rows is None,
        how=how,
        anchors=anchors,
        held_out=held_out,
        evaluation=settings.evaluation,
        trainer=settings.trainer,
        start_from=start_from,
    )
    if settings.pairing.teacher_is_not_base and opened is not None:
        tell_user(f"The teacher is {opened.manifest.model_name}, not the base: step 0 is not checked.")

    measured = [anchor.open_cache for anchor in anchors]
    if opened is not None and job.reads_cache and settings.pairing.teacher_is_base:
        measured.insert(0, opened)

    def tell(found: "StepZero") -> None:
        tell_user(_said_of(found, measured.pop(0), base, bool(anchors)))

    told = [TrainEvents(console.on_event)] if log_json or not sys.stderr.isatty() else []
    report = run(job, resume, [TrainBar("train", log_json), *told], tell, tell_user, stop)
    if speaks:
        for sentence in _said_of_evaluation(report):
            console.note(sentence)
        if log_json:
            ended = Trained(report.num_steps, report.best_step, report.stopped, report.final, report.evaluated)
            console.on_event(ended)
        say(_summary(report, out))


def _anchor_weights(caches: tuple[str, ...], given: tuple[float, ...]) -> list[float]:
    """A weight for each of the anchor caches. Raises `click.UsageError`."""
    if len(given) not in (0, 1, len(caches)):
        raise click.UsageError(
            f"--anchor-weight is given {len(given)} times, --anchor-cache {len(caches)} times: give one weight for "
            "each cache, in their order, or one for all."
        )
    return [(given or (AnchorSettings().weight,))[i % max(len(given), 1)] for i in range(len(caches))]


def _anchors(caches: tuple[str, ...], weights: list[float], settings: RunSettings) -> "list[Anchor]":
    """The anchor caches, opened, each with its weight."""
    from logitcache.training.anchors import Anchor

    found = (Anchor(c, replace(settings.anchor, weight=w)) for c, w in zip(caches, weights, strict=True))
    return [anchor.opened() for anchor in found]


def _check_usage(
    values: dict[str, Any], cache: str | None, data: tuple[str, ...] | None, anchors: tuple[str, ...]
) -> None:
    """Raise `click.UsageError` for flags that have no place beside others, be their values the defaults."""
    regularizer, ctx = values["regularizer"], click.get_current_context()
    if regularizer not in ("none", *PENALTIES) and cache is None:
        raise click.UsageError(f"--regularizer {regularizer} needs --cache.")
    if cache is None and not without_base({**values, "regularizer": "none"}):
        raise click.UsageError(f"--ce-weight {values['ce_weight']} needs --cache: it reads what the base says.")
    if cache is None and data is None:
        raise click.UsageError(f"--regularizer {regularizer} needs --data, or a --cache to take the samples from.")
    if data is None and was_given(ctx, "max_length"):
        raise click.UsageError("--max-length is for --data: the samples of a cache are cut already. Leave it out.")
    if data is None:
        check_has_rows(ctx, "--data", OF_TEMPLATE)
    for name in () if anchors else ANCHORS_OWN:
        if was_given(ctx, name):
            flag = name.replace("_", "-")
            raise click.UsageError(f"--{flag} is of an anchor cache: give --anchor-cache, or leave it out.")
    if values["other_precision"] and cache is None and not anchors:
        raise click.UsageError("--other-precision is for the cache of the student's own base.")
    if regularizer == "none" and was_given(ctx, "weight"):
        raise click.UsageError("--weight with --regularizer none: there is no regulariser to weigh. Leave it out.")
    for name in NO_PLACE.get(values["adapter"], ()):
        if was_given(ctx, name):
            raise click.UsageError(without_place(values["adapter"], name))


def _said_of(found: "StepZero", cache: "LogitCache", base: "Base", named: bool) -> str:
    """named: there are several caches."""
    why, theirs, ours = "noise floor", cache.manifest.model.quantization, base.identity.quantization
    if theirs != ours:
        why = f"{ours or 'unquantised'} weights against a cache of {theirs or 'unquantised'} ones; --max-start-kl is "
        why += f"{found.tolerance_nats:.2g}"
    where = f" on {cache.path}" if named else ""
    return f"Before step 1 the KL to the base{where} was {abs(found.kl_nats):.2g} nats ({why})."


def _summary(report: "TrainReport", out: Path) -> str:
    final = ", ".join(f"{name} {report.final[name]:.4f}" for name in ("ce", "kl", "anchor_kl") if name in report.final)
    return f"Trained {report.num_steps:,} steps in {report.seconds:.0f} s ({final}, nats a position): {out}"


def _said_of_evaluation(report: "TrainReport") -> list[str]:
    """Why the run ended, and of which step the weights are."""
    said = [f"Stopped at step {report.num_steps:,}: {report.stopped}."] if report.stopped else []
    if report.evaluated:
        step, best = report.best_step or report.num_steps, report.best_step is not None
        which = ", the best evaluation" if best else ""
        said.append(f"The weights are of step {step:,}{which}: {evaluation_words(report.evaluated)}.")
    return said
