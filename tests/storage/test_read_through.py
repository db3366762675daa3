"""A cache on an object store, read through a local copy that fsspec keeps: nothing is fetched twice, damage is told."""

import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from support.storage_faults import STORES, read_all, samples_of, write
from support.storage_faults import manifest_for as manifest

from logitcache.storage import CorruptCache, LogitCache


@pytest.fixture
def urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Of a cache in memory, and through copies in tmp_path / "near"."""
    monkeypatch.setitem(fsspec.config.conf, "filecache", {"cache_storage": str(tmp_path / "near")})
    url = f"memory://{uuid.uuid4().hex}"
    return url, f"filecache::{url}"


@pytest.mark.parametrize("store", STORES)
def test_what_was_read_once_is_not_fetched_again(
    store: str, urls: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    far, near = urls
    write(far, manifest(store), samples_of(1))
    expected = read_all(far)
    fetched: list[str] = []
    for name in ("cat_file", "_open"):
        original = getattr(MemoryFileSystem, name)

        def counted(self: Any, path: str, *more: Any, original: Any = original, **named: Any) -> Any:
            fetched.append(path)
            return original(self, path, *more, **named)

        monkeypatch.setattr(MemoryFileSystem, name, counted)
    assert read_all(near) == expected
    assert fetched and len(set(fetched)) == len(fetched)  # each file once, as a whole
    fetched.clear()
    assert read_all(near) == expected and fetched == []


@pytest.mark.parametrize("store", STORES)
def test_a_damaged_copy_is_refused(store: str, urls: tuple[str, str], tmp_path: Path) -> None:
    far, near = urls
    write(far, manifest(store), samples_of(1))
    read_all(near)
    copies = [p for p in (tmp_path / "near").iterdir() if p.name != "cache"]
    largest = max(copies, key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 3] ^= 1
    largest.write_bytes(data)
    with pytest.raises(CorruptCache):
        list(LogitCache.open(near).samples())
