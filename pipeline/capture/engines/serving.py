"""An engine in a process of its own, as that process sees it: runs what it is asked, answers with hidden states.

Owns the loop between requests and forwards, and that the process leaves nothing behind: when nobody asks any more, it
shuts the engine down, and whatever it started ends with it. Must not know which engine it is. The other end is
`process`.
"""

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import IO, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitcache.errors import is_out_of_memory
from logitcache.storage.child_process import ends_of_child, read_array, read_header, write_frame

STARTED, HIDDEN, FAILED, DIED = "started", "hidden", "failed", "died"
"""Kinds of answers; the last is what the other end makes of their end."""

STARTING, RUNNING = "starting", "running"
"""What may fail."""

LEAVING_SECONDS = 5.0
"""How long an engine may take to shut down before its process is killed."""


class Engine(Protocol):
    """What runs token sequences, some at a time."""

    #: What the job is told of it once it has started: its version, say.
    facts: dict[str, Any]

    def add(self, number: int, token_ids: list[int]) -> None:
        """Have a sequence run."""
        ...

    def step(self) -> list[tuple[int, Tensor]]:
        """One forward: the sequences that are done, with their last hidden states [n, D] after the final norm."""
        ...

    def has_work(self) -> bool:
        """Whether some are not done."""
        ...

    def shut_down(self) -> None:
        """End everything that it started."""
        ...


_Asked = tuple[int, NDArray[Any], NDArray[Any]]
"""Number, token ids, positions."""


def serve(start: Callable[[Mapping[str, Any]], Engine]) -> None:
    """The process: start an engine as the first header says, and run what comes, until nothing more does."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)  # of who asks, who then closes the pipe
    source, sink = ends_of_child()
    first = read_header(source)
    if first is None:
        return
    asked: SimpleQueue[_Asked | None] = SimpleQueue()
    threading.Thread(target=_listen, args=(source, asked), daemon=True).start()
    with suppress(BrokenPipeError):
        try:
            engine = start(first)
        except Exception as error:  # of a library: many kinds
            write_frame(sink, _failed(STARTING, error))
        else:
            try:
                write_frame(sink, {"kind": STARTED, **engine.facts})
                _run(engine, asked, sink)
            finally:
                engine.shut_down()
    _leave()


def _listen(source: IO[bytes], asked: "SimpleQueue[_Asked | None]") -> None:
    try:
        while (header := read_header(source)) is not None:
            tokens = read_array(source, "u4", (header["tokens"],))
            positions = read_array(source, "i4", (header["positions"],))
            if tokens is None or positions is None:
                break
            asked.put((header["number"], tokens, positions))
    finally:
        asked.put(None)
        time.sleep(LEAVING_SECONDS)
        _leave()  # the engine does not leave by itself


def _leave() -> None:
    """End the group that this process leads."""
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)


def _run(engine: Engine, asked: "SimpleQueue[_Asked | None]", sink: IO[bytes]) -> None:
    positions: dict[int, NDArray[Any]] = {}
    while True:
        while (found := _next(asked, wait=not engine.has_work())) is not _NOTHING:
            if found is None:
                return
            number, tokens, positions[number] = found
            try:
                engine.add(number, tokens.tolist())
            except Exception as error:
                write_frame(sink, _failed(RUNNING, error, number))
                return
        try:
            done = engine.step()
        except Exception as error:
            write_frame(sink, _failed(RUNNING, error))
            return
        for number, hidden in done:
            _answer(sink, number, hidden, positions.pop(number))


_NOTHING: Any = object()


def _next(asked: "SimpleQueue[_Asked | None]", wait: bool) -> _Asked | None:
    """What was asked next, None that nothing more will be, `_NOTHING` where nothing was asked yet."""
    try:
        return asked.get(block=wait)
    except Empty:
        return _NOTHING  # type: ignore[no-any-return]


def _answer(sink: IO[bytes], number: int, hidden: Tensor, positions: NDArray[Any]) -> None:
    rows = hidden[torch.from_numpy(positions.astype(np.int64))].contiguous()
    data = rows.view(torch.uint8).numpy()
    header = {"kind": HIDDEN, "number": number, "shape": list(rows.shape), "size": data.size}
    write_frame(sink, {**header, "dtype": str(rows.dtype).removeprefix("torch.")}, (data,))


def _failed(what: str, error: Exception, number: int | None = None) -> dict[str, Any]:
    return {
        "kind": FAILED,
        "what": what,
        "reason": reason_of(error),
        "number": number,
        "out_of_memory": is_out_of_memory(error),
    }


def reason_of(error: Exception) -> str:
    """One line of what a library says, without its full stop: of pydantic, which counts first, the first reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if len(lines) > 1 and re.match(r"\d+ validation errors? for ", lines[0]):
        reasons = [line for line in lines[1:] if " [type=" in line]
        lines = [reasons[0].partition(" [type=")[0] if reasons else lines[1]]
    return re.sub(r"^(Value|Assertion) error, ", "", lines[0]).rstrip(".")
