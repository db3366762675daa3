"""The list of a folder's files: their names, sizes and checksums, written last, so that half a folder is known as one.

Owns files.json: what the folder of an adapter, a model or a checkpoint was when it was whole, and what its writer said
about it. The list is written after everything in it is on the disk. Trade-off: crc32c, as of the blocks of a cache,
finds what disks and kills do, not a forgery; checking reads every byte. Must not import torch, or know what files mean.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import google_crc32c

from logitcache.json_files import read_checked, write_checked
from logitcache.storage.files import sync_path

FILES, FORMAT = "files.json", 1
_PIECE_BYTES = 2**23


def seal(folder: Path, about: dict[str, Any], names: Iterable[str] | None = None) -> None:
    """Put files of a folder on the disk, and then the list of them. names: by default all files below the folder.

    about: plain JSON that is kept with the list; `about_of` gives it back.
    """
    listed = names_below(folder) if names is None else sorted(names)
    for name in listed:
        sync_path(folder / name)
    for path in {(folder / name).parent for name in listed} | {folder, folder.parent}:
        sync_path(path)
    files = {name: list(_measure(folder / name)) for name in listed}
    write_checked(folder / FILES, {"format": FORMAT, "files": files, "about": about})


def about_of(folder: Path) -> dict[str, Any] | None:
    """What was said about a folder when it was sealed; None where its list is missing or damaged."""
    body = _body(folder)
    return None if body is None else body["about"]


def fault_of(folder: Path) -> str | None:
    """In which file a folder is not what it was when it was sealed, as the end of a sentence; None where it is whole.

    Every byte is read. Files that are not in the list do not count. Raises `OSError` where the disk refuses to read.
    """
    body = _body(folder)
    if body is None:
        return f"{FILES} is {'damaged' if (folder / FILES).exists() else 'missing'}"
    for name, (size, checksum) in body["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes, not {size:,}"
        if _measure(path) != (size, checksum):
            return f"{name} is not what was written"
    return None


def names_below(folder: Path) -> list[str]:
    """The files below a folder by their names in it, sorted; without the list itself."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted({path.relative_to(folder).as_posix() for path in paths} - {FILES})


def _body(folder: Path) -> dict[str, Any] | None:
    try:
        body = read_checked(folder / FILES)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    files, about = body.get("files"), body.get("about")
    if body.keys() != {"format", "files", "about"} or body["format"] != FORMAT:
        return None
    known = isinstance(files, dict) and all(_is_entry(name, entry) for name, entry in files.items())
    return body if known and isinstance(about, dict) else None


def _is_entry(name: str, entry: object) -> bool:
    """Whether a file is below the folder, and has a size and a checksum."""
    parts = name.split("/")
    inside = name.isprintable() and not {"", ".", ".."} & {*parts}
    inside = inside and len(parts) <= 64 and all(len(part.encode()) <= 255 for part in parts)
    return inside and isinstance(entry, list) and len(entry) == 2 and all(type(number) is int for number in entry)


def _measure(path: Path) -> tuple[int, int]:
    """Size and crc32c of a file."""
    size, checksum = 0, 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            size, checksum = size + len(piece), google_crc32c.extend(checksum, piece)
    return size, checksum
