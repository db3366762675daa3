"""The rows of one file: JSONL or an array of JSON, packed by gzip or not, or Parquet; local or of any store.

Owns what is wrong with a file or a line of it: not JSON, a key twice, not UTF-8, too long, half a file, a pointer in
place of the data. Each row comes unparsed, with where it comes from, so that what nobody wants is not parsed. Must not
know folders, nor what a row means.
"""

import codecs
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from logitcache.errors import InvalidData
from logitcache.storage.plain_text import one_line, shown, without_secrets

Row = dict[str, Any]
"""One row as its file has it, by the names of its columns."""

IGNORED = -100
"""The label of a token that is none."""

Wanted = Callable[[int], bool]
Unparsed = tuple[str, Callable[[], Row] | None]
"""Where a row comes from, and what parses it; None where it lies in a window that is not wanted."""

MAX_ROW_BYTES = 2**23
"""Of a row of JSON: parsed, what somebody makes up takes 20 times that."""

_CHUNK = 2**16
_POINTER = b"version https://git-lfs.github.com/spec/"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_BOM = b"\xef\xbb\xbf"
_SPACE = b" \t\r\n"


def rows_of_file(file: str, first: int, wanted: Wanted) -> Iterator[Unparsed]:
    """The rows of a file. first: how many rows of the data come before it. Raises `InvalidData`."""
    if file.endswith(".parquet"):
        return _parquet_rows(file, first, wanted)
    return _json_rows(file, first, wanted)


def count_rows_of_file(file: str) -> int | None:
    """How many rows a local file has, where that is known without parsing it. Its reader says what is wrong."""
    if file.endswith(".parquet"):
        try:
            return int(pq.ParquetFile(file).metadata.num_rows)
        except (pa.ArrowInvalid, OSError):
            return None
    if file.endswith(".gz"):
        return None
    with Path(file).open("rb") as f:
        return None if _is_array(f) else sum(1 for line in f if line.strip())


@contextmanager
def _opened(file: str, name: str) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked. Raises `InvalidData` for what stands there in place of them."""
    with fsspec.open(file, "rb") if "://" in file else Path(file).open("rb") as raw:
        start = raw.read(len(_POINTER))
        raw.seek(0)
        if start == _POINTER:
            raise InvalidData(
                f"reading {name}: expected the data, found a pointer of Git LFS in their place. It holds no row. Fetch "
                "the file with: git lfs pull."
            )
        if start.startswith(_UTF16):
            raise InvalidData(f"reading {name}: expected UTF-8, found UTF-16. Save the file as UTF-8.")
        if not file.endswith(".gz"):
            yield raw
            return
        try:
            with gzip.GzipFile(fileobj=raw) as unpacked:
                yield cast(IO[bytes], unpacked)
        except (OSError, EOFError, zlib.error) as error:
            said = one_line(str(error), 200)
            raise InvalidData(
                f"reading {name}: it is not a whole file of gzip ({said}). Fetch or pack it again."
            ) from error


def _is_array(f: IO[bytes]) -> bool:
    """Whether the first sign of a file, which stands at its start again afterwards, begins a list."""
    while (start := f.read(_CHUNK)) and not start.strip(_SPACE + _BOM):
        pass
    f.seek(0)
    return start.lstrip(_SPACE + _BOM).startswith(b"[")


def _json_rows(file: str, first: int, wanted: Wanted) -> Iterator[Unparsed]:
    name = without_secrets(file)
    with _opened(file, name) as f:
        of_array = file.removesuffix(".gz").endswith(".json") and _is_array(f)
        yield from _array_rows(f, name, first, wanted) if of_array else _line_rows(f, name, first, wanted)


def _line_rows(f: IO[bytes], name: str, first: int, wanted: Wanted) -> Iterator[Unparsed]:
    number = first
    for at, line in enumerate(iter(lambda: f.readline(MAX_ROW_BYTES + 1), b""), 1):
        rest = line
        while len(rest) > MAX_ROW_BYTES and not rest.endswith(b"\n"):
            rest = f.readline(MAX_ROW_BYTES + 1)
        if line.strip():
            yield f"{name}:{at}", (_Line(name, at, line) if wanted(number) else None)
            number += 1


@dataclass(frozen=True)
class _Line:
    file: str
    number: int
    text: bytes

    def __call__(self) -> Row:
        where = f"reading {self.file}: line {self.number}"
        if len(self.text) > MAX_ROW_BYTES:
            raise InvalidData(
                f"{where} has more than {MAX_ROW_BYTES:,} bytes. One row a line is expected; divide a longer one."
            )
        try:
            row = json.loads(_text(self.text, where), object_pairs_hook=_once)
        except _TwiceError as error:
            raise InvalidData(f"{where} has the key {error} twice. Which counts is not said. Leave one out.") from error
        except (ValueError, RecursionError) as error:
            raise InvalidData(f"{where} is not JSON ({one_line(str(error), 200)}). Repair the line.") from error
        return _object(row, where, "One object a line is expected.")


def _array_rows(f: IO[bytes], name: str, first: int, wanted: Wanted) -> Iterator[Unparsed]:
    """The elements of a list, each parsed when it is reached, with no more of the file in memory than one takes."""
    decoder = json.JSONDecoder(object_pairs_hook=_or_twice)
    text, number, size = _Buffer(f, name), first, _CHUNK
    text.skip("[")
    while not text.starts_with("]"):
        where = f"reading {name}, row {number - first + 1}"
        if number > first and not text.skip(","):
            raise InvalidData(f"{where}: expected a comma before it, found {shown(text.ahead(20))}. Repair the file.")
        while True:
            try:
                row, end = decoder.raw_decode(text.ahead(size))
                break
            except (ValueError, RecursionError) as error:
                if size <= MAX_ROW_BYTES and text.has_more(size):
                    size *= 2
                    continue
                raise InvalidData(f"{where}: it is not JSON ({one_line(str(error), 200)}). Repair the file.") from error
        text.take(end)
        size = _CHUNK
        yield f"{name}, row {number - first + 1}", (_Element(row, where) if wanted(number) else None)
        number += 1
    text.skip("]")
    if rest := text.ahead(20):
        raise InvalidData(
            f"reading {name}: expected nothing behind the list that it begins with, found {shown(rest[:20])}. What "
            "follows would not be read. Make it one list, or a .jsonl file with a row a line."
        )


@dataclass(frozen=True)
class _Element:
    value: Any
    where: str

    def __call__(self) -> Row:
        twice = next(_twice_in(self.value), None)
        if twice is not None:
            raise InvalidData(f"{self.where}: it has the key {twice} twice. Which counts is not said. Leave one out.")
        return _object(self.value, self.where, "A list of objects is expected.")


@dataclass(frozen=True)
class _Twice:
    """In place of an object that has a key twice: its row can be told, and those behind it read."""

    key: str


def _or_twice(pairs: list[tuple[str, Any]]) -> Row | _Twice:
    try:
        return _once(pairs)
    except _TwiceError as error:
        return _Twice(str(error))


def _twice_in(value: Any) -> Iterator[str]:
    left = [value]
    while left:
        found = left.pop()
        if isinstance(found, _Twice):
            yield found.key
        elif isinstance(found, (dict, list)):
            left += found.values() if isinstance(found, dict) else found


class _Buffer:
    """The text of a file from where it has been read to."""

    def __init__(self, f: IO[bytes], name: str) -> None:
        self._file, self._decoder = f, codecs.getincrementaldecoder("utf-8-sig")()
        self._name, self._text, self._ended = name, "", False

    def ahead(self, size: int) -> str:
        """What comes next, without space before it: so many characters, and at the end of the file fewer."""
        self._text = self._text.lstrip()
        while len(self._text) < size and not self._ended:
            data = self._file.read(max(size, _CHUNK))
            try:
                more = self._decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise _not_utf8(f"reading {self._name}", error) from error
            self._ended = not data
            self._text = (self._text + more).lstrip()
        return self._text

    def has_more(self, size: int) -> bool:
        """Whether anything comes behind the next so many characters."""
        return not self._ended or len(self._text) > size

    def starts_with(self, sign: str) -> bool:
        """Whether this comes next. Raises `InvalidData` where nothing does."""
        if not self.ahead(1):
            raise InvalidData(f"reading {self._name}: the file ends within its list. Fetch or write it again.")
        return self._text.startswith(sign)

    def skip(self, sign: str) -> bool:
        """Go behind this sign if it comes next; whether it did."""
        found = self.starts_with(sign)
        self._text = self._text[len(sign) :] if found else self._text
        return found

    def take(self, end: int) -> None:
        """Go on by so many characters."""
        self._text = self._text[end:]


class _TwiceError(Exception):
    """A key that an object has twice."""


def _once(pairs: list[tuple[str, Any]]) -> Row:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _TwiceError(shown(next(key for key in keys if keys.count(key) > 1)))
    return found


def _text(line: bytes, where: str) -> str:
    try:
        return line.removeprefix(_BOM).decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error) from error


def _not_utf8(where: str, error: UnicodeDecodeError) -> InvalidData:
    return InvalidData(
        f"{where}: expected UTF-8, found the byte 0x{error.object[error.start]:02x}, as another encoding has it. Its "
        "text would not be what was written. Save the file as UTF-8."
    )


def _object(row: Any, where: str, expected: str) -> Row:
    if not isinstance(row, dict):
        raise InvalidData(f"{where} is not a JSON object. {expected}")
    return row


def _parquet_rows(file: str, first: int, wanted: Wanted) -> Iterator[Unparsed]:
    """Row groups without a wanted row are not read."""
    name = without_secrets(file)
    try:
        with _opened(file, name) as f:
            parquet = pq.ParquetFile(f)
            start = 0
            for group in range(parquet.num_row_groups):
                stop = start + parquet.metadata.row_group(group).num_rows
                if any(wanted(first + row) for row in range(start, stop)):
                    read = parquet.iter_batches(batch_size=1024, row_groups=[group])
                    rows = (row for batch in read for row in batch.to_pylist())
                    for number, row in enumerate(rows, start + 1):
                        yield f"{name}, row {number}", Parsed(row)
                else:
                    for number in range(start + 1, stop + 1):
                        yield f"{name}, row {number}", None
                start = stop
    except (pa.ArrowException, OSError, ValueError, TypeError, LookupError, ArithmeticError) as error:
        said = one_line(str(error), 200)
        raise InvalidData(f"reading {name}: it is not a readable Parquet file ({said}).") from error


@dataclass(frozen=True)
class Parsed:
    """A row of columns, which is there already."""

    row: Row

    def __call__(self) -> Row:
        """The row without the nulls in objects of it: in Arrow and Parquet each has the fields of all others, and what
        one lacks is null there, so that a call would be learnt with the arguments of other rows' calls."""
        return {name: _without_nulls(value) for name, value in self.row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    if isinstance(value, list) and any(isinstance(each, (dict, list)) for each in value):
        return [_without_nulls(each) for each in value]
    return value
