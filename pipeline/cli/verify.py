"""`logitcache verify`: read every byte of a cache."""

import json
from dataclasses import asdict

import click

from .common import CachePath, config_option, human_bytes, say, say_lines


@click.command(short_help="Read every byte of a cache and check it.")
@config_option
@click.argument("path", type=CachePath(), metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(path: str, as_json: bool) -> int:
    """Read every byte of a cache, check it, and name each bad shard and sample. Exit status 3 where there is one.

    Exit status 2 where nothing that could be read is bad, but symbolic links, which are not followed, hide some.
    """
    from logitcache.storage import LinkRefused
    from logitcache.storage import verify as check

    report = check(path)
    status = 0 if report.is_intact else 3 if report.is_corrupt else 2
    if as_json:
        say_lines(json.dumps({"intact": report.is_intact, **asdict(report)}, indent=2))
        return status
    for problem in report.problems:
        sample = f", sample {problem.sample}" if problem.sample else ""
        say(f"shard {problem.shard}{sample}: {problem.what}" if problem.shard else problem.what)
    read = (
        f"{report.num_shards:,} shards, {report.num_samples:,} samples, {report.num_positions:,} positions, "
        f"{human_bytes(report.num_bytes)}"
    )
    if report.is_intact:
        say(f"{path} is intact: {read}.")
        return 0
    links = sum(p.reason == LinkRefused.reason for p in report.problems)
    if links:
        say(
            f"{path} was not read whole: {links:,} symbolic link{'s are' if links > 1 else ' is'} not followed. "
            "A link may stand at the cache's root and at its shards/, and lead to a folder of this cache alone; put "
            "what others lead to in their place. Until then repair changes nothing."
        )
    if report.is_corrupt:
        problems = [p for p in report.problems if p.reason != LinkRefused.reason]
        shards = {p.shard for p in problems if p.shard}
        say(
            f"{path} is corrupt: {len(problems):,} problems in {len(shards):,} of {read}. "
            "Restore them from a copy; or run `logitcache repair`, which drops them, and precompute again."
        )
    return status
