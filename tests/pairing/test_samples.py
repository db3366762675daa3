"""Samples of data beside a cache: cut as the cache's were, and what is said of rows that were cut."""

import numpy as np
import pytest
from support.tiny_runs import V, make_base

from logitcache.capture.settings import CaptureSettings
from logitcache.capture.worker import precompute
from logitcache.data.rows import NamedRows
from logitcache.data.samples import Sample
from logitcache.pairing.samples import DEFAULT_MAX_LENGTH, samples_for
from logitcache.storage import LogitCache

MAX_LENGTH = 5


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    path = tmp_path_factory.mktemp("samples") / "c"
    supervised = np.array([False, False, True, True])
    sample = Sample(np.array([4, 5, 6, 7], dtype=np.uint32), supervised, "row 0")
    precompute(make_base(), [sample], path, CaptureSettings(top_k=4, max_length=MAX_LENGTH))
    return LogitCache.open(path)


def rows(*lengths: int) -> NamedRows:
    return ((f"row {n}", {"input_ids": list(range(1, n + 1))}) for n in lengths)


def lengths_of(samples: list[Sample]) -> list[int]:
    return [len(s.token_ids) for s in samples]


def test_rows_are_cut_as_the_caches_were_unless_said_otherwise(cache: LogitCache) -> None:
    assert lengths_of(samples_for(rows(3, 9), cache, None, V)) == [3, MAX_LENGTH]
    assert lengths_of(samples_for(rows(3, 9), cache, None, V, 4)) == [3, 4]
    long = samples_for((("row", {"input_ids": [1] * n}) for n in (9, DEFAULT_MAX_LENGTH + 1)), None, None, V)
    assert lengths_of(long) == [9, DEFAULT_MAX_LENGTH]


def test_rows_that_were_cut_are_told(cache: LogitCache) -> None:
    told: list[str] = []
    samples_for(rows(3, 9, 8), cache, None, V, on_message=told.append)
    assert told == ["2 rows were cut to 5 tokens."]
    samples_for(rows(3, 5), cache, None, V, on_message=told.append)
    assert len(told) == 1


def test_without_rows_they_are_the_caches(cache: LogitCache) -> None:
    (sample,) = samples_for(None, cache, None, V)
    assert sample.token_ids.tolist() == [4, 5, 6, 7] and sample.positions.tolist() == [1, 2]
    with pytest.raises(ValueError, match="give one of them"):
        samples_for(None, None, None, V)


def test_rows_of_which_nothing_is_left_are_told() -> None:
    """The tokens that are learnt lie behind the cut: the row is not among the samples."""
    told: list[str] = []
    labels = [-100] * 8 + [9, 10]
    late = ("late", {"input_ids": list(range(1, 11)), "labels": labels})
    found = samples_for(iter([*rows(4), late]), None, None, 260, 5, told.append)
    assert lengths_of(found) == [4]
    assert told == ["1 rows were cut to 5 tokens; 1 of them kept no supervised token and are left out."]
