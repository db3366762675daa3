"""Tasks of lm-evaluation-harness on base and adapter: a task of this test's own, offline."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.cli_harness import done, refused, text_data
from support.tiny_model import make_model, make_tokenizer

import logitcache.evaluation.lm_eval as tasks
from logitcache.adapters.attach import AdapterSettings, attach
from logitcache.errors import install_line
from logitcache.evaluation.compare import load_adapter
from logitcache.evaluation.lm_eval import scores_of
from logitcache.evaluation.table import evaluation_rows

QUESTIONS = [
    {"question": f"{a} + {b} =", "choices": [str(a + b), str(a - b), "no"], "answer": (a + b) % 3}
    for a, b in ((1, 2), (3, 4), (7, 1), (2, 2), (5, 3), (6, 6), (9, 4), (8, 2), (3, 3), (4, 1))
]


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    """A multiple-choice task of local rows."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), encoding="utf-8")
    (folder / "sums.yaml").write_text(
        f"""\
task: local_sums
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
""",
        encoding="utf-8",
    )
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Any attempt to look something up outside this machine fails at once."""
    import socket

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))

    def refuse(*_: Any) -> Any:
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def accuracy(model: Any) -> list[bool]:
    """What the task measures, from its definition: is the likeliest choice, written after a space, the answer."""
    tokenizer = make_tokenizer()
    right = []
    for row in QUESTIONS:
        context = tokenizer(row["question"])["input_ids"]
        sums = []
        for choice in row["choices"]:  # type: ignore[attr-defined]
            ids = tokenizer(" " + choice)["input_ids"]
            with torch.no_grad():
                logp = model(input_ids=torch.tensor([context + ids])).logits[0].double().log_softmax(-1)
            sums.append(math.fsum(float(logp[len(context) - 1 + i, token]) for i, token in enumerate(ids)))
        right.append(int(np.argmax(sums)) == row["answer"])
    return right


@pytest.mark.usefixtures("offline")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_local_task_for_base_and_adapter(tmp_path: Path, tiny_model: Path, task_folder: Path) -> None:
    pytest.importorskip("lm_eval")
    data = text_data(tmp_path)
    model = attach(make_model(), AdapterSettings(rank=4), str(tiny_model))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "out")
    line = ["evaluate", "--model", tiny_model, "--adapter", tmp_path / "out"]
    line += ["--tasks", "local_sums", "--tasks-path", task_folder]
    outcome = done(*line, "--json")
    (score,) = json.loads(outcome.out)["tasks"]
    before = accuracy(make_model())
    after = accuracy(load_adapter(make_model(), str(tmp_path / "out")))
    assert before != after  # else nothing would show that the adapter was measured
    assert (score["task"], score["metric"], score["num_documents"]) == ("local_sums", "acc", len(QUESTIONS))
    assert score["before"] == pytest.approx(np.mean(before)) and score["after"] == pytest.approx(np.mean(after))
    assert score["interval"][0] <= score["after"] - score["before"] <= score["interval"][1]
    assert outcome.err == ""
    table = done(*line, "--data", data, "--prior", data).out.splitlines()
    assert table[-3].startswith("local_sums: acc, 10 documents") and table[2].startswith("prior: KL")
    message = refused(2, *line[:-4], "--tasks", "local_sums,nowhere", "--tasks-path", task_folder)
    assert "'nowhere' is not among the tasks of lm-evaluation-harness nor of" in message


@pytest.mark.usefixtures("offline")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_task_whose_data_are_missing_is_1(tiny_model: Path, task_folder: Path) -> None:
    pytest.importorskip("lm_eval")
    (task_folder / "rows.jsonl").unlink()
    message = refused(1, "evaluate", "--model", tiny_model, "--tasks", "local_sums", "--tasks-path", task_folder)
    assert message.startswith("logitcache: running local_sums: ")


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    monkeypatch.setattr(tasks, "find_spec", lambda _: None)
    message = refused(2, "evaluate", "--model", tiny_model, "--tasks", "hellaswag")
    assert install_line("tasks") in message


# --- what the harness returns ----------------------------------------------------------------------------------------


def harness_results(per_document: list[float], reported: float, **more: Any) -> dict[str, Any]:
    """The parts of lm_eval's results that are read."""
    values = {"alias": "t", "sample_len": len(per_document), "acc,none": reported, "acc_stderr,none": 0.1, **more}
    rows = [{"doc_id": i, "filter": "none", "acc": value} for i, value in enumerate(per_document)]
    return {"results": {"t": values}, "samples": {"t": list(reversed(rows))}}


def test_the_interval_of_a_mean_is_of_paired_documents() -> None:
    """Both models are right on half of the documents, mostly the same: the change is far surer than either score."""
    old = [float(i % 2) for i in range(200)]
    new = [*old[:-2], 1.0, 1.0]
    (score,) = scores_of(harness_results(old, 0.5), harness_results(new, np.mean(new)))
    assert score.after is not None and score.after - score.before == pytest.approx(1 / 200)
    assert score.interval is not None
    assert 0 <= score.interval[0] <= 1 / 200 <= score.interval[1] < 0.03


def test_a_score_that_is_no_mean_over_documents_has_no_interval() -> None:
    old, new = harness_results([1.0, 2.0, 3.0], 7.0), harness_results([1.0, 2.0, 4.0], 8.0)
    (score,) = scores_of(old, new)
    assert (score.before, score.after, score.interval) == (7.0, 8.0, None)
    for rows in (old["samples"]["t"], new["samples"]["t"]):
        for row in rows:
            row["acc"] = (1.0, 2.0)  # a pair for an aggregation of its own
    assert scores_of(old, new)[0].interval is None
    old["samples"] = {}
    assert scores_of(old, new)[0].interval is None


def test_filters_and_what_is_no_number() -> None:
    more = {"acc,strict": 0.25, "acc_stderr,strict": 0.1, "name": "t", "bleu,none": "N/A"}
    scores = scores_of(harness_results([0.0, 1.0], 0.5, **more))
    assert [(s.metric, s.before, s.after, s.interval) for s in scores] == [
        ("acc", 0.5, None, None),
        ("acc (strict)", 0.25, None, None),
    ]
    rows = evaluation_rows({}, None, scores)
    assert rows[1] == ["t: acc, 2 documents", "0.5000", "-", "-", ""]
