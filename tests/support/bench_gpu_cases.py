"""scripts/bench_gpu.py on the simulated CUDA device, as it is and with something wrong: for `on_simulated_cuda`.

Each case takes a folder and returns the exit status and the lines that are on disk. What is expected is the test's.
"""

import csv
import io
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import numpy as np

from logitcache.losses.fused import LinearLoss
from logitcache.losses.kernels import choice
from logitcache.storage import BaseLogprobs

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import bench_gpu
import bench_gpu_loss
import bench_gpu_models

Json = dict[str, Any]


def whole(folder: Path) -> Json:
    """What `scripts/bench_gpu.py --tiny` says: its exit status, and its lines as they are on disk."""
    return _benched(["--tiny", "--out", str(folder / "gpu.csv")])


def wrong_loss(folder: Path) -> Json:
    """The same of its first section, where the loss of every slice is a thousandth part too large."""
    right = bench_gpu_loss.linear_loss

    def wrong(*args: Any) -> LinearLoss:
        made = right(*args)
        return made._replace(loss=1.001 * made.loss)

    with patch.object(bench_gpu_loss, "linear_loss", wrong):
        return _benched(["--tiny", "--sections", "correctness", "--out", str(folder / "gpu.csv")])


def wrong_capture(folder: Path) -> Json:
    """The same of capture, which keeps its best alternative twice, and a tail that is no number."""
    right = bench_gpu_models.capture

    def wrong(*args: Any, **settings: Any) -> list[BaseLogprobs]:
        first, *others = right(*args, **settings)
        ids, tails = first.alternative_ids.copy(), first.tail_logprobs.copy()
        ids[0, -1], tails[0] = ids[0, 0], np.nan
        return [replace(first, alternative_ids=ids, tail_logprobs=tails), *others]

    with patch.object(bench_gpu_models, "capture", wrong):
        return _benched(["--tiny", "--sections", "correctness of capture", "--out", str(folder / "gpu.csv")])


def failing_kernels(folder: Path) -> Json:
    """The same of slices, on a card where Triton's kernels are there and fail their trial."""
    failing = {"are_there": lambda device: True, "are_usable": lambda device, dtype: False}
    with patch.multiple(choice, **failing):
        return _benched(["--tiny", "--sections", "slices", "--out", str(folder / "gpu.csv")])


def failing_peer(folder: Path) -> Json:
    """The same of losses, where another project's raises before it is measured."""
    name, *_ = bench_gpu_loss.PEERS
    failing = replace(bench_gpu_loss.BY_NAME[name], loss_of=Mock(side_effect=RuntimeError("no driver")))
    with patch.dict(bench_gpu_loss.BY_NAME, {name: failing}):
        return _benched(["--tiny", "--sections", "loss", "--out", str(folder / "gpu.csv")])


def without_time(folder: Path) -> Json:
    """The same of the whole, with no time to do it in."""
    return _benched(["--minutes", "0", "--out", str(folder / "gpu.csv")])


def an_error(folder: Path) -> Json:
    """The same of two sections, the first of which raises."""
    with patch.object(bench_gpu_loss, "inputs_of", side_effect=RuntimeError("no inputs\nat all")):
        return _benched(["--tiny", "--sections", "slices", "noise", "--out", str(folder / "gpu.csv")])


def _benched(arguments: list[str]) -> Json:
    with redirect_stdout(io.StringIO()):  # the last line of this process is its answer
        status = bench_gpu.main(arguments)
    with Path(arguments[-1]).open(newline="", encoding="utf-8") as file:
        return {"status": status, "lines": list(csv.DictReader(file))}
