"""The data sets of a cache: which samples each has, and at which positions, whatever else the cache holds.

Owns the files data-<checksum>.npy (one structured array, a row a run of positions, readable with `np.load`), their
bounds, and the records data-<hash of the name>.json by which writers know the data sets that contents.json is to list:
whoever finalises last lists all that are there, as with shards. Must not know rows of data, nor the records of shards.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backend import corrupt
from .files import Files, how_missing
from .identity import digest
from .index import npy_header
from .layout import data_file_name, data_record_name, is_data_record
from .manifest import MAX_DATA_SET_NAME, DataSetEntry, StoredFile, read_json, to_bytes
from .plain_text import one_line, without_secrets

DTYPE = np.dtype([("sample_id", "<u8", (2,)), ("first", "<u4"), ("num_positions", "<u4"), ("cross_entropy", "u1")])
"""A run: positions of a sample that follow one another, and whether cross-entropy counts there (1) or not (0)."""

Runs = NDArray[Any]

_TAG = 9
"""Characters of what tells apart two names that had to be made printable or short."""


@dataclass(frozen=True)
class DataSet:
    """Samples and positions of one data set, in the order of the sample ids' bytes; runs: `DTYPE` [R]."""

    name: str
    runs: Runs

    @property
    def num_samples(self) -> int:
        """Different token sequences."""
        return int(_begins(self.runs).sum())

    @property
    def num_positions(self) -> int:
        """Of all samples together."""
        return int(self.runs["num_positions"].sum(dtype=np.int64))

    def packed(self) -> tuple[DataSetEntry, bytes]:
        """Its entry, and the bytes of its file."""
        data = packed_runs(self.runs)
        file = StoredFile(data_file_name(digest(data)), len(data), digest(data))
        return DataSetEntry(self.name, file, self.num_samples, len(self.runs), self.num_positions), data

    def of_samples(self, wanted: Iterable[bytes]) -> "DataSet":
        """Without the samples whose ids are not among these."""
        keys = set(wanted)
        ids = np.ascontiguousarray(self.runs["sample_id"]).view("u1").reshape(-1, 16)
        stays = np.fromiter((key.tobytes() in keys for key in ids), dtype=np.bool_, count=len(ids))
        return DataSet(self.name, self.runs[stays])

    def samples(self) -> Iterator[tuple[bytes, Runs]]:
        """The id and the runs of every sample."""
        starts = np.flatnonzero(_begins(self.runs)).tolist()
        for start, stop in pairwise([*starts, len(self.runs)]):
            yield self.runs["sample_id"][start].tobytes(), self.runs[start:stop]


def name_of(text: str) -> str:
    """What a data set is called that was given as this path, URL or hub id: on one line, bounded, without secrets."""
    plain = without_secrets(text)
    shown = one_line(plain)
    if shown == plain and 1 <= len(plain) <= MAX_DATA_SET_NAME:
        return plain
    tag = digest(plain.encode(errors="surrogatepass"))[: _TAG - 1]
    return f"{shown[-(MAX_DATA_SET_NAME - _TAG) :].lstrip()}#{tag}"


def runs_of(
    sample_ids: Sequence[bytes],
    positions: Sequence[NDArray[np.integer]],
    cross_entropy: Sequence[NDArray[np.bool_]] | None = None,
) -> Runs:
    """The runs of these samples, each with its ascending positions, in their order.

    cross_entropy: of each position, whether it counts for cross-entropy; None: all do.
    """
    lengths = [len(p) for p in positions]
    if not sum(lengths):
        return np.zeros(0, dtype=DTYPE)
    owner, at = np.repeat(np.arange(len(lengths)), lengths), np.concatenate(positions).astype(np.int64)
    counts = np.ones(len(at), dtype=np.bool_) if cross_entropy is None else np.concatenate(cross_entropy)
    new = np.ones(len(at), dtype=np.bool_)
    new[1:] = (np.diff(owner) != 0) | (np.diff(at) != 1) | (counts[1:] != counts[:-1])
    starts = np.flatnonzero(new)
    runs = np.zeros(len(starts), dtype=DTYPE)
    runs["sample_id"] = np.frombuffer(b"".join(sample_ids), dtype="<u8").reshape(-1, 2)[owner[starts]]
    runs["first"], runs["num_positions"] = at[starts], np.diff([*starts, len(at)])
    runs["cross_entropy"] = counts[starts]
    return runs


def positions_of(runs: Runs) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """The positions of one sample, ascending, and which of them count for cross-entropy."""
    lengths = runs["num_positions"].astype(np.int64)
    offsets = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    at = np.repeat(runs["first"].astype(np.int64), lengths) + offsets
    return at.astype(np.int32), np.repeat(runs["cross_entropy"] == 1, lengths)


def joined(name: str, parts: Sequence[Runs]) -> DataSet:
    """One data set of parts in any order. A sample that stands in several has the union of its positions."""
    runs = np.concatenate(parts) if parts else np.zeros(0, dtype=DTYPE)
    runs = runs[_order(runs)]
    again = np.zeros(len(runs), dtype=np.bool_)
    again[1:] = runs[1:] == runs[:-1]
    runs = runs[~again]
    clashing = {key.tobytes() for key in runs["sample_id"][1:][_overlap(runs)]}
    if not clashing:
        return DataSet(name, runs)
    ids: list[bytes] = []
    positions: list[NDArray[np.int32]] = []
    counts: list[NDArray[np.bool_]] = []
    for key, part in DataSet(name, runs).of_samples(clashing).samples():
        at, counted = positions_of(part)
        found, place = np.unique(at, return_inverse=True)
        union = np.zeros(len(found), dtype=np.bool_)
        np.logical_or.at(union, place, counted)
        ids.append(key)
        positions.append(found)
        counts.append(union)
    rest = [key for key, _ in DataSet(name, runs).samples() if key not in clashing]
    return joined(name, [DataSet(name, runs).of_samples(rest).runs, runs_of(ids, positions, counts)])


def packed_runs(runs: Runs) -> bytes:
    """The .npy file of runs."""
    return npy_header(DTYPE, len(runs)) + runs.tobytes()


def unpacked_runs(files: Files, name: str, num_runs: int, checksum: str) -> Runs:
    """The runs of such a file, all of its bytes compared. Raises `CorruptCache`."""
    where, header = f"{files.root}/{name}", npy_header(DTYPE, num_runs)
    size = len(header) + DTYPE.itemsize * num_runs
    try:
        data = files.read(name, size)
    except FileNotFoundError as error:
        raise corrupt(where, how_missing(error)) from error
    if len(data) != size or digest(data) != checksum or data[: len(header)] != header:
        raise corrupt(where, f"expected {num_runs} runs with checksum {checksum}, found {digest(data)}")
    return np.frombuffer(data, dtype=DTYPE, offset=len(header))


def read_data_set(files: Files, entry: DataSetEntry) -> DataSet:
    """The data set of an entry. Raises `CorruptCache`."""
    where = f"{files.root}/{entry.file.name}"
    if entry.file.size != len(npy_header(DTYPE, entry.num_runs)) + DTYPE.itemsize * entry.num_runs:
        raise corrupt(where, f"expected {entry.num_runs} runs, found {entry.file.size} bytes")
    runs = unpacked_runs(files, entry.file.name, entry.num_runs, entry.file.checksum)
    end = runs["first"].astype(np.int64) + runs["num_positions"]
    sane = (runs["num_positions"] > 0) & (end < 2**31) & (runs["cross_entropy"] <= 1)
    if not sane.all() or np.any(np.diff(_order(runs)) != 1) or _overlap(runs).any():
        raise corrupt(where, "its runs do not ascend, or overlap")
    found = DataSet(entry.name, runs)
    if (found.num_samples, found.num_positions) != (entry.num_samples, entry.num_positions):
        raise corrupt(where, "it counts other samples or positions than its entry")
    return found


def write_data_set(files: Files, data_set: DataSet) -> None:
    """Let writers know a data set, in place of the one of its name, from the next `finalize` on."""
    entry, data = data_set.packed()
    files.replace(entry.file.name, data)
    files.replace(record_name(entry.name), to_bytes(entry))


def remove_data_set(files: Files, name: str) -> None:
    """Let writers forget the data set of this name."""
    files.remove(record_name(name))


def record_of(files: Files, name: str) -> DataSetEntry | None:
    """What writers know of the data set of this name."""
    record = record_name(name)
    return read_json(DataSetEntry, files, record) if files.exists(record) else None


def record_name(name: str) -> str:
    """The file by which writers know the data set of this name."""
    return data_record_name(digest(name.encode()))


def known_data_sets(files: Files) -> tuple[DataSetEntry, ...]:
    """The data sets that writers know, in the order of their names. Raises `CorruptCache`."""
    entries = []
    for record in filter(is_data_record, files.names("")):
        try:
            entry = read_json(DataSetEntry, files, record)
        except FileNotFoundError:  # removed meanwhile
            continue
        if record != record_name(entry.name):
            raise corrupt(f"{files.root}/{record}", "it is the record of another data set")
        entries.append(entry)
    return tuple(sorted(entries, key=lambda entry: entry.name))


def kept_apart(data_sets: Iterable[DataSet]) -> list[DataSet]:
    """All of them, each once: where two of one name differ, the later one is called `name (2)`, and so on."""
    kept: dict[str, DataSet] = {}
    for found in data_sets:
        number, name = 1, found.name
        while name in kept and not np.array_equal(kept[name].runs, found.runs):
            number += 1
            suffix = f" ({number})"
            name = found.name[: MAX_DATA_SET_NAME - len(suffix)].rstrip() + suffix
        kept[name] = DataSet(name, found.runs)
    return list(kept.values())


def _order(runs: Runs) -> NDArray[np.intp]:
    ids = np.ascontiguousarray(runs["sample_id"]).view(">u8")
    return np.lexsort((runs["cross_entropy"], runs["num_positions"], runs["first"], ids[:, 1], ids[:, 0]))


def _begins(runs: Runs) -> NDArray[np.bool_]:
    """Which runs are the first of their sample."""
    new = np.ones(len(runs), dtype=np.bool_)
    new[1:] = (runs["sample_id"][1:] != runs["sample_id"][:-1]).any(axis=1)
    return new


def _overlap(runs: Runs) -> NDArray[np.bool_]:
    """[R - 1]: which runs begin inside the one before, of the same sample, or could be one with it."""
    end = runs["first"].astype(np.int64)[:-1] + runs["num_positions"][:-1]
    first, alike = runs["first"][1:], runs["cross_entropy"][1:] == runs["cross_entropy"][:-1]
    overlap: NDArray[np.bool_] = ~_begins(runs)[1:] & ((first < end) | ((first == end) & alike))
    return overlap
