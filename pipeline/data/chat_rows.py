"""A row with turns -> one form of chat, whatever shape the data set has.

Owns what a row may say and how each shape is read: `messages`; ShareGPT's `conversations`; `prompt` + `completion` of
turns; content in parts; tools and template variables as objects or JSON strings. What would be dropped is refused by
name. Must not know templates, tokenizers or files.
"""

import json
from dataclasses import dataclass, replace
from typing import Any

from logitcache.errors import InvalidData

from .files import Row

_SHAREGPT_NAMES = {"human": "user", "gpt": "assistant"}
"""Who speaks in ShareGPT's `from`, in the roles that chat templates know. TRL keeps the names as they are."""

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which data sets keep a turn's reasoning. The first is the one that chat templates read."""

_SAYS = {
    "function_call": "Write it as 'tool_calls'.",
    "refusal": "Write it as the turn's content.",
    "audio": "Only text is learnt here. Remove the row.",
}
"""What a turn may say besides its content, in data of OpenAI's form, which chat templates do not read; what to do."""

_WEIGHS = ("weight", "train", "training")
"""Names under which data sets say of a turn whether it is learnt."""

_BESIDE = ("system", "system_prompt", "functions")
"""Columns beside the turns that say what belongs before them, and that TRL reads as little as this."""

RESERVED = frozenset(
    {
        *("messages", "conversation", "conversations", "tools", "chat_template", "add_generation_prompt", "tokenize"),
        *("continue_final_message", "return_assistant_tokens_mask", "return_dict", "return_tensors", "truncation"),
        *("padding", "max_length", "tokenizer_kwargs", "sanitize_control_tokens"),
    }
)
"""Names that a chat template's variables cannot have: they mean something to what renders it."""


@dataclass(frozen=True)
class Chat:
    """The turns of a row, and what its chat template is given besides them."""

    #: role, content (always a string) and whatever else a turn has; nothing in a turn is None.
    messages: list[Row]
    #: What the model may call; None where there is nothing.
    tools: list[Row] | None
    #: Variables for the chat template.
    variables: dict[str, Any]
    #: The first so many turns are a prompt, which is never learnt.
    num_prompt: int = 0


def has_tools(row: Row) -> bool:
    """Whether a row comes with tools, be they readable or not."""
    return row.get("tools") not in (None, "", "[]", [])


def unread_beside(row: Row) -> list[str]:
    """A sentence for each column of a row with turns that belongs to the chat and is not read."""
    turns: list[Row] = next(
        (row[name] for name in ("messages", "conversations", "prompt") if row.get(name) is not None), []
    )
    said = [turn.get("content", turn.get("value")) for turn in turns]
    unread = [name for name in _BESIDE if row.get(name) not in (None, "", "[]", [], *said)]
    return [
        f"Rows have {name!r} beside their turns, which is not read: their samples are those of rows without. Put it "
        f"{'into tools' if name == 'functions' else 'in front, as a turn of the role system'} if it is to count."
        for name in unread
    ]


def check_learnt(turn: Row, where: str) -> None:
    """Raise `InvalidData` for a turn that is to be learnt and says of itself that it is not, or only in part."""
    odd = next((name for name in _WEIGHS if turn.get(name) is not None and turn[name] != 1), None)
    if odd is not None:
        raise InvalidData(
            f"{where}: it says {odd!r}: {turn[odd]!r:.40}, and nothing here weighs turns: it would be learnt like the "
            "others. Put what is not learnt into 'prompt' and the rest into 'completion', learn the last turn alone "
            "(--supervise last), or give input_ids and labels."
        )


def first_turns(chat: Chat, num_turns: int) -> Chat:
    """The beginning of a chat."""
    return replace(chat, messages=chat.messages[:num_turns])


def is_chat(row: Row) -> bool:
    """Whether a row has turns, to be rendered with a chat template."""
    if row.get("input_ids") is not None:
        return False
    if row.get("messages") is not None or row.get("conversations") is not None:
        return True
    return _is_turns(row.get("prompt")) and _is_turns(row.get("completion"))


def read_chat(row: Row, variables: dict[str, Any], origin: str) -> Chat:
    """The chat of a row for which `is_chat` holds.

    variables: those of the command line; the row's own `chat_template_kwargs` come before them.
    Raises `InvalidData`, naming the origin.
    """
    given = _object(row.get("chat_template_kwargs"), "chat_template_kwargs", origin)
    check_variables(given, f"reading {origin}: chat_template_kwargs")
    merged = {**variables, **given}
    tools = _tools(row.get("tools"), origin)
    for name in ("messages", "conversations"):
        if row.get(name) is not None:
            return Chat(_turns(row[name], name, origin), tools, merged)
    prompt = _turns(row["prompt"], "prompt", origin)
    return Chat([*prompt, *_turns(row["completion"], "completion", origin)], tools, merged, len(prompt))


def check_variables(variables: dict[str, Any], where: str) -> None:
    """Raise `InvalidData` for a variable whose name is taken."""
    taken = sorted(RESERVED & variables.keys())
    if taken:
        raise InvalidData(
            f"{where}: {taken[0]!r} is not a variable of a chat template, it is set by what renders it. Remove it; "
            "tools have a field of their own in the row."
        )


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)


def _turns(value: Any, name: str, origin: str) -> list[Row]:
    if not (_is_turns(value) and all("role" in turn or "from" in turn for turn in value)):
        raise InvalidData(
            f"reading {origin}: expected a list of {{role, content}} in {name!r}, found {value!r:.60}. "
            "Each turn names who speaks and what is said."
        )
    return [_turn(turn, f"reading {origin}: turn {i} of {name!r}") for i, turn in enumerate(value)]


def _turn(turn: Row, where: str) -> Row:
    named = {key: value for key, value in turn.items() if value is not None}
    if "from" in named and "role" not in named:
        who = named.pop("from")
        named["role"] = _SHAREGPT_NAMES.get(who, who) if isinstance(who, str) else who
    if "value" in named and "content" not in named:
        named["content"] = named.pop("value")
    if not isinstance(named.get("role"), str):
        raise InvalidData(f"{where}: expected a string as its role, found {named.get('role')!r:.60}.")
    unread = next((name for name in _SAYS if named.get(name) not in (None, "", {}, [])), None)
    if unread is not None:
        raise InvalidData(
            f"{where}: it has {unread!r}, which no chat template reads: it would be learnt as if it were not said. "
            f"{_SAYS[unread]}"
        )
    calls = named.get("tool_calls")
    if calls is not None and not _is_turns(calls):
        if calls != []:
            raise InvalidData(f"{where}: expected a list of objects in 'tool_calls', found {calls!r:.60}.")
        del named["tool_calls"]
    reasoning = next((named[key] for key in _REASONING if key in named), None)
    if reasoning is not None:  # as transformers has it since 5.21, for every version
        if not isinstance(reasoning, str):
            raise InvalidData(f"{where}: expected a string as its reasoning, found {reasoning!r:.60}.")
        named = {"thinking": reasoning, **named, "reasoning_content": reasoning}
    return {**named, "content": _text(named.get("content"), where)}


def _text(content: Any, where: str) -> str:
    """What a turn says: a string as it is, parts of text joined, "" for null."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise InvalidData(
            f"{where}: expected a string or a list of text parts as its content, found {type(content).__name__} "
            f"({content!r:.60}). A template would print it as Python does. Make it a string."
        )
    return "".join(_part(part, where) for part in content)


def _part(part: Any, where: str) -> str:
    kind = part.get("type", "none") if isinstance(part, dict) else type(part).__name__
    text = part.get("text") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(text, str):
        raise InvalidData(
            f"{where}: expected parts of type 'text' in its content, found one of type {kind!r:.40}. Only text is "
            "learnt here. Remove the row, or replace the part with text."
        )
    others = sorted(key for key, value in part.items() if value is not None and key not in ("type", "text"))
    if others:
        raise InvalidData(
            f"{where}: a text part of its content has {others[0]!r:.40}, which nothing here reads. Remove that field."
        )
    return text


def _tools(value: Any, origin: str) -> list[Row] | None:
    if isinstance(value, str):
        value = _parsed(value, "tools", origin) if value.strip() else None
    if not value:
        return None
    if not _is_turns(value):
        raise InvalidData(f"reading {origin}: expected a list of objects in 'tools', found {value!r:.60}.")
    return list(value)


def _object(value: Any, name: str, origin: str) -> dict[str, Any]:
    if isinstance(value, str):
        value = _parsed(value, name, origin) if value.strip() else None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidData(f"reading {origin}: expected an object in {name!r}, found {value!r:.60}.")
    return {key: each for key, each in value.items() if each is not None}


def _parsed(text: str, name: str, origin: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidData(
            f"reading {origin}: expected JSON in {name!r}, found {text!r:.60}. Repair the field."
        ) from error
