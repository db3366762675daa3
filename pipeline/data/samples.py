"""Rows of a data set -> token ids and which of them are supervised.

Owns how text becomes tokens: the rules below are those of TRL's SFTTrainer, so that the same rows give the same samples
there. Must not know models or caches. Position t predicts token t+1; `supervised[t]` says that token t is a label.

- `input_ids` (+ `labels`, -100 where not supervised; or TRL's `completion_mask`, `assistant_masks`): as they are
- `messages`: the tokenizer's chat template; assistant turns are supervised
- `prompt` + `completion`: tokenized together, the end-of-text token added; the completion is supervised
- `text`: the end-of-text token added; everything is supervised
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from logitcache.errors import InvalidData

Row = dict[str, Any]
IGNORED = -100


@dataclass(frozen=True)
class Sample:
    """A token sequence and its labels. token_ids: uint32 [n]; supervised: bool [n], token t is a label; origin: where
    it comes from, for messages; num_tokens_cut: what truncation took off its end."""

    token_ids: NDArray[np.uint32]
    supervised: NDArray[np.bool_]
    origin: str
    num_tokens_cut: int = 0

    @cached_property
    def positions(self) -> NDArray[np.int32]:
        """Positions whose next token is supervised, ascending. The first token is never a label."""
        return np.flatnonzero(self.supervised[1:]).astype(np.int32)


@dataclass(frozen=True)
class SampleSet:
    """The samples of a data set, in its order, and what was done to get them."""

    samples: list[Sample]
    num_rows: int
    num_truncated: int
    num_tokens_cut: int
    num_without_labels: int
    """Rows that truncation left without a supervised token; they are not among the samples."""


@dataclass(frozen=True)
class PaddedBatch:
    """input_ids, attention_mask: [B, T], padded on the right; rows: [N] of the flattened [B * T] that predict a
    supervised token; label_ids: [N], that token."""

    input_ids: Tensor
    attention_mask: Tensor
    rows: Tensor
    label_ids: Tensor


def make_samples(
    rows: Iterable[tuple[str, Row]], tokenizer: PreTrainedTokenizerBase | None, max_length: int, vocab_size: int
) -> SampleSet:
    """Samples of (origin, row) pairs. Raises `InvalidData`, naming the row, and where nothing is supervised at all."""
    found = read_samples(rows, tokenizer, max_length, vocab_size)
    check_samples_left(found.num_rows, len(found.samples), max_length)
    return found


def read_samples(
    rows: Iterable[tuple[str, Row]], tokenizer: PreTrainedTokenizerBase | None, max_length: int, vocab_size: int
) -> SampleSet:
    """`make_samples` of a part of a data set, in which nothing may be left. Raises `InvalidData`, naming the row."""
    samples: list[Sample] = []
    num_rows = num_truncated = num_cut = num_without = 0
    for origin, row in rows:
        num_rows += 1
        token_ids, supervised = _tokenize(row, tokenizer, origin)
        _check_tokens(token_ids, supervised, vocab_size, origin)
        cut = max(0, len(token_ids) - max_length)
        num_truncated, num_cut = num_truncated + (cut > 0), num_cut + cut
        sample = Sample(token_ids[:max_length].astype(np.uint32), supervised[:max_length], origin, cut)
        if len(sample.positions):
            samples.append(sample)
        else:
            num_without += 1
    return SampleSet(samples, num_rows, num_truncated, num_cut, num_without)


def check_samples_left(num_rows: int, num_samples: int, max_length: int) -> None:
    """Raise `InvalidData` where a data set has no row, or none with a supervised token."""
    if not num_rows:
        raise InvalidData("reading data: expected at least one row, found none.")
    if not num_samples:
        raise InvalidData(
            f"reading data: no supervised token is left in any of {num_rows} rows after truncation to {max_length} "
            "tokens. Use a larger --max-length."
        )


def pad_batch(batch: Sequence[Sample], device: torch.device | str = "cpu") -> PaddedBatch:
    """Samples side by side, padded on the right with token 0, which the attention mask hides."""
    length = max(len(s.token_ids) for s in batch)
    input_ids = np.zeros((len(batch), length), dtype=np.int64)
    mask = np.zeros((len(batch), length), dtype=np.int64)
    for i, sample in enumerate(batch):
        input_ids[i, : len(sample.token_ids)] = sample.token_ids
        mask[i, : len(sample.token_ids)] = 1
    rows = np.concatenate([i * length + s.positions.astype(np.int64) for i, s in enumerate(batch)])
    labels = np.concatenate([s.token_ids[s.positions + 1] for s in batch]).astype(np.int64)
    return PaddedBatch(*(torch.from_numpy(a).to(device) for a in (input_ids, mask, rows, labels)))


def pad_samples(samples: Sequence[Sample], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Samples as any collator would have them: input_ids, attention_mask and labels, int64 [B, T]."""
    padded = pad_batch(samples, device)
    labels = torch.full_like(padded.input_ids, IGNORED)
    labels.view(-1)[padded.rows + 1] = padded.label_ids
    return {"input_ids": padded.input_ids, "attention_mask": padded.attention_mask, "labels": labels}


def _tokenize(
    row: Row, tokenizer: PreTrainedTokenizerBase | None, origin: str
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    if row.get("input_ids") is not None:
        return _from_ids(row, origin)
    if tokenizer is None:
        raise InvalidData(f"reading {origin}: it holds text, but the model's folder has no tokenizer.")
    if row.get("messages") is not None:
        if row.get("tools"):
            raise InvalidData(
                f"reading {origin}: it holds tools, which are not rendered here: the model would learn to call what it "
                "was not shown. Render the rows into input_ids and labels, or remove the field."
            )
        return _from_messages(row["messages"], tokenizer, origin)
    if row.get("prompt") is not None and row.get("completion") is not None:
        return _from_completion(row["prompt"], row["completion"], tokenizer, origin)
    if row.get("text") is not None:
        return _from_text(row["text"], tokenizer, origin)
    raise InvalidData(
        f"reading {origin}: expected text, prompt + completion, messages or input_ids, found {sorted(row)}. "
        "Rename the fields of the data."
    )


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
    if not isinstance(text, str) or not text:
        raise InvalidData(f"reading {origin}: expected a non-empty string in 'text', found {text!r:.60}.")
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
    start = _common_prefix(_encode(prompt, tokenizer, origin), whole)
    return whole, np.arange(len(whole)) >= start


def _from_messages(
    messages: Any, tokenizer: PreTrainedTokenizerBase, origin: str
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
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


def _render(
    messages: list[Row], tokenizer: PreTrainedTokenizerBase, origin: str
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    if "{% generation" in str(tokenizer.chat_template) or "{%- generation" in str(tokenizer.chat_template):
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


def _encode(text: str, tokenizer: PreTrainedTokenizerBase, origin: str) -> NDArray[np.int64]:
    try:
        return np.array(tokenizer(text, truncation=False, verbose=False)["input_ids"], dtype=np.int64)
    except (TypeError, UnicodeEncodeError) as error:  # JSON can hold half of a surrogate pair, no encoding can
        raise InvalidData(f"reading {origin}: its text is not valid Unicode. Repair or remove the row.") from error


def _with_end(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    end = tokenizer.eos_token
    return text if end is None or text.endswith(end) else text + end


def _integers(values: Any, name: str, origin: str) -> NDArray[np.int64]:
    try:
        array = np.asarray(values)
    except ValueError:  # lists of different lengths
        array = np.asarray([], dtype=object)
    if array.ndim != 1 or array.dtype.kind not in "iu" or not len(array):
        raise InvalidData(f"reading {origin}: expected a list of integers in {name!r}, found {values!r:.60}.")
    return array.astype(np.int64)


def _check_tokens(token_ids: NDArray[np.int64], supervised: NDArray[np.bool_], vocab_size: int, origin: str) -> None:
    if token_ids.min(initial=0) < 0 or token_ids.max(initial=0) >= vocab_size:
        bad = token_ids[(token_ids < 0) | (token_ids >= vocab_size)][0]
        raise InvalidData(
            f"reading {origin}: token id {bad} is outside the model's vocabulary of {vocab_size}. "
            "The data were tokenized for another model."
        )
    if not supervised[1:].any():
        raise InvalidData(
            f"reading {origin}: no supervised token ({len(token_ids)} tokens; the first is never a label). "
            "Remove the row."
        )


def _common_prefix(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


def _starts_with(whole: NDArray[np.int64], part: NDArray[np.int64]) -> bool:
    return _common_prefix(whole, part) == len(part)


def distinct(samples: Iterable[Sample]) -> Iterator[Sample]:
    """The different token sequences among the samples, in order; equal ones become one with the union of labels."""
    merged: dict[bytes, Sample] = {}
    for sample in samples:
        key = sample.token_ids.tobytes()
        seen = merged.get(key)
        if seen is None:
            merged[key] = sample
        elif not np.array_equal(seen.supervised, sample.supervised):
            merged[key] = Sample(
                seen.token_ids,
                seen.supervised | sample.supervised,
                seen.origin,
                max(seen.num_tokens_cut, sample.num_tokens_cut),
            )
    yield from merged.values()
