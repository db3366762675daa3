"""Seconds and memory of whole LoRA training steps: plain, against a cache, and against a live base.

Owns the measurements behind docs/benchmarks/step.csv. One run, every method in a fresh process, the repeats going round
the methods; every method trains the same adapter on the same rows with transformers' Trainer, and what counts are the
ratios to plain cross-entropy. The live methods are masked KL as arXiv 2605.29498 describes it, written plainly: full
logits of both sides, lambda 1. A step with anchors has as many of them as new samples, of 64 tokens, as answers to
everyday prompts have them. Steps are timed from end to end of each other, data included, without the first 2; the
peak is that of the whole process, step_growth what the steps after the first need beyond what stays between them.
Models: the demo's embedded base on its own text, and one of random weights with V = 151,936 on random tokens, whose
head is a larger part of it than of a real model (see the columns body and head).

    python scripts/bench_step.py                      both models, one core
    python scripts/bench_step.py --quick              a taste, which writes nothing
    python scripts/bench_step.py --preset 7b --out F  on a GPU: shape of Qwen2.5-7B, bfloat16, random weights
    python scripts/bench_step.py --preset 0.5b --batch-size 8 --length 1024 --out F
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from importlib.resources import as_file
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from bench_common import (
    BENCHMARKS,
    DEMO,
    QUICK,
    SHAPES,
    PeakMemory,
    Shape,
    demo_base,
    make_model,
    out_of,
    provenance,
    run_child,
    set_up,
    write_csv,
)
from torch import Tensor, nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    logging,
)

from logitcache.adapters.attach import AdapterSettings, attach
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.worker import precompute
from logitcache.data.samples import Sample
from logitcache.demo.text import code_documents
from logitcache.losses.formulas import Objective
from logitcache.models.loading import Base, Source, load_base, load_tokenizer
from logitcache.pairing import targets
from logitcache.training.anchors import Anchor
from logitcache.training.settings import AnchorSettings
from logitcache.training.trainer import CachedKLTrainer

DEFAULT_OUT = BENCHMARKS / "step.csv"
METHODS = {
    "plain CE": "Trainer's own loss",
    "cache, bucket": "masked KL, base read from the cache",
    "cache, groups": "masked KL, base read from the cache",
    "plain CE + anchors": "and full KL on anchors, base read from their cache",
    "cache, bucket + anchors": "masked KL and full KL on anchors, base read from the caches",
    "live, adapter disabled": "masked KL, base run in every step",
    "live, second model": "masked KL, base run in every step",
}
TOP_K, TAIL_GROUPS, RANK = 64, 64, 16
NUM_ANCHORS, ANCHOR_LENGTH = 16, 64
LEFT_OUT_STEPS = 2
LEAST_REST = 1e-4


# Preparation, in a process of its own


def prepare(job: dict[str, Any]) -> dict[str, float]:
    """Writes the model (unless it is the demo's), the rows and the cache into the folder; says how large they are."""
    folder, shape = Path(job["folder"]), Shape(**job["shape"])
    num_rows = (job["steps"] + 1) * job["batch_size"]  # a batch more: the loader is one ahead
    if shape != DEMO:
        make_model(shape, folder / "model", job)
    with the_base(job) as base:
        made = num_rows + NUM_ANCHORS
        every = demo_rows(base, made, job["length"]) if shape == DEMO else random_rows(shape, made, job)
        rows = every[:num_rows]
        np.save(folder / "rows.npy", rows)
        fill_cache(base, rows, folder / "cache")
        fill_cache(base, every[num_rows:, :ANCHOR_LENGTH], folder / "anchors")
        head = base.model.get_output_embeddings().weight.numel()
        parameters = sum(p.numel() for p in base.model.parameters())
        embedding = base.model.get_input_embeddings().weight.numel()
        tied = base.model.config.tie_word_embeddings
    size = sum(file.stat().st_size for file in (folder / "cache").rglob("*") if file.is_file())
    body = parameters - embedding - (0 if tied else head)
    return {"body": body, "head": head, "cache_bytes_a_token": size / rows.size}


@contextmanager
def the_base(job: dict[str, Any]) -> Iterator[Base]:
    """The untouched base, loaded from its folder."""
    with (
        as_file(demo_base()) if Shape(**job["shape"]) == DEMO else nullcontext(Path(job["folder"]) / "model") as folder
    ):
        yield load_base(Source(job["shape"]["name"], folder), job["dtype"], torch.device(job["device"]))


def demo_rows(base: Base, num_rows: int, length: int) -> np.ndarray:
    """The demo's new domain, one document after the other, cut into rows: int64 [num_rows, length]."""
    tokenizer = load_tokenizer(base.source)
    assert tokenizer is not None
    ids: list[int] = []
    for document in code_documents():
        ids += tokenizer(document.text, truncation=False, verbose=False)["input_ids"]
        if len(ids) >= num_rows * length:
            break
    return np.array(ids[: num_rows * length], dtype=np.int64).reshape(num_rows, length)


def random_rows(shape: Shape, num_rows: int, job: dict[str, Any]) -> np.ndarray:
    """int64 [num_rows, length]."""
    return np.random.default_rng(job["seed"]).integers(shape.vocab_size, size=(num_rows, job["length"]))


def fill_cache(base: Base, rows: np.ndarray, path: Path) -> None:
    """k = 64 and 64 tail groups: one cache for every method."""
    settings = CaptureSettings(top_k=TOP_K, max_length=rows.shape[1], tail_groups=TAIL_GROUPS, batch_tokens=2048)
    samples = [
        Sample(row.astype(np.uint32), np.ones(len(row), dtype=np.bool_), f"row {i}") for i, row in enumerate(rows)
    ]
    precompute(base, samples, path, settings)


# Training, in a process of its own


class LiveKLTrainer(Trainer):
    """CE + masked KL towards a base that runs in every step: a second model, or this one with its adapter disabled."""

    def __init__(self, *args: Any, teacher: nn.Module | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(**inputs)
        with torch.no_grad(), model.disable_adapter() if self.teacher is None else nullcontext():
            base_logits = (self.teacher or model)(input_ids=inputs["input_ids"]).logits
        loss = outputs.loss + masked_kl(outputs.logits, base_logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


def masked_kl(logits: Tensor, base_logits: Tensor, labels: Tensor) -> Tensor:
    """Mean KL(p without y || q without y) over supervised positions with 1 - p(y) >= 1e-4; all float32, [N, V]."""
    labels = labels[:, 1:]
    supervised = labels != -100
    y = labels[supervised][:, None]
    q, p = logits[:, :-1][supervised].float(), base_logits[:, :-1][supervised].float()
    counts = 1 - p.softmax(dim=-1).gather(1, y).squeeze(1) >= LEAST_REST
    least = torch.finfo(torch.float32).min
    log_q, log_p = q.scatter(1, y, least).log_softmax(dim=-1), p.scatter(1, y, least).log_softmax(dim=-1)
    values = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)
    return (values * counts).sum() / counts.sum().clamp(min=1)


class StepMeter(TrainerCallback):
    """Seconds from the end of one step to the end of the next, and of the lookups in between; memory of the first step,
    which brings checks, imports and the optimizer's state, apart from that of the others."""

    def __init__(self, device: str) -> None:
        self.ends: list[float] = []
        self.looked_up: list[float] = []
        self.seconds_of_lookups = 0.0
        self.device = device
        self.memory = [PeakMemory(device).__enter__()]

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        self.looked_up.append(self.seconds_of_lookups)
        if len(self.ends) == 1:
            self.memory[0].__exit__()
            self.memory.append(PeakMemory(self.device).__enter__())

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.memory[1].__exit__()

    def watch_lookups(self) -> None:
        """Everything the cache adds to the collator: finding, decoding, packing into tensors."""
        plain = targets.with_targets

        def watched(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            found = plain(*args, **kwargs)
            self.seconds_of_lookups += time.perf_counter() - start
            return found

        targets.with_targets = watched


def train(job: dict[str, Any]) -> dict[str, Any]:
    """One method for a few steps: seconds of each, MiB, seconds of lookups."""
    set_up(job["threads"])
    folder, method = Path(job["folder"]), job["method"]
    rows = [{"input_ids": row, "labels": row} for row in np.load(folder / "rows.npy").tolist()]
    with the_base(job) as base:
        teacher = None
        if method == "live, second model":
            with the_base(job) as second:
                teacher = second.model
        torch.manual_seed(job["seed"])
        model = attach(base.model, AdapterSettings(rank=RANK), base.source.name)
        meter = StepMeter(job["device"])
        meter.watch_lookups()
        common: dict[str, Any] = {
            "model": model,
            "args": arguments(job),
            "train_dataset": rows,
            "data_collator": default_data_collator,
            "callbacks": [meter],
        }
        if method == "plain CE":
            trainer = Trainer(**common)
        elif method.startswith("live"):
            trainer = LiveKLTrainer(**common, teacher=teacher)
        else:
            trainer = cached_trainer(common, method, folder, job["batch_size"])
        loss = trainer.train().training_loss
    seconds, lookups = (np.diff(times)[LEFT_OUT_STEPS - 1 :] for times in (meter.ends, meter.looked_up))
    return {
        "seconds": seconds.tolist(),
        "lookup_seconds": lookups.tolist(),
        "peak": max(memory.before + memory.growth for memory in meter.memory),
        "growth": meter.memory[1].growth,
        "mean_loss": loss,
    }


def cached_trainer(common: dict[str, Any], method: str, folder: Path, batch_size: int) -> Trainer:
    """Of the methods that read a cache: the main one, that of the anchors, or both."""
    what, _, anchored = method.partition(" + ")
    anchor = Anchor(folder / "anchors", AnchorSettings(batch=batch_size)) if anchored else ()
    if what == "plain CE":
        return CachedKLTrainer(**common, cache=None, objective=Objective("none"), anchor=anchor)
    tail: Any = what.removeprefix("cache, ")
    return CachedKLTrainer(**common, cache=folder / "cache", objective=Objective(tail=tail), anchor=anchor)


def arguments(job: dict[str, Any]) -> TrainingArguments:
    """The Trainer's defaults but for what would write, print or stop."""
    return TrainingArguments(
        output_dir=str(Path(job["folder"]) / "out"),
        per_device_train_batch_size=job["batch_size"],
        max_steps=job["steps"],
        learning_rate=2e-4,
        gradient_checkpointing=job["gradient_checkpointing"],
        gradient_checkpointing_kwargs={"use_reentrant": False} if job["gradient_checkpointing"] else None,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=job["device"] == "cpu",
        dataloader_pin_memory=job["device"] == "cuda",
        seed=job["seed"],
    )


# Report


def measure(shape: Shape, args: argparse.Namespace, folder: Path) -> list[dict[str, str]]:
    """Every method on one model, the repeats going round the methods."""
    names = ("device", "dtype", "threads", "steps", "batch_size", "length", "gradient_checkpointing", "seed")
    job = {name: getattr(args, name) for name in names} | {"folder": str(folder), "shape": asdict(shape)}
    made = run_child(__file__, job | {"method": "prepare"}, args.threads)
    assert made is not None, "memory ran out while the cache was made"
    print(f"{shape.name}: {made}", flush=True)
    found: dict[str, list[dict[str, Any]]] = {method: [] for method in args.methods}
    for repeat in range(args.repeats):
        for method in args.methods:
            run = run_child(__file__, job | {"method": method}, args.threads)
            found[method] += [run] if run else []
            print(f"{shape.name}, repeat {repeat + 1}: {method}: {run}", flush=True)
    about = {
        "model": shape.name,
        "body": f"{made['body']:.0f}",
        "head": f"{made['head']:.0f}",
        "dtype": args.dtype,
        "device": args.device,
        "threads": str(args.threads),
        "batch": f"{args.batch_size} x {args.length}",
        "gradient_checkpointing": str(args.gradient_checkpointing),
        "cache_bytes_a_token": f"{made['cache_bytes_a_token']:.1f}",
    }
    base = columns(found.get("plain CE", []))
    rows = []
    for method, runs in found.items():
        numbers = columns(runs)
        if not numbers:
            rows.append({"method": method, "what": METHODS[method], "remark": "out of memory"})
            continue
        shown = {name: f"{value:.4g}" for name, value in numbers.items()}
        for name, of in (
            ("seconds_ratio", "seconds"),
            ("peak_ratio", "peak_mib"),
            ("step_growth_ratio", "step_growth_mib"),
        ):
            shown[name] = f"{numbers[of] / base[of]:.3f}" if base else ""
        rows.append({"method": method, "what": METHODS[method], **shown, "remark": ""})
    every = max(rows, key=len)
    return [about | dict.fromkeys(every, "") | row for row in rows]


def columns(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Over the steps of all repeats; memory is the median of the repeats. {} without runs."""
    if not runs:
        return {}
    seconds = [s for run in runs for s in run["seconds"]]
    return {
        "seconds": median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "peak_mib": median(run["peak"] for run in runs),
        "step_growth_mib": median(run["growth"] for run in runs),
        "lookup_share": sum(s for run in runs for s in run["lookup_seconds"]) / sum(seconds),
        "mean_loss": runs[0]["mean_loss"],
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(SHAPES), default="cpu", help="models; all but cpu want a GPU")
    parser.add_argument("--only", default="", help="models whose name begins so")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: as the preset wants")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: as the preset wants")
    parser.add_argument("--hidden-size", type=int, help="of the random model of preset cpu")
    parser.add_argument("--layers", type=int, help="likewise")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--length", type=int, default=256, help="tokens a row; at most 512 for the demo's base")
    parser.add_argument("--steps", type=int, default=8, help=f"of which the first {LEFT_OUT_STEPS} do not count")
    parser.add_argument("--repeats", type=int, default=2, help="processes a method")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tiny random model; nothing is written")
    parser.add_argument("--work", type=Path, help="where models and caches go for the time (15 GB for 7b)")
    parser.add_argument("--out", type=Path, help="default: docs/benchmarks/step.csv")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        logging.set_verbosity_error()
        print(json.dumps((prepare if args.job["method"] == "prepare" else train)(args.job)))
        return
    out = out_of(parser, args, DEFAULT_OUT, ["work"], args.quick)
    on_gpu = args.preset != "cpu"
    args.device = args.device or ("cuda" if on_gpu else "cpu")
    args.dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    changed = {"hidden_size": args.hidden_size, "num_hidden_layers": args.layers}
    changed = {name: value for name, value in changed.items() if value}
    shapes = QUICK if args.quick else SHAPES[args.preset]
    shapes = [shape if shape == DEMO else replace(shape, **changed) for shape in shapes]
    shapes = [shape for shape in shapes if shape.name.startswith(args.only)]
    if not shapes:
        parser.error(f"--only {args.only}: expected the beginning of a model's name, found none of them")
    about = provenance(__file__, args.device, ["torch", "transformers", "peft", "accelerate", "logitcache"])
    rows = []
    for shape in shapes:
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            rows += measure(shape, args, Path(folder))
    print(f"\n{'':48}{'s':>8}{'ratio':>8}{'peak MiB':>10}{'ratio':>8}{'growth':>8}{'lookup':>9}")
    for row in rows:
        cells = f"{row['seconds']:>8}{row['seconds_ratio']:>8}{row['peak_mib']:>10}{row['peak_ratio']:>8}"
        share = f"{float(row['lookup_share']):.2%}" if row["lookup_share"] else ""
        print(f"{row['model'] + ': ' + row['method']:48}{cells}{row['step_growth_mib']:>8}{share:>9} {row['remark']}")
    print(about)
    if out:
        write_csv([row | about | {"seed": str(args.seed)} for row in rows], out)


if __name__ == "__main__":
    main()
