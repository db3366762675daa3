"""What can be wrong with a user's input, besides the cache itself: one class each, with a stable `reason` code.

Also what the machine's own refusals, of its memory or its disk, look like.
"""

from typing import ClassVar

_NO_MEMORY = ("out of memory", "can't allocate memory")
"""What torch says of a GPU, and of a CPU."""

_NO_FILE = ("(os error ", "failed writing file", "unexpected pos ")
"""What safetensors says of a full disk, and torch; neither raises OSError."""


INSTALLED_FROM = "."
"""What pip is told to install: the clone that one stands in. At the first release this becomes `logitcache`, and
tests/house/test_docs.py then names every page that says otherwise."""


def install_line(extra: str) -> str:
    """The command that installs an optional dependency by its extra."""
    return f"pip install '{INSTALLED_FROM}[{extra}]'"


def release_of(number: str) -> tuple[int, ...]:
    """Major and minor of a version, to say of what is installed that it is too old."""
    return tuple(int(part) for part in number.split(".")[:2])


class PipelineError(Exception):
    """Base of the refusals of the pipeline."""

    reason: ClassVar[str] = "pipeline-error"


class InputNotFound(PipelineError):
    """A path, hub id, device or layer name that leads nowhere."""

    reason = "input-not-found"


class InvalidSettings(PipelineError, ValueError):
    """A setting of the wrong type or out of its range, or settings that contradict one another."""

    reason = "invalid-settings"


class InvalidData(PipelineError):
    """A data file or row that cannot be used; the message names it."""

    reason = "invalid-data"


class UnsupportedModel(PipelineError):
    """A model whose logits this program cannot reproduce from its hidden states, or that lacks weights."""

    reason = "unsupported-model"


class NonFiniteLogits(PipelineError):
    """The base produced NaN or infinite logits."""

    reason = "non-finite-logits"


class EngineFailed(PipelineError):
    """An engine that runs the base did not start, broke off, or returned something else than it was asked for."""

    reason = "engine-failed"


class NotCalibrated(PipelineError):
    """An engine whose numbers were not compared with those of training, or differ from them by more than noise."""

    reason = "not-calibrated"


class NotTheBase(PipelineError):
    """The model that is to be trained does not start from the distributions of the cache."""

    reason = "not-the-base"


class UnsuitableAdapter(PipelineError):
    """An adapter that cannot be had as it is asked for: its kind, its rank, or layers that it cannot change."""

    reason = "unsuitable-adapter"


class InvalidBatch(PipelineError):
    """A collated batch that cannot be taken apart into samples."""

    reason = "invalid-batch"


class TrainingFailed(PipelineError):
    """Training cannot go on: a loss that is not finite, or an output folder that is in use."""

    reason = "training-failed"


class FolderInUse(TrainingFailed):
    """An output folder that another run writes to at this moment."""

    reason = "folder-in-use"


class UnreadableSweep(PipelineError):
    """Files of a sweep that are damaged, half-written, or contradict one another."""

    reason = "unreadable-sweep"


class NotComparable(PipelineError):
    """Two evaluations of different bases or data, whose ratio would mean nothing; a cache that none can be made of."""

    reason = "not-comparable"


class TasksFailed(PipelineError):
    """The evaluation harness could not load or run a task."""

    reason = "tasks-failed"


class HubFailed(PipelineError):
    """The Hub refused, could not be reached, holds something else, or did not keep what it was sent."""

    reason = "hub-failed"


def is_out_of_memory(error: Exception) -> bool:
    """Whether main memory or a GPU's ran out, by whatever class a library says so."""
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in _NO_MEMORY)


def is_file_failure(error: Exception) -> bool:
    """Whether a file could not be read or written, as on a full disk, by whatever class a library says so."""
    return isinstance(error, OSError) or any(sign in str(error) for sign in _NO_FILE)
