"""`logitcache repair`: drop what is damaged, so that precompute makes only that again."""

import click

from .common import CachePath, config_option


@click.command(short_help="Drop damaged shards, so that precompute makes only those again.")
@config_option
@click.argument("path", type=CachePath(), metavar="DIR")
def repair(path: str) -> None:
    """Drop every damaged shard of a cache. Then run the same precompute command again: it makes only those.

    Until it has run, the cache is incomplete and refused by readers. What killed writers left is removed too. Nothing
    else may write to the cache meanwhile, on any machine: a writer on this one is found, one on another may not be.
    """
    from logitcache.storage import repair as drop

    report = drop(path)
    for unit in report.dropped:
        click.echo(f"dropped shard {unit}")
    if not report.is_incomplete:
        if report.leftovers:
            num = len(report.leftovers)
            click.echo(f"removed {num:,} file{'s' * (num != 1)} or folder{'s' * (num != 1)} that nothing names")
        click.echo(f"{path} is intact; {'only that was removed' if report.leftovers else 'nothing was changed'}.")
        return
    what = f"{len(report.dropped):,} damaged shard{'s' * (len(report.dropped) != 1)} dropped"
    if not report.dropped:
        what = "no shard is damaged; its list of contents is missing or was damaged, and is dropped"
    click.echo(
        f"{path}: {what}. The cache is incomplete now: run the command that made it again (`logitcache precompute`, "
        "merge or convert), which makes only what is missing."
    )
