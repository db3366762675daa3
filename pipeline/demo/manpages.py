"""A domain far from what an English chat model knows: German prose about Linux, from Debian's package `manpages-de`.

Owns fetching the package (`apt-get download` and `dpkg-deb`, which need no root and check Debian's signature), which of
its pages become documents, and where the text is from, licence included. Where apt is not to be had: the source code
of this Python's own standard library, told. Must not know models or caches.
"""

import gzip
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from .text import Document, code_documents, joined, without_seen
from .troff import plain_text

PACKAGE = "manpages-de"
MAX_CHARS = 640
"""Of a document: about 230 tokens of an English tokenizer."""
MIN_CHARS = 400
MIN_GERMAN = 0.08
"""Share of a document's words that are among the commonest German ones; pages are translated in parts."""
TIMEOUT_SECONDS = 180

_GERMAN = {
    *("der", "die", "das", "den", "dem", "ein", "eine", "einen", "und", "oder", "nicht", "sich"),
    *("ist", "wird", "werden", "mit", "für", "auf", "von", "zu"),
}


@dataclass(frozen=True)
class NewText:
    """The new domain of the demo: its documents, and what a report says of them."""

    documents: tuple[Document, ...]
    #: What the text is.
    what: str
    #: Where it is from.
    source: str
    licence: str
    #: The package's own word on who may do what with it, if it has one.
    copyright: str = ""


def new_text() -> tuple[NewText, str]:
    """German manual pages, or Python's source code where they cannot be had; and a sentence that says which, and why.

    Raises `FileNotFoundError` where there is neither.
    """
    missing = [name for name in ("apt-get", "dpkg-deb") if shutil.which(name) is None]
    if missing:
        why = f"this system has no {missing[0]}"
    else:
        with TemporaryDirectory() as folder:
            try:
                found = manual_pages(*fetch(Path(folder)))
                return found, f"New text: {found.what}, from {found.source}."
            except (subprocess.SubprocessError, OSError) as error:
                why = _reason(error)
    code = NewText(
        code_documents(),
        "source code of Python's standard library",
        "this Python's own files",
        "Python Software Foundation License",
    )
    return code, (
        f"New text: {code.what}, since German manual pages cannot be had: {why}. A model that was trained on code has "
        "less to learn there. For the German pages: `apt-get update` as root, and the demo again with another --out."
    )


def fetch(folder: Path) -> tuple[Path, str]:
    """Download and unpack the package; where its files are now, and its version. Raises `CalledProcessError`, OSError,
    `TimeoutExpired`."""
    _run("apt-get", "download", "--quiet", PACKAGE, within=folder)
    packages = sorted(folder.glob(f"{PACKAGE}_*.deb"))
    if not packages:
        raise FileNotFoundError(f"apt-get downloaded no {PACKAGE}_*.deb")
    version = _run("dpkg-deb", "--field", str(packages[0]), "Version", within=folder).strip()
    unpacked = folder / "unpacked"
    _run("dpkg-deb", "--extract", str(packages[0]), str(unpacked), within=folder)
    return unpacked, version


def manual_pages(root: Path, version: str) -> NewText:
    """The German pages below `root`, an unpacked package."""
    pages = _pages(root / "usr" / "share" / "man" / "de")
    return NewText(
        tuple(documents_of(pages)),
        "German manual pages",
        f"Debian's package {PACKAGE} {version}",
        f"GPL-3+, and as data/copyright-{PACKAGE} says",
        (root / "usr" / "share" / "doc" / PACKAGE / "copyright").read_text(encoding="utf-8"),
    )


def documents_of(pages: Iterator[tuple[str, str]]) -> Iterator[Document]:
    """Pieces of German prose of each page, `man:<page>#<i>`; a paragraph that an earlier page has is left out."""
    seen: set[str] = set()
    for name, source in pages:
        kept = without_seen(plain_text(source), seen)
        for index, piece in enumerate(joined(iter(kept.split("\n\n")), MAX_CHARS)):
            if len(piece) >= MIN_CHARS and german_share(piece) >= MIN_GERMAN:
                yield Document(f"man:{name}#{index}", piece)


def german_share(text: str) -> float:
    """Share of the words that are among the commonest German ones."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    return sum(word in _GERMAN for word in words) / max(len(words), 1)


def _pages(root: Path) -> Iterator[tuple[str, str]]:
    """Name and troff source of each page, sorted; a page that is a link to another one is left out."""
    for path in sorted(root.glob("man*/*.gz")):
        if not path.is_symlink():
            yield path.stem, gzip.decompress(path.read_bytes()).decode("utf-8", "replace")


def _run(*command: str, within: Path) -> str:
    done = subprocess.run(
        command,
        cwd=within,
        env={**os.environ, "LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=True,
        timeout=TIMEOUT_SECONDS,
        stdin=subprocess.DEVNULL,
    )
    return done.stdout


def _reason(error: Exception) -> str:
    """The last line that a program said, or what Python says of it."""
    said = str(error.stderr or "").strip().splitlines() if isinstance(error, subprocess.CalledProcessError) else []
    return (said[-1] if said else str(error)).rstrip(".")
