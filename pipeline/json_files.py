"""JSON files of runs, sweeps and calibrations: written whole with a checksum, and taken value by value.

Owns the one write and the one read of them (`storage.checked_json` owns the bytes), lines of a log included, and the
refusals: every one names the file, the place in it, what was expected and what was found. A damaged file is a sentence,
never a number. Knows nothing of what the values mean.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from logitcache.errors import UnreadableSweep
from logitcache.storage.checked_json import MAX_SEALED_BYTES, sealed, unsealed
from logitcache.storage.files import replace_file
from logitcache.storage.plain_text import one_line, shown

MAX_COUNT = 2**53
"""Beyond it two counts may be one number."""

MAX_LINE_BYTES = 2**20
"""Of a line of a log, which has some hundred."""

ADVICE = "No report was written. Restore the file, or remove the run's folder and run the sweep again."


def write_checked(path: Path, fields: dict[str, Any]) -> None:
    """Write an object with its checksum, whole or not at all, and on the disk before this returns."""
    replace_file(path, sealed(fields))


def read_checked(path: Path) -> dict[str, Any]:
    """What `write_checked` was given. Raises `OSError`, or `ValueError`: what is wrong, the middle of a sentence."""
    with path.open("rb") as file:
        return unsealed(file.read(MAX_SEALED_BYTES + 1))


def line_of(entry: dict[str, Any]) -> bytes:
    """A line of a log, with its checksum."""
    return sealed(entry, indent=None)


def read_lines(path: Path, unfinished: bool) -> Iterator[dict[str, Any]]:
    """The entries of a log, one by one. Raises as `read_checked` where it comes to a line that is none.

    unfinished: the last line may be one that was being written, and is left out: it has no line break, and is not a
    whole object with something behind it.
    """
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
            if unfinished and not line.endswith(b"\n") and len(line) <= MAX_LINE_BYTES and _is_cut_off(line):
                return
            try:
                yield unsealed(line.removesuffix(b"\n"))
            except ValueError as error:
                start = shown(line[:40].decode(errors="replace"))
                raise ValueError(f"expected JSON in line {number} with its checksum, found {start}") from error


def _is_cut_off(line: bytes) -> bool:
    try:
        json.JSONDecoder().raw_decode(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        return True
    return False


@dataclass(frozen=True)
class CheckedJson:
    """An object of a JSON file, whose values are checked when they are taken; `where` leads to it in the file."""

    path: Path
    values: dict[str, Any] = field(repr=False)
    where: str = ""
    advice: str = ADVICE

    @classmethod
    def of(cls, path: Path, advice: str = ADVICE) -> "CheckedJson":
        """The object that a file holds. advice: closes every refusal. Raises `UnreadableSweep`."""
        try:
            return cls(path, read_checked(path), advice=advice)
        except ValueError as error:
            raise UnreadableSweep(f"reading {path}: {error}. {advice}") from error

    def wrong(self, key: str, expected: str, found: str | None = None) -> UnreadableSweep:
        """The refusal of a value."""
        said = shown(self.values.get(key, "nothing")) if found is None else one_line(found, 200)
        return UnreadableSweep(
            f"reading {self.path}: expected {expected} at {self.where}{key}, found {said}. {self.advice}"
        )

    def only(self, names: Iterable[str]) -> "CheckedJson":
        """This object, of which no other fields are known."""
        unknown = sorted(self.values.keys() - set(names))
        if unknown:
            raise self.wrong(shown(unknown[0]).strip("'"), "no such field", "one")
        return self

    def number(self, key: str, least: float = -sys.float_info.max, most: float = sys.float_info.max) -> float:
        """A finite number, within bounds."""
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
            raise self.wrong(key, "a finite number")
        if not least <= value <= most:
            raise self.wrong(key, f"a number from {least:g} to {most:g}")
        return float(value)

    def number_or_none(
        self, key: str, least: float = -sys.float_info.max, most: float = sys.float_info.max
    ) -> float | None:
        """The same, or None where it is null or absent."""
        return None if self.values.get(key) is None else self.number(key, least, most)

    def whole(self, key: str) -> int:
        """A count: 0, 1, 2, ..."""
        number = self.number(key)
        if not 0 <= number <= MAX_COUNT or number != int(number):
            raise self.wrong(key, "a count")
        return int(number)

    def switch(self, key: str) -> bool:
        """True or false."""
        value = self.values.get(key)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str) -> str:
        """Text with something in it."""
        value = self.values.get(key)
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(key, "text")
        return value

    def text_or_empty(self, key: str) -> str:
        """Text, which may be empty."""
        return "" if self.values.get(key) == "" else self.text(key)

    def texts(self, key: str) -> list[str]:
        """A list of different names."""
        value = self.values.get(key)
        if not isinstance(value, list) or not all(isinstance(v, str) and v.strip() for v in value):
            raise self.wrong(key, "a list of names")
        if len(set(value)) < len(value):
            raise self.wrong(key, "each name once")
        return value

    def part(self, key: str) -> "CheckedJson":
        """An object in this one."""
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return CheckedJson(self.path, value, f"{self.where}{key}.", self.advice)

    def parts(self, key: str) -> list["CheckedJson"]:
        """A list of objects in this one."""
        value = self.values.get(key)
        if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
            raise self.wrong(key, "a list of objects")
        return [CheckedJson(self.path, v, f"{self.where}{key}[{i}].", self.advice) for i, v in enumerate(value)]
