"""Which token sequences start with given tokens: all of them in lexicographic order, a million in half a second.

Owns the order and the search in it. Must not know caches, and imports nobody.
Trade-off: sorting goes through all sequences two tokens at a time, and only those that are still alike go on; the
tokens are held once more, 4 bytes each, and 24 bytes a sequence.
"""

from bisect import bisect_left
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray


class Prefixes:
    """Token sequences, in lexicographic order.

    token_ids: uint32, those of all sequences. starts, lengths: [S], where in them each sequence begins, and how long it
    is. What is found are numbers below S. Nothing changes once it is made, so threads may share it.
    """

    def __init__(
        self, token_ids: NDArray[np.uint32], starts: NDArray[np.integer], lengths: NDArray[np.integer]
    ) -> None:
        self._data = token_ids.astype(">u4").tobytes()  # whose order, as bytes, is that of the tokens
        self._starts, self._lengths = starts.astype(np.int64), lengths.astype(np.int64)
        self._order = _lexicographic(token_ids, self._starts, self._lengths)

    def __len__(self) -> int:
        return len(self._order)

    def starting_with(self, tokens: NDArray[np.uint32]) -> list[int]:
        """All sequences that start with these tokens."""
        wanted = tokens.astype(">u4").tobytes()
        return list(self._from(self._place(wanted), wanted))

    def nearest(self, tokens: NDArray[np.uint32]) -> tuple[int, int]:
        """A sequence that shares the most tokens with these at the start, and how many. There must be sequences."""
        wanted = tokens.astype(">u4").tobytes()
        at = self._place(wanted)
        beside = [int(number) for number in self._order[max(at - 1, 0) : at + 1]]
        return max(((number, _common(self._bytes(number), wanted)) for number in beside), key=lambda found: found[1])

    def _place(self, wanted: bytes) -> int:
        return bisect_left(range(len(self._order)), wanted, key=lambda i: self._bytes(int(self._order[i])))

    def _from(self, at: int, wanted: bytes) -> Iterator[int]:
        while at < len(self._order) and self._bytes(number := int(self._order[at])).startswith(wanted):
            yield number
            at += 1

    def _bytes(self, number: int) -> bytes:
        start = 4 * int(self._starts[number])
        return self._data[start : start + 4 * int(self._lengths[number])]


def _lexicographic(
    tokens: NDArray[np.uint32], starts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[np.intp]:
    """The order of sequences; one that is the start of another comes first. [S]"""
    order = np.argsort(lengths, kind="stable")  # what is alike stays in this order: the last of a group is its longest
    places = np.arange(len(order)) if len(order) > 1 else order[:0]
    group = np.zeros(len(places), dtype=np.intp)  # of sequences that are alike up to `depth`, ascending
    depth = 0
    while len(places):
        rows = order[places]
        key = _two_tokens(tokens, starts[rows] + depth, lengths[rows] - depth)
        new = group[1:] != group[:-1]
        if np.any((key[1:] != key[:-1]) & ~new):
            by = np.lexsort((key, group))
            rows, key = rows[by], key[by]
            order[places] = rows
        first = np.concatenate([[True], new | (key[1:] != key[:-1])])
        last = np.concatenate([first[1:], [True]])
        depth += 2
        group = np.cumsum(first) - 1
        left = ~(first & last) & (lengths[rows[last]] > depth)[group]
        places, group = places[left], group[left]
    return order


def _two_tokens(
    tokens: NDArray[np.uint32], starts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """The first two tokens as one number, 0 for those that are not there."""
    most = max(len(tokens) - 1, 0)
    key = np.zeros(len(starts), dtype=np.uint64)
    for i in range(2):
        there = np.take(tokens, np.minimum(starts + i, most), mode="clip") if len(tokens) else np.uint32(0)
        key = (key << np.uint64(32)) | np.where(lengths > i, there, 0).astype(np.uint64)
    return key


def _common(a: bytes, b: bytes) -> int:
    """Number of tokens two sequences share at their start."""
    n = min(len(a), len(b)) // 4
    x, y = np.frombuffer(a, ">u4", count=n), np.frombuffer(b, ">u4", count=n)
    differs = np.flatnonzero(x != y)
    return int(differs[0]) if len(differs) else n
