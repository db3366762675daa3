"""A chat -> the text that a template makes of it, and where the assistant's turns stand in that text.

Owns the two ways to tell: the template's generation markers, or the beginnings of the chat that it renders. Must not
know which template is chosen, tokens, or files.
"""

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from jinja2 import nodes
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from logitcache.errors import InvalidData, install_line

from .chat_rows import Chat, first_turns
from .files import Row

Spans = list[tuple[int, int]]
"""Ranges of characters, ascending, each [start, stop)."""

ADVICE = "Give a template with {% generation %} markers by --chat-template FILE, or give input_ids and labels."
"""The way out where a chat template does not say what is the assistant's."""

_NEEDS_TRL = f"{install_line('trl')} brings training templates of the known model families. "


@dataclass(frozen=True)
class Template:
    """A chat template as the chats of a data set are rendered with it."""

    text: str
    #: Whether generation markers say what is an assistant's.
    has_markers: bool
    #: Whether it wants content as a list of parts, and renders nothing of a string.
    takes_parts: bool = False
    #: Whether it shows the tools that a chat comes with.
    shows_tools: bool = False
    #: Whether TRL's training template stands in for the tokenizer's.
    is_training: bool = False


@dataclass(frozen=True)
class Rendered:
    """A chat as its template has it."""

    text: str
    #: What is the assistant's, ascending; several may be of one turn.
    spans: Spans


@dataclass(frozen=True)
class Renderer:
    """A template with the special tokens that it may name. Its methods raise what the template raises: it is a program
    of the model's author, and may raise anything."""

    template: Template
    #: By their names, such as bos_token.
    special_tokens: dict[str, Any]
    #: Where the chat comes from, for messages.
    origin: str

    def text(self, chat: Chat, generation_prompt: bool = False) -> str:
        """The text of a chat; generation_prompt: with what begins the assistant's next turn."""
        return self._render(chat, generation_prompt, markers=False).text

    def rendered(self, chat: Chat) -> Rendered:
        """The text with what is the assistant's. Raises `InvalidData` where the template does not let that be told."""
        if self.template.has_markers:
            return self._render(chat, False, markers=True)
        text = self.text(chat)
        turns = (i for i, turn in enumerate(chat.messages) if turn["role"] == "assistant")
        return Rendered(text, [self._by_prefix(i, text, chat) for i in turns])

    def given(self, chat: Chat) -> list[Row]:
        """The turns as the template is given them."""
        if not self.template.takes_parts:
            return chat.messages
        return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in chat.messages]

    def _render(self, chat: Chat, generation_prompt: bool, markers: bool) -> Rendered:
        texts, spans = render_jinja_template(
            [self.given(chat)],
            tools=chat.tools,
            chat_template=self.template.text,
            return_assistant_tokens_mask=markers,
            add_generation_prompt=generation_prompt,
            **{**self.special_tokens, **chat.variables},
        )
        return Rendered(str(texts[0]), [(int(start), int(stop)) for start, stop in spans[0]] if markers else [])

    def _by_prefix(self, i: int, whole: str, chat: Chat) -> tuple[int, int]:
        """Where turn i stands: from the end of what is rendered before it, the prompt for it included, to the end of
        what is rendered with it."""
        if i == 0:
            raise InvalidData(
                f"reading {self.origin}: its messages begin with the assistant's turn, before which a chat template "
                "renders nothing. Put a system or user turn first, or give input_ids."
            )
        prompt = self.text(first_turns(chat, i), generation_prompt=True)
        start = len(prompt) if whole.startswith(prompt) else self._header_length(i, whole, prompt, chat)
        after = self._without_closing(self.text(first_turns(chat, i + 1)), whole)
        if start is None or not whole.startswith(after):
            way = _NEEDS_TRL if find_spec("trl") is None else ""
            raise InvalidData(
                f"reading {self.origin}: the chat template renders turn {i} differently once later turns follow, so "
                f"the assistant's tokens cannot be told. {way}{ADVICE}"
            )
        return start, len(after)

    def _header_length(self, i: int, whole: str, prompt: str, chat: Chat) -> int | None:
        """How much stands before turn i where its prompt is not how the turn begins: what the two have in common, and
        no more than what any two answers have; None where the turns before it are rendered otherwise."""
        before = first_turns(chat, i)
        if not whole.startswith(self._without_closing(self.text(before), whole)):
            return None
        answers = ({"role": "assistant", "content": said} for said in ("one", "two"))
        texts = [self.text(replace(chat, messages=[*before.messages, answer])) for answer in answers]
        return min(_common_length(prompt, whole), _common_length(*texts))

    def _without_closing(self, part: str, whole: str) -> str:
        """A rendered beginning of a chat without a special token that only closes chats, and the whole lacks there."""
        if whole.startswith(part):
            return part
        closings = [token for token in self.special_tokens.values() if isinstance(token, str)]
        shorter = [part.removesuffix(token) for token in closings]
        return next((text for text in shorter if whole.startswith(text)), part)


def _common_length(a: str, b: str) -> int:
    differs = (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differs, min(len(a), len(b)))


def has_markers(text: str) -> bool:
    """Whether a template has a generation block. Raises jinja2's `TemplateError` where it cannot be parsed."""
    return any(True for _ in parse(text).find_all(nodes.ExtensionAttribute))  # no other tag there makes one


def parse(text: str) -> nodes.Template:
    """A template's tree, by the environment that renders it, which knows the generation tag."""
    found: nodes.Template = _compile_jinja_template(text).environment.parse(text)
    return found
