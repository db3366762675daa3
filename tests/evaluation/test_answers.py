"""Answers: greedy, the same in a batch as alone, held against a loop of full forwards; and what becomes of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.cli_harness import done, refused
from support.tiny_model import make_model, make_tokenizer
from transformers import GenerationConfig

from logitcache.data.rows import read_rows
from logitcache.data.samples import make_samples
from logitcache.errors import InvalidData, UnsupportedModel
from logitcache.evaluation.answers import Answer, Answered, answers, answers_of
from logitcache.evaluation.prompts import Prompt, read_prompts
from logitcache.evaluation.settings import AnswerSettings

TEXTS = ["a", "What is it?", "abc", "Tell me of the sea and of all that swims in it.", "abd", "zz top", "0"]


def prompts_of(*texts: str) -> list[Prompt]:
    return [Prompt(({"role": "user", "content": text},), f"here:{i}") for i, text in enumerate(texts, 1)]


@pytest.fixture
def model() -> Any:
    """Two of its tokens end an answer, as generation configs of chat models have it."""
    made = make_model()
    made.generation_config = GenerationConfig(eos_token_id=[69, 68], pad_token_id=3)
    return made


@pytest.fixture
def tokenizer() -> Any:
    return make_tokenizer()


def by_full_forwards(model: Any, tokenizer: Any, text: str, limit: int) -> tuple[list[int], bool]:
    """The oracle: one forward of the whole sequence a token, without cache, batch or generate."""
    ids = tokenizer(f"<user>{text}\n<assistant>")["input_ids"]
    generated: list[int] = []
    while len(generated) < limit:
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids + generated])).logits[0, -1].argmax())
        if token in (69, 68, tokenizer.eos_token_id):
            return generated, False
        generated.append(token)
    return generated, True


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_answers_are_those_of_full_forwards_in_any_batch(model: Any, tokenizer: Any, batch_size: int) -> None:
    found = answers_of(model, tokenizer, prompts_of(*TEXTS), AnswerSettings(24, batch_size)).answers
    expected = [by_full_forwards(model, tokenizer, text, 24) for text in TEXTS]
    assert [(a.num_tokens, a.is_cut) for a in found] == [(len(ids), cut) for ids, cut in expected]
    for answer, (ids, cut) in zip(found, expected, strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert answer.text == (text.rstrip("\ufffd") if cut else text)
    assert {a.is_cut for a in found} == {True, False}


def test_sampling_and_penalties_of_the_model_are_set_aside_and_put_back(model: Any, tokenizer: Any) -> None:
    plain = answers_of(model, tokenizer, prompts_of(*TEXTS), AnswerSettings(12))
    own = GenerationConfig(
        do_sample=True, temperature=2.0, top_k=3, repetition_penalty=5.0, eos_token_id=[69, 68], pad_token_id=3
    )
    model.generation_config = own
    model.train()
    assert answers_of(model, tokenizer, prompts_of(*TEXTS), AnswerSettings(12)) == plain
    assert model.generation_config is own and model.training


def test_an_adapted_model_answers_with_its_adapter(model: Any, tokenizer: Any) -> None:
    before = answers_of(model, tokenizer, prompts_of("abc"), AnswerSettings(8))
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.mul_(20)
    (after,) = answers_of(adapted, tokenizer, prompts_of("abc"), AnswerSettings(8)).answers
    ids, _ = by_full_forwards(adapted, tokenizer, "abc", 8)
    assert after.text == tokenizer.decode(ids).rstrip("\ufffd") != before.answers[0].text
    with adapted.disable_adapter():
        assert answers_of(adapted, tokenizer, prompts_of("abc"), AnswerSettings(8)) == before


def test_empty_answers_are_left_out_and_cut_ones_kept(tmp_path: Path) -> None:
    one, two, three = prompts_of("a", "b", "c")
    found = Answered((Answer(one, "x", 1, True), Answer(two, " \n", 2, False), Answer(three, "ü", 1, False)))
    assert (found.num_cut, found.num_empty) == (1, 1)
    found.write(tmp_path / "out.jsonl")
    assert [row["messages"][0]["content"] for _, row in read_rows(str(tmp_path / "out.jsonl"))] == ["a", "c"]
    with pytest.raises(InvalidData, match=r"found 1 empty ones\. Nothing was written"):
        Answered((Answer(two, "", 0, False),)).write(tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()


def test_a_character_that_the_limit_cuts_is_not_part_of_the_answer(tokenizer: Any) -> None:
    """Random models say broken bytes: the replacement character at the end of a cut answer is left out."""
    found = answers_of(make_model(), tokenizer, prompts_of(*TEXTS), AnswerSettings(5)).answers
    assert all(not a.text.endswith("\ufffd") for a in found if a.is_cut) and any(a.is_cut for a in found)


def test_models_that_cannot_be_asked_are_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(UnsupportedModel, match="answering here:2: its 111 tokens and an answer of 200 are more than"):
        answers_of(model, tokenizer, prompts_of("a", "b" * 93), AnswerSettings(200))
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(InvalidData, match=r"answering here:1: the chat template refuses its messages \(no\)"):
        answers_of(model, tokenizer, prompts_of("a"))
    tokenizer.chat_template = None
    for without in (tokenizer, None):
        with pytest.raises(UnsupportedModel, match="expected a tokenizer with a chat template"):
            answers_of(model, without, prompts_of("a"))


def test_the_verb_writes_rows_that_evaluate_takes(tiny_model: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "prior.jsonl"
    prompts.write_text("\n".join(TEXTS))
    line = ("answers", "--model", tiny_model, "--prompts", prompts, "--out", out, "--max-new-tokens", 6)
    told = done(*line, "--batch-size", 3)
    rows = [json.loads(text) for text in out.read_text(encoding="utf-8").splitlines()]
    assert f"Wrote {len(rows)} answers of" in told.out
    asked = [row["messages"][0]["content"] for row in rows]
    assert asked == [text for text in TEXTS if text in asked] and len(rows) > 3
    assert "answers reached --max-new-tokens 6 and end there." in told.err
    assert all(row.keys() == {"messages"} and row["messages"][1]["role"] == "assistant" for row in rows)
    samples = make_samples(read_rows(str(out)), make_tokenizer(), 256, 260)
    assert len(samples.samples) == len(rows)
    before = out.read_bytes()
    assert "exists. Choose another file" in refused(2, *line)
    assert out.read_bytes() == before
    again = answers(tiny_model, read_prompts(prompts), tmp_path / "again.jsonl", settings=AnswerSettings(6))
    assert (tmp_path / "again.jsonl").read_bytes() == before and len(again.kept) == len(rows)


def test_without_prompts_the_everyday_ones_are_answered(tiny_model: Path, tmp_path: Path) -> None:
    told = done("answers", "--model", tiny_model, "--out", tmp_path / "out.jsonl", "--max-new-tokens", 2)
    rows = [json.loads(text) for text in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) > 50 and all(row["kind"] and row["part"] in ("anchor", "test") for row in rows)
    assert f"{100 - len(rows)} of 100 answers were empty" in told.err or len(rows) == 100
