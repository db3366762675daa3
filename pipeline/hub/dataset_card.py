"""The data card of a cache: README.md with the YAML front matter that the Hub reads.

Owns what the card says, all of it from the manifest and the counts, and where licences are read: beside the weights of
the base, or in an earlier card. A licence that nobody told is unknown, never guessed; of a local path only the last
component is said. Must not send.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCard, DatasetCardData, try_to_load_from_cache

from logitcache.models.same_base import config_differences
from logitcache.storage import CaptureIdentity, LogitCache, Manifest
from logitcache.storage.configs import config_text, read_config
from logitcache.storage.encoding import group_error
from logitcache.storage.identity import digest, weights_fingerprint
from logitcache.storage.manifest import MAX_DATA_SET_NAME
from logitcache.storage.model_check import read_model_check
from logitcache.storage.plain_text import without_secrets
from logitcache.yaml_files import MAX_CHARS as MAX_YAML_CHARS
from logitcache.yaml_files import load_yaml

UNKNOWN = "unknown: ask who made it"
CARD = "README.md"

MAX_CHARS, MAX_LICENCES = 200, 10
"""Of what others named, and of a list of licences."""

_FRONT = re.compile(r"\ufeff?\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
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
    return re.sub(r"[^\w.+ -]", "_", without_secrets(last))[:MAX_CHARS] or "unnamed"


def public_data_names(names: Sequence[str]) -> dict[str, str]:
    """What may be said of data sets, by their names: of a hub id all, of a path or URL the last part.

    Where two are the same then, the later one is called `name (2)`, and so on.
    """
    said: dict[str, str] = {}
    for name in names:
        last = " + ".join(map(_last_part, name.split(" + ")))
        plain, number = last[-MAX_DATA_SET_NAME:] or "unnamed", 1
        public = plain
        while public in said.values():
            number += 1
            public = f"{plain[: MAX_DATA_SET_NAME - 9]} ({number})"
        said[name] = public
    return said


def _last_part(name: str) -> str:
    hub_id = is_hub_id(name) and not Path(name).exists()
    return name if hub_id else re.split(r"[/\\]", name.rstrip("/\\"))[-1]


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
        card = _front_matter(head_of(folder / CARD))
        if not card.get("license") or config_differences(manifest.model.config, config_text(read_config(folder))):
            return Licence()
        if weights_fingerprint(folder) != manifest.model.weights:
            return Licence()
    except (OSError, ValueError):  # not a model any more, or a card that cannot be read
        return Licence()
    return _licence(card["license"], card)


def licences_in(card: str) -> tuple[Licence, Licence]:
    """Of the base and of the data, as an earlier card of a cache says; unknown where it is no such card."""
    front = _front_matter(card)
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
        f"# Logit cache of {_marked(name)}",
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
    held = f" on {_cell(model.quantization)} weights" if model.quantization else ""
    held += " with TF32" if model.tf32 else ""
    templates = ", ".join(f"`{found}`" for found in sorted({commit.chat_template for commit in commits} - {""}))
    rows = [
        ("base model", f"{_marked(name)}, run in {_cell(model.dtype)}{held} with {_cell(model.attention)} attention"),
        ("width of the logits", f"{model.vocab_size:,}"),
        ("fingerprint of the weights", f"`{model.weights}`"),
        ("fingerprint of the configuration", f"`{digest(model.config.encode())}`"),
        (
            "fingerprint of the tokenizer",
            f"`{tokenizer.fingerprint}`" if tokenizer else "none: the data were token ids",
        ),
        ("fingerprint of the chat template", templates or "none: no sample was rendered by one"),
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
    check = read_model_check(cache)
    if check is not None:
        said = f"{check.sentence()}; of contents `{check.contents}` and model `{check.model}`"
        rows.append(("captured again by the base", said))
    features = ", ".join(manifest.reader_features + manifest.writer_features)
    rows += [("features of the format", features)] if features else []
    made = ", ".join(f"{_cell(k)} {_cell(v)}" for k, v in sorted(manifest.created_with.items()))
    return ["| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in [*rows, ("made with", made)]), ""]


def _tail(capture: CaptureIdentity) -> str:
    parts = ["one mass"]
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
    listed = found if isinstance(found, list) else [found]
    ids = tuple(entry for entry in listed if isinstance(entry, str))
    if len(ids) < len(listed) or len(ids) > MAX_LICENCES or not all(is_licence(entry) for entry in ids):
        return Licence()
    if "other" not in ids:
        return Licence(ids)
    return Licence(ids, _cell(front.get("license_name", "")), _link(front.get("license_link", "")))


def _downloaded(model_name: str) -> Path | None:
    """The folder of a hub id that was loaded on this machine."""
    if not is_hub_id(model_name) or Path(model_name).is_dir():
        return None
    found = try_to_load_from_cache(model_name, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def _cell(value: object) -> str:
    """Text of others that cannot leave its cell of a table."""
    return re.sub(r"[^\w.+ /-]", "_", str(value)[:MAX_CHARS])


def _marked(text: str) -> str:
    """Text in which Markdown finds no markup: of what `_cell` and `public_name` leave, signs around words."""
    return re.sub(r"(?<!\w)_|_(?!\w)|^[+-](?=\s)", r"\\\g<0>", text)


def _link(value: object) -> str:
    """A link that everybody can follow, else nothing: a card beside the weights may name a file beside it."""
    return str(value) if re.fullmatch(r"https://[A-Za-z0-9._~/%-]{1,200}", str(value)) else ""


def head_of(path: Path) -> str:
    """As much of a card as is read: its front matter is at its start."""
    with path.open("rb") as file:
        return file.read(4 * MAX_YAML_CHARS).decode(errors="replace")


def _front_matter(card: str) -> dict[str, Any]:
    """What a card of anybody says between its first two lines of ---; nothing where that is no YAML."""
    found = _FRONT.match(card[: 2 * MAX_YAML_CHARS])
    try:
        front = load_yaml(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    return front if isinstance(front, dict) else {}
