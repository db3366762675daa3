"""Where the host waits for the device: each place that needs a number of it, or memory that only the host can give.

Owns which operators make the host wait on CUDA, and which lines of the product, or of a library, call them. Copies do
not where the memory is pinned and the copy is asked not to block. For a process on the simulated device.
"""

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import logitcache

ALWAYS = frozenset(
    f"aten.{name}"
    for name in (
        *("_local_scalar_dense.default", "is_nonzero.default", "equal.default"),  # a number, read
        *("nonzero.default", "masked_select.default", "unique_consecutive.default", "_unique2.default"),  # a size, read
        *("bincount.default", "repeat_interleave.Tensor"),
    )
)
"""Operators whose result the host needs before it can go on."""

_PRODUCT, _TORCH = (Path(module.__path__[0]) for module in (logitcache, torch))


class HostWaits(TorchDispatchMode):
    """Counts them within, by what they are and where: (kind, line of the product, innermost line outside torch)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # there composites arrive whole
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        given, made = _tensors((args, kwargs)), _tensors(out)
        if any(tensor.is_cuda for tensor in (*given, *made)):
            kind = _kind(str(func), args, kwargs, given, made)
            if kind:
                self.found[(kind, *_place())] += 1
        return out

    def lines(self) -> list[str]:
        """What was found, one place a line, the most frequent first."""
        return [f"{count} x {kind} at {ours} ({inner})" for (kind, ours, inner), count in self.found.most_common()]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _kind(name: str, args: Any, kwargs: Any, given: list[Tensor], made: list[Tensor]) -> str:
    """Why the host waits in this operator; "" where it does not."""
    if name in ALWAYS:
        return name.split(".")[1]
    if name == "aten.lift_fresh.default":
        return "tensor of the host's numbers"
    if name == "aten._to_copy.default":
        return _copy(given[0], made[0], bool(kwargs.get("non_blocking")))
    if name == "aten.copy_.default":
        return _copy(given[1], given[0], bool(kwargs.get("non_blocking") or (len(args) > 2 and args[2])))
    if name == "aten.index.Tensor" or name.startswith("aten.index_put"):
        indices = [index for index in args[1] if index is not None]
        fills = name.startswith("aten.index_put") and args[2].numel() == 1
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices) and not fills:  # a fill is masked
            return "index by a mask"
        return "index from the host" if any(not index.is_cuda for index in indices) else ""
    return ""


def _copy(source: Tensor, to: Tensor, non_blocking: bool) -> str:
    if source.is_cuda == to.is_cuda or not source.numel():
        return ""
    if source.is_cuda:
        return "" if non_blocking and to.is_pinned() else "copy to the host"
    return "" if non_blocking and source.is_pinned() else "copy from the host"


def _place() -> tuple[str, str]:
    """The innermost line of the product, "-" where a library is not called by it; the innermost line outside torch."""
    frame: FrameType | None = sys._getframe(1)
    inner = ""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path != Path(__file__) and not path.is_relative_to(_TORCH):
            line = f"{path.parent.name}/{path.name}:{frame.f_lineno}"
            inner = inner or line
            if path.is_relative_to(_PRODUCT):
                return line, inner
        frame = frame.f_back
    return "-", inner or "-"
