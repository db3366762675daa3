"""Two domains of text that every CPython carries: prose (docstrings, language reference) and code.

Owns where the text comes from, its documents, and which are held out. Imports the standard library only, and
none of the modules that it reads: they are parsed. Trade-off: nothing is shipped or downloaded, and two
Python versions give slightly different corpora; the split depends on names alone, so it is the same in both.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

MIN_CHARS = 80  # of a docstring that is kept, and of a paragraph or definition that is kept only once
HELD_OUT_ONE_IN = 8
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data", "__phello__"}
_CODEC_TABLE = re.compile(rb"gencodec|decoding_(table|map)\b|\bgetcodec\(")  # in encodings/: generated files

_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True)
class Document:
    """One text, and the name by which the split is made, such as `module:json` or `code:json.decoder#3`."""

    name: str
    text: str


@cache
def prose_documents() -> tuple[Document, ...]:
    """Docstrings of each standard library module, and each topic of `pydoc_data`, sorted by name.

    Docstrings of at least 80 characters are kept, and those of one module joined by blank lines in source
    order as `module:<dotted.name>`; topics are `topic:<topic>`. A docstring, or a paragraph of at least 80
    characters, that an earlier document holds is left out: topics quote whole chapters of one another, which
    would leak held-out text into training. Some 450 documents of 1.8 million characters together.

    Raises
    ------
    FileNotFoundError
        If the standard library's sources or `pydoc_data` are missing.
    """
    seen: set[str] = set()
    texts = {}
    for name, tree in _parsed_modules():
        kept = (without_seen(text, seen) for text in _docstrings(tree))
        texts[f"module:{name}"] = "\n\n".join(text for text in kept if text)
    for topic, text in sorted(_topics().items()):
        texts[f"topic:{topic}"] = without_seen(_normalised(text), seen)
    return tuple(Document(name, text) for name, text in texts.items() if text)


@cache
def code_documents(max_chars: int = 900) -> tuple[Document, ...]:
    """Top-level functions and classes of those modules, without docstrings and comments, sorted by name.

    Definitions are joined greedily into segments of at most `max_chars` characters, `code:<dotted.name>#<i>`.
    A longer class is cut between its methods, a longer function at line ends; only one line that is longer
    by itself makes a longer segment. A definition that an earlier segment holds is left out. Some 6,000
    documents of 4.8 million characters together; `ast.unparse` differs a little between Python versions. Parsed once
    a process.

    Raises
    ------
    FileNotFoundError
        If the standard library's sources are missing.
    """
    seen: set[str] = set()
    documents = []
    for name, tree in _parsed_modules():
        _remove_docstrings(tree)
        definitions = (node for node in tree.body if isinstance(node, _DEFINITIONS))
        pieces = (piece for node in definitions for piece in _pieces(node, max_chars, seen))
        for index, segment in enumerate(joined(pieces, max_chars)):
            documents.append(Document(f"code:{name}#{index}", segment))
    return tuple(documents)


def is_held_out(name: str) -> bool:
    """Whether a document is held out, one module or topic in 8: by BLAKE2b of its name before any '#'."""
    digest = hashlib.blake2b(name.partition("#")[0].encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def split(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """The documents to train on and those held out, each in their order."""
    held_out = [document for document in documents if is_held_out(document.name)]
    return [document for document in documents if not is_held_out(document.name)], held_out


def _parsed_modules() -> Iterator[tuple[str, ast.Module]]:
    """Dotted name and syntax tree of each standard library module that parses, sorted by name."""
    if not (files := dict(_module_files(Path(sysconfig.get_path("stdlib"))))):
        raise _missing("The source code (*.py) of the standard library")
    for name, path in sorted(files.items()):
        source = path.read_bytes()
        if path.parent.name == "encodings" and _CODEC_TABLE.search(source):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # a SyntaxWarning in someone else's source
                tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        yield name, tree


def _module_files(root: Path) -> Iterator[tuple[str, Path]]:
    """Dotted name and path of each module; names with '-' (site-packages, config-3.x) are none."""
    for folder, subfolders, _ in os.walk(root):
        subfolders[:] = [sub for sub in subfolders if sub.isidentifier() and sub not in _SKIPPED]
        for path in Path(folder).glob("*.py"):
            if path.stem.isidentifier() and not path.stem.startswith("_sysconfigdata"):  # build settings
                parts = path.relative_to(root).with_suffix("").parts
                yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise _missing("The language reference (pydoc_data/topics.py)") from None
    return topics


def _missing(what: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"{what} was looked for in {sysconfig.get_path('stdlib')} and not found; run this with a complete "
        "Python, not a minimal, zipped or frozen one (Debian and Ubuntu: install libpython3-stdlib)."
    )


def _docstrings(tree: ast.Module) -> list[str]:
    """The docstrings in source order, without their indentation."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, _DEFINITIONS)]
    nodes.sort(key=lambda node: node.lineno)
    return [_normalised(ast.get_docstring(node) or "") for node in (tree, *nodes)]


def _normalised(text: str) -> str:
    """The text with plain line ends, no space before or around them, and nothing that UTF-8 cannot write."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").encode("utf-8", "ignore").decode()
    return re.sub(r"[ \t]+(?=\n)", "", text).strip()


def without_seen(text: str, seen: set[str]) -> str:
    """The text without paragraphs in `seen`, to which it adds its own; empty if too little is left."""
    if text in seen:
        return ""
    paragraphs = [(part, " ".join(part.split())) for part in re.split(r"\n{2,}", text)]
    kept = "\n\n".join(part for part, key in paragraphs if key not in seen).strip()
    seen.update(key for key in (text, *(key for _, key in paragraphs)) if len(key) >= MIN_CHARS)
    return kept if len(kept) >= MIN_CHARS else ""


def _remove_docstrings(tree: ast.Module) -> None:
    """Delete every statement of `tree` that is only a string; a body left empty becomes `pass`."""
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            body[:] = [part for part in body if not _is_string(part)] or [ast.Pass()]


def _is_string(node: ast.stmt) -> bool:
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _pieces(node: ast.stmt, max_chars: int, seen: set[str]) -> Iterator[str]:
    """The definition's source: whole if short, a class's members one by one otherwise; none if in `seen`."""
    source = ast.unparse(node)
    if len(source) >= MIN_CHARS and source in seen:
        return
    seen.add(source)
    if len(source) <= max_chars or not isinstance(node, ast.ClassDef):
        yield source
        return
    members = [member for member in node.body if isinstance(member, _DEFINITIONS)]
    node.body = [member for member in node.body if member not in members] or [ast.Pass()]
    yield ast.unparse(node)
    for member in members:
        yield from (textwrap.indent(piece, "    ") for piece in _pieces(member, max_chars, seen))


def joined(pieces: Iterator[str], max_chars: int) -> Iterator[str]:
    """Pieces joined by blank lines up to `max_chars` characters; a longer piece is cut at its line ends."""
    segment = ""
    for piece in pieces:
        separator = "\n\n"
        for part in [piece] if len(piece) <= max_chars else piece.split("\n"):
            if segment and len(segment) + len(separator) + len(part) > max_chars:
                yield segment
                segment = ""
            segment += separator + part if segment else part
            separator = "\n"
    if segment:
        yield segment
