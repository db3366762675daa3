"""Packing processes where something goes wrong between a frame and its answer, or around the process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.storage_samples import SHARDS, make_manifest

from logitcache.storage import InvalidRecord, packing_process
from logitcache.storage.errors import PackingStopped
from logitcache.storage.packing import pack_samples
from logitcache.storage.packing_process import PackingProcess

MANIFEST = make_manifest("zarr")


def interrupted(where: str, monkeypatch: pytest.MonkeyPatch, process: PackingProcess) -> None:
    """A shard of which that function of the module raises at its last call."""
    calls: list[object] = []
    real: Callable[..., Any] = getattr(packing_process, where)

    def raising(*given: Any) -> Any:
        calls.append(given)
        if where == "write_frame":  # a header, and of the arrays only the first
            real(*given[:2], [next(iter(given[2]))])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(packing_process, where, raising)
        with pytest.raises(KeyboardInterrupt):
            process.pack(SHARDS[0])
    assert calls


@pytest.mark.parametrize("where", ["write_frame", "read_header"])
def test_after_a_frame_that_was_interrupted_nothing_is_taken_for_the_answer_of_the_next(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PackingProcess(MANIFEST) as process:
        interrupted(where, monkeypatch, process)
        with pytest.raises(PackingStopped, match="status -9"):
            process.pack(SHARDS[1])


def test_columns_of_objects_are_refused_and_the_next_shard_is_packed() -> None:
    good = SHARDS[0]
    objects = good[1].logprobs.label_logprobs.astype(object)
    with PackingProcess(MANIFEST) as process:
        for order in (1, -1):
            bad = replace(good[1], logprobs=replace(good[1].logprobs, label_logprobs=objects))
            with pytest.raises(InvalidRecord):
                process.pack([good[0], bad][::order])
        with pytest.raises(InvalidRecord):
            process.pack([bad])
        assert process.pack(good).files == pack_samples(MANIFEST, good).files


def test_numbers_of_numpy_say_how_many_tokens_were_cut() -> None:
    samples = [replace(sample, num_tokens_cut=np.int64(3)) for sample in SHARDS[0]]  # type: ignore[arg-type]
    with PackingProcess(MANIFEST) as process:
        assert process.pack(samples).commit == pack_samples(MANIFEST, samples).commit


def test_tokens_and_columns_as_they_lie_in_memory_do_not_change_the_bytes() -> None:
    def other(array: np.ndarray) -> np.ndarray:
        return np.repeat(array, 2, axis=0)[::2] if array.ndim == 1 else np.asfortranarray(array)

    shard = [
        replace(
            sample,
            token_ids=other(sample.token_ids).astype(np.int64),
            logprobs=replace(sample.logprobs, **{n: other(c) for n, c in sample.logprobs.columns().items()}),
        )
        for sample in SHARDS[0]
    ]
    with PackingProcess(MANIFEST) as process:
        assert process.pack(shard).files == pack_samples(MANIFEST, SHARDS[0]).files


PACKS = """
from support.storage_samples import SHARDS, make_manifest
from logitcache.storage.packing_process import PackingProcess
import os, sys
os.chdir(sys.argv[1])
with PackingProcess(make_manifest("zarr")) as process:
    print(process.pack(SHARDS[0]).commit.unit)
"""


def unit_from(script: str, to: Path, paths: list[str], flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [sys.executable, *flags, "-c", script, str(to)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def unit() -> str:
    return pack_samples(MANIFEST, SHARDS[0]).commit.unit


def absolute() -> list[str]:
    return [str(Path(path).absolute()) for path in sys.path]


def test_what_lies_in_the_folder_of_who_asked_is_not_imported(tmp_path: Path, unit: str) -> None:
    for name in ("json", "numpy", "struct", "logitcache"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')\n")
    run = unit_from(PACKS, tmp_path, absolute(), ("-P",))
    assert run.stdout.split() == [unit], run.stderr


def test_a_relative_place_to_import_from_is_that_of_who_asked(tmp_path: Path, unit: str) -> None:
    relative = "import os, sys\nsys.path[:] = [os.path.relpath(path) for path in sys.path if path]\n"
    run = unit_from(relative + PACKS, tmp_path, absolute())
    assert run.stdout.split() == [unit], run.stderr


def test_what_is_printed_before_it_listens_is_no_answer(tmp_path: Path, unit: str) -> None:
    """By `sitecustomize`, as a company or a notebook has one."""
    (tmp_path / "sitecustomize.py").write_text("print('hello, hello', flush=True)\n")
    run = unit_from(PACKS, tmp_path, [str(tmp_path), *absolute()])
    assert run.stdout.split() == ["hello,", "hello", unit], run.stderr


ISOLATED = f"import sys; sys.path[:] = {json.dumps(absolute())}\n"


def test_an_isolated_interpreter_packs(tmp_path: Path, unit: str) -> None:
    run = unit_from(ISOLATED + PACKS, tmp_path, [], ("-I",))
    assert run.stdout.split() == [unit], run.stderr
