"""The demo at a size that takes seconds: same code, two steps."""

import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from support.cli_harness import logitcache

from logitcache.adapters.registry import AdapterSettings
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.worker import precompute
from logitcache.data.rows import read_rows
from logitcache.data.samples import make_samples
from logitcache.demo.run import DemoSettings, relative_sentences, run_demo, summary_rows, write_data
from logitcache.errors import TrainingFailed, UnsupportedModel
from logitcache.evaluation.compare import compare, load_adapter
from logitcache.losses.formulas import Objective
from logitcache.models.loading import Base, find_model, load_base, load_tokenizer
from logitcache.storage import LogitCache
from logitcache.training.run import TrainSettings, train

SMALL = DemoSettings(seeds=(3,), max_steps=2, batch_size=2, max_length=48, num_held_out=4, top_k=8)


def test_demo_writes_what_it_says_and_can_be_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    sweep = run_demo(tmp_path / "demo", SMALL, said.append)
    assert [(run.method, run.settings["seed"]) for run in sweep.finished] == [(m.name, 3) for m in SMALL.methods]
    assert [run.settings["lr"] for run in sweep.runs] == [m.lr for m in SMALL.methods]
    report = (tmp_path / "demo" / "report.md").read_text()
    for row in summary_rows(sweep):
        assert row[1] in report
    for sentence in relative_sentences(sweep):
        assert sentence in report
    assert (tmp_path / "demo" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert sum("trained in" in line for line in said) == 3
    laid_out = ["cache", "data", "demo.json", "frontier.png", "report.md", "sweep"]
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == laid_out

    adapters = {p: p.stat().st_mtime_ns for p in (tmp_path / "demo").glob("sweep/runs/*/adapter_model.safetensors")}
    assert len(adapters) == 3
    say_again: list[str] = []
    assert run_demo(tmp_path / "demo", SMALL, say_again.append) == sweep
    assert {p: p.stat().st_mtime_ns for p in adapters} == adapters
    assert "nothing left to run" in say_again[1] and say_again[2:] == said[2:]

    monkeypatch.setattr("logitcache.demo.run.DemoSettings", lambda: SMALL)
    lines = logitcache("demo", "--out", tmp_path / "demo").out.splitlines()
    assert lines[-1].startswith("Report: ") and lines[-2].startswith("Nats a token on held-out text")
    assert lines[-3] == "" and not [line for line in lines if "\\n" in line]


def test_demo_trains_and_measures_as_one_run_after_the_other_by_hand(tmp_path: Path) -> None:
    """The demo is a sweep; its numbers are those of `train` and `compare` with the same settings and seeds."""
    settings = replace(SMALL, methods=(SMALL.methods[2],))
    (run,) = run_demo(tmp_path / "demo", settings, lambda _: None).runs
    source = find_model(str(files("logitcache.demo").joinpath("base")))

    def load() -> Base:
        return load_base(source, "float32", torch.device("cpu"))

    base, tokenizer = load(), load_tokenizer(source)
    new_train, new, prior = (
        make_samples(read_rows(str(path)), tokenizer, settings.max_length, 4096).samples
        for path in write_data(tmp_path / "data", settings)
    )
    precompute(base, new_train, tmp_path / "c", CaptureSettings(top_k=8, max_length=48))
    by_hand = TrainSettings(lr=2e-3, batch_size=2, max_steps=2, seed=3)
    cache = LogitCache.open(tmp_path / "c")
    train(load(), new_train, cache, tmp_path / "run", AdapterSettings(rank=16, alpha=32), Objective(), by_hand)
    name = "adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "demo/sweep/runs" / run.name / name).read_bytes()
    adapted = load_adapter(load().model, str(tmp_path / "run"))
    assert run.outcome is not None
    for held_out, found in ((new, run.outcome.new), (prior, run.outcome.prior)):
        expected = compare(base.model, adapted, held_out)
        assert expected.after is not None and expected.kl_nats is not None
        assert found.ce_before == pytest.approx(expected.before.ce_nats, abs=1e-5)
        assert found.ce_after == pytest.approx(expected.after.ce_nats, abs=1e-5)
        assert (found.num_first_changed, found.num_documents) == (expected.num_first_changed, 4)
        assert 0 < found.kl_nats <= expected.kl_nats + 1e-6  # over 256 alternatives and the rest as one outcome


def test_a_run_that_fails_ends_the_demo_and_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(SMALL, methods=SMALL.methods[:1])
    with monkeypatch.context() as patched:
        patched.setattr("logitcache.sweeps.run.load_adapter", refuse)
        with pytest.raises(TrainingFailed, match=r"training plain LoRA of the demo in .*no such adapter"):
            run_demo(tmp_path, settings, lambda _: None)
    assert len(run_demo(tmp_path, settings, lambda _: None).finished) == 1


def refuse(*_: object) -> None:
    raise UnsupportedModel("no such adapter")


def test_demo_does_not_touch_a_folder_that_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(TrainingFailed, match="Nothing was changed"):
        run_demo(tmp_path, SMALL, lambda _: None)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_base_never_saw_what_is_held_out(tmp_path: Path) -> None:
    """Training text of the base and of the adapters, and the held-out texts, come from different modules."""
    from logitcache.demo.text import is_held_out

    paths = write_data(tmp_path, DemoSettings(max_steps=4))
    sources = [[json.loads(line)["source"] for line in path.read_text().splitlines()] for path in paths]
    assert all(len(s) > 20 for s in sources)
    assert [{is_held_out(name) for name in names} for names in sources] == [{False}, {True}, {True}]


def test_the_embedded_base_is_small_and_says_how_it_was_made() -> None:
    base = files("logitcache.demo").joinpath("base")
    sizes = [len(item.read_bytes()) for item in base.iterdir()]
    assert sum(sizes) <= 6_000_000
    assert "scripts/make_demo_base.py" in base.joinpath("README.md").read_text()
