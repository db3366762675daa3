"""What a precompute job will take: units, tokens, bytes, time and money, from its plan and a measured sample of it; and
what other settings would take and keep of the same sample, and how far it lies from what the base says itself.

Owns the sample and the arithmetic. The sample is captured and packed as the job would, in memory; nothing is written.
Must not print.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter

from logitcache.data.batches import batches_by_length
from logitcache.data.samples import Sample, check_samples_left
from logitcache.events import OnEvent
from logitcache.storage import CachedSample, LogitCache

from .base_distance import Distance, distance
from .byte_table import Choice, bytes_per_position, capture_wide, choices_of
from .loaded import Loaded
from .plan import Counts, count
from .settings import JobSpec
from .teacher import TransformersTeacher
from .worker import Share, check_num_shards, plans

SAMPLE_POSITIONS, SAMPLES = 2048, 256
"""Positions that are captured to know what one takes, and samples at most."""

FEW_POSITIONS = 1000
"""Of fewer than these the averages say little."""


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
    #: What else could be kept; none, and no distance, where the base is run by an engine or by several processes.
    choices: tuple[Choice, ...] = ()
    distance: Distance | None = None

    @property
    def num_bytes(self) -> float:
        """Of the shards of the finished cache, sample tables included; commit records and index come to it."""
        return self.total_of(self.bytes_per_position)

    @property
    def is_rough(self) -> bool:
        """Whether so few positions were measured that the averages say little."""
        return self.sampled_positions < FEW_POSITIONS

    @property
    def worker_hours(self) -> float:
        """Of one worker, or of many together."""
        return self.planned.num_tokens / self.tokens_per_second / 3600

    def total_of(self, bytes_per_position: float) -> float:
        """Bytes of a cache of the same data that takes so many a position."""
        return bytes_per_position * self.planned.num_positions


class Spread:
    """Every n-th of all samples it is given; n doubles as they become many, so that few are held however many come."""

    def __init__(self, most: int = 16 * SAMPLES) -> None:
        self._most, self._step, self._seen = most, 1, 0
        self._held: list[Sample] = []

    def add(self, samples: Iterable[Sample]) -> None:
        """More of them."""
        for sample in samples:
            if self._seen % self._step == 0:
                self._held.append(sample)
            self._seen += 1
            if len(self._held) > self._most:
                self._held, self._step = self._held[::2], 2 * self._step

    def chosen(self, num_positions: int = SAMPLE_POSITIONS, num_samples: int = SAMPLES) -> list[Sample]:
        """About so many positions of them, so many samples at most and one at least, evenly spread."""
        held = self._held
        mean = sum(len(sample.positions) for sample in held) / len(held)
        wanted = max(1, min(len(held), num_samples, round(num_positions / mean)))
        return [held[i * len(held) // wanted] for i in range(wanted)]


def estimate(
    spec: JobSpec,
    loaded: Loaded,
    tokens_per_second: float | None = None,
    on_event: OnEvent = lambda _: None,
    probe: LogitCache | None = None,
) -> Estimate:
    """The plan of a whole job, and what it costs. tokens_per_second: of a worker elsewhere; None: measure it here.
    probe: a cache of the same base (checked by the caller), of what it says itself."""
    planned, spread = Counts(), Spread()
    for _, found, plan in plans(spec, loaded, Share(), on_event):
        planned += count(found, plan)
        spread.add(plan.samples)
    check_samples_left(planned.num_rows, planned.num_samples, spec.settings.max_length)
    check_num_shards(planned.num_shards, spec.settings)
    batches = list(batches_by_length(spread.chosen(), spec.settings.batch_tokens))
    per_shard = planned.num_positions / planned.num_shards
    size, sampled, measured = _measure(loaded, batches, per_shard)
    kept = loaded.cache_spec.manifest
    rate = measured if tokens_per_second is None else tokens_per_second
    found_of = kept.capture.top_k, kept.model.vocab_size, planned, size, sampled, rate, tokens_per_second is None
    if loaded.base is None or not isinstance(loaded.teacher, TransformersTeacher):
        return Estimate(*found_of)
    wide = capture_wide(loaded.base, batches, loaded.cache_spec)
    choices = choices_of(wide, loaded.base, loaded.tokenizer, spec.settings, per_shard)
    return Estimate(*found_of, choices, distance(wide.records, probe))


def _measure(
    loaded: Loaded, batches: Sequence[Sequence[Sample]], positions_per_shard: float
) -> tuple[float, int, float]:
    """Bytes a position, positions captured, and tokens a second, of the second time where there is one batch only."""
    seconds, tokens = 0.0, 0
    cached: list[CachedSample] = []
    loaded.teacher(batches[0])  # the first forward allocates
    for batch in batches:
        start = perf_counter()
        records = loaded.teacher(batch)
        seconds += perf_counter() - start
        tokens += sum(len(s.token_ids) for s in batch)
        cached += loaded.cache_spec.stored(zip(batch, records, strict=True))
    size = bytes_per_position(cached, loaded.cache_spec, positions_per_shard)
    return size, sum(len(c.logprobs) for c in cached), tokens / seconds
