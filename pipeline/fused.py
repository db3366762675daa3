"""The losses of hidden states without [N, V] memory: slice by slice through the head, recomputed in the backward.

Owns memory, not mathematics: every number comes from `losses`. Tensors only. Trade-off: the head's product is computed
twice (forward and backward) so that one slice of logits is alive at a time; correct for any head, trained or frozen.
Shapes: N positions, n of a slice, D hidden, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .losses import (
    Regularizer,
    SparseTargets,
    Tail,
    cross_entropy,
    regularizer_mask,
    regularizer_values,
)

TOKENS_PER_LOSS_CHUNK = 256
Head = Callable[[Tensor], Tensor]


def linear_losses(
    hidden: Tensor,
    head: Head,
    label_ids: Tensor,
    targets: SparseTargets | None,
    regularizer: Regularizer,
    tail: Tail,
    tokens_per_loss_chunk: int = TOKENS_PER_LOSS_CHUNK,
) -> tuple[Tensor, Tensor]:
    """Sum over positions of the cross-entropy, and of the regulariser over the positions that count; float32 scalars.

    hidden: [N, D] with gradient; head: hidden [n, D] -> logits [n, V]; label_ids: int64 [N]; targets: of the same
    positions, None for the regulariser `none`. Equals the sums of `losses.cross_entropy` and
    `losses.regularizer_values` over the whole [N, V].
    """
    ce = hidden.new_zeros((), dtype=torch.float32)
    kl = hidden.new_zeros((), dtype=torch.float32)
    num_slices = -(-len(hidden) // tokens_per_loss_chunk)
    parts = [None] * num_slices if targets is None else targets.split(tokens_per_loss_chunk)
    slices = zip(hidden.split(tokens_per_loss_chunk), label_ids.split(tokens_per_loss_chunk), parts, strict=True)
    for h, labels, part in slices:
        ce_slice, kl_slice = checkpoint(_slice_losses, h, head, labels, part, regularizer, tail, use_reentrant=False)
        ce, kl = ce + ce_slice, kl + kl_slice
    return ce, kl


def _slice_losses(
    hidden: Tensor,
    head: Head,
    label_ids: Tensor,
    targets: SparseTargets | None,
    regularizer: Regularizer,
    tail: Tail,
) -> tuple[Tensor, Tensor]:
    logits = head(hidden).float()
    ce = cross_entropy(logits, label_ids).sum()
    if targets is None or regularizer == "none":
        return ce, torch.zeros_like(ce)
    values = regularizer_values(logits, targets, regularizer, tail)
    return ce, torch.where(regularizer_mask(targets, regularizer), values, 0.0).sum()
