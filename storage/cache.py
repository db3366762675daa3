"""`LogitCache`: open a cache from its path alone, and look samples up by their tokens.

Owns the way from content to record. Every answer is checked on the way out: the tokens of a hit are compared one by
one, the bytes with their checksums, the rows with their invariants. Must not write.
Trade-off: the index is read at open (32 bytes a sample), everything else on lookup; only a miss, or a prefix, reads the
tokens of the whole cache, once (4 bytes a token in memory). Threads need no lock, which a fork could leave held: what
is kept for later is put in place whole, by whoever was last.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backend import corrupt
from .data_sets import DataSet, read_data_set
from .errors import CorruptCache, PositionNotCaptured, SampleNotCached
from .files import Files, open_files
from .heads import read_commit, read_contents, read_manifest, read_token_groups
from .identity import digest, sample_id
from .index import SampleIndex
from .layout import shard_path
from .manifest import (
    Contents,
    DataSetEntry,
    Manifest,
)
from .prefixes import Prefixes
from .records import BaseLogprobs, CachedSample, narrow, unite
from .shard import OpenShard, StoredSample, checked_record

MAX_OPEN_SHARDS = 4096
"""Shards whose commit records are kept in memory, some 30 kB each."""

SAMPLES_A_READ = 64
"""Samples that `samples` reads at once."""


class LogitCache:
    """A finished cache, open for reading. One may be used by several threads at once, and in forked and spawned
    processes.

    >>> cache = LogitCache.open("cache/")                      # doctest: +SKIP
    >>> record = cache.lookup(token_ids)                       # doctest: +SKIP
    """

    def __init__(self, files: Files, manifest: Manifest, contents: Contents, index: SampleIndex) -> None:
        self.path, self.manifest = files.root, manifest
        self._files, self._contents, self._index = files, contents, index
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._prefixes: Prefixes | None = None
        self._token_groups: NDArray[np.uint8] | None = None

    @classmethod
    def open(cls, path: str | Path) -> "LogitCache":
        """The cache in this folder, or at this URL of fsspec.

        Raises `NotACache`, `IncompleteCache` (precompute did not finish), `UnsupportedFormat`, `CorruptCache`.
        """
        files = open_files(path)
        manifest = read_manifest(files)
        contents = read_contents(files)
        while True:
            try:
                return cls(files, manifest, contents, SampleIndex.read(files, contents))
            except CorruptCache:
                newer = read_contents(files)  # a writer that finishes now removes the index of the contents before
                if newer == contents:
                    raise
                contents = newer

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict(), "_prefixes": None, "_token_groups": None}

    def __len__(self) -> int:
        """Number of different samples."""
        return len(self._index.distinct)

    @property
    def num_positions(self) -> int:
        """Number of stored records."""
        return self._index.num_positions

    @property
    def num_tokens(self) -> int:
        """Number of stored tokens, supervised or not."""
        return self._index.num_tokens

    @property
    def num_bytes(self) -> int:
        """Size of all shards. Reads their commit records."""
        return sum(shard.commit.num_bytes for shard in self.shards())

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self._contents.shards)

    @property
    def contents_checksum(self) -> str:
        """Checksum of the commit records, and through them of every byte of the shards: equal for equal contents."""
        return digest("".join(entry.unit + entry.checksum for entry in self._contents.shards).encode())

    @property
    def data_sets(self) -> tuple[DataSetEntry, ...]:
        """The data sets it was filled with, as they are now, in the order of their names."""
        return self._contents.data_sets

    def data_set(self, entry: DataSetEntry) -> DataSet:
        """Samples and positions of one of them. Raises `CorruptCache`."""
        return read_data_set(self._files, entry)

    def token_groups(self) -> NDArray[np.uint8] | None:
        """uint8 [V], the tail group of each token of the vocabulary; None where the tail is not split."""
        if not self.manifest.capture.num_tail_groups:
            return None
        return read_token_groups(self._files, self.manifest)

    def shards(self) -> Iterator[OpenShard]:
        """The shards, in order."""
        return (self._shard(number) for number in range(self.num_shards))

    def shards_of(self, keys: Iterable[bytes]) -> Iterator[OpenShard]:
        """The shards that hold some sample of these ids, in order."""
        numbers = {self._index.shard(number) for key in keys for number in self._index.find(key)}
        return (self._shard(number) for number in sorted(numbers))

    def chat_templates(self, keys: Iterable[bytes] | None = None) -> frozenset[str]:
        """Digests of the chat templates that rendered samples, of all shards or of those that hold some of these ids.

        Reads their commit records.
        """
        shards = self.shards() if keys is None else self.shards_of(keys)
        return frozenset(shard.commit.chat_template for shard in shards) - {""}

    def is_captured_again(self, key: bytes) -> bool:
        """Whether the sample of this id stands in the cache more than once, with other positions or the same."""
        return len(self._index.find(key)) > 1

    def sample_id(self, index: int) -> bytes:
        """The id of the sample with this index, without reading it."""
        return self._index.sample_id(int(self._index.distinct[index]))

    def sample(self, index: int) -> CachedSample:
        """The sample with this index, 0 to len - 1, in an order that the contents fix."""
        return self._samples([int(self._index.distinct[index])])[0]

    def samples(self) -> Iterator[CachedSample]:
        """All samples, in order."""
        numbers = iter(self._index.distinct.tolist())
        while part := list(islice(numbers, SAMPLES_A_READ)):
            yield from self._samples(part)

    def stored_samples(self) -> Iterator[StoredSample]:
        """Tokens, captured positions and chat template of all samples, in order, without reading records."""
        for number, group in groupby(self._index.distinct.tolist(), key=self._index.shard):
            shard = self._shard(number)
            table, template = shard.table(), shard.commit.chat_template
            for row in group:
                place = self._index.place(row)
                tokens, positions = table.token_ids[place.tokens], table.positions[place.positions]
                yield self._united(row, StoredSample(tokens, positions, template))

    def lookup(
        self,
        token_ids: NDArray[np.integer],
        positions: NDArray[np.integer] | None = None,
        top_k: int | None = None,
    ) -> BaseLogprobs:
        """The record of a sample, found by its tokens.

        token_ids: [n] of a cached sample, or, where there is none of just these, of a causal prefix of cached samples
        (the base's predictions at positions that all have are the same). positions: which ones, in ascending order; by
        default every captured position whose label is inside token_ids. top_k: alternatives a row, 0 to K, by default
        K; the others are in the tail, and in its groups, as in a capture of so many. Raises `SampleNotCached`,
        `PositionNotCaptured`, `CorruptCache`; ValueError for a top_k above K, or below where the cache has draws.
        """
        return self.lookup_batch([token_ids], None if positions is None else [positions], top_k)[0]

    def lookup_batch(
        self,
        token_ids: Sequence[NDArray[np.integer]],
        positions: Sequence[NDArray[np.integer]] | None = None,
        top_k: int | None = None,
    ) -> list[BaseLogprobs]:
        """`lookup` of several samples, which costs less than one after the other."""
        groups = None if top_k is None else self._groups_to_narrow(top_k)
        asked = [_as_tokens(tokens) for tokens in token_ids]
        captures = [self._find(tokens) for tokens in asked]
        numbers = sorted({number for capture in captures for number in capture})
        stored = self._stored(numbers)
        records = dict(zip(numbers, self._records(numbers, stored), strict=True))
        found = []
        for i, (tokens, capture) in enumerate(zip(asked, captures, strict=True)):
            for number in capture:
                self._compare(tokens, stored[number], number)
            record = unite([records[number] for number in capture])
            wanted = None if positions is None else np.asarray(positions[i])
            selected = self._select(record, wanted, tokens)
            found.append(selected if top_k is None else narrow(selected, top_k, groups))
        return found

    def _groups_to_narrow(self, top_k: int) -> NDArray[np.uint8] | None:
        """What narrowing needs beside records. Raises ValueError where they cannot be narrowed to this width."""
        capture = self.manifest.capture
        if not 0 <= top_k <= capture.top_k:
            raise ValueError(
                f"looking up {top_k} alternatives in {self.path}: expected 0 to {capture.top_k}, all that it holds. "
                "What was not captured cannot be had. Ask for fewer, or precompute with a larger --top-k."
            )
        if top_k < capture.top_k and capture.num_tail_samples:
            raise ValueError(
                f"looking up {top_k} of {capture.top_k} alternatives in {self.path}: expected a cache without draws "
                f"from the tail, found {capture.num_tail_samples}. They are of the tail without all its alternatives. "
                "Look up all of them, or precompute without draws."
            )
        if self._token_groups is None and top_k < capture.top_k:
            self._token_groups = self.token_groups()
        return self._token_groups

    def require(self, token_ids: NDArray[np.integer], positions: NDArray[np.integer]) -> None:
        """Raise what `lookup` would raise for a sample that is not there, without reading any record."""
        self.require_all([token_ids], [positions])

    def require_all(self, token_ids: Sequence[NDArray[np.integer]], positions: Sequence[NDArray[np.integer]]) -> None:
        """`require` of many samples, in the order in which they are stored, whatever order they are given in."""
        asked = [_as_tokens(tokens) for tokens in token_ids]
        captures = [self._find(tokens) for tokens in asked]
        order = iter(sorted(range(len(asked)), key=lambda i: captures[i][0]))
        while part := list(islice(order, SAMPLES_A_READ)):
            stored = self._stored(sorted({number for i in part for number in captures[i]}))
            for i in part:
                for number in captures[i]:
                    self._compare(asked[i], stored[number], number)
                captured = np.unique(np.concatenate([stored[number].positions for number in captures[i]]))
                self._rows_of(captured, np.asarray(positions[i]), asked[i])

    def __contains__(self, token_ids: NDArray[np.integer]) -> bool:
        try:
            self._find(_as_tokens(token_ids))
        except SampleNotCached:
            return False
        return True

    def _shard(self, number: int) -> OpenShard:
        shard = self._open.get(number)
        if shard is None:
            commit = read_commit(self._files, self.manifest.identity_digest, self._contents, number)
            found = self._index.counts(number)
            if found != (commit.num_samples, commit.num_positions, commit.num_tokens):
                raise corrupt(f"{self.path}/{self._contents.index.name}", "its counts are not those of the shards")
            shard = OpenShard(self._files, self.manifest, commit, shard_path(commit.folder))
            self._open[number] = shard
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
        return shard

    def _by_shard(self, numbers: Sequence[int]) -> Iterator[tuple[OpenShard, list[int]]]:
        """Ascending numbers, shard by shard."""
        for shard, group in groupby(numbers, key=self._index.shard):
            yield self._shard(shard), list(group)

    def _stored(self, numbers: Sequence[int]) -> dict[int, StoredSample]:
        """Tokens and positions of stored samples, by ascending number."""
        found: dict[int, StoredSample] = {}
        for shard, group in self._by_shard(numbers):
            found |= zip(group, shard.samples([self._index.place(n) for n in group]), strict=True)
        for number, sample in found.items():
            if sample_id(sample.token_ids) != self._index.sample_id(number):
                name = self._index.sample_id(number).hex()
                where = self._shard(self._index.shard(number)).files.where
                raise corrupt(where, f"the tokens of sample {name} are not those of its id")
        return found

    def _records(self, numbers: Sequence[int], stored: dict[int, StoredSample]) -> list[BaseLogprobs]:
        """The checked records of stored samples, by ascending number, all decoded at once."""
        if not numbers:
            return []
        parts = [shard.columns([self._index.place(n) for n in group]) for shard, group in self._by_shard(numbers)]
        columns = {
            name: np.concatenate([p[name] for p in parts]) if len(parts) > 1 else parts[0][name] for name in parts[0]
        }
        samples = [stored[n] for n in numbers]
        where = f"{self.path}, samples {', '.join(self._index.sample_id(n).hex() for n in numbers[:3])}"
        record = checked_record(columns, samples, self.manifest, where)
        ends = np.cumsum([len(s.positions) for s in samples]).tolist()
        return [record.take(slice(start, end)) for start, end in zip([0, *ends], ends, strict=False)]

    def _samples(self, firsts: Sequence[int]) -> list[CachedSample]:
        """Whole samples, each given by the number of its first capture."""
        captures = [self._index.find(self._index.sample_id(number)) for number in firsts]
        numbers = sorted({number for capture in captures for number in capture})
        stored = self._stored(numbers)
        records = dict(zip(numbers, self._records(numbers, stored), strict=True))
        return [
            CachedSample(stored[c[0]].token_ids, unite([records[n] for n in c]), self._index.num_tokens_cut(c[0]))
            for c in captures
        ]

    def _united(self, number: int, stored: StoredSample) -> StoredSample:
        """A stored sample with the positions of all its captures."""
        captures = self._index.find(self._index.sample_id(number))
        if len(captures) == 1:
            return stored
        parts = [s.positions for s in self._stored(captures).values()]
        templates = {self._shard(self._index.shard(n)).commit.chat_template for n in captures}
        template = stored.chat_template if "" not in templates else ""
        return StoredSample(stored.token_ids, np.unique(np.concatenate(parts)), template)

    def _compare(self, tokens: NDArray[np.uint32], stored: StoredSample, number: int) -> None:
        if not np.array_equal(stored.token_ids[: len(tokens)], tokens):
            name = self._index.sample_id(number).hex()
            raise corrupt(self._shard(self._index.shard(number)).files.where, f"sample {name} holds other tokens")

    def _select(
        self, record: BaseLogprobs, wanted: NDArray[np.integer] | None, tokens: NDArray[np.uint32]
    ) -> BaseLogprobs:
        """The rows asked for; the record itself where that is all of them."""
        if wanted is None:
            inside = int(np.searchsorted(record.positions, len(tokens) - 1))
            return record if inside == len(record) else record.take(slice(0, inside))
        rows = self._rows_of(record.positions, wanted, tokens)
        return record if len(rows) == len(record) and np.array_equal(rows, np.arange(len(rows))) else record.take(rows)

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

    def _find(self, tokens: NDArray[np.uint32]) -> list[int]:
        """The numbers of the captures of a sample, or of one that starts with these tokens."""
        found = self._index.find(sample_id(tokens))
        if found:
            return found
        samples = [self._index.find(self._index.sample_id(first)) for first in self._find_prefix(tokens)]
        return sorted(number for captures in samples for number in captures)

    def _find_prefix(self, tokens: NDArray[np.uint32]) -> list[int]:
        """The first captures of all cached samples that start with these tokens."""
        prefixes = self._prefixes
        if prefixes is None:
            prefixes = self._prefixes = self._all_prefixes()
        if not len(prefixes):
            raise SampleNotCached(f"looking up a sample of {len(tokens)} tokens in {self.path}: it holds no samples.")
        matches = prefixes.starting_with(tokens)
        if matches:
            return [int(self._index.distinct[place]) for place in matches]
        place, shared = prefixes.nearest(tokens)
        raise SampleNotCached(self._departure(tokens, shared, int(self._index.distinct[place])))

    def _all_prefixes(self) -> Prefixes:
        """Reads the tokens of every shard."""
        parts = [shard.token_ids() for shard in self.shards()]
        token_ids = np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint32)
        return Prefixes(token_ids, *self._index.tokens_of_distinct())

    def _departure(self, tokens: NDArray[np.uint32], shared: int, number: int) -> str:
        nearest = self._stored([number])[number].token_ids
        there = f"token {nearest[shared]}" if shared < len(nearest) else f"its end after {len(nearest)} tokens"
        return (
            f"looking up a sample of {len(tokens)} tokens in {self.path}: not cached. The nearest cached sample, "
            f"{self._index.sample_id(number).hex()}, departs at token {shared}: expected token {tokens[shared]}, "
            f"found {there}. The data, tokenizer, chat template or truncation is not that of the cache. "
            "Precompute this data, or train without --data on the samples of the cache."
        )


def _as_tokens(token_ids: NDArray[np.integer]) -> NDArray[np.uint32]:
    array = np.asarray(token_ids)
    if array.ndim != 1 or array.dtype.kind not in "iu" or np.any((array < 0) | (array >= 2**32)):
        raise ValueError(f"token_ids: expected a 1-D array of integers in [0, 2^32), found {array.dtype} {array.shape}")
    return array.astype(np.uint32)
