"""A head whose logits are given, in float64."""

from __future__ import annotations

import numpy as np
import torch
from support.numerics_cases import (
    Case,
)
from support.oracles import FloatArray
from torch import Tensor, nn


class ExactHead:
    """A frozen nn.Linear, a permutation with signs, so that its logits are any given float32 numbers exactly."""

    def __init__(self, case: Case) -> None:
        v = case.adapted.shape[1]
        rng = np.random.default_rng(v)
        self.order, self.signs = rng.permutation(v), rng.choice([-1.0, 1.0], size=v)
        self.linear = nn.Linear(v, v, bias=False).requires_grad_(False)
        self.linear.weight.zero_()
        self.linear.weight[torch.arange(v), torch.from_numpy(self.order)] = torch.from_numpy(self.signs).float()
        hidden = np.zeros_like(case.adapted)
        hidden[:, self.order] = case.adapted * self.signs
        self.hidden = torch.from_numpy(hidden).float().requires_grad_()

    def to_logits(self, gradient: Tensor | None) -> FloatArray:
        assert gradient is not None
        return np.asarray(gradient.double().numpy()[:, self.order] * self.signs)
