"""The loss of one batch, made inside the forward of the student. What trainers and own loops share.

Owns the way from a batch with targets to a `LinearLoss`. Must not read caches: batches come from `targets`.
Trade-off: the loss is made by the head's layer in the model's one forward, so that it is right under whatever shards
the model; it must then know there all that it is multiplied by, since wrappers may round what is returned.
Shapes: N supervised positions, D hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from logitcache.errors import TrainingFailed
from logitcache.losses.formulas import Objective
from logitcache.losses.fused import LinearLoss, linear_loss
from logitcache.losses.leaves import trained_in
from logitcache.models.head import OutputHead, causal_lm_of
from logitcache.models.head_layer import HeadLayer
from logitcache.models.inside_forward import inside_forward
from logitcache.pairing.inputs import model_inputs
from logitcache.pairing.targets import PREFIX, Batch, placed, targets_of
from logitcache.pairing.view import CacheView


def batch_loss(
    model: nn.Module,
    batch: Batch,
    objective: Objective,
    kl_weight: float | Tensor,
    view: CacheView | None,
    top1: Tensor | None = None,
    scale: float | Tensor = 1.0,
) -> LinearLoss:
    """scale * (ce + kl_weight * kl) with gradient, and ce and kl without: sums over the positions that count.

    model: whatever wraps it, DistributedDataParallel, FSDP, DeepSpeed, PEFT, torch.compile; it is called once. batch:
    as `targets.with_targets` makes it, on one device, where the sums will be too; the model may be on several.
    kl_weight stands for `objective.weight`. view: of the cache that the targets are from, None without one. scale: what
    makes a share of a mean of the sums; multiplied here, before a wrapper rounds the loss and its gradient to half
    precision. The head's trained parameters (LoRA on lm_head, modules_to_save, a whole model) get their gradients too,
    those of adapters that are not active none. Raises `TrainingFailed` where another one would get none. top1: as
    `linear_loss` has it.
    """
    where, made = batch["input_ids"].device, list[LinearLoss]()

    def loss_of(hidden: Tensor, layer: HeadLayer) -> Tensor:
        own, weight = placed(batch, hidden.device), kl_weight
        if not isinstance(weight, Tensor):  # filled in there: a number of the host's would be copied, slice by slice
            weight = torch.full((), weight, device=hidden.device)
        vocab_size, groups = (None, None) if view is None else (view.vocab_size, view.token_groups(hidden.device))
        head = OutputHead(causal_lm_of(model), vocab_size, layer)
        given, logits_of, trained = _given(hidden, head, layer)
        sums: LinearLoss = linear_loss(
            given,
            logits_of,
            own[f"{PREFIX}label_ids"],
            targets_of(own, groups),
            objective,
            _on(hidden.device, weight),
            trained,
            top1,
            own.get(f"{PREFIX}supervised"),
            own.get(f"{PREFIX}for_ce"),
        )
        made.append(sums._replace(loss=sums.loss * _on(hidden.device, scale)))
        return made[0].loss

    returned = inside_forward(model, model_inputs(model, batch), batch[f"{PREFIX}rows"], loss_of)
    (found,) = made
    exact: Tensor = _Exact.apply(returned, found.loss.detach().to(returned.device))  # type: ignore[no-untyped-call]
    return LinearLoss(*(value.to(where) for value in (exact, found.ce, found.kl)))


def _given(hidden: Tensor, head: OutputHead, layer: HeadLayer) -> tuple[Tensor, Any, list[Tensor]]:
    """What the loss goes through in slices, how logits are made of it, and what is trained on that way.

    The hidden states, and the head; or where the head must run once, its logits, as they are, [N, V].
    """
    if layer.has_parts:
        if layer.merged:
            raise TrainingFailed(
                "training the output head: an adapter is merged into it, and the head computes without what is "
                "trained. Unmerge it."
            )
        return head(hidden), nn.Identity(), []
    if not torch.is_grad_enabled():
        return hidden, head, []
    of_one, name = head(hidden.detach()[:1]), type(layer.layer).__name__
    return hidden, head, trained_in(of_one, layer.tensors(), sorted(layer.trained), layer.frozen, name)


def _on(device: torch.device, value: float | Tensor) -> float | Tensor:
    return value.to(device) if isinstance(value, Tensor) else value


class _Exact(torch.autograd.Function):
    """The loss as it was made, with the gradient of what a wrapper returned of it, perhaps in half precision."""

    @staticmethod
    def forward(ctx: Any, returned: Tensor, exact: Tensor) -> Tensor:
        """The second, as a function of the first."""
        ctx.dtype = returned.dtype
        return exact.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """As if it were the first."""
        return grad.to(ctx.dtype), None
