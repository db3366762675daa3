"""Which samples of a cache are still in the data: the data made into samples exactly as the cache's were.

Owns the check that it is the same tokenizer, and the same chat template where it counts; the truncation is that of the
manifest. Loads no weights. Must not know how samples are removed.
"""

from dataclasses import dataclass
from functools import partial

from logitcache.data.chat_templates import template_digests
from logitcache.data.places import Named, OnMessage, names_of
from logitcache.data.rows import read_rows
from logitcache.data.samples import make_samples
from logitcache.data.settings import DEFAULT, DataSettings
from logitcache.data.skipped import list_skipped, said_of_skipped
from logitcache.models.loading import find_tokenizer, load_tokenizer, tokenizer_identity
from logitcache.storage import IdentityMismatch, LogitCache, sample_id

from .identity_checks import check_templates


@dataclass(frozen=True)
class DataIds:
    """num_rows of the data, and the ids of the different samples that they make."""

    num_rows: int
    sample_ids: frozenset[bytes]


def ids_of_data(
    cache: LogitCache,
    data: Named,
    model: str | None,
    how: DataSettings = DEFAULT,
    on_message: OnMessage = lambda _: None,
) -> DataIds:
    """The sample ids of a data set for a cache.

    model: a folder or hub id with the tokenizer; None for a cache that has none, whose data were token ids.
    how: as they were read for the cache.
    Raises `IdentityMismatch` for another tokenizer, or another chat template where chats are among the data or the
    cache's samples, `InputNotFound`, `InvalidData`.
    """
    manifest = cache.manifest
    tokenizer = None if model is None else load_tokenizer(find_tokenizer(model))
    found, expected = tokenizer_identity(tokenizer), manifest.tokenizer
    if found != expected:
        raise IdentityMismatch(
            f"reading data {', '.join(names_of(data))} for {cache.path}: expected the tokenizer of the cache, found "
            f"another or none in {model or 'no --model'} (fingerprint). Every sample would look as if it were gone. "
            "Name the folder of the tokenizer that the cache was made with."
        )
    rows, max_length = read_rows(data, how, on_message), manifest.capture.max_length
    made = make_samples(rows, tokenizer, max_length, manifest.model.vocab_size, how)
    if made.skipped:
        on_message(said_of_skipped(len(made.skipped), list_skipped(how, made.skipped)))
    check_templates(cache, made.samples, partial(template_digests, tokenizer, how))
    return DataIds(made.num_rows, frozenset(sample_id(sample.token_ids) for sample in made.samples))
