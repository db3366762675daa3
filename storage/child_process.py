"""A process that computes for this one: how it is started, and the frames that go to it and come back.

Owns that it imports what this interpreter imports, that it is spoken with through its standard input and a pipe of its
own, since anything may print on standard output, and how a frame begins and ends: a header in JSON, and arrays as they
lie in memory. Nothing is pickled. A frame that was left unfinished leaves the pipe useless: what comes next would be
read as the rest of it. Must not know what is sent.
"""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

_BUFFER = 2**20
_LENGTH = struct.Struct("<Q")
_RUN = "import sys; sys.path[:] = sys.argv[4:]; getattr(__import__(sys.argv[2], fromlist=['_']), sys.argv[3])()"
"""Arguments: the descriptor that answers go to, module and function, and where to import from: what this interpreter
imports, not what lies in the folder that it works in."""


@dataclass(frozen=True)
class Child:
    """A process, what it reads, and what it answers."""

    process: subprocess.Popen[bytes]
    to: IO[bytes]
    answers: IO[bytes]


def start_child(
    module: str,
    function: str,
    environment: Mapping[str, str] | None = None,
    stderr: IO[bytes] | None = None,
    own_session: bool = False,
) -> Child:
    """A process that calls a function of a module, which finds its ends by `ends_of_child`.

    environment: in place of this one's; stderr: None is this one's; own_session: a signal from the terminal does not
    reach it, and a signal to its group reaches all that it starts.
    """
    answers, theirs = os.pipe()
    from_child = os.fdopen(answers, "rb", _BUFFER)
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _RUN, str(theirs), module, function, *_IMPORT_PATHS],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            bufsize=_BUFFER,
            pass_fds=(theirs,),
            env=environment,
            start_new_session=own_session,
        )
    except BaseException:
        from_child.close()
        raise
    finally:
        os.close(theirs)
    assert process.stdin is not None
    return Child(process, process.stdin, from_child)


def ends_of_child() -> tuple[IO[bytes], IO[bytes]]:
    """In the process: what it is asked through, and what it answers through."""
    return sys.stdin.buffer, os.fdopen(int(sys.argv[1]), "wb", _BUFFER)


def write_frame(sink: IO[bytes], header: dict[str, Any], arrays: Iterable[NDArray[Any]] = ()) -> None:
    """Send a header and what follows it. Raises BrokenPipeError where nobody reads."""
    data = json.dumps(header).encode()
    sink.write(_LENGTH.pack(len(data)) + data)
    for array in arrays:
        sink.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    sink.flush()


def read_header(source: IO[bytes]) -> dict[str, Any] | None:
    """The next header; None where nothing more comes, or not all of it."""
    length = source.read(_LENGTH.size)
    if len(length) < _LENGTH.size:
        return None
    (size,) = _LENGTH.unpack(length)
    data = source.read(size)
    return json.loads(data) if len(data) == size else None


def read_array(source: IO[bytes], dtype: str, shape: Sequence[int]) -> NDArray[Any] | None:
    """An array that follows a header; None where it ends early."""
    found = np.empty(shape, dtype=dtype)
    wanted, at = found.reshape(-1).view(np.uint8).data, 0
    while at < len(wanted):
        if not (num := source.readinto(wanted[at:])):  # type: ignore[attr-defined]
            return None
        at += num
    return found


def _absolute(paths: Sequence[str]) -> list[str]:
    found = []
    for path in paths:
        with suppress(FileNotFoundError):  # relative to a folder that is gone: nothing is imported from there either
            found.append(str(Path(path).absolute()))
    return found


_IMPORT_PATHS = _absolute(sys.path)
"""What this was imported from, before anybody goes to another folder."""
