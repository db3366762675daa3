"""Which layouts, wrappers and trained parts give the right training, by error against one process in float64.

Owns docs/benchmarks/trainers.csv. A case is a training of tests/support/layouts.py on two or four gloo processes on a
CPU: a loop of one's own, or transformers' Trainer over accelerate, DeepSpeed or PEFT. A cell is the errors of loss and
parameters after three steps and how far these moved, or the sentence that refuses the case and whose it is. Nothing in
it is a time. DeepSpeed's cases need it (`pip install deepspeed`, with DS_ACCELERATOR=cpu and DS_BUILD_OPS=0).

    python scripts/table_trainers.py                 writes the table: half an hour on two idle cores
    python scripts/table_trainers.py --only zero3    cases with this in their names, printed
    python scripts/table_trainers.py --add           runs the cases that the table lacks, and keeps its other rows
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

from support.layouts import PARTS, Case, make_caches  # noqa: E402
from support.layouts_wrap import BY_OUTPUT, OF_TWO, TRAINER_OF_TWO  # noqa: E402

DEFAULT_OUT = ROOT / "docs" / "benchmarks" / "trainers.csv"
NUMBERS = ("loss_error", "parameter_error", "head_error", "moved", "head_moved")
FIELDS = ("wrapper", "layout", "parts", "options", *NUMBERS, "refused_by", "refused")
LARGEST_ERROR = 1e-5
WAITED = ("timed out", "timeout", "connection closed", "connection reset")
"""What gloo says of a process that waits for another in vain."""


def _each(wrapper: str, layouts: tuple[str, ...], parts: tuple[str, ...], option: str) -> tuple[str, ...]:
    return tuple(f"{wrapper} | {layout} | {part} | {option}" for layout in layouts for part in parts)


FEW = ("ddp", "fsdp1, head alone", "fsdp2, head alone", "zero3")
FSDP = ("fsdp1, head alone", "fsdp2, head alone", "fsdp2, head with the norm")
ACTIVATIONS = ("ddp", "fsdp1, head alone", "fsdp2, head with the norm", "zero3")
EXPERTS = ("fsdp2 of transformers", "tensor parallel", "fsdp2 x tensor parallel")
"""In which a model with experts has these on one process each (expert parallelism)."""
AWAY = "parameters on the CPU"
"""And, of ZeRO, the optimizer's state."""
OPTIONS = (
    *_each("loop", FEW, ("lora + head",), "even"),
    *_each("loop", ("fsdp2, head with the norm",), ("lora", "full"), "even"),
    *_each("loop", FEW, ("full",), "checkpoint"),
    *_each("loop", ("ddp", "fsdp2, head with the norm"), ("lora",), "compile"),
    *_each("trainer", ("ddp", "fsdp2", "zero3"), ("full",), "checkpoint"),
    *_each("trainer", ("fsdp1", "fsdp2"), ("lora",), "activations"),
    *_each("trainer", ("ddp", "fsdp2"), ("lora",), "compile"),
    *_each("loop", ("ddp", "fsdp2, head alone", "zero3"), ("full",), "reentrant"),
    *_each("trainer", ("ddp", "fsdp2"), ("lora",), "reentrant"),
    *_each("loop", ("ddp",), ("lora + head", "full"), "static graph"),
    *_each("loop", ACTIVATIONS, ("lora + head", "full"), "activations on the CPU"),
    *_each("loop", ACTIVATIONS, ("lora + head", "full"), "activations as TRL"),
    *_each("trainer", ("ddp", "fsdp2"), ("full",), "checkpoint, offload"),
    *_each("trainer", ("fsdp2",), ("lora + head", "full"), "activations, offload"),
    *_each("loop", (*FSDP[1:], "zero2", "zero3"), ("lora + head", "full"), AWAY),  # FSDP1's wants an accelerator
    *_each("trainer", ("fsdp2", "zero2", "zero3"), ("full",), AWAY),
    *_each("loop", ("ddp", "fsdp2, head with the norm", "zero3", *EXPERTS), ("full",), "experts"),
    *_each("trainer", EXPERTS, ("full",), "experts"),
    *(
        case  # packed weights shown as bytes, bitsandbytes' default, or as floats (bnb_4bit_quant_storage)
        for option in ("4bit", "4bit as float")
        for case in (
            *_each("loop", ("ddp", *FSDP, "zero3"), ("lora + head",), option),
            *_each("loop", ("fsdp2, head with the norm", "zero3"), ("lora on head",), option),
            *_each("trainer", ("ddp", "fsdp1", "fsdp2", "zero3"), ("lora",), option),
        )
    ),
)
OF_FOUR = (
    *(f"loop | fsdp2 x tensor parallel | {parts}" for parts in PARTS),
    *(f"loop | fsdp2 x tensor parallel{by_output} | lora" for by_output in (BY_OUTPUT, f" by hand{BY_OUTPUT}")),
    *(f"loop | fsdp2 x tensor parallel by hand | {parts}" for parts in ("lora", "full", "full, tied")),
    f"loop | fsdp2 x tensor parallel by hand{BY_OUTPUT} | lora + head",
    *(f"loop | hsdp | {parts}" for parts in ("lora", "full", "full, tied")),
    *(
        f"loop | hsdp, {kind} | {parts}"
        for kind in ("fsdp1", "fsdp2")
        for parts in ("lora + head", "full", "full, tied")
    ),
    *(f"trainer | fsdp2 x tensor parallel | {parts}" for parts in ("lora", "full", "full, tied")),
    *(f"trainer | hsdp, fsdp2 | {parts}" for parts in ("lora", "lora + head", "full")),
    "trainer | hsdp | full",
)
CASES = (
    *(f"loop | {layout} | {parts}" for layout in OF_TWO for parts in PARTS),
    *(f"trainer | {layout} | {parts}" for layout in TRAINER_OF_TWO for parts in PARTS),
    *OPTIONS,
    *OF_FOUR,
    *_each("loop", ("zero2", "zero3"), ("full",), "sequence parallel"),  # after which DeepSpeed knows nothing else
)


def results_of(cases: list[str], num_processes: int, folder: Path) -> dict[str, dict[str, Any]]:
    """What each case came to, all of as many processes. They are started anew after one that ended them."""
    found: dict[str, dict[str, Any]] = {}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
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


def read_table(path: Path) -> dict[str, dict[str, str]]:
    """The rows that are there, by case."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {" | ".join(row[name] for name in FIELDS[:4] if row[name]): row for row in rows}


def main() -> None:
    """Run the cases and write the table, unless a cell is neither right nor refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cases that have this in their names; prints, and writes nothing without --add")
    parser.add_argument("--add", action="store_true", help="of the cases those that the table lacks, written to it")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    given = parser.parse_args()
    kept = read_table(given.out) if given.add else {}
    cases = [case for case in CASES if (given.only is None or given.only in case) and case not in kept]
    if find_spec("deepspeed") is None and any("zero" in case for case in cases):
        raise SystemExit("deepspeed is not installed: pip install deepspeed, or --only a layout without it")
    found: dict[str, dict[str, Any]] = {}
    for num_processes in (2, 4):
        some = [case for case in cases if Case.of(case).num_processes == num_processes]
        with tempfile.TemporaryDirectory() as folder:
            make_caches(Path(folder))
            found |= results_of(some, num_processes, Path(folder))
    wrong = [case for case in cases if not _is_right(found[case])]
    rows = {case: row_of(case, found[case]) for case in cases if case not in wrong}
    if given.only is not None and not given.add:
        csv.DictWriter(sys.stdout, FIELDS).writerows(rows.values())
    elif given.add or not wrong:
        with given.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows((kept | rows)[case] for case in CASES if case in kept or case in rows)
    if wrong:
        raise SystemExit("\n".join(["wrong:", *(f"{case}: {found[case]}" for case in wrong)]))


def _is_right(result: dict[str, Any]) -> bool:
    """Or refused: by a sentence, and not by processes that wait for one another."""
    if "refused" in result:
        return not any(word in result["refused"].lower() for word in WAITED)
    return max(result[name] for name in ("loss_error", "parameter_error", "head_error")) <= LARGEST_ERROR


if __name__ == "__main__":
    main()
