"""`logitcache inspect`: what a cache holds."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from .common import config_option, human_bytes


@click.command(short_help="Print what a cache holds and what it belongs to.")
@config_option
@click.argument("path", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(path: Path, as_json: bool) -> None:
    """Print what a cache holds and what it belongs to. Reads its index, not its log-probabilities."""
    from logitcache.storage import LogitCache

    cache = LogitCache.open(path)
    facts = _facts(cache)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    model, capture, contents = facts["model"], facts["capture"], facts["contents"]
    tokenizer = facts["tokenizer"]
    click.echo(
        f"{path}: {facts['store']} cache, format version {facts['format_version']}\n"
        f"  model        {facts['model_name']}, {model['dtype']}, {model['attention']} attention, "
        f"{model['vocab_size']:,} logits\n"
        f"  weights      {model['weights']}\n"
        f"  tokenizer    {tokenizer['fingerprint'] if tokenizer else 'none (the data were token ids)'}\n"
        f"  capture      top {capture['top_k']} alternatives, samples of at most {capture['max_length']} tokens\n"
        f"  contents     {contents['num_samples']:,} samples, {contents['num_tokens']:,} tokens, "
        f"{contents['num_positions']:,} positions in {contents['num_shards']:,} shards\n"
        f"  truncated    {contents['num_tokens_cut']:,} tokens were cut off\n"
        f"  size         {human_bytes(contents['num_bytes'])}, {contents['bytes_a_position']:.1f} bytes a position\n"
        f"  kept mass    {100 * contents['mean_kept_mass']:.2f} % of the non-target mass on average"
    )


def _facts(cache: Any) -> dict[str, Any]:
    commits = [shard.commit for shard in cache.shards]
    positions = cache.num_positions
    return {
        **asdict(cache.manifest),
        "contents": {
            "num_samples": len(cache),
            "num_tokens": cache.num_tokens,
            "num_positions": positions,
            "num_shards": len(commits),
            "num_tokens_cut": sum(c.num_tokens_cut for c in commits),
            "num_bytes": cache.num_bytes,
            "bytes_a_position": cache.num_bytes / max(positions, 1),
            "mean_kept_mass": sum(c.kept_mass for c in commits) / max(positions, 1),
            "checksum": cache.contents_checksum,
        },
    }
