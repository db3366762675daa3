"""Models larger than a device: where the parts of a model lie, and where its inputs and hidden states must go.

Owns the words of `--device-map` and what transformers is told for it. accelerate's hooks move what passes between the
parts; where token ids and targets go, which no hook moves, `input_device` and `head_device` say. Must not load
anything.
"""

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from logitcache.errors import UnsupportedModel, release_of

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""accelerate's ways of spreading layers over all GPUs, then main memory, then the disk."""

DeviceMap = str | dict[str, str | int]
"""A row of `DEVICE_MAPS`, or a device, "cpu" or "disk" for the modules of each name."""


def input_device(causal_lm: Any) -> torch.device:
    """Where token ids go: the device on which the input embedding computes."""
    return _computes_on(causal_lm.get_input_embeddings())


def head_device(causal_lm: Any) -> torch.device:
    """Where hidden states and targets go: the device on which the output embedding computes."""
    return _computes_on(causal_lm.get_output_embeddings())


def is_spread(model: nn.Module) -> bool:
    """Whether parts of a model lie on different devices, in main memory beside one, or on the disk."""
    places = _places(model)
    return len(set(places)) > 1 or "disk" in places


def offloaded_parts(model: nn.Module) -> list[str]:
    """Modules whose weights come from main memory or the disk each time they run."""
    found = {name for name, module in model.named_modules() for h in _hooks(module) if getattr(h, "offload", False)}
    return sorted(found)


def devices_of(model: nn.Module) -> list[torch.device]:
    """Every device that holds a parameter, in the order of the model."""
    return list(dict.fromkeys(p.device for p in model.parameters()))


@contextmanager
def weight_of(module: nn.Module) -> Iterator[Tensor]:
    """The whole weight of a layer while it is in place; an offloaded one is fetched, a divided one gathered.

    On every rank of a divided model at once.
    """
    with align_module_device(module):
        weight: Any = module.weight
        yield weight.full_tensor() if isinstance(weight, DTensor) else weight


@contextmanager
def spreading(device_map: DeviceMap, name: str) -> Iterator[dict[str, Any]]:
    """What `from_pretrained` is told; the folder for weights that must be rewritten to be offloaded lasts as it does.

    The caller keeps it with `keep_while`. Raises `UnsupportedModel` under torchrun, where each process would spread
    over every GPU, and for a map that the installed accelerate does not take.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UnsupportedModel(
            f"loading model {name!r} over all devices: {os.environ['WORLD_SIZE']} processes would each take every "
            "GPU. Start one process, without torchrun, or leave --device-map out."
        )
    _check_whole_on_disk(device_map, name)
    folder = tempfile.mkdtemp(prefix="logitcache-offload-")
    try:
        yield {"device_map": device_map, "offload_folder": folder}
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def keep_while(model: nn.Module, told: dict[str, Any]) -> None:
    """Let the folder of `spreading` go with the model, or at once where nothing was written to it."""
    folder = Path(told["offload_folder"])
    if any(folder.iterdir()):
        weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    else:
        folder.rmdir()


def _check_whole_on_disk(device_map: DeviceMap, name: str) -> None:
    found = version("accelerate")
    if isinstance(device_map, dict) and set(device_map.values()) == {"disk"} and release_of(found) < (1, 15):
        raise UnsupportedModel(
            f"loading model {name!r} from the disk, layer by layer: expected accelerate 1.15 or later where no part of "
            f"it lies elsewhere, found accelerate {found}. Upgrade it (pip install -U accelerate), or let one part lie "
            "in main memory, such as 'model.norm'."
        )


def _places(model: nn.Module) -> list[str]:
    found = getattr(model, "hf_device_map", None)
    return [] if found is None else [str(place) for place in found.values()]


def _computes_on(module: nn.Module) -> torch.device:
    for part in module.modules():  # of an adapter's wrapper the layer below it
        for hook in _hooks(part):
            if getattr(hook, "execution_device", None) is not None:
                return torch.device(hook.execution_device)
    weight: Any = module.weight
    return torch.device(weight.device)


def _hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks of a module."""
    hook: Any = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))
