"""What writers leave that were killed, or that were slower than another: no commit record and no contents name it.

Owns what is such, and its removal by who knows that nobody writes. A writer removes nothing of it: locks may stop at
the machine, and what looks left may be what a live writer on another one is about to name.
"""

from collections.abc import Collection, Iterator

from .data_sets import known_data_sets
from .errors import LinkRefused
from .files import Files
from .layout import (
    CONTENTS,
    SHARDS,
    commit_path,
    commit_units,
    is_data_file,
    is_index,
    is_shard_folder,
    is_temporary,
    shard_path,
)
from .manifest import Contents, ShardCommit, read_json


def find_leftovers(files: Files, folders: Collection[str]) -> tuple[str, ...]:
    """The names of unfinished files and folders, of shards without a commit record, of older indexes and
    data sets.

    folders: those that the commit records name. While writers are at work, what they are at is among these. A link of a
    temporary name is nobody's; raises `LinkRefused` for one of another name, and `CorruptCache` for bad contents.
    """
    return tuple(_leftovers(files, folders))


def remove_leftovers(files: Files) -> tuple[str, ...]:
    """Remove them, and return their names. No other process may write to the cache. Raises as `find_leftovers`."""
    units = commit_units(files.names(SHARDS))
    found = find_leftovers(files, {read_json(ShardCommit, files, commit_path(unit)).folder for unit in units})
    files.remove(*found)
    return found


def _leftovers(files: Files, folders: Collection[str]) -> Iterator[str]:
    contents = read_json(Contents, files, CONTENTS) if files.exists(CONTENTS) else None
    data_sets = (*(contents.data_sets if contents else ()), *known_data_sets(files))
    named = {contents.index.name if contents else "", *(entry.file.name for entry in data_sets)}
    for name in files.names(""):
        if is_temporary(name) and not _is_link(files, name):
            yield name
        elif (is_index(name) or is_data_file(name)) and name not in named:
            files.exists(name)
            yield name
    for name in files.names(SHARDS):
        path = shard_path(name)
        if is_temporary(name) and not _is_link(files, path):
            yield path
        elif is_shard_folder(name) and name not in folders:
            files.exists(path)
            yield path


def _is_link(files: Files, name: str) -> bool:
    try:
        files.exists(name)
    except LinkRefused:
        return True
    return False
