"""`logitcache VERB --help` as a page: flags under headings, and an example at the end.

Owns the headings' order, which is that of the flags, and how examples are shown. Must not know any one flag: what is a
setting brings its heading along (`Setting.heading`), what is not has that of `heading` above it.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

LAST = "Other"
"""Heading of what every verb has."""

_HEADING = "heading"


class Verb(click.Command):
    """A verb whose help has its flags under headings, and its epilog as an example, line by line as it is written."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """A list of flags under each heading, in the order of the verb; `LAST` at the end."""
        lists: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                lists.setdefault(heading_of(param), []).append(record)
        for title in sorted(lists, key=lambda title: title == LAST):  # a stable sort
            with formatter.section(title if len(lists) > 1 else "Options"):
                formatter.write_dl(lists[title])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The example, not wrapped: it is there to be copied."""
        write_example(self, formatter)


def write_example(command: click.Command, formatter: click.HelpFormatter) -> None:
    """What a command's epilog has, under a heading of its own."""
    if command.epilog:
        with formatter.section("Example"):
            for line in command.epilog.splitlines():
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")


def verb(short_help: str, example: str) -> Callable[[Callable[..., Any]], Verb]:
    """A verb. short_help: its line in the list of verbs; example: whole commands, a line each, `\\` at the end of one
    that goes on."""
    return click.command(cls=Verb, short_help=short_help, epilog=example)


def heading(title: str) -> Callable[[F], F]:
    """The flags below this line, down to the next one, stand under this heading; not those that have one."""

    def decorate(function: F) -> F:
        for param in getattr(function, "__click_params__", []):
            vars(param).setdefault(_HEADING, title)
        return function

    return decorate


def headed(function: F, title: str) -> F:
    """The function with its topmost flag under this heading; "": under that of the line above."""
    if title:
        vars(vars(function)["__click_params__"][-1])[_HEADING] = title
    return function


def heading_of(param: click.Parameter) -> str:
    """Under which heading a flag stands."""
    return str(vars(param).get(_HEADING, LAST))
