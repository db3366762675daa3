"""The kernels of the loss against PyTorch's slices and the oracles: interpreted on a CPU, or on a card.

`scripts/test-kernels` runs this with Triton, and beside it the other tests of the loss from hidden states, which then
hold the kernels against the oracles too. Without Triton there is nothing to test here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support import oracles
from support.numerics_cases import Case, case_of, expected_loss, forms, make_case
from support.oracles_forms import FORMS
from support.oracles_weights import dft_oracle, weighted_sums
from torch import Tensor, nn

from logitcache.losses import compared, fused
from logitcache.losses.fused import linear_loss
from logitcache.losses.kernels import choice
from logitcache.losses.objective import Objective

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if not choice.are_there(DEVICE):
    pytest.skip("needs Triton, and a card or TRITON_INTERPRET=1", allow_module_level=True)

from logitcache.losses.kernels import tail as kernels  # noqa: E402

WEIGHT = 0.7
NEAR = 7e-7
"""Of the largest gradient: what float32 may differ by."""

SHAPES = [(13, 50, 8), (9, 252, 64), (5, 1003, 16), (1, 2, 1), (3, 507, 506), (6, 20, 0)]
HALF_SHAPES = [(13, 50, 8), (5, 1003, 16)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_form = pytest.mark.parametrize(
    "form",
    [*FORMS, ("dkd", "bucket"), ("dkd", "groups"), ("tad", "groups"), ("none", "bucket")],
    ids="/".join,
)


@pytest.fixture(scope="module", autouse=True)
def _tried_out() -> None:
    """Before anything is counted; a trial that failed would leave nothing to test."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert choice.are_usable(DEVICE, dtype)


class Made(NamedTuple):
    """ce, kl and the gradient by the logits, in their dtype."""

    ce: float
    kl: float
    gradient: Tensor


def options_of(form: Any) -> dict[str, Any]:
    return {"tail_weight": 3.0} if form[0] == "tad" else {"label_weight": 2.0} if form[0] == "dkd" else {}


def made(
    case: Case,
    form: Any,
    dtype: torch.dtype = torch.float32,
    logits: Tensor | None = None,
    for_ce: Tensor | None = None,
    supervised: Tensor | None = None,
    chunk: int | None = None,
    **options: Any,
) -> Made:
    """What `linear_loss` makes of given logits: the head gives back what it is given."""
    z = (case.logits if logits is None else logits).to(DEVICE, dtype).requires_grad_()
    targets = case.targets
    columns = {f.name: getattr(targets, f.name) for f in fields(targets)}
    targets = replace(targets, **{k: None if v is None else v.to(DEVICE) for k, v in columns.items()})
    chosen = Objective(
        regularizer=form[0], tail=form[1], tokens_per_loss_chunk=chunk, **{**options_of(form), **options}
    )
    needed = targets if chosen.reads_base else None
    result = linear_loss(
        z,
        lambda hidden: hidden * 1,
        targets.label_ids,
        needed,
        chosen,
        WEIGHT,
        supervised=None if supervised is None else supervised.to(DEVICE),
        for_ce=None if for_ce is None else for_ce.to(DEVICE),
    )
    (gradient,) = torch.autograd.grad(result.loss, z)
    return Made(float(result.ce), float(result.kl), gradient.detach().cpu())


def plainly(monkeypatch: pytest.MonkeyPatch, make: Callable[[], Made]) -> Made:
    """The same by PyTorch's slices."""
    with monkeypatch.context() as patch:
        patch.setattr(fused, "are_usable", lambda device, dtype: False)
        return make()


@contextmanager
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the passes that kernels make meanwhile."""
    seen: list[str] = []
    with monkeypatch.context() as patch:
        for name in ("_stats", "_apply"):
            real = getattr(kernels.KernelTail, name)
            patch.setattr(
                kernels.KernelTail, name, lambda *a, _real=real, _name=name: (seen.append(_name), _real(*a))[1]
            )
        yield seen


def assert_near(one: Made, two: Made, rows: int) -> None:
    assert one.ce == pytest.approx(two.ce, rel=2e-6, abs=2e-6 * rows)
    assert one.kl == pytest.approx(two.kl, rel=2e-6, abs=2e-6 * rows)
    largest = float(two.gradient.abs().max())
    assert float((one.gradient - two.gradient).abs().max()) <= NEAR * largest


@every_form
@shapes
def test_float32_is_what_pytorch_makes(form: Any, shape: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for scale, groups in ((1.0, 16), (6.0, 2)):
        case = make_case(shape, scale, groups)
        with launches(monkeypatch) as seen:
            found = made(case, form)
        assert seen == ["_stats", "_apply"]
        assert_near(found, plainly(monkeypatch, lambda c=case: made(c, form)), shape[0])


@forms
def test_float32_is_the_oracle(form: Any) -> None:
    case = make_case((5, 1003, 16), 1.0)
    ce, kl, gradient = expected_loss(case, form, WEIGHT)
    assert_near(made(case, form, chunk=2), Made(ce, kl, torch.from_numpy(gradient)), 5)


@every_form
@pytest.mark.parametrize("shape", HALF_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_is_one_unit_from_pytorch(
    form: Any, shape: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient is rounded once, to the head's dtype; its sums are those of float32."""
    case = make_case(shape, 3.0)
    case = replace(case, adapted=case.logits.to(dtype).double().numpy())
    with launches(monkeypatch) as seen:
        found = made(case, form, dtype)
    assert seen == ["_stats", "_apply"] and found.gradient.dtype == dtype
    plain, exact = (plainly(monkeypatch, lambda d=d: made(case, form, d)) for d in (dtype, torch.float32))
    assert found.ce == pytest.approx(plain.ce, rel=2e-6) and found.kl == pytest.approx(plain.kl, rel=2e-6, abs=1e-5)
    unit, least = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for other in (plain.gradient.double(), exact.gradient.double()):
        bound = unit * other.abs() + least + NEAR * float(other.abs().max())
        assert bool(((found.gradient.double() - other).abs() <= bound).all())


@every_form
def test_rows_that_keep_fewer_or_do_not_count(form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ragged = make_case((6, 30, 8), 3.0, keep=[0, 1, 3, 7, 8, 8])
    without_tail = make_case((5, 9, 8), 3.0, keep=[8, 8, 0, 2, 7])
    for case in (ragged, without_tail):
        find = lambda c=case: made(c, form, chunk=4)  # noqa: E731
        assert_near(find(), plainly(monkeypatch, find), len(case.labels))
    if form[0] in ("none", "dkd", "tad", "full-kl"):
        return
    case = make_case((13, 50, 8), 1.0)
    half = float(np.median(1 - np.exp(case.record.label_logprobs))) + 1e-4
    for options in ({"min_base_rest": half}, {"min_adapted_rest": 0.6}, {"weighting": "non-target-mass"}):
        find = lambda o=options: made(case, form, **o)  # noqa: E731
        assert_near(find(), plainly(monkeypatch, find), 13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_token_that_is_drawn_often_is_rounded_once(dtype: torch.dtype) -> None:
    case = make_case((4, 12, 3), 1.0, draws=64)
    case = replace(case, adapted=case.logits.to(dtype).double().numpy())
    found, form = made(case, ("masked-kl", "sampled"), dtype), ("masked-kl", "sampled")
    gradient = torch.from_numpy(expected_loss(case, form, WEIGHT)[2])
    bound = torch.finfo(dtype).eps * gradient.abs() + 4 * NEAR
    assert bool(((found.gradient.double() - gradient).abs() <= bound).all())


@pytest.mark.parametrize("name", ["dft", "eaft", "stm", "eaft-base", "data"])
@pytest.mark.parametrize("form", [("masked-kl", "bucket"), ("full-kl", "groups"), ("none", "bucket")], ids="/".join)
def test_a_weight_a_row(name: str, form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case((13, 61, 24), 1.0)
    weights = torch.arange(13).remainder(3).float() * 0.8
    brought = weights if name == "data" else None
    supervised = torch.arange(13) % 4 != 1 if form[0] != "none" else None
    find = lambda: made(case, form, ce_weight=name, for_ce=brought, supervised=supervised, chunk=5)  # noqa: E731
    found = find()
    assert_near(found, plainly(monkeypatch, find), 13)
    if name == "dft" and form[0] == "none":
        ce, gradient = weighted_sums(case.adapted, case.labels, dft_oracle(case.adapted, case.labels))
        assert_near(found, Made(ce, 0.0, torch.from_numpy(gradient)), 13)


def test_logits_of_minus_infinity() -> None:
    case = make_case((7, 70, 4), 1.0)
    gone = np.setdiff1d(np.arange(70), case.labels)[:50]  # whole parts of the columns among them
    base, adapted = case.base.copy(), case.adapted.copy()
    base[:, gone] = adapted[:, gone] = -np.inf
    record = oracles.record_oracle(base, case.labels, 4)
    case = case_of(base, adapted, case.labels, record, 4, 5, np.arange(70) % 4)
    for form in (("masked-kl", "bucket"), ("full-kl", "groups"), ("masked-kl", "sampled")):
        ce, kl, gradient = expected_loss(case, form, WEIGHT)
        assert_near(made(case, form), Made(ce, kl, torch.from_numpy(gradient)), 7)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's numpy
@pytest.mark.parametrize("what", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", [("masked-kl", "bucket"), ("full-kl", "groups"), ("none", "bucket")], ids="/".join)
def test_what_is_no_number_stays_none(what: float, form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A maximum on the card passes NaN by: the loss and the row's whole gradient say it all the same."""
    case = make_case((4, 97, 3), 1.0)
    labels = case.labels[2], *case.record.alternative_ids[2]
    at = next(c for c in range(90, 0, -1) if c not in labels)
    logits = case.logits
    logits[2, at] = what
    find = lambda: made(case, form, logits=logits)  # noqa: E731
    found, plain = find(), plainly(monkeypatch, find)
    assert np.isnan(found.ce) and np.isnan(plain.ce)
    assert bool(found.gradient[2].isnan().all()) and not bool(found.gradient[[0, 1, 3]].isnan().any())


@pytest.mark.parametrize("groups", [1, 2, 16, 17, 100, 256])
def test_the_tail_of_rows_that_are_not_aligned(groups: int) -> None:
    """Columns 1 to 1,003 of a wider tensor, in which nothing else is written."""
    torch.manual_seed(groups)
    whole = (torch.randn(21, 1011) * 4).to(DEVICE)
    whole[3, 2:900] = whole[4] = -torch.inf
    before, z = whole.clone(), whole[:, 1:1004]
    token_groups = torch.randint(groups, (1003,), device=DEVICE)
    one_hot = torch.nn.functional.one_hot(token_groups, groups).float()
    plain, found = compared.Tail(z.clone()), kernels.KernelTail(z, token_groups, groups)
    torch.testing.assert_close(found.log_sum, plain.log_sum, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.top, plain.top, rtol=0, atol=0)
    rows = torch.arange(21, device=DEVICE)
    assert torch.equal(found.first_of_top(rows)[rows != 4], plain.first_of_top(rows)[rows != 4])
    sums = [tail.split(token_groups, one_hot) for tail in (found, plain)]
    torch.testing.assert_close(*sums, rtol=1e-6, atol=2e-6)
    gradient, parts = torch.randn(21, 1, device=DEVICE), torch.randn(21, groups, device=DEVICE)
    for tail in (plain, found):
        tail.scale(gradient, parts)
    torch.testing.assert_close(z, plain.buffer, rtol=1e-5, atol=NEAR * float(plain.buffer.abs().max()))
    outside = torch.cat([whole[:, :1], whole[:, 1004:]], dim=1)
    assert torch.equal(outside, torch.cat([before[:, :1], before[:, 1004:]], dim=1))


def test_groups_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="token_groups: expected 30, one a column of logits, found 29"):
        kernels.KernelTail(torch.zeros(2, 30, device=DEVICE), torch.zeros(29, device=DEVICE), 4)


def test_labels_that_have_the_largest_logit_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case((64, 9, 2), 1.0)
    case = replace(case, adapted=np.round(case.adapted))  # ties
    counts = []
    for usable in (True, False):
        top1 = torch.zeros((), dtype=torch.int64, device=DEVICE)
        chosen = Objective(regularizer="none", tokens_per_loss_chunk=10)
        z, labels = case.logits.to(DEVICE), torch.from_numpy(case.labels).to(DEVICE)
        with monkeypatch.context() as patch:
            if not usable:
                patch.setattr(fused, "are_usable", lambda device, dtype: False)
            linear_loss(z, lambda hidden: hidden * 1, labels, None, chosen, 0.0, top1=top1)
        counts.append(int(top1))
    assert counts == [int((case.adapted.argmax(axis=1) == case.labels).sum())] * 2 and 0 < counts[0] < 64


def test_nothing_of_float32_is_as_large_as_the_logits() -> None:
    """Of a bfloat16 head, whose logits become the gradient where they are."""
    case = make_case((40, 300, 8), 1.0)
    head = nn.Linear(16, 300, bias=False).to(DEVICE, torch.bfloat16).requires_grad_(False)
    hidden = torch.randn(40, 16).to(DEVICE, torch.bfloat16).requires_grad_()
    made_of_that_size: list[tuple[str, torch.dtype]] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel() >= 40 * 300:
                    made_of_that_size.append((str(func), tensor.dtype))
            return out

    labels, chosen = torch.from_numpy(case.labels).to(DEVICE), Objective(regularizer="none")
    with Watch():
        linear_loss(hidden, head, labels, None, chosen, 0.0).loss.backward()
    assert made_of_that_size and {dtype for _, dtype in made_of_that_size} == {torch.bfloat16}
    assert sum(name.startswith(("aten.mm", "aten.clone", "aten._to_copy")) for name, _ in made_of_that_size) == 1


@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"tail": "groups"}], ids=["smoothed", "groups"])
def test_what_they_do_not_serve_goes_the_plain_way(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    smoothed = "label_smoothing" in options
    num_groups = 16 if smoothed else choice.MOST_GROUPS + 1
    case = make_case((5, 300, 4), 1.0, num_groups)
    form = ("none", "bucket") if smoothed else ("masked-kl", "groups")
    smoothing = {"label_smoothing": 0.1} if smoothed else {}
    with launches(monkeypatch) as seen:
        made(case, form, **smoothing)
    assert not seen


@pytest.mark.parametrize("how", ["wrong sums", "wrong sums by group", "wrong gradient", "no compiler"])
def test_a_trial_that_fails_leaves_the_plain_way(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real_stats, real_factors = kernels.KernelTail._stats, kernels.KernelTail.factors

    def stats(self: Any, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
        if how == "no compiler":
            raise RuntimeError("Failed to find C compiler")
        tops, sums, by_group = real_stats(self, num_groups)
        return tops, sums * (1.001 if how == "wrong sums" else 1), by_group * (0.999 if "group" in how else 1)

    monkeypatch.setattr(kernels.KernelTail, "_stats", stats)
    if how == "wrong gradient":
        monkeypatch.setattr(kernels.KernelTail, "factors", lambda *given: real_factors(*given) * 1.03)
    try_out = choice.are_usable.__wrapped__
    match = (
        "RuntimeError: Failed to find C compiler" if how == "no compiler" else f"other {how.removeprefix('wrong ')} "
    )
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.warns(UserWarning, match=match):
            assert not try_out(DEVICE, dtype)
    monkeypatch.undo()
    assert try_out(DEVICE, torch.float32) and not try_out(DEVICE, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_trial_of_a_card_goes_through_several_tiles_and_parts(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would show nothing of what a program carries from tile to tile. Here in those tiles too."""
    monkeypatch.setattr(kernels, "is_interpreted", lambda: False)
    sizes = choice._TRIAL_SHAPES["cuda"]
    for tile in (
        kernels.stats_tile(0, dtype),
        kernels.stats_tile(32, dtype),
        kernels.apply_tile(False),
        kernels.apply_tile(True),
    ):
        grid = kernels._grid(torch.empty(sizes, dtype=dtype), tile)
        assert grid.parts > 1 and grid.part >= 2 * tile.width and grid.parts * grid.part >= sizes[1]
    monkeypatch.setitem(choice._TRIAL_SHAPES, DEVICE.type, sizes)
    assert choice._fault(DEVICE, dtype) is None


def test_slices_are_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case((9, 40, 8), 1.0)
    monkeypatch.setattr(fused, "LOSS_SLICE_BYTES", {"cpu": 4 * 40 * 3, "cuda": 4 * 40 * 3})
    with launches(monkeypatch) as seen:
        found = made(case, ("masked-kl", "bucket"))
    assert seen == ["_stats", "_apply"]
    case_plain = plainly(monkeypatch, lambda: made(case, ("masked-kl", "bucket")))
    assert_near(found, case_plain, 9)


def test_float32_means_the_products_of_groups_have_22_bits() -> None:
    """Sums of numbers that TF32 alone would round by 2^-11."""
    torch.manual_seed(0)
    z, token_groups = torch.randn(16, 4096).to(DEVICE), torch.randint(16, (4096,), device=DEVICE)
    exact = torch.zeros(16, 16, dtype=torch.float64, device=DEVICE)
    exact.index_add_(1, token_groups, z.double().exp())
    one_hot = torch.nn.functional.one_hot(token_groups, 16).float()
    found = kernels.KernelTail(z, token_groups, 16).split(token_groups, one_hot)
    assert float((found.double() - exact.log()).abs().max()) < 1e-6
