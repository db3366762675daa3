"""How much of its inputs' energy an adapter's A sees: LoRA-Null, MiLoRA and random rows, layer by layer.

Owns the table docs/benchmarks/nullspace.csv, on the demo's base and the prose it was trained on. A column is the mean
energy of a layer's inputs along the rows of A, over that along a random direction: 1 is what chance gives, eps^2 =
1.4e-14 the rounding of float32. `held_out`: the same A on prose that neither the base nor the calibration has seen.
`float32_off`: what products in float32 change of C, as its largest eigenvalue over eps times C's largest;
`float32_energy`: energy of the directions found by them, by the C of float64, over that of float64's own, less 1.

    python scripts/table_nullspace.py                  rank 16, 256 samples of at most 256 tokens; a minute
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from importlib.resources import as_file
from pathlib import Path
from typing import Any

import torch
from bench_common import BENCHMARKS, demo_base, out_of, write_csv
from torch import Tensor
from transformers.utils import logging

from logitcache.adapters.covariances import energy_ratio, input_covariances, linear_layers
from logitcache.adapters.null_space import InputSpace, NullSpace, NullSpaceSettings, compute_null_space
from logitcache.adapters.start import minor_components, projected_factors
from logitcache.data.samples import Sample, make_samples
from logitcache.demo.text import prose_documents, split
from logitcache.models.loading import Base, Source, load_base, load_tokenizer

OUT = BENCHMARKS / "nullspace.csv"
MAX_LENGTH, MAX_CHARS = 256, 1100
KINDS = ("lora_null", "milora", "random")


def prose(base: Base, held_out: bool, count: int) -> list[Sample]:
    """Pieces of about MAX_CHARS characters of prose, spread over the documents."""
    documents = split(prose_documents())[held_out]
    pieces = [d.text[i : i + MAX_CHARS] for d in documents for i in range(0, len(d.text) - 200, MAX_CHARS)]
    count = min(count, len(pieces))
    chosen = [pieces[i * len(pieces) // count] for i in range(count)]
    rows = ((f"piece {i}", {"text": text}) for i, text in enumerate(chosen))
    return make_samples(rows, load_tokenizer(base.source), MAX_LENGTH, base.identity.vocab_size).samples


def ratios_by_layer(
    base: Base, null: NullSpace, texts: dict[str, Sequence[Sample]]
) -> Iterator[tuple[str, InputSpace, dict[str, float]]]:
    """Layer, the null space of its input, and `energy_ratio` of each kind's A on each text, as 'kind on text'."""
    layers, generator = linear_layers(base.model), torch.Generator().manual_seed(0)
    found = {name: {g.layers: c for g, c in input_covariances(base.model, used)} for name, used in texts.items()}
    for space in null.spaces:
        for name in space.group.layers:
            weight = layers[name].weight.detach()
            rows: dict[str, Tensor] = {
                "lora_null": projected_factors(weight, space.directions, 1.0)[1],
                "milora": minor_components(weight, null.rank, 1.0)[1],
                "random": torch.randn(null.rank, space.group.width, generator=generator),
            }
            yield (
                name,
                space,
                {f"{k} on {t}": energy_ratio(rows[k], found[t][space.group.layers]) for t in texts for k in KINDS},
            )


def of_float32(base: Base, null: NullSpace, used: Sequence[Sample]) -> dict[tuple[str, ...], tuple[str, str]]:
    """By the layers of an input: `float32_off` and `float32_energy`."""
    exact = dict(input_covariances(base.model, used))
    found, eps = {}, torch.finfo(torch.float32).eps
    for group, covariance in input_covariances(base.model, used, products=torch.float32):
        values = torch.linalg.eigvalsh(exact[group])
        off = torch.linalg.matrix_norm(covariance - exact[group], 2) / (eps * values[-1])
        least = torch.linalg.eigh(covariance).eigenvectors[:, : null.rank]
        energy = ((exact[group] @ least) * least).sum() / values[: null.rank].sum()
        found[group.layers] = f"{off:.2f}", f"{energy - 1:+.1e}"
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--out", type=Path, help="default: docs/benchmarks/nullspace.csv")
    args = parser.parse_args(arguments)
    out = out_of(parser, args, OUT)
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    with as_file(demo_base()) as folder:
        base = load_base(Source("demo base", folder), "float32", torch.device("cpu"))
        texts: dict[str, Sequence[Sample]] = {
            "calibration": prose(base, False, args.samples),
            "held_out": prose(base, True, args.samples),
        }
        null = compute_null_space(base, texts["calibration"], NullSpaceSettings(args.rank, args.samples, MAX_LENGTH))
    for finding in null.findings():
        print(finding)
    in_float32 = of_float32(base, null, texts["calibration"])
    lines: list[dict[str, Any]] = []
    for name, space, ratios in ratios_by_layer(base, null, texts):
        lines.append(
            {
                "layer": name.removeprefix("model."),
                "width": space.group.width,
                "rank": null.rank,
                "calibration_tokens": null.num_tokens,
                "null_dimension": space.null_dimension(torch.float32),
                "energy_share": f"{space.energy_share:.2e}",
                **{column: f"{value:.2e}" for column, value in ratios.items()},
                **dict(zip(("float32_off", "float32_energy"), in_float32[space.group.layers], strict=True)),
            }
        )
    write_csv(lines, out)
    print(f"{len(lines)} layers: {out}")


if __name__ == "__main__":
    main()
