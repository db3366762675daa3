"""Which trained tensors logits are made with, read from autograd's graph.

Owns the check that a head is trained in what it computes with. A module may show one parameter and compute with
another, as sharding wrappers do within a call; autograd then finds the one shown unused, and takes that for no error.
Knows tensors by their names, not who put them there.
"""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from logitcache.errors import TrainingFailed

_ADVICE = "An adapter may be merged: unmerge it. Or something else computes in its place: freeze what is not used."


def trained_in(
    logits: Tensor, held: Mapping[str, Tensor], trained: Collection[str], frozen: Collection[str], layer: str
) -> list[Tensor]:
    """Of the tensors that a head's layer holds, by name, those that logits are made of directly and that are trained.

    held may have views of a larger tensor, in the place of parameters: then the view is what is trained. trained: names
    that must have a part; frozen: names of which no gradient is wanted, whatever they require. Raises
    `TrainingFailed`, naming the layer, where a trained one has no part, or where something else has one, which would
    get no gradient.
    """
    by_node = {t.grad_fn: name for name, t in held.items() if t.grad_fn is not None}
    by_leaf = {id(t): name for name, t in held.items() if t.grad_fn is None}
    used, unknown = dict[str, Tensor](), list[Tensor]()
    nodes, seen = [logits.grad_fn], set[Any]()
    while nodes:
        node: Any = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # where the gradient of a leaf is summed
        name = by_node.get(node) if leaf is None else by_leaf.get(id(leaf))
        if name is not None:
            used[name] = held[name]
        elif leaf is not None:
            unknown.append(leaf)
        else:
            nodes += [before for before, _ in node.next_functions]
    found = {id(tensor) for tensor in used.values()}
    for name in trained:
        if name not in held or id(held[name]) not in found:
            raise TrainingFailed(
                "training the output head: expected a gradient for all that is trained of it, found no gradient for "
                f"{name} of the output head ({layer}). The head computes without it, and it would stay as it is, "
                f"whatever the loss. {_ADVICE}"
            )
    for leaf in unknown:
        raise TrainingFailed(
            "training the output head: expected it to compute with its own parameters, found a trained tensor of shape "
            f"{list(leaf.shape)} that is none of them. That tensor would lack the gradient of what the head makes of "
            f"it. {_ADVICE}"
        )
    return [held[name] for name in held if name in used and name not in frozen]
