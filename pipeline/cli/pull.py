"""`logitcache pull`: a cache from the Hugging Face Hub."""

import click

from .common import CachePath, config_option, human_bytes, quiet_hub, say
from .help_page import heading, verb


@verb(
    "Fetch a cache from the Hugging Face Hub, and verify it.",
    example="logitcache pull me/base-logits cache/",
)
@config_option
@heading("Repository")
@click.argument("repo_id", metavar="REPO_ID")
@click.argument("cache", type=CachePath(), metavar="CACHE")
@click.option("--revision", help="Branch, tag or commit.  [default: main]")
def pull(repo_id: str, cache: str, revision: str | None) -> None:
    """Fetch the cache in the data set REPO_ID (owner/name) of the Hugging Face Hub into the new folder CACHE.

    It is downloaded beside its place, to CACHE.pulling, and moved there when every byte has been verified. Interrupted,
    the same command goes on. What lies at CACHE.pulling and no pull wrote is left alone, and refused. HF_TOKEN or
    `hf auth login` says who you are, HF_ENDPOINT which Hub.
    """
    quiet_hub()
    from logitcache.hub.transfer import pull as fetch

    try:
        pulled = fetch(repo_id, cache, revision=revision)
    except FileExistsError as error:
        raise click.UsageError(str(error.strerror)) from error
    report = pulled.report
    say(
        f"{f'Pulled {repo_id} to {cache}' if pulled.is_new else f'{cache} holds {repo_id} already'}, commit "
        f"{pulled.commit}: {report.num_samples:,} samples, {report.num_positions:,} positions in {report.num_shards:,} "
        f"shards, {human_bytes(report.num_bytes)}, all verified."
    )
