"""Text of others as it may be said: what is escaped, what is cut, and which parts of a URL are never said."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitcache.storage.files import open_files
from logitcache.storage.identity import differing
from logitcache.storage.plain_text import escaped, one_line, safe, shown, without_secrets

SAID = {
    "s3://user:S@bucket/x": "s3://***@bucket/x",
    "s3://user:S/S@bucket/x": "s3://***@bucket/x",
    "https://S@host/a?X-Amz-Signature=S&b=c end": "https://***@host/a?*** end",
    "git+https://user:S@host/a#token=S": "git+https://***@host/a?***",
    "zip://a.jsonl::https://user:S@host/a.zip": "zip://***@host/a.zip",
    "https://host/a?S": "https://host/a?***",
    "'https://host/a?sig=S': no": "'https://host/a?***': no",
    "/user:S@host/cache is missing": "/***@host/cache is missing",
    "with url: /rows?X-Amz-Signature=S (Caused by": "with url: /rows?*** (Caused by",
    "s3://bucket/a?sig=S/shards/x": "s3://bucket/a?***",
}
KEPT = (
    *("s3://bucket/run@2/a", "hf://datasets/owner/name@main/f.jsonl:12", "abfs://container@account.net/x", "a@b.c"),
    *("What? Yes: a = b", "memory://cli-test/cache", "12:30 @ home", "https://host/a@b", "s3://***@bucket/a?***/x"),
)


@pytest.mark.parametrize("text", SAID)
def test_a_secret_is_not_said(text: str) -> None:
    assert without_secrets(text) == SAID[text]
    assert without_secrets(SAID[text]) == SAID[text]


@pytest.mark.parametrize("text", KEPT)
def test_what_is_no_secret_is_said(text: str) -> None:
    assert without_secrets(text) == text


@given(st.text(), st.text())
def test_json_stays_json(key: str, value: str) -> None:
    text = json.dumps({key: value, "url": f"s3://u:p@{value}"})
    assert isinstance(json.loads(without_secrets(text)), dict)


@given(st.text(max_size=200))
def test_what_is_printed_is_printable_and_what_was_so_stays(text: str) -> None:
    assert escaped(text).isprintable() and escaped(escaped(text)) == escaped(text)
    assert all(line.isprintable() for line in safe(text).replace("\t", " ").split("\n"))
    assert one_line(one_line(text, 50), 50) == one_line(text, 50) and len(one_line(text, 50)) <= 50


def test_what_a_terminal_would_act_on_is_spelt_out() -> None:
    assert escaped("\x1b[2J\r\n\0‮é漢\ud800") == r"\x1b[2J\r\n\x00\u202eé漢\ud800"
    assert safe("a\tb\nc\r") == "a\tb\nc\\r"


def test_any_value_is_shown_and_short() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (10**5000, [10**5000], "x" * 10**6, {"a": deep}, deep, [[]] * 10**6, b"x" * 10**6, float("nan")):
        assert len(shown(value)) <= 80
    assert shown("a") == "'a'" and shown(None) == "None" and shown(1.5) == "1.5" and shown([1, "x"]) == "[1, 'x']"
    assert "SECRET" not in shown("https://user:SECRET@" + "x" * 100)


def test_the_root_of_a_store_is_for_people_and_its_url_still_opens_it() -> None:
    files = open_files("memory://user:SECRET@host/plain-text?sig=SECRET")
    assert files.root == "memory://***@host/plain-text?***"
    assert files.create("name", b"data") and files.read("name") == b"data"
    files.remove("name")


def test_what_differs_is_said_on_one_line() -> None:
    """Whatever a stranger's run.json or config.json holds."""
    said = differing({"weights": "a\r\nb"}, {"weights": "\x1b[2J" + "x" * 500})
    assert said == ["weights: a b here, \\x1b[2J" + "x" * 70 + "... there"]
