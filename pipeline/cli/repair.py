"""`logitcache repair`: drop what is damaged, so that precompute makes only that again."""

import click

from .common import CachePath, config_option, say
from .help_page import heading, verb


@verb(
    "Drop damaged shards, so that precompute makes only those again.",
    example="logitcache repair cache/\nlogitcache precompute --model base/ --data train.jsonl --cache cache/",
)
@config_option
@heading("Repair")
@click.argument("path", type=CachePath(), metavar="DIR")
@click.option(
    "--manifest-from",
    type=CachePath(),
    metavar="DIR",
    help="Another cache of this base and capture, whose manifest is written where this one's is lost.",
)
def repair(path: str, manifest_from: str | None) -> None:
    """Drop every damaged shard of a cache. Then run the same precompute command again: it makes only those.

    Until it has run, the cache is incomplete and refused by readers. What killed writers left unfinished is removed
    too, and another base's shard; whole shards that an interrupted run committed stay. Nothing else may write to the
    cache meanwhile, on any machine: a writer on this one is found, one on another may not be.
    """
    from logitcache.storage import repair as drop

    report = drop(path, manifest_from)
    if report.wrote_manifest:
        say(f"wrote manifest.json again, as it is in {manifest_from}")
    for unit in report.dropped:
        say(f"dropped shard {unit}")
    if report.num_records_restored:
        say(f"wrote {report.num_records_restored:,} records of data sets again, as the contents have them")
    shards = f"shard{'s' * (len(report.dropped) != 1)} dropped"
    if not report.is_incomplete:
        if report.leftovers:
            num = len(report.leftovers)
            say(f"removed {num:,} file{'s' * (num != 1)} or folder{'s' * (num != 1)} that nothing names")
        more = report.num_records_restored or report.wrote_manifest
        changed = "changed" if more else "removed"
        changed = f"only that was {changed}" if more or report.leftovers else "nothing was changed"
        unlisted = f"{len(report.dropped):,} bad {shards} that its contents do not list"
        say(f"{path} is intact; {unlisted if report.dropped else changed}.")
        return
    if report.num_data_sets_dropped:
        say(f"dropped {report.num_data_sets_dropped:,} damaged data sets, whose names are lost with them")
    what = f"{len(report.dropped):,} bad {shards}"
    if not report.dropped:
        what = "no shard is damaged; its list of contents is missing or was damaged, and is dropped"
    say(
        f"{path}: {what}. The cache is incomplete now: run the command that made it again (`logitcache precompute`, "
        "merge or convert), which makes only what is missing."
        + (f" Its data sets: {', '.join(map(repr, report.data_sets))}." if report.data_sets else "")
    )
