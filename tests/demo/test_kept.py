"""What the real demo keeps between two tries."""

import json
from pathlib import Path

import pytest

from logitcache.demo import kept
from logitcache.demo.kept import COST, Clock, read_kept, write_kept
from logitcache.errors import TrainingFailed


def test_a_finished_part_keeps_its_seconds_and_an_interrupted_one_adds_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([0.0, 10.0, 100.0, 105.0, 200.0, 203.0, 300.0])
    monkeypatch.setattr(kept, "perf_counter", lambda: next(times))
    clock = Clock(tmp_path)
    with clock.part("base"):
        pass
    with pytest.raises(KeyboardInterrupt), clock.part("training"):
        raise KeyboardInterrupt
    again = Clock(tmp_path)
    with again.part("training"):
        pass
    with again.part("base"):
        pass
    assert Clock(tmp_path).seconds == again.seconds == {"base": 10.0, "training": 8.0}
    assert again.peak_memory_bytes > 2**20


def test_a_file_of_the_demo_that_is_damaged_is_named(tmp_path: Path) -> None:
    assert read_kept(tmp_path / "about.json") == {}
    write_kept(tmp_path / "about.json", {"what": "Größe"})
    assert json.loads((tmp_path / "about.json").read_text()) == read_kept(tmp_path / "about.json") == {"what": "Größe"}
    (tmp_path / COST).write_text('{"seconds": {')
    with pytest.raises(TrainingFailed, match=r"cost\.json is damaged"):
        Clock(tmp_path)
