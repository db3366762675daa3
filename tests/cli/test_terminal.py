"""Events of jobs at the terminal: a line of JSON for a machine, a sentence for a person."""

import json
import pickle
from dataclasses import asdict
from pathlib import Path

import pytest

from logitcache.cli.terminal import Console
from logitcache.events import (
    BatchHalved,
    DataNoted,
    Event,
    Finished,
    RayStarted,
    ShardCommitted,
    ShardFailed,
    ShareDone,
    WindowPlanned,
)

LINES: list[tuple[Event, dict[str, object]]] = [
    (WindowPlanned(2, 90, 40), {"event": "window", "number": 2, "tokens": 90, "missing_tokens": 40}),
    (DataNoted("a note"), {"event": "data-note", "note": "a note"}),
    (ShardCommitted("ab", 7, 8, 99), {"event": "unit-done", "unit": "ab", "positions": 7, "tokens": 8, "bytes": 99}),
    (ShardFailed("a logit"), {"event": "unit-failed", "why": "a logit"}),
    (BatchHalved(8192, 4096), {"event": "batch-halved", "tokens": 8192, "to": 4096}),
    (RayStarted(2, 8, 1), {"event": "ray", "actors": 2, "shares": 8, "nodes": 1}),
    (ShareDone(5, 1, 8), {"event": "share-done", "share": 5, "done": 1, "of": 8}),
    (Finished(3, 20), {"event": "finished", "samples": 3, "positions": 20}),
]


def test_an_event_is_a_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Names and fields, in this order, are what programs read."""
    console = Console(as_json=True)
    for event, _ in LINES:
        console.on_event(event)
    found = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [list(line) for line in found] == [["time", *expected] for _, expected in LINES]
    assert [{name: value for name, value in line.items() if name != "time"} for line in found] == [e for _, e in LINES]
    assert {type(event) for event, _ in LINES} == set(Event.__subclasses__())


def test_a_person_is_told_what_they_should_know(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(as_json=False)
    for event, _ in LINES:
        console.on_event(event)
    assert capsys.readouterr().err.splitlines() == [
        "a note",
        "A shard was left out: a logit",
        "Memory ran out on a batch of 8,192 tokens: from here on 4,096 at most.",
    ]


def test_the_bar_grows_by_the_tokens_of_each_window() -> None:
    console = Console(as_json=False, speaks=False)
    with console.bar("precompute"):
        for tokens in (90, 10):
            console.on_event(WindowPlanned(0, tokens, 0))
        assert console._bar.total == 100


def test_an_event_survives_the_way_from_an_actor() -> None:
    for event, _ in LINES:
        assert pickle.loads(pickle.dumps(event)) == event and asdict(event)


def test_every_event_is_in_the_guide() -> None:
    guide = (Path(__file__).resolve().parents[2] / "docs" / "how-to" / "scale.md").read_text(encoding="utf-8")
    assert [event.name for event, _ in LINES if f"`{event.name}`" not in guide] == []
