"""The names of the files and folders of a cache, spelt here and nowhere else, and what a name is, back.

Owns names relative to a cache's root, with "/"; docs/format.md says what the files hold. Names inside a shard's folder
are its backend's. Must not touch a file, and imports nobody.
"""

import re
import uuid
from collections.abc import Iterable

MANIFEST, CONTENTS, TOKEN_GROUPS, SHARDS = "manifest.json", "contents.json", "token_groups.npy", "shards"

LOCK = "writer.lock"
"""The writers' lock, on a local disk."""

AGAINST_MODEL = "against-model.json"
"""What `verify --against-model` found; it decides nothing."""

UNFINISHED = ".new"
"""What the name of a file or folder ends in until it is whole."""

INDEX_PATTERN = "index-*.npy"
"""Of every index, as a shell's pattern."""

DATA_PATTERNS = ("data-*.npy", "data-*.json")
"""Of the files of data sets, as a shell's patterns."""

_COMMIT = ".json"
_INDEX = re.compile(r"index-[0-9a-f]{32}\.npy")
_DATA_FILE, _DATA_RECORD = re.compile(r"data-[0-9a-f]{32}\.npy"), re.compile(r"data-[0-9a-f]{32}\.json")
_SHARD_FOLDER = re.compile(r"[0-9a-f]{32}-[0-9a-f]{16}")
_WORKER = re.compile(r"worker-(\d+)-of-(\d+)-([0-9a-z]+)\.json")
_WORKER_PART = re.compile(r"worker-\d+-of-\d+-[0-9a-z]+\.npy")
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.new$")


def commit_path(unit: str) -> str:
    """The commit record of a unit."""
    return f"{SHARDS}/{unit}{_COMMIT}"


def commit_unit(name: str) -> str | None:
    """The unit that a file in `SHARDS` commits; None for another one."""
    return name.removesuffix(_COMMIT) if name.endswith(_COMMIT) else None


def commit_units(names: Iterable[str]) -> list[str]:
    """The committed units, in their order, of the names in `SHARDS`."""
    return sorted(unit for name in names if (unit := commit_unit(name)) is not None)


def shard_folder(unit: str, checksum: str) -> str:
    """The name of a shard's folder. checksum: of its files, hexadecimal."""
    return f"{unit}-{checksum[:16]}"


def shard_path(folder: str, name: str = "") -> str:
    """The folder of a shard, or a file in it."""
    return f"{SHARDS}/{folder}/{name}" if name else f"{SHARDS}/{folder}"


def is_shard_folder(name: str) -> bool:
    """Whether a name in `SHARDS` is a shard's folder, committed or not."""
    return _SHARD_FOLDER.fullmatch(name) is not None


def unit_of_path(path: str) -> str | None:
    """The unit that a file belongs to, whole or not; None outside `SHARDS`."""
    below = path.removeprefix(f"{SHARDS}/")
    return None if below == path else re.split(r"[-./]", below, maxsplit=1)[0]


def index_name(checksum: str) -> str:
    """The index with this checksum."""
    return f"index-{checksum}.npy"


def is_index(name: str) -> bool:
    """Whether this is the name of an index that was ever written; other names are somebody else's."""
    return _INDEX.fullmatch(name) is not None


def data_file_name(checksum: str) -> str:
    """Samples and positions of a data set, with this checksum."""
    return f"data-{checksum}.npy"


def is_data_file(name: str) -> bool:
    """Whether this is the name of such a file that was ever written."""
    return _DATA_FILE.fullmatch(name) is not None


def data_record_name(checksum: str) -> str:
    """What writers know of a data set. checksum: of its name."""
    return f"data-{checksum}.json"


def is_data_record(name: str) -> bool:
    """Whether this is the name of what writers know of some data set."""
    return _DATA_RECORD.fullmatch(name) is not None


def worker_name(index: int, num: int, job: str) -> str:
    """What worker `index` of `num` says of itself. job: digest of what it works on: several may fill one cache."""
    return f"worker-{index}-of-{num}-{job}.json"


def worker_part_name(index: int, num: int, job: str) -> str:
    """The samples and positions that worker `index` of `num` of a job answers for."""
    return f"worker-{index}-of-{num}-{job}.npy"


def worker_of(name: str) -> tuple[int, int, str] | None:
    """(index, number of workers, job) of a worker's file; None for another one."""
    match = _WORKER.fullmatch(name)
    return (int(match[1]), int(match[2]), match[3]) if match else None


def is_worker_part(name: str) -> bool:
    """Whether this is the name of what some worker answers for."""
    return _WORKER_PART.fullmatch(name) is not None


def temporary_name(base: str) -> str:
    """A name, which nobody else's file has, for a file or folder until it is whole and gets its own."""
    return f"{base}.{uuid.uuid4().hex}{UNFINISHED}"


def claim_name(base: str) -> str:
    """The name of the file by which a process claims to create `base`: the same for all, and temporary."""
    return f"{base}.{'0' * 32}{UNFINISHED}"


def is_temporary(name: str) -> bool:
    """Whether `temporary_name` or `claim_name` gave this name."""
    return _TEMPORARY.search(name) is not None


def is_unfinished(name: str, of: str) -> bool:
    """Whether this is the name of what became of `of` where its writer was killed: nobody else's file."""
    return name.startswith(f"{of}.") and _TEMPORARY.fullmatch(name.removeprefix(of)) is not None
