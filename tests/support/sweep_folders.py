"""Fabricated sweep folders, as `logitcache sweep` leaves them: no model, only the files."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitcache.json_files import line_of
from logitcache.storage.checked_json import sealed

BASE = {"new": 4.7, "prior": 4.1}
AXES = {
    "regularizer": "none",
    "tail": None,
    "weight": None,
    "kl_budget": None,
    "top_k": None,
    "temperature": None,
    "label_smoothing": None,
    "adapter": "lora",
    "rank": 16,
    "lr": 1e-3,
    "seed": 0,
    "max_steps": 50,
}
MASKED = {"regularizer": "masked-kl", "tail": "bucket", "weight": 1.0, "top_k": 64, "temperature": 1.0}


@dataclass(frozen=True)
class Method:
    """A method: settings, its learning at lr 1e-3 and what it forgets there (KL to the base)."""

    name: str
    settings: dict[str, Any]
    learning: float
    forgetting: float


PLAIN = Method("plain LoRA", {}, 0.6, 0.08)
MASKED_KL = Method("masked KL", MASKED, 0.5, 0.004)
FULL_KL = Method("full KL", {**MASKED, "regularizer": "full-kl"}, 0.45, 0.002)
LRS = (5e-4, 1e-3, 2e-3)


def write_sweep(
    folder: Path,
    methods: Sequence[Method] = (PLAIN, MASKED_KL, FULL_KL),
    lrs: Sequence[float] = LRS,
    seeds: Sequence[int] = (0, 1),
    failed: Sequence[str] = (),
    in_progress: Sequence[str] = (),
    cost: bool = True,
    scaled: Sequence[str] = (),
    load: float = 1.2,
) -> list[str]:
    """Write the folder; returns the names of its runs, METHOD-NUMBER-lr-seed in order. Numbers by a fixed rule.

    cost: whether it was measured. scaled: methods that have the curve between base and adapter. load: of the machine.
    """
    runs, noise = [], random.Random(7)
    for number, method in enumerate(methods):
        for lr in lrs:
            for seed in seeds:
                settings = {**AXES, **method.settings, "lr": lr, "seed": seed}
                name = f"m{number}-lr{lr:g}-seed{seed}"
                runs.append({"name": name, "method": method.name, "settings": settings})
                size = math.sqrt(lr / 1e-3)
                learning = method.learning * size + noise.gauss(0, 0.008)
                forgetting = abs(method.forgetting * size**3 + noise.gauss(0, 0.003))
                status = "failed" if name in failed else "in progress" if name in in_progress else "finished"
                write_run(folder / "runs" / name, runs[-1], status, learning)
                if status == "finished":
                    own = run_cost(settings, load) if cost else {**dict.fromkeys(COST), "own_threads": 1}
                    write_json(folder / "runs" / name / "result.json", result(runs[-1], learning, forgetting, own))
                    if method.name in scaled:
                        write_json(folder / "runs" / name / "scales.json", scales(runs[-1], learning, forgetting))
    head = {
        "format": 3,
        "given": {"model": "demo base", "cache": "cache", "data": None, "anchor_cache": [], "dtype": "float32"},
        "model": "demo base",
        "cache": "cache",
        "new": "new.jsonl",
        "prior": "prior.jsonl",
        "num_train_tokens": 87_364,
        "num_train_positions": 86_964,
        "methods": [method.name for method in methods],
        "runs": runs,
    }
    write_json(folder / "sweep.json", head)
    return [str(run["name"]) for run in runs]


def write_run(folder: Path, plan: dict[str, Any], status: str, learning: float) -> None:
    """The files of one run: its start, its log, and how it ended if it has."""
    write_json(folder / "run.json", {"status": "finished" if status == "finished" else "started", "settings": {}})
    lines = [curve_line(step, learning, plan["settings"]) for step in (1, 10, 20, 30, 40, 50)]
    if status != "finished":
        lines = lines[:3]
    (folder / "train_log.jsonl").write_bytes(b"".join(line_of(line) for line in lines))
    if status == "failed":
        write_json(folder / "failed.json", {**plan, "error": "training, step 21: the loss is not finite.", "step": 21})


def curve_line(step: int, learning: float, settings: dict[str, Any]) -> dict[str, Any]:
    """A line of train_log.jsonl."""
    risen = 1 - math.exp(-step / 15)
    ce = BASE["new"] - 0.9 * learning * risen + 0.03 * math.sin(step + settings["seed"])
    kl = 0.0 if settings["regularizer"] == "none" else 0.1 * risen * (1 + settings["seed"] / 9) / settings["weight"]
    return {"step": step, "epoch": step / 50, "loss": ce + kl, "ce": ce, "kl": kl, "kl_weight": 1.0, "grad_norm": 1.0}


COST = ("step_seconds", "base_step_seconds", "base_once_seconds", "load")


def run_cost(settings: dict[str, Any], load: float) -> dict[str, Any]:
    """What a run cost: of one with a regulariser also what a live base would have added."""
    has_base = settings["regularizer"] != "none"
    base = (0.13, 9.5) if has_base else (None, None)
    return {**dict(zip(COST, (0.42 if has_base else 0.4, *base, load), strict=True)), "own_threads": 1}


def result(plan: dict[str, Any], learning: float, forgetting: float, cost: dict[str, Any]) -> dict[str, Any]:
    """A result.json with this learning and forgetting; the cross-entropy on prior text falls first, and then rises."""
    counts = {"seconds": 20.5, "num_steps": 50, "num_tokens": 87_364, "peak_memory_bytes": 2**30}
    return {**plan, **counts, "cost": cost, **sides(learning, forgetting)}


def sides(learning: float, forgetting: float) -> dict[str, Any]:
    """New and prior text."""
    return {
        "new": comparison(BASE["new"], BASE["new"] - learning, 0.2),
        "prior": comparison(BASE["prior"], BASE["prior"] + forgetting / 2 - 0.01, forgetting),
    }


def scales(plan: dict[str, Any], learning: float, forgetting: float) -> dict[str, Any]:
    """A scales.json: at a part s it learns as s, and forgets as s^2."""
    points = [{"scale": s, **sides(s * learning, s * s * forgetting)} for s in (0.25, 0.5, 0.75)]
    return {**plan, "points": points, "error": None}


def comparison(before: float, after: float, kl: float) -> dict[str, Any]:
    """`Comparison.as_dict()`, with everything that it may have."""
    return {
        "before": metrics(before),
        "after": metrics(after),
        "kl_nats": kl,
        "base_ce_nats": before + 0.1,
        "agreement": 0.9,
        "num_first_changed": min(60, round(100 * kl)),
        "num_documents": 60,
        "drift_percent": 100 * (math.exp(after - before) - 1),
        "intervals": {"drift_percent": [-1.0, 9.0]},
    }


def metrics(ce: float) -> dict[str, Any]:
    """One side of a comparison."""
    return {"num_positions": 4000, "ce_nats": ce, "token_accuracy": 0.3, "perplexity": math.exp(ce)}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """JSON with its checksum, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(sealed(value))
