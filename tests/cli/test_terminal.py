"""Events of jobs at the terminal: a line of JSON for a machine, a sentence for a person."""

import json
import pickle
from dataclasses import asdict
from pathlib import Path

import pytest

from logitcache.cli.progress import TrainEvents
from logitcache.cli.terminal import Console
from logitcache.events import (
    BatchHalved,
    DataNoted,
    Evaluated,
    Event,
    Finished,
    RayStarted,
    ShardCommitted,
    ShardFailed,
    ShareDone,
    Trained,
    TrainLogged,
    TrainProgress,
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
    (
        TrainProgress(7, 90, 120.6, 4000.0, {"ce": 1.5, "kl": 0.25}),
        {
            **{"event": "progress", "step": 7, "of": 90, "tokens_per_second": 120.6, "seconds_left": 4000.0},
            "values": {"ce": 1.5, "kl": 0.25},
        },
    ),
    (TrainLogged(7, {"ce": 1.5}), {"event": "log", "step": 7, "values": {"ce": 1.5}}),
    (Evaluated(8, {"new_ce": 1.5}), {"event": "evaluation", "step": 8, "values": {"new_ce": 1.5}}),
    (
        Trained(9, 4, "why", {"ce": 1.5}, {"new_ce": 2.0}),
        {
            **{"event": "trained", "step": 9, "best_step": 4, "stopped": "why", "values": {"ce": 1.5}},
            "evaluated": {"new_ce": 2.0},
        },
    ),
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
        "Memory ran out on a batch of 8,192 tokens: from here on 4,096 at most, whose numbers round otherwise. With "
        "--batch-tokens 4096 from the start a job that is killed ends with the same bytes.",
        "Step 7 of 90: 121 tokens/s, 1 h 7 min left, ce 1.500, kl 0.250.",
        "Step 8: new CE 1.5000.",
    ]


def test_the_bar_grows_by_the_tokens_of_each_window() -> None:
    console = Console(as_json=False, speaks=False)
    with console.bar("precompute"):
        for tokens in (90, 10):
            console.on_event(WindowPlanned(0, tokens, 0))
        assert console._bar.total == 100


class State:
    """What the Trainer tells its callbacks."""

    is_world_process_zero, max_steps = True, 100

    def __init__(self, step: int) -> None:
        self.global_step, self.num_input_tokens_seen = step, 50 * step


def test_a_run_says_how_far_it_is_every_half_minute() -> None:
    """By a clock that is set: not before 30 s, in the middle of a long step too, and of a resumed run from where it
    began."""
    now, told = [1000.0], list[Event]()
    events = TrainEvents(told.append, lambda: now[0])
    events.on_train_begin(None, State(10), None)
    for after, step, ends in ((29, 11, True), (31, 12, True), (60, 12, False), (62, 12, False), (90, 14, True)):
        now[0] = 1000.0 + after
        (events.on_step_end if ends else events.on_substep_end)(None, State(step), None)
        events.on_log(None, State(step), None, {"ce": float(step), "loss": 1.0})
    said = [event for event in told if isinstance(event, TrainProgress)]
    assert [(e.step, e.of, e.values.get("ce")) for e in said] == [(12, 100, 11.0), (12, 100, 12.0)]
    assert said[0].tokens_per_second == pytest.approx(100 / 31) and said[0].seconds_left == pytest.approx(88 * 31 / 2)
    assert [e.step for e in told if isinstance(e, TrainLogged)] == [11, 12, 12, 12, 14]


def test_an_event_survives_the_way_from_an_actor() -> None:
    for event, _ in LINES:
        assert pickle.loads(pickle.dumps(event)) == event and asdict(event)


def test_every_event_is_in_the_guide() -> None:
    pages = Path(__file__).resolve().parents[2] / "docs" / "how-to"
    guide = "".join((pages / name).read_text(encoding="utf-8") for name in ("scale.md", "train.md"))
    assert [event.name for event, _ in LINES if f"`{event.name}`" not in guide] == []
