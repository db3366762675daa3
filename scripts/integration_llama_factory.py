"""LLaMA-Factory from end to end against the oracle: `scripts/check-integration llama_factory` runs this.

    python -m logitcache.integrations.llama_factory train.yaml      a user's own YAML, with a `logitcache:` block

Padded and packed: a recorded run in this process fills the cache; a second one, by the command above, must write
nothing into it and have the same losses. The adapter of every step is the checkpoint before it. Owns the YAML and what
is asked of a run: losses within 1e-5 of the formula, and refusals by name.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from integration_common import (
    TOP_K,
    Recorder,
    Step,
    check_refused,
    check_steps,
    contents,
    documents,
    instruction_rows,
    logged_steps,
    make_base,
    oracle_steps,
    row,
    write_jsonl,
    write_rows,
)

from logitcache.integrations import llama_factory

STEPS, WEIGHT = 4, 2.0

NOTE = "above its pins (transformers<=5.6, peft<=0.18.1, datasets<=4.0): DISABLE_VERSION_CHECK=1"

STOCK: dict[str, Any] = {
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 4,
    "lora_target": "all",
    "dataset": "tiny",
    "template": "default",
    "cutoff_len": 256,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_steps": 1,
    "report_to": "none",
    "overwrite_output_dir": True,
}
"""What a user's YAML says beside model, data and output."""

LAYOUTS: dict[str, dict[str, Any]] = {"padded": {}, "packed": {"neat_packing": True, "flash_attn": "sdpa"}}


def written(folder: Path, name: str, layout: str, **more: Any) -> Path:
    """The YAML of a run."""
    block = {
        "cache": str(folder / f"cache-{layout}"),
        "fill": True,
        "weight": WEIGHT,
        "capture": {"top_k": TOP_K, "precision": "exact"},
    }
    places = {
        "model_name_or_path": str(folder / "base"),
        "dataset_dir": str(folder),
        "output_dir": str(folder / name),
    }
    path = folder / f"{name}.yaml"
    config = {**STOCK, **LAYOUTS[layout], **places, "logitcache": block, **more}
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def recorded(config: Path, recorder: Recorder) -> None:
    """A run in this process, as the command line reads it."""
    sys.argv = ["llama_factory", str(config)]
    with recorder.watching(llama_factory):
        llama_factory.main()


def as_a_user(config: Path) -> None:
    """A run in a process of its own."""
    subprocess.run([sys.executable, "-m", "logitcache.integrations.llama_factory", str(config)], check=True)


def steps_of(run: Path) -> list[Step]:
    """What a run logged of each step."""
    return logged_steps(json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"])


def prove(folder: Path, layout: str) -> dict[str, Any]:
    """Both runs of a layout. Returns its row."""
    recorder, cache = Recorder(), folder / f"cache-{layout}"
    recorded(written(folder, layout, layout), recorder)
    ours = steps_of(folder / layout)
    oracle = oracle_steps(folder / "base", folder / layout, recorder, WEIGHT)
    check_steps(ours, oracle, STEPS)
    batches = [batch for step in recorder.batches.values() for batch in step]
    several = [len(documents(batch)) > len(batch["input_ids"]) for batch in batches]
    assert all(several) if layout == "packed" else not any(several), several
    assert recorder.trainer.filled is not None
    before = contents(cache)
    as_a_user(written(folder, f"{layout}-again", layout))
    assert contents(cache) == before, "the second run wrote into the cache"
    assert steps_of(folder / f"{layout}-again") == ours, "the second run has other losses"
    return row("LLaMA-Factory", "llamafactory", layout, ours, oracle, NOTE)


def main() -> None:
    os.environ.setdefault("DISABLE_VERSION_CHECK", "1")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(os.environ.get("KEEP", temporary))
        make_base(folder / "base")
        write_jsonl(folder / "train.jsonl", instruction_rows(96))
        names = {"tiny": {"file_name": "train.jsonl"}}
        (folder / "dataset_info.json").write_text(json.dumps(names), encoding="utf-8")
        for option in ({"use_dft_loss": True}, {"packing": True}, {"stage": "pt"}, {"enable_liger_kernel": True}):
            config = written(folder, "refused", "padded", **option)
            check_refused(next(iter(option)), lambda config=config: recorded(config, Recorder()))
        rows = [prove(folder, layout) for layout in LAYOUTS]
    for found in rows:
        print(found)
    write_rows("LLaMA-Factory", rows)


if __name__ == "__main__":
    main()
