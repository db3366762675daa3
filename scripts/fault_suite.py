"""Thousands of faults done to caches and their writers, of which none may give another number.

Owns the counts and the table; the faults are in tests/support/storage_faults*.py, of which
tests/storage/test_faults.py runs a sample. The trade-off: everything happens in memory (/dev/shm) where there is one,
so that thousands of cases take minutes; kill -9 and a failing disk are simulated at the system calls, a power failure
is not.

    python scripts/fault_suite.py            writes docs/benchmarks/faults.csv; 15 minutes on one core
    python scripts/fault_suite.py --quick    a taste, which writes nothing
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support import flipped_results, planted_secrets  # noqa: E402
from support import storage_faults_crowds as crowds  # noqa: E402
from support import storage_faults_damage as damage  # noqa: E402
from support import storage_faults_hostile as hostile  # noqa: E402
from support import storage_faults_locks as locks  # noqa: E402
from support import storage_faults_strangers as strangers  # noqa: E402
from support import storage_faults_writers as writers  # noqa: E402
from support.storage_faults import STORES, Counts, Seen, Tally, grouped  # noqa: E402

DEFAULT_OUT = ROOT / "docs" / "benchmarks" / "faults.csv"
LONG = Counts(flips=5000, kills=200, rounds=100, mutations=3000, stride=1, jobs=90)
QUICK = Counts(flips=300, kills=10, rounds=6, mutations=100, stride=23, jobs=6)
FAULTS = (
    *damage.FAULTS,
    *strangers.FAULTS,
    *writers.FAULTS,
    *crowds.FAULTS,
    *locks.FAULTS,
    *hostile.FAULTS,
)
ONCE = (flipped_results.flips, planted_secrets.secrets)
"""Of no store: what is read or written beside caches."""
COLUMNS = ("fault", "store", "cases", "refused", "without_effect", "wrong_numbers", "remark")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few hundred cases, nothing is written")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--only", default="", help="faults whose name contains this; nothing is written")
    args = parser.parse_args()
    tallies = run(QUICK if args.quick else LONG, args.only)
    if not (args.quick or args.only):
        save(args.out, tallies)
        print(f"{args.out} written")
    return int(any(tally.wrong or tally.defects for tally in tallies))


def run(counts: Counts, only: str) -> list[Tally]:
    """All faults on all stores, one row a fault and a store, each printed when it is done."""
    tallies: dict[tuple[str, str], Tally] = {}
    for fault in (*FAULTS, *ONCE):
        for store in () if only not in fault.__name__ else ("both",) if fault in ONCE else STORES:
            started, rows = time.perf_counter(), set()
            with tempfile.TemporaryDirectory(dir=memory()) as folder:
                for tally in fault(store, Path(folder), counts):
                    key = tally.fault, store
                    rows.add(key)
                    if key in tallies:
                        tallies[key].merge(tally)
                    else:
                        tallies[key] = tally
            for key in sorted(rows):
                show(tallies[key])
            print(f"    {fault.__name__}: {time.perf_counter() - started:.0f} s", flush=True)
    messages = error_messages(list(tallies.values()))
    show(messages)
    return [*tallies.values(), messages]


def error_messages(tallies: list[Tally]) -> Tally:
    """Every different message of all refusals: whether it names the file or shard, and something to do."""
    total = Tally("messages of the refusals", "both")
    for tally in tallies:
        total.messages |= tally.messages
    total.refused = len(total.messages) - len(total.bad_messages)
    for text, lack in total.bad_messages.items():
        total.add(text, Seen("defect", f"lacks {lack}"))
    return total


def memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def show(tally: Tally) -> None:
    numbers = f"{tally.cases:6} cases {tally.refused:6} refused {tally.without_effect:6} without effect"
    print(f"{tally.fault:44.44} {tally.store:6}{numbers} {len(tally.wrong):4} wrong {len(tally.defects):4} defects")
    for kind, found in (("WRONG", tally.wrong), ("defect", tally.defects)):
        for example in grouped(found):
            print(f"    {kind}: {example}")


def save(path: Path, tallies: list[Tally]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        for t in tallies:
            table.writerow([t.fault, t.store, t.cases, t.refused, t.without_effect, len(t.wrong), t.remark[:2000]])


if __name__ == "__main__":
    sys.exit(main())
