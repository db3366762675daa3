"""The real demo at a size that takes seconds: the same code on a tiny random base."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.cli_harness import logitcache

from logitcache.demo import real
from logitcache.demo.manpages import NewText
from logitcache.demo.real import (
    ANCHOR_ROWS,
    ANSWERS,
    PRIOR,
    QUESTIONS,
    RealDemoSettings,
    run_real_demo,
    write_answers,
    write_new_text,
)
from logitcache.demo.run import summary_rows
from logitcache.demo.text import Document, is_held_out
from logitcache.errors import TrainingFailed
from logitcache.evaluation.prompts import everyday_prompts

SMALL = RealDemoSettings(
    max_steps=2,
    batch_size=2,
    max_length=200,
    num_held_out=3,
    top_k=8,
    num_prior=4,
    num_anchors=12,
    max_answer_tokens=20,
    questions=QUESTIONS[:2],
)
TEXT = NewText(
    tuple(Document(f"man:{i}.1#0", f"Seite {i} erklärt | den Schalter -{i}. " * 3) for i in range(60)),
    *("German manual pages", "a package", "GPL-3+", "License: GPL-3+\n"),
)


@pytest.fixture
def run(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the tiny base and a text of this file what the real demo is on."""

    def make_base(folder: Path) -> str:
        shutil.copytree(tiny_model, folder)
        return "a tiny model, in float32"

    monkeypatch.setattr(real, "check_installed", lambda: None)
    monkeypatch.setattr(real, "unpacked_base", make_base)
    monkeypatch.setattr(real, "new_text", lambda: (TEXT, "New text: of the test."))
    monkeypatch.setattr(real, "RealDemoSettings", lambda: SMALL)


@pytest.mark.usefixtures("run")
def test_real_demo_writes_what_it_says_and_goes_on_where_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, said = tmp_path / "demo", list[str]()
    with monkeypatch.context() as patched:
        patched.setattr(real, "answer_questions", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_real_demo(out, SMALL, said.append)
    assert [line.split(":")[0] for line in said[:6]] == [
        *("Base", "New text", "Prior text", "Anchors", "Precompute", "Anchors")
    ]
    assert not (out / "report.md").exists()
    adapters = {p: p.stat().st_mtime_ns for p in out.glob("sweep/runs/*/adapter_model.safetensors")}
    assert len(adapters) == 5

    said.clear()
    sweep = run_real_demo(out, SMALL, said.append)
    assert "nothing left to run" in said[2] and {p: p.stat().st_mtime_ns for p in adapters} == adapters
    done = [(run.method, run.settings["lr"], run.settings["anchor_weight"]) for run in sweep.finished]
    assert done == [(m.name, m.lr, m.anchor_weight) for m in SMALL.methods]
    prior, anchors = (asked(out / "data" / name) for name in (PRIOR, ANCHOR_ROWS))
    assert len(anchors) > len(prior) > 0 and not anchors & (prior | set(QUESTIONS))
    laid_out = {*("about.json", "anchors", "answers.json", "base", "cache", "cost.json", "data", "demo.json"), "sweep"}
    assert {path.name for path in out.iterdir()} == laid_out | {"frontier.png", "report.md"}
    assert (out / "data" / "copyright-manpages-de").read_text() == TEXT.copyright
    report = (out / "report.md").read_text()
    for row in summary_rows(sweep):
        assert row[1] in report
    cost = json.loads((out / "cost.json").read_text())
    assert list(cost["seconds"]) == cost["finished"] and cost["finished"][0] == "unpacking the base"
    assert f"{cost['peak_memory_bytes'] / 2**20:,.0f} MiB" in report

    again = logitcache("demo", "--real", "--out", out).out
    assert (out / "report.md").read_text() == report
    assert QUESTIONS[0] in again and re.search(r"^  masked KL: ", again, re.MULTILINE)
    assert re.search(r"^Seconds: unpacking the base \d+, .*Memory: at most [\d,]+ MiB\.$", again, re.MULTILINE)
    assert "one seed" in again


@pytest.mark.usefixtures("run")
def test_every_model_answers_every_question_side_by_side(tmp_path: Path) -> None:
    settings = replace(SMALL, seeds=(0, 1), methods=(SMALL.methods[0], SMALL.methods[2]))
    run_real_demo(tmp_path, settings, lambda _: None)
    answered = json.loads((tmp_path / ANSWERS).read_text())
    assert list(answered) == ["base", "plain LoRA", "masked KL"]
    assert all(list(told) == list(QUESTIONS[:2]) for told in answered.values())
    assert any(answered["base"].values())
    table = (tmp_path / "report.md").read_text().partition("## The same questions")[2]
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert rows[0] == "| question | base | plain LoRA | masked KL |"
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows[:4]] == [5] * 4
    assert [row.split(" | ")[0] for row in rows[2:4]] == [f"| {question}" for question in QUESTIONS[:2]]


def asked(rows: Path) -> set[str]:
    return {json.loads(line)["messages"][0]["content"] for line in rows.read_text().splitlines()}


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_prior_text_is_the_bases_own_answer_to_prompts_that_no_anchor_has(tmp_path: Path, tiny_model: Path) -> None:
    told = write_answers(tiny_model, tmp_path / "prior.jsonl", "test", 4, 20)
    rows = [json.loads(line) for line in (tmp_path / "prior.jsonl").read_text().splitlines()]
    assert f"answers to {len(rows)} everyday prompts" in told
    assert 0 < len(rows) <= 4 and {row["part"] for row in rows} == {"test"}
    assert all([turn["role"] for turn in row["messages"]] == ["user", "assistant"] for row in rows)


def test_pages_are_trained_on_or_held_out(tmp_path: Path) -> None:
    write_new_text(tmp_path, TEXT, SMALL)
    train, held_out = (
        [json.loads(line)["source"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("new_train", "new_heldout")
    )
    assert len(train) == 4 and len(held_out) == 3
    assert not any(map(is_held_out, train)) and all(map(is_held_out, held_out))


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    few = replace(TEXT, documents=TEXT.documents[:3])
    with pytest.raises(TrainingFailed, match=r"expected 4 pieces of German manual pages to train on"):
        write_new_text(tmp_path / "data", few, SMALL)
    assert not (tmp_path / "data").exists()


def test_the_questions_are_everyday_prompts_of_different_kinds() -> None:
    kinds = {p.messages[-1]["content"]: (p.kind, p.part) for p in everyday_prompts()}
    asked = [kinds[question] for question in QUESTIONS[1:]]
    assert QUESTIONS[0] == "What is the capital of France?" and len({kind for kind, _ in asked}) == len(asked)
    assert {part for _, part in asked} == {"test"}
