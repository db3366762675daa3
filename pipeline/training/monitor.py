"""Evaluation while training: when it is due, what its numbers decide, and the weights of the best one.

Owns early stopping, the choice among evaluations and a budget that is of them; all are restored from checkpoints, so
that a run that goes on decides as one that nothing interrupted. What is measured is given (`Probe`), and where weights
are kept is the `run_folder`'s. Must not know texts, caches or metrics.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl
from transformers.trainer_callback import ExportableState

from logitcache.errors import TrainingFailed

from .callbacks import BudgetCallback
from .kl_controller import EVERY_EVALUATION, Gains
from .settings import BudgetOf, EvalSettings
from .trainer import CachedKLTrainer

WEIGHTS = "weights.safetensors"
"""What is trained, in the folder of the best evaluation."""

SHARE = 0.1
"""Of the steps from one evaluation to the next, where it is not said: as of checkpoints."""

Measured = Callable[[nn.Module], dict[str, float]]
"""What is measured of a model, by its names."""


class Monitor(TrainerCallback, ExportableState):
    """Says when an evaluation is due, and stops a run by what it found."""

    def __init__(self, settings: EvalSettings, keep: Callable[[int, Callable[[Path], None]], None]) -> None:
        """keep: takes the step of the best evaluation so far and the function that writes its weights to a folder."""
        self._settings, self._keep, self._every = settings, keep, 1
        #: The step of the best evaluation; None: none counts, or nothing is asked for.
        self.best_step: int | None = None
        #: What the best evaluation, or where there is none the last one, found.
        self.found: dict[str, float] = {}
        #: Why the run ended before its last step; "": it did not.
        self.why = ""
        self._without_best = 0

    def state(self) -> dict[str, Any]:
        """What trainer_state.json keeps."""
        kept = ("best_step", "found", "why", "_without_best")
        return {"args": {}, "attributes": {name: getattr(self, name) for name in kept}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._every = self._settings.eval_steps or max(1, math.ceil(SHARE * state.max_steps))
        if not state.global_step:
            self._check_moves_budget(state.max_steps)
        saved = (state.stateful_callbacks or {}).get(type(self).__name__)
        if state.global_step and isinstance(saved, dict):
            for name, value in saved["attributes"].items():
                setattr(self, name, value)
        if self.why:  # the checkpoint is of the very step: there is no other
            state.max_steps = state.global_step

    def _check_moves_budget(self, max_steps: int) -> None:
        """Raise `TrainingFailed` where the only evaluation is after the last step: it would move no weight."""
        if self._settings.kl_budget_of == "prior" and self._settings.eval_steps and self._every >= max_steps:
            raise TrainingFailed(
                f"training with --kl-budget-of prior: expected an evaluation before the last of {max_steps:,} steps, "
                f"found --eval-steps {self._every:,}. The weight would stay as it is, whatever the budget. Give a "
                "smaller --eval-steps, or leave it out."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._every == 0 or state.global_step >= state.max_steps:
            control.should_evaluate = control.should_log = True

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any = None, metrics: Any = None, **kwargs: Any
    ) -> None:
        if not state.global_step:  # the base is no candidate: nothing was learnt
            return
        limit, drift = self._settings.stop_at_prior_kl, metrics.get("prior_kl", 0.0)
        is_beyond = limit is not None and drift >= limit
        if self.best_step is None:
            self.found = dict(metrics)
        if self._settings.best_by is not None and not is_beyond:
            self._judge(self._settings.best_by.replace("-", "_"), metrics, state, model)
        if is_beyond:
            self.why = f"the KL on prior text was {drift:.4g} nats a token, --stop-at-prior-kl is {limit:g}"
        elif self._settings.patience is not None and self._without_best >= self._settings.patience:
            self.why = f"{self._without_best} evaluations in a row found no lower {self._settings.best_by}"
        control.should_training_stop = control.should_training_stop or bool(self.why)

    def _judge(self, by: str, metrics: dict[str, float], state: Any, model: Any) -> None:
        """Keep the weights if they are the best so far. by: a name of what was measured."""
        if self.best_step is not None and metrics[by] >= self.found[by]:
            self._without_best += 1
            return
        self.best_step, self.found, self._without_best = state.global_step, dict(metrics), 0
        if state.is_world_process_zero:
            self._keep(state.global_step, partial(save_trained, model))


class PriorBudget(BudgetCallback):
    """Sets the trainer's weight after every evaluation, by the KL on prior text."""

    gains: ClassVar[Gains] = EVERY_EVALUATION

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing: the KL of a step is of the new data."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if state.global_step:  # before the first step it is the base's own, 0
            self.found(metrics["prior_kl"])


class MonitoredTrainer(CachedKLTrainer):
    """`CachedKLTrainer` whose evaluation is what it is given. budget_of: what the objective's budget bounds."""

    #: Set before it trains; None: there is no evaluation.
    measured: Measured | None = None
    control: TrainerControl

    def __init__(self, *args: Any, budget_of: BudgetOf = "new", **kwargs: Any) -> None:  # those of the class above
        self.budget_of = budget_of
        super().__init__(*args, **kwargs)
        if budget_of == "prior":
            self.add_callback(PriorBudget(self))

    @property
    def step_budget(self) -> float | None:
        """None where the budget is of the KL on prior text."""
        return super().step_budget if self.budget_of == "new" else None

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure, log and tell the callbacks; every process decides by the numbers of the first."""
        assert self.measured is not None
        with self.accelerator.autocast():
            found = [self.measured(self.model)]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(found)
        self.log({f"{metric_key_prefix}_{name}": value for name, value in found[0].items()})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found[0])
        return found[0]


def save_trained(model: nn.Module, folder: Path) -> None:
    """What is trained of a model, by the names of the parameters."""
    trained = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    save_file(trained, folder / WEIGHTS)


@torch.no_grad()
def load_trained(model: nn.Module, folder: Path) -> None:
    """What `save_trained` kept, into the same model. Raises `TrainingFailed` where it is of another."""
    kept: Mapping[str, torch.Tensor] = load_file(folder / WEIGHTS)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if kept.keys() != trained.keys():
        raise TrainingFailed(
            f"taking the weights of the best evaluation from {folder}: expected {len(trained)} tensors that are "
            f"trained, found {len(kept)} others. Train again with another --out."
        )
    for name, parameter in trained.items():
        parameter.copy_(kept[name])
