"""`logitcache status`: how far a precompute job is."""

import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from logitcache.storage.plain_text import one_line

from .common import CachePath, config_option, human_bytes, say
from .help_page import heading, verb

if TYPE_CHECKING:
    from logitcache.storage.job_status import Status, WorkerRecord


@verb(
    "How far a precompute job is, from its commits.",
    example="logitcache status cache/",
)
@config_option
@heading("Output")
@click.argument("cache", metavar="DIR", type=CachePath())
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def status(cache: str, as_json: bool) -> None:
    """Units done, running and failed, throughput and time left of the job that fills a cache.

    What is done, and how fast, comes from the commits alone: no process is asked, and none need be alive. What each
    worker is at, it has written beside them.
    """
    from logitcache.storage.job_status import status as read

    found = read(cache)
    if as_json:
        say(json.dumps(_facts(cache, found)))
        return
    state = "finished" if found.is_final else "not finished"
    say(f"{cache}: {state}, of {found.manifest.model_name}")
    say(
        f"  done         {found.num_shards:,} units: {found.num_samples:,} samples, {found.num_tokens:,} tokens, "
        f"{found.num_positions:,} positions, {human_bytes(found.num_bytes)}"
    )
    if found.tokens_per_second is not None:
        say(f"  throughput   {found.tokens_per_second:,.0f} tokens/s, from the first commit to the last")
    left = _seconds_left(found)
    if left is not None and not found.is_final:
        say(f"  time left    about {_duration(left)}, at that rate")
    for (index, num, _), worker in found.workers.items():
        say(f"  worker {index} of {num}: {_worker_line(worker)}")
        for failure in worker.failures:
            say(f"    failed: {one_line(failure)}")
    if found.leftovers:
        say(
            f"  left over    {len(found.leftovers):,} files or folders (--json names them), of killed writers, or what "
            "live ones are at"
        )
        say("               `logitcache repair` removes them: run it when no writer is alive on any machine")


def _worker_line(worker: "WorkerRecord") -> str:
    seen = _duration(max(0.0, time.time() - worker.updated))
    windows = f", window {worker.windows_done:,} of {worker.num_windows:,}" if worker.num_windows >= 0 else ""
    failed = f", {len(worker.failures):,} failed" if worker.failures else ""
    return (
        f"{worker.state} on {worker.host} ({worker.pid}), {worker.num_units:,} units{failed}{windows}; "
        f"last heard of {seen} ago"
    )


def _seconds_left(found: "Status") -> float | None:
    """By the share of the windows that is done, and how long that took."""
    share = found.share_done
    if not share or found.seconds <= 0:
        return None
    return found.seconds * (1 - share) / share


def _facts(cache: str, found: "Status") -> dict[str, Any]:
    workers = [{"index": i, "num_workers": n, **asdict(w)} for (i, n, _), w in found.workers.items()]
    return {
        "cache": cache,
        "is_final": found.is_final,
        "units_done": found.num_shards,
        "units_running": sum(w.state == "running" for w in found.workers.values()),
        "units_failed": sum(len(w.failures) for w in found.workers.values()),
        "samples": found.num_samples,
        "positions": found.num_positions,
        "tokens": found.num_tokens,
        "bytes": found.num_bytes,
        "tokens_per_second": found.tokens_per_second,
        "seconds_left": None if found.is_final else _seconds_left(found),
        "workers": workers,
        "leftovers": list(found.leftovers),
    }


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
