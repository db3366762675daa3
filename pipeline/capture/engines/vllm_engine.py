"""vLLM as an engine of hidden states, within its process.

Owns what vLLM is told: it runs the model as one that embeds tokens, whose last hidden states it returns. Nothing of it
is imported by the job. Written against 0.32.0, and run with it (`scripts/test-vllm`). Must not know samples or caches.
"""

import dataclasses
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .serving import serve

_TASK = "token_embed"


class VllmEngine:
    """An `Engine`. start: folder, dtype, max_length, batch_tokens, num_gpus, and arguments of vLLM's own by name."""

    def __init__(self, start: Mapping[str, Any]) -> None:
        vllm = import_module("vllm")
        given = dict(start["arguments"])
        unknown = sorted(given.keys() - {field.name for field in dataclasses.fields(vllm.EngineArgs)})
        if unknown:
            raise ValueError(f"--engine-arg {unknown[0]}: vLLM {vllm.__version__} has no argument of that name")
        told = {
            "model": start["folder"],
            "skip_tokenizer_init": True,  # it is given token ids
            "trust_remote_code": False,
            "runner": "pooling",
            "convert": "embed",
            "pooler_config": import_module("vllm.config").PoolerConfig(task=_TASK, use_activation=False),
            "hf_overrides": {"head_dtype": "model"},
            "enable_prefix_caching": False,  # a position that is not computed has no hidden state
            "load_format": "safetensors",  # the files that were fingerprinted, not others beside them
            "config_format": "hf",
            "dtype": start["dtype"],
            "max_model_len": start["max_length"],
            "max_num_batched_tokens": max(start["batch_tokens"], start["max_length"]),
            "tensor_parallel_size": start["num_gpus"],
            "disable_log_stats": True,
            "seed": 0,
            "distributed_executor_backend": "uni" if start["num_gpus"] == 1 else "mp",  # what a group's end ends
        }
        self._engine = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**{**told, **given}))
        self._params = vllm.PoolingParams(task=_TASK, use_activation=False)
        held = self._engine.model_config.quantization
        self.facts = {"version": str(vllm.__version__), "quantization": str(held) if held else ""}

    def add(self, number: int, token_ids: list[int]) -> None:
        """As a request of its own."""
        self._engine.add_request(str(number), {"prompt_token_ids": token_ids}, self._params.clone())

    def step(self) -> list[tuple[int, Tensor]]:
        """One step of its scheduler."""
        done = []
        for output in self._engine.step():
            if output.finished:
                hidden = torch.as_tensor(output.outputs.data).cpu()
                done.append((int(output.request_id), hidden))
                if len(hidden) != len(output.prompt_token_ids):
                    raise RuntimeError(
                        f"expected a hidden state of each of {len(output.prompt_token_ids)} tokens, found {len(hidden)}"
                    )
        return done

    def has_work(self) -> bool:
        """Whether requests are not done."""
        return bool(self._engine.has_unfinished_requests())

    def shut_down(self) -> None:
        """vLLM's own."""
        self._engine.engine_core.shutdown()


def main() -> None:
    """The process."""
    serve(VllmEngine)
