"""Where the assistant's turns stand in a rendered chat, and that nothing is learnt that the row does not say."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chat_oracle import CHATML, MARKED, chatml_bytes
from support.tiny_model import make_tokenizer

from logitcache.data import chat_rendering
from logitcache.data.samples import Sample, make_samples
from logitcache.data.settings import DataSettings, Supervise
from logitcache.errors import InvalidData

CHATS = Path(__file__).parent / "chats"
TOKENIZER = make_tokenizer()
USER, SAID = {"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is 4."}
MORE, LAST = {"role": "user", "content": "And 3 + 3?"}, {"role": "assistant", "content": "It is 6."}


def sample_of(messages: list[dict[str, Any]], template: str, supervise: Supervise = "assistant") -> Sample:
    TOKENIZER.chat_template = template
    how = DataSettings(supervise=supervise)
    (sample,) = make_samples([("row", {"messages": messages})], TOKENIZER, 10**6, 260, how).samples
    return sample


def learnt(messages: list[dict[str, Any]], template: str, supervise: Supervise = "assistant") -> str:
    sample = sample_of(messages, template, supervise)
    return str(TOKENIZER.decode(sample.token_ids[sample.supervised]))


def refusal(messages: list[dict[str, Any]], template: str) -> str:
    with pytest.raises(InvalidData) as error:
        sample_of(messages, template)
    assert "reading row: " in str(error.value)
    return str(error.value)


# --- the definition --------------------------------------------------------------------------------------------------

contents = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]) | st.sampled_from(" \n<>z"), max_size=12)
turns = st.builds(dict, role=st.sampled_from(["user", "assistant", "assistant", "tool"]), content=contents)
chats = st.tuples(st.builds(dict, role=st.just("system"), content=contents), st.lists(turns, max_size=6)).map(
    lambda found: [found[0], *found[1], SAID]
)


@given(messages=chats)
@settings(deadline=None, max_examples=150)
def test_every_byte_has_the_label_of_the_definition(messages: list[dict[str, Any]]) -> None:
    """With markers and by prefixes; any text, empty and repeated turns among them."""
    for template, line_is_learnt in ((MARKED, False), (CHATML, True)):
        sample = sample_of(messages, template)
        text, labels = chatml_bytes(messages, line_is_learnt)
        assert TOKENIZER.decode(sample.token_ids).encode() == text
        assert sample.supervised.tolist() == labels


@pytest.mark.parametrize("template", [MARKED, CHATML], ids=["markers", "prefixes"])
def test_what_of_a_chat_is_learnt_is_asked(template: str) -> None:
    messages = [USER, SAID, MORE, LAST]
    assert learnt(messages, template, "assistant").replace("<|im_end|>", "").split("\n")[0].startswith("It is 4.")
    assert "It is 4." in learnt(messages, template) and "It is 6." in learnt(messages, template)
    assert learnt(messages, template, "last").removesuffix("\n") == "It is 6.<|im_end|>"
    every = sample_of(messages, template, "all")
    assert every.supervised.all() and every.token_ids.tolist() == sample_of(messages, template).token_ids.tolist()


def test_all_of_a_chat_without_an_assistant_is_learnt() -> None:
    assert learnt([USER], CHATML, "all") == "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n"
    assert "no turn of its messages is the assistant's" in refusal([USER], CHATML)


# --- markers ---------------------------------------------------------------------------------------------------------


def test_markers_are_those_that_jinja_knows() -> None:
    """Three spellings are the same samples; one that stands in a comment alone is none."""
    spelt = json.loads((CHATS / "generation-markers.json").read_text(encoding="utf-8"))
    found = {name: learnt([USER, SAID, MORE, LAST], text) for name, text in spelt.items()}
    assert found.pop("gen-comment") == "It is 4.<|im_end|>\nIt is 6.<|im_end|>\n"
    assert set(found.values()) == {"It is 4.<|im_end|>It is 6.<|im_end|>"} and len(found) == 3
    assert {name: chat_rendering.has_markers(text) for name, text in spelt.items()} == {
        "gen-ok": True,
        "gen-tight": True,
        "gen-2space": True,
        "gen-comment": False,
    }
    assert not chat_rendering.has_markers("{{ '{% generation %}' }}{% raw %}{% generation %}{% endraw %}")


WRONG_MARKERS = {
    "the whole chat": (
        MARKED.replace("{% for", "{% generation %}{% for", 1)
        .replace("{% generation %}{{ m", "{{ m")
        .replace("{% endgeneration %}{% else", "{% else")
        .replace("{% endfor %}", "{% endfor %}{% endgeneration %}"),
        "hold turns [0, 1, 2, 3] together",
    ),
    "the user's turns": (MARKED.replace("'assistant' %}", "'user' %}"), "hold turns [0] together"),
    "the last turn alone": (
        MARKED.replace("'assistant' %}", "'assistant' and loop.last %}"),
        "has nothing of turn 1",
    ),
    "the end alone": (
        MARKED.replace(
            "{% generation %}{{ m['content'] + '<|im_end|>' }}", "{{ m['content'] }}{% generation %}<|im_end|>"
        ),
        "of turn 1, 'It is 4.', the chat template has only the end learnt",
    ),
    "no content": (MARKED.replace("{{ m['content'] + '<|im_end|>' }}{% end", "<|im_end|>{% end"), "or drops the words"),
    "nothing": (MARKED.replace("{{ m['content'] + '<|im_end|>' }}{% end", "{% end"), "has nothing of turn 1"),
    "the head of all": ("{% generation %}Hello.{% endgeneration %}" + MARKED, "text that is of no assistant turn"),
}


@pytest.mark.parametrize("name", WRONG_MARKERS)
def test_markers_around_something_else_are_refused(name: str) -> None:
    template, said = WRONG_MARKERS[name]
    message = refusal([USER, SAID, MORE, LAST], template)
    assert said in message and "--chat-template FILE" in message


def test_a_mask_that_runs_on_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As before transformers 5.24, where the user's next turn may be learnt as the assistant's."""
    render = chat_rendering.render_jinja_template

    def runs_on(*args: Any, **kwargs: Any) -> Any:
        texts, spans = render(*args, **kwargs)
        return texts, [[(start, len(texts[0])) for start, _ in spans[0]]]

    monkeypatch.setattr(chat_rendering, "render_jinja_template", runs_on)
    assert "hold turns [1, 2, 3] together" in refusal([USER, SAID, MORE, LAST], MARKED)


def test_parts_of_a_turn_in_several_ranges_are_one_turn() -> None:
    """A thinking block, a call, an end each in markers of their own."""
    split = MARKED.replace(
        "{% generation %}{{ m['content'] +",
        "{% generation %}<think>{{ m.thinking }}</think>{% endgeneration %}\n{% generation %}{{ m['content'] +",
    )
    messages = [USER, {**SAID, "thinking": "hm"}, MORE, {**LAST, "content": "", "thinking": "so"}]
    assert learnt(messages, split) == "<think>hm</think>It is 4.<|im_end|><think>so</think><|im_end|>"
    assert learnt(messages, split, "last") == "<think>so</think><|im_end|>"


# --- prefixes --------------------------------------------------------------------------------------------------------


def test_a_turn_that_is_rendered_otherwise_later_is_refused() -> None:
    shown = "('<think></think>' if loop.last and m['role'] == 'assistant' else '') + m['content'] +"
    thinking = CHATML.replace("m['content'] +", shown)
    assert learnt([USER, SAID], thinking) == "<think></think>It is 4.<|im_end|>\n"
    message = refusal([USER, SAID, MORE, LAST], thinking)
    assert "turn 1 differently once later turns follow" in message
    assert "--chat-template FILE" in message and "remove the row" not in message.lower()


def test_what_only_closes_a_chat_is_no_difference() -> None:
    """The end of text after the last turn, as Phi-3 has it, is learnt with the turn that it closes."""
    closed = CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
    assert learnt([USER, SAID, MORE, LAST], closed) == "It is 4.<|im_end|>\nIt is 6.<|im_end|>\n<|endoftext|>"
    assert learnt([USER, SAID, MORE], closed) == "It is 4.<|im_end|>\n"


def test_a_prompt_that_no_turn_begins_with_ends_where_they_part() -> None:
    """A prompt that opens a thinking block, and a turn without one: what is said is learnt from its first character."""
    opens = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")
    assert learnt([USER, SAID], opens) == "It is 4.<|im_end|>\n"
    alike = {"role": "assistant", "content": "<b>4</b>"}
    assert learnt([USER, alike, MORE, LAST], opens) == "<b>4</b><|im_end|>\nIt is 6.<|im_end|>\n"


# --- what a template prints ------------------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
CALLS = "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{{ ARGUMENTS }}</call>{% endfor %}"


def calling(arguments: str) -> str:
    return MARKED.replace(
        "{{ m['content'] + '<|im_end|>' }}{% end",
        CALLS.replace("ARGUMENTS", arguments) + "{{ m['content'] + '<|im_end|>' }}{% end",
    )


def test_calls_are_learnt_as_they_are_rendered() -> None:
    messages = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "sun"},
        SAID,
    ]
    as_json = '<call>weather{"city": "Rome"}</call><|im_end|>It is 4.<|im_end|>'
    assert learnt(messages, calling("c.function.arguments | tojson")) == as_json


@pytest.mark.parametrize("supervise", ["assistant", "all"])
def test_objects_printed_as_python_are_refused(supervise: Supervise) -> None:
    messages = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    with pytest.raises(InvalidData, match=r"prints \{'city': 'Rome'\} as Python does"):
        sample_of(messages, calling("c.function.arguments"), supervise)
    with pytest.raises(InvalidData, match="as Python does"):
        sample_of([USER, SAID], "{{ messages }}", "all")
    like_json = {**CALL["function"], "arguments": ["it's", 4]}  # Python and JSON print it alike
    called = [USER, {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": like_json}]}]
    assert '["it\'s", 4]' in learnt(called, calling("c.function.arguments | tojson"))
    quoted = [{"role": "user", "content": "{'city': 'Rome'}"}, messages[1]]  # the row itself says it
    assert "{'city'" not in learnt(quoted, calling("c.function.arguments | tojson"))


@pytest.mark.parametrize("supervise", ["assistant", "all"])
def test_a_dropped_call_is_refused(supervise: Supervise) -> None:
    messages = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}, SAID]
    with pytest.raises(InvalidData, match="drops a call of 'weather' in turn 1"):
        sample_of(messages, MARKED, supervise)
    one = calling("c.function.arguments | tojson").replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
    with pytest.raises(InvalidData, match="drops a call of 'weather' in turn 1"):
        sample_of(messages, one, supervise)


def test_a_template_that_counts_on_the_end_of_what_is_said_is_read() -> None:
    """The mark that tells the turns is put at the end of what is said; where that changes the text, before it."""
    counts = MARKED.replace("{{ '\n' }}", "{{ '' if m['content'].endswith('/no') else '!' }}{{ '\n' }}")
    asked = {"role": "user", "content": "What is 2 + 2? /no"}
    assert learnt([asked, SAID, MORE, LAST], counts) == "It is 4.<|im_end|>It is 6.<|im_end|>"


def test_a_slow_tokenizer_is_refused_by_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(TOKENIZER), "is_fast", False)
    assert "which does not say of which characters a token is" in refusal([USER, SAID], MARKED)


DROPS_THOUGHT = MARKED.replace(
    "{{ m['content'] + '<|im_end|>' }}{% endgen",
    "{{ m['content'] if loop.last else m['content'].split('</think>')[-1].strip() }}<|im_end|>{% endgen",
)


def test_a_turn_that_only_reasons_is_not_learnt_as_one_that_says_nothing() -> None:
    """Of it the template leaves the end mark; of one that answers too, the answer."""
    thought = {"role": "assistant", "content": "<think>\nreason\n</think>\n\n"}
    answered = {"role": "assistant", "content": "<think>reason</think>It is 4."}
    assert learnt([USER, answered, MORE, LAST], DROPS_THOUGHT) == "It is 4.<|im_end|>It is 6.<|im_end|>"
    assert learnt([USER, thought], DROPS_THOUGHT) == "<think>\nreason\n</think>\n\n<|im_end|>"
    said = refusal([USER, thought, MORE, LAST], DROPS_THOUGHT)
    assert "of turn 1, '<think>" in said and "The model would learn to say nothing." in said


def test_a_template_that_cannot_be_parsed_is_told_from_a_row_that_it_refuses() -> None:
    said = refusal([USER, SAID], "{% for m in messages %}\n{{ m.content }")
    assert "the chat template cannot be parsed (line 2: " in said and "Repair it" in said
    said = refusal([USER, SAID], "{{ raise_exception('roles must alternate') }}")
    assert "refuses its messages (roles must alternate). Change the row" in said


@pytest.mark.parametrize("supervise", ["assistant", "all"])
def test_a_call_that_is_named_in_what_is_said_is_not_taken_for_shown(supervise: Supervise) -> None:
    """The template shows no call: 'Let me search.' would be learnt as all that there is to say."""
    call = {"type": "function", "function": {"name": "search", "arguments": {"q": "x"}}}
    calling = {"role": "assistant", "content": "Let me search.", "tool_calls": [call]}
    with pytest.raises(InvalidData, match="drops a call of 'search' in turn 1"):
        sample_of([USER, calling], MARKED, supervise)
    shown = MARKED.replace(
        "m['content'] + '<|im_end|>' }}{% endgen", "m['content'] + (m.tool_calls | tojson) }}{% endgen"
    )
    assert '"name": "search"' in learnt([USER, calling], shown, supervise)
