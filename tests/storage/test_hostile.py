"""Files that someone has forged, with checksums that match: refused as corrupt, and never another kind of error."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.storage_forging import assign, body_of, canonical, forge, forge_files, forge_index, is_read, sealed
from support.storage_samples import (
    SHARDS,
    VOCAB,
    cache_bits,
    make_groups,
    make_manifest,
    make_sample,
    refused,
    tree,
    write_cache,
)

from logitcache.storage import (
    CacheError,
    CacheWriter,
    CorruptCache,
    LinkRefused,
    LogitCache,
    UnsupportedFormat,
    repair,
    verify,
)

pytest_plugins = ["support.storage_fixtures"]
pytestmark = pytest.mark.usefixtures("no_fsync")


NAMES = ["../../x", "..", "a/../b", "/etc/passwd", "a\0b", "", "a//b", "a/", "a\nb", "a\\b", "\ud800", "a" * 5000]
WRONG_TYPES: list[object] = [None, True, "1", 1.5, [], {}, [[]]]
COUNTS: list[object] = [0, -1, 1, 2**31, 2**39, 2**40, 10**30, *WRONG_TYPES]
HOSTILE: dict[tuple[str, tuple[str | int, ...]], list[object]] = {
    ("commit", ("files", 0, "name")): [*NAMES, None, 5],
    ("commit", ("files", 0, "size")): [-1, 2**50, 10**30, 2**49, *WRONG_TYPES],
    ("commit", ("files", 0, "checksum")): [None, 5, [], {}],
    ("commit", ("num_samples",)): COUNTS,
    ("commit", ("num_positions",)): COUNTS,
    ("commit", ("num_tokens",)): COUNTS,
    ("commit", ("num_tokens_cut",)): [-1, 2**40, 10**30, *WRONG_TYPES],
    ("commit", ("kept_mass",)): [None, "1", 1, 10**400, [], {}],
    ("commit", ("files",)): [None, {}, "x", 5, [], [None], [[]], [{}]],
    ("commit", ("blocks",)): [None, {}, "x", 5, [None], [[]], {"x": None}, {"x": [[]]}, {"x": [[1, 2, 3, 4]]}],
    ("commit", ("blocks", "*")): [[], None, {}, "x", 5, [None], [[1, 2]], [[]]],
    ("commit", ("blocks", "*", 0)): [
        [-1, 8, 0],
        [0, 0, 0],
        [0, -8, 0],
        [0, 8, 0],
        [0, 2**39, 0],
        [2**49, 8, 0],
        [2**60, 8, 0],
        ["0", 8, 0],
    ],
    ("commit", ("unit",)): ["0" * 32, "../../x", "A" * 32, "", None, 5, "0" * 32 + "\n"],
    ("commit", ("identity",)): ["0" * 32, "../../x", "A" * 32, "", None, 5, "0" * 32 + "\n"],
    ("commit", ("chat_template",)): ["x", "A" * 32, "0" * 33, "0" * 32 + "\n", None, 5, []],
    ("contents", ("shards", 0, "unit")): ["0" * 32, "../../x", "A" * 32, "", None, 5, "0" * 32 + "\n"],
    ("contents", ("shards", 0, "checksum")): [None, 5, [], "0" * 32],
    ("contents", ("shards",)): [None, {}, "x", 5, [], [None], [[]], [{}]],
    ("contents", ("manifest",)): [None, 5, [], "0" * 32],
    ("contents", ("num_samples",)): COUNTS,
    ("contents", ("index",)): [None, 5, [], {}, "index.npy"],
    ("contents", ("index", "name")): [*NAMES, None, 5, "manifest.json", "shards", "index-0.npy"],
    ("contents", ("index", "size")): [-1, 0, 1, 2**31, 2**49, 2**50, 10**30, *WRONG_TYPES],
    ("contents", ("index", "checksum")): [None, 5, [], "0" * 32],
    ("manifest", ("store",)): ["", "parquet", "../zarr", None, 5, ["zarr"]],
    ("manifest", ("model", "vocab_size")): [-1, 0, 1, 5, 2**24, 10**30, *WRONG_TYPES],
    ("manifest", ("capture", "top_k")): [-1, 0, VOCAB, 4, 6, 39, 10**30, *WRONG_TYPES],
    ("manifest", ("capture", "max_length")): [-1, 0, 1, *WRONG_TYPES],
    ("manifest", ("model",)): [None, [], "x", {}],
    ("manifest", ("model", "quantization")): ["", "4bit", "../4bit", "4" * 33, "4bit\n", *WRONG_TYPES],
    ("manifest", ("model", "config")): ["", "{", "[]", '{"a": 1}', '{"b":1,"a":1}', "[" * 10_000, *WRONG_TYPES[:3]],
    ("manifest", ("model", "tf32")): [0, 1, None, "true", []],
    ("manifest", ("tokenizer",)): [[], "x", {}, 5],
    ("manifest", ("created_with",)): [None, [], "x", {"a": 5}, {"a": {}}],
    ("manifest", ("model_name",)): [None, 5, []],
    ("manifest", ("reader_features",)): [
        None,
        5,
        [[]],
        [{}],
        ["tail-groups"],
        ["tail-samples"],
        ["quantized-base"],
    ],
    ("manifest", ("writer_features",)): [None, 5, [[]], [{}], [5, "x"]],
    ("manifest", ("capture", "min_mass")): [0.0, -0.5, 1.01, 1e300, 1, *WRONG_TYPES[:3], [], {}],
    ("manifest", ("capture", "precision")): ["", "float", "FINE", "fine", None, 5, [], {}],
    ("manifest", ("capture", "max_error")): [0.1, -0.1, 0, *WRONG_TYPES[:3], [], {}],
    ("manifest", ("capture", "num_tail_groups")): [-1, 1, 2, 257, 10**30, *WRONG_TYPES],
    ("manifest", ("capture", "group_steps_per_nat")): [-1, 1, 2, 4, 10**30, *WRONG_TYPES],
    ("manifest", ("capture", "num_tail_samples")): [0, -1, 1, 4096, 4097, 10**30, *WRONG_TYPES],
    ("manifest", ("capture", "tail_partition")): ["0" * 32, None, 5, []],
    ("manifest", ("format_version",)): [2.0],
}


@pytest.mark.parametrize("file", ["manifest", "contents", "commit"])
def test_hostile_values_are_refused_as_corrupt(written: Path, file: str) -> None:
    honest = body_of(written, file)
    before = tree(written)
    for keys, value in [(keys, v) for (name, keys), values in HOSTILE.items() if name == file for v in values]:
        body = json.loads(canonical(honest))
        assign(body, keys, value)
        forge(written, file, canonical(body))
        for read in (cache_bits, verify_strictly):
            with pytest.raises(CacheError) as caught:
                read(written)
            assert type(caught.value) is CorruptCache, (keys, value)
    forge(written, file, canonical(honest))
    assert tree(written) == before


def verify_strictly(path: Path) -> None:
    """`verify`, with a problem as an error."""
    report = verify(path)
    if not report.is_intact:
        raise CorruptCache(str(report.problems))


@pytest.mark.parametrize("file", ["manifest", "contents", "commit"])
def test_missing_and_extra_fields_are_refused(written: Path, file: str) -> None:
    honest = body_of(written, file)
    for name in honest:
        if file == "manifest" and name == "format_version":
            continue
        forge(written, file, canonical({k: v for k, v in honest.items() if k != name}))
        refused(CorruptCache, "corrupt", lambda: cache_bits(written))
    forge(written, file, canonical(honest | {"extra": 1}))
    refused(CorruptCache, "corrupt", lambda: cache_bits(written))


@pytest.mark.parametrize("file", ["manifest", "contents", "commit"])
@pytest.mark.parametrize(
    "body",
    [
        b"null",
        b"[]",
        b"[1]",
        b"5",
        b'"x"',
        b'{"format_version":2}',
        b"true",
        b"NaN",
        b"1e999",
        b"9" * 5000,
        b'"\\ud800"',
    ],
)
def test_another_kind_of_json_is_refused(written: Path, file: str, body: bytes) -> None:
    forge(written, file, body)
    refused(CorruptCache, "corrupt", lambda: cache_bits(written))


@pytest.mark.parametrize("file", ["manifest", "contents", "commit"])
def test_deep_nesting_is_refused(written: Path, file: str) -> None:
    honest = canonical(body_of(written, file)).decode()
    key = {"manifest": "model_name", "contents": "shards", "commit": "files"}[file]
    for depth in (100, *range(600, 1000, 20), 5000, 200_000):
        deep = "[" * depth + "]" * depth
        inside = honest.replace(f'"{key}":', f'"{key}":{deep},"zzz":', 1)
        for body in (deep, inside, '{"reader_features":' + deep + "}"):
            forge(written, file, body.encode())
            refused(CorruptCache, "corrupt", lambda: cache_bits(written))


@pytest.mark.parametrize("file", ["manifest", "contents", "commit"])
@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff\xfe", b"\0" * 100, b"[]", b"{}", b'{"body":{}}', b'{"body":{},"checksum":5}', b"\xef\xbb\xbf{}"],
)
def test_what_is_not_the_envelope_is_refused(written: Path, file: str, data: bytes) -> None:
    unit = body_of(written, "contents")["shards"][0]["unit"]
    name = f"shards/{unit}.json" if file == "commit" else f"{file}.json"
    (written / name).write_bytes(data)
    refused(CorruptCache, "corrupt", lambda: cache_bits(written))


def test_an_absurdly_large_manifest_is_not_read(written: Path) -> None:
    with (written / "manifest.json").open("r+b") as f:
        f.truncate(2**40)  # a hole: takes no space
    assert "bytes" in refused(CorruptCache, "corrupt", lambda: LogitCache.open(written))


@pytest.mark.parametrize(
    ("field", "value"),
    [("format_version", 3), ("format_version", 1), ("format_version", 0), ("reader_features", ["int8"])],
)
def test_an_unknown_format_is_refused_by_readers_and_writers(
    written: Path, store: str, field: str, value: object
) -> None:
    forge(written, "manifest", canonical(body_of(written, "manifest") | {field: value, "new_field": {}}))
    before = tree(written)
    for call in (LogitCache.open, verify, lambda p: CacheWriter(p, make_manifest(store))):
        message = refused(UnsupportedFormat, "unsupported-format", lambda c=call: c(written))  # type: ignore[misc]
        assert str(value) in message
    assert tree(written) == before


def test_an_unknown_writer_feature_is_refused_by_writers_alone(written: Path, store: str) -> None:
    here = cache_bits(written)
    forge(written, "manifest", canonical(body_of(written, "manifest") | {"writer_features": ["v2-index"]}))
    before = tree(written)
    assert cache_bits(written) == here and verify(written).is_intact
    message = refused(UnsupportedFormat, "unsupported-format", lambda: CacheWriter(written, make_manifest(store)))
    assert "v2-index" in message
    assert tree(written) == before


def test_a_manifest_that_the_contents_do_not_name_is_refused(written: Path) -> None:
    body = body_of(written, "manifest") | {"model_name": "another"}
    (written / "manifest.json").write_bytes(sealed(canonical(body)))
    refused(CorruptCache, "corrupt", lambda: LogitCache.open(written))


def test_a_shard_listed_twice_is_refused(written: Path) -> None:
    body = body_of(written, "contents")
    forge(written, "contents", canonical(body | {"shards": body["shards"] + body["shards"][:1]}))
    refused(CorruptCache, "corrupt", lambda: LogitCache.open(written))


def test_a_file_listed_twice_is_refused(written: Path) -> None:
    body = body_of(written, "commit")
    forge_files(written, body | {"files": body["files"] + body["files"][:1]})
    refused(CorruptCache, "corrupt", lambda: cache_bits(written))


@pytest.mark.parametrize("size", [0, 1, 2**31, 2**40, 2**49])
def test_a_file_of_another_size_than_committed_is_a_problem(written: Path, size: int) -> None:
    body = body_of(written, "commit")
    body["files"][0]["size"] = size
    forge_files(written, body)
    problems = verify(written).problems
    assert {problem.shard for problem in problems} == {body["unit"]}
    assert repair(written).dropped == (body["unit"],)


def test_counts_beyond_the_blocks_are_refused_before_anything_is_allocated(written: Path) -> None:
    body = body_of(written, "commit")
    for changes in (
        {"num_tokens": 2**32 - 1},
        {"num_tokens": 2**32 - 1, "num_positions": 2**31},
        {"num_tokens": 2**32 - 1, "num_positions": 2**31 - 1, "num_samples": 2**31},
    ):
        forge(written, "commit", canonical(body | changes))
        assert {problem.shard for problem in verify(written).problems} >= {body["unit"]}
        refused(CorruptCache, "corrupt", lambda: cache_bits(written))


def test_a_file_that_the_commit_does_not_list_is_not_trusted(written: Path) -> None:
    """Nor read as fill values where it is gone."""
    honest = body_of(written, "commit")
    for i, file in enumerate(honest["files"]):
        if not is_read(file["name"]):
            continue
        folder = forge_files(written, honest | {"files": honest["files"][:i] + honest["files"][i + 1 :]})
        kept = (folder / file["name"]).rename(written / "kept")
        refused(CorruptCache, "corrupt", lambda: cache_bits(written))
        assert not verify(written).is_intact
        kept.rename(folder / file["name"])


def test_two_commits_exchanged_are_refused(written: Path) -> None:
    first, second = (written / "shards" / f"{e['unit']}.json" for e in body_of(written, "contents")["shards"])
    first.rename(written / "kept")
    second.rename(first)
    (written / "kept").rename(second)
    cache = LogitCache.open(written)
    for sample in (shard[0] for shard in SHARDS):
        refused(CorruptCache, "corrupt", lambda s=sample: cache.lookup(s.token_ids))  # type: ignore[misc]


def swapped(rows: NDArray[Any], column: str) -> NDArray[Any]:
    """The first two rows with one column exchanged."""
    rows[column][:2] = rows[column][:2][::-1].copy()
    return rows


def assigned(rows: NDArray[Any], column: str, value: int) -> NDArray[Any]:
    rows[column][0] = value
    return rows


INDEXES: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "ids exchanged": lambda rows: swapped(rows, "sample_id"),
    "lengths exchanged": lambda rows: swapped(rows, "num_tokens"),
    "an id twice": lambda rows: assigned(rows, "sample_id", 1)[[0, 0, *range(2, len(rows))]],
    "a shard that is not there": lambda rows: assigned(rows[::-1].copy(), "shard", 7)[::-1].copy(),
    "shards out of order": lambda rows: rows[::-1].copy(),
    "a row less": lambda rows: rows[:-1],
    "a row twice": lambda rows: rows[[0, *range(len(rows))]],
    "none": lambda rows: rows[:0],
    "a huge count": lambda rows: assigned(rows, "num_positions", 2**32 - 1),
    "no tokens": lambda rows: assigned(rows, "num_tokens", 0),
}


@pytest.mark.parametrize("change", INDEXES.values(), ids=INDEXES.keys())
def test_a_forged_index_gives_no_other_numbers(written: Path, change: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
    honest = {s.token_ids.tobytes(): s.logprobs for shard in SHARDS for s in shard}
    forge_index(written, change)
    assert not verify_is_intact(written)
    for shard in SHARDS:
        for sample in shard:
            try:
                found = LogitCache.open(written).lookup(sample.token_ids)
            except CacheError:
                continue
            assert found.equals(honest[sample.token_ids.tobytes()])


def test_verify_compares_the_index_with_the_shards(written: Path) -> None:
    """Lookups take the number of a sample's rows from the index alone, whose checksum the contents name."""
    forge_index(written, lambda rows: swapped(rows, "num_positions"))
    assert [problem.shard for problem in verify(written).problems] == [""]
    assert repair(written).is_incomplete


def verify_is_intact(path: Path) -> bool:
    try:
        return verify(path).is_intact
    except CacheError:
        return False


def test_a_capture_under_the_id_of_another_sample_is_refused(path: Path, store: str) -> None:
    """Every capture of a hit is compared, not only the first."""
    rng = np.random.default_rng(26)
    first, second = (make_sample(rng, 12, positions=where) for where in ([1, 3], [2, 5]))
    write_cache(path, store, [[first, second]])

    def claim(rows: NDArray[Any]) -> NDArray[Any]:
        rows["sample_id"][1] = rows["sample_id"][0]
        return rows

    forge_index(path, claim)
    refused(CorruptCache, "corrupt", lambda: LogitCache.open(path).lookup(first.token_ids))


def test_a_symlinked_file_is_refused(written: Path, tmp_path: Path) -> None:
    for file in [p for p in (written / "shards").rglob("*") if p.is_file() and p.parent.name != "shards"]:
        kept = file.rename(tmp_path / "kept")
        file.symlink_to(kept)
        assert not verify(written).is_intact
        if is_read(file.relative_to(written).as_posix()):
            refused(LinkRefused, "link-refused", lambda: cache_bits(written))
        file.unlink()
        kept.rename(file)
    assert verify(written).is_intact


def test_a_symlinked_folder_is_refused(written: Path, tmp_path: Path) -> None:
    """As docs/format.md says: links below shards/ are not followed."""
    for folder in [p for p in (written / "shards").rglob("*") if p.is_dir()]:
        kept = folder.rename(tmp_path / "kept")
        folder.symlink_to(kept)
        assert not verify(written).is_intact
        if is_read(folder.relative_to(written).as_posix()):
            refused(LinkRefused, "link-refused", lambda: cache_bits(written))
        folder.unlink()
        kept.rename(folder)


@pytest.mark.parametrize("name", ["manifest.json", "contents.json", "index", "commit"])
def test_a_symlinked_file_of_the_cache_is_no_other_kind_of_error(written: Path, tmp_path: Path, name: str) -> None:
    unit = body_of(written, "contents")["shards"][0]["unit"]
    names = {"index": body_of(written, "contents")["index"]["name"], "commit": f"shards/{unit}.json"}
    file = written / names.get(name, name)
    file.symlink_to(file.rename(tmp_path / "kept"))
    refused(LinkRefused, "link-refused", lambda: cache_bits(written))


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir], ids=["a pipe", "a folder"])
def test_what_is_no_plain_file_is_not_called_missing(
    written: Path, tmp_path: Path, make: Callable[[Path], object]
) -> None:
    unit = body_of(written, "contents")["shards"][0]["unit"]
    index = body_of(written, "contents")["index"]["name"]
    (data, *_) = sorted(p for p in written.glob(f"shards/{unit}-*/**/*") if p.is_file() and p.name != "zarr.json")
    for file in (written / index, written / f"shards/{unit}.json", data):
        file.rename(tmp_path / "kept")
        make(file)
        message = refused(CorruptCache, "corrupt", lambda: cache_bits(written))
        assert f"{file}: expected a plain file, found a folder, a pipe or a device" in message
        file.rmdir() if file.is_dir() else file.unlink()
        (tmp_path / "kept").rename(file)


# --- tail groups ------------------------------------------------------------------------------------------------------


@pytest.fixture
def grouped(path: Path, store: str) -> Path:
    """A cache with four tail groups."""
    groups = make_groups(np.random.default_rng(27), VOCAB, 4)
    sample = make_sample(np.random.default_rng(28), 30, token_groups=groups)
    return write_cache(path, store, [[sample]], make_manifest(store, token_groups=groups), groups)


@pytest.mark.parametrize("damage", ["missing", "short", "long", "another", "empty"])
def test_a_damaged_partition_is_refused_and_verify_says_so(grouped: Path, damage: str) -> None:
    file = grouped / "token_groups.npy"
    data = file.read_bytes()
    changed = {"short": data[:-1], "long": data + b"\0", "another": data[:-1] + bytes([data[-1] ^ 1]), "empty": b""}
    file.write_bytes(changed[damage]) if damage in changed else file.unlink()
    refused(CorruptCache, "corrupt", lambda: LogitCache.open(grouped).token_groups())
    assert not verify_is_intact(grouped)


def test_the_feature_of_tail_groups_is_there_exactly_with_them(grouped: Path) -> None:
    body = body_of(grouped, "manifest")
    forge(grouped, "manifest", canonical(body | {"reader_features": []}))
    refused(CorruptCache, "corrupt", lambda: LogitCache.open(grouped))


def test_a_file_that_is_gone_is_said_to_be_missing(written: Path) -> None:
    """And not to be a folder, a pipe or a device, which is said of what is in its place."""
    name = next(path for path in sorted(written.glob("index-*.npy")))
    name.unlink()
    with pytest.raises(CorruptCache, match="the file is missing"):
        LogitCache.open(written)
    name.mkdir()
    with pytest.raises(CorruptCache, match="found a folder, a pipe or a device"):
        LogitCache.open(written)
