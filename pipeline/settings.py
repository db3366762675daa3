"""Settings as dataclasses: a field owns its default, its help, its bounds and its choices, and everything else is
derived from it.

Owns the check at construction: type, finiteness, bounds, choices, then the rules between fields. Command-line options,
keys of `--config`, the fields of a sweep and docs/reference.md are made of `settings_of`. Ground floor: must not know
any job, nor import torch or click.
"""

import math
import numbers
import os
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from logitcache.errors import InvalidSettings

T = TypeVar("T")
_OPTION = "option"
_FUNCTION = re.compile(r".+\.py:[A-Za-z_]\w*", re.DOTALL)


@dataclass(frozen=True)
class Option:
    """What a field says of itself besides its name, type and default."""

    help: str
    #: Bound of a number, itself left out.
    above: float | None = None
    #: Bound of a number.
    at_least: float | None = None
    #: Bound of a number, itself left out.
    below: float | None = None
    #: Bound of a number.
    at_most: float | None = None
    #: Of a text; those of a Literal need not be given.
    choices: tuple[str, ...] = ()
    #: Whether it may also name a function of the user's own, as FILE.py:FUNCTION.
    or_function: bool = False
    #: Its name on the command line where that is not its own.
    flag: str = ""
    #: What stands for its value in the help.
    metavar: str | None = None
    #: Whether it has a flag, a key of `--config` and, in training, a field of a sweep.
    on_line: bool = True
    #: Under which heading of the help it stands, where that is not the one of its class.
    heading: str = ""


def option(
    default: T,
    help: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    choices: tuple[str, ...] = (),
    or_function: bool = False,
    flag: str = "",
    metavar: str | None = None,
    on_line: bool = True,
    heading: str = "",
) -> T:
    """A field of a settings dataclass: its default, and what `Option` says."""
    said = Option(help, above, at_least, below, at_most, choices, or_function, flag, metavar, on_line, heading)
    made: T = field(default=default, metadata={_OPTION: said})
    return made


def required(help: str, *, flag: str = "", metavar: str | None = None, heading: str = "") -> Any:
    """A field that has no default."""
    return field(metadata={_OPTION: Option(help, flag=flag, metavar=metavar, heading=heading)})


@dataclass(frozen=True)
class Setting:
    """A field of a settings dataclass, as everything that is derived from it needs it."""

    owner: type["Settings"]
    name: str
    #: bool, int, float, str, tuple (of texts), `Numbers`, or another class.
    kind: type
    #: Whether it may be None.
    optional: bool
    #: MISSING where it must be given.
    default: Any
    choices: tuple[str, ...]
    #: None for a part that is a dataclass of its own.
    option: Option | None

    @property
    def key(self) -> str:
        """Its name among flags, keys of `--config` and fields of a sweep."""
        return (self.option.flag if self.option is not None else "") or self.name

    @property
    def flag(self) -> str:
        """Its flag."""
        return "--" + self.key.replace("_", "-")

    @property
    def heading(self) -> str:
        """Under which heading of the help its flag stands; "" where neither it nor its class says one."""
        return (self.option.heading if self.option is not None else "") or self.owner.heading

    @property
    def takes_function(self) -> bool:
        """Whether it may name a function of the user's own."""
        return self.option is not None and self.option.or_function

    @property
    def expected(self) -> str:
        """What its value must be, in words."""
        if self.choices:
            what = f"one of {', '.join(self.choices)}{' or FILE.py:FUNCTION' if self.takes_function else ''}"
        else:
            noun = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
            noun[tuple] = "a text, or several in a list"
            noun[Numbers] = "numbers in a list or separated by commas, each"
            what = noun.get(self.kind, f"a {self.kind.__name__}") + self._bounds()
        return f"{what}, or None" if self.optional else what

    def wrong(self, value: object) -> str:
        """What is said of a value that it cannot have."""
        return f"{self.key}: expected {self.expected}, found {value!r:.200}"

    def checked(self, value: object) -> Any:
        """The value as its plain type, or `InvalidSettings`: a whole number is a number, true is neither."""
        if value is None and self.optional:
            return None
        found: Any
        if isinstance(value, bool) and self.kind is not bool:
            raise self._wrong(value)
        if self.kind is float and isinstance(value, numbers.Real):
            found = float(value)
        elif self.kind is int and isinstance(value, numbers.Integral):
            found = int(value)
        elif self.kind is str and isinstance(value, (str, os.PathLike)):
            found = os.fspath(value)
        elif self.kind is tuple:
            found = self._texts(value)
        elif self.kind is Numbers:
            found = self._numbers(value)
        elif self.kind not in (int, float, str) and isinstance(value, self.kind):
            found = value
        else:
            raise self._wrong(value)
        if self.choices and found not in self.choices and not (self.takes_function and names_function(found)):
            raise self._wrong(value)
        if self.kind in (int, float) and not self._within(found):
            raise self._wrong(value)
        return value if isinstance(value, Derived) else found

    def _texts(self, value: object) -> tuple[str, ...]:
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        texts = tuple(os.fspath(text) for text in values if isinstance(text, (str, os.PathLike)))
        if not texts or len(texts) < len(values):
            raise self._wrong(value)
        return texts

    def _numbers(self, value: object) -> tuple[float, ...]:
        values = value if isinstance(value, (list, tuple)) else ()
        switches = [v for v in values if isinstance(v, bool)]
        found = tuple(float(v) for v in values if isinstance(v, numbers.Real) and not switches)
        if not found or len(found) < len(values) or not all(map(self._within, found)):
            raise self._wrong(value)
        return found

    def _within(self, number: float) -> bool:
        said = self.option or Option("")
        return (
            math.isfinite(number)
            and (said.above is None or number > said.above)
            and (said.at_least is None or number >= said.at_least)
            and (said.below is None or number < said.below)
            and (said.at_most is None or number <= said.at_most)
        )

    def _bounds(self) -> str:
        said = self.option or Option("")
        bounds = [
            f" above {said.above:g}" if said.above is not None else "",
            f" of {_plain(said.at_least)} or more" if said.at_least is not None else "",
            f" below {said.below:g}" if said.below is not None else "",
            f" of {_plain(said.at_most)} or less" if said.at_most is not None else "",
        ]
        return " and".join(bound for bound in bounds if bound)

    def _wrong(self, value: object) -> InvalidSettings:
        return InvalidSettings(
            f"setting {self.owner.__name__}.{self.name}: expected {self.expected}, found {value!r:.200}. Nothing was "
            f"started. Give another {self.name}."
        )


def names_function(text: str) -> bool:
    """Whether a text names a function in a file, as FILE.py:FUNCTION."""
    return _FUNCTION.fullmatch(text) is not None


class Numbers(tuple[float, ...]):
    """The kind of a field of several numbers, `tuple[float, ...]`."""


class Derived(float):
    """A number that followed from another setting, and follows again when `dataclasses.replace` changes that one."""


@dataclass(frozen=True)
class Settings:
    """Base of the settings dataclasses: what is constructed is right, or `InvalidSettings` says what is not."""

    #: Under which heading of the help the flags of its fields stand.
    heading: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Check every field by itself, then derive what was left open, then check them together."""
        for setting in settings_of(type(self)):
            object.__setattr__(self, setting.name, setting.checked(getattr(self, setting.name)))
        for name, value in self.derived().items():
            object.__setattr__(self, name, value)
        self.check_together()

    def derived(self) -> dict[str, object]:
        """Fields whose value follows from others where they were not given; none here."""
        return {}

    def check_together(self) -> None:
        """Raise `InvalidSettings` for values that are right alone and wrong together; there are none here."""

    def doubts(self) -> list[str]:
        """What is allowed and unlikely to be meant, a sentence each, for whoever started the job."""
        parts = (getattr(self, setting.name) for setting in settings_of(type(self)))
        return [doubt for part in parts if isinstance(part, Settings) for doubt in part.doubts()]

    def plain(self) -> dict[str, Any]:
        """The fields as JSON and YAML know them."""
        values = {setting.name: getattr(self, setting.name) for setting in settings_of(type(self))}
        return {
            name: value.plain() if isinstance(value, Settings) else float(value) if type(value) is Derived else value
            for name, value in values.items()
        }

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Self:
        """What `plain` gave. Raises `InvalidSettings` for a key that is no field, and one that is missing."""
        known = settings_of(cls)
        check_known(values, [setting.name for setting in known], f"reading {cls.__name__}")
        missing = [s.name for s in known if s.default is MISSING and s.name not in values]
        if missing:
            raise InvalidSettings(f"reading {cls.__name__}: expected {missing[0]}, found no such key. Give it.")
        parts = {s.name: s.kind for s in known if issubclass(s.kind, Settings)}
        made = {
            name: parts[name].from_plain(value) if name in parts and isinstance(value, Mapping) else value
            for name, value in values.items()
        }
        return cls(**made)


def settings_of(owner: type[Settings]) -> tuple[Setting, ...]:
    """The settings of a dataclass, in its order."""
    if owner not in _known:
        _known[owner] = _read(owner)
    return _known[owner]


_known: dict[type[Settings], tuple[Setting, ...]] = {}


def _read(owner: type[Settings]) -> tuple[Setting, ...]:
    hints = get_type_hints(owner)
    return tuple(
        Setting(owner, f.name, *_kind_of(hints[f.name]), f.default, _choices_of(hints[f.name], f.metadata), said)
        for f in fields(owner)
        for said in [f.metadata.get(_OPTION)]
    )


def line_settings(*owners: type[Settings]) -> Iterator[Setting]:
    """The settings of these dataclasses that have a flag."""
    for owner in owners:
        yield from (s for s in settings_of(owner) if s.option is not None and s.option.on_line)


def check_known(found: Mapping[str, Any], known: list[str] | tuple[str, ...], where: str) -> None:
    """Raise `InvalidSettings` for a key that is not known, naming those that are."""
    unknown = sorted(f"{name!r:.80}" for name in found if name not in known)
    if unknown:
        raise InvalidSettings(f"{where}: unknown key {unknown[0]}. Known keys: {', '.join(sorted(known))}.")


def _plain(bound: float) -> str:
    return f"{bound:,.0f}" if bound == int(bound) else f"{bound:g}"


def _kind_of(hint: Any) -> tuple[type, bool]:
    """The class of a field's values, and whether None is one of them."""
    optional = get_origin(hint) in (Union, types.UnionType)
    if optional:
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    origin = get_origin(hint)
    if origin is tuple:
        return (Numbers if get_args(hint)[0] is float else tuple), optional
    return (str if origin is Literal else hint), optional


def _choices_of(hint: Any, metadata: Mapping[str, Any]) -> tuple[str, ...]:
    said: Option | None = metadata.get(_OPTION)
    if said is not None and said.choices:
        return said.choices
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    return get_args(hint) if get_origin(hint) is Literal else ()
