"""The data card of a cache: README.md with the YAML front matter that the Hub reads.

Owns what the card says, all of it from the manifest and the counts, and where licences are read: beside the weights of
the base, or in an earlier card. A licence that nobody told is unknown, never guessed; of a local path only the last
component is said. Must not send.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData, ModelCard, try_to_load_from_cache

from logitcache.storage import CaptureIdentity, LogitCache, Manifest
from logitcache.storage.encoding import group_error
from logitcache.storage.identity import config_fingerprint, weights_fingerprint

UNKNOWN = "unknown: ask who made it"
CARD = "README.md"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B")


@dataclass(frozen=True)
class Licence:
    """As the Hub names licences."""

    #: Such as apache-2.0; none where it is not known.
    ids: tuple[str, ...] = ()
    #: Of an `other`.
    name: str = ""
    #: Of an `other`.
    link: str = ""

    def __str__(self) -> str:
        more = ", ".join(part for part in (self.name, self.link) if part)
        return (", ".join(self.ids) + (f" ({more})" if more else "")) if self.ids else UNKNOWN


def is_licence(text: str) -> bool:
    """Whether it is spelt as the Hub's licence identifiers are; the Hub decides whether it knows it."""
    return _LICENCE.fullmatch(text) is not None


def is_hub_id(text: str) -> bool:
    """Whether it is spelt as `owner/name`."""
    return _HUB_ID.fullmatch(text) is not None and ".." not in text and "--" not in text


def public_name(model_name: str, base_model: str | None) -> str:
    """What may be said of the base: the hub id given, the name if this machine has it from the Hub, or the last part.

    A manifest holds what was typed after --model, which may be a path that says more than its owner wants to tell.
    """
    if base_model:
        return base_model
    if _downloaded(model_name) is not None:
        return model_name
    last = re.split(r"[/\\]", model_name.rstrip("/\\"))[-1]
    return re.sub(r"[^\w.+ -]", "_", last) or "unnamed"


def model_licence(manifest: Manifest) -> Licence:
    """The licence in the model card beside the base's weights, if they are still where the manifest says.

    Only the card of the very model counts: the weights there must have the fingerprint that the cache carries, which
    means reading them (about 1 GB/s a core). Unknown where there is no card, or another model.
    """
    here = Path(manifest.model_name)
    folder = here if here.is_dir() else _downloaded(manifest.model_name)
    if folder is None or not (folder / CARD).is_file():
        return Licence()
    try:
        card = ModelCard.load(folder / CARD, ignore_metadata_errors=True).data.to_dict()
        if not card.get("license") or config_fingerprint(folder) != manifest.model.config:
            return Licence()
        if weights_fingerprint(folder) != manifest.model.weights:
            return Licence()
    except (OSError, ValueError):  # not a model any more, or a card that cannot be read
        return Licence()
    return _licence(card["license"], card)


def licences_in(card: str) -> tuple[Licence, Licence]:
    """Of the base and of the data, as an earlier card of a cache says; unknown where it is no such card."""
    try:
        front = DatasetCard(card, ignore_metadata_errors=True).data.to_dict()
    except ValueError:
        return Licence(), Licence()
    ours = front.get("logitcache")
    if not isinstance(ours, dict):
        return Licence(), Licence()
    return _licence(ours.get("model_license"), front), _licence(ours.get("data_license"), {})


def make_card(cache: LogitCache, repo_id: str, name: str, model: Licence, data: Licence) -> str:
    """README.md of a cache that goes to the data set `repo_id`.

    name: of the base, as it may be said (`public_name`). Reads the commit records, for the counts.
    """
    front = DatasetCardData(
        license=_front_licence(model, data),
        size_categories=_size_category(len(cache)),
        pretty_name=f"Logit cache of {name}",
        tags=["logitcache", "logits", "knowledge-distillation"],
        viewer=False,
        logitcache={"model_license": list(model.ids), "data_license": list(data.ids)},
        **({"base_model": name} if is_hub_id(name) else {}),
        **({"license_name": model.name} if model.name else {}),
        **({"license_link": model.link} if model.link else {}),
    )
    body = [*_introduction(name), *_table(cache, name), *_licences(model, data), *_usage(repo_id, name)]
    return str(DatasetCard(f"---\n{front.to_yaml()}\n---\n\n" + "\n".join(body)))


def _introduction(name: str) -> list[str]:
    return [
        f"# Logit cache of {name}",
        "",
        "What a base model predicts at every position of a text: the log-probability of the label, of the most",
        "probable other tokens, and of the rest together. A LoRA adapter or a student can be trained against it",
        "without running the base (`logitcache`, a masked KL of the cached distribution).",
        "",
    ]


def _table(cache: LogitCache, name: str) -> list[str]:
    manifest, capture, model = cache.manifest, cache.manifest.capture, cache.manifest.model
    commits = [shard.commit for shard in cache.shards()]
    positions, num_bytes = cache.num_positions, sum(commit.num_bytes for commit in commits)
    tokenizer = manifest.tokenizer
    alternatives = f"{capture.top_k}"
    if capture.min_mass < 1:
        alternatives += f" at most: the fewest with {100 * capture.min_mass:g} % of the mass beside the label's"
    kept = sum(commit.kept_mass for commit in commits) / max(positions, 1)
    held = f" on {_one_line(model.quantization)} weights" if model.quantization else ""
    rows = [
        ("base model", f"{name}, run in {_one_line(model.dtype)}{held} with {_one_line(model.attention)} attention"),
        ("width of the logits", f"{model.vocab_size:,}"),
        ("fingerprint of the weights", f"`{model.weights}`"),
        ("fingerprint of the configuration", f"`{model.config}`"),
        (
            "fingerprint of the tokenizer",
            f"`{tokenizer.fingerprint}`" if tokenizer else "none: the data were token ids",
        ),
        ("fingerprint of the chat template", f"`{tokenizer.chat_template}`" if tokenizer else "none"),
        ("alternatives a position (top_k)", alternatives),
        ("mass kept of what is not the label's", f"{100 * kept:.2f} % on average"),
        ("tail", _tail(capture)),
        ("precision", f"{capture.precision}; maximum error {capture.max_error:g} nats{_group_error(capture)}"),
        ("positions", f"{positions:,}"),
        ("samples", f"{len(cache):,} of at most {capture.max_length:,} tokens"),
        ("tokens", f"{cache.num_tokens:,}; {sum(c.num_tokens_cut for c in commits):,} more were cut off"),
        ("shards", f"{len(commits):,}"),
        ("bytes", f"{num_bytes:,}; {num_bytes / max(positions, 1):.1f} a position"),
        ("checksum of the contents", f"`{cache.contents_checksum}`"),
        ("format", f"version {manifest.format_version}, {manifest.store} store"),
    ]
    features = ", ".join(manifest.reader_features + manifest.writer_features)
    rows += [("features of the format", features)] if features else []
    made = ", ".join(f"{_one_line(k)} {_one_line(v)}" for k, v in sorted(manifest.created_with.items()))
    return ["| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in [*rows, ("made with", made)]), ""]


def _tail(capture: CaptureIdentity) -> str:
    parts = ["one mass"]
    parts += ["taken as 1 minus the rest"] if capture.tail_from_remainder else []
    parts += [f"split into {capture.num_tail_groups} groups of the vocabulary"] if capture.num_tail_groups else []
    parts += [f"{capture.num_tail_samples} draws from it"] if capture.num_tail_samples else []
    return ", ".join(parts)


def _group_error(capture: CaptureIdentity) -> str:
    error = group_error(capture)
    return f", of tail groups {error:.4g}" if error else ""


def _licences(model: Licence, data: Licence) -> list[str]:
    return [
        "## Licences and privacy",
        "",
        f"- Licence of the base model: {model}",
        f"- Licence of the data: {data}",
        "",
        "The log-probabilities are outputs of the base model and fall under its licence, its terms for training other",
        "models with its outputs included. **The cache contains the text itself**: token ids are stored, supervised or",
        "not, and anyone with the tokenizer can read them. Treat it as you treat the data: personal or confidential",
        "text is as exposed here as there.",
        "",
    ]


def _usage(repo_id: str, name: str) -> list[str]:
    return [
        "## How to use",
        "",
        "```",
        f"logitcache pull {repo_id} cache/",
        "logitcache inspect cache/",
        f"logitcache train --model {name if is_hub_id(name) else 'BASE'} --cache cache/ --out adapter/",
        "```",
        "",
        "`pull` compares every checksum before the cache is put in place. `train` refuses a base or a tokenizer with",
        "other fingerprints than those above. From Python: `logitcache.storage.LogitCache.open('cache/')`.",
        "",
    ]


def _front_licence(model: Licence, data: Licence) -> str | list[str]:
    """Both: whoever uses the cache has to keep to both."""
    ids = list(dict.fromkeys([*(model.ids or ("unknown",)), *(data.ids or ("unknown",))]))
    return ids[0] if len(ids) == 1 else ids


def _size_category(count: int) -> str:
    return _SIZES[min(max(len(str(count)) - 3, 0), len(_SIZES) - 1)]


def _licence(found: object, front: dict[str, Any]) -> Licence:
    """An identifier or a list of them, with the name and the link that the front matter has for another licence."""
    ids = tuple(str(entry) for entry in (found if isinstance(found, list) else [found]))
    if not all(is_licence(entry) for entry in ids):
        return Licence()
    if "other" not in ids:
        return Licence(ids)
    return Licence(ids, _one_line(front.get("license_name", "")), _link(front.get("license_link", "")))


def _downloaded(model_name: str) -> Path | None:
    """The folder of a hub id that was loaded on this machine."""
    if not is_hub_id(model_name) or Path(model_name).is_dir():
        return None
    found = try_to_load_from_cache(model_name, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def _one_line(value: object) -> str:
    """Text that cannot leave its cell of a table."""
    return re.sub(r"[^\w.+ /-]", "_", str(value))


def _link(value: object) -> str:
    """A link that everybody can follow, else nothing: a card beside the weights may name a file beside it."""
    return str(value) if re.fullmatch(r"https://[\w./%-]+", str(value)) else ""
