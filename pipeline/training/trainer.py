"""What plugs into transformers' Trainer, or any trainer made from it: CE + weight * regulariser from the cache.

Owns normalisation: the cross-entropy and the regulariser are each a mean over their own positions of the whole
accumulated batch, over all processes, so that 16 x 1, 4 x 4 and two processes give one gradient. The formulas are in
`losses`, the way from batch to loss in `batch_loss`, the terms of anchor caches in `anchors`, what is refused in
`supported`, how the cache gains what it lacks in `fill`.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer

from logitcache.adapters.adalora import Orthogonality
from logitcache.errors import TrainingFailed
from logitcache.losses.formula_checks import check_formulas
from logitcache.losses.formulas import Objective
from logitcache.models.head import causal_lm_of, check_head
from logitcache.models.inside_forward import check_head_inside
from logitcache.models.quantization import keep_trainable
from logitcache.models.sharding import check_parts, is_sharded, local_part, on_any_process
from logitcache.pairing.identity_checks import PairingRules
from logitcache.pairing.inputs import opened
from logitcache.pairing.layout import LayoutCheck
from logitcache.pairing.step_zero import StepZero
from logitcache.pairing.targets import PREFIX, Batch, CachedCollator, Collator, collated, count_positions
from logitcache.pairing.view import AnyCache, CacheView, objective_of

from .anchors import Anchor, AnchorLoss, Anchors, anchors_of, named_means
from .batch_loss import batch_loss
from .callbacks import BudgetCallback, FirstStepCheck, MeterReset
from .fill import CaptureSettings, Filling, JobReport
from .micro_batches import PARTS, MicroBatches, parts_of
from .normalisation import FirstStep, already_normalised, num_replicas, over_processes
from .own_loss import probe_own_loss
from .penalties import Penalty
from .replaced import TokenMetrics, check_replaced, logs_tokens
from .rows import Rows, check_rows, tokenizer_of
from .supported import check_in_pieces, check_supported, divided_by, in_pieces

logger = logging.getLogger(__name__)

_AnyTrainer: Any = Trainer if TYPE_CHECKING else object


class CachedKL(_AnyTrainer):
    """Mixin before a Trainer class: its loss reads the base from a cache. The base itself is never run.

        class CachedKLSFTTrainer(CachedKL, SFTTrainer): ...
        CachedKLSFTTrainer(cache="cache/", objective=Objective(weight=1.0), model=..., args=..., train_dataset=...)

    Samples are found by content in whatever batches the trainer's own collator makes: padded, packed or padding-free.
    top_k: read fewer alternatives than the cache has. check: hold configuration and weights against the checkpoint of
    the cache's base, look up the data set before step 1, and compare the untrained model with the cache on the first
    batch, which is then `step_zero` (leave it on, unless that has been done). rules: how the cache may
    belong to another teacher, a padded vocabulary or another number format, else `IdentityMismatch`. cache: a path, an
    opened cache, or a `CacheView`, which has an objective, a top_k and rules of its own.
    fill: what the cache at this path lacks of the training data is captured here and now, before anything is trained,
    with the model below its adapter (`filled` says how much of it by this process); a cache that is not there is made,
    with capture in place of the default settings. `NotTheBase` where the adapter has rewritten or left the base.
    replace_loss: the trainer that this is mixed into has a loss of its own, which is not to be used in training.
    penalty: on the change of the weights, times its weight a term of the loss of every step, whatever its batches.
    AdaLoRA's orthogonality term, which PEFT adds to a model's own loss, is added in the same way.
    anchor: a cache, or several, of what the base says far from the new data: on its samples the model is compared with
    the base, beside every batch, and learns nothing else; it needs no cache of the new data.
    Logs `ce` (what is trained: smoothed or weighted, if so) and `kl`, nats a position and means over the logged steps,
    `kl_weight`, `penalty`, `orthogonality` and `anchor_kl` (of several their mean, and each), without their weights,
    beside the trainer's own; over TRL's SFTTrainer its `num_tokens` and `mean_token_accuracy` too. Batches of
    evaluation are the trainer's own business.
    Raises `TrainingFailed` for what would be silently wrong (see `check_supported`) and for a loss that is not finite,
    `NotTheBase`, `SampleNotCached`, `PositionNotCaptured`.
    """

    data_collator: Any
    #: False where no batch of this trainer's needs its mask: see `CachedKLTrainer`.
    masked: bool = True

    def __init__(
        self,
        *args: Any,
        cache: AnyCache | None,
        objective: Objective | None = None,
        top_k: int | None = None,
        rules: PairingRules | None = None,
        check: bool = True,
        penalty: Penalty | None = None,
        anchor: Anchor | Anchors | Sequence[Anchor] = (),
        replace_loss: bool = False,
        fill: bool = False,
        capture: CaptureSettings | None = None,
        **kwargs: Any,  # of the trainer that this is mixed into
    ) -> None:
        if not replace_loss:
            check_replaced(type(self), CachedKL)
        super().__init__(*args, **kwargs)
        self.kl_objective = chosen = objective_of(cache, objective, top_k, rules)
        filling = Filling.asked(cache, fill, capture, chosen, top_k, rules)
        if cache is None and chosen.reads_base:
            raise TrainingFailed(f"training with {chosen.reader}: a cache is needed. Give cache=.")
        if penalty is not None and chosen.label_smoothing:
            raise TrainingFailed(
                "training with a penalty on the weights and label smoothing: these are two baselines. Use one of them."
            )
        self.penalty, self.orthogonality = penalty, Orthogonality.of(self.model)
        self._micro_batch, self._num_micro_batches = 0, 1
        if num_replicas(self) > 1 and any(self._terms()):
            raise TrainingFailed(
                f"training with a penalty on the weights (AdaLoRA has one) of a model divided over {num_replicas(self)}"
                " processes: each process has a part of them and would pull on that alone. Leave out the penalty, or "
                "tensor parallelism."
            )
        self._check_model()
        self._check_formulas(chosen, told=not check)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self.anchors = anchors_of(anchor, self.model, seed, rules)
        if in_pieces(self):
            check_in_pieces(penalised=any(self._terms()), anchored=len(self.anchors) > 0)
        self.filled: JobReport | None = None  # what this process captured before training
        self.cache_view: CacheView | None = None
        if cache is not None and chosen.reads_base:
            if filling is not None:
                self._fill(filling)
            view = CacheView.of(cache, self.model, chosen, top_k, rules)
            self.cache_view = self._held_against_model(view) if check else view  # unchecked: somebody has done it
        self._check, self._check_start, self._check_anchors, self._check_split = check, check, check, False
        self.step_zero: StepZero | None = None  # what the first batch showed
        self._check_layout = None if self.cache_view is None else LayoutCheck(self.cache_view.cache)
        self._tokens = TokenMetrics(self) if logs_tokens(type(self), CachedKL) else None
        self._make_meters(self.args.device)
        self.kl_weight = self.kl_objective.weight
        self.add_callback(MeterReset(self))
        self.add_callback(FirstStepCheck(self))
        if self._tokens is not None:
            self.add_callback(self._tokens)
        if self.step_budget is not None:
            self.add_callback(BudgetCallback(self))

    @property
    def step_budget(self) -> float | None:
        """Nats a position that the KL of the steps is to meet; None: it is to meet none."""
        return self.kl_objective.kl_budget

    def _check_model(self) -> None:
        """Raise where this trainer and model would be trained wrongly, whatever the loss."""
        check_supported(self)
        check_parts(self.model)
        keep_trainable(causal_lm_of(self.model))

    def _make_meters(self, device: torch.device) -> None:
        """What the logs are made of, and the check of the first step."""
        self._meter, self._step_meter = torch.zeros(2, device=device), torch.zeros(2, device=device)
        self._anchor_meter, self._anchor_step_meter = (torch.zeros(len(self.anchors), device=device) for _ in range(2))
        self._term_meters = {name: torch.zeros((), device=device) for name in ("penalty", "orthogonality")}
        self.reset_meters()
        self._step_counts = torch.ones((), dtype=torch.int64, device=device)
        self.first_step = FirstStep(device, 2 + len(self.anchors))

    def _fill(self, filling: Filling) -> None:
        """Give the cache what it lacks of the training data."""
        if not hasattr(self.train_dataset, "__len__"):
            raise TrainingFailed(
                f"filling {filling.path}: expected training data of a known length, found "
                f"{type(self.train_dataset).__name__}. What it will bring cannot be captured before step 1. Give data "
                "that have one, or make the cache beforehand and leave fill out."
            )
        rows = Rows.of(self, self.train_dataset)
        self.filled = filling.fill(self.model, rows, tokenizer_of(self), divided_by(self))

    def _check_formulas(self, objective: Objective, told: bool) -> None:
        """Try formulas of the user's own, and say what is to be known of them, unless that has been told."""
        said = check_formulas(objective)
        if said and not told and self.is_world_process_zero():
            logger.warning("CachedKL: %s", " ".join(said))

    def _held_against_model(self, view: CacheView) -> CacheView:
        """The view of this model; what could not be compared is said once."""
        held = view.held_against(self.model, in_pieces(self))
        if held.left_out and self.is_world_process_zero():
            logger.warning("CachedKL with %s: not compared: %s.", held.cache.path, "; ".join(held.left_out))
        return held

    def get_train_dataloader(self, *args: Any, **kwargs: Any) -> Any:  # those of the trainer that this is mixed into
        """The trainer's own, whose batches bring their targets along, made where they are collated."""
        if self._check and in_pieces(self):  # which the wrapper alone puts together
            self._check_split = True
        elif self._check:
            check_head(causal_lm_of(self.model))
            probe_own_loss(self.model)
        collator, settings = self.data_collator, self.accelerator.dataloader_config
        before = settings.dispatch_batches, settings.non_blocking
        view = self.cache_view
        self.data_collator = self._train_collator(collator)
        settings.dispatch_batches = False  # it would cut every tensor of a batch after as many entries as it has rows
        settings.non_blocking = before[1] or self.args.dataloader_pin_memory  # a batch has a dozen tensors
        try:
            loader = super().get_train_dataloader(*args, **kwargs)
        finally:
            self.data_collator, (settings.dispatch_batches, settings.non_blocking) = collator, before
        if self._check and view is not None:
            check_rows(self, view, getattr(loader, "dataset", None))  # a stream's loader need not have one
        return loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """The batches of one optimizer step, and their positions on all processes: int64 [CE, regulariser]."""
        if self.state.global_step >= self.state.max_steps:  # resumed from its last step: the Trainer would do one more
            return [], torch.zeros(2, dtype=torch.int64, device=device)
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [self._looked_up(batch) for batch in batches]
        if len(batches) < num_batches:  # a stream has ended
            batches = []
        parts = [part for batch in batches for part in parts_of(batch)]
        self._micro_batch, self._num_micro_batches = 0, max(1, len(parts))
        self._metered_steps += bool(batches)
        self._metered_weight += self.kl_weight if batches else 0.0
        self._metered_anchors += self.anchors.due(self.state.global_step) * bool(batches)
        self._step_meter.zero_()
        self._anchor_step_meter.zero_()
        self.first_step.begin(self.state.global_step + 1)
        counts = torch.zeros(2, dtype=torch.int64, device=device)
        for part in parts:
            counts += count_positions(part, self.kl_objective).to(device)
        counts = over_processes(self, counts)
        self._step_counts = counts[1]
        return batches, counts

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The trainer's own, but what `compute_loss` returns is not divided by the number of micro-batches."""
        watched = self.first_step.watching(self) if self.first_step.pending else nullcontext()
        with already_normalised(self), watched:
            loss: Tensor = super().training_step(*args, **kwargs)
        self._micro_batch += 1
        if self.first_step.pending:
            self.first_step.add_returned(loss)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The part of this micro-batch in the loss of the whole step, a float32 scalar."""
        if not model.training:  # evaluation
            inputs = {name: value for name, value in inputs.items() if not name.startswith(PREFIX)}
            if self._tokens is not None:
                self._tokens.settle()
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        inputs = self._looked_up(inputs)
        inputs = inputs if self.masked else opened(inputs)
        with self.accelerator.autocast():
            self._check_batch(model, inputs)
        if num_items_in_batch is None:
            num_items_in_batch = count_positions(inputs, self.kl_objective)
        num_ce, num_kl = num_items_in_batch.to(self.args.device).clamp(min=1)
        # distributed training averages gradients over its data-parallel processes; these are sums
        num_averaged = self.accelerator.num_processes // num_replicas(self)
        with self.accelerator.autocast():  # the head too, and a model that has no wrapper around its own forward
            weight = self.kl_weight * num_ce / num_kl
            top1 = None if self._tokens is None else torch.zeros((), dtype=torch.int64, device=self.args.device)
            found = batch_loss(model, inputs, self.kl_objective, weight, self.cache_view, top1, num_averaged / num_ce)
        if self._tokens is not None and top1 is not None:
            self._tokens.add(inputs, top1)
        means = torch.stack([found.ce / num_ce, found.kl / num_kl])
        self._meter += means
        self._step_meter += means
        anchors = self._anchor_loss(model)
        loss = found.loss + anchors.loss * num_averaged
        others = torch.zeros_like(loss)
        for name, term in self._terms():  # the same on every process, so that the average of its gradients is its own
            part = (term() / self._num_micro_batches).to(loss.device)
            self._term_meters[name] += part.detach()
            others = others + term.weight * part
        loss = loss + others
        if self.first_step.pending:
            counts = [*count_positions(inputs, self.kl_objective), *anchors.counted]
            self.first_step.add_terms([found.ce, found.kl, *anchors.sums], counts, others, loss)
        return (loss, {"ce": means[0], "kl": means[1]}) if return_outputs else loss

    def _looked_up(self, batch: Batch) -> Batch:
        """A batch with its targets: as it is, or where another collator made it, looked up now."""
        if f"{PREFIX}rows" in batch or PARTS in batch:
            return batch
        return self._collator(collated).looked_up(batch)

    def _train_collator(self, collator: Collator) -> Collator:
        """What makes the batches of training."""
        return self._collator(collator)

    def _collator(self, collator: Collator) -> CachedCollator:
        """Another's batches, with what the loss reads beside them."""
        if self.cache_view is not None:
            return self.cache_view.collator(collator)
        return CachedCollator(collator, None, ce_weight=self.kl_objective.ce_weight)

    def _check_batch(self, model: nn.Module, inputs: Batch) -> None:
        """Raise where the model is not the base, or does not keep the documents of this batch apart."""
        if self._check_split:
            self._check_split = False
            check_head_inside(model)
            probe_own_loss(model)
        if self.first_step.pending:
            check_parts(model)
        if self._check_layout is not None:
            self._check_layout(model, inputs)
        view = self.cache_view
        if self._check_start and view is not None and on_any_process(model, len(inputs[f"{PREFIX}rows"]) > 0):
            self._check_start = False
            self.step_zero = view.check_first_batch(model, inputs)
            if self.step_zero is not None and view.rules.other_precision:
                logger.warning("CachedKL: before step 1 the KL to the base was %.2g nats.", self.step_zero.kl_nats)

    def _anchor_loss(self, model: nn.Module) -> AnchorLoss:
        """The part of this micro-batch in the terms of the anchors, and their meters moved on by it.

        The samples of a step are shared out over all micro-batches of all processes that do not see one batch together.
        """
        replicas = num_replicas(self)
        num_parts, mine = self.accelerator.num_processes // replicas, self.accelerator.process_index // replicas
        index, of = self._micro_batch * num_parts + mine, self._num_micro_batches * num_parts
        with self.accelerator.autocast():
            if self._check_anchors and len(self.anchors):
                self._check_anchors = False
                self.anchors.step_zero(model)
            found = self.anchors.loss(model, self.state.global_step, index, of, self.args.device)
        means = found.sums / found.counts
        self._anchor_meter += means
        self._anchor_step_meter += means
        return found

    def _terms(self) -> Iterator[tuple[str, Penalty | Orthogonality]]:
        """What is added to the loss of every step once, whatever its batches, by the names of the logs."""
        if self.penalty is not None:
            yield "penalty", self.penalty
        if self.orthogonality is not None:
            yield "orthogonality", self.orthogonality

    def begin_run(self, goes_on: bool) -> None:
        """Nothing of an earlier run, or of a try that ran out of memory, stays in the meters; one that goes on is not
        where the base is."""
        self.reset_meters()
        if goes_on:
            self._check_start = self._check_anchors = False

    def reset_meters(self) -> None:
        """What is logged next is of steps after this."""
        self._meter.zero_()
        for meter in self._term_meters.values():
            meter.zero_()
        if self._tokens is not None:
            self._tokens.reset()
        self._anchor_meter.zero_()
        self._metered_steps, self._metered_weight = 0, 0.0
        self._metered_anchors = np.zeros(len(self.anchors), dtype=np.int64)

    def step_kl(self) -> float | None:
        """Mean regulariser of the last optimizer step over all processes, nats a position; None where none counted."""
        kl = over_processes(self, self._step_meter)[1]
        num_positions, kl_nats = torch.stack([self._step_counts.to(kl), kl]).tolist()  # the host waits once
        return kl_nats if num_positions else None

    def check_first_step(self) -> None:
        """Raise `TrainingFailed` where the run's first step is not that of all its positions: see `FirstStep`."""
        logged = torch.cat([self._step_meter, self._anchor_step_meter])
        self.first_step.check(self, logged, [1.0, self.kl_weight, *self.anchors.weights])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds ce, kl, kl_weight and other terms to the logs of training; stops a run whose loss is not finite."""
        if self._tokens is not None and self.model.training:
            logs = {**logs, **self._tokens.logged()}
        if "loss" in logs and self._metered_steps:
            ce, kl = (over_processes(self, self._meter) / self._metered_steps).tolist()
            logs = {**logs, "ce": ce, "kl": kl, "kl_weight": self._metered_weight / self._metered_steps}
            added = {name: float(self._term_meters[name]) / self._metered_steps for name, _ in self._terms()}
            added |= named_means(over_processes(self, self._anchor_meter).tolist(), self._metered_anchors)
            logs, advice = {**logs, **added}, "Try a lower --lr."
            terms = ", ".join([f"CE {ce}, KL {kl}", *(f"{name} {value}" for name, value in added.items())])
            if self.kl_objective.label_smoothing:
                advice = "Try a lower --lr, or no label smoothing: it is infinite where a logit is -inf."
            self.reset_meters()
            if not torch.isfinite(torch.tensor([ce, kl, *added.values()])).all():
                raise TrainingFailed(
                    f"training, step {self.state.global_step}: the loss is not finite ({terms}). "
                    f"The last checkpoint is kept. {advice}"
                )
        super().log(logs, start_time)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Saves no weights that are not finite, since the checkpoint before would be removed for them."""
        trained = [local_part(p) for p in self.model.parameters() if p.requires_grad]
        finite = torch.tensor(float(all(bool(torch.isfinite(p).all()) for p in trained)), device=self.args.device)
        if is_sharded(self.model_wrapped):
            finite = self.accelerator.reduce(finite, reduction="mean")  # all stop, or all save together
        if finite < 1:
            raise TrainingFailed(
                f"training, step {self.state.global_step}: what is trained is not finite. "
                "The last checkpoint is kept. Try a lower --lr."
            )
        super().save_model(*args, **kwargs)

    def _load_callback_state(self) -> None:
        """Without those that restore themselves: they cannot be made anew without their trainer.

        Where the checkpoint is of a trainer that had them not, they begin, and the next checkpoint has them.
        """
        kinds, saved = (BudgetCallback, TokenMetrics), dict(self.state.stateful_callbacks or {})
        own = {type(c).__name__: c.state() for c in self.callback_handler.callbacks if isinstance(c, kinds)}
        restored = {*own, *(kind.__name__ for kind in kinds)}
        self.state.stateful_callbacks = {k: v for k, v in saved.items() if k not in restored}
        super()._load_callback_state()
        self.state.stateful_callbacks = {**own, **saved}


class CachedKLTrainer(CachedKL, Trainer):
    """`CachedKL` over transformers' own Trainer. Raises as it does.

    batch_tokens: a batch, of `Sample`s, goes through the model in micro-batches of at most so many tokens. masked:
    False where every batch is padded on the right, and the model needs no mask then (`models.causal.needs_mask`).
    """

    def __init__(  # those of both above
        self, *args: Any, batch_tokens: int | None = None, masked: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.batch_tokens, self.masked = batch_tokens, masked
        self.anchors.masked = masked

    def _train_collator(self, collator: Collator) -> Collator:
        """With the samples of a batch in micro-batches."""
        made = super()._train_collator(collator)
        if self.batch_tokens is None:
            return made
        if self.is_deepspeed_enabled:
            raise TrainingFailed(
                "training in micro-batches of tokens under DeepSpeed: its engine counts one backward a batch. Nothing "
                "was started. Use torchrun alone, or CachedKL in a Trainer of your own."
            )
        return MicroBatches(made, self.batch_tokens)

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | None = None) -> Tensor:
        """The loss of a batch, with its gradient: micro-batch by micro-batch. Processes meet at the last, whose numbers
        may differ."""
        parts, losses = parts_of(inputs), []
        for i, part in enumerate(parts, 1):
            with nullcontext() if i == len(parts) else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, part, num_items_in_batch))
        return torch.stack(losses).sum()

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The Trainer's, but a run of one step has no warm-up: at a learning rate of 0 it would train nothing."""
        if self.args.get_warmup_steps(num_training_steps) >= num_training_steps:
            self.args.warmup_steps = 0
        scheduler: torch.optim.lr_scheduler.LRScheduler = super().create_scheduler(num_training_steps, optimizer)
        return scheduler
