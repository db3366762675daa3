"""What vLLM is told beside its model: arguments of its own, the devices that are its, and the variables of its process.

Owns which arguments a user may give, and that workers of one machine do not share GPUs. Must not start anything.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from logitcache.errors import InputNotFound, InvalidSettings
from logitcache.models.loading import pick_device
from logitcache.models.tf32 import tf32_is_on

SET_BY_FLAGS = {
    "dtype": "--dtype",
    "max_model_len": "--max-length",
    "max_num_batched_tokens": "--batch-tokens",
    "model": "--model",
    "tensor_parallel_size": "--tensor-parallel",
}
"""Arguments of vLLM's that have a flag here."""

SET_HERE = (
    *("tokenizer", "skip_tokenizer_init", "trust_remote_code", "runner", "convert", "pooler_config", "hf_overrides"),
    *("enable_prefix_caching", "quantization", "quantization_config", "load_format", "config_format", "revision"),
    *("hf_config_path", "model_weights", "model_class_overrides", "distributed_executor_backend", "seed"),
    *("disable_log_stats",),
)
"""Arguments of vLLM's that the record depends on, or which model it is of."""

_TORCHRUN = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_NAME"),
    *("ROLE_RANK", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
)
"""What torchrun says to its processes, and is not meant for an engine that one of them starts."""


def arguments_of(given: Sequence[str]) -> dict[str, Any]:
    """vLLM's own arguments by name, of name=value each; a value is JSON, or the text that it is. Raises
    `InvalidSettings`."""
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name.isidentifier():
            raise InvalidSettings(f"--engine-arg {text}: expected name=value, as gpu_memory_utilization=0.7.")
        if name in SET_BY_FLAGS:
            raise InvalidSettings(f"--engine-arg {name}: use {SET_BY_FLAGS[name]}.")
        if name in SET_HERE:
            raise InvalidSettings(
                f"--engine-arg {name}: the record depends on it, so that it is set here. Leave it out."
            )
        if name in found:
            raise InvalidSettings(f"--engine-arg {name}: given twice. Leave one out.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def engine_device(name: str, num_gpus: int) -> torch.device:
    """Where records are made: the CPU, or the first of the GPUs that the engine of this process has. name: as of
    `pick_device`."""
    device = pick_device(name)
    return device if device.type == "cpu" else torch.device("cuda", (device.index or 0) * num_gpus)


def visible_devices(num_gpus: int, device: torch.device) -> list[str]:
    """What the engine of this process may see of CUDA's devices: those that no other process of this machine has, none
    for a CPU. Raises `InputNotFound` where there are too few."""
    if device.type != "cuda":
        return []
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    said = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    there = [d.strip() for d in said.split(",")] if said else [str(i) for i in range(torch.cuda.device_count())]
    mine = there[rank * num_gpus : (rank + 1) * num_gpus]
    if len(mine) < num_gpus:
        raise InputNotFound(
            f"starting vLLM on {num_gpus} GPUs (--tensor-parallel) for process {rank} of this machine: expected "
            f"{(rank + 1) * num_gpus} of them, found {len(there)}. Start fewer processes, or divide the model less."
        )
    return mine


def engine_environment(ours: Mapping[str, str], devices: Sequence[str]) -> dict[str, str]:
    """The variables of the engine's process: this one's, but for what torchrun says, these devices, and products of
    float32 as the identity has them."""
    kept = {k: v for k, v in ours.items() if k not in _TORCHRUN and not k.startswith("TORCHELASTIC_")}
    kept.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    kept.setdefault("VLLM_NO_USAGE_STATS", "1")
    kept["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # it is in a process of its own already
    kept["VLLM_FLOAT32_MATMUL_PRECISION"] = "high" if tf32_is_on() else "highest"
    kept["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    return kept
