"""Which chat template renders the chats: the tokenizer's, one of several, a file's, TRL's; and its digest."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.chat_oracle import CHATML, MARKED
from support.tiny_model import CHAT_TEMPLATE, make_tokenizer

from logitcache.data import chat_rendering, chat_templates
from logitcache.data.chat_templates import template_digest, template_digests
from logitcache.data.samples import SampleSet, make_samples
from logitcache.data.settings import DEFAULT, DataSettings
from logitcache.errors import InputNotFound, InvalidData, install_line
from logitcache.storage.identity import digest_json

CHATS = Path(__file__).parent / "chats"
ONE = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is 4."}]
TOOLS = [{"type": "function", "function": {"name": "weather"}}]


def tokenizer_with(template: Any) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def read(template: Any, row: dict[str, Any], how: DataSettings = DEFAULT) -> SampleSet:
    return make_samples([("row", row)], tokenizer_with(template), 4096, 260, how)


def learnt(template: Any, row: dict[str, Any], how: DataSettings = DEFAULT) -> str:
    (sample,) = read(template, row, how).samples
    return str(make_tokenizer().decode(sample.token_ids[sample.supervised]))


# --- several by their names ------------------------------------------------------------------------------------------


def test_of_several_the_default_is_used_and_for_tools_that_for_tools() -> None:
    named = json.loads((CHATS / "named-templates.json").read_text(encoding="utf-8"))
    assert learnt(named, {"messages": ONE}) == "It is 4.<|im_end|>\n"  # by prefixes
    assert learnt(named, {"messages": ONE, "tools": TOOLS}) == "It is 4.<|im_end|>"  # by the markers of tool_use
    assert read(named, {"messages": ONE}).samples[0].chat_template == digest_json(named)


def test_several_without_a_default_are_refused_by_their_names() -> None:
    with pytest.raises(InvalidData, match=r"rag, tool_use.*--chat-template FILE") as error:
        read({"tool_use": MARKED, "rag": CHATML}, {"messages": ONE})
    assert "remove the row" not in str(error.value).lower()
    assert learnt({"tool_use": MARKED}, {"messages": ONE, "tools": TOOLS}) == "It is 4.<|im_end|>"


def test_no_template_is_refused_with_the_flag() -> None:
    with pytest.raises(InvalidData, match=r"no chat template.*--chat-template FILE"):
        read(None, {"messages": ONE})
    assert template_digest(tokenizer_with(None)) == "" == template_digest(None)


# --- a file, and variables -------------------------------------------------------------------------------------------


def test_a_file_replaces_the_tokenizers(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(MARKED, encoding="utf-8")
    how = DataSettings(chat_template=str(file))
    for template in (CHATML, None, {"default": CHATML}):
        (sample,) = read(template, {"messages": ONE}, how).samples
        assert learnt(template, {"messages": ONE}, how) == "It is 4.<|im_end|>"
        assert sample.chat_template == digest_json(MARKED) == template_digest(tokenizer_with(template), how)


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        ({"chat_template": "no such file.jinja"}, InputNotFound, "no such file.jinja"),
        ({"chat_template_kwargs": "enable_thinking=false"}, InvalidData, "expected a JSON object"),
        ({"chat_template_kwargs": "[1]"}, InvalidData, "expected a JSON object"),
        ({"chat_template_kwargs": '{"tools": []}'}, InvalidData, "'tools' is not a variable"),
        ({"chat_template_kwargs": '{"enable_thinking": true}'}, InvalidData, "does not read 'enable_thinking'"),
    ],
    ids=str,
)
def test_settings_that_say_nothing_are_refused(how: dict[str, str], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        read(CHATML, {"messages": ONE}, DataSettings(**how))


def test_variables_of_the_line_are_of_the_digest() -> None:
    """The same chats under other variables are other samples, and a cache must not hold both."""
    reads = "{% if loud %}!{% endif %}" + CHATML
    tokenizer = tokenizer_with(reads)
    loud, quiet = (DataSettings(chat_template_kwargs=json.dumps({"loud": value})) for value in (True, False))
    assert len({template_digest(tokenizer, how) for how in (DEFAULT, loud, quiet)}) == 3
    assert template_digest(tokenizer) == digest_json(reads)


# --- TRL's training templates ----------------------------------------------------------------------------------------

KNOWN = CHATML.replace("{{ '<|im", "{{ '' if loop.last else '' }}{{ '<|im", 1)
"""Stands for a family's template, in which TRL's training template learns to the end mark only."""


@pytest.fixture
def trl_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def training(text: str, _: Any) -> str | None:
        return MARKED if text == KNOWN else None

    monkeypatch.setattr(chat_templates, "_training_template", training)


@pytest.mark.usefixtures("trl_knows")
def test_trls_template_stands_in_where_it_reads_turns_otherwise() -> None:
    found = read(KNOWN, {"messages": ONE})
    assert learnt(KNOWN, {"messages": ONE}) == "It is 4.<|im_end|>"
    assert found.samples[0].chat_template == digest_json(MARKED) == template_digest(tokenizer_with(KNOWN))
    (said,) = found.notes
    assert "TRL's training template" in said
    assert read(CHATML, {"messages": ONE}).notes == ()


@pytest.mark.usefixtures("trl_knows")
def test_where_all_is_learnt_the_tokenizers_own_is_used() -> None:
    """As TRL does without assistant_only_loss. A cache of either is of this tokenizer."""
    every = DataSettings(supervise="all")
    (sample,) = read(KNOWN, {"messages": ONE}, every).samples
    assert sample.supervised.all() and sample.chat_template == digest_json(KNOWN)
    assert template_digests(tokenizer_with(KNOWN)) == {digest_json(KNOWN), digest_json(MARKED)}


def test_trls_template_that_reads_alike_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that samples and digest of most families do not depend on whether TRL is installed."""
    alike = MARKED.replace("'<|im_end|>' }}{% endgeneration %}", "'<|im_end|>\n' }}{% endgeneration %}").replace(
        "{{ '\n' }}{% endfor", "{{ '' if m['role'] == 'assistant' else '\n' }}{% endfor"
    )
    monkeypatch.setattr(chat_templates, "_training_template", lambda *_: alike)
    found = read(CHATML, {"messages": ONE})
    assert found.samples[0].chat_template == digest_json(CHATML) and found.notes == ()


def test_without_trl_the_way_out_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = "('<think></think>' if loop.last and m['role'] == 'assistant' else '') + m['content'] +"
    template = CHATML.replace("m['content'] +", shown)
    for module in (chat_templates, chat_rendering):
        monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(InvalidData, match=re.escape(install_line("trl"))):
        read(template, {"messages": [*ONE, *ONE]})
    assert learnt(template, {"messages": ONE}) == "<think></think>It is 4.<|im_end|>\n"


def test_the_digest_of_a_plain_template_is_that_of_its_text() -> None:
    """Those of caches that were made before stay what they are."""
    assert template_digest(make_tokenizer()) == digest_json(CHAT_TEMPLATE)
    assert template_digest(tokenizer_with(MARKED)) == digest_json(MARKED)
