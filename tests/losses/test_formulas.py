"""The plain losses and the sliced ones against the float64 oracles, in value and gradient."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from support import oracles
from torch import Tensor

from logitcache.capture.records import slice_record
from logitcache.losses.formulas import (
    Objective,
    SparseTargets,
    regularizer_mask,
    regularizer_values,
)
from logitcache.losses.fused import linear_loss

SCALES = [1.0, 6.0, 30.0]

FORMS = [("masked-kl", "bucket"), ("masked-kl", "renormalize"), ("full-kl", "bucket")]


def make_case(
    shape: tuple[int, int, int], scale: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Any]:
    """Base logits, adapted logits [N, V] float64 (exact in float32), labels, and the oracle's record."""
    n, v, k = shape
    rng = np.random.default_rng(seed)
    base = (rng.normal(size=(n, v)) * scale).astype(np.float32).astype(np.float64)
    adapted = (base + rng.normal(size=(n, v))).astype(np.float32).astype(np.float64)
    labels = rng.integers(0, v, n)
    return base, adapted, labels, oracles.record_oracle(base, labels, k)


def as_targets(record: Any, labels: np.ndarray) -> SparseTargets:
    """The oracle's record as tensors, absent alternatives on the label as `targets.sparse_targets` puts them."""
    ids = np.where(record.alternative_ids == oracles.PAD_ID, labels[:, None], record.alternative_ids)
    columns = (record.label_logprobs, ids, record.alternative_logprobs, record.tail_logprobs)
    label, ids, kept, tail = (torch.from_numpy(np.asarray(c)) for c in columns)
    return SparseTargets(torch.from_numpy(labels), label.float(), ids.long(), kept.float(), tail.float())


def of(form: Any, logits: Tensor, targets: SparseTargets) -> Tensor:
    """The regulariser (regularizer, tail) of these logits."""
    return regularizer_values(logits, targets, Objective(*form))


def value_and_gradient(values: Tensor, logits: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Per-position values and d(sum)/d(logits) as numpy."""
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    return values.detach().double().numpy(), gradient.double().numpy()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_logits_are_used_as_they_are(form: Any, dtype: torch.dtype) -> None:
    """No further rounding: the same numbers as the float32 form of the rounded logits."""
    _, adapted, labels, record = make_case((9, 40, 8), 3.0)
    half = torch.from_numpy(adapted).to(dtype)
    targets = as_targets(record, labels)
    values = regularizer_values(half, targets, Objective(*form))
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, regularizer_values(half.float(), targets, Objective(*form)), rtol=0, atol=0)


@pytest.mark.parametrize("form", [*FORMS, ("full-kl", "renormalize")])
def test_extreme_distributions_are_finite(form: Any) -> None:
    """One-hot bases, saturated labels and logits of +-60: finite values and gradients."""
    rng = np.random.default_rng(3)
    base = rng.choice([-60.0, 0.0, 60.0], size=(40, 17))
    labels = rng.integers(0, 17, 40)
    record = oracles.record_oracle(base, labels, 5)
    logits = torch.from_numpy(rng.choice([-60.0, 0.0, 60.0], size=(40, 17))).float().requires_grad_()
    value, gradient = value_and_gradient(of(form, logits, as_targets(record, labels)), logits)
    assert np.isfinite(value).all() and np.isfinite(gradient).all()
    assert (value > -1e-4).all()


def test_saturated_positions_are_left_out_of_masked_kl_only() -> None:
    labels = torch.tensor([0, 0, 0])
    masses = [1.1e-4, 0.9e-4, 1 - math.exp(-2.0)]  # beside the label, half of it in the tail
    logprobs = torch.tensor([math.log1p(-m) for m in masses]).round(decimals=3)  # log p(y) cannot tell the first two
    halves = torch.tensor([math.log(m / 2) for m in masses])
    targets = SparseTargets(labels, logprobs, labels[:, None], halves[:, None], halves)
    assert regularizer_mask(targets, Objective()).tolist() == [True, False, True]
    assert regularizer_mask(targets, Objective("full-kl")).tolist() == [True, True, True]


@pytest.mark.parametrize("k", [1, 4, 16, 49])
@pytest.mark.parametrize("scale", SCALES)
def test_record_equals_its_oracle(k: int, scale: float) -> None:
    base, _, labels, _ = make_case((11, 50, k), scale)
    expected = oracles.record_oracle(base, labels, k)
    found = slice_record(torch.from_numpy(base).float(), torch.from_numpy(labels), k)
    np.testing.assert_array_equal(found["alternative_ids"].numpy(), expected.alternative_ids)
    for name in ("label_logprobs", "alternative_logprobs", "tail_logprobs"):
        np.testing.assert_allclose(found[name].numpy(), getattr(expected, name), rtol=1e-6, atol=1e-5)


def test_sliced_losses_hold_one_slice_of_logits() -> None:
    """No tensor of N * V elements is ever made: the largest is a slice's."""
    _, _, labels, record = make_case((64, 400, 8), 1.0)
    targets = as_targets(record, labels)
    head, hidden = torch.nn.Linear(4, 400).requires_grad_(False), torch.randn(64, 4, requires_grad=True)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.numel())
            return out

    with Watch():
        objective = Objective(tokens_per_loss_chunk=8)
        linear_loss(hidden, head, targets.label_ids, targets, objective, 1.0).loss.backward()
    assert 8 * 400 <= largest < 16 * 400


def test_the_first_token_of_a_record_is_the_argmax_among_equal_logits_too() -> None:
    """As in bfloat16: few different logits, of which many are the largest. `topk` alone has them in any order."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 600, (64, 3000), generator=generator).float() / 64
    labels = torch.randint(0, 3000, (64,), generator=generator)
    record = slice_record(logits.clone(), labels, 16)
    first, ids = record["alternative_logprobs"][:, 0], record["alternative_ids"][:, 0]
    is_label = (record["label_logprobs"] > first) | ((record["label_logprobs"] == first) & (labels < ids))
    assert torch.equal(torch.where(is_label, labels, ids), logits.argmax(dim=1))
    steps = record["alternative_logprobs"].diff(dim=1)
    assert (steps <= 0).all() and (record["alternative_ids"].diff(dim=1)[steps == 0] > 0).all()
    assert (steps == 0).any()
