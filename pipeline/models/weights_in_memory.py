"""Are the weights of a model in memory those of a checkpoint? A fixed sample of rows of every tensor, bit for bit.

Owns where the checkpoint of a model in memory lies, under which name a stored tensor stands in memory, which tensors
there are an adapter's, and why one cannot be compared: packed, divided over processes, rewritten by an adapter,
converted while it was loaded. Must not
know caches, nor decide what a difference means. Trade-off: a sample, so that a model of any size takes seconds; single
values that changed between the rows are not seen, a matrix that changed is.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from logitcache.storage.identity import weight_files, weights_fingerprint

from .head import causal_lm_of, unwrapped

NUM_ROWS = 8
"""Of every tensor, spread evenly from the first to the last."""

MAX_ROW = 2**16
"""Values of a row that are compared, and of a vector."""

_FLOATS = frozenset(("F64", "F32", "F16", "BF16"))
"""Of safetensors; a tensor of anything else is packed."""

_WRAPPERS = frozenset(
    (
        *("base_layer", "original_module", "token_adapter"),  # PEFT's
        *("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"),  # torch's
    )
)
"""Names of modules that stand around the one that a checkpoint knows."""

_KEEPS_WEIGHTS = frozenset(
    (
        *("ADALORA", "BOFT", "FOURIERFT", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "OFT", "RANDLORA"),
        *("TRAINABLE_TOKENS", "VBLORA", "VERA"),
    )
)
"""Kinds of PEFT's, besides LoRA, whose start leaves the weights below them as they were."""

_LORA_KEEPS_WEIGHTS = frozenset(("gaussian", "eva", "orthogonal", "mica"))
"""`init_lora_weights` that are texts and leave the weights as they were; pissa, olora, corda, loftq and lora_ga rewrite
them."""

_TRANSFORMED = (torch.bfloat16, torch.float16)
"""A float32 weight may have been held in one of these before."""


@dataclass(frozen=True)
class WeightsCompared:
    """A model in memory against a checkpoint, by the names of the checkpoint."""

    num_compared: int
    #: Tensors that have other values.
    differing: tuple[str, ...]
    #: Why tensors were not compared, and how many each.
    left_out: Mapping[str, int]
    #: Parameters of the base in memory, by their names there, that the checkpoint has not.
    not_stored: tuple[str, ...] = ()

    @property
    def said(self) -> str:
        """What was left out, a phrase; "" where nothing was."""
        total = self.num_compared + sum(self.left_out.values())
        parts = [f"{number} {why}" for why, number in self.left_out.items()]
        return f"{', '.join(parts)} (of {total} tensors of the checkpoint)" if parts else ""


def own_checkpoint(causal_lm: PreTrainedModel) -> Path | None:
    """`local_checkpoint` of what a model in memory names, in the revision that it was loaded from."""
    return local_checkpoint(causal_lm.name_or_path or "", getattr(causal_lm.config, "_commit_hash", None))


def local_checkpoint(name: str, revision: str | None = None) -> Path | None:
    """The folder of a model, or the local snapshot of a hub id; None where there is none. Nothing is downloaded."""
    if not name:
        return None
    try:
        if Path(name).is_dir():
            return Path(name)
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except Exception:  # the hub client raises many kinds: not in its cache, no hub id at all; too long for a path
        return None


def has_weights(folder: Path) -> bool:
    """Whether a checkpoint's files of weights are in this folder."""
    try:
        return all(file.is_file() for file in weight_files(folder))
    except (OSError, ValueError, KeyError):
        return False


def fingerprint_in(folder: Path) -> str | None:
    """`weights_fingerprint` of the folder, read once while its files stay as they are; None where it has no weights."""
    try:
        stats = [(file.resolve(), file.stat()) for file in weight_files(folder)]
        return _fingerprint(folder, tuple((str(f), s.st_size, s.st_mtime_ns) for f, s in stats))
    except (OSError, ValueError, KeyError):
        return None


@lru_cache(maxsize=8)
def _fingerprint(folder: Path, _files: tuple[tuple[str, int, int], ...]) -> str:
    return weights_fingerprint(folder)


def compare_weights(
    model: nn.Module, folder: Path, chosen: Callable[[Tensor], bool] = lambda _: True, exact: bool = False
) -> WeightsCompared:
    """The tensors of the checkpoint in this folder against those in memory, cast to their dtype.

    chosen: of the tensors in memory, those to compare; others are not counted. A float32 weight that is the stored one
    rounded to 16 bits is the same, since it was loaded so, and then widened; exact: it is another one.
    Raises OSError and ValueError where the files cannot be read.
    """
    causal_lm = causal_lm_of(model)
    here, rename = _tensors_of(causal_lm), _renamed(causal_lm)
    rewritten = _rewritten(model, causal_lm)
    num_compared, differing, left_out, stored_here = 0, [], Counter[str](), set[int]()
    for name, stored in _stored(folder):
        found = rename(name)
        tensor = None if found is None else _look_up(here, found, causal_lm.base_model_prefix)
        if tensor is not None:
            stored_here.add(id(tensor))
            if not chosen(tensor):
                continue
        why = "of other names in memory" if tensor is None else _not_comparable(tensor, stored)
        if tensor is not None and not why and id(tensor) in rewritten:
            why = "rewritten by the adapter"
        if tensor is None or why:
            left_out[why] += 1
            continue
        num_compared += 1
        if not _same_rows(tensor, stored, exact):
            differing.append(name)
    not_stored = tuple(name for name, tensor in base_parameters(causal_lm) if id(tensor) not in stored_here)
    return WeightsCompared(num_compared, tuple(differing), dict(left_out), not_stored)


def base_parameters(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a model without those that PEFT's layers have beside them, by name, tied ones as often as they
    are used."""
    if isinstance(module, BaseTunerLayer):
        yield from base_parameters(module.get_base_layer(), prefix)
    elif isinstance(module, AuxiliaryTrainingWrapper):
        yield from base_parameters(module.original_module, prefix)
    else:
        yield from (
            (f"{prefix}{name}", p) for name, p in module.named_parameters(recurse=False, remove_duplicate=False)
        )
        for name, child in module.named_children():
            yield from base_parameters(child, f"{prefix}{name}.")


def _stored(folder: Path) -> Iterator[tuple[str, Any]]:
    """The name and the lazy slice of every tensor of a checkpoint."""
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                yield name, tensors.get_slice(name)


def _tensors_of(causal_lm: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and buffers by the names that they have without wrappers."""
    named = [*causal_lm.named_parameters(remove_duplicate=False), *causal_lm.named_buffers(remove_duplicate=False)]
    return {without_wrappers(name): tensor for name, tensor in named}


def without_wrappers(name: str) -> str:
    """The name of a tensor or a module as its checkpoint knows it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _look_up(here: Mapping[str, Tensor], name: str, prefix: str) -> Tensor | None:
    """A checkpoint of a body alone has its names without the body's own, and the other way round."""
    for spelt in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        if spelt in here:
            return here[spelt]
    return None


def _renamed(causal_lm: PreTrainedModel) -> Callable[[str], str | None]:
    """Name in the checkpoint -> name in memory, as transformers loads it; None where it makes another tensor of it."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    transforms: list[Any] = get_model_conversion_mapping(causal_lm)

    def rename(name: str) -> str | None:
        for transform in transforms:
            name, matched = transform.rename_source_key(name)
            if matched is not None and hasattr(transform, "operations"):
                return None
        return name

    return rename


def _not_comparable(tensor: Tensor, stored: Any) -> str:
    """Why; "" where they can be."""
    if hasattr(tensor, "to_local") or hasattr(tensor, "ds_id"):
        return "divided over processes"
    if tensor.is_meta:
        return "not in memory"
    if stored.get_dtype() not in _FLOATS or not tensor.is_floating_point():
        return "packed"
    return "" if tuple(tensor.shape) == tuple(stored.get_shape()) else "of other shapes in memory"


def _same_rows(tensor: Tensor, stored: Any, exact: bool) -> bool:
    shape = tuple(stored.get_shape())
    if not shape:
        return _same(tensor.detach().cpu(), torch.as_tensor(stored[...]), exact)
    if len(shape) == 1:
        return _same(tensor.detach()[:MAX_ROW].cpu(), stored[:MAX_ROW], exact)
    width = min(shape[1], max(1, MAX_ROW // math.prod(shape[2:])))
    places = torch.linspace(0, shape[0] - 1, min(shape[0], NUM_ROWS), dtype=torch.float64).long()
    ours = tensor.detach()[:, :width].index_select(0, places.to(tensor.device)).cpu()
    return _same(ours, torch.cat([stored[i : i + 1, :width] for i in places.tolist()]), exact)


def _same(ours: Tensor, theirs: Tensor, exact: bool) -> bool:
    if torch.equal(ours, theirs.to(ours.dtype)):
        return True
    return (
        not exact and ours.dtype == torch.float32 and any(torch.equal(ours, theirs.to(t).float()) for t in _TRANSFORMED)
    )


def _rewritten(model: nn.Module, causal_lm: PreTrainedModel) -> set[int]:
    """Ids of the weights below an adapter that may have taken a part out of them at its start."""
    configs = getattr(unwrapped(model), "peft_config", None) or getattr(causal_lm, "peft_config", None) or {}
    if all(_keeps_weights(config) for config in configs.values()):
        return set()
    layers = [module for module in causal_lm.modules() if isinstance(module, BaseTunerLayer)]
    return {id(tensor) for layer in layers for tensor in layer.get_base_layer().parameters()}


def _keeps_weights(config: Any) -> bool:
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        return kind in _KEEPS_WEIGHTS or bool(getattr(config, "is_prompt_learning", False))
    start = getattr(config, "init_lora_weights", True)
    return not isinstance(start, str) or start.lower() in _LORA_KEEPS_WEIGHTS
