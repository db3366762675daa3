"""ms-swift from end to end against the oracle: `scripts/check-integration swift` runs this.

    swift sft ... --external_plugins cached.py      a user's own command, with a file of three lines

Padded, padding-free and packed: a recorded run in this process fills the cache; a second one, by the command above,
must write nothing into it and have the same losses; a third goes on from step 2 of the first. The adapter of every step
is the checkpoint before it. Owns the command and what is asked of a run: losses within 1e-5 of the formula, and
refusals by name. Without a GPU there is no FlashAttention, which ms-swift asks for where documents are packed: there
its check is lifted, and the runs are in one process with transformers' sdpa.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from integration_common import (
    TOP_K,
    Recorder,
    Step,
    chat_rows,
    check_refused,
    check_steps,
    contents,
    documents,
    logged_steps,
    make_base,
    oracle_steps,
    row,
    write_jsonl,
    write_rows,
)
from swift.arguments import SftArguments
from swift.pipelines import sft_main

from logitcache.integrations import swift as integration

STEPS, WEIGHT = 4, 2.0

STOCK = {
    "model_type": "llama",
    "template": "chatml",
    "tuner_type": "lora",
    "lora_rank": 4,
    "lora_dropout": 0,
    "torch_dtype": "float32",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_steps": 1,
    "split_dataset_ratio": 0,
    "report_to": "none",
    "add_version": False,
    "check_model": False,
    "attn_impl": "sdpa",
    "max_length": 256,
}
"""What a user's command says beside model, data and output."""

LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "padded": ({}, ""),
    "padding_free": ({"padding_free": True}, "its check for FlashAttention lifted (no GPU): sdpa"),
    "packed": ({"packing": True}, "its check for FlashAttention lifted (no GPU): sdpa"),
}
"""Options, and what is to be known of the run."""


def command(folder: Path, name: str, layout: str, **more: Any) -> list[str]:
    """The arguments of a run, whose plug-in file is written beside them."""
    block = {
        "cache": str(folder / f"cache-{layout}"),
        "fill": True,
        "weight": WEIGHT,
        "capture": {"top_k": TOP_K, "precision": "exact"},
    }
    plugin = folder / f"{name}.py"
    plugin.write_text(f"from logitcache.integrations.swift import register\n\nregister({block!r})\n", encoding="utf-8")
    options = {**STOCK, **LAYOUTS[layout][0], "model": folder / "base", "dataset": folder / "train.jsonl"}
    options |= {"output_dir": folder / name, "external_plugins": plugin, **more}
    return [text for option, value in options.items() for text in (f"--{option}", str(value))]


@contextmanager
def any_attention(packed: bool) -> Iterator[None]:
    """Inside, ms-swift packs without FlashAttention."""
    own = SftArguments._check_padding_free
    if packed:
        SftArguments._check_padding_free = lambda self: setattr(self, "padding_free", True)
    try:
        yield
    finally:
        SftArguments._check_padding_free = own


def recorded(arguments: list[str], recorder: Recorder, packed: bool = False) -> None:
    """A run in this process."""
    with recorder.watching(integration), any_attention(packed):
        sft_main(arguments)


def as_a_user(arguments: list[str]) -> None:
    """A run in a process of its own, as `swift sft` starts it."""
    subprocess.run([sys.executable, "-m", "swift.cli.sft", *arguments], check=True)


def steps_of(run: Path) -> list[Step]:
    """What a run logged of each step."""
    state = run / f"checkpoint-{STEPS}" / "trainer_state.json"
    return logged_steps(json.loads(state.read_text(encoding="utf-8"))["log_history"])


def prove(folder: Path, layout: str) -> dict[str, Any]:
    """The runs of a layout. Returns its row."""
    recorder, cache, packed = Recorder(), folder / f"cache-{layout}", layout != "padded"
    recorded(command(folder, layout, layout), recorder, packed)
    ours = steps_of(folder / layout)
    oracle = oracle_steps(folder / "base", folder / layout, recorder, WEIGHT)
    check_steps(ours, oracle, STEPS)
    batches = [batch for step in recorder.batches.values() for batch in step]
    several = [len(documents(batch)) > len(batch["input_ids"]) for batch in batches]
    assert all(several) if packed else not any(several), several
    assert recorder.trainer.filled is not None
    before, again = contents(cache), command(folder, f"{layout}-again", layout)
    if packed:
        recorded(again, Recorder(), packed)
    else:
        as_a_user(again)
    assert contents(cache) == before, "the second run wrote into the cache"
    assert steps_of(folder / f"{layout}-again") == ours, "the second run has other losses"
    return row("ms-swift", "ms-swift", layout, ours, oracle, LAYOUTS[layout][1])


def prove_resumed(folder: Path) -> None:
    """A run that goes on from a checkpoint has the losses of the one that did not stop: ms-swift skips batches anew."""
    from_two = folder / "padded" / "checkpoint-2"
    recorded(command(folder, "resumed", "padded", resume_from_checkpoint=from_two), Recorder())
    ours, whole = steps_of(folder / "resumed"), steps_of(folder / "padded")
    assert ours == whole, (ours, whole)


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(os.environ.get("KEEP", temporary))
        make_base(folder / "base")
        write_jsonl(folder / "train.jsonl", chat_rows(96))
        weighed = {"enable_dft_loss": True, "loss_scale": "react", "router_aux_loss_coef": 0.1}
        for number, (name, value) in enumerate(weighed.items()):
            arguments = command(folder, f"refused-{number}", "padded", **{name: value})
            check_refused(name, lambda arguments=arguments: recorded(arguments, Recorder()))
        rows = [prove(folder, layout) for layout in LAYOUTS]
        prove_resumed(folder)
    for found in rows:
        print(found)
    write_rows("ms-swift", rows)


if __name__ == "__main__":
    main()
