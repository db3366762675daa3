"""A model that is sharded, divided or replicated over processes trains as on one, or is refused by a sentence.

The whole of the layouts is docs/benchmarks/trainers.csv (scripts/table_trainers.py); here is a part of it.
"""

import csv
import json
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from support import layouts
from support.breadth import some_of
from support.two_processes import run_under_torchrun

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
IN_ZERO = tuple(f"{wrapper} | zero3 | {parts}" for wrapper in ("loop", "trainer") for parts in layouts.PARTS)


def results_of(cases: tuple[str, ...], folder: Path) -> dict[str, dict[str, Any]]:
    layouts.make_caches(folder)
    run_under_torchrun("layouts_rank.py", folder, *map(Path, cases))
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["case"]: row for row in map(json.loads, lines)}


def assert_right(found: dict[str, Any]) -> None:
    assert "refused" not in found, found
    assert max(found[name] for name in ("loss_error", "parameter_error", "head_error")) <= LARGEST_ERROR, found
    assert found["moved"] > 0.05  # so that a gradient that is not there would show
    if found["case"].split("|")[2].strip() != "lora":
        assert found["head_moved"] > 0.02


def test_layouts_train_as_one_process(tmp_path: Path) -> None:
    cases = (*SILENT, *FEW, *some_of(OTHERS, 1), *REFUSED)
    found = results_of(tuple(dict.fromkeys(cases)), tmp_path)
    for case in cases:
        if case in REFUSED:
            assert found[case]["error"] == "TrainingFailed" and REFUSED[case] in found[case]["refused"]
        else:
            assert_right(found[case])


def test_the_table_has_no_cell_that_is_neither_right_nor_refused() -> None:
    table = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "trainers.csv"
    with table.open(encoding="utf-8", newline="") as file:
        rows = {(r["wrapper"], r["layout"], r["parts"], r["options"]): r for r in csv.DictReader(file)}
    for wrapper, names in (("loop", layouts.LAYOUTS), ("trainer", layouts.TRAINER_LAYOUTS)):
        for cell in product([wrapper], names, layouts.PARTS, [""]):
            assert cell in rows
    for row in rows.values():
        right = [float(row[name] or "inf") <= LARGEST_ERROR for name in ("loss_error", "parameter_error", "head_error")]
        assert all(right) != bool(row["refused_by"] and row["refused"]), row


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_zero_trains_as_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("DS_BUILD_OPS", "0")
    cases = tuple(some_of(IN_ZERO, 4))
    found = results_of(cases, tmp_path)
    for case in cases:
        assert_right(found[case])
