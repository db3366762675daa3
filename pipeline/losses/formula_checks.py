"""What a formula of the user's own must be, tried on random distributions in float64 before anything is trained.

Owns the refusals: a regulariser that gives no number a position, mixes positions, or whose gradient is not that of its
values; a weight that gives no number of 0 or more a token, or mixes tokens. And what is said of a regulariser that
pulls at a model which is the base. Must not know models or caches.
Shapes: N positions, J outcomes, K alternatives.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from logitcache.errors import TrainingFailed
from logitcache.settings import names_function

from .formula_files import load_formula
from .formulas import NO_MASS, Objective, own_divergence
from .weights import Tokens, own_weights

_N, _J, _K = 6, 9, 5
_STEP = 1e-5
_CLOSE = 1e-5
"""Relative, between central differences and the gradient of a smooth formula in float64 (measured 1e-9)."""

_ZERO = 1e-8
_SAME_IN_FLOAT32 = 1e-3


def check_formulas(objective: Objective) -> list[str]:
    """Load the formulas of an objective as their files are now, and try them; what a person should know, in sentences.

    Raises `TrainingFailed` for one that is none, and what `load_formula` raises. Executes no file that the objective
    does not name.
    """
    said = []
    for name in objective.own_formulas:
        load_formula(name)
    if names_function(objective.regularizer):
        said += _check_divergence(objective.regularizer)
    if names_function(objective.ce_weight):
        _check_weight(objective.ce_weight)
    return said


def _check_divergence(name: str) -> list[str]:
    log_p, logits = _distributions()

    def values_of(z: Tensor) -> Tensor:
        return _tried(name, lambda: own_divergence(log_p, z.log_softmax(dim=1), name))

    leaf = logits.clone().requires_grad_()
    values = values_of(leaf)
    _check_finite(name, values)
    if not values.requires_grad:
        raise TrainingFailed(
            f"checking {name}: expected a value with a gradient by log_q, found one without. It would regularise "
            "nothing. Compute it from log_q with torch, without detach or numpy."
        )
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    for i in range(_N):
        alone = _tried(name, partial(own_divergence, log_p[i : i + 1], logits[i : i + 1].log_softmax(dim=1), name))
        _check_alone(name, values.detach()[i], alone[0], "position")
    expected = _central_differences(values_of, logits)
    off = (gradient - expected).abs().max()
    if not bool(torch.isfinite(gradient).all()) or float(off) > _CLOSE * max(1.0, float(expected.abs().max())):
        raise TrainingFailed(
            f"checking {name}: expected a gradient that is that of its values, found one that is off by "
            f"{float(off):.3g} from finite differences (of up to {float(expected.abs().max()):.3g}). Training would "
            "follow something else than is logged. Leave out detach and in-place changes."
        )
    exact = values.detach()
    single = _tried(name, lambda: own_divergence(log_p.float(), logits.float().log_softmax(dim=1), name)).detach()
    if not torch.allclose(single.double(), exact, rtol=_SAME_IN_FLOAT32, atol=_SAME_IN_FLOAT32):
        raise TrainingFailed(
            f"checking {name}: expected nearly the same values in float32, found {float(single[0]):.6g} for "
            f"{float(exact[0]):.6g}. Digits are lost where it is trained. Stay with differences of logarithms."
        )
    return _at_base(name, log_p)


def _at_base(name: str, log_p: Tensor) -> list[str]:
    """What it does where the adapted distribution is the base's: nothing, or what is said of it."""
    leaf = log_p.clone().requires_grad_()
    values = _tried(name, lambda: own_divergence(log_p, leaf.log_softmax(dim=1), name))
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    said, largest = [], float(values.detach().abs().max())
    if largest > _ZERO:
        said.append(f"{name} is up to {largest:.3g}, not 0, where the model is the base.")
    if not float(gradient.abs().max()) <= _ZERO:
        said.append(
            f"{name} has a gradient of up to {float(gradient.abs().max()):.3g} where the model is the base: it pulls "
            "away from the base too."
        )
    return said


def _check_weight(name: str) -> None:
    log_p, logits = _distributions()
    log_q = logits.log_softmax(dim=1)
    log_p_tail = log_p[:, 1 + _K :].logsumexp(dim=1)
    tokens = Tokens(log_q[:, 0].float(), *(part.float() for part in (log_p[:, 0], log_p[:, 1 : 1 + _K], log_p_tail)))
    weights = _tried(name, lambda: own_weights(name, tokens))
    _check_finite(name, weights)
    for i in range(_N):
        columns = (tokens.log_q, tokens.log_p, tokens.log_p_alternatives, tokens.log_p_tail)
        part = Tokens(*(column[i : i + 1] for column in columns))
        _check_alone(name, weights[i], _tried(name, partial(own_weights, name, part))[0], "token")


def _distributions() -> tuple[Tensor, Tensor]:
    """log P [N, J], some outcomes of which have no mass, and logits of Q; float64."""
    random = torch.Generator().manual_seed(0)
    log_p, logits = (torch.randn(_N, _J, generator=random, dtype=torch.float64) * 2 for _ in range(2))
    log_p[1, 3] = log_p[4, 7:] = -torch.inf
    log_p = log_p.log_softmax(dim=1)
    order = log_p[:, 1 : 1 + _K].argsort(dim=1, descending=True)
    log_p[:, 1 : 1 + _K] = log_p[:, 1 : 1 + _K].gather(1, order)
    return log_p.clamp(min=NO_MASS), logits


def _central_differences(f: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    found = torch.zeros_like(logits)
    with torch.no_grad():
        for i in range(logits.shape[1]):  # positions do not mix, which has been checked
            step = torch.zeros_like(logits)
            step[:, i] = _STEP
            found[:, i] = (f(logits + step) - f(logits - step)) / (2 * _STEP)
    return found


def _tried(name: str, call: Callable[[], Tensor]) -> Tensor:
    """What it gives. Raises `TrainingFailed` for whatever goes wrong in it."""
    try:
        return call()
    except TrainingFailed:
        raise
    except Exception as error:
        raise TrainingFailed(
            f"checking {name}: it failed on random distributions with {type(error).__name__}: {error}. Nothing was "
            "trained. Repair the formula."
        ) from error


def _check_finite(name: str, values: Tensor) -> None:
    if not values.is_floating_point() or not bool(torch.isfinite(values).all()):
        raise TrainingFailed(
            f"checking {name}: expected finite numbers on random distributions, found "
            f"{values.flatten()[:4].tolist()}. An outcome without mass has the logarithm {NO_MASS:g}, not -inf. Repair "
            "the formula."
        )


def _check_alone(name: str, together: Tensor, alone: Tensor, what: str) -> None:
    """Raise `TrainingFailed` where a value depends on what else is in the slice."""
    alone = alone.detach()
    if not torch.allclose(together.double(), alone.double(), rtol=1e-6, atol=1e-9):
        raise TrainingFailed(
            f"checking {name}: expected the same value of a {what} alone and among others, found {float(alone):.6g} "
            f"and {float(together):.6g}. The loss is made in slices, and would depend on their size. Compute each "
            f"{what} by itself."
        )
