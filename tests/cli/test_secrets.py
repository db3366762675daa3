"""A password and a signed query, planted wherever a verb takes a URL: neither is printed or written by any verb."""

import json
from pathlib import Path

from support.cli_harness import logitcache
from support.planted_secrets import VERBS, hits, planted, run_all
from support.sweep_folders import write_json, write_sweep


def test_no_verb_prints_or_writes_a_secret(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    with planted() as url:
        said = run_all(url, tiny_model, folder)
        assert {str(line[0]) for line, _ in said} >= VERBS
        assert hits(said, folder) == []


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
