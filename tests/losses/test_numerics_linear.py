"""linear_loss, the sliced loss from hidden states: against the oracles, and against the same loss written plainly."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support import oracles
from support.exact_head import ExactHead
from support.numerics_cases import (
    EPSILON,
    Case,
    Shape,
    case_of,
    expected_loss,
    float32,
    forms,
    make_case,
    objective,
    plain_loss,
    saturated_case,
    scales,
    shapes,
)
from support.oracles import FloatArray
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from logitcache.losses.fused import LinearLoss, linear_loss
from logitcache.losses.kernels.choice import are_usable

WEIGHT = 0.7


def assert_equals_oracle(case: Case, form: Sequence[Any], chunk: int | None = 3, **options: Any) -> None:
    """ce, kl, loss and the gradient by the logits, at rounding errors."""
    head, unit = ExactHead(case), case.unit()
    chosen = objective(form, tokens_per_loss_chunk=chunk, **options)
    result = linear_loss(head.hidden, head.linear, case.targets.label_ids, case.targets, chosen, WEIGHT)
    for scalar in result.loss, result.ce, result.kl:
        assert scalar.dtype == torch.float32 and scalar.shape == ()
    assert not result.ce.requires_grad and not result.kl.requires_grad
    ce, kl, gradient = expected_loss(case, form, WEIGHT, **options)
    for actual, expected in ((result.ce, ce), (result.kl, kl), (result.loss, ce + WEIGHT * kl)):
        assert abs(float(actual.detach()) - expected) <= 4 * len(case.labels) * unit + 8 * EPSILON * abs(expected)
    result.loss.backward()
    assert head.linear.weight.grad is None
    found = head.to_logits(head.hidden.grad)
    assert found.shape == gradient.shape
    assert bool(np.all(np.abs(found - gradient) <= 4 * unit + 8 * EPSILON * np.abs(gradient)))


# --- against the oracles


@forms
@shapes
@scales
def test_loss_and_gradient(form: Any, shape: Shape, scale: float) -> None:
    case = make_case(shape, scale, 2 if scale == 6.0 else 16)
    for chunk in (1, 3, 128):
        assert_equals_oracle(case, form, chunk)


@forms
def test_ragged_rows_options_and_default_slices(form: Any) -> None:
    ragged = make_case((6, 30, 8), 3.0, keep=[0, 1, 3, 7, 8, 8])
    assert_equals_oracle(ragged, form, None)
    assert_equals_oracle(make_case((5, 9, 8), 3.0, keep=[8, 8, 0, 2, 7]), form)
    assert_equals_oracle(make_case((13, 50, 8), 6.0), form, 5, weighting="non-target-mass")
    case = make_case((13, 50, 8), 1.0)
    case.adapted[np.arange(13), case.labels] += np.linspace(-2, 12, 13)  # from most to nothing beside the label
    case = replace(case, adapted=float32(case.adapted))
    half = float(np.median(1 - np.exp(case.record.label_logprobs))) + 1e-4  # leaves out 7 of 13
    options: list[dict[str, Any]] = [
        {"min_adapted_rest": 0.25},
        {"min_base_rest": half},
        {"weighting": "non-target-mass"},
    ]
    for option in options:
        assert_equals_oracle(case, form, 5, **option)
        moved = abs(expected_loss(case, form, WEIGHT, **option)[1] - expected_loss(case, form, WEIGHT)[1])
        assert (moved > 1e-3) == (form[0] != "full-kl" or "weighting" in option)
    if form[1] == "renormalize":
        assert_equals_oracle(ragged, form, 4, temperature=2.0, min_base_rest=0.5)


@forms
def test_no_position_counts(form: Any) -> None:
    """Saturated labels: the masked forms leave the loss and its gradient to the cross-entropy."""
    case = saturated_case()
    assert not case.counted(("masked-kl", "bucket")).any()
    assert_equals_oracle(case, form)
    assert_equals_oracle(case, form, min_base_rest=0.0)


@forms
def test_positions_without_any_mass_beside_the_label(form: Any) -> None:
    """A base that is one-hot at the label has no p'; nothing of that reaches the sums."""
    plain = make_case((6, 9, 3), 1.0)
    base = plain.base.copy()
    base[[1, 4]] = -np.inf
    base[[1, 4], plain.labels[[1, 4]]] = 0.0
    record = oracles.record_oracle(base, plain.labels, 3)
    ids, gone = record.alternative_ids, record.alternative_logprobs == -np.inf
    record = replace(record, alternative_ids=np.where(gone, oracles.PAD_ID, ids))  # absent, as targets have it
    case = case_of(base, plain.adapted, plain.labels, record, 4, 5, np.arange(9) % 4)
    assert case.counted(form).tolist() == [i not in (1, 4) or form[0] == "full-kl" for i in range(6)]
    for chunk in (1, 4, 6):
        assert_equals_oracle(case, form, chunk)


@forms
def test_vanished_tokens(form: Any) -> None:
    """Logits of -inf, from a bias of -inf, where the base has no mass."""
    case = make_case((7, 12, 4), 1.0)
    gone = np.setdiff1d(np.arange(12), case.labels)[:3]
    base, adapted = case.base.copy(), case.adapted.copy()
    base[:, gone] = adapted[:, gone] = -np.inf
    case = case_of(base, adapted, case.labels, oracles.record_oracle(base, case.labels, 4), 4, 5, np.arange(12) % 4)
    finite = replace(case, adapted=np.where(np.isinf(adapted), 0.0, adapted))
    head, bias = ExactHead(finite), torch.zeros(12)
    bias[torch.from_numpy(gone)] = -torch.inf
    hidden = head.hidden
    result = linear_loss(
        hidden, lambda h: head.linear(h) + bias, case.targets.label_ids, case.targets, objective(form), WEIGHT
    )
    ce, kl, gradient = expected_loss(case, form, WEIGHT)
    np.testing.assert_allclose([float(result.ce), float(result.kl)], [ce, kl], rtol=1e-5)
    result.loss.backward()
    np.testing.assert_allclose(head.to_logits(hidden.grad), gradient, rtol=1e-5, atol=4 * case.unit())


@forms
def test_an_empty_batch(form: Any) -> None:
    case = make_case((0, 7, 3), 1.0)
    linear, hidden = nn.Linear(5, 7), torch.zeros(0, 5, requires_grad=True)
    parameters = tuple(linear.parameters())
    result = linear_loss(hidden, linear, case.targets.label_ids, case.targets, objective(form), WEIGHT, parameters)
    assert (float(result.loss.detach()), float(result.ce), float(result.kl)) == (0.0, 0.0, 0.0)
    gradients = torch.autograd.grad(result.loss, [hidden, *parameters])
    assert [g.shape for g in gradients] == [hidden.shape, *(p.shape for p in parameters)]
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("without", ["targets", "regularizer", "weight"])
def test_cross_entropy_alone(without: str) -> None:
    case = make_case((9, 40, 8), 6.0)
    head = ExactHead(case)
    targets = None if without == "targets" else case.targets
    chosen = objective(("none" if without == "regularizer" else "masked-kl", "bucket"), tokens_per_loss_chunk=4)
    weight = 0.0 if without == "weight" else WEIGHT
    result = linear_loss(head.hidden, head.linear, case.targets.label_ids, targets, chosen, weight)
    ce, gradient = oracles.cross_entropy_oracle(case.adapted, case.labels)
    np.testing.assert_allclose([float(result.loss.detach()), float(result.ce)], ce.sum(), rtol=1e-6)
    assert (float(result.kl) == 0) == (without != "weight")
    result.loss.backward()
    np.testing.assert_allclose(head.to_logits(head.hidden.grad), gradient, rtol=1e-6, atol=4 * case.unit())


# --- against the plain form: the same formulas over full logits by autograd


class Lora(nn.Module):
    """A frozen linear layer and a trained update of rank 3."""

    def __init__(self, dimension: int, vocabulary: int) -> None:
        super().__init__()
        self.base = nn.Linear(dimension, vocabulary).requires_grad_(False)
        self.a, self.b = nn.Linear(dimension, 3, bias=False), nn.Linear(3, vocabulary, bias=False)

    def forward(self, hidden: Tensor) -> Any:
        return self.base(hidden) + 2.0 * self.b(self.a(hidden))


class SoftCap(nn.Module):
    """cap * tanh(linear / cap)."""

    def __init__(self, dimension: int, vocabulary: int, trained: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(dimension, vocabulary).requires_grad_(trained)

    def forward(self, hidden: Tensor) -> Any:
        return 4.0 * torch.tanh(self.linear(hidden) / 4.0)


HEADS: dict[str, Callable[[int, int], nn.Module]] = {
    "frozen": lambda d, v: nn.Linear(d, v).requires_grad_(False),
    "frozen without bias": lambda d, v: nn.Linear(d, v, bias=False).requires_grad_(False),
    "trained": nn.Linear,
    "LoRA": Lora,
    "soft cap": SoftCap,
    "frozen soft cap": lambda d, v: SoftCap(d, v, trained=False),
}
DIMENSION = 16


def make_head(name: str, shape: Shape, scale: float, offset: float = 0.0) -> tuple[nn.Module, Tensor, Case]:
    """A random head, hidden states [N, D], and a case with the head's logits, moved by `offset` if it has a bias."""
    torch.manual_seed(sum(shape))
    n, v, _ = shape
    module = HEADS[name](DIMENSION, v)
    for key, parameter in module.named_parameters():
        parameter.data.mul_(2.0 * scale if "b.weight" not in key else 2.0)
        if "bias" in key:
            parameter.data += offset
    hidden = torch.randn(n, DIMENSION)
    case = make_case(shape, scale)
    adapted = float32(module(hidden).detach().double().numpy())
    base = float32(adapted + np.random.default_rng(n).normal(size=adapted.shape))
    record = oracles.record_oracle(base, case.labels, shape[2])
    return module, hidden, case_of(base, adapted, case.labels, record)


def trained(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters() if p.requires_grad]


def gradients_of(
    loss: Callable[[nn.Module, Tensor], Tensor], module: nn.Module, hidden: Tensor, dtype: torch.dtype
) -> list[FloatArray]:
    """Gradients by the hidden states and what the head trains, of the loss over copies in this type."""
    module, hidden = copy.deepcopy(module).to(dtype), hidden.detach().clone().to(dtype).requires_grad_()
    return [g.double().numpy() for g in torch.autograd.grad(loss(module, hidden), [hidden, *trained(module)])]


def three_gradients(
    module: nn.Module, hidden: Tensor, case: Case, form: Sequence[Any], dtype: torch.dtype, chunk: int = 3
) -> list[list[FloatArray]]:
    """Those of linear_loss and of the plain form in float32 (both on a head of `dtype`), and in float64."""

    def sliced(head: nn.Module, h: Tensor) -> Tensor:
        chosen = objective(form, tokens_per_loss_chunk=chunk)
        result = linear_loss(h, head, case.targets.label_ids, case.targets, chosen, WEIGHT, trained(head))
        assert isinstance(result, LinearLoss)
        return result.loss

    def plain(head: nn.Module, h: Tensor) -> Tensor:
        logits = head(h)
        return plain_loss(logits if logits.dtype == torch.float64 else logits.float(), case, form, WEIGHT)

    rounded_module, rounded_hidden = copy.deepcopy(module).to(dtype).double(), hidden.to(dtype).double()
    return [
        gradients_of(sliced, module, hidden, dtype),
        gradients_of(plain, module, hidden, dtype),
        gradients_of(plain, rounded_module, rounded_hidden, torch.float64),
    ]


def assert_no_worse(results: Sequence[Sequence[FloatArray]], factor: float, floor: float) -> None:
    """Error of the first at most factor times that of the second plus floor; in units of the largest entry."""
    for found, plain, exact in zip(*results, strict=True):
        largest = np.abs(exact).max()
        error, plain_error = (float(np.abs(x - exact).max() / largest) for x in (found, plain))
        assert error <= factor * plain_error + floor, f"error {error:.2e}, of the plain form {plain_error:.2e}"


@forms
@pytest.mark.parametrize("offset", [0.0, 40.0])
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_error_is_that_of_the_plain_form(form: Any, scale: float, offset: float) -> None:
    for shape in ((13, 50, 8), (9, 252, 64)):
        module, hidden, case = make_head("frozen", shape, scale, offset)
        assert_no_worse(three_gradients(module, hidden, case, form, torch.float32), 1.5, 4 * EPSILON)


@forms
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_error_is_that_of_the_plain_form_in_bfloat16(form: Any, scale: float) -> None:
    for shape in ((13, 50, 8), (9, 252, 64)):
        module, hidden, case = make_head("frozen", shape, scale)
        assert_no_worse(three_gradients(module, hidden, case, form, torch.bfloat16), 1.25, 2.0**-10)


@forms
@pytest.mark.parametrize("name", HEADS)
def test_heads(form: Any, name: str) -> None:
    """Whatever the head is made of: the gradients of autograd, to it and through it."""
    for chunk in (2, 13):
        module, hidden, case = make_head(name, (13, 50, 8), 1.0)
        results = three_gradients(module, hidden, case, form, torch.float32, chunk)
        assert len(results[0]) == {"trained": 3, "LoRA": 3, "soft cap": 3}.get(name, 1)
        assert all(np.abs(g).max() > 1e-3 for g in results[2])
        assert_no_worse(results, 2.0, 8 * EPSILON)


@forms
def test_under_autocast(form: Any) -> None:
    module, hidden, case = make_head("trained", (13, 50, 8), 1.0)
    exact = three_gradients(module, hidden, case, form, torch.float32)[2]
    with torch.autocast("cpu", torch.bfloat16):
        results = three_gradients(module, hidden, case, form, torch.float32)
    assert max(np.abs(a - b).max() for a, b in zip(results[1], exact, strict=True)) > 1e-4  # it was cast
    assert_no_worse([results[0], results[1], exact], 1.25, 2.0**-9)


def call(module: nn.Module, hidden: Tensor, case: Case, form: Sequence[Any] = ("masked-kl", "bucket")) -> LinearLoss:
    chosen = objective(form, tokens_per_loss_chunk=4)
    return linear_loss(hidden, module, case.targets.label_ids, case.targets, chosen, WEIGHT, trained(module))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
@forms
def test_whatever_the_default_dtype_is(form: Any, default: torch.dtype) -> None:
    """Of the process, which some set to the dtype that they train in."""
    case = make_case((13, 50, 8), 1.0)
    head, chosen = ExactHead(case), objective(form, tokens_per_loss_chunk=3)
    arguments = (head.hidden, head.linear, case.targets.label_ids, case.targets, chosen, WEIGHT)
    expected = linear_loss(*arguments)
    (gradient,) = torch.autograd.grad(expected.loss, head.hidden)
    torch.set_default_dtype(default)
    try:
        found = linear_loss(*arguments)
        (same_gradient,) = torch.autograd.grad(found.loss, head.hidden)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, two in zip((*found, same_gradient), (*expected, gradient), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)  # dtypes among it


def test_gradients_accumulate_and_scale() -> None:
    """Over two calls, in one backward or two, scaled from above, and through what made the hidden states."""
    module, hidden, case = make_head("trained", (13, 50, 8), 1.0)
    other = make_case((13, 50, 8), 6.0)
    inputs = hidden.clone().requires_grad_()
    tensors = [inputs, *trained(module)]
    first = torch.autograd.grad(call(module, inputs.tanh(), case).loss, tensors)
    second = torch.autograd.grad(call(module, inputs.sin(), other).loss, tensors)
    (call(module, inputs.tanh(), case).loss * 0.3).backward()
    (call(module, inputs.sin(), other).loss / 7).backward()
    for tensor, one, two in zip(tensors, first, second, strict=True):
        torch.testing.assert_close(tensor.grad, 0.3 * one + two / 7, rtol=1e-5, atol=1e-6)
    together = call(module, inputs.tanh(), case).loss * 0.3 + call(module, inputs.sin(), other).loss / 7
    for tensor, gradient in zip(tensors, torch.autograd.grad(together, tensors), strict=True):
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-5, atol=1e-6)


def test_only_what_needs_a_gradient_gets_one() -> None:
    module, hidden, case = make_head("LoRA", (13, 50, 8), 1.0)
    expected = call(module, hidden.clone().requires_grad_(), case)
    detached = call(module, hidden, case)
    detached.loss.backward()
    assert hidden.grad is None and all(p.grad is not None for p in trained(module))
    assert all(p.grad is None for p in module.parameters() if not p.requires_grad)
    with torch.no_grad():
        silent = call(module, hidden.clone().requires_grad_(), case)
    frozen = call(module.requires_grad_(False), hidden, case)
    for result in (detached, silent, frozen):
        torch.testing.assert_close(result.loss.detach(), expected.loss.detach())
        torch.testing.assert_close(result.kl, expected.kl)
    assert not silent.loss.requires_grad and not frozen.loss.requires_grad


def test_narrow_labels_and_a_weight_that_is_a_tensor() -> None:
    case = make_case((9, 40, 8), 6.0)
    head, chosen = ExactHead(case), objective(("masked-kl", "bucket"))
    labels = case.targets.label_ids
    one = linear_loss(head.hidden, head.linear, labels, case.targets, chosen, WEIGHT)
    two = linear_loss(head.hidden, head.linear, labels.int(), case.targets, chosen, torch.tensor(WEIGHT))
    assert one.loss.item() == two.loss.item()
    gradients = [torch.autograd.grad(x.loss, head.hidden)[0] for x in (one, two)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


# --- memory and compilation


@forms
def test_one_slice_of_logits_at_a_time(form: Any) -> None:
    """The head sees each position once, in slices; no tensor is larger than a slice's logits, nor lives on."""
    case, chunk = make_case((90, 400, 8), 1.0), 20
    linear = nn.Linear(4, 400)
    hidden, seen, made, largest = torch.randn(90, 4, requires_grad=True), [], [], 0

    def head(slice_of_hidden: Tensor) -> Any:
        assert sum(reference() is not None for reference in made) <= 1, "the logits of earlier slices are alive"
        seen.append(slice_of_hidden.shape[0])
        logits = linear(slice_of_hidden)
        made.append(weakref.ref(logits))
        return logits

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    largest = max(largest, tensor.numel())
            return out

    chosen = objective(form, tokens_per_loss_chunk=chunk)
    are_usable(hidden.device, hidden.dtype)  # where there are kernels, their trial is no slice
    with Watch():
        result = linear_loss(
            hidden, head, case.targets.label_ids, case.targets, chosen, WEIGHT, tuple(linear.parameters())
        )
        assert sum(reference() is not None for reference in made) == 0
        result.loss.backward()
    assert seen == [20, 20, 20, 20, 10]
    assert chunk * 400 <= largest < 2 * chunk * 400


def test_what_keeps_saved_tensors_elsewhere_is_asked_once() -> None:
    """Activation offloading moves the gradients that wait for the backward, and the head's weights for no slice."""
    case = make_case((90, 400, 8), 1.0)
    linear, gradients, packed = nn.Linear(4, 400), list[tuple[Tensor, ...]](), list[tuple[int, ...]]()
    start = torch.randn(90, 4)

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tuple(tensor.shape))
        return tensor.clone()

    for away in (False, True):
        hidden = start.clone().requires_grad_()
        chosen = objective(("masked-kl", "bucket"), tokens_per_loss_chunk=20)
        trained_in_it = tuple(linear.parameters())
        with saved_tensors_hooks(pack, lambda tensor: tensor) if away else nullcontext():
            result = linear_loss(hidden, linear, case.targets.label_ids, case.targets, chosen, WEIGHT, trained_in_it)
        gradients.append(torch.autograd.grad(result.loss, [hidden, *trained_in_it]))
    assert sorted(packed) == [(90, 4), (400,), (400, 4)]
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_a_head_that_overwrites_what_its_backward_reads_is_no_head() -> None:
    case, linear = make_case((9, 40, 8), 1.0), nn.Linear(4, 40)

    def head(hidden: Tensor) -> Tensor:
        saved = linear(hidden).sigmoid()
        return saved * 2 + saved.mul_(3)

    hidden = torch.randn(9, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="overwritten"):
        linear_loss(hidden, head, case.targets.label_ids, case.targets, objective(("masked-kl", "bucket")), WEIGHT)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of torch.compile itself
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_inside_a_compiled_function(backend: str) -> None:
    module, hidden, case = make_head("trained", (13, 50, 8), 1.0)
    targets, chosen = case.targets, objective(("masked-kl", "bucket"), tokens_per_loss_chunk=4)

    def step(h: Tensor) -> Tensor:
        result = linear_loss(h.tanh(), module, targets.label_ids, targets, chosen, WEIGHT, trained(module))
        return result.loss / 13

    compiled = torch.compile(step, backend=backend)
    leaf = hidden.clone().requires_grad_()
    expected = torch.autograd.grad(step(leaf), [leaf, *trained(module)])
    found = torch.autograd.grad(compiled(leaf), [leaf, *trained(module)])
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
