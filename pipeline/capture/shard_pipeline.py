"""Shards captured one after the other; each is packed and written while the base runs on the next.

Owns that overlap, and what happens when a batch does not fit into memory (it is halved, and so are those after it) or
cannot be computed at all (its shard is left out and reported). Where the base runs on a processor, a thread packs;
where it runs on a GPU, whose work this interpreter only hands out, processes do (`packing_process`): they hold up
nobody, and pack two shards at once. Must not know which shards there are, or why.
"""

import gc
import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import TracebackType

import torch

from logitcache.data.samples import Sample
from logitcache.errors import EngineFailed, NonFiniteLogits, is_out_of_memory
from logitcache.events import BatchHalved, OnEvent, Progress, ShardCommitted, ShardFailed
from logitcache.storage import BaseLogprobs, CacheWriter, sample_id
from logitcache.storage.manifest import ShardCommit
from logitcache.storage.packing_process import PackingProcess

from .cache_spec import CacheSpec
from .teacher import LaunchingTeacher, Teacher, launched

_Launched = tuple[Sequence[Sample], Callable[[], list[BaseLogprobs]]]
"""Samples that a base runs on, and what gives their records when they are there."""

LEAVING_SECONDS = 5.0
"""How long a shard that is being written is waited for when the work is stopped."""

PACKING_PROCESSES = 2
"""Processes beside a base on a GPU: one packs some 400,000 positions a second, of K = 64."""


@dataclass
class Filled:
    """What was added so far, and a sentence for every shard that could not be computed."""

    num_samples: int = 0
    num_positions: int = 0
    num_tokens: int = 0
    num_shards: int = 0
    failures: tuple[str, ...] = ()


def failed_text(failures: Sequence[str]) -> str:
    """What is said of shards that could not be computed."""
    others = f" {len(failures) - 1} more shards could not be computed either." if len(failures) > 1 else ""
    return failures[0] + others


class ShardPipeline:
    """Fills the cache of a writer. Use as a context manager; what was added is in `filled` once it is left.

    cache_spec: of the cache that is written. num_processes: that pack; 0: a thread does. Raises what the teacher and
    `CacheWriter.commit` raise, the latter a shard later, and `PackingStopped`.
    """

    def __init__(
        self,
        writer: CacheWriter,
        teacher: Teacher,
        cache_spec: CacheSpec,
        progress: Progress = lambda _: None,
        on_event: OnEvent = lambda _: None,
        num_processes: int = 0,
    ) -> None:
        self.filled = Filled()
        self._writer, self._teacher, self._cache_spec = writer, teacher, cache_spec
        self._progress, self._on_event = progress, on_event
        self._num_ahead = teacher.num_ahead if isinstance(teacher, LaunchingTeacher) else 1
        self._most_tokens: int | None = None
        self._num_processes = num_processes if sys.executable else 0  # an interpreter within a program starts no other
        self._at_once = max(1, self._num_processes)
        self._pool = ThreadPoolExecutor(self._at_once, thread_name_prefix="logitcache-writer")
        self._writing: deque[Future[ShardCommit]] = deque()
        self._is_left = False
        self._packers: SimpleQueue[PackingProcess] = SimpleQueue()  # of those that pack nothing now
        self._started: list[PackingProcess] = []

    def __enter__(self) -> "ShardPipeline":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is None:
            try:
                self.settle()
            except BaseException as late:
                self._leave(late)
                raise
        self._leave(error)

    def _leave(self, error: BaseException | None) -> None:
        self._is_left = True
        try:
            if error is None or isinstance(error, Exception):  # of one shard: those before it may still be whole
                self._pool.shutdown()
            else:  # asked to stop, by a key or a signal: soon
                wait(self._writing, LEAVING_SECONDS)
        finally:
            if not all(shard.done() for shard in self._writing):
                self._writer.abandon()
                for packer in self._started:  # one that does not answer holds its thread, which this process waits for
                    packer.kill()
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._close_idle()

    def _close_idle(self) -> None:
        """End the processes that pack nothing; one that does is ended by its thread, after it."""
        with suppress(Empty):
            while True:
                self._packers.get_nowait().close()

    def shard(self, batches: Sequence[Sequence[Sample]]) -> None:
        """Capture a shard, and have it written while the next one is captured. Left out where a logit is not finite."""
        captured: list[tuple[Sample, BaseLogprobs]] = []
        running: deque[list[_Launched]] = deque()
        try:
            for batch in batches:
                running.append(self._launched(batch))
                if len(running) > self._num_ahead:
                    captured += self._arrived(running.popleft())  # while the teacher is at the next one
            for parts in running:
                captured += self._arrived(parts)
        except NonFiniteLogits as error:
            self.filled.failures += (str(error),)
            self._on_event(ShardFailed(str(error)))
            return
        self._settle_but(self._at_once - 1)
        self._writing.append(self._pool.submit(self._write, captured))

    def settle(self) -> None:
        """Wait for the shards that are being written."""
        self._settle_but(0)

    def _settle_but(self, num: int) -> None:
        """Wait until so many are being written, the last ones."""
        while len(self._writing) > num:
            commit = self._writing[0].result()  # still among them where this is interrupted
            self._writing.popleft()
            self._settled(commit)

    def _settled(self, commit: ShardCommit) -> None:
        self.filled.num_samples += commit.num_samples
        self.filled.num_positions += commit.num_positions
        self.filled.num_tokens += commit.num_tokens
        self.filled.num_shards += 1
        size = sum(file.size for file in commit.files)
        self._on_event(ShardCommitted(commit.unit, commit.num_positions, commit.num_tokens, size))

    def is_done(self, batches: Sequence[Sequence[Sample]]) -> bool:
        """Whether another worker has committed exactly this meanwhile."""
        return self._writer.is_committed([(sample_id(s.token_ids), s.positions) for batch in batches for s in batch])

    def _launched(self, batch: Sequence[Sample]) -> list[_Launched]:
        """The parts in which a batch fits into memory, each with what gives its records."""
        left = [list(batch)]
        found: list[_Launched] = []
        while left:
            part = left.pop(0)
            size = len(part) * max(len(s.token_ids) for s in part)
            if len(part) > 1 and self._most_tokens is not None and size > self._most_tokens:
                left[:0] = [part[: len(part) // 2], part[len(part) // 2 :]]
                continue
            try:
                found.append((part, launched(self._teacher, part)))
            except EngineFailed:  # which is of the engine, not of this batch
                raise
            except Exception as error:
                if len(part) == 1 or not is_out_of_memory(error):
                    raise
                self._most_tokens = size // 2
                left[:0] = [part]
                self._on_event(BatchHalved(size, self._most_tokens))
            else:
                continue
            gc.collect()  # what the failed forward held, now that its error is gone
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return found

    def _arrived(self, parts: Sequence[_Launched]) -> list[tuple[Sample, BaseLogprobs]]:
        found: list[tuple[Sample, BaseLogprobs]] = []
        for part, records in parts:
            found += zip(part, records(), strict=True)
            self._progress(sum(len(s.token_ids) for s in part))
        return found

    def _write(self, captured: Sequence[tuple[Sample, BaseLogprobs]]) -> ShardCommit:
        (template,) = {sample.chat_template for sample, _ in captured}  # a plan mixes none
        samples = self._cache_spec.stored(captured)
        if not self._num_processes:
            return self._writer.commit(samples, template)
        packer = self._packer()
        try:
            packed = packer.pack(samples, template)
        except BaseException:
            packer.close()
            raise
        self._packers.put(packer)
        if self._is_left:
            self._close_idle()
        return self._writer.commit_packed(packed)

    def _packer(self) -> PackingProcess:
        """One that packs nothing now; a process starts when it is first needed."""
        with suppress(Empty):
            return self._packers.get_nowait()
        packer = PackingProcess(self._writer.manifest)  # no more than threads of the pool
        self._started.append(packer)
        return packer
