"""YAML that anybody wrote: plain values and nothing else, no more than fit a screen a thousand times.

Owns the one reader: what it refuses is said in the middle of a sentence, and what it returns can be printed, compared
and hashed without care. Owns the one syntax of numbers too, that of YAML files, flags and lists of numbers:

    [+-] digits [. digits] [e [+-] digits]      such as 8, 1e-4, .5, 2., 1_000, 010 (which is ten)

Digits are 0 to 9, and one `_` may stand between two of them. Commas (they separate numbers), other bases, infinity and
NaN are none here; in YAML 1.1 1e-4 is a text, 010 is eight and 1:30 is ninety. A whole number is any without a
fraction: 1e3 and 8.0 too. Ground floor: must not know what the values mean.
"""

import math
import re
from collections.abc import Callable, Hashable
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

from logitcache.storage.plain_text import one_line, shown

MAX_CHARS = 2**18
MAX_DEPTH = 32
"""Values within one another."""
MAX_VALUES = 20_000
"""In all, each counted wherever it is named."""


_DIGITS = r"[0-9]+(?:_[0-9]+)*"
WHOLE = re.compile(rf"[+-]?{_DIGITS}\Z")
"""Of the numbers, those that are whole at a glance."""

NUMBER = re.compile(rf"[+-]?(?:{_DIGITS}(?:\.(?:{_DIGITS})?)?|\.{_DIGITS})(?:[eE][+-]?[0-9]+)?\Z")

MAX_DIGITS = 400
MAX_WHOLE = 2**64


def read_number(text: str) -> float:
    """The number that a text is. Raises ValueError: what was expected, the end of a sentence."""
    found = text.strip()
    if len(found) > MAX_DIGITS or NUMBER.match(found) is None:
        raise ValueError("expected a number, such as 8, .5, 1e-4 or 1_000")
    number = float(found)
    if not math.isfinite(number):
        raise ValueError("expected a number of a size that a float has")
    return number


def read_whole(text: str) -> int:
    """The whole number that a text is. Raises ValueError as `read_number`."""
    if abs(read_number(text)) >= MAX_WHOLE:
        raise ValueError("expected a whole number below 2^64")
    exact = Decimal(text.strip().replace("_", ""))
    if exact != exact.to_integral_value():
        raise ValueError("expected a whole number, such as 8, 1e3 or 1_000")
    return int(exact)


def read_numbers(text: str) -> tuple[float, ...]:
    """The numbers that a text names, separated by commas. Raises ValueError as `read_number`."""
    return tuple(read_number(part) for part in text.split(","))


def read_as(kind: type, value: Any) -> Any:
    """A value of a file for a field of this kind: where that is int, float or several numbers, texts are numbers.

    Raises ValueError as `read_number`. What is no text, and no whole number as a float, is left to the field.
    """
    readers: dict[type, Callable[[str], Any]] = {int: read_whole, float: read_number}
    if kind in readers:
        written = repr(value) if kind is int and isinstance(value, float) else value
        return readers[kind](written) if isinstance(written, str) else value
    if kind is tuple or not issubclass(kind, tuple):
        return value
    if isinstance(value, list):
        return tuple(read_number(v) if isinstance(v, str) else v for v in value)
    return read_numbers(value) if isinstance(value, str) else value


class _Loader(yaml.SafeLoader):
    """YAML's safe loader for files of others: a key that stands twice, depth, and what unfolds without end are refused.

    YAML takes the last of two values of one key; names for values (&, *) make of one line more than fits the memory.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth, self._unfolded = 0, 0
        #: Of a value that is complete: the values in it, and their depth, by the identity of its node.
        self._sizes: dict[int, tuple[int, int]] = {}
        self._deepest = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A value, within `MAX_DEPTH` others and `MAX_VALUES` in all, each counted wherever it is named."""
        mark, is_name = self.peek_event().start_mark, self.check_event(yaml.AliasEvent)  # type: ignore[no-untyped-call]
        first, outer = self._unfolded, self._deepest
        self._depth += 1
        self._deepest, self._unfolded = self._depth, self._unfolded + 1
        self._check_size(mark)
        node = super().compose_node(parent, index)
        if is_name:
            if id(node) not in self._sizes:
                raise yaml.MarkedYAMLError(None, None, "a value is a part of itself", mark)
            count, height = self._sizes[id(node)]
            self._deepest, self._unfolded = self._depth + height, first + count
            self._check_size(mark)
        else:
            self._sizes[id(node)] = self._unfolded - first, self._deepest - self._depth
        self._depth -= 1
        self._deepest = max(outer, self._deepest)
        return node

    def _check_size(self, mark: Any) -> None:
        if self._deepest > MAX_DEPTH or self._unfolded > MAX_VALUES:
            what = f"more than {MAX_DEPTH} values within one another, or {MAX_VALUES:,} in all"
            raise yaml.MarkedYAMLError(None, None, what, mark)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """The mapping, each of whose keys stands once."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[Hashable] = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)
            if name in seen:
                raise yaml.MarkedYAMLError(
                    "reading a mapping", node.start_mark, f"the key {shown(key.value)} stands twice", key.start_mark
                )
            seen.add(name)
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """The value of a node, where its text is one of its tag."""
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, str):
                value.encode()  # halves of a pair are no text
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise yaml.MarkedYAMLError(None, None, "a value is not what its tag says", node.start_mark) from error
        if isinstance(value, int) and not abs(value) < 2**64:
            raise yaml.MarkedYAMLError(None, None, "a whole number is 2^64 or more", node.start_mark)
        return value


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"

_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_constructor(_INT, lambda loader, node: read_whole(_text_of(loader, node)))
_Loader.add_constructor(_FLOAT, lambda loader, node: read_number(_text_of(loader, node)))


def _text_of(loader: Any, node: Any) -> str:
    return str(loader.construct_scalar(node))


class _TypedLoader(_Loader):
    """The same with numbers as numbers, where no field says what is one."""


_TypedLoader.add_implicit_resolver(_INT, WHOLE, list("+-0123456789"))  # the first that matches counts
_TypedLoader.add_implicit_resolver(_FLOAT, NUMBER, list("+-.0123456789"))


def load_yaml(text: str) -> Any:
    """What a YAML text of anybody says: plain values, in lists and mappings that hold nothing twice.

    Raises `yaml.YAMLError` where it is none, or a mapping has a key twice, or it is too much.
    """
    return _loaded(text, _TypedLoader)


def _loaded(text: str, loader: type[_Loader]) -> Any:
    if len(text) > MAX_CHARS:
        raise yaml.YAMLError(f"it has {len(text):,} characters, at most {MAX_CHARS:,} are read")
    return yaml.load(text, loader)  # a SafeLoader


def read_yaml(path: Path) -> Any:
    """What a YAML file says, every number as the text that it is: the field that takes it reads it (`read_as`).

    Raises OSError, and `yaml.YAMLError`, the middle of a sentence.
    """
    with path.open("rb") as file:
        data = file.read(4 * MAX_CHARS + 1)
    try:
        return _loaded(data.decode(), _Loader)
    except UnicodeDecodeError as error:
        raise yaml.YAMLError("it is not UTF-8") from error
    except yaml.YAMLError as error:
        raise yaml.YAMLError(one_line(str(error), 500)) from error


def at_home(text: str) -> str:
    """A text of a file as a shell would hand it over: ~/ in front is the home folder."""
    return str(Path(text).expanduser()) if text.startswith("~/") else text
