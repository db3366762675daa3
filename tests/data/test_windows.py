"""Windows of a data set are its rows, cut after every so many; only the wanted ones are parsed.

The oracle parses files with json and pyarrow alone.
"""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcache.data.rows import Window, count_rows, read_rows, read_windows
from logitcache.errors import InputNotFound, InvalidData

Row = dict[str, Any]


def rows(start: int, stop: int) -> list[Row]:
    return [{"text": f"row {i}"} for i in range(start, stop)]


def jsonl(found: list[Row], blank: str = "\n") -> bytes:
    """One object a line, with a blank line after every third and two at the start."""
    lines = [json.dumps(row) + "\n" + (blank if i % 3 == 0 else "") for i, row in enumerate(found)]
    return ("\n \n" + "".join(lines)).encode()


def parquet(path: Path, found: list[Row], group: int) -> Path:
    pq.write_table(pa.Table.from_pylist(found), path, row_group_size=group)
    return path


def make_folder(folder: Path, sizes: list[tuple[str, int, int]]) -> list[Row]:
    """Files of these kinds, numbers of rows and sizes of row groups, and all their rows in order."""
    folder.mkdir()
    start = 0
    for number, (kind, size, group) in enumerate(sizes):
        here, start = rows(start, start + size), start + size
        if kind == "parquet":
            parquet(folder / f"{number:03}.parquet", here, group)
        else:
            (folder / f"{number:03}.jsonl").write_bytes(jsonl(here))
    return rows(0, start)


@pytest.fixture
def memory() -> Iterator[str]:
    """A prefix of memory://, emptied afterwards."""
    yield "memory://windows-test/data"
    fs, _ = fsspec.core.url_to_fs("memory://")
    fs.rm("/windows-test", recursive=True)


def parts(found: list[Row], size: int) -> list[list[Row]]:
    return [found[i : i + size] for i in range(0, len(found), size)]


def check_windows(data: str, expected: list[Row], size: int) -> None:
    """All windows, each alone, and every second one."""
    whole = list(read_rows(data))
    assert [row for _, row in whole] == expected
    windows = list(read_windows(data, size))
    assert [w.number for w in windows] == list(range(len(windows)))
    assert [[row for _, row in w.rows] for w in windows] == parts(expected, size)
    assert [pair for w in windows for pair in w.rows] == whole  # the origins too
    for number in range(len(windows)):
        assert list(read_windows(data, size, lambda w, n=number: w == n)) == [windows[number]]  # type: ignore[misc]
    assert list(read_windows(data, size, lambda w: w % 2 == 1)) == windows[1::2]
    assert list(read_windows(data, size, lambda _: False)) == []


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(
        st.tuples(st.sampled_from(["jsonl", "parquet"]), st.integers(1, 12), st.integers(1, 5)), min_size=1, max_size=4
    ),
    size=st.integers(1, 14),
)
def test_windows_of_a_folder_are_its_rows_cut(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[str, int, int]], size: int
) -> None:
    folder = tmp_path_factory.mktemp("windows") / "data"
    expected = make_folder(folder, sizes)
    check_windows(str(folder), expected, size)
    assert count_rows(str(folder)) == len(expected)


@pytest.mark.parametrize("size", [1, 3, 4, 7, 11, 100])
def test_a_file_alone(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(rows(0, 11)))
    check_windows(str(path), rows(0, 11), size)
    check_windows(str(parquet(tmp_path / "b.parquet", rows(0, 11), 3)), rows(0, 11), size)


def test_urls(tmp_path: Path, memory: str) -> None:
    expected = make_folder(tmp_path / "data", [("jsonl", 5, 0), ("parquet", 9, 4), ("jsonl", 3, 0)])
    fs, root = fsspec.core.url_to_fs(memory)
    for path in sorted((tmp_path / "data").iterdir()):
        fs.pipe_file(f"{root}/{path.name}", path.read_bytes())
    fs.pipe_file(f"{root}/notes.txt", b"not data")
    check_windows(memory, expected, 4)
    check_windows(f"{memory}/000.jsonl", expected[:5], 2)
    check_windows((tmp_path / "data").as_uri(), expected, 4)
    assert count_rows(memory) is None
    with pytest.raises(InputNotFound, match="no such file or folder"):
        read_windows(f"{memory}/none.jsonl", 4)


@pytest.mark.parametrize("name", ["a[1].jsonl", "a*.jsonl", "a::b.jsonl", "a b#?.jsonl", "ä.jsonl"])
def test_a_name_is_not_a_pattern(tmp_path: Path, name: str) -> None:
    """Beside files that it would match if it were one."""
    for other in ("a1.jsonl", "ab.jsonl", "b.jsonl"):
        (tmp_path / other).write_bytes(jsonl(rows(50, 60)))
    (tmp_path / name).write_bytes(jsonl(rows(0, 5)))
    check_windows(str(tmp_path / name), rows(0, 5), 2)


@pytest.mark.parametrize("name", ["a[1].jsonl", "a*.jsonl"])
def test_a_url_is_not_a_pattern(memory: str, name: str) -> None:
    fs, root = fsspec.core.url_to_fs(memory)
    fs.pipe_file(f"{root}/a1.jsonl", jsonl(rows(50, 60)))
    fs.pipe_file(f"{root}/{name}", jsonl(rows(0, 5)))
    check_windows(f"{memory}/{name}", rows(0, 5), 2)


def test_a_broken_line_is_told_where_it_is_wanted(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in rows(0, 10)]
    lines[5] = '{"text": "row 5'  # window 2 of windows of 2
    lines.insert(3, "")
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = list(read_windows(str(path), 2, lambda w: w != 2))
    assert [w.number for w in found] == [0, 1, 3, 4]
    assert [[row["text"] for _, row in w.rows] for w in found][2] == ["row 6", "row 7"]
    windows = read_windows(str(path), 2)
    assert [next(windows).number, next(windows).number] == [0, 1]
    with pytest.raises(InvalidData, match=r"a\.jsonl: line 7 is not JSON"):
        next(windows)


def test_row_groups_without_a_wanted_row_are_not_read(tmp_path: Path) -> None:
    """Their pages are overwritten: whoever read them would fail or get other rows."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows(0, 12)), path, row_group_size=4, compression="gzip")
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    starts = [column.dictionary_page_offset or column.data_page_offset, column.data_page_offset]
    broken = bytearray(path.read_bytes())
    begin = min(starts)
    broken[begin : begin + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(broken)
    found = list(read_windows(str(path), 4, lambda w: w != 1))
    assert [[row for _, row in w.rows] for w in found] == [rows(0, 4), rows(8, 12)]
    with pytest.raises(InvalidData, match="not a readable Parquet file"):
        list(read_windows(str(path), 4))


def test_a_window_runs_across_files(tmp_path: Path) -> None:
    make_folder(tmp_path / "data", [("jsonl", 3, 0), ("parquet", 3, 2), ("jsonl", 3, 0)])
    (only,) = read_windows(str(tmp_path / "data"), 4, lambda w: w == 1)
    assert isinstance(only, Window)
    assert [row["text"] for _, row in only.rows] == ["row 4", "row 5", "row 6", "row 7"]
    names = [Path(origin.split(",")[0].split(":")[0]).name for origin, _ in only.rows]
    assert names == ["001.parquet", "001.parquet", "002.jsonl", "002.jsonl"]


def test_windows_come_one_by_one(tmp_path: Path) -> None:
    """The second file is missing by the time it is reached, and the rows before it have come."""
    make_folder(tmp_path / "data", [("jsonl", 4, 0), ("jsonl", 4, 0)])
    windows = read_windows(str(tmp_path / "data"), 2)
    (tmp_path / "data" / "001.jsonl").unlink()
    assert [next(windows).number, next(windows).number] == [0, 1]
    with pytest.raises(FileNotFoundError):
        next(windows)


def test_an_empty_file_among_others_is_left_out_and_told(tmp_path: Path) -> None:
    expected = make_folder(tmp_path / "data", [("jsonl", 3, 0), ("jsonl", 2, 0)])
    (tmp_path / "data" / "0005.jsonl").write_text("\n\n", encoding="utf-8")
    told: list[str] = []
    windows = list(read_windows(str(tmp_path / "data"), 2, on_message=told.append))
    assert [row for w in windows for _, row in w.rows] == expected
    assert told == [f"{tmp_path}/data/0005.jsonl holds no rows and is left out."]


def test_data_without_any_row_are_refused(tmp_path: Path) -> None:
    make_folder(tmp_path / "data", [("jsonl", 0, 0)])
    with pytest.raises(InvalidData, match=r"data: the file holds no rows"):
        list(read_windows(str(tmp_path / "data"), 2, lambda w: w == 0))
    (tmp_path / "data" / "001.jsonl").write_bytes(b"")
    with pytest.raises(InvalidData, match=r"data: it holds no rows"):
        list(read_windows(str(tmp_path / "data"), 2))


def test_rows_are_not_shared_between_windows(tmp_path: Path) -> None:
    expected = make_folder(tmp_path / "data", [("parquet", 10, 10)])
    windows = list(read_windows(str(tmp_path / "data"), 3))
    for earlier, later in pairwise(windows):
        assert not {o for o, _ in earlier.rows} & {o for o, _ in later.rows}
    assert sum(len(w.rows) for w in windows) == len(expected)
