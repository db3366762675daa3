"""`precompute --plan` as a user reads it: other settings, the advice for so many bytes, the distance from the base."""

import json
import re
from pathlib import Path

import pytest
from support.cli_fixtures import cache as cache
from support.cli_fixtures import caches as caches
from support.cli_fixtures import data as data
from support.cli_harness import copy_of, done, flip_byte, precompute, precompute_line, refused, unchanged
from support.tiny_model import make_model

from logitcache.storage import LogitCache

ROW = re.compile(r" +(\d+) +(\d+) +([\d.]+) +([\d.]+ (?:B|KiB|MiB)) +([\d.]+) +([\d.]+)")


def advice(out: str) -> str:
    (found,) = (line[8:] for line in out.splitlines() if line.startswith("advice"))
    return found


def test_other_settings_stand_in_a_table_and_the_truest_that_fits_is_advised(
    tmp_path: Path, tiny_model: Path, data: Path
) -> None:
    line = precompute_line(tiny_model, data, tmp_path / "c", "--plan")
    with unchanged(tmp_path):
        out = done(*line).out
        rows = [m.groups() for m in map(ROW.fullmatch, out.splitlines()) if m is not None]
        assert [(int(k), int(groups)) for k, groups, *_ in rows] == [
            (k, groups) for k in (8, 16, 32, 64, 128, 256) for groups in (0, 16, 64)
        ]
        total = rows[0][3]
        assert advice(out).startswith(f"--top-k 8: {total} of {total} (what these settings take; for another bound ")
        assert out.endswith("the truest gradient that fits\nNothing was written.\n")
        assert advice(done(*line, "--plan-bytes", "1T").out).startswith("--top-k 256 --tail-groups 64: ")
        assert ", few: a rough guide\n" in out
        less = advice(done(*line, "--plan-bytes", "1K").out)
    assert (
        less == f"none of these fits into 1.0 KiB: the least, --top-k 8, takes {total}. Give more room or fewer data."
    )


def test_the_data_are_held_against_what_the_base_says_itself(
    tmp_path: Path,
    tiny_model: Path,
    data: Path,
    cache: Path,
) -> None:
    """Of the data themselves, which are as far from the base as they are."""
    with unchanged(cache):
        out = done(*precompute_line(tiny_model, data, tmp_path / "c", "--plan", "--probe-cache", cache)).out
    pattern = (
        r"(?:base|    )    log p\(label\) (-[\d.]+), entropy ([\d.]+) nats a position of (.+), measured on ([\d,]+)"
    )
    ours, theirs = (m.groups() for m in map(re.compile(pattern).fullmatch, out.splitlines()) if m is not None)
    assert (ours[2], theirs[2]) == ("these data", str(cache))
    assert ours[3] == theirs[3] == f"{LogitCache.open(cache).num_positions:,}"
    for mine, its in zip(ours[:2], theirs[:2], strict=True):
        assert float(mine) == pytest.approx(float(its), abs=0.02)


def test_a_probe_that_cannot_be_read_or_is_of_another_base_is_refused(
    tmp_path: Path,
    tiny_model: Path,
    other_model: Path,
    data: Path,
    cache: Path,
) -> None:
    line = precompute_line(tiny_model, data, tmp_path / "c", "--plan")
    assert str(tmp_path / "none") in refused(2, *line, "--probe-cache", tmp_path / "none")
    damaged = copy_of(cache, tmp_path / "damaged")
    for path in (damaged / "shards").rglob("*.arrow"):
        flip_byte(path)
    assert str(damaged) in refused(3, *line, "--probe-cache", damaged)
    precompute(other_model, data, tmp_path / "other")
    said = refused(4, *line, "--probe-cache", tmp_path / "other")
    assert f"pairing {tmp_path / 'other'} with" in said and "weights" in said
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--plan-bytes", "1G"], "are for --plan"),
        (["--probe-cache", "p"], "are for --plan"),
        (["--plan", "--plan-bytes", "1X"], "is no size"),
        (["--plan", "--plan-bytes", "0"], "is no size"),
        (["--plan", "--plan-bytes", "nan"], "is no size"),
        (["--plan", "--plan-bytes", ""], "is no size"),
        (["--plan", "--tensor-parallel", 2, "--plan-bytes", "1G"], "in one process"),
        (["--plan", "--engine", "vllm", "--calibration", "f", "--probe-cache", "p"], "in one process"),
    ],
)
def test_what_nobody_reads_is_refused(
    more: list[str],
    named: str,
    tmp_path: Path,
    tiny_model: Path,
    data: Path,
) -> None:
    assert named in refused(2, *precompute_line(tiny_model, data, tmp_path / "c", *more))


def small(folder: Path, vocab_size: int) -> tuple[Path, Path]:
    """A base of so many tokens without a tokenizer, and rows of ids."""
    model = make_model(vocab_size=vocab_size, bos_token_id=None, eos_token_id=None)
    model.save_pretrained(folder / f"m{vocab_size}")
    rows = [{"input_ids": [i * j % vocab_size for j in range(9 + i)]} for i in range(1, 7)]
    data = folder / f"d{vocab_size}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / f"m{vocab_size}", data


@pytest.mark.parametrize(
    ("vocab_size", "advised"),
    [(8, "--top-k 7: all that a vocabulary of 8 has"), (17, "--top-k 16: ")],
)
def test_of_a_small_vocabulary_all_is_advised_where_it_fits(vocab_size: int, advised: str, tmp_path: Path) -> None:
    """No row of the table has 7 alternatives, and with 16 of 17 tokens no tail is left that groups could tell apart."""
    model, data = small(tmp_path, vocab_size)
    out = done(*precompute_line(model, data, tmp_path / "c", "--plan", "--top-k", 4, "--plan-bytes", "1G")).out
    assert advice(out).startswith(advised)


@pytest.mark.parametrize("more", [["--min-mass", ".5"], ["--top-k", "32"]])
def test_the_bound_of_the_advice_is_what_the_settings_take(
    more: list[str], tmp_path: Path, tiny_model: Path, data: Path
) -> None:
    """Also where --min-mass makes less of them than the row of the same alternatives takes."""
    out = done(*precompute_line(tiny_model, data, tmp_path / "c", "--plan", "--top-k", "64", *more)).out
    (size,) = (line[8:].split(":")[0] for line in out.splitlines() if line.startswith("size"))
    assert f" {size} (what these settings take" in advice(out).replace("none of these fits into", "of")
