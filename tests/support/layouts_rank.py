"""One process of `test_layouts` and of scripts/table_trainers.py: trainings under torchrun, held against the oracle.

    torchrun --nproc-per-node 2 layouts_rank.py FOLDER CASE ...

FOLDER: has the caches. It ends after a case that something other than this project refuses, where the processes may
not be in step any more. CASE: "wrapper | layout | parts | options": wrapper loop or trainer; all of them for as many
processes as there are. A line of JSON a case and process goes to FOLDER/results.jsonl.
"""

import datetime
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from support import layouts
from support.layouts import LR, MICRO, WEIGHT, Case, Result
from support.layouts_wrap import student_of, wrapped
from torch import nn
from torch.autograd.graph import save_on_cpu

from logitcache.losses.formulas import Objective
from logitcache.models.head import causal_lm_of
from logitcache.storage import LogitCache
from logitcache.training.custom_loop import CachedLoss

PACKAGES = ("logitcache", "peft", "transformers", "accelerate", "deepspeed", "bitsandbytes", "trl", "torch")
SECONDS_TO_TELL = 3
"""What another process may have found meanwhile."""
OBJECTIVE = Objective(weight=WEIGHT, tokens_per_loss_chunk=3)

Around = Callable[[], AbstractContextManager[Any]]


def around_step(case: Case, student: Any) -> Around:
    """What a step is made in, forward and backward. TRL's own offloading wants an accelerator: the CPU is one here."""
    if "activations on the CPU" in case.options:
        return lambda: save_on_cpu(pin_memory=True)  # which copies on a CPU too
    if "activations as TRL" not in case.options:
        return nullcontext
    from trl.models import get_act_offloading_ctx_manager

    torch.cpu.empty_cache = lambda: None  # type: ignore[attr-defined]
    with patch.object(torch.accelerator, "current_accelerator", lambda: torch.device("cpu")):
        made = get_act_offloading_ctx_manager(student, use_pin_memory=False, use_streams=False, min_offload_size=1)
    return lambda: made


def loop(case: Case, cache: LogitCache) -> Result:
    """`CachedLoss` in a loop of one's own, as docs/how-to/plug-in.md has it."""
    student = student_of(case)
    if "checkpoint" in case.options or "reentrant" in case.options:
        causal_lm_of(student).gradient_checkpointing_enable({"use_reentrant": "reentrant" in case.options})
        causal_lm_of(student).enable_input_require_grads()
    around = around_step(case, student)
    model = wrapped(case, student)
    called = torch.compile(model, backend="aot_eager") if "compile" in case.options else model
    called.train()
    engine = model if case.layout.startswith("zero") else None
    optimizer = engine or torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    replicas, losses = case.num_replicas, list[float]()
    num_batches = case.num_processes // replicas  # processes that see different ones
    part = dist.get_rank() // replicas
    anchored = CachedLoss(cache, OBJECTIVE)
    for step in case.steps:
        mine = [batch for parts in step for batch in parts[part::num_batches]]
        counts = torch.stack([anchored.count(batch) for batch in mine]).sum(0)
        dist.all_reduce(counts)
        total = torch.zeros(())
        for i, batch in enumerate(mine):
            if isinstance(model, nn.parallel.DistributedDataParallel) and "static graph" not in case.options:
                model.require_backward_grad_sync = i == len(mine) - 1
            with around():
                loss = anchored(called, batch, counts // replicas).loss
                if engine is None:
                    (loss * num_batches).backward()
                else:
                    engine.backward(loss * num_batches, scale_wrt_gas=False)
            if engine is not None:
                engine.step()
            total += loss.detach()
        if engine is None:
            optimizer.step()
            optimizer.zero_grad()
        dist.all_reduce(total)
        losses.append(float(total) / replicas)
    return Result(losses, layouts.trained_of(model, case.layout))


def run(text: str, folder: Path) -> dict[str, Any]:
    """What a case came to: errors, or the sentence that refuses it."""
    case = Case.of(text)
    assert dist.get_world_size() == case.num_processes and MICRO > 1
    cache = LogitCache.open(case.cache_in(folder))
    expected = layouts.oracle(case, cache)
    found: dict[str, Any] = {"case": text}
    try:
        if case.wrapper == "trainer":
            from support.layouts_trainer import train

            result = train(case, cache)
        else:
            result = loop(case, cache)
        return found | layouts.errors(result, expected)
    except Exception as error:  # whatever refuses it
        if os.environ.get("TRACE"):
            traceback.print_exc()
        places = [f.filename for f in traceback.extract_tb(error.__traceback__)]
        by = next((n for n in PACKAGES if f"/{n}/" in places[-1]), places[-1])
        return found | {"error": type(error).__name__, "refused": str(error), "by": by}


def main(folder: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    for case in cases:
        try:
            dist.barrier()
        except RuntimeError:  # the other process has ended after the last case
            os._exit(1)
        row = run(case, folder)
        stops = row.get("error", "TrainingFailed") != "TrainingFailed"  # perhaps on this process alone
        with (folder / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | {"rank": dist.get_rank()}) + "\n")
        if stops:
            time.sleep(SECONDS_TO_TELL)
            os._exit(1)  # torchrun ends the other, which may wait for this one
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
