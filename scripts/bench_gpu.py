"""What a CUDA card is asked, in one run of at most ten minutes: is it right there, and how fast beside others.

Owns the order of the sections, the most valuable first, what each needs, and the exit status. Each line goes to
docs/benchmarks/gpu.csv as soon as it is known; what does not fit into the time or the memory that are left is skipped
and says so, what fails says with which error, and the others go on. Times are the card's own events, after calls that
do not count; what counts are ratios of one section. Models have random weights, tokens are random: nothing is
downloaded.

    python scripts/bench_gpu.py                                     on a card of 80 GiB, an H100 or H200
    python scripts/bench_gpu.py --sections correctness --out F      some of it
    python scripts/bench_gpu.py --tiny                              a taste; written only where --out says

Exit status 1 where something is wrong: a loss, a gradient, kernels, a record of capture, or a check that failed to run.
The tests run --tiny on the simulated device, where times mean nothing and the column `device` says so.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import bench_gpu_loss as of_loss
import bench_gpu_models as of_models
import torch
from bench_common import BENCHMARKS, out_of, provenance
from bench_gpu_run import FAILED, FULL, SKIPPED, TINY, Run, free_gib, said
from transformers import logging

DEFAULT_OUT = BENCHMARKS / "gpu.csv"
PACKAGES = ["torch", "transformers", "peft", "logitcache"]


@dataclass(frozen=True)
class Section:
    """name; work; seconds and gib: what it needs, about, on an H100; checks: whether an error in it is a wrong line."""

    name: str
    work: Callable[[Run], None]
    seconds: float
    gib: float
    checks: bool = False


SECTIONS = (
    Section("correctness", of_loss.loss_correctness, 30, 8, checks=True),
    Section("correctness of capture", of_models.capture_correctness, 15, 8, checks=True),
    Section("loss", of_loss.losses, 130, 45),
    Section("slices", of_loss.slices, 40, 12),
    Section("top-k", of_loss.top_ks, 15, 12, checks=True),
    Section("noise", of_models.noise, 25, 12),
    Section("steps, smaller", of_models.small_steps, 60, 50),
    Section("steps, larger", of_models.large_steps, 100, 75),
    Section("loader", of_models.loader, 50, 30),
    Section("capture", of_models.capture_speed, 40, 12),
)


def go_through(section: Section, run: Run, tiny: bool) -> bool:
    """The section's lines; whether it must count as wrong. tiny: it needs next to nothing."""
    run.section, began = section.name, time.monotonic()
    try:
        left, free = run.seconds_left(), free_gib()
        if not tiny and (left < section.seconds or free < section.gib):
            wants = f"wants about {section.seconds:.0f} s and {section.gib:.0f} GiB"
            run.say("", verdict=SKIPPED, remark=f"{wants}, found {max(left, 0):.0f} s and {free:.0f} GiB")
            return False
        section.work(run)
    except Exception as error:  # whatever it is: the line has it, and the next section is another matter
        traceback.print_exc()
        run.say("", verdict=FAILED, remark=said(error))
        return section.checks
    run.say("section", value=time.monotonic() - began, unit="seconds")
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Go through the sections; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [section.name for section in SECTIONS]
    parser.add_argument("--minutes", type=float, default=9.0, help="in which what begins must end, imports not counted")
    parser.add_argument("--sections", nargs="+", choices=names, default=names, metavar="SECTION", help="; ".join(names))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="small shapes; nothing is written unless --out is given")
    parser.add_argument("--out", type=Path, help=f"default: {DEFAULT_OUT.relative_to(BENCHMARKS.parents[1])}")
    args = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * args.minutes
    path = args.out if args.tiny else out_of(parser, args, DEFAULT_OUT)
    if not torch.cuda.is_available():
        parser.exit(
            2, "bench_gpu: expected a CUDA card, found none. Nothing was measured. Run it on a machine with one.\n"
        )
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    about = provenance(__file__, "cuda", PACKAGES) | {"seed": str(args.seed)}
    run = Run(TINY if args.tiny else FULL, args.seed, deadline, about, path)
    chosen = [section for section in SECTIONS if section.name in args.sections]
    failed = [section.name for section in chosen if go_through(section, run, args.tiny)]
    wrong = run.num_wrong()
    print(about)
    if wrong or failed:
        print(f"{wrong} lines are wrong; checks that failed to run: {', '.join(failed) or 'none'}.", file=sys.stderr)
    return int(bool(wrong or failed))


if __name__ == "__main__":
    sys.exit(main())
