"""YAML that anybody wrote: plain values and nothing else, no more than fit a screen a thousand times.

Owns the one reader: what it refuses is said in the middle of a sentence, and what it returns can be printed, compared
and hashed without care. Ground floor: must not know what the values mean.
"""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from logitcache.storage.plain_text import one_line, shown

MAX_CHARS = 2**18
MAX_DEPTH = 32
"""Values within one another."""
MAX_VALUES = 20_000
"""In all, each counted wherever it is named."""


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


def load_yaml(text: str) -> Any:
    """What a YAML text of anybody says: plain values, in lists and mappings that hold nothing twice.

    Raises `yaml.YAMLError` where it is none, or a mapping has a key twice, or it is too much.
    """
    if len(text) > MAX_CHARS:
        raise yaml.YAMLError(f"it has {len(text):,} characters, at most {MAX_CHARS:,} are read")
    return yaml.load(text, _Loader)  # a SafeLoader


def read_yaml(path: Path) -> Any:
    """What a YAML file says. Raises OSError, and `yaml.YAMLError`, the middle of a sentence."""
    with path.open("rb") as file:
        data = file.read(4 * MAX_CHARS + 1)
    try:
        return load_yaml(data.decode())
    except UnicodeDecodeError as error:
        raise yaml.YAMLError("it is not UTF-8") from error
    except yaml.YAMLError as error:
        raise yaml.YAMLError(one_line(str(error), 500)) from error


def at_home(text: str) -> str:
    """A text of a file as a shell would hand it over: ~/ in front is the home folder."""
    return str(Path(text).expanduser()) if text.startswith("~/") else text
