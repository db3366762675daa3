"""One row of a data set -> token ids and which of them are supervised.

Owns how text becomes tokens: the rules are those of TRL's SFTTrainer, so that the same rows give the same samples
there. Must not know files, models or caches.

- `input_ids` (+ `labels`, -100 where not supervised; or TRL's `completion_mask`, `assistant_masks`): as they are
- `messages`, `conversations`, or `prompt` + `completion` of turns: the chat template; assistant turns are supervised,
  of a completion only its own (`chat_rows`, `chat_templates`, `chat_tokens`)
- `prompt` + `completion`: tokenized together, the end-of-text token added; the completion is supervised
- `text`: the end-of-text token added; everything is supervised
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from logitcache.errors import InvalidData

from .chat_rows import is_chat, read_chat
from .chat_templates import ChatTemplates, chat_templates
from .chat_tokens import chat_tokens, common_prefix
from .files import IGNORED, Row
from .settings import DEFAULT, DataSettings

WEIGHTS = ("loss_scale", "weights")
"""Columns with a weight a token, by ms-swift's name and others'."""


def tokenize_row(
    row: Row,
    tokenizer: PreTrainedTokenizerBase | None,
    origin: str,
    templates: ChatTemplates | None = None,
    how: DataSettings = DEFAULT,
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Token ids [n] of a row, and which of them are supervised [n]. Raises `InvalidData`, naming the origin.

    templates: of the tokenizer, for `how`; made here where they are not given.
    """
    if row.get("input_ids") is not None:
        return _from_ids(row, origin)
    if tokenizer is None:
        raise InvalidData(f"reading {origin}: it holds text, but the model's folder has no tokenizer.")
    if is_chat(row):
        templates = chat_templates(tokenizer, how) if templates is None else templates
        chat = read_chat(row, templates.variables, origin)
        return chat_tokens(chat, templates.choose(chat, origin), tokenizer, how.supervise, origin)
    if row.get("prompt") is not None and row.get("completion") is not None:
        return _from_completion(row["prompt"], row["completion"], tokenizer, origin)
    if row.get("text") is not None:
        return _from_text(row["text"], tokenizer, origin)
    raise InvalidData(
        f"reading {origin}: expected text, prompt + completion, messages or input_ids, found {sorted(row)}. "
        "Rename the fields of the data."
    )


def row_weights(row: Row, num_tokens: int, origin: str) -> NDArray[np.float32] | None:
    """The weight of each token that a row brings (`loss_scale`, or `weights`), [n]; None where it brings none.

    A number counts for every token; a list, which only a row of `input_ids` can have, has one a token, aligned as its
    labels are. Raises `InvalidData`, naming the origin.
    """
    named = [name for name in WEIGHTS if row.get(name) is not None]
    if not named:
        return None
    if len(named) > 1:
        raise InvalidData(f"reading {origin}: it has both {' and '.join(named)}: two weights a token. Leave one out.")
    value = row[named[0]]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        weights = np.full(num_tokens, value, dtype=np.float32)
    elif row.get("input_ids") is not None:
        weights = _floats(value)
    else:
        return None
    if weights.shape != (num_tokens,) or not np.isfinite(weights).all() or (weights < 0).any():
        raise InvalidData(
            f"reading {origin}: expected a number of 0 or more for each of its {num_tokens} tokens in {named[0]!r}, or "
            f"one number for all, found {value!r:.60}. Repair or remove the field."
        )
    return weights


def _floats(values: Any) -> NDArray[np.float32]:
    """A list of numbers; an array of no dimension for anything else."""
    numbers = isinstance(values, (list, tuple, np.ndarray)) and all(
        isinstance(v, (int, float, np.number)) and not isinstance(v, bool) for v in values
    )
    return np.asarray(values if numbers else np.nan, dtype=np.float32)


def _from_ids(row: Row, origin: str) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    token_ids = _integers(row["input_ids"], "input_ids", origin)
    if not _mask(row, "attention_mask", len(token_ids), origin).all():
        raise InvalidData(f"reading {origin}: its attention_mask hides tokens. Give input_ids without padding.")
    kept = np.ones(len(token_ids), dtype=np.bool_)
    for name in ("completion_mask", "assistant_masks"):
        kept &= _mask(row, name, len(token_ids), origin)
    if row.get("labels") is None:
        return token_ids, kept
    labels = _integers(row["labels"], "labels", origin)
    supervised = labels != IGNORED
    if labels.shape != token_ids.shape or np.any(labels[supervised] != token_ids[supervised]):
        raise InvalidData(
            f"reading {origin}: expected labels equal to input_ids (unshifted) or {IGNORED}, found others. "
            "A label here is always the next token of the sample."
        )
    return token_ids, supervised & kept


def _mask(row: Row, name: str, length: int, origin: str) -> NDArray[np.bool_]:
    """An optional column of 0 and 1, one a token; all ones where the row has none."""
    if row.get(name) is None:
        return np.ones(length, dtype=np.bool_)
    values = _integers([int(v) if isinstance(v, bool) else v for v in row[name]], name, origin)
    if values.shape != (length,) or not np.isin(values, (0, 1)).all():
        raise InvalidData(f"reading {origin}: expected a 0 or 1 for every token in {name!r}, found others.")
    return values.astype(np.bool_)


def _from_text(
    text: Any, tokenizer: PreTrainedTokenizerBase, origin: str
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    if not isinstance(text, str):
        raise InvalidData(f"reading {origin}: expected a string in 'text', found {text!r:.60}.")
    token_ids = _encode(_with_end(text, tokenizer), tokenizer, origin)
    return token_ids, np.ones(len(token_ids), dtype=np.bool_)


def _from_completion(
    prompt: Any, completion: Any, tokenizer: PreTrainedTokenizerBase, origin: str
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    for name, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, str):
            raise InvalidData(
                f"reading {origin}: expected a string in {name!r}, found {value!r:.60}. Put chat turns into 'messages'."
            )
    if not completion:
        raise InvalidData(f"reading {origin}: its completion is empty: there is nothing to learn. Remove the row.")
    whole = _encode(prompt + _with_end(completion, tokenizer), tokenizer, origin)
    start = common_prefix(_encode(prompt, tokenizer, origin), whole)
    return whole, np.arange(len(whole)) >= start


def _encode(text: str, tokenizer: PreTrainedTokenizerBase, origin: str) -> NDArray[np.int64]:
    try:
        return np.array(tokenizer(text, truncation=False, verbose=False)["input_ids"], dtype=np.int64)
    except (TypeError, UnicodeEncodeError) as error:  # JSON can hold half of a surrogate pair, no encoding can
        raise InvalidData(f"reading {origin}: its text is not valid Unicode. Repair or remove the row.") from error


def _with_end(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    end = tokenizer.eos_token
    return text if end is None or text.endswith(end) else text + end


def _integers(values: Any, name: str, origin: str) -> NDArray[np.int64]:
    if isinstance(values, list) and not values:
        return np.zeros(0, dtype=np.int64)
    try:
        array = np.asarray(values)
    except ValueError:  # lists of different lengths
        array = np.asarray([], dtype=object)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InvalidData(f"reading {origin}: expected a list of integers in {name!r}, found {values!r:.60}.")
    return array.astype(np.int64)


def check_row_tokens(token_ids: NDArray[np.int64], vocab_size: int, origin: str) -> None:
    """Raise `InvalidData` for a token outside the vocabulary."""
    if token_ids.min(initial=0) < 0 or token_ids.max(initial=0) >= vocab_size:
        bad = token_ids[(token_ids < 0) | (token_ids >= vocab_size)][0]
        raise InvalidData(
            f"reading {origin}: token id {bad} is outside the model's vocabulary of {vocab_size}. "
            "The data were tokenized for another model."
        )
