"""The largest logits of a row with their ids, exactly, without sorting the vocabulary.

Owns the two stages: the maxima of small chunks of the vocabulary, then a top-k over the chunks that have the k largest
of them, in which the k largest values must be. `topk` alone spends most of its time on values that are far from the
best. The values of a chunk stand V / chunk apart, so that the maxima are one pass over whole rows. Must not know what a
logit or a record is.
Shapes: n rows, V values a row, k kept.
"""

import math

import torch
from torch import Tensor

MIN_CHUNK = 4
"""Maxima of fewer values cost more than they save."""

MOST_CANDIDATES = 1 / 4
"""Share of the vocabulary above which its own top-k is as fast."""


def top_k(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of floats [n, V], descending, and their places, int64; equal ones by ascending place.

    So the first is the argmax. Which others of several equal to the k-th value are kept is not said; it is the same
    whenever the same values come.
    """
    chunk = _chunk(values.shape[1], k)
    kept, places = values.topk(k, dim=1) if chunk is None else _two_stages(values, k, chunk)
    equal = kept[:, 1:] == kept[:, :-1]
    if k == 1 or equal.is_cuda or bool(equal.any()):  # asking a GPU takes longer than what may be saved
        kept, places = _by_place_where_equal(kept, places)
        places = _argmax_first(values, kept, places)
    return kept, places


def _chunk(width: int, k: int) -> int | None:
    """Values a chunk, sqrt(V / k), at which both stages look at as many; None where one stage is faster."""
    chunk = max(MIN_CHUNK, round(math.sqrt(width / max(k, 1))))
    return chunk if 0 < k * chunk <= MOST_CANDIDATES * width else None


def _two_stages(values: Tensor, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    """chunk: values of which one is the maximum; what is left behind the last whole chunk is a candidate as it is."""
    apart = values.shape[1] // chunk
    whole = apart * chunk
    best = values[:, :whole].unflatten(1, (chunk, apart)).amax(dim=1).topk(k, dim=1, sorted=False).indices
    steps = torch.arange(0, whole, apart, device=values.device)
    places = (steps[:, None] + best[:, None, :]).flatten(1)
    rest = torch.arange(whole, values.shape[1], device=values.device).expand(len(values), -1)
    places = torch.cat([places, rest], dim=1)
    kept, at = values.gather(1, places).topk(k, dim=1)
    return kept, places.gather(1, at)


def _by_place_where_equal(values: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Descending values [n, k] with their places; `topk` has equal ones, frequent in bfloat16, in any order."""
    places, order = places.sort(dim=1)
    values, again = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, places.gather(1, again)


def _argmax_first(values: Tensor, kept: Tensor, places: Tensor) -> Tensor:
    """places, with the argmax among them where more values than k, of all [n, V], are equal to the largest."""
    first = torch.where(kept[:, 0] == kept[:, -1], values.argmax(dim=1), places[:, 0])
    return torch.cat([first[:, None], places[:, 1:]], dim=1)
