"""Where rows come from: JSONL or Parquet files, local or of any store that fsspec knows, or a hub data set.

Owns files and their faults (missing, empty, a broken line and its number), and windows: so many rows in a row, parsed
only where they are wanted, so that many workers can share one data set. Must not know what a row means.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from logitcache.errors import InputNotFound, InvalidData
from logitcache.storage.plain_text import one_line, without_secrets

from .settings import DEFAULT, DataSettings

Row = dict[str, Any]
"""One row as its file has it, by the names of its columns."""

NamedRows = Iterator[tuple[str, Row]]
"""Where each row comes from, and the row."""

IGNORED = -100
"""The label of a token that is none."""

_SUFFIXES = (".jsonl", ".json", ".parquet")

MAX_ROW_BYTES = 2**23
"""Of a line of JSONL: parsed, what somebody makes up takes 20 times that."""

COUNTED_BYTES = 2**30
"""Of local files, up to which they are read beforehand: their lines counted, their checksums made."""

Wanted = Callable[[int], bool]
Unparsed = tuple[str, Callable[[], Row] | None]
"""Where a row comes from, and what parses it; None where it lies in a window that is not wanted."""


@dataclass(frozen=True)
class Window:
    """Rows that follow one another: the `number`-th so many of a data set, with where each comes from."""

    number: int
    rows: list[tuple[str, Row]]


def read_rows(data: str, how: DataSettings = DEFAULT) -> NamedRows:
    """Pairs (origin, row) of a data set, lazily, in a fixed order; the origin is 'file:line' or 'file, row n'.

    how: which of them, and how they are fetched. Raises `InputNotFound` at once, `InvalidData` at the line that is
    broken, or where a file holds no row.
    """
    found = _unparsed(data, how, lambda _: True)
    return ((origin, parse()) for origin, parse in found if parse is not None)


def read_windows(
    data: str, num_rows: int, wanted: Wanted = lambda _: True, how: DataSettings = DEFAULT
) -> Iterator[Window]:
    """The wanted windows of num_rows rows each; the last one has what is left. Raises as `read_rows`."""
    found = _unparsed(data, how, lambda row: wanted(row // num_rows))
    return _windows(found, num_rows, wanted)


def count_rows(data: str, how: DataSettings = DEFAULT) -> int | None:  # noqa: ARG001
    """How many rows there are, where that is known without reading much: None otherwise."""
    files = _files(data)
    if files is None or "://" in data:
        return None
    lines = [f for f in files if not f.endswith(".parquet")]
    if sum(Path(f).stat().st_size for f in lines) > COUNTED_BYTES:
        return None
    try:
        parquet = sum(pq.ParquetFile(f).metadata.num_rows for f in files if f.endswith(".parquet"))
    except (pa.ArrowInvalid, OSError):
        return None  # reading it says what is wrong
    return int(parquet) + sum(_count_lines(f) for f in lines)


def sizes_of(data: str, how: DataSettings = DEFAULT) -> list[list[str | int]]:  # noqa: ARG001
    """Names and sizes of the files of a data set, with checksums where they are local and can be had without reading
    much; of the hub, its id."""
    files = _files(data)
    if files is None:
        return [[data, -1]]
    if "://" in data:
        fs, _ = fsspec.core.url_to_fs(data)
        return [[f.rsplit("/", 1)[-1], int(fs.size(f))] for f in files]
    sizes: list[list[str | int]] = [[Path(f).name, Path(f).stat().st_size] for f in files]
    if sum(Path(f).stat().st_size for f in files) <= COUNTED_BYTES:
        for size, f in zip(sizes, files, strict=True):
            with Path(f).open("rb") as opened:
                size.append(hashlib.file_digest(opened, "blake2b").hexdigest())
    return sizes


def _windows(found: Iterator[Unparsed], num_rows: int, wanted: Wanted) -> Iterator[Window]:
    number = 0
    while chunk := list(islice(found, num_rows)):
        if wanted(number):
            yield Window(number, [(origin, parse()) for origin, parse in chunk if parse is not None])
        number += 1


def _unparsed(data: str, how: DataSettings, wanted: Wanted) -> Iterator[Unparsed]:
    files = _files(data)
    return _hub_rows(data, how.streaming) if files is None else _rows_of(files, wanted)


def _files(data: str) -> list[str] | None:
    """Paths or URLs in a fixed order; None for what can only be a hub id. Raises `InputNotFound`."""
    if "://" in data:
        return _remote_files(data)
    path = Path(data)
    if path.is_dir():
        files = sorted(str(p) for p in path.iterdir() if p.suffix in _SUFFIXES)
        if not files:
            raise InputNotFound(
                f"reading data {_named(data)}: expected *.jsonl or *.parquet in this folder, found none."
            )
        return files
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise InputNotFound(
                f"reading data {_named(data)}: expected a .jsonl or .parquet file, found {path.suffix!r}."
            )
        return [str(path)]
    if path.suffix in _SUFFIXES:
        raise InputNotFound(f"reading data {_named(data)}: no such file. Check the path.")
    return None


def _remote_files(data: str) -> list[str]:
    try:
        fs, root = fsspec.core.url_to_fs(data)
        names = [root] if fs.isfile(root) else sorted(fs.ls(root, detail=False))
    except FileNotFoundError as error:
        raise InputNotFound(f"reading data {_named(data)}: no such file or folder. Check the URL.") from error
    except Exception as error:  # each client raises its own
        raise InputNotFound(
            f"reading data {_named(data)}: the store did not give it ({one_line(str(error), 400)}). Check the URL."
        ) from error
    files = [fs.unstrip_protocol(name) for name in names if name.endswith(_SUFFIXES)]
    if not files:
        raise InputNotFound(f"reading data {_named(data)}: expected *.jsonl or *.parquet there, found none.")
    return files


def _rows_of(files: Sequence[str], wanted: Wanted) -> Iterator[Unparsed]:
    number = 0
    for file in files:
        first = number
        rows = _parquet_rows if file.endswith(".parquet") else _jsonl_rows
        for unparsed in rows(file, first, wanted):
            number += 1
            yield unparsed
        if number == first:
            raise InvalidData(f"reading {without_secrets(file)}: the file holds no rows.")


def _jsonl_rows(file: str, first: int, wanted: Wanted) -> Iterator[Unparsed]:
    with _open(file) as f:
        number = first
        name = without_secrets(file)
        for at, line in enumerate(iter(lambda: f.readline(MAX_ROW_BYTES + 1), b""), 1):
            if len(line) > MAX_ROW_BYTES:
                raise InvalidData(
                    f"reading {name}: line {at} has more than {MAX_ROW_BYTES:,} bytes. One row a line is expected; "
                    "divide one that is so long."
                )
            if line.strip():
                yield f"{name}:{at}", (_Line(name, at, line) if wanted(number) else None)
                number += 1


@dataclass(frozen=True)
class _Line:
    file: str
    number: int
    text: bytes

    def __call__(self) -> Row:
        try:
            row = json.loads(self.text)
        except (ValueError, RecursionError) as error:
            raise InvalidData(
                f"reading {self.file}: line {self.number} is not JSON ({one_line(str(error), 200)}). Repair the line."
            ) from error
        if not isinstance(row, dict):
            raise InvalidData(
                f"reading {self.file}: line {self.number} is not a JSON object. One object a line is expected."
            )
        return row


def _parquet_rows(file: str, first: int, wanted: Wanted) -> Iterator[Unparsed]:
    """Row groups without a wanted row are not read."""
    name = without_secrets(file)
    try:
        with _open(file) as f:
            parquet = pq.ParquetFile(f)
            start = 0
            for group in range(parquet.num_row_groups):
                stop = start + parquet.metadata.row_group(group).num_rows
                if any(wanted(first + row) for row in range(start, stop)):
                    read = parquet.iter_batches(batch_size=1024, row_groups=[group])
                    rows = (row for batch in read for row in batch.to_pylist())
                    for number, row in enumerate(rows, start + 1):
                        yield f"{name}, row {number}", _Parsed(row)
                else:
                    for number in range(start + 1, stop + 1):
                        yield f"{name}, row {number}", None
                start = stop
    except (pa.ArrowException, OSError, ValueError, TypeError, LookupError, ArithmeticError) as error:
        said = one_line(str(error), 200)
        raise InvalidData(f"reading {name}: it is not a readable Parquet file ({said}).") from error


@dataclass(frozen=True)
class _Parsed:
    row: Row

    def __call__(self) -> Row:
        return self.row


def _hub_rows(name: str, streaming: bool) -> Iterator[Unparsed]:
    from datasets import load_dataset  # a slow import that local files do not need

    try:
        dataset: Any = load_dataset(name, split="train", streaming=streaming)
    except Exception as error:  # the hub client raises many kinds
        line = one_line((str(error).strip().splitlines() or [type(error).__name__])[0], 400)
        raise InputNotFound(
            f"reading data {name!r}: no such file or folder, and the hub did not give it ({line}). "
            "Check the path, or the network."
        ) from error
    return ((f"{without_secrets(name)}, row {i}", _Parsed(dict(row))) for i, row in enumerate(dataset, 1))


def _named(data: str) -> str:
    return repr(without_secrets(data))


def _open(file: str) -> Any:
    return fsspec.open(file, "rb") if "://" in file else Path(file).open("rb")


def _count_lines(file: str) -> int:
    with Path(file).open("rb") as f:
        return sum(1 for line in f if line.strip())
