"""JSON files of a sweep whose values are checked when they are taken: a damaged one is a sentence, never a number.

Owns the refusals: every one names the file, the place in it, what was expected and what was found. Knows nothing of
what the values mean.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from logitcache.errors import UnreadableSweep

ADVICE = "No report was written. Restore the file, or remove the run's folder and run the sweep again."


def text_of(path: Path, advice: str = ADVICE) -> str:
    """What a UTF-8 file holds. advice: what to do where it holds something else."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UnreadableSweep(f"reading {path}: expected text, found other bytes. {advice}") from error


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
            found = json.loads(text_of(path, advice))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UnreadableSweep(
                f"reading {path}: expected a JSON object, found a damaged or half-written file. {advice}"
            )
        return cls(path, found, advice=advice)

    def wrong(self, key: str, expected: str, found: str | None = None) -> UnreadableSweep:
        """The refusal of a value."""
        said = repr(self.values.get(key, "nothing"))[:80] if found is None else found
        return UnreadableSweep(
            f"reading {self.path}: expected {expected} at {self.where}{key}, found {said}. {self.advice}"
        )

    def number(self, key: str) -> float:
        """A finite number."""
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
            raise self.wrong(key, "a finite number")
        return float(value)

    def number_or_none(self, key: str) -> float | None:
        """The same, or None where it is null or absent."""
        return None if self.values.get(key) is None else self.number(key)

    def whole(self, key: str) -> int:
        """A count: 0, 1, 2, ..."""
        number = self.number(key)
        if number < 0 or number != int(number):
            raise self.wrong(key, "a count")
        return int(number)

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
