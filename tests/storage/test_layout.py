"""The names of a cache's files, as docs/format.md has them, and what each is, back."""

from __future__ import annotations

import pytest

from logitcache.storage import layout

UNIT, CHECKSUM = "0a" * 16, "b1" * 16


def test_names_are_those_of_the_format() -> None:
    assert (layout.MANIFEST, layout.CONTENTS, layout.SHARDS) == ("manifest.json", "contents.json", "shards")
    assert (layout.TOKEN_GROUPS, layout.LOCK) == ("token_groups.npy", "writer.lock")
    assert layout.commit_path(UNIT) == f"shards/{UNIT}.json"
    assert layout.shard_folder(UNIT, CHECKSUM) == f"{UNIT}-{CHECKSUM[:16]}"
    assert layout.shard_path(f"{UNIT}-x") == f"shards/{UNIT}-x"
    assert layout.shard_path(f"{UNIT}-x", "a/b") == f"shards/{UNIT}-x/a/b"
    assert layout.index_name(CHECKSUM) == f"index-{CHECKSUM}.npy"
    assert layout.worker_name(3, 12, "0a") == "worker-3-of-12-0a.json"


def test_a_commit_record_is_known_among_what_lies_beside_it() -> None:
    names = ["b.json", f"{UNIT}-{CHECKSUM[:16]}", "a.json", layout.temporary_name("c.json")]
    assert layout.commit_units(names) == ["a", "b"]
    assert [layout.commit_unit(name) for name in names] == ["b", None, "a", None]
    assert [layout.is_shard_folder(name) for name in names] == [False, True, False, False]


@pytest.mark.parametrize("name", ["manifest.json", f"index-{CHECKSUM}.npy", f"xshards/{UNIT}.json", "shards"])
def test_what_is_of_no_shard(name: str) -> None:
    assert layout.unit_of_path(name) is None


def test_the_unit_of_every_file_of_a_shard() -> None:
    folder = layout.shard_folder(UNIT, CHECKSUM)
    paths = [layout.commit_path(UNIT), layout.shard_path(folder), layout.shard_path(folder, "a/b.arrow")]
    paths += [layout.temporary_name(path) for path in paths[:2]]
    assert {layout.unit_of_path(path) for path in paths} == {UNIT}


@pytest.mark.parametrize("name", [f"index-{CHECKSUM}.npy.x", "index-1.npy", f"Xindex-{CHECKSUM}.npy", "index-.npy"])
def test_another_name_is_no_index(name: str) -> None:
    assert layout.is_index(layout.index_name(CHECKSUM)) and not layout.is_index(name)


@pytest.mark.parametrize(
    "name", ["worker-1-of-2-0.json.x", "worker-a-of-2-0.json", "worker-1-of-2.json", "aworker-1-of-2-0.json"]
)
def test_another_name_is_no_worker(name: str) -> None:
    assert layout.worker_of(layout.worker_name(1, 20, "0a")) == (1, 20, "0a") and layout.worker_of(name) is None


def test_an_unfinished_file_is_known_by_its_name() -> None:
    name = layout.temporary_name("a.json")
    assert name != layout.temporary_name("a.json")
    assert name.endswith(layout.UNFINISHED) and layout.is_temporary(name) and layout.is_unfinished(name, "a.json")
    assert not layout.is_unfinished(name, "a") and not layout.is_unfinished("a.json.new", "a.json")
    assert not layout.is_temporary("a.json.new") and not layout.is_temporary(name + "x")
