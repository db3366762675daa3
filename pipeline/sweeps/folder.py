"""The folder of a sweep: what its files are called, how far a run in it has come, and whose sweep it is.

    sweep.json               what the sweep is of, and its runs
    probe/new, probe/prior   what the base says of the held-out text, captured once
    runs/NAME/               what `training` writes, and result.json or failed.json: what has one of these is done;
                             scales.json: the curve between the base and the run, where it was asked for

Owns that two sweeps never share a folder, and that a run is claimed by a lock which is gone with the process that
holds it. Must not know models, nor how a run is done.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from logitcache.errors import TrainingFailed
from logitcache.json_files import CheckedJson
from logitcache.models.same_base import described_differences
from logitcache.storage import IdentityMismatch
from logitcache.storage.files import is_unfinished
from logitcache.storage.plain_text import one_line
from logitcache.training.run_folder import LOG as LOG
from logitcache.training.run_folder import RUN as RUN

from .config import MAX_METHOD

SWEEP, RESULT, FAILED, SCALES = "sweep.json", "result.json", "failed.json", "scales.json"
RUNS, PROBE = "runs", "probe"
VERSION = 3

_DECISIVE = ("format", "identity", "contents", "anchors", "data", "texts", "pairing", "probe_top_k")
"""Of sweep.json, what decides every run's result besides its own settings; paths may differ."""


def state_of(folder: Path) -> str:
    """Of a run's folder: finished, failed, begun, or waiting."""
    for name, state in ((RESULT, "finished"), (FAILED, "failed"), (RUN, "begun")):
        if (folder / name).is_file():
            return state
    return "waiting"


def check_folder(out: Path) -> None:
    """Raise `TrainingFailed` where `out` holds something else than a sweep, begun or done."""
    ours = {SWEEP, f"{SWEEP}.lock", PROBE, RUNS}
    names = [path.name for path in out.iterdir()] if out.exists() else []
    stray = sorted(name for name in names if name not in ours and not is_unfinished(name, SWEEP))
    if stray and not (out / SWEEP).is_file():
        raise TrainingFailed(
            f"writing to {out}: expected an empty folder or a sweep, found {stray[0]}. Choose another --out."
        )


def stored(out: Path) -> dict[str, Any]:
    """sweep.json of a sweep that was begun; empty where there is none. Raises `UnreadableSweep`."""
    path = out / SWEEP
    if not path.is_file():
        return {}
    found = CheckedJson.of(path, "It is not what `logitcache sweep` wrote. Restore the file, or choose another --out.")
    for run in found.parts("runs"):
        name = run.text("name")
        if Path(name).name != name or run.text("method") != one_line(run.text("method"), MAX_METHOD):
            raise run.wrong("name", "the name of a folder, and of a method")
    return found.values


def check_same(there: dict[str, Any], described: dict[str, Any], out: Path) -> None:
    """Raise `IdentityMismatch` where the sweep that is there (`stored`) was of something else."""
    mine = json.loads(json.dumps({part: described[part] for part in _DECISIVE}))
    differs = described_differences(mine, there, "identity") if there else []
    if differs:
        raise IdentityMismatch(
            f"going on with {out}: the sweep there differs in {', '.join(differs)} (see its {SWEEP}). Its results and "
            "new ones could not be compared. Choose another --out, or use the model, cache and text it was begun with."
        )


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Whether this process alone holds the lock file within; the system lets go of it however the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, blocking=wait, fallback_to_soft=False)  # a soft one would outlive a killed process
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
