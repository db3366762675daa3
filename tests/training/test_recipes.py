"""The pages that start from a user's own script: the script runs as it stands, and with the page's diff applied."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from support.tiny_model import make_model, make_tokenizer

from logitcache.storage import LogitCache

PAGES = Path(__file__).resolve().parents[2] / "docs" / "how-to"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>\
{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": f"hello {i}"}, {"role": "assistant", "content": f"good day {i * 37}"}]}
    for i in range(12)
]
TEXTS: list[dict[str, Any]] = [{"text": f"the {i}th of {i * 37} texts"} for i in range(12)]

# TRL's SFTConfig sets gradient_checkpointing, whose name transformers 5.23 has changed
pytestmark = [
    pytest.mark.training,
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
]


def block(page: str, language: str) -> str:
    """The first code block of a page in a language."""
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    found = re.search(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found, f"{page}.md has no block of {language}"
    return found[1]


def patched(script: str, diff: str) -> str:
    """A script with every hunk of a diff applied; what a hunk expects stands in the script once."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines()
        before = "".join(f"{line[1:]}\n" for line in lines if line[:1] in ("-", " ", ""))
        after = "".join(f"{line[1:]}\n" for line in lines if line[:1] in ("+", " ", ""))
        assert script.count(before) == 1, before
        script = script.replace(before, after)
    return script


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a user stands: a base whose template marks what the assistant says."""
    make_model().save_pretrained(tmp_path / "base")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return tmp_path


def run(folder: Path, script: str) -> dict[str, Any]:
    """What a script leaves in its names."""
    (folder / "train.py").write_text(script, encoding="utf-8")
    return runpy.run_path(str(folder / "train.py"))


@pytest.mark.parametrize(("page", "rows"), [("trl", CHATS), ("own-loop", TEXTS)])
def test_a_users_script_runs_before_and_after_the_pages_diff(
    folder: Path, page: str, rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    before = block(page, "python").replace("SFTConfig(\n", "SFTConfig(\n        use_cpu=True,\n")  # TRL asks for a GPU
    run(folder, before)
    assert (folder / "adapter" / "adapter_model.safetensors").exists() and not (folder / "cache").exists()
    after = patched(before, block(page, "diff").replace("SFTConfig(\n", "SFTConfig(\n         use_cpu=True,\n"))
    capsys.readouterr()
    found = run(folder, after)
    assert len(LogitCache.open(folder / "cache")) == len(rows)
    if page == "trl":
        logs = [entry for entry in found["trainer"].state.log_history if "loss" in entry]
        assert len(logs) == 6 and all({"ce", "kl", "kl_weight"} <= entry.keys() for entry in logs)
        assert found["trainer"].step_zero.kl_nats <= 5e-5 and logs[-1]["kl"] > logs[0]["kl"]
    else:
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2 and re.fullmatch(r"step 1: loss [\d.]+, CE [\d.]+, KL -?0\.0000", lines[0]), lines
        assert float(lines[1].rpartition(" ")[2]) > 0
    run(folder, after)  # again: the cache is there, and nothing is captured
