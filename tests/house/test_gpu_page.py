"""docs/gpu.md predicts what the loss takes on a card: numbers follow from its formula, bytes from the operators.

Shapes: N positions, D hidden, V vocabulary, K alternatives, G groups.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from logitcache.losses.formulas import Objective, SparseTargets
from logitcache.losses.fused import linear_loss

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"
N, D, V, K, G = 16, 12, 20_000, 4, 8

PASSES = {"aten._log_softmax.default": 3, "aten._log_softmax_backward_data.default": 2}
"""Readings of the first tensor, where there are several: each row is longer than what a multiprocessor can keep."""

TOUCH_FEW = ("aten.gather", "aten.scatter_", "aten.nll_loss_forward", "aten.mm", "aten.detach")
"""Operators that read and write K of V, or products, whose reading and writing are in their rate."""

ONLY_WRITES = ("aten.nll_loss_backward.default", "aten.copy_.default")
"""Operators that do not read the tensor of [N, V] that they are given first."""


class Moved(TorchDispatchMode):
    """Bytes that operators read and write of tensors of [N, V], or of a part of their columns."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = str(func)
        if func.is_view or (name.startswith(TOUCH_FEW) and not self._sums_by_group(name, args)):
            return made
        read = [t for t in tree_leaves((args, kwargs)) if _is_large(t)][1 if name in ONLY_WRITES else 0 :]
        written = [] if self._sums_by_group(name, args) else [t for t in tree_leaves(made) if _is_large(t)]
        passes = [PASSES.get(name, 1), *[1] * len(read)]
        self.num_bytes += sum(_bytes(t) * n for t, n in zip(read, passes, strict=False)) + sum(map(_bytes, written))
        return made

    @staticmethod
    def _sums_by_group(name: str, args: Any) -> bool:
        return name == "aten.mm.default" and args[1].shape[1] == G


def _is_large(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and len(value) == N and value.shape[1] > 1000


def _bytes(tensor: Tensor) -> int:
    return tensor.element_size() * tensor.numel()


def moved(loss: Callable[[Tensor], Tensor]) -> float:
    """Bytes a logit, from hidden states to their gradient."""
    hidden = torch.randn(N, D, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    with Moved() as found:
        loss(hidden).backward()
    return found.num_bytes / (N * V)


def head() -> nn.Linear:
    made = nn.Linear(D, V, bias=False, dtype=torch.bfloat16)
    return made.requires_grad_(False)


def ours(objective: Objective) -> Callable[[Tensor], Tensor]:
    layer, labels = head(), torch.arange(N)
    uniform = torch.full((N, K), -9.0)
    targets = SparseTargets(
        labels,
        torch.full((N,), -9.0),
        100 + torch.arange(N * K).view(N, K),
        uniform,
        torch.full((N,), -0.01),
        torch.full((N, G), -2.0),
        torch.arange(V) % G,
    )
    given = None if objective.regularizer == "none" else targets
    return lambda hidden: linear_loss(hidden, layer, labels, given, objective, torch.ones(())).loss


def plain(hidden: Tensor) -> Tensor:
    return nn.functional.cross_entropy((hidden @ head().weight.T).float(), torch.arange(N))


@pytest.fixture(scope="module")
def predicted() -> dict[str, tuple[float, float, float]]:
    """Bytes, milliseconds and the ratio to plain cross-entropy, by the first column."""
    table = PAGE.read_text(encoding="utf-8").split("| predicted |")[1].split("\n\n")[0]
    found = {}
    for row in table.splitlines()[2:]:
        what, count, *numbers = (cell.strip() for cell in row.strip("|").split("|"))
        milliseconds, ratio = map(float, numbers)
        found[what] = float(re.findall(r"[\d.]+", count)[-1]), milliseconds, ratio
    return found


def test_times_follow_from_the_formula(predicted: dict[str, tuple[float, float, float]]) -> None:
    n, d, v = 8192, 3584, 152_064
    seconds = {what: 4 * n * d * v / 700e12 + count * n * v / 3.0e12 for what, (count, _, _) in predicted.items()}
    assert len(predicted) == 6
    for what, (_, milliseconds, ratio) in predicted.items():
        assert milliseconds == pytest.approx(1e3 * seconds[what], abs=0.05), what
        assert ratio == pytest.approx(seconds[what] / seconds["plain cross-entropy"], abs=0.005), what


def test_sums_on_the_page_add_up() -> None:
    sums = re.findall(r"\| (\d[^|=]*) = (\d+) \|", PAGE.read_text(encoding="utf-8"))
    assert len(sums) == 5
    for terms, total in sums:
        parts = [int(re.findall(r"^\d+", term.strip())[0]) for term in terms.split("+")]
        assert sum(parts) == int(total), terms


def test_bytes_are_those_of_the_operators(predicted: dict[str, tuple[float, float, float]]) -> None:
    expected = {what: count for what, (count, _, _) in predicted.items()}
    assert moved(plain) == expected["plain cross-entropy"]
    slices = expected["ours, PyTorch's slices, CE alone or bucket"]
    assert moved(ours(Objective(regularizer="none"))) == slices
    assert moved(ours(Objective())) == slices
    assert moved(ours(Objective(tail="groups"))) == expected["... groups"]
