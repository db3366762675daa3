"""A progress bar over optimizer steps with tokens/s, for transformers' Trainer."""

import sys
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback


class TrainBar(TrainerCallback):
    """Steps done, tokens/s, time left and the last CE, KL, anchors' KL and evaluation, on stderr of a terminal."""

    def __init__(self, description: str) -> None:
        self._description = description
        self._bar: Any = None
        self._shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        silent = not (sys.stderr.isatty() and state.is_world_process_zero)
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
