"""What a precompute job will take: units, tokens, bytes, time and money, from its plan and a measured sample of it.

Owns the arithmetic. The sample is captured and packed as the job would, in memory; nothing is written. Must not print.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from logitcache.data.samples import Sample, check_samples_left
from logitcache.events import OnEvent
from logitcache.storage import CachedSample
from logitcache.storage.encoding import encode, sample_table
from logitcache.storage.records import concatenate
from logitcache.storage.writer import pack_shard

from .plan import Counts, count
from .worker import JobSpec, Loaded, Share, check_num_shards, plans

SAMPLE_POSITIONS = 2048
"""Positions that are captured to know how many bytes and how much time one takes."""


@dataclass(frozen=True)
class Estimate:
    """What a job will take."""

    #: Alternatives a position.
    kept: int
    vocab_size: int
    planned: Counts
    bytes_per_position: float
    sampled_positions: int
    #: Of one worker, measured here or as given.
    tokens_per_second: float
    measured: bool

    @property
    def num_bytes(self) -> float:
        """Of the shards of the finished cache, sample tables included; commit records and index come to it."""
        return self.bytes_per_position * self.planned.num_positions

    @property
    def worker_hours(self) -> float:
        """Of one worker, or of many together."""
        return self.planned.num_tokens / self.tokens_per_second / 3600


def estimate(
    spec: JobSpec, loaded: Loaded, tokens_per_second: float | None = None, on_event: OnEvent = lambda _: None
) -> Estimate:
    """The plan of a whole job, and what it costs. tokens_per_second: of a worker elsewhere; None: measure it here."""
    planned = Counts()
    first: list[Sequence[Sample]] = []
    for _, found, plan in plans(spec, loaded, Share(), on_event):
        planned += count(found, plan)
        if not first and plan.shards:
            first = _spread([batch for shard in plan.shards for batch in shard])
    check_samples_left(planned.num_rows, planned.num_samples, spec.settings.max_length)
    check_num_shards(planned.num_shards, spec.settings)
    bytes_per_position, sampled, measured = _measure(loaded, first)
    return Estimate(
        loaded.cache_spec.manifest.capture.top_k,
        loaded.cache_spec.manifest.model.vocab_size,
        planned,
        bytes_per_position,
        sampled,
        measured if tokens_per_second is None else tokens_per_second,
        tokens_per_second is None,
    )


def _spread(batches: Sequence[Sequence[Sample]]) -> list[Sequence[Sample]]:
    """Batches of all lengths, as many as hold the sample's positions."""
    mean = sum(len(s.positions) for batch in batches for s in batch) / len(batches)
    wanted = max(1, min(len(batches), round(SAMPLE_POSITIONS / mean)))
    return [batches[i * len(batches) // wanted] for i in range(wanted)]


def _measure(loaded: Loaded, batches: Sequence[Sequence[Sample]]) -> tuple[float, int, float]:
    """Bytes a position, positions, and tokens a second, of the second time where there is one batch only."""
    manifest, seconds, tokens = loaded.cache_spec.manifest, 0.0, 0
    cached: list[CachedSample] = []
    loaded.teacher(batches[0])  # the first forward allocates
    for batch in batches:
        start = perf_counter()
        records = loaded.teacher(batch)
        seconds += perf_counter() - start
        tokens += sum(len(s.token_ids) for s in batch)
        cached += loaded.cache_spec.stored(zip(batch, records, strict=True))
    table = sample_table(cached)
    columns = encode(concatenate([c.logprobs for c in cached]), manifest.capture)
    commit, files = pack_shard(manifest, table, columns, 0.0)
    return sum(map(len, files.values())) / commit.num_positions, commit.num_positions, tokens / seconds
