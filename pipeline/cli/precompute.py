"""`logitcache precompute`: run the base once and store its predictions."""

import os
from typing import TYPE_CHECKING

import click

from .common import (
    CachePath,
    FiniteFloat,
    check_device_map,
    config_option,
    device_map_option,
    human_bytes,
    load_in_option,
    model_option,
    quiet_libraries,
    runtime_options,
)
from .terminal import Console, terminated_softly

if TYPE_CHECKING:
    from logitcache.capture.estimate import Estimate
    from logitcache.capture.worker import JobReport, JobSpec, Share


@click.command(short_help="Run the base once and store its log-probabilities.")
@config_option
@model_option
@click.option(
    "--data", required=True, metavar="D", help="JSONL or Parquet file, a folder or a URL of them, or a hub data set id."
)
@click.option(
    "--cache",
    required=True,
    type=CachePath(),
    metavar="DIR",
    help="Cache to fill: a folder, or a URL such as s3://b/c.",
)
@click.option(
    "--top-k", type=click.IntRange(min=1), default=64, show_default=True, help="Alternatives to keep a position."
)
@click.option(
    "--min-mass",
    type=FiniteFloat(min=0, min_open=True, max=1),
    default=1.0,
    show_default=True,
    help="Keep the fewest alternatives that hold this share of the non-target mass, --top-k at most.",
)
@click.option(
    "--tail-groups",
    type=click.IntRange(0, 256),
    default=0,
    show_default=True,
    help="Groups of the vocabulary to split the mass beyond the alternatives over; 0: keep it as one.",
)
@click.option(
    "--tail-samples",
    type=click.IntRange(0, 4096),
    default=0,
    show_default=True,
    help="Draw this many tokens from beyond the alternatives (train --tail sampled).",
)
@click.option(
    "--precision",
    type=click.Choice(["exact", "fine", "compact"]),
    default="fine",
    show_default=True,
    help="Maximum error of a stored log-probability: 0 (float32), 1/64 or 1/32 nat.",
)
@click.option(
    "--store",
    type=click.Choice(["zarr", "arrow"]),
    default="zarr",
    show_default=True,
    help="File layout of the shards.",
)
@click.option(
    "--max-length",
    type=click.IntRange(min=2),
    default=1024,
    show_default=True,
    help="Tokens a sample; longer ones are cut at the end, counted and reported.",
)
@click.option(
    "--batch-tokens",
    type=click.IntRange(min=1),
    default=8192,
    show_default=True,
    help="Tokens in one forward of the base, padding included. Lower it if memory runs out.",
)
@click.option(
    "--shard-positions",
    type=click.IntRange(min=1),
    default=32_768,
    show_default=True,
    help="Positions a shard: what an interruption can lose at most.",
)
@click.option(
    "--window-rows",
    type=click.IntRange(min=1),
    default=16_384,
    show_default=True,
    help="Rows that are held, sorted by length and cut into shards together.",
)
@click.option("--streaming", is_flag=True, help="Read a hub data set as it comes, and keep nothing of it on the disk.")
@click.option(
    "--engine",
    type=click.Choice(["transformers", "vllm", "ray"]),
    default="transformers",
    show_default=True,
    help="What runs the base: transformers; vLLM (with --calibration); transformers in Ray's workers.",
)
@click.option("--calibration", metavar="FILE", help="What `logitcache calibrate` wrote; for --engine vllm.")
@click.option("--num-workers", type=click.IntRange(min=1), help="Actors of --engine ray.  [default: one a GPU, or 1]")
@click.option("--shard-index", type=click.IntRange(min=0), help="This worker of --num-shards, from 0.")
@click.option("--num-shards", type=click.IntRange(min=1), help="Workers that share the job, each started by itself.")
@click.option(
    "--samples-from", type=CachePath(), metavar="DIR", help="Another cache of the same base: copy what it has already."
)
@load_in_option("Quantise the linear layers of the base, by bitsandbytes; the cache says so (docs/how-to/distil.md).")
@device_map_option
@click.option(
    "--tensor-parallel", is_flag=True, help="torchrun's processes hold one model together, and are one worker."
)
@runtime_options
@click.option("--log-json", is_flag=True, help="Say what happens in lines of JSON on stderr.")
@click.option("--plan", is_flag=True, help="Measure a sample, print what the job will take, write nothing and stop.")
@click.option(
    "--tokens-per-second",
    type=FiniteFloat(min=0, min_open=True),
    help="Of a worker, for --plan.  [default: as measured here]",
)
@click.option("--cost-per-hour", type=FiniteFloat(min=0), help="Of a worker, in any currency, for --plan.")
def precompute(
    model: str,
    data: str,
    cache: str,
    top_k: int,
    min_mass: float,
    tail_groups: int,
    tail_samples: int,
    precision: str,
    store: str,
    max_length: int,
    batch_tokens: int,
    shard_positions: int,
    window_rows: int,
    streaming: bool,
    engine: str,
    calibration: str | None,
    num_workers: int | None,
    shard_index: int | None,
    num_shards: int | None,
    samples_from: str | None,
    load_in: str | None,
    device_map: str | None,
    tensor_parallel: bool,
    dtype: str,
    device: str,
    log_json: bool,
    plan: bool,
    tokens_per_second: float | None,
    cost_per_hour: float | None,
) -> None:
    """Run the base once over a data set and store, for every supervised token, its top-k log-probabilities.

    Rows: text; prompt + completion; messages (assistant turns are supervised); or input_ids (+ labels, -100 where not
    supervised). Interrupted, the same command goes on where it stopped. A finished cache gains what it lacks.

    Many workers: --shard-index and --num-shards in a job array; torchrun --nproc-per-node N -m logitcache
    precompute ...; or --engine ray (docs/how-to/scale.md).
    """
    if tail_groups == 1:
        raise click.UsageError("--tail-groups 1 is the whole tail, which is always kept: give 2 or more, or 0.")
    if tail_samples and min_mass < 1:
        raise click.UsageError("--tail-samples with --min-mass: the draws are from beyond all --top-k. Leave one out.")
    if (engine == "vllm") != (calibration is not None):
        raise click.UsageError("--engine vllm and --calibration go together: run `logitcache calibrate` first.")
    if num_workers is not None and engine != "ray":
        raise click.UsageError("--num-workers is for --engine ray; elsewhere: --shard-index and --num-shards.")
    if not plan and (tokens_per_second is not None or cost_per_hour is not None):
        raise click.UsageError("--tokens-per-second and --cost-per-hour are for --plan.")
    if engine == "vllm" and (load_in or device_map or tensor_parallel):
        raise click.UsageError("--load-in, --device-map and --tensor-parallel are of transformers, not of vLLM.")
    if tensor_parallel and (device_map is not None or engine == "ray"):
        raise click.UsageError("--tensor-parallel goes with torchrun alone, without --device-map and --engine ray.")
    if tensor_parallel and (shard_index is not None or num_shards is not None):
        raise click.UsageError("--tensor-parallel makes one worker of all processes: leave --shard-index out.")
    check_device_map(device_map, device)
    index, num = (0, 1) if tensor_parallel else _share(shard_index, num_shards, engine)
    console = Console(log_json, speaks=index == 0 or shard_index is not None)
    quiet_libraries()
    from logitcache.capture.settings import PrecomputeSettings
    from logitcache.capture.worker import JobSpec, Share, load, one_worker, work

    settings = PrecomputeSettings(
        top_k, max_length, batch_tokens, shard_positions, store, precision, min_mass, tail_groups, tail_samples
    )
    spec = JobSpec(
        model,
        data,
        cache,
        settings,
        dtype,
        device,
        window_rows,
        streaming,
        samples_from=samples_from or "",
        engine="transformers" if engine == "ray" else engine,
        calibration=calibration or "",
        load_in=load_in,
        device_map=device_map,
        tensor_parallel=tensor_parallel,
    )
    share = Share(index, num)
    if plan:
        from logitcache.capture.estimate import estimate

        with one_worker(load(spec)) as loaded:
            if loaded is not None:
                _print_plan(spec, estimate(spec, loaded, tokens_per_second), share, cost_per_hour)
        return
    if engine == "ray":
        from logitcache.capture.engines.ray import run_on_ray

        with terminated_softly():
            report = run_on_ray(spec, num_workers, console.tell)
    else:
        with terminated_softly(), one_worker(load(spec)) as loaded:
            if loaded is None:  # another process leads
                return
            with console.bar("precompute") as progress:
                report = work(spec, loaded, share, progress, console.tell)
    _print_report(report, spec, share, console)


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


def _print_plan(spec: "JobSpec", found: "Estimate", share: "Share", cost_per_hour: float | None) -> None:
    how = "measured here" if found.measured else "as given"
    planned, hours = found.planned, found.worker_hours
    lines = [
        (
            "rows",
            f"{planned.num_rows:,}, {planned.num_truncated:,} of them cut to {spec.settings.max_length} tokens",
        ),
        ("samples", f"{planned.num_samples:,} (a sequence that repeats in another window counts again)"),
        ("tokens", f"{planned.num_tokens:,}, {planned.num_positions:,} supervised positions"),
        (
            "keeping",
            f"{found.kept} of {found.vocab_size:,} alternatives a position, precision {spec.settings.precision}",
        ),
        ("units", f"{planned.num_units:,}, a shard each"),
        (
            "size",
            f"{human_bytes(found.num_bytes)}: {found.bytes_per_position:.0f} bytes a position, "
            f"measured on {found.sampled_positions:,}",
        ),
        ("time", f"{_hours(hours)} of one worker at {found.tokens_per_second:,.0f} tokens/s ({how})"),
    ]
    if share.num > 1:
        lines.append(("", f"{_hours(hours / share.num)} with {share.num} workers, if they do not wait for one another"))
    if cost_per_hour is not None:
        lines.append(("cost", f"{hours * cost_per_hour:,.2f} at {cost_per_hour:g} an hour and worker"))
    for name, value in lines:
        click.echo(f"{name:8}{value}")
    click.echo("Nothing was written.")


def _hours(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.1f} s"
    return f"{hours * 60:.1f} min" if hours < 2 else f"{hours:,.1f} h"


def _print_report(report: "JobReport", spec: "JobSpec", share: "Share", console: Console) -> None:
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
    console.tell("finished", {"samples": report.num_samples, "positions": report.num_positions})
    if not console.speaks:
        return
    already = f" {report.num_samples_found:,} samples were there already." if report.num_samples_found else ""
    already += f" {report.num_samples_copied:,} were copied from {spec.samples_from}." if spec.samples_from else ""
    waits = "" if report.is_final else " Other workers are not done; the last one finishes the cache."
    click.echo(
        f"Cached {report.num_positions:,} positions of {report.num_samples:,} samples in {spec.cache}.{already}{waits}"
    )
