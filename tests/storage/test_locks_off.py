"""A sample of jobs whose workers see no lock of one another (scripts/fault_suite.py has 90 a store): all are right."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.storage_faults import STORES, Counts
from support.storage_faults_locks import KINDS, locks_off

COUNTS = Counts(flips=0, kills=0, rounds=0, mutations=0, stride=1, jobs=3)


@pytest.mark.parametrize("store", STORES)
def test_every_job_of_three_workers_ends_with_one_right_cache(store: str, tmp_path: Path) -> None:
    (tally,) = locks_off(store, tmp_path, COUNTS)
    assert tally.wrong == {} and tally.defects == {}
    assert tally.without_effect == COUNTS.jobs == len(KINDS)
