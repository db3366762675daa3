"""One bit of a sweep's files is turned: the report refuses it by a sentence, or shows what it showed before."""

from pathlib import Path

import pytest
from support.flipped_results import FILES, flips
from support.storage_faults import Counts
from support.sweep_folders import PLAIN, write_sweep

from logitcache.errors import UnreadableSweep
from logitcache.reports.results import read_sweep


def test_no_flipped_bit_shows_another_value(tmp_path: Path) -> None:
    (tally,) = flips("", tmp_path, Counts(0, 0, 0, 0, 0, 0))
    assert tally.wrong == {} and tally.defects == {}
    assert tally.cases > 3000 and tally.refused > 2000


def test_a_file_without_its_checksum_is_refused(tmp_path: Path) -> None:
    write_sweep(tmp_path, (PLAIN,), lrs=(1e-3,), seeds=(0,))
    for name in FILES[:3]:
        path = tmp_path / name
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace('"checksum"', '"checksums"'), encoding="utf-8")
        with pytest.raises(UnreadableSweep, match="checksum"):
            read_sweep(tmp_path)
        path.write_text(text, encoding="utf-8")
