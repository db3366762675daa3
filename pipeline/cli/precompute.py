"""`logitcache precompute`: run the base once and store its predictions."""

import os
from typing import TYPE_CHECKING, Any

import click

from logitcache.capture.settings import CaptureSettings, JobSpec
from logitcache.data.settings import DataSettings
from logitcache.events import Finished
from logitcache.models.settings import LoadSettings

from .common import CachePath, config_option, human_bytes, quiet_libraries, say
from .options import Number, Whole, options_of, settings_from
from .terminal import Console, terminated_softly

if TYPE_CHECKING:
    from logitcache.capture.estimate import Estimate
    from logitcache.capture.worker import JobReport, Share


@click.command(short_help="Run the base once and store its log-probabilities.")
@config_option
@options_of(CaptureSettings)
@options_of(
    JobSpec,
    types={"cache": CachePath(), "samples_from": CachePath()},
    engine={"type": click.Choice(["transformers", "vllm", "ray"])},
)
@options_of(DataSettings)
@click.option("--num-workers", type=Whole(min=1), help="Actors of --engine ray.  [default: one a GPU, or 1]")
@click.option("--shard-index", type=Whole(min=0), help="This worker of --num-shards, from 0.")
@click.option("--num-shards", type=Whole(min=1), help="Workers that share the job, each started by itself.")
@options_of(
    LoadSettings,
    load_in={
        "help": "Quantise the linear layers of the base, by bitsandbytes; the cache says so (docs/how-to/distil.md)."
    },
)
@click.option(
    "--tensor-parallel", is_flag=True, help="torchrun's processes hold one model together, and are one worker."
)
@click.option("--log-json", is_flag=True, help="Say what happens in lines of JSON on stderr.")
@click.option("--plan", is_flag=True, help="Measure a sample, print what the job will take, write nothing and stop.")
@click.option(
    "--tokens-per-second",
    type=Number(min=0, min_open=True),
    help="Of a worker, for --plan.  [default: as measured here]",
)
@click.option("--cost-per-hour", type=Number(min=0), help="Of a worker, in any currency, for --plan.")
def precompute(
    num_workers: int | None,
    shard_index: int | None,
    num_shards: int | None,
    tensor_parallel: bool,
    log_json: bool,
    plan: bool,
    tokens_per_second: float | None,
    cost_per_hour: float | None,
    **values: Any,
) -> None:
    """Run the base once over a data set and store, for every supervised token, its top-k log-probabilities.

    Rows: text; prompt + completion; messages (assistant turns are supervised); or input_ids (+ labels, -100 where not
    supervised). Interrupted, the same command goes on where it stopped. A finished cache gains what it lacks.

    Many workers: --shard-index and --num-shards in a job array; torchrun --nproc-per-node N -m logitcache
    precompute ...; or --engine ray (docs/how-to/scale.md).
    """
    engine = values["engine"]
    if num_workers is not None and engine != "ray":
        raise click.UsageError("--num-workers is for --engine ray; elsewhere: --shard-index and --num-shards.")
    if not plan and (tokens_per_second is not None or cost_per_hour is not None):
        raise click.UsageError("--tokens-per-second and --cost-per-hour are for --plan.")
    if tensor_parallel and engine == "ray":
        raise click.UsageError("--tensor-parallel goes with torchrun alone, without --engine ray.")
    if tensor_parallel and (shard_index is not None or num_shards is not None):
        raise click.UsageError("--tensor-parallel makes one worker of all processes: leave --shard-index out.")
    spec = _spec(values, tensor_parallel)
    index, num = (0, 1) if tensor_parallel else _share(shard_index, num_shards, engine)
    console = Console(log_json, speaks=index == 0 or shard_index is not None)
    for doubt in spec.doubts():
        console.note(doubt)
    quiet_libraries()
    from logitcache.capture.worker import Share, load, one_worker, work

    share = Share(index, num)
    if plan:
        from logitcache.capture.estimate import estimate

        with one_worker(load(spec)) as loaded:
            if loaded is not None:
                _print_plan(spec, estimate(spec, loaded, tokens_per_second, console.on_event), share, cost_per_hour)
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


def _spec(values: dict[str, Any], tensor_parallel: bool) -> JobSpec:
    """The job that the flags ask for; Ray's workers run transformers."""
    loading = settings_from(LoadSettings, values, tensor_parallel=tensor_parallel)
    ray = values["engine"] == "ray"
    job = {**values, "engine": "transformers"} if ray else values
    settings, how = settings_from(CaptureSettings, values), settings_from(DataSettings, values)
    return settings_from(JobSpec, job, settings=settings, loading=loading, how=how)


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


def _print_plan(spec: JobSpec, found: "Estimate", share: "Share", cost_per_hour: float | None) -> None:
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
            f"measured on {found.sampled_positions:,}",
        ),
        ("time", f"{_hours(hours)} of one worker at {found.tokens_per_second:,.0f} tokens/s ({how})"),
    ]
    if share.num > 1:
        lines.append(("", f"{_hours(hours / share.num)} with {share.num} workers, if they do not wait for one another"))
    if cost_per_hour is not None:
        lines.append(("cost", f"{hours * cost_per_hour:,.2f} at {cost_per_hour:g} an hour and worker"))
    for name, value in lines:
        say(f"{name:8}{value}")
    say("Nothing was written.")


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
