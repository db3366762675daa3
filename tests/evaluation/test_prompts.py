"""Prompts: the everyday ones that come with the package, and those of a file."""

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from logitcache.errors import InputNotFound, InvalidData
from logitcache.evaluation.prompts import everyday_prompts, read_prompts

WriteRows = Callable[..., Path]

INSTRUCTIONS = {"explain", "write", "which", "three"}
"""Long words that say what to do, or how often, and not of what: both parts may have them."""


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def part(name: str) -> list[str]:
    """The texts of a part of the everyday prompts."""
    return [p.messages[0]["content"] for p in everyday_prompts() if p.part == name]


def runs_of_words(texts: Iterable[str], length: int) -> set[tuple[str, ...]]:
    """All that stand one after another, so many together."""
    found = set()
    for text in texts:
        words = re.findall(r"[a-z0-9']+", text.lower())
        found |= {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}
    return found


def test_everyday_prompts_are_a_hundred_in_two_halves() -> None:
    prompts = everyday_prompts()
    assert len({p.messages[0]["content"] for p in prompts}) == len(prompts) == 100
    assert Counter(p.part for p in prompts) == {"anchor": 50, "test": 50}
    kinds = {name: {p.kind for p in prompts if p.part == name} for name in ("anchor", "test")}
    assert kinds["test"] - kinds["anchor"] == {"code"} and kinds["anchor"] < kinds["test"]
    assert all(len(p.messages) == 1 and p.messages[0]["role"] == "user" for p in prompts)


def test_the_halves_share_neither_wording_nor_subject() -> None:
    """No three words in a row, and of words with five letters or more only those that ask."""
    anchors, tests = part("anchor"), part("test")
    assert not runs_of_words(anchors, 3) & runs_of_words(tests, 3)
    shared = {word for (word,) in runs_of_words(anchors, 1) & runs_of_words(tests, 1) if len(word) >= 5}
    assert shared <= INSTRUCTIONS


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffOne?\r\n\n  Zwei über drei?  \n".encode())
    found = read_prompts(path)
    assert [p.messages for p in found] == [(user("One?"),), (user("Zwei über drei?"),)]
    assert [p.origin for p in found] == [f"{path}:1", f"{path}:3"]
    assert found[0].answered("Yes.") == {"messages": [user("One?"), {"role": "assistant", "content": "Yes."}]}


def test_rows_are_prompts_or_chats_with_their_kind(write_rows: WriteRows) -> None:
    system = {"role": "system", "content": "Be brief."}
    rows: list[dict[str, Any]] = [
        {"prompt": "One?", "kind": "facts", "part": "test"},
        {"prompt": [system, user("Two?")], "completion": None},
        {"messages": [user("a"), {"role": "assistant", "content": "b"}, user("c")], "tools": "[]", "id": 7},
    ]
    found = read_prompts(write_rows(rows))
    assert [list(p.messages) for p in found] == [[user("One?")], rows[1]["prompt"], rows[2]["messages"]]
    assert [(p.kind, p.part) for p in found] == [("facts", "test"), ("", ""), ("", "")]
    assert found[0].answered("x") == {
        "messages": [user("One?"), {"role": "assistant", "content": "x"}],
        "kind": "facts",
        "part": "test",
    }


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a"}, "expected either 'prompt' or 'messages'"),
        ({"prompt": "a", "messages": [user("a")]}, "found prompt and messages"),
        ({"prompt": "a", "completion": "b"}, "Leave 'completion' out"),
        ({"prompt": "a", "tools": [{"name": "f"}]}, "Leave 'tools' out"),
        ({"prompt": "  "}, "found an empty one"),
        ({"prompt": 3}, "two texts each, in 'prompt'"),
        ({"messages": "a"}, "two texts each, in 'messages'"),
        ({"messages": []}, "two texts each"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, "two texts each"),
        ({"messages": [{**user("a"), "tool_calls": [{}]}]}, "two texts each"),
        ({"messages": [user("a"), {"role": "assistant", "content": "b"}]}, "there is nothing to answer"),
        ({"prompt": "a", "part": 3}, "expected a text in 'part', found 3"),
    ],
)
def test_a_row_that_is_no_prompt_is_refused_by_its_line(write_rows: WriteRows, row: dict[str, Any], said: str) -> None:
    path = write_rows([{"prompt": "fine"}, row])
    with pytest.raises(InvalidData) as caught:
        read_prompts(path)
    assert f"{path}:2" in str(caught.value) and said in str(caught.value)


def test_files_that_hold_no_prompts_are_refused(tmp_path: Path) -> None:
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text("\n \n")
    latin.write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(InvalidData, match="found none"):
        read_prompts(empty)
    with pytest.raises(InvalidData, match="expected a text in UTF-8, found other bytes at byte 2"):
        read_prompts(latin)
    with pytest.raises(InputNotFound, match="no such file"):
        read_prompts(tmp_path / "missing.txt")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a"}) + "\n{\n")
    with pytest.raises(InvalidData, match="line 2 is not JSON"):
        read_prompts(rows)


def test_a_folder_of_prompts_says_which_of_it_is_read(tmp_path: Path) -> None:
    told: list[str] = []
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"prompt": "{name}?"}}\n', encoding="utf-8")
    assert [p.messages[0]["content"] for p in read_prompts(tmp_path, told.append)] == ["train?"]
    assert told == [f"{tmp_path}: reading split train: train.jsonl; not read: test.jsonl (--split test)."]


def test_rows_are_not_put_to_the_model_as_they_stand(tmp_path: Path) -> None:
    """Rows of JSON whose file has another name, and packed ones, which are rows by their name."""
    row = b'{"prompt": "Why?"}\n'
    path = tmp_path / "prompts.ndjson"
    path.write_bytes(b"\n" + row)
    with pytest.raises(InvalidData, match=r"found a row of JSON in line 2\. It would be put to the model as it stands"):
        read_prompts(path)
    (tmp_path / "prompts.jsonl.gz").write_bytes(gzip.compress(row))
    assert [p.messages for p in read_prompts(tmp_path / "prompts.jsonl.gz")] == [(user("Why?"),)]
