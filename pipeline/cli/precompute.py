"""`logitcache precompute`: run the base once and store its predictions."""

import click

from .common import (
    CachePath,
    FiniteFloat,
    config_option,
    human_bytes,
    model_option,
    note,
    quiet_libraries,
    runtime_options,
    token_bar,
)


@click.command(short_help="Run the base once and store its log-probabilities.")
@config_option
@model_option
@click.option(
    "--data", required=True, metavar="D", help="JSONL or Parquet file, a folder of them, or a hub data set id."
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
@runtime_options
@click.option("--dry-run", is_flag=True, help="Read the data, print the plan and its size, and stop.")
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
    dtype: str,
    device: str,
    dry_run: bool,
) -> None:
    """Run the base once over a data set and store, for every supervised token, its top-k log-probabilities.

    Rows: text; prompt + completion; messages (assistant turns are supervised); or input_ids (+ labels, -100 where not
    supervised). Interrupted, the same command goes on where it stopped. A finished cache gains what it lacks.
    """
    if tail_groups == 1:
        raise click.UsageError("--tail-groups 1 is the whole tail, which is always kept: give 2 or more, or 0.")
    if tail_samples and min_mass < 1:
        raise click.UsageError("--tail-samples with --min-mass: the draws are from beyond all --top-k. Leave one out.")
    quiet_libraries()
    from .. import precompute as job
    from ..models import configured_vocab_size, find_model, load_base, load_tokenizer, pick_device
    from ..rows import read_rows
    from ..samples import make_samples

    settings = job.PrecomputeSettings(
        top_k, max_length, batch_tokens, shard_positions, store, precision, min_mass, tail_groups, tail_samples
    )
    source = find_model(model)
    where = pick_device(device)
    tokenizer = load_tokenizer(source)
    rows = read_rows(data)
    if dry_run:
        vocab_size = configured_vocab_size(source)
    else:
        base = load_base(source, dtype, where)
        vocab_size = base.identity.vocab_size
    found = make_samples(rows, tokenizer, max_length, vocab_size)
    plan = job.make_plan(found.samples, settings)
    settings = settings.fitted(vocab_size)
    note(
        f"{found.num_rows:,} rows: {plan.num_samples:,} distinct samples, {plan.num_tokens:,} tokens, "
        f"{plan.num_positions:,} supervised positions."
    )
    if found.num_truncated:
        note(
            f"{found.num_truncated:,} rows are longer than {max_length} tokens and were cut "
            f"({found.num_tokens_cut:,} tokens lost); {found.num_without_labels:,} of them kept no supervised token "
            "and are left out."
        )
    if dry_run:
        size = human_bytes(plan.num_bytes(settings))
        groups = f" and the rest in {settings.tail_groups} groups" if settings.tail_groups else ""
        click.echo(
            f"Would run {source.name} over {plan.num_tokens:,} tokens into {len(plan.shards):,} shards, keeping "
            f"{settings.top_k} of {vocab_size:,} alternatives{groups} a position at precision {precision}: {size} "
            "before compression. Nothing was written."
        )
        return
    partition = job.partition_for(base, settings, cache)
    manifest = job.manifest_for(base, tokenizer, settings, partition)
    with token_bar("precompute", plan.num_tokens) as progress:
        report = job.precompute(base, manifest, plan, cache, progress, partition)
    already = f" {report.num_samples_found:,} samples were there already." if report.num_samples_found else ""
    click.echo(f"Cached {report.num_positions:,} positions of {report.num_samples:,} samples in {cache}.{already}")
