"""Samples of data beside a cache: rows cut as the cache's were, or the cache's own.

Owns how many tokens a sample has, and what is said of rows that were cut, for every job that reads text. Must not know
models.
"""

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from logitcache.data.rows import NamedRows
from logitcache.data.samples import Sample, make_samples
from logitcache.data.settings import DEFAULT, DataSettings
from logitcache.storage import LogitCache, data_samples

from .targets import said_of, samples_named

DEFAULT_MAX_LENGTH = 1024
"""Tokens a sample of data that no cache goes with."""


def samples_for(
    rows: NamedRows | None,
    cache: LogitCache | None,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    max_length: int | None = None,
    on_message: Callable[[str], None] = lambda _: None,
    how: DataSettings = DEFAULT,
) -> list[Sample]:
    """The samples of rows, or without rows those of the cache's data sets.

    max_length: tokens a sample, for rows; None: as many as the cache's have, or `DEFAULT_MAX_LENGTH` without one.
    vocab_size: of the model that reads them. how: what of each row is learnt. on_message is told how they were
    rendered, how many were cut, or which data sets they are of.
    Raises what reading data and the cache raises; ValueError where there is neither.
    """
    if rows is None:
        if cache is None:
            raise ValueError("samples are of rows or of a cache: give one of them")
        named = data_samples(cache)
        on_message(said_of(cache, named))
        return samples_named(cache, named)
    length = max_length or (DEFAULT_MAX_LENGTH if cache is None else cache.manifest.capture.max_length)
    found = make_samples(rows, tokenizer, length, vocab_size, how)
    for note in found.notes:
        on_message(note)
    if found.num_truncated:
        on_message(f"{found.num_truncated:,} rows were cut to {length} tokens.")
    return found.samples
