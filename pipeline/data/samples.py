"""Samples: token ids and which of them are supervised, of the rows of a data set or a part of it.

Owns truncation, what is left of a data set after it, and that equal token sequences are one sample. Must not know
models or caches. Position t predicts token t+1; `supervised[t]` says that token t is a label.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from logitcache.errors import InvalidData

from .chat_rows import has_tools, is_chat, unread_beside
from .chat_templates import ChatTemplates, chat_templates
from .files import Row
from .rows import Skipped
from .settings import DEFAULT, DataSettings
from .tokenize import check_row_tokens, row_weights, tokenize_row


@dataclass(frozen=True)
class Sample:
    """A token sequence and its labels."""

    #: uint32 [n].
    token_ids: NDArray[np.uint32]
    #: bool [n], token t is a label.
    supervised: NDArray[np.bool_]
    #: Where it comes from, for messages.
    origin: str
    #: What truncation took off its end.
    num_tokens_cut: int = 0
    #: Digest of the chat template that rendered it, "" where none did.
    chat_template: str = ""
    #: float32 [n], of the cross-entropy of each token as a label, where the row brings them.
    weights: NDArray[np.float32] | None = None

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
    num_unlabelled: int = 0
    """Rows that had none before: labels of -100 alone, or no text. They are not among the samples either."""
    skipped: tuple[Skipped, ...] = ()
    """Rows that cannot be used, where the settings say to go on without them."""
    notes: tuple[str, ...] = ()
    """What the user is told of how the rows were read."""


def make_samples(
    rows: Iterable[tuple[str, Row | Skipped]],
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    vocab_size: int,
    how: DataSettings = DEFAULT,
) -> SampleSet:
    """Samples of (origin, row) pairs. Raises `InvalidData`, naming the row, and where nothing is supervised at all."""
    found = read_samples(rows, tokenizer, max_length, vocab_size, how)
    check_samples_left(found.num_rows, len(found.samples), max_length, found.skipped)
    return found


def read_samples(
    rows: Iterable[tuple[str, Row | Skipped]],
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    vocab_size: int,
    how: DataSettings = DEFAULT,
) -> SampleSet:
    """`make_samples` of a part of a data set, in which nothing may be left. Raises `InvalidData`, naming the row."""
    samples: list[Sample] = []
    skipped: list[Skipped] = []
    templates: ChatTemplates | None = None  # made for the first chat: looking at them may import TRL
    notes: dict[str, None] = {}
    num_rows = num_truncated = num_cut = num_without = num_unlabelled = 0
    for origin, row in rows:
        num_rows += 1
        if isinstance(row, Skipped):
            skipped.append(row)
            continue
        rendered = tokenizer is not None and is_chat(row)
        if rendered and templates is None:
            templates = chat_templates(tokenizer, how)
        try:
            token_ids, supervised = tokenize_row(row, tokenizer, origin, templates, how)
            check_row_tokens(token_ids, vocab_size, origin)
            weights = row_weights(row, len(token_ids), origin)
        except InvalidData as error:
            if not how.skip_bad_rows:
                raise
            skipped.append(Skipped(origin, str(error)))
            continue
        if not supervised[1:].any():
            num_unlabelled += 1
            continue
        cut = max(0, len(token_ids) - max_length)
        num_truncated, num_cut = num_truncated + (cut > 0), num_cut + cut
        kept = token_ids[:max_length].astype(np.uint32), supervised[:max_length]
        if rendered and templates is not None:
            notes.update(dict.fromkeys([*templates.notes(has_tools(row)), *unread_beside(row)]))
        template = templates.digest if rendered and templates is not None else ""
        sample = Sample(*kept, origin, cut, template, None if weights is None else weights[:max_length])
        if len(sample.positions):
            samples.append(sample)
        else:
            num_without += 1
    counts = (num_rows, num_truncated, num_cut, num_without, num_unlabelled)
    return SampleSet(samples, *counts, tuple(skipped), tuple(notes))


def check_samples_left(num_rows: int, num_samples: int, max_length: int, skipped: Sequence[Skipped] = ()) -> None:
    """Raise `InvalidData` where data have no row, or none with a supervised token. skipped: what is known of those."""
    if not num_rows:
        raise InvalidData("reading data: expected at least one row, found none.")
    if num_samples:
        return
    if skipped:
        raise InvalidData(
            f"reading data: of {num_rows:,} rows none is left, and {len(skipped):,} or more could not be used; the "
            f"first: {skipped[0].reason}"
        )
    raise InvalidData(
        f"reading data: no supervised token is left in any of {num_rows} rows after truncation to {max_length} "
        "tokens. Use a larger --max-length, or rows with labels."
    )


def distinct(samples: Iterable[Sample]) -> Iterator[Sample]:
    """The different token sequences among the samples, in order; equal ones become one with the union of labels, of a
    chat template only if all of them are. Weights are nobody's there: this is for what the base says of tokens."""
    merged: dict[bytes, Sample] = {}
    for sample in samples:
        key = sample.token_ids.tobytes()
        seen = merged.get(key)
        if seen is None:
            merged[key] = sample
        elif not np.array_equal(seen.supervised, sample.supervised) or seen.chat_template != sample.chat_template:
            merged[key] = Sample(
                seen.token_ids,
                seen.supervised | sample.supervised,
                seen.origin,
                max(seen.num_tokens_cut, sample.num_tokens_cut),
                seen.chat_template if seen.chat_template == sample.chat_template else "",
            )
    yield from merged.values()
