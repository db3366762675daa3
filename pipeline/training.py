"""The training job: check, attach an adapter, train, save, and say exactly what was run.

Owns the order of these steps and the output folder: the adapter (as PEFT writes it) or the whole model, run.json,
train_log.jsonl, tensorboard/, checkpoints/. The mathematics is in `trainer`, the checks in `gate`. Must not print.
"""

import json
import os
import platform
import resource
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback

from logitcache.storage import IdentityMismatch, LogitCache, sample_id
from logitcache.storage.identity import digest, digest_json

from .adapters import AdapterSettings, adapter_callbacks, attach, save, save_start, target_layers
from .errors import InputNotFound, TrainingFailed
from .full import computes_in_bfloat16, save_whole, unfreeze
from .gate import (
    Pairing,
    StepZero,
    check_precision,
    check_samples,
    check_tail,
    check_tokens,
    check_width,
    common_width,
    probe_step_zero,
)
from .head import check_head, check_length
from .kinds import KINDS, NO_ADAPTER, check_settings, keeps_start, rewrites_base
from .losses import Objective
from .models import Base
from .nullspace import NullSpace, check_null_space
from .own_loss import probe_own_loss
from .penalties import Penalty, PenaltySettings, fisher_diagonal
from .placement import devices_of, head_device, is_spread, offloaded_parts
from .quantized import held_in, quantization_of
from .samples import Sample, pad_samples
from .trainer import CachedKLTrainer

RUN, LOG, TENSORBOARD, CHECKPOINTS = "run.json", "train_log.jsonl", "tensorboard", "checkpoints"
START = "start"
"""Folder of the first factors, among the checkpoints, of an adapter that cannot do without them."""

_PACKAGES = ("logitcache", "torch", "transformers", "peft", "accelerate", "zarr", "pyarrow", "numpy")


@dataclass(frozen=True)
class TrainSettings:
    """epochs over the samples, or max_steps optimizer steps if positive; batch_size samples a device and micro-batch;
    grad_accum micro-batches a step; lr: peak learning rate of AdamW (cosine, 3 % warm-up, no weight decay); top_k:
    alternatives read of those in the cache (None: all)."""

    lr: float = 2e-4
    epochs: float = 1.0
    batch_size: int = 8
    grad_accum: int = 1
    seed: int = 0
    max_steps: int = -1
    log_every: int = 10
    top_k: int | None = None


@dataclass(frozen=True)
class TrainReport:
    """What a run came to: optimizer steps, tokens seen, seconds, and the last logged values (nats a position)."""

    num_steps: int
    num_tokens: int
    seconds: float
    peak_memory_bytes: int
    final: dict[str, float]
    step_zero: StepZero | None


def train(
    base: Base,
    samples: Sequence[Sample],
    cache: LogitCache | None,
    out: Path,
    adapter: AdapterSettings,
    objective: Objective,
    settings: TrainSettings,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    penalty: PenaltySettings | None = None,
    pairing: Pairing | None = None,
    on_step_zero: Callable[[StepZero], None] = lambda _: None,
) -> TrainReport:
    """Train an adapter of `base`, or all of it, on samples, regularised by a cache, into the folder `out`.

    cache: required unless the regulariser is `none`; its identity has been checked with the same pairing
    (`gate.check_identity`). penalty: on the change of the weights, in addition; ewc's Fisher information is of these
    samples. on_step_zero is told what was measured before step 1. The base's model object becomes the student's
    backbone: load it anew for another run. Raises `SampleNotCached`, `PositionNotCaptured`, `NotTheBase`,
    `TrainingFailed` (output folder in use, loss not finite), `CorruptCache`, `InputNotFound` (no layer of the names to
    adapt), `UnsuitableAdapter`.
    """
    if cache is None and objective.regularizer != "none":
        raise TrainingFailed(f"training with {objective.regularizer}: a cache is needed. Give --cache.")
    pairing = pairing or Pairing()
    _check_combination(base, cache, objective, settings.top_k)
    if penalty is not None and (adapter.kind == NO_ADAPTER or held_in(base.model) is not None):
        raise TrainingFailed(
            f"training with {penalty.kind}: it is of what an adapter changes of weights that can be read. Use an "
            "adapter on weights that are not quantised, or another regulariser."
        )
    _check_placement(base, adapter, penalty)
    check_settings(adapter)
    description = _describe(base, samples, cache, adapter, objective, settings, penalty, pairing)
    checkpoint = _prepare_folder(out, description, resume)
    finished = _finished_report(out)
    if finished is not None:
        return finished
    started, start = perf_counter(), out / CHECKPOINTS / START
    check_head(base.model)
    check_length(base.model, max(len(s.token_ids) for s in samples))
    regularized = cache if objective.regularizer != "none" else None
    vocab_size = None
    if regularized is not None:
        if pairing.ignore_padding:
            vocab_size = common_width(base.model, regularized)
            check_tokens(samples, vocab_size)
        check_width(base.model, regularized, objective, vocab_size)
        if pairing.teacher_is_base:
            check_precision(base.model, regularized, pairing.other_precision)
        check_samples(regularized, samples)
    fisher = None  # of the base as it is, which `attach` may rewrite
    if penalty is not None and penalty.kind == "ewc":
        names = list(target_layers(base.model, adapter))
        fisher = fisher_diagonal(base.model, names, samples, penalty.num_fisher_samples)
    set_seed(settings.seed)
    mixed = adapter.kind == NO_ADAPTER and computes_in_bfloat16(base.model)
    model = _student(base, adapter, samples, start if checkpoint is not None else None)
    probe_own_loss(model)
    step_zero = None
    if regularized is not None and pairing.teacher_is_base:
        with torch.autocast(head_device(base.model).type, torch.bfloat16, enabled=mixed):
            step_zero = probe_step_zero(model, regularized, samples, objective, vocab_size)
        on_step_zero(step_zero)
    log = _JsonLog(out / LOG)
    trainer = CachedKLTrainer(
        model=model,
        args=_arguments(out, settings, head_device(base.model), mixed),
        train_dataset=list(samples),
        data_collator=pad_samples,
        callbacks=[log, _tensorboard(out), *adapter_callbacks(model, adapter), *callbacks],
        cache=regularized,
        objective=objective,
        top_k=settings.top_k,
        check=False,  # done above, with the names of the samples
        penalty=None if penalty is None else Penalty(model, penalty.weight, fisher, rewrites_base(adapter)),
        ignore_padding=pairing.ignore_padding,
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.is_world_process_zero():
        write_json(out / RUN, {**description, "status": "started"})
        if isinstance(model, PeftModel) and keeps_start(adapter) and checkpoint is None:
            save_start(model, start)
    trainer.train(resume_from_checkpoint=checkpoint)
    report = TrainReport(
        num_steps=trainer.state.global_step,
        num_tokens=int(trainer.state.num_input_tokens_seen),
        seconds=round(perf_counter() - started, 2),
        peak_memory_bytes=_peak_memory(devices_of(base.model)),
        final=log.last,
        step_zero=step_zero,
    )
    if trainer.is_world_process_zero():
        if isinstance(model, PeftModel):
            save(model, out, adapter, base.source.name, start)
        else:
            save_whole(model, base.source, out)
        write_json(out / RUN, {**description, "status": "finished", "result": asdict(report)})
    return report


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


def _check_combination(base: Base, cache: LogitCache | None, objective: Objective, top_k: int | None) -> None:
    """Raise `TrainingFailed` for settings that would train something else than they say."""
    if base.model.dtype == torch.float16:
        raise TrainingFailed(
            f"training {base.source.name} in float16: the gradients of one position among thousands are too small for "
            "it and would be lost. Use --dtype bfloat16 or float32; the cache may stay as it is."
        )
    check_tail(cache, objective, top_k)


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
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        entries = [entry for line in lines if (entry := _entry(line)) and entry["step"] <= state.global_step]
        self.path.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries), encoding="utf-8")
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
        with self.path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(entry) + "\n")


def _entry(line: str) -> dict[str, Any] | None:
    """A line of the log; None for the last one of a run that was killed while it wrote it."""
    try:
        entry: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return entry


def _arguments(out: Path, settings: TrainSettings, device: torch.device, mixed: bool = False) -> TrainingArguments:
    """mixed: float32 weights that are computed with in bfloat16."""
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
        save_total_limit=1,
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


def _describe(
    base: Base,
    samples: Sequence[Sample],
    cache: LogitCache | None,
    adapter: AdapterSettings,
    objective: Objective,
    settings: TrainSettings,
    penalty: PenaltySettings | None,
    pairing: Pairing,
) -> dict[str, Any]:
    """What determines a run, as JSON: a resumed run must agree in all of it but the versions."""
    return {
        "model": {"name": base.source.name, **asdict(base.identity)},
        "cache": None if cache is None else {"path": str(cache.path), "contents": cache.contents_checksum},
        "data": {
            "num_samples": len(samples),
            "num_tokens": sum(len(s.token_ids) for s in samples),
            "num_positions": sum(len(s.positions) for s in samples),
            "fingerprint": data_fingerprint(samples),
        },
        "pairing": {**asdict(pairing), "load_in": quantization_of(base.model)},
        "adapter": _describe_adapter(base, adapter),
        "objective": asdict(objective),
        "penalty": None if penalty is None else asdict(penalty),
        "settings": asdict(settings),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "device": ", ".join(str(device) for device in devices_of(base.model)),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),  # torchrun's; the batch of a step grows with it
    }


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


def _prepare_folder(out: Path, description: dict[str, Any], resume: bool) -> str | None:
    """The checkpoint to go on from. Raises `TrainingFailed` where the folder is in use, or holds another run."""
    previous = _read_run(out)
    if previous is None:
        if out.exists() and not all(_is_leftover(path) for path in out.iterdir()):
            raise TrainingFailed(f"writing to {out}: expected an empty folder, found files. Choose another --out.")
        out.mkdir(parents=True, exist_ok=True)
        return None
    if not resume:
        raise TrainingFailed(f"writing to {out}: it holds a run. Go on with it by --resume, or choose another --out.")
    parts = [k for k in description if k not in ("versions", "device")]
    differs = [k for k in parts if _identity(json.loads(json.dumps(description[k]))) != _identity(previous.get(k))]
    if differs:
        raise IdentityMismatch(
            f"resuming {out}: the run there differs in {', '.join(differs)} (see its run.json). "
            "Resume with the arguments it was started with, or choose another --out."
        )
    return _last_checkpoint(out / CHECKPOINTS)


def _identity(part: Any) -> Any:
    """A part of run.json without the names of paths: content decides, however it is spelt or wherever it was moved."""
    return {k: v for k, v in part.items() if k not in ("name", "path")} if isinstance(part, dict) else part


def _is_leftover(path: Path) -> bool:
    """What a run leaves that ended before its run.json was written."""
    return path.name == f"{RUN}.new" or (path.name == CHECKPOINTS and path.is_dir() and not any(path.iterdir()))


def _read_run(out: Path) -> dict[str, Any] | None:
    if not (out / RUN).exists():
        return None
    try:
        run = json.loads((out / RUN).read_text(encoding="utf-8"))
    except ValueError:
        run = None
    if not isinstance(run, dict) or "status" not in run:
        raise TrainingFailed(f"reading {out / RUN}: it is not what `logitcache train` writes. Choose another --out.")
    return run


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is whole: a run killed while it wrote one goes on from the one before.

    The Trainer writes trainer_state.json last, and removes the older checkpoint after that.
    """
    for path in sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return str(path)
    return None


def _finished_report(out: Path) -> TrainReport | None:
    run = _read_run(out)
    if run is None or run["status"] != "finished":
        return None
    result = run["result"]
    step_zero = None if result["step_zero"] is None else StepZero(**result["step_zero"])
    return TrainReport(**{**result, "step_zero": step_zero})


def _peak_memory(devices: Sequence[torch.device]) -> int:
    """Peak of this process: of the GPUs' allocators, or of the resident set on a CPU."""
    if devices[0].type == "cuda":
        return sum(torch.cuda.max_memory_allocated(device) for device in devices)
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
