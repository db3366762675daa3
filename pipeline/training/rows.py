"""The rows of a trainer's data, as its own collator makes batches of them: looked up, and taken as samples.

Owns what is done with all of them before step 1, some at once, and which row a refusal names. Must not train, nor
write, nor import `trainer`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from logitcache.data.samples import Sample
from logitcache.pairing.identity_checks import EVERY
from logitcache.pairing.targets import OWN_TOKENS, Batch, Collator, documents_of, samples_in
from logitcache.pairing.view import CacheView
from logitcache.storage import PositionNotCaptured, SampleNotCached

from .supported import what_cuts

CHECKED_ROWS = 100_000
"""Rows of a data set that are looked up before the first step; later ones when their step comes."""

_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Rows:
    """A data set that has a length, and what makes a batch of some of its rows."""

    dataset: Any
    collate: Collator

    @classmethod
    def of(cls, trainer: Any, dataset: Any) -> "Rows":
        """Those of a trainer, without the columns that it would take out."""
        return cls(dataset, trainer._get_collator_with_removed_columns(trainer.data_collator))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, rows: slice) -> Iterator[Sample]:
        """The samples of these rows, made as they are asked for."""
        wanted = range(*rows.indices(len(self)))
        for start in range(0, len(wanted), _ROWS_AT_ONCE):
            part = wanted[start : start + _ROWS_AT_ONCE]
            yield from samples_in(self.batch(part), f"rows {part[0]} to {part[-1]} of the training data")

    def batch(self, rows: range | list[int]) -> Batch:
        """These rows, collated."""
        return self.collate([self.dataset[i] for i in rows])


def check_rows(trainer: Any, view: CacheView, dataset: Any) -> None:
    """Look up every document of the first rows. A miss names the row, and what the trainer's settings do to it."""
    if not hasattr(dataset, "__len__"):
        return
    rows = Rows.of(trainer, dataset)
    numbers = iter(range(min(len(rows), CHECKED_ROWS)))
    while chunk := list(islice(numbers, _ROWS_AT_ONCE)):
        if _miss(view, rows.batch(chunk)) is None:
            continue
        for number in chunk:  # one by one, for the first in the order of the data
            error = _miss(view, rows.batch([number]))
            if error is not None:
                every = view.objective.kl_positions == "all"
                others = OWN_TOKENS if isinstance(error, PositionNotCaptured) else ""
                why = (EVERY if every else others) + what_cuts(trainer.args)
                raise type(error)(f"row {number} of the training data: {error}{why}") from error


def tokenizer_of(trainer: Any) -> PreTrainedTokenizerBase | None:
    """That makes the tokens of a trainer's rows, or is inside the processor that does; None where it has none."""
    made_by = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    return made_by if isinstance(made_by, PreTrainedTokenizerBase) else None


def _miss(view: CacheView, batch: Batch) -> SampleNotCached | PositionNotCaptured | None:
    """What the cache says of the documents of a batch; None where it has them all."""
    documents = list(documents_of(batch, every=view.objective.kl_positions == "all"))
    try:
        view.cache.require_all([d.token_ids for d in documents], [d.positions for d in documents])
    except (SampleNotCached, PositionNotCaptured) as error:
        return error
    return None
