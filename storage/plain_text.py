"""What may be said of text that others wrote: escaped, short, and without the secrets of a URL.

Owns the three rules: what a terminal would act on is spelt out, what is unbounded is cut, and what stands before the @
of a URL or behind its ? is never kept or shown. Must not know where text goes, and imports nobody. Trade-off: secrets
are known by their form, so something harmless that looks like `user:password@` is hidden too.
"""

import re
import reprlib

SHOWN = 80
"""Characters of a value that a message shows."""

HIDDEN = "***"

_URL = re.compile(r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]{0,30})?://(?P<rest>(?:[^\s\"'<>\\]|\\.)+)")
_USER = re.compile(r"(?:[^\s/:@\"'()\\]|\\.){1,64}:(?:[^\s/@\"\\]|\\.){1,256}@")
_QUERY = re.compile(r"\?(?:[^\s\"'<>=\\]|\\.){0,256}=(?:[^\s\"'<>\\]|\\.)*")
"""The last two: as clients say it, without the protocol. Each sign is tried so often and no oftener."""


def without_secrets(text: str) -> str:
    """Text whose URLs have no `user:password@`, no query and no fragment; wherever they stand in it.

    What is left of a URL is for people, and opens nothing. Valid JSON stays valid.
    """
    if not any(sign in text for sign in "@?#"):
        return text
    text = _URL.sub(_bare, text)
    return _QUERY.sub(f"?{HIDDEN}", _USER.sub(f"{HIDDEN}@", text))


def _bare(url: re.Match[str]) -> str:
    scheme, rest = url["scheme"] or "", url["rest"]
    before, at, path = rest.rpartition("@")
    if at and ":" in before:
        rest = f"{HIDDEN}@{path}"
    elif scheme.lower() in ("http", "https") and "@" in rest.partition("/")[0]:
        rest = f"{HIDDEN}@{rest.partition('@')[2]}"
    place, mark, query = _cut(rest)
    return f"{scheme}://{rest if query.startswith(HIDDEN) or not mark else f'{place}?{HIDDEN}'}"


def _cut(rest: str) -> tuple[str, str, str]:
    """Before the first ? or #, that sign, and what follows."""
    signs = [at for sign in "?#" if (at := rest.find(sign)) >= 0]
    return (rest[: min(signs)], rest[min(signs)], rest[min(signs) + 1 :]) if signs else (rest, "", "")


def escaped(text: str, keep: str = "") -> str:
    r"""Text of which a terminal, a page or a table shows every sign: others are spelt out, ESC as \x1b.

    That is what `str.isprintable` says of them: control characters, line breaks, what turns the direction of writing,
    what has no width, halves of a pair. keep: signs that are let through.
    """
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() or sign in keep else _spelt_out(sign) for sign in text)


def safe(text: str) -> str:
    """What may be printed: lines of text, escaped, and without secrets."""
    return escaped(without_secrets(text), keep="\n\t")


def one_line(text: str, limit: int | None = None) -> str:
    """A sentence as it may be printed and kept: on one line, escaped, without secrets, and no longer than the limit."""
    line = escaped(without_secrets(" ".join(text.split())))
    return line if limit is None or len(line) <= limit else f"{line[: limit - 3]}..."


def shown(value: object) -> str:
    """`repr` of any value as a message shows it: short, however large or deep it is, and without secrets."""
    if isinstance(value, str):
        value = without_secrets(value[: 100 * SHOWN])
        return repr(value[: SHOWN - 2])[:SHOWN]
    return without_secrets(_BOUNDED.repr(value))[:SHOWN]


class _Bounded(reprlib.Repr):
    """Python's short `repr`, which also knows numbers that Python refuses to spell."""

    def repr_int(self, number: int, level: int) -> str:
        """A number, or how large it is."""
        return repr(number) if abs(number) < 10**40 else f"a number of {number.bit_length():,} bits"


_BOUNDED = _Bounded()
_BOUNDED.maxstring = _BOUNDED.maxother = SHOWN
_BOUNDED.maxlevel, _BOUNDED.maxlist, _BOUNDED.maxdict = 3, 4, 4


def _spelt_out(sign: str) -> str:
    return sign.encode("unicode_escape").decode("ascii")
