"""What stands at the head of a cache: its manifest, contents, commit records and partition, read and held together.

Owns which of them must agree, and the refusal where they do not: a record is of the manifest's identity and of the unit
that its name says, contents are of this manifest, a partition is the one that the manifest names. Must not open shards.
"""

from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .backend import corrupt
from .errors import CorruptCache, IdentityMismatch, IncompleteCache, NotACache
from .files import Files, how_missing, open_files
from .identity import digest
from .index import npy_header
from .layout import CONTENTS, MANIFEST, SHARDS, TOKEN_GROUPS, commit_path, commit_units
from .manifest import MAX_VOCAB_SIZE, Contents, Manifest, ShardCommit, from_bytes, read_bytes, read_json


def read_manifest(files: Files) -> Manifest:
    """The manifest of the cache in this folder. Raises `NotACache` where there is none."""
    if not files.exists(MANIFEST):
        if committed := len(commit_units(files.names(SHARDS))):
            raise NotACache(
                f"opening {files.root}: expected {MANIFEST}, found {committed} committed shards and none: nothing else "
                "says what they are of. Run the same `logitcache precompute`, which writes it again, or `logitcache "
                "repair --manifest-from` another cache of that base and capture."
            )
        found = f"no {MANIFEST} in it" if files.names("") else "no such folder, or an empty one"
        raise NotACache(
            f"opening {files.root}: expected a logit cache, found {found}. Make one with `logitcache precompute`."
        )
    return read_json(Manifest, files, MANIFEST)


def read_contents(files: Files) -> Contents:
    """The contents of a finished cache. Raises `IncompleteCache` where precompute did not finish."""
    if not files.exists(CONTENTS):
        committed = len(commit_units(files.names(SHARDS)))
        raise IncompleteCache(
            f"opening {files.root}: what writes it was interrupted after {committed} committed shards, or is at work. "
            "Nothing is lost: run the same command again (`logitcache precompute`, merge or convert); it goes on there."
        )
    contents = read_json(Contents, files, CONTENTS)
    if digest(read_bytes(files, MANIFEST)) != contents.manifest:
        raise corrupt(f"{files.root}/{MANIFEST}", "it is not the manifest that this cache was finished with")
    return contents


def stored_token_groups(path: str | Path) -> NDArray[np.uint8] | None:
    """uint8 [V], the partition that a cache at this path was begun with, finished or not; None where there is none."""
    files = open_files(path)
    if not files.exists(MANIFEST):
        return _lost_token_groups(files)
    manifest = read_manifest(files)
    return read_token_groups(files, manifest) if manifest.capture.num_tail_groups else None


def _lost_token_groups(files: Files) -> NDArray[np.uint8] | None:
    """The partition of a cache that lost its manifest, whose records will say whether it is theirs."""
    if not commit_units(files.names(SHARDS)) or not files.exists(TOKEN_GROUPS):
        return None
    data, overhead = files.read(TOKEN_GROUPS, 2 * MAX_VOCAB_SIZE), len(npy_header(np.dtype("u1"), 0))
    is_partition = data[:overhead] == npy_header(np.dtype("u1"), max(0, len(data) - overhead))
    return np.frombuffer(data, dtype=np.uint8, offset=overhead) if is_partition else None


def read_token_groups(files: Files, manifest: Manifest) -> NDArray[np.uint8]:
    """The partition of the vocabulary that the manifest names by its checksum. Raises `CorruptCache`."""
    vocab_size, where = manifest.model.vocab_size, f"{files.root}/{TOKEN_GROUPS}"
    header = npy_header(np.dtype("u1"), vocab_size)
    try:
        data = files.read(TOKEN_GROUPS, len(header) + vocab_size)
    except FileNotFoundError as error:
        raise corrupt(where, how_missing(error)) from error
    groups = np.frombuffer(data, dtype=np.uint8, offset=min(len(header), len(data)))
    capture = manifest.capture
    is_it = data[: len(header)] == header and digest(groups.tobytes()) == capture.tail_partition
    if not is_it or int(groups.max()) >= capture.num_tail_groups:
        raise corrupt(where, f"it is not the partition {capture.tail_partition} of {vocab_size} tokens")
    return groups


def read_commit(files: Files, identity: str, contents: Contents, number: int) -> ShardCommit:
    """`read_record` of a shard that the contents list, with the checksum that they say."""
    entry = contents.shards[number]
    commit, checksum = read_record(files, identity, entry.unit)
    if checksum != entry.checksum:
        where = f"{files.root}/{commit_path(entry.unit)}"
        raise corrupt(where, f"expected checksum {entry.checksum}, found {checksum}")
    return commit


def read_record(files: Files, identity: str, unit: str) -> tuple[ShardCommit, str]:
    """The commit record of a unit and its checksum. identity: `Manifest.identity_digest` of the cache.

    Raises `CorruptCache` where it is missing or damaged, of another unit, or of a cache of another identity.
    """
    name = commit_path(unit)
    data, where = read_bytes(files, name), f"{files.root}/{name}"
    commit = from_bytes(ShardCommit, data, where)
    if commit.identity != identity:
        fact = f"{where}: expected identity {identity}, found {commit.identity}, of another base or capture"
        raise CorruptCache(
            f"reading {fact}. Its shard answers for another cache, and is not read. Run `logitcache repair`, which "
            "drops it, and then the same command again.",
            fact,
        )
    if commit.unit != unit:
        raise corrupt(where, f"expected unit {unit}, found {commit.unit}")
    return commit, digest(data)


def check_lost_manifest(files: Files, manifest: Manifest) -> None:
    """Raise `IdentityMismatch` unless this could be the manifest that a cache lost: its records are of that identity.

    A record that cannot be read says nothing, but some must say it.
    """
    expected, found = manifest.identity_digest, ""
    for unit in commit_units(files.names(SHARDS)):
        with suppress(CorruptCache):
            found = read_json(ShardCommit, files, commit_path(unit)).identity
            if found != expected:
                break
    if found != expected:
        found = f"{commit_path(unit)} of identity {found}" if found else "no commit record that can be read"
        raise IdentityMismatch(
            f"writing {files.root}/{MANIFEST} again: expected shards of identity {expected}, that of what is to be "
            f"written, found {found}. Nothing was changed. Use the base and the settings that the cache was made with."
        )
