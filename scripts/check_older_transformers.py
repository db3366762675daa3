"""Samples of chats, and the loss of 2 x 3 micro-batches over that of 1 x 6, with older transformers and PEFT than those
installed here.

Owns the environment: the older packages in a folder of their own that comes before what is installed (torch and all
else stay), and one process in it. Trainers and cache are those of tests/training/test_normalisation.py,
which runs there too. Exit status 1 where a ratio is further from 1 than 1e-5, or a chat is another sample there.

    python scripts/check_older_transformers.py                 transformers 5.16.1 as in axolotl 0.19, and PEFT 0.20
    python scripts/check_older_transformers.py --tests         and tests/training/test_normalisation.py there
    python scripts/check_older_transformers.py --chats         the chats alone
    python scripts/check_older_transformers.py --packages transformers==5.10.0 peft==0.20.0
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
PACKAGES = ("transformers==5.16.1", "peft==0.20.0")
HUB = "huggingface_hub>=1.5,<2"
"""What transformers before 5.20 takes; with its own requirements, since the newer one has fewer."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--packages", nargs="+", default=PACKAGES)
    parser.add_argument("--tests", action="store_true", help="run tests/training/test_normalisation.py there too")
    parser.add_argument("--chats", action="store_true", help="compare the samples of chats, and nothing else")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--print-chats", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure()
    if args.print_chats:
        print(json.dumps(chats()))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", folder]
        subprocess.run([*pip, HUB], check=True)
        subprocess.run([*pip, "--no-deps", *args.packages], check=True)
        inside = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])}
        found = compare_chats(inside)
        if args.chats:
            return found
        found |= subprocess.run([sys.executable, __file__, "--measure"], env=inside, check=False).returncode
        if args.tests:
            command = [sys.executable, "-m", "pytest", "-n", "0", str(TESTS / "training" / "test_normalisation.py")]
            found |= subprocess.run(command, env=inside, cwd=ROOT, check=False).returncode
    return found


def compare_chats(inside: dict[str, str]) -> int:
    """Print how many chats are other samples in the older environment, and which. Their number, at most 1."""
    here, there = (
        json.loads(subprocess.run([sys.executable, __file__, "--print-chats"], env=env, check=True, stdout=-1).stdout)
        for env in (dict(os.environ), inside)
    )
    versions = here.pop("transformers"), there.pop("transformers")
    differ = sorted(name for name in here if here[name] != there.get(name))
    refused = sum(isinstance(found, str) for found in here.values())
    print(f"{len(here)} chats, {refused} refused: {len(differ)} differ between transformers {' and '.join(versions)}")
    for name in differ:
        print(f"  {name}: {here[name]!s:.200} | {there.get(name)!s:.200}")
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


def measure() -> int:
    """Print a line a trainer, with the installed versions."""
    sys.path.insert(0, str(TESTS))
    print(", ".join(f"{name} {version(name)}" for name in ("transformers", "peft", "trl")))
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name, many, one in losses(Path(folder)):
            print(f"{name}: {many:.6f} with 2 x 3 over {one:.6f} with 1 x 6 = {many / one:.7f}", flush=True)
            worst = max(worst, abs(many / one - 1))
    return int(worst > 1e-5)


def losses(folder: Path) -> Iterator[tuple[str, float, float]]:
    """Name of a trainer, and its first logged loss both ways."""
    from support.plug_ins import make_sft
    from support.tiny_runs import make_cache, make_samples, moved_adapter
    from training.test_normalisation import SilentAboutLosses, trainer_over
    from transformers import PrinterCallback, Trainer
    from transformers.utils import logging

    from logitcache.losses.formulas import Objective

    logging.set_verbosity_error()
    samples = make_samples(6)
    cache = make_cache(folder / "c", samples)

    def sft(**sizes: int) -> Any:
        objective = Objective(weight=2.0)
        return make_sft(folder / "sft", samples, cache, moved_adapter(), objective=objective, check=False, **sizes)

    trainers = {
        "Trainer": lambda **sizes: trainer_over(Trainer, folder, samples, cache, **sizes),
        "with model_accepts_loss_kwargs=False": lambda **sizes: trainer_over(
            SilentAboutLosses, folder, samples, cache, **sizes
        ),
        "TRL's SFTTrainer": sft,
    }
    for name, make in trainers.items():
        found = []
        for batch, accumulate in ((3, 2), (6, 1)):
            trainer = make(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            found.append(float(trainer.state.log_history[0]["loss"]))
        yield name, *found


if __name__ == "__main__":
    sys.exit(main())
