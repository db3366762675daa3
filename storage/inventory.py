"""The files that a finished cache is made of, exactly: for whoever copies one elsewhere.

Owns the list, and the files that change where the names of the base and of its data must not go along. Must not copy,
and does not check the files of the shards: `verify` does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .data_sets import record_name
from .files import open_files
from .heads import read_commit, read_contents, read_manifest
from .identity import digest
from .index import npy_header
from .layout import CONTENTS, MANIFEST, TOKEN_GROUPS, commit_path, shard_path
from .manifest import Contents, Manifest, read_bytes, to_bytes


@dataclass(frozen=True)
class Inventory:
    """What a finished cache is made of."""

    manifest: Manifest
    contents: Contents
    #: Bytes of every file of it, by name, without manifest, contents and the records of data sets.
    sizes: dict[str, int]

    @property
    def records(self) -> tuple[str, ...]:
        """The names of the records of data sets, as they lie here."""
        return tuple(record_name(entry.name) for entry in self.contents.data_sets)

    def heads(self, model_name: str, data_names: Mapping[str, str]) -> dict[str, bytes]:
        """What changes of the same cache where its base and its data sets have other names, which decide nothing:
        manifest.json, contents.json and the records of the data sets.

        data_names: of every data set, by the name it has; no two may be equal.
        """
        manifest = to_bytes(replace(self.manifest, model_name=model_name))
        renamed = [replace(entry, name=data_names[entry.name]) for entry in self.contents.data_sets]
        data_sets = tuple(sorted(renamed, key=lambda entry: entry.name))
        contents = replace(self.contents, manifest=digest(manifest), data_sets=data_sets)
        records = {record_name(entry.name): to_bytes(entry) for entry in data_sets}
        return {MANIFEST: manifest, CONTENTS: to_bytes(contents), **records}


def take_inventory(path: str | Path) -> Inventory:
    """What `contents.json` names, and nothing else that lies there. Raises what opening a cache raises."""
    files = open_files(path)
    manifest, contents = read_manifest(files), read_contents(files)
    sizes = {file.name: file.size for file in (contents.index, *(entry.file for entry in contents.data_sets))}
    if manifest.capture.num_tail_groups:
        vocab_size = manifest.model.vocab_size
        sizes[TOKEN_GROUPS] = len(npy_header(np.dtype("u1"), vocab_size)) + vocab_size
    for number, entry in enumerate(contents.shards):
        commit = read_commit(files, manifest.identity_digest, contents, number)
        sizes |= {shard_path(commit.folder, file.name): file.size for file in commit.files}
        sizes[commit_path(entry.unit)] = len(read_bytes(files, commit_path(entry.unit)))
    return Inventory(manifest, contents, sizes)
