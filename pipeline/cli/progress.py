"""What a run says while it trains, for transformers' Trainer: a bar at a terminal; else, and for machines, events."""

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from logitcache.events import Evaluated, OnEvent, TrainLogged, TrainProgress

EVERY_SECONDS = 30.0
"""A run says how far it is at least so often, or once a micro-batch."""


class TrainBar(TrainerCallback):
    """Steps done, tokens/s, time left and the last CE, KL, anchors' KL and evaluation, on stderr of a terminal."""

    def __init__(self, description: str, silent: bool = False) -> None:
        self._description, self._silent = description, silent
        self._bar: Any = None
        self._shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        silent = self._silent or not (sys.stderr.isatty() and state.is_world_process_zero)
        self._bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc=self._description, unit=" steps", disable=silent
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        elapsed = self._bar.format_dict["elapsed"] or 1e-9
        self._bar.set_postfix(
            {"tokens/s": f"{state.num_input_tokens_seen / elapsed:,.0f}", **self._shown}, refresh=False
        )
        self._bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        names = ("ce", "kl", "anchor_kl")
        self._shown |= {name: f"{value:.3f}" for name, value in (logs or {}).items() if name in names}

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        names = {"new_ce": "new ce", "prior_kl": "prior kl"}
        self._shown |= {shown: f"{metrics[name]:.3f}" for name, shown in names.items() if name in metrics}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.close()


class TrainEvents(TrainerCallback):
    """Tells what is logged and measured, and how far the run is, at least every half minute."""

    def __init__(self, tell: OnEvent, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: seconds."""
        self._tell, self._clock = tell, clock
        self._began = self._told = 0.0
        self._first_step = self._first_tokens = 0
        self._values: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = self._told = self._clock()
        self._first_step, self._first_tokens = state.global_step, int(state.num_input_tokens_seen)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = self._clock()
        if now - self._told < EVERY_SECONDS or not state.is_world_process_zero:
            return
        elapsed, done = now - self._began, state.global_step - self._first_step
        left = (state.max_steps - state.global_step) * elapsed / done if done else None
        pace = (int(state.num_input_tokens_seen) - self._first_tokens) / elapsed
        self._told = now
        self._tell(TrainProgress(state.global_step, state.max_steps, pace, left, self._values))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_substep_end(args, state, control)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "ce" in logs and state.is_world_process_zero:
            self._values = {name: value for name, value in logs.items() if isinstance(value, (int, float))}
            self._tell(TrainLogged(state.global_step, self._values))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._tell(Evaluated(state.global_step, dict(metrics)))
