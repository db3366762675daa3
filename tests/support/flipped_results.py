"""One bit of a sweep's files is turned: the report refuses it by a sentence, or shows what it showed before.

Owns which files and which bits. The drivers are tests/reports/test_flips.py and scripts/fault_suite.py.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from logitcache.errors import UnreadableSweep
from logitcache.reports.results import read_sweep

from .storage_faults import REFUSED, SAME, Counts, Seen, Tally
from .sweep_folders import MASKED_KL, PLAIN, write_sweep

FINISHED, FAILED, RUNNING = "runs/m0-lr0.001-seed0", "runs/m0-lr0.002-seed0", "runs/m1-lr0.001-seed0"
FILES = (
    *("sweep.json", f"{FINISHED}/result.json", f"{FINISHED}/train_log.jsonl"),
    *(f"{FAILED}/failed.json", f"{FAILED}/train_log.jsonl"),
    *(f"{RUNNING}/run.json", f"{RUNNING}/train_log.jsonl"),
)
FLIPS_A_FILE = 430
"""3,010 in all, and the last two bytes of each file: a log's line break there says that its last line is whole."""


def flips_of(data: bytes, number: int) -> list[int]:
    """Bits, drawn from a fixed seed; of the last two bytes, all."""
    bits = random.Random(number).sample(range(8 * len(data)), min(FLIPS_A_FILE, 8 * len(data)))
    return [*bits, *range(8 * len(data) - 16, 8 * len(data))]


def flips(_: str, folder: Path, __: Counts) -> Iterator[Tally]:
    """A case a bit; a sentence that is none, or of two lines, is a defect."""
    tally = Tally("single bit flipped in a sweep's results", "both")
    write_sweep(
        folder,
        (PLAIN, MASKED_KL),
        lrs=(1e-3, 2e-3),
        seeds=(0,),
        failed=[Path(FAILED).name],
        in_progress=[Path(RUNNING).name],
    )
    whole = read_sweep(folder)
    for number, name in enumerate(FILES):
        data = (folder / name).read_bytes()
        for bit in flips_of(data, number):
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            (folder / name).write_bytes(damaged)
            tally.add(f"{name}, bit {bit}", _seen(folder, whole))
        (folder / name).write_bytes(data)
    assert read_sweep(folder) == whole
    yield tally


def _seen(folder: Path, whole: object) -> Seen:
    try:
        return SAME if read_sweep(folder) == whole else Seen("wrong", "another value is shown")
    except UnreadableSweep as refusal:
        said = str(refusal)
        return REFUSED if "\n" not in said and said.endswith(".") else Seen("defect", f"no sentence: {said:.80}")
