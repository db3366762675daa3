"""Anchors on the command line: flags and --config, what is written, what goes on, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.cli_harness import done, precompute, refused, text_data
from support.tiny_model import make_model, make_tokenizer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SHORT = ["--max-steps", 3, "--batch-size", 4, "--log-every", 1, "--rank", 2, "--lr", 1e-2]
ANCHORS_OWN = [
    ("--anchor-weight", 1),
    ("--anchor-batch", 4),
    ("--anchor-every", 2),
    ("--anchor-regularizer", "full-kl"),
]


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Path]:
    """Of the tiny base: of the new text and of two anchors. And of another model: the new text and an anchor."""
    folder = tmp_path_factory.mktemp("anchor-caches")
    rows = {"first": [{"text": f"one {i} ." * (1 + i % 4)} for i in range(9)]}
    rows["second"] = [{"prompt": f"say {i}", "completion": "yes " * (1 + i % 3)} for i in range(6)]
    for name, each in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in each), encoding="utf-8")
    teacher = folder / "teacher"
    make_model(seed=7, hidden_size=48, num_hidden_layers=1).save_pretrained(teacher)
    make_tokenizer().save_pretrained(teacher)
    data = text_data(folder)
    for name, source in {"new": data, "first": folder / "first.jsonl", "second": folder / "second.jsonl"}.items():
        precompute(tiny_model, source, folder / name)
    precompute(teacher, data, folder / "taught")
    precompute(teacher, folder / "first.jsonl", folder / "foreign")
    return {"data": data, **{n: folder / n for n in ("new", "first", "second", "taught", "foreign")}}


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "train_log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_plain_training_with_anchors_is_flags_and_keys(
    caches: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    """No cache of the new data; the same run from --config; and TensorBoard has the means too."""
    line = ["train", "--model", tiny_model, "--data", caches["data"], "--regularizer", "none", *SHORT]
    anchors = ["--anchor-cache", caches["first"], "--anchor-weight", 2, "--anchor-cache", caches["second"]]
    anchors += ["--anchor-weight", 0.5, "--anchor-batch", 3, "--anchor-every", 2, "--anchor-regularizer", "masked-kl"]
    said = done(*line, "--out", tmp_path / "line", *anchors)
    assert said.err.count("Before step 1 the KL to the base on ") == 2
    assert said.err.index(str(caches["first"])) < said.err.index(str(caches["second"]))
    assert "anchor_kl" in said.out
    for entry in log_of(tmp_path / "line"):
        terms = 2 * entry.get("anchor_kl_1", 0) + 0.5 * entry.get("anchor_kl_2", 0)
        assert entry["loss"] == pytest.approx(entry["ce"] + terms, rel=1e-5)
    assert ["anchor_kl" in entry for entry in log_of(tmp_path / "line")] == [True, False, True]
    run = json.loads((tmp_path / "line" / "run.json").read_text(encoding="utf-8"))
    assert [(a["path"], a["weight"]) for a in run["anchors"]] == [
        (str(caches["first"]), 2),
        (str(caches["second"]), 0.5),
    ]
    events = EventAccumulator(str(tmp_path / "line" / "tensorboard"))
    events.Reload()
    assert {"train/anchor_kl", "train/anchor_kl_1", "train/anchor_kl_2"} <= set(events.Tags()["scalars"])
    keys = {
        "anchor_cache": [str(caches["first"]), str(caches["second"])],
        "anchor_weight": [2, 0.5],
        "anchor-batch": 3,
        "anchor_every": 2,
        "anchor_regularizer": "masked-kl",
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
    done(*line, "--out", tmp_path / "file", "--config", tmp_path / "c.yaml")
    assert log_of(tmp_path / "file") == log_of(tmp_path / "line")


def test_one_weight_is_of_all_anchors_and_another_is_another_run(
    caches: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    line = ["train", "--model", tiny_model, "--cache", caches["new"], "--out", tmp_path / "o", *SHORT]
    anchors = ["--anchor-cache", caches["first"], "--anchor-cache", caches["second"]]
    done(*line, *anchors, "--anchor-weight", 3)
    run = json.loads((tmp_path / "o" / "run.json").read_text(encoding="utf-8"))
    assert [a["weight"] for a in run["anchors"]] == [3, 3]
    assert "differs in anchors" in refused(4, *line, *anchors, "--anchor-weight", 2, "--resume")
    done(*line, *anchors, "--anchor-weight", 3, "--resume")


@pytest.mark.parametrize("flag", ANCHORS_OWN)
def test_a_setting_without_an_anchor_cache_is_2(
    flag: tuple[str, object], caches: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    """Also with its default's value, and from --config."""
    line = ["train", "--model", tiny_model, "--cache", caches["new"], "--out", tmp_path / "o"]
    assert f"{flag[0]} is of an anchor cache" in refused(2, *line, *flag)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({flag[0][2:]: flag[1]}), encoding="utf-8")
    assert f"{flag[0]} is of an anchor cache" in refused(2, *line, "--config", tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("status", "flags", "message"),
    [
        (2, ["--anchor-weight", 1, "--anchor-weight", 2], "given 2 times, --anchor-cache 1 times"),
        (2, ["--anchor-weight", -1], "-1"),
        (1, ["--anchor-weight", 0], "with a weight of 0"),
        (1, ["--anchor-batch", 10], "expected as many in the cache, found 9"),
        (2, ["--anchor-every", 0], "0 is not in the range"),
        (2, ["--anchor-regularizer", "none"], "none"),
    ],
)
def test_what_an_anchor_cannot_be_is_said(
    status: int, flags: list[object], message: str, caches: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    line = ["train", "--model", tiny_model, "--cache", caches["new"], "--out", tmp_path / "o"]
    assert message in refused(status, *line, "--anchor-cache", caches["first"], *flags)


@pytest.mark.parametrize("value", [[], [["a"]], [None], {"a": 1}])
def test_a_list_in_a_file_is_of_plain_values(value: Any, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"anchor_cache": value, "regularizer": "none"}), encoding="utf-8")
    line = ["train", "--model", tiny_model, "--out", tmp_path / "o", "--config", tmp_path / "c.yaml"]
    assert "for 'anchor-cache'" in refused(2, *line)


def test_an_anchor_is_of_the_base_whoever_the_teacher_is(
    caches: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    """A student of another teacher is held to what it said itself; a cache of the teacher is no anchor."""
    line = ["train", "--student", tiny_model, "--cache", caches["taught"], "--teacher-is-not-base", *SHORT]
    said = done(*line, "--out", tmp_path / "o", "--anchor-cache", caches["first"])
    assert said.err.count("Before step 1") == 1 and str(caches["first"]) in said.err
    foreign = ["--out", tmp_path / "p", "--anchor-cache", caches["foreign"]]
    assert str(caches["foreign"]) in refused(4, *line, *foreign)
    own = ["train", "--model", tiny_model, "--cache", caches["new"], *SHORT]
    assert str(caches["foreign"]) in refused(4, *own, *foreign)
