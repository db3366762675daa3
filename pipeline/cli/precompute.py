"""`logitcache precompute`: run the base once and store its predictions."""

import os
from typing import TYPE_CHECKING, Any

import click

from logitcache.capture.settings import CaptureSettings, EngineSettings, JobSpec
from logitcache.data.settings import DataSettings
from logitcache.events import Finished
from logitcache.models.settings import LoadSettings

from .common import CachePath, config_option, human_bytes, log_json_option, quiet_libraries, say, tensor_parallel_option
from .help_page import heading, verb
from .options import ByteSize, Number, Whole, options_of, settings_from
from .terminal import Console, terminated_softly

if TYPE_CHECKING:
    from logitcache.capture.estimate import Estimate
    from logitcache.capture.worker import JobReport, Share
    from logitcache.storage import LogitCache


@verb(
    "Run the base once and store its log-probabilities.",
    example="logitcache precompute --model base/ --data train.jsonl --cache cache/ --plan\n"
    "logitcache precompute --model base/ --data train.jsonl --cache cache/",
)
@config_option
@options_of(
    JobSpec,
    types={"cache": CachePath(), "samples_from": CachePath()},
    engine={"type": click.Choice(["transformers", "vllm", "ray"])},
)
@options_of(CaptureSettings)
@options_of(DataSettings)
@heading("Engine and workers")
@click.option("--num-workers", type=Whole(min=1), help="Actors of --engine ray.  [default: one a GPU, or 1]")
@click.option("--shard-index", type=Whole(min=0), help="This worker of --num-shards, from 0.")
@click.option("--num-shards", type=Whole(min=1), help="Workers that share the job, each started by itself.")
@options_of(
    LoadSettings,
    load_in={
        "help": "Quantise the linear layers of the base, by bitsandbytes; the cache says so (docs/how-to/distil.md).  "
        "[default: as stored]"
    },
)
@options_of(EngineSettings)
@heading("Engine and workers")
@tensor_parallel_option
@heading("Other")
@log_json_option
@heading("Plan")
@click.option("--plan", is_flag=True, help="Measure a sample, print what the job will take, write nothing and stop.")
@click.option(
    "--tokens-per-second",
    type=Number(min=0, min_open=True),
    help="Of a worker, for --plan.  [default: as measured here]",
)
@click.option("--cost-per-hour", type=Number(min=0), help="Of a worker, in any currency, for --plan.")
@click.option(
    "--plan-bytes",
    type=ByteSize(),
    help="Bytes that the whole cache may take, as 500M or 100G (of 1,024), for the advice of --plan.  "
    "[default: what these settings take]",
)
@click.option(
    "--probe-cache",
    type=CachePath(),
    metavar="DIR",
    help="A cache of what the base says itself (of `logitcache answers`), which --plan holds the data against.",
)
def precompute(
    num_workers: int | None,
    shard_index: int | None,
    num_shards: int | None,
    tensor_parallel: int | None,
    log_json: bool,
    plan: bool,
    tokens_per_second: float | None,
    cost_per_hour: float | None,
    plan_bytes: float | None,
    probe_cache: str | None,
    **values: Any,
) -> None:
    """Run the base once over a data set and store, for every supervised token, its top-k log-probabilities.

    Rows: text; prompt + completion; messages (assistant turns are supervised); or input_ids (+ labels, -100 where not
    supervised). Interrupted, the same command goes on where it stopped. A finished cache gains what it lacks.

    Many workers: --shard-index and --num-shards in a job array; torchrun --nproc-per-node N -m logitcache
    precompute ...; or --engine ray (docs/how-to/scale.md).
    """
    engine, runs = values["engine"], _runs(values)
    if num_workers is not None and engine != "ray":
        raise click.UsageError("--num-workers is for --engine ray; elsewhere: --shard-index and --num-shards.")
    for_plan = (tokens_per_second, cost_per_hour, plan_bytes, probe_cache)
    if not plan and for_plan != (None,) * 4:
        raise click.UsageError("--tokens-per-second, --cost-per-hour, --plan-bytes and --probe-cache are for --plan.")
    if (runs == "vllm" or tensor_parallel) and (plan_bytes is not None or probe_cache is not None):
        raise click.UsageError(
            f"{_ONE_PROCESS} --plan-bytes and --probe-cache need that: plan with --engine transformers, and "
            "--device-map auto where it is large."
        )
    together = _are_together(tensor_parallel, runs, engine, shard_index is not None or num_shards is not None)
    spec = _spec(values, tensor_parallel, together)
    index, num = (0, 1) if together else _share(shard_index, num_shards, engine)
    console = Console(log_json, speaks=index == 0 or shard_index is not None)
    for doubt in spec.doubts():
        console.note(doubt)
    quiet_libraries()
    from logitcache.capture.loaded import load, one_worker
    from logitcache.capture.worker import Share, work

    share = Share(index, num)
    if plan:
        _plan(spec, share, console, tokens_per_second, cost_per_hour, plan_bytes, probe_cache)
        return
    if engine == "ray":
        from logitcache.capture.engines.ray import run_on_ray

        with terminated_softly():
            report = run_on_ray(spec, num_workers, console.on_event)
    else:
        with terminated_softly(), one_worker(load(spec)) as loaded:
            if loaded is None:  # another process leads
                return
            with console.bar("precompute") as progress:
                report = work(spec, loaded, share, progress, console.on_event)
    _print_report(report, spec, share, console)


_ONE_PROCESS = "Other numbers of alternatives and groups are measured by transformers in one process."


def _plan(
    spec: JobSpec,
    share: "Share",
    console: Console,
    tokens_per_second: float | None,
    cost_per_hour: float | None,
    plan_bytes: float | None,
    probe_cache: str | None,
) -> None:
    from logitcache.capture.estimate import estimate
    from logitcache.capture.loaded import load, one_worker
    from logitcache.pairing.identity_checks import check_identity
    from logitcache.storage import LogitCache

    probe = None if probe_cache is None else LogitCache.open(probe_cache)
    with one_worker(load(spec)) as loaded:
        if loaded is None:  # another process leads
            return
        if probe is not None and loaded.base is not None:
            check_identity(probe, loaded.base, loaded.tokenizer)
        found = estimate(spec, loaded, tokens_per_second, console.on_event, probe)
    lines = [*_plan_lines(spec, found, share, cost_per_hour), *_choice_lines(spec, found, plan_bytes, probe)]
    for line in (*lines, "Nothing was written."):
        say(line)


def _runs(values: dict[str, Any]) -> str:
    """What runs the base."""
    by_ray = "vllm" if values.get("calibration") else "transformers"
    return by_ray if values["engine"] == "ray" else str(values["engine"])


def _are_together(tensor_parallel: int | None, runs: str, engine: str, has_shares: bool) -> bool:
    """Whether torchrun's processes hold one model together, and are one worker."""
    if tensor_parallel is None or runs == "vllm":
        return False
    if engine == "ray":
        raise click.UsageError(
            "--tensor-parallel goes with torchrun or vLLM; Ray's workers run that with --calibration."
        )
    if has_shares:
        raise click.UsageError("--tensor-parallel makes one worker of all processes: leave --shard-index out.")
    world = os.environ.get("WORLD_SIZE", "1")
    if world not in ("1", str(tensor_parallel)):  # one: said with how to start more, when the model is loaded
        raise click.UsageError(f"--tensor-parallel {tensor_parallel}: torchrun started {world} processes.")
    return True


def _spec(values: dict[str, Any], tensor_parallel: int | None, together: bool) -> JobSpec:
    """The job that the flags ask for; Ray's workers run vLLM where there is a calibration, else transformers."""
    loading = settings_from(LoadSettings, values, tensor_parallel=together)
    num_gpus = 1 if together else tensor_parallel or 1
    running = settings_from(EngineSettings, values, num_gpus=num_gpus)
    job = {**values, "engine": _runs(values)}
    settings, how = settings_from(CaptureSettings, values), settings_from(DataSettings, values)
    return settings_from(JobSpec, job, settings=settings, loading=loading, how=how, running=running)


def _share(shard_index: int | None, num_shards: int | None, engine: str) -> tuple[int, int]:
    """Which of how many workers this is: as the flags say, or torchrun."""
    if (shard_index is None) != (num_shards is None):
        raise click.UsageError("--shard-index and --num-shards go together.")
    if shard_index is not None and num_shards is not None:
        if shard_index >= num_shards:
            raise click.UsageError(f"--shard-index {shard_index} with --num-shards {num_shards}: they count from 0.")
        if engine == "ray":
            raise click.UsageError("--engine ray shares the work itself: leave --shard-index out.")
        return shard_index, num_shards
    if engine == "ray":
        return 0, 1
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise click.UsageError(f"RANK={rank} and WORLD_SIZE={world} in the environment are no worker of a job.")
    return int(rank), int(world)


def _plan_lines(spec: JobSpec, found: "Estimate", share: "Share", cost_per_hour: float | None) -> list[str]:
    how = "measured here" if found.measured else "as given"
    planned, hours = found.planned, found.worker_hours
    lines = [
        (
            "rows",
            f"{planned.num_rows:,}, {planned.num_truncated:,} of them cut to {spec.settings.max_length} tokens",
        ),
        *_left_out(planned.num_unlabelled, planned.num_skipped),
        ("samples", f"{planned.num_samples:,} (a sequence that repeats in another window counts again)"),
        ("tokens", f"{planned.num_tokens:,}, {planned.num_positions:,} supervised positions"),
        (
            "keeping",
            f"{found.kept} of {found.vocab_size:,} alternatives a position, precision {spec.settings.precision}",
        ),
        ("units", f"{planned.num_shards:,}, a shard each"),
        (
            "size",
            f"{human_bytes(found.num_bytes)}: {found.bytes_per_position:.0f} bytes a position, "
            f"measured on {found.sampled_positions:,}" + (", few: a rough guide" if found.is_rough else ""),
        ),
        ("time", f"{_hours(hours)} of one worker at {found.tokens_per_second:,.0f} tokens/s ({how})"),
    ]
    if share.num > 1:
        lines.append(("", f"{_hours(hours / share.num)} with {share.num} workers, if they do not wait for one another"))
    if cost_per_hour is not None:
        lines.append(("cost", f"{hours * cost_per_hour:,.2f} at {cost_per_hour:g} an hour and worker"))
    return [f"{name:8}{value}" for name, value in lines]


def _choice_lines(spec: JobSpec, found: "Estimate", plan_bytes: float | None, probe: "LogitCache | None") -> list[str]:
    """How far the data lie from the base, what else could be kept of them, and what is advised."""
    if found.distance is None:
        return [f"{'other':8}{_ONE_PROCESS}"]
    said = [(found.distance.data, "these data")]
    said += [(found.distance.own, probe.path)] if found.distance.own is not None and probe is not None else []
    lines = [
        f"{name:8}log p(label) {p.label_logprob:.2f}, entropy {p.entropy:.2f} nats a position of {where}, "
        f"measured on {p.num_positions:,}"
        for name, (p, where) in zip(("base", ""), said, strict=False)
    ]
    if not found.choices:
        size = found.vocab_size
        return [*lines, f"{'advice':8}--top-k {size - 1}: all that a vocabulary of {size:,} has"]
    lines.append(f"{'other':8}top-k  groups  bytes a position       total  mass kept  gradient")
    lines += [
        f"{'':8}{c.top_k:5}{c.tail_groups:8}{c.bytes_per_position:18.1f}"
        f"{human_bytes(found.total_of(c.bytes_per_position)):>12}{c.kept_mass:11.3f}{c.gradient_cosine:10.3f}"
        for c in found.choices
    ]
    lines.append(f"{'':8}gradient: cosine with the exact one, as measured elsewhere (docs/loss.md)")
    return [*lines, f"{'advice':8}{_advice(spec, found, plan_bytes)}"]


def _advice(spec: JobSpec, found: "Estimate", plan_bytes: float | None) -> str:
    from logitcache.capture.byte_table import best_within, with_choice

    most = found.bytes_per_position if plan_bytes is None else plan_bytes / found.planned.num_positions
    asked = (spec.settings.top_k, spec.settings.tail_groups)
    if plan_bytes is None and spec.settings == with_choice(spec.settings, *asked):
        # the same settings of the same sample, whose tails are summed in another order
        most = max([most, *(c.bytes_per_position for c in found.choices if (c.top_k, c.tail_groups) == asked)])
    bound = human_bytes(found.total_of(most))
    best = best_within(found.choices, most)
    if best is None:
        least = min(found.choices, key=lambda c: c.bytes_per_position)
        return (
            f"none of these fits into {bound}: the least, --top-k {least.top_k}, takes "
            f"{human_bytes(found.total_of(least.bytes_per_position))}. Give more room or fewer data."
        )
    flags = f"--top-k {best.top_k}" + (f" --tail-groups {best.tail_groups}" if best.tail_groups else "")
    size = human_bytes(found.total_of(best.bytes_per_position))
    whose = "what these settings take; for another bound --plan-bytes" if plan_bytes is None else "--plan-bytes"
    return f"{flags}: {size} of {bound} ({whose}), the truest gradient that fits"


def _left_out(num_unlabelled: int, num_skipped: int) -> list[tuple[str, str]]:
    if not num_unlabelled and not num_skipped:
        return []
    return [("", f"{num_unlabelled:,} of them without a supervised token, {num_skipped:,} that cannot be used")]


def _hours(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.1f} s"
    return f"{hours * 60:.1f} min" if hours < 2 else f"{hours:,.1f} h"


def _print_report(report: "JobReport", spec: JobSpec, share: "Share", console: Console) -> None:
    from logitcache.data.skipped import said_of_skipped, said_of_unlabelled

    planned = report.planned
    console.note(
        f"{planned.num_rows:,} rows: {planned.num_samples:,} distinct samples, {planned.num_tokens:,} tokens, "
        f"{planned.num_positions:,} supervised positions."
        + (f" Those of worker {share.index} of {share.num}." if share.num > 1 else "")
    )
    if planned.num_truncated:
        console.note(
            f"{planned.num_truncated:,} rows are longer than {spec.settings.max_length} tokens and were cut "
            f"({planned.num_tokens_cut:,} tokens lost); {planned.num_without_labels:,} of them kept no supervised "
            "token and are left out."
        )
    if planned.num_unlabelled:
        console.note(said_of_unlabelled(planned.num_unlabelled))
    if planned.num_skipped:
        console.note(said_of_skipped(planned.num_skipped, *report.skipped_files))
    console.on_event(Finished(report.num_samples, report.num_positions))
    if not console.speaks:
        return
    already = f" {report.num_samples_found:,} samples were there already." if report.num_samples_found else ""
    already += f" {report.num_samples_copied:,} were copied from {spec.samples_from}." if spec.samples_from else ""
    waits = "" if report.is_final else " Other workers are not done; the last one finishes the cache."
    say(f"Cached {report.num_positions:,} positions of {report.num_samples:,} samples in {spec.cache}.{already}{waits}")
