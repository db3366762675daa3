"""`logitcache calibrate`: is another engine close enough to transformers to make a cache with?"""

import gc
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from logitcache.capture.settings import EngineSettings
from logitcache.data.settings import DataSettings

from .common import (
    CachePath,
    batch_options,
    config_option,
    data_option,
    device_map_option,
    model_option,
    note,
    quiet_libraries,
    runtime_options,
    say,
    tensor_parallel_option,
)
from .help_page import heading, verb
from .options import Whole, check_has_rows, options_of, settings_from, was_given

if TYPE_CHECKING:
    from logitcache.capture.calibration import Calibration, HeldRecords
    from logitcache.data.samples import Sample


@verb(
    "Compare another engine with transformers before a cache is made by it.",
    example="logitcache calibrate --model base/ --data train.jsonl --engine vllm --out calibration.json\n"
    "logitcache precompute --model base/ --data train.jsonl --cache cache/ \\\n"
    "    --engine vllm --calibration calibration.json",
)
@config_option
@heading("Model, data and output")
@model_option
@data_option("Rows to compare on, as for precompute; at least 1,000 supervised tokens.")
@heading("What is compared")
@click.option(
    "--engine",
    type=click.Choice(["vllm", "transformers"]),
    default="vllm",
    show_default=True,
    help="What to compare; transformers: with another --engine-dtype or --engine-attention.",
)
@click.option(
    "--engine-dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Number format of the engine's weights.  [default: that of the reference]",
)
@click.option(
    "--engine-attention",
    type=click.Choice(["eager", "sdpa"]),
    help="Attention of --engine transformers.  [default: that of the reference]",
)
@click.option(
    "--cache", type=CachePath(), metavar="DIR", help="Compare what this cache holds, in place of --engine and --data."
)
@click.option(
    "--num-positions",
    type=Whole(min=1000),
    default=1000,
    show_default=True,
    help="Supervised tokens to compare on, or a few more.",
)
@click.option("--top-k", type=Whole(min=1), default=64, show_default=True, help="Alternatives to keep a position.")
@options_of(DataSettings)
@batch_options
@heading("Engine and workers")
@options_of(EngineSettings)
@tensor_parallel_option
@runtime_options
@device_map_option
@heading("Model, data and output")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("calibration.json"),
    show_default=True,
    metavar="FILE",
    help="Where to write what was found, for precompute --calibration; nothing is written with --cache.",
)
def calibrate(
    model: str,
    data: tuple[str, ...] | None,
    engine: str,
    engine_dtype: str | None,
    engine_attention: str | None,
    cache: str | None,
    num_positions: int,
    top_k: int,
    max_length: int,
    batch_tokens: int,
    dtype: str,
    device: str,
    device_map: str | None,
    tensor_parallel: int | None,
    out: Path,
    **values: Any,
) -> None:
    """Run an engine and transformers over the same samples, print by how much they differ, and refuse an engine that
    differs by more than noise. The reference runs in --dtype.
    """
    if (data is None) == (cache is None):
        raise click.UsageError("give either --data, to run an engine on, or --cache, to compare what it holds.")
    if data is None:
        ctx = click.get_current_context()
        check_has_rows(ctx, "--data")
        for name in ("engine", "engine_arg", "engine_attention", "engine_dtype", "tensor_parallel"):
            if was_given(ctx, name):
                flag = "--" + name.replace("_", "-")
                raise click.UsageError(f"{flag} is of an engine that runs: give --data, or leave it out with --cache.")
    running = settings_from(EngineSettings, values, num_gpus=tensor_parallel or 1)
    if engine != "vllm" and running != EngineSettings():
        raise click.UsageError("--engine-arg and --tensor-parallel are for --engine vllm.")
    if engine == "vllm" and engine_attention:
        raise click.UsageError("--engine-attention is of --engine transformers; vLLM chooses its own.")
    if not out.parent.is_dir():
        raise click.UsageError(f"--out {out}: {out.parent} is no folder.")
    how = settings_from(DataSettings, values)
    quiet_libraries()
    import torch

    from logitcache.capture import calibration as job
    from logitcache.capture.engines.vllm import vllm_base, vllm_teacher, vllm_version
    from logitcache.capture.settings import CaptureSettings
    from logitcache.capture.teacher import TransformersTeacher
    from logitcache.data.skipped import listed_beside
    from logitcache.models.head import check_head, check_length
    from logitcache.models.loading import find_model, load_base, load_tokenizer, pick_device
    from logitcache.pairing.identity_checks import check_identity

    if cache is None and engine == "vllm":
        vllm_version()  # before the reference has run for nothing
    source, where = find_model(model), pick_device(device)
    tokenizer = load_tokenizer(source)
    held = None if cache is None else _held(cache, num_positions)
    base = load_base(source, dtype, where, device_map=device_map)
    if held is not None:
        check_identity(held.cache, base, tokenizer)
        chosen, top_k = held.samples, held.cache.manifest.capture.top_k
    else:
        chosen = _chosen(
            data or (), listed_beside(how, str(out)), tokenizer, max_length, base.identity.vocab_size, num_positions
        )
    check_head(base.model)
    check_length(base.model, max(len(sample.token_ids) for sample in chosen))
    CaptureSettings(top_k=top_k).check_vocabulary(base.identity.vocab_size)
    reference = job.Run("transformers", version("transformers"), base.identity)
    expected = job.records_of(TransformersTeacher(base.model, top_k), chosen, batch_tokens)
    del base
    gc.collect()  # accelerate's hooks hold a model in a cycle
    torch.cuda.empty_cache()  # vLLM is a process of its own, and needs the memory
    if held is not None:
        run, records, rounding = held.run, held.records, held.cache.manifest.capture.max_error
    elif engine == "vllm":
        vllm = vllm_base(source, engine_dtype or reference.model.dtype, device, running, max_length, batch_tokens)
        run, rounding, head = vllm.run, 0.0, vllm.head()
        with vllm.start() as process:
            records = job.records_of(vllm_teacher(process, head, top_k), chosen, batch_tokens)
    else:
        other = load_base(source, engine_dtype or reference.model.dtype, where, attention=engine_attention)
        run, rounding = job.Run(engine, version("transformers"), other.identity), 0.0
        records = job.records_of(TransformersTeacher(other.model, top_k), chosen, batch_tokens)
    calibration = job.Calibration(run, reference, top_k, job.compare(expected, records), rounding)
    for line in _lines(calibration):
        say(line)
    job.check_bounds(calibration)
    if held is None:
        job.write_calibration(out, calibration)
    say("Within the bounds." if held is not None else f"Within the bounds: {out}")


def _held(path: str, num_positions: int) -> "HeldRecords":
    from logitcache.capture.calibration import choose_cached
    from logitcache.storage import LogitCache

    return choose_cached(LogitCache.open(path), num_positions)


def _chosen(
    data: tuple[str, ...], how: DataSettings, tokenizer: Any, max_length: int, vocab_size: int, num_positions: int
) -> "list[Sample]":
    from logitcache.capture.calibration import choose
    from logitcache.data.rows import read_rows
    from logitcache.pairing.samples import samples_for

    samples = samples_for(read_rows(data, how, note), None, tokenizer, vocab_size, max_length, note, how)
    return choose(samples, num_positions, ", ".join(data))


def _lines(calibration: "Calibration") -> list[str]:
    from logitcache.capture.calibration import MIN_OVERLAP, bounds_of

    found, bounds = calibration.found, bounds_of(calibration)
    runs = [
        f"{run.engine} {run.version}, {run.model.dtype}, {run.model.attention} attention"
        for run in (calibration.engine, calibration.reference)
    ]
    return [
        f"{runs[0]}",
        f"against {runs[1]}: {found.num_positions:,} positions of {found.num_samples:,} samples, "
        f"top {calibration.top_k} alternatives",
        f"{'':30}{'max':>11}{'mean':>11}   bounds",
        f"  log p(label), nats          {found.max_label_nats:11.3g}{found.mean_label_nats:11.3g}"
        f"   {bounds.max_nats:g}, {bounds.mean_nats:g}",
        f"  log p(alternative), nats    {found.max_alternative_nats:11.3g}{found.mean_alternative_nats:11.3g}"
        f"   {bounds.max_nats:g}, {bounds.mean_nats:g}",
        f"  KL(reference || engine)     {found.max_kl_nats:11.3g}{found.mean_kl_nats:11.3g}"
        f"   mean {bounds.mean_kl_nats:g}",
        f"  log p(tail), nats           {found.max_tail_nats:11.3g}{found.mean_tail_nats:11.3g}"
        f"   {bounds.max_nats:g}, {bounds.mean_nats:g}",
        f"  alternatives both keep      {'':11}{found.mean_overlap:11.4f}   at least {MIN_OVERLAP:g}",
    ]
