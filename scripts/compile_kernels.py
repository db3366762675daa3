"""Compiles the kernels of the loss for cards of these compute capabilities, on a machine without one.

    python scripts/compile_kernels.py 80 89 90

Every dtype and number of groups that they are chosen for, in the tiles that are launched, of a slice whose rows are
aligned, or not, or that is one row; prints a row for each: registers a thread, bytes of them that went to memory, bytes
of shared memory. Exit status 1 where registers went to memory, or the sums by group are not made on the tensor cores.
Needs Triton.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from logitcache.losses.kernels import programs, tail
from logitcache.losses.kernels.choice import MOST_GROUPS

POINTERS = {"groups": "*i32", "tops": "*fp32", "sums": "*fp32", "group_sums": "*fp32", "factors": "*fp32"}
ALIGNED = ("z", "part", *POINTERS)
"""What is a multiple of 16 whatever the vocabulary: addresses, and the columns of a part, which are whole tiles."""

SLICES = ("aligned", "ragged", "one row")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def variants() -> Iterator[tuple[Any, str, tail.Tile, dict[str, int | bool]]]:
    """Program, dtype of the logits, tile, and the constants beside it."""
    for name, dtype in DTYPES.items():
        groups = 16
        yield programs.stats, name, tail.stats_tile(0, dtype), {"num_groups": 0}
        while groups <= MOST_GROUPS:
            yield programs.stats, name, tail.stats_tile(groups, dtype), {"num_groups": groups}
            groups *= 2
        for by_group in (False, True):
            yield programs.apply, name, tail.apply_tile(by_group), {"by_group": by_group}


def compiled(program: Any, dtype: str, tile: tail.Tile, constants: dict[str, int | bool], of: str, sm: int) -> Any:
    """The program for this card and one of SLICES, as a launch would compile it: a number that is 1 is a constant."""
    constants = {"height": tile.height, "width": tile.width, **constants}
    if of == "one row":
        constants["num_rows"] = 1
    if constants.get("by_group") is False:
        constants["num_factors"] = 1
    signature, attributes, names = {}, {}, program.arg_names
    for at, name in enumerate(names):
        signature[name] = (
            "constexpr" if name in constants else "*" + dtype if name == "z" else POINTERS.get(name, "i32")
        )
        if name in ALIGNED or (of == "aligned" and name not in constants):
            attributes[(at,)] = [["tt.divisibility", 16]]
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=program, signature=signature, constexprs=values, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": tile.warps})


def registers(kernel: Any, sm: int) -> tuple[int, int]:
    """Registers a thread, and bytes a thread that went to memory, as the assembler says."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"], encoding="utf-8")
        card = f"sm_{sm}a" if sm >= 90 else f"sm_{sm}"
        line = [get_ptxas(sm).path, "-v", f"--gpu-name={card}", str(source), "-o", str(Path(folder) / "kernel.cubin")]
        said = subprocess.run(line, capture_output=True, text=True, check=True).stderr
    used, spilt = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    if used is None or spilt is None:
        raise RuntimeError(f"compiling the kernels: expected the assembler to count registers, found {said!r}.")
    return int(used[1]), int(spilt[1])


def main() -> int:
    if tail.is_interpreted():
        sys.exit("compiling the kernels: TRITON_INTERPRET is set, with which nothing is compiled. Unset it.")
    failed = False
    print("sm,program,dtype,constants,slice,registers,bytes spilt,bytes shared")
    for sm in map(int, sys.argv[1:]):
        for program, dtype, tile, constants in variants():
            for of in SLICES:
                kernel = compiled(program, dtype, tile, constants, of, sm)
                used, spilt = registers(kernel, sm)
                said = " ".join(f"{name}={value}" for name, value in constants.items())
                print(
                    f"{sm},{program.__name__},{dtype},{said},{of},{used},{spilt},{kernel.metadata.shared}",
                    flush=True,
                )
                lacks = constants.get("num_groups", 0) > 0 and ".tf32.tf32" not in kernel.asm["ptx"]
                failed = failed or spilt > 0 or lacks
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
