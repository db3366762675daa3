"""Chat data sets of every shape, from end to end, and a template of the user's own."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.chat_oracle import CHATML, MARKED
from support.cli_harness import copy_of, done, facts, precompute, refused, train_line
from support.trl_chats import CALLING, SAID, SUNNY, USER, template_texts

from logitcache.storage import LogitCache

CALLS = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + MARKED.replace(
    "{{ m['content'] + '<|im", "{{ (m.tool_calls or '') and m.tool_calls | tojson }}{{ m['content'] + '<|im"
)
TOOLS = [{"type": "function", "function": {"name": "weather"}}]
RESULT = {"role": "tool", "name": "weather", "content": "sunny"}
SHAPES: dict[str, dict[str, Any]] = {
    "messages": {"messages": [USER, SAID]},
    "prompt + completion": {"prompt": [USER], "completion": [SAID]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]},
    "tools": {"messages": [{"role": "user", "content": "Rome?"}, CALLING, RESULT, SUNNY], "tools": json.dumps(TOOLS)},
}


def model_with(template: str, tiny_model: Path, folder: Path) -> Path:
    return copy_of(tiny_model, folder, lambda f: (f / "chat_template.jinja").write_text(template, encoding="utf-8"))


def file_of(rows: list[dict[str, Any]], folder: Path) -> Path:
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.training
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_goes_all_the_way(shape: str, tmp_path: Path, tiny_model: Path) -> None:
    model, data = model_with(CALLS, tiny_model, tmp_path / "model"), file_of([SHAPES[shape]], tmp_path)
    precompute(model, data, tmp_path / "c", "--max-length", 512)
    assert facts(tmp_path / "c")["contents"]["num_samples"] == 1
    done(*train_line(model, tmp_path / "c", tmp_path / "adapter"))
    done(*train_line(model, tmp_path / "c", tmp_path / "again", "--data", data))
    line = ["evaluate", "--model", model, "--adapter", tmp_path / "adapter", "--data", data, "--prior", data]
    found = json.loads(done(*line, "--max-length", 512, "--json").out)
    assert found["new"]["before"]["num_positions"] == facts(tmp_path / "c")["contents"]["num_positions"]


@pytest.mark.training
def test_a_template_of_the_users_own_is_asked_for_by_every_verb(tmp_path: Path, tiny_model: Path) -> None:
    """It rendered the cache's chats, so a model with another one is refused, with the flag as the way out."""
    own, data = tmp_path / "own.jinja", file_of([SHAPES["messages"]], tmp_path)
    own.write_text("{{ who }}" + MARKED, encoding="utf-8")
    flags = ["--chat-template", own, "--chat-template-kwargs", '{"who": "Bob "}']
    precompute(tiny_model, data, tmp_path / "c", *flags)
    (sample,) = LogitCache.open(tmp_path / "c").stored_samples()
    assert len(sample.positions) == len("It is 4.<|im_end|>")
    for more in ([], ["--data", data], ["--chat-template", own], ["--data", data, "--chat-template", own]):
        message = refused(4, *train_line(tiny_model, tmp_path / "c", tmp_path / "a", *more))
        assert "chat_template: " in message and "--chat-template" in message and "teacher-is-not-base" not in message
    done(*train_line(tiny_model, tmp_path / "c", tmp_path / "a", *flags))
    done(*train_line(tiny_model, tmp_path / "c", tmp_path / "b", "--data", data, *flags))
    last = ["--data", data, *flags, "--supervise", "all"]
    assert "not captured" in refused(4, *train_line(tiny_model, tmp_path / "c", tmp_path / "d", *last))


@pytest.mark.training
def test_trls_template_is_told_once_by_each_verb(tmp_path: Path, tiny_model: Path) -> None:
    model = model_with(template_texts()["qwen3"], tiny_model, tmp_path / "model")
    data = file_of([SHAPES["messages"], {"messages": [USER, SAID, USER, SAID]}], tmp_path)
    said = "TRL's training template"
    assert precompute(model, data, tmp_path / "c").err.count(said) == 1
    outcome = done(*train_line(model, tmp_path / "c", tmp_path / "a", "--data", data))
    assert outcome.err.count(said) == 1
    assert said not in done(*train_line(model, tmp_path / "c", tmp_path / "b")).err  # no row is rendered


def test_flags_of_rows_are_refused_without_rows(tmp_path: Path, tiny_model: Path) -> None:
    model, data = model_with(CHATML, tiny_model, tmp_path / "model"), file_of([SHAPES["messages"]], tmp_path)
    precompute(model, data, tmp_path / "c")
    message = refused(2, *train_line(model, tmp_path / "c", tmp_path / "a", "--supervise", "last"))
    assert "--supervise is for rows that are read" in message
