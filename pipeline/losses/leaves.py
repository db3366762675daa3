"""Which trained tensors a result was computed with, read from autograd's graph.

Owns the check that a head is trained in what it computes with. A module may show one parameter and compute with
another, as sharding wrappers do within a call; autograd then finds the one shown unused, and takes that for no error.
Knows tensors and modules, not who wraps them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from logitcache.errors import TrainingFailed

_ADVICE = (
    "A wrapper may put another tensor in its place within the call (FSDP2's fully_shard on lm_head alone): shard the "
    "head with the model around it, or not at all. Or an adapter is merged: unmerge it. Else freeze what is not used."
)


def leaves_of(result: Tensor) -> list[Tensor]:
    """The leaves that require a gradient and that a result depends on."""
    found: list[Tensor] = []
    seen: set[Any] = set()
    nodes: list[Any] = [result.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor) and not node.next_functions:  # where the gradient of a leaf is summed
            found.append(variable)
        nodes += [before for before, _ in node.next_functions]
    return found


def names_in(head: Any) -> Mapping[int, str]:
    """The names of a head's parameters, by their ids; made before a call, in which others may be in their place."""
    module = getattr(head, "module", head)
    named = module.named_parameters() if isinstance(module, nn.Module) else ()
    return {id(parameter): f"{name} of the output head ({type(module).__name__})" for name, parameter in named}


def check_gradients(
    gradients: Sequence[Tensor | None], parameters: Sequence[Tensor], idle: Sequence[Tensor], names: Mapping[int, str]
) -> None:
    """Raise `TrainingFailed`, naming it, for a parameter without a gradient that is not idle."""
    excused = {id(parameter) for parameter in idle}
    for gradient, parameter in zip(gradients, parameters, strict=True):
        if gradient is None and id(parameter) not in excused:
            name = names.get(id(parameter), f"a tensor of shape {list(parameter.shape)} in the output head")
            raise TrainingFailed(
                "training the output head: expected a gradient for all that is trained of it, found no gradient for "
                f"{name}. The head computes without it, and it would stay as it is, whatever the loss. {_ADVICE}"
            )


def check_leaves(logits: Tensor, known: Sequence[Tensor]) -> None:
    """Raise `TrainingFailed` where logits depend on a trained tensor that is none of these, and gets no gradient."""
    ids = {id(tensor) for tensor in known}
    for leaf in leaves_of(logits):
        if id(leaf) not in ids:
            raise TrainingFailed(
                "training the output head: expected it to compute with its own parameters, found a trained tensor of "
                f"shape {list(leaf.shape)} that is none of them. That tensor would lack the gradient of what the head "
                f"makes of it. {_ADVICE}"
            )
