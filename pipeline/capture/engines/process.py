"""An engine in a process of its own, as the job sees it: tokens go in, hidden states come back.

Owns the process from its start to its end: it leads a group, so that all that it starts is ended with it; a signal, a
failure or the end of the job ends it; where it dies or answers nothing, the job hears so. Nothing here waits without
looking. Must not know which engine it is, nor what is made of hidden states. The other end is `serving`.
"""

import os
import select
import signal
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from queue import Empty, SimpleQueue
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from logitcache.data.samples import Sample
from logitcache.errors import EngineFailed
from logitcache.storage.child_process import Child, read_array, read_header, start_child, write_frame

from .serving import DIED, FAILED, HIDDEN, LEAVING_SECONDS, STARTED, STARTING

SILENT_SECONDS = 50.0
"""How long an engine that was asked may answer nothing while it is waited for."""

LOOK_SECONDS = 0.5
"""How often it is looked whether the process is there still: its end of the pipe may be held by what it started."""


@dataclass(frozen=True)
class Command:
    """What a process is told: module and function that serve, what they are asked to start, and the environment."""

    name: str
    module: str
    function: str
    start: Mapping[str, Any]
    environment: Mapping[str, str]


class EngineProcess:
    """A running engine. Use as a context manager, or `close` it; from one thread.

    Raises `EngineFailed` where it does not start, with the reason that it gives.
    """

    def __init__(self, command: Command) -> None:
        self._name, self._number, self._silent = command.name, 0, 0.0
        self._origins: dict[int, str] = {}  # of what is not fetched yet
        self._arrived: dict[int, Tensor] = {}
        self._inbox: SimpleQueue[tuple[dict[str, Any], NDArray[Any] | None]] = SimpleQueue()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `close`)
        self._closed = False
        self._child: Child = start_child(
            command.module, command.function, command.environment, self._said, own_session=True
        )
        os.set_blocking(self._child.to.fileno(), False)
        self._listener = threading.Thread(target=self._listen, name=f"logitcache-{self._name}", daemon=True)
        try:
            self._listener.start()
            self._send(dict(command.start))
            self.facts = self._started()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "EngineProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Of the process, and of the group that it leads."""
        return self._child.process.pid

    def ask(self, samples: Sequence[Sample]) -> list[int]:
        """Have the samples run, and say by which numbers their hidden states are fetched."""
        numbers = list(range(self._number, self._number + len(samples)))
        self._number += len(samples)
        for number, sample in zip(numbers, samples, strict=True):
            self._origins[number] = sample.origin
            header = {"number": number, "tokens": len(sample.token_ids), "positions": len(sample.positions)}
            self._send(header, (sample.token_ids, sample.positions))
        return numbers

    def fetch(self, numbers: Sequence[int]) -> Tensor:
        """Hidden states of the supervised positions of these samples, one after the other, [N, D] in main memory."""
        while not self._arrived.keys() >= set(numbers):
            self._take(*self._next())
        for number in numbers:
            del self._origins[number]
        return torch.cat([self._arrived.pop(number) for number in numbers])

    def forget(self, numbers: Sequence[int]) -> None:
        """Nobody will fetch these, if they were not fetched."""
        for number in numbers:
            self._origins.pop(number, None)
            self._arrived.pop(number, None)

    def close(self) -> None:
        """End the process and all that it started: it is let go, and killed where it does not leave soon."""
        if self._closed:
            return
        self._closed = True
        try:
            with suppress(OSError):
                self._child.to.close()  # nothing is in its buffer
            deadline = time.monotonic() + LEAVING_SECONDS
            while not self._is_dead() and time.monotonic() < deadline:
                time.sleep(0.02)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)  # its number is not another's: it was not waited for yet
            self._child.process.wait()
            if self._listener.ident is not None:
                self._listener.join()  # nobody holds the other end of its pipe any more
            self._child.answers.close()
            self._said.close()

    def _listen(self) -> None:
        source = self._child.answers
        try:
            while (header := read_header(source)) is not None:
                data = None
                if header["kind"] == HIDDEN and (data := read_array(source, "u1", (header["size"],))) is None:
                    break
                self._inbox.put((header, data))
        finally:
            self._inbox.put(({"kind": DIED}, None))

    def _send(self, header: dict[str, Any], arrays: Sequence[NDArray[Any]] = ()) -> None:
        if self._closed:
            raise EngineFailed(f"running {self._name}: it was ended. What was committed is kept. Start it again.")
        frame = BytesIO()
        write_frame(frame, header, arrays)
        left, pipe, self._silent = frame.getbuffer(), self._child.to.fileno(), 0.0
        while left:
            try:
                left = left[os.write(pipe, left) :]
                self._silent = 0.0
            except BrokenPipeError:
                while True:  # what it said last, or that it is dead
                    self._take(*self._next())
            except BlockingIOError:
                if not select.select([], [pipe], [], LOOK_SECONDS)[1]:
                    self._look()

    def _started(self) -> dict[str, Any]:
        """What it says once it has started, which may take as long as it takes."""
        while True:
            header, data = self._next(may_be_silent=True)
            if header["kind"] == STARTED:
                return header
            self._take(header, data)

    def _take(self, header: dict[str, Any], data: NDArray[Any] | None) -> None:
        if header["kind"] == FAILED:
            raise self._failure(header)
        number = header["number"]
        if number in self._origins:
            assert data is not None
            dtype = getattr(torch, header["dtype"])
            self._arrived[number] = torch.from_numpy(data).view(dtype).reshape(header["shape"])

    def _next(self, may_be_silent: bool = False) -> tuple[dict[str, Any], NDArray[Any] | None]:
        self._silent = 0.0
        while True:
            try:
                header, data = self._inbox.get(timeout=LOOK_SECONDS)
            except Empty:
                self._look(may_be_silent)
                continue
            if header["kind"] == DIED:
                raise self._death()
            return header, data

    def _look(self, may_be_silent: bool = False) -> None:
        """After a while without an answer. These are counted, not the clock: the job itself may have been stopped."""
        if self._is_dead():
            raise self._death()
        self._silent += LOOK_SECONDS
        if self._silent > SILENT_SECONDS and not may_be_silent:
            raise EngineFailed(
                f"running {self._name}: expected the hidden states of {len(self._origins)} samples, found that its "
                f"process {self.pid} has answered nothing for {self._silent:.0f} s. It was ended; what was committed "
                "is kept. Run the same command again, with a smaller --batch-tokens where one forward takes so long."
            )

    def _is_dead(self) -> bool:
        """Without waiting for it, so that its number stays its own."""
        if self._child.process.returncode is not None:
            return True
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # SIGCHLD is ignored here, so that nobody can wait for it
            return True

    def _death(self) -> EngineFailed:
        last = self._last_words()
        self.close()
        status = self._child.process.returncode
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return EngineFailed(
            f"running {self._name}: its process {self.pid} {how}{last}. What was committed is kept. Run the same "
            "command again" + (", on a machine with more memory if that ran out." if status == -9 else ".")
        )

    def _failure(self, header: dict[str, Any]) -> EngineFailed:
        what, reason = header["what"], header["reason"]
        origin = self._origins.get(header["number"], "") if header["number"] is not None else ""
        where = f"{what} {self._name}" + (f" on {origin}" if origin else "")
        if header["out_of_memory"]:
            return EngineFailed(
                f"{where}: memory ran out ({reason}). Nothing of it was cached; what was committed is kept. Give it "
                "fewer --batch-tokens or more GPUs (--tensor-parallel), or another share of the memory "
                "(--engine-arg gpu_memory_utilization=0.7)."
            )
        kept = "Nothing was run." if what == STARTING else "Nothing of it was cached; what was committed is kept."
        return EngineFailed(f"{where}: {reason}. {kept} Put that right, or use --engine transformers.")

    def _last_words(self) -> str:
        """The last line that it wrote to stderr."""
        self._said.seek(0, os.SEEK_END)
        self._said.seek(max(0, self._said.tell() - 4096))
        lines = self._said.read().decode("utf-8", "replace").strip().splitlines()
        return f" ({lines[-1].strip()[:200]})" if lines and lines[-1].strip() else ""
