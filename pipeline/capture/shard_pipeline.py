"""Shards captured one after the other; each is encoded and written while the base runs on the next.

Owns that overlap, and what happens when a batch does not fit into memory (it is halved, and so are those after it) or
cannot be computed at all (its shard is left out and reported). Must not know which shards there are, or why.
"""

import gc
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

import torch

from logitcache.data.samples import Sample
from logitcache.errors import NonFiniteLogits, is_out_of_memory
from logitcache.events import BatchHalved, OnEvent, Progress, ShardCommitted, ShardFailed
from logitcache.storage import BaseLogprobs, CacheWriter, sample_id
from logitcache.storage.manifest import ShardCommit

from .cache_spec import CacheSpec
from .teacher import Teacher

LEAVING_SECONDS = 5.0
"""How long a shard that is being written is waited for when the work is stopped."""


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

    cache_spec: of the cache that is written. Raises what the teacher and `CacheWriter.commit` raise, the latter one
    shard later.
    """

    def __init__(
        self,
        writer: CacheWriter,
        teacher: Teacher,
        cache_spec: CacheSpec,
        progress: Progress = lambda _: None,
        on_event: OnEvent = lambda _: None,
    ) -> None:
        self.filled = Filled()
        self._writer, self._teacher, self._cache_spec = writer, teacher, cache_spec
        self._progress, self._on_event = progress, on_event
        self._most_tokens: int | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="logitcache-writer")
        self._writing: Future[ShardCommit] | None = None

    def __enter__(self) -> "ShardPipeline":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is None:
            self.settle()
            self._pool.shutdown()
            return
        if isinstance(error, Exception):  # of one shard: the one before it may still be whole
            self._pool.shutdown()
            return
        if self._writing is not None:  # asked to stop, by a key or a signal: soon
            with suppress(Exception):
                self._writing.result(LEAVING_SECONDS)
            if not self._writing.done():
                self._writer.abandon()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def shard(self, batches: Sequence[Sequence[Sample]]) -> None:
        """Capture a shard, and have it written while the next one is captured. Left out where a logit is not finite."""
        captured: list[tuple[Sample, BaseLogprobs]] = []
        try:
            for batch in batches:
                captured += self._captured(batch)
                self._progress(sum(len(s.token_ids) for s in batch))
        except NonFiniteLogits as error:
            self.filled.failures += (str(error),)
            self._on_event(ShardFailed(str(error)))
            return
        self.settle()
        self._writing = self._pool.submit(self._write, captured)

    def settle(self) -> None:
        """Wait for the shard that is being written, if there is one."""
        if self._writing is None:
            return
        commit = self._writing.result()
        self._writing = None
        self.filled.num_samples += commit.num_samples
        self.filled.num_positions += commit.num_positions
        self.filled.num_tokens += commit.num_tokens
        self.filled.num_shards += 1
        size = sum(file.size for file in commit.files)
        self._on_event(ShardCommitted(commit.unit, commit.num_positions, commit.num_tokens, size))

    def is_done(self, batches: Sequence[Sequence[Sample]]) -> bool:
        """Whether another worker has committed exactly this meanwhile."""
        return self._writer.is_committed([(sample_id(s.token_ids), s.positions) for batch in batches for s in batch])

    def _captured(self, batch: Sequence[Sample]) -> list[tuple[Sample, BaseLogprobs]]:
        pending = [list(batch)]
        found: list[tuple[Sample, BaseLogprobs]] = []
        while pending:
            part = pending.pop(0)
            size = len(part) * max(len(s.token_ids) for s in part)
            if len(part) > 1 and self._most_tokens is not None and size > self._most_tokens:
                pending[:0] = [part[: len(part) // 2], part[len(part) // 2 :]]
                continue
            try:
                found += zip(part, self._teacher(part), strict=True)
            except Exception as error:
                if len(part) == 1 or not is_out_of_memory(error):
                    raise
                self._most_tokens = size // 2
                pending[:0] = [part]
                self._on_event(BatchHalved(size, self._most_tokens))
            else:
                continue
            gc.collect()  # what the failed forward held, now that its error is gone
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return found

    def _write(self, captured: Sequence[tuple[Sample, BaseLogprobs]]) -> ShardCommit:
        (template,) = {sample.chat_template for sample, _ in captured}  # a plan mixes none
        return self._writer.commit(self._cache_spec.stored(captured), template)
