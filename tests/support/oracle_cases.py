"""Logits and labels on which the oracles themselves are checked."""

from __future__ import annotations

import numpy as np
import pytest
from support.oracles import FloatArray, IntArray

SCALES = ["plain", "peaked", "label", "other"]

cases = pytest.mark.parametrize("scale", SCALES)


def make_logits(
    rng: np.random.Generator, shape: tuple[int, int], scale: str
) -> tuple[FloatArray, FloatArray, IntArray]:
    """b, z [N, V], labels [N]. plain: order 1; peaked: within +-60; label, other: one token at 60, others near -58."""
    n, v = shape
    labels = rng.integers(0, v, n)
    b, z = rng.normal(size=(2, n, v)) * 1.5
    if scale == "peaked":
        b, z = rng.uniform(-60, 60, size=(2, n, v))
    if scale in ("label", "other"):
        peak = labels if scale == "label" else (labels + 1) % v
        for x in (b, z):
            x -= 58
            x[np.arange(n), peak] = 60
    return b, z, labels


def rng_of(shape: tuple[int, int], scale: str) -> np.random.Generator:
    """The generator of a case."""
    return np.random.default_rng([*shape, SCALES.index(scale)])
