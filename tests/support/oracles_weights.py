"""Slow float64 references for the weights of the cross-entropy, written from their formulas in docs/loss.md alone.

    L_CE = (1/N) sum over supervised t of w_t * -log q(y_t),     gradient by z_t: w_t (q_t - 1_y) / N

A weight is a constant. N is all supervised positions (dft, eaft, eaft-base), or those that are kept (stm, rho1, data).
Legend: N positions, V vocabulary; b, z: base and adapted logits [N, V], p = softmax(b), q = softmax(z), y the labels.
Nothing here imports the code under test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .oracles import FloatArray, IntArray, cross_entropy_oracle, log_softmax

OVER_KEPT = ("stm", "rho1", "data")
PUBLISHED = {"stm": 2.5, "eaft": 1.0, "eaft-base": 1.0, "rho1": 0.6}


def dft_oracle(z: FloatArray, y: IntArray) -> FloatArray:
    """w = q(y)."""
    return np.array([math.exp(log_softmax(row)[label]) for row, label in zip(z, y, strict=True)])


def stm_oracle(log_p_label: FloatArray, perplexity: float) -> FloatArray:
    """w = 0 where exp(-log p(y)) > perplexity, else 1."""
    return np.array([0.0 if math.exp(min(-float(x), 700.0)) > perplexity else 1.0 for x in log_p_label])


def eaft_oracle(logits: Sequence[FloatArray], power: float) -> FloatArray:
    """w = (H / ln K)^power, H the entropy of the softmax of the K = 20 largest, or of all where there are fewer."""
    found = []
    for row in logits:
        largest = np.sort(np.asarray(row, dtype=np.float64))[::-1][:20]
        shares = [math.exp(x) for x in log_softmax(largest)]
        entropy = math.fsum(-s * math.log(s) for s in shares if s > 0)
        found.append((entropy / math.log(len(largest))) ** power)
    return np.array(found)


def rho1_oracle(
    log_p_label: FloatArray, z: FloatArray, y: IntArray, documents: Sequence[int], share: float
) -> FloatArray:
    """w = 1 for the ceil(share * n) of each document's n tokens with the largest -log q(y) + log p(y), else 0.

    Of equal ones the first.
    """
    excess = cross_entropy_oracle(z, y)[0] + np.asarray(log_p_label, dtype=np.float64)
    weights = np.zeros(len(y))
    for document in set(documents):
        own = [i for i, d in enumerate(documents) if d == document]
        num_kept = -(-round(share * 1000) * len(own) // 1000)
        for i in sorted(own, key=lambda i: (-excess[i], i))[:num_kept]:
            weights[i] = 1.0
    return weights


def weighted_sums(z: FloatArray, y: IntArray, weights: FloatArray) -> tuple[float, FloatArray]:
    """sum of w * -log q(y), and its gradient by z [N, V], of weights that are constants."""
    values, gradient = cross_entropy_oracle(z, y)
    parts = [w * v for w, v in zip(weights, values, strict=True) if w != 0]
    return math.fsum(parts), np.asarray(weights)[:, None] * gradient


def num_of_mean(name: str, weights: FloatArray) -> int:
    """N of the mean of a form."""
    return int(np.count_nonzero(weights)) if name in OVER_KEPT else len(weights)
