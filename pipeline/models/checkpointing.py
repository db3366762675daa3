"""Checkpointed layers: a model keeps the input of each layer alone, and runs the layer again in the backward.

Owns how it is asked for under any version of transformers. The head is not among the layers, so the loss that is made
in it is made once. Must not know losses or trainers.
"""

from typing import Any

from torch import nn

from logitcache.errors import UnsupportedModel

from .head import causal_lm_of


def check_checkpointable(model: nn.Module) -> None:
    """Raise `UnsupportedModel` for a model whose layers cannot be run again."""
    causal_lm = causal_lm_of(model)
    if not getattr(causal_lm, "supports_gradient_checkpointing", False):
        raise UnsupportedModel(
            f"training {type(causal_lm).__name__} with gradient checkpointing: transformers cannot run its layers "
            "again. Nothing was started. Leave --gradient-checkpointing out, and use a smaller --batch-tokens."
        )


def checkpoint_layers(model: nn.Module) -> None:
    """From here on, while it is trained, each layer is run again in the backward. Raises as `check_checkpointable`.

    Without re-entering autograd, so that a frozen embedding needs no gradient and a wrapper sees one backward.
    """
    check_checkpointable(model)
    causal_lm: Any = causal_lm_of(model)
    enable = getattr(causal_lm, "activation_checkpointing_enable", None) or causal_lm.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    causal_lm.disable_input_require_grads()  # transformers' enabling lets the embedding's output have a gradient
