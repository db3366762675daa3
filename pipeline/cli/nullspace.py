"""`logitcache nullspace`: the directions that a model's layers leave unused, for --adapter lora-null."""

from pathlib import Path
from typing import Any

import click

from logitcache.adapters.settings import NullSpaceSettings
from logitcache.data.settings import DataSettings

from .common import (
    config_option,
    data_option,
    model_option,
    note,
    quiet_libraries,
    runtime_options,
    say,
    token_bar,
)
from .help_page import heading, verb
from .options import options_of, settings_from


@verb(
    "Find the input directions that a model leaves unused, for lora-null.",
    example="logitcache nullspace --model base/ --data prior.jsonl --out nullspace/\n"
    "logitcache train --model base/ --cache cache/ --out adapter/ --adapter lora-null --nullspace nullspace/",
)
@config_option
@heading("Model, data and output")
@model_option
@data_option("Calibration text: what the model must not forget.", required=True)
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder for the result.")
@options_of(NullSpaceSettings)
@options_of(DataSettings)
@runtime_options
def nullspace(model: str, data: tuple[str, ...], out: Path, dtype: str, device: str, **values: Any) -> None:
    """Run the base over calibration text and keep, for every linear layer's input, the directions with least energy.

    They are the eigenvectors of the inputs' covariance with the smallest eigenvalues. Layers that share an input share
    the work. What is doubtful about the result is said: too little text, a rank beyond the null space, ties.
    """
    settings, how = settings_from(NullSpaceSettings, values), settings_from(DataSettings, values)
    quiet_libraries()
    from logitcache.adapters import null_space as job
    from logitcache.adapters.covariances import input_groups, num_operations, num_passes, spread
    from logitcache.data.rows import read_rows
    from logitcache.data.skipped import listed_beside
    from logitcache.models.loading import find_model, load_base, load_tokenizer, pick_device
    from logitcache.pairing.samples import samples_for

    job.claim_folder(out)
    source = find_model(model)
    how = listed_beside(how, str(out))
    rows = read_rows(data, how, note)
    base = load_base(source, dtype, pick_device(device))
    vocab_size = base.identity.vocab_size
    found = samples_for(rows, None, load_tokenizer(source), vocab_size, settings.max_length, note, how)
    used = spread(found, settings.max_samples)
    passes = num_passes(base.model, used[0], settings.memory_bytes)
    if settings.products == "float64" and base.model.device.type == "cuda":
        tera = num_operations(input_groups(base.model, used[0]), sum(len(s.token_ids) for s in used)) / 1e12
        note(
            f"Products of inputs: {tera:,.0f} TFLOP in float64, which a GPU made for games does at some 1 TFLOP/s, an "
            "H100 at 60. --products float32 takes 1/32 to 1/64 of that time on the former (docs/adapters.md)."
        )
    with token_bar("nullspace", passes * sum(len(s.token_ids) for s in used)) as progress:
        result = job.compute_null_space(base, used, settings, progress)
    result.save(out)
    for finding in result.findings():
        note(finding)
    say(
        f"Kept {settings.rank} directions of each of {len(result.spaces)} inputs of {len(result.directions)} layers, "
        f"from {result.num_tokens:,} tokens in {passes} {'pass' if passes == 1 else 'passes'}: {out}"
    )
