"""A training run: claim the folder, attach an adapter, train, save, and say exactly what was run.

Owns the order of these steps, and what is written: the adapter (as PEFT writes it) or the whole model, run.json,
train_log.jsonl, tensorboard/, checkpoints/. What is run is a `job`, what determines it the `description`; when the
folder is whole, and who may write to it, is in `run_folder`, the mathematics in `trainer`, the checks of what belongs
together in `pairing`. Must not print.
"""

import platform
import resource
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from logitcache.adapters.attach import AdapterSettings, adapter_callbacks, attach, save, save_start, target_layers
from logitcache.adapters.registry import NO_ADAPTER, keeps_start, rewrites_base
from logitcache.adapters.saved_files import FILES
from logitcache.adapters.start_from import start_from
from logitcache.data.batches import pad_samples, pad_weighted
from logitcache.data.places import Named, are_names
from logitcache.data.samples import Sample
from logitcache.data.settings import DataSettings
from logitcache.data.skipped import listed_beside
from logitcache.errors import TrainingFailed, release_of
from logitcache.events import OnMessage, StopRequest
from logitcache.losses.formulas import Objective
from logitcache.models.causal import needs_mask
from logitcache.models.checkpointing import checkpoint_layers
from logitcache.models.device_map import devices_of, head_device, is_spread
from logitcache.models.loading import Base, find_model, load_as, load_tokenizer
from logitcache.models.settings import LoadSettings
from logitcache.models.tensor_parallel import decided, leads
from logitcache.pairing.identity_checks import PairingRules
from logitcache.pairing.samples import samples_for
from logitcache.pairing.step_zero import StepZero
from logitcache.pairing.view import CacheView
from logitcache.storage import LogitCache
from logitcache.storage.plain_text import shown

from . import run_folder
from .anchors import Anchor, Anchors
from .description import describe
from .full_weights import save_whole, unfreeze
from .job import HeldOutText, Job, Probes, check_before_loading, check_model, names_of_layers
from .logs import EvalLog, JsonLog, tensorboard
from .model_card import card_of
from .monitor import Monitor, MonitoredTrainer, load_trained
from .out_of_memory import told_in_bytes
from .own_loss import probe_own_loss
from .penalties import Penalty, fisher_diagonal
from .settings import EvalSettings, PenaltySettings
from .settings import TrainSettings as TrainSettings
from .stopping import StopAtStep
from .supported import in_pieces
from .trainer_arguments import on_device, with_fields
from .trainer_settings import TrainerSettings

LOADER_WORKERS = 2
"""Processes that look up batches ahead of the step where a GPU would wait for them; on a CPU it needs the cores."""


@dataclass(frozen=True)
class TrainReport:
    """What a run came to: optimizer steps, tokens seen, seconds, and the last logged values (nats a position)."""

    num_steps: int
    num_tokens: int
    seconds: float
    peak_memory_bytes: int
    final: dict[str, float]
    step_zero: StepZero | None
    #: Of each anchor cache.
    anchors_step_zero: Sequence[StepZero] = ()
    #: What the last evaluation found, by its names; of the weights that were saved, with `best_step`.
    evaluated: dict[str, float] = field(default_factory=dict)
    #: Of the weights that were saved, where the best evaluation's were asked for; None: those of the last step.
    best_step: int | None = None
    #: Why the run ended before its last step; "": it did not.
    stopped: str = ""


def train(
    model: str | Path | Base,
    data: Named | Sequence[Sample] | None,
    cache: str | Path | LogitCache | None,
    out: str | Path,
    adapter: AdapterSettings | None = None,
    objective: Objective | None = None,
    settings: TrainSettings | None = None,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    penalty: PenaltySettings | None = None,
    pairing: PairingRules | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    how: DataSettings | None = None,
    max_length: int | None = None,
    on_step_zero: Callable[[StepZero], None] = lambda _: None,
    on_message: OnMessage = lambda _: None,
    anchors: Sequence[Anchor] = (),
    held_out: HeldOutText | None = None,
    evaluation: EvalSettings | None = None,
    trainer: TrainerSettings | None = None,
    start: str | Path | None = None,
) -> TrainReport:
    """Train an adapter of a model, or all of it, on data, regularised by a cache, into the folder `out`.

    model: folder or hub id, or a base that is loaded, which becomes the student's backbone: load it anew for another
    run. data: file, folder, URL or hub id, or several; samples in memory; None: the data sets of the cache. cache: a
    path or an opened one, required unless the regulariser is `none`; held against the base, its tokenizer and the
    objective, as the pairing says, before anything is trained. penalty: on the change of the weights, in addition;
    ewc's Fisher information is of these samples. tokenizer: None is the one beside the model, if there is one. how:
    which rows of the data, and what of a chat is learnt. max_length: tokens a sample of rows, as of `samples_for`.
    resume: go on with what is whole in `out`, or begin where there is nothing; on_message is told, in sentences, what
    is read, what was cut or left aside, and why. on_step_zero is told what was measured before step 1, of the cache and
    then of each anchor's. anchors: caches of what the base itself says far from the data, on whose samples the model
    is held to it. held_out: text that is measured while the model is trained (`HeldOut`), when and to what end the
    evaluation says. trainer: what transformers' Trainer is told beside.
    start: folder of a LoRA as the adapter is, whose weights it starts from.
    Raises what loading and `CacheView.paired` raise, `SampleNotCached`, `PositionNotCaptured`, `NotTheBase`,
    `TrainingFailed` (output folder in use, loss not finite), `FolderInUse` (another run is writing there),
    `IdentityMismatch` (the run there is another), `CorruptCache`, `InputNotFound` (no layer of the names to adapt),
    `UnsuitableAdapter`.
    """
    out, adapter, objective = Path(out), adapter or AdapterSettings(), objective or Objective()
    settings, pairing, how = settings or TrainSettings(), pairing or PairingRules(), how or DataSettings()
    opened = LogitCache.open(cache) if isinstance(cache, (str, Path)) else cache
    named, early = are_names(data), partial(check_before_loading, top_k=settings.top_k, resume=resume)
    rows = early(data, opened, out, objective, max_length=max_length, how=how, on_message=on_message)
    how = listed_beside(how, str(out)) if named else how
    anchors = [anchor.opened() for anchor in anchors]
    watched = None if held_out is None else held_out.opened(how, str(out), on_message)
    base = model if isinstance(model, Base) else load_as(find_model(str(model)), LoadSettings())
    if tokenizer is None and not isinstance(model, Base):
        tokenizer = load_tokenizer(base.source)
    in_memory = None if named else cast("Sequence[Sample] | None", data)
    if in_memory is None:
        in_memory = samples_for(rows, opened, tokenizer, base.identity.vocab_size, max_length, on_message, how)
    parts = (base, in_memory, opened, out, adapter, objective, settings, penalty, pairing, tokenizer, data is None, how)
    evaluation, trainer = evaluation or EvalSettings(), trainer or TrainerSettings()
    job = Job(*parts, anchors, watched, evaluation, trainer, None if start is None else Path(start))
    return run(job, resume, callbacks, on_step_zero, on_message)


def run(
    job: Job,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    on_step_zero: Callable[[StepZero], None] = lambda _: None,
    on_message: OnMessage = lambda _: None,
    stop: StopRequest | None = None,
) -> TrainReport:
    """Claim the folder of a job for this run alone, and do what is left of the run in it.

    stop: asks it to stop, which it does at the end of a step, with a checkpoint. Raises as `train`, and `Terminated`
    where it was asked.
    """
    out, view, anchors, probes = job.out, job.paired(), job.paired_anchors(), job.paired_held_out()
    check_model(job, view, anchors)
    # starts the group of processes, if there are any
    where = head_device(job.base.model)
    arguments = trainer_arguments(out, job.settings, where, job.mixed)
    arguments = with_fields(arguments, job.trainer)
    if not is_spread(job.base.model):  # else transformers leaves it where it is
        arguments = on_device(arguments, where)
    request = stop or StopRequest("What was committed is kept", "resume the run to go on")
    ready = _Ready(job, view, anchors, probes, describe(job, probes), arguments, request)
    with ExitStack() as stack:
        found = decided(lambda: stack.enter_context(run_folder.claimed(out, ready.description, resume)))
        run_folder.check_shared(out)
        unseen = [f"Not compared: {phrase}." for phrase in (() if view is None else view.left_out)]
        for sentence in (*found.said, *unseen) if leads() else ():
            on_message(sentence)
        if found.result is None:
            return _train(ready, found.checkpoint, callbacks, on_step_zero)
        if leads():
            run_folder.settle(out)
        return _report_of(found.result)


@dataclass(frozen=True)
class _Ready:
    """A job whose parts were held against each other."""

    job: Job
    view: CacheView | None
    anchors: Anchors
    probes: Probes | None
    description: dict[str, Any]
    arguments: TrainingArguments
    stop: StopRequest


def _train(
    ready: _Ready,
    checkpoint: Path | None,
    callbacks: Sequence[TrainerCallback],
    on_step_zero: Callable[[StepZero], None],
) -> TrainReport:
    """From the checkpoint, or from the beginning, to the end, in a folder that is this run's alone."""
    job, view, anchors, description = ready.job, ready.view, ready.anchors, ready.description
    base, out, started, mixed, penalty = job.base, job.out, perf_counter(), job.mixed, job.penalty
    fisher = None  # of the base as it is, which `attach` may rewrite
    if penalty is not None and penalty.kind == "ewc":
        names = list(target_layers(base.model, job.adapter))
        fisher = fisher_diagonal(base.model, names, job.samples, penalty.num_fisher_samples)
    set_seed(job.settings.seed)
    resumed = checkpoint is not None and keeps_start(job.adapter)
    model = _student(job, run_folder.start_of(out) if resumed else None)
    with torch.autocast(head_device(base.model).type, torch.bfloat16, enabled=mixed):
        probe_own_loss(model)
        step_zero, at_anchors = _measured(job, model, view, anchors, on_step_zero)
        masked = needs_mask(model)
    if job.start_from is not None and checkpoint is None:
        start_from(model, job.start_from)
    log = JsonLog(out / run_folder.LOG)
    monitor = Monitor(job.evaluation, partial(run_folder.keep_best, out, description))
    stopping = StopAtStep(ready.stop)
    own = [log, tensorboard(out), _Checkpoints(out, description), stopping, *adapter_callbacks(model, job.adapter)]
    if ready.probes is not None:
        own += [EvalLog(out / run_folder.EVAL_LOG), monitor]
        ready.arguments.eval_on_start = checkpoint is None
    added = None if penalty is None else Penalty(model, penalty.weight, fisher, rewrites_base(job.adapter))
    trainer = _trainer(ready, model, added, [*own, *callbacks], masked)
    if checkpoint is not None:
        check_resumable(trainer.args, out)
    if trainer.is_world_process_zero():
        run_folder.begin(out, description, checkpoint)
        if isinstance(model, PeftModel) and keeps_start(job.adapter) and checkpoint is None:
            run_folder.keep_start(out, description, partial(save_start, model))
    with told_in_bytes(job), ready.stop.looked_for():
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if stopping.step is not None and not monitor.why:  # which is an end of its own
        raise ready.stop.stopped(f"A checkpoint of step {stopping.step:,} was written")
    report = TrainReport(
        num_steps=_steps_of(trainer, job),
        num_tokens=int(trainer.state.num_input_tokens_seen),
        seconds=round(perf_counter() - started, 2),
        peak_memory_bytes=_peak_memory(devices_of(base.model)),
        final=log.last,
        step_zero=step_zero,
        anchors_step_zero=at_anchors,
        evaluated=monitor.found,
        best_step=monitor.best_step,
        stopped=monitor.why,
    )
    if trainer.is_world_process_zero():
        if monitor.best_step is not None:
            load_trained(model, run_folder.best_of(out, monitor.best_step))
        card = card_of(description, asdict(report))
        run_folder.finish(out, description, asdict(report), partial(_save, job, model, card))
    return report


def _trainer(
    ready: _Ready, model: nn.Module, penalty: Penalty | None, callbacks: Sequence[TrainerCallback], masked: bool
) -> MonitoredTrainer:
    """masked: whether the model needs a mask of padding. Raises `TrainingFailed` where it would divide the weights."""
    job = ready.job
    trainer = MonitoredTrainer(
        model=model,
        args=ready.arguments,
        train_dataset=list(job.samples),
        data_collator=pad_weighted if job.objective.ce_weight == "data" else pad_samples,
        callbacks=list(callbacks),
        cache=ready.view,
        objective=job.objective if ready.view is None else None,
        check=False,  # done before, with the names of the samples
        penalty=penalty,
        anchor=ready.anchors,
        batch_tokens=job.settings.batch_tokens,
        masked=masked,
        budget_of=job.evaluation.kl_budget_of,
    )
    trainer.measured = None if ready.probes is None else ready.probes.measured
    _check_whole(trainer, job.out)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _measured(
    job: Job, model: nn.Module, view: CacheView | None, anchors: Anchors, on_step_zero: Callable[[StepZero], None]
) -> tuple[StepZero | None, list[StepZero]]:
    """Where the untrained student starts: against the cache, unless its teacher is another, and against each anchor."""
    of_base = view if job.pairing.teacher_is_base else None
    found = None if of_base is None else of_base.step_zero(model, job.samples)
    at_anchors = anchors.step_zero(model)
    for each in at_anchors if found is None else [found, *at_anchors]:
        on_step_zero(each)
    return found, at_anchors


def _steps_of(trainer: MonitoredTrainer, job: Job) -> int:
    """Optimizer steps that were made. Raises `TrainingFailed` where there were none: nothing was trained."""
    if not trainer.state.global_step:
        raise TrainingFailed(
            f"training into {job.out}: expected {trainer.state.max_steps:,} steps, found that {len(job.samples):,} "
            f"samples make no batch of {job.settings.batch_size} on each device. Nothing was trained. Leave --set "
            "dataloader_drop_last out, or use a smaller --batch-size."
        )
    return int(trainer.state.global_step)


def _check_whole(trainer: MonitoredTrainer, out: Path) -> None:
    """Raise `TrainingFailed` where no process has the weights that are saved at the end."""
    if in_pieces(trainer):
        raise TrainingFailed(
            f"training into {out} under FSDP or ZeRO-3: the job saves whole weights, and each process has a part of "
            "them. Use torchrun alone, or CachedKL in a Trainer of your own, which saves as it is set to."
        )


def check_resumable(arguments: TrainingArguments, out: Path) -> None:
    """Raise `TrainingFailed` where transformers cannot read the optimizer's state again: below 5.18 it asks torch for
    the device cpu:0, which several processes on a CPU have."""
    found = version("transformers")
    if arguments.world_size > 1 and arguments.device.type == "cpu" and release_of(found) < (5, 18):
        raise TrainingFailed(
            f"going on with {out} by {arguments.world_size} processes on a CPU: expected transformers 5.18 or later, "
            f"which can read an optimizer there, found {found}. Upgrade it (pip install -U transformers), or train "
            "again in one process."
        )


def _save(job: Job, model: PreTrainedModel | PeftModel, card: str, folder: Path) -> None:
    """What was trained, as whoever uses it loads it, with its tokenizer and its card."""
    if isinstance(model, PeftModel):
        start = run_folder.start_of(job.out) if keeps_start(job.adapter) else None
        save(model, folder, job.adapter, job.base.source.name, start, job.base.source.revision)
        if job.tokenizer is not None:
            job.tokenizer.save_pretrained(folder)
    else:
        save_whole(model, job.base.source, folder)
    (folder / run_folder.CARD).write_text(card, encoding="utf-8")


def _student(job: Job, start: Path | None) -> PreTrainedModel | PeftModel:
    """What is trained: the base's model with an adapter on it, or itself. start: of a run that is resumed."""
    base, adapter = job.base, job.adapter
    student: PreTrainedModel | PeftModel
    if adapter.kind == NO_ADAPTER:
        student = unfreeze(base.model)
    else:
        given = start if keeps_start(adapter) else None
        with names_of_layers(base.source.name, adapter):
            student = attach(base.model, adapter, str(base.source.folder), job.samples, given)
    if job.settings.gradient_checkpointing:  # last: PEFT would have a frozen embedding's output have a gradient
        checkpoint_layers(student)
    return student


class _Checkpoints(TrainerCallback):
    """Lists every checkpoint once all processes have written their part of it, and keeps the last two."""

    def __init__(self, out: Path, description: dict[str, Any]) -> None:
        self._out, self._description = out, description

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            run_folder.seal_checkpoint(self._out, state.global_step, self._description, args.world_size)


def trainer_arguments(
    out: Path, settings: TrainSettings, device: torch.device, mixed: bool = False
) -> TrainingArguments:
    """The Trainer's arguments of a run. mixed: what is trained is float32 and computed with in bfloat16."""
    return TrainingArguments(
        output_dir=str(out / run_folder.CHECKPOINTS),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.grad_accum,
        learning_rate=settings.lr,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        weight_decay=0.0,
        seed=settings.seed,
        data_seed=settings.seed,
        logging_steps=settings.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=0.1,
        save_total_limit=None,  # `_Checkpoints` removes the older ones, when the newer are on the disk
        remove_unused_columns=False,
        include_num_input_tokens_seen="non_padding",
        report_to=[],
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        use_cpu=device.type == "cpu",
        bf16=mixed,
        dataloader_pin_memory=device.type == "cuda",
        dataloader_num_workers=LOADER_WORKERS if device.type == "cuda" else 0,
    )


def _report_of(result: dict[str, Any]) -> TrainReport:
    try:
        step_zero = None if result["step_zero"] is None else StepZero(**result["step_zero"])
        at_anchors = [StepZero(**found) for found in result["anchors_step_zero"]]
        return TrainReport(**{**result, "step_zero": step_zero, "anchors_step_zero": at_anchors})
    except (KeyError, TypeError) as error:
        raise TrainingFailed(
            "reading what a finished run came to: expected what `logitcache train` wrote, found "
            f"{shown(result)}. Restore its {FILES} from a copy, or train again with another --out."
        ) from error


def _peak_memory(devices: Sequence[torch.device]) -> int:
    """Peak of this process: of the GPUs' allocators, or of the resident set on a CPU."""
    if devices[0].type == "cuda":
        return sum(torch.cuda.max_memory_allocated(device) for device in devices)
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
