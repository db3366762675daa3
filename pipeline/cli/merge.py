"""`logitcache merge`: one cache out of several of the same base and capture."""

import click

from .common import CachePath, config_option, human_bytes, say
from .help_page import verb


@verb(
    "Join caches of one base and one capture.",
    example="logitcache merge all/ cache/ more/",
)
@config_option
@click.argument("target", type=CachePath(), metavar="TARGET")
@click.argument("sources", type=CachePath(), metavar="SOURCE...", nargs=-1, required=True)
def merge(target: str, sources: tuple[str, ...]) -> None:
    """Join caches of one identity into TARGET, a new folder or a cache of that identity. The sources stay."""
    from logitcache.models.same_base import config_differences
    from logitcache.storage import merge as join

    cache = join(sources, target, config_differences)
    what = "1 cache" if len(sources) == 1 else f"{len(sources):,} caches"
    say(
        f"Merged {what}: {target} holds {len(cache):,} samples, {cache.num_positions:,} positions in "
        f"{cache.num_shards:,} shards, {human_bytes(cache.num_bytes)}."
    )
