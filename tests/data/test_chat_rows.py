"""Rows with turns in every shape that data sets have: what they say is read, and what would be dropped is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.chat_oracle import CHATML, MARKED
from support.tiny_model import make_tokenizer

from logitcache.data.samples import make_samples
from logitcache.data.settings import DEFAULT, DataSettings
from logitcache.errors import InvalidData

Row = dict[str, Any]
CHATS = Path(__file__).parent / "chats"
V = 260


def rows_of(name: str) -> list[Row]:
    return [json.loads(line) for line in (CHATS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def texts(row: Row, template: str = CHATML, how: DataSettings = DEFAULT) -> tuple[str, str]:
    """All of a row's text, and what of it is learnt."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    (sample,) = make_samples([("row", row)], tokenizer, 4096, V, how).samples
    return tokenizer.decode(sample.token_ids), tokenizer.decode(sample.token_ids[sample.supervised])


def refusal(row: Row, template: str = CHATML) -> str:
    with pytest.raises(InvalidData) as error:
        texts(row, template)
    return str(error.value)


PLAIN = {"messages": [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is 4."}]}


def test_null_content_is_an_empty_turn() -> None:
    (row,) = rows_of("null-content")
    text, learnt = texts(row)
    assert "None" not in text
    assert learnt == "<|im_end|>\nIt is 4.<|im_end|>\n"


def test_text_parts_are_the_plain_string() -> None:
    (row,) = rows_of("content-parts")
    assert texts(row) == texts(PLAIN)
    several = {"messages": [PLAIN["messages"][0], {"role": "assistant", "content": parts("It ", "is 4", ".")}]}
    assert texts(several) == texts(PLAIN)


def parts(*said: str) -> list[Row]:
    return [{"type": "text", "text": text, "image": None} for text in said]  # null: as Parquet fills columns


def test_other_parts_are_refused_by_row_and_type() -> None:
    (row,) = rows_of("picture")
    assert "reading row: turn 0 of 'messages'" in refusal(row) and "'image'" in refusal(row)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"text": "It is 4."}, "found dict"),
        (4, "found int"),
        (["It is 4."], "of type 'str'"),
        ([{"type": "text"}], "of type 'text'"),
        ([{"type": "text", "text": "It is 4.", "cache_control": {}}], "'cache_control'"),
    ],
    ids=repr,
)
def test_content_that_a_template_would_print_is_refused(content: Any, said: str) -> None:
    assert said in refusal({"messages": [PLAIN["messages"][0], {"role": "assistant", "content": content}]})


@pytest.mark.parametrize("name", ["tools-empty", "tools-emptylist", "tools-null"])
def test_empty_tools_are_none(name: str) -> None:
    (row,) = rows_of(name)
    tell = "{% if tools is not none %}TOOLS{% endif %}"
    assert texts(row, tell + CHATML) == texts(PLAIN, tell + CHATML)
    assert "TOOLS" not in texts(row, tell + CHATML)[0]


@pytest.mark.parametrize("as_json", [False, True])
def test_tools_reach_the_template_as_objects(as_json: bool) -> None:
    tools = [{"type": "function", "function": {"name": "weather"}}]
    row = {**PLAIN, "tools": json.dumps(tools) if as_json else tools}
    text, learnt = texts(row, "{% for t in tools or [] %}{{ t.function.name }};{% endfor %}" + CHATML)
    assert text.startswith("weather;<|im_start|>user") and learnt == "It is 4.<|im_end|>\n"


@pytest.mark.parametrize("tools", ["[{", "4", {"name": "f"}, [4]])
def test_tools_that_are_none_are_refused(tools: Any) -> None:
    assert "'tools'" in refusal({**PLAIN, "tools": tools})


@pytest.mark.parametrize(
    ("field", "value", "instead"),
    [
        ("function_call", {"name": "f", "arguments": "{}"}, "Write it as 'tool_calls'"),
        ("refusal", "I cannot.", "Write it as the turn's content"),
        ("audio", {"id": "a"}, "Only text is learnt"),
    ],
)
def test_what_a_turn_says_besides_its_content_is_not_learnt_as_silence(field: str, value: Any, instead: str) -> None:
    user, said = PLAIN["messages"]
    spoken = {"messages": [user, {"role": "assistant", "content": None, field: value}]}
    assert f"turn 1 of 'messages': it has '{field}'" in refusal(spoken) and instead in refusal(spoken)
    assert texts({"messages": [user, {**said, field: None}]}) == texts(PLAIN)


@pytest.mark.parametrize("says", [{"weight": 0}, {"weight": 0.5}, {"train": False}, {"training": False}])
def test_a_turn_that_says_it_is_not_learnt_is_not(says: Row) -> None:
    """OpenAI's `weight`, and what other trainers call it: refused where the turn would be learnt, and there alone."""
    user, said = PLAIN["messages"]
    row = {"messages": [user, {**said, **says}, user, said]}
    assert f"turn 1 of its messages: it says '{next(iter(says))}'" in refusal(row)
    assert texts(row, how=DataSettings(supervise="last"))[1] == "It is 4.<|im_end|>\n"
    as_prompt = {"prompt": row["messages"][:3], "completion": row["messages"][3:]}
    assert texts(as_prompt)[1] == "It is 4.<|im_end|>\n"
    counted = {name: 1 if name == "weight" else True for name in says}
    assert texts({"messages": [user, {**said, **counted}]}) == texts(PLAIN)


def test_a_system_prompt_in_a_column_of_its_own_is_not_left_out_without_a_word() -> None:
    """As ShareGPT and ToolACE have it, and as TRL reads it: not at all."""

    def notes(row: Row) -> tuple[str, ...]:
        tokenizer = make_tokenizer()
        tokenizer.chat_template = CHATML
        return make_samples([("row", row)], tokenizer, 4096, V).notes

    (note,) = notes({**PLAIN, "system": "Be brief."})
    assert note.startswith("Rows have 'system' beside their turns, which is not read")
    (note,) = notes({**PLAIN, "functions": [{"name": "f"}]})
    assert "Put it into tools" in note
    in_front = [{"role": "system", "content": "Be brief."}, *PLAIN["messages"]]
    assert notes({"messages": in_front, "system": "Be brief."}) == notes({**PLAIN, "system": ""}) == ()


def test_sharegpt_is_the_same_chat() -> None:
    """Also with the names and the fields of other data sets."""
    (row,) = rows_of("sharegpt")
    assert texts(row) == texts(PLAIN)
    assert texts({"conversations": PLAIN["messages"]}) == texts(PLAIN)
    named = [{"from": m["role"], "value": m["content"]} for m in PLAIN["messages"]]
    assert texts({"conversations": named}) == texts(PLAIN)
    assert texts({"messages": named}) == texts(PLAIN)


def test_of_prompt_and_completion_only_the_completion_is_learnt() -> None:
    (row,) = rows_of("chat-prompt-completion")
    assert texts(row) == texts(PLAIN)
    more = [{"role": "user", "content": "And 3 + 3?"}]
    text, learnt = texts(
        {"prompt": [*PLAIN["messages"], *more], "completion": [{"role": "assistant", "content": "6."}]}
    )
    assert learnt == "6.<|im_end|>\n" and "It is 4." in text


KWARGS = "{% if enable_thinking is defined and not enable_thinking %}NO {% endif %}{{ date_string }}" + CHATML


def test_a_rows_variables_reach_the_template_and_win() -> None:
    (row,) = rows_of("template-kwargs")
    assert texts(row, KWARGS)[0].startswith("NO 1 Jan 2026<|im_start|>user")
    of_line = DataSettings(chat_template_kwargs='{"date_string": "2 Feb", "enable_thinking": true}')
    assert texts(row, KWARGS, of_line)[0].startswith("NO 1 Jan 2026<")
    assert texts(PLAIN, KWARGS, of_line)[0].startswith("2 Feb<")
    assert texts({**PLAIN, "chat_template_kwargs": json.dumps(row["chat_template_kwargs"])}, KWARGS) == texts(
        row, KWARGS
    )
    assert "NO " not in texts({**PLAIN, "chat_template_kwargs": {"enable_thinking": None}}, KWARGS)[0]


@pytest.mark.parametrize("given", [{"tools": []}, {"add_generation_prompt": True}, "[1]", "{", 4])
def test_variables_that_are_none_are_refused(given: Any) -> None:
    assert "chat_template_kwargs" in refusal({**PLAIN, "chat_template_kwargs": given})


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ({"role": 4, "content": "a"}, "a string as its role"),
        ({"role": "assistant", "content": "a", "tool_calls": "f()"}, "'tool_calls'"),
        ({"role": "assistant", "content": "a", "reasoning_content": ["b"]}, "as its reasoning"),
    ],
)
def test_turns_that_say_something_else_are_refused(turn: Row, said: str) -> None:
    assert "turn 1 of 'messages'" in refusal({"messages": [PLAIN["messages"][0], turn]})
    assert said in refusal({"messages": [PLAIN["messages"][0], turn]})


def test_no_calls_are_no_calls() -> None:
    """A column of Parquet has an empty list, or null, where a turn calls nothing."""
    calling = "{% for m in messages %}{% if 'tool_calls' in m %}CALL{% endif %}{% endfor %}" + CHATML
    for nothing in ([], None):
        turns = [{**m, "tool_calls": nothing, "name": None} for m in PLAIN["messages"]]
        assert texts({"messages": turns}, calling) == texts(PLAIN, calling)


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_has_every_name(key: str) -> None:
    """As transformers renames it since 5.21: templates read one or the other."""
    template = "{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }}{% endfor %}" + MARKED
    row = {"messages": [PLAIN["messages"][0], {**PLAIN["messages"][1], key: "hm "}]}
    assert texts(row, template)[0].startswith("hm hm <|im_start|>user")
