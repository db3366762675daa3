"""A model that is sharded, divided or replicated over processes trains as on one, or is refused by a sentence.

The whole of the layouts is docs/benchmarks/trainers.csv (scripts/table_trainers.py); here is a part of it.
"""

import csv
import json
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from support import layouts, layouts_wrap
from support.breadth import some_of
from support.layouts import Case
from support.quantised_base import bitsandbytes
from support.two_processes import run_under_torchrun

from logitcache.errors import release_of

LARGEST_ERROR = 1e-5
SILENT = ("loop | fsdp2, head alone | lora + head | even", "loop | fsdp1, head alone | full | even")
"""As many positions on every process, and a trained head in a unit of its own: a loss made behind the forward gives the
head no gradient there, and no error."""
FEW = (
    "loop | ddp | lora + head",
    "loop | fsdp1, head in the root | full, tied",
    "loop | fsdp1, PEFT's policy | lora on head",
    "loop | fsdp2, head with the norm | full",
    "trainer | fsdp1 flat | full",
    "trainer | fsdp2 | lora",
    "loop | tensor parallel by hand | full",
    "loop | fsdp2, head with the norm | lora + head | activations as TRL",
)
OTHERS = (
    *(f"loop | {layout} | {parts}" for layout in ("ddp", "fsdp1, head alone") for parts in layouts.PARTS[:4]),
    *(f"loop | {layout} | {parts}" for layout in ("fsdp2, head alone",) for parts in layouts.PARTS[:4]),
    *(f"loop | fsdp2, head with the norm | {parts}" for parts in layouts.PARTS),
    *(f"trainer | {layout} | {parts}" for layout in ("ddp", "fsdp1", "fsdp2") for parts in layouts.PARTS),
)
REFUSED = {
    "loop | fsdp2 of transformers | lora": "expected fully_shard to have divided all that is trained",
    "loop | fsdp1, head alone | full, tied": "expected the output head in one FSDP unit with the input embedding",
}
OF_ROTATIONS = (
    "loop | fsdp2, head with the norm | oft",
    "loop | fsdp1, PEFT's policy | oft",
    "trainer | fsdp2 | oft",
    "loop | tensor parallel by hand, lora on layers split by output | oft",
)
REFUSED_ROTATIONS = {
    "loop | tensor parallel by hand | oft": "by tensor parallelism: expected an adapter that PEFT divides",
    "trainer | tensor parallel | oft": "each would train an adapter of its own on its part",
}
KEPT_ELSEWHERE = (
    *(f"loop | {layout} | full | activations on the CPU" for layout in ("ddp", "fsdp2, head with the norm")),
    *(f"loop | {layout} | lora + head | activations as TRL" for layout in ("ddp", "fsdp1, head alone")),
    "loop | fsdp2, head alone | full | parameters on the CPU",
    "trainer | fsdp2 | lora + head | activations, offload",
    "trainer | ddp | full | checkpoint, offload",
)
IN_4BIT = (
    "loop | fsdp2, head alone | lora + head | 4bit as float",
    "loop | fsdp2, head with the norm | lora on head | 4bit",
    "loop | fsdp1, head alone | lora + head | 4bit as float",
    "trainer | fsdp2 | lora | 4bit",
)
OF_FOUR = (
    "loop | fsdp2 x tensor parallel | full",
    "loop | fsdp2 x tensor parallel by hand, lora on layers split by output | lora",
    "loop | hsdp, fsdp2 | lora + head",
    "trainer | fsdp2 x tensor parallel | full, tied",
    "trainer | hsdp, fsdp2 | lora",
    "loop | hsdp, fsdp1 | full",
    "loop | fsdp2 x tensor parallel | full | experts",
)
REFUSED_OF_FOUR = {
    "loop | fsdp2 x tensor parallel, lora on layers split by output | lora": "20 parameters that it has not",
    "loop | fsdp2 x tensor parallel by hand | lora": "by tensor parallelism: expected an adapter that PEFT divides",
}
if release_of(version("transformers")) < (5, 18):  # which then ends in an IndexError of its own loading (5.16)
    OF_FOUR = tuple(case for case in OF_FOUR if "x tensor parallel" not in case or "by hand" in case)
    REFUSED_OF_FOUR = {case: said for case, said in REFUSED_OF_FOUR.items() if "by hand" in case}
IN_ZERO = tuple(f"{wrapper} | zero3 | {parts}" for wrapper in ("loop", "trainer") for parts in layouts.PARTS)
KEPT_BY_ZERO = (
    *(f"loop | zero3 | lora + head | {option}" for option in ("parameters on the CPU", "activations as TRL")),
    "trainer | zero3 | full | parameters on the CPU",
)


def results_of(cases: tuple[str, ...], folder: Path) -> dict[str, dict[str, Any]]:
    (processes,) = {Case.of(case).num_processes for case in cases}
    layouts.make_caches(folder)
    run_under_torchrun("layouts_rank.py", folder, *map(Path, cases), processes=processes)
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["case"]: row for row in map(json.loads, lines)}


def assert_right(found: dict[str, Any]) -> None:
    assert "refused" not in found, found
    assert max(found[name] for name in ("loss_error", "parameter_error", "head_error")) <= LARGEST_ERROR, found
    assert found["moved"] > 0.05  # so that a gradient that is not there would show
    if found["case"].split("|")[2].strip() not in ("lora", "oft"):
        assert found["head_moved"] > 0.02


def assert_all(cases: tuple[str, ...], folder: Path, refused: Mapping[str, str] | None = None) -> None:
    """Right, or refused in this sentence."""
    found, sentences = results_of(tuple(dict.fromkeys(cases)), folder), refused or {}
    for case in cases:
        if case in sentences:
            assert found[case]["error"] == "TrainingFailed" and sentences[case] in found[case]["refused"]
        else:
            assert_right(found[case])


def test_layouts_train_as_one_process(tmp_path: Path) -> None:
    assert_all((*SILENT, *FEW, *some_of(OTHERS, 1), *some_of(KEPT_ELSEWHERE, 1), *REFUSED), tmp_path, REFUSED)


def test_rotations_train_in_layouts_as_in_one_process(tmp_path: Path) -> None:
    assert_all((*OF_ROTATIONS, *REFUSED_ROTATIONS), tmp_path, REFUSED_ROTATIONS)


def test_four_processes_that_divide_and_share_out_train_as_one(tmp_path: Path) -> None:
    assert_all((*some_of(OF_FOUR, 3), *REFUSED_OF_FOUR), tmp_path, REFUSED_OF_FOUR)


@bitsandbytes
def test_a_base_in_4_bits_that_is_sharded_trains_as_one_process(tmp_path: Path) -> None:
    assert_all(tuple(some_of(IN_4BIT, 2)), tmp_path)


def test_the_table_has_no_cell_that_is_neither_right_nor_refused() -> None:
    table = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "trainers.csv"
    with table.open(encoding="utf-8", newline="") as file:
        rows = {(r["wrapper"], r["layout"], r["parts"], r["options"]): r for r in csv.DictReader(file)}
    for wrapper, names in (("loop", layouts_wrap.OF_TWO), ("trainer", layouts_wrap.TRAINER_OF_TWO)):
        for cell in product([wrapper], names, layouts.PARTS, [""]):
            assert cell in rows
    for row in rows.values():
        right = [float(row[name] or "inf") <= LARGEST_ERROR for name in ("loss_error", "parameter_error", "head_error")]
        assert all(right) != bool(row["refused_by"] and row["refused"]), row


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_zero_trains_as_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("DS_BUILD_OPS", "0")
    assert_all((*some_of(IN_ZERO, 4), *some_of(KEPT_BY_ZERO, 1)), tmp_path)
