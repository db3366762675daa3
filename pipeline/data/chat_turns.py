"""Which assistant turn each learnt range of a rendered chat belongs to, and that nothing else is learnt.

Owns the checks after rendering: each assistant turn has a range of its own, none holds another turn's words, a turn
that says or calls something has it learnt, and nothing is printed as Python prints it. Must not know tokens.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from logitcache.errors import InvalidData

from .chat_rendering import ADVICE, Rendered, Renderer, Spans
from .chat_rows import Chat
from .files import Row


def spans_by_turn(found: Rendered, chat: Chat, renderer: Renderer) -> dict[int, Spans]:
    """The spans of each assistant turn, by a second rendering in which every content ends or begins with a mark.

    Raises `InvalidData` where a turn has no span of its own, a span holds another turn's content, or nothing of a
    turn's content is learnt; and what the template raises.
    """
    marked = None
    for at_end in (True, False):
        marks = _marks(chat, found.text)
        twin = replace(chat, messages=[_with_mark(m, marks[i], at_end) for i, m in enumerate(chat.messages)])
        second = renderer.rendered(twin)
        if len(second.spans) == len(found.spans):
            marked = second
            if _unmarked(second.text, marks) == found.text:
                break
    if marked is None:
        raise InvalidData(
            f"reading {renderer.origin}: the chat template renders its turns differently with other words in "
            f"them, so it cannot be checked what is the assistant's. {ADVICE}"
        )
    turns = _assigned(found, marked, marks, chat, renderer.origin)
    _check_said(found, turns, marks, chat, renderer)
    return turns


def _marks(chat: Chat, text: str) -> list[str]:
    """A word for each turn that stands nowhere in the text."""
    salt = next(n for n in range(len(text) + 1) if f"zq{n}x" not in text)
    return [f"zq{salt}x{i}z" for i in range(len(chat.messages))]


def _with_mark(turn: Row, mark: str, at_end: bool) -> Row:
    """The turn with its mark inside the space around its content, which templates trim; an empty one as it is."""
    content = turn["content"]
    if not content.strip():
        return turn
    at = len(content.rstrip()) if at_end else len(content) - len(content.lstrip())
    return {**turn, "content": content[:at] + mark + content[at:]}


def _unmarked(text: str, marks: list[str]) -> str:
    for mark in marks:
        text = text.replace(mark, "")
    return text


@dataclass(frozen=True)
class _Marked:
    """Where the marks of each turn stand."""

    #: Position and turn of every mark, ascending.
    places: list[tuple[int, int]]

    def within(self, span: tuple[int, int]) -> set[int]:
        """The turns of the marks in a span."""
        return {turn for at, turn in self.places if span[0] <= at < span[1]}

    def around(self, span: tuple[int, int]) -> tuple[int, int | None]:
        """The turns of the last mark before a span (-1: none) and of the first after it."""
        before = [turn for at, turn in self.places if at < span[0]]
        after = [turn for at, turn in self.places if at >= span[1]]
        return (before[-1] if before else -1), (after[0] if after else None)


def _places(text: str, marks: list[str]) -> Iterator[tuple[int, int]]:
    for turn, mark in enumerate(marks):
        at = text.find(mark)
        while at >= 0:
            yield at, turn
            at = text.find(mark, at + 1)


def _assigned(found: Rendered, second: Rendered, marks: list[str], chat: Chat, origin: str) -> dict[int, Spans]:
    """The spans of each assistant turn: those that hold its mark, and those beside it that hold none."""
    marked = _Marked(sorted(_places(second.text, marks)))
    turns: dict[int, Spans] = {i: [] for i, turn in enumerate(chat.messages) if turn["role"] == "assistant"}
    held = {i for span in second.spans for i in marked.within(span)}
    silent = [i for i in turns if i not in held]
    for span, twin in zip(found.spans, second.spans, strict=True):
        inside = marked.within(twin)
        if span[0] == span[1]:
            continue
        if len(inside) > 1 or not inside <= turns.keys():
            raise InvalidData(
                f"reading {origin}: the chat template's generation markers hold turns {sorted(inside)} together, so "
                f"another's words would be learnt as the assistant's. {ADVICE}"
            )
        owner = inside.pop() if inside else _owner(marked.around(twin), silent, turns)
        if owner is None:
            raise InvalidData(
                f"reading {origin}: the chat template's generation markers hold text that is of no assistant turn. "
                f"{ADVICE}"
            )
        turns[owner].append(span)
    _check_turns(turns, held, marked, chat, origin)
    return turns


def _owner(around: tuple[int, int | None], silent: list[int], turns: dict[int, Spans]) -> int | None:
    """The turn of a span without a mark: one between the marks around it whose own content shows nowhere, the first
    that has no span yet; else the assistant's turn before it, or after it."""
    before, after = around
    between = [i for i in silent if before < i and (after is None or i < after)]
    if between:
        return next((i for i in between if not turns[i]), between[-1])
    return next((i for i in (before, after) if i in turns), None)


def _check_turns(turns: dict[int, Spans], held: set[int], marked: _Marked, chat: Chat, origin: str) -> None:
    shown = {turn for _, turn in marked.places}
    for i, spans in turns.items():
        if not spans:
            raise InvalidData(
                f"reading {origin}: the chat template has nothing of turn {i} that is learnt, though it is the "
                f"assistant's. {ADVICE}"
            )
        turn = chat.messages[i]
        if i not in held and (i in shown or (turn["content"].strip() and "tool_calls" not in turn)):
            raise _only_end(i, chat, origin)


def _check_said(found: Rendered, turns: dict[int, Spans], marks: list[str], chat: Chat, renderer: Renderer) -> None:
    """Raise `InvalidData` where as much is learnt of a turn that says something as of one that says nothing: templates
    that drop the reasoning of earlier turns leave nothing of one that only reasons."""

    def learnt(text: str, spans: Spans) -> str:
        return "".join(text[start:stop] for start, stop in spans)

    doubtful = {}
    for i, spans in turns.items():
        said = chat.messages[i]["content"].strip()
        if said and "tool_calls" not in chat.messages[i] and said not in learnt(found.text, spans):
            doubtful[i] = learnt(found.text, spans)
    if not doubtful:
        return
    silent = [{**turn, "content": marks[i]} if i in doubtful else turn for i, turn in enumerate(chat.messages)]
    bare = renderer.rendered(replace(chat, messages=silent))
    if len(bare.spans) != len(found.spans):
        return
    places = dict(zip(found.spans, bare.spans, strict=True))
    for i, text in doubtful.items():
        if learnt(bare.text, [places[span] for span in turns[i]]).replace(marks[i], "") == text:
            raise _only_end(i, chat, renderer.origin)


def _only_end(i: int, chat: Chat, origin: str) -> InvalidData:
    return InvalidData(
        f"reading {origin}: of turn {i}, {chat.messages[i]['content']!r:.60}, the chat template has only the end "
        f"learnt, or drops the words. The model would learn to say nothing. {ADVICE}"
    )


def check_calls(text: str, turns: dict[int, Spans], chat: Chat, renderer: Renderer) -> None:
    """Raise `InvalidData` where the template drops a call of the assistant's, or shows calls without the row's tools.

    turns: their spans in the text; without any, all of it counts.
    """
    callers = {i: turn["tool_calls"] for i, turn in enumerate(chat.messages) if _calls(turn)}
    unshown = _unshown(text, chat, renderer) if callers else {}
    for i, called in callers.items():
        shown = "".join(text[start:stop] for start, stop in turns[i]) if turns else text
        names = Counter(str(_function(call).get("name")) for call in called)
        dropped = next((name for name, times in names.items() if shown.count(name) < times), unshown.get(i))
        if dropped is not None:
            raise InvalidData(
                f"reading {renderer.origin}: the chat template drops a call of {dropped!r:.60} in turn {i}, so the "
                "model would learn to say nothing where the row calls. Give a template that renders all calls by "
                "--chat-template FILE, or remove the row."
            )
        if chat.tools is not None and not renderer.template.shows_tools:
            raise InvalidData(
                f"reading {renderer.origin}: turn {i} calls a tool, and the chat template does not show the row's "
                "tools: the model would learn to call what it was not shown. Remove the row's 'tools' if a turn says "
                "them, or give a template that shows them by --chat-template FILE."
            )


def _calls(turn: Row) -> bool:
    return turn["role"] == "assistant" and bool(turn.get("tool_calls"))


def _unshown(text: str, chat: Chat, renderer: Renderer) -> dict[int, str]:
    """By its turn, a call that another rendering does not show, in which calls have names that stand nowhere else: what
    is called may well be named in what is said."""
    marks, twins = _marks(chat, text), list(chat.messages)
    named: dict[str, tuple[int, str]] = {}
    for i, turn in enumerate(chat.messages):
        if not _calls(turn):
            continue
        called = {f"{marks[i]}{j}c": call for j, call in enumerate(turn["tool_calls"])}
        twins[i] = {**turn, "tool_calls": [_renamed(call, mark) for mark, call in called.items()]}
        named.update({mark: (i, str(_function(call).get("name"))) for mark, call in called.items()})
    try:
        second = renderer.text(replace(chat, messages=twins))
    except Exception:  # a template may know the names of its tools, and raise what it likes for others
        return {}
    return {i: name for mark, (i, name) in named.items() if mark not in second}


def _renamed(call: Row, name: str) -> Row:
    function = call.get("function")
    return {**call, "function": {**function, "name": name}} if isinstance(function, dict) else {**call, "name": name}


def _function(call: Row) -> Row:
    named = call.get("function")
    return named if isinstance(named, dict) else call


def check_no_repr(text: str, chat: Chat, renderer: Renderer) -> None:
    """Raise `InvalidData` where a list or object of the row is printed as Python would."""
    strings = [value for value in _values([chat.messages, chat.tools, chat.variables]) if isinstance(value, str)]
    for value in _values([*renderer.given(chat), chat.tools, chat.variables]):
        printed = repr(value) if isinstance(value, (dict, list)) and value else ""
        if not printed or printed not in text or printed == json.dumps(value, ensure_ascii=False, default=str):
            continue
        if text.count(printed) > sum(string.count(printed) for string in strings):
            raise InvalidData(
                f"reading {renderer.origin}: the chat template prints {printed:.60} as Python does, which the model "
                "would learn to say. Make it a string in the row, or give a template that prints it with tojson by "
                "--chat-template FILE."
            )


def _values(value: Any) -> Iterator[Any]:
    yield value
    if isinstance(value, dict):
        for each in value.values():
            yield from _values(each)
    elif isinstance(value, list):
        for each in value:
            yield from _values(each)
