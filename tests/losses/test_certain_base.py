"""A base that is certain of every label: the KL to it is the cross-entropy, which study_anchors.py calls replay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from logitcache.losses.formulas import Objective
from logitcache.losses.fused import linear_loss
from logitcache.pairing.targets import sparse_targets
from logitcache.storage import BaseLogprobs

N, V, D = 5, 40, 8


def test_the_full_kl_to_a_certain_base_is_the_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    import study_anchors

    torch.manual_seed(0)
    labels = torch.randint(V, (N,))
    said = BaseLogprobs(
        positions=np.arange(N, dtype=np.int32),
        label_ids=labels.numpy().astype(np.uint32),
        label_logprobs=np.full(N, -1.0, dtype=np.float32),
        alternative_ids=((labels[:, None].numpy() + np.array([[1, 2]])) % V).astype(np.uint32),
        alternative_logprobs=np.log(np.array([[0.3, 0.2]] * N, dtype=np.float32)),
        tail_logprobs=np.log(np.full(N, 0.5 - np.exp(-1), dtype=np.float32)),
    )
    targets = sparse_targets([study_anchors.certain(said)])
    hidden = torch.randn(N, D, requires_grad=True)
    head = nn.Linear(D, V, bias=False).requires_grad_(False)
    found = linear_loss(hidden, head, labels, targets, Objective("full-kl"), 1.0)
    logprobs = (hidden.double() @ head.weight.double().T).log_softmax(dim=1)
    cross_entropy = -logprobs.gather(1, labels[:, None]).sum()
    torch.testing.assert_close(found.kl.double(), cross_entropy.detach(), rtol=1e-6, atol=0)
    (gradient,), (of_ce,) = (torch.autograd.grad(loss, hidden) for loss in (found.loss, cross_entropy))
    torch.testing.assert_close(gradient, 2 * of_ce, rtol=1e-5, atol=1e-6)  # the loss has its own cross-entropy beside
