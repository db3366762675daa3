"""What is done on the simulated CUDA device, and on the CPU beside it: for `on_simulated_cuda`, which see.

Each case takes a folder and returns plain JSON. What is expected is the test's.
"""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from support.host_waits import HostWaits
from support.plug_ins import CachedSFTTrainer, rows_of
from support.tiny_model import make_model, make_tokenizer
from support.tiny_runs import make_base, make_cache, make_samples, moved_adapter
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from logitcache.capture.pending import PendingRecords
from logitcache.capture.records import one_hot
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.teacher import TransformersTeacher
from logitcache.capture.worker import precompute
from logitcache.data.batches import pad_samples
from logitcache.errors import TrainingFailed
from logitcache.evaluation.compare import compare
from logitcache.losses.formulas import Objective
from logitcache.models.loading import Base, Source
from logitcache.pairing.view import CacheView
from logitcache.storage import LogitCache
from logitcache.training.anchors import Anchor, AnchorSettings
from logitcache.training.batch_loss import batch_loss
from logitcache.training.custom_loop import CachedLoss
from logitcache.training.run import TrainSettings, train, trainer_arguments
from logitcache.training.trainer import CachedKLTrainer
from logitcache.training.trainer_settings import TrainerSettings

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)

Json = dict[str, Any]

Waits = Counter[tuple[str, str, str]]
"""As `HostWaits` counts them."""

FULL = CaptureSettings(
    top_k=8, max_length=256, precision="exact", tail_groups=4, tail_samples=4, kl_positions="all", batch_tokens=128
)
"""A cache that has all that an objective may read."""

OBJECTIVES = {
    "bucket": Objective(),
    "groups": Objective(tail="groups"),
    "sampled": Objective(tail="sampled"),
    "full-kl": Objective("full-kl"),
    "reverse": Objective("masked-reverse-kl", tail="groups"),
    "all positions": Objective(kl_positions="all"),
    "rho1": Objective(ce_weight="rho1"),
}


def of_the_device(_: Path) -> Json:
    """What the device itself does: where tensors lie, what it refuses, and what is counted as a wait."""
    a = torch.arange(6.0, device=CUDA)
    mask, weight = a > 2, torch.ones(6, device=CUDA, requires_grad=True)
    pinned = torch.ones(3).pin_memory()

    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * float(grad.sum())

    work: dict[str, Callable[[], Any]] = {
        "a number": lambda: a.sum().item(),
        "a comparison": lambda: bool(a[0] == 0),
        "places": lambda: mask.nonzero(),
        "a choice by a mask": lambda: a[mask],
        "a copy to the host": lambda: a.cpu(),
        "a copy from the host": lambda: torch.ones(3).to(CUDA, non_blocking=True),
        "a copy that blocks": lambda: pinned.to(CUDA),
        "a tensor of a number": lambda: torch.tensor(1.0, device=CUDA),
        "a backward": lambda: Reads.apply(weight).sum().backward(),
        "a copy from pinned memory": lambda: pinned.to(CUDA, non_blocking=True),
        "an empty copy": lambda: torch.ones(0).to(CUDA),
        "a fill by a mask": lambda: a.masked_fill(mask, 0.0),
        "a choice by numbers": lambda: a.index_select(0, torch.arange(2, device=CUDA)),
        "a tensor of zeros": lambda: torch.zeros(3, device=CUDA),
        "a sum": lambda: (a * 2).sum(),
    }
    refused = [_raised(f) for f in (lambda: a + torch.ones(6), lambda: a.index_select(0, torch.arange(2)))]
    return {
        "device": str((a + 1).device),
        "refused": refused,
        "waits": {n: sum(_waits(f).values()) for n, f in work.items()},
    }


def _raised(work: Callable[[], Any]) -> str:
    try:
        return str(work())
    except RuntimeError as error:
        return str(error)


def losses(folder: Path) -> Json:
    """Of each objective: ce, kl and loss on both devices, and how far the gradients are apart."""
    cache, found = _full_cache(folder), {}
    for name, objective in OBJECTIVES.items():
        values, gradients = zip(*(_loss_on(device, cache, objective) for device in (CPU, CUDA)), strict=True)
        sizes = [float(gradients[0][n].abs().max()) for n in gradients[0]]
        apart = [float((gradients[0][n] - gradients[1][n]).abs().max()) for n in gradients[0]]
        found[name] = {"cpu": values[0], "cuda": values[1], "apart": max(apart), "size": max(sizes)}
    return found


def _loss_on(device: torch.device, cache: LogitCache, objective: Objective) -> tuple[list[float], dict[str, Tensor]]:
    model = moved_adapter().to(device).train()
    view = CacheView.paired(cache, model, objective)
    batch = view.collator(pad_samples)(make_samples()[:6])
    placed = {name: value.to(device) for name, value in batch.items()}
    made = batch_loss(model, placed, objective, 0.7, view)
    assert made.loss.device == device
    made.loss.backward()
    return [float(value) for value in made], {
        n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None
    }


def steps(folder: Path) -> Json:
    """The log and the weights of three steps of `CachedKLTrainer`, on both devices, with anchors and a budget."""
    cache = make_cache(folder / "cache", make_samples())
    anchor = Anchor(make_cache(folder / "anchor", make_samples(8, seed=7)), AnchorSettings(batch=2))
    found: Json = {}
    for device in (CPU, CUDA):
        objective = Objective(kl_budget=0.05)
        trainer = _trainer(folder / device.type, device, cache, objective, log_every=1, max_steps=3, anchor=anchor)
        trainer.train()
        names = ("loss", "ce", "kl", "kl_weight", "anchor_kl", "grad_norm")
        logged = [{name: entry[name] for name in names} for entry in trainer.state.log_history if "ce" in entry]
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        devices = sorted({str(p.device) for p in trained})
        found[device.type] = {
            "log": logged,
            "norm": float(sum(p.detach().square().sum() for p in trained)),
            "on": devices,
        }
    return found


def captured(folder: Path) -> Json:
    """By how much two caches of the same samples, one made on each device, differ at most, by the records' columns."""
    samples, caches = make_samples(), []
    for device in (CPU, CUDA):
        base = make_base()
        base.model.to(device)
        precompute(base, samples, folder / device.type, FULL)
        caches.append(LogitCache.open(folder / device.type))
    asked = [s.token_ids for s in samples], [np.arange(len(s.token_ids) - 1, dtype=np.int32) for s in samples]
    records = [cache.lookup_batch(*asked) for cache in caches]
    found = {}
    for name in (field.name for field in fields(records[0][0])):
        one, other = (np.concatenate([getattr(r, name) for r in part]).astype(np.float64) for part in records)
        found[name] = float(np.abs(np.where(one == other, 0.0, one - other)).max())  # where both are -inf
    return found


def waits_of_capture(_: Path) -> Json:
    """Where the host waits while it gives the device a batch to capture, and while it fetches the record; without tail
    groups and draws, with both."""
    model = make_model().to(CUDA)
    groups = one_hot(torch.arange(model.config.vocab_size) % 3, torch.device(CUDA))
    teachers = {
        "bucket": TransformersTeacher(model, 8, masked=False),
        "groups and draws": TransformersTeacher(model, 8, groups, 4, masked=False),
    }
    found = {}
    for name, teacher in teachers.items():
        teacher(make_samples()[:4])  # which allocates
        pending: list[PendingRecords] = []
        launching = _waits(lambda: pending.append(teacher.launch(make_samples()[4:8])))  # noqa: B023
        found[name] = {"launch": _told(launching), "records": _told(_waits(lambda: pending.pop().records()))}  # noqa: B023
    return found


def compared(_: Path) -> Json:
    """What an evaluation of an adapter finds, on both devices."""
    return {
        device.type: compare(make_model().to(device), moved_adapter().eval().to(device), make_samples()).as_dict()
        for device in (CPU, CUDA)
    }


def waits_of_a_step(folder: Path) -> Json:
    """Where the host waits in one optimizer step that is not logged, after two others: transformers' own Trainer and
    `CachedKLTrainer`, with the arguments of a plug-in's user and with those of `logitcache train`."""
    cache, full = make_cache(folder / "cache", make_samples()), _full_cache(folder / "full")
    anchor = Anchor(make_cache(folder / "anchor", make_samples(8, seed=7)), AnchorSettings(batch=2))
    makers: dict[str, Callable[[Path], Trainer]] = {
        "plain": lambda out: _plain(_users(out)),
        "plug-in": lambda out: _plugged(out, cache),
        "plug-in, groups": lambda out: _plugged(out, full, OBJECTIVES["groups"]),
        "plug-in, all positions": lambda out: _plugged(out, full, OBJECTIVES["all positions"]),
        "plug-in, rho1": lambda out: _plugged(out, full, OBJECTIVES["rho1"]),
        "plug-in, budget": lambda out: _plugged(out, cache, Objective(kl_budget=0.05)),
        "plug-in, anchor": lambda out: _plugged(out, cache, anchor=anchor),
        "plain, job": lambda out: _plain(_jobs(out, CUDA)),
        "job": lambda out: _trainer(out, CUDA, cache, masked=False),
        "job, micro-batches": lambda out: _trainer(out, CUDA, cache, masked=False, batch_tokens=64),
    }
    found = {name: _told(_waits_of_third_step(make(folder / name))) for name, make in makers.items()}
    found["own loop"] = _told(_waits_of_a_loop(cache))
    return {**found, "job, whole": _told(_waits_of_a_job(folder, cache))}


def waits_of_sft(folder: Path) -> Json:
    """The same of TRL's SFTTrainer, by itself and with `CachedKL`, whose batches are padded and packed."""
    cache = make_cache(folder / "cache", make_samples())
    found: Json = {}
    for packing in (False, True):
        settings = {"packing": packing, "max_steps": 4, "logging_steps": 100, "per_device_train_batch_size": 4}
        for kind, cls in (("plain", SFTTrainer), ("cached", CachedSFTTrainer)):
            name = f"{kind}, {'packed' if packing else 'padded'}"
            found[name] = _told(_waits_of_third_step(_sft(folder / name, cls, cache, settings)))
    return found


def sent_columns(folder: Path) -> Json:
    """The names of what a batch brings of a cache that has all, for each objective."""
    cache = _full_cache(folder)
    return {
        name: sorted(CacheView.paired(cache, make_model(), objective).collator(pad_samples)(make_samples()[:2]))
        for name, objective in OBJECTIVES.items()
    }


def one_of_two(folder: Path) -> Json:
    """A job on a machine with two devices, its base on each in turn, and once without workers of the loader; and a
    trainer of one's own there, refused."""
    assert torch.cuda.device_count() == 2
    cache = make_cache(folder / "cache", make_samples())
    settings, found = TrainSettings(max_steps=3, log_every=1), dict[str, Any]()
    places = {"cpu": CPU, "cuda:0": CUDA, "cuda:1": torch.device("cuda", 1), "cuda:0, no workers": CUDA}
    for name, device in places.items():
        base, out = _on_disk(folder / "tiny", device), folder / name
        own = TrainerSettings(set=("dataloader_num_workers=0",) if "no workers" in name else None)
        report = train(base, make_samples(), cache, out, None, None, settings, trainer=own)
        found[name] = {
            "steps": report.num_steps,
            "on": sorted({str(p.device) for p in base.model.parameters()}),
            "final": report.final,
            "adapter": hashlib.sha256((out / "adapter_model.safetensors").read_bytes()).hexdigest(),
        }
    try:
        _plugged(folder / "own", cache)
        found["own"] = "trained"
    except TrainingFailed as error:
        found["own"] = str(error)
    return found


def _sft(out: Path, cls: Any, cache: LogitCache, settings: Json) -> Trainer:
    args = SFTConfig(
        str(out), bf16=False, max_length=64, save_strategy="no", report_to=[], disable_tqdm=True, **settings
    )
    made = {"cache": cache, "check": False} if cls is CachedSFTTrainer else {}
    data = Dataset.from_list(rows_of(make_samples()))
    return cls(model=_student(), args=args, train_dataset=data, processing_class=make_tokenizer(), **made)


def _full_cache(folder: Path) -> LogitCache:
    precompute(make_base(), make_samples(), folder / "full", FULL)
    return LogitCache.open(folder / "full")


def _on_disk(folder: Path, device: torch.device) -> Base:
    base = make_base()
    base.model.config.save_pretrained(folder)  # PEFT looks at it when it saves
    base.model.to(device)
    return replace(base, source=Source("tiny", folder))


def _jobs(out: Path, device: torch.device, **settings: Any) -> TrainingArguments:
    """Arguments as of `logitcache train`."""
    args = trainer_arguments(out, TrainSettings(**{"lr": 1e-2, "max_steps": 5, "log_every": 100, **settings}), device)
    args.save_strategy = "no"
    return args


def _users(out: Path) -> TrainingArguments:
    """Arguments as a user of the plug-in has them."""
    quiet: Json = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "remove_unused_columns": False}
    return TrainingArguments(str(out), per_device_train_batch_size=4, max_steps=5, logging_steps=100, **quiet)


def _student() -> PeftModel:
    model = moved_adapter()
    model.train()
    return model


def _plain(args: TrainingArguments) -> Trainer:
    return Trainer(model=_student(), args=args, train_dataset=list(make_samples()), data_collator=pad_samples)


def _plugged(out: Path, cache: LogitCache, objective: Objective | None = None, **changes: Any) -> CachedKLTrainer:
    return _made(_users(out), cache, objective, **changes)


def _trainer(
    out: Path,
    device: torch.device,
    cache: LogitCache,
    objective: Objective | None = None,
    log_every: int = 100,
    max_steps: int = 5,
    **changes: Any,
) -> CachedKLTrainer:
    args = _jobs(out, device, log_every=log_every, max_steps=max_steps, batch_size=4)
    return _made(args, cache, objective, **changes)


def _made(args: TrainingArguments, cache: LogitCache, objective: Objective | None, **changes: Any) -> CachedKLTrainer:
    return CachedKLTrainer(
        model=_student(),
        args=args,
        train_dataset=list(make_samples()),
        data_collator=pad_samples,
        cache=cache,
        objective=objective or Objective(),
        check=False,  # it is not the base any more
        **changes,
    )


def _told(waits: Waits) -> Json:
    """How many there are, how many of them a line of the product itself causes, and all of them in words."""
    own = sum(count for (_, ours, inner), count in waits.items() if ours == inner)
    return {"count": sum(waits.values()), "own": own, "lines": [f"{n} x {' '.join(at)}" for at, n in waits.items()]}


class _AtSteps(TrainerCallback):
    """What had been counted at the end of each step."""

    def __init__(self, waits: HostWaits) -> None:
        self._waits = waits
        self.counted: list[Waits] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.counted.append(Counter(self._waits.found))


def _waits(work: Callable[[], Any]) -> Waits:
    with HostWaits() as waits:
        work()
    return waits.found


def _waits_of_a_loop(cache: LogitCache) -> Waits:
    """Of the third batch of a loop of one's own, whose collator knows no cache: it is on the device when it is looked
    up."""
    model, loss_of = _student().to(CUDA), CachedLoss(cache, check=False)
    batch = {name: value.to(CUDA) for name, value in pad_samples(make_samples()[:4]).items()}
    for _ in range(2):
        loss_of(model, batch).loss.backward()
    return _waits(lambda: loss_of(model, batch).loss.backward())


def _waits_of_a_job(folder: Path, cache: LogitCache) -> Waits:
    """Of the third step of `train`, whose batches are looked up by workers of the loader."""
    waits = HostWaits()
    at_steps = _AtSteps(waits)
    base, out, settings = _on_disk(folder / "tiny", CUDA), folder / "job-out", TrainSettings(max_steps=4, log_every=100)
    own = TrainerSettings(save_steps=100)
    with waits:
        train(base, make_samples(), cache, out, None, None, settings, callbacks=[at_steps], trainer=own)
    return at_steps.counted[2] - at_steps.counted[1]


def _waits_of_third_step(trainer: Trainer) -> Waits:
    """From the end of the second step to that of the third: fetching its batches, forward, backward and update."""
    waits = HostWaits()
    at_steps = _AtSteps(waits)
    trainer.add_callback(at_steps)
    with waits:
        trainer.train()
    return at_steps.counted[2] - at_steps.counted[1]
