"""SIGKILL at any moment of `precompute`: after the rerun the cache is, byte for byte, that of an undisturbed run.

What the killed ones left beside it, `repair` removes.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.breadth import ALL
from support.cli_harness import precompute, snapshot
from support.tiny_model import text_rows

from logitcache.storage import repair

KILLER = Path(__file__).resolve().parents[1] / "support" / "precompute_killer.py"
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
OTHER_HASHES = {"PYTHONHASHSEED": "12345"}
KILLS, STRIDE = (20, 1) if ALL else (8, 4)


def run_killer(folder: Path, model: Path, data: Path, more: list[str], **arguments: Any) -> dict[str, Any]:
    """Run the killer over a `precompute` of this data, and return its report."""
    line = ["precompute", "--model", str(model), "--data", str(data), "--top-k", "8", *more]
    request = json.dumps({"line": line, "folder": str(folder), **arguments})
    done = subprocess.run(
        [sys.executable, str(KILLER), request],
        capture_output=True,
        text=True,
        env={**os.environ, **ONE_THREAD, **OTHER_HASHES},
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def mended(cache: Path) -> dict[str, bytes | None]:
    """A cache that is whole, once what killed writers left is removed."""
    report = repair(cache)
    assert not report.is_incomplete and report.dropped == ()
    return snapshot(cache)


@pytest.mark.parametrize("store", ["zarr", "arrow"])
def test_kills_at_random_moments_leave_no_trace(
    store: str, tmp_path: Path, tiny_model: Path, write_rows: Callable[..., Path]
) -> None:
    data = write_rows(text_rows(60))
    more = ["--store", store, "--batch-tokens", "64", "--shard-positions", "80"]
    report = run_killer(tmp_path, tiny_model, data, more, mode="random", kills=KILLS, seed=0)
    at_kills = report["commits_at_kills"]
    assert report["num_shards"] >= 12
    assert len(at_kills) >= KILLS  # each of a live process
    assert sum(0 < n < report["num_shards"] for n in at_kills) >= KILLS // 2  # inside the work
    assert len(set(at_kills)) >= KILLS // 4  # all over it
    precompute(tiny_model, data, tmp_path / "here", *more)  # another process, with other hashes
    expected = snapshot(tmp_path / "here")
    assert {"contents.json", "manifest.json"} <= expected.keys()
    assert snapshot(tmp_path / "reference") == expected
    for number in range(report["rounds"]):
        assert mended(tmp_path / f"killed-{number}") == expected


def test_a_kill_before_any_step_on_the_disk_leaves_no_trace(
    tmp_path: Path, tiny_model: Path, write_rows: Callable[..., Path]
) -> None:
    """Before every sync, link, rename, removal and new folder in turn, from the manifest to the contents."""
    data = write_rows(text_rows(4))
    more = ["--store", "arrow", "--batch-tokens", "64", "--shard-positions", "60"]
    report = run_killer(tmp_path, tiny_model, data, more, mode="steps", stride=STRIDE)
    assert report["num_shards"] == 2
    assert report["kills"] >= (2 * 8 + 8) // STRIDE
    expected = snapshot(tmp_path / "reference")
    assert {"contents.json", "manifest.json"} <= expected.keys()
    for number in range(report["kills"]):
        assert mended(tmp_path / f"killed-{number}") == expected, f"killed before step {number * STRIDE + 1}"
