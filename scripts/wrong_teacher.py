"""What it costs to regularise towards `disable_adapter()` where an adapter has rewritten the base.

Owns the measurements behind docs/benchmarks/wrong_teacher.csv: the demo's base, data, steps and settings, an adapter
that takes its first factors out of the weights, and four ways of training it:

    plain CE                no regulariser
    live disable_adapter()  exact masked KL, the teacher run in every step as online implementations do: without the
                            adapter, which is the residual model and not the base
    live true base          the same with a second copy of the untouched base as the teacher: what should have been
    cache                   masked KL from the cache of the untouched base, as `logitcache train` does it

The live arms are written here, dense and plain, over transformers' Trainer with the product's own arguments, so that
steps, order of samples and learning rates are the same. Every adapter is saved, loaded on the untouched base and
evaluated there. What is in the CSV is not run again; nats a token.

    python scripts/wrong_teacher.py                                     pissa, two seeds: 8 runs of about a minute
    python scripts/wrong_teacher.py --adapter corda olora milora        more of them
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from contextlib import nullcontext
from dataclasses import replace
from importlib.resources import as_file
from pathlib import Path
from typing import Any

import study_demo
import torch
import torch.nn.functional as F
from bench_common import BENCHMARKS, Line, demo_base, read_csv, write_csv
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, set_seed
from transformers.utils import logging

from logitcache.adapters.attach import AdapterSettings, attach, save, save_start
from logitcache.data.batches import pad_samples
from logitcache.data.files import IGNORED
from logitcache.demo.run import DemoSettings
from logitcache.evaluation.compare import compare, load_adapter
from logitcache.losses.formulas import Objective
from logitcache.training.run import TrainSettings, train, trainer_arguments

OUT = BENCHMARKS / "wrong_teacher.csv"
WORK = Path(tempfile.gettempdir()) / "logitcache-wrong-teacher"
PLAIN, LIVE, TRUE, CACHE = "plain CE", "live disable_adapter()", "live true base", "cache"
ARMS = (PLAIN, LIVE, TRUE, CACHE)
ADAPTERS = ("pissa", "corda", "olora", "milora")
KEY = ("adapter", "arm", "seed", "lr", "steps", "weight")
MIN_REST = 1e-4


def masked_kl(base: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """KL(p without y || q without y) of [N, V] logits, mean over positions where 1 - p(y) >= MIN_REST."""
    y = labels[:, None]
    log_p, log_q = (z.float().scatter(1, y, -torch.inf).log_softmax(dim=1) for z in (base, logits))
    hole = F.one_hot(labels, logits.shape[1]).bool()
    values = (log_p.exp() * (log_p - log_q).masked_fill(hole, 0.0)).sum(dim=1)
    return values[base.float().softmax(dim=1).gather(1, y)[:, 0] <= 1 - MIN_REST].mean()


class LiveTeacher(Trainer):
    """CE + weight * masked KL to a teacher that is run in every step: `base`, or the model without its adapter."""

    def __init__(self, *args: Any, base: nn.Module | None, weight: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.base, self.weight = base, weight

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        """The loss of a batch, a float32 scalar."""
        labels = inputs.pop("labels")[:, 1:]
        kept = labels != IGNORED
        with torch.no_grad(), nullcontext() if self.base is not None else model.disable_adapter():
            teacher = (self.base or model)(**inputs, use_cache=False).logits[:, :-1][kept]
        logits = model(**inputs, use_cache=False).logits[:, :-1][kept]
        return F.cross_entropy(logits, labels[kept]) + self.weight * masked_kl(teacher, logits, labels[kept])


class Demo(study_demo.Demo):
    """The demo's base, data and cache, kept in `work`, and one run of each arm."""

    def __init__(self, folder: Path, work: Path, settings: DemoSettings) -> None:
        super().__init__(folder, work, settings)
        cache = self.cache(study_demo.REFERENCE)
        assert cache is not None
        self.kept = cache
        self.tail = "groups" if cache.manifest.capture.num_tail_groups else "bucket"

    def run_arm(self, adapter: AdapterSettings, arm: str, job: TrainSettings, weight: float, out: Path) -> float:
        """Train one adapter into `out`; its seconds."""
        started = time.perf_counter()
        if arm in (LIVE, TRUE):
            self.live(adapter, arm, job, weight, out)
        else:
            objective = Objective("none") if arm == PLAIN else Objective(tail=self.tail, weight=weight)  # type: ignore[arg-type]
            train(self.load(), self.train_set, self.kept, out, adapter, objective, job)
        return time.perf_counter() - started

    def live(self, adapter: AdapterSettings, arm: str, job: TrainSettings, weight: float, out: Path) -> None:
        set_seed(job.seed)
        model = attach(self.load().model, adapter, str(self.source.folder), self.train_set)
        save_start(model, out / "checkpoints" / "start")
        args = trainer_arguments(out, job, torch.device("cpu"))
        args.save_strategy = "no"
        trainer = LiveTeacher(
            model=model,
            args=args,
            train_dataset=list(self.train_set),
            data_collator=pad_samples,
            base=self.load().model if arm == TRUE else None,
            weight=weight,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        save(model, out, adapter, self.source.name, out / "checkpoints" / "start")

    def measure(self, out: Path) -> Line:
        """Learning and forgetting of a trained adapter, on the untouched base."""
        adapted = load_adapter(self.load().model, str(out))
        new, prior = (compare(self.untouched.model, adapted, held_out) for held_out in (self.new, self.prior))
        assert new.after is not None and prior.after is not None
        values = {
            "new_ce": new.after.ce_nats,
            "prior_ce": prior.after.ce_nats,
            "learning": new.before.ce_nats - new.after.ce_nats,
            "forgetting": prior.after.ce_nats - prior.before.ce_nats,
            "kl_new": new.kl_nats,
            "kl_prior": prior.kl_nats,
        }
        return {name: f"{value:.4f}" for name, value in values.items()}

    def residual(self, adapter: AdapterSettings, seed: int) -> str:
        """What `disable_adapter()` forgets before any training: its cross-entropy on prior text less the base's."""
        set_seed(seed)
        model = attach(self.load().model, adapter, str(self.source.folder), self.train_set).eval()
        with model.disable_adapter():
            found = compare(self.untouched.model, model, self.prior)
        assert found.after is not None
        return f"{found.after.ce_nats - found.before.ce_nats:.4f}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = DemoSettings()
    parser.add_argument("--adapter", nargs="+", choices=ADAPTERS, default=["pissa"])
    parser.add_argument("--arm", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(defaults.seeds))
    parser.add_argument("--lr", nargs="+", type=float, default=[2e-3])
    parser.add_argument("--weight", type=float, default=defaults.weight)
    parser.add_argument("--steps", type=int, default=defaults.max_steps)
    parser.add_argument("--held-out", type=int, default=defaults.num_held_out)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    settings = replace(defaults, max_steps=args.steps, num_held_out=args.held_out)
    with as_file(demo_base()) as folder:
        demo = Demo(folder, args.work, settings)
        for kind in args.adapter:
            sweep(demo, AdapterSettings(kind, settings.rank, 2.0 * settings.rank), args)


def sweep(demo: Demo, adapter: AdapterSettings, args: argparse.Namespace) -> None:
    """Every seed, learning rate and arm that is not in the CSV yet."""
    for seed in args.seeds:
        residual = ""
        for lr in args.lr:
            for arm in args.arm:
                key = dict(
                    zip(
                        KEY, (adapter.kind, arm, str(seed), f"{lr:g}", str(args.steps), f"{args.weight:g}"), strict=True
                    )
                )
                lines = read_csv(args.out)
                if any(all(line[k] == v for k, v in key.items()) for line in lines):
                    continue
                residual = residual or demo.residual(adapter, seed)
                job = TrainSettings(lr=lr, batch_size=demo.settings.batch_size, max_steps=args.steps, seed=seed)
                with tempfile.TemporaryDirectory(dir=args.work) as out:
                    seconds = demo.run_arm(adapter, arm, job, args.weight, Path(out))
                    found = {**key, "tail": demo.tail if arm == CACHE else "", **demo.measure(Path(out))}
                found |= {"residual_forgetting": residual, "seconds": f"{seconds:.1f}"}
                write_csv([*lines, found], args.out)
                print(f"{adapter.kind}, {arm}, seed {seed}, lr {lr:g}: learnt {found['learning']}, forgot "
                      f"{found['forgetting']} nats, {seconds:.0f} s")  # fmt: skip


if __name__ == "__main__":
    main()
