"""The files that a finished cache is made of, exactly: for whoever copies one elsewhere.

Owns the list and the two files that change where the base's name must not go along. Must not copy, and does not check
the files of the shards: `verify` does.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .cache import read_commit, read_contents, read_manifest
from .files import open_files
from .identity import digest
from .index import npy_header
from .layout import CONTENTS, MANIFEST, TOKEN_GROUPS, commit_path, shard_path
from .manifest import Contents, Manifest, read_bytes, to_bytes


@dataclass(frozen=True)
class Inventory:
    """What a finished cache is made of."""

    manifest: Manifest
    contents: Contents
    #: Bytes of every file of it, by name, without manifest and contents.
    sizes: dict[str, int]

    def heads(self, model_name: str) -> dict[str, bytes]:
        """manifest.json and contents.json of the same cache with another name for its base, which decides nothing."""
        manifest = to_bytes(replace(self.manifest, model_name=model_name))
        return {MANIFEST: manifest, CONTENTS: to_bytes(replace(self.contents, manifest=digest(manifest)))}


def take_inventory(path: str | Path) -> Inventory:
    """What `contents.json` names, and nothing else that lies there. Raises what opening a cache raises."""
    files = open_files(path)
    manifest, contents = read_manifest(files), read_contents(files)
    sizes = {contents.index.name: contents.index.size}
    if manifest.capture.num_tail_groups:
        vocab_size = manifest.model.vocab_size
        sizes[TOKEN_GROUPS] = len(npy_header(np.dtype("u1"), vocab_size)) + vocab_size
    for number, entry in enumerate(contents.shards):
        commit = read_commit(files, manifest.identity_digest, contents, number)
        sizes |= {shard_path(commit.folder, file.name): file.size for file in commit.files}
        sizes[commit_path(entry.unit)] = len(read_bytes(files, commit_path(entry.unit)))
    return Inventory(manifest, contents, sizes)
