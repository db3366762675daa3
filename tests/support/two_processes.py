"""Processes of one group of torch.distributed on the CPU: two of a function, or some of a script under torchrun."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from queue import Empty
from typing import Any

import torch

SUPPORT = Path(__file__).resolve().parent


def in_two_processes(work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(rank, *arguments)` returns in each of two new processes, by rank; what it raises is raised here."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_as_rank, args=(rank, port, queue, work, arguments)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found: dict[int, Any] = {}
    try:
        for _ in workers:
            rank, result, error = _told(queue, workers)
            if error is not None:
                raise AssertionError(f"process {rank}: {error}")
            found[rank] = result
        for worker in workers:
            worker.join()
            assert worker.exitcode == 0
    finally:
        for worker in workers:
            worker.kill()  # the one beside a failed one hangs in a collective
            worker.join()
    return [found[rank] for rank in sorted(found)]


def _told(queue: Any, workers: list[Any]) -> Any:
    """The next result: waited for as long as all live, since torch itself ends a collective that hangs."""
    while True:
        try:
            return queue.get(timeout=5)
        except Empty:
            assert not any(worker.exitcode for worker in workers), "a process died without a word"


def run_under_torchrun(script: str, *arguments: Path, processes: int = 2) -> None:
    """Run a script of this folder in as many processes, as `torchrun` does; all must end well."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*launch, str(SUPPORT / script), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(SUPPORT.parent), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def _as_rank(rank: int, port: int, queue: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    try:
        queue.put((rank, work(rank, *arguments), None))
    except Exception as error:  # whatever it is: the test fails with it
        queue.put((rank, None, f"{type(error).__name__}: {error}"))
        raise
    torch.distributed.barrier()  # a process that leaves while the other still talks to it aborts
    torch.distributed.destroy_process_group()
