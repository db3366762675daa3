"""Prompts to be answered: of a text file, of rows, or the everyday ones that come with the package.

Owns what a row of prompts may hold; what it holds besides and nobody would read is refused by name. Must not know
models or tokenizers.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from logitcache.data.files import Row
from logitcache.data.rows import Skipped, read_rows
from logitcache.data.splits import SUFFIXES
from logitcache.errors import InputNotFound, InvalidData
from logitcache.events import OnMessage
from logitcache.storage.plain_text import shown, without_secrets

EVERYDAY = Path(__file__).with_name("prompts.jsonl")
"""100 prompts of eleven kinds; each is an anchor or a test, halves that share neither subject nor wording, and the kind
"code" is in the tests alone."""

_KNOWN = ("prompt", "messages")
_UNREAD = ("completion", "tools", "chat_template_kwargs")
"""What rows of chats may have and answers do not take."""


@dataclass(frozen=True)
class Prompt:
    """A chat that waits for its next answer."""

    #: {"role": ..., "content": ...} each; the last one is not the assistant's.
    messages: tuple[dict[str, str], ...]
    #: Where it comes from, for messages.
    origin: str
    #: What it is about, "" where its row does not say.
    kind: str = ""
    #: Which part of its list it belongs to (of the everyday ones anchor or test), "" where its row does not say.
    part: str = ""

    def answered(self, text: str) -> dict[str, Any]:
        """The row of a data set: the chat with its answer, kind and part where there are any."""
        chat = [*self.messages, {"role": "assistant", "content": text}]
        said = {"kind": self.kind, "part": self.part}
        return {"messages": chat, **{name: value for name, value in said.items() if value}}


@cache
def everyday_prompts() -> tuple[Prompt, ...]:
    """The 100 that come with the package, in their fixed order."""
    lines = EVERYDAY.read_text(encoding="utf-8").splitlines()
    return tuple(_of_row(json.loads(line), f"{EVERYDAY.name}:{number}") for number, line in enumerate(lines, 1))


def read_prompts(prompts: str | Path, on_message: OnMessage = lambda _: None) -> list[Prompt]:
    """The prompts of a file, in its order: one a line of a text file, or a row each of JSONL or Parquet, a folder of
    these or a hub data set: `prompt` (text, or messages) or `messages`, and perhaps `kind` and `part`.

    on_message is told which split is read. Raises `InputNotFound`, and `InvalidData` with the line that is wrong or
    where there is no prompt.
    """
    name = str(prompts)
    is_text = "://" not in name and not name.endswith(SUFFIXES) and (Path(name).is_file() or name.endswith(".txt"))
    found = list(_of_lines(Path(name)) if is_text else _of_rows(name, on_message))
    if not found:
        raise InvalidData(f"reading prompts {without_secrets(name)}: expected one a line, found none.")
    return found


def _of_rows(name: str, on_message: OnMessage) -> Iterator[Prompt]:
    for origin, row in read_rows(name, on_message=on_message):
        assert not isinstance(row, Skipped)  # no row is skipped unless that is asked for
        yield _of_row(row, origin)


def _of_lines(path: Path) -> Iterator[Prompt]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise InputNotFound(f"reading prompts {path}: no such file. Check the path.") from error
    except UnicodeDecodeError as error:
        raise InvalidData(
            f"reading prompts {path}: expected a text in UTF-8, found other bytes at byte {error.start:,}. Save it as "
            "UTF-8."
        ) from error
    for number, line in enumerate(lines, 1):
        if _is_row(line):
            raise InvalidData(
                f"reading prompts {path}: expected a text with a prompt a line, found a row of JSON in line {number}. "
                f"It would be put to the model as it stands. Give the file one of the endings {', '.join(SUFFIXES)}."
            )
        if line.strip():
            yield Prompt(({"role": "user", "content": line.strip()},), f"{path}:{number}")


def _is_row(line: str) -> bool:
    """Whether a line is an object of JSON, as lines of prompts are not."""
    try:
        return line.lstrip().startswith("{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _of_row(row: Row, origin: str) -> Prompt:
    given = [name for name in _KNOWN if row.get(name) is not None]
    if len(given) != 1:
        found = " and ".join(given) or ", ".join(sorted(map(shown, row))) or "nothing"
        raise InvalidData(f"reading {origin}: expected either 'prompt' or 'messages' to be answered, found {found}.")
    unread = [name for name in _UNREAD if row.get(name) not in (None, "", [], {}, "[]")]
    if unread:
        raise InvalidData(
            f"reading {origin}: it has '{unread[0]}', which is not read here: a prompt is answered as it stands. "
            f"Leave '{unread[0]}' out."
        )
    labels = {name: row.get(name) or "" for name in ("kind", "part")}
    odd = [name for name, value in labels.items() if not isinstance(value, str)]
    if odd:
        raise InvalidData(f"reading {origin}: expected a text in '{odd[0]}', found {shown(labels[odd[0]])}.")
    return Prompt(_messages_of(row[given[0]], given[0], origin), origin, **labels)


def _messages_of(value: Any, column: str, origin: str) -> tuple[dict[str, str], ...]:
    if isinstance(value, str) and column == "prompt":
        if not value.strip():
            raise InvalidData(f"reading {origin}: expected a text in 'prompt', found an empty one. Leave the row out.")
        return ({"role": "user", "content": value},)
    turns = value if isinstance(value, list) else []
    if not turns or not all(_is_turn(turn) for turn in turns):
        raise InvalidData(
            f"reading {origin}: expected a list of {{role, content}}, two texts each, in '{column}', found "
            f"{shown(value)}."
        )
    if turns[-1]["role"] == "assistant":
        raise InvalidData(
            f"reading {origin}: its messages end with the assistant's turn, so there is nothing to answer. Leave that "
            "turn out."
        )
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)


def _is_turn(turn: Any) -> bool:
    if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
        return False
    extra = {name for name, value in turn.items() if value is not None} - {"role", "content"}
    return not extra and isinstance(turn["role"], str) and isinstance(turn["content"], str)
