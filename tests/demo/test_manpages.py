"""The new domain of the real demo: German pages of a package, or Python's source where there is no package."""

import gzip
import shutil
import subprocess
from pathlib import Path

import pytest

from logitcache.demo import manpages
from logitcache.demo.manpages import documents_of, fetch, german_share, manual_pages, new_text

SENTENCE = (
    "Das Programm {} liest die Datei und schreibt das Ergebnis auf die Standardausgabe, wenn nichts dagegen steht. "
)


def page(*subjects: str) -> str:
    paragraphs = [SENTENCE.format(subject) + SENTENCE.format(subject.upper()) for subject in subjects]
    return ".TH x 1\n.SH BESCHREIBUNG\n" + "\n.PP\n".join(paragraphs) + "\n"


def package(root: Path, pages: dict[str, str]) -> Path:
    """An unpacked package with these pages."""
    for name, source in pages.items():
        path = root / "usr/share/man/de/man1" / f"{name}.1.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(source.encode()))
    papers = root / "usr/share/doc/manpages-de/copyright"
    papers.parent.mkdir(parents=True)
    papers.write_text("License: GPL-3+\n")
    return root


def test_pages_become_documents_and_a_paragraph_is_kept_once(tmp_path: Path) -> None:
    root = package(tmp_path, {"b": page("eins", "zwei", "drei"), "c": page("eins", "zwei", "drei", "vier", "sechs")})
    (root / "usr/share/man/de/man1/a.1.gz").symlink_to("b.1.gz")
    text = manual_pages(root, "4.2-1")
    assert [d.name for d in text.documents] == ["man:b.1#0", "man:c.1#0"]
    assert "eins" in text.documents[0].text and "zwei" in text.documents[0].text
    assert "zwei" not in text.documents[1].text and "vier" in text.documents[1].text
    assert text.source == "Debian's package manpages-de 4.2-1" and text.copyright == "License: GPL-3+\n"


def test_what_is_short_or_not_german_is_left_out() -> None:
    english = ".SH BESCHREIBUNG\n" + "This paragraph of the page has not been translated by anybody so far. " * 7
    assert german_share(english) < 0.01 < 0.3 < german_share(SENTENCE)
    assert list(documents_of(iter([("e.1", english), ("s.1", page("kurz"))]))) == []


def test_the_package_is_downloaded_and_unpacked_by_debians_own_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def program(*command: str, within: Path) -> str:
        asked.append(command[:2])
        if command[0] == "apt-get":
            (within / "manpages-de_4.18.1-1_all.deb").write_bytes(b"!<arch>")
        elif command[1] == "--extract":
            package(Path(command[3]), {"x": page("eins", "zwei", "drei")})
        return "4.18.1-1\n"

    monkeypatch.setattr(manpages, "_run", program)
    unpacked, version = fetch(tmp_path)
    assert asked == [("apt-get", "download"), ("dpkg-deb", "--field"), ("dpkg-deb", "--extract")]
    assert version == "4.18.1-1" and len(manual_pages(unpacked, version).documents) == 1


@pytest.mark.parametrize("lacks", ["program", "package", "network"])
def test_without_the_package_the_source_of_python_is_the_new_text_and_why_is_told(
    lacks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: str, **__: Path) -> str:
        if lacks == "network":
            raise subprocess.TimeoutExpired("apt-get", 180)
        raise subprocess.CalledProcessError(100, "apt-get", stderr="E: Unable to locate package manpages-de\n")

    monkeypatch.setattr(shutil, "which", lambda _: None if lacks == "program" else "/usr/bin/x")
    monkeypatch.setattr(manpages, "_run", refuse)
    text, told = new_text()
    why = {"program": "has no apt-get", "package": "Unable to locate package manpages-de", "network": "timed out"}
    assert why[lacks] in told and "Python's standard library" in told
    assert len(text.documents) > 1000 and text.documents[0].name.startswith("code:")
