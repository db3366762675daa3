"""The rows of data by their names: of files, of what `datasets` saved, of the Hub; one name after the other.

Owns windows: so many rows in a row, parsed only where they are wanted, so that many workers can share one data set;
and what becomes of an empty file and of a row that cannot be read. Where files are is in `places`, what is in one in
`files`. Must not know what a row means.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import fsspec

from logitcache.errors import InvalidData
from logitcache.storage.plain_text import without_secrets

from .files import Parsed, Row, Unparsed, Wanted, count_rows_of_file, rows_of_file
from .places import Named, OnMessage, Place, open_hub, open_saved, places_of
from .settings import DEFAULT, DataSettings
from .splits import named_files

COUNTED_BYTES = 2**30
"""Of local files, up to which they are read beforehand: their lines counted, their checksums made."""


@dataclass(frozen=True)
class Skipped:
    """A row that cannot be used, and why: a sentence."""

    origin: str
    reason: str


NamedRows = Iterator[tuple[str, Row | Skipped]]
"""Where each row comes from, and the row."""


@dataclass(frozen=True)
class Window:
    """Rows that follow one another: the `number`-th so many of the data, with where each comes from."""

    number: int
    rows: list[tuple[str, Row | Skipped]]


def read_rows(data: Named, how: DataSettings = DEFAULT, on_message: OnMessage = lambda _: None) -> NamedRows:
    """Pairs (origin, row) of the data, lazily, in a fixed order; the origin is 'file:line' or 'file, row n'.

    how: which of them, how they are fetched, and whether one that cannot be read comes as `Skipped`. on_message is told
    which split is read and which files are not. Raises what `places_of` and opening the Hub raise at once;
    `InvalidData` at the line that is broken, or where a name leads to no row at all.
    """
    found = _unparsed(data, how, lambda _: True, on_message)
    return ((origin, _parsed(origin, parse, how)) for origin, parse in found if parse is not None)


def read_windows(
    data: Named,
    num_rows: int,
    wanted: Wanted = lambda _: True,
    how: DataSettings = DEFAULT,
    on_message: OnMessage = lambda _: None,
) -> Iterator[Window]:
    """The wanted windows of num_rows rows each; the last one has what is left. Raises as `read_rows`."""
    found = _unparsed(data, how, lambda row: wanted(row // num_rows), on_message)
    return _windows(found, num_rows, wanted, how)


def count_rows(data: Named, how: DataSettings = DEFAULT) -> int | None:
    """How many rows there are, where that is known without reading much: None otherwise."""
    places = places_of(data, how)
    files = [file for place in places for file in place.files]
    if not all(place.files for place in places) or any("://" in file for file in files):
        return None
    if sum(Path(f).stat().st_size for f in files if not f.endswith(".parquet")) > COUNTED_BYTES:
        return None
    counts = [count_rows_of_file(file) for file in files]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def sizes_of(data: Named, how: DataSettings = DEFAULT) -> list[list[str | int]]:
    """Names and sizes of the files of the data, with checksums where they are local and can be had without reading
    much; of the Hub, its id."""
    return [size for place in places_of(data, how) for size in _sizes(place)]


def _sizes(place: Place) -> list[list[str | int]]:
    if place.hub_id:
        return [[place.hub_id, -1]]
    files = place.files or tuple(sorted(str(p) for p in Path(place.saved).iterdir() if p.is_file()))
    if any("://" in file for file in files):
        fs, _ = fsspec.core.url_to_fs(files[0])
        return [[f.rsplit("/", 1)[-1], int(fs.size(f))] for f in files]
    sizes: list[list[str | int]] = [[Path(f).name, Path(f).stat().st_size] for f in files]
    if sum(Path(f).stat().st_size for f in files) <= COUNTED_BYTES:
        for size, f in zip(sizes, files, strict=True):
            with Path(f).open("rb") as opened:
                size.append(hashlib.file_digest(opened, "blake2b").hexdigest())
    return sizes


def _windows(found: Iterator[Unparsed], num_rows: int, wanted: Wanted, how: DataSettings) -> Iterator[Window]:
    number = 0
    while chunk := list(islice(found, num_rows)):
        if wanted(number):
            yield Window(
                number, [(origin, _parsed(origin, parse, how)) for origin, parse in chunk if parse is not None]
            )
        number += 1


def _parsed(origin: str, parse: Callable[[], Row], how: DataSettings) -> Row | Skipped:
    try:
        return parse()
    except InvalidData as error:
        if how.skip_bad_rows:
            return Skipped(origin, str(error))
        raise


def _unparsed(data: Named, how: DataSettings, wanted: Wanted, on_message: OnMessage) -> Iterator[Unparsed]:
    places = places_of(data, how)
    for place in places:
        if place.said:
            on_message(place.said)
    twice = _given_twice(places)
    if twice:
        on_message(f"Given more than once, and read as often: {named_files(twice)}.")
    opened = [None if place.files else _opened(place, how, on_message) for place in places]
    return _joined(places, opened, wanted, on_message)


def _given_twice(places: Sequence[Place]) -> list[str]:
    units = [unit for place in places for unit in (place.files or (place.saved or place.hub_id,))]
    counts = Counter(unit if "://" in unit else os.path.realpath(unit) for unit in units)
    return [without_secrets(unit) for unit, count in counts.items() if count > 1]


def _opened(place: Place, how: DataSettings, on_message: OnMessage) -> Iterable[Row]:
    dataset: Iterable[Row] = open_saved(place) if place.saved else open_hub(place, how, on_message)
    return dataset


def _joined(
    places: Sequence[Place], opened: Sequence[Iterable[Row] | None], wanted: Wanted, on_message: OnMessage
) -> Iterator[Unparsed]:
    number = 0
    for place, dataset in zip(places, opened, strict=True):
        first = number
        rows = _file_rows(place.files, first, wanted, on_message) if dataset is None else _dataset_rows(place, dataset)
        for unparsed in rows:
            number += 1
            yield unparsed
        if number == first:
            what = "the file holds" if len(place.files) == 1 else "it holds"
            raise InvalidData(f"reading {place.name}: {what} no rows.")


def _file_rows(files: Sequence[str], first: int, wanted: Wanted, on_message: OnMessage) -> Iterator[Unparsed]:
    number = first
    for file in files:
        before = number
        for unparsed in rows_of_file(file, before, wanted):
            number += 1
            yield unparsed
        if number == before and len(files) > 1:
            on_message(f"{without_secrets(file)} holds no rows and is left out.")


def _dataset_rows(place: Place, dataset: Iterable[Row]) -> Iterator[Unparsed]:
    return ((f"{place.name}, row {i}", Parsed(dict(row))) for i, row in enumerate(dataset, 1))
