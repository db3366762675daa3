"""`LogitCache`: open a cache from its path alone, and look samples up by their tokens.

Owns the index from content to place. Every answer is checked on the way out: the tokens of a hit are compared one by
one, the bytes with their checksums, the record with its invariants. Must not write.
Trade-off: the index and the token ids are read at open (about 2 bytes a token on disk), log-probabilities on lookup.
"""

from bisect import bisect
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .arrow_backend import ArrowBackend
from .backend import Backend, ShardReader, corrupt
from .encoding import decode
from .errors import IncompleteCache, InvalidRecord, NotACache, PositionNotCaptured, SampleNotCached
from .identity import digest, sample_id
from .manifest import Contents, Manifest, ShardCommit, from_bytes, read_bytes, read_json, to_bytes
from .records import BaseLogprobs, CachedSample, check_record, concatenate
from .zarr_backend import ZarrBackend

MANIFEST, CONTENTS, SHARDS = "manifest.json", "contents.json", "shards"
BACKENDS: dict[str, Backend] = {"zarr": ZarrBackend(), "arrow": ArrowBackend()}


class OpenShard:
    """A committed shard: its samples in memory, its log-probabilities on disk."""

    def __init__(self, root: Path, manifest: Manifest, commit: ShardCommit) -> None:
        self.commit = commit
        self.where = f"{root / SHARDS / commit.unit}"
        self._vocab_size = manifest.model.vocab_size
        folder = root / SHARDS / commit.unit
        self._reader: ShardReader = BACKENDS[manifest.store].open(folder, commit, manifest.capture.top_k)
        self.table = self._reader.table()
        counts = (len(self.table), int(self.table.num_positions.sum()), int(self.table.num_tokens.sum()))
        lengths = (len(self.table.positions), len(self.table.token_ids))
        if counts[1:] != lengths or counts != (commit.num_samples, commit.num_positions, commit.num_tokens):
            raise corrupt(folder, f"the sample table counts {counts}, its commit says otherwise")
        self._tokens, self._rows = self.table.token_slices(), self.table.position_slices()

    def __len__(self) -> int:
        return len(self.table)

    def sample_id(self, row: int) -> bytes:
        """The id of a sample of this shard."""
        return bytes(self.table.sample_ids[row])

    def token_ids(self, row: int) -> NDArray[np.uint32]:
        """Its tokens."""
        return self.table.token_ids[self._tokens[row]]

    def positions(self, row: int) -> NDArray[np.int32]:
        """Its captured positions."""
        return self.table.positions[self._rows[row]]

    def read(self, row: int) -> BaseLogprobs:
        """Its record, checked. Raises `CorruptCache`."""
        tokens, positions = self.token_ids(row), self.positions(row)
        where = f"{self.where}, sample {self.sample_id(row).hex()}"
        if np.any(positions < 0) or np.any(positions >= len(tokens) - 1):
            raise corrupt(where, "a position lies outside the sample")
        record = decode(self._reader.rows(self._rows[row]), positions, tokens)
        try:
            check_record(record, tokens, self._vocab_size, where)
        except InvalidRecord as error:
            raise corrupt(where, str(error)) from error
        return record


Place = tuple[int, int]
"""Shard and row of a sample."""


class LogitCache:
    """A finished cache, open for reading.

    >>> cache = LogitCache.open("cache/")                      # doctest: +SKIP
    >>> record = cache.lookup(token_ids)                       # doctest: +SKIP
    """

    def __init__(self, path: Path, manifest: Manifest, shards: list[OpenShard]) -> None:
        self.path, self.manifest, self.shards = path, manifest, shards
        self._places: dict[bytes, list[Place]] = {}
        for s, shard in enumerate(shards):
            for row in range(len(shard)):
                self._places.setdefault(shard.sample_id(row), []).append((s, row))
        self._first = [places[0] for places in self._places.values()]
        self._sorted: list[tuple[bytes, Place]] | None = None

    @classmethod
    def open(cls, path: str | Path) -> "LogitCache":
        """The cache in this folder.

        Raises `NotACache`, `IncompleteCache` (precompute did not finish), `UnsupportedFormat`, `CorruptCache`.
        """
        root = Path(path)
        manifest = read_manifest(root)
        commits = read_contents(root)
        return cls(root, manifest, [OpenShard(root, manifest, commit) for commit in commits])

    def __len__(self) -> int:
        """Number of different samples."""
        return len(self._first)

    @property
    def num_positions(self) -> int:
        """Number of stored records."""
        return sum(shard.commit.num_positions for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        """Number of stored tokens, supervised or not."""
        return sum(shard.commit.num_tokens for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.commit.num_bytes for shard in self.shards)

    @property
    def contents_checksum(self) -> str:
        """Checksum of the commit records, and through them of every byte of the shards: equal for equal contents."""
        return digest(b"".join(to_bytes(shard.commit) for shard in self.shards))

    def sample(self, index: int) -> CachedSample:
        """The sample with this index, 0 to len - 1, in an order that the contents fix."""
        s, row = self._first[index]
        shard = self.shards[s]
        cut = int(shard.table.num_tokens_cut[row])
        return CachedSample(shard.token_ids(row), self._record(shard.sample_id(row)), cut)

    def samples(self) -> Iterator[CachedSample]:
        """All samples, in order."""
        return (self.sample(i) for i in range(len(self)))

    def token_ids(self, index: int) -> NDArray[np.uint32]:
        """The tokens of a sample, without reading its record."""
        s, row = self._first[index]
        return self.shards[s].token_ids(row)

    def positions(self, index: int) -> NDArray[np.int32]:
        """The captured positions of a sample, without reading its record."""
        s, row = self._first[index]
        return self._positions_of(self.shards[s].sample_id(row))

    def lookup(self, token_ids: NDArray[np.integer], positions: NDArray[np.integer] | None = None) -> BaseLogprobs:
        """The record of a sample, found by its tokens.

        token_ids: [n] of a cached sample or of a causal prefix of one (the base's predictions at positions that both
        have are the same). positions: which ones, in ascending order; by default every captured position whose label
        is inside token_ids. Raises `SampleNotCached`, `PositionNotCaptured`, `CorruptCache`.
        """
        tokens = _as_tokens(token_ids)
        record = self._record(self._find(tokens))
        if positions is None:
            return record.take(np.flatnonzero(record.positions + 1 < len(tokens)))
        return record.take(self._rows_of(record.positions, np.asarray(positions), tokens))

    def require(self, token_ids: NDArray[np.integer], positions: NDArray[np.integer]) -> None:
        """Raise what `lookup` would raise for a sample that is not there, without reading any record."""
        tokens = _as_tokens(token_ids)
        self._rows_of(self._positions_of(self._find(tokens)), np.asarray(positions), tokens)

    def _rows_of(
        self, captured: NDArray[np.int32], wanted: NDArray[np.integer], tokens: NDArray[np.uint32]
    ) -> NDArray[np.intp]:
        rows = np.searchsorted(captured, wanted)
        found = rows < len(captured)
        found[found] = captured[rows[found]] == wanted[found]
        found &= wanted < len(tokens) - 1
        if not np.all(found):
            missing = wanted[~found]
            raise PositionNotCaptured(
                f"looking up sample {sample_id(tokens).hex()} in {self.path}: position {int(missing[0])} and "
                f"{len(missing) - 1} more were not captured (not supervised when the cache was made). "
                "Precompute this data into the cache to add them."
            )
        return rows

    def __contains__(self, token_ids: NDArray[np.integer]) -> bool:
        try:
            self._find(_as_tokens(token_ids))
        except SampleNotCached:
            return False
        return True

    def _positions_of(self, key: bytes) -> NDArray[np.int32]:
        return np.unique(np.concatenate([self.shards[s].positions(row) for s, row in self._places[key]]))

    def _record(self, key: bytes) -> BaseLogprobs:
        parts = [self.shards[s].read(row) for s, row in self._places[key]]
        return parts[0] if len(parts) == 1 else concatenate(parts)

    def _find(self, tokens: NDArray[np.uint32]) -> bytes:
        key = sample_id(tokens)
        places = self._places.get(key)
        if places is not None:
            s, row = places[0]
            if not np.array_equal(self.shards[s].token_ids(row), tokens):
                raise corrupt(self.shards[s].where, f"sample {key.hex()} holds other tokens than its id says")
            return key
        return self._find_prefix(tokens)

    def _find_prefix(self, tokens: NDArray[np.uint32]) -> bytes:
        """A cached sample that starts with these tokens: one of the two neighbours in lexicographic order."""
        if self._sorted is None:
            keyed = ((self.shards[s].token_ids(row), (s, row)) for s, row in self._first)
            self._sorted = sorted((_sort_key(t), place) for t, place in keyed)
        if not self._sorted:
            raise SampleNotCached(f"looking up a sample of {len(tokens)} tokens in {self.path}: it holds no samples.")
        wanted = _sort_key(tokens)
        at = bisect(self._sorted, wanted, key=lambda entry: entry[0])
        best = max(self._sorted[max(at - 1, 0) : at + 1], key=lambda entry: _common(entry[0], wanted))
        s, row = best[1]
        shared = _common(best[0], wanted)
        if shared == len(tokens):
            return self.shards[s].sample_id(row)
        raise SampleNotCached(self._departure(tokens, shared, s, row))

    def _departure(self, tokens: NDArray[np.uint32], shared: int, shard: int, row: int) -> str:
        nearest = self.shards[shard].token_ids(row)
        there = f"token {nearest[shared]}" if shared < len(nearest) else f"its end after {len(nearest)} tokens"
        return (
            f"looking up a sample of {len(tokens)} tokens in {self.path}: not cached. The nearest cached sample, "
            f"{self.shards[shard].sample_id(row).hex()}, departs at token {shared}: expected token {tokens[shared]}, "
            f"found {there}. The data, tokenizer, chat template or truncation is not that of the cache. "
            "Precompute this data, or train without --data on the samples of the cache."
        )


def read_manifest(root: Path) -> Manifest:
    """The manifest of the cache in this folder. Raises `NotACache` where there is none."""
    if not (root / MANIFEST).is_file():
        found = "no manifest.json in it" if root.is_dir() else "no such folder"
        raise NotACache(
            f"opening {root}: expected a logit cache, found {found}. Make one with `logitcache precompute`."
        )
    return read_json(Manifest, root / MANIFEST)


def read_contents(root: Path) -> list[ShardCommit]:
    """The committed shards of a finished cache. Raises `IncompleteCache` where precompute did not finish."""
    if not (root / CONTENTS).is_file():
        committed = len(list((root / SHARDS).glob("*.json")))
        raise IncompleteCache(
            f"opening {root}: precompute was interrupted after {committed} committed shards. "
            "Nothing is lost: run the same `logitcache precompute` again and it goes on from there."
        )
    contents = read_json(Contents, root / CONTENTS)
    if digest(read_bytes(root / MANIFEST)) != contents.manifest:
        raise corrupt(root / MANIFEST, "it is not the manifest that this cache was finished with")
    commits = []
    for entry in contents.shards:
        path = root / SHARDS / f"{entry.unit}.json"
        data = read_bytes(path)
        if digest(data) != entry.checksum:
            raise corrupt(path, f"expected checksum {entry.checksum}, found {digest(data)}")
        commit = from_bytes(ShardCommit, data, str(path))
        if commit.unit != entry.unit:
            raise corrupt(path, f"expected unit {entry.unit}, found {commit.unit}")
        commits.append(commit)
    return commits


def _as_tokens(token_ids: NDArray[np.integer]) -> NDArray[np.uint32]:
    array = np.asarray(token_ids)
    if array.ndim != 1 or array.dtype.kind not in "iu" or np.any((array < 0) | (array >= 2**32)):
        raise ValueError(f"token_ids: expected a 1-D array of integers in [0, 2^32), found {array.dtype} {array.shape}")
    return array.astype(np.uint32)


def _sort_key(tokens: NDArray[np.uint32]) -> bytes:
    """Bytes whose order is the lexicographic order of the tokens."""
    return tokens.astype(">u4").tobytes()


def _common(a: bytes, b: bytes) -> int:
    """Number of tokens two keys share at their start."""
    n = min(len(a), len(b)) // 4
    x, y = np.frombuffer(a, ">u4", count=n), np.frombuffer(b, ">u4", count=n)
    differs = np.flatnonzero(x != y)
    return int(differs[0]) if len(differs) else n
