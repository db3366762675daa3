"""For people with their own training loop: the loss of a batch against a cache, without a trainer.

    anchored = CachedLoss("cache/", Objective(weight=1.0))
    loss = anchored(model, batch).loss   # batch: input_ids, labels, attention_mask or position_ids
    loss.backward()

Owns nothing but this arrangement: looking up is `targets`, the loss `step`, the check of the first batch `gate`.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from logitcache.adapters.adalora import Orthogonality
from logitcache.losses.formulas import Objective
from logitcache.losses.fused import LinearLoss
from logitcache.models.head import unwrapped
from logitcache.pairing.identity_checks import check_first_batch, check_precision, check_tail, check_width
from logitcache.pairing.layout import LayoutCheck
from logitcache.pairing.targets import (
    PREFIX,
    Batch,
    CachedCollator,
    Collator,
    count_positions,
    cut_of,
    groups_of,
    with_targets,
)
from logitcache.storage import LogitCache

from .batch_loss import batch_loss
from .own_loss import check_own_loss, probe_own_loss


class CachedLoss:
    """mean CE + weight * mean regulariser of a batch, each over its own positions.

    cache: opened, or its path. check: on the first batch, hold the model (an untrained adapter) against the cache;
    False where training goes on from a trained adapter, or where the teacher is another model. vocab_size: where model
    and cache have logits of different widths by padding, the lesser of these; that many tokens are compared.
    other_precision: model and cache may hold their weights in different formats, else `IdentityMismatch` if checked.
    Raises `NotTheBase`, `SampleNotCached`, `PositionNotCaptured`, and `TrainingFailed` where the model's own loss has a
    term that is not made here, or a batch brings what nothing reads.
    """

    def __init__(
        self,
        cache: LogitCache | str | Path,
        objective: Objective | None = None,
        *,
        check: bool = True,
        vocab_size: int | None = None,
        other_precision: bool = False,
    ) -> None:
        self.cache = LogitCache.open(cache) if isinstance(cache, (str, Path)) else cache
        self.objective = Objective() if objective is None else objective
        if self.objective.kl_budget is not None:
            raise ValueError("kl_budget: a loop of one's own gives kl_weight every step, from budget.BudgetedWeight")
        check_tail(self.cache, self.objective)
        self._check, self._vocab_size, self._other_precision = check, vocab_size, other_precision
        self._check_layout = LayoutCheck(self.cache)
        self._cut = cut_of(self.cache, vocab_size)
        self._groups = groups_of(self.cache, vocab_size) if self.objective.tail == "groups" else None

    def collator(self, collator: Collator) -> CachedCollator:
        """A collator whose batches bring their targets, so that a `DataLoader`'s workers look them up ahead."""
        return CachedCollator(collator, self.cache, cut=self._cut)

    def count(self, batch: Batch) -> Tensor:
        """Positions that count for CE and for the regulariser, int64 [2]: add them up over accumulated batches."""
        return count_positions(self.looked_up(batch), self.objective)

    def looked_up(self, batch: Batch) -> Batch:
        """The batch with its targets: as it is where they are there, looked up where not."""
        if f"{PREFIX}rows" in batch:
            return batch
        device = batch["input_ids"].device
        on_cpu = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in batch.items()}
        found = with_targets(on_cpu, self.cache, cut=self._cut)
        return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in found.items()}

    def __call__(
        self, model: nn.Module, batch: Batch, counts: Tensor | None = None, kl_weight: float | None = None
    ) -> LinearLoss:
        """The loss with gradient, and the means of CE and regulariser (nats a position) without.

        Of an AdaLoRA model the loss has PEFT's orthogonality term too, in the share of the step's positions that this
        batch has, so that a step has it once.

        counts: int64 [2], positions of the whole step (`count`), of which this batch is a part; by default its own.
        kl_weight: in place of the objective's weight.
        """
        batch = self.looked_up(batch)
        check_width(model, self.cache, self.objective, self._vocab_size)
        check_own_loss(model)
        self._check_layout(model, batch)
        if self._check and len(batch[f"{PREFIX}rows"]):
            probe_own_loss(model)
            check_precision(model, self.cache, self._other_precision)
            check_first_batch(model, batch, self.cache, self.objective, self._vocab_size)
            self._check = False
        counts = count_positions(batch, self.objective) if counts is None else counts
        num_ce, num_kl = counts.to(batch["input_ids"].device).clamp(min=1)
        weight = self.objective.weight if kl_weight is None else kl_weight
        if self._groups is not None:
            self._groups = self._groups.to(batch["input_ids"].device)
        sums = batch_loss(model, batch, self.objective, weight * num_ce / num_kl, self._groups, self._vocab_size)
        loss, orthogonality = sums.loss / num_ce, Orthogonality.of(unwrapped(model))
        if orthogonality is not None:
            share = len(batch[f"{PREFIX}label_ids"]) / num_ce
            loss = loss + orthogonality.weight * share * orthogonality().to(loss.device)
        return LinearLoss(loss, sums.ce / num_ce, torch.as_tensor(sums.kl / num_kl))
