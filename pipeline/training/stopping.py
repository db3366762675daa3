"""A run that is asked to stop does so at the end of a step, with a checkpoint.

Owns that all processes stop at one step. Who is asked, and by what, is `events.StopRequest`'s.
"""

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback

from logitcache.events import StopRequest


class StopAtStep(TrainerCallback):
    """Ends a run after the step in which any of its processes was asked to stop; a run that is at its end goes on."""

    def __init__(self, request: StopRequest) -> None:
        self._request = request
        #: The step of the checkpoint; None: it was not asked.
        self.step: int | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < state.max_steps and self._is_asked(args.device):
            self.step = state.global_step
            control.should_save = control.should_training_stop = True

    def _is_asked(self, device: torch.device) -> bool:
        if PartialState().num_processes == 1:
            return self._request.is_asked
        asked = reduce(torch.full((), float(self._request.is_asked), device=device), reduction="sum")
        return bool(asked > 0)
