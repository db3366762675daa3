"""Hidden states or logits -> the record: what a cache keeps of a distribution, whoever computed it.

Owns the record's numbers: the head on slices of supervised positions only, and of each slice of logits the label, the
alternatives, the tail, its groups and its draws. [batch, time, vocabulary] is never held; one slice of logits in
float32 is. Must not run a base.
Shapes: N positions of the batch, n of a slice, V vocabulary, K alternatives, G groups, M draws, D hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitcache.data.batches import label_ids, moved
from logitcache.data.samples import Sample
from logitcache.errors import InvalidBatch
from logitcache.models.head import LOGITS_BYTES, rows_of, slice_rows
from logitcache.storage import BaseLogprobs, sample_id

from .pending import PendingRecords
from .top_k import top_k as top_k_of

CACHED_BYTES = {"cpu": 4 * 2**20, "cuda": LOGITS_BYTES["cuda"]}
"""Logits whose record is made together on a processor: larger temporaries leave its cache, and come from the system
anew each time, which takes longer than the arithmetic (2.6 times at V = 151,936)."""

LEAST_MASS = 1e-25
"""Tail, as a share of the largest token's probability, below which float32 may lose tokens of it: it is summed anew."""


@dataclass(frozen=True)
class Kept:
    """What is kept of a distribution. groups: one-hot, float32 [V, G], where the logits are; of the tail, M draws."""

    top_k: int
    groups: Tensor | None = None
    num_tail_samples: int = 0


def records_from_logits(
    logits: Tensor,
    batch: Sequence[Sample],
    top_k: int,
    token_groups: NDArray[np.uint8] | None = None,
    num_tail_samples: int = 0,
) -> list[BaseLogprobs]:
    """The record of every supervised position of each sample, from logits that anything may have made.

    logits: floats [N, V], one row a supervised position, of the samples one after the other: a sample's row i is what
    its position `sample.positions[i]` says of the token after it. token_groups: uint8 [V], the partition of a cache
    that has tail groups; num_tail_samples: draws, the same for a position of a sample wherever it is captured. Raises
    `NonFiniteLogits` with sample and position, `InvalidBatch` where the rows are not those of the samples.
    """
    return records_from_hidden(logits, lambda rows: rows, batch, top_k, token_groups, num_tail_samples)


def records_from_hidden(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    batch: Sequence[Sample],
    top_k: int,
    token_groups: NDArray[np.uint8] | None = None,
    num_tail_samples: int = 0,
) -> list[BaseLogprobs]:
    """`records_from_logits` of last hidden states, as the head is given them: after the final norm.

    hidden: [N, D] in the model's dtype, where the head is. head: [n, D] -> logits [n, V] with whatever the model does
    to them; `load_head` has that of a checkpoint.
    """
    labels = label_ids(batch)
    if hidden.dim() != 2 or len(hidden) != len(labels):
        raise InvalidBatch(
            f"recording {len(batch)} samples: expected [{len(labels)}, ...], a row for each of their supervised "
            f"positions, found {list(hidden.shape)}. Nothing was recorded. Give the rows at `sample.positions`."
        )
    groups = None if token_groups is None else one_hot(torch.from_numpy(token_groups.copy()), hidden.device)
    width = int(head(hidden[:1]).shape[1])
    rows = hidden, moved(torch.from_numpy(labels), hidden.device)
    return record_hidden(*rows, head, width, batch, Kept(top_k, groups, num_tail_samples)).records()


@torch.inference_mode()
def record_hidden(
    hidden: Tensor,
    labels: Tensor,
    head: Callable[[Tensor], Tensor],
    vocab_size: int,
    batch: Sequence[Sample],
    kept: Kept,
) -> PendingRecords:
    """What gives the records of hidden states [N, D] with labels [N], without waiting for a GPU."""
    device = hidden.device
    uniforms = moved(torch.from_numpy(_uniforms(batch, kept.num_tail_samples)), device)
    num_rows, num_together = slice_rows(vocab_size, device), rows_of(CACHED_BYTES, vocab_size, device)
    parts = []
    for h, y, u in zip(*(column.split(num_rows) for column in (hidden, labels, uniforms)), strict=True):
        together = zip(*(c.split(num_together) for c in (head(h).float(), y, u)), strict=True)
        parts += [slice_record(z, wanted, kept.top_k, kept.groups, v) for z, wanted, v in together]
    return PendingRecords(batch, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def one_hot(groups: Tensor, device: torch.device) -> Tensor:
    """float32 [V, G] on a device, of the group of each token, [V]; of n partitions, [V, n], with the groups of all
    side by side."""
    partitions = groups.long().reshape(len(groups), -1).unbind(dim=1)
    rows = torch.cat([torch.nn.functional.one_hot(partition) for partition in partitions], dim=1).float()
    return rows.to(device)


def slice_record(
    logits: Tensor, labels: Tensor, top_k: int, groups: Tensor | None = None, uniforms: Tensor | None = None
) -> dict[str, Tensor]:
    """The columns of `BaseLogprobs` that float32 logits [n, V] determine; the logits stay as they are.

    groups: one-hot, float32 [V, G]. uniforms: float64 [n, M] in [0, 1), M draws from the tail by inversion. A row with
    a logit that is not finite comes back as NaN in its log p(label).
    """
    k = min(top_k, logits.shape[1] - 1)
    top = logits.amax(dim=1, keepdim=True)
    finite = (logits.amin(dim=1) > -torch.inf) & (top.squeeze(1) < torch.inf)  # NaN fails both
    rest = logits - top  # first, so that the size of the logits costs no digits
    masses = rest.exp()
    normaliser = masses.sum(dim=1, keepdim=True).log()
    label = (rest.gather(1, labels[:, None]) - normaliser).squeeze(1)
    kept, ids = top_k_of(rest.scatter_(1, labels[:, None], -torch.inf), k)
    rest.scatter_(1, ids, -torch.inf)
    left = masses.scatter_(1, labels[:, None], 0.0).scatter_(1, ids, 0.0).sum(dim=1)
    tail = left.log() - normaliser.squeeze(1)
    if (tiny := left < LEAST_MASS).is_cuda or bool(tiny.any()):  # asking a GPU takes longer than what may be saved
        tail = torch.where(tiny, rest.logsumexp(dim=1) - normaliser.squeeze(1), tail)
    columns = {
        "label_logprobs": label.where(finite, torch.nan),
        "alternative_ids": ids,
        "alternative_logprobs": kept - normaliser,
        "tail_logprobs": tail,
    }
    if groups is None and (uniforms is None or not uniforms.shape[1]):
        return columns
    most = rest.amax(dim=1, keepdim=True)
    most = torch.where(most > -torch.inf, most, 0.0)
    masses = (rest - most).exp()
    if groups is not None:
        columns["tail_group_logprobs"] = (masses @ groups).log() + (most - normaliser)
    if uniforms is not None and uniforms.shape[1]:
        drawn = _draw(masses, uniforms)
        logprobs = rest.gather(1, drawn) - normaliser
        order = logprobs.argsort(dim=1, descending=True, stable=True)  # of ids in ascending order
        nothing = (tail == -torch.inf)[:, None]
        columns["tail_sample_ids"] = torch.where(nothing, -1, drawn.gather(1, order))
        columns["tail_sample_logprobs"] = torch.where(nothing, -torch.inf, logprobs.gather(1, order))
    return columns


def _draw(masses: Tensor, uniforms: Tensor) -> Tensor:
    """Indices, ascending, int64 [n, M]: the first whose cumulative mass exceeds the uniform's share of the whole."""
    cumulative = masses.double().cumsum(dim=1)
    total = cumulative[:, -1:]
    below = total.nextafter(torch.zeros_like(total))  # a uniform next to 1 times the total may round to it
    drawn = torch.searchsorted(cumulative, torch.minimum(uniforms * total, below), right=True)
    return drawn.clamp_(max=masses.shape[1] - 1).sort(dim=1).values  # beyond the end only where there is no tail


def _uniforms(batch: Sequence[Sample], num_draws: int) -> NDArray[np.float64]:
    """float64 [N, M] in [0, 1) of the supervised positions: a function of tokens and position, not of the batch."""
    parts = []
    for sample in batch:
        seed = int.from_bytes(sample_id(sample.token_ids), "little")
        stream = np.random.Generator(np.random.Philox(key=seed))
        parts.append(stream.random((len(sample.token_ids), num_draws))[sample.positions])
    return np.concatenate(parts)
