"""Chats -> token ids and which of them are an assistant's, by the tokenizer's own chat template.

Owns how assistant turns are told: by the template's generation markers, or else by the prefixes that it renders. Must
not know files, models or caches.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from logitcache.errors import InvalidData
from logitcache.storage.identity import digest_json

from .files import Row


def from_messages(
    messages: Any, tokenizer: PreTrainedTokenizerBase, origin: str
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Token ids [n] of a chat, and which of them are an assistant's [n]. Raises `InvalidData`, naming the origin."""
    if not (isinstance(messages, list) and messages and all(isinstance(m, dict) and "role" in m for m in messages)):
        raise InvalidData(f"reading {origin}: expected a list of {{role, content}} in 'messages'.")
    if tokenizer.chat_template is None:
        raise InvalidData(f"reading {origin}: it holds messages, but the tokenizer has no chat template.")
    if not any(m["role"] == "assistant" for m in messages):
        raise InvalidData(f"reading {origin}: no turn of its messages is the assistant's: nothing is supervised.")
    try:
        return _render(messages, tokenizer, origin)
    except InvalidData:
        raise
    except Exception as error:  # a template is a program of the model's author and raises what it likes
        said = " ".join(str(error).split())
        raise InvalidData(f"reading {origin}: the chat template refuses its messages ({said}).") from error


def template_digest(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Digest of its chat template, or of all that it has by their names; "" where it has none."""
    if tokenizer is None or tokenizer.chat_template is None:
        return ""
    return digest_json(tokenizer.chat_template)


def _render(
    messages: list[Row], tokenizer: PreTrainedTokenizerBase, origin: str
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    if "{% generation" in str(tokenizer.chat_template) or "{%- generation" in str(tokenizer.chat_template):
        if not tokenizer.is_fast:
            raise InvalidData(
                f"reading {origin}: the chat template marks the assistant's turns by their characters, and the "
                f"tokenizer ({type(tokenizer).__name__}) is a slow one, which does not say which tokens these are. "
                "Nothing would be supervised. Use a tokenizer with tokenizer.json, or a --chat-template without "
                "generation markers."
            )
        encoded = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return np.array(encoded["input_ids"]), np.array(encoded["assistant_masks"], dtype=np.bool_)
    whole = _chat_ids(messages, tokenizer)
    supervised = np.zeros(len(whole), dtype=np.bool_)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if i == 0:
            raise InvalidData(
                f"reading {origin}: its messages begin with the assistant's turn, before which a chat template renders "
                "nothing. Put a system or user turn first, or give input_ids."
            )
        before = _chat_ids(messages[:i], tokenizer, add_generation_prompt=True)
        after = _chat_ids(messages[: i + 1], tokenizer)
        if not (_starts_with(whole, before) and _starts_with(whole, after)):
            raise InvalidData(
                f"reading {origin}: the chat template renders turn {i} differently once later turns follow, so the "
                "assistant's tokens cannot be told. Use a template with {% generation %} markers, or give input_ids."
            )
        supervised[len(before) : len(after)] = True
    return whole, supervised


def _chat_ids(
    messages: list[Row], tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = False
) -> NDArray[np.int64]:
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=add_generation_prompt
    )
    return np.array(encoded["input_ids"], dtype=np.int64)


def _starts_with(whole: NDArray[np.int64], part: NDArray[np.int64]) -> bool:
    return common_prefix(whole, part) == len(part)


def common_prefix(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """How many tokens both begin with."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n
