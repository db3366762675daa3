"""One bit of a sweep's files is turned: the report refuses it by a sentence, or shows what it showed before."""

import random
from pathlib import Path

import pytest
from support.sweep_folders import MASKED_KL, PLAIN, write_sweep

from logitcache.errors import UnreadableSweep
from logitcache.reports.results import read_sweep

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


def test_no_flipped_bit_shows_another_value(tmp_path: Path) -> None:
    write_sweep(
        tmp_path,
        (PLAIN, MASKED_KL),
        lrs=(1e-3, 2e-3),
        seeds=(0,),
        failed=[Path(FAILED).name],
        in_progress=[Path(RUNNING).name],
    )
    whole, refused, others = read_sweep(tmp_path), [], []
    for number, name in enumerate(FILES):
        path = tmp_path / name
        data = path.read_bytes()
        for bit in flips_of(data, number):
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            try:
                others += [(name, bit)] if read_sweep(tmp_path) != whole else []
            except UnreadableSweep as refusal:
                refused.append(str(refusal))
        path.write_bytes(data)
    assert read_sweep(tmp_path) == whole and len(refused) > 2000
    assert all("\n" not in said and said.endswith(".") for said in refused)
    assert not others, f"{len(others)} flips show another value, the first {others[:3]}"


def test_a_file_without_its_checksum_is_refused(tmp_path: Path) -> None:
    write_sweep(tmp_path, (PLAIN,), lrs=(1e-3,), seeds=(0,))
    for name in FILES[:3]:
        path = tmp_path / name
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace('"checksum"', '"checksums"'), encoding="utf-8")
        with pytest.raises(UnreadableSweep, match="checksum"):
            read_sweep(tmp_path)
        path.write_text(text, encoding="utf-8")
