"""A page of headings, paragraphs, lists, tables and pictures, as Markdown and as one self-contained HTML file.

Owns markup and escaping: every text of a block is plain text, and comes out as it is whatever signs are in it. The HTML
needs no script, no network and no second file. Knows nothing of what the page is about.
"""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from logitcache.evaluation.table import markdown_table
from logitcache.storage.plain_text import escaped


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the page's title."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Rows of equal length, the first of them the heading. Numbers are right-aligned, `num_text` first columns left."""

    rows: Sequence[Sequence[str]]
    num_text: int = 1


@dataclass(frozen=True)
class Code:
    """Lines to be copied."""

    lines: tuple[str, ...]


@dataclass(frozen=True)
class Picture:
    """A picture in two files that exist."""

    #: Of the .png and the .svg file.
    stem: Path
    #: What it is, in place of it too.
    title: str
    #: How to read it.
    caption: str


Block = Heading | Paragraph | Bullets | Table | Code | Picture

_MARKUP = re.compile(r"[\\`*$~<>\[\]|]|(?<!\w)_|_(?!\w)|&(?=[#\w])")
_AT_START = re.compile(r"^[#+=-](?=\s|$)|(?<=^\d)[.)](?=\s)")
"""What Markdown would read as markup anywhere in a text, and where a line begins with it."""

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 76rem; margin: 2rem auto;
  padding: 0 1.2rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.4rem; border-bottom: 1px solid #ccc; }
p, li { max-width: 52rem; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top;
  overflow-wrap: break-word; max-width: 26rem; }
th { border-bottom: 2px solid #888; vertical-align: bottom; }
.left { text-align: left; }
pre { overflow-x: auto; background: #f4f4f4; padding: .6rem .8rem; font-size: .85rem; }
figure { margin: 1.2rem 0; } img { max-width: 100%; height: auto; }
figcaption { font-size: .9rem; color: #444; max-width: 52rem; }
@media print { body { margin: 0; max-width: none; } figure, tr { break-inside: avoid; } }
"""


def as_markdown(blocks: Sequence[Block]) -> str:
    """The page with its pictures as files beside it."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def as_html(blocks: Sequence[Block]) -> str:
    """The page as one file, pictures embedded."""
    title = next((b.text for b in blocks if isinstance(b, Heading) and b.level == 1), "report")
    body = "\n".join(_html(block) for block in blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_line(text)}"
        case Paragraph(text):
            return _line(text)
        case Bullets(items):
            return "\n".join(f"- {_line(item)}" for item in items)
        case Table(rows, num_text):
            return markdown_table([[_plain(cell) for cell in row] for row in rows], num_text)
        case Code(lines):
            return "\n".join([_fence(lines), *map(escaped, lines), _fence(lines)])
        case Picture(stem, title, caption):
            return f"![{_plain(title)}]({stem.name}.png)\n\n{_line(caption)}"


def _plain(text: str) -> str:
    """Text on one line in which Markdown finds no markup."""
    return _MARKUP.sub(r"\\\g<0>", escaped(" ".join(text.split())))


def _line(text: str) -> str:
    """The same where a line begins with it."""
    return _AT_START.sub(r"\\\g<0>", _plain(text))


def _fence(lines: Sequence[str]) -> str:
    """Backticks, more than stand in a row in any of the lines."""
    return "`" * max(3, *(len(run) + 1 for line in lines for run in re.findall("`+", line) or [""]))


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{_text(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{_text(text)}</p>"
        case Bullets(items):
            return "<ul>\n" + "\n".join(f"<li>{_text(item)}</li>" for item in items) + "\n</ul>"
        case Table(rows, num_text):
            head, *body = [_row(row, num_text, "td" if i else "th") for i, row in enumerate(rows)]
            inner = "\n".join(body)
            return (
                f'<div class="table">\n<table>\n<thead>\n{head}\n</thead>\n<tbody>\n{inner}\n</tbody>\n</table>\n</div>'
            )
        case Code(lines):
            return "<pre>\n" + "\n".join(f"<code>{escape(escaped(line))}</code>" for line in lines) + "\n</pre>"
        case Picture(stem, title, caption):
            svg = base64.b64encode(stem.with_name(f"{stem.name}.svg").read_bytes()).decode("ascii")
            return (
                f'<figure>\n<img alt="{_text(title)}" src="data:image/svg+xml;base64,{svg}"/>\n'
                f"<figcaption>{_text(caption)}</figcaption>\n</figure>"
            )


def _row(row: Sequence[str], num_text: int, tag: str) -> str:
    kinds = [' class="left"' if i < num_text else "" for i in range(len(row))]
    cells = (f"<{tag}{kind}>{_text(cell)}</{tag}>" for kind, cell in zip(kinds, row, strict=True))
    return f"<tr>{''.join(cells)}</tr>"


def _text(text: str) -> str:
    return escape(escaped(" ".join(text.split())))
