"""Does --kl-budget hold? The demo's training with budgets of nats a position.

Of new: mean KL of the steps of the second half of the run. Of prior: mean KL of its evaluations on prior text, every
5 steps (a tenth of the run) and every 2.

python scripts/study_budget.py            -> docs/benchmarks/budget.csv
"""

import argparse
import json
import tempfile
from dataclasses import dataclass
from importlib.resources import as_file
from pathlib import Path
from typing import Any

from bench_common import BENCHMARKS, demo_base, out_of, write_csv
from study_demo import REFERENCE, Demo
from transformers.utils import logging

from logitcache.adapters.attach import AdapterSettings
from logitcache.capture.settings import CaptureSettings
from logitcache.demo.run import DemoSettings
from logitcache.evaluation.held_out import HeldOut
from logitcache.losses.formulas import Objective
from logitcache.training.run import TrainSettings, train
from logitcache.training.settings import BudgetOf, EvalSettings

OUT = BENCHMARKS / "budget.csv"


@dataclass(frozen=True)
class Budget:
    """What is tried; every: steps from one evaluation to the next."""

    of: BudgetOf
    nats: float
    every: int = 1


BUDGETS = (
    *(Budget("new", nats) for nats in (0.05, 0.1, 0.2)),
    *(Budget("prior", nats, every) for nats in (0.02, 0.05) for every in (5, 2)),
)


def run(demo: Demo, budget: Budget, seed: int, out: Path) -> list[dict[str, Any]]:
    """The log of a run: of its steps, or of its evaluations on prior text but the first, which is of the base."""
    settings = demo.settings
    prior = None
    if budget.of == "prior":
        job = CaptureSettings(256, settings.max_length, precision="exact")
        prior = HeldOut(prior=demo.fill(demo.work / "prior", demo.prior, job))
    train(
        demo.load(),
        demo.train_set,
        demo.cache(REFERENCE),
        out,
        AdapterSettings(rank=settings.rank),
        Objective(kl_budget=budget.nats),
        TrainSettings(2e-3, batch_size=settings.batch_size, max_steps=settings.max_steps, seed=seed, log_every=1),
        held_out=prior,
        evaluation=EvalSettings(eval_steps=budget.every, kl_budget_of="prior") if prior else None,
    )
    name, skipped = ("eval_log.jsonl", 1) if prior else ("train_log.jsonl", 0)
    return [json.loads(line) for line in (out / name).read_text(encoding="utf-8").splitlines()][skipped:]


def main() -> None:
    """Every budget and seed, a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", choices=("new", "prior"), nargs="+", default=("new", "prior"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=DemoSettings().max_steps)
    parser.add_argument("--out", type=Path, help="default: docs/benchmarks/budget.csv")
    args = parser.parse_args()
    table = out_of(parser, args, OUT)
    logging.disable_progress_bar()
    lines = []
    with tempfile.TemporaryDirectory() as folder, as_file(demo_base()) as base_folder:
        demo = Demo(base_folder, Path(folder), DemoSettings(max_steps=args.steps))
        for budget, seed in ((b, s) for b in BUDGETS if b.of in args.of for s in range(args.seeds)):
            out = Path(folder) / f"{budget.of}-{budget.nats}-{budget.every}-{seed}"
            log = run(demo, budget, seed, out)
            found = [entry["kl" if budget.of == "new" else "prior_kl"] for entry in log]
            half = found[len(found) // 2 :]
            kl = sum(half) / len(half)
            last = (out / "train_log.jsonl").read_text(encoding="utf-8").splitlines()[-1]
            line = {"of": budget.of, "every_steps": budget.every, "budget_nats": budget.nats, "seed": seed}
            lines.append(
                {
                    **line,
                    "steps": args.steps,
                    "mean_kl_second_half_nats": round(kl, 4),
                    "off_percent": round(100 * (kl / budget.nats - 1), 1),
                    "last_kl_nats": round(found[-1], 4),
                    "highest_kl_nats": round(max(found), 4),
                    "last_weight": round(json.loads(last)["kl_weight"], 3),
                }
            )
            print(lines[-1], found if budget.of == "prior" else "", flush=True)
    write_csv(lines, table)


if __name__ == "__main__":
    main()
