"""The loss of one batch: student forward, supervised positions, head, loss. What trainers and own loops share.

Owns the way from a batch with targets to a `LinearLoss`. Must not read caches: batches come from `targets`.
Shapes: B rows, T time, D hidden, N supervised positions.
"""

from torch import Tensor, nn

from logitcache.losses.formulas import Objective
from logitcache.losses.fused import LinearLoss, linear_loss
from logitcache.models.head import OutputHead, causal_lm_of, hidden_states
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
) -> LinearLoss:
    """Sums over the positions of a batch that count: ce + kl_weight * kl with gradient, and ce and kl without.

    batch: as `targets.with_targets` makes it, on one device, where the sums will be too; the model may be on several.
    kl_weight stands for `objective.weight`. view: of the cache that the targets are from, None without one. The head's
    trained parameters (LoRA on lm_head, modules_to_save, a whole model) get their gradients too, those of adapters that
    are not active none. Raises `TrainingFailed` where another one would get none. top1: as `linear_loss` has it.
    """
    where = batch["input_ids"].device
    hidden = hidden_states(model, **model_inputs(model, batch))
    batch = placed(batch, hidden.device)
    if isinstance(kl_weight, Tensor):
        kl_weight = kl_weight.to(hidden.device)
    head = OutputHead(causal_lm_of(model), None if view is None else view.vocab_size)
    selected = hidden.flatten(0, 1).index_select(0, batch[f"{PREFIX}rows"])
    targets = targets_of(batch, None if view is None else view.token_groups(hidden.device))
    parameters, idle = head.parameters(), head.idle_parameters()
    labels = batch[f"{PREFIX}label_ids"]
    found: LinearLoss = linear_loss(
        selected,
        head,
        labels,
        targets,
        objective,
        kl_weight,
        parameters,
        idle,
        top1,
        batch.get(f"{PREFIX}supervised"),
    )
    return LinearLoss(*(value.to(where) for value in found))
