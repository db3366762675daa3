"""What each of TRL's chat templates gives here and in TRL: docs/chat-templates.md, docs/benchmarks/chat_templates.csv.

Owns the comparison: the same conversations, rendered with each template by this package and by the preparation of TRL's
own SFTTrainer with `assistant_only_loss`, token ids and labels side by side. The families' tokenizers are not needed:
one stand-in has all their special tokens. Conversations, tokenizer and TRL's side: tests/support/trl_chats.py.
Exit status 1 where fewer than 340 of 380 of what TRL takes is the same, or a difference has no sentence.

    python scripts/table_chat_templates.py
"""

from __future__ import annotations

import csv
import logging
import sys
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "chat-templates.md"
TABLE = ROOT / "docs" / "benchmarks" / "chat_templates.csv"
LEAST_SAME = 340 / 380

STRINGS_ARE_LOST = (
    "TRL gives it content as a string, of which it renders nothing: every turn is empty there, and only its end is "
    "learnt. Here such a template is given the content as a part of type text, as it wants it."
)
WHY_DIFFERENT = {"idefics3": STRINGS_ARE_LOST, "smolvlm": STRINGS_ARE_LOST}

Pair = dict[str, str]


def pairs() -> Iterator[Pair]:
    """Every template with every conversation."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support.trl_chats import CONVERSATIONS, compared, stand_in_tokenizer, template_texts

    tokenizer = stand_in_tokenizer()
    for name, text in template_texts().items():
        tokenizer.chat_template = text
        for conversation, row in CONVERSATIONS.items():
            yield {"template": name, "conversation": conversation, **compared(tokenizer, row)}


def main() -> int:
    logging.disable(logging.WARNING)  # TRL says much of templates that it knows
    found = list(pairs())
    taken = [pair for pair in found if pair["trl"] == "taken"]
    same = sum(pair["here"] == "same" for pair in taken)
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["template", "conversation", "trl", "here", "why"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    PAGE.write_text(page(found, taken, same), encoding="utf-8")
    print(f"{same} of {len(taken)} pairs that TRL takes are the same, of {len(found)}.")
    return int(same < LEAST_SAME * len(taken))


HEAD = """# Chat templates here and in TRL

Of {taken} pairs of chat template and conversation that TRL takes with `assistant_only_loss`, {same} give the same
token ids and labels here. Made by `python scripts/table_chat_templates.py`; every pair is a row of
[chat_templates.csv](benchmarks/chat_templates.csv). {versions}.

The templates are those that TRL knows, as their families ship them. The families' tokenizers are not at hand: one
stand-in takes their place, a byte-level BPE of 512 tokens trained on the templates, with what looks like a special
token in any of them as one token. [how-to/chats.md](how-to/chats.md) says how a template is chosen and what is learnt.
The conversations:

{conversations}.

| template | TRL takes | same | differs | refused here | taken here only |
|---|---|---|---|---|---|
{rows}

TRL has no training template for gemma4, llama3_1 and llama3_2, whose turns are told by prefixes here; and it cannot
render strings with llava_next, which is given parts here.

## Each of the others, and why

{whys}
"""


def page(found: list[Pair], taken: list[Pair], same: int) -> str:
    """The page, from head to end."""
    names = dict.fromkeys(pair["template"] for pair in found)
    return HEAD.format(
        taken=len(taken),
        same=same,
        versions=", ".join(f"{name} {version(name)}" for name in ("trl", "transformers", "jinja2")),
        conversations="; ".join(dict.fromkeys(pair["conversation"] for pair in found)),
        rows="\n".join(row(name, [pair for pair in found if pair["template"] == name]) for name in names),
        whys="\n".join(whys(taken)),
    )


def row(name: str, found: list[Pair]) -> str:
    """A template's line."""
    taken = [pair["here"] for pair in found if pair["trl"] == "taken"]
    only_here = sum(pair["here"] == "taken" for pair in found)
    counts = [len(taken), *(taken.count(what) for what in ("same", "differs", "refused")), only_here]
    return f"| {name} | " + " | ".join(str(count) if count else "" for count in counts) + " |"


def whys(taken: list[Pair]) -> Iterator[str]:
    """A line a reason, with the templates and conversations that it is of."""
    reasons: dict[str, list[Pair]] = defaultdict(list)
    for pair in taken:
        if pair["here"] == "refused":
            said = pair["why"].split(". ")[0]  # without the way out
            reasons[f"refused: {said}."].append(pair)
        elif pair["here"] == "differs":
            reasons[f"differs: {WHY_DIFFERENT[pair['template']]}"].append(pair)
    for why, of in reasons.items():
        names, conversations = (dict.fromkeys(pair[key] for pair in of) for key in ("template", "conversation"))
        yield f"- **{', '.join(names)}** ({'; '.join(conversations)}) {why}"


if __name__ == "__main__":
    sys.exit(main())
