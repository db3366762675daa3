"""`logitcache push`: a cache to the Hugging Face Hub, with a data card."""

import click

from .common import CachePath, config_option, human_bytes, note, quiet_hub, say, say_lines
from .help_page import heading, verb


@verb(
    "Put a cache on the Hugging Face Hub, with a data card.",
    example="logitcache push cache/ me/base-logits --private --dry-run",
)
@config_option
@heading("Repository and card")
@click.argument("cache", type=CachePath(), metavar="CACHE")
@click.argument("repo_id", metavar="REPO_ID")
@click.option("--private", is_flag=True, help="Make the repository private; refuse one that is public.")
@click.option("--revision", metavar="BRANCH", help="Branch to push to, made if need be.  [default: main]")
@click.option(
    "--model-license",
    metavar="ID",
    help="Licence of the base, as the Hub spells it.  [default: that of the card beside its weights, or there before]",
)
@click.option(
    "--data-license",
    metavar="ID",
    help="Licence of the data, as the Hub spells it.  [default: that of the card there before, or unknown]",
)
@click.option("--base-model", metavar="ID", help="Hub id of the base, where the cache was made from a local folder.")
@click.option("--dry-run", is_flag=True, help="Verify, print the card and the files with their sizes, send nothing.")
def push(
    cache: str,
    repo_id: str,
    private: bool,
    revision: str | None,
    model_license: str | None,
    data_license: str | None,
    base_model: str | None,
    dry_run: bool,
) -> None:
    """Put the cache CACHE into the data set REPO_ID (owner/name) of the Hugging Face Hub.

    Every byte is verified first. Only what belongs to the cache is sent, and only what is not there yet. The card says
    what the cache is of, how exact it is, and its licences. HF_TOKEN or `hf auth login` says who you are, HF_ENDPOINT
    which Hub. A cache holds the token ids of its text: whoever can read it can read the text.
    """
    quiet_hub()
    from logitcache.hub.dataset_card import Licence, is_licence
    from logitcache.hub.transfer import prepare, send

    for flag, value in (("--model-license", model_license), ("--data-license", data_license)):
        if value is not None and not is_licence(value):
            raise click.UsageError(f"{flag} {value!r}: expected an identifier of the Hub, such as apache-2.0 or other.")
    upload = prepare(
        cache,
        repo_id,
        model=Licence((model_license,)) if model_license else None,
        data=Licence((data_license,)) if data_license else None,
        base_model=base_model,
    )
    report = None if dry_run else send(upload, private=private, revision=revision)
    upload = upload if report is None else report.upload
    sizes = upload.sizes
    for flag, whose, licence in (("model", "base", upload.model), ("data", "data", upload.data)):
        if not licence.ids:
            note(f"The licence of the {whose} is not known, and the card says so. --{flag}-license says which it is.")
    if report is None:
        say_lines(upload.card)
        for name, size in sizes.items():
            say(f"{size:14,}  {name}")
        say(f"Would push {len(sizes):,} files, {human_bytes(sum(sizes.values()))}, to {repo_id}. Nothing was sent.")
        return
    if report.is_public:
        note("The repository is public: anyone can read the cache, and its text by the token ids.")
    new = sum(sizes[name] for name in report.new_files)
    say(
        f"Pushed {cache} to {report.url}, commit {report.commit}: {len(sizes):,} files, "
        f"{human_bytes(sum(sizes.values()))}, of which {len(report.new_files):,} were new ({human_bytes(new)})."
    )
