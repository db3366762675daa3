"""Sequences that start with given tokens, against a search through all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from logitcache.storage.prefixes import Prefixes

LARGEST = 2**32 - 1
tokens = st.lists(st.sampled_from([0, 1, 256, LARGEST]), max_size=7)
"""0 is what fills up a short sequence while sorting; 1 and 256 are in another order by their little-endian bytes."""


def made(sequences: Sequence[Sequence[int]]) -> Prefixes:
    lengths = np.array([len(s) for s in sequences], dtype=np.int64)
    return Prefixes(array([t for s in sequences for t in s]), np.cumsum(lengths) - lengths, lengths)


def array(values: Sequence[int]) -> NDArray[np.uint32]:
    return np.array(values, dtype=np.uint32)


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@given(st.lists(tokens, min_size=1, max_size=12, unique_by=tuple), tokens)
@example([[0], [0, 0], [0, 0, 0]], [0, 0])
@example([[5], [5, 0, 3], [5, 0]], [5, 0])
@example([[], [1]], [])
def test_the_sequences_that_start_with_tokens_are_found(sequences: list[list[int]], asked: list[int]) -> None:
    prefixes = made(sequences)
    found = prefixes.starting_with(array(asked))
    expected = [i for i, s in enumerate(sequences) if s[: len(asked)] == asked]
    assert sorted(found) == expected
    assert [sequences[i] for i in found] == sorted(sequences[i] for i in expected)
    number, common = prefixes.nearest(array(asked))
    assert common == shared(sequences[number], asked) == max(shared(s, asked) for s in sequences)


def test_sequences_that_are_long_alike_are_told_apart() -> None:
    start = np.random.default_rng(0).integers(LARGEST, size=1001).tolist()
    sequences = [[*start, 9], [*start, 3], start, [*start, 3, 0], start[:700], [*start[:700], LARGEST]]
    prefixes = made(sequences)
    assert prefixes.starting_with(array(start)) == [2, 1, 3, 0]
    assert prefixes.nearest(array([*start, 3, 7])) in ((1, 1002), (3, 1002))


@pytest.mark.parametrize("shape", [(0, 0), (1, 0), (1, 3)])
def test_none_and_one(shape: tuple[int, int]) -> None:
    prefixes = made([[7] * shape[1]] * shape[0])
    assert len(prefixes) == shape[0]
    assert prefixes.starting_with(array([])) == list(range(shape[0]))
    assert prefixes.starting_with(array([7, 7, 7, 7])) == []


def test_starts_may_leave_tokens_out() -> None:
    """A cache hands in the tokens of all captures, and the places of each sample's first."""
    prefixes = Prefixes(array([1, 2, 1, 2, 3, 4]), np.array([0, 4]), np.array([2, 2]))
    assert prefixes.starting_with(array([1])) == [0] and prefixes.starting_with(array([3, 4])) == [1]
