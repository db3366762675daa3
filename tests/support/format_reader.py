"""A second reader of the cache format, written from docs/format.md alone and sharing no code with the package.

It needs json, hashlib, NumPy, google-crc32c and, by the store, pcodec or pyarrow. `open_cache(folder)` checks the
manifest, the contents and the index; `Cache.captures` checks and decodes shard after shard; `Cache.samples` joins the
captures of a sample. It reads a shard as a whole, local folders only, and refuses by `FormatError`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

NAME = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*")
DROPS_PER_NAT = {"fine": 32, "compact": 16}
ABSENT = 65535
ABOVE_ZERO = 1e-6  # rounding of what was captured
INDEX = np.dtype(
    [("sample_id", "<u8", 2), ("shard", "<u4"), ("num_tokens", "<u4"), ("num_positions", "<u4"), ("num_cut", "<u4")]
)
FILE = {"name": str, "size": int, "checksum": str}
CAPTURE = {
    "top_k": int,
    "max_length": int,
    "min_mass": float,
    "precision": str,
    "max_error": float,
    "num_tail_groups": int,
    "tail_partition": str,
    "group_steps_per_nat": int,
}
MODEL = {"weights": str, "config": str, "vocab_size": int, "dtype": str, "attention": str, "tf32": bool}
MANIFEST = {
    "format_version": int,
    "reader_features": [str],
    "writer_features": [str],
    "store": str,
    "model": (MODEL, MODEL | {"quantization": str}),
    "tokenizer": ({"fingerprint": str}, None),
    "capture": (CAPTURE, CAPTURE | {"num_tail_samples": int}, CAPTURE | {"tail_from_remainder": bool}),
    "model_name": str,
    "created_with": dict,
}
DATA_SET = {"name": str, "file": FILE, "num_samples": int, "num_runs": int, "num_positions": int}
CONTENTS = {
    "manifest": str,
    "num_samples": int,
    "index": FILE,
    "shards": [{"unit": str, "checksum": str}],
    "data_sets": [DATA_SET],
}
RUNS = np.dtype([("sample_id", "<u8", 2), ("first", "<u4"), ("num_positions", "<u4"), ("cross_entropy", "u1")])
COMMIT = {
    "unit": str,
    "identity": str,
    "num_samples": int,
    "num_positions": int,
    "num_tokens": int,
    "num_tokens_cut": int,
    "kept_mass": float,
    "files": [FILE],
    "blocks": dict,
    "chat_template": str,
}


class FormatError(Exception):
    """The cache is not what docs/format.md says."""


def require(condition: object, message: str) -> None:
    if not condition:
        raise FormatError(message)


# Files and JSON


def digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def canonical(value: Any) -> bytes:
    """Sorted keys, no spaces, \\u escapes for what is not ASCII, numbers as Python writes them."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def conforms(value: Any, schema: Any) -> bool:
    """Exactly these fields, of exactly these types."""
    if isinstance(schema, dict):
        return (
            isinstance(value, dict)
            and value.keys() == schema.keys()
            and all(conforms(value[k], schema[k]) for k in schema)
        )
    if isinstance(schema, list):
        return isinstance(value, list) and all(conforms(item, schema[0]) for item in value)
    if isinstance(schema, tuple):
        return any(conforms(value, one) for one in schema)
    return value is None if schema is None else type(value) is schema


def read_json(data: bytes, schema: Any, what: str) -> Any:
    """The body of a JSON file."""
    require(len(data) <= 64 * 2**20, f"{what}: over 64 MiB")
    envelope = json.loads(data)
    require(conforms(envelope, {"body": schema, "checksum": str}), f"{what}: missing, unknown or ill-typed fields")
    require(digest(canonical(envelope["body"])) == envelope["checksum"], f"{what}: checksum")
    return envelope["body"]


def read_listed(folder: Path, listed: dict[str, Any]) -> bytes:
    """A file of which the name, the size and the checksum are listed."""
    name = listed["name"]
    require(NAME.fullmatch(name) and ".." not in name, f"bad name {name!r}")
    path = folder / name
    require(path.is_file() and path.resolve().is_relative_to(folder.resolve()), f"{path}: missing, or a link out")
    data = path.read_bytes()
    require(len(data) == listed["size"] and digest(data) == listed["checksum"], f"{path}: size or checksum")
    return data


def read_data_set(folder: Path, entry: dict[str, Any]) -> dict[bytes, dict[int, bool]]:
    """Samples and positions of a data set, and what its writers' record says of it."""
    name = entry["name"]
    require(1 <= len(name) <= 200 and name.isprintable(), "a data set's name")
    require(entry["file"]["name"] == f"data-{entry['file']['checksum']}.npy", "a data set's file has another name")
    record = read_json((folder / f"data-{digest(name.encode())}.json").read_bytes(), DATA_SET, "data set")
    require(record == entry, "the record of a data set is not that of the contents")
    read_listed(folder, entry["file"])
    runs = np.load(folder / entry["file"]["name"], allow_pickle=False)
    require(runs.dtype == RUNS and runs.shape == (entry["num_runs"],), "data set: columns")
    found: dict[bytes, dict[int, bool]] = {}
    before = (b"", 0, -1)
    for sample_id, first, length, counts in zip(*(runs[n].tolist() for n in runs.dtype.names), strict=True):
        key = b"".join(int(part).to_bytes(8, "little") for part in sample_id)
        require(length > 0 and counts in (0, 1), "data set: an empty run")
        apart = first > before[1] or (first == before[1] and counts != before[2])
        require(key > before[0] or (key == before[0] and apart), "data set: runs do not ascend, or could be one")
        before = (key, first + length, counts)
        found.setdefault(key, {}).update({first + i: counts == 1 for i in range(length)})
    require(len(found) == entry["num_samples"], "data set: num_samples")
    require(sum(map(len, found.values())) == entry["num_positions"], "data set: num_positions")
    return found


def identity_of(body: dict[str, Any]) -> str:
    """What the records of a cache with this manifest carry."""
    flat = {"store": body["store"]}
    for group in ("model", "tokenizer", "capture"):
        flat |= {group: None} if body[group] is None else {f"{group}.{name}": x for name, x in body[group].items()}
    return digest(canonical(flat))


def check_manifest(body: dict[str, Any]) -> None:
    capture, vocab = body["capture"], body["model"]["vocab_size"]
    require(all(isinstance(value, str) for value in body["created_with"].values()), "created_with")
    groups, features = capture["num_tail_groups"], body["reader_features"]
    require(body["format_version"] == 2, "another format version")
    known = {"tail-groups", "tail-samples", "tail-from-remainder", "quantized-base"}
    require(set(features) <= known, "an unknown reader feature")
    remainder = "tail_from_remainder" in capture
    require(("tail-from-remainder" in features) == remainder, "tail-from-remainder without its field, or reversed")
    require(not remainder or (capture["tail_from_remainder"] and groups == 0), "tail_from_remainder")
    require(("tail-groups" in features) == (groups > 0), "tail-groups without groups, or reversed")
    require(("tail-samples" in features) == ("num_tail_samples" in capture), "tail-samples without draws, or reversed")
    require(1 <= capture.get("num_tail_samples", 1) <= 4096, "num_tail_samples")
    config = body["model"]["config"]
    require(len(config) <= 2**18 and isinstance(json.loads(config), dict), "config")
    require(json.dumps(json.loads(config), sort_keys=True, separators=(",", ":")) == config, "config: not canonical")
    quantized = body["model"].get("quantization")
    require(("quantized-base" in features) == (quantized is not None), "quantized-base without the field, or reversed")
    require(quantized is None or re.fullmatch(r"[a-z0-9][a-z0-9_.-]{0,31}", quantized), "quantization")
    require(body["store"] in ("zarr", "arrow"), "an unknown store")
    require(2 <= vocab < 2**24, "vocab_size")
    require(0 <= capture["top_k"] < vocab and capture["max_length"] >= 2, "top_k or max_length")
    require(0 < capture["min_mass"] <= 1, "min_mass")
    require(capture["min_mass"] == 1 or capture["top_k"], "min_mass without alternatives")
    require(capture["precision"] in ("exact", *DROPS_PER_NAT), "precision")
    require(0 <= capture["max_error"] <= 0.5, "max_error")
    require(groups == 0 or 2 <= groups <= 256, "num_tail_groups")
    require((capture["tail_partition"] == "") == (groups == 0), "tail_partition")
    require(capture["group_steps_per_nat"] in ((1, 4) if groups else (0,)), "group_steps_per_nat")


# Samples


ROWS = (
    *("label_logprobs", "alternative_ids", "alternative_logprobs", "tail_logprobs"),
    *("tail_group_logprobs", "tail_sample_ids", "tail_sample_logprobs"),
)
"""What a sample has a row a position of; the last three are None where the cache has none."""


@dataclass(frozen=True)
class Sample:
    """Log-probabilities are float64, in nats; those of what is absent and of empty tails are -inf."""

    token_ids: Array
    num_tokens_cut: int
    positions: Array  # position t predicts token t+1, the label
    label_logprobs: Array  # [P]
    alternative_ids: Array  # [P, K]
    alternative_logprobs: Array  # [P, K]
    tail_logprobs: Array  # [P]
    tail_group_logprobs: Array | None  # [P, G]
    tail_sample_ids: Array | None  # [P, M]
    tail_sample_logprobs: Array | None  # [P, M]

    def joined(self, later: Sample) -> Sample:
        """The union of two captures; where they overlap this one counts."""
        positions, rows = np.unique(np.concatenate([self.positions, later.positions]), return_index=True)
        pairs = {name: (getattr(self, name), getattr(later, name)) for name in ROWS}
        joined = {name: None if a is None else np.concatenate([a, b])[rows] for name, (a, b) in pairs.items()}
        return Sample(self.token_ids, self.num_tokens_cut, positions, **joined)


@dataclass(frozen=True)
class Cache:
    folder: Path
    manifest: dict[str, Any]
    contents: dict[str, Any]
    index: Array
    token_groups: Array | None

    def data_sets(self) -> dict[str, dict[bytes, dict[int, bool]]]:
        """By name and sample id: the positions, and whether cross-entropy counts at each."""
        return {entry["name"]: read_data_set(self.folder, entry) for entry in self.contents["data_sets"]}

    def samples(self) -> Iterator[Sample]:
        """Every sample once, by its first capture in the order of the contents."""
        joined: dict[bytes, Sample] = {}
        for sample in self.captures():
            key = sample.token_ids.tobytes()
            joined[key] = joined[key].joined(sample) if key in joined else sample
        yield from joined.values()

    def captures(self) -> Iterator[Sample]:
        """Every sample of every shard, in order."""
        for number, listed in enumerate(self.contents["shards"]):
            data = (self.folder / "shards" / f"{listed['unit']}.json").read_bytes()
            require(digest(data) == listed["checksum"], f"commit record of {listed['unit']}: checksum")
            commit = read_json(data, COMMIT, f"commit record of {listed['unit']}")
            require(commit["unit"] == listed["unit"], "the commit record is of another shard")
            require(commit["identity"] == identity_of(self.manifest), "the commit record is of another cache")
            samples = list(self._shard(commit))
            index = self.index[self.index["shard"] == number]
            expected = [(len(s.token_ids), len(s.positions), s.num_tokens_cut) for s in samples]
            require(index[["num_tokens", "num_positions", "num_cut"]].tolist() == expected, "index: counts")
            ids = b"".join(sample_id(s.token_ids) for s in samples)
            require(index["sample_id"].tobytes() == ids, "index: sample ids")
            yield from samples

    def _shard(self, commit: dict[str, Any]) -> Iterator[Sample]:
        capture = self.manifest["capture"]
        folder = self.folder / "shards" / f"{commit['unit']}-{digest(canonical(commit['files']))[:16]}"
        files = {listed["name"]: read_listed(folder, listed) for listed in commit["files"]}
        decode = {"zarr": decode_zarr, "arrow": decode_arrow}[self.manifest["store"]]
        columns = decode(files, commit, capture)
        rows = decode_rows(columns, capture)
        num_tokens, num_positions = columns["num_tokens"], columns["num_positions"]
        require(num_tokens.sum() == commit["num_tokens"], "commit record: num_tokens")
        require(num_positions.sum() == commit["num_positions"], "commit record: num_positions")
        require(columns["num_tokens_cut"].sum() == commit["num_tokens_cut"], "commit record: num_tokens_cut")
        unit = b"".join(
            np.ascontiguousarray(columns[c]).tobytes() for c in ("sample_ids", "num_positions", "positions")
        )
        unit = bytes.fromhex(commit["identity"]) + unit
        require(digest(unit) == commit["unit"], "the unit does not belong to these samples")
        token, row = 0, 0
        for i in range(commit["num_samples"]):
            token_ids = columns["token_ids"][token : token + num_tokens[i]]
            mine = slice(row, row + num_positions[i])
            token, row = token + int(num_tokens[i]), row + int(num_positions[i])
            require(columns["sample_ids"][i].tobytes() == sample_id(token_ids), "a sample id is not of its tokens")
            sample = Sample(
                token_ids=token_ids,
                num_tokens_cut=int(columns["num_tokens_cut"][i]),
                positions=columns["positions"][mine],
                **{name: None if values is None else values[mine] for name, values in rows.items()},
            )
            check_rows(sample, capture, self.manifest["model"]["vocab_size"])
            yield sample


def sample_id(token_ids: Array) -> bytes:
    return hashlib.blake2b(token_ids.astype("<u4").tobytes(), digest_size=16).digest()


def open_cache(folder: str | Path) -> Cache:
    folder = Path(folder)
    require((folder / "contents.json").is_file(), "no contents.json: not a cache, or not finished")
    data = (folder / "manifest.json").read_bytes()
    manifest = read_json(data, MANIFEST, "manifest.json")
    check_manifest(manifest)
    contents = read_json((folder / "contents.json").read_bytes(), CONTENTS, "contents.json")
    require(contents["manifest"] == digest(data), "contents.json belongs to another manifest.json")
    read_listed(folder, contents["index"])
    index = np.load(folder / contents["index"]["name"], allow_pickle=False)
    require(index.dtype == INDEX and index.ndim == 1, "index: columns")
    require((np.diff(index["shard"].astype(np.int64)) >= 0).all(), "index: order of the shards")
    require(len(index) == contents["num_samples"], "contents.json: num_samples")  # one captured twice counts twice
    names = [entry["name"] for entry in contents["data_sets"]]
    require(names == sorted(set(names)) and len(names) <= 256, "contents.json: names of data sets")
    token_groups = None
    if groups := manifest["capture"]["num_tail_groups"]:
        token_groups = np.load(folder / "token_groups.npy", allow_pickle=False)
        require(token_groups.dtype == np.uint8, "token_groups.npy: type")
        require(token_groups.shape == (manifest["model"]["vocab_size"],), "token_groups.npy: shape")
        require(digest(token_groups.tobytes()) == manifest["capture"]["tail_partition"], "token_groups.npy: checksum")
        require(token_groups.max() < groups, "token_groups.npy: groups")
    return Cache(folder, manifest, contents, index, token_groups)


# Rows


def row_columns(capture: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and width of the columns with a row a position."""
    exact = capture["precision"] == "exact"
    k, g, m = (capture["top_k"],), (capture["num_tail_groups"],), (capture.get("num_tail_samples", 0),)
    columns: dict[str, tuple[str, tuple[int, ...]]] = {
        "label_logprobs" if exact else "label_steps": ("float32" if exact else "uint32", ()),
        "tail_logprobs" if exact else "tail_steps": ("float32" if exact else "uint32", ()),
    }
    if k[0]:
        columns["alternative_ids"] = ("uint32", k)
        columns["alternative_logprobs" if exact else "alternative_drops"] = ("float32" if exact else "uint16", k)
    if g[0]:
        columns["tail_group_logprobs" if exact else "tail_group_steps"] = ("float32" if exact else "uint16", g)
    if m[0]:
        columns["tail_sample_ids"] = ("uint32", m)
        columns["tail_sample_logprobs" if exact else "tail_sample_drops"] = ("float32" if exact else "uint16", m)
    return columns


def from_steps(steps: Array, steps_per_nat: int) -> Array:
    return np.where(steps == np.iinfo(steps.dtype).max, -np.inf, -steps.astype(np.float64) / steps_per_nat)


def from_drops(drops: Array, steps_per_nat: int) -> Array:
    logprobs = -np.cumsum(drops.astype(np.int64), axis=1) / steps_per_nat
    return np.where(drops == ABSENT, -np.inf, logprobs)


def decode_rows(columns: dict[str, Array], capture: dict[str, Any]) -> dict[str, Array | None]:
    """Columns as stored -> log-probabilities."""
    if not capture["top_k"]:
        rows = len(columns["tail_logprobs" if capture["precision"] == "exact" else "tail_steps"])
        none = np.zeros((rows, 0), np.uint16)
        columns = {"alternative_ids": none, "alternative_logprobs": none, "alternative_drops": none, **columns}
    if capture["precision"] == "exact":
        rows = {name: columns.get(name) for name in ROWS}
        return {n: a if a is None or n.endswith("ids") else a.astype(np.float64) for n, a in rows.items()}
    drops_per_nat = DROPS_PER_NAT[capture["precision"]]
    tail = from_steps(columns["tail_steps"], 1024)
    groups, draws = columns.get("tail_group_steps"), columns.get("tail_sample_drops")
    per_nat = capture["group_steps_per_nat"]
    return {
        "label_logprobs": from_steps(columns["label_steps"], 1024),
        "alternative_ids": columns["alternative_ids"],
        "alternative_logprobs": from_drops(columns["alternative_drops"], drops_per_nat),
        "tail_logprobs": tail,
        "tail_group_logprobs": None if groups is None else tail[:, None] + from_steps(groups, per_nat),
        "tail_sample_ids": columns.get("tail_sample_ids"),
        "tail_sample_logprobs": None if draws is None else from_drops(draws, drops_per_nat),
    }


def logsumexp(logprobs: Array) -> Array:
    with np.errstate(divide="ignore"):
        top = np.maximum(logprobs.max(axis=1, keepdims=True), -1e300)
        return np.log(np.exp(logprobs - top).sum(axis=1)) + top[:, 0]


def check_rows(sample: Sample, capture: dict[str, Any], vocab: int) -> None:
    """What every row must fulfil."""
    tokens, positions, ids = sample.token_ids, sample.positions.astype(np.int64), sample.alternative_ids
    label, alternatives, tail = sample.label_logprobs, sample.alternative_logprobs, sample.tail_logprobs
    absent = np.isneginf(alternatives)
    exact = capture["precision"] == "exact"
    require(len(positions) > 0 and (np.diff(positions, prepend=-1) > 0).all(), "positions do not ascend")
    require(positions[-1] <= len(tokens) - 2, "a position without a label")
    labels = tokens[positions + 1]
    require((labels < vocab).all() and (ids < vocab).all(), "a token that the vocabulary does not have")
    require(not np.isnan(np.column_stack([label, alternatives, tail])).any(), "NaN")
    require(max(label.max(), alternatives.max(initial=-1.0), tail.max()) <= ABOVE_ZERO, "a log-probability above 0")
    require(
        (alternatives[:, 1:] <= alternatives[:, :-1]).all(), "alternatives ascend, or absent ones are not at the end"
    )
    require((ids[absent] == 0).all(), "an absent alternative has an id")
    distinct = np.sort(np.where(absent, vocab + np.arange(ids.shape[1]), ids), axis=1)
    require((np.diff(distinct, axis=1) > 0).all(), "an alternative stands twice in its row")
    require(((ids != labels[:, None]) | absent).all(), "an alternative is the label")
    mass = np.exp(label) + np.exp(alternatives).sum(axis=1) + np.exp(tail)
    bound = 1e-4 if exact else np.expm1(capture["max_error"] if capture["top_k"] else 1 / 2048) + 1e-4
    require((np.abs(1 - mass) <= bound).all(), "the masses of a row do not add up to 1")
    if sample.tail_group_logprobs is not None:
        require(
            not np.isnan(sample.tail_group_logprobs).any() and sample.tail_group_logprobs.max() <= ABOVE_ZERO,
            "tail groups",
        )
        total = logsumexp(sample.tail_group_logprobs)
        error = 1e-4 if exact else 1e-4 + 0.5 / capture["group_steps_per_nat"] + 1 / 2048 + capture["max_error"]
        with np.errstate(invalid="ignore"):
            agree = np.where(np.isneginf(tail), np.isneginf(total), np.abs(total - tail) <= error)
        require(agree.all(), "the tail groups do not add up to the tail")
    if sample.tail_sample_ids is not None:
        check_draws(sample, labels, vocab, 1e-4 if exact else 1e-4 + 1 / 2048 + capture["max_error"])


def check_draws(sample: Sample, labels: Array, vocab: int, error: float) -> None:
    ids, draws, tail = sample.tail_sample_ids, sample.tail_sample_logprobs, sample.tail_logprobs
    assert ids is not None and draws is not None
    require(not np.isnan(draws).any(), "NaN among the draws")
    require((np.isneginf(draws) == np.isneginf(tail)[:, None]).all(), "draws from nothing, or none from a tail")
    require((draws[:, 1:] <= draws[:, :-1]).all(), "the draws ascend")
    require((draws <= tail[:, None] + error).all(), "a draw is more probable than the tail")
    for row in range(len(ids)):
        if np.isneginf(tail[row]):
            require((ids[row] == 0).all(), "an absent draw has an id")
            continue
        kept = set(sample.alternative_ids[row, np.isfinite(sample.alternative_logprobs[row])].tolist())
        require(ids[row].max() < vocab, "a draw that the vocabulary does not have")
        require(not set(ids[row].tolist()) & (kept | {int(labels[row])}), "a draw is the label or an alternative")
        starts = np.flatnonzero(np.diff(ids[row].astype(np.int64), prepend=-1))
        require(len(starts) == len(set(ids[row].tolist())), "equal draws do not stand together")
        for run in np.split(draws[row], starts[1:]):
            require((run == run[0]).all(), "a token has two log-probabilities")


def rows_per_block(capture: dict[str, Any]) -> int:
    return int(max(1, min(256, 2**20 // max(1, capture["top_k"] + capture.get("num_tail_samples", 0)))))


# Stores: the bytes of a shard -> its columns


def blocks_of(data: bytes, blocks: list[list[int]]) -> Iterator[bytes]:
    """The blocks of a file, each compared with its crc32c."""
    for offset, length, crc in blocks:
        block = data[offset : offset + length]
        require(len(block) == length and google_crc32c.value(block) == crc, "a block is short or damaged")
        yield block


def decode_zarr(files: dict[str, bytes], commit: dict[str, Any], capture: dict[str, Any]) -> dict[str, Array]:
    from pcodec import standalone

    samples, positions = commit["num_samples"], commit["num_positions"]
    columns: dict[str, tuple[str, tuple[int, ...], int]] = {
        "sample_ids": ("uint64", (samples, 2), 4096),
        "token_ids": ("uint32", (commit["num_tokens"],), 4096),
        "num_tokens": ("uint32", (samples,), 4096),
        "positions": ("int32", (positions,), 4096),
        "num_positions": ("uint32", (samples,), 4096),
        "num_tokens_cut": ("uint32", (samples,), 4096),
    }
    columns |= {
        name: (dtype, (positions, *width), rows_per_block(capture))
        for name, (dtype, width) in row_columns(capture).items()
    }
    place = {name: f"{name}/c/{'/'.join('0' for _ in shape)}" for name, (_, shape, _) in columns.items()}
    require(files.keys() == {"zarr.json", *place.values(), *(f"{c}/zarr.json" for c in columns)}, "files of the shard")
    require(commit["blocks"].keys() == columns.keys(), "blocks of the shard")
    decoded = {}
    for name, (dtype, shape, chunk_rows) in columns.items():
        meta = json.loads(files[f"{name}/zarr.json"])
        require(meta["shape"] == list(shape) and meta["data_type"] == dtype, f"{name}/zarr.json: shape or type")
        rows = min(chunk_rows, shape[0])  # the last chunk is as long as the others, filled up
        blocks = commit["blocks"][name]
        require(len(blocks) == -(-shape[0] // rows), f"{name}: chunks missing")
        values = np.empty((len(blocks) * rows, *shape[1:]), dtype)
        for i, block in enumerate(blocks_of(files[place[name]], blocks)):
            flat = values[i * rows : (i + 1) * rows].reshape(-1)
            progress = standalone.simple_decompress_into(block, flat)  # writes no more than there is room for
            require(progress.n_processed == flat.size and progress.finished, f"{name}: a chunk of another length")
        decoded[name] = values[: shape[0]]
    return decoded


def decode_arrow(files: dict[str, bytes], commit: dict[str, Any], capture: dict[str, Any]) -> dict[str, Array]:
    import pyarrow as pa
    import pyarrow.compute

    require(files.keys() == commit["blocks"].keys() == {"samples.arrow", "logprobs.arrow"}, "files of the shard")

    def table(name: str, rows: int, batch_rows: int) -> Any:
        schema = pa.ipc.open_file(pa.py_buffer(files[name])).schema
        blocks = [pa.ipc.read_message(block) for block in blocks_of(files[name], commit["blocks"][name])]
        batches = [pa.ipc.read_record_batch(block, schema) for block in blocks]
        expected = [min(batch_rows, rows - start) for start in range(0, rows, batch_rows)]
        require([batch.num_rows for batch in batches] == expected, f"{name}: rows")
        return pa.Table.from_batches(batches, schema).combine_chunks()

    def values(column: Any, dtype: str, width: tuple[int, ...] = ()) -> Array:
        require(column.null_count == 0, "a null")
        array = column.combine_chunks()
        array = array.flatten() if pa.types.is_list(array.type) or width else array
        require(array.null_count == 0 and str(array.to_numpy().dtype) == dtype, "a null, or another type")
        return array.to_numpy().reshape(-1, *width)

    samples = table("samples.arrow", commit["num_samples"], 16)
    require(
        samples.column_names == ["sample_id", "token_ids", "positions", "num_tokens_cut"], "columns of samples.arrow"
    )
    decoded = {
        "sample_ids": np.frombuffer(b"".join(samples["sample_id"].to_pylist()), "<u8").reshape(-1, 2),
        "token_ids": values(samples["token_ids"], "uint32"),
        "num_tokens": pa.compute.list_value_length(samples["token_ids"]).to_numpy().astype(np.uint32),
        "positions": values(samples["positions"], "int32"),
        "num_positions": pa.compute.list_value_length(samples["positions"]).to_numpy().astype(np.uint32),
        "num_tokens_cut": values(samples["num_tokens_cut"], "uint32"),
    }
    rows = table("logprobs.arrow", commit["num_positions"], rows_per_block(capture))
    stored = set()
    for name, (dtype, width) in row_columns(capture).items():
        if width and dtype != "float32":
            low_type, high_type, base = {"uint32": ("uint16", "uint8", 65536), "uint16": ("uint8", "uint8", 256)}[dtype]
            low = values(rows[f"{name}_low"], low_type, width).astype(dtype)
            high = values(rows[f"{name}_high"], high_type, width).astype(dtype)
            decoded[name] = low + base * high
            stored |= {f"{name}_low", f"{name}_high"}
        else:
            decoded[name] = values(rows[name], dtype, width)
            stored.add(name)
        require(len(decoded[name]) == commit["num_positions"], f"{name}: rows")
    require(set(rows.column_names) == stored, "columns of logprobs.arrow")
    return decoded
