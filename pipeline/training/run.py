"""The training job: check, attach an adapter, train, save, and say exactly what was run.

Owns the order of these steps, and what is written: the adapter (as PEFT writes it) or the whole model, run.json,
train_log.jsonl, tensorboard/, checkpoints/. When the folder is whole, and who may write to it, is in `run_folder`, the
mathematics in `trainer`, the checks in `pairing`. Must not print.
"""

import os
import platform
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import TensorBoardCallback

from logitcache.adapters.attach import AdapterSettings, adapter_callbacks, attach, save, save_start, target_layers
from logitcache.adapters.null_space import NullSpace, check_null_space
from logitcache.adapters.registry import KINDS, NO_ADAPTER, keeps_start, rewrites_base
from logitcache.data.batches import pad_samples
from logitcache.data.rows import Row, read_rows
from logitcache.data.samples import Sample, make_samples
from logitcache.errors import InputNotFound, TrainingFailed
from logitcache.events import OnMessage
from logitcache.json_files import line_of, read_lines
from logitcache.losses.formulas import Objective
from logitcache.models.device_map import devices_of, head_device, is_spread, offloaded_parts
from logitcache.models.head import check_head, check_length
from logitcache.models.loading import Base, find_model, load_as, load_tokenizer
from logitcache.models.quantization import held_in, quantization_of
from logitcache.models.settings import LoadSettings
from logitcache.models.tensor_parallel import decided, leads
from logitcache.pairing.identity_checks import (
    PairingRules,
    check_tail,
)
from logitcache.pairing.step_zero import StepZero
from logitcache.pairing.targets import samples_of
from logitcache.pairing.view import CacheView
from logitcache.storage import IdentityMismatch, LogitCache, sample_id
from logitcache.storage.files import replace_file
from logitcache.storage.identity import digest, digest_json
from logitcache.storage.model_check import read_model_check
from logitcache.training import run_folder

from .full_weights import computes_in_bfloat16, save_whole, unfreeze
from .own_loss import probe_own_loss
from .penalties import Penalty, fisher_diagonal
from .run_folder import CHECKPOINTS, LOG
from .settings import PenaltySettings
from .settings import TrainSettings as TrainSettings
from .trainer import CachedKLTrainer

TENSORBOARD = "tensorboard"
DEFAULT_MAX_LENGTH = 1024
"""Tokens a sample of data that no cache goes with."""

Rows = Iterator[tuple[str, Row]]
"""Where each comes from, and the row."""

_PACKAGES = ("logitcache", "torch", "transformers", "peft", "accelerate", "zarr", "pyarrow", "numpy")


@dataclass(frozen=True)
class TrainReport:
    """What a run came to: optimizer steps, tokens seen, seconds, and the last logged values (nats a position)."""

    num_steps: int
    num_tokens: int
    seconds: float
    peak_memory_bytes: int
    final: dict[str, float]
    step_zero: StepZero | None


@dataclass(frozen=True)
class _Job:
    """What is trained, on what, into which folder, and how; as `train` was asked for it."""

    base: Base
    samples: Sequence[Sample]
    cache: LogitCache | None
    out: Path
    adapter: AdapterSettings
    objective: Objective
    settings: TrainSettings
    penalty: PenaltySettings | None
    pairing: PairingRules
    tokenizer: PreTrainedTokenizerBase | None

    @property
    def regularized(self) -> LogitCache | None:
        """The cache, where the loss reads it."""
        return self.cache if self.objective.regularizer != "none" else None

    @property
    def mixed(self) -> bool:
        """Whether float32 weights are computed with in bfloat16. Ask before the model is made the student."""
        return self.adapter.kind == NO_ADAPTER and computes_in_bfloat16(self.base.model)


def train(
    model: str | Path | Base,
    data: str | Path | Sequence[Sample] | None,
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
    on_step_zero: Callable[[StepZero], None] = lambda _: None,
    on_message: OnMessage = lambda _: None,
) -> TrainReport:
    """Train an adapter of a model, or all of it, on data, regularised by a cache, into the folder `out`.

    model: folder or hub id, or a base that is loaded, which becomes the student's backbone: load it anew for another
    run. data: file, folder, URL or hub id; samples in memory; None: the samples of the cache. cache: a path or an
    opened one, required unless the regulariser is `none`; held against the base, its tokenizer and the objective, as
    the pairing says, before anything is trained. penalty: on the change of the weights, in addition; ewc's Fisher
    information is of these samples. tokenizer: None is the one beside the model, if there is one. resume: go on with
    what is whole in `out`, or begin where there is nothing; on_message is told, in sentences, what was cut or left
    aside, and why. on_step_zero is told what was measured before step 1.
    Raises what loading and `CacheView.paired` raise, `SampleNotCached`, `PositionNotCaptured`, `NotTheBase`,
    `TrainingFailed` (output folder in use, loss not finite), `FolderInUse` (another run is writing there),
    `IdentityMismatch` (the run there is another), `CorruptCache`, `InputNotFound` (no layer of the names to adapt),
    `UnsuitableAdapter`.
    """
    out, adapter, objective = Path(out), adapter or AdapterSettings(), objective or Objective()
    settings, pairing = settings or TrainSettings(), pairing or PairingRules()
    opened = LogitCache.open(cache) if isinstance(cache, (str, Path)) else cache
    rows = check_before_loading(opened, data, out, objective, settings.top_k)
    base = model if isinstance(model, Base) else load_as(find_model(str(model)), LoadSettings())
    if tokenizer is None and not isinstance(model, Base):
        tokenizer = load_tokenizer(base.source)
    in_memory = None if isinstance(data, (str, Path)) else data
    samples = samples_for(rows, opened, base, tokenizer, on_message=on_message) if in_memory is None else in_memory
    job = _Job(base, samples, opened, out, adapter, objective, settings, penalty, pairing, tokenizer)
    return _in_its_folder(job, resume, callbacks, on_step_zero, on_message)


def _in_its_folder(
    job: _Job,
    resume: bool,
    callbacks: Sequence[TrainerCallback],
    on_step_zero: Callable[[StepZero], None],
    on_message: OnMessage,
) -> TrainReport:
    """Claim the folder for this run alone, and do what is left of the run in it."""
    _check_combination(job)
    _check_placement(job.base, job.adapter, job.penalty)
    out, view = job.out, _paired(job)
    description = _describe(job)
    # starts the group of processes, if there are any
    arguments = trainer_arguments(out, job.settings, head_device(job.base.model), job.mixed)
    with ExitStack() as stack:

        def claim() -> run_folder.Found:
            run_folder.check_ours(out)
            stack.enter_context(run_folder.held(out))
            return run_folder.look(out, description, resume)

        found = decided(claim)
        run_folder.check_shared(out)
        for sentence in found.said if leads() else ():
            on_message(sentence)
        if found.result is None:
            return _train(job, view, description, arguments, found.checkpoint, callbacks, on_step_zero)
        if leads():
            run_folder.settle(out)
        return _report_of(found.result)


def check_before_loading(
    cache: LogitCache | None, data: object, out: Path, objective: Objective, top_k: int | None
) -> Rows | None:
    """Raise what can be told of a run before weights are read (see `train`). Its rows, lazily, if data are a name."""
    if cache is None and objective.regularizer != "none":
        raise TrainingFailed(f"training with {objective.regularizer}: a cache is needed. Give --cache.")
    if cache is None and data is None:
        raise TrainingFailed("training without a cache: expected data to train on, found none. Give --data.")
    check_tail(cache, objective, top_k)
    run_folder.check_ours(out)
    return read_rows(str(data)) if isinstance(data, (str, Path)) else None


def samples_for(
    rows: Rows | None,
    cache: LogitCache | None,
    base: Base,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int | None = None,
    on_message: OnMessage = lambda _: None,
) -> Sequence[Sample]:
    """The samples of rows, cut as the cache was, or those of the cache.

    max_length: tokens a sample, for rows; with a cache it can only be the cache's own, else `IdentityMismatch`.
    on_message is told how many rows were cut. Raises what reading data raises.
    """
    if rows is None:
        assert cache is not None
        return samples_of(cache)
    captured = None if cache is None else cache.manifest.capture.max_length
    if cache is not None and max_length not in (None, captured):
        raise IdentityMismatch(
            f"pairing {cache.path} with --max-length {max_length}: the cache was made with {captured}. "
            "The same rows would be other samples. Leave --max-length out, or precompute a cache with it."
        )
    length = captured or max_length or DEFAULT_MAX_LENGTH
    found = make_samples(rows, tokenizer, length, base.identity.vocab_size)
    if found.num_truncated:
        on_message(f"{found.num_truncated:,} rows were cut to {length} tokens.")
    return found.samples


def _train(
    job: _Job,
    view: CacheView | None,
    description: dict[str, Any],
    arguments: TrainingArguments,
    checkpoint: Path | None,
    callbacks: Sequence[TrainerCallback],
    on_step_zero: Callable[[StepZero], None],
) -> TrainReport:
    """From the checkpoint, or from the beginning, to the end, in a folder that is this run's alone."""
    base, out, started, mixed = job.base, job.out, perf_counter(), job.mixed
    penalty = job.penalty
    check_head(base.model)
    check_length(base.model, max(len(s.token_ids) for s in job.samples))
    if view is not None:
        view.require(job.samples)
    fisher = None  # of the base as it is, which `attach` may rewrite
    if penalty is not None and penalty.kind == "ewc":
        names = list(target_layers(base.model, job.adapter))
        fisher = fisher_diagonal(base.model, names, job.samples, penalty.num_fisher_samples)
    set_seed(job.settings.seed)
    resumed = checkpoint is not None and keeps_start(job.adapter)
    model = _student(base, job.adapter, job.samples, run_folder.start_of(out) if resumed else None)
    step_zero = None
    with torch.autocast(head_device(base.model).type, torch.bfloat16, enabled=mixed):
        probe_own_loss(model)
        if view is not None and job.pairing.teacher_is_base:
            step_zero = view.step_zero(model, job.samples)
    if step_zero is not None:
        on_step_zero(step_zero)
    log = _JsonLog(out / LOG)
    own = [log, _tensorboard(out), _Checkpoints(out, description), *adapter_callbacks(model, job.adapter)]
    trainer = CachedKLTrainer(
        model=model,
        args=arguments,
        train_dataset=list(job.samples),
        data_collator=pad_samples,
        callbacks=[*own, *callbacks],
        cache=view,
        objective=job.objective if view is None else None,
        check=False,  # done above, with the names of the samples
        penalty=None if penalty is None else Penalty(model, penalty.weight, fisher, rewrites_base(job.adapter)),
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.is_world_process_zero():
        run_folder.begin(out, description, checkpoint)
        if isinstance(model, PeftModel) and keeps_start(job.adapter) and checkpoint is None:
            run_folder.keep_start(out, description, partial(save_start, model))
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    report = TrainReport(
        num_steps=trainer.state.global_step,
        num_tokens=int(trainer.state.num_input_tokens_seen),
        seconds=round(perf_counter() - started, 2),
        peak_memory_bytes=_peak_memory(devices_of(base.model)),
        final=log.last,
        step_zero=step_zero,
    )
    if trainer.is_world_process_zero():
        run_folder.finish(out, description, asdict(report), partial(_save, job, model))
    return report


def _paired(job: _Job) -> CacheView | None:
    """The cache as the run reads it; None where its loss reads none. Also one of samples alone must be of this base."""
    if job.cache is None:
        return None
    top_k, rules = job.settings.top_k, job.pairing
    view = CacheView.paired(job.cache, job.base, job.objective, tokenizer=job.tokenizer, top_k=top_k, rules=rules)
    return None if job.regularized is None else view


def _save(job: _Job, model: PreTrainedModel | PeftModel, folder: Path) -> None:
    """What was trained, as whoever uses it loads it."""
    if isinstance(model, PeftModel):
        start = run_folder.start_of(job.out) if keeps_start(job.adapter) else None
        save(model, folder, job.adapter, job.base.source.name, start)
    else:
        save_whole(model, job.base.source, folder)


def _student(
    base: Base, adapter: AdapterSettings, samples: Sequence[Sample], start: Path | None
) -> PreTrainedModel | PeftModel:
    """What is trained: the base's model with an adapter on it, or itself. start: of a run that is resumed."""
    if adapter.kind == NO_ADAPTER:
        return unfreeze(base.model)
    try:
        return attach(base.model, adapter, str(base.source.folder), samples, start if keeps_start(adapter) else None)
    except ValueError as error:
        raise InputNotFound(
            f"attaching {adapter.kind} to {base.source.name}: target modules {adapter.target_modules!r}, or one of "
            "them, name no layer that can be adapted. Use all-linear, or names of linear layers separated by commas."
        ) from error


def _check_combination(job: _Job) -> None:
    """Raise `TrainingFailed` for settings that would train something else than they say."""
    penalty, model = job.penalty, job.base.model
    if model.dtype == torch.float16:
        raise TrainingFailed(
            f"training {job.base.source.name} in float16: the gradients of one position among thousands are too small "
            "for it and would be lost. Use --dtype bfloat16 or float32; the cache may stay as it is."
        )
    if penalty is not None and (job.adapter.kind == NO_ADAPTER or held_in(model) is not None):
        raise TrainingFailed(
            f"training with {penalty.kind}: it is of what an adapter changes of weights that can be read. Use an "
            "adapter on weights that are not quantised, or another regulariser."
        )


def _check_placement(base: Base, adapter: AdapterSettings, penalty: PenaltySettings | None) -> None:
    """Raise `TrainingFailed` for what a model on several devices, or beyond them, cannot be trained with."""
    offloaded = offloaded_parts(base.model)
    if offloaded:
        raise TrainingFailed(
            f"training {base.source.name}: {len(offloaded)} of its parts do not fit on the devices and would be "
            f"fetched from main memory or the disk ({offloaded[0]}, ...). The backward pass would hold them all at "
            "once. Use more or larger devices, or --load-in 4bit."
        )
    if not is_spread(base.model):
        return
    if penalty is not None or (adapter.kind != NO_ADAPTER and not KINDS[adapter.kind].quantized):
        what = adapter.kind if penalty is None else penalty.kind
        raise TrainingFailed(
            f"training {base.source.name} on several devices with {what}: it computes with the weights of many layers "
            "on one. Use lora, or another kind that stands on quantised weights (docs/adapters.md)."
        )


class _JsonLog(TrainerCallback):
    """Appends every training log to a JSONL file; on resume, drops what lies after the checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        entries = _logged(self.path, state.global_step) if state.global_step and self.path.exists() else []
        replace_file(self.path, b"".join(line_of(entry) for entry in entries))
        if entries:
            self.last = {name: value for name, value in entries[-1].items() if name not in ("step", "epoch")}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log = control.should_log or state.global_step >= state.max_steps  # the last step too

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "ce" not in logs:
            return
        names = ("loss", "ce", "kl", "kl_weight", "penalty", "orthogonality", "grad_norm", "learning_rate")
        self.last = {name: logs[name] for name in names if name in logs}
        entry = {"step": state.global_step, "epoch": logs.get("epoch"), **self.last}
        with self.path.open("ab") as f:
            f.write(line_of(entry))


class _Checkpoints(TrainerCallback):
    """Lists every checkpoint once all processes have written their part of it, and keeps the last two."""

    def __init__(self, out: Path, description: dict[str, Any]) -> None:
        self._out, self._description = out, description

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            run_folder.seal_checkpoint(self._out, state.global_step, self._description, args.world_size)


def _logged(path: Path, step: int) -> list[dict[str, Any]]:
    """The entries of a log up to a step; what a killed run was writing comes after it."""
    try:
        return list(takewhile(lambda entry: entry["step"] <= step, read_lines(path, unfinished=True)))
    except ValueError as error:
        raise TrainingFailed(
            f"going on with {path}: {error}. The log of the resumed run would lack what was there. Restore the file "
            "from a copy, or remove that line."
        ) from error


def trainer_arguments(
    out: Path, settings: TrainSettings, device: torch.device, mixed: bool = False
) -> TrainingArguments:
    """The Trainer's arguments of a run. mixed: float32 weights that are computed with in bfloat16."""
    return TrainingArguments(
        output_dir=str(out / CHECKPOINTS),
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
    )


def _tensorboard(out: Path) -> TrainerCallback:
    callback = TensorBoardCallback()
    callback.logging_dir = str(out / TENSORBOARD)
    return callback


def _describe(job: _Job) -> dict[str, Any]:
    """What determines a run, as JSON: a resumed run must agree in all of it but the versions."""
    base, samples, cache, penalty = job.base, job.samples, job.cache, job.penalty
    return {
        "model": {"name": base.source.name, **asdict(base.identity)},
        "cache": None if cache is None else {"path": str(cache.path), "contents": cache.contents_checksum},
        "against_model": _describe_check(cache),
        "data": {
            "num_samples": len(samples),
            "num_tokens": sum(len(s.token_ids) for s in samples),
            "num_positions": sum(len(s.positions) for s in samples),
            "fingerprint": data_fingerprint(samples),
        },
        "pairing": {**asdict(job.pairing), "load_in": quantization_of(base.model)},
        "adapter": _describe_adapter(base, job.adapter),
        "objective": asdict(job.objective),
        "penalty": None if penalty is None else asdict(penalty),
        "settings": asdict(job.settings),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "device": ", ".join(str(device) for device in devices_of(base.model)),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),  # torchrun's; the batch of a step grows with it
    }


def _describe_check(cache: LogitCache | None) -> dict[str, Any] | None:
    """What `verify --against-model` found of these very contents, where it was asked."""
    check = None if cache is None else read_model_check(cache)
    return None if check is None else {"within": check.is_within, "ratio": check.ratio, **asdict(check)}


def _describe_adapter(base: Base, adapter: AdapterSettings) -> dict[str, Any]:
    """With the null space's content, where there is one. Raises `NotTheBase` where it is another model's."""
    if adapter.kind == NO_ADAPTER:
        return {"kind": NO_ADAPTER}
    described = {k: v for k, v in asdict(adapter).items() if k not in ("nullspace", "variant")}
    if adapter.kind != "lora-null":
        return described
    space = NullSpace.open(Path(adapter.nullspace))
    check_null_space(space, base, adapter.rank, adapter.nullspace)
    return {**described, "variant": adapter.variant, "nullspace": space.checksum, "path": adapter.nullspace}


def data_fingerprint(samples: Sequence[Sample]) -> str:
    """Of the samples, their order and their supervised tokens; two data sets with one fingerprint are the same."""
    return digest_json([[sample_id(s.token_ids).hex(), digest(s.supervised.tobytes())] for s in samples])


def _report_of(result: dict[str, Any]) -> TrainReport:
    step_zero = None if result["step_zero"] is None else StepZero(**result["step_zero"])
    return TrainReport(**{**result, "step_zero": step_zero})


def _peak_memory(devices: Sequence[torch.device]) -> int:
    """Peak of this process: of the GPUs' allocators, or of the resident set on a CPU."""
    if devices[0].type == "cuda":
        return sum(torch.cuda.max_memory_allocated(device) for device in devices)
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
