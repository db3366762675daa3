"""A formula of the user's own: a Python function in a file, named by a setting as FILE.py:FUNCTION.

Owns that nothing is executed but the file that a setting names, and that its text is kept, so that a run can say word
for word what it computed. What a formula must be is checked in `formula_checks`. Must not know models or caches.
Trade-off: a file is a module of its own, and its folder is not on Python's path: what it imports is installed, so that
the file is all of the formula.
"""

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from logitcache.errors import InputNotFound, TrainingFailed

MAX_BYTES = 2**20
"""Of a file that is a formula; run.json holds it."""


@dataclass(frozen=True)
class Formula:
    """A function, and the text that it was made of."""

    #: As it was given, FILE.py:FUNCTION.
    name: str
    text: str
    function: Callable[..., Any]

    @property
    def digest(self) -> str:
        """SHA-256 of the text, in hexadecimal digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()


_loaded: dict[str, Formula] = {}


def load_formula(name: str) -> Formula:
    """The formula as its file is now, which is executed where it was not before or has changed.

    Raises `InputNotFound` for a file that cannot be read, `TrainingFailed` for one that fails or has no such function.
    """
    path, _, function = name.rpartition(":")
    text = _text_of(Path(path).expanduser(), name)
    known = _loaded.get(name)
    if known is None or known.text != text:
        _loaded[name] = Formula(name, text, _executed(path, text, function))
    return _loaded[name]


def formula(name: str) -> Formula:
    """The formula as it was loaded, also where its file has changed since."""
    return _loaded[name] if name in _loaded else load_formula(name)


def _text_of(path: Path, name: str) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputNotFound(f"reading the formula {name}: {error.strerror or error}. Check the path.") from error
    if len(data) > MAX_BYTES:
        raise TrainingFailed(
            f"reading the formula {name}: expected at most {MAX_BYTES:,} bytes, found {len(data):,}. run.json keeps "
            "the file as it is. Leave in it what the formula needs."
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise TrainingFailed(
            f"reading the formula {name}: the file is not UTF-8 ({error}). Save it as such."
        ) from error


def _executed(path: str, text: str, function: str) -> Callable[..., Any]:
    module = ModuleType(f"logitcache_formula_{hashlib.sha256((path + text).encode()).hexdigest()[:16]}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses look for theirs there
    try:
        exec(compile(text, path, "exec"), vars(module))
    except Exception as error:
        raise TrainingFailed(
            f"reading the formula {path}:{function}: executing the file failed with {type(error).__name__}: {error}. "
            "Its folder is not on Python's path: it can import what is installed. Repair the file."
        ) from error
    found = vars(module).get(function)
    if not callable(found):
        raise TrainingFailed(
            f"reading the formula {path}:{function}: expected a function {function} in the file, found "
            f"{'nothing of that name' if found is None else type(found).__name__}. Check the name."
        )
    made: Callable[..., Any] = found
    return made
