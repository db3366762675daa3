"""The samples of a job, window by window: rows of a data set, tokenized as they come, or samples that are in memory.

Owns that a job sees no difference between the two, and what is refused of samples in memory, whose rows nobody has
checked. Must not know plans, models or caches.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from logitcache.data.files import Wanted
from logitcache.data.places import Named
from logitcache.data.rows import count_rows, read_windows, sizes_of
from logitcache.data.samples import Sample, SampleSet, read_samples
from logitcache.data.settings import DataSettings
from logitcache.data.tokenize import check_row_tokens
from logitcache.errors import InvalidData
from logitcache.events import OnMessage


class Data(Protocol):
    """Where a job's samples come from."""

    def windows(
        self, num_rows: int, wanted: Wanted = ..., on_message: OnMessage = ...
    ) -> Iterator[tuple[int, SampleSet]]:
        """Number and samples of every wanted window of num_rows rows; the last one has what is left. on_message is told
        what a person should know of the data."""
        ...

    def count(self) -> int | None:
        """How many rows there are, where that is known without reading much."""
        ...

    def sizes(self) -> list[list[str | int]]:
        """Names and sizes by which the workers of one job know that they work on the same data."""
        ...


@dataclass(frozen=True)
class Rows:
    """Data by their names, as `read_windows` takes it. Raises as that does, and `InvalidData`, naming the row."""

    names: Named
    how: DataSettings
    tokenizer: PreTrainedTokenizerBase | None
    max_length: int
    vocab_size: int

    def windows(
        self, num_rows: int, wanted: Wanted = lambda _: True, on_message: OnMessage = lambda _: None
    ) -> Iterator[tuple[int, SampleSet]]:
        """Parsed and tokenized where they are wanted only."""
        for window in read_windows(self.names, num_rows, wanted, self.how, on_message):
            yield window.number, read_samples(window.rows, self.tokenizer, self.max_length, self.vocab_size, self.how)

    def count(self) -> int | None:
        """None for what is large, at a URL or of the hub."""
        return count_rows(self.names, self.how)

    def sizes(self) -> list[list[str | int]]:
        """Of the files; of the hub, its id."""
        return sizes_of(self.names, self.how)


class SampleRows(Protocol):
    """Samples in memory, or rows of which each slice makes samples when it is asked for: none, one or several a row."""

    def __len__(self) -> int:
        """How many rows there are."""
        ...

    def __getitem__(self, rows: slice, /) -> Iterable[Sample]:
        """The samples of these rows, in their order."""
        ...


@dataclass(frozen=True)
class Samples:
    """Samples in memory. Raises `InvalidData` where one is too long, of another vocabulary, or has no label."""

    samples: SampleRows
    max_length: int
    vocab_size: int

    def windows(
        self,
        num_rows: int,
        wanted: Wanted = lambda _: True,
        on_message: OnMessage = lambda _: None,
    ) -> Iterator[tuple[int, SampleSet]]:
        """Slices of them."""
        for number, start in enumerate(range(0, len(self.samples), num_rows)):
            if wanted(number):
                stop = min(start + num_rows, len(self.samples))
                yield number, self._checked(list(self.samples[start:stop]), stop - start)

    def count(self) -> int:
        """All of them."""
        return len(self.samples)

    def sizes(self) -> list[list[str | int]]:
        """Their number: no other process has them."""
        return [["samples in memory", len(self.samples)]]

    def _checked(self, samples: list[Sample], num_rows: int) -> SampleSet:
        for sample in samples:
            if len(sample.token_ids) > self.max_length:
                raise InvalidData(
                    f"reading {sample.origin}: expected at most {self.max_length} tokens, found "
                    f"{len(sample.token_ids)}. The cache would say that its samples are no longer than that. Cut the "
                    "sample, or use a larger max_length."
                )
            check_row_tokens(sample.token_ids.astype("int64"), self.vocab_size, sample.origin)
            if not len(sample.positions):
                raise InvalidData(
                    f"reading {sample.origin}: no supervised token ({len(sample.token_ids)} tokens; the first is never "
                    "a label). Leave the sample out."
                )
        cut = [sample.num_tokens_cut for sample in samples if sample.num_tokens_cut]
        return SampleSet(samples, num_rows, len(cut), sum(cut), 0)
