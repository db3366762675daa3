"""A sample of the fault suite (scripts/fault_suite.py has the long one): no fault gives another number."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support import storage_faults_crowds as crowds
from support import storage_faults_damage as damage
from support import storage_faults_hostile as hostile
from support import storage_faults_strangers as strangers
from support import storage_faults_writers as writers
from support.storage_faults import (
    SAME,
    STORES,
    Counts,
    Tally,
    judge,
    lacks,
    make_cache,
    read_all,
    samples_of,
    write,
)

from logitcache.storage import cache as cache_module
from logitcache.storage.shard import checked_record as checked

COUNTS = Counts(flips=150, kills=10, rounds=3, mutations=60, stride=61, jobs=3)
FAULTS = (*damage.FAULTS, *strangers.FAULTS, *writers.FAULTS, *crowds.FAULTS, *hostile.FAULTS)
SEES_NOTHING_WRONG = {"crowds", "meeting_writers"}
"""Faults after which the cache must be whole, so that nothing is to be refused."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where it can be: the faults are simulated above the disk."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as name:
        yield Path(name)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_no_fault_gives_another_number(
    fault: Callable[[str, Path, Counts], Iterator[Tally]], store: str, folder: Path
) -> None:
    tallies = list(fault(store, folder, COUNTS))
    assert {f"{t.fault}, {label}": what for t in tallies for label, what in t.wrong.items()} == {}
    assert {f"{t.fault}, {label}": what for t in tallies for label, what in t.defects.items()} == {}
    assert {text: what for t in tallies for text, what in t.bad_messages.items()} == {}
    assert all(tally.cases for tally in tallies)
    assert any(tally.refused for tally in tallies) or fault.__name__ in SEES_NOTHING_WRONG


@pytest.mark.parametrize("store", STORES)
def test_every_class_of_file_is_flipped_and_verify_reports_all_but_the_line_end(store: str, folder: Path) -> None:
    (tally,) = damage.bit_flips(store, folder, COUNTS)
    assert tally.notes["reported by verify"] >= tally.cases - len(tally.defects) - 3
    assert tally.cases >= COUNTS.flips


# --- the suite itself -------------------------------------------------------------------------------------------------


def test_the_suite_sees_another_number(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_cache(folder / "cache", "arrow")
    expected = read_all(path)
    assert judge(path, expected).kind == "same"
    other = read_all(make_cache(folder / "other", "arrow", seed=2))
    assert judge(path, other).kind == "wrong"

    def wrong(*args: object) -> object:
        record = checked(*args)  # type: ignore[arg-type]
        record.label_logprobs[:1] = np.nextafter(record.label_logprobs[:1], np.float32(-1e9))
        return record

    monkeypatch.setattr(cache_module, "checked_record", wrong)
    assert judge(path, expected).kind == "wrong"


def test_the_suite_sees_an_exception_of_another_kind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_cache(folder / "cache", "zarr")
    expected = read_all(path)

    def fails(*_: object) -> object:
        raise IndexError("out of bounds")

    monkeypatch.setattr(cache_module, "checked_record", fails)
    assert judge(path, expected).kind == "defect"


def test_the_suite_sees_a_writer_that_leaves_other_bytes(folder: Path) -> None:
    scene = writers.Scene("arrow", folder, grows=False)
    write(scene.path, scene.manifest, samples_of(5, version=1, groups=True)[:1])
    assert scene.finish(SAME).kind == "wrong"


def test_a_message_without_a_place_or_an_action_is_seen() -> None:
    path = Path("/caches/a")
    assert list(lacks("reading /caches/a/manifest.json: bad. Run `logitcache verify`.", path).values()) == [""]
    assert list(lacks("it is bad. Run `logitcache verify`.", path).values()) == ["the file or shard"]
    assert list(lacks("reading /caches/a: bad.", path).values()) == ["an action"]
