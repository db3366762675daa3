"""The rows of TRL's preference trainers, as its collators make batches of them: looked up, and taken as samples.

Owns which token sequences a row has (a chosen and a rejected answer; or a completion, and KTO's mismatched one), and
that a log-probability of the cache stands where TRL sums it. Must not train, nor write, nor import TRL, which need not
be installed. Shapes: B sequences of a batch, T time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from logitcache.data.files import IGNORED
from logitcache.data.samples import Sample
from logitcache.errors import InvalidBatch
from logitcache.pairing.identity_checks import check_samples
from logitcache.pairing.targets import Batch, Collator, documents_of, on_cpu
from logitcache.storage import LogitCache, PositionNotCaptured, SampleNotCached

_KINDS = ("", "KL_")
"""What the names of a batch begin with: of what is trained, and of the pairs by which KTO estimates its KL."""

_READ = {"input_ids", "attention_mask", "labels"}
_OF_THE_CALL = {"use_cache", "fused_lm_head"}
"""How TRL calls a model, of no consequence to what it says of the tokens."""

_ROWS_AT_ONCE = 64

ADVICE = (
    " fill=True captures what is missing, before anything is trained. In KTO every prompt stands with the completion "
    "of another row too; of which one follows from the order of the rows and per_device_train_batch_size "
    "(docs/how-to/preferences.md)."
)


@dataclass(frozen=True)
class PreferenceRows:
    """A data set as a preference trainer has prepared it, and what makes a batch of some of its rows."""

    dataset: Any
    collate: Collator
    #: Of the data set, as messages say it.
    name: str

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, rows: slice) -> Iterator[Sample]:
        """The samples of these rows, made as they are asked for."""
        wanted = range(*rows.indices(len(self)))
        for start in range(0, len(wanted), _ROWS_AT_ONCE):
            yield from self.samples(wanted[start : start + _ROWS_AT_ONCE])

    def batch(self, rows: Sequence[int]) -> Batch:
        """These rows, collated. Raises `InvalidBatch` where no sequence of TRL's is in what the collator made."""
        batch = dict(self.collate([self.dataset[row] for row in rows]))
        if not list(_labelled(batch)):
            raise InvalidBatch(
                f"collating the {self.name} data: expected a batch with input_ids, attention_mask and completion_mask, "
                f"as TRL's collators make it, found {', '.join(sorted(batch))}. Leave data_collator out."
            )
        return batch

    def samples(self, rows: Sequence[int]) -> list[Sample]:
        """The token sequences of these rows that have completion tokens, the completion supervised."""
        return [
            document.sample(f"row {rows[document.row % len(rows)]} of the {self.name} data")
            for part in _labelled(on_cpu(self.batch(rows)))
            for document in documents_of(part)
        ]

    def check(self, cache: LogitCache) -> None:
        """Raise `SampleNotCached` or `PositionNotCaptured`, naming the row, unless the cache has all of them."""
        for start in range(0, len(self), _ROWS_AT_ONCE):
            try:
                check_samples(cache, list(self[start : start + _ROWS_AT_ONCE]))
            except (SampleNotCached, PositionNotCaptured) as error:
                raise type(error)(f"{error}{ADVICE}") from error


@dataclass(frozen=True)
class FromCache:
    """Called as TRL calls its reference model, it answers from a cache; no model runs.

    inputs: input_ids, attention_mask and labels [B, T]. The answer has log_probs, float32 [B, T - 1]: log p(label) in
    nats where the next token is supervised, else 0. Raises `InvalidBatch` for inputs that it does not read, and what
    looking up raises.
    """

    cache: LogitCache

    def __call__(self, **inputs: Any) -> SimpleNamespace:
        if unread := sorted(set(inputs) - _READ - _OF_THE_CALL):
            raise InvalidBatch(
                f"looking up reference log-probabilities in {self.cache.path}: expected batches of input_ids, "
                f"attention_mask and completion_mask, found {', '.join(unread)} beside them. A model may answer "
                "otherwise for it, and the cache does not. Leave it out of the batches."
            )
        documents = list(documents_of(on_cpu({name: inputs[name] for name in _READ})))
        num_sequences, length = inputs["input_ids"].shape
        logprobs = torch.zeros(num_sequences, length - 1)
        if documents:
            found = self.cache.lookup_batch([d.token_ids for d in documents], [d.positions for d in documents])
            for document, record in zip(documents, found, strict=True):
                places = torch.from_numpy(document.column + document.positions).long()
                logprobs[document.row, places] = torch.from_numpy(record.label_logprobs).float()
        return SimpleNamespace(log_probs=logprobs.to(inputs["input_ids"].device))


def _labelled(batch: Batch) -> Iterator[Batch]:
    """The sequences of a batch, with labels at their completions; of KTO twice, as they are and mismatched."""
    for kind in _KINDS:
        names = [f"{kind}{name}" for name in ("input_ids", "attention_mask", "completion_mask")]
        if all(name in batch for name in names):
            tokens, mask, completion = (batch[name] for name in names)
            labels = tokens.masked_fill(completion == 0, IGNORED)
            yield {"input_ids": tokens, "attention_mask": mask, "labels": labels}
