"""Which layouts, wrappers and trained parts give the right training, by error against one process in float64.

Owns docs/benchmarks/trainers.csv. A case is a training of tests/support/layouts.py on two gloo processes on a CPU: a
loop of one's own, or transformers' Trainer over accelerate, DeepSpeed or PEFT. A cell is the errors of loss and
parameters after three steps and how far these moved, or the sentence that refuses the case and whose it is. Nothing in
it is a time. DeepSpeed's cases need it (`pip install deepspeed`, with DS_ACCELERATOR=cpu and DS_BUILD_OPS=0).

    python scripts/table_trainers.py                 writes the table: 20 minutes on two cores
    python scripts/table_trainers.py --only zero3    cases with this in their names, printed
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.layouts import LAYOUTS, PARTS, TRAINER_LAYOUTS, make_caches  # noqa: E402

DEFAULT_OUT = ROOT / "docs" / "benchmarks" / "trainers.csv"
NUMBERS = ("loss_error", "parameter_error", "head_error", "moved", "head_moved")
FIELDS = ("wrapper", "layout", "parts", "options", *NUMBERS, "refused_by", "refused")
LARGEST_ERROR = 1e-5
OPTIONS = (
    *(f"loop | {layout} | lora + head | even" for layout in ("ddp", "fsdp1, head alone", "fsdp2, head alone", "zero3")),
    *(f"loop | {layout} | {parts} | even" for layout in ("fsdp2, head with the norm",) for parts in ("lora", "full")),
    *(f"loop | {layout} | full | checkpoint" for layout in ("ddp", "fsdp1, head alone", "fsdp2, head alone", "zero3")),
    *(f"loop | {layout} | lora | compile" for layout in ("ddp", "fsdp2, head with the norm")),
    *(f"trainer | {layout} | full | checkpoint" for layout in ("ddp", "fsdp2", "zero3")),
    *(f"trainer | {layout} | lora | activations" for layout in ("fsdp1", "fsdp2")),
    *(f"trainer | {layout} | lora | compile" for layout in ("ddp", "fsdp2")),
)
CASES = (
    *(f"loop | {layout} | {parts}" for layout in LAYOUTS for parts in PARTS),
    *(f"trainer | {layout} | {parts}" for layout in TRAINER_LAYOUTS for parts in PARTS),
    *OPTIONS,
)


def results_of(cases: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """What each case came to. Processes are started anew after one that ended them."""
    found: dict[str, dict[str, Any]] = {}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join([str(ROOT / "tests"), *sys.path])
    settings = {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    results = folder / "results.jsonl"
    while left := [case for case in cases if case not in found]:
        script = ROOT / "tests" / "support" / "layouts_rank.py"
        done = subprocess.run(
            [*launch, str(script), str(folder), *left], env={**os.environ, **settings}, capture_output=True, text=True
        )
        lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
        num_before = len(found)
        for row in sorted(map(json.loads, lines), key=_standing):
            found.setdefault(row["case"], row)
        if len(found) == num_before:
            raise SystemExit(f"{left[0]} ended without a word:\n{done.stderr[-3000:]}")
    return found


def _standing(row: dict[str, Any]) -> tuple[bool, bool, int]:
    """What is said of a case: a refusal before numbers, this project's before another's, which one process may have."""
    return "refused" not in row, row.get("error") != "TrainingFailed", row["rank"]


def row_of(case: str, result: dict[str, Any]) -> dict[str, str]:
    """A line of the table."""
    names = dict(zip(FIELDS, [part.strip() for part in case.split("|")], strict=False))
    if "refused" in result:
        return {**names, "refused_by": result["by"], "refused": " ".join(result["refused"].split())}
    return {**names, **{name: f"{result[name]:.1e}" for name in NUMBERS}}


def main() -> None:
    """Run the cases and write the table, unless a cell is neither right nor refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cases that have this in their names; prints, and writes nothing")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    given = parser.parse_args()
    cases = [case for case in CASES if given.only is None or given.only in case]
    if find_spec("deepspeed") is None and any("zero" in case for case in cases):
        raise SystemExit("deepspeed is not installed: pip install deepspeed, or --only a layout without it")
    with tempfile.TemporaryDirectory() as folder:
        make_caches(Path(folder))
        found = results_of(cases, Path(folder))
    wrong = [c for c in cases if "refused" not in found[c] and not _is_right(found[c])]
    rows = [row_of(case, found[case]) for case in cases]
    if given.only is not None:
        csv.DictWriter(sys.stdout, FIELDS).writerows(rows)
    elif not wrong:
        with given.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    if wrong:
        raise SystemExit("\n".join(["wrong:", *(f"{case}: {found[case]}" for case in wrong)]))


def _is_right(result: dict[str, Any]) -> bool:
    return max(result[name] for name in ("loss_error", "parameter_error", "head_error")) <= LARGEST_ERROR


if __name__ == "__main__":
    main()
