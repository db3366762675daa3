"""What a run says when memory runs out: the bytes that a step takes by its config, and what takes fewer.

Owns the sentence; the numbers are `memory`'s. Must not know the trainer.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from logitcache.errors import TrainingFailed, is_out_of_memory
from logitcache.models.device_map import head_device
from logitcache.models.quantization import LOAD_IN, held_in

from .job import Job
from .memory import StepMemory, check_reckonable, step_memory

logger = logging.getLogger(__name__)


@contextmanager
def told_in_bytes(job: Job) -> Iterator[None]:
    """Within, an error that says that memory ran out becomes a `TrainingFailed` that says by what."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        what = " ".join(str(error).split())[:200].rstrip(".")
        raise TrainingFailed(
            f"training {job.base.source.name}: memory ran out ({what}). {_reckoned(job)}The last checkpoint is kept. "
            f"Train into a new --out with {_advice(job)}."
        ) from error


def _reckoned(job: Job) -> str:
    """The sum; nothing where a model cannot be made without weights, or an optimizer's state is not known, since the
    first error is the one to tell."""
    try:
        check_reckonable(job.trainer)
        return f"By its config a step takes {memory_of(job).said}. "
    except Exception as error:  # whatever a family's own code raises of tensors without memory
        logger.debug("reckoning the bytes of a step failed", exc_info=error)
        return ""


def memory_of(job: Job) -> StepMemory:
    """What a step of a job takes."""
    model, held = job.base.model, held_in(job.base.model)
    return step_memory(
        model.config,
        getattr(torch, job.base.identity.dtype),
        job.adapter,
        job.settings,
        max(len(sample.token_ids) for sample in job.samples),
        load_in=held if held in LOAD_IN else None,
        device=head_device(model).type,
        anchor_tokens=sum(a.settings.batch * a.open_cache.manifest.capture.max_length for a in job.anchors),
        with_fisher=job.penalty is not None and job.penalty.kind == "ewc",
        attention=getattr(model.config, "_attn_implementation", None),
    )


def _advice(job: Job) -> str:
    fewer = f"--batch-tokens {max(job.settings.batch_tokens // 2, 1)}"
    return fewer if job.settings.gradient_checkpointing else f"--gradient-checkpointing, or {fewer}"
