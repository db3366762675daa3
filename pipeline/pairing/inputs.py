"""What of a collated batch a model is given, and the refusal of what nobody reads.

A batch may bring more than the tokens: weights of the loss, other labels, another mask. Bodies swallow in their
**kwargs what they do not know, so it would be without effect and without an error. Owns the names that are no loss:
those that attention reads from **kwargs, and those that are harmless. Everything else must be named by the body's own
forward, or by PEFT. Must not know what the documents of a batch are, which is `targets`.
"""

import inspect
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from logitcache.errors import InvalidBatch, TrainingFailed
from logitcache.models.head import body_of, causal_lm_of, unwrapped

from .targets import PREFIX, Batch

HARMLESS: tuple[str, ...] = (
    "length",  # of a row, by which transformers' sampler groups rows
    "seq_lengths",  # of a packed row's documents (TRL), which its position_ids say too
    "num_items_in_batch",  # the Trainer's count for a model's own loss; positions are counted here
    "token_type_ids",  # segments, which some tokenizers make for every model; one that has segments names them
    "special_tokens_mask",  # a tokenizer's, for collators that mask tokens
    "use_cache",  # set here, as is the next
    "return_dict",
)
"""Nothing of the loss or of the model is in them, so they are left out where the body does not name them."""

READ_BY_ATTENTION: tuple[str, ...] = (
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),  # where packed documents begin
    "seq_idx",  # the same, for linear attention and state-space layers
)
"""Named by no body: transformers hands them through **kwargs to the layers."""

OPEN = "open"
"""Of what a batch has for the loss: there where it is padded on the right, for a model that needs no mask then."""

_ALWAYS = ("input_ids", "attention_mask", "position_ids")
"""`targets` reads them, and takes documents apart by them, whatever the body does."""


def opened(batch: Batch) -> Batch:
    """A batch that is padded on the right, for a model that needs no mask (`models.causal.needs_mask`)."""
    return {**batch, f"{PREFIX}{OPEN}": torch.empty(0)}  # nothing to copy to a device


def model_inputs(model: nn.Module, batch: Batch) -> Batch:
    """What of a batch the model itself is given: no labels, nothing of the cache, nothing that it does not read.

    Raises `TrainingFailed` where the batch brings more than that, and more than what is harmless, and `InvalidBatch`
    where it was cut or padded after it was looked up (trimmed, or divided by context parallelism): the places of its
    targets would be those of other tokens.
    """
    shape, looked_up = tuple(batch["input_ids"].shape), batch.get(f"{PREFIX}laid_out")
    if looked_up is not None and (before := tuple(looked_up.shape[:2])) != shape:
        raise InvalidBatch(
            f"reading a batch: expected input_ids {before}, as they were looked up, found {shape}. The targets would "
            "be compared with predictions for other tokens. Cut or pad before the lookup, in the collator; sequences "
            "that are divided over processes are not supported."
        )
    given = {n: v for n, v in batch.items() if n != "labels" and not n.startswith(PREFIX) and v is not None}
    if f"{PREFIX}{OPEN}" in batch:
        given.pop("attention_mask", None)
    others = given.keys() - set(_ALWAYS)
    if not others:
        return given
    unread = others - _read_by(model)
    refused = sorted(unread - set(HARMLESS))
    if refused:
        raise TrainingFailed(
            f"reading a batch: the batch brings {', '.join(refused)}, which neither the loss here nor the forward of "
            f"{type(body_of(causal_lm_of(model))).__name__} reads. It would be without effect. Leave it out of the "
            "batch. Labels of -100 select what is learnt here, and loss_scale or weights weigh it with "
            'Objective(ce_weight="data").'
        )
    return {name: value for name, value in given.items() if name not in unread}


def _read_by(model: nn.Module) -> set[str]:
    """Names of keyword arguments that the body, its attention or PEFT reads."""
    inner, body = unwrapped(model), body_of(causal_lm_of(model))
    read: set[str] = set()
    for forward in (type(body).forward, body.forward):  # a library may have replaced the instance's own
        parameters = inspect.signature(forward).parameters
        read |= {name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
            read |= set(READ_BY_ATTENTION)
    if isinstance(inner, PeftModel):
        read |= _read_by_peft(inner)
    return read


def _read_by_peft(model: Any) -> set[str]:
    """Names of keyword arguments that PEFT takes for itself."""
    tasks = {"task_ids"} if any(str(c.peft_type.value) == "POLY" for c in model.peft_config.values()) else set()
    return tasks | set(getattr(model, "special_peft_forward_args", ()))
