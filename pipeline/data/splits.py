"""Which files of a folder are which split of which configuration: the rules of the Hub, as `datasets` has them.

Owns what is not read of a folder, and the choice among several splits and configurations. The patterns are those of
`datasets`, held against a listing of the files that can be read here: so a log or a README beside the data decides
nothing. Must not open files of data, nor know rows.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from fsspec.utils import glob_translate

from logitcache.errors import InputNotFound, InvalidData
from logitcache.storage.plain_text import one_line

SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")
"""Of the files whose rows are read here, without `datasets`."""

OTHER_KINDS = (".csv", ".tsv", ".arrow", ".ndjson", ".jsonlines", ".gz", ".zst", ".bz2", ".xz", ".lz4", ".zip", ".tar")
"""Endings, whatever their case, of files that people keep rows in and that are not read here."""

ABOUT_DATA = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""What `datasets` writes beside data: of them, not data."""

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})")

TRAIN, DEFAULT_CONFIG = "train", "default"

NAMED = 6
"""Files that a sentence names one by one."""


@dataclass(frozen=True)
class Chosen:
    """The files of one split, and what is to be said of the choice."""

    #: Relative to the folder, in order.
    files: tuple[str, ...]
    #: "" where there is but one split, which has no name of its own.
    split: str
    #: A sentence, or "".
    said: str


def is_data(relative: str) -> bool:
    """Whether a file in a folder holds rows: of a kind that is read, and neither hidden nor about data."""
    return relative.endswith(SUFFIXES) and not _is_hidden(relative) and PurePosixPath(relative).name not in ABOUT_DATA


def is_of_another_kind(relative: str) -> bool:
    """Whether a file in a folder may hold rows too, of a kind that is not read."""
    may_hold = relative.lower().endswith((*OTHER_KINDS, *SUFFIXES)) and not relative.endswith(SUFFIXES)
    return may_hold and not _is_hidden(relative)


def _is_hidden(relative: str) -> bool:
    """macOS puts a ._ file beside each."""
    return any(part.startswith((".", "__")) for part in PurePosixPath(relative).parts)


def choose(where: str, files: Sequence[str], card: str, split: str, config: str) -> Chosen:
    """The files of a split and a configuration of a folder; "" for the only one there is, or the one that is usual.

    where: the folder, for messages. files: of it, relative. card: its README.md. Raises `InputNotFound` where there is
    no such split or configuration, naming those that there are, and where it is not said which; `InvalidData` where
    the card is not as the Hub has them.
    """
    named, default = configurations(where, card)
    if config and not named:
        raise InputNotFound(
            f"reading data {where}: expected a configuration named {config!r}, found none: it has no README.md that "
            "names configurations. Leave --config-name out."
        )
    splits, chosen = _rule(files), ""
    if named:
        chosen = choose_one(where, "configuration", tuple(named), config, "--config-name", default)
        splits = _of_config(where, files, named[chosen])
    picked = choose_one(where, "split", tuple(splits), split, "--split", TRAIN)
    return Chosen(splits[picked], picked, _said(where, files, splits, picked, chosen if len(named) > 1 else ""))


def choose_one(where: str, what: str, found: Sequence[str], wanted: str, flag: str, usual: str) -> str:
    """Of several the one that is wanted, or the only one, or the usual one. Raises `InputNotFound` with all of them."""
    if wanted and wanted not in found:
        raise InputNotFound(
            f"reading data {where}: expected a {what} named {wanted!r}, found {_listed(found)}. Nothing was read. "
            f"Give another {flag}."
        )
    if wanted or len(found) == 1:
        return wanted or found[0]
    if usual in found:
        return usual
    raise InputNotFound(
        f"reading data {where}: found {len(found)} {what}s, {_listed(found)}, and none named {usual}. Which to read "
        f"is not said. Give one: {flag} {found[0] if found else 'NAME'}."
    )


def configurations(where: str, card: str) -> tuple[dict[str, Mapping[str, Any]], str]:
    """The configurations that a README.md names on its top, and which is the usual one. Raises `InvalidData`."""
    if not card.startswith("---"):
        return {}, DEFAULT_CONFIG
    from datasets.utils.metadata import MetadataConfigs  # slow imports that files by themselves do not need
    from huggingface_hub import DatasetCard

    try:
        found = MetadataConfigs.from_dataset_card_data(DatasetCard(card).data)
        default = found.get_default_config_name() if found else None
    except Exception as error:  # yaml's, and whatever these two raise for what they did not expect
        raise InvalidData(
            f"reading data {where}: its README.md does not say as the Hub does which files there are "
            f"({one_line(str(error), 200)}). Repair the part between its ---, or remove it."
        ) from error
    return dict(found), default or DEFAULT_CONFIG


def _of_config(where: str, files: Sequence[str], config: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The files of every split of a configuration."""
    from datasets.data_files import sanitize_patterns

    folder = str(config.get("data_dir") or "").strip("/")
    prefix = f"{folder}/" if folder not in ("", ".") else ""
    if config.get("data_files") is None:
        inside = [file.removeprefix(prefix) for file in files if file.startswith(prefix)]
        return {name: tuple(prefix + file for file in found) for name, found in _rule(inside).items()}
    splits = {}
    for split, patterns in sanitize_patterns(config["data_files"]).items():
        found = [_matching(files, [prefix + str(pattern).removeprefix("./")]) for pattern in patterns]
        missing = [str(pattern) for pattern, some in zip(patterns, found, strict=True) if not some]
        if missing:
            raise InputNotFound(
                f"reading data {where}: its README.md says that {missing[0]} is of split {split}, and no file of it is "
                f"there that ends in {', '.join(SUFFIXES)}. Fetch it, or convert it."
            )
        splits[split] = tuple(dict.fromkeys(file for some in found for file in some))
    return splits


def _rule(files: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The files of every split by their names alone, as `datasets.data_files.get_data_patterns` finds them."""
    from datasets.data_files import ALL_DEFAULT_PATTERNS, DEFAULT_SPLITS, SPLIT_PATTERN_SHARDED

    sharded = _matching(files, [SPLIT_PATTERN_SHARDED.replace("{split}", "*")])
    if sharded:
        splits = {re.sub(r"-\d{5}-of-\d{5}.*$", "", PurePosixPath(file).name) for file in sharded}
        usual = [str(name) for name in DEFAULT_SPLITS if str(name) in splits]
        ordered = [*usual, *sorted(splits - set(usual))]
        return {name: _matching(files, [SPLIT_PATTERN_SHARDED.format(split=name)]) for name in ordered}
    for patterns in ALL_DEFAULT_PATTERNS:
        found = {str(split): _matching(files, wanted) for split, wanted in patterns.items()}
        if any(found.values()):
            return {split: some for split, some in found.items() if some}
    return {}


def _matching(files: Iterable[str], patterns: Iterable[str]) -> tuple[str, ...]:
    """Those files, in their order, that any of the patterns means."""
    known = [re.compile(glob_translate(pattern)) for pattern in patterns]
    return tuple(file for file in files if any(pattern.match(file) for pattern in known))


def _said(
    where: str, files: Sequence[str], splits: Mapping[str, tuple[str, ...]], picked: str, configuration: str
) -> str:
    """What a person may not know of what is read: of several splits, of files in folders, of a choice."""
    read = splits[picked]
    others = {name: [file for file in some if file not in read] for name, some in splits.items() if name != picked}
    placed = {file for some in splits.values() for file in some}
    unplaced = tuple(file for file in files if file not in placed)
    left = [f"{named_files(some)} (--split {name})" for name, some in others.items() if some]
    if unplaced:
        left.append(f"{named_files(unplaced)} (of no split{' of this configuration' if configuration else ''})")
    doubts = "".join(_doubts(files, splits, picked, configuration))
    deep, kinds = any("/" in file for file in read), {PurePosixPath(file).suffix for file in read}
    if not left and not deep and not configuration and not doubts and picked == TRAIN and len(kinds) == 1:
        return ""
    of_config = f" of configuration {configuration}" if configuration else ""
    rest = f"; not read: {', '.join(left)}" if left else ""
    return f"{where}: reading split {picked}{of_config}: {named_files(read)}{rest}.{doubts}"


def _doubts(
    files: Sequence[str], splits: Mapping[str, tuple[str, ...]], picked: str, configuration: str
) -> Iterator[str]:
    """Sentences where the rule may not give what a person means."""
    for name, some in splits.items():
        both = [file for file in some if file in splits[picked]] if name != picked else []
        if both:
            yield f" By its name {named_files(both)} is of split {name} too."
    if not configuration and set(splits) != set(_rule([file.lower() for file in files])):
        yield " In names of splits capital letters count: what is written with them is of no split of its own."
    shards: dict[tuple[str, int], set[int]] = {}
    for file in splits[picked]:
        if found := _SHARD.search(file):
            shards.setdefault((file[: found.start()], int(found[2])), set()).add(int(found[1]))
    for (start, count), there in shards.items():
        if len(there) < count:
            yield f" Missing: {count - len(there):,} of the {count:,} files {start}-*-of-{count:05}."


def named_files(names: Sequence[str]) -> str:
    """The first of them by name, and how many more."""
    shown = ", ".join(names[:NAMED])
    return shown if len(names) <= NAMED else f"{shown} and {len(names) - NAMED:,} more"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "none"
