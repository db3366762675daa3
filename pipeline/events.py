"""What jobs tell while they work: typed events, and the types of the functions that are told, which print or count.

An event's `name` and its fields are what `--log-json` writes. Must not know any job, nor print.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Event:
    """Something that happened in a job."""

    name: ClassVar[str]


@dataclass(frozen=True)
class WindowPlanned(Event):
    """A window of the data was read, and this worker's shards of it are known."""

    name: ClassVar[str] = "window"
    #: The how manieth of the data, from 0.
    number: int
    #: Of this worker's shards of the window.
    tokens: int
    #: Of those, the tokens that are not in the cache yet.
    missing_tokens: int


@dataclass(frozen=True)
class DataNoted(Event):
    """Something about how the rows are read that the user should know; each once a worker."""

    name: ClassVar[str] = "data-note"
    #: A sentence.
    note: str


@dataclass(frozen=True)
class ShardCommitted(Event):
    """A shard is in the cache."""

    name: ClassVar[str] = "unit-done"
    #: The shard's name.
    unit: str
    positions: int
    tokens: int
    #: Of its files.
    bytes: int


@dataclass(frozen=True)
class ShardFailed(Event):
    """A shard could not be computed, and was left out."""

    name: ClassVar[str] = "unit-failed"
    #: A sentence.
    why: str


@dataclass(frozen=True)
class BatchHalved(Event):
    """Memory ran out on a batch."""

    name: ClassVar[str] = "batch-halved"
    #: Of the batch, with padding.
    tokens: int
    #: The most tokens of a batch from here on.
    to: int


@dataclass(frozen=True)
class RayStarted(Event):
    """A job runs on Ray."""

    name: ClassVar[str] = "ray"
    actors: int
    #: Into how many the job is cut.
    shares: int
    #: Machines of the cluster.
    nodes: int


@dataclass(frozen=True)
class ShareDone(Event):
    """A share of a job on Ray is done."""

    name: ClassVar[str] = "share-done"
    #: Its number, from 0.
    share: int
    #: Shares that are done by now.
    done: int
    #: Shares of the job.
    of: int


@dataclass(frozen=True)
class Finished(Event):
    """A worker has done its part."""

    name: ClassVar[str] = "finished"
    #: Samples that it added.
    samples: int
    #: Positions that it added.
    positions: int


Progress = Callable[[int], None]
"""Called with the number of tokens done since the last call."""

OnEvent = Callable[[Event], None]
"""Called with what happened."""

OnMessage = Callable[[str], None]
"""Called with a sentence for people."""
