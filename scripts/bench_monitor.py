"""What evaluation while training takes of memory: the same run with and without it, each in a process of its own.

python scripts/bench_monitor.py            -> docs/benchmarks/monitor.csv
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_common import (
    BENCHMARKS,
    Shape,
    high_water_mark_mib,
    make_model,
    out_of,
    provenance,
    reset_high_water_mark,
    resident_mib,
    run_child,
    set_up,
    write_csv,
)

OUT = BENCHMARKS / "monitor.csv"
SHAPE = Shape("llama-8x512", vocab_size=32_768, tie_word_embeddings=True)
PACKAGES = ("torch", "transformers", "peft", "logitcache")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=256, help="tokens a sample")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--samples", type=int, default=16, help="of each text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="default: docs/benchmarks/monitor.csv")
    parser.add_argument("--job")
    args = parser.parse_args()
    if args.job:
        print(json.dumps(child(json.loads(args.job))))
        return
    out = out_of(parser, args, OUT)
    with tempfile.TemporaryDirectory() as folder:
        job = {name: getattr(args, name) for name in ("length", "batch_size", "steps", "samples", "seed", "threads")}
        with torch.no_grad():
            make_model(SHAPE, Path(folder) / "base", {**job, "device": "cpu", "dtype": "float32"})
        assert run_child(__file__, {**job, "folder": folder, "part": "caches"}, args.threads) is not None
        lines: list[dict[str, Any]] = []
        for evaluated in (False, True):
            found = run_child(
                __file__, {**job, "folder": folder, "part": "train", "evaluated": evaluated}, args.threads
            )
            assert found is not None
            against = lines[0] if lines else found
            ratio = {f"{name}_ratio": round(found[name] / against[name], 4) for name in ("peak_mib", "growth_mib")}
            lines.append({"model": SHAPE.name, **found, **ratio, **provenance(__file__, "cpu", PACKAGES)})
            print(lines[-1], flush=True)
    write_csv(lines, out)


def child(job: dict[str, Any]) -> dict[str, Any]:
    """A part of the work in this process: the two caches, or a run."""
    from transformers import TrainerCallback, logging

    from logitcache import (
        AdapterSettings,
        CaptureSettings,
        EvalSettings,
        HeldOut,
        Objective,
        TrainSettings,
        precompute,
        train,
    )
    from logitcache.models.loading import find_model, load_base

    set_up(job["threads"])
    logging.disable_progress_bar()
    folder = Path(job["folder"])
    base = load_base(find_model(str(folder / "base")), "float32", torch.device("cpu"))
    new, prior = (samples_of(job, seed) for seed in (1, 2))
    if job["part"] == "caches":
        for name, samples in (("cache", new), ("prior", prior)):
            precompute(base, samples, folder / name, CaptureSettings(top_k=32, max_length=job["length"]))
        return {}
    start: dict[str, float] = {}

    class Begins(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert reset_high_water_mark()
            start["mib"] = resident_mib()

    settings = TrainSettings(max_steps=job["steps"], batch_size=job["batch_size"], log_every=1)
    report = train(
        *(
            base,
            new,
            folder / "cache",
            folder / f"adapter-{job['evaluated']}",
            AdapterSettings(),
            Objective(),
            settings,
        ),
        callbacks=[Begins()],
        held_out=HeldOut(samples_of(job, 3), folder / "prior") if job["evaluated"] else None,
        evaluation=EvalSettings(eval_steps=2) if job["evaluated"] else None,
    )
    peak = high_water_mark_mib()
    return {
        "evaluated": job["evaluated"],
        "evaluations": job["steps"] // 2 + 1 if job["evaluated"] else 0,
        "tokens_a_step": job["length"] * job["batch_size"],
        "tokens_evaluated": 2 * job["length"] * job["samples"] if job["evaluated"] else 0,
        "peak_mib": round(peak, 1),
        "growth_mib": round(peak - start["mib"], 1),
        "prior_kl": report.evaluated.get("prior_kl"),
    }


def samples_of(job: dict[str, Any], seed: int) -> list[Any]:
    """Random tokens, every one supervised."""
    from logitcache.data.samples import Sample

    drawn = np.random.default_rng(seed).integers(0, SHAPE.vocab_size, (job["samples"], job["length"]))
    return [
        Sample(ids.astype(np.uint32), np.ones(len(ids), dtype=np.bool_), f"sample {i}") for i, ids in enumerate(drawn)
    ]


if __name__ == "__main__":
    main()
