"""What training makes of each form of the tail: learning and forgetting on the demo, along a sweep of the weight.

Owns the measurements behind docs/benchmarks/tail_frontier.csv. Every tail has a cache of its own here, made as
`precompute` makes it; what is compared is compared along the weight, since the lower bounds act like a smaller one.

    python scripts/study_frontier.py --seeds 2        goes on where it was stopped; 20 minutes a seed
    python scripts/study_frontier.py --table          only print what is in the CSV
"""

from __future__ import annotations

import argparse
import tempfile
import time
from importlib.resources import as_file
from itertools import product
from pathlib import Path
from statistics import mean

import numpy as np
from bench_common import BENCHMARKS, Line, demo_base, read_csv, write_csv
from study_demo import PLAIN, REFERENCE, Arm, Demo, arguments, bytes_a_position, start

from logitcache.demo.run import DemoSettings
from logitcache.evaluation.compare import compare

ARMS = (
    REFERENCE,
    Arm("groups k=32 G=64", 32, "groups", 64),
    Arm("groups k=16 G=64", 16, "groups", 64),
    Arm("renormalize k=64", 64, "renormalize"),
    Arm("sampled k=16 M=32", 16, "sampled", 0, 32),
    Arm("exact", 0, precision="exact"),
    Arm("full KL, bucket k=64", regularizer="full-kl"),
    Arm("masked JS, bucket k=64", regularizer="masked-js"),
    Arm("masked reverse KL, bucket k=64", regularizer="masked-reverse-kl"),
    Arm("bucket k=16", 16),
    Arm("groups k=64 G=64", 64, "groups", 64),
)
WEIGHTS = (0.3, 1.0, 3.0)
SAID = ("arm", "weight", "seed", "learning", "forgetting", "kl_prior", "seconds")


def frontier(args: argparse.Namespace) -> None:
    """Train what is not in the CSV yet, a whole sweep of one seed before the next, and compare."""
    out = args.out or BENCHMARKS / "tail_frontier.csv"
    lines, steps = read_csv(out), str(args.steps)
    done = {(line["arm"], line["weight"], line["seed"], line["steps"]) for line in lines}
    sweep = [(PLAIN, 0.0), *product(ARMS, WEIGHTS)]
    runs = [(arm, weight, seed) for seed in range(args.seeds) for arm, weight in sweep]
    missing = [run for run in runs if (run[0].name, f"{run[1]:g}", str(run[2]), steps) not in done]
    if missing and not args.table:
        with as_file(demo_base()) as folder:
            demo = Demo(folder, args.work, DemoSettings(max_steps=args.steps))
            for number, run in enumerate(missing, 1):
                started = time.perf_counter()
                lines.append(trained(demo, *run))
                write_csv(lines, out)
                said = "  ".join(f"{name} {value}" for name, value in lines[-1].items() if name in SAID)
                print(f"{number}/{len(missing)} {said}  {time.perf_counter() - started:.0f} s in all", flush=True)
    print_frontier([line for line in lines if line["steps"] == steps])


def trained(demo: Demo, arm: Arm, weight: float, seed: int) -> Line:
    """One run: cache, training, learning and forgetting as the demo has them."""
    cache = demo.cache(arm)
    with tempfile.TemporaryDirectory(dir=demo.work) as folder:
        adapted, seconds = demo.train(arm, cache, weight, seed, Path(folder))
    new, prior = (compare(demo.untouched.model, adapted, samples) for samples in (demo.new, demo.prior))
    assert new.after is not None and prior.after is not None and prior.kl_nats is not None
    kept = {"top_k": "", "bytes_a_position": ""}
    if cache is not None:
        kept = {"top_k": str(cache.manifest.capture.top_k), "bytes_a_position": f"{bytes_a_position(cache):.1f}"}
    return {
        "arm": arm.name,
        "regularizer": arm.regularizer,
        "tail": arm.tail if cache is not None else "",
        "tail_groups": str(arm.tail_groups),
        "tail_samples": str(arm.tail_samples),
        **kept,
        "weight": f"{weight:g}",
        "seed": str(seed),
        "steps": str(demo.settings.max_steps),
        "learning": f"{new.before.ce_nats - new.after.ce_nats:.4f}",
        "forgetting": f"{prior.after.ce_nats - prior.before.ce_nats:.4f}",
        "kl_prior": f"{prior.kl_nats:.4f}",
        "seconds": f"{seconds:.1f}",
    }


def print_frontier(lines: list[Line]) -> None:
    """Learning and forgetting of every arm, and its learning where it forgets what the reference does at each weight.

    Between its weights (and plain CE, weight 0) an arm's learning is interpolated linearly in its forgetting, seed by
    seed; `-` where its sweep does not reach. Means over seeds ± half the range.
    """
    levels = [_mean(lines, REFERENCE, weight, "forgetting") for weight in WEIGHTS]
    seeds = sorted({line["seed"] for line in lines})
    titles = [*(f"weight {weight:g}" for weight in WEIGHTS), *(f"at {level:+.3f}" for level in levels)]
    print(f"\nlearning/forgetting; then learning interpolated at a forgetting\n{'':32}", end="")
    print("".join(f"{title:17}" for title in titles))
    for arm in (PLAIN, *ARMS):
        weights = (0.0,) if arm == PLAIN else WEIGHTS
        cells = [f"{_mean(lines, arm, w, 'learning'):.3f}/{_mean(lines, arm, w, 'forgetting'):+.3f}" for w in weights]
        if arm != PLAIN:
            cells += [_mean_and_range([learning_at(lines, arm, level, seed) for seed in seeds]) for level in levels]
        print(f"{arm.name:32}" + "".join(f"{cell:17}" for cell in cells))


def learning_at(lines: list[Line], arm: Arm, forgetting: float, seed: str) -> float:
    """Interpolated along the arm's sweep; NaN outside."""
    sweep = [line for line in lines if line["arm"] in (arm.name, PLAIN.name) and line["seed"] == seed]
    points = sorted((float(line["forgetting"]), float(line["learning"])) for line in sweep)
    if len(points) < 2:
        return float("nan")
    forgot, learnt = ([point[i] for point in points] for i in (0, 1))
    return float(np.interp(forgetting, forgot, learnt, left=np.nan, right=np.nan))


def _mean(lines: list[Line], arm: Arm, weight: float, what: str) -> float:
    found = [float(line[what]) for line in lines if line["arm"] == arm.name and line["weight"] == f"{weight:g}"]
    return mean(found) if found else float("nan")


def _mean_and_range(values: list[float]) -> str:
    reached = [value for value in values if not np.isnan(value)]
    if not reached:
        return "-"
    return f"{mean(reached):.3f}" + (f" ± {(max(reached) - min(reached)) / 2:.3f}" if len(values) > 1 else "")


def main() -> None:
    """Train, print and write."""
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    frontier(start(parser))


if __name__ == "__main__":
    main()
