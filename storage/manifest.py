"""The JSON files of a cache: frozen dataclasses <-> canonical bytes that carry their own checksum.

`manifest.json` says what the cache belongs to, `shards/<unit>.json` commits one shard, `contents.json` lists the
shards of a finished cache. docs/format.md is the specification. Owns bounds and names: everything read here is
checked before anything is allocated or opened. Must not know where shards keep their columns.
"""

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args

from .errors import CorruptCache, UnsupportedFormat
from .identity import CaptureSettings, ModelIdentity, TokenizerIdentity, digest

FORMAT_VERSION = 1
KNOWN_FEATURES: frozenset[str] = frozenset()
STORES = ("zarr", "arrow")
MAX_JSON_BYTES = 64 * 2**20
MAX_VOCAB_SIZE = 2**24

_UNIT = re.compile(r"[0-9a-f]{32}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*")

T = TypeVar("T")


@dataclass(frozen=True)
class Manifest:
    """What a cache belongs to and how it is stored. Written once, never changed.

    model, tokenizer (None where the data were token ids) and capture are the identity; `store` is where the bytes
    are; `created_with` and `model_name` are for people and decide nothing.
    """

    store: str
    model: ModelIdentity
    tokenizer: TokenizerIdentity | None
    capture: CaptureSettings
    model_name: str
    created_with: dict[str, str]
    features: tuple[str, ...] = ()
    format_version: int = FORMAT_VERSION

    def differences(self, other: "Manifest") -> list[str]:
        """Where two caches differ in identity: 'capture.top_k: 64 here, 32 there'. Empty: the same cache."""
        mine, theirs = self._identity(), other._identity()
        return [
            f"{key}: {mine.get(key)} here, {theirs.get(key)} there"
            for key in sorted(mine.keys() | theirs.keys())
            if mine.get(key) != theirs.get(key)
        ]

    def _identity(self) -> dict[str, object]:
        flat: dict[str, object] = {"store": self.store}
        for group in ("model", "tokenizer", "capture"):
            value = getattr(self, group)
            flat |= {f"{group}.{k}": v for k, v in asdict(value).items()} if value else {group: None}
        return flat


@dataclass(frozen=True)
class StoredFile:
    """One file of a shard: its name inside the shard's folder, its size and its checksum."""

    name: str
    size: int
    checksum: str


@dataclass(frozen=True)
class ShardCommit:
    """What makes a shard exist: counts, files with sizes and checksums, and what its store needs for reading.

    blocks: [offset, length, crc32c] of what is read apart: each record batch in logprobs.arrow; in Zarr, column by
    column, each chunk and then the shard index.
    kept_mass: sum over positions of the non-target mass kept.
    """

    unit: str
    num_samples: int
    num_positions: int
    num_tokens: int
    num_tokens_cut: int
    kept_mass: float
    files: tuple[StoredFile, ...]
    blocks: tuple[tuple[int, int, int], ...] = ()

    @property
    def num_bytes(self) -> int:
        """Size of the shard's files."""
        return sum(f.size for f in self.files)


@dataclass(frozen=True)
class ShardEntry:
    """A shard in the contents: its unit and the checksum of its commit record."""

    unit: str
    checksum: str


@dataclass(frozen=True)
class Contents:
    """The shards of a finished cache, and the checksum of its manifest. A reader sees these shards and no others."""

    manifest: str
    shards: tuple[ShardEntry, ...]


def to_bytes(value: Manifest | ShardCommit | Contents) -> bytes:
    """Canonical JSON of a value inside {"checksum", "body"}; the checksum is `digest` of the canonical body."""
    body = _canonical(asdict(value))
    return b'{"body":' + body + b',"checksum":"' + digest(body).encode() + b'"}\n'


def from_bytes(cls: type[T], data: bytes, where: str) -> T:
    """The value that `to_bytes` wrote. Raises `CorruptCache`, or `UnsupportedFormat` for a newer manifest."""
    try:
        envelope = json.loads(data)
        body, checksum = envelope["body"], envelope["checksum"]
        intact = digest(_canonical(body)) == checksum
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _corrupt(where, f"expected the JSON this program writes, found {error!r}") from error
    if not intact:
        raise _corrupt(where, f"expected checksum {checksum}, found {digest(_canonical(body))}")
    try:
        if cls is Manifest:
            _check_version(body, where)
        value = _build(cls, body)
        _check_bounds(value)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _corrupt(where, str(error)) from error
    return value


def read_json(cls: type[T], path: Path) -> T:
    """`from_bytes` of a file, which must exist and be of a sane size."""
    return from_bytes(cls, read_bytes(path), str(path))


def read_bytes(path: Path) -> bytes:
    """The bytes of a JSON file of a cache. Raises `CorruptCache` where it is missing or absurdly large."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise _corrupt(str(path), f"expected at most {MAX_JSON_BYTES} bytes, found {size}")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise _corrupt(str(path), "the file is missing") from error


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _corrupt(where: str, what: str) -> CorruptCache:
    return CorruptCache(
        f"reading {where}: {what}. Nothing in it can be trusted. "
        "Run `logitcache verify`, or precompute again into a new folder."
    )


def _check_version(body: dict[str, Any], where: str) -> None:
    version, unknown = body.get("format_version"), set(body.get("features", ())) - KNOWN_FEATURES
    if version != FORMAT_VERSION or unknown:
        found = f"features {sorted(unknown)}" if unknown else f"version {version}"
        raise UnsupportedFormat(
            f"reading {where}: expected format version {FORMAT_VERSION} with features {sorted(KNOWN_FEATURES)}, "
            f"found {found}. Its numbers could be misread. Install a newer logitcache."
        )


def _build(cls: type[T], body: Any) -> T:
    """A dataclass from plain JSON, exactly its fields, each of the type it declares."""
    names = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    if not isinstance(body, dict) or body.keys() != names:
        found = sorted(body) if isinstance(body, dict) else type(body).__name__
        raise ValueError(f"expected the fields {sorted(names)}, found {found}")
    return cls(**{f.name: _convert(f.type, body[f.name], f.name) for f in fields(cls)})  # type: ignore[arg-type]


def _convert(kind: Any, value: Any, name: str) -> Any:
    if isinstance(kind, UnionType):
        (inner,) = (k for k in get_args(kind) if k is not NoneType)
        return None if value is None else _convert(inner, value, name)
    if getattr(kind, "__origin__", None) is tuple:
        parts = get_args(kind)
        if not isinstance(value, list) or (parts[-1] is not Ellipsis and len(parts) != len(value)):
            raise ValueError(f"{name}: expected a list like {kind}, found {value!r:.80}")
        return tuple(_convert(parts[0], v, name) for v in value)
    if getattr(kind, "__origin__", None) is dict:
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            raise ValueError(f"{name}: expected an object of strings, found {value!r:.80}")
        return value
    if hasattr(kind, "__dataclass_fields__"):
        return _build(kind, value)
    if type(value) is not kind:
        raise ValueError(f"{name}: expected {kind.__name__}, found {value!r:.80}")
    return value


def _check_bounds(value: object) -> None:
    if isinstance(value, Manifest):
        if value.store not in STORES:
            raise ValueError(f"store: expected one of {STORES}, found {value.store!r:.80}")
        if not 2 <= value.model.vocab_size <= MAX_VOCAB_SIZE:
            raise ValueError(f"model.vocab_size: expected 2 to {MAX_VOCAB_SIZE}, found {value.model.vocab_size}")
        if not 1 <= value.capture.top_k < value.model.vocab_size:
            raise ValueError(f"capture.top_k: expected 1 to V - 1, found {value.capture.top_k}")
        if value.capture.max_length < 2:
            raise ValueError(f"capture.max_length: expected at least 2, found {value.capture.max_length}")
    if isinstance(value, ShardCommit):
        _check_commit(value)
    if isinstance(value, Contents):
        for entry in value.shards:
            _check_unit(entry.unit)
        if len({entry.unit for entry in value.shards}) != len(value.shards):
            raise ValueError("a shard is listed twice")


def _check_commit(commit: ShardCommit) -> None:
    _check_unit(commit.unit)
    counts = (commit.num_samples, commit.num_positions, commit.num_tokens)
    if not all(1 <= n < 2**40 for n in counts) or not 0 <= commit.num_tokens_cut < 2**40:
        raise ValueError(f"counts: expected 1 to 2^40, found {counts}")
    for file in commit.files:
        plain = len(file.name) < 256 and _FILE_NAME.fullmatch(file.name) and ".." not in file.name.split("/")
        if not plain or not 0 <= file.size < 2**50:
            raise ValueError(f"file {file.name!r:.80}: expected a plain name inside the shard and a sane size")
    if len({file.name for file in commit.files}) != len(commit.files):
        raise ValueError("a file is listed twice")
    if any(not 0 <= offset < 2**50 or not 0 < length < 2**40 for offset, length, _ in commit.blocks):
        raise ValueError("blocks: expected offsets and lengths inside the file")


def _check_unit(unit: str) -> None:
    if not _UNIT.fullmatch(unit):
        raise ValueError(f"unit: expected 32 hexadecimal digits, found {unit!r:.80}")
