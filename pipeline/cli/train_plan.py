"""`logitcache train --plan`: the bytes of a step, told before anything is loaded.

Owns the lines; the numbers are those of `training.memory`.
"""

from typing import TYPE_CHECKING

from logitcache.adapters.settings import NO_ADAPTER
from logitcache.training.settings import RunSettings

from .common import human_bytes, say

if TYPE_CHECKING:
    from logitcache.storage import LogitCache
    from logitcache.training.anchors import Anchor
    from logitcache.training.memory import StepMemory

DEFAULT_LENGTH = 1024
"""Tokens of a sample, where neither the line nor a cache says how many."""


def print_plan(
    model: str,
    settings: RunSettings,
    max_length: int | None,
    cache: "LogitCache | None",
    anchors: "list[Anchor]",
    revision: str | None = None,
    attention: str | None = None,
) -> None:
    """Say what a step takes, from the model's config.json."""
    from logitcache.models.loading import read_shape
    from logitcache.training.job import names_of_layers
    from logitcache.training.memory import check_reckonable, step_memory

    check_reckonable(settings.trainer)
    config, dtype = read_shape(model, settings.loading.dtype, revision)
    length = max_length or (DEFAULT_LENGTH if cache is None else cache.manifest.capture.max_length)
    with names_of_layers(model, settings.adapter):
        found = step_memory(
            *(config, dtype, settings.adapter, settings.training, length),
            load_in=settings.loading.load_in,
            device="cpu" if settings.loading.device == "cpu" else "cuda",
            anchor_tokens=sum(a.settings.batch * a.open_cache.manifest.capture.max_length for a in anchors),
            with_fisher=settings.penalty is not None and settings.penalty.kind == "ewc",
            attention=attention,
        )
    stated = settings.loading.load_in or str(dtype).removeprefix("torch.")
    for name, value in _lines(model, stated, settings, found):
        say(f"{name:11}{value}")


def _lines(model: str, stated: str, settings: RunSettings, found: "StepMemory") -> list[tuple[str, str]]:
    kind, whole = settings.adapter.kind, settings.adapter.kind == NO_ADAPTER
    what = "every weight" if whole else f"an adapter ({kind}) of {_count(found.num_trained)}"
    tokens = f"{found.rows} x {found.width:,} tokens" + (f" and {found.anchor_tokens:,}" if found.anchor_tokens else "")
    each = human_bytes(found.kept / (found.rows * found.width + found.anchor_tokens))
    fisher = f"{human_bytes(found.fisher)}: of ewc, a float32 of each adapted weight"
    return [
        ("model", f"{model}: {_count(found.num_weights)} weights; trained is {what}, in float32"),
        ("weights", human_bytes(found.weights) + ("" if whole else f" in {stated}")),
        ("trained", f"{human_bytes(found.trained)}, its gradients {human_bytes(found.gradients)}"),
        ("optimizer", f"{human_bytes(found.optimizer)}: two moments of AdamW"),
        *([("fisher", fisher)] if found.fisher else []),
        ("kept", f"{human_bytes(found.kept)} for the backward of {tokens}, {each} a token"),
        ("", f"{human_bytes(found.kept_checkpointed)} with --gradient-checkpointing"),
        ("head", f"{human_bytes(found.head)}: a slice of the loss, and the gradient of all hidden states"),
        ("in all", human_bytes(found.total_without) + _set(not found.checkpointed)),
        ("", f"{human_bytes(found.total_with)} with --gradient-checkpointing" + _set(found.checkpointed)),
        *_device_lines(settings, found),
        ("", "Reckoned from the config: without what kernels need for a moment. Nothing was loaded or written."),
    ]


def _set(is_set: bool) -> str:
    return ", as this run is set" if is_set else ""


def _device_lines(settings: RunSettings, found: "StepMemory") -> list[tuple[str, str]]:
    """What the device of this machine has, and whether that is enough; nothing where there is no GPU."""
    import torch

    if settings.loading.device == "cpu" or not torch.cuda.is_available():
        return []
    free, there = torch.cuda.mem_get_info()
    fits = "it fits" if found.total < free else "it does not fit: a smaller --batch-tokens, or --gradient-checkpointing"
    return [("device", f"{human_bytes(there)}, {human_bytes(free)} of them free: {fits}")]


def _count(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:,}"
