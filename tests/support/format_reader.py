"""A second reader of the cache format, written from docs/format.md alone and sharing no code with the package.

It needs json, hashlib, NumPy, google-crc32c and, by the store, pcodec or pyarrow. `open_cache(folder)` checks the
manifest, the contents and the index; `Cache.captures` checks and decodes shard after shard; `Cache.samples` joins the
captures of a sample; `Cache.data_sets`, `Cache.recorded_data_sets` and `Cache.learnt` read what is to be learnt. It
reads a shard as a whole, local folders at rest only, and refuses by `FormatError`.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

DROPS_PER_NAT = {"fine": 32, "compact": 16}
LEAST_MAX_ERROR = {"exact": 0.0, "fine": 1 / 64, "compact": 1 / 32}
FEATURES = {"tail-groups", "tail-samples", "quantized-base"}
ABSENT = 65535
ABOVE_ZERO = 1e-6  # rounding of what was captured
INDEX = np.dtype(
    [("sample_id", "<u8", 2), ("shard", "<u4"), ("num_tokens", "<u4"), ("num_positions", "<u4"), ("num_cut", "<u4")]
)
RUNS = np.dtype([("sample_id", "<u8", 2), ("first", "<u4"), ("num_positions", "<u4"), ("cross_entropy", "u1")])

# Fields of the JSON files: see `conforms`

DIGEST = re.compile(r"[0-9a-f]{32}")
DIGEST_OR_NONE = re.compile(r"([0-9a-f]{32})?")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _./:@+-]{0,63}")
METHOD = re.compile(r"[a-z0-9][a-z0-9_.-]{0,31}")
FILE_NAME = re.compile(r"(?!.*\.\.)[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*")
SECRET = re.compile(
    r"://\S*[?#]|\?\S*=|[^\s/:@]:[^\s/@]+@|(?<![\w+.-])https?://[^\s/]+@",
    re.IGNORECASE,
)
"""A query, a user or a password of a URL."""
COUNT, AT_LEAST_ONE = range(2**63), range(1, 2**63)
FILE = {"name": FILE_NAME, "size": COUNT, "checksum": DIGEST}
CAPTURE = {
    "top_k": range(2**18),
    "max_length": range(2, 2**32),
    "min_mass": float,
    "precision": re.compile("exact|fine|compact"),
    "max_error": float,
    "num_tail_groups": (range(1), range(2, 257)),
    "tail_partition": DIGEST_OR_NONE,
    "group_steps_per_nat": (range(2), range(4, 5)),
}
DRAWS = {"num_tail_samples": range(1, 4097)}
MODEL = {
    "weights": DIGEST,
    "config": str,
    "vocab_size": range(2, 2**24),
    "dtype": NAME,
    "attention": NAME,
    "tf32": bool,
}
MANIFEST = {
    "format_version": range(2, 3),
    "reader_features": [str],
    "writer_features": [NAME],
    "store": re.compile("zarr|arrow"),
    "model": (MODEL, MODEL | {"quantization": METHOD}),
    "tokenizer": ({"fingerprint": DIGEST}, None),
    "capture": (CAPTURE, CAPTURE | DRAWS),
    "model_name": str,
    "created_with": dict,
}
DATA_SET = {
    "name": str,
    "file": FILE,
    "num_samples": AT_LEAST_ONE,
    "num_runs": AT_LEAST_ONE,
    "num_positions": AT_LEAST_ONE,
}
CONTENTS = {
    "manifest": DIGEST,
    "num_samples": COUNT,
    "index": FILE,
    "shards": [{"unit": DIGEST, "checksum": DIGEST}],
    "data_sets": [DATA_SET],
}
COMMIT = {
    "unit": DIGEST,
    "identity": DIGEST,
    "num_samples": AT_LEAST_ONE,
    "num_positions": AT_LEAST_ONE,
    "num_tokens": AT_LEAST_ONE,
    "num_tokens_cut": COUNT,
    "kept_mass": float,
    "files": [FILE],
    "blocks": dict,
    "chat_template": DIGEST_OR_NONE,
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
    """Exactly these fields, each of exactly this type, matched by this expression, or in this range of integers."""
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
    if isinstance(schema, re.Pattern):
        return isinstance(value, str) and schema.fullmatch(value) is not None
    if isinstance(schema, range):
        return type(value) is int and value in schema
    return value is None if schema is None else type(value) is schema


def read_json(data: bytes, schema: Any, what: str) -> Any:
    """The body of a JSON file."""
    require(len(data) <= 16 * 2**20, f"{what}: over 16 MiB")
    for mark, share in ((b"[", 8), (b"{", 8), (b":", 16), (b",", 5), (b'"', 5)):
        require(data.count(mark) <= 1000 + len(data) / share, f"{what}: too many of {mark!r}")
    try:
        envelope = json.loads(data)
        body = canonical(envelope["body"])
        checksum = envelope["checksum"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(f"{what}: not JSON with a body and a checksum") from error
    require(digest(body) == checksum, f"{what}: checksum")
    spelt = b'{"body":' + body + b',"checksum":"' + checksum.encode() + b'"}\n'
    require(data == spelt, f"{what}: another spelling than the canonical one")
    require(conforms(envelope["body"], schema), f"{what}: missing or unknown fields, or values that no field has")
    return envelope["body"]


def read_file(root: Path, name: str) -> bytes:
    """A file of the cache, to which no link leads but the root itself and `shards`."""
    path = root
    for part in name.split("/"):
        path = path / part
        require(not path.is_symlink() or path == root / "shards", f"{path}: a link")
    require(path.is_file(), f"{path}: missing")
    return path.read_bytes()


def check_link(root: Path) -> None:
    """Where `shards` is a link it leads to a folder, and to none of another cache."""
    shards = root / "shards"
    if shards.is_symlink():
        require(shards.is_dir(), f"{shards}: a link to no folder")
        for folder in (shards.resolve(), shards.resolve().parent):
            other = folder / "manifest.json"
            ours = not other.exists() or other.samefile(root / "manifest.json")
            require(ours, f"{shards}: a link into another cache")


def read_listed(root: Path, listed: dict[str, Any], folder: str = "") -> bytes:
    """A file of which the name, the size and the checksum are listed."""
    data = read_file(root, folder + listed["name"])
    require(len(data) == listed["size"] and digest(data) == listed["checksum"], f"{listed['name']}: size or checksum")
    return data


def read_npy(data: bytes, dtype: Any, what: str) -> Array:
    """The array of a file of one array, in one dimension."""
    stream = io.BytesIO(data)
    try:
        array = np.lib.format.read_array(stream, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise FormatError(f"{what}: not an array") from error
    require(array.dtype == dtype and array.ndim == 1, f"{what}: columns")
    require(not stream.read(1), f"{what}: more than an array")
    return array


def read_runs(root: Path, entry: dict[str, Any]) -> dict[bytes, dict[int, bool]]:
    """Samples and positions of a data set."""
    runs = read_npy(read_listed(root, entry["file"]), RUNS, "data set")
    require(len(runs) == entry["num_runs"], "data set: num_runs")
    found: dict[bytes, dict[int, bool]] = {}
    before = (b"", 0, -1)
    for sample_id, first, length, counts in zip(*(runs[n].tolist() for n in runs.dtype.names), strict=True):
        key = b"".join(int(part).to_bytes(8, "little") for part in sample_id)
        require(length > 0 and first + length < 2**31, "data set: an empty run, or one beyond all positions")
        require(counts in (0, 1), "data set: cross_entropy")
        apart = first > before[1] or (first == before[1] and counts != before[2])
        require(key > before[0] or (key == before[0] and apart), "data set: runs do not ascend, or could be one")
        before = (key, first + length, counts)
        found.setdefault(key, {}).update({first + i: counts == 1 for i in range(length)})
    require(len(found) == entry["num_samples"], "data set: num_samples")
    require(sum(map(len, found.values())) == entry["num_positions"], "data set: num_positions")
    return found


def check_entry(entry: dict[str, Any]) -> None:
    require(1 <= len(entry["name"]) <= 200, "a data set's name is empty, or over 200 characters")
    check_for_people(entry["name"], "a data set's name")
    require(entry["file"]["name"] == f"data-{entry['file']['checksum']}.npy", "a data set's file has another name")


def identity_of(body: dict[str, Any]) -> str:
    """What the records of a cache with this manifest carry."""
    flat = {"store": body["store"]}
    for group in ("model", "tokenizer", "capture"):
        flat |= {group: None} if body[group] is None else {f"{group}.{name}": x for name, x in body[group].items()}
    return digest(canonical(flat))


def check_manifest(body: dict[str, Any]) -> None:
    check_features(body)
    check_config(body["model"]["config"])
    check_capture(body["capture"], body["model"]["vocab_size"])
    check_for_people(body["model_name"], "model_name")
    require(len(body["created_with"]) <= 32, "created_with: more than 32 names")
    for name, value in body["created_with"].items():
        require(NAME.fullmatch(name), "created_with: a name")
        check_for_people(value, "created_with")


def check_features(body: dict[str, Any]) -> None:
    """No feature that is not known, and each exactly where its field says so."""
    require(set(body["reader_features"]) <= FEATURES, "an unknown reader feature")
    fields = {
        "tail-groups": body["capture"]["num_tail_groups"] > 0,
        "tail-samples": "num_tail_samples" in body["capture"],
        "quantized-base": "quantization" in body["model"],
    }
    for feature, is_there in fields.items():
        require((feature in body["reader_features"]) == is_there, f"{feature} without its field, or reversed")


def check_config(text: str) -> None:
    """An object in canonical JSON."""
    require(len(text) <= 2**18, "config: over 2^18 bytes")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError("config: not JSON") from error
    require(isinstance(config, dict), "config: not an object")
    require(json.dumps(config, sort_keys=True, separators=(",", ":")) == text, "config: not canonical")


def check_capture(capture: dict[str, Any], vocab: int) -> None:
    groups = capture["num_tail_groups"]
    require(capture["top_k"] < vocab, "top_k")
    require(0 < capture["min_mass"] <= 1, "min_mass")
    require(capture["min_mass"] == 1 or capture["top_k"], "min_mass without alternatives")
    least = LEAST_MAX_ERROR[capture["precision"]]
    require(least <= capture["max_error"] <= (0.5 if least else 0), "max_error")
    require((capture["tail_partition"] == "") == (groups == 0), "tail_partition")
    require((capture["group_steps_per_nat"] == 0) == (groups == 0), "group_steps_per_nat")


def check_for_people(text: Any, what: str) -> None:
    """A string that may be printed."""
    require(isinstance(text, str) and len(text) <= 1000, f"{what}: not a string, or over 1,000 characters")
    require(text.isprintable(), f"{what}: cannot be printed")
    require(text == " ".join(text.split()), f"{what}: a space at an end, or two in a row")
    require(not SECRET.search(text), f"{what}: a query, a user or a password")


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
        return {entry["name"]: read_runs(self.folder, entry) for entry in self.contents["data_sets"]}

    def recorded_data_sets(self) -> dict[str, dict[bytes, dict[int, bool]]]:
        """The same as writers know them, which readers need not."""
        recorded = {}
        for name in sorted(p.name for p in self.folder.glob("data-*.json")):
            entry = read_json(read_file(self.folder, name), DATA_SET, name)
            check_entry(entry)
            require(name == f"data-{digest(entry['name'].encode())}.json", f"{name}: of another data set")
            recorded[entry["name"]] = read_runs(self.folder, entry)
        return recorded

    def learnt(self) -> dict[bytes, dict[int, bool]]:
        """What is to be learnt where nobody names data, by sample id: the union of the data sets."""
        held: dict[bytes, dict[int, bool]] = {}
        for sample in self.captures():
            held.setdefault(sample_id(sample.token_ids), {}).update(dict.fromkeys(sample.positions.tolist(), True))
        if not self.contents["data_sets"]:
            return held
        union: dict[bytes, dict[int, bool]] = {}
        for name, samples in self.data_sets().items():
            for key, positions in samples.items():
                require(positions.keys() <= held.get(key, {}).keys(), f"{name}: a sample or position of no shard")
                require(union.setdefault(key, positions) == positions, f"{name}: other runs than another data set")
        return union

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
            data = read_file(self.folder, f"shards/{listed['unit']}.json")
            require(digest(data) == listed["checksum"], f"commit record of {listed['unit']}: checksum")
            commit = read_json(data, COMMIT, f"commit record of {listed['unit']}")
            check_blocks(commit["blocks"])
            require(0 <= commit["kept_mass"] <= 1.001 * commit["num_positions"], "commit record: kept_mass")
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
        folder = f"shards/{commit['unit']}-{digest(canonical(commit['files']))[:16]}/"
        files = {listed["name"]: read_listed(self.folder, listed, folder) for listed in commit["files"]}
        require(len(files) == len(commit["files"]), "commit record: a file stands twice")
        decode = {"zarr": decode_zarr, "arrow": decode_arrow}[self.manifest["store"]]
        columns = decode(files, commit, capture)
        rows = decode_rows(columns, capture)
        num_tokens, num_positions = columns["num_tokens"], columns["num_positions"]
        require(len(num_tokens) == len(num_positions) == commit["num_samples"], "commit record: num_samples")
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


def check_blocks(blocks: dict[str, Any]) -> None:
    """By stream: offset, length and crc32c of each."""
    for listed in blocks.values():
        require(conforms(listed, [[COUNT]]), "commit record: blocks")
        require(all(len(block) == 3 and block[2] < 2**32 for block in listed), "commit record: blocks")


def open_cache(folder: str | Path) -> Cache:
    folder = Path(folder)
    require((folder / "contents.json").is_file(), "no contents.json: not a cache, or not finished")
    data = read_file(folder, "manifest.json")
    manifest = read_json(data, MANIFEST, "manifest.json")
    check_manifest(manifest)
    check_link(folder)
    contents = read_json(read_file(folder, "contents.json"), CONTENTS, "contents.json")
    require(contents["manifest"] == digest(data), "contents.json belongs to another manifest.json")
    check_contents(contents)
    index = read_npy(read_listed(folder, contents["index"]), INDEX, "index")
    shards = np.unique(index["shard"]).tolist()
    require(shards == list(range(len(contents["shards"]))), "index: a shard without samples, or one that is not there")
    require((np.diff(index["shard"].astype(np.int64)) >= 0).all(), "index: order of the shards")
    require(len(index) == contents["num_samples"], "contents.json: num_samples")  # one captured twice counts twice
    return Cache(folder, manifest, contents, index, read_groups(folder, manifest))


def check_contents(contents: dict[str, Any]) -> None:
    require(contents["index"]["name"] == f"index-{contents['index']['checksum']}.npy", "the index has another name")
    units = [listed["unit"] for listed in contents["shards"]]
    require(units == sorted(set(units)), "contents.json: order of the shards")
    names = [entry["name"] for entry in contents["data_sets"]]
    require(names == sorted(set(names)) and len(names) <= 256, "contents.json: names of data sets")
    for entry in contents["data_sets"]:
        check_entry(entry)


def read_groups(folder: Path, manifest: dict[str, Any]) -> Array | None:
    """The tail group of each token."""
    capture = manifest["capture"]
    if not capture["num_tail_groups"]:
        return None
    groups = read_npy(read_file(folder, "token_groups.npy"), np.uint8, "token_groups.npy")
    require(len(groups) == manifest["model"]["vocab_size"], "token_groups.npy: shape")
    require(digest(groups.tobytes()) == capture["tail_partition"], "token_groups.npy: checksum")
    require(groups.max() < capture["num_tail_groups"], "token_groups.npy: groups")
    return groups


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
    above = np.where(np.isneginf(tail), 0, tail)[:, None]  # a group of nothing says so by itself
    groups, draws = columns.get("tail_group_steps"), columns.get("tail_sample_drops")
    per_nat = capture["group_steps_per_nat"]
    return {
        "label_logprobs": from_steps(columns["label_steps"], 1024),
        "alternative_ids": columns["alternative_ids"],
        "alternative_logprobs": from_drops(columns["alternative_drops"], drops_per_nat),
        "tail_logprobs": tail,
        "tail_group_logprobs": None if groups is None else above + from_steps(groups, per_nat),
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


def parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FormatError("not JSON") from error


def has(value: Any, expected: Any) -> bool:
    """What is expected is there; an object may say more."""
    if isinstance(expected, dict):
        return isinstance(value, dict) and all(k in value and has(value[k], expected[k]) for k in expected)
    if isinstance(expected, list):
        return isinstance(value, list) and len(value) == len(expected) and all(map(has, value, expected))
    return type(value) is type(expected) and value == expected


def steps_of(name: str, capture: dict[str, Any]) -> int | None:
    """What to divide the integers of a column by."""
    if name.endswith("_drops"):
        return DROPS_PER_NAT[capture["precision"]]
    return {"label_steps": 1024, "tail_steps": 1024, "tail_group_steps": capture["group_steps_per_nat"]}.get(name)


def array_metadata(dtype: str, shape: tuple[int, ...], rows: int, steps: int | None) -> dict[str, Any]:
    """What zarr.json says of a column of chunks of so many rows, so that other tools read it."""
    chunk, shard = [rows, *shape[1:]], [-(-shape[0] // rows) * rows, *shape[1:]]
    sharding = {
        "chunk_shape": chunk,
        "codecs": [{"name": "numcodecs.pcodec"}, {"name": "crc32c"}],
        "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
        "chunk_key_encoding": {"name": "default"},
        "fill_value": "NaN" if dtype == "float32" else int(np.iinfo(dtype).max),
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": {} if steps is None else {"steps_per_nat": steps},
    }


def check_zarr_index(data: bytes, blocks: list[list[int]], name: str) -> None:
    """The crc32c stands after each chunk, and the index at the end says where each is."""
    for offset, length, crc in blocks:
        require(data[offset + length :][:4] == struct.pack("<I", crc), f"{name}: no crc32c after a chunk")
    index = b"".join(struct.pack("<QQ", offset, length + 4) for offset, length, _ in blocks)
    end = struct.pack("<I", google_crc32c.value(index))
    require(data.endswith(index + end), f"{name}: the index is not that of the blocks")


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
    require(has(parsed(files["zarr.json"]), {"zarr_format": 3, "node_type": "group"}), "zarr.json: not a group")
    decoded = {}
    for name, (dtype, shape, chunk_rows) in columns.items():
        rows = min(chunk_rows, shape[0])  # the last chunk is as long as the others, filled up
        expected = array_metadata(dtype, shape, rows, steps_of(name, capture))
        require(has(parsed(files[f"{name}/zarr.json"]), expected), f"{name}/zarr.json: not what it has to say")
        blocks = commit["blocks"][name]
        require(len(blocks) == -(-shape[0] // rows), f"{name}: chunks missing")
        check_zarr_index(files[place[name]], blocks, name)
        values = np.empty((len(blocks) * rows, *shape[1:]), dtype)
        for i, block in enumerate(blocks_of(files[place[name]], blocks)):
            flat = values[i * rows : (i + 1) * rows].reshape(-1)
            try:
                progress = standalone.simple_decompress_into(block, flat)  # writes no more than there is room for
            except (ValueError, TypeError, RuntimeError) as error:
                raise FormatError(f"{name}: a chunk that is not pcodec's") from error
            require(progress.n_processed == flat.size and progress.finished, f"{name}: a chunk of another length")
        beyond = values[shape[0] :]
        require((np.isnan(beyond) if dtype == "float32" else beyond == np.iinfo(dtype).max).all(), f"{name}: filling")
        decoded[name] = values[: shape[0]]
    return decoded


def flat_field(data: bytes, table: int, number: int) -> int:
    """Where a field of a flatbuffers table is; 0: it is not there."""
    fields = table - struct.unpack_from("<i", data, table)[0]
    place = 4 + 2 * number
    offset = (
        struct.unpack_from("<H", data, fields + place)[0] if place < struct.unpack_from("<H", data, fields)[0] else 0
    )
    return table + offset if offset else 0


def flat_follow(data: bytes, place: int) -> int:
    require(place, "an Arrow message without a field")
    return int(place + struct.unpack_from("<I", data, place)[0])


def unpacked_bytes(block: bytes) -> int:
    """What the buffers of a record batch, zstd all of them, say that they unpack to."""
    mark, size = struct.unpack_from("<Ii", block)
    message, body = block[8 : 8 + size], block[8 + size :]
    require(mark == 0xFFFFFFFF and len(message) == size, "not an Arrow message")
    root = struct.unpack_from("<I", message)[0]
    kind = flat_field(message, root, 1)
    require(kind and message[kind] == 3, "not a record batch")
    batch = flat_follow(message, flat_field(message, root, 2))
    codec = flat_field(message, flat_follow(message, flat_field(message, batch, 3)), 0)
    require(codec and message[codec] == 1, "buffers that are not zstd")
    buffers = flat_follow(message, flat_field(message, batch, 2))
    total = 0
    for i in range(struct.unpack_from("<I", message, buffers)[0]):
        offset, length = struct.unpack_from("<qq", message, buffers + 4 + 16 * i)
        require(offset >= 0 and length >= 0 and offset + length <= len(body), "a buffer beyond its message")
        stated = struct.unpack_from("<q", body, offset)[0] if length else 0
        require(stated >= -1, "a buffer of a negative length")
        total += length if stated == -1 else stated  # -1: as it is
    return total


def read_batches(data: bytes, blocks: list[list[int]], rows: list[int], room: int, types: dict[str, Any]) -> Any:
    """The table of an Arrow file of batches of so many rows, which unpack to so many bytes together at most."""
    import pyarrow as pa

    try:
        file = pa.ipc.open_file(pa.py_buffer(data))
        found = list(blocks_of(data, blocks))
        require(len(found) == file.num_record_batches == len(rows), "batches missing")
        require(sum(map(unpacked_bytes, found)) <= room, "batches that unpack to more than their rows")
        batches = [pa.ipc.read_record_batch(pa.ipc.read_message(block), file.schema) for block in found]
        for batch in batches:
            batch.validate(full=True)
    except (struct.error, IndexError, OSError, ValueError, pa.ArrowException) as error:
        raise FormatError("not Arrow") from error
    require([batch.num_rows for batch in batches] == rows, "rows of a batch")
    require(all(file.get_batch(i).equals(batch) for i, batch in enumerate(batches)), "blocks that are not the file's")
    schema = file.schema
    require(sorted(schema.names) == sorted(types), "columns of an Arrow file")
    require(all(schema.field(name).type == types[name] for name in types), "type of a column")
    return pa.Table.from_batches(batches, schema).combine_chunks()


def arrow_types(capture: dict[str, Any]) -> dict[str, Any]:
    """The columns of logprobs.arrow."""
    import pyarrow as pa

    halves = {"uint32": (pa.uint16(), pa.uint8()), "uint16": (pa.uint8(), pa.uint8())}
    types = {}
    for name, (dtype, width) in row_columns(capture).items():
        if width and dtype in halves:
            types[f"{name}_low"], types[f"{name}_high"] = (pa.list_(half, *width) for half in halves[dtype])
        else:
            types[name] = pa.list_(pa.float32(), *width) if width else pa.type_for_alias(dtype)
    return types


def decode_arrow(files: dict[str, bytes], commit: dict[str, Any], capture: dict[str, Any]) -> dict[str, Array]:
    import pyarrow as pa
    import pyarrow.compute

    require(files.keys() == commit["blocks"].keys() == {"samples.arrow", "logprobs.arrow"}, "files of the shard")

    def table(name: str, rows: int, batch_rows: int, room: int, types: dict[str, Any]) -> Any:
        batches = [min(batch_rows, rows - start) for start in range(0, rows, batch_rows)]
        room += 64 * 3 * len(types) * len(batches)  # buffers may be padded
        return read_batches(files[name], commit["blocks"][name], batches, room, types)

    def values(column: Any, width: tuple[int, ...] = ()) -> Array:
        array = column.combine_chunks()
        inner = array.flatten() if pa.types.is_list(array.type) or width else array
        require(array.null_count == inner.null_count == 0, "a null")
        return inner.to_numpy().reshape(-1, *width)

    num_samples, num_positions = commit["num_samples"], commit["num_positions"]
    types = {
        "sample_id": pa.binary(16),
        "token_ids": pa.list_(pa.uint32()),
        "positions": pa.list_(pa.int32()),
        "num_tokens_cut": pa.uint32(),
    }
    room = (16 + 4 + 4 + 4) * num_samples + 4 * (commit["num_tokens"] + num_positions)
    samples = table("samples.arrow", num_samples, 16, room, types)
    require(samples["sample_id"].null_count == 0, "a null")
    decoded = {
        "sample_ids": np.frombuffer(b"".join(samples["sample_id"].to_pylist()), "<u8").reshape(-1, 2),
        "token_ids": values(samples["token_ids"]),
        "num_tokens": pa.compute.list_value_length(samples["token_ids"]).to_numpy().astype(np.uint32),
        "positions": values(samples["positions"]),
        "num_positions": pa.compute.list_value_length(samples["positions"]).to_numpy().astype(np.uint32),
        "num_tokens_cut": values(samples["num_tokens_cut"]),
    }
    columns = row_columns(capture)
    room = num_positions * sum(int(np.prod(width)) * np.dtype(dtype).itemsize for dtype, width in columns.values())
    rows = table("logprobs.arrow", num_positions, rows_per_block(capture), room, arrow_types(capture))
    for name, (dtype, width) in columns.items():
        if name in rows.column_names:
            decoded[name] = values(rows[name], width)
        else:
            low, high = (values(rows[f"{name}_{half}"], width).astype(dtype) for half in ("low", "high"))
            decoded[name] = low + (65536 if dtype == "uint32" else 256) * high
        require(len(decoded[name]) == num_positions, f"{name}: rows")
    return decoded
