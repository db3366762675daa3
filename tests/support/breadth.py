"""How many of a test's cases a run takes: some of them, or all, as scripts/nightly asks with LOGITCACHE_TESTS=all.

Owns that one switch. A test whose cases differ only in where a process is killed, or in which kind of adapter it has,
says how many are enough for every change; no case is written that nightly does not run.
"""

import os
from collections.abc import Iterable
from typing import TypeVar

Case = TypeVar("Case")

ALL = os.environ.get("LOGITCACHE_TESTS") == "all"


def some_of(cases: Iterable[Case], num: int) -> list[Case]:
    """All cases, or `num` of them at equal distances and in their order, the first and the last included.

    num: of 1 it is the middle one.
    """
    found = list(cases)
    if ALL or len(found) <= num:
        return found
    if num == 1:
        return [found[len(found) // 2]]
    return [found[round(n * (len(found) - 1) / (num - 1))] for n in range(num)]
