"""Weights of the cross-entropy against their float64 oracles: sums, gradients and the number of the mean, in slices."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support import oracles
from support.exact_head import ExactHead
from support.numerics_cases import Case, case_of, float32, make_case
from support.oracles import FloatArray
from support.oracles_weights import (
    PUBLISHED,
    dft_oracle,
    eaft_oracle,
    num_of_mean,
    rho1_oracle,
    stm_oracle,
    weighted_sums,
)
from torch import Tensor, nn

from logitcache.errors import InvalidSettings, TrainingFailed
from logitcache.losses import compared
from logitcache.losses.formulas import Objective, SparseTargets
from logitcache.losses.fused import linear_loss
from logitcache.losses.objective import WEIGHT_FORMS
from logitcache.losses.weights import num_weighed, rho1

FORMS = ("dft", "stm", "eaft", "eaft-base", "rho1", "data")
SHAPES = [(7, 2, 1), (13, 50, 24), (9, 252, 64), (5, 40, 39)]
KL_WEIGHT = 0.7


def weighed_case(shape: tuple[int, int, int], scale: float) -> Case:
    """`make_case` with labels from improbable to probable, so that every form finds some that it keeps or trusts."""
    case, (n, v, k) = make_case(shape, scale), shape
    base, adapted = case.base.copy(), case.adapted.copy()
    for x in (base, adapted):
        x[np.arange(n), case.labels] += np.linspace(-1, 2 + math.log(v) + 2 * scale, n) if n else 0.0
    base = float32(base)
    return case_of(base, float32(adapted), case.labels, oracles.record_oracle(base, case.labels, k))


def documents_of(case: Case) -> Tensor:
    """Three documents of uneven lengths, one after the other."""
    return torch.from_numpy((np.arange(len(case.labels)) ** 2 // len(case.labels)).astype(np.int32)).unique(
        return_inverse=True
    )[1]


def brought(case: Case) -> FloatArray:
    """Weights of the data, a third of them 0."""
    return float32(np.abs(np.sin(np.arange(len(case.labels)) * 1.3)) * 2 * (np.arange(len(case.labels)) % 3 > 0))


def for_ce(case: Case, name: str) -> Tensor | None:
    if name == "data":
        return torch.from_numpy(brought(case)).float().view(torch.int32)
    return documents_of(case) if name == "rho1" else None


def expected_weights(case: Case, name: str, value: float | None = None) -> FloatArray:
    """Of the oracles, from the record as stored and the float32 logits."""
    number = PUBLISHED.get(name, 0.0) if value is None else value
    record, z = case.record, case.adapted
    if name == "dft":
        return dft_oracle(z, case.labels)
    if name == "stm":
        return stm_oracle(record.label_logprobs, number)
    if name == "eaft":
        return eaft_oracle(list(z), number)
    if name == "eaft-base":
        rows = np.concatenate([record.label_logprobs[:, None], record.alternative_logprobs], axis=1)
        return eaft_oracle(list(rows), number)
    if name == "rho1":
        return rho1_oracle(record.label_logprobs, z, case.labels, documents_of(case).tolist(), number)
    return brought(case)


def of(name: str, regularizer: str = "none", chunk: int | None = 3, **more: Any) -> Objective:
    return Objective(regularizer, ce_weight=name, tokens_per_loss_chunk=chunk, **more)


def assert_is_oracle(case: Case, objective: Objective, weights: FloatArray) -> None:
    """ce, loss and the gradient by the logits: within 1e-6, or two rounding errors of logits that are larger."""
    head, labels, name = ExactHead(case), torch.from_numpy(case.labels), objective.ce_weight
    result = linear_loss(
        head.hidden, head.linear, labels, case.targets, objective, KL_WEIGHT, for_ce=for_ce(case, name)
    )
    ce, gradient = weighted_sums(case.adapted, case.labels, weights)
    kl = 0.0
    if objective.regularizer != "none":
        form = (objective.regularizer, objective.tail)
        values, by_z = case.expected(form)
        counted = case.counted(form)
        kl = float(values[counted].sum())
        gradient = gradient + KL_WEIGHT * np.where(counted[:, None], by_z, 0.0)
    unit, num = case.unit(), len(case.labels)
    for found, exact in ((result.ce, ce), (result.kl, kl), (result.loss, ce + KL_WEIGHT * kl)):
        assert abs(float(found.detach()) - exact) <= num * max(1e-6, 2 * unit) + 1e-6 * abs(exact)
    result.loss.backward()
    found = head.to_logits(head.hidden.grad)
    assert bool(np.all(np.abs(found - gradient) <= max(1e-6, 2 * unit) + 1e-6 * np.abs(gradient)))
    supervised = torch.ones(num, dtype=torch.bool)
    count = num_weighed(objective, supervised, case.targets, for_ce(case, name))
    assert count.dtype == torch.int64 and int(count) == num_of_mean(name, weights)


@pytest.mark.parametrize("regularizer", ["none", "masked-kl", "full-kl", "masked-js"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_sums_and_gradients_are_the_oracles(name: str, shape: tuple[int, int, int], regularizer: str) -> None:
    case = weighed_case(shape, 1.5)
    weights = expected_weights(case, name)
    for chunk in (1, 4, None):
        assert_is_oracle(case, of(name, regularizer, chunk), weights)


@pytest.mark.parametrize("scale", [6.0, 30.0])
@pytest.mark.parametrize("name", FORMS)
def test_at_other_scales_and_with_groups(name: str, scale: float) -> None:
    """30: probabilities that float32 cannot hold beside 1."""
    case = weighed_case((13, 50, 24), scale)
    assert_is_oracle(case, of(name), expected_weights(case, name))
    assert_is_oracle(case, of(name, "masked-kl", tail="groups"), expected_weights(case, name))


@pytest.mark.parametrize("name", FORMS)
def test_the_general_way_has_the_same_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of which digits would be lost are made by autograd."""
    monkeypatch.setattr(compared, "LEAST_GROUP_SUM", 1e30)
    case = weighed_case((13, 50, 24), 1.5)
    assert_is_oracle(case, of(name, "masked-kl", tail="groups"), expected_weights(case, name))


@pytest.mark.parametrize(
    ("name", "value"), [("stm", 1.0), ("stm", 40.0), ("eaft", 2.0), ("eaft-base", 0.5), ("rho1", 0.3), ("rho1", 1.0)]
)
def test_the_number_of_a_formula(name: str, value: float) -> None:
    case = weighed_case((13, 50, 24), 1.5)
    weights = expected_weights(case, name, value)
    assert_is_oracle(case, of(name, ce_weight_value=value), weights)
    if value != 1.0:
        assert np.abs(weights - expected_weights(case, name)).max() > 0.01


def test_the_published_numbers_are_the_defaults() -> None:
    assert {n: form.published for n, form in WEIGHT_FORMS.items() if form.published is not None} == PUBLISHED
    for name, value in PUBLISHED.items():
        assert Objective(ce_weight=name).ce_weight_value == value
        assert Objective(ce_weight=name) == Objective(ce_weight=name, ce_weight_value=value)
    assert replace(Objective(ce_weight="stm"), ce_weight="rho1").ce_weight_value == PUBLISHED["rho1"]
    assert replace(Objective(ce_weight="stm"), ce_weight="dft").ce_weight_value is None
    assert Objective().ce_weight_value is None


def test_weights_move_the_sums() -> None:
    """So that the bounds above mean something: every form weighs these tokens differently, and none of them all."""
    case = weighed_case((13, 50, 24), 1.5)
    found = {name: expected_weights(case, name) for name in FORMS}
    for name, weights in found.items():
        assert 0 < weights.sum() < len(weights) or name == "data", name
        others = [other for key, other in found.items() if key != name]
        assert min(np.abs(weights - other).max() for other in others) > 0.01, name


def test_a_weight_is_a_constant() -> None:
    """The gradient is of w * CE at a fixed w: not that of q(y) * CE, which differs."""
    case = weighed_case((5, 40, 39), 1.0)
    weights = dft_oracle(case.adapted, case.labels)
    _, fixed = weighted_sums(case.adapted, case.labels, weights)

    def moving(z: FloatArray) -> FloatArray:
        return dft_oracle(z, case.labels) * oracles.cross_entropy_oracle(z, case.labels)[0]

    assert np.abs(fixed - oracles.finite_difference(moving, case.adapted)).max() > 0.01
    assert_is_oracle(case, of("dft"), weights)


@pytest.mark.parametrize("name", FORMS)
def test_only_supervised_positions_have_a_cross_entropy(name: str) -> None:
    """Where the regulariser counts at others too; they have no part in what a document keeps."""
    case = weighed_case((13, 50, 24), 1.5)
    supervised = np.arange(13) % 3 != 1
    own = Case(
        case.base[supervised],
        case.adapted[supervised],
        case.labels[supervised],
        _rows(case, supervised),
        case.token_groups,
    )
    column = for_ce(case, name)
    weights = np.zeros(13)
    if name == "rho1":
        documents = documents_of(case)[torch.from_numpy(supervised)].tolist()
        weights[supervised] = rho1_oracle(own.record.label_logprobs, own.adapted, own.labels, documents, 0.6)
    else:
        weights[supervised] = expected_weights(case, name)[supervised]
    head, mask = ExactHead(case), torch.from_numpy(supervised)
    objective = of(name, "full-kl")
    labels = torch.from_numpy(case.labels)
    found = linear_loss(
        head.hidden, head.linear, labels, case.targets, objective, KL_WEIGHT, supervised=mask, for_ce=column
    )
    ce, _ = weighted_sums(case.adapted, case.labels, weights)
    assert float(found.ce) == pytest.approx(ce, rel=1e-6)
    assert float(found.kl) == pytest.approx(float(case.expected(("full-kl", "bucket"))[0].sum()), rel=1e-5)
    expected = num_of_mean(name, weights[supervised])
    assert int(num_weighed(objective, mask, case.targets, column)) == expected


def _rows(case: Case, rows: Any) -> Any:
    record = case.record
    columns = (record.label_logprobs, record.alternative_ids, record.alternative_logprobs, record.tail_logprobs)
    return replace(
        record,
        **dict(
            zip(
                ("label_logprobs", "alternative_ids", "alternative_logprobs", "tail_logprobs"),
                (column[rows] for column in columns),
                strict=True,
            )
        ),
    )


def test_the_share_of_a_document_is_rounded_up_and_ties_go_to_the_first() -> None:
    excess = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5, -1.0, 2.0, 3.0, 0.0, 1.0])
    documents = torch.tensor([0, 0, 0, 0, 0, 1, 2, 2, 2, 2])
    everything = torch.ones(10, dtype=torch.bool)
    assert rho1(excess, documents, everything, 0.6).tolist() == [1, 1, 1, 0, 0, 1, 1, 1, 0, 1]
    assert rho1(excess, documents, everything, 0.5).tolist() == [1, 1, 1, 0, 0, 1, 1, 1, 0, 0]
    assert rho1(excess, documents, everything, 1.0).tolist() == [1] * 10
    for share in (0.7, 0.1, 0.3):  # 0.7 * 10 is 7.000000000000001 in binary
        ten = rho1(torch.arange(10.0), torch.zeros(10), everything, share)
        assert ten.sum() == round(share * 10)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_head_gets_the_gradient_of_its_logits(name: str, dtype: torch.dtype) -> None:
    """As near to the loss written plainly in float64 on the same logits as rounding allows."""
    case = weighed_case((13, 50, 24), 1.0)
    torch.manual_seed(0)
    head = nn.Linear(16, 50, dtype=dtype)
    hidden = torch.randn(13, 16).to(dtype).requires_grad_()
    labels = torch.from_numpy(case.labels)
    found = linear_loss(
        hidden, head, labels, case.targets, of(name), 0.0, tuple(head.parameters()), for_ce=for_ce(case, name)
    )
    found.loss.backward()
    logits = head(hidden.detach()).detach()
    at = replace(case, adapted=logits.double().numpy())
    weights = expected_weights(at, name)
    _, by_z = weighted_sums(at.adapted, at.labels, weights)
    by_weight = by_z.T @ hidden.detach().double().numpy()
    assert head.weight.grad is not None
    error = np.linalg.norm(head.weight.grad.double().numpy() - by_weight) / np.linalg.norm(by_weight)
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("name", FORMS)
def test_nothing_to_learn_is_no_error(name: str) -> None:
    case = weighed_case((0, 7, 3), 1.0)
    head = nn.Linear(7, 7, bias=False)
    hidden = torch.zeros(0, 7, requires_grad=True)
    found = linear_loss(hidden, head, torch.zeros(0, dtype=torch.int64), case.targets, of(name), 0.0)
    found.loss.backward()
    assert float(found.ce) == 0
    assert int(num_weighed(of(name), torch.zeros(0, dtype=torch.bool), None, None)) == 0


@pytest.mark.parametrize("name", [n for n in FORMS if WEIGHT_FORMS[n].reads_base])
def test_a_batch_without_a_cache_is_refused_by_the_name_of_the_weight(name: str) -> None:
    case = weighed_case((5, 40, 39), 1.0)
    head, labels = ExactHead(case), torch.from_numpy(case.labels)
    with pytest.raises(TrainingFailed, match=f"{name}: expected what the base says .* without a cache"):
        linear_loss(head.hidden, head.linear, labels, None, of(name), 0.0, for_ce=for_ce(case, name))


@pytest.mark.parametrize("name", ["rho1", "data"])
def test_a_batch_that_was_looked_up_for_another_objective_is_refused(name: str) -> None:
    case = weighed_case((5, 40, 39), 1.0)
    head, labels = ExactHead(case), torch.from_numpy(case.labels)
    with pytest.raises(TrainingFailed, match=f"{name}: expected a batch that was looked up with this objective"):
        linear_loss(head.hidden, head.linear, labels, case.targets, of(name), 0.0)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another name": ({"ce_weight": "dfx"}, "ce_weight: expected one of none, dft, .* or FILE.py:FUNCTION, found 'dfx'"),
    "no number": ({"ce_weight": "dft", "ce_weight_value": 2.0}, "dft, whose formula has no number"),
    "none at all": ({"ce_weight_value": 2.0}, "none, whose formula has no number"),
    "perplexity": ({"ce_weight": "stm", "ce_weight_value": 0.9}, "expected a number of 1 or more"),
    "share": ({"ce_weight": "rho1", "ce_weight_value": 1.5}, "expected a number from 0 to 1"),
    "infinite": ({"ce_weight": "stm", "ce_weight_value": math.inf}, "ce_weight_value: expected a number above 0"),
    "smoothed": ({"regularizer": "none", "ce_weight": "stm", "label_smoothing": 0.1}, "--label-smoothing with --ce-we"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_defined_is_refused(case: str) -> None:
    given, said = REFUSED[case]
    with pytest.raises(InvalidSettings, match=said):
        Objective(**given)


def test_what_reads_the_base() -> None:
    """So that a cache is asked for, and looked up, without a regulariser too."""
    reading = [name for name in WEIGHT_FORMS if Objective("none", ce_weight=name).reads_base]
    assert reading == ["stm", "eaft-base", "rho1"]
    assert Objective("none", ce_weight="my.py:f").reads_base and Objective().reads_base
    assert Objective("none", ce_weight="stm").reader == "--ce-weight stm" and Objective().reader == "masked-kl"


def test_targets_keep_their_precision() -> None:
    """A half-precision record is read as the numbers it holds."""
    case = weighed_case((5, 40, 39), 1.0)
    half = SparseTargets(
        case.targets.label_ids,
        case.targets.label_logprobs.half(),
        case.targets.alternative_ids,
        case.targets.alternative_logprobs.half(),
        case.targets.tail_logprobs.half(),
    )
    head, labels = ExactHead(case), torch.from_numpy(case.labels)
    found = linear_loss(head.hidden, head.linear, labels, half, of("stm"), 0.0)
    weights = stm_oracle(half.label_logprobs.double().numpy(), 2.5)
    assert float(found.ce) == pytest.approx(weighted_sums(case.adapted, case.labels, weights)[0], rel=1e-6)
