"""One cache out of others: merge caches of one identity, convert between stores and precisions, export to Parquet.

Must not make numbers finer than they are, nor hide how exact they are: a converted cache says its maximum error.
"""

import errno
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from .cache import LogitCache
from .configs import ConfigDifferences, as_spelt
from .data_sets import kept_apart
from .encoding import PRECISIONS, decode, encode
from .errors import IdentityMismatch, IncompleteCache
from .files import is_unfinished, name_file
from .identity import CaptureIdentity, sample_id
from .layout import CONTENTS, temporary_name
from .manifest import STORES, Manifest
from .records import CachedSample, concatenate
from .repack import Part, Pick, Source, pack
from .shard import OpenShard, unit_id
from .writer import CacheWriter, committed_units

SAMPLES_A_ROW_GROUP = 64
_LISTS, _FLOATS = pa.list_(pa.uint32()), pa.list_(pa.float32())
_PARQUET_SCHEMA = pa.schema(
    {
        "sample_id": pa.string(),
        "token_ids": _LISTS,
        "num_tokens_cut": pa.int64(),
        "positions": pa.list_(pa.int32()),
        "label_ids": _LISTS,
        "label_logprobs": _FLOATS,
        "alternative_ids": pa.list_(_LISTS),
        "alternative_logprobs": pa.list_(_FLOATS),
        "tail_logprobs": _FLOATS,
        "tail_group_logprobs": pa.list_(_FLOATS),
    }
)
_PARQUET_DRAWS = (
    pa.field("tail_sample_ids", pa.list_(_LISTS)),
    pa.field("tail_sample_logprobs", pa.list_(_FLOATS)),
)


def merge(sources: Sequence[str | Path], target: str | Path, configs: ConfigDifferences = as_spelt) -> LogitCache:
    """A cache with the shards of all sources, byte for byte. A shard that several of them hold is taken once.

    Where two spellings of an identity agree, and so two digests of it, a record is written again with the target's.

    sources: finished caches of one identity and one store. target: a new folder, or a cache of that identity, which
    gains. All data sets are kept; where two of one name differ, the later one is called `name (2)`. configs: how the
    configs of the bases are compared. Raises `IdentityMismatch` with what differs, chat templates among it, before
    anything is committed, and what reading and writing raise.
    """
    if not sources:
        raise ValueError("merge: expected one source or more")
    caches = [LogitCache.open(path) for path in sources]
    first = caches[0]
    for other in caches[1:]:
        differences = first.manifest.differences(other.manifest, f"in {first.path}", f"in {other.path}", configs)
        if differences:
            raise IdentityMismatch(
                f"merging {other.path} with {first.path}: they are of different identities "
                f"({'; '.join(differences)}). Nothing was written. Merge caches of one base and one capture; "
                "`logitcache convert` changes store and precision."
            )
    _check_templates(caches)
    with CacheWriter(target, first.manifest, first.token_groups(), configs) as writer:
        there = [LogitCache.open(target)] if writer.files.exists(CONTENTS) else []
        _check_templates([*there, *caches])
        if not there:
            _check_own(writer, caches)
        data_sets = [cache.data_set(entry) for cache in (*there, *caches) for entry in cache.data_sets]
        for cache in caches:
            for moved in _moves(cache, writer.manifest):
                if moved.picks is None:
                    writer.adopt(moved.shard)
                else:
                    part = Source(moved.shard).take(moved.picks)
                    writer.commit_columns(part.table, part.columns, part.kept_mass, part.chat_template)
        writer.finalize(kept_apart(data_sets))
    return LogitCache.open(target)


def _check_templates(caches: Sequence[LogitCache]) -> None:
    """Raise `IdentityMismatch` where one has chats of another template than those before it, as `precompute` does."""
    held: dict[str, LogitCache] = {}
    for cache in caches:
        ours = cache.chat_templates()
        if held and ours - held.keys():
            template, first = next(iter(held.items()))
            raise IdentityMismatch(
                f"merging {cache.path} with {first.path}: chat_template: {min(ours - held.keys())} in {cache.path}, "
                f"{template} in {first.path}. The same chats are other samples with another template, and both would "
                "be learnt. Nothing was copied. Merge caches of one template."
            )
        held |= dict.fromkeys(sorted(ours), cache)


def _check_own(writer: CacheWriter, sources: Sequence[LogitCache]) -> None:
    """A target that is not finished may be new or what an earlier run of this left; not a job of somebody else's."""
    theirs = set(committed_units(writer.files))
    if theirs:
        theirs -= {moved.unit(writer.manifest) for cache in sources for moved in _moves(cache, writer.manifest)}
    if theirs:
        raise IncompleteCache(
            f"writing to {writer.path}: expected a new folder or what this command left there, found a cache with "
            f"{len(theirs)} shards of its own. It would look finished, or be mixed. Nothing was changed. Choose "
            "another folder; `logitcache merge` joins finished caches."
        )


@dataclass(frozen=True)
class _Move:
    """A shard on its way into another cache: whole, or only some rows of it."""

    shard: OpenShard
    picks: list[Pick] | None

    def unit(self, manifest: Manifest) -> str:
        """Its name there."""
        if self.picks is None:
            return self.shard.commit_for(manifest.identity_digest).unit
        return unit_id(manifest.identity_digest, Source(self.shard).table_of(self.picks))


def _moves(cache: LogitCache, manifest: Manifest) -> Iterator[_Move]:
    """The shards of a cache for one with this manifest, in their order.

    Of rows that several shards hold those in the first count. That order is of the units, which have other names, and
    so another order, where the identity is another one: there what an earlier shard holds is left out of later ones.
    """
    is_same = cache.manifest.identity_digest == manifest.identity_digest
    taken: dict[bytes, list[NDArray[np.int32]]] = {}
    for shard in cache.shards():
        if is_same:
            yield _Move(shard, None)
            continue
        samples = list(Source(shard).samples())
        rows = [
            np.flatnonzero(~np.isin(positions, np.concatenate([[-1], *taken.get(key, ())])))
            for key, positions in samples
        ]
        for key, positions in samples:
            if cache.is_captured_again(key):
                taken.setdefault(key, []).append(positions)
        if all(len(left) == len(positions) for left, (_, positions) in zip(rows, samples, strict=True)):
            yield _Move(shard, None)
        elif picks := [Pick(row, left) for row, left in enumerate(rows) if len(left)]:
            yield _Move(shard, picks)


def converted(manifest: Manifest, store: str, precision: str) -> Manifest:
    """The manifest of a cache converted to a store and a precision, which may not be finer than it was.

    Its maximum error is that of the precision and that of the source together. Raises ValueError.
    """
    order = list(PRECISIONS)
    capture = manifest.capture
    if precision not in order or order.index(precision) < order.index(capture.precision):
        raise ValueError(
            f"converting from precision {capture.precision} to {precision}: expected "
            f"{' or '.join(order[order.index(capture.precision) :])}, since what was rounded cannot be made finer. "
            "Precompute the cache again for a finer one."
        )
    if store not in STORES:
        raise ValueError(f"converting to store {store}: expected one of {STORES}")
    added = PRECISIONS[precision] if precision != capture.precision else None
    max_error = capture.max_error + (added.max_error if added else 0.0)
    return replace(manifest, store=store, capture=replace(capture, precision=precision, max_error=max_error))


def convert(
    source: str | Path, target: str | Path, store: str | None = None, precision: str | None = None
) -> LogitCache:
    """The same samples in another store or at a coarser precision. The target must be new, or hold that very cache.

    Raises ValueError for a finer precision, and what reading and writing raise.
    """
    cache = LogitCache.open(source)
    capture = cache.manifest.capture
    manifest = converted(cache.manifest, store or cache.manifest.store, precision or capture.precision)
    with CacheWriter(target, manifest, cache.token_groups()) as writer:
        _check_own(writer, [cache])
        for moved in _moves(cache, manifest):
            part = _whole(moved.shard) if moved.picks is None else Source(moved.shard).take(moved.picks)
            _commit_converted(writer, part, capture)
        writer.finalize([cache.data_set(entry) for entry in cache.data_sets])
    return LogitCache.open(target)


def _whole(shard: OpenShard) -> Part:
    """All of a shard, its rows checked."""
    table, columns = shard.table(), shard.reader.rows([slice(0, shard.commit.num_positions)])
    shard.record(columns, shard.all_samples(table))
    return Part(table, columns, shard.commit.kept_mass, shard.commit.chat_template)


def _commit_converted(writer: CacheWriter, part: Part, theirs: CaptureIdentity) -> None:
    """Commit rows that were checked, as they are stored or at the writer's coarser precision."""
    columns, capture = part.columns, writer.manifest.capture
    if theirs.precision != capture.precision:
        columns = encode(decode(columns, part.table.positions, part.label_ids, theirs), capture)
    writer.commit_columns(part.table, columns, part.kept_mass, part.chat_template)


@dataclass(frozen=True)
class Copied:
    """What came from another cache: different samples, and positions of them."""

    num_samples: int
    num_positions: int


def check_same_capture(manifest: Manifest, source: LogitCache, configs: ConfigDifferences = as_spelt) -> None:
    """Raise `IdentityMismatch` unless a cache holds, or converts into, the rows that one with this manifest would.

    Its store is free. Its precision may be `exact` where the manifest's is coarser, and its rows are then rounded once,
    as they would have been at the capture. Everything else must be equal, the config by `configs`.
    """
    theirs, precision = source.manifest, manifest.capture.precision
    if theirs.capture.precision == "exact" and theirs.capture.num_tail_groups:  # its groups are not rounded yet
        steps = manifest.capture.group_steps_per_nat or theirs.capture.group_steps_per_nat
        theirs = replace(theirs, capture=replace(theirs.capture, group_steps_per_nat=steps))
    try:
        theirs = converted(theirs, manifest.store, precision)
    except ValueError:  # coarser than wanted: the precision is among the differences
        theirs = replace(theirs, store=manifest.store)
    differences = manifest.differences(theirs, "wanted", f"in {source.path}", configs)
    if differences:
        raise IdentityMismatch(
            f"taking samples from {source.path}: it is of another identity ({'; '.join(differences)}). Nothing was "
            "taken. Name a cache of the same base and capture, or precompute without it."
        )


def copy_samples(
    writer: CacheWriter,
    source: LogitCache,
    wanted: Mapping[bytes, NDArray[np.int32]],
    max_positions: int = 32_768,
) -> Copied:
    """Commit to a cache the samples of another that are wanted and there, their rows as they are stored.

    wanted: positions by sample id, without what the writer's cache holds already; of a sample that the source holds in
    part, that part comes. max_positions: of a shard. The stores may differ; see `check_same_capture` for the precision.
    A call that is killed and made again with what is then missing commits the same shards. Does not finalise. Needs the
    memory of a shard of each cache. Raises `IdentityMismatch` before anything is written, `CorruptCache` for a source
    whose bytes are not those that were committed, and what `CacheWriter.commit_columns` raises.
    """
    check_same_capture(writer.manifest, source, writer.configs)
    copied: dict[bytes, int] = {}
    for part in pack(_wanted_picks(source, wanted), max_positions):
        _commit_converted(writer, part, source.manifest.capture)
        for key, num_positions in zip(part.table.sample_ids, part.table.num_positions.tolist(), strict=True):
            copied[key.tobytes()] = copied.get(key.tobytes(), 0) + num_positions
    return Copied(len(copied), sum(copied.values()))


def _wanted_picks(source: LogitCache, wanted: Mapping[bytes, NDArray[np.int32]]) -> Iterator[tuple[Source, Pick]]:
    """Each wanted row once, from the first capture that has it, which is the one that counts."""
    taken: dict[bytes, list[NDArray[np.int32]]] = {}
    for shard in source.shards_of(wanted):
        shard_source = Source(shard)
        for row, (key, positions) in enumerate(shard_source.samples()):
            asked = wanted.get(key)
            if asked is None:
                continue
            before = taken.setdefault(key, [])
            here = np.isin(positions, asked) & ~np.isin(positions, np.concatenate([[-1], *before]))
            before.append(positions[here])
            if here.any():
                yield shard_source, Pick(row, np.flatnonzero(here))


def export_parquet(source: str | Path, file: str | Path) -> int:
    """Write a cache as one Parquet file, a row a sample, all log-probabilities as float32; return the rows.

    Columns: sample_id, token_ids, num_tokens_cut, positions, label_ids, label_logprobs, alternative_ids and
    alternative_logprobs (lists of lists, without what is absent), tail_logprobs, tail_group_logprobs (empty lists where
    the tail is not split); where the cache has draws tail_sample_ids and tail_sample_logprobs (empty lists where there
    is no tail). What a killed export to this very file left is removed, so one at a time. Raises FileExistsError where
    the file is there.
    """
    path = Path(file)
    cache = LogitCache.open(source)
    samples = cache.samples()
    num_rows, capture = 0, cache.manifest.capture
    widest = max(1, capture.top_k, capture.num_tail_groups, capture.num_tail_samples)
    group_size = max(1, min(SAMPLES_A_ROW_GROUP, 2**30 // (widest * capture.max_length)))  # 32-bit offsets
    schema = pa.schema([*_PARQUET_SCHEMA, *_PARQUET_DRAWS]) if capture.num_tail_samples else _PARQUET_SCHEMA
    if path.exists():
        raise FileExistsError(errno.EEXIST, "the file exists", str(path))
    for left in path.parent.glob("*"):
        if is_unfinished(left.name, path.name):
            left.unlink()
    temporary = path.with_name(temporary_name(path.name))
    try:
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            while group := list(islice(samples, group_size)):
                writer.write_batch(_parquet_rows(group, schema))
                num_rows += len(group)
        name_file(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return num_rows


def _parquet_rows(samples: Sequence[CachedSample], schema: pa.Schema) -> pa.RecordBatch:
    record = concatenate([s.logprobs for s in samples])
    rows = [len(s.logprobs) for s in samples]
    groups = record.tail_group_logprobs
    groups = np.zeros((len(record), 0), dtype=np.float32) if groups is None else groups

    def lists(values: NDArray[Any]) -> pa.ListArray:
        return _list_array(pa.array(values), rows)

    def pairs(ids: NDArray[np.uint32], logprobs: NDArray[np.float32]) -> list[pa.ListArray]:
        present = logprobs > -np.inf
        counts = present.sum(axis=1)
        return [_list_array(_list_array(pa.array(values[present]), counts), rows) for values in (ids, logprobs)]

    arrays = [
        pa.array([sample_id(s.token_ids).hex() for s in samples]),
        _list_array(pa.array(np.concatenate([s.token_ids for s in samples])), [len(s.token_ids) for s in samples]),
        pa.array([s.num_tokens_cut for s in samples], pa.int64()),
        lists(record.positions),
        lists(record.label_ids),
        lists(record.label_logprobs),
        *pairs(record.alternative_ids, record.alternative_logprobs),
        lists(record.tail_logprobs),
        _list_array(_list_array(pa.array(groups.reshape(-1)), [groups.shape[1]] * len(record)), rows),
    ]
    if record.tail_sample_ids is not None and record.tail_sample_logprobs is not None:
        arrays += pairs(record.tail_sample_ids, record.tail_sample_logprobs)
    return pa.record_batch(arrays, schema=schema)


def _list_array(values: Any, lengths: Sequence[int] | NDArray[np.intp]) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32()), values)
