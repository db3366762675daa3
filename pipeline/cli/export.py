"""`logitcache export`: a cache as a plain table, for other tools."""

from pathlib import Path

import click

from .common import CachePath, config_option, human_bytes, say
from .help_page import heading, verb


@verb(
    "Write a cache as Parquet, for pandas, DuckDB or a data set viewer.",
    example="logitcache export cache/ --to parquet --out cache.parquet",
)
@config_option
@heading("What is written")
@click.argument("path", type=CachePath(), metavar="DIR")
@click.option("--to", "kind", type=click.Choice(["parquet"]), default="parquet", show_default=True, help="Format.")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="File to write."
)
def export(path: str, kind: str, out: Path) -> None:
    """Write a cache as one table, a row a sample, log-probabilities as float32. For other tools, not for training."""
    from logitcache.storage import export_parquet

    try:
        num_rows = export_parquet(path, out)
    except FileExistsError as error:
        raise click.UsageError(f"{out} exists. Choose another file, or remove it.") from error
    say(f"Wrote {num_rows:,} samples to {out} ({kind}, {human_bytes(out.stat().st_size)}).")
