"""One process of `test_layouts` and of scripts/table_trainers.py: trainings under torchrun, held against the oracle.

    torchrun --nproc-per-node 2 layouts_rank.py FOLDER CASE ...

FOLDER: has the caches. It ends after a case that something other than this project refuses, where the processes may
not be in step any more. CASE: "wrapper | layout | parts | options": wrapper loop or trainer; options, with commas:
even, checkpoint, compile. A line of JSON a case and process goes to FOLDER/results.jsonl.
"""

import datetime
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support import layouts
from support.layouts import LR, MICRO, RANKS, WEIGHT, Result
from torch import nn

from logitcache.losses.formulas import Objective
from logitcache.models.head import causal_lm_of
from logitcache.storage import LogitCache
from logitcache.training.custom_loop import CachedLoss

PACKAGES = ("logitcache", "peft", "transformers", "accelerate", "deepspeed", "torch")
SECONDS_TO_TELL = 3
"""What another process may have found meanwhile."""
OBJECTIVE = Objective(weight=WEIGHT, tokens_per_loss_chunk=3)


def loop(layout: str, parts: str, options: list[str], cache: LogitCache) -> Result:
    """`CachedLoss` in a loop of one's own, as docs/how-to/plug-in.md has it."""
    even, alone = "even" in options, layout.startswith(("one", "tensor"))  # every process goes through all of the data
    student = layouts.student_in(layout, parts)
    if "checkpoint" in options:
        causal_lm_of(student).gradient_checkpointing_enable({"use_reentrant": False})
        causal_lm_of(student).enable_input_require_grads()
    model = layouts.LAYOUTS[layout](student)
    called = torch.compile(model, backend="aot_eager") if "compile" in options else model
    called.train()
    engine = model if layout.startswith("zero") else None
    optimizer = engine or torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    anchored, rank, losses = CachedLoss(cache, OBJECTIVE), dist.get_rank(), []
    for step in layouts.make_steps(even):
        mine = [b for ranks in step for b in ranks] if alone else [ranks[rank] for ranks in step]
        counts = torch.stack([anchored.count(batch) for batch in mine]).sum(0)
        if not alone:
            dist.all_reduce(counts)
        total = torch.zeros(())
        for i, batch in enumerate(mine):
            if isinstance(model, nn.parallel.DistributedDataParallel):
                model.require_backward_grad_sync = i == len(mine) - 1
            loss = anchored(called, batch, counts).loss
            total += loss.detach()
            if engine is None:
                (loss * (1 if alone else RANKS)).backward()
            else:
                engine.backward(loss * RANKS, scale_wrt_gas=False)
                engine.step()
        if engine is None:
            optimizer.step()
            optimizer.zero_grad()
        if not alone:
            dist.all_reduce(total)
        losses.append(float(total))
    return Result(losses, layouts.trained_of(model, layout))


def run(case: str, folder: Path) -> dict[str, Any]:
    """What a case came to: errors, or the sentence that refuses it."""
    wrapper, layout, parts, *rest = (part.strip() for part in case.split("|"))
    options = [option.strip() for option in "".join(rest).split(",") if option.strip()]
    cache = LogitCache.open(layouts.cache_path(folder, parts))
    expected = layouts.oracle(layout, parts, cache, "even" in options)
    found: dict[str, Any] = {"case": case}
    try:
        if wrapper == "trainer":
            from support.layouts_trainer import train

            result = train(layout, parts, options, cache)
        else:
            result = loop(layout, parts, options, cache)
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
    assert dist.get_world_size() == RANKS and MICRO > 1
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
