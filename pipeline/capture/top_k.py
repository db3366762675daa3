"""The largest logits of a row with their ids, exactly, without sorting the vocabulary.

Owns the two stages: the maxima of small chunks of the vocabulary, then a top-k over the chunks that have the k largest
of them, in which the k largest values must be. `topk` alone spends most of its time on values that are far from the
best. The values of a chunk stand V / chunk apart, so that the maxima are one pass over whole rows. Must not know what a
logit or a record is.
Shapes: n rows, V values a row, k kept.
"""

import math

import numpy as np
import torch
from torch import Tensor

MIN_CHUNK = 4
"""Maxima of fewer values cost more than they save."""

MOST_CANDIDATES = 1 / 4
"""Share of the vocabulary above which its own top-k is as fast."""


def top_k(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of floats [n, V], descending, and their places, int64; equal ones by ascending place.

    So the first is the argmax. Which others of several equal to the k-th value are kept is not said; it is the same
    whenever the same values come, on one kind of processor.
    """
    chunk = _chunk(values.shape[1], k)
    places = _largest(values, k) if chunk is None else _two_stages(values, k, chunk)
    kept, order = values.gather(1, places).sort(dim=1, descending=True)
    places = places.gather(1, order)
    if _any(kept[:, 1:] == kept[:, :-1]):
        kept, places = _by_place_where_equal(kept, places)
    if k and _any(kept[:, 0] == kept[:, -1]):
        places = _argmax_first(values, kept, places)
    return kept, places


def _any(rows: Tensor) -> bool:
    """Whether some are true; of a GPU without asking, which takes longer than what may be saved."""
    return rows.is_cuda or bool(rows.any())


def _chunk(width: int, k: int) -> int | None:
    """Values a chunk, sqrt(V / k), at which both stages look at as many; None where one stage is faster."""
    chunk = max(MIN_CHUNK, round(math.sqrt(width / max(k, 1))))
    return chunk if 0 < k * chunk <= MOST_CANDIDATES * width else None


def _two_stages(values: Tensor, k: int, chunk: int) -> Tensor:
    """Places. chunk: values of which one is the maximum; what is left behind the last whole chunk is a candidate as it
    is."""
    apart = values.shape[1] // chunk
    whole = apart * chunk
    chunks = values[:, :whole].unflatten(1, (chunk, apart))
    best = _largest(chunks.amax(dim=1), k)
    candidates = chunks.gather(2, best[:, None, :].expand(-1, chunk, -1)).flatten(1)
    if whole < values.shape[1]:
        candidates = torch.cat([candidates, values[:, whole:]], dim=1)
    at = _largest(candidates, k)
    places = best.gather(1, at % k) + at // k * apart
    return torch.where(at < chunk * k, places, at + (whole - chunk * k))


def _largest(values: Tensor, k: int) -> Tensor:
    """Places of the k largest of each row [n, W], in any order. On a processor by numpy, whose selection looks at eight
    or sixteen values at once."""
    width = values.shape[1]
    if values.device.type != "cpu" or not 0 < k < width:
        return values.topk(k, dim=1, sorted=False).indices
    return torch.from_numpy(np.argpartition(values.numpy(), width - k, axis=1)[:, width - k :])


def _by_place_where_equal(values: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Descending values [n, k] with their places; `topk` has equal ones, frequent in bfloat16, in any order."""
    places, order = places.sort(dim=1)
    values, again = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, places.gather(1, again)


def _argmax_first(values: Tensor, kept: Tensor, places: Tensor) -> Tensor:
    """places, with the argmax among them where more values than k, of all [n, V], are equal to the largest."""
    first = torch.where(kept[:, 0] == kept[:, -1], values.argmax(dim=1), places[:, 0])
    return torch.cat([first[:, None], places[:, 1:]], dim=1)
