"""The precompute job: samples of a data set of any size, or in memory, filled into one cache by any number of workers.

Owns the one way to fill a cache, and who does what. The data are read in windows of so many rows; the samples of a
window make a plan of their own, and its shards are the units of work. Each unit belongs to one worker, by a rule that
needs no talk: so workers may die, come late or be repeated, and what two did is committed once. Only the samples of one
window are in memory. The last worker to finish finalises. Must not know how a record is made, nor print.
"""

import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from math import gcd
from pathlib import Path
from typing import cast

from transformers import PreTrainedTokenizerBase

from logitcache.data.places import Named, are_names, names_of
from logitcache.data.samples import Sample, SampleSet, check_samples_left, distinct
from logitcache.data.settings import DataSettings
from logitcache.data.skipped import list_skipped, listed_beside
from logitcache.errors import InvalidData, InvalidSettings, NonFiniteLogits
from logitcache.events import DataNoted, Event, OnEvent, Progress, ShardCommitted, ShardFailed, WindowPlanned
from logitcache.models.head import check_length
from logitcache.models.loading import Base
from logitcache.models.same_base import config_differences
from logitcache.models.settings import LoadSettings
from logitcache.storage import CacheWriter, CorruptCache, LogitCache, check_same_capture, copy_samples, sample_id
from logitcache.storage.captured_index import Captured
from logitcache.storage.data_sets import Runs, joined, runs_of
from logitcache.storage.job_status import (
    FAILED,
    FINISHED,
    RUNNING,
    STOPPED,
    WorkerRecord,
    has_part,
    job_digest,
    read_part,
    read_records,
    remove_records,
    write_part,
    write_record,
)
from logitcache.storage.manifest import MAX_SHARDS

from .loaded import TRANSFORMERS, Loaded, OwnEngine, load, one_worker
from .plan import Counts, Plan, check_template, count, make_plan, without_captured
from .settings import CaptureSettings, Engine, EngineSettings
from .settings import JobSpec as JobSpec
from .shard_pipeline import PACKING_PROCESSES, ShardPipeline, failed_text
from .windows import Data, Rows, Samples

IN_MEMORY = "samples in memory"
"""The name of data that have none."""

WINDOW_ROWS = JobSpec.window_rows

WORKERS_A_WINDOW = 8
"""Workers that share a window: more would all have to tokenize it, fewer would leave small data sets to few."""


@dataclass(frozen=True)
class Share:
    """The `index`-th of `num` workers."""

    index: int = 0
    num: int = 1

    def has_shard(self, window: int, shard: int) -> bool:
        """Whether a shard of a window is this worker's: each is one worker's, every worker's share about equal."""
        turned = window // (
            self.num // gcd(WORKERS_A_WINDOW, self.num)
        )  # so that windows of few shards feed all of them
        return (window * WORKERS_A_WINDOW + (shard + turned) % WORKERS_A_WINDOW) % self.num == self.index

    def has_window(self, window: int) -> bool:
        """Whether some unit of a window may be this worker's."""
        return (self.index - window * WORKERS_A_WINDOW) % self.num < WORKERS_A_WINDOW


@dataclass(frozen=True)
class JobReport:
    """What one worker did."""

    #: The rows of the windows it read, and its units of them.
    planned: Counts
    num_samples: int = 0
    num_positions: int = 0
    num_tokens: int = 0
    #: Of those, the samples that were there already.
    num_samples_found: int = 0
    #: Samples that came from the other cache.
    num_samples_copied: int = 0
    #: Whether the cache is finished now.
    is_final: bool = False
    #: The samples and positions that it answers for.
    part: Runs | None = field(default=None, compare=False, repr=False)
    #: Digest of what workers of one job agree on.
    job: str = field(default="", compare=False, repr=False)
    #: Where rows that were skipped are listed.
    skipped_files: tuple[str, ...] = field(default=(), compare=False, repr=False)


def precompute(
    model: str | Path | Base,
    data: Named | Sequence[Sample],
    cache: str | Path,
    settings: CaptureSettings | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    loading: LoadSettings | None = None,
    window_rows: int = WINDOW_ROWS,
    how: DataSettings | None = None,
    data_name: str = "",
    samples_from: str | Path = "",
    engine: Engine | OwnEngine = "transformers",
    running: EngineSettings | None = None,
    calibration: str | Path = "",
    progress: Progress = lambda _: None,
    on_event: OnEvent = lambda _: None,
) -> JobReport:
    """Run a base once over data, and store its top-k log-probabilities in the cache at `cache`, which is then finished.

    model: folder or hub id, or a base that is loaded, for which loading and engine are settled. engine: what runs it, a
    name or one of your own; running, calibration: of vllm. data: file, folder, URL
    or hub id, several of them, or samples in memory. tokenizer: None is the one beside the model, if there is one.
    how: which rows of the data, and what of a chat is learnt. The others: as of `JobSpec`. Called again, it goes on
    where it stopped; a finished cache gains what it lacks. Which samples the data have, and at which positions, is kept
    in the cache under data_name, in place of what was there: by default the path as given, or `samples in memory`.

    With a model that is divided over processes, all must call this; the leader's report counts and the others' is
    empty. Raises what loading, the data, the teacher and `CacheWriter` raise, `InvalidSettings` for settings that
    contradict each other.
    """
    base, own = model if isinstance(model, Base) else None, engine if isinstance(engine, OwnEngine) else None
    if base is not None and (loading is not None or engine != TRANSFORMERS):
        raise InvalidSettings("loading, engine: the base is loaded already. Leave them out.")
    names = names_of(data) if are_names(data) else (IN_MEMORY,)
    samples = None if are_names(data) else cast(Sequence[Sample], data)
    spec = JobSpec(
        str(model) if base is None else base.source.name,
        names,
        str(cache),
        settings or CaptureSettings(),
        loading or LoadSettings(),
        how or DataSettings(),
        window_rows=window_rows,
        engine=TRANSFORMERS if isinstance(engine, OwnEngine) else engine,
        running=running or EngineSettings(),
        calibration=str(calibration),
        data_name=data_name,
        samples_from=str(samples_from),
    )
    with one_worker(load(spec, tokenizer, base, own)) as loaded:
        if loaded is None:
            return JobReport(Counts())
        return work(spec, replace(loaded, samples=samples), progress=progress, on_event=on_event)


Planned = tuple[int, SampleSet, Plan]
"""Number, samples and plan of a window."""


def plans(spec: JobSpec, loaded: Loaded, share: Share, on_event: OnEvent = lambda _: None) -> Iterator[Planned]:
    """Every window that may hold a unit of this share."""

    def tell(sentence: str) -> None:
        on_event(DataNoted(sentence))

    for number, found in data_of(spec, loaded).windows(spec.window_rows, share.has_window, tell):
        yield number, found, make_plan(found.samples, spec.settings)


def data_of(spec: JobSpec, loaded: Loaded) -> Data:
    """The data of a job, by their name or in memory."""
    max_length, vocab_size = spec.settings.max_length, loaded.cache_spec.manifest.model.vocab_size
    if loaded.samples is None:
        return Rows(spec.data, spec.how, loaded.tokenizer, max_length, vocab_size)
    return Samples(loaded.samples, max_length, vocab_size)


def work(
    spec: JobSpec,
    loaded: Loaded,
    share: Share | None = None,
    progress: Progress = lambda _: None,
    on_event: OnEvent = lambda _: None,
) -> JobReport:
    """Do a share of the job, and finalise the cache if all of the others are done.

    Raises what `CacheWriter`, the teacher and the data raise; `NonFiniteLogits` at the end where units could not be
    computed. What was committed before stays, and the same call goes on from there.
    """
    share = share or Share()
    windows = plans(spec, loaded, share, on_event)
    first = next(windows, None)  # a broken row at the start is told before anything is written
    if share.num == 1 and (first is None or first[1].num_rows < spec.window_rows):
        rows, samples = (0, 0) if first is None else (first[1].num_rows, len(first[1].samples))
        check_samples_left(rows, samples, spec.settings.max_length, () if first is None else first[1].skipped)
    num_windows = _num_windows(spec, loaded)
    if first is not None:
        _check_length(loaded, first[2])
        check_num_shards(len(first[2].shards) * (num_windows or 1), spec.settings)
    other = LogitCache.open(spec.samples_from) if spec.samples_from else None
    if other is not None:
        check_same_capture(loaded.cache_spec.manifest, other, config_differences)
    with loaded.cache_spec.writer(spec.cache) as writer:
        if first is not None:
            check_template(spec.cache, writer.chat_templates, first[2])
        worker = _Worker(spec, loaded, share, writer, progress, on_event, other, num_windows)
        worker.begin()
        try:
            return worker.run(windows if first is None else chain([first], windows))
        except BaseException:
            with suppress(OSError):  # of a disk that is full, say
                worker.record(worker.failed_as)
            raise


def check_num_shards(num_shards: int, settings: CaptureSettings) -> None:
    """Raise `InvalidData` where a job comes to more shards than one cache can list, before it has cost anything."""
    if num_shards > MAX_SHARDS:
        factor = -(-num_shards // MAX_SHARDS)
        raise InvalidData(
            f"planning the job: about {num_shards:,} shards, expected at most {MAX_SHARDS:,} in one cache. It could "
            f"not be finished. Use --shard-positions {settings.shard_positions * factor} or more."
        )


def _num_windows(spec: JobSpec, loaded: Loaded) -> int | None:
    """None where nobody knows how many rows there are."""
    rows = data_of(spec, loaded).count()
    return None if rows is None else -(-rows // spec.window_rows)


def _job_of(spec: JobSpec, loaded: Loaded) -> str:
    """What the workers of one job agree on: the data, their name, how they are read and how they are cut into units."""
    kept = spec.settings
    cut = (kept.max_length, kept.batch_tokens, kept.shard_positions, spec.window_rows, kept.kl_positions)
    return job_digest(spec.name, [data_of(spec, loaded).sizes(), list(cut), spec.how.determining()])


def _check_length(loaded: Loaded, plan: Plan) -> None:
    if loaded.base is not None:
        check_length(loaded.base.model, max((len(s.token_ids) for s in plan.samples), default=0))


def _runs(found: SampleSet, mine: Plan) -> Runs:
    """The samples of a share of a window at the positions that are captured, and where cross-entropy counts."""
    samples = list(mine.samples)
    supervised = {s.token_ids.tobytes(): s.supervised for s in distinct(found.samples)}
    counts = [supervised[s.token_ids.tobytes()][s.positions + 1] for s in samples]
    return runs_of([sample_id(s.token_ids) for s in samples], [s.positions for s in samples], counts)


class _Worker:
    """One share on its way."""

    def __init__(
        self,
        spec: JobSpec,
        loaded: Loaded,
        share: Share,
        writer: CacheWriter,
        progress: Progress,
        on_event: OnEvent,
        other: LogitCache | None,
        num_windows: int | None,
    ) -> None:
        self._planned, self._num_found, self._num_copied = Counts(), 0, 0
        self._parts: list[Runs] = []
        self._part: Runs | None = None
        self._spec, self._loaded, self._share = spec, loaded, share
        self._writer, self._progress, self._on_event = writer, progress, on_event
        self._other, self._job = other, ""
        part = f".{share.index}-of-{share.num}" if share.num > 1 else ""
        self._how = listed_beside(spec.how, spec.cache, part)
        self._noted: set[str] = set()
        self._started, self._windows_done = time.time(), 0
        self._num_windows = -1 if num_windows is None else sum(map(share.has_window, range(num_windows)))
        num_packing = PACKING_PROCESSES if loaded.is_on_gpu else 0
        self._pipeline = ShardPipeline(writer, loaded.teacher, loaded.cache_spec, progress, self._told, num_packing)

    def begin(self) -> None:
        """Read what is there, and say that it works on the rest."""
        self._writer.captured()
        self._job = _job_of(self._spec, self._loaded)
        self.record(RUNNING)

    def run(self, windows: Iterable[Planned]) -> JobReport:
        """All windows, then the end."""
        captured = self._writer.captured()
        with self._pipeline as pipeline:
            for number, found, plan in windows:
                self._fill(pipeline, number, found, plan, captured)
                self._windows_done += 1
        filled = pipeline.filled
        if filled.failures:
            raise NonFiniteLogits(failed_text(filled.failures))
        self._part, self._parts = joined(self._spec.name, self._parts).runs, []
        self.record(FINISHED)
        return JobReport(
            self._planned,
            filled.num_samples,
            filled.num_positions,
            filled.num_tokens,
            self._num_found,
            self._num_copied,
            self._finalize(),
            self._part,
            self._job,
            (self._how.skipped_file,) if self._planned.num_skipped else (),
        )

    @property
    def failed_as(self) -> str:
        """What it is if it goes no further."""
        return FAILED if self._pipeline.filled.failures else STOPPED

    def record(self, state: str) -> None:
        """Say how this worker is."""
        filled, index, num = self._pipeline.filled, self._share.index, self._share.num
        checksum = "" if self._part is None else write_part(self._writer.files, index, num, self._job, self._part)
        record = WorkerRecord(
            state=state,
            job=self._job,
            host=socket.gethostname(),
            pid=os.getpid(),
            started=self._started,
            updated=time.time(),
            num_units=filled.num_shards,
            num_positions=filled.num_positions,
            num_tokens=filled.num_tokens,
            windows_done=self._windows_done,
            num_windows=self._num_windows,
            part_checksum=checksum,
            num_runs=0 if self._part is None else len(self._part),
            failures=filled.failures[:100],
        )
        write_record(self._writer.files, index, num, record)

    def _fill(self, pipeline: ShardPipeline, window: int, found: SampleSet, plan: Plan, captured: Captured) -> None:
        pipeline.settle()  # a sample that was in the window before is captured by now
        mine = Plan(tuple(s for number, s in enumerate(plan.shards) if self._share.has_shard(window, number)))
        _check_length(self._loaded, mine)
        check_template(self._spec.cache, self._writer.chat_templates, mine)
        missing = without_captured(mine, captured)
        self._parts.append(_runs(found, mine))
        if found.skipped:
            list_skipped(self._how, found.skipped, more=self._planned.num_skipped > 0)
        self._planned += count(found, mine)
        for note in dict.fromkeys(found.notes):
            if note not in self._noted:
                self._on_event(DataNoted(note))
        self._noted.update(found.notes)
        self._num_found += mine.num_samples - missing.num_samples
        self._on_event(WindowPlanned(window, mine.num_tokens, missing.num_tokens))
        if self._other is not None:
            missing = self._copied(self._other, missing, captured)
        self._progress(mine.num_tokens - missing.num_tokens)
        for shard in missing.shards:
            if self._share.num > 1 and pipeline.is_done(shard):  # repeated: another did it after this one had begun
                self._progress(sum(len(s.token_ids) for batch in shard for s in batch))
            else:
                pipeline.shard(shard)

    def _copied(self, other: LogitCache, missing: Plan, captured: Captured) -> Plan:
        """The plan less what the other cache has, which is in this one now."""
        rendered = Plan(tuple(shard for shard in missing.shards if shard[0][0].chat_template))
        check_template(other.path, other.chat_templates(sample_id(s.token_ids) for s in rendered.samples), rendered)
        wanted = {sample_id(s.token_ids): s.positions for s in missing.samples}
        copied = copy_samples(self._writer, other, wanted, self._spec.settings.shard_positions)
        self._num_copied += copied.num_samples
        return without_captured(missing, captured)

    def _told(self, event: Event) -> None:
        self._on_event(event)
        if isinstance(event, ShardCommitted | ShardFailed):
            self.record(RUNNING)

    def _finalize(self) -> bool:
        """By the last one: all of the others have said that they finished. Whether the cache is final now."""
        num, files = self._share.num, self._writer.files
        records = read_records(files)
        others = [r for i in range(num) if (r := records.get((i, num, self._job))) is not None]
        if [r.state for r in others] != [FINISHED] * num:
            return self._writer.is_final
        try:
            data_set = joined(self._spec.name, [read_part(files, i, num, r) for i, r in enumerate(others)])
        except CorruptCache:
            if read_records(files) == records and all(has_part(files, i, num, r) for i, r in enumerate(others)):
                raise
            return self._writer.is_final  # another finalised meanwhile, or began when it had: it has to begin again
        if not data_set.num_samples:
            num_rows = data_of(self._spec, self._loaded).count() or max(1, self._planned.num_rows)
            check_samples_left(num_rows, 0, self._spec.settings.max_length)
        if not self._writer.holds(data_set):
            self._writer.finalize([data_set])
        remove_records(files, self._job)
        return True
