"""The file that lists rows that --skip-bad-rows left out: a line of JSON each, with where it comes from and why.

Owns its name and its lines. The file stands beside what a job writes, never in it: a cache has the files of its format
and no others. Must not know why a row cannot be used.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .rows import Skipped
from .settings import DataSettings

ENDING = ".skipped.jsonl"


def listed_beside(how: DataSettings, output: str, part: str = "") -> DataSettings:
    """The settings with the name of the file, where rows may be skipped; the list of an earlier run is removed.

    output: what the job writes; of a URL, its last name in the folder where the job runs. part: which of several
    workers this is, each of which has a file.
    """
    if not how.skip_bad_rows:
        return how
    plain = output.rstrip("/")
    beside = plain.rsplit("/", 1)[-1] if "://" in plain else plain
    path = Path(how.skipped_file or f"{beside}{ENDING}")
    path = path.with_name(f"{path.stem}{part}{path.suffix}")
    path.unlink(missing_ok=True)
    return replace(how, skipped_file=str(path))


def list_skipped(how: DataSettings, rows: Sequence[Skipped], more: bool = False) -> str:
    """Write rows into the file, or more of them behind those that are there; its name."""
    path = Path(how.skipped_file or f"rows{ENDING}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a" if more else "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"origin": row.origin, "reason": row.reason}) + "\n" for row in rows)
    return str(path)


def said_of_skipped(count: int, *files: str) -> str:
    """How many rows were skipped, and where they are listed."""
    return f"{count:,} rows could not be used and were skipped: {', '.join(files)} says why."


def said_of_unlabelled(count: int) -> str:
    """How many rows there is nothing to learn of."""
    return f"{count:,} rows have no supervised token (labels of -100 alone, or no text) and are left out."
