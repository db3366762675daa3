"""The rows of one file, and what is said of a file or a line that cannot be read. The oracle is json itself."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcache.data.files import MAX_ROW_BYTES
from logitcache.data.rows import Skipped, count_rows, read_rows, read_windows
from logitcache.data.settings import DataSettings
from logitcache.errors import InvalidData

INPUTS = Path(__file__).parent / "inputs" / "json-files"
SKIP = DataSettings(skip_bad_rows=True)


def rows_of(path: Path) -> list[Any]:
    return [row for _, row in read_rows(path)]


def refusal(path: Path) -> str:
    with pytest.raises(InvalidData) as told:
        rows_of(path)
    return str(told.value)


def test_an_array_and_a_packed_file_are_read() -> None:
    expected = json.loads((INPUTS / "array.json").read_text(encoding="utf-8"))
    found = list(read_rows(INPUTS / "array.json"))
    assert [row for _, row in found] == expected
    assert found[1][0] == f"{INPUTS / 'array.json'}, row 2"
    assert list(read_rows(INPUTS / "data.jsonl.gz")) == [
        (f"{INPUTS / 'data.jsonl.gz'}:1", {"text": "One and two are three."})
    ]
    assert count_rows(INPUTS / "array.json") is None and count_rows(INPUTS / "data.jsonl.gz") is None


def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    assert "dupkey.jsonl: line 1 has the key 'text' twice" in refusal(INPUTS / "dupkey.jsonl")
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}, {"messages": [{"role": "user", "role": "assistant"}]}]', encoding="utf-8")
    assert "a.json, row 2: it has the key 'role' twice" in refusal(path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=60)
@given(
    found=st.lists(st.dictionaries(st.text(), VALUES, max_size=3), min_size=1, max_size=6),
    indent=st.sampled_from([None, 1]),
    packed=st.booleans(),
    ascii_only=st.booleans(),
)
def test_an_array_gives_the_rows_that_json_gives(
    tmp_path_factory: pytest.TempPathFactory,
    found: list[dict[str, Any]],
    indent: int | None,
    packed: bool,
    ascii_only: bool,
) -> None:
    text = json.dumps(found, indent=indent, ensure_ascii=ascii_only)
    data = text.encode(errors="surrogatepass" if ascii_only else "replace")
    path = tmp_path_factory.mktemp("array") / ("a.json.gz" if packed else "a.json")
    path.write_bytes(gzip.compress(data) if packed else data)
    expected = json.loads(data.decode())
    assert rows_of(path) == expected
    windows = list(read_windows(path, 2, lambda w: w == 1))
    assert [row for w in windows for _, row in w.rows] == expected[2:4]


def test_an_array_whose_rows_are_longer_than_what_is_read_at_once(tmp_path: Path) -> None:
    expected = [{"text": "ä" * size} for size in (70_000, 3, 200_000, 65_536)]
    path = tmp_path / "a.json"
    path.write_text(" \n" + json.dumps(expected, ensure_ascii=False, indent=2) + "\n", encoding="utf-8-sig")
    assert rows_of(path) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'[{"a": 1} {"a": 2}]', "row 2: expected a comma before it, found '{\"a\": 2}]'"),
        (b'[{"a": 1}, {"a": }]', "row 2: it is not JSON"),
        (b'[{"a": 1}, ', "row 2: it is not JSON"),
        (b'[{"a": 1}', "the file ends within its list"),
        (b'[{"a": 1}, 7]', "row 2 is not a JSON object"),
        (b'[{"a": "\xe9"}]', "expected UTF-8, found the byte 0xe9"),
        (b"[" * 100_000, "row 1: it is not JSON"),
        (b"[]", "the file holds no rows"),
    ],
)
def test_an_array_that_is_none_is_refused_with_its_row(content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert expected in refusal(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n", "git lfs pull"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n", "git lfs pull"),
        ("a.jsonl.gz", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n", "git lfs pull"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), "expected UTF-8, found UTF-16"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "line 2: expected UTF-8, found the byte 0xe9"),
        ("a.jsonl.gz", b'{"text": "a"}\n', "not a whole file of gzip"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "abcdefghijklmno"}\n' * 99, mtime=0)[:-12], "not a whole file of gzip"),
        ("a.json", b'{\n "text": "a"\n}\n', "line 1 is not JSON"),
    ],
)
def test_a_file_that_is_something_else_is_told_from_a_broken_line(
    name: str, content: bytes, expected: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    assert expected in refusal(tmp_path / name)


def test_a_mark_of_utf8_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    assert rows_of(tmp_path / "a.jsonl") == [{"text": "a"}]


def test_lines_that_cannot_be_read_are_skipped_and_the_rest_is_where_it_was(tmp_path: Path) -> None:
    lines = [
        b'{"text": "a"}',
        b"{",
        b'{"text": "' + b"b" * (2 * MAX_ROW_BYTES) + b'"}',
        b'{"a": 1, "a": 2}',
        b'{"text": "c"}',
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(InvalidData, match="line 2 is not JSON"):
        rows_of(path)
    found = list(read_rows(path, SKIP))
    assert [row for _, row in found if isinstance(row, dict)] == [{"text": "a"}, {"text": "c"}]
    skipped = [row for _, row in found if isinstance(row, Skipped)]
    assert [row.origin for row in skipped] == [f"{path}:{at}" for at in (2, 3, 4)]
    for row, expected in zip(skipped, ("is not JSON", "has more than 8,388,608 bytes", "twice"), strict=True):
        assert expected in row.reason
    assert count_rows(path) == len(found)


def test_an_element_that_is_no_object_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}, 7, {"text": "b"}]', encoding="utf-8")
    assert [row for _, row in read_rows(path, SKIP) if isinstance(row, dict)] == [{"text": "a"}, {"text": "b"}]


def test_an_element_with_a_key_twice_is_skipped_and_those_behind_it_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}, {"m": [{"r": 1, "r": 2}]}, {"text": "c"}]', encoding="utf-8")
    rows = [row for _, row in read_rows(path, DataSettings(skip_bad_rows=True))]
    assert [rows[0], rows[2]] == [{"text": "a"}, {"text": "c"}]
    assert isinstance(rows[1], Skipped) and "row 2: it has the key 'r' twice" in rows[1].reason


@pytest.mark.parametrize("rest", ['\n[{"text": "b"}]\n', '\n{"text": "b"}', ",", "]"])
def test_what_stands_behind_an_array_is_not_left_out_without_a_word(rest: str, tmp_path: Path) -> None:
    """Two exports in one file: the rows of the second would not be read."""
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}]' + rest, encoding="utf-8")
    assert "a.json: expected nothing behind the list that it begins with" in refusal(path)
    path.write_text('[{"text": "a"}]' + " \n\t" * 40_000, encoding="utf-8")
    assert [row for _, row in read_rows(path)] == [{"text": "a"}]


def test_no_null_is_added_to_a_row(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a", "tool_calls": []}]}, {"messages": [{"role": "user"}]}]
    buffer = io.StringIO()
    json.dump(rows, buffer)
    (tmp_path / "a.json").write_text(buffer.getvalue(), encoding="utf-8")
    assert rows_of(tmp_path / "a.json") == rows


CALLS = [
    {
        "messages": [
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]},
            {"role": "tool", "content": "sunny"},
        ],
        "tools": [{"function": {"name": "f", "parameters": {"properties": {name: {"type": "string"}}}}}],
        "input_ids": None,
    }
    for name, arguments in (("city", {"city": "Rome"}), ("zip", {"zip": ["1", "2"]}))
]
"""The arguments of one are not those of the other."""


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_rows_of_columns_have_no_fields_of_other_rows(kind: str, tmp_path: Path) -> None:
    """Arrow gives each object the fields of all, null: {"city": "Rome", "zip": null} would be learnt."""
    dataset = datasets.Dataset(pa.Table.from_pylist(CALLS))
    assert dataset[0]["messages"][0]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome", "zip": None}
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(CALLS), path)
    else:
        dataset.save_to_disk(path)
    assert rows_of(path) == CALLS
