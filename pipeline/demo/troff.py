"""Manual pages as plain text: the running prose of a page written with the `man` macros, paragraph by paragraph.

Owns which requests and escapes of troff are read. Synopses, listings, tables and the sections that every page repeats
(who translated it, where to report bugs) are left out; so is a paragraph with an escape that is not known here, and a
page in `mdoc`, whose macros are other ones. Trade-off: no groff is needed, and what it would set is not all kept.
Imports the standard library only.
"""

import re
from dataclasses import dataclass, field

UNKNOWN = "\0"
"""In place of an escape that is not known: its paragraph is left out."""

REPEATED_SECTIONS = {
    *("BEZEICHNUNG", "NAME", "ÜBERSICHT", "SYNOPSIS", "SIEHE AUCH", "SEE ALSO", "KONFORM ZU", "STANDARDS", "QUELLEN"),
    *("AUTOR", "AUTOREN", "AUTHOR", "AUTHORS", "DANKSAGUNGEN", "ÜBERSETZUNG", "COPYRIGHT", "COPYRIGHT-HINWEIS"),
    *("WARENZEICHEN", "VERSION", "VERSIONEN", "HOMEPAGE"),
    *("FEHLER MELDEN", "FEHLERBERICHTE", "KONTAKT UND FEHLERBERICHTE"),
}
"""Sections, in capitals, of names, lists and phrases that a hundred pages share."""

_CHARACTERS = {
    **{
        "en": "\u2013",
        "em": "\u2014",
        "hy": "-",
        "mi": "-",
        "bu": "\u2022",
        "co": "©",
        "rg": "®",
        "tm": "™",
        "at": "@",
    },
    **{"aq": "'", "Aq": "'", "dq": '"', "oq": "\u2018", "cq": "\u2019", "lq": "\u201c", "rq": "\u201d", "ga": "`"},
    **{"Bq": "\u201e", "bq": "\u201a", "Fo": "«", "Fc": "»", 'L"': "\u201c", 'R"': "\u201d", "C`": "", "C'": ""},
    **{":a": "ä", ":o": "ö", ":u": "ü", ":A": "Ä", ":O": "Ö", ":U": "Ü", "ss": "ß"},
    **{"rs": "\\", "ha": "^", "ti": "~", "sh": "#", "Do": "$", "ul": "_", "pl": "+", "or": "|", "ba": "|", "de": "°"},
    **{"lB": "[", "rB": "]", "lC": "{", "rC": "}", "la": "\u27e8", "ra": "\u27e9", "mu": "\u00d7", "+-": "±"},
    **{"->": "→", "<-": "←", "<=": "≤", ">=": "≥"},
}
"""Of `\\(xx`, `\\[xx]` and `\\*(xx`, by name."""

_ESCAPE = re.compile(
    r"""\\(?:
      f(?:\[[^\]]*\]|\(..|.)                     # a font
    | s[+-]?(?:\[[^\]]*\]|'[^']*'|\d{1,2})        # a size
    | [mMFnkg](?:\[[^\]]*\]|\(..|.)               # colours, registers
    | [hvwlLDoAbxXZ]'[^']*'                       # motions and drawings
    | \*?(?:\[(?P<long>[^\]]*)\]|\((?P<two>..))   # a character, a string
    | (?P<one>.)
    )""",
    re.VERBOSE,
)
_ONE = {"-": "-", "e": "\\", "\\": "\\", " ": " ", "~": " ", "0": " ", ".": ".", "'": "'", "`": "`", "_": "_", "t": " "}
_NOTHING = "&/,%:^|c$aud{}!?prz"  # of no width, or of no meaning in prose

_BREAKS = {"PP", "P", "LP", "sp", "IP", "TP", "TQ", "HP", "RS", "RE", "br", "ti"}
_JOINED = {"BR", "RB", "BI", "IB", "IR", "RI"}
_SPACED = {"B", "I", "SM", "SB", "R"}
_LISTINGS = {"nf": "fi", "EX": "EE", "TS": "TE", "EQ": "EN", "Vb": "Ve", "ig": ".", "de": ".", "SY": "YS"}
"""What opens text that is not prose, and what ends it."""


def plain_text(source: str) -> str:
    """The paragraphs of a manual page in its troff source, joined by blank lines; empty for one in mdoc."""
    if re.search(r"^\.(Dd|Dt) ", source, re.MULTILINE):
        return ""
    page, lines = _Page(), iter(source.splitlines())
    for line in lines:
        request, rest = _request(line)
        if request is None:
            page.add_line(line)
        elif request in ("if", "ie", "el"):
            depth = line.count("\\{") - line.count("\\}")
            while depth > 0 and (line := next(lines, "\\}" * depth)):
                depth += line.count("\\{") - line.count("\\}")
        elif request in _LISTINGS:
            ends = _LISTINGS[request]
            page.end_paragraph()
            while (line := next(lines, f".{ends}")) is not None and _request(line)[0] != ends:
                pass
        else:
            page.apply(request, rest)
    page.end_paragraph()
    return "\n\n".join(page.paragraphs)


@dataclass
class _Page:
    """A page while it is read."""

    paragraphs: list[str] = field(default_factory=list)
    #: Of the paragraph that is being read.
    words: list[str] = field(default_factory=list)
    is_repeated: bool = True  # before the first section there is no prose
    #: Whether the next line is the term that a `.TP` explains.
    expects_term: bool = False
    #: What the next paragraph explains.
    term: str = ""

    def add_line(self, line: str) -> None:
        """A line of text; an empty one ends a paragraph, and an indented one is of a listing."""
        if not line.strip() or line[0] in " \t":
            self.end_paragraph()
        else:
            self.add(unescaped(line))

    def add(self, text: str) -> None:
        """Words for the paragraph, or the term of the next one."""
        if self.expects_term:
            self.expects_term, self.term = False, text.strip()
        elif text.strip():
            self.words.append(text.strip())

    def apply(self, request: str, rest: str) -> None:
        """A macro: it ends a paragraph, sets words in another font, or is of no meaning here."""
        arguments = _arguments(rest)
        if request in ("SH", "SS"):
            self.end_paragraph()
            if request == "SH":
                self.is_repeated = " ".join(arguments).upper() in REPEATED_SECTIONS
        elif request in _BREAKS:
            self.end_paragraph()
            self.expects_term = request in ("TP", "TQ")
            if request == "IP" and arguments and any(c.isalnum() for c in arguments[0]):
                self.term = arguments[0].strip()
        elif request in _SPACED | _JOINED:
            self.add(("" if request in _JOINED else " ").join(arguments))
        elif request in ("UR", "MT"):
            self.add(arguments[0] if arguments else "")
        elif request in ("UE", "ME") and arguments and self.words:
            self.words[-1] += arguments[0]
        elif request in ("URL", "MTO"):
            self.add("".join(arguments[1:3]) or "".join(arguments[:1]))

    def end_paragraph(self) -> None:
        """Keep the paragraph with the term it explains, unless it is of a section that every page has."""
        text = re.sub(r"\s+", " ", " ".join(self.words)).strip()
        self.words = []
        if not text:
            return
        text, self.term = f"{self.term}\n{text}" if self.term else text, ""
        if not self.is_repeated and UNKNOWN not in text:
            self.paragraphs.append(text)


def unescaped(text: str) -> str:
    """A text without troff's escapes; `UNKNOWN` in place of one that is not known."""
    return _ESCAPE.sub(_character, re.sub(r'\\["#].*', "", text))


def _character(match: re.Match[str]) -> str:
    name = match["long"] if match["long"] is not None else match["two"]
    if name is not None:
        return chr(int(name[1:], 16)) if re.fullmatch(r"u[0-9A-F]{4}", name) else _CHARACTERS.get(name, UNKNOWN)
    one = match["one"]
    if one is None or one in _NOTHING:
        return ""
    return _ONE.get(one, UNKNOWN)


def _request(line: str) -> tuple[str | None, str]:
    """The name of a request and what follows it; None for a line of text. `..` is the request `.`."""
    found = re.match(r"[.'][ \t]*(\\\"|\.|[A-Za-z]+|$)(.*)", line)
    return (found[1], found[2]) if found else (None, line)


def _arguments(rest: str) -> list[str]:
    """The arguments of a macro, without escapes; quotes hold spaces together."""
    without_comment = re.sub(r'\\".*', "", rest)
    found = re.findall(r'"((?:[^"]|"")*)"?|((?:\\.|[^\s"\\])(?:\\.|[^\s\\])*)', without_comment)
    return [unescaped(quoted.replace('""', '"') if quoted or not bare else bare) for quoted, bare in found]
