"""Both stores keep what `BackendTests` asks of a store on a local disk.

The core of it runs on object stores too, in test_remote.
"""

from __future__ import annotations

import numpy as np
import pytest
from support.backend_suite import BackendTests
from support.storage_samples import NO_TOKEN, STORES, every_position

pytest_plugins = ["support.storage_fixtures"]
pytestmark = pytest.mark.usefixtures("no_fsync")


class TestZarr(BackendTests):
    name = "zarr"
    unread = frozenset({"zarr.json"})


class TestArrow(BackendTests):
    name = "arrow"


def test_every_store_is_here() -> None:
    assert {TestZarr.name, TestArrow.name} == {*STORES}


def test_samples_have_tails_of_minus_infinity_and_short_rows() -> None:
    sample = every_position(np.random.default_rng(4), 200, 6, 5)
    record = sample.logprobs
    assert np.isneginf(record.tail_logprobs).any() and np.isfinite(record.tail_logprobs).any()
    assert (record.alternative_ids == NO_TOKEN).any() and (record.alternative_ids != NO_TOKEN).all(axis=1).any()
