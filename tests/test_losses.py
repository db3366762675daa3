"""The plain losses and the sliced ones against the float64 oracles, in value and gradient."""

import math
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor

from logitcache.pipeline.fused import linear_loss
from logitcache.pipeline.losses import (
    Objective,
    SparseTargets,
    cross_entropy,
    regularizer_mask,
    regularizer_values,
)
from logitcache.pipeline.teacher import slice_record

SHAPES = [(7, 2, 1), (5, 3, 1), (5, 3, 2), (13, 50, 8), (4, 123, 122), (9, 252, 64), (3, 507, 1)]
SCALES = [1.0, 6.0, 30.0]

FORMS = {
    ("masked-kl", "bucket"): oracles.masked_kl_bucket_oracle,
    ("masked-kl", "renormalize"): oracles.masked_kl_renormalize_oracle,
    ("full-kl", "bucket"): oracles.full_kl_bucket_oracle,
}


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


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("form", FORMS)
def test_regularizer_equals_its_oracle(form: Any, shape: tuple[int, int, int], scale: float) -> None:
    _, adapted, labels, record = make_case(shape, scale)
    expected_value, expected_gradient = FORMS[form](record, adapted, labels)
    logits = torch.from_numpy(adapted).float().requires_grad_()
    value, gradient = value_and_gradient(of(form, logits, as_targets(record, labels)), logits)
    np.testing.assert_allclose(value, expected_value, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", [(6, 2, 1), (8, 60, 59)])
def test_all_alternatives_give_the_exact_masked_kl(shape: tuple[int, int, int], scale: float) -> None:
    base, adapted, labels, record = make_case(shape, scale)
    expected_value, expected_gradient = oracles.masked_kl_full_oracle(base, adapted, labels)
    logits = torch.from_numpy(adapted).float().requires_grad_()
    value, gradient = value_and_gradient(regularizer_values(logits, as_targets(record, labels), Objective()), logits)
    np.testing.assert_allclose(value, expected_value, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_cross_entropy_equals_its_oracle(shape: tuple[int, int, int]) -> None:
    _, adapted, labels, _ = make_case(shape, 6.0)
    expected_value, expected_gradient = oracles.cross_entropy_oracle(adapted, labels)
    logits = torch.from_numpy(adapted).float().requires_grad_()
    value, gradient = value_and_gradient(cross_entropy(logits, torch.from_numpy(labels)), logits)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("regularizer", ["masked-kl", "full-kl"])
def test_zero_value_and_gradient_where_adapted_equals_base(
    regularizer: Any, tail: Any, shape: tuple[int, int, int]
) -> None:
    base, _, labels, record = make_case(shape, 6.0)
    logits = torch.from_numpy(base).float().requires_grad_()
    value, gradient = value_and_gradient(of((regularizer, tail), logits, as_targets(record, labels)), logits)
    assert np.abs(value).max() < 2e-6
    assert np.abs(gradient).max() < 2e-6


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_masked_kl_has_no_gradient_at_the_label_and_ignores_its_logit(tail: Any) -> None:
    _, adapted, labels, record = make_case((9, 40, 8), 3.0)
    targets = as_targets(record, labels)
    logits = torch.from_numpy(adapted).float().requires_grad_()
    value, gradient = value_and_gradient(of(("masked-kl", tail), logits, targets), logits)
    assert np.all(gradient[np.arange(9), labels] == 0)
    moved = logits.detach().clone()
    moved[torch.arange(9), targets.label_ids] += 17.0
    np.testing.assert_array_equal(of(("masked-kl", tail), moved, targets).double().numpy(), value)


@pytest.mark.parametrize("form", FORMS)
def test_invariant_to_a_constant_added_to_the_logits(form: Any) -> None:
    _, adapted, labels, record = make_case((9, 40, 8), 3.0)
    logits = torch.from_numpy(adapted).float()
    targets = as_targets(record, labels)
    torch.testing.assert_close(
        regularizer_values(logits + 5.0, targets, Objective(*form)),
        regularizer_values(logits, targets, Objective(*form)),
        rtol=1e-4,
        atol=1e-5,
    )


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
def test_rows_that_keep_fewer_alternatives(form: Any) -> None:
    """A padded row gives the same as the row without its padding, and finite gradients."""
    _, adapted, labels, wide = make_case((6, 30, 8), 3.0)
    narrow = oracles.record_oracle(make_case((6, 30, 8), 3.0)[0], labels, 3)
    ids = np.full_like(wide.alternative_ids, oracles.PAD_ID)
    kept = np.full_like(wide.alternative_logprobs, -np.inf)
    ids[:, :3], kept[:, :3] = narrow.alternative_ids, narrow.alternative_logprobs
    padded = oracles.OracleRecord(narrow.label_logprobs, ids, kept, narrow.tail_logprobs)
    results = []
    for record in (padded, narrow):
        logits = torch.from_numpy(adapted).float().requires_grad_()
        results.append(value_and_gradient(of(form, logits, as_targets(record, labels)), logits))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-6, atol=1e-7)


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


@pytest.mark.parametrize("chunk", [1, 5, 13, 1000])
@pytest.mark.parametrize("form", [*FORMS, ("full-kl", "renormalize"), ("none", "bucket")])
def test_sliced_losses_equal_the_plain_ones(form: Any, chunk: int) -> None:
    """Sums, gradients into the hidden states and into a trained head with a bias, whatever the slices."""
    _, _, labels, record = make_case((13, 50, 8), 1.0)
    targets = as_targets(record, labels)
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 50)
    hidden = torch.randn(13, 6, requires_grad=True)
    parameters = [hidden, *head.parameters()]
    objective = Objective(*form, tokens_per_loss_chunk=chunk)
    loss, ce, kl = linear_loss(
        hidden, head, targets.label_ids, targets if form[0] != "none" else None, objective, 0.7, list(head.parameters())
    )
    found = torch.autograd.grad(loss, parameters)
    logits = head(hidden)
    plain_ce = cross_entropy(logits, targets.label_ids).sum()
    plain_kl = regularizer_values(logits, targets, Objective(*form))[regularizer_mask(targets, Objective(*form))].sum()
    expected = torch.autograd.grad(plain_ce + 0.7 * plain_kl, parameters)
    torch.testing.assert_close(ce, plain_ce, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(kl, plain_kl, rtol=1e-5, atol=1e-5)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_sliced_losses_hold_one_slice_of_logits() -> None:
    """No tensor of N * V elements is ever made: the largest is a slice's."""
    _, _, labels, record = make_case((64, 400, 8), 1.0)
    targets = as_targets(record, labels)
    head, hidden = torch.nn.Linear(4, 400), torch.randn(64, 4, requires_grad=True)
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
