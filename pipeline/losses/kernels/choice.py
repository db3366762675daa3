"""Whether the kernels make the loss: where Triton and a CUDA device are, and a trial there came out right.

Owns the choice, alone: which objectives they serve, the machines and dtypes they run on, and how many rows a slice then
has. Whatever they are not chosen for goes through PyTorch's slices, with the same numbers. Imports nothing of Triton
unless it is there; on a CPU only where TRITON_INTERPRET=1 asks for it, which is for tests.
"""

import os
import warnings
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from logitcache.losses.compared import Tail
from logitcache.losses.objective import Objective

MOST_GROUPS = 256
"""Of the tail: with more, a program's sums by group would leave its registers."""

_LEAST_CAPABILITY = (8, 0)
"""Of a card: the first with the products of `programs`."""

_LEAST_ROWS, _MOST_ROWS, _ROWS_A_TILE = 1024, 4096, 128
"""Of a slice: enough for the product that makes its gradient, and a multiple of what such a product has at a time."""

_TRIAL_SHAPES, _TRIAL_GROUPS = {"cpu": (40, 1003), "cuda": (200, 17_003)}, 20
"""Rows and columns by the kind of device: such that each program goes through several tiles, and a row has several."""

_TRIAL_TOLERANCE = 1e-4
"""Of sums and gradient, beside the rounding of the dtype: far above that of a right kernel, far below what is wrong."""


def serve(objective: Objective, num_groups: int) -> bool:
    """Whether the objective is one that the kernels make. num_groups: of the tail, 0 without groups."""
    return not objective.label_smoothing and (objective.tail != "groups" or num_groups <= MOST_GROUPS)


def are_there(device: torch.device) -> bool:
    """Whether Triton is, and a card that its kernels are made for, or its interpreter."""
    if find_spec("triton") is None:
        return False
    if device.type == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" or torch.version.cuda is None:  # ROCm's device is called cuda too
        return False
    return torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY


@cache
def are_usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether they run there, on logits of this dtype. The first call on a card compiles them and tries them out.

    Where they fail or differ from PyTorch, a warning says so, and no slice of this process goes through them.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) or not are_there(device):
        return False
    try:
        fault = _fault(device, dtype)
    except Exception as error:  # of the compiler, the linker or the driver: each has types of its own
        fault = f"{type(error).__name__}: {error}"
    if fault is not None:
        warnings.warn(
            f"making the loss on {device} of logits in {dtype}: expected Triton's kernels to do what PyTorch does, "
            f"found {fault}. PyTorch's slices make the loss instead: the same numbers, in more time. Report it.",
            stacklevel=2,
        )
    return fault is None


def num_rows(num_bytes: int, vocab_size: int, dtype: torch.dtype) -> int:
    """Of a slice of logits of about this size."""
    fitting = num_bytes // (vocab_size * dtype.itemsize) // _ROWS_A_TILE * _ROWS_A_TILE
    return min(max(fitting, _LEAST_ROWS), _MOST_ROWS)


def kernel_tail(buffer: Tensor, groups: Tensor | None, num_groups: int) -> Tail:
    """As `tail.KernelTail` has it."""
    from .tail import KernelTail

    return KernelTail(buffer, groups, num_groups)


@torch.no_grad()
def _fault(device: torch.device, dtype: torch.dtype) -> str | None:
    """What a small slice shows to be wrong, without groups and with them; None: nothing."""
    rows, vocab = _TRIAL_SHAPES[device.type]
    numbers = torch.arange(rows * vocab, device=device, dtype=torch.float32).view(rows, vocab)
    z = (12 * (numbers * 0.7391).sin()).to(dtype)
    z[:, 5::7] = -torch.inf
    groups = torch.arange(vocab, device=device) * 7 % _TRIAL_GROUPS
    one_hot = torch.nn.functional.one_hot(groups, _TRIAL_GROUPS).float()
    # of one sign: where two cancel, a right kernel's rounding would be as large as a fault
    factor = 1.5 + (numbers[:, :1] * 0.37).cos()
    parts = 1.5 + (numbers[:, :_TRIAL_GROUPS] * 0.61).sin()
    rounding, least = _TRIAL_TOLERANCE + 2 * torch.finfo(dtype).eps, max(torch.finfo(dtype).tiny, 1e-9)
    for by_group in (False, True):
        found = []
        for tail in (kernel_tail(z.clone(), groups if by_group else None, _TRIAL_GROUPS), Tail(z.float())):
            sums = [tail.log_sum, tail.split(groups, one_hot)] if by_group else [tail.log_sum]
            tail.scale(factor, parts if by_group else None)
            found.append([*sums, tail.buffer.float()])
        names = ["sums", *(["sums by group"] if by_group else []), "gradient"]
        for name, one, two in zip(names, *found, strict=True):
            relative, absolute = (rounding, least) if name == "gradient" else (0.0, _TRIAL_TOLERANCE)
            if not torch.allclose(one, two, rtol=relative, atol=absolute):
                return f"other {name} of a slice of {list(z.shape)} logits"
    return None
