"""The output folder of a training run: who writes to it, what is whole in it, and where a resumed run goes on.

Owns run.json, run.lock, checkpoints/, where the best evaluation's weights are too, and the order of what is written: a
list of files (`saved_files`) is on the disk before anything older is removed, so that whatever is killed, and whenever
the power goes, something whole is left. The lists keep the description of the run too: run.json is for people, and is
written again from them. Must not know the trainer or import torch. Trade-off: two checkpoints, and a third while it is
written, take their space.
"""

import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from logitcache.adapters.saved_files import FILES, about_of, fault_of, names_below, seal
from logitcache.errors import FolderInUse, TrainingFailed
from logitcache.json_files import read_checked, write_checked
from logitcache.models.same_base import described_differences
from logitcache.settings import line_settings
from logitcache.storage import IdentityMismatch
from logitcache.storage.files import is_unfinished, sync_path
from logitcache.storage.plain_text import one_line

from .settings import PARTS

RUN, LOG, LOCK, CHECKPOINTS = "run.json", "train_log.jsonl", "run.lock", "checkpoints"
EVAL_LOG = "eval_log.jsonl"
"""Of a run with evaluation."""

START = "start"
"""Folder of the first factors, among the checkpoints, of an adapter that cannot do without them."""

KEPT = 2
"""Checkpoints: the newest, and one more should a disk lose a part of it."""

PATIENCE_SECONDS = 60.0
"""How long a file of another machine may take to be seen here: as long as NFS may keep the names of a folder."""

CARD = "README.md"
"""Which people write anew, so that it is in no list."""

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_BEST = re.compile(r"best-(\d+)")
_STAGED = "final.new"
_DIGEST = re.compile(r"[0-9a-f]{16,}")
_VARIES = ("versions", "device", "against_model")
"""Parts of a description in which a resumed run may differ."""

Json = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """What a folder holds of a run."""

    #: To go on from.
    checkpoint: Path | None = None
    #: Of a run that is finished, and nothing is to be done.
    result: Json | None = None
    #: What was left aside, and why, a sentence each.
    said: tuple[str, ...] = ()


@contextmanager
def held(out: Path) -> Iterator[None]:
    """This process alone writes to the folder within; the system lets go of it however the process ends.

    Raises `FolderInUse` where another does.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK, blocking=False, fallback_to_soft=False)  # a soft one would outlive a killed process
    try:
        lock.acquire()
    except Timeout as error:
        raise FolderInUse(
            f"writing to {out}: expected nobody else there, found {_holder(out)} training into it. Two runs would "
            "overwrite each other. Wait for it, or choose another --out."
        ) from error
    try:
        since = f"{datetime.now():%Y-%m-%d %H:%M}"
        (out / LOCK).write_text(f"process {os.getpid()} on {socket.gethostname()} (since {since})", encoding="utf-8")
        yield
    finally:
        try:
            (out / LOCK).write_bytes(b"")
        finally:
            lock.release()


@contextmanager
def claimed(out: Path, description: Json, resume: bool) -> Iterator[Found]:
    """The folder is this process's alone within; yields what it holds of the run that `description` describes.

    Under the lock the folder is checked once more, for it may have changed since `check_out` let weights be read.
    Raises as `check_out`, `held` and `look`.
    """
    with held(out):
        check_out(out, resume)
        yield look(out, description)


def check_out(out: Path, resume: bool) -> None:
    """Raise `TrainingFailed` where a run may not write to a folder: it holds something else, or a run not to resume.

    Changes nothing. For before weights are read: a run that is refused then costs no time, and leaves no lock among
    files that are not its own. What it finds is settled only under the lock, by `claimed`.
    """
    if not out.exists():
        return
    if _run_json(out) is None and _recorded(out) is None:
        if (out / RUN).exists():
            raise TrainingFailed(
                f"reading {out / RUN}: it is not what `logitcache train` writes. Choose another --out."
            )
        if not all(_is_leftover(path) for path in out.iterdir()):
            raise TrainingFailed(f"writing to {out}: expected an empty folder, found files. Choose another --out.")
    elif not resume:
        raise TrainingFailed(f"writing to {out}: it holds a run. Go on with it by --resume, or choose another --out.")


def look(out: Path, description: Json) -> Found:
    """What there is of the run that `description` describes. Changes nothing.

    Raises `IdentityMismatch` where the folder holds another run, `TrainingFailed` where it holds a finished one that is
    damaged and has no whole checkpoint.
    """
    recorded, run = _recorded(out), _run_json(out)
    if recorded is None and run is None:
        return Found()
    _check_same(out, description, recorded or run or {})
    said = [] if _agree(run, recorded) else [f"{RUN} is missing or damaged: it is written again."]
    if not (out / FILES).exists() and (run or {}).get("status") != "finished":
        return _to_go_on(out, description, said)
    fault = fault_of(out)
    about = about_of(out) or {}
    if fault is None and not all(isinstance(about.get(name), dict) for name in ("run", "result")):
        fault = f"{FILES} does not say what came out"
    if fault is None:
        return Found(result=about["result"], said=tuple(said))
    found = _to_go_on(out, description, [*said, f"The finished run is damaged: {fault}."])
    if found.checkpoint is None:
        raise TrainingFailed(
            f"resuming {out}: expected a finished run, found that {fault}, and no whole checkpoint to go on from. "
            "Restore the file from a copy, or train again with another --out."
        )
    return found


def begin(out: Path, description: Json, checkpoint: Path | None) -> None:
    """Say that the run is under way, and remove what it will write again: all that is newer than the checkpoint."""
    (out / FILES).unlink(missing_ok=True)
    write_checked(out / RUN, {**description, "status": "started"})
    shutil.rmtree(out / _STAGED, ignore_errors=True)
    for path in (*_checkpoints(out), *_bests(out)):
        if checkpoint is None or _step(path) > _step(checkpoint):
            shutil.rmtree(path)


def keep_start(out: Path, description: Json, save: Callable[[Path], None]) -> None:
    """Make the folder of the first factors, as a whole or not at all. save: writes them to a folder."""
    _keep(out, START, {"run": description}, save)


def keep_best(out: Path, description: Json, step: int, save: Callable[[Path], None]) -> None:
    """Make the folder of what was trained at the best evaluation so far, as a whole or not at all.

    Those before it go when no checkpoint needs them: `seal_checkpoint`. save: writes it to a folder.
    """
    _keep(out, f"best-{step}", {"run": description, "step": step}, save)


def best_of(out: Path, step: int) -> Path:
    """The folder of the best evaluation, at this step. Raises `TrainingFailed` where it is not what was written."""
    folder = out / CHECKPOINTS / f"best-{step}"
    fault = fault_of(folder)
    if fault is not None:
        raise TrainingFailed(
            f"taking the weights of the best evaluation from {folder}: expected what was written at step {step}, found "
            f"that {fault}. The last step's would not be what was asked for. Train again with another --out."
        )
    return folder


def _keep(out: Path, name: str, about: Json, save: Callable[[Path], None]) -> None:
    folder, staged = out / CHECKPOINTS / name, out / CHECKPOINTS / f"{name}.new"
    for path in (staged, folder):
        if path.exists():
            shutil.rmtree(path)
    staged.mkdir(parents=True)
    save(staged)
    seal(staged, about)
    staged.rename(folder)
    sync_path(folder.parent)


def start_of(out: Path) -> Path:
    """The folder of the first factors. Raises `TrainingFailed` where it is not what was written."""
    folder = out / CHECKPOINTS / START
    fault = fault_of(folder)
    if fault is not None:
        raise TrainingFailed(
            f"going on from {folder}: the first factors of this run are missing or damaged ({fault}), and without them "
            "its checkpoints are of no use. Start again with another --out."
        )
    return folder


def seal_checkpoint(out: Path, step: int, description: Json, num_processes: int) -> None:
    """List a checkpoint that every process has written its part of, and then remove those before the one before it.

    Raises `TrainingFailed` where a process's part is not seen here.
    """
    folder = out / CHECKPOINTS / f"checkpoint-{step}"
    ranks = [f"rng_state_{rank}.pth" for rank in range(num_processes)] if num_processes > 1 else ["rng_state.pth"]
    _wait_for([folder / name for name in ("trainer_state.json", *ranks)])
    _sync_logs(out)
    seal(folder, {"run": description, "step": step})
    older = [path for path in _checkpoints(out) if _step(path) < step]
    spare = [path for path in older if about_of(path) is not None][: KEPT - 1]
    for path in older:
        if path not in spare:
            shutil.rmtree(path, ignore_errors=True)  # what is left of it is not whole
    bests = _bests(out)
    needed = [next((best for best in bests if _step(best) <= _step(path)), None) for path in (folder, *spare)]
    for path in bests:
        if path not in needed and _step(path) < step:
            shutil.rmtree(path, ignore_errors=True)


def finish(out: Path, description: Json, result: Json, save: Callable[[Path], None]) -> None:
    """Save what was trained, list it, say that the run is finished, and remove the checkpoints, in this order.

    save: writes what was trained to a folder.
    """
    staged = out / _STAGED
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    save(staged)
    names = names_below(staged)
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).replace(out / name)
    shutil.rmtree(staged)
    _sync_logs(out)
    seal(out, {"run": description, "result": result}, [name for name in names if name != CARD])
    settle(out)


def settle(out: Path) -> None:
    """What is left to do in a folder whose final list is whole: run.json says so, and no checkpoint is needed."""
    about = about_of(out) or {}
    finished = {**about["run"], "status": "finished", "result": about["result"]}
    if _run_json(out) != finished:
        write_checked(out / RUN, finished)
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)  # what cannot be removed now does not undo a run
    for path in out.iterdir():  # of a writer that was killed
        if any(is_unfinished(path.name, name) for name in (RUN, LOG, EVAL_LOG, FILES)):
            path.unlink(missing_ok=True)


def clear(out: Path) -> None:
    """Remove all that a run left in its folder. Raises `FolderInUse` where it is under way."""
    with held(out):
        for path in out.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()


def check_shared(out: Path) -> None:
    """Raise `TrainingFailed` where this process does not see the folder that the first one made."""
    _wait_for([out / LOCK])


def _to_go_on(out: Path, description: Json, said: Sequence[str]) -> Found:
    """The newest whole checkpoint of this run, and what is to be said of the newer ones."""
    told, checkpoints = list(said), _checkpoints(out)
    for path in checkpoints:
        fault = fault_of(path)
        if fault is None and _differs(description, (about_of(path) or {}).get("run") or {}):
            fault = "it is of another run"
        if fault is None:
            return Found(path, said=(*told, f"Going on from {path.name}."))
        told.append(f"{path.name} was left: {fault}.")
    why = "No checkpoint is whole" if checkpoints else "No checkpoint was written yet"
    return Found(said=(*told, f"{why}: the run starts from the beginning."))


def _recorded(out: Path) -> Json | None:
    """The description that the newest list keeps; None where there is no list that can be read."""
    for folder in (out, *_checkpoints(out), out / CHECKPOINTS / START):
        about = about_of(folder)
        if about is not None and isinstance(about.get("run"), dict):
            run: Json = about["run"]
            return run
    return None


def _run_json(out: Path) -> Json | None:
    """What run.json says; None where it is missing or damaged."""
    try:
        run = read_checked(out / RUN)
    except (FileNotFoundError, ValueError):
        return None
    return run if run.get("status") in ("started", "finished") else None


def _agree(run: Json | None, recorded: Json | None) -> bool:
    """Whether run.json is of the run that the lists are of."""
    return run is not None and (recorded is None or not _differs(recorded, run))


def _check_same(out: Path, description: Json, recorded: Json) -> None:
    mine = json.loads(json.dumps(description))
    differs = [_with_fields(part, mine.get(part), recorded.get(part)) for part in _differs(description, recorded)]
    if differs:
        raise IdentityMismatch(
            f"resuming {out}: the run there differs in {', '.join(differs)} (see its {RUN}). "
            "Resume with the arguments it was started with, or choose another --out."
        )


def _with_fields(part: str, mine: Any, theirs: Any) -> str:
    """A part of a description that differs, with what differs in it, by the names of the flags where it has some.

    Digests, and what is no plain value, say nothing to anybody: where there is nothing else it is the part alone.
    """
    if not isinstance(mine, dict) or not isinstance(theirs, dict):
        return part
    owner = PARTS.get({"settings": "training"}.get(part, part))
    owners = [PARTS["loading"], *([] if owner is None else [owner])]  # how the model is held is among its pairing
    flags = {setting.name: setting.flag for each in owners for setting in line_settings(each)}
    here, there = _identity(mine), _identity(theirs)
    said = [
        f"{flags.get(name, name)}: {one_line(str(there.get(name)), 80)} there, {one_line(str(here.get(name)), 80)} here"
        for name in dict.fromkeys([*here, *there])
        if here.get(name) != there.get(name) and _is_plain(here.get(name)) and _is_plain(there.get(name))
    ]
    return f"{part} ({'; '.join(said)})" if said else part


def _is_plain(value: Any) -> bool:
    return not isinstance(value, (dict, list)) and not (isinstance(value, str) and _DIGEST.fullmatch(value))


def _differs(description: Json, recorded: Json) -> list[str]:
    parts = [name for name in description if name not in _VARIES]
    mine: Json = json.loads(json.dumps(description))
    return described_differences(
        {name: _identity(mine[name]) for name in parts}, {n: _identity(recorded.get(n)) for n in parts}, "model"
    )


def _identity(part: Any) -> Any:
    """A part of a description without names and revisions: content decides, however it is spelt or where it is now."""
    if isinstance(part, list):
        return [_identity(each) for each in part]
    return {k: v for k, v in part.items() if k not in ("name", "path", "revision")} if isinstance(part, dict) else part


def _is_leftover(path: Path) -> bool:
    """What a run leaves that ended before its run.json was written."""
    return (
        is_unfinished(path.name, RUN)
        or path.name == LOCK
        or (path.name == CHECKPOINTS and path.is_dir() and not any(path.iterdir()))
    )


def _checkpoints(out: Path) -> list[Path]:
    """The newest first."""
    folders = [path for path in (out / CHECKPOINTS).glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)]
    return sorted(folders, key=_step, reverse=True)


def _bests(out: Path) -> list[Path]:
    """Folders of best evaluations, the newest first."""
    folders = [path for path in (out / CHECKPOINTS).glob("best-*") if _BEST.fullmatch(path.name)]
    return sorted(folders, key=_step, reverse=True)


def _step(folder: Path) -> int:
    """Of a checkpoint, or of a best evaluation."""
    return int(folder.name.split("-")[1])


def _sync_logs(out: Path) -> None:
    for name in (LOG, EVAL_LOG):
        if (out / name).exists():
            sync_path(out / name)


def _wait_for(paths: Sequence[Path]) -> None:
    """Until they are there. Raises `TrainingFailed` where they do not come: the machines share no folder."""
    until = time.monotonic() + PATIENCE_SECONDS
    while missing := [path for path in paths if not path.exists()]:
        if time.monotonic() > until:
            raise TrainingFailed(
                f"training over processes: expected {missing[0]} of another process, found that it is not seen here. "
                "Without it no checkpoint is whole. Choose an --out that all machines share."
            )
        time.sleep(0.1)


def _holder(out: Path) -> str:
    said = (out / LOCK).read_text(encoding="utf-8").strip()
    return said or "another process"
