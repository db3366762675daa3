"""Does a model need the mask of padding on the right? Not if nothing that stands behind a token changes what it says.

A mask beside causal attention costs the fast path: libraries then make a [B, T, T] mask, and leave the kernels that
know only causality. Owns the question to the model itself, once: what a class or a configuration says of it is not
believed. Must not know batches of training, nor who asks.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .head import causal_lm_of, evaluation_mode, hidden_states, num_tokens
from .quantization import held_in
from .sharding import dtype_as_called

LENGTHS = (7, 12, 5)
"""Tokens of the rows of the probe. Padding stands before tokens of other rows too, as in a batch: it takes room from
them in a layer that has room for so many."""

TOLERANCE_FLOAT32, TOLERANCE_16BIT = 1e-5, 0.02
"""Relative change of hidden states, mean over tokens, that another kernel may make (7e-3 measured in bfloat16)."""


@torch.no_grad()
def needs_mask(model: nn.Module) -> bool:
    """Whether a batch that is padded on the right must bring its attention mask: three forwards of a few tokens.

    It need not where the hidden states of the tokens are the same with the mask and without, but for rounding, and
    exactly the same whatever the padding is. Whoever takes more than all tokens before it into account needs it, in its
    row or in others, and so does a model whose rounding depends on the rest of its batch, as LLM.int8()'s.
    """
    ids, mask = _probe(num_tokens(causal_lm_of(model)))
    others = torch.where(mask.bool(), ids, ids + 1)
    with evaluation_mode(model):
        masked = _of_tokens(model, mask, input_ids=ids, attention_mask=mask)
        open_, other = (_of_tokens(model, mask, input_ids=i) for i in (ids, others))
    torch.clear_autocast_cache()  # torch < 2.11 keeps casts made without gradient
    is_short = held_in(causal_lm_of(model)) is not None or dtype_as_called(model).itemsize < 4
    sizes = masked.norm(dim=-1).clamp(min=torch.finfo(masked.dtype).tiny)
    change = float(((open_ - masked).norm(dim=-1) / sizes).mean())
    is_same = change <= (TOLERANCE_16BIT if is_short else TOLERANCE_FLOAT32)  # not where it is NaN
    return not (is_same and torch.equal(open_, other))


def _probe(vocab_size: int) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask, [B, T]."""
    longest = max(LENGTHS)
    ids = torch.arange(len(LENGTHS) * longest).reshape(-1, longest) * 7919 % max(vocab_size - 1, 1)
    return ids, torch.stack([(torch.arange(longest) < length).long() for length in LENGTHS])


def _of_tokens(model: nn.Module, mask: Tensor, **inputs: Any) -> Tensor:
    """Hidden states of the tokens that are not padding, float32 [N, D]."""
    hidden = hidden_states(model, **inputs)
    return hidden[mask.to(hidden.device).bool()].float()
