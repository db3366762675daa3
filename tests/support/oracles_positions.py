"""A step's loss in float64 over the whole vocabulary, with cross-entropy and regulariser each at positions of its own.

    L = (1/N) sum over supervised t of w_t * -log q(y_t) + weight * (1/M) sum over t of R_t

R counts at every position of a document that has supervised ones; of the masked forms and dkd only where
1 - p(y) >= 1e-4. The formulas are those of docs/loss.md, written as they stand there, with nothing left for a tail.
Nothing here imports the code under test.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from support.oracles import log_softmax
from support.oracles_weights import PUBLISHED, dft_oracle, eaft_oracle, num_of_mean, rho1_oracle, stm_oracle

Matrix = NDArray[np.float64]
LEAST_REST = 1e-4


@dataclass(frozen=True)
class Scored:
    """A document alone: logits of base and student at all of its positions, their labels, where it is supervised."""

    base: Matrix
    student: Matrix
    labels: NDArray[np.int64]
    supervised: NDArray[np.bool_]


@dataclass(frozen=True)
class StepMeans:
    """Of one step."""

    ce: float
    regularizer: float
    num_ce: int
    num_regularizer: int


def kl(p: Matrix, q: Matrix) -> float:
    """KL(p || q) of two distributions, nats."""
    held = p > 0
    return float((p[held] * np.log(p[held] / q[held])).sum())


def divergence(name: str, base: Matrix, student: Matrix, label: int, label_weight: float = 1.0) -> float:
    """R of one position from the logits of both, [V]."""
    p, q = np.exp(log_softmax(base)), np.exp(log_softmax(student))
    if name == "full-kl":
        return kl(p, q)
    others = np.arange(len(p)) != label
    p_rest, q_rest = p[others] / p[others].sum(), q[others] / q[others].sum()
    middle = (p_rest + q_rest) / 2
    of_label = [np.array([x[label], x[others].sum()]) for x in (p, q)]
    values = {
        "masked-kl": lambda: kl(p_rest, q_rest),
        "masked-reverse-kl": lambda: kl(q_rest, p_rest),
        "masked-js": lambda: (kl(p_rest, middle) + kl(q_rest, middle)) / 2,
        "dkd": lambda: label_weight * kl(*of_label) + kl(p_rest, q_rest),
    }
    return values[name]()


def step_means(
    documents: Sequence[Scored], name: str, ce_weight: str = "none", label_weight: float = 1.0, perplexity: float = 2.5
) -> StepMeans:
    """Both means of a step of these documents, and how many positions each is over. perplexity: of stm."""
    values = []
    for d in documents:
        if not d.supervised.any():
            continue
        for base, student, label in zip(d.base, d.student, d.labels, strict=True):
            rest = np.exp(log_softmax(base))[np.arange(len(base)) != label].sum()
            if name == "full-kl" or rest >= LEAST_REST:
                values.append(divergence(name, base, student, int(label), label_weight))
    b, z = (np.concatenate([getattr(d, side)[d.supervised] for d in documents]) for side in ("base", "student"))
    y = np.concatenate([d.labels[d.supervised] for d in documents])
    numbers = np.concatenate([np.full(int(d.supervised.sum()), i) for i, d in enumerate(documents)])
    log_p = np.array([log_softmax(row)[label] for row, label in zip(b, y, strict=True)])
    log_q = np.array([log_softmax(row)[label] for row, label in zip(z, y, strict=True)])
    weights = {
        "none": lambda: np.ones(len(y)),
        "dft": lambda: dft_oracle(z, y),
        "stm": lambda: stm_oracle(log_p, perplexity),
        "eaft": lambda: eaft_oracle(list(z), PUBLISHED["eaft"]),
        "eaft-base": lambda: eaft_oracle(list(b), PUBLISHED["eaft-base"]),
        "rho1": lambda: rho1_oracle(log_p, z, y, numbers.tolist(), PUBLISHED["rho1"]),
    }[ce_weight]()
    num_ce = num_of_mean(ce_weight, weights)
    return StepMeans(float((weights * -log_q).sum()) / num_ce, float(np.mean(values)), num_ce, len(values))
