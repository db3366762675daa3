"""What a model's own forward adds to the cross-entropy of its loss: known here, or refused.

The head is skipped, so the loss that a forward would return is never made, and what a model or an adapter adds to it (a
router's auxiliary loss, a z-loss, a term on the adapter's weights) would be left out in silence. Owns the names of
those that are known, and the comparison of a model's own loss with the cross-entropy of its own logits for those that
are not. AdaLoRA's term is served, by `adalora`.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers.loss.loss_utils import ForCausalLMLoss

from logitcache.adapters.adalora import Orthogonality
from logitcache.errors import TrainingFailed
from logitcache.models.head import causal_lm_of, evaluation_mode, few_tokens, unwrapped
from logitcache.models.sharding import called_in_checks

ROUTER = (
    "the router's auxiliary loss of a mixture of experts is not computed here. "
    "Set output_router_logits=False in the model's config, and router_aux_loss_coef=0.0 in TRL's SFTConfig"
)

_TOLERANCE, _TOLERANCE_HALF = 1e-4, 2e-2
"""Of a loss in float32, which most models make of logits of any dtype, and of one in half precision."""


def check_own_loss(model: nn.Module) -> None:
    """Raise `TrainingFailed` where the loss of the model's own forward is known to have a term that is not made."""
    inner, causal_lm = unwrapped(model), causal_lm_of(model)
    config = causal_lm.config.get_text_config()
    adapters = getattr(inner, "peft_config", {}).values()
    z_loss = getattr(causal_lm, "z_loss_coefficient", getattr(config, "z_loss_coefficient", None))
    refused = (
        (getattr(config, "output_router_logits", False), ROUTER),
        (z_loss, f"its own loss has a z-loss (z_loss_coefficient={z_loss}), which is not computed here. Set it to 0"),
        (
            vars(causal_lm).get("_loss_function", ForCausalLMLoss) is not ForCausalLMLoss,
            "its loss_function was set to another one, which would be ignored. Leave it at its default",
        ),
        (
            any(getattr(adapter, "auxiliary_loss_weight", 0) for adapter in adapters),
            "its adapter adds a loss of its own (auxiliary_loss_weight), which is not computed here. Set that to 0",
        ),
    )
    for holds, why in refused:
        if holds:
            raise TrainingFailed(f"training {type(causal_lm).__name__}: {why}.")


@torch.no_grad()
def probe_own_loss(model: nn.Module) -> None:
    """Raise `TrainingFailed` unless the model's own loss of a few tokens is their cross-entropy and what is served.

    In evaluation mode; of a model in pieces by all processes together. A model that takes no labels, or returns no loss
    or no logits for the same tokens (virtual ones, which are refused elsewhere), has nothing to be compared.
    """
    inner, causal_lm = unwrapped(model), causal_lm_of(model)
    taken = inspect.signature(type(causal_lm).forward).parameters
    if "labels" not in taken and not any(p.kind == p.VAR_KEYWORD for p in taken.values()):
        return
    ids, mask = few_tokens(causal_lm)
    with evaluation_mode(inner), _returning_names(causal_lm.config):
        output: Any = called_in_checks(model)(input_ids=ids, attention_mask=mask, labels=ids)
    torch.clear_autocast_cache()  # torch < 2.11 keeps casts made without gradient
    loss, logits = getattr(output, "loss", None), getattr(output, "logits", None)
    if loss is None or logits is None or logits.shape[:2] != ids.shape:
        return
    ce = float(cross_entropy(logits[0, :-1].float(), ids[0, 1:].to(logits.device)))
    orthogonality = Orthogonality.of(inner)
    served = 0.0 if orthogonality is None else orthogonality.weight * float(orthogonality())
    rounded = any(loss.to(half).to(loss.dtype) == loss for half in (torch.bfloat16, torch.float16))  # by a wrapper too
    relative = _TOLERANCE_HALF if rounded else _TOLERANCE
    allowed = relative * max(1.0, abs(ce)) + _TOLERANCE_HALF * served  # which PEFT makes in the adapter's own dtype
    if abs(float(loss) - ce - served) > allowed:
        raise TrainingFailed(
            f"training {type(causal_lm).__name__}: expected the loss of its own forward to be the cross-entropy, "
            f"{ce + served:.6g} on a few tokens, found {float(loss):.6g}. It has a term that is not computed here and "
            "would be left out. Switch it off in the model's or the adapter's configuration."
        )


@contextmanager
def _returning_names(config: Any) -> Iterator[None]:
    """Where a configuration says return_dict=False, several of transformers' models fail in their own forward."""
    found, config.return_dict = getattr(config, "return_dict", True), True
    try:
        yield
    finally:
        config.return_dict = found
