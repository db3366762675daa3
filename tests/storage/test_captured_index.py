"""What `Captured` says is missing, against a dictionary of sets."""

import threading
from collections import Counter
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from logitcache.storage import captured_index as module
from logitcache.storage.captured_index import Captured
from logitcache.storage.encoding import SampleTable

Part = list[tuple[bytes, list[int]]]
"""Of a shard: sample ids and their positions."""

FIRST_HALVES = (b"\0" * 8, b"\xff" * 8, b"12345678")
IDS = [first + bytes([n]) * 8 for first in FIRST_HALVES for n in (0, 1, 255)]
"""Each shares its first half, the key it is sorted by, with two others."""

positions = st.sets(st.integers(0, 12), min_size=1, max_size=8).map(sorted)
parts = st.lists(st.tuples(st.sampled_from(IDS), positions), min_size=1, max_size=6, unique_by=lambda s: s[0])
asked = st.lists(st.tuples(st.sampled_from(IDS), positions), max_size=6)


def make_table(part: Part) -> SampleTable:
    """What a shard of these samples reads as; tokens are of no matter here."""
    return SampleTable(
        sample_ids=np.array([list(key) for key, _ in part], dtype=np.uint8).reshape(-1, 16),
        num_tokens=np.array([max(p) + 2 for _, p in part], dtype="<u4"),
        num_positions=np.array([len(p) for _, p in part], dtype="<u4"),
        num_tokens_cut=np.zeros(len(part), dtype="<u4"),
        token_ids=np.zeros(sum(max(p) + 2 for _, p in part), dtype="<u4"),
        positions=np.concatenate([np.array(p) for _, p in part]).astype("<i4"),
    )


class Shards:
    """Committed shards, and how often each was read."""

    def __init__(self) -> None:
        self.tables: dict[str, SampleTable] = {}
        self.reads: Counter[str] = Counter()
        self.captured = Captured(self.read)
        self.known: dict[bytes, set[int]] = {}
        self._names = count()

    def read(self, unit: str) -> SampleTable:
        self.reads[unit] += 1
        return self.tables[unit]

    def add(self, part: Part) -> None:
        unit, table = f"unit-{next(self._names)}", make_table(part)
        self.tables[unit] = table
        self.captured.add(unit, table)
        for key, found in part:
            self.known.setdefault(key, set()).update(found)

    def check(self, wanted: Part) -> None:
        found = self.captured.missing([key for key, _ in wanted], [as_positions(p) for _, p in wanted])
        expected = [[t for t in p if t not in self.known.get(key, set())] for key, p in wanted]
        assert [f.tolist() for f in found] == expected
        assert all(f.dtype == np.int32 for f in found)


def as_positions(found: list[int]) -> NDArray[np.int32]:
    return np.array(found, dtype=np.int32)


@pytest.fixture(params=[1, 4096], ids=["parts apart", "parts joined"])
def _size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALL", request.param)


@pytest.mark.usefixtures("_size")
@settings(max_examples=150, deadline=None)
@given(steps=st.lists(st.tuples(parts, asked), max_size=8))
def test_missing_is_what_no_shard_has(steps: list[tuple[Part, Part]]) -> None:
    shards = Shards()
    shards.check([(key, [0, 5]) for key in IDS])
    for part, wanted in steps:
        shards.add(part)
        shards.check(wanted)
        shards.check(part)
    shards.check([(key, list(range(13))) for key in IDS])
    assert len(shards.captured) == sum(len(part) for part, _ in steps)


def test_nothing_asked() -> None:
    assert Captured(lambda _: pytest.fail("nothing to read")).missing([], []) == []


def test_the_same_positions_are_recognised_without_reading() -> None:
    shards = Shards()
    shards.add([(key, [n, n + 3]) for n, key in enumerate(IDS)])
    shards.check([(key, [n, n + 3]) for n, key in enumerate(IDS)])
    shards.check([(b"x" * 16, [1])])
    assert not shards.reads
    shards.check([(IDS[0], [0, 1])])
    assert sum(shards.reads.values()) == 1


def test_the_union_of_several_captures() -> None:
    shards = Shards()
    for start in range(6):
        shards.add([(IDS[0], [start, start + 6]), (IDS[1], [0])])
    shards.check([(IDS[0], list(range(12))), (IDS[0], [*range(12), 12]), (IDS[1], [0, 1]), (IDS[2], [0])])


@pytest.mark.parametrize("size", [1, 17, 300])
def test_many_parts_stay_few_and_right(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random ids, most captured; adding never grows the number of parts beyond the logarithm of their rows."""
    monkeypatch.setattr(module, "SMALL", 1)
    rng = np.random.default_rng(size)
    shards = Shards()
    ids = [rng.bytes(16) for _ in range(40 * size)]
    rng.shuffle(ids)
    for start in range(0, len(ids), size):
        shards.add([(key, [int(rng.integers(5)), 7]) for key in ids[start : start + size]])
    assert len(shards.captured) == len(ids)
    assert len(shards.captured._parts) <= 2 + np.log2(len(ids))
    sampled = [ids[i] for i in rng.permutation(len(ids))[:200]]
    shards.check([(key, sorted({int(rng.integers(9)), 7})) for key in sampled])
    shards.check([(rng.bytes(16), [0, 7]) for _ in range(50)])


def test_adding_while_others_ask() -> None:
    """What was added before is never missing, what nobody adds always is."""
    shards = Shards()
    rng = np.random.default_rng(0)
    early = [(rng.bytes(16), [1, 2]) for _ in range(50)]
    never = [(key[:8] + b"never!!!", [1]) for key, _ in early]
    shards.add(early)
    failures: list[str] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            wanted = [*early, *((key, [1, 2, 3]) for key, _ in early), *never]
            found = shards.captured.missing([k for k, _ in wanted], [as_positions(p) for _, p in wanted])
            if [f.tolist() for f in found] != [[]] * 50 + [[3]] * 50 + [[1]] * 50:
                failures.append(str(found))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(150):
        shards.add([(rng.bytes(16), [0]) for _ in range(20)])
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    shards.check([*early, *never])
