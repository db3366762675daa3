"""`logitcache verify`: read every byte of a cache; hold a sample of it against the model that it says it is of."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from logitcache.capture.settings import AgainstSettings

from .common import CachePath, config_option, device_option, human_bytes, note, quiet_libraries, say, say_lines
from .help_page import heading, verb
from .options import options_of, settings_from, was_given

if TYPE_CHECKING:
    from logitcache.storage import VerifyReport
    from logitcache.storage.model_check import ModelCheck


@verb(
    "Read every byte of a cache and check it.",
    example="logitcache verify cache/ --against-model base/",
)
@config_option
@heading("Output")
@click.argument("path", type=CachePath(), metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@heading("Against the model")
@click.option(
    "--against-model",
    metavar="M",
    help="Then capture a sample again by this model, a local folder or a hub id, and compare; the answer is kept in "
    "against-model.json beside the cache.",
)
@options_of(AgainstSettings)
@device_option
@click.pass_context
def verify(
    ctx: click.Context, /, path: str, as_json: bool, against_model: str | None, device: str, **values: Any
) -> int:
    """Read every byte of a cache, check it, and name each bad shard and sample. Exit status 3 where there is one.

    Exit status 2 where nothing that could be read is bad, but symbolic links, which are not followed, hide some; 4
    where a cache that is intact is not of --against-model, by its fingerprints or by more than the model's own noise.
    """
    from logitcache.storage import verify as check

    idle = [name for name in ("num_positions", "batch_tokens", "device") if was_given(ctx, name)]
    if against_model is None and idle:
        raise click.UsageError(f"--{idle[0].replace('_', '-')} says how to run a model. Give --against-model too.")
    settings = settings_from(AgainstSettings, values)
    report = check(path)
    status = 0 if report.is_intact else 3 if report.is_corrupt else 2
    found = None
    if against_model is not None and report.is_intact:
        found = _against(path, against_model, settings, device)
        status = 0 if found.is_within else 4
    if as_json:
        compared = {} if found is None else {"against_model": {"within": found.is_within, **asdict(found)}}
        say_lines(json.dumps({"intact": report.is_intact, **asdict(report), **compared}, indent=2))
        return status
    _say(path, report)
    if found is not None:
        say(f"{path} is {found.sentence()}.")
    if found is not None and not found.is_within:
        note(
            f"{path} says that it is of {against_model}, and holds other distributions. Ask who made it "
            "how, or precompute a cache."
        )
    return status


def _against(path: str, model: str, settings: AgainstSettings, device: str) -> "ModelCheck":
    """Run the model as the cache says its base was run, compare, and keep the answer."""
    quiet_libraries()
    from logitcache.capture.against_model import check_against
    from logitcache.capture.calibration import choose_cached
    from logitcache.models.head import check_head
    from logitcache.models.loading import find_model, load_as_stated, load_tokenizer, pick_device
    from logitcache.pairing.identity_checks import check_identity
    from logitcache.storage import LogitCache
    from logitcache.storage.model_check import write_model_check

    source, where, cache = find_model(model), pick_device(device), LogitCache.open(path)
    base = load_as_stated(source, cache.manifest.model, where)
    held = choose_cached(cache, settings.num_positions, at_least=1)
    check_identity(cache, base, load_tokenizer(source))
    check_head(base.model)
    found = check_against(held, base, settings.batch_tokens)
    write_model_check(path, found)
    return found


def _say(path: str, report: "VerifyReport") -> None:
    """What was read and what is bad, and what to do."""
    from logitcache.storage import LinkRefused

    for problem in report.problems:
        sample = f", sample {problem.sample}" if problem.sample else ""
        say(f"shard {problem.shard}{sample}: {problem.what}" if problem.shard else problem.what)
    read = (
        f"{report.num_shards:,} shards, {report.num_samples:,} samples, {report.num_positions:,} positions, "
        f"{human_bytes(report.num_bytes)}"
    )
    if report.is_intact:
        say(f"{path} is intact: {read}.")
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
