"""Options of the command line made of settings dataclasses, and the way back.

Owns how a field becomes a flag: its type, range, choices, default and help are the field's. Also that no flag is given
twice. Must not know any one setting.
"""

import contextlib
import errno
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from logitcache.data.settings import DataSettings
from logitcache.errors import InvalidSettings
from logitcache.settings import Numbers, Option, Setting, Settings, line_settings, names_function
from logitcache.yaml_files import at_home, read_number, read_numbers, read_whole

from .help_page import headed, write_example

F = TypeVar("F", bound=Callable[..., Any])
S = TypeVar("S", bound=Settings)


class Number(click.FloatRange):
    """A number in a range, as `yaml_files` reads it."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(_read(read_number, self, value, param, ctx), param, ctx)


class Whole(click.IntRange):
    """A whole number in a range, likewise."""

    name = "integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(_read(read_whole, self, value, param, ctx), param, ctx)


class NumberList(click.types.StringParamType):
    """Numbers separated by commas; which numbers, the setting checks."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return _read(read_numbers, self, value, param, ctx)


def _read(
    reader: Callable[[str], Any],
    kind: "click.ParamType[Any]",
    value: Any,
    param: click.Parameter | None,
    ctx: click.Context | None,
) -> Any:
    """A text as the reader has it; of others, defaults, the value. Fails as a click type does."""
    if not isinstance(value, str):
        return value
    try:
        return reader(value)
    except ValueError as error:
        return kind.fail(f"{error}, found {value!r:.200}.", param, ctx)


class ByteSize(click.types.StringParamType):
    """A number of bytes, or with K, M, G or T of so many KiB, MiB, GiB or TiB: 1.5G."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        text = str(value).strip().upper()
        number, unit = (text[:-1], text[-1:]) if text[-1:] in "KMGT" else (text, "")
        try:
            count = read_number(number) * 1024.0 ** " KMGT".index(unit or " ")
        except ValueError:
            count = 0.0
        if not 0 < count < float("inf"):
            self.fail(f"{value} is no size: expected a number of bytes, or one with K, M, G or T, as 1.5G.", param, ctx)
        return count


if TYPE_CHECKING:
    TextChoice = click.Choice[str]
else:
    TextChoice = click.Choice  # which click 8.1 does not let be subscripted


class ChoiceOrFunction(TextChoice):
    """One of some texts, or a function of the user's own, as FILE.py:FUNCTION."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if isinstance(value, str) and names_function(value) else super().convert(value, param, ctx)


def options_of(
    settings: type[Settings] | Iterable[Setting],
    types: "Mapping[str, click.ParamType[Any]] | None" = None,
    **changed: Mapping[str, Any],
) -> Callable[[F], F]:
    """An option for every setting that has a flag, in their order.

    types: click's types of texts that are paths, by the names of the settings. changed: what one verb has otherwise
    than the field, as arguments of `click.option`, likewise.
    """
    found = line_settings(settings) if isinstance(settings, type) else settings

    def decorate(function: F) -> F:
        for setting in reversed(list(found)):
            said = {**_arguments(setting), **changed.get(setting.key, {})}
            if types is not None and setting.key in types:
                said["type"] = types[setting.key]
            function = headed(click.option(setting.flag, setting.key, **said)(function), setting.heading)
        return function

    return decorate


def settings_from(owner: type[S], values: Mapping[str, Any], **parts: Any) -> S:
    """Settings of what the command line was given; parts: those that are settings themselves. A flag that may be
    repeated is an empty tuple where it was not given.

    Raises `click.UsageError` with what `InvalidSettings` says.
    """
    chosen = {s.name: values[s.key] for s in line_settings(owner) if values.get(s.key) not in (None, ())}
    with as_usage():
        return owner(**chosen, **parts)


@contextlib.contextmanager
def as_usage() -> Any:
    """Settings that contradict one another are wrong usage."""
    try:
        yield
    except InvalidSettings as error:
        raise click.UsageError(str(error)) from error


def was_given(ctx: click.Context, name: str) -> bool:
    """Whether a parameter stands on the line or in the --config file, be it the default's value."""
    return ctx.get_parameter_source(name) not in (ParameterSource.DEFAULT, None)


def check_has_rows(ctx: click.Context, flags: str, also_read: tuple[str, ...] = ()) -> None:
    """Raise `click.UsageError` for settings of rows where no rows are read. flags: what names some. also_read: settings
    that are read without rows."""
    for setting in line_settings(DataSettings):
        if was_given(ctx, setting.key) and setting.name not in also_read:
            raise click.UsageError(f"{setting.flag} is for rows that are read: give {flags}, or leave it out.")


class Verbs(click.Group):
    """A group whose verbs take each flag once: click itself takes the last in silence. Its epilog is an example."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The example, not wrapped."""
        write_example(self, formatter)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, and `click.UsageError` for a flag that is given twice."""
        name, command, rest = super().resolve_command(ctx, [_at_home(arg) for arg in args])
        if command is not None:
            _check_given_once(command, click.Context(command, info_name=name, parent=ctx), rest)
        return name, command, rest

    def invoke(self, ctx: click.Context) -> Any:
        """As click does, but a file that ends too early is no end of what a person types, which it calls ctrl-c."""
        try:
            return super().invoke(ctx)
        except EOFError as error:
            raise OSError(errno.EIO, f"a file ends before its time ({error or 'no more said'})") from error


def _at_home(argument: str) -> str:
    """--flag=~/x as the shell hands over --flag ~/x."""
    flag, equals, value = argument.partition("=")
    return f"{flag}={at_home(value)}" if equals and flag.startswith("--") else argument


def _check_given_once(command: click.Command, ctx: click.Context, arguments: Sequence[str]) -> None:
    try:
        _, _, order = command.make_parser(ctx).parse_args(list(arguments))
    except click.UsageError:
        return  # the verb says it
    for parameter in order:
        once = isinstance(parameter, click.Option) and not parameter.multiple and not parameter.count
        if once and order.count(parameter) > 1:
            raise click.UsageError(f"{parameter.opts[0]} is given twice. Leave one of them out.", ctx)


def _arguments(setting: Setting) -> dict[str, Any]:
    said = setting.option or Option("")
    default = None if setting.default in ("", MISSING) else setting.default
    found: dict[str, Any] = {"help": said.help, "metavar": said.metavar, "default": default}
    found |= {"required": True} if setting.default is MISSING else {}
    if setting.kind is bool:
        return {"help": said.help, "is_flag": True}
    if setting.kind is tuple:
        return {**found, "multiple": True}
    if setting.kind is Numbers:
        return {**found, "type": NumberList(), "default": None}
    if setting.kind is int:
        found["type"] = Whole(_whole(said.at_least), _whole(said.at_most))
    elif setting.kind is float:
        found["type"] = Number(
            min=said.at_least if said.above is None else said.above,
            max=said.at_most if said.below is None else said.below,
            min_open=said.above is not None,
            max_open=said.below is not None,
        )
    elif setting.choices:
        found["type"] = (ChoiceOrFunction if setting.takes_function else click.Choice)(setting.choices)
    return {**found, "show_default": default is not None}


def _whole(bound: float | None) -> int | None:
    return None if bound is None else int(bound)
