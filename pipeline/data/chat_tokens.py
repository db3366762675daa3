"""A chat -> token ids and which of them are learnt, by its template.

Owns what of a chat is learnt (`--supervise`), and the way from characters to tokens: by the offsets of the tokens, not
by the masks of transformers, which differ between its versions. Must not know files or caches.
"""

import numpy as np
from jinja2 import TemplateSyntaxError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from logitcache.errors import InvalidData

from .chat_rendering import Renderer, Spans, Template
from .chat_rows import Chat, check_learnt, first_turns
from .chat_templates import special_tokens
from .chat_turns import check_calls, check_no_repr, spans_by_turn
from .settings import Supervise


def chat_tokens(
    chat: Chat, template: Template, tokenizer: PreTrainedTokenizerBase, supervise: Supervise, origin: str
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Token ids [n] of a chat, and which of them are learnt [n]. Raises `InvalidData`, naming the origin."""
    learnt = [i for i, turn in enumerate(chat.messages) if turn["role"] == "assistant" and i >= chat.num_prompt]
    if not learnt and supervise != "all":
        raise InvalidData(
            f"reading {origin}: no turn of its messages is the assistant's: nothing is supervised. Remove the row, or "
            "name the speaker 'assistant'."
        )
    chosen = learnt[-1:] if supervise == "last" else learnt
    for i in chosen if supervise != "all" else ():
        check_learnt(chat.messages[i], f"reading {origin}: turn {i} of its messages")
    renderer = Renderer(template, special_tokens(tokenizer), origin)
    try:
        text, turns, prompt = _rendered(chat, renderer, supervise)
    except InvalidData:
        raise
    except Exception as error:  # a template is a program of the model's author and raises what it likes
        said = " ".join(str(error).split())
        if isinstance(error, TemplateSyntaxError):
            raise InvalidData(
                f"reading {origin}: the chat template cannot be parsed (line {error.lineno}: {said}), so it renders no "
                "chat. Repair it, or give another by --chat-template FILE."
            ) from error
        raise InvalidData(
            f"reading {origin}: the chat template refuses its messages ({said}). Change the row, or give a template "
            "that takes it by --chat-template FILE."
        ) from error
    check_no_repr(text, chat, renderer)
    check_calls(text, turns, chat, renderer)
    ids, offsets = _encode(text, tokenizer, origin)
    if supervise == "all":
        return ids, np.ones(len(ids), dtype=np.bool_)
    supervised = _overlapping(offsets, [span for i in chosen for span in turns[i]])
    if prompt:
        supervised[: common_prefix(_encode(prompt, tokenizer, origin)[0], ids)] = False
    return ids, supervised


def _rendered(chat: Chat, renderer: Renderer, supervise: Supervise) -> tuple[str, dict[int, Spans], str]:
    """The text of a chat, the spans of each assistant turn by its number, and the text of its prompt or ""."""
    if supervise == "all":
        return renderer.text(chat), {}, ""
    found = renderer.rendered(chat)
    prompt = renderer.text(first_turns(chat, chat.num_prompt), generation_prompt=True) if chat.num_prompt else ""
    return found.text, spans_by_turn(found, chat, renderer), prompt


def common_prefix(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """How many tokens both begin with."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


def _encode(text: str, tokenizer: PreTrainedTokenizerBase, origin: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids [n], and of which characters each is [n, 2]."""
    if not tokenizer.is_fast:
        raise InvalidData(
            f"reading {origin}: the tokenizer is a slow one, which does not say of which characters a token is, so "
            "the assistant's tokens cannot be told. Use the model's fast tokenizer (tokenizer.json), or give input_ids."
        )
    try:
        encoded = tokenizer(
            text, add_special_tokens=False, truncation=False, return_offsets_mapping=True, verbose=False
        )
    except (TypeError, UnicodeEncodeError) as error:  # JSON can hold half of a surrogate pair, no encoding can
        raise InvalidData(f"reading {origin}: its text is not valid Unicode. Repair or remove the row.") from error
    offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    return np.array(encoded["input_ids"], dtype=np.int64), offsets


def _overlapping(offsets: NDArray[np.int64], spans: Spans) -> NDArray[np.bool_]:
    """Which tokens share a character with a span."""
    found = np.zeros(len(offsets), dtype=np.bool_)
    for start, stop in spans:
        found |= (offsets[:, 0] < stop) & (offsets[:, 1] > start)
    return found
