"""Formulas of one's own: what a file computes is what is trained, and what is no formula is refused before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import oracles
from support.exact_head import ExactHead
from support.numerics_cases import Case, make_case
from support.oracles import FloatArray
from support.oracles_weights import weighted_sums

from logitcache.errors import InputNotFound, InvalidSettings, TrainingFailed
from logitcache.losses import compared
from logitcache.losses.formula_checks import check_formulas
from logitcache.losses.formula_files import formula, load_formula
from logitcache.losses.formulas import Objective, regularizer_values
from logitcache.losses.fused import linear_loss
from logitcache.losses.weights import Tokens, own_weights

KL = """
def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)
"""

JEFFREYS = """
def jeffreys(log_p, log_q):
    p, q = log_p.exp(), log_q.exp()
    return ((p - q) * (log_p - log_q)).sum(dim=1) / 2
"""

IMPORTANCE = """
def importance(tokens):
    return (tokens.log_q - tokens.log_p).exp().clamp(max=2.0)
"""

CONFLICT = """
def conflict(tokens):
    return 1.0 - ((tokens.base_entropy < 2.0) & (tokens.log_p < -2.0)).float()
"""

KL_WEIGHT = 0.7


def written(folder: Path, text: str, name: str) -> str:
    path = folder / "my.py"
    path.write_text(text, encoding="utf-8")
    return f"{path}:{name}"


def fused(case: Case, objective: Objective) -> tuple[float, float, FloatArray]:
    head = ExactHead(case)
    labels = torch.from_numpy(case.labels)
    found = linear_loss(head.hidden, head.linear, labels, case.targets, objective, KL_WEIGHT)
    found.loss.backward()
    return float(found.ce), float(found.kl), head.to_logits(head.hidden.grad)


def assert_same(found: tuple[float, float, FloatArray], expected: tuple[float, float, FloatArray]) -> None:
    np.testing.assert_allclose(found[:2], expected[:2], rtol=1e-6)
    np.testing.assert_allclose(found[2], expected[2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("plainly", [False, True], ids=["sliced", "by autograd"])
@pytest.mark.parametrize("tail", ["bucket", "groups", "renormalize"])
def test_a_written_kl_is_the_one_that_is_built_in(
    tail: Any, plainly: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With empty groups, absent alternatives, in slices and in the general way."""
    name = written(tmp_path, KL, "kl")
    if plainly:
        monkeypatch.setattr(compared, "LEAST_GROUP_SUM", 1e30)
    for keep in (None, [0, 1, 3, 7, 8, 8]):
        case = make_case((6, 30, 8), 1.5, keep=keep)
        for chunk in (1, 4, None):
            options: dict[str, Any] = {"tail": tail, "tokens_per_loss_chunk": chunk}
            if tail == "renormalize" and keep is not None:
                options["temperature"] = 2.0
            found = fused(case, Objective(name, **options))
            assert_same(found, fused(case, Objective("full-kl", **options)))


def test_another_divergence_has_its_own_gradient(tmp_path: Path) -> None:
    """Half the sum of both KLs over label, alternatives and tail: values from the formula, gradient by differences."""
    name, case = written(tmp_path, JEFFREYS, "jeffreys"), make_case((5, 12, 4), 1.0)
    record = case.record

    def values_of(z: FloatArray) -> FloatArray:
        found = np.zeros(len(z))
        for i, row in enumerate(z):
            log_q = oracles.log_softmax(row)
            kept = [int(case.labels[i]), *record.alternative_ids[i].tolist()]
            rest = [c for c in range(12) if c not in kept]
            q = np.array([*log_q[kept], oracles.log_sum_exp(log_q[rest])])
            p = oracles.log_softmax(
                np.array([record.label_logprobs[i], *record.alternative_logprobs[i], record.tail_logprobs[i]])
            )
            found[i] = np.sum((np.exp(p) - np.exp(q)) * (p - q)) / 2
        return found

    leaf = case.logits.requires_grad_()
    values = regularizer_values(leaf, case.targets, Objective(name))
    np.testing.assert_allclose(values.detach().numpy(), values_of(case.adapted), rtol=1e-5, atol=1e-6)
    gradient = oracles.finite_difference(values_of, case.adapted)
    (by_autograd,) = torch.autograd.grad(values.sum(), leaf)
    np.testing.assert_allclose(by_autograd.numpy(), gradient, rtol=1e-4, atol=1e-6)
    _, ce_gradient = oracles.cross_entropy_oracle(case.adapted, case.labels)
    for chunk in (1, 3, None):
        _, kl, found = fused(case, Objective(name, tokens_per_loss_chunk=chunk))
        assert kl == pytest.approx(values_of(case.adapted).sum(), rel=1e-6)
        np.testing.assert_allclose(found, ce_gradient + KL_WEIGHT * gradient, rtol=1e-4, atol=2e-6)


def test_a_weight_of_ones_own(tmp_path: Path) -> None:
    case = make_case((13, 50, 24), 1.5)
    log_q = np.array([oracles.log_softmax(z)[y] for z, y in zip(case.adapted, case.labels, strict=True)])
    weights = np.minimum(np.exp(log_q - case.record.label_logprobs), 2.0)
    assert weights.min() < 0.5 and weights.max() == 2.0
    name = written(tmp_path, IMPORTANCE, "importance")
    ce, gradient = weighted_sums(case.adapted, case.labels, weights)
    for chunk in (1, 4, None):
        found = fused(case, Objective("none", ce_weight=name, tokens_per_loss_chunk=chunk))
        assert found[0] == pytest.approx(ce, rel=1e-6) and found[1] == 0
        np.testing.assert_allclose(found[2], gradient, rtol=1e-6, atol=2e-6)


def test_a_weight_reads_the_entropy_of_the_base(tmp_path: Path) -> None:
    case = make_case((13, 50, 24), 3.0)
    record = case.record
    masses = np.exp(
        np.concatenate(
            [record.label_logprobs[:, None], record.alternative_logprobs, record.tail_logprobs[:, None]], axis=1
        )
    )
    entropy = -np.sum(masses * np.log(masses), axis=1)
    dropped = (entropy < 2.0) & (record.label_logprobs < -2.0)
    assert 0 < dropped.sum() < 13
    name = written(tmp_path, CONFLICT, "conflict")
    ce, gradient = weighted_sums(case.adapted, case.labels, 1.0 - dropped)
    found = fused(case, Objective("masked-kl", ce_weight=name, tokens_per_loss_chunk=5, weight=0.0))
    assert found[0] == pytest.approx(ce, rel=1e-6)
    _, masked = case.expected(("masked-kl", "bucket"))
    counted = case.counted(("masked-kl", "bucket"))
    expected = gradient + KL_WEIGHT * np.where(counted[:, None], masked, 0.0)
    np.testing.assert_allclose(found[2], expected, rtol=1e-6, atol=2e-6)


# --- what is no formula ----------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[str, str]] = {
    "a mean over positions": ("return (log_p.exp() * (log_p - log_q)).sum(dim=1).mean()", "a number for each of .* po"),
    "a value an outcome": ("return log_p.exp() * (log_p - log_q)", "a number for each of .* positions, found a tensor"),
    "a number": ("return 0.0", "expected a tensor with a number for each of .* found float"),
    "positions that mix": (
        "kl = (log_p.exp() * (log_p - log_q)).sum(dim=1)\n    return kl - kl.mean() + 1",
        "expected the same value of a position alone and among others",
    ),
    "detached": ("return (log_p.exp() * (log_p - log_q.detach())).sum(dim=1)", "expected a value with a gradient by l"),
    "partly detached": (
        "return (log_q.exp().detach() * (log_q - log_p)).sum(dim=1)",
        "expected a gradient that is that of its values",
    ),
    "not finite": ("return (log_p / log_p.exp() * log_q).sum(dim=1)", "expected finite numbers"),
    "an error": ("return missing(log_p, log_q)", "failed on random distributions with NameError"),
    "digits are lost": (
        "p = log_p.exp()\n    return ((1e5 + (p * (log_p - log_q)).sum(dim=1)) - 1e5)",
        "nearly the same values in float32",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_regulariser_that_is_none_is_refused_before_training(case: str, tmp_path: Path) -> None:
    body, said = WRONG[case]
    name = written(tmp_path, f"def f(log_p, log_q):\n    {body}\n", "f")
    with pytest.raises(TrainingFailed, match=said) as caught:
        check_formulas(Objective(name))
    assert "my.py:f" in str(caught.value)


WRONG_WEIGHTS: dict[str, tuple[str, str]] = {
    "one number": ("return tokens.log_q.exp().mean()", "a number for each of .* tokens, found a tensor"),
    "negative": ("return tokens.log_q", "expected weights of 0 or more"),
    "normalised over the slice": (
        "w = tokens.log_q.exp()\n    return w / w.sum()",
        "expected the same value of a token alone and among others",
    ),
    "nan": ("return (tokens.log_q - tokens.log_q) / 0", "expected finite numbers"),
    "what it is not given": ("return tokens.entropy", "failed on random distributions with AttributeError"),
}


@pytest.mark.parametrize("case", WRONG_WEIGHTS)
def test_a_weight_that_is_none_is_refused_before_training(case: str, tmp_path: Path) -> None:
    body, said = WRONG_WEIGHTS[case]
    name = written(tmp_path, f"def g(tokens):\n    {body}\n", "g")
    with pytest.raises(TrainingFailed, match=said):
        check_formulas(Objective(ce_weight=name))


def test_what_pulls_away_from_the_base_is_said(tmp_path: Path) -> None:
    assert check_formulas(Objective(written(tmp_path, KL, "kl"))) == []
    assert check_formulas(Objective(written(tmp_path, JEFFREYS, "jeffreys"))) == []
    entropy = "def f(log_p, log_q):\n    return -(log_p.exp() * log_q).sum(dim=1)\n"
    (said,) = check_formulas(Objective(written(tmp_path, entropy, "f")))
    assert "not 0, where the model is the base" in said
    confident = "def f(log_p, log_q):\n    return (log_q.exp() * log_q).sum(dim=1)\n"
    said_of = check_formulas(Objective(written(tmp_path, confident, "f")))
    assert len(said_of) == 2 and "it pulls away from the base too" in said_of[1]


FILES: dict[str, tuple[str | bytes | None, str, type[Exception], str]] = {
    "no file": (None, "f", InputNotFound, "my.py:f: No such file"),
    "no Python": ("def f(:\n", "f", TrainingFailed, "executing the file failed with SyntaxError"),
    "an import": ("import nowhere_at_all\n", "f", TrainingFailed, "ModuleNotFoundError: .* Its folder is not on"),
    "no function": (
        "def g(): ...\n",
        "f",
        TrainingFailed,
        "expected a function f in the file, found nothing of that n",
    ),
    "no callable": ("f = 3\n", "f", TrainingFailed, "expected a function f in the file, found int"),
    "no text": (b"\xff\xfe", "f", TrainingFailed, "not UTF-8"),
    "too large": ("#" * (2**20 + 1), "f", TrainingFailed, "expected at most 1,048,576 bytes"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_cannot_be_executed_is_named(case: str, tmp_path: Path) -> None:
    content, name, kind, said = FILES[case]
    path = tmp_path / "my.py"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(kind, match=said):
        check_formulas(Objective(f"{path}:{name}"))


def test_nothing_is_executed_but_what_a_setting_names(tmp_path: Path) -> None:
    """Not when an objective is made or described, and of no other file; and once, as long as it is the same."""
    ran = tmp_path / "ran"
    name = written(tmp_path, f"from pathlib import Path\nPath({str(ran)!r}).mkdir()\n{KL}", "kl")
    objective = Objective(name)
    assert objective.plain()["regularizer"] == name and objective.own_formulas == (name,)
    assert check_formulas(Objective()) == [] and not ran.exists()
    check_formulas(objective)
    assert ran.exists()
    check_formulas(objective)  # a second time it would fail


def test_a_changed_file_is_read_again_where_training_begins_and_nowhere_else(tmp_path: Path) -> None:
    name = written(tmp_path, KL, "kl")
    first = load_formula(name)
    written(tmp_path, KL.replace("dim=1)", "dim=1) * 2"), "kl")
    assert formula(name) is first and formula(name).text == KL
    again = load_formula(name)
    assert again.digest != first.digest and formula(name) is again
    p = torch.tensor([[0.5, 0.5]]).log()
    q = torch.tensor([[0.25, 0.75]]).log()
    assert float(again.function(p, q)) == pytest.approx(2 * float(first.function(p, q)))


def test_it_goes_with_what_full_kl_goes_with(tmp_path: Path) -> None:
    name = written(tmp_path, KL, "kl")
    assert not Objective(name).masked
    with pytest.raises(InvalidSettings, match="draws from the base estimate forward KL only"):
        Objective(name, "sampled")
    for wrong in ("my.py", "my.py:", "my.txt:f", ":f", "my.py:2f", "my.py:a.b"):
        with pytest.raises(InvalidSettings, match=r"regularizer: expected one of masked-kl, .* or FILE\.py:FUNCTION"):
            Objective(wrong)


def test_a_weight_that_is_negative_where_no_trial_was_is_refused_when_it_is(tmp_path: Path) -> None:
    name = written(tmp_path, "def g(tokens):\n    return 1 + tokens.log_q / 50\n", "g")
    check_formulas(Objective("none", ce_weight=name))
    columns = [torch.zeros(2), torch.zeros(2, 3), torch.zeros(2)]
    assert own_weights(name, Tokens(torch.tensor([-1.0, -49.0]), *columns)).min() > 0
    with pytest.raises(TrainingFailed, match=r"weights of 0 or more, found -0\.2"):
        own_weights(name, Tokens(torch.tensor([-1.0, -60.0]), *columns))
