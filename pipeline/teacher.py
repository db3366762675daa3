"""The base -> `BaseLogprobs`, chunk by chunk.

Owns the record's numbers: one body forward of a padded batch, then the head on slices of supervised positions only.
[batch, time, vocabulary] is never held; one slice of logits in float32 is.
Shapes: B samples, T time, N positions of the batch, n of a slice, V vocabulary, K alternatives, D hidden.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from logitcache.storage import BaseLogprobs

from .errors import NonFiniteLogits
from .head import OutputHead, hidden_states, logits_width
from .samples import Sample, pad_batch

SLICE_BYTES = 64 * 2**20
"""Size of one slice of float32 logits; a few of its size are alive at a time."""


@torch.inference_mode()
def capture(model: PreTrainedModel, batch: Sequence[Sample], top_k: int) -> list[BaseLogprobs]:
    """The record of every supervised position of a batch, with K = min(top_k, V - 1).

    log p(c) = z_c - logsumexp(z) in float32 over the whole vocabulary; the tail is summed directly over the tokens that
    are neither label nor kept. Raises `NonFiniteLogits` with the sample and the position.
    """
    padded = pad_batch(batch, model.device)
    hidden = hidden_states(model, padded.input_ids, padded.attention_mask).flatten(0, 1)
    hidden = hidden.index_select(0, padded.rows)
    head = OutputHead(model)
    vocab_size = logits_width(model)
    num_rows = max(1, SLICE_BYTES // (4 * vocab_size))
    slices = zip(hidden.split(num_rows), padded.label_ids.split(num_rows), strict=True)
    parts = [slice_record(head(h).float(), labels, top_k) for h, labels in slices]
    label, ids, kept, tail = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
    _check_finite(label, batch)
    records, start = [], 0
    for sample in batch:
        rows = slice(start, start + len(sample.positions))
        start = rows.stop
        records.append(
            BaseLogprobs(
                positions=sample.positions,
                label_ids=sample.token_ids[sample.positions + 1],
                label_logprobs=label[rows],
                alternative_ids=ids[rows].astype(np.uint32),
                alternative_logprobs=kept[rows],
                tail_logprobs=tail[rows],
            )
        )
    return records


def slice_record(logits: Tensor, labels: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log p(label) [n], ids [n, K], their log p [n, K] and log p(tail) [n] of float32 logits [n, V].

    A row with a logit that is not finite comes back as NaN in its log p(label).
    """
    k = min(top_k, logits.shape[1] - 1)
    top = logits.amax(dim=1, keepdim=True)
    finite = (logits.amin(dim=1) > -torch.inf) & (top.squeeze(1) < torch.inf)  # NaN fails both
    rest = logits - top  # first, so that the size of the logits costs no digits
    normaliser = rest.logsumexp(dim=1, keepdim=True)
    label = (rest.gather(1, labels[:, None]) - normaliser).squeeze(1)
    kept, ids = rest.scatter_(1, labels[:, None], -torch.inf).topk(k, dim=1)
    tail = rest.scatter_(1, ids, -torch.inf).logsumexp(dim=1) - normaliser.squeeze(1)
    return label.where(finite, torch.nan), ids, kept - normaliser, tail


def _check_finite(label_logprobs: np.ndarray, batch: Sequence[Sample]) -> None:
    bad = np.flatnonzero(np.isnan(label_logprobs))
    if not len(bad):
        return
    row = int(bad[0])
    for sample in batch:
        if row < len(sample.positions):
            raise NonFiniteLogits(
                f"running the base on {sample.origin}, position {sample.positions[row]}: its logits are not finite "
                f"({len(bad)} positions of this batch). Nothing of this batch was cached. "
                "Try --dtype float32, or look at this row."
            )
        row -= len(sample.positions)
