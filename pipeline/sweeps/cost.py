"""What a run cost, and what a live base would have added to it: seconds a step, measured in the run's own process.

Owns the three measurements, that all are made under the same conditions (the last right after the run), and what is
kept of the conditions: the load of the machine. A live base is measured as the least that it adds to a step: body, head
and log-softmax at the supervised positions, slice by slice; not the copy of its logits that most trainers keep.
"""

import os
from collections.abc import Sequence
from statistics import median
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback

from logitcache.data.batches import pad_batch
from logitcache.data.samples import Sample
from logitcache.models.causal import needs_mask
from logitcache.models.head import OutputHead, head_rows, hidden_states
from logitcache.pairing.anchors import anchor_samples
from logitcache.training.job import Job

from .run_cost import RunCost

NUM_BATCHES = 5
"""By which a live base is measured, the first of them to warm up."""


class StepClock(TrainerCallback):
    """Seconds of each optimizer step, from the end of the one before: batches and targets included, and no saving."""

    def __init__(self) -> None:
        self._since = 0.0
        self._seconds: list[float] = []

    @property
    def step_seconds(self) -> float | None:
        """The median, without the first step, which warms up; None where there was none after it."""
        return median(self._seconds[1:]) if len(self._seconds) > 1 else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = perf_counter()
        self._seconds.append(now - self._since)
        self._since = now

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = perf_counter()


def cost_of(job: Job, clock: StepClock, base: PreTrainedModel) -> RunCost:
    """What a run cost that has just ended. base: the untouched one, on the run's device."""
    settings = job.settings
    texts: list[tuple[Sequence[Sample], int, float]] = []
    own = 1 if base.device.type == "cuda" else torch.get_num_threads()
    load = _load()
    if job.reads_cache and job.pairing.teacher_is_base:  # another teacher, which was not run, is not here
        texts.append((job.samples, settings.batch_size, settings.grad_accum))
    for anchor in job.anchors:
        texts.append((anchor_samples(anchor.open_cache), anchor.settings.batch, 1 / anchor.settings.every))
    if not texts:
        return RunCost(clock.step_seconds, None, None, load, own)
    a_step, once, masked = 0.0, 0.0, needs_mask(base)
    for samples, size, times in texts:
        seconds, tokens = _batch_seconds(base, samples, size, masked)
        a_step += times * seconds
        once += seconds / tokens * _num_tokens(samples)
    return RunCost(clock.step_seconds, a_step, once, load, own)


def _batch_seconds(base: PreTrainedModel, samples: Sequence[Sample], size: int, masked: bool) -> tuple[float, float]:
    """Seconds and tokens of a batch of so many samples, means over a few."""
    starts = range(0, min(len(samples), size * NUM_BATCHES), size)
    batches = [samples[start : start + size] for start in starts]
    seconds = [_seconds_of(base, batch, masked) for batch in batches]
    counted = seconds[1:] or seconds
    return sum(counted) / len(counted), _num_tokens(samples[: size * len(batches)]) / len(batches)


@torch.inference_mode()
def _seconds_of(base: PreTrainedModel, batch: Sequence[Sample], masked: bool) -> float:
    _wait_for(base.device)
    started = perf_counter()
    padded = pad_batch(batch, base.device)
    hidden = hidden_states(base, **padded.inputs(masked)).flatten(0, 1)
    head, num_rows = OutputHead(base), head_rows(base)
    for rows in hidden.index_select(0, padded.rows).split(num_rows):
        head(rows).float().log_softmax(dim=1)
    _wait_for(base.device)
    return perf_counter() - started


def _num_tokens(samples: Sequence[Sample]) -> int:
    return sum(len(sample.token_ids) for sample in samples)


def _load() -> float | None:
    try:
        return os.getloadavg()[0]
    except OSError:
        return None


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
