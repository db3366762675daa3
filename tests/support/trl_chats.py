"""TRL's chat templates, what TRL itself makes of a row with them, and the conversations that both are held to.

`trl_tokens` runs the dataset preparation of TRL's SFTTrainer with `assistant_only_loss`, and nothing of ours;
`compared` holds ours against it.
"""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

Row = dict[str, Any]

USER = {"role": "user", "content": "What is 2 + 2?"}
SAID = {"role": "assistant", "content": "It is 4."}
MORE = {"role": "user", "content": "And 3 + 3?"}
LAST = {"role": "assistant", "content": "It is 6."}
SYSTEM = {"role": "system", "content": "Answer in one sentence."}
WEATHER = {"role": "user", "content": "What is the weather in Rome and in Oslo?"}


def _tool(name: str) -> Row:
    properties = {"city": {"type": "string", "description": "Which city."}}
    parameters = {"type": "object", "properties": properties, "required": ["city"]}
    return {"type": "function", "function": {"name": name, "description": "Weather now.", "parameters": parameters}}


def _call(city: str) -> Row:
    return {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}


def _result(text: str) -> Row:
    return {"role": "tool", "name": "weather", "content": text}


CALLING = {"role": "assistant", "content": "", "tool_calls": [_call("Rome")]}
BOTH = {"role": "assistant", "content": "", "tool_calls": [_call("Rome"), _call("Oslo")]}
SUNNY = {"role": "assistant", "content": "It is sunny."}

CONVERSATIONS: dict[str, Row] = {
    "one turn": {"messages": [USER, SAID]},
    "two turns": {"messages": [USER, SAID, MORE, LAST]},
    "system": {"messages": [SYSTEM, USER, SAID]},
    "many turns": {"messages": [SYSTEM, *[USER, SAID, MORE, LAST] * 3]},
    "ends with the user": {"messages": [USER, SAID, MORE]},
    "space around content": {"messages": [USER, {"role": "assistant", "content": " It is 4.\n"}, MORE, LAST]},
    "thinking in its field": {"messages": [USER, {**SAID, "reasoning_content": "2 and 2 are 4."}]},
    "thinking in content": {
        "messages": [USER, {"role": "assistant", "content": "<think>\n2 and 2 are 4.\n</think>\n\nIt is 4."}]
    },
    "thinking, two turns": {
        "messages": [USER, {**SAID, "reasoning_content": "2 and 2."}, MORE, {**LAST, "reasoning_content": "3 and 3."}]
    },
    "tools, not called": {"messages": [USER, SAID], "tools": [_tool("weather")]},
    "a call": {"messages": [WEATHER, CALLING, _result("sunny"), SUNNY], "tools": [_tool("weather")]},
    "parallel calls": {
        "messages": [WEATHER, BOTH, _result("sunny"), _result("snow"), SUNNY],
        "tools": [_tool("weather"), _tool("forecast")],
    },
    "prompt + completion": {"prompt": [USER, SAID, MORE], "completion": [LAST]},
}
"""What both render: name to row."""


def template_texts() -> dict[str, str]:
    """TRL's templates of the families, without its training variants: name to Jinja."""
    import trl

    folder = Path(str(trl.__file__)).parent / "chat_templates"
    found = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}
    return {name: text for name, text in found.items() if not name.endswith("_training")}


_SPECIAL = re.compile(
    r"<\|[A-Za-z_0-9:/]+\|>|<\uff5c[^\uff5c]+\uff5c>|<(?:start|end)_of_[a-z]+>|<\|(?:turn|channel|tool|tool_call|tool_response)>"
    r"|<(?:turn|channel|tool|tool_call|tool_response)\|>|\[/?INST\]|</?think>|</?tool_call>|<sop>|\[gMASK\]"
)


def stand_in_tokenizer() -> Any:
    """A byte-level BPE of 512 tokens, trained on the templates, with all that looks like a special token in them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = template_texts()
    special = sorted({token for text in texts.values() for token in _SPECIAL.findall(text)})
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts.values(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.add_special_tokens({"additional_special_tokens": special})
    return fast


def named_as_since_5_21(row: Row) -> Row:
    """The row with a turn's `reasoning_content` as `thinking` too, which is all that the templates of gpt-oss and
    LFM2.5 read. transformers fills that in since 5.21; before, the samples that TRL makes there lack the reasoning."""
    turns = [
        {"thinking": turn["reasoning_content"], **turn} if "reasoning_content" in turn else turn
        for turn in row.get("messages", [])
    ]
    return {**row, "messages": turns} if turns else row


def trl_tokens(tokenizer: Any, row: Row) -> tuple[list[int], list[int]]:
    """Token ids and labels (-100 where not learnt) of a row, as TRL's SFTTrainer prepares it with
    `assistant_only_loss=True`. Raises what TRL raises."""
    from datasets import IterableDataset
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers
    from trl.trainer.sft_trainer import SFTTrainer

    marked = has_generation_markers(tokenizer.chat_template)
    trainer = SimpleNamespace(
        _tokenizer=tokenizer,
        chat_template=None if marked else get_training_chat_template(tokenizer),
        completion_only_loss="prompt" in row,
    )
    args = SimpleNamespace(
        dataset_num_proc=None,
        assistant_only_loss=True,
        dataset_text_field="text",
        max_length=None,
        shuffle_dataset=False,
    )
    rows = IterableDataset.from_generator(lambda: iter([row]))  # a Dataset would put nulls into the row
    prepared = SFTTrainer._prepare_dataset(trainer, rows, tokenizer, args, False, None, "train")  # type: ignore[arg-type]
    (found,) = list(prepared)
    return list(found["input_ids"]), list(found["labels"])


def compared(tokenizer: Any, row: Row) -> dict[str, str]:
    """What becomes of a row `here` (same, differs, taken, refused) and in `trl` (taken, refused), and `why`: what
    differs, or what the refusal says."""
    from logitcache.data.files import IGNORED
    from logitcache.data.tokenize import tokenize_row
    from logitcache.errors import InvalidData

    theirs, trl = None, "taken"
    try:
        theirs = trl_tokens(tokenizer, row)
    except Exception:  # of its own kinds, and the template's
        trl = "refused"
    try:
        token_ids, supervised = tokenize_row(row, tokenizer, "row")
    except InvalidData as error:
        return {"here": "refused", "trl": trl, "why": str(error).removeprefix("reading row: ")}
    ours = token_ids.tolist(), [int(t) if s else IGNORED for t, s in zip(token_ids, supervised, strict=True)]
    if theirs is None:
        return {"here": "taken", "trl": trl, "why": ""}
    if theirs == ours:
        return {"here": "same", "trl": trl, "why": ""}
    return {"here": "differs", "trl": trl, "why": "labels" if theirs[0] == ours[0] else "ids"}
