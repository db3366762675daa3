"""Does --kl-budget hold? The demo's training with budgets of nats a position: mean KL over the second half of the run.

python scripts/study_budget.py            -> docs/benchmarks/budget.csv
"""

import argparse
import csv
import json
import tempfile
from importlib.resources import as_file, files
from pathlib import Path

from transformers.utils import logging

from logitcache.adapters.attach import AdapterSettings
from logitcache.demo.run import DemoSettings, _fill_cache, _load, _load_float32, write_data
from logitcache.losses.formulas import Objective
from logitcache.models.loading import Source, find_model
from logitcache.training.run import TrainSettings, train

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "budget.csv"
BUDGETS = (0.05, 0.1, 0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    logging.disable_progress_bar()
    settings, lines = DemoSettings(), []
    with (
        tempfile.TemporaryDirectory() as folder,
        as_file(files("logitcache.demo").joinpath("base")) as base_folder,
    ):
        work = Path(folder)
        source = Source("demo base", find_model(str(base_folder)).folder)
        samples = _load(source, write_data(work / "data", settings)[0], settings)
        cache = _fill_cache(work / "cache", _load_float32(source), samples, settings, print)
        for budget, seed in ((b, s) for b in args.budgets for s in range(args.seeds)):
            out = work / f"{budget}-{seed}"
            train(
                _load_float32(source),
                samples,
                cache,
                out,
                AdapterSettings(rank=settings.rank, alpha=2.0 * settings.rank),
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
    with args.out.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    main()
