"""Which samples a cache is to hold, in which order, shard by shard, and which of them are missing.

Owns the plan. It is a function of the data, the budget and the shard size alone, so a run that is killed and started
again forms the same batches and ends with the same bytes; what is committed is skipped. Must not know how a record is
computed or stored.
"""

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from logitcache.data.batches import batches_by_length
from logitcache.data.samples import Sample, SampleSet, distinct
from logitcache.storage import IdentityMismatch, sample_id
from logitcache.storage.captured_index import Captured

from .settings import CaptureSettings


@dataclass(frozen=True)
class Plan:
    """Batches, longest samples first, grouped into shards."""

    shards: tuple[tuple[tuple[Sample, ...], ...], ...]

    @property
    def samples(self) -> Iterator[Sample]:
        """Every sample of the plan."""
        return (sample for shard in self.shards for batch in shard for sample in batch)

    @property
    def num_samples(self) -> int:
        """Different token sequences."""
        return sum(1 for _ in self.samples)

    @property
    def num_tokens(self) -> int:
        """Tokens the base will see, without padding."""
        return sum(len(s.token_ids) for s in self.samples)

    @property
    def num_positions(self) -> int:
        """Records the cache will gain."""
        return sum(len(s.positions) for s in self.samples)


@dataclass(frozen=True)
class Counts:
    """Of a data set, or a part of it: rows, what truncation did to them, and what is planned of them."""

    num_rows: int = 0
    num_truncated: int = 0
    num_tokens_cut: int = 0
    num_without_labels: int = 0
    num_unlabelled: int = 0
    num_skipped: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    num_positions: int = 0
    num_shards: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        """Of both parts together."""
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def count(found: SampleSet, plan: Plan) -> Counts:
    """Of rows that were read, and a plan of some or all of their samples."""
    rows = (found.num_rows, found.num_truncated, found.num_tokens_cut)
    left_out = (found.num_without_labels, found.num_unlabelled, len(found.skipped))
    return Counts(*rows, *left_out, plan.num_samples, plan.num_tokens, plan.num_positions, len(plan.shards))


def make_plan(samples: Sequence[Sample], settings: CaptureSettings) -> Plan:
    """Distinct samples in batches of at most `batch_tokens`, longest first, and these in shards; what a chat template
    rendered in shards of its own, whose records name it.

    Their supervised positions are those that are captured: all, where the settings say so.
    """
    if settings.kl_positions == "all":
        samples = [replace(s, supervised=np.ones_like(s.supervised)) for s in samples]
    by_template: dict[str, list[Sample]] = {}
    for sample in distinct(samples):
        by_template.setdefault(sample.chat_template, []).append(sample)
    return Plan(tuple(shard for name in sorted(by_template) for shard in _shards(by_template[name], settings)))


def _shards(samples: Sequence[Sample], settings: CaptureSettings) -> list[tuple[tuple[Sample, ...], ...]]:
    shards: list[tuple[tuple[Sample, ...], ...]] = []
    batches: list[tuple[Sample, ...]] = []
    num_positions = 0
    for batch in batches_by_length(samples, settings.batch_tokens):
        batches.append(batch)
        num_positions += sum(len(sample.positions) for sample in batch)
        if num_positions >= settings.shard_positions:
            shards.append(tuple(batches))
            batches, num_positions = [], 0
    if batches:
        shards.append(tuple(batches))
    return shards


def check_template(where: str, held: frozenset[str], plan: Plan) -> None:
    """Raise `IdentityMismatch` where chats would be added to, or taken from, those that another template rendered.

    held: digests of the templates of a cache.
    """
    ours = {sample.chat_template for sample in plan.samples} - {""}
    if held and ours - held:
        raise IdentityMismatch(
            f"adding chats to those of {where}: chat_template: {min(ours - held)} here, {min(held)} there. The same "
            "chats are other samples with another template, and both would be learnt. None of them was written. Choose "
            "another folder, or use the tokenizer, --chat-template and --chat-template-kwargs of that cache."
        )


def without_captured(plan: Plan, captured: Captured) -> Plan:
    """The plan less what a cache holds: positions, samples, batches and shards, in the same order."""
    samples = list(plan.samples)
    missing = captured.missing([sample_id(s.token_ids) for s in samples], [s.positions for s in samples])
    left = iter([_at(sample, positions) for sample, positions in zip(samples, missing, strict=True)])
    shards = []
    for shard in plan.shards:
        batches = [tuple(found for _ in batch if (found := next(left)) is not None) for batch in shard]
        if any(batches):
            shards.append(tuple(b for b in batches if b))
    return Plan(tuple(shards))


def _at(sample: Sample, positions: NDArray[np.int32]) -> Sample | None:
    """A sample of which only these positions are wanted; None where there are none."""
    if len(positions) == len(sample.positions):
        return sample
    if not len(positions):
        return None
    supervised = np.zeros_like(sample.supervised)
    supervised[positions + 1] = True
    return replace(sample, supervised=supervised)
