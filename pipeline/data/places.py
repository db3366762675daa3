"""Where data are: a name as people give it -> files in a fixed order, or a data set that `datasets` opens.

Owns the kinds of names (a file, a folder, a URL, what `save_to_disk` wrote, an id of the Hub), and the listing of a
folder. Which of its files are read is in `splits`. Must not open files of data, nor know rows.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import fsspec

from logitcache.errors import InputNotFound, InvalidData, InvalidSettings
from logitcache.storage.plain_text import one_line, without_secrets

from .settings import DataSettings
from .splits import DEFAULT_CONFIG, SUFFIXES, TRAIN, choose, choose_one, is_data, is_of_another_kind, named_files

Named = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""Data by their names: a path, URL or hub id, or several of them, whose rows follow one another."""

OnMessage = Callable[[str], None]

KINDS = "*.jsonl, *.json or *.parquet, or *.jsonl.gz"


@dataclass(frozen=True)
class Place:
    """What a name leads to."""

    #: As it was given, without secrets.
    name: str
    #: Paths or URLs in a fixed order; none where `datasets` opens it.
    files: tuple[str, ...] = ()
    #: Of `save_to_disk`: the folder of the split.
    saved: str = ""
    #: Of the Hub: its id.
    hub_id: str = ""
    #: Whether --split and --config-name choose among something here.
    has_splits: bool = True
    #: What a person should know of the choice, a sentence; "" for nothing.
    said: str = ""


def names_of(data: Named) -> tuple[str, ...]:
    """The names, one by one; a ~ in front is the home folder. Raises `InputNotFound` for an empty one."""
    names = [data] if isinstance(data, (str, os.PathLike)) else list(data)
    plain = [os.fspath(name) for name in names]
    if "" in plain:  # as of a variable of the shell that is not set; as a path it would be the folder one is in
        raise InputNotFound("reading data '': expected a path, URL or hub id, found an empty name. Give --data one.")
    return tuple(str(Path(name).expanduser()) if name.startswith("~/") else name for name in plain)


def are_names(data: object) -> TypeGuard[Named]:
    """Whether data are given by their names, and not as samples in memory."""
    if isinstance(data, (str, os.PathLike)):
        return True
    return isinstance(data, (list, tuple)) and bool(data) and all(isinstance(d, (str, os.PathLike)) for d in data)


def places_of(data: Named, how: DataSettings) -> list[Place]:
    """What the names lead to. Raises `InputNotFound`, `InvalidData` for a folder that does not say what it holds,
    `InvalidSettings` for a split or a configuration where none of the names has any."""
    places = [_place(name, how) for name in names_of(data)]
    if not places:
        raise InputNotFound("reading data: expected a path, URL or hub id, found no name. Give --data.")
    asked = [flag for flag, value in (("--split", how.split), ("--config-name", how.config_name)) if value]
    if asked and not any(place.has_splits for place in places):
        names = ", ".join(place.name for place in places)
        raise InvalidSettings(
            f"reading data {names} with {asked[0]}: expected a folder or a hub data set, found files by themselves, "
            f"of which all is read. Leave {asked[0]} out, or give the folder."
        )
    return places


def settings_for(texts: Mapping[str, object], how: DataSettings) -> dict[str, DataSettings]:
    """The settings for each of several texts of one job: a split or configuration is asked of those that have any.

    Raises `InvalidSettings` where none has, and as `places_of`. Texts that are not given by their names are left out.
    """
    named = {key: data for key, data in texts.items() if are_names(data)}
    if not (how.split or how.config_name) or not named:
        return dict.fromkeys(named, how)
    plain = replace(how, split="", config_name="")
    by_itself = {key for key, data in named.items() if all(_is_by_itself(name) for name in names_of(data))}
    if len(by_itself) == len(named):
        places_of([name for data in named.values() for name in names_of(data)], how)
    return {key: plain if key in by_itself else how for key in named}


def _is_by_itself(name: str) -> bool:
    return name.endswith(SUFFIXES) and ("://" in name or not Path(name).is_dir())


def _place(data: str, how: DataSettings) -> Place:
    name = without_secrets(data)
    if "://" in data:
        return _remote(data, name, how)
    path = Path(data)
    if path.is_dir():
        return _saved(path, name, how) or _chosen(str(path), name, _local_listing(path), _card(path), how, os.path.join)
    if path.is_file():
        return _by_itself(name, str(path))
    if data.endswith(SUFFIXES):
        raise InputNotFound(f"reading data {name!r}: no such file. Check the path.")
    return Place(name, hub_id=data)


def _by_itself(name: str, file: str) -> Place:
    if not file.endswith(SUFFIXES):
        raise InputNotFound(f"reading data {name!r}: expected {KINDS}, found a file of another kind. Convert it.")
    return Place(name, (file,), has_splits=False)


def _chosen(
    root: str, name: str, listing: Iterable[str], card: str, how: DataSettings, join: Callable[[str, str], str]
) -> Place:
    """The files of a folder that are read."""
    listed = sorted(listing)
    files, others = [file for file in listed if is_data(file)], [file for file in listed if is_of_another_kind(file)]
    if not files:
        found = f"files of other kinds ({named_files(others)}). Convert them" if others else "none"
        raise InputNotFound(f"reading data {name!r}: expected {KINDS} in this folder, found {found}.")
    chosen = choose(name, files, card, how.split, how.config_name)
    of_others = f"{name}: not read, as of other kinds than {KINDS}: {named_files(others)}." if others else ""
    said = " ".join(sentence for sentence in (chosen.said, of_others) if sentence)
    return Place(name, tuple(join(root, file) for file in chosen.files), said=said)


def _local_listing(folder: Path) -> Iterable[str]:
    """Behind links too, each folder once."""
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=_not_listed):
        real = os.path.realpath(root)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith((".", "__")))
        inside = Path(root).relative_to(folder)
        yield from ((inside / name).as_posix() for name in (() if real in seen else files))
        seen.add(real)


def _not_listed(error: OSError) -> None:
    """A folder that may not be looked into would be left out without a word."""
    raise error


def _card(folder: Path) -> str:
    path = folder / "README.md"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _saved(path: Path, name: str, how: DataSettings) -> Place | None:
    """What `save_to_disk` of `datasets` wrote, one split or several; None where the folder is something else."""
    several, one = (path / "dataset_dict.json").is_file(), (path / "state.json").is_file()
    if not several and not (one and (path / "dataset_info.json").is_file()):
        return None
    if how.config_name:
        raise InputNotFound(
            f"reading data {name!r} with --config-name: what save_to_disk wrote has no configurations. Leave it out."
        )
    if not several:
        if how.split:
            raise InputNotFound(
                f"reading data {name!r} with --split {how.split}: what save_to_disk wrote there is one split without a "
                "name. Leave --split out."
            )
        return Place(name, saved=str(path))
    splits = sorted(p.name for p in path.iterdir() if (p / "state.json").is_file())
    picked = choose_one(name, "split", splits, how.split, "--split", TRAIN)
    others = [split for split in splits if split != picked]
    said = f"{name}: reading split {picked}; not read: {', '.join(others)} (--split)." if others else ""
    return Place(name, saved=str(path / picked), said=said)


def _remote(data: str, name: str, how: DataSettings) -> Place:
    try:
        fs, root = fsspec.core.url_to_fs(data)
        if fs.isfile(root):
            return _by_itself(name, fs.unstrip_protocol(root))
        listing = {file[len(root) :].lstrip("/"): file for file in fs.find(root)}
        card = fs.cat_file(listing["README.md"]).decode(errors="replace") if "README.md" in listing else ""
    except InputNotFound:
        raise
    except FileNotFoundError as error:
        raise InputNotFound(f"reading data {name!r}: no such file or folder. Check the URL.") from error
    except Exception as error:  # each client raises its own
        raise InputNotFound(
            f"reading data {name!r}: the store did not give it ({one_line(str(error), 400)}). Check the URL."
        ) from error
    if not listing:
        raise InputNotFound(f"reading data {name!r}: no such file or folder. Check the URL.")
    return _chosen(data, name, listing, card, how, lambda _, file: str(fs.unstrip_protocol(listing[file])))


def open_saved(place: Place) -> Any:
    """The data set that `save_to_disk` wrote. Raises `InvalidData`."""
    from datasets import load_from_disk

    try:
        return load_from_disk(place.saved)
    except Exception as error:  # pyarrow's, json's and its own
        raise InvalidData(
            f"reading data {place.name!r}: it is not what save_to_disk of datasets wrote "
            f"({one_line(str(error), 200)}). Save it again."
        ) from error


def open_hub(place: Place, how: DataSettings, on_message: OnMessage) -> Any:
    """A data set of the Hub, one split of one configuration. Raises `InputNotFound` with all that there are."""
    from datasets import (
        get_dataset_config_names,
        get_dataset_default_config_name,
        get_dataset_split_names,
        load_dataset,
    )

    try:
        configs = get_dataset_config_names(place.hub_id)
        default = get_dataset_default_config_name(place.hub_id) or DEFAULT_CONFIG
        config = choose_one(place.name, "configuration", configs, how.config_name, "--config-name", default)
        splits = get_dataset_split_names(place.hub_id, config)
        split = choose_one(place.name, "split", splits, how.split, "--split", TRAIN)
        dataset: Any = load_dataset(place.hub_id, config, split=split, streaming=how.streaming)
    except InputNotFound:
        raise
    except Exception as error:  # the hub client raises many kinds
        line = one_line((str(error).strip().splitlines() or [type(error).__name__])[0], 400)
        raise InputNotFound(
            f"reading data {place.name!r}: no such file or folder, and the hub did not give it ({line}). "
            "Check the path, or the network."
        ) from error
    left = [f"split {name}" for name in splits if name != split] + [
        f"configuration {c}" for c in configs if c != config
    ]
    if left:
        on_message(f"{place.name}: reading split {split} of configuration {config}; not read: {', '.join(left)}.")
    return dataset
