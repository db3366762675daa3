"""A fixed partition of the vocabulary into groups, by which the tail of every distribution is split.

Spherical k-means of the rows of the output embedding: tokens whose embeddings point the same way get their logits moved
together, so the masses of such groups say most about where the tail lies (docs/loss.md has the measurement). Owns the
clustering and its determinism: the same weights on the same kind of machine give the same groups; what was used is
stored in the cache, and whoever goes on with it uses that.
Shapes: V vocabulary, D hidden, G groups.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from logitcache.errors import UnsupportedModel
from logitcache.models.device_map import weight_of
from logitcache.models.head import logits_width
from logitcache.models.loading import Base
from logitcache.storage.heads import stored_token_groups

from .settings import CaptureSettings

NUM_ITERATIONS = 30
ROWS_AT_ONCE = 16_384


def groups_for(base: Base, settings: CaptureSettings, path: str | Path) -> NDArray[np.uint8] | None:
    """The tail group of each token, uint8 [V]: that of the cache at `path` if it was begun, or made from the base.

    None without tail groups, or without a tail.
    """
    settings.check_vocabulary(base.identity.vocab_size)
    num_groups = settings.tail_groups
    if not num_groups:
        return None
    stored = stored_token_groups(path)
    return token_groups(base.model, num_groups) if stored is None else stored


@torch.no_grad()
def token_groups(model: PreTrainedModel, num_groups: int) -> NDArray[np.uint8]:
    """The group of each token, uint8 [V], none of them empty; num_groups: 2 to 256 and at most V.

    Raises ValueError where the vocabulary has fewer distinct tokens than groups are asked for, `UnsupportedModel` where
    the output embedding is packed.
    """
    vocab_size = logits_width(model)
    if not 2 <= num_groups <= min(256, vocab_size):
        raise ValueError(f"splitting {vocab_size} tokens: expected 2 to {min(256, vocab_size)} groups")
    with weight_of(model.get_output_embeddings()) as weight:
        if len(weight) != vocab_size:
            raise UnsupportedModel(
                f"splitting the vocabulary of {type(model).__name__} into groups: its output embedding is packed, a "
                "row is no token. Leave --tail-groups out."
            )
        rows = F.normalize(weight.float(), dim=1)
    centres = _first_centres(rows, num_groups)
    for _ in range(NUM_ITERATIONS):
        nearest, similarity = _nearest(rows, centres)
        sums = F.one_hot(nearest, num_groups).float().T @ rows  # in one order on every device, unlike index_add
        counts = nearest.bincount(minlength=num_groups)
        for empty in (counts == 0).nonzero().flatten().tolist():  # takes the token that is worst served
            worst = similarity.argmin()
            sums[empty], similarity[worst] = rows[worst], 2.0
        centres = F.normalize(sums, dim=1)
    nearest, similarity = _nearest(rows, centres)
    for empty in (nearest.bincount(minlength=num_groups) == 0).nonzero().flatten().tolist():
        sizes = nearest.bincount(minlength=num_groups)
        similarity = torch.where(sizes[nearest] > 1, similarity, 2.0)
        worst = similarity.argmin()
        nearest[worst], similarity[worst] = empty, 2.0
    groups: NDArray[np.uint8] = nearest.to(torch.uint8).cpu().numpy()
    return groups


def _first_centres(rows: Tensor, num_groups: int) -> Tensor:
    """k-means++ with a fixed seed: each next centre is drawn by its distance from those there are."""
    generator = torch.Generator().manual_seed(0)
    chosen = [int(torch.randint(len(rows), (), generator=generator))]
    distance = 1 - rows @ rows[chosen[0]]
    for _ in range(num_groups - 1):
        cumulative = distance.clamp(min=1e-12).double().cpu().cumsum(0)
        draw = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[-1]
        chosen.append(min(int(torch.searchsorted(cumulative, draw)), len(rows) - 1))
        distance = torch.minimum(distance, 1 - rows @ rows[chosen[-1]])
    return rows[chosen].clone()


def _nearest(rows: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The most similar centre of each row, int64 [V], and the cosine to it, [V]."""
    similarity, nearest = zip(*((part @ centres.T).max(dim=1) for part in rows.split(ROWS_AT_ONCE)), strict=True)
    return torch.cat(nearest), torch.cat(similarity)
