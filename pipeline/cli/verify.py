"""`logitcache verify`: read every byte of a cache."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from .common import config_option, human_bytes


@click.command(short_help="Read every byte of a cache and check it.")
@config_option
@click.argument("path", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(path: Path, as_json: bool) -> int:
    """Read every byte of a cache, check it, and name each bad shard and sample. Exit status 3 where there is one."""
    from logitcache.storage import verify as check

    report = check(path)
    if as_json:
        click.echo(json.dumps({"intact": report.is_intact, **asdict(report)}, indent=2))
        return 0 if report.is_intact else 3
    for problem in report.problems:
        sample = f", sample {problem.sample}" if problem.sample else ""
        click.echo(f"shard {problem.shard}{sample}: {problem.what}")
    read = (
        f"{report.num_shards:,} shards, {report.num_samples:,} samples, {report.num_positions:,} positions, "
        f"{human_bytes(report.num_bytes)}"
    )
    if report.is_intact:
        click.echo(f"{path} is intact: {read}.")
        return 0
    shards = sorted({p.shard for p in report.problems})
    click.echo(
        f"{path} is corrupt: {len(report.problems):,} problems in {len(shards):,} of {read}. "
        "Restore these shards from a copy, or precompute the cache again into a new folder."
    )
    return 3
