"""`logitcache inspect`: what a cache holds, and what its bytes are spent on."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from logitcache.storage.plain_text import safe

from .common import CachePath, config_option, human_bytes, say, say_lines
from .help_page import heading, verb
from .options import Whole


@verb(
    "Print what a cache holds and what it belongs to.",
    example="logitcache inspect cache/ --plot cache.png",
)
@config_option
@heading("Output")
@click.argument("path", type=CachePath(), metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write a picture (.png, .svg, .pdf): kept mass, alternatives a row (where all rows keep as many, what fewer "
    "would keep), bytes by column.",
)
@click.option(
    "--max-positions",
    type=Whole(min=1),
    default=200_000,
    show_default=True,
    help="Positions to read for the percentiles and the picture; of a larger cache, every n-th sample.",
)
def inspect(path: str, as_json: bool, plot: Path | None, max_positions: int) -> None:
    """Print what a cache holds and what it belongs to: counts, bytes by column, how much it kept."""
    from logitcache.storage import LogitCache
    from logitcache.storage.statistics import describe

    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise click.UsageError(f"--plot {plot}: expected a name that ends in .png, .svg or .pdf.")
    cache = LogitCache.open(path)
    statistics = describe(cache, max_positions)
    facts = _facts(cache, statistics)
    if plot is not None:
        from logitcache.reports.plots import plot_cache
        from logitcache.reports.results import without_folders

        plot_cache(statistics, cache.num_positions, safe(without_folders(f"{facts['model_name']}: {path}")), plot)
    if as_json:
        say_lines(json.dumps(facts, indent=2))
        return
    for line in [*_identity_lines(path, facts), *_contents_lines(facts)]:
        say(line)
    if plot is not None:
        say(f"  picture      {plot}")


def _identity_lines(path: str, facts: dict[str, Any]) -> list[str]:
    model, capture, tokenizer = facts["model"], facts["capture"], facts["tokenizer"]
    kept = f"top {capture['top_k']} alternatives" if capture["top_k"] else "no alternatives"
    if capture["min_mass"] < 1:
        kept = f"the fewest alternatives with {100 * capture['min_mass']:g} % of the non-target mass, {kept} at most"
    groups = f", tail in {capture['num_tail_groups']} groups" if capture["num_tail_groups"] else ""
    groups += f", {capture['num_tail_samples']} draws from the tail" if capture["num_tail_samples"] else ""
    of_groups = f", tail groups within {facts['max_group_error']:.4g}" if facts["max_group_error"] else ""
    quantized = f" with {model['quantization']} weights" if model["quantization"] else ""
    quantized += " and TF32" if model["tf32"] else ""
    return [
        f"{path}: {facts['store']} cache, format version {facts['format_version']}",
        f"  model        {facts['model_name']}, {model['dtype']}{quantized}, {model['attention']} attention, "
        f"{model['vocab_size']:,} logits",
        f"  weights      {model['weights']}",
        f"  tokenizer    {tokenizer['fingerprint'] if tokenizer else 'none (the data were token ids)'}",
        f"  capture      {kept}{groups}; samples of at most {capture['max_length']} tokens",
        f"  precision    {capture['precision']}: log-probabilities within {capture['max_error']:g} nats{of_groups}",
    ]


def _contents_lines(facts: dict[str, Any]) -> list[str]:
    contents, kept, rows = facts["contents"], facts["kept_mass"], facts["num_alternatives"]
    lines = [
        f"  contents     {contents['num_samples']:,} samples, {contents['num_tokens']:,} tokens, "
        f"{contents['num_positions']:,} positions in {contents['num_shards']:,} shards",
        *(
            f"  data set     {d['name']}: {d['num_samples']:,} samples, {d['num_positions']:,} positions, {d['digest']}"
            for d in facts["data_sets"]
        ),
        f"  truncated    {contents['num_tokens_cut']:,} tokens were cut off",
        f"  size         {human_bytes(contents['num_bytes'])}, {contents['bytes_a_position']:.1f} bytes a position:",
    ]
    lines += [f"    {size:8.2f}  {name}" for name, size in facts["bytes_a_position_by_column"].items()]
    lines.append(f"  kept mass    {100 * contents['mean_kept_mass']:.2f} % of the non-target mass on average")
    if kept:
        lines.append("    percentile " + "".join(f"{p:>9}" for p in kept))
        lines.append("    kept mass  " + "".join(f"{v:9.4f}" for v in kept.values()))
        lines.append("    kept       " + "".join(f"{v:9.0f}" for v in rows.values()))
        lines.append(f"  tail         {100 * facts['mean_tail_mass']:.3g} % of the whole mass on average")
    if facts["is_sampled"]:
        lines.append(f"    (percentiles of {contents['num_positions_read']:,} positions; see --max-positions)")
    return lines


def _facts(cache: Any, statistics: Any) -> dict[str, Any]:
    from logitcache.storage.encoding import group_error

    commits = [shard.commit for shard in cache.shards()]
    positions, num_bytes = cache.num_positions, sum(c.num_bytes for c in commits)
    columns = statistics.bytes_by_column
    if num_bytes > sum(columns.values()) + len(columns) * len(commits):  # of Zarr: zarr.json, the indices of the arrays
        columns = columns | {"metadata": num_bytes - sum(columns.values())}
    return {
        **asdict(cache.manifest),
        "max_group_error": group_error(cache.manifest.capture),
        "contents": {
            "num_samples": len(cache),
            "num_tokens": cache.num_tokens,
            "num_positions": positions,
            "num_shards": len(commits),
            "num_tokens_cut": sum(c.num_tokens_cut for c in commits),
            "num_bytes": num_bytes,
            "bytes_a_position": num_bytes / max(positions, 1),
            "mean_kept_mass": sum(c.kept_mass for c in commits) / max(positions, 1),
            "num_positions_read": statistics.num_positions,
            "checksum": cache.contents_checksum,
        },
        "data_sets": [
            {"name": d.name, "digest": d.file.checksum, "num_samples": d.num_samples, "num_positions": d.num_positions}
            for d in cache.data_sets
        ],
        "bytes_a_position_by_column": {name: size / max(positions, 1) for name, size in columns.items()},
        "is_sampled": statistics.is_sampled,
        "kept_mass": {f"{p}%": v for p, v in statistics.kept_mass_percentiles().items()},
        "mean_tail_mass": float(statistics.tail_mass.mean()) if statistics.num_positions else None,
        "num_alternatives": {f"{p}%": v for p, v in statistics.num_alternatives_percentiles().items()},
    }
