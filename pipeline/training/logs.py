"""The logs of a run: a checked line a logged step (train_log.jsonl) or evaluation (eval_log.jsonl), and TensorBoard's.

Owns which values are kept, and that a resumed run's log has each step once. Must not know what trains.
"""

from itertools import takewhile
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from logitcache.errors import TrainingFailed
from logitcache.json_files import line_of, read_lines
from logitcache.storage.files import replace_file

TENSORBOARD = "tensorboard"


class JsonLog(TrainerCallback):
    """Appends every training log to a JSONL file; on resume, drops what lies after the checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        entries = logged(self.path, state.global_step) if state.global_step and self.path.exists() else []
        replace_file(self.path, b"".join(line_of(entry) for entry in entries))
        if entries:
            self.last = {name: value for name, value in entries[-1].items() if name not in ("step", "epoch")}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log = control.should_log or state.global_step >= state.max_steps  # the last step too

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "ce" not in logs:
            return
        anchors = sorted(name for name in logs if name.startswith("anchor_kl"))
        names = ("loss", "ce", "kl", "kl_weight", *anchors, "penalty", "orthogonality", "grad_norm", "learning_rate")
        self.last = {name: logs[name] for name in names if name in logs}
        entry = {"step": state.global_step, "epoch": logs.get("epoch"), **self.last}
        with self.path.open("ab") as f:
            f.write(line_of(entry))


class EvalLog(TrainerCallback):
    """Appends every evaluation to a JSONL file; on resume, drops what lies after the checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            entries = logged(self.path, state.global_step) if state.global_step and self.path.exists() else []
            replace_file(self.path, b"".join(line_of(entry) for entry in entries))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            with self.path.open("ab") as f:
                f.write(line_of({"step": state.global_step, "epoch": state.epoch, **metrics}))


def logged(path: Path, step: int) -> list[dict[str, Any]]:
    """The entries of a log up to a step; what a killed run was writing comes after it.

    Raises `TrainingFailed` where a line before it is damaged.
    """
    try:
        return list(takewhile(lambda entry: entry["step"] <= step, read_lines(path, unfinished=True)))
    except ValueError as error:
        raise TrainingFailed(
            f"going on with {path}: {error}. The log of the resumed run would lack what was there. Restore the file "
            "from a copy, or remove that line."
        ) from error


def tensorboard(out: Path) -> TrainerCallback:
    """TensorBoard's events, in a folder of the run's."""
    callback = TensorBoardCallback()
    callback.logging_dir = str(out / TENSORBOARD)
    return callback
