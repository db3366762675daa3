"""The loss of a step with anchor caches, in float64, from its formula in docs/loss.md and full logits alone.

    L = mean CE(new) + w * mean R(new) + sum over anchor caches a of W_a * mean R_a(a's samples of the step)

Every mean is over its own positions of the whole step, however the step is divided; an anchor has no cross-entropy.
R is KL( p || q ) over all tokens (full), or KL( p without y || q without y ) where 1 - p(y) >= 1e-4 (masked).
Shapes: N positions, V vocabulary. Nothing here imports the code under test.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .oracles import FloatArray, IntArray, cross_entropy_oracle, log_softmax, masked_kl_full_oracle


@dataclass(frozen=True)
class Positions:
    """Positions one after the other: base logits b [N, V], adapted logits z [N, V], labels y [N]."""

    b: FloatArray
    z: FloatArray
    y: IntArray


@dataclass(frozen=True)
class Regularized:
    """A mean regulariser over positions, with its weight: `regularizer` is full-kl, masked-kl or none."""

    positions: Positions
    regularizer: str
    weight: float


@dataclass(frozen=True)
class AnchoredStep:
    """loss; its gradient by z of the new positions [N, V] and of each anchor's; and the means that it is made of."""

    loss: float
    new_gradient: FloatArray
    anchor_gradients: tuple[FloatArray, ...]
    ce: float
    kl: float
    anchor_kl: tuple[float, ...]


def anchored_step(new: Regularized, anchors: Sequence[Regularized]) -> AnchoredStep:
    """The loss of a whole step. An anchor without positions has a mean of 0."""
    ce, gradient = cross_entropy_oracle(new.positions.z, new.positions.y)
    count = max(len(ce), 1)
    kl, kl_gradient = _mean(new)
    found = [_mean(anchor) for anchor in anchors]
    terms = [math.fsum(ce) / count, new.weight * kl, *(a.weight * v for a, (v, _) in zip(anchors, found, strict=True))]
    return AnchoredStep(
        math.fsum(terms),
        gradient / count + new.weight * kl_gradient,
        tuple(anchor.weight * g for anchor, (_, g) in zip(anchors, found, strict=True)),
        terms[0],
        kl,
        tuple(value for value, _ in found),
    )


def _mean(term: Regularized) -> tuple[float, FloatArray]:
    """The mean of R over the positions that count, and its gradient by z [N, V]."""
    b, z, y = term.positions.b, term.positions.z, term.positions.y
    gradient = np.zeros_like(z)
    if term.regularizer == "none":
        return 0.0, gradient
    log_p = [log_softmax(row) for row in b]
    if term.regularizer == "masked-kl":
        rest = [math.fsum(np.exp(np.delete(row, label))) for row, label in zip(log_p, y, strict=True)]
        counted = [i for i, mass in enumerate(rest) if mass >= 1e-4]
        values, rows = masked_kl_full_oracle(b[counted], z[counted], y[counted])
    else:
        counted = list(range(len(y)))
        log_q = [log_softmax(row) for row in z]
        values = np.array([math.fsum(np.exp(p) * (p - q)) for p, q in zip(log_p, log_q, strict=True)])
        rows = np.array([np.exp(q) - np.exp(p) for p, q in zip(log_p, log_q, strict=True)]).reshape(z.shape)
    count = max(len(counted), 1)
    gradient[counted] = rows / count
    return math.fsum(values) / count, gradient
