"""Manual pages as plain text: what of troff is read, and what is left out."""

import pytest

from logitcache.demo.troff import UNKNOWN, plain_text, unescaped

PAGE = r"""'\" t
.\" -*- coding: UTF-8 -*-
.TH beispiel 1 "1. Mai" "" "Befehle"
.ie \n(.g .ds Aq \(aq
.el       .ds Aq '
.de Sp
.if t .sp .5v
..
.SH BEZEICHNUNG
beispiel \- wird nicht gelesen
.SH ÜBERSICHT
\fBbeispiel\fP [\fB\-v\fP]
.SH BESCHREIBUNG
\fBbeispiel\fP zeigt eine Datei\&. Der Schalter
.B "\-n 3"
wird mit
.BR head (1)
geteilt, \(Bqkurz\(lq und \(aqlang\(aq. \" eine Bemerkung
.PP
Es ist \s-1GROSS\s0 oder klein,
    eingerückt ist eine Auflistung
und danach beginnt ein neuer Absatz.
.TS
allbox;
l l.
Zelle	Zelle
.TE
.if n \{\
.RS 4
verschluckt
.\}
.nf
$ beispiel datei
.fi
.SH OPTIONEN
.TP
\fB\-v\fP, \fB\-\-version\fP
gibt die Version aus
und beendet das Programm.
.IP \(bu 2
Ein Punkt der Liste,
.UR https://example.org
.UE .
.IP "\fB\-q\fP" 4
ist still.
.SS "Ein Unterabschnitt"
Gehört zu den Optionen.
.SH "SIEHE AUCH"
Wird nicht gelesen.
"""

TEXT = """beispiel zeigt eine Datei. Der Schalter -n 3 wird mit head(1) geteilt, „kurz“ und 'lang'.

Es ist GROSS oder klein,

und danach beginnt ein neuer Absatz.

-v, --version
gibt die Version aus und beendet das Programm.

Ein Punkt der Liste, https://example.org.

-q
ist still.

Gehört zu den Optionen."""


def test_the_prose_of_a_page_is_kept_and_nothing_else() -> None:
    assert plain_text(PAGE) == TEXT


def test_a_page_in_mdoc_has_no_prose_here() -> None:
    assert plain_text(".Dd May 1, 2026\n.Dt LS 1\n.Sh DESCRIPTION\nText.\n") == ""


def test_a_paragraph_with_an_unknown_escape_is_left_out() -> None:
    page = ".SH BESCHREIBUNG\nDies \\(zz bleibt weg.\n.PP\nDies bleibt.\n"
    assert plain_text(page) == "Dies bleibt."


def test_a_page_that_ends_within_a_listing_or_a_condition_ends_there() -> None:
    start = ".SH BESCHREIBUNG\nDavor.\n"
    assert plain_text(start + ".nf\nkein Ende") == plain_text(start + ".if n \\{\\\nkein Ende") == "Davor."


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (r"\fBfett\fR, \f[I]schräg\f[], \f(CWschreib\fP", "fett, schräg, schreib"),
        (r"C:\eWindows\\x \- ein\ Wort\~hier", "C:\\Windows\\x - ein Wort hier"),
        (r"\h'-04'\(bu\h'+03'Punkt\c", "\u2022Punkt"),
        (r"\[u00E4]\[:o]\*(Aq\*[Aq]", "äö''"),
        (r"\m[blue]\fBname\fR\m[]\&\s-2\u[1]\d\s+2", "name[1]"),
        (r"\(qq", UNKNOWN),
        (r"Ende\"mehr", "Ende"),
    ],
)
def test_escapes(source: str, text: str) -> None:
    assert unescaped(source) == text
