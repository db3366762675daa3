"""Lines of train_log.jsonl: each has its checksum; the last one of a killed run may be cut off."""

from pathlib import Path

import pytest

from logitcache.json_files import line_of, read_lines

ENTRIES = [{"step": step, "ce": 1 / step} for step in (1, 2, 3)]
LINES = b"".join(line_of(entry) for entry in ENTRIES)


def test_a_line_that_was_being_written_is_left_out_wherever_it_was_cut(tmp_path: Path) -> None:
    log, start = tmp_path / "log", len(line_of(ENTRIES[0]) + line_of(ENTRIES[1]))
    for cut in range(start, len(LINES) + 1):
        log.write_bytes(LINES[:cut])
        whole = 3 if cut >= len(LINES) - 1 else 2  # without its line break, a line is whole
        assert list(read_lines(log, unfinished=True)) == ENTRIES[:whole]
        if whole == 2 and cut > start:
            with pytest.raises(ValueError, match="expected JSON in line 3"):
                list(read_lines(log, unfinished=False))


def test_no_flipped_bit_of_whole_lines_is_taken_for_a_cut(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for bit in range(8 * len(LINES)):
        damaged = bytearray(LINES)
        damaged[bit // 8] ^= 1 << bit % 8
        log.write_bytes(damaged)
        for unfinished in (True, False):
            try:
                assert list(read_lines(log, unfinished)) == ENTRIES
            except ValueError as error:
                assert str(error).startswith("expected JSON in line")  # noqa: PT017
