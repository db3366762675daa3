"""Which chat template renders the chats of a data set, and its digest.

Owns the choice: a template with generation markers as it is; one without as it is too, if the beginnings of chats that
it renders tell the assistant's turns as TRL does; else TRL's training template of its family, where TRL is installed
and knows it. Must not know tokens or files of data, nor how turns are told (`chat_rendering`).
"""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, meta
from transformers import PreTrainedTokenizerBase

from logitcache.errors import InputNotFound, InvalidData
from logitcache.storage.identity import digest_json

from .chat_rendering import Rendered, Renderer, Spans, Template, has_markers, parse
from .chat_rows import Chat, check_variables
from .files import Row
from .settings import DEFAULT, DataSettings

_DEFAULT, _FOR_TOOLS = "default", "tool_use"
"""Names that templates have where a tokenizer has several."""

_REPLACED = (
    "Chats are rendered with TRL's training template for this model's family, in place of the tokenizer's, which does "
    "not say what is the assistant's: the same tokens are learnt as by TRL with assistant_only_loss."
)

_NO_TOOLS = "Rows have tools, which the chat template does not show: their samples are those of rows without."

_Special = tuple[tuple[str, Any], ...]
"""Names and values of special tokens, to be looked up by."""


@dataclass(frozen=True)
class ChatTemplates:
    """The templates of a tokenizer, as `DataSettings` have it: by their names, or one named "default"."""

    named: dict[str, Template]
    #: What is the same for chats that are rendered alike; "" where there is no template.
    digest: str
    #: Given to the template besides each chat.
    variables: dict[str, Any]

    def notes(self, with_tools: bool) -> list[str]:
        """What the user is told of a chat with or without tools, once."""
        name = _FOR_TOOLS if with_tools and _FOR_TOOLS in self.named else _DEFAULT
        template = self.named[name]
        replaced = [_REPLACED] if template.is_training else []
        return [*replaced, _NO_TOOLS] if with_tools and not template.shows_tools else replaced

    def choose(self, chat: Chat, origin: str) -> Template:
        """The template of a chat: that for tools where it has some, else the default. Raises `InvalidData`."""
        if chat.tools is not None and _FOR_TOOLS in self.named:
            return self.named[_FOR_TOOLS]
        if _DEFAULT in self.named:
            return self.named[_DEFAULT]
        if not self.named:
            raise InvalidData(
                f"reading {origin}: it holds messages, but the tokenizer has no chat template. Give one with "
                "--chat-template FILE."
            )
        raise InvalidData(
            f"reading {origin}: the tokenizer has the chat templates {', '.join(sorted(self.named))}, none of them "
            f"{_DEFAULT!r}. Give one with --chat-template FILE."
        )


def template_digests(tokenizer: PreTrainedTokenizerBase | None, how: DataSettings = DEFAULT) -> frozenset[str]:
    """Digests that samples rendered with a tokenizer may have, whatever of them is learnt."""
    return frozenset(template_digest(tokenizer, replace(how, supervise=what)) for what in ("assistant", "all")) - {""}


def template_digest(tokenizer: PreTrainedTokenizerBase | None, how: DataSettings = DEFAULT) -> str:
    """Digest of the chat templates with which the data of these settings are rendered; "" where there is none."""
    return "" if tokenizer is None else chat_templates(tokenizer, how).digest


def chat_templates(tokenizer: PreTrainedTokenizerBase, how: DataSettings) -> ChatTemplates:
    """The templates of a tokenizer, or of `how`'s file. Raises `InputNotFound` and `InvalidData` for what `how` says.

    Those that cannot be parsed are kept as they are: a row that is rendered with one says what is wrong.
    """
    given = _from_file(how.chat_template) if how.chat_template else tokenizer.chat_template
    variables = _variables(how.chat_template_kwargs)
    if given is None:
        return ChatTemplates({}, "", variables)
    texts = given if isinstance(given, dict) else {_DEFAULT: given}
    named = {name: _effective(text, tokenizer, how.supervise != "all") for name, text in texts.items()}
    _check_read(variables, named)
    effective: Any = {name: template.text for name, template in named.items()}
    if not isinstance(given, dict):
        effective = effective[_DEFAULT]
    digest = digest_json([effective, variables] if variables else effective)
    return ChatTemplates(named, digest, variables)


def _from_file(name: str) -> str:
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise InputNotFound(
            f"reading --chat-template {name!r}: expected a Jinja file, found none that can be read "
            f"({error.strerror}). Check the path."
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidData(f"reading --chat-template {name!r}: it is not UTF-8. Save it as UTF-8.") from error


def _variables(text: str) -> dict[str, Any]:
    if not text:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InvalidData(
            f"reading --chat-template-kwargs: expected a JSON object, found {text!r:.80}. "
            """Write it as '{"enable_thinking": false}'."""
        )
    check_variables(found, "reading --chat-template-kwargs")
    return found


def _check_read(variables: dict[str, Any], named: dict[str, Template]) -> None:
    """Raise `InvalidData` for a variable of the command line that no template reads."""
    read = {"documents"}
    for template in named.values():
        try:
            read |= meta.find_undeclared_variables(parse(template.text))
        except TemplateError:
            return  # a row that is rendered with it says what is wrong
    ignored = sorted(variables.keys() - read)
    if ignored:
        raise InvalidData(
            f"reading --chat-template-kwargs: the chat template does not read {ignored[0]!r}, so it would change "
            f"nothing. Leave it out, or check its spelling: the template reads {', '.join(sorted(read))}."
        )


def _effective(text: Any, tokenizer: PreTrainedTokenizerBase, needs_turns: bool) -> Template:
    """The template of a text, or what stands in for it. needs_turns: whether the assistant's turns must be told."""
    if not isinstance(text, str):
        raise InvalidData(f"reading the tokenizer's chat template: expected text, found {type(text).__name__}.")
    special = tuple(special_tokens(tokenizer).items())
    own = _looked_at(text, special)
    if not needs_turns or own.has_markers:
        return own
    training = _training_template(text, tokenizer)
    if training is None or _turns_agree(text, training, special):
        return own
    return replace(_looked_at(training, special), is_training=True)


@lru_cache(maxsize=64)
def _looked_at(text: str, special: _Special) -> Template:
    try:
        own = Template(text, has_markers(text))
    except TemplateError:  # a row that is rendered with it says what is wrong
        return Template(text, has_markers=False)
    turns = [{"role": "user", "content": "firstprobe"}, {"role": "assistant", "content": "secondprobe"}]
    tool = {"type": "function", "function": {"name": "toolprobe", "description": "probe", "parameters": {}}}

    def shows(template: Template, tools: list[Row] | None, words: list[str]) -> bool:
        try:
            found = Renderer(template, dict(special), "a probe").text(Chat(turns, tools, {}))
        except Exception:  # whatever the author of a template likes
            return False
        return all(word in found for word in words)

    said, in_parts = [turn["content"] for turn in turns], replace(own, takes_parts=True)
    own = in_parts if not shows(own, None, said) and shows(in_parts, None, said) else own
    return replace(own, shows_tools=shows(own, [tool], ["toolprobe"]))


@lru_cache(maxsize=64)
def _turns_agree(text: str, training: str, special: _Special) -> bool:
    """Whether prefixes tell of every probe what the markers of TRL's training template tell."""
    own, theirs = _looked_at(text, special), _looked_at(training, special)
    return all(_told(own, chat, special) == _told(theirs, chat, special) for chat in _probes())


def _probes() -> Iterator[Chat]:
    """Chats in which templates differ: turns that later ones follow, with reasoning, with a call."""
    call = {"type": "function", "function": {"name": "probe", "arguments": {"key": "value"}}}
    user, said = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
    reasoned = {**said, "reasoning_content": "reason", "thinking": "reason"}
    thought = {**said, "content": "<think>\nreason\n</think>\n\nanswer"}
    calling = {**said, "content": "", "tool_calls": [call]}
    for first in (said, reasoned, thought):
        yield Chat([user, first, user, said], None, {})
    yield Chat([user, calling, {"role": "tool", "name": "probe", "content": "result"}, said], None, {})


def _told(template: Template, chat: Chat, special: _Special) -> Rendered | None:
    """The chat with what is the assistant's, adjoining spans as one; None where the template refuses it."""
    try:
        found = Renderer(template, dict(special), "a probe").rendered(chat)
    except Exception:  # whatever the author of a template likes
        return None
    joined: Spans = []
    for start, stop in found.spans:
        before = joined.pop() if joined and joined[-1][1] == start else (start, start)
        joined.append((before[0], stop))
    return Rendered(found.text, joined)


def _training_template(text: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """TRL's training template for a template it knows, None for others and where TRL is not installed."""
    if find_spec("trl") is None:
        return None
    from trl.chat_template_utils import get_training_chat_template

    asked = copy.copy(tokenizer)
    asked.chat_template = text
    try:
        found = get_training_chat_template(asked)
    except Exception:  # ValueError for one that it does not know, others where the template rejects TRL's probes
        return None
    return None if found is None else str(found)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The special tokens that a template may name, by their names."""
    known = tokenizer.special_tokens_map.items()
    return {name: tuple(map(str, token)) if isinstance(token, (list, tuple)) else str(token) for name, token in known}
