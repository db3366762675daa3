"""Forging the files of a cache on a local disk, with every checksum made to match: by someone who means it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from support.storage_samples import blake

UNREAD = ("zarr.json", "sample_ids", "num_tokens", "num_positions", "num_tokens_cut")
"""Files of a Zarr shard that no lookup reads: the index has what is in them."""


def is_read(name: str) -> bool:
    """Whether lookups read this file of a shard."""
    return not set(UNREAD) & set(name.split("/"))


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def sealed(body: bytes) -> bytes:
    """A JSON file of a cache with a checksum that matches: written by someone who means it."""
    return b'{"body":' + body + b',"checksum":"' + blake(body).encode() + b'"}\n'


def forge(path: Path, file: str, body: bytes) -> None:
    """Replace the manifest, the contents or the first shard's commit, with every checksum made to match."""
    if file == "contents":
        (path / "contents.json").write_bytes(sealed(body))
        return
    contents = body_of(path, "contents")
    if file == "manifest":
        (path / "manifest.json").write_bytes(sealed(body))
        contents["manifest"] = blake(sealed(body))
    else:
        entry = contents["shards"][0]
        (path / "shards" / f"{entry['unit']}.json").write_bytes(sealed(body))
        entry["checksum"] = blake(sealed(body))
    (path / "contents.json").write_bytes(sealed(canonical(contents)))


def forge_files(path: Path, body: dict[str, Any]) -> Path:
    """Forge the first commit with its folder under the name that its list of files asks for."""
    before = folder_of(body_of(path, "commit"))
    forge(path, "commit", canonical(body))
    return (path / "shards" / before).rename(path / "shards" / folder_of(body))


def folder_of(commit: dict[str, Any]) -> str:
    return f"{commit['unit']}-{blake(canonical(commit['files']))[:16]}"


def forge_index(path: Path, change: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
    """Replace rows of the index, with every checksum made to match."""
    contents = body_of(path, "contents")
    rows = change(np.load(path / contents["index"]["name"]))
    np.save(path / "forged.npy", rows)
    data = (path / "forged.npy").read_bytes()
    (path / "forged.npy").unlink()
    name = f"index-{blake(data)}.npy"
    (path / name).write_bytes(data)
    contents |= {"num_samples": len(rows), "index": {"name": name, "size": len(data), "checksum": blake(data)}}
    forge(path, "contents", canonical(contents))


def body_of(path: Path, file: str) -> Any:
    if file == "commit":
        unit = body_of(path, "contents")["shards"][0]["unit"]
        return json.loads((path / "shards" / f"{unit}.json").read_bytes())["body"]
    return body_of_bytes((path / f"{file}.json").read_bytes())


def body_of_bytes(data: bytes) -> Any:
    return json.loads(data)["body"]


def assign(body: Any, keys: Sequence[str | int], value: object) -> None:
    """Set what the keys lead to; "*" is every one."""
    first, rest = keys[0], keys[1:]
    for key in list(body) if first == "*" else [first]:
        if rest:
            assign(body[key], rest, value)
        else:
            body[key] = value
