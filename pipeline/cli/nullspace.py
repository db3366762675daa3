"""`logitcache nullspace`: the directions that a model's layers leave unused, for --adapter lora-null."""

from pathlib import Path

import click

from .common import (
    FiniteFloat,
    batch_options,
    config_option,
    model_option,
    note,
    quiet_libraries,
    runtime_options,
    token_bar,
)


@click.command(short_help="Find the input directions that a model leaves unused, for lora-null.")
@config_option
@model_option
@click.option("--data", required=True, metavar="D", help="Calibration text: what the model must not forget.")
@click.option(
    "--rank", type=click.IntRange(min=1), default=16, show_default=True, help="Directions an input; that of training."
)
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder for the result.")
@click.option(
    "--max-samples", type=click.IntRange(min=1), default=256, show_default=True, help="Samples, spread over the data."
)
@batch_options
@click.option(
    "--memory-limit",
    type=FiniteFloat(min=0, min_open=True),
    default=4.0,
    show_default=True,
    help="GiB of covariances at a time; what does not fit takes another pass over the text.",
)
@runtime_options
def nullspace(
    model: str,
    data: str,
    rank: int,
    out: Path,
    max_samples: int,
    max_length: int,
    batch_tokens: int,
    memory_limit: float,
    dtype: str,
    device: str,
) -> None:
    """Run the base over calibration text and keep, for every linear layer's input, the directions with least energy.

    They are the eigenvectors of the inputs' covariance with the smallest eigenvalues. Layers that share an input share
    the work. What is doubtful about the result is said: too little text, a rank beyond the null space, ties.
    """
    quiet_libraries()
    from logitcache.adapters import null_space as job
    from logitcache.adapters.covariances import num_passes, spread
    from logitcache.data.rows import read_rows
    from logitcache.data.samples import make_samples
    from logitcache.models.loading import find_model, load_base, load_tokenizer, pick_device

    job.claim_folder(out)
    source = find_model(model)
    rows = read_rows(data)
    base = load_base(source, dtype, pick_device(device))
    found = make_samples(rows, load_tokenizer(source), max_length, base.identity.vocab_size)
    if found.num_truncated:
        note(f"{found.num_truncated:,} rows were cut to {max_length} tokens.")
    settings = job.NullSpaceSettings(rank, max_samples, max_length, batch_tokens, int(memory_limit * 2**30))
    used = spread(found.samples, max_samples)
    passes = num_passes(base.model, used[0], settings.memory_bytes)
    with token_bar("nullspace", passes * sum(len(s.token_ids) for s in used)) as progress:
        result = job.compute_null_space(base, used, settings, progress)
    result.save(out)
    for finding in result.findings():
        note(finding)
    click.echo(
        f"Kept {rank} directions of each of {len(result.spaces)} inputs of {len(result.directions)} layers, from "
        f"{result.num_tokens:,} tokens in {passes} {'pass' if passes == 1 else 'passes'}: {out}"
    )
