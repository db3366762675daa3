"""What a long job says while it runs: a bar and notes for a person, or lines of JSON for a machine; and SIGTERM."""

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from logitcache.events import (
    BatchHalved,
    DataNoted,
    Evaluated,
    Event,
    ShardFailed,
    StopRequest,
    TrainProgress,
    WindowPlanned,
)

from .common import note, progress_bar
from .evaluation_words import evaluation_words

KEPT, GOES_ON = "What was committed is kept", "the same command goes on"


@contextmanager
def terminated_softly(kept: str = KEPT, goes_on: str = GOES_ON) -> Iterator[StopRequest]:
    """SIGTERM becomes `Terminated`, raised where the program is, which leaves the unit in work and says so; or a
    request, where the job looks for one. kept, goes_on: the halves of the sentence."""
    stop = StopRequest(kept, goes_on)
    before = signal.signal(signal.SIGTERM, lambda _number, _frame: stop.ask())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def _progress_words(event: TrainProgress) -> str:
    left = ""
    if event.seconds_left is not None:
        hours, minutes = divmod(math.ceil(event.seconds_left / 60), 60)
        left = f", {hours} h {minutes} min left" if hours else f", {minutes} min left"
    said = "".join(f", {name} {event.values[name]:.3f}" for name in ("ce", "kl", "anchor_kl") if name in event.values)
    return f"Step {event.step:,} of {event.of:,}: {event.tokens_per_second:,.0f} tokens/s{left}{said}."


class Console:
    """stderr of a job. as_json: a line of JSON an event, and nothing for people. speaks: whether this process does."""

    def __init__(self, as_json: bool, speaks: bool = True) -> None:
        self.speaks, self._as_json = speaks, as_json
        self._bar: Any = None
        self._noted: set[str] = set()

    def note(self, text: str) -> None:
        """A line for the person at the terminal."""
        if self.speaks and not self._as_json:
            note(text)

    def on_event(self, event: Event) -> None:
        """An event: a line of JSON, or for a person what they should know."""
        if self._as_json:
            note(json.dumps({"time": round(time.time(), 3), "event": event.name, **asdict(event)}))
        elif isinstance(event, WindowPlanned) and self._bar is not None:
            self._bar.total = (self._bar.total or 0) + event.tokens
            self._bar.refresh()
        elif isinstance(event, DataNoted) and event.note not in self._noted:
            self._noted.add(event.note)  # each of Ray's shares says it
            self.note(event.note)
        elif isinstance(event, BatchHalved):
            note(
                f"Memory ran out on a batch of {event.tokens:,} tokens: from here on {event.to:,} at most, "
                f"whose numbers round otherwise. With --batch-tokens {event.to} from the start "
                "a job that is killed ends with the same bytes."
            )
        elif isinstance(event, ShardFailed):
            note(f"A shard was left out: {event.why}")
        elif isinstance(event, Evaluated):
            note(f"Step {event.step:,}: {evaluation_words(event.values)}.")
        elif isinstance(event, TrainProgress):
            note(_progress_words(event))

    @contextmanager
    def bar(self, description: str) -> Iterator[Callable[[int], None]]:
        """A bar over the tokens of the windows so far; yields the function that advances it."""
        silent = self._as_json or not self.speaks
        with progress_bar(description, None, silent) as self._bar:
            yield self._bar.update
        self._bar = None
