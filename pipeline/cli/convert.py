"""`logitcache convert`: the same samples in another store, or at a coarser precision."""

import click

from .common import CachePath, config_option, human_bytes, say
from .help_page import heading, verb


@verb(
    "Copy a cache into another store or a coarser precision.",
    example="logitcache convert cache/ smaller/ --precision compact --store arrow",
)
@config_option
@heading("What is written")
@click.argument("source", type=CachePath(), metavar="SOURCE")
@click.argument("target", type=CachePath(), metavar="TARGET")
@click.option("--store", type=click.Choice(["zarr", "arrow"]), help="File layout.  [default: that of the source]")
@click.option(
    "--precision",
    type=click.Choice(["exact", "fine", "compact"]),
    help="Not finer than the source.  [default: that of the source]",
)
def convert(source: str, target: str, store: str | None, precision: str | None) -> None:
    """Copy the cache SOURCE to TARGET in another store or at a coarser precision.

    Errors add up: a cache that was fine and is made compact says 3/64 nat, not 1/32.
    """
    from logitcache.storage import LogitCache
    from logitcache.storage import convert as copy
    from logitcache.storage.transfer import converted

    found = LogitCache.open(source).manifest
    try:
        converted(found, store or found.store, precision or found.capture.precision)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    cache = copy(source, target, store, precision)
    capture = cache.manifest.capture
    say(
        f"Converted {cache.num_positions:,} positions to {target}: {cache.manifest.store}, {capture.precision} (within "
        f"{capture.max_error:g} nats), {human_bytes(cache.num_bytes)}."
    )
