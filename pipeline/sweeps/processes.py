"""The runs of a sweep over several processes of one machine, one GPU each where there are GPUs.

Owns nothing but the arrangement: `concurrent.futures` starts the processes and hands out the runs, `sweep` does them
and sees to it that none is done twice. Several machines: start `logitcache sweep` on each, into one folder.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from logitcache.errors import TrainingFailed
from logitcache.events import StopRequest, Terminated
from logitcache.models.loading import pick_device

from .config import RunSpec, SweepConfig
from .prepare import Prepared, prepare
from .run import Done, run_one

_prepared: Prepared | None = None
"""Of this process, once it has been started."""

_stop = StopRequest("Finished runs are kept", "the same command goes on", is_patient=True)
"""Of this process: a run that is being trained looks for it, and others are not begun. It may be asked several times,
as by a scheduler that tells every process and by the first one of them."""


def run_in_processes(
    config: SweepConfig,
    out: Path,
    dtype: str,
    device: str,
    jobs: int,
    retry_failed: bool = False,
    on_start: Callable[[], None] | None = None,
) -> Iterator[Done]:
    """What the runs came to, as they end; those that are done already do not come. The folder has been prepared.

    on_start: called first in every process. Raises what stops all runs, `TrainingFailed` where one was killed, and
    `Terminated` where this process is asked to stop: the others are then, too, and waited for.
    """
    context = multiprocessing.get_context("spawn")  # CUDA and torch's threads do not survive a fork
    slots: Any = context.Queue()
    for slot in range(jobs):
        slots.put(slot)
    with ProcessPoolExecutor(jobs, context, _start, (config, out, dtype, device, jobs, slots, on_start)) as pool:
        futures = [pool.submit(_run, spec, retry_failed) for spec in config.runs]
        try:
            for future in as_completed(futures):
                done = future.result()
                if done is not None:
                    yield done
        except Terminated:  # a process that trains writes a checkpoint first
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        except BrokenProcessPool as error:
            raise TrainingFailed(
                f"sweeping into {out}: one of {jobs} processes was killed, by the system if memory ran out. "
                "Finished runs are kept. Run the same command again, with fewer --jobs."
            ) from error
        finally:
            for future in futures:
                future.cancel()


def _start(
    config: SweepConfig, out: Path, dtype: str, device: str, jobs: int, slots: Any, on_start: Callable[[], None] | None
) -> None:
    global _prepared
    signal.signal(signal.SIGTERM, lambda _number, _frame: _stop.ask())
    if on_start is not None:
        on_start()
    _take_gpu(slots.get())
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    _prepared = prepare(config, out, dtype, pick_device(device))


def _take_gpu(slot: int) -> None:
    """Show this process one of the GPUs: with more it would split batches among them."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = shown.split(",") if shown else [str(i) for i in range(torch.cuda.device_count())]
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]


def _run(spec: RunSpec, retry_failed: bool) -> Done | None:
    assert _prepared is not None
    if _stop.is_asked:
        raise _stop.stopped()
    return run_one(_prepared, spec, retry_failed, _stop)
