"""Smoothed cross-entropy, plain and sliced, against its formula in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import oracles
from support.exact_head import ExactHead
from support.numerics_cases import EPSILON, float32, make_case
from support.oracles import FloatArray, IntArray
from torch import Tensor, nn

from logitcache.losses.formulas import Objective, cross_entropy
from logitcache.losses.fused import LinearLoss, linear_loss

SHAPES = [(7, 2), (5, 3), (13, 50), (9, 252), (3, 507)]


def smoothed(logits: FloatArray, labels: IntArray, epsilon: float) -> tuple[FloatArray, FloatArray]:
    """-(1 - e) log q(y) - e mean_c log q(c), [N], and its gradient by the logits, q - (1 - e) 1_y - e / V."""
    values, gradient = np.zeros(len(labels)), np.zeros_like(logits)
    for i, (row, label) in enumerate(zip(logits, labels, strict=True)):
        log_q = oracles.log_softmax(row)
        values[i] = -(1 - epsilon) * log_q[label] - epsilon * log_q.mean()
        gradient[i] = np.exp(log_q) - epsilon / len(row)
        gradient[i, label] -= 1 - epsilon
    return values, gradient


def of(epsilon: float, chunk: int | None = 3) -> Objective:
    return Objective("none", label_smoothing=epsilon, tokens_per_loss_chunk=chunk)


def test_the_formula_is_that_of_torch() -> None:
    z = np.random.default_rng(0).normal(size=(5, 11)) * 4
    labels = np.arange(5)
    leaf = torch.from_numpy(z).requires_grad_()
    values = nn.functional.cross_entropy(leaf, torch.from_numpy(labels), reduction="none", label_smoothing=0.3)
    values.sum().backward()
    expected, gradient = smoothed(z, labels, 0.3)
    np.testing.assert_allclose(values.detach().numpy(), expected, rtol=1e-13)
    assert leaf.grad is not None
    np.testing.assert_allclose(leaf.grad.numpy(), gradient, rtol=0, atol=1e-14)


@pytest.mark.parametrize("epsilon", [1e-3, 0.1, 0.9])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (6.0, 0.0), (30.0, 0.0), (3.0, 1000.0)])
def test_values_and_gradients(shape: tuple[int, int], scale: float, offset: float, epsilon: float) -> None:
    """Plain and sliced, within rounding errors of the logits as differences: a common offset costs no digits."""
    case = make_case((*shape, 1), scale)
    z = float32(case.adapted + offset)
    case.adapted[:] = z
    values, gradient = smoothed(z, case.labels, epsilon)
    unit = EPSILON * max(1.0, float(np.ptp(z, axis=1).max()))
    labels = torch.from_numpy(case.labels)
    plain = cross_entropy(case.logits, labels, epsilon)
    assert plain.dtype == torch.float32
    np.testing.assert_allclose(plain.numpy(), values, rtol=4 * EPSILON, atol=4 * EPSILON * np.abs(z).max())
    for chunk in (1, 3, 128, None):
        head = ExactHead(case)
        result = linear_loss(head.hidden, head.linear, labels, None, of(epsilon, chunk), 1.0)
        assert float(result.kl) == 0 and result.ce.dtype == torch.float32
        for found in (result.loss, result.ce):
            assert float(found.detach()) == pytest.approx(values.sum(), rel=8 * EPSILON, abs=4 * len(z) * unit)
        result.loss.backward()
        np.testing.assert_allclose(head.to_logits(head.hidden.grad), gradient, rtol=8 * EPSILON, atol=4 * unit)


def test_smoothing_changes_the_numbers() -> None:
    """So that the bounds above mean something."""
    case = make_case((13, 50, 1), 6.0)
    (plain, _), (changed, _) = (smoothed(case.adapted, case.labels, e) for e in (0.0, 1e-3))
    assert np.abs(plain - changed).min() > 100 * case.unit()


class Head(nn.Module):
    """A trained linear layer, and a soft-cap on its logits."""

    def __init__(self, dtype: torch.dtype, cap: float | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.cap = nn.Linear(16, 211, dtype=dtype), cap

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.linear(hidden)
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_heads_in_every_precision(dtype: torch.dtype, cap: float | None) -> None:
    """Value and gradients by hidden states and head: as near to float64 on the same logits as torch's own form is."""
    labels = torch.arange(40) * 5

    def gradients(loss_of: Callable[[Head, Tensor], Tensor], exact: bool) -> list[Tensor]:
        head = Head(dtype, cap)
        torch.manual_seed(1)
        hidden = (2 * torch.randn(40, 16)).to(dtype)
        if exact:
            head, hidden = head.double(), hidden.double()
        hidden.requires_grad_()
        loss = loss_of(head, hidden)
        loss.backward()
        found = [hidden.grad, *(p.grad for p in head.parameters())]
        return [loss.detach().double(), *(g.double() for g in found if g is not None)]

    def torchs(head: Head, hidden: Tensor) -> Tensor:
        logits = head(hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return nn.functional.cross_entropy(logits, labels, label_smoothing=0.2, reduction="sum")

    def ours(head: Head, hidden: Tensor) -> Tensor:
        result: LinearLoss = linear_loss(hidden, head, labels, None, of(0.2, 16), 1.0, tuple(head.parameters()))
        return result.loss

    exact, naive, found = gradients(torchs, True), gradients(torchs, False), gradients(ours, False)
    for e, n, f in zip(exact, naive, found, strict=True):
        error, allowed = (f - e).norm(), (n - e).norm()
        assert error <= 2 * allowed + 1e-6 * e.norm()


def test_a_token_that_cannot_occur_makes_it_infinite() -> None:
    """And never NaN: the trainer stops at an infinite loss, whose gradient is still q - (1 - e) 1_y - e / V."""
    case = make_case((4, 9, 1), 1.0)
    bias = torch.zeros(9)
    bias[next(c for c in range(9) if c not in case.labels)] = -torch.inf
    labels = torch.from_numpy(case.labels)
    assert bool((cross_entropy(case.logits + bias, labels, 0.1) == torch.inf).all())
    hidden = case.logits.requires_grad_()
    result = linear_loss(hidden, lambda h: h + bias, labels, None, of(0.1, 2), 1.0)
    assert float(result.ce) == float(result.loss.detach()) == np.inf
    result.loss.backward()
    _, gradient = smoothed(np.where(np.isinf(bias.numpy()), -1e3, case.adapted), case.labels, 0.1)
    assert hidden.grad is not None
    np.testing.assert_allclose(hidden.grad.numpy(), gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes", [{"label_smoothing": e} for e in (-0.1, 1.0, float("nan"))])
def test_what_is_no_share_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="label_smoothing: expected a number of 0 or more and below 1"):
        Objective("none", **changes)


@pytest.mark.parametrize("regularizer", ["masked-kl", "full-kl"])
def test_with_a_regulariser_it_is_refused(regularizer: Any) -> None:
    with pytest.raises(ValueError, match=f"not with {regularizer}: .* two answers .* Use regularizer none"):
        Objective(regularizer, label_smoothing=0.1)
