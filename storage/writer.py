"""`CacheWriter`: commit shards one by one, so that a process killed at any moment loses at most the shard in work.

A shard is written into staging/, synced, read back and compared, renamed to shards/<unit>/, and only then committed by
shards/<unit>.json, created only if absent. `finalize` writes contents.json; before it, readers see no cache, and after
it, exactly what it lists. One writer at a time, by a lock that dies with its process. POSIX only.
"""

import fcntl
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from .backend import corrupt, describe_files
from .cache import BACKENDS, CONTENTS, MANIFEST, SHARDS, OpenShard, read_manifest
from .encoding import encode
from .errors import CacheLocked, IdentityMismatch, InvalidRecord, NotACache
from .identity import digest, digest_json, sample_id
from .manifest import Contents, Manifest, ShardCommit, ShardEntry, read_json, to_bytes
from .records import CachedSample, check_record

STAGING, LOCK = "staging", "writer.lock"


class CacheWriter:
    """Writes a new cache or goes on with an interrupted or finished one of the same identity.

    Use as a context manager: it holds the writer's lock. Raises `IdentityMismatch` where the folder holds another
    cache (which is left as it is), `NotACache` where it holds other files, `CacheLocked`, `OSError`.
    """

    def __init__(self, path: str | Path, manifest: Manifest) -> None:
        self.path = Path(path)
        _matching_manifest(self.path, manifest)
        (self.path / SHARDS).mkdir(parents=True, exist_ok=True)
        self._lock = _take_lock(self.path / LOCK)
        try:
            self.manifest = _matching_manifest(self.path, manifest)  # again: another writer may have been first
            self._remove_leftovers()
            if not (self.path / MANIFEST).exists():
                _commit_file(self.path / MANIFEST, to_bytes(self.manifest))
        except BaseException:
            self.close()
            raise
        self._commits = {path.stem for path in (self.path / SHARDS).glob("*.json")}
        self._attempts = 0

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let the lock go. What is committed stays."""
        os.close(self._lock)

    @property
    def is_final(self) -> bool:
        """Whether the contents list every committed shard."""
        if not (self.path / CONTENTS).exists():
            return False
        return {e.unit for e in read_json(Contents, self.path / CONTENTS).shards} == self._commits

    def captured(self) -> dict[bytes, NDArray[np.int32]]:
        """The positions captured so far, by sample id, from every committed shard."""
        found: dict[bytes, list[NDArray[np.int32]]] = {}
        for unit in sorted(self._commits):
            shard = OpenShard(self.path, self.manifest, self._read_commit(unit))
            for row in range(len(shard)):
                found.setdefault(shard.sample_id(row), []).append(shard.positions(row))
        return {key: np.unique(np.concatenate(parts)) for key, parts in found.items()}

    def commit(self, samples: Sequence[CachedSample]) -> ShardCommit:
        """Write one shard and commit it. A shard that is already committed is left as it is.

        Raises `InvalidRecord` before anything is written, `CorruptCache` where the disk returns other bytes than
        were written, `OSError` where it refuses them.
        """
        self._check(samples)
        unit = unit_id(samples)
        if unit in self._commits:
            return self._read_commit(unit)
        shutil.rmtree(self.path / STAGING, ignore_errors=True)  # of a commit that failed
        self._attempts += 1  # a folder of its own: Zarr's threads may go on writing into that of a failed commit
        staging, final = self.path / STAGING / str(self._attempts), self.path / SHARDS / unit
        staging.mkdir(parents=True)
        commit = self._write(staging, unit, samples)
        if final.exists():  # renamed by a commit of this writer that failed
            shutil.rmtree(final)
        staging.rename(final)
        _sync_folder(final.parent)
        self._read_back(commit, samples)
        _commit_file(self.path / SHARDS / f"{unit}.json", to_bytes(commit))
        self._commits.add(unit)
        return commit

    def finalize(self) -> Contents:
        """Make the committed shards the contents of the cache, in one atomic step."""
        entries = []
        for unit in sorted(self._commits):
            entries.append(ShardEntry(unit, digest((self.path / SHARDS / f"{unit}.json").read_bytes())))
        contents = Contents(digest((self.path / MANIFEST).read_bytes()), tuple(entries))
        temporary = self.path / _temporary(CONTENTS)
        _write_synced(temporary, to_bytes(contents))
        temporary.replace(self.path / CONTENTS)
        _sync_folder(self.path)
        shutil.rmtree(self.path / STAGING, ignore_errors=True)
        return contents

    def _remove_leftovers(self) -> None:
        """Remove what a killed run left: nothing of it was committed, or it is a second name of what was."""
        shutil.rmtree(self.path / STAGING, ignore_errors=True)
        temporary = [self.path / _temporary(name) for name in (MANIFEST, CONTENTS)]
        for path in [*temporary, *(self.path / SHARDS).glob(_temporary("*.json"))]:
            path.unlink(missing_ok=True)
        for folder in (self.path / SHARDS).iterdir():  # renamed by a run that died before its commit
            if folder.is_dir() and not folder.with_suffix(".json").exists():
                shutil.rmtree(folder)

    def _check(self, samples: Sequence[CachedSample]) -> None:
        if not samples:
            raise InvalidRecord(f"writing to {self.path}: expected samples for a shard, found none.")
        top_k = self.manifest.capture.top_k
        for sample in samples:
            where, record = f"sample {sample_id(sample.token_ids).hex()}", sample.logprobs
            check_record(record, sample.token_ids, self.manifest.model.vocab_size, where)
            if not len(record) or record.num_alternatives != top_k:
                found = record.alternative_ids.shape
                raise InvalidRecord(f"alternative_ids in {where}: expected one row or more of {top_k}, found {found}.")

    def _write(self, folder: Path, unit: str, samples: Sequence[CachedSample]) -> ShardCommit:
        table, columns = encode(samples)
        blocks = BACKENDS[self.manifest.store].write(folder, table, columns)
        for item in folder.rglob("*"):
            _sync_folder(item) if item.is_dir() else _sync_file(item)
        _sync_folder(folder)
        return ShardCommit(
            unit=unit,
            num_samples=len(samples),
            num_positions=int(table.num_positions.sum()),
            num_tokens=int(table.num_tokens.sum()),
            num_tokens_cut=int(table.num_tokens_cut.sum()),
            kept_mass=float(sum(s.logprobs.kept_mass().sum() for s in samples)),
            files=describe_files(folder),
            blocks=blocks,
        )

    def _read_back(self, commit: ShardCommit, samples: Sequence[CachedSample]) -> None:
        shard = OpenShard(self.path, self.manifest, commit)
        for row, sample in enumerate(samples):
            same_tokens = np.array_equal(shard.token_ids(row), sample.token_ids)
            if not (same_tokens and shard.read(row).equals(sample.logprobs)):
                raise corrupt(shard.where, f"sample {row} reads back other than it was written")

    def _read_commit(self, unit: str) -> ShardCommit:
        return read_json(ShardCommit, self.path / SHARDS / f"{unit}.json")


def unit_id(samples: Sequence[CachedSample]) -> str:
    """The name of a shard: a hash of its samples and their positions, so that repeated work meets itself."""
    return digest_json([[sample_id(s.token_ids).hex(), s.logprobs.positions.tolist()] for s in samples])


def _matching_manifest(path: Path, manifest: Manifest) -> Manifest:
    if not (path / MANIFEST).exists():
        names = (SHARDS, LOCK, _temporary(MANIFEST))  # what a run leaves that was killed before it had a manifest
        foreign = path.exists() and any(p.name not in names for p in path.iterdir())
        if foreign or any((path / SHARDS).glob("*")):
            raise NotACache(
                f"writing to {path}: expected an empty folder or a cache, found other files. "
                "Nothing was changed. Choose another folder."
            )
        return manifest
    existing = read_manifest(path)
    differences = manifest.differences(existing)
    if differences:
        raise IdentityMismatch(
            f"writing to {path}: it holds a cache of another identity ({'; '.join(differences)}). "
            "Nothing was changed. Choose another folder, or use the settings of that cache."
        )
    return existing


def _take_lock(path: Path) -> int:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise CacheLocked(
            f"writing to {path.parent}: another process is writing to this cache. Wait for it to end, or stop it."
        ) from None
    return handle


def _temporary(name: str) -> str:
    """The name of a file until it is whole."""
    return f"{name}.new"


def _commit_file(path: Path, data: bytes) -> None:
    """Create a file with these bytes, all or nothing, unless it exists: the first one wins."""
    temporary = path.with_name(_temporary(path.name))
    _write_synced(temporary, data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return
    finally:
        temporary.unlink()
    _sync_folder(path.parent)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _sync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_sync_folder = _sync_file
