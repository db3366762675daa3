"""Whether chats are the same samples in two environments: this one, and one with other versions of transformers.

Owns the comparison: every conversation and input of tests/, with every template of TRL's, tokenized by each of the two
interpreters. Exit status 1 where one is another sample, or is refused in one of them alone.

    python scripts/compare_chats.py .venv-lowest/bin/python      the lowest versions, which scripts/test-lowest installs
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

TESTS = Path(__file__).resolve().parents[1] / "tests"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("python", help="of the other environment, with logitcache and TRL; -: print the samples here")
    args = parser.parse_args()
    if args.python == "-":
        print(json.dumps(chats()))
        return 0
    return compare(args.python)


def compare(python: str) -> int:
    """Print how many chats are other samples in the other environment, and which. 1 where one is."""
    here, there = (
        json.loads(subprocess.run([each, __file__, "-"], check=True, stdout=subprocess.PIPE).stdout)
        for each in (sys.executable, python)
    )
    versions = here.pop("transformers"), there.pop("transformers")
    differ = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    refused = sum(isinstance(found, str) for found in here.values())
    print(f"{len(here)} chats, {refused} refused: {len(differ)} differ between transformers {' and '.join(versions)}")
    for name in differ:
        print(f"  {name}: {here.get(name)!s:.200} | {there.get(name)!s:.200}")
    return int(bool(differ))


def chats() -> dict[str, Any]:
    """Token ids and what is learnt of every conversation and input of tests/, with every template of TRL's; or what
    refuses it."""
    sys.path.insert(0, str(TESTS))
    from support.trl_chats import CONVERSATIONS, stand_in_tokenizer, template_texts

    from logitcache.data.tokenize import tokenize_row
    from logitcache.errors import InvalidData

    logging.disable(logging.WARNING)
    rows = dict(CONVERSATIONS)
    for file in sorted((TESTS / "data" / "chats").glob("*.jsonl")):
        rows[file.stem] = json.loads(file.read_text(encoding="utf-8"))
    markers = json.loads((TESTS / "data" / "chats" / "generation-markers.json").read_text(encoding="utf-8"))
    tokenizer, found = stand_in_tokenizer(), {"transformers": version("transformers")}
    for template, text in {**template_texts(), **markers}.items():
        tokenizer.chat_template = text
        for name, row in rows.items():
            try:
                ids, supervised = tokenize_row(row, tokenizer, "row")
                found[f"{template}, {name}"] = [ids.tolist(), np.flatnonzero(supervised).tolist()]
            except InvalidData as error:
                found[f"{template}, {name}"] = str(error)
    return found


if __name__ == "__main__":
    sys.exit(main())
