"""`logitcache repair`: drop what is damaged, so that precompute makes only that again."""

import click

from .common import CachePath, config_option, say


@click.command(short_help="Drop damaged shards, so that precompute makes only those again.")
@config_option
@click.argument("path", type=CachePath(), metavar="DIR")
def repair(path: str) -> None:
    """Drop every damaged shard of a cache. Then run the same precompute command again: it makes only those.

    Until it has run, the cache is incomplete and refused by readers. Nothing else may write to the cache meanwhile.
    """
    from logitcache.storage import repair as drop

    report = drop(path)
    for unit in report.dropped:
        say(f"dropped shard {unit}")
    if not report.is_incomplete:
        say(f"{path} is intact; nothing was changed.")
        return
    what = f"{len(report.dropped):,} damaged shard{'s' * (len(report.dropped) != 1)} dropped"
    if not report.dropped:
        what = "no shard is damaged; its list of contents is missing or was damaged, and is dropped"
    say(
        f"{path}: {what}. The cache is incomplete now: run the command that made it again (`logitcache precompute`, "
        "merge or convert), which makes only what is missing."
    )
