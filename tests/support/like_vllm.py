"""Classes that look like vLLM's, for tests without it: what the adapter reads, made from a transformers model.

vLLM cannot run where these tests do (no GPU). The shapes follow the source of vLLM 0.33.0 and 0.32.0, the same here:
vllm/logprobs.py (`Logprob`, `FlatLogprobs`, `append_logprobs_for_next_position`), vllm/outputs.py, and the sampler,
whose rank of the prompt token counts the logits that are not below its own. Shares no code with the package.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM


@dataclass
class LikeLogprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class LikeFlatLogprobs:
    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int | None] = field(default_factory=list)

    def add(self, rows: list[tuple[int, float, int]]) -> None:
        self.start_indices.append(len(self.logprobs))
        for token, logprob, rank in rows:
            self.token_ids.append(token)
            self.logprobs.append(logprob)
            self.ranks.append(rank)
        self.end_indices.append(len(self.logprobs))

    def __len__(self) -> int:
        return len(self.start_indices)


@dataclass
class LikeRequestOutput:
    prompt_token_ids: list[int] | None
    prompt_logprobs: Any


def entries_of(logits: torch.Tensor, tokens: list[int], k: int) -> list[list[tuple[int, float, int]]]:
    """For each token after the first: (id, logprob, rank), the prompt token first, then the k most probable."""
    found = []
    for row, token in zip(logits.float()[:-1], tokens[1:], strict=True):
        logprobs = row.log_softmax(dim=0)
        top = row.topk(k)
        rank = int((row >= row[token]).sum())
        listed = [(int(i), float(logprobs[i]), place) for place, i in enumerate(top.indices, start=1)]
        found.append([(token, float(logprobs[token]), rank), *listed])
    return found


def output_of(logits: torch.Tensor, tokens: list[int], k: int, flat: bool) -> LikeRequestOutput:
    """logits: [n, V] of the n tokens."""
    entries = entries_of(logits, tokens, k)
    if flat:
        container = LikeFlatLogprobs()
        container.add([])
        for rows in entries:
            container.add(rows)
        return LikeRequestOutput(tokens, container)
    dicts = [{token: LikeLogprob(logprob, rank) for token, logprob, rank in rows} for rows in entries]
    return LikeRequestOutput(tokens, [None, *dicts])


@dataclass
class LikeSamplingParams:
    max_tokens: int
    temperature: float
    prompt_logprobs: int
    detokenize: bool
    flat_logprobs: bool = False


class LikeLLM:
    """Runs a folder by transformers, without padding; refuses what vLLM would, and says how it holds the weights."""

    told: dict[str, Any]
    noise = 0.0

    def __init__(self, model: str, dtype: str, max_logprobs: int, max_model_len: int, **told: Any) -> None:
        LikeLLM.told = {**told, "dtype": dtype, "max_logprobs": max_logprobs, "max_model_len": max_model_len}
        if max_model_len > 256:
            raise ValueError(f"User-specified max_model_len ({max_model_len}) is greater than the derived 256\nmore")
        self.max_logprobs, self.max_model_len = max_logprobs, max_model_len
        stated = json.loads((Path(model) / "config.json").read_text(encoding="utf-8")).get("quantization_config", {})
        method = {"gptq": "gptq_marlin"}.get(stated.get("quant_method"), stated.get("quant_method"))
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(quantization=method))
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        for module in self.model.modules():  # bitsandbytes rounds to bfloat16 on some CPUs, in evaluation mode
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False

    @torch.no_grad()
    def generate(self, prompts: list[dict[str, list[int]]], params: LikeSamplingParams, use_tqdm: bool) -> list[Any]:
        if params.prompt_logprobs > self.max_logprobs:
            raise ValueError("Requested prompt logprobs greater than max allowed")
        outputs = []
        for prompt in prompts:
            tokens = prompt["prompt_token_ids"]
            if len(tokens) + params.max_tokens > self.max_model_len:
                raise ValueError("The decoder prompt is longer than the maximum model length")
            logits = self.model(torch.tensor([tokens])).logits[0].float()
            torch.manual_seed(0)
            logits += self.noise * torch.randn(logits.shape)
            outputs.append(output_of(logits, tokens, params.prompt_logprobs, params.flat_logprobs))
        return outputs


def like_vllm(version: str = "0.33.0") -> ModuleType:
    """A module to stand for `vllm` in sys.modules."""
    module = ModuleType("vllm")
    module.__dict__.update(LLM=LikeLLM, SamplingParams=LikeSamplingParams, __version__=version)
    return module
