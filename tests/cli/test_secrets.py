"""A password and a signed query, planted wherever a verb takes a URL: neither is printed or written by any verb."""

import json
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from support.cli_harness import CliResult, logitcache
from support.sweep_folders import write_json, write_sweep
from support.tiny_model import text_rows

PASSWORD, SIGNATURE = "hunter2hunter2", "5f0c1gn4tur3"

SWEEP = """
model: {model}
cache: "{url}/cache"
data: "{url}/train.jsonl"
new: "{url}/train.jsonl"
prior: "{url}/prior.jsonl"
grid: {{lr: [1.0e-3], rank: [2], max_steps: [1]}}
methods: {{plain: {{regularizer: none}}, masked: {{}}, broken: {{target_modules: no_such_layer}}}}
"""


@pytest.fixture
def url() -> Iterator[str]:
    """A prefix of memory:// with a password and a signature in it, and data below it."""
    prefix = f"user{uuid.uuid4().hex[:6]}:{PASSWORD}@host"
    made = f"memory://{prefix}/x?X-Amz-Signature={SIGNATURE}"
    rows = [json.dumps(row) + "\n" for row in text_rows(12)]
    for name, lines in {"train.jsonl": rows[:8], "prior.jsonl": rows[8:], "broken.jsonl": [*rows[:2], "{\n"]}.items():
        fsspec.filesystem("memory").pipe_file(f"{made}/{name}", "".join(lines).encode())
    yield made
    fsspec.filesystem("memory").rm(f"/{prefix}", recursive=True)


def lines(url: str, model: Path, folder: Path) -> list[tuple[int | None, list[object]]]:
    """Every verb with its exit status, in an order in which they find what they need; None: any but a success."""
    cache, data, prior = f"{url}/cache", f"{url}/train.jsonl", f"{url}/prior.jsonl"
    capture = ["precompute", "--model", model, "--top-k", 8, "--store", "arrow"]
    training = ["train", "--model", model, "--rank", 2, "--max-steps", 1]
    evaluation = ["evaluate", "--model", model, "--adapter", folder / "adapter"]
    return [
        (0, [*capture, "--data", data, "--cache", cache]),
        (0, [*capture, "--data", data, "--cache", cache, "--plan"]),
        (0, [*capture, "--data", data, "--cache", folder / "copied", "--samples-from", cache, "--log-json"]),
        (0, [*capture, "--data", prior, "--cache", f"{url}/prior"]),
        (None, [*capture, "--data", f"{url}/broken.jsonl", "--cache", folder / "none"]),
        (None, [*capture, "--data", f"{url}/missing.jsonl", "--cache", folder / "none"]),
        (None, [*capture, "--data", data, "--cache", f"nosuch{url}"]),
        (None, [*capture[:1], "--model", url, "--data", data, "--cache", folder / "none"]),
        (None, [*capture, "--top-k", 9, "--data", data, "--cache", cache]),
        (0, ["status", cache]),
        (0, ["status", cache, "--json"]),
        (0, ["inspect", cache, "--plot", folder / "cache.svg"]),
        (0, ["inspect", cache, "--json"]),
        (0, ["verify", cache]),
        (0, ["verify", cache, "--json"]),
        (0, ["repair", cache]),
        (0, ["prune", cache, "--model", model, "--data", data, "--dry-run"]),
        (0, ["convert", cache, f"{url}/converted", "--precision", "compact"]),
        (0, ["merge", f"{url}/all", cache, f"{url}/prior"]),
        (None, ["merge", f"{url}/mixed", cache, f"{url}/converted"]),
        (0, ["export", cache, "--to", "parquet", "--out", folder / "cache.parquet"]),
        (0, ["nullspace", "--model", model, "--data", data, "--out", folder / "space", "--rank", 2]),
        (0, [*training, "--cache", cache, "--data", data, "--out", folder / "adapter"]),
        (None, [*training, "--cache", cache, "--data", prior, "--out", folder / "other"]),
        (0, [*training, "--cache", cache, "--out", folder / "adapter", "--data", data, "--resume"]),
        (0, [*evaluation, "--data", data, "--prior", prior, "--json"]),
        (0, [*evaluation, "--new-cache", cache, "--prior-cache", f"{url}/prior"]),
        (None, [*evaluation, "--data", f"{url}/missing.jsonl", "--prior", prior]),
        (0, ["sweep", "--config", folder / "sweep.yaml", "--out", folder / "sweep"]),
        (0, ["report", folder / "sweep"]),
        (None, ["calibrate", "--model", url, "--data", data, "--out", folder / "calibration.json"]),
        (None, ["push", cache, "owner/name"]),
        (None, ["push", folder / "copied", url]),
        (None, ["pull", url, folder / "pulled"]),
        (None, ["pull", "owner/name", cache]),
        (None, ["report", url]),
        (None, ["demo", "--out", url, "--config", url]),
        (None, ["verify", f"{url}/nothing"]),
    ]


def test_no_verb_prints_or_writes_a_secret(url: str, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(SWEEP.format(model=tiny_model, url=url), encoding="utf-8")
    asked = lines(url, tiny_model, tmp_path)
    (tmp_path / "sweep.yaml").rename(tmp_path.parent / f"{tmp_path.name}.yaml")  # it is the user's own file
    config = tmp_path.parent / f"{tmp_path.name}.yaml"
    said: list[tuple[list[object], CliResult]] = []
    for status, line in asked:
        words = [config if word == tmp_path / "sweep.yaml" else word for word in line]
        found = logitcache(*words)
        assert found.status == status or (status is None and found.status != 0), (line, found.err)
        said.append((line, found))
    config.unlink()
    assert {str(line[0]) for line, _ in said} >= {
        *("precompute", "status", "inspect", "verify", "repair", "prune", "convert", "merge", "export", "nullspace"),
        *("train", "evaluate", "sweep", "report", "calibrate", "push", "pull", "demo"),
    }
    for secret in (PASSWORD, SIGNATURE):
        assert not [line for line, found in said if secret in found.out + found.err]
        assert not [path for path in tmp_path.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
        memory = fsspec.filesystem("memory")
        assert not [path for path in memory.find("/") if secret.encode() in memory.cat_file(path)]


def test_a_report_shows_no_folder_of_this_machine(tmp_path: Path) -> None:
    """What a report is of, and why a run failed, are said without where it was."""
    folder = tmp_path / "sweep"
    names = write_sweep(folder, lrs=(1e-3,), failed=("m0-lr0.001-seed1",))
    head = json.loads((folder / "sweep.json").read_bytes())
    del head["checksum"]
    places = {"model": "/home/someone/base", "new": f"file://{tmp_path}/new.jsonl", "prior": str(tmp_path / "prior")}
    write_json(folder / "sweep.json", {**head, **places})
    plan = next(run for run in head["runs"] if run["name"] == names[1])
    why = f"reading {tmp_path}/new.jsonl:3: no text. See '/home/someone/x y/z'."
    write_json(folder / "runs" / names[1] / "failed.json", {**plan, "error": why, "step": None})
    assert logitcache("report", folder, "--out", tmp_path / "report").status == 0
    for path in (tmp_path / "report").iterdir():
        if path.suffix in (".md", ".html", ".csv", ".svg"):
            text = path.read_text(encoding="utf-8")
            assert str(tmp_path) not in text and "/home" not in text
    assert "new.jsonl" in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
