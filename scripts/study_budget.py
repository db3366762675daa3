"""Does --kl-budget hold? The demo's training with budgets of nats a position: mean KL over the second half of the run.

python scripts/study_budget.py            -> docs/benchmarks/budget.csv
"""

import argparse
import json
import tempfile
from importlib.resources import as_file
from pathlib import Path

from bench_common import BENCHMARKS, demo_base, write_csv
from study_demo import REFERENCE, Demo
from transformers.utils import logging

from logitcache.adapters.attach import AdapterSettings
from logitcache.demo.run import DemoSettings
from logitcache.losses.formulas import Objective
from logitcache.training.run import TrainSettings, train

OUT = BENCHMARKS / "budget.csv"
BUDGETS = (0.05, 0.1, 0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=DemoSettings().max_steps)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    logging.disable_progress_bar()
    settings, lines = DemoSettings(max_steps=args.steps), []
    with tempfile.TemporaryDirectory() as folder, as_file(demo_base()) as base_folder:
        work = Path(folder)
        demo = Demo(base_folder, work, settings)
        cache = demo.cache(REFERENCE)
        for budget, seed in ((b, s) for b in args.budgets for s in range(args.seeds)):
            out = work / f"{budget}-{seed}"
            train(
                demo.load(),
                demo.train_set,
                cache,
                out,
                AdapterSettings(rank=settings.rank),
                Objective(kl_budget=budget),
                TrainSettings(
                    2e-3, batch_size=settings.batch_size, max_steps=settings.max_steps, seed=seed, log_every=1
                ),
            )
            log = [json.loads(line) for line in (out / "train_log.jsonl").read_text(encoding="utf-8").splitlines()]
            half = log[len(log) // 2 :]
            kl = sum(entry["kl"] for entry in half) / len(half)
            lines.append(
                {
                    "budget_nats": budget,
                    "seed": seed,
                    "steps": len(log),
                    "mean_kl_second_half_nats": round(kl, 4),
                    "off_percent": round(100 * (kl / budget - 1), 1),
                    "highest_kl_nats": round(max(entry["kl"] for entry in log), 4),
                    "last_weight": round(log[-1]["kl_weight"], 3),
                }
            )
            print(lines[-1], flush=True)
    write_csv(lines, args.out)


if __name__ == "__main__":
    main()
