"""Seconds of the batch precompute job against the forwards that it cannot do without, and of two processes against one.

Owns the measurements behind docs/benchmarks/precompute.csv. All methods run over the same padded batches, each in a
fresh process that has loaded its model and run one batch before; the repeats go round the methods, and what counts are
the ratios of one round. `bare` is the body's forward and the head on the supervised rows, nothing kept or made of them,
with a mask only where capture needs one, in slices of the size that is fastest when tried beforehand; `capture` the
records too (top-k, label, tail, copies), nothing written; `precompute` the whole of `work`: rows read,
tokenised and planned, captured, encoded, checked, written, synced, read back, finalised. `two processes` are two
workers of one job with as many threads each, from the moment that both are let go to the end of the last. Nobody is
pinned within the cores that a setting has: 1 thread on 2 cores leaves one to the writer, as a GPU leaves the processor;
`--settings 1/1` shows what writing costs where nothing can overlap. With two workers the units should be many, or
even: what one has more than the other counts against the speedup.
Models: the demo's base on source code, and one of random weights with the shape of Qwen2.5-0.5B (V = 151,936) on random
tokens; `head_share` is the head's part of the multiplications.

    python scripts/bench_precompute.py                      both models; 6 GB of memory, 2.5 GB of disk
    python scripts/bench_precompute.py --quick              a taste, which writes nothing
    python scripts/bench_precompute.py --preset 7b --device cuda --dtype bfloat16 --settings 1/2 --length 1024 \\
        --tokens 1000000 --batch-tokens 8192 --shard-positions 32768 --out F
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib.resources import as_file
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from bench_common import (
    BENCHMARKS,
    DEMO,
    QUICK,
    SHAPES,
    Shape,
    demo_base,
    make_model,
    out_of,
    provenance,
    timed,
    write_csv,
)
from torch import Tensor
from transformers import PreTrainedModel, logging

from logitcache.capture.loaded import Loaded, load
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.teacher import TransformersTeacher, launched
from logitcache.capture.worker import JobSpec, Share, plans, work
from logitcache.data.batches import pad_batch
from logitcache.data.samples import Sample
from logitcache.demo.text import code_documents
from logitcache.models.causal import needs_mask
from logitcache.models.head import OutputHead, hidden_states, rows_at_once
from logitcache.models.settings import LoadSettings
from logitcache.storage import LogitCache
from logitcache.storage.identity import digest
from logitcache.storage.layout import CONTENTS

DEFAULT_OUT = BENCHMARKS / "precompute.csv"
BARE, CAPTURE, PRECOMPUTE, TWO = METHODS = ["bare", "capture", "precompute", "two processes"]
PRESETS = {"both": [DEMO, SHAPES["0.5b"][0]], "demo": [DEMO], "0.5b": SHAPES["0.5b"], "7b": SHAPES["7b"]}
TOP_K = 64
POLL_SECONDS = 0.001
SLICE_BYTES = (16 * 2**20, 64 * 2**20, 256 * 2**20, 2**30)
"""Of logits that `bare` tries to make at once: the fastest is of another size at another V and on another machine."""

Batches = Sequence[Sequence[Sample]]


# Data


def write_rows(shape: Shape, path: Path, job: dict[str, Any]) -> None:
    """Rows of about job["tokens"] tokens in all: source code as text, or random ids of one length."""
    rng = np.random.default_rng(job["seed"])
    rows: list[dict[str, Any]] = []
    if shape == DEMO:
        left = 3.0 * job["tokens"]  # characters: about 3 a token of the demo's tokenizer on source code
        texts = [d.text for d in code_documents()]
        for at in rng.permutation(len(texts)):
            if left <= 0:
                break
            rows.append({"text": texts[at]})
            left -= len(texts[at])
    else:
        left = job["tokens"]
        while left > 0:
            ids = rng.integers(shape.vocab_size, size=job["length"]).tolist()
            rows.append({"input_ids": ids})
            left -= len(ids)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# One measurement, in a process of its own


@torch.inference_mode()
def bare(model: PreTrainedModel, batches: Batches, masked: bool, num_rows: int) -> None:
    """What nobody can do without: every hidden state and every logit once."""
    head = OutputHead(model)
    for batch in batches:
        for rows in supervised(model, batch, masked).split(num_rows):
            head(rows)


def supervised(model: PreTrainedModel, batch: Sequence[Sample], masked: bool) -> Tensor:
    """Hidden states [N, D] that predict a supervised token."""
    padded = pad_batch(batch, model.device)
    return hidden_states(model, **padded.inputs(masked)).flatten(0, 1).index_select(0, padded.rows)


@torch.inference_mode()
def fastest_rows(model: PreTrainedModel, batch: Sequence[Sample], masked: bool) -> int:
    """Rows a slice of the head with which a batch takes least; each size once to warm up, then the better of two."""
    head, hidden = OutputHead(model), supervised(model, batch, masked)
    device = hidden.device.type

    def once(num_rows: int) -> None:
        for rows in hidden.split(num_rows):
            head(rows)

    sizes = {min(len(hidden), rows_at_once(model, {"cuda": size})) for size in SLICE_BYTES}
    for num_rows in sizes:
        once(num_rows)
    return min(sizes, key=lambda num_rows: min(timed(lambda: once(num_rows), device) for _ in range(2)))


def child(job: dict[str, Any]) -> dict[str, Any]:
    """Load, run one batch, wait to be let go, do one method: when it began and ended, and its processor seconds."""
    torch.set_num_threads(job["threads"])
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[-job["cores"] :]))
    settings = CaptureSettings(
        TOP_K, job["length"], job["batch_tokens"], job["shard_positions"], job["store"], tail_groups=job["tail_groups"]
    )
    spec = JobSpec(
        job["model"], job["data"], job["cache"], settings, LoadSettings(dtype=job["dtype"], device=job["device"])
    )
    loaded = load(spec)
    share = Share(job["index"], job["num"])
    planned = [plan for _, _, plan in plans(spec, loaded, Share())]
    batches = [batch for plan in planned for shard in plan.shards for batch in shard]
    loaded.teacher(batches[0])  # the first forward allocates, and chooses kernels
    method = job["method"]
    run: Callable[[], object] = lambda: work(spec, loaded, share)  # noqa: E731
    if method in (BARE, CAPTURE):
        run = method_without_cache(method, loaded, batches)
    (Path(job["meeting"]) / f"ready-{job['index']}").touch()
    while not (Path(job["meeting"]) / "go").exists():
        time.sleep(POLL_SECONDS)
    start, used = time.perf_counter(), time.process_time()
    run()
    if job["device"] == "cuda":
        torch.cuda.synchronize()
    stop, used = time.perf_counter(), time.process_time() - used
    assert loaded.base is not None
    return {
        "start": start,
        "stop": stop,
        "cpu": used,
        "tokens": sum(plan.num_tokens for plan in planned),
        "padded": sum(len(batch) * max(len(s.token_ids) for s in batch) for batch in batches),
        "positions": sum(plan.num_positions for plan in planned),
        "samples": sum(plan.num_samples for plan in planned),
        "shards": sum(len(plan.shards) for plan in planned),
        **parameters(loaded.base.model),
    }


def method_without_cache(method: str, loaded: Loaded, batches: Batches) -> Callable[[], object]:
    """`bare`, or the teacher alone."""
    assert loaded.base is not None
    model = loaded.base.model
    if method == BARE:
        masked = needs_mask(model)  # as `teacher_of` asks it
        num_rows = fastest_rows(model, batches[0], masked)
        return lambda: bare(model, batches, masked, num_rows)

    return lambda: captured(loaded.teacher, batches)


def captured(teacher: TransformersTeacher, batches: Batches) -> None:
    """As the job does it: a batch is launched before the records of the one before are fetched."""
    running: deque[Callable[[], object]] = deque()
    for batch in batches:
        running.append(launched(teacher, batch))
        if len(running) > teacher.num_ahead:
            running.popleft()()
    for fetched in running:
        fetched()


def parameters(model: PreTrainedModel) -> dict[str, int]:
    """Weights that are multiplied with every position: of the head, and of the body without its embedding."""
    head = model.get_output_embeddings().weight.numel()
    every = sum(p.numel() for p in model.parameters())
    embedding = model.get_input_embeddings().weight.numel()
    return {"head": head, "body": every - embedding - (0 if model.config.tie_word_embeddings else head)}


# Rounds


def run_workers(job: dict[str, Any], method: str) -> dict[str, Any]:
    """One method, by one process or two that begin together: seconds from the first's start to the last's end."""
    num = 2 if method == TWO else 1
    with tempfile.TemporaryDirectory(dir=job["folder"]) as meeting, ExitStack() as opened:
        workers, cache = [], Path(meeting) / "cache"
        for index in range(num):
            each = job | {"method": method, "index": index, "num": num, "meeting": meeting, "cache": str(cache)}
            out, err = (opened.enter_context((Path(meeting) / f"{kind}-{index}").open("w")) for kind in ("out", "err"))
            environment = os.environ | {"OMP_NUM_THREADS": str(job["threads"])}
            line = [sys.executable, __file__, "--job", json.dumps(each)]
            workers.append(subprocess.Popen(line, stdout=out, stderr=err, env=environment))
        while not all((Path(meeting) / f"ready-{i}").exists() for i in range(num)):
            if any(worker.poll() for worker in workers):
                break
            time.sleep(POLL_SECONDS)
        (Path(meeting) / "go").touch()
        codes = [worker.wait() for worker in workers]
        if any(codes):
            told = "\n".join((Path(meeting) / f"err-{i}").read_text()[-4000:] for i in range(num))
            raise RuntimeError(f"{method} ended with {codes}:\n{told}")
        found = [json.loads((Path(meeting) / f"out-{i}").read_text().splitlines()[-1]) for i in range(num)]
        run: dict[str, Any] = dict(found[0])
        run["seconds"] = max(f["stop"] for f in found) - min(f["start"] for f in found)
        run["cpu"] = sum(f["cpu"] for f in found)
        if method in (PRECOMPUTE, TWO):
            run |= look_at(cache, run)
    return run


def look_at(cache: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Bytes, files and fingerprint of a cache that must be finished and hold every position."""
    found = LogitCache.open(cache)
    held = (len(found), found.num_positions)
    if held != (run["samples"], run["positions"]):
        raise RuntimeError(f"{cache}: expected {run['samples']} samples and {run['positions']} positions, found {held}")
    stored = [file for file in cache.rglob("*") if file.is_file()]
    return {
        "bytes": sum(file.stat().st_size for file in stored),
        "files": len(stored),
        "contents": digest((cache / CONTENTS).read_bytes()),
    }


def measure(shape: Shape, args: argparse.Namespace, folder: Path, model: Path) -> list[dict[str, str]]:
    """Every setting and method on one model."""
    names = ("device", "dtype", "length", "batch_tokens", "shard_positions", "store", "tail_groups", "seed")
    job = {name: getattr(args, name) for name in names} | {"folder": str(folder), "model": str(model)}
    job |= {"tokens": args.demo_tokens if shape == DEMO else args.tokens, "data": str(folder / "rows.jsonl")}
    if shape == DEMO:
        job |= {"batch_tokens": args.demo_batch_tokens, "shard_positions": args.demo_shard_positions}
    write_rows(shape, folder / "rows.jsonl", job)
    rows = []
    for threads, cores in args.settings:
        methods = [m for m in args.methods if m != TWO or 2 * threads <= cores]
        runs: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
        for repeat in range(args.repeats):
            for method in methods:
                runs[method].append(run_workers(job | {"threads": threads, "cores": cores}, method))
                found = runs[method][-1]
                said = f"{found['seconds']:.2f} s, {found['cpu']:.2f} s of processors"
                print(f"{shape.name}, {threads} threads on {cores}, repeat {repeat + 1}: {method}: {said}", flush=True)
        marks = {run["contents"] for found in runs.values() for run in found if "contents" in run}
        if len(marks) > 1:
            raise RuntimeError(f"{shape.name}, {threads} threads: the caches are not of the same bytes")
        rows += [row(shape, job, threads, cores, method, runs) for method in methods]
    return rows


def row(
    shape: Shape, job: dict[str, Any], threads: int, cores: int, method: str, runs: dict[str, list[dict[str, Any]]]
) -> dict[str, str]:
    """Medians of one method; round by round its ratios to `bare`, and the speedup of two processes over one."""
    found, first = runs[method], runs[method][0]
    seconds = [run["seconds"] for run in found]
    against = [run["seconds"] for run in runs.get(BARE, [])]
    one = [run["seconds"] for run in runs.get(PRECOMPUTE, [])]
    ratios = [a / b for a, b in zip(seconds, against, strict=False)]
    speedups = [a / b for a, b in zip(one, seconds, strict=False)] if method == TWO else []
    has_cache = "bytes" in first
    return {
        "model": shape.name,
        **{name: str(first[name]) for name in ("body", "head")},
        "head_share": f"{first['head'] / (first['head'] + first['body']):.2f}",
        **{name: str(job[name]) for name in ("device", "dtype", "store", "tail_groups")},
        "threads": str(threads),
        "cores": str(cores),
        **{name: str(first[name]) for name in ("samples", "tokens", "padded", "positions", "shards")},
        "method": method,
        "seconds": f"{median(seconds):.4g}",
        "seconds_min": f"{min(seconds):.4g}",
        "seconds_max": f"{max(seconds):.4g}",
        "cpu_seconds": f"{median(run['cpu'] for run in found):.4g}",
        "tokens_per_second": f"{first['tokens'] / median(seconds):.4g}",
        **spread("ratio", ratios),
        **spread("speedup", speedups),
        "bytes_a_position": f"{first['bytes'] / first['positions']:.1f}" if has_cache else "",
        "files": str(first["files"]) if has_cache else "",
        "repeats": str(len(found)),
    }


def spread(name: str, values: Sequence[float]) -> dict[str, str]:
    """Median, least and most; empty where there are none."""
    shown = [f"{value:.3f}" for value in (median(values), min(values), max(values))] if values else ["", "", ""]
    return dict(zip((name, f"{name}_min", f"{name}_max"), shown, strict=True))


def threads_on_cores(text: str) -> tuple[int, int]:
    """'1/2' -> 1 thread on 2 cores."""
    threads, cores = text.split("/")
    return int(threads), int(cores)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="both")
    parser.add_argument("--layers", type=int, help="of the random model; 24 by default, as Qwen2.5-0.5B")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--settings", type=threads_on_cores, nargs="+", default=[(1, 2)], metavar="T/C")
    parser.add_argument("--length", type=int, default=256, help="most tokens a sample")
    parser.add_argument("--tokens", type=int, default=4096, help="of the random model")
    parser.add_argument("--batch-tokens", type=int, default=512)
    parser.add_argument("--shard-positions", type=int, default=448, help="as many batches a shard as this needs")
    parser.add_argument("--demo-tokens", type=int, default=131_072)
    parser.add_argument("--demo-batch-tokens", type=int, default=2048)
    parser.add_argument("--demo-shard-positions", type=int, default=4096)
    parser.add_argument("--store", choices=["zarr", "arrow"], default="zarr")
    parser.add_argument("--tail-groups", type=int, default=0)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="small data and a tiny random model; nothing is written")
    parser.add_argument("--work", type=Path, help="where the model and the caches go for the time")
    parser.add_argument("--out", type=Path, help="default: docs/benchmarks/precompute.csv")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.job:
        print(json.dumps(child(args.job)))
        return
    out = out_of(parser, args, DEFAULT_OUT, ["work"], args.quick)
    shapes = PRESETS[args.preset]
    if args.quick:
        shapes, args.repeats, args.demo_tokens, args.demo_shard_positions = [DEMO, QUICK[0]], 1, 8192, 1024
    if args.layers:
        shapes = [s if s == DEMO else replace(s, name=f"{s.name}, {args.layers} layers") for s in shapes]
        shapes = [s if s == DEMO else replace(s, num_hidden_layers=args.layers) for s in shapes]
    about = provenance(__file__, args.device, ["torch", "transformers", "zarr", "pcodec", "logitcache"])
    rows = []
    for shape in shapes:
        with tempfile.TemporaryDirectory(dir=args.work) as folder, ExitStack() as stack:
            model = Path(folder) / "model"
            if shape == DEMO:
                demo = stack.enter_context(as_file(demo_base()))
                shutil.copytree(demo, model)
            else:
                make_model(shape, model, asdict(shape) | vars(args))
            rows += measure(shape, args, Path(folder), model)
    for line in rows:
        print("  ".join(f"{name} {value}" for name, value in line.items() if value), flush=True)
    print(about)
    if out:
        write_csv([line | about | {"seed": str(args.seed)} for line in rows], out)


if __name__ == "__main__":
    main()
