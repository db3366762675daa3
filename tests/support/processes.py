"""Other processes, as the system sees them: whether they run, and how one is stopped."""

import os
import signal
import time
from pathlib import Path


def state_of(pid: int) -> str:
    """As the system says it: Z only waits for its parent to look, T is stopped; "" where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


def is_there(pid: int) -> bool:
    return state_of(pid) not in ("", "Z")


def stop(pid: int) -> None:
    """Until then one of its threads may read on."""
    os.kill(pid, signal.SIGSTOP)
    while state_of(pid) != "T":
        time.sleep(0.01)


def assert_gone(*pids: int, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while any(map(is_there, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
