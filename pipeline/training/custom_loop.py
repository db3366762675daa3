"""For people with their own training loop: the loss of a batch against a cache, without a trainer.

    anchored = CachedLoss("cache/", Objective(weight=1.0))
    loss = anchored(model, batch).loss   # batch: input_ids, labels, attention_mask or position_ids
    loss.backward()

With anchors, caches of what the base says far from the new data, the loop says which step it is at:

    anchored = CachedLoss("cache/", Objective(weight=1.0), anchor=Anchor("anchors/"))
    loss = anchored(model, batch, step=step).loss

A cache that lacks some of the data, or is not there, is filled before the first step:

    anchored = CachedLoss("cache/", Objective(weight=1.0), fill=True)
    anchored.fill(model, loader)

Owns nothing but this arrangement: looking up and all checks of a pairing are `pairing`'s, the loss is `batch_loss`'s,
filling is `fill`'s.
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from logitcache.adapters.adalora import Orthogonality
from logitcache.errors import TrainingFailed
from logitcache.losses.formula_checks import check_formulas
from logitcache.losses.formulas import Objective
from logitcache.losses.fused import LinearLoss
from logitcache.models.head import causal_lm_of, unwrapped
from logitcache.models.quantization import keep_trainable
from logitcache.models.sharding import check_parts, is_sharded, on_any_process
from logitcache.pairing.identity_checks import PairingRules, check_tail
from logitcache.pairing.layout import LayoutCheck
from logitcache.pairing.step_zero import StepZero
from logitcache.pairing.targets import (
    PREFIX,
    Batch,
    CachedCollator,
    Collator,
    collated,
    count_positions,
)
from logitcache.pairing.view import AnyCache, CacheView, objective_of
from logitcache.storage import LogitCache

from .anchors import Anchor, Anchors, anchors_of
from .batch_loss import batch_loss
from .fill import CaptureSettings, Filling, JobReport, samples_of
from .own_loss import check_own_loss, probe_own_loss
from .supported import check_in_pieces

logger = logging.getLogger(__name__)


class CachedLoss:
    """mean CE + weight * mean regulariser of a batch, each over its own positions.

    cache: a path, an opened cache, or a `CacheView`, which has an objective, a top_k and rules of its own. model: held
    against the cache now instead of at the first call; needed beforehand where the rules ignore padding. top_k: read
    fewer alternatives than the cache has. rules: how the cache may belong to another model or number format. check: at
    the first batch, hold the model's configuration and weights against the checkpoint of the cache's base, and measure
    it (an untrained adapter) against the cache, which is then `step_zero`; False where training goes on from a trained
    adapter. anchor: a cache, or several, on whose own samples the model is compared with the base and learns nothing
    else; cache may then be None, with an objective `none`. seed: of the order of the anchors' samples. fill: the cache
    at this path is given what it lacks by the method `fill`, which must be called before anything is looked up; a cache
    that is not there is made, with capture in place of the default settings.
    Raises what `CacheView.paired` raises, `NotTheBase`, `SampleNotCached`, `PositionNotCaptured`, and `TrainingFailed`
    where the model's own loss has a term that is not made here, or a batch brings what nothing reads.
    """

    def __init__(
        self,
        cache: AnyCache | None,
        objective: Objective | None = None,
        *,
        model: nn.Module | None = None,
        top_k: int | None = None,
        rules: PairingRules | None = None,
        check: bool = True,
        anchor: Anchor | Sequence[Anchor] = (),
        seed: int = 0,
        fill: bool = False,
        capture: CaptureSettings | None = None,
    ) -> None:
        self.objective = objective_of(cache, objective, top_k, rules)
        if self.objective.kl_budget is not None:
            raise ValueError("kl_budget: a loop of one's own gives kl_weight every step (kl_controller.BudgetedWeight)")
        if cache is None and self.objective.reads_base:
            raise TrainingFailed(f"training with {self.objective.reader}: a cache is needed. Give cache=.")
        for sentence in check_formulas(self.objective):
            logger.warning("CachedLoss: %s", sentence)
        self._filling = Filling.asked(cache, fill, capture, self.objective, top_k, rules)
        self.filled: JobReport | None = None  # what this process captured before training
        self._view = cache if isinstance(cache, CacheView) else None
        self.cache: LogitCache | None = None
        self._top_k, self._rules = top_k, PairingRules() if rules is None else rules
        self._check = check
        self._check_layout: LayoutCheck | None = None
        if self._filling is None:
            self._open(cache)
        given = [anchor] if isinstance(anchor, Anchor) else anchor
        self._anchor, self._seed = [each.opened() for each in given], seed
        self._anchors: Anchors | None = None
        #: Of the last call: the share of its batch in each anchor's mean KL, nats a position, float32 [anchors].
        self.anchor_kl = torch.zeros(len(self._anchor))
        self.step_zero: StepZero | None = None  # what the first batch showed
        if model is not None:
            self.view(model)
            self.anchors(model)

    def _open(self, cache: AnyCache | None) -> None:
        opened = LogitCache.open(cache) if isinstance(cache, (str, Path)) else cache
        self.cache = opened.cache if isinstance(opened, CacheView) else opened
        check_tail(self.cache, self.objective, self._top_k)
        self._check_layout = None if self.cache is None else LayoutCheck(self.cache)

    def fill(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        """Capture what the cache lacks of the documents of these batches, with the model below its untrained adapter.

        batches: a `DataLoader`, say, of all that will be learnt; it is gone through once, and what it draws next time
        is as if it had not been. All processes must call it, each with its own batches; `filled` says what this one
        captured. Raises `NotTheBase` where the adapter has rewritten or left the base, `TrainingFailed`.
        """
        if self._filling is None:
            raise ValueError("fill: expected CachedLoss(..., fill=True), which says that the cache may be written to")
        self.filled = self._filling.fill(model, samples_of(batches))
        self._open(self._filling.path)

    def _check_open(self) -> None:
        """Raise `TrainingFailed` where the cache still has to be filled."""
        if self._filling is not None and self.cache is None:
            raise TrainingFailed(
                f"looking up {self._filling.path}: expected it to be filled before, as fill=True says, found that "
                "nobody did. Call fill(model, batches) before the first step."
            )

    def view(self, model: nn.Module) -> CacheView | None:
        """The cache as this model reads it, held against it; the first model decides how much padding is ignored."""
        self._check_open()
        if self._view is None and self.cache is not None:
            self._view = CacheView.paired(self.cache, model, self.objective, top_k=self._top_k, rules=self._rules)
        if self._view is not None:
            self._view.check_width(model)
        return self._view

    def anchors(self, model: nn.Module) -> Anchors:
        """The anchor caches as this model reads them, held against the first one that is given."""
        if self._anchors is None:
            self._anchors = anchors_of(self._anchor, model, self._seed, self._rules)
        return self._anchors

    def _tell(self, view: CacheView) -> None:
        if view.left_out:
            logger.warning("CachedLoss with %s: not compared: %s.", view.cache.path, "; ".join(view.left_out))
        if self.step_zero is not None and view.rules.other_precision:
            logger.warning("CachedLoss: before step 1 the KL to the base was %.2g nats.", self.step_zero.kl_nats)

    def collator(self, collator: Collator = collated) -> CachedCollator:
        """A collator whose batches bring their targets, so that a `DataLoader`'s workers look them up ahead."""
        self._check_open()
        if self._view is not None:
            return self._view.collator(collator)
        if self._rules.ignore_padding and self.cache is not None:
            raise TrainingFailed(
                f"looking up {self.cache.path} before a model is known: the rules ignore padding, and how much of the "
                "vocabulary that is follows from the model. Give CachedLoss(..., model=model)."
            )
        every, chosen = self.objective.kl_positions == "all", self.objective
        return CachedCollator(collator, self.cache, self._top_k, None, every, chosen.ce_weight, chosen.tail)

    def count(self, batch: Batch) -> Tensor:
        """Positions that count for CE and for the regulariser, int64 [2]: add them up over accumulated batches."""
        return count_positions(self.looked_up(batch), self.objective)

    def looked_up(self, batch: Batch) -> Batch:
        """The batch with its targets: as it is where they are there, looked up where not."""
        return self.collator().looked_up(batch)

    def __call__(
        self,
        model: nn.Module,
        batch: Batch,
        counts: Tensor | None = None,
        kl_weight: float | None = None,
        step: int | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> LinearLoss:
        """The loss with gradient, and the means of CE and regulariser (nats a position) without.

        Of an AdaLoRA model the loss has PEFT's orthogonality term too, in the share of the step's positions that this
        batch has, so that a step has it once. Likewise the terms of the anchors, whose means are then in `anchor_kl`.

        counts: int64 [2], positions of the whole step (`count`), of which this batch is a part; by default its own.
        kl_weight: in place of the objective's weight. step: the number of the optimizer step, from 0, which decides
        which samples of the anchors come; needed with anchors, and without them refused. part: which of how many
        batches of the step this is, over all processes: (i, n).
        """
        self._check_step(step, part)
        check_parts(model)
        keep_trainable(causal_lm_of(model))
        view, batch = self.view(model), self.looked_up(batch)
        check_own_loss(model)
        _check_autocast(model, batch)
        orthogonality = Orthogonality.of(unwrapped(model))
        if is_sharded(model):
            check_in_pieces(penalised=orthogonality is not None, anchored=bool(self._anchor))
        if self._check_layout is not None:
            self._check_layout(model, batch)
        if self._check and on_any_process(model, len(batch[f"{PREFIX}rows"]) > 0):
            probe_own_loss(model)
            if view is not None:
                self._view = view = view.held_against(model)
                self.step_zero = view.check_first_batch(model, batch)
                self._tell(view)
            self.anchors(model).step_zero(model)
            self._check = False
        counts = count_positions(batch, self.objective) if counts is None else counts
        num_ce, num_kl = counts.to(batch["input_ids"].device).clamp(min=1)
        weight = self.objective.weight if kl_weight is None else kl_weight
        sums = batch_loss(model, batch, self.objective, weight * num_ce / num_kl, view, scale=1 / num_ce)
        loss = sums.loss
        if step is not None:
            found = self.anchors(model).loss(model, step, *part, loss.device)
            loss, self.anchor_kl = loss + found.loss, found.sums / found.counts
        if orthogonality is not None:
            share = count_positions(batch, self.objective)[0].to(num_ce.device) / num_ce
            loss = loss + orthogonality.weight * share * orthogonality().to(loss.device)
        return LinearLoss(loss, sums.ce / num_ce, torch.as_tensor(sums.kl / num_kl))

    def _check_step(self, step: int | None, part: tuple[int, int]) -> None:
        """Raise ValueError where a step is not said that decides which anchors come, or said and nobody reads it."""
        if self._anchor and step is None:
            raise ValueError(
                "step: expected the number of the optimizer step, from 0, found none. It decides which samples of the "
                "anchors come, also where a run goes on. Give step=."
            )
        if not self._anchor and (step is not None or part != (0, 1)):
            raise ValueError("step, part: expected none without anchors, since nothing reads them. Leave them out.")


def _check_autocast(model: nn.Module, batch: Batch) -> None:
    """Raise `TrainingFailed` where accelerate has put autocast into a forward that is not run here."""
    causal_lm, kind = causal_lm_of(model), batch["input_ids"].device.type
    if "_original_forward" in vars(causal_lm) and not torch.is_autocast_enabled(kind):
        raise TrainingFailed(
            f"training {type(causal_lm).__name__}, which accelerate prepared for mixed precision: expected autocast to "
            "be on, found it off. accelerate switches it on in the model's own forward, in place of which the loss is "
            "made, and all would be computed in the precision of the weights. Call CachedLoss within "
            "accelerator.autocast()."
        )
