"""Samples of data beside a cache: rows cut as the cache's were, or the cache's own.

Owns how many tokens a sample has, and what is said of rows that were cut, for every job that reads text; and that the
weights that rows bring are read, or refused. Must not know models.
"""

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from logitcache.data.rows import NamedRows
from logitcache.data.samples import Sample, make_samples
from logitcache.data.settings import DEFAULT, DataSettings
from logitcache.data.skipped import list_skipped, said_of_skipped, said_of_unlabelled
from logitcache.errors import TrainingFailed
from logitcache.losses.objective import Objective
from logitcache.storage import IdentityMismatch, LogitCache, data_samples

from .targets import said_of, samples_named

DEFAULT_MAX_LENGTH = 1024
"""Tokens a sample of data that no cache goes with."""


def check_max_length(cache: LogitCache | None, max_length: int | None) -> None:
    """Raise `IdentityMismatch` where rows would be cut later than the samples of the cache: it lacks what is between.

    Cut earlier, each is a causal prefix of what is there, which is a hit.
    """
    if cache is None or max_length is None or max_length <= cache.manifest.capture.max_length:
        return
    raise IdentityMismatch(
        f"pairing {cache.path} with --max-length {max_length}: expected at most the "
        f"{cache.manifest.capture.max_length} tokens a sample that the cache was made with. What comes behind them is "
        "not in it. Leave --max-length out, or precompute a cache with it."
    )


def check_weights(samples: Sequence[Sample], objective: Objective) -> None:
    """Raise `TrainingFailed` where samples bring weights that the objective does not read, or lack those it reads."""
    reads = objective.ce_weight == "data"
    wrong = next((sample for sample in samples if (sample.weights is not None) != reads), None)
    if wrong is None:
        return
    if reads:
        raise TrainingFailed(
            f"training with --ce-weight data on {wrong.origin}: expected a weight for every token (loss_scale or "
            "weights, a list beside input_ids or one number), found none. The samples of a cache have none. Give rows "
            "that bring them, or another --ce-weight."
        )
    raise TrainingFailed(
        f"training on {wrong.origin}: it brings weights (loss_scale or weights), which --ce-weight "
        f"{objective.ce_weight} does not read. They would be without effect. Use --ce-weight data, or leave the field "
        "out of the rows."
    )


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

    max_length: tokens a sample, for rows, with a cache at most its own; None: as many as the cache's have, or
    `DEFAULT_MAX_LENGTH` without one.
    vocab_size: of the model that reads them. how: what of each row is learnt. on_message is told how they were
    rendered, how many were cut or left out, or which data sets they are of.
    Raises what reading data and the cache raises; ValueError where there is neither.
    """
    if rows is None:
        if cache is None:
            raise ValueError("samples are of rows or of a cache: give one of them")
        named = data_samples(cache)
        on_message(said_of(cache, named))
        return samples_named(cache, named)
    check_max_length(cache, max_length)
    length = max_length or (DEFAULT_MAX_LENGTH if cache is None else cache.manifest.capture.max_length)
    found = make_samples(rows, tokenizer, length, vocab_size, how)
    for note in found.notes:
        on_message(note)
    if found.num_truncated:
        lost = f"; {found.num_without_labels:,} of them kept no supervised token and are left out"
        on_message(
            f"{found.num_truncated:,} rows were cut to {length} tokens{lost if found.num_without_labels else ''}."
        )
    if found.num_unlabelled:
        on_message(said_of_unlabelled(found.num_unlabelled))
    if found.skipped:
        on_message(said_of_skipped(len(found.skipped), list_skipped(how, found.skipped)))
    return found.samples
