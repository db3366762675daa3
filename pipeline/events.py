"""What jobs tell while they work: typed events, and the types of the functions that are told, which print or count. And
what they are told: to stop.

An event's `name` and its fields are what `--log-json` writes. Must not know any job, nor print.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@dataclass(frozen=True)
class TrainProgress(Event):
    """How far a run is, at least every half minute."""

    name: ClassVar[str] = "progress"
    step: int
    #: Steps of the run.
    of: int
    #: Of this process since it began, padding left out.
    tokens_per_second: float
    #: At the pace since it began; None before the first step.
    seconds_left: float | None
    #: What was logged last, by its names.
    values: dict[str, float]


@dataclass(frozen=True)
class TrainLogged(Event):
    """What the steps since the last log came to."""

    name: ClassVar[str] = "log"
    step: int
    #: By the names of train_log.jsonl.
    values: dict[str, float]


@dataclass(frozen=True)
class Evaluated(Event):
    """Held-out text was measured while training."""

    name: ClassVar[str] = "evaluation"
    step: int
    #: By the names of eval_log.jsonl.
    values: dict[str, float]


@dataclass(frozen=True)
class Trained(Event):
    """A run is finished."""

    name: ClassVar[str] = "trained"
    step: int
    #: Of the weights that were saved; None: the last step's.
    best_step: int | None
    #: Why it ended before its last step; "": it did not.
    stopped: str
    #: Logged last.
    values: dict[str, float]
    #: Of the weights that were saved.
    evaluated: dict[str, float]


class Terminated(BaseException):
    """A job was asked to stop, as by a scheduler that takes the machine back. It is no KeyboardInterrupt, of which
    click makes its own."""

    def __init__(self, kept: str, goes_on: str) -> None:
        """What is kept of the work, and how it goes on: the two halves of a sentence."""
        super().__init__(kept, goes_on)
        self.kept, self.goes_on = kept, goes_on


class StopRequest:
    """Whether this process was asked to stop. It stops where it is, unless a job said that it will look for itself."""

    def __init__(self, kept: str, goes_on: str, is_patient: bool = False) -> None:
        """kept, goes_on: of `Terminated`, where nothing else is known. is_patient: a job always looks for itself."""
        self.is_asked = False
        self._kept, self._goes_on = kept, goes_on
        self._is_patient, self._looks = is_patient, False

    def ask(self) -> None:
        """Ask it to stop; who asks twice does not want to wait. Raises `Terminated`."""
        waits = self._is_patient or (self._looks and not self.is_asked)
        self.is_asked = True
        if not waits:
            raise self.stopped()

    def stopped(self, kept: str = "") -> Terminated:
        """What to raise by a job that has stopped. kept: what it has put away for that."""
        return Terminated(kept or self._kept, self._goes_on)

    @contextmanager
    def looked_for(self) -> Iterator[None]:
        """A job looks for itself within, where it can put away what it has."""
        before, self._looks = self._looks, True
        try:
            yield
        finally:
            self._looks = before


Progress = Callable[[int], None]
"""Called with the number of tokens done since the last call."""

OnEvent = Callable[[Event], None]
"""Called with what happened."""

OnMessage = Callable[[str], None]
"""Called with a sentence for people."""
