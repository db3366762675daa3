"""Work done inside the one forward of a wrapped model, by the layer of its head, while the head's weights are whole.

For the time of one call two instances' `forward` are shadowed. That of the causal language model runs the body, and
calls its head once with the hidden states of the rows that are wanted; that of the layer that makes logits does the
work and returns its result in their place. So every hook of every wrapper runs once and in its order, and nothing is
installed that could be lost, copied or pickled. What belongs to the work travels in the closure: wrappers cast what is
an argument. Must not know losses.
Shapes: B rows of a batch, T time, N rows that are wanted, D hidden.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from logitcache.errors import UnsupportedModel

from .device_map import head_device, input_device
from .head import OutputHead, body_of, causal_lm_of, check_same_logits, evaluation_mode, few_tokens, no_virtual_tokens
from .head_layer import HeadLayer, replaced_forward, shadowed
from .sharding import is_sharded

Work = Callable[[Tensor, HeadLayer], Tensor]


def inside_forward(model: nn.Module, inputs: dict[str, Any], rows: Tensor | None, work: Work) -> Tensor:
    """work(hidden states [N, D], the head's layer), done inside the head; its result, as the wrappers return it.

    inputs: those of the model's own forward, without labels. rows: int64 [N], places in the flattened [B * T]; None:
    all. Calls `model` once and its head once, also where N is 0, so that processes that hold the model together do the
    same. Of a model on several devices, inputs may lie on any. Raises `UnsupportedModel` where an adapter adds virtual
    tokens or a hook cuts sequences, or activation checkpointing would run the head again without its work.
    """
    causal_lm = causal_lm_of(model)
    body, head = body_of(causal_lm), causal_lm.get_output_embeddings()
    _check_not_recomputed(model, causal_lm, head)
    to = None if is_sharded(model) else head_device(causal_lm)  # else where it computes, wrappers see to

    def forward(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        given = {k: v for k, v in kwargs.items() if v is not None and k not in ("labels", "return_dict", "use_cache")}
        hidden = body(*args, **given, use_cache=False, return_dict=True).last_hidden_state
        no_virtual_tokens(causal_lm, inputs.get("input_ids"), hidden)
        flat = hidden.flatten(0, 1) if to is None else hidden.flatten(0, 1).to(to)
        return {"loss": head(flat if rows is None else flat.index_select(0, rows.to(flat.device)))}

    placed = inputs if to is None else _placed(inputs, input_device(causal_lm))
    with shadowed(causal_lm, forward), replaced_forward(head, work):
        found: Tensor = model(**placed)["loss"]
    return found


@torch.no_grad()
def check_head_inside(model: nn.Module) -> None:
    """`head.check_head` for a model in its wrappers, by all processes together."""
    causal_lm = causal_lm_of(model)
    ids, mask = (tensor.cpu() for tensor in few_tokens(causal_lm))
    found: list[Tensor] = []

    def keep(hidden: Tensor, layer: HeadLayer) -> Tensor:
        found.append(OutputHead(causal_lm, layer=layer)(hidden))
        return hidden.new_zeros(())

    inputs = _placed({"input_ids": ids, "attention_mask": mask}, next(model.parameters()).device)
    with evaluation_mode(model):
        own = model(**inputs, use_cache=False).logits
        inside_forward(model, inputs, None, keep)
    check_same_logits(causal_lm, own.flatten(0, 1), found[0])


def _placed(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _check_not_recomputed(model: nn.Module, causal_lm: nn.Module, head: nn.Module) -> None:
    for inside, what in ((causal_lm, "the whole of it"), (head, "its head")):
        wrappers = [m for m in model.modules() if "_checkpoint_wrapped_module" in m._modules]
        if any(inside in wrapper.modules() for wrapper in wrappers):
            raise UnsupportedModel(
                f"training {type(causal_lm).__name__}: activation checkpointing is around {what}, and would run it "
                "again in the backward, where no loss is made. Checkpoint its layers (gradient_checkpointing_enable)."
            )
