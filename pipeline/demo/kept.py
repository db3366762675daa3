"""What the real demo keeps between two tries beside data and runs: plain JSON files, and what its parts took.

Owns how they are written, whole or not at all, and cost.json: the seconds of each part, and the largest memory of the
demo's processes. A part that is finished keeps its seconds when the demo is started again; one that was interrupted
adds up those of every try that ended in order.
"""

import json
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

from logitcache.errors import TrainingFailed
from logitcache.storage.files import replace_file

COST = "cost.json"


def write_kept(path: Path, value: dict[str, Any]) -> None:
    """Write a file that people read too."""
    replace_file(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_kept(path: Path) -> dict[str, Any]:
    """What is in it, empty where it is not there. Raises `TrainingFailed` where it was damaged."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise TrainingFailed(
            f"going on with the demo in {path.parent}: {path.name} is damaged ({error}). What it holds cannot be "
            "reported. Choose another --out, or remove the folder."
        ) from error
    return found


class Clock:
    """Measures the parts of a demo, in the order in which they are first begun."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / COST
        found = read_kept(self._path)
        self.seconds: dict[str, float] = dict(found.get("seconds", {}))
        self._finished: set[str] = set(found.get("finished", []))
        self.peak_memory_bytes: int = found.get("peak_memory_bytes", 0)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Within, a part of the demo is done; what it takes is added to it unless it was finished before."""
        started, was_finished = perf_counter(), name in self._finished
        try:
            yield
            self._finished.add(name)
        finally:
            if not was_finished:
                self.seconds[name] = round(self.seconds.get(name, 0.0) + perf_counter() - started, 1)
                self.peak_memory_bytes = max(self.peak_memory_bytes, peak_memory_bytes())
                finished = [part for part in self.seconds if part in self._finished]
                write_kept(
                    self._path,
                    {"seconds": self.seconds, "finished": finished, "peak_memory_bytes": self.peak_memory_bytes},
                )


def peak_memory_bytes() -> int:
    """The most main memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
