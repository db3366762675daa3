"""An engine of hidden states by transformers, in the place of vLLM: what holds the process that an engine runs in.

It is no vLLM and says nothing of one (`scripts/test-vllm` runs that). What goes wrong is told by its environment.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from logitcache.capture.engines import vllm
from logitcache.capture.engines.serving import serve
from logitcache.models.head import hidden_states

FAULT, HELD = "LOGITCACHE_TEST_FAULT", "LOGITCACHE_TEST_HELD"


class HiddenEngine:
    """Two sequences a forward, without padding."""

    def __init__(self, start: Mapping[str, Any]) -> None:
        self.fault, self.waiting = os.environ.get(FAULT, ""), list[tuple[int, list[int]]]()
        if self.fault == "does not start":
            raise ValueError(
                "1 validation error for ModelConfig\n  Value error, the model is cursed. [type=value_error]"
            )
        if self.fault == "dies at the start":
            os.write(2, b"the last words\n")
            os._exit(3)
        self.facts = {"version": "0.32.0", "quantization": self.held(start["folder"])}
        if self.fault == "starts another":
            self.facts["other"] = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid
        found = AutoModelForCausalLM.from_pretrained(start["folder"], dtype=getattr(torch, start["dtype"]))
        self.model = found.eval()
        for module in self.model.modules():  # bitsandbytes rounds to bfloat16 on some CPUs, in evaluation mode
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False

    def held(self, folder: str) -> str:
        """As config.json says it, or the environment."""
        stated = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("quantization_config", {})
        told = os.environ.get(HELD, stated.get("quant_method", ""))
        return "" if told == "none" else str(told)

    def add(self, number: int, token_ids: list[int]) -> None:
        if self.fault == "refuses a sample":
            raise ValueError("the prompt is too long.\nand more")
        self.waiting.append((number, token_ids))

    @torch.no_grad()
    def step(self) -> list[tuple[int, torch.Tensor]]:
        if self.fault == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault in ("is silent", "starts another"):
            time.sleep(600)
        if self.fault == "fails":
            raise RuntimeError("a kernel failed")
        if self.fault == "runs out of memory":
            raise RuntimeError("CUDA out of memory. Tried to allocate 3 GiB")
        now, self.waiting = self.waiting[-2:], self.waiting[:-2]  # in another order than they came
        found = [(number, hidden_states(self.model, input_ids=torch.tensor([ids]))[0]) for number, ids in now]
        if self.fault.startswith("noise"):
            found = [(number, h + float(self.fault.split()[1]) * torch.randn(h.shape)) for number, h in found]
        return found

    def has_work(self) -> bool:
        return bool(self.waiting)

    def shut_down(self) -> None:
        if self.fault == "does not leave":
            time.sleep(600)


def main() -> None:
    serve(HiddenEngine)


def in_place_of_vllm(patch: pytest.MonkeyPatch, fault: str = "") -> None:
    """Whoever starts vLLM has this, of version 0.32.0."""
    patch.setattr(vllm, "PROCESS", (__name__, "main"))
    patch.setattr(vllm, "vllm_version", lambda: "0.32.0")
    patch.setenv(FAULT, fault)
