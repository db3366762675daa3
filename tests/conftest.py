"""Fixtures: a tiny random Llama with a byte-level tokenizer, on disk as a user would have it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_model import make_model, make_tokenizer

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)
pytest.register_assert_rewrite("support.backend_suite")

SLOW = {
    "process": (
        *("capture/test_kill", "capture/test_ray", "capture/test_worker", "capture/test_worker_modes"),
        *("losses/test_peers", "models/test_tensor_parallel", "pairing/test_in_pieces", "storage/test_locks_off"),
        *("training/test_fill_processes", "training/test_layouts", "training/test_normalisation"),
    ),
    "training": (
        *(
            "adapters/",
            "cli/",
            "demo/test_demo",
            "demo/test_real",
            "losses/test_loss_adversarial",
            "losses/test_tails",
            "models/test_quantization",
        ),
        *("pairing/test_distil", "pairing/test_layout", "sweeps/test_run", "training/", "house/test_docs"),
        *("models/test_device_map", "models/test_prequantised", "pairing/test_wanted_samples", "capture/test_vllm"),
    ),
    "device": ("device/",),
    "faults": ("storage/test_faults", "storage/test_hostile", "storage/test_adversarial", "reports/test_flips"),
    "peer": ("evaluation/test_lm_eval", "storage/test_interop", "storage/test_remote", "hub/"),
}
"""What `scripts/test --quick` leaves out, and why it takes long: it starts processes or trains, builds the simulated
device, tries thousands of faults, or asks other programs."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each test has the marker of the first line of `SLOW` that its file is on."""
    root = Path(__file__).parent
    for item in items:
        name = item.path.relative_to(root).as_posix()
        for marker, files in SLOW.items():
            if name.startswith(files):
                item.add_marker(marker)
                break


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny base: weights, config, tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture and tokenizer with other weights."""
    folder = tmp_path_factory.mktemp("models") / "other"
    make_model(seed=1).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """write_rows(rows, name='data.jsonl') -> the path of a JSONL file with these rows."""

    def write(rows: list[dict[str, Any]], name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
