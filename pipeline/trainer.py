"""What plugs into transformers' Trainer: CE + weight * regulariser from the cache, in one forward of the student.

Owns normalisation: the cross-entropy and the regulariser are each a mean over their own positions of the whole
accumulated batch, over all processes, so that 16 x 1, 4 x 4 and two processes give one gradient. The formulas are in
`losses`. Must not read caches: batches come with their targets from `targets.collate`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from .errors import TrainingFailed
from .fused import TOKENS_PER_LOSS_CHUNK, linear_losses
from .head import OutputHead, causal_lm_of, hidden_states
from .losses import Regularizer, Tail
from .targets import collate, count_positions, targets_of


@dataclass(frozen=True)
class Objective:
    """loss = mean CE + weight * mean regulariser; weight in loss per nat, dimensionless.

    Arguments as in `losses`. tokens_per_loss_chunk: positions whose logits are alive at a time.
    """

    regularizer: Regularizer = "masked-kl"
    tail: Tail = "bucket"
    weight: float = 1.0
    tokens_per_loss_chunk: int = TOKENS_PER_LOSS_CHUNK


class CachedKLTrainer(Trainer):
    """A Trainer whose loss reads the base from the batch. The base itself is never run.

    Logs `ce` and `kl` (nats a position, means over the logged steps) and `kl_weight` beside the Trainer's own.
    Raises `TrainingFailed` for DataParallel, label smoothing and a loss that is not finite.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PeftModel,
        args: TrainingArguments,
        train_dataset: Dataset[Any],
        objective: Objective,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, data_collator=collate, callbacks=callbacks
        )
        if args.n_gpu > 1:
            raise TrainingFailed(
                f"training on {args.n_gpu} GPUs in one process (DataParallel) splits a batch without its targets. "
                "Start one process a GPU with torchrun, or show one GPU with CUDA_VISIBLE_DEVICES."
            )
        if args.label_smoothing_factor:
            raise TrainingFailed("label smoothing and a regulariser towards the base are two answers to one question.")
        self.objective = objective
        self._meter = torch.zeros(2, device=args.device)
        self._metered_steps = 0

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor]:
        """The batches of one optimizer step, and their positions on all processes: int64 [CE, regulariser]."""
        if self.state.global_step >= self.state.max_steps:  # resumed from its last step: the Trainer would do one more
            return [], torch.zeros(2, dtype=torch.int64, device=device)
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._metered_steps += 1
        counts = torch.zeros(2, dtype=torch.int64, device=device)
        for batch in batches:
            counts += torch.tensor(count_positions(batch, self.objective.regularizer), device=device)
        return batches, self.accelerator.reduce(counts, reduction="sum")

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The Trainer's, but a run of one step has no warm-up: at a learning rate of 0 it would train nothing."""
        if self.args.get_warmup_steps(num_training_steps) >= num_training_steps:
            self.args.warmup_steps = 0
        scheduler: torch.optim.lr_scheduler.LRScheduler = super().create_scheduler(num_training_steps, optimizer)
        return scheduler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The part of this micro-batch in the loss of the whole step, a float32 scalar."""
        objective = self.objective
        if num_items_in_batch is None:
            num_items_in_batch = torch.tensor(count_positions(inputs, objective.regularizer))
        hidden = hidden_states(model, inputs["input_ids"], inputs["attention_mask"])
        selected = hidden.flatten(0, 1).index_select(0, inputs["rows"])
        ce, kl = linear_losses(
            selected,
            OutputHead(causal_lm_of(model)),
            inputs["label_ids"],
            targets_of(inputs),
            objective.regularizer,
            objective.tail,
            objective.tokens_per_loss_chunk,
        )
        means = torch.stack([ce, kl]) / num_items_in_batch.to(ce.device).clamp(min=1)
        self._meter += means.detach()
        loss = means[0] + objective.weight * means[1]
        loss = loss * self.accelerator.num_processes  # distributed training averages gradients; these are sums
        return (loss, {"ce": means[0], "kl": means[1]}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds ce, kl and kl_weight to the logs of training steps, and stops a run whose loss is not finite."""
        if "loss" in logs and self._metered_steps:
            ce, kl = (self.accelerator.reduce(self._meter, reduction="sum") / self._metered_steps).tolist()
            logs = {**logs, "ce": ce, "kl": kl, "kl_weight": self.objective.weight}
            self._meter.zero_()
            self._metered_steps = 0
            if not torch.isfinite(torch.tensor([ce, kl])).all():
                raise TrainingFailed(
                    f"training, step {self.state.global_step}: the loss is not finite (CE {ce}, KL {kl}). "
                    "The last checkpoint is kept. Try a lower --lr."
                )
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Saves no adapter that is not finite, since the checkpoint before would be removed for it."""
        trained = (p for p in model.parameters() if p.requires_grad)
        if not all(torch.isfinite(p).all() for p in trained):
            raise TrainingFailed(
                f"training, step {self.state.global_step}: the adapter's weights are not finite. "
                "The last checkpoint is kept. Try a lower --lr."
            )
        super()._save_checkpoint(model, trial)
