"""axolotl from end to end, as a user starts it, against the oracle: `scripts/check-integration axolotl` runs this.

    axolotl train run.yml          a user's own YAML, padded and packed, with the plug-in's lines added

Each run is a process of its own. `Recording`, a second plug-in, leaves the batches that reached the loss beside the
checkpoints; the adapter of every step is the checkpoint before it. Owns the YAML and what is asked of a run: losses
within 1e-5 of the formula, a second run that captures nothing and has the same losses, and refusals by name.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from axolotl.integrations.base import BasePlugin
from integration_common import (
    LARGEST_DIFFERENCE,
    TOP_K,
    Recorder,
    Step,
    chat_rows,
    documents,
    instruction_rows,
    logged_steps,
    make_base,
    oracle_steps,
    row,
    worst,
    write_jsonl,
    write_rows,
)

STEPS, WEIGHT = 4, 2.0
BATCHES = "batches.pt"
FILLS = "the base runs now over what it lacks"

STOCK: dict[str, Any] = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_linear": True,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "learning_rate": 0.01,
    "lr_scheduler": "constant",
    "optimizer": "adamw_torch",
    "bf16": False,
    "tf32": False,
    "attn_implementation": "sdpa",
    **dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False),  # on a CPU: they are Triton's
    "logging_steps": 1,
    "save_steps": 1,
    "val_set_size": 0,
    "seed": 1,
}
"""What a user's YAML says beside model, data and lengths."""

LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {"sequence_len": 256},
    "packed": {"sequence_len": 192, "sample_packing": True},
}


class Recording(BasePlugin):
    """Keeps the batches of a run in its output_dir, and draws its adapter from the seed, which axolotl sets later."""

    def pre_lora_load(self, cfg: Any, model: Any) -> None:
        torch.manual_seed(cfg.seed)

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        self.recorder = Recorder()
        self.recorder.attach(trainer)

    def post_train(self, cfg: Any, model: Any) -> None:
        torch.save(dict(self.recorder.batches), Path(cfg.output_dir) / BATCHES)


def plugged(stock: dict[str, Any], cache: Path, **block: Any) -> dict[str, Any]:
    """The user's YAML with the plug-in's lines."""
    plugins = ["logitcache.integrations.axolotl.LogitCachePlugin", f"{Path(__file__).stem}.Recording"]
    kept = {"top_k": TOP_K, "precision": "exact"}
    return {**stock, "plugins": plugins, "logitcache": {"cache": str(cache), "fill": True, "capture": kept, **block}}


def run(folder: Path, name: str, config: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """`axolotl train`, with its output in a folder of its own."""
    out = folder / name
    path = folder / f"{name}.yml"
    path.write_text(
        yaml.safe_dump({**config, "output_dir": str(out), "dataset_prepared_path": str(folder / "prepared")})
    )
    command = [sys.executable, "-m", "axolotl.cli.main", "train", str(path), "--launcher", "python"]
    scripts = str(Path(__file__).parent)
    path_of = os.pathsep.join(filter(None, [scripts, os.environ.get("PYTHONPATH")]))
    quiet = {"AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, **quiet, "PYTHONPATH": path_of}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    (folder / f"{name}.log").write_text(done.stdout + done.stderr)
    return done


def steps_of(folder: Path, name: str) -> list[Step]:
    """What a run logged of each step."""
    state = json.loads((folder / name / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return logged_steps(state["log_history"])


def trained(folder: Path, name: str, config: dict[str, Any]) -> tuple[list[Step], str]:
    """The steps of a run as it logged them, and all that it said; RuntimeError where it failed."""
    done = run(folder, name, config)
    said = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"axolotl train {name}.yml: exit status {done.returncode}\n{said[-4000:]}")
    return steps_of(folder, name), said


def proved(folder: Path, base: Path, layout: str, config: dict[str, Any]) -> dict[str, Any]:
    """The row of a layout: a run that fills its cache, held against the oracle, and one that finds all in it."""
    ours, said = trained(folder, layout, config)
    again, said_again = trained(folder, f"{layout}-again", config)
    recorder = Recorder()
    recorder.batches.update(torch.load(folder / layout / BATCHES))
    several = any(len(documents(b)) > len(b["input_ids"]) for step in recorder.batches.values() for b in step)
    require(several == (layout == "packed"), f"{layout}: rows of several documents, {several}")
    oracle = oracle_steps(base, folder / layout, recorder, WEIGHT)
    for mine, its in zip(ours, oracle, strict=True):
        print(f"{layout}: logged {mine}, by the formula {its}")
    difference = worst(ours, oracle)[2]
    require(difference <= LARGEST_DIFFERENCE, f"{layout}: {difference:.2g} nats from the oracle")
    require(FILLS in said and FILLS not in said_again, f"{layout}: filled by the first run, and by the first alone")
    require(again == ours, f"{layout}: the second run logged {again}, the first {ours}")
    return row("axolotl", "axolotl", layout, ours, oracle, "fill: true; the second run fills nothing, same losses")


def require(holds: bool, what: str) -> None:
    """Raise RuntimeError where something does not hold."""
    if not holds:
        raise RuntimeError(what)


def check_refused(folder: Path, config: dict[str, Any]) -> None:
    """An option that changes the loss, and a key that is none, stop axolotl with a sentence that names them."""
    for name, wrong, sentence in (
        ("loss", {**config, "chunked_cross_entropy": True}, "chunked_cross_entropy: True is refused"),
        ("key", {**config, "logitcache": {**config["logitcache"], "wieght": 1}}, "logitcache: unknown key 'wieght'"),
    ):
        done = run(folder, f"refused-{name}", wrong)
        said = done.stdout + done.stderr
        require(done.returncode != 0 and sentence in said, f"expected {sentence!r}, found {said[-2000:]}")
        print(f"refused: {next(line for line in said.splitlines() if sentence in line)}")


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = make_base(folder / "base")
        data = {
            "padded": {"path": str(write_jsonl(folder / "padded.jsonl", instruction_rows(48))), "type": "alpaca"},
            "packed": {"path": str(write_jsonl(folder / "packed.jsonl", chat_rows(96))), "type": "chat_template"},
        }
        rows = []
        for layout, lengths in LAYOUTS.items():
            stock = {"base_model": str(base), "datasets": [{**data[layout], "ds_type": "json"}], **lengths, **STOCK}
            config = plugged(stock, folder / f"cache-{layout}", weight=WEIGHT)
            rows.append(proved(folder, base, layout, config))
        check_refused(folder, config)
    write_rows("axolotl", rows)


if __name__ == "__main__":
    main()
