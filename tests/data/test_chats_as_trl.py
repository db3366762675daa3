"""The same token ids and labels as TRL's SFTTrainer with `assistant_only_loss`, over TRL's templates."""

import csv
import json
import logging
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from packaging.version import Version
from support.breadth import some_of
from support.trl_chats import (
    CONVERSATIONS,
    compared,
    named_as_since_5_21,
    stand_in_tokenizer,
    template_texts,
    trl_tokens,
)

from logitcache.data.files import IGNORED
from logitcache.data.samples import make_samples
from logitcache.data.tokenize import tokenize_row
from logitcache.errors import InvalidData

CHATS = Path(__file__).parent / "chats"
TABLE = Path(__file__).parents[2] / "docs" / "benchmarks" / "chat_templates.csv"
TEMPLATES = template_texts()


@pytest.fixture(autouse=True)
def silence() -> Iterator[None]:
    """TRL and transformers say much of templates that they know."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return stand_in_tokenizer()


def ours(tokenizer: Any, row: dict[str, Any]) -> tuple[list[int], list[int]]:
    token_ids, supervised = tokenize_row(row, tokenizer, "row")
    return token_ids.tolist(), [int(t) if s else IGNORED for t, s in zip(token_ids, supervised, strict=True)]


def row_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((CHATS / f"{name}.jsonl").read_text(encoding="utf-8"))
    return found


def pairs() -> list[dict[str, str]]:
    return list(csv.DictReader(TABLE.read_text(encoding="utf-8").splitlines()))


@pytest.mark.parametrize("pair", some_of(pairs(), 60), ids=lambda pair: f"{pair['template']}, {pair['conversation']}")
def test_the_table_is_what_comes_out(pair: dict[str, str], tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATES[pair["template"]]
    row = CONVERSATIONS[pair["conversation"]]
    if Version(version("transformers")) < Version("5.21"):
        written, row = row, named_as_since_5_21(row)
        assert pair["here"] == "refused" or ours(tokenizer, written) == ours(tokenizer, row)
    found = compared(tokenizer, row)
    assert found == {key: pair[key] for key in ("here", "trl", "why")}


def test_the_table_is_of_all_and_nine_of_ten_are_the_same() -> None:
    found = pairs()
    assert {(pair["template"], pair["conversation"]) for pair in found} == {
        (template, conversation) for template in TEMPLATES for conversation in CONVERSATIONS
    }
    taken = [pair["here"] for pair in found if pair["trl"] == "taken"]
    assert taken.count("same") * 380 >= 340 * len(taken)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_space_before_what_is_said_is_never_refused(name: str, tokenizer: Any) -> None:
    """Whether the template trims it or not; parts are the same ids as the plain string, and null learns no word."""
    tokenizer.chat_template = TEMPLATES[name]
    user, more = {"role": "user", "content": " What is 2 + 2?"}, {"role": "user", "content": "And 3 + 3? "}
    said, last = {"role": "assistant", "content": " It is 4."}, {"role": "assistant", "content": " It is 6."}
    plain = [user, said, more, last]
    in_parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in plain]
    nothing = [user, {"role": "assistant", "content": None}, more, last]
    rows = [(str(n), {"messages": messages}) for n, messages in enumerate((plain, in_parts, nothing))]
    of_strings, of_parts, of_null = make_samples(rows, tokenizer, 4096, len(tokenizer)).samples
    assert of_strings.token_ids.tolist() == of_parts.token_ids.tolist()
    assert of_strings.supervised.tolist() == of_parts.supervised.tolist()
    for text in ("It is 4.", "It is 6."):
        assert text in tokenizer.decode(of_strings.token_ids[of_strings.supervised])
    assert "None" not in tokenizer.decode(of_null.token_ids).removeprefix(tokenizer.decode(of_strings.token_ids)[:200])
    assert "None" not in tokenizer.decode(of_null.token_ids[of_null.supervised])


@pytest.mark.parametrize("name", ["qwen3", "deepseekv3", "glm4moe", "gptoss"])
@pytest.mark.parametrize("row", ["thinking-multiturn", "chat-prompt-completion", "template-kwargs"])
def test_families_that_think_are_read_as_trl_reads_them(name: str, row: str, tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATES[name]
    assert ours(tokenizer, row_of(row)) == trl_tokens(tokenizer, row_of(row))


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_5_think", "lfm2_2_5"])
def test_a_call_with_its_arguments_as_a_string_is_rendered_as_trl_renders_it(name: str, tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATES[name]
    row = row_of("tools-toolcall")
    theirs: Any
    try:
        theirs = trl_tokens(tokenizer, row)
    except (TemplateError, TypeError):
        theirs = None
    if theirs is None:  # a template that wants an object refuses the string in both
        with pytest.raises(InvalidData, match="the chat template refuses"):
            ours(tokenizer, row)
    else:
        assert ours(tokenizer, row) == theirs


def test_sharegpt_is_read_as_trl_converts_it(tokenizer: Any) -> None:
    """With the roles that templates know; `human` and `gpt`, which TRL leaves as they are, are these."""
    tokenizer.chat_template = TEMPLATES["qwen3"]
    row = row_of("sharegpt")
    names = {"human": "user", "gpt": "assistant"}
    known = {"conversations": [{**turn, "from": names[turn["from"]]} for turn in row["conversations"]]}
    theirs = trl_tokens(tokenizer, json.loads(json.dumps(known)))
    assert ours(tokenizer, known) == ours(tokenizer, row) == theirs
