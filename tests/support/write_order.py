"""A recorder of what a verb does to the disk, which holds every step against the order that a power failure needs.

A model of a disk that keeps only what was synced: bytes of a file by its fsync, a name by the fsync of its folder.
Calls of `os` that change the disk pass through it; a sync only counts. What must hold: a file or folder is named when
all of it is synced; what names others (manifest, commit record, contents) when those are, and the folders above; what
is named is removed when what names it is gone for good; and at the end every name is on the disk. Written from
docs/format.md, "Writing" and "Pruning".
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from logitcache.storage.manifest import ShardCommit, from_bytes

Key = tuple[int, int]
HEADS = ("manifest.json", "contents.json")


class WriteOrder:
    """While it is entered, it looks at every step below a folder; `faults` says which came too early."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.faults: list[str] = []
        self._pending: dict[Key, set[str]] = {}
        self._synced: dict[Key, tuple[int, int]] = {}
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> WriteOrder:
        for name in ("open", "mkdir", "link", "rename", "replace", "unlink", "rmdir", "fsync"):
            call = partial(getattr(self, f"_{name}"), getattr(os, name))
            self._patches.enter_context(mock.patch.object(os, name, call))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()
        for folder, names in self._pending.items():
            left = sorted(name for name in names if not name.endswith(".new") and name != "writer.lock")
            self._must(not left, f"{left} in {self._where(folder)} are not on the disk at the end")

    # --- steps ------------------------------------------------------------------------------------------------------

    def _open(self, original: Callable[..., int], path: Any, flags: int, *args: Any, **more: Any) -> int:
        above, name = self._split(path, more.get("dir_fd"))
        is_new = bool(flags & os.O_CREAT) and not os.path.lexists(above / name)
        handle = original(path, flags, *args, **more)
        if is_new and self._is_mine(above):
            self._changed(above, name)
        return handle

    def _mkdir(self, original: Callable[..., None], path: Any, *args: Any, **more: Any) -> None:
        above, name = self._split(path, more.get("dir_fd"))
        original(path, *args, **more)
        if self._is_mine(above):
            self._pending.pop(_key(above / name), None)  # of a folder that is gone, whose number it has
            self._changed(above, name)

    def _link(self, original: Callable[..., None], source: Any, target: Any, **more: Any) -> None:
        self._named(source, target, more)
        original(source, target, **more)

    def _rename(self, original: Callable[..., None], source: Any, target: Any, **more: Any) -> None:
        above, name = self._split(source, more.get("src_dir_fd"))
        self._named(source, target, more)
        if not name.endswith(".new"):
            self._gone(above, name)
        original(source, target, **more)
        self._changed(above, name)

    _replace = _rename

    def _unlink(self, original: Callable[..., None], path: Any, **more: Any) -> None:
        above, name = self._split(path, more.get("dir_fd"))
        if self._is_mine(above):
            self._gone(above, name)
        original(path, **more)
        if self._is_mine(above):
            self._changed(above, name)

    def _rmdir(self, original: Callable[..., None], path: Any, **more: Any) -> None:
        above, name = self._split(path, more.get("dir_fd"))
        key = _key(above / name)
        original(path, **more)
        if self._is_mine(above):
            self._pending.pop(key, None)
            self._changed(above, name)

    def _fsync(self, _: Callable[[int], None], handle: int) -> None:
        found = os.fstat(handle)
        if stat.S_ISDIR(found.st_mode):
            self._pending.pop((found.st_dev, found.st_ino), None)
        else:
            self._synced[found.st_dev, found.st_ino] = found.st_size, found.st_mtime_ns

    # --- what must hold ---------------------------------------------------------------------------------------------

    def _named(self, source: Any, target: Any, more: dict[str, Any]) -> None:
        """Before a file or folder gets its name."""
        above, name = self._split(target, more.get("dst_dir_fd"))
        from_folder, from_name = self._split(source, more.get("src_dir_fd"))
        if not self._is_mine(above):
            return
        if not name.endswith(".new"):
            path = from_folder / from_name
            self._must(self._is_whole(path), f"{above / name} is named before all of it is synced")
            self._must(self._is_lasting(above), f"{above / name} is named in a folder that is not on the disk")
            if name in HEADS or (above.name == "shards" and name.endswith(".json")):
                self._check_head(above, name, path)
        self._changed(above, name)

    def _check_head(self, above: Path, name: str, path: Path) -> None:
        """Before a file that names others does so."""
        body = json.loads(path.read_bytes())["body"]
        root = above if name in HEADS else above.parent
        needed = [root / "token_groups.npy"] if (root / "token_groups.npy").exists() else []
        if name != "manifest.json":
            needed.append(root / "manifest.json")
        if name == "contents.json":
            needed.append(root / body["index"]["name"])
            needed += [root / "shards" / f"{entry['unit']}.json" for entry in body["shards"]]
        elif name != "manifest.json":
            needed.append(above / _folder_of(path))
        for each in needed:
            self._must(
                each.exists() and self._is_lasting(each), f"{above / name} names {each}, which is not on the disk"
            )

    def _gone(self, above: Path, name: str) -> None:
        """Before a name is taken from a folder: nothing that is or may be on the disk names it."""
        if above.name == "shards" and name.endswith(".json"):
            self._must(not self._is_listed(above.parent, name), f"{name} goes while contents.json names it")
        if name.startswith("index-"):
            self._must(not self._is_listed(above, name), f"{name} goes while contents.json names it")
        shard = next((p for p in (above / name, *(above / name).parents) if p.parent.name == "shards"), None)
        if shard is not None and shard != above / name and "." not in shard.name:
            record = shard.parent / f"{shard.name[:32]}.json"
            is_named = record.exists() and _folder_of(record) == shard.name
            self._must(not is_named and self._is_lasting(record), f"{shard.name} goes while its record may be there")

    def _is_listed(self, root: Path, name: str) -> bool:
        """Whether the contents name it, now or after a power failure."""
        contents = root / "contents.json"
        if not self._is_lasting(contents):
            return True
        return contents.exists() and name.removesuffix(".json").encode() in contents.read_bytes()

    # --- the model --------------------------------------------------------------------------------------------------

    def _is_whole(self, path: Path) -> bool:
        """Whether all of a file or folder is synced."""
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode):
            return self._synced.get(_key(path)) == (found.st_size, found.st_mtime_ns)
        return not self._pending.get(_key(path)) and all(self._is_whole(below) for below in path.iterdir())

    def _is_lasting(self, path: Path) -> bool:
        """Whether a name, there or not, and those of the folders above it are as they are after a power failure."""
        return path == self.top or (
            path.name not in self._pending.get(_key(path.parent), ()) and self._is_lasting(path.parent)
        )

    def _changed(self, above: Path, name: str) -> None:
        self._pending.setdefault(_key(above), set()).add(name)

    def _split(self, path: Any, at: int | None) -> tuple[Path, str]:
        """The folder of a path, by its real name, and the last part."""
        whole = Path(os.fsdecode(path))
        above = Path(f"/proc/self/fd/{at}").readlink() / whole.parent if at is not None else whole.parent.absolute()
        return Path(os.path.realpath(above)), whole.name

    def _is_mine(self, above: Path) -> bool:
        return above.is_relative_to(self.top)

    def _where(self, key: Key) -> str:
        found = (p for p in (self.top, *self.top.rglob("*")) if p.is_dir() and _key(p) == key)
        return str(next(found, "a folder that is gone"))

    def _must(self, holds: object, fault: str) -> None:
        if not holds:
            self.faults.append(fault)


def _key(path: Path) -> Key:
    found = os.lstat(path)
    return found.st_dev, found.st_ino


def _folder_of(record: Path) -> str:
    """The name of the folder that a commit record names."""
    return from_bytes(ShardCommit, record.read_bytes(), str(record)).folder


@contextlib.contextmanager
def in_order(top: Path) -> Iterator[WriteOrder]:
    """Assert that what is done inside keeps the order."""
    with WriteOrder(top) as order:
        yield order
    assert order.faults == []
