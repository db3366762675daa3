"""The trainer below `CachedKL`, whose own loss is not called in training: whose it may be, and its log made again.

A trainer's `compute_loss` may weight, add or log; below the mixin all of that would be lost in silence. Owns the names
of the classes whose loss is known to be the plain cross-entropy, and the two metrics that TRL's SFTTrainer makes
there. Must not import TRL, which need not be installed.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from logitcache.errors import TrainingFailed
from logitcache.pairing.targets import Batch, num_supervised

from .normalisation import num_replicas

KNOWN = (("transformers", "Trainer"), ("trl", "SFTTrainer"))
"""Package and class: cross-entropy, with what `check_supported` refuses and `TokenMetrics` makes again."""

_NOT_CALLED = ("compute_loss", "_get_num_items_in_batch")
"""Methods of a trainer whose result has no part in training: the loss, and the count that it is divided by."""


def check_replaced(trainer: type[Any], mixin: type[Any]) -> None:
    """Raise `TrainingFailed` unless the loss that a trainer has below the mixin is that of a known class.

    Also where a library has put its own function into a known class. What is above the mixin is called.
    """
    for method in _NOT_CALLED:
        owner = next((c for c in _below(trainer, mixin) if method in vars(c)), None)
        if owner is None:
            continue
        module = getattr(vars(owner)[method], "__module__", None) or owner.__module__
        if _package(owner.__module__) == _package(module) and (_package(module), owner.__name__) in KNOWN:
            continue
        raise TrainingFailed(
            f"training with {trainer.__name__}: expected the {method} of transformers' Trainer or TRL's SFTTrainer "
            f"below {mixin.__name__}, found {owner.__name__}.{method} of {module}. It would not be used in training, "
            f"where the loss is CE + weight * regulariser. Put it above {mixin.__name__} (a class made from this one, "
            "which adds to super().compute_loss), or say replace_loss=True."
        )


def logs_tokens(trainer: type[Any], mixin: type[Any]) -> bool:
    """Whether TRL's SFTTrainer is below the mixin."""
    return any((_package(c.__module__), c.__name__) == ("trl", "SFTTrainer") for c in _below(trainer, mixin))


class TokenMetrics(TrainerCallback, ExportableState):
    """`num_tokens` and `mean_token_accuracy` as SFTTrainer logs them in training.

    num_tokens: all that was seen since training began, padding not counted. mean_token_accuracy: the share of
    positions whose label has the largest logit, over all processes, a mean over micro-batches since the last log. Kept
    on the device, without synchronisation, until a log, an evaluation or a checkpoint asks for it. A resumed run counts
    on, where SFTTrainer's own begins at 0 again.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._pending: list[Tensor] = []
        self._accuracies: list[float] = []

    def state(self) -> dict[str, Any]:
        """What trainer_state.json keeps."""
        return {"args": {}, "attributes": {"num_tokens": self._total}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = (state.stateful_callbacks or {}).get(type(self).__name__)
        if state.global_step and isinstance(saved, dict):
            self._trainer._total_train_tokens = saved["attributes"]["num_tokens"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:  # by one process alone
            self.settle()

    @property
    def _total(self) -> int:
        """Where SFTTrainer keeps it, whose evaluation logs it too."""
        return getattr(self._trainer, "_total_train_tokens", 0)

    def add(self, batch: Batch, top1: Tensor) -> None:
        """A micro-batch. top1: int64 scalar, how many of its labels have the largest logit."""
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        tokens = torch.full_like(top1, ids.numel()) if mask is None else mask.sum().to(top1)
        positions = num_supervised(batch).to(top1)
        self._pending.append(torch.stack([top1, positions, tokens]))

    def settle(self) -> None:
        """Add up what is pending, over all processes."""
        if not self._pending:
            return
        counts = self._trainer.accelerator.reduce(torch.stack(self._pending), reduction="sum").tolist()
        self._pending.clear()
        self._accuracies += [right / positions if positions else 0.0 for right, positions, _ in counts]
        seen = sum(tokens // num_replicas(self._trainer) for _, _, tokens in counts)  # a group has the same batch
        self._trainer._total_train_tokens = self._total + seen

    def logged(self) -> dict[str, float]:
        """Both, of the micro-batches since this was last asked."""
        self.settle()
        if not self._accuracies:
            return {}
        accuracy = sum(self._accuracies) / len(self._accuracies)
        self._accuracies.clear()
        return {"num_tokens": self._total, "mean_token_accuracy": accuracy}

    def reset(self) -> None:
        """Forget what has not been logged."""
        self._pending.clear()
        self._accuracies.clear()


def _below(trainer: type[Any], mixin: type[Any]) -> tuple[type[Any], ...]:
    order = trainer.__mro__
    return order[order.index(mixin) + 1 :]


def _package(module: str) -> str:
    return module.split(".")[0]
