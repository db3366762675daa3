"""What the trainer does beside its steps: clear its meters, hold the first step against its positions, set its weight.

Owns a callback each. What they read and set is `trainer.CachedKL`'s, the law of the weight `kl_controller`'s. Must not
compute a loss.
"""

import logging
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from .kl_controller import EVERY_STEP, BudgetedWeight, Gains

if TYPE_CHECKING:
    from .trainer import CachedKL

logger = logging.getLogger(__name__)


class MeterReset(TrainerCallback):
    """Begins a run in its trainer: see `CachedKL.begin_run`."""

    def __init__(self, trainer: "CachedKL") -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.begin_run(goes_on=bool(state.global_step))


class FirstStepCheck(TrainerCallback):
    """Holds the first step of every run, and of every try of it, against its own positions before it is made; says so
    where steps are made and logged in which none counts."""

    def __init__(self, trainer: "CachedKL") -> None:
        self._trainer = trainer
        self._told = False  # that nothing counts

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.first_step.pending, self._told = True, not state.is_world_process_zero

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.check_first_step()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._trainer.first_step.pending and "ce" in (logs or {}) and not self._told:
            self._told = True
            logger.warning(
                "CachedKL: up to step %d the cross-entropy counted at no token: nothing of the data was learnt. Look "
                "at the labels and at ce_weight=%r, which may drop them all.",
                state.global_step,
                self._trainer.kl_objective.ce_weight,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.check_first_step()  # in a loop of one's own that does not say when it is about to make the step


class BudgetCallback(TrainerCallback, ExportableState):
    """Sets the trainer's weight after every step; its state is saved with checkpoints and restored from them."""

    gains: ClassVar[Gains] = EVERY_STEP

    def __init__(self, trainer: "CachedKL") -> None:
        objective = trainer.kl_objective
        assert objective.kl_budget is not None
        self._trainer = trainer
        self._weight = BudgetedWeight(objective.kl_budget, objective.weight, self.gains)

    def state(self) -> dict[str, Any]:
        """What trainer_state.json keeps."""
        return {"args": {}, "attributes": {k: v for k, v in vars(self._weight).items() if k != "gains"}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = (state.stateful_callbacks or {}).get(type(self).__name__)
        if state.global_step and isinstance(saved, dict):
            kept = {**saved["attributes"], "kl_budget": self._weight.kl_budget}
            self._weight = BudgetedWeight(**kept, gains=self.gains)
        self._trainer.kl_weight = self._weight.weight

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step_kl = self._trainer.step_kl()
        if step_kl is not None:
            self.found(step_kl)

    def found(self, kl_nats: float) -> None:
        """Move the weight, after a KL of this."""
        self._trainer.kl_weight = self._weight.update(kl_nats)
