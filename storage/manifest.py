"""The JSON files of a cache: frozen dataclasses <-> canonical bytes that carry their own checksum.

`manifest.json` says what the cache belongs to, `shards/<unit>.json` commits one shard, `contents.json` lists the
shards of a finished cache and names its index. docs/format.md is the specification. Owns bounds and names: everything
read here is checked before anything is allocated or opened. Must not know where shards keep their columns.
"""

import re
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args

from .checked_json import MAX_JSON_BYTES as MAX_JSON_BYTES
from .checked_json import body_of, canonical, envelope
from .configs import ConfigDifferences, as_spelt, check_config_text
from .encoding import GROUP_STEPS_PER_NAT, PRECISIONS
from .errors import CorruptCache, InvalidRecord, UnsupportedFormat
from .files import Files, how_missing
from .identity import CaptureIdentity, ModelIdentity, TokenizerIdentity, differing, digest, digest_json
from .layout import MANIFEST, data_file_name, shard_folder
from .plain_text import one_line, shown

FORMAT_VERSION = 2
TAIL_GROUPS = "tail-groups"
TAIL_SAMPLES = "tail-samples"
QUANTIZED_BASE = "quantized-base"
READER_FEATURES = frozenset({TAIL_GROUPS, TAIL_SAMPLES, QUANTIZED_BASE})
WRITER_FEATURES: frozenset[str] = frozenset()
STORES = ("zarr", "arrow")
MAX_SHARDS = 180_000
"""Of a cache: contents.json has 90 bytes for each."""
MAX_VOCAB_SIZE = 2**24 - 1
MAX_TOP_K = 2**18
MAX_TAIL_GROUPS = 256
MAX_TAIL_SAMPLES = 4096
MAX_DATA_SETS, MAX_DATA_SET_NAME = 256, 200
"""Of a cache; and characters of the name of each."""
MAX_ERROR = 0.5
"""Nats; more than a precision promises where a cache was converted twice."""

_LATER_FIELDS: dict[type, dict[str, Any]] = {
    CaptureIdentity: {"num_tail_samples": 0},
    ModelIdentity: {"quantization": ""},
}
"""Fields that came with a feature, and what they are without it: then they are not in the JSON."""

MAX_NAME = 64
"""Characters of a dtype, an attention, a feature, and the name of a package."""
MAX_TEXT = 1000
"""Characters of what is for people."""
MAX_PACKAGES = 32
"""Entries of `created_with`."""

_SHORT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _./:@+-]*")
_QUANTIZATION = re.compile(r"[a-z0-9][a-z0-9_.-]{0,31}")
_DIGITS = re.compile(r"[0-9a-f]{32}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*")

T = TypeVar("T")


@dataclass(frozen=True)
class Manifest:
    """What a cache belongs to and how it is stored. Written once, never changed.

    model, tokenizer (None where the data were token ids) and capture are the identity; `store` is where the bytes
    are; `created_with` and `model_name` are for people and decide nothing. Who does not know a reader feature can
    neither read nor write the cache; who does not know a writer feature can read it.
    """

    store: str
    model: ModelIdentity
    tokenizer: TokenizerIdentity | None
    capture: CaptureIdentity
    model_name: str
    created_with: dict[str, str]
    reader_features: tuple[str, ...] = ()
    writer_features: tuple[str, ...] = ()
    format_version: int = FORMAT_VERSION

    def differences(
        self, other: "Manifest", here: str = "here", there: str = "there", configs: ConfigDifferences = as_spelt
    ) -> list[str]:
        """`identity.differing` of two caches. Empty: the same cache."""
        return differing(self._identity(), other._identity(), here, there, configs)

    @cached_property
    def identity_digest(self) -> str:
        """`digest` of the identity: what commit records carry, so that no other base's shard is taken for this one's.

        Caches without `differences` have records of one digest unless two spellings of an identity agree.
        """
        return digest(canonical(self._identity()))

    def _identity(self) -> dict[str, object]:
        """What `differences` compares, flat; without what is not in the JSON either, so that a digest stays what it is
        when fields are added."""
        flat: dict[str, object] = {"store": self.store}
        for group in ("model", "tokenizer", "capture"):
            value = getattr(self, group)
            flat |= {f"{group}.{k}": v for k, v in _plain(value).items()} if value else {group: None}
        return flat


@dataclass(frozen=True)
class StoredFile:
    """One file of a shard: its name inside the shard's folder, its size and its checksum."""

    name: str
    size: int
    checksum: str


Block = tuple[int, int, int]
"""A part of a file that is read apart: its offset, its length and its crc32c."""


@dataclass(frozen=True)
class ShardCommit:
    """What makes a shard exist: counts, files with sizes and checksums, and what its store needs for reading."""

    unit: str
    #: `Manifest.identity_digest` of the cache that it was made for.
    identity: str
    num_samples: int
    num_positions: int
    num_tokens: int
    num_tokens_cut: int
    #: Sum over positions of the non-target mass kept.
    kept_mass: float
    files: tuple[StoredFile, ...]
    #: Of each stream of the store (in Zarr a column, in Arrow a file) the parts that are read apart, in order.
    blocks: dict[str, tuple[Block, ...]]
    #: Digest of the chat template that rendered its samples, "" where they were not rendered.
    chat_template: str = ""

    @property
    def folder(self) -> str:
        """The folder of its files, named by what they contain: two writers of one unit cannot disturb one another."""
        return shard_folder(self.unit, digest_json(_plain(self.files)))

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
class DataSetEntry:
    """A data set that a cache was filled with: its name, as it was given, and the file of its samples and positions."""

    #: Printable, `MAX_DATA_SET_NAME` characters at most, without what a URL says to its server alone.
    name: str
    file: StoredFile
    #: Different token sequences.
    num_samples: int
    #: Rows of the file.
    num_runs: int
    num_positions: int


@dataclass(frozen=True)
class Contents:
    """The shards of a finished cache, their index, its data sets, and the checksum of the manifest.

    A reader sees no other shards.
    """

    manifest: str
    num_samples: int
    index: StoredFile
    shards: tuple[ShardEntry, ...]
    #: In the order of their names.
    data_sets: tuple[DataSetEntry, ...]


def to_bytes(value: object) -> bytes:
    """Canonical JSON of a value inside {"checksum", "body"}; the checksum is `digest` of the canonical body."""
    data = envelope(_plain(value))
    if len(data) > MAX_JSON_BYTES:
        raise InvalidRecord(
            f"writing {type(value).__name__}: expected at most {MAX_JSON_BYTES} bytes, found {len(data)}. Readers "
            "would refuse it. Write fewer, larger shards (--shard-positions), or smaller ones if one is too large."
        )
    return data


def from_bytes(cls: type[T], data: bytes, where: str) -> T:
    """The value that `to_bytes` wrote. Raises `CorruptCache`, or `UnsupportedFormat` for a newer manifest."""
    try:
        body = body_of(data)
    except ValueError as error:
        raise _corrupt(where, str(error)) from error
    try:
        if cls is Manifest:
            _check_version(body, where)
        value = _build(cls, body)
        _check_bounds(value)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _corrupt(where, str(error)) from error
    return value


def read_json(cls: type[T], files: Files, name: str) -> T:
    """`from_bytes` of a file, which must exist and be of a sane size."""
    return from_bytes(cls, read_bytes(files, name), f"{files.root}/{name}")


def read_bytes(files: Files, name: str) -> bytes:
    """The bytes of a JSON file of a cache. Raises `CorruptCache` where it is missing or absurdly large."""
    where = f"{files.root}/{name}"
    try:
        data = files.read(name, MAX_JSON_BYTES)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise _corrupt(where, how_missing(error)) from error
    if len(data) > MAX_JSON_BYTES:
        raise _corrupt(where, f"expected at most {MAX_JSON_BYTES} bytes, found more")
    return data


def _plain(value: Any) -> Any:
    """Dataclasses as dicts, all the way down; `dataclasses.asdict` copies every number of every block."""
    if is_dataclass(value):
        later = _LATER_FIELDS.get(type(value), {})
        plain = {f.name: getattr(value, f.name) for f in fields(value)}
        return {name: _plain(v) for name, v in plain.items() if name not in later or v != later[name]}
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, tuple) and value and not isinstance(value[0], int):
        return [_plain(v) if is_dataclass(v) else v for v in value]
    return value


def _corrupt(where: str, what: str) -> CorruptCache:
    return CorruptCache(
        f"reading {where}: {what}. Nothing in it can be trusted. Run `logitcache repair` and the same precompute "
        f"again; where {MANIFEST} itself is damaged, remove it, and the same precompute alone writes it again."
    )


def _check_version(body: dict[str, Any], where: str) -> None:
    version, unknown = body.get("format_version"), set(body.get("reader_features", ())) - READER_FEATURES
    if version == 1:
        raise UnsupportedFormat(
            f"reading {where}: expected format version {FORMAT_VERSION}, found version 1. Its shards do not say which "
            "base and capture they are of, so that another's could be taken for its own; nothing was read. Run the "
            "same `logitcache precompute` into a new folder."
        )
    if version != FORMAT_VERSION or unknown:
        found = f"features {shown(sorted(unknown))}" if unknown else f"version {shown(version)}"
        raise UnsupportedFormat(
            f"reading {where}: expected format version {FORMAT_VERSION} with features among "
            f"{sorted(READER_FEATURES)}, found {found}. Its numbers could be misread. Install a newer logitcache."
        )


def _build(cls: type[T], body: Any) -> T:
    """A dataclass from plain JSON, exactly its fields, each of the type it declares."""
    later = _LATER_FIELDS.get(cls, {})
    kinds = {f.name: f.type for f in fields(cls)}  # type: ignore[arg-type]
    if not isinstance(body, dict) or not kinds.keys() - later.keys() <= body.keys() <= kinds.keys():
        found = shown(sorted(body)) if isinstance(body, dict) else type(body).__name__
        raise ValueError(f"expected the fields {sorted(kinds)}, found {found}")
    value = cls(**{name: _convert(kinds[name], found, name) for name, found in body.items()})
    for name in body.keys() & later.keys():
        if getattr(value, name) == later[name]:
            raise ValueError(f"{name}: expected no such field, or another value than {later[name]!r}")
    return value


def _convert(kind: Any, value: Any, name: str) -> Any:
    if isinstance(kind, UnionType):
        (inner,) = (k for k in get_args(kind) if k is not NoneType)
        return None if value is None else _convert(inner, value, name)
    if getattr(kind, "__origin__", None) is tuple:
        parts = get_args(kind)
        if not isinstance(value, list) or (parts[-1] is not Ellipsis and len(parts) != len(value)):
            raise ValueError(f"{name}: expected a list like {kind}, found {shown(value)}")
        return tuple(_convert(parts[0], v, name) for v in value)
    if getattr(kind, "__origin__", None) is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{name}: expected an object, found {shown(value)}")
        return {key: _convert(get_args(kind)[1], v, name) for key, v in value.items()}
    if hasattr(kind, "__dataclass_fields__"):
        return _build(kind, value)
    if type(value) is not kind:
        raise ValueError(f"{name}: expected {kind.__name__}, found {shown(value)}")
    return value


def features_of(capture: CaptureIdentity, model: ModelIdentity | None = None) -> tuple[str, ...]:
    """The reader features of a cache with these settings, of this base."""
    held = {
        TAIL_GROUPS: capture.num_tail_groups > 0,
        TAIL_SAMPLES: capture.num_tail_samples > 0,
        QUANTIZED_BASE: model is not None and bool(model.quantization),
    }
    return tuple(name for name, is_there in held.items() if is_there)


def _check_bounds(value: object) -> None:
    if isinstance(value, Manifest):
        if value.store not in STORES:
            raise ValueError(f"store: expected one of {STORES}, found {shown(value.store)}")
        if not 2 <= value.model.vocab_size <= MAX_VOCAB_SIZE:
            raise ValueError(f"model.vocab_size: expected 2 to {MAX_VOCAB_SIZE}, found {shown(value.model.vocab_size)}")
        _check_texts(value)
        _check_capture(value.capture, value.model.vocab_size)
        if (value.capture.num_tail_groups > 0) != (TAIL_GROUPS in value.reader_features):
            raise ValueError(f"reader_features: expected {TAIL_GROUPS!r} exactly where there are tail groups")
        if (value.capture.num_tail_samples > 0) != (TAIL_SAMPLES in value.reader_features):
            raise ValueError(f"reader_features: expected {TAIL_SAMPLES!r} exactly where there are draws from the tail")
        if bool(value.model.quantization) != (QUANTIZED_BASE in value.reader_features):
            raise ValueError(f"reader_features: expected {QUANTIZED_BASE!r} exactly where the base was quantised")
        check_config_text(value.model.config)
        if value.model.quantization and not _QUANTIZATION.fullmatch(value.model.quantization):
            raise ValueError(f"model.quantization: expected a short name, found {shown(value.model.quantization)}")
    if isinstance(value, ShardCommit):
        _check_commit(value)
    if isinstance(value, Contents):
        for entry in value.shards:
            _check_unit(entry.unit)
            _check_digits("checksum", entry.checksum)
        _check_digits("manifest", value.manifest)
        if len({entry.unit for entry in value.shards}) != len(value.shards):
            raise ValueError("a shard is listed twice")
        if not 0 <= value.num_samples < 2**32:
            raise ValueError(f"num_samples: expected 0 to 2^32, found {shown(value.num_samples)}")
        _check_files((value.index,))
        for data_set in value.data_sets:
            _check_data_set(data_set)
        names = [data_set.name for data_set in value.data_sets]
        if names != sorted(set(names)) or len(names) > MAX_DATA_SETS:
            raise ValueError(f"data_sets: expected {MAX_DATA_SETS} at most, in the order of their names")
    if isinstance(value, DataSetEntry):
        _check_data_set(value)


def _check_capture(capture: CaptureIdentity, vocab_size: int) -> None:
    if not 0 <= capture.top_k < min(vocab_size, MAX_TOP_K):
        raise ValueError(f"capture.top_k: expected 0 to V - 1, below {MAX_TOP_K}, found {shown(capture.top_k)}")
    if not 2 <= capture.max_length < 2**32:
        raise ValueError(f"capture.max_length: expected 2 to 2^32, found {shown(capture.max_length)}")
    if not 0 < capture.min_mass <= 1:
        raise ValueError(f"capture.min_mass: expected more than 0 and at most 1, found {shown(capture.min_mass)}")
    if capture.min_mass < 1 and not capture.top_k:
        raise ValueError("capture.min_mass: expected 1 without alternatives, which nothing is kept of")
    if capture.precision not in PRECISIONS:
        raise ValueError(f"capture.precision: expected one of {list(PRECISIONS)}, found {shown(capture.precision)}")
    precision = PRECISIONS[capture.precision]
    least, most = (precision.max_error, MAX_ERROR) if precision else (0, 0)
    if not least <= capture.max_error <= most:
        raise ValueError(f"capture.max_error: expected {least} to {most} nats, found {shown(capture.max_error)}")
    if not 0 <= capture.num_tail_groups <= MAX_TAIL_GROUPS or capture.num_tail_groups == 1:
        raise ValueError(f"capture.num_tail_groups: expected 0, or 2 to 256, found {shown(capture.num_tail_groups)}")
    if bool(capture.tail_partition) != (capture.num_tail_groups > 0):
        raise ValueError("capture.tail_partition: expected exactly where there are tail groups")
    steps = GROUP_STEPS_PER_NAT if capture.num_tail_groups else (0,)
    if capture.group_steps_per_nat not in steps:
        raise ValueError(
            f"capture.group_steps_per_nat: expected one of {steps}, found {shown(capture.group_steps_per_nat)}"
        )
    if not 0 <= capture.num_tail_samples <= MAX_TAIL_SAMPLES:
        raise ValueError(
            f"capture.num_tail_samples: expected 1 to {MAX_TAIL_SAMPLES}, or no such field, "
            f"found {shown(capture.num_tail_samples)}"
        )


def _check_commit(commit: ShardCommit) -> None:
    _check_unit(commit.unit)
    _check_digits("identity", commit.identity)
    counts = (commit.num_samples, commit.num_positions, commit.num_tokens)
    if not all(1 <= n < 2**32 for n in counts) or not 0 <= commit.num_tokens_cut < 2**40:
        raise ValueError(f"counts: expected 1 to 2^32, found {shown(counts)}")
    if not commit.num_positions + commit.num_samples <= commit.num_tokens:
        raise ValueError(f"counts: expected fewer positions than tokens in every sample, found {shown(counts)}")
    if not 0 <= commit.kept_mass <= commit.num_positions * 1.001:
        raise ValueError(f"kept_mass: expected 0 to the number of positions, found {shown(commit.kept_mass)}")
    if commit.chat_template:
        _check_digits("chat_template", commit.chat_template)
    _check_files(commit.files)
    for offset, length, crc in (block for blocks in commit.blocks.values() for block in blocks):
        if not 0 <= offset < 2**50 or not 0 < length < 2**31 or not 0 <= crc < 2**32:
            raise ValueError("blocks: expected offsets and lengths inside the file, and 32 bits of crc32c")


def _check_files(files: tuple[StoredFile, ...]) -> None:
    for file in files:
        plain = len(file.name) < 256 and _FILE_NAME.fullmatch(file.name) and not {".", ".."} & set(file.name.split("/"))
        if not plain or not 0 <= file.size < 2**50:
            raise ValueError(f"file {shown(file.name)}: expected a plain name inside its folder and a sane size")
        _check_digits("checksum", file.checksum)
    if len({file.name for file in files}) != len(files):
        raise ValueError("a file is listed twice")


def _check_data_set(entry: DataSetEntry) -> None:
    name = entry.name
    if not name or name != one_line(name, MAX_DATA_SET_NAME):
        raise ValueError(
            f"data set: expected a name of 1 to {MAX_DATA_SET_NAME} printable characters, found {shown(name)}"
        )
    if entry.file.name != data_file_name(entry.file.checksum):
        raise ValueError(f"data set: expected a file named by its checksum, found {shown(entry.file.name)}")
    _check_files((entry.file,))
    if not 1 <= entry.num_samples <= entry.num_runs <= entry.num_positions < 2**40:
        raise ValueError(f"data set {shown(name)}: expected as many samples as runs and positions, or fewer")


def _check_unit(unit: str) -> None:
    _check_digits("unit", unit)


def _check_digits(name: str, found: str) -> None:
    if not _DIGITS.fullmatch(found):
        raise ValueError(f"{name}: expected 32 hexadecimal digits, found {shown(found)}")


def _check_texts(manifest: Manifest) -> None:
    """What is in no list of this program: fingerprints are digits, and the rest is short and can be printed."""
    model, tokenizer = manifest.model, manifest.tokenizer
    fingerprints = {"model.weights": model.weights}
    if tokenizer is not None:
        fingerprints["tokenizer.fingerprint"] = tokenizer.fingerprint
    if manifest.capture.tail_partition:
        fingerprints["capture.tail_partition"] = manifest.capture.tail_partition
    for name, value in fingerprints.items():
        _check_digits(name, value)
    names = {"model.dtype": model.dtype, "model.attention": model.attention}
    names |= {f"writer_features {i}": feature for i, feature in enumerate(manifest.writer_features)}
    names |= {f"created_with {i}": package for i, package in enumerate(manifest.created_with)}
    for name, value in names.items():
        if len(value) > MAX_NAME or not _SHORT_NAME.fullmatch(value):
            raise ValueError(f"{name}: expected a name of at most {MAX_NAME} plain characters, found {shown(value)}")
    if len(manifest.created_with) > MAX_PACKAGES or len(manifest.writer_features) > MAX_PACKAGES:
        raise ValueError(f"created_with, writer_features: expected at most {MAX_PACKAGES} entries of each")
    for name, value in {"model_name": manifest.model_name, **manifest.created_with}.items():
        if value != one_line(value, MAX_TEXT):
            raise ValueError(
                f"{name}: expected at most {MAX_TEXT} characters that can be printed, without a password, "
                f"found {shown(value)}"
            )
