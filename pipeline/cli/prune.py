"""`logitcache prune`: remove from a cache the samples that are not in the data any more."""

from typing import Any

import click

from logitcache.data.settings import DataSettings

from .common import CachePath, config_option, data_option, human_bytes, note, quiet_libraries, say
from .help_page import heading, verb
from .options import options_of, settings_from


@verb(
    "Remove the samples that are not in the data any more.",
    example="logitcache prune cache/ --data train.jsonl --model base/ --dry-run",
)
@config_option
@heading("What stays")
@click.argument("path", type=CachePath(), metavar="DIR")
@data_option("Data whose samples stay: what --data of precompute takes, all of it.", required=True)
@click.option(
    "--model",
    metavar="M",
    help="Folder or hub id with the tokenizer of the cache; no weights are loaded. Not needed where the data of the "
    "cache were token ids and its base had no tokenizer.",
)
@options_of(DataSettings)
@click.option("--dry-run", is_flag=True, help="Say what would go, and stop.")
def prune(path: str, data: tuple[str, ...], model: str | None, dry_run: bool, **values: Any) -> None:
    """Remove every sample from a finished cache that is not in the data any more.

    Shards that are wanted whole stay byte for byte. Killed at any moment, the cache holds the old contents or the new;
    the same command again finishes. Nothing else may write to the cache meanwhile; who reads it gets an error.
    """
    how = settings_from(DataSettings, values)
    quiet_libraries()
    from logitcache.data.skipped import listed_beside
    from logitcache.pairing.wanted_samples import ids_of_data
    from logitcache.storage import LogitCache
    from logitcache.storage import prune as remove

    cache = LogitCache.open(path)
    if model is None and cache.manifest.tokenizer is not None:
        raise click.UsageError("the samples of this cache were made with a tokenizer: prune needs --model.")
    found = ids_of_data(cache, data, model, listed_beside(how, path), note)
    report = remove(path, found.sample_ids, dry_run)
    num_missing = len(found.sample_ids) - report.num_samples_kept
    note(f"{found.num_rows:,} rows: {len(found.sample_ids):,} distinct samples, {num_missing:,} of them not in {path}.")
    if not report.num_samples and not report.num_shards_dropped + report.num_shards_rewritten:
        say(f"{path} holds no sample that is not in the data; nothing was changed.")
        return
    total = report.num_samples + report.num_samples_kept
    shards = (
        f"{report.num_shards_dropped:,} shards dropped, {report.num_shards_rewritten:,} rewritten, "
        f"{report.num_shards_kept:,} untouched"
    )
    what = f"{report.num_samples:,} of {total:,} samples, {report.num_positions:,} positions"
    if dry_run:
        say(f"Would remove {what}, about {human_bytes(report.num_bytes)} from {path}: {shards}. Nothing was written.")
        return
    say(f"Removed {what}, {human_bytes(report.num_bytes)} from {path}: {shards}.")
