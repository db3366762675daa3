"""The demo at a size that takes seconds: same code, two steps."""

import json
from pathlib import Path

import pytest

from logitcache.demo.run import DemoSettings, run_demo, summary_rows
from logitcache.errors import TrainingFailed

SMALL = DemoSettings(seeds=(3,), max_steps=2, batch_size=2, max_length=48, num_held_out=4, top_k=8)


def test_demo_writes_what_it_says_and_can_be_run_again(tmp_path: Path) -> None:
    said: list[str] = []
    outcomes = run_demo(tmp_path / "demo", SMALL, said.append)
    assert [(o.method, o.seed) for o in outcomes] == [(m.name, 3) for m in SMALL.methods]
    assert {o.new.before.ce_nats for o in outcomes} == {outcomes[0].new.before.ce_nats}
    report = (tmp_path / "demo" / "report.md").read_text()
    for row in summary_rows(outcomes):
        assert row[1] in report
    assert (tmp_path / "demo" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((tmp_path / "demo" / "results.json").read_text())) == 3
    assert sum("trained in" in line for line in said) == 3

    adapters = {p: p.stat().st_mtime_ns for p in (tmp_path / "demo").glob("runs/*/adapter_model.safetensors")}
    assert len(adapters) == 3
    again = run_demo(tmp_path / "demo", SMALL, said.append)
    assert again == outcomes
    assert {p: p.stat().st_mtime_ns for p in adapters} == adapters


def test_demo_does_not_touch_a_folder_that_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(TrainingFailed, match="Nothing was changed"):
        run_demo(tmp_path, SMALL, lambda _: None)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_base_never_saw_what_is_held_out(tmp_path: Path) -> None:
    """Training text of the base and of the adapters, and the held-out texts, come from different modules."""
    from logitcache.demo.run import write_data
    from logitcache.demo.text import is_held_out

    paths = write_data(tmp_path, DemoSettings(max_steps=4))
    sources = [[json.loads(line)["source"] for line in path.read_text().splitlines()] for path in paths]
    assert all(len(s) > 20 for s in sources)
    assert [{is_held_out(name) for name in names} for names in sources] == [{False}, {True}, {True}]


def test_the_embedded_base_is_small_and_says_how_it_was_made() -> None:
    from importlib.resources import files

    base = files("logitcache.demo").joinpath("base")
    sizes = [len(item.read_bytes()) for item in base.iterdir()]
    assert sum(sizes) <= 6_000_000
    assert "scripts/make_demo_base.py" in base.joinpath("README.md").read_text()
