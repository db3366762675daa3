"""Fine-tune with LoRA against a cache of the base model's own predictions.

    import logitcache

    logitcache.precompute("base/", "train.jsonl", "cache/")                  # the base runs once
    logitcache.train("base/", None, "cache/", "adapter/")                    # as often as you like
    logitcache.answers("base/", None, "prior.jsonl")                         # what the base itself says
    logitcache.evaluate("base/", "adapter/", {"new": "new.jsonl", "prior": "prior.jsonl"})

Two flows, each a straight line, meet in the cache: rows -> samples -> base -> cache, and samples -> cache -> loss ->
adapter. What is public stands in `__all__` and is imported from here; a name loads torch or transformers when it is
used first, and only if it needs them. The command line is `logitcache --help`.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

_HOMES = {
    "AdapterSettings": "adapters.settings",
    "Anchor": "training.anchors",
    "AnchorSettings": "training.settings",
    "AnswerSettings": "evaluation.settings",
    "CacheError": "storage",
    "CacheView": "pairing.view",
    "CacheWriter": "storage",
    "CachedKL": "training.trainer",
    "CachedKLTrainer": "training.trainer",
    "CachedLoss": "training.custom_loop",
    "CachedReference": "training.reference",
    "CaptureSettings": "capture.settings",
    "CorruptCache": "storage",
    "DataSettings": "data.settings",
    "EngineSettings": "capture.settings",
    "EvalSettings": "training.settings",
    "FolderInUse": "errors",
    "HeldOut": "evaluation.held_out",
    "IdentityMismatch": "storage",
    "IncompleteCache": "storage",
    "InputNotFound": "errors",
    "InvalidData": "errors",
    "InvalidSettings": "errors",
    "LoadSettings": "models.settings",
    "LogitCache": "storage",
    "NotTheBase": "errors",
    "Objective": "losses.objective",
    "OwnEngine": "capture.loaded",
    "PairingRules": "pairing.settings",
    "PenaltySettings": "training.settings",
    "PipelineError": "errors",
    "PositionNotCaptured": "storage",
    "Sample": "data.samples",
    "SampleNotCached": "storage",
    "TrainSettings": "training.settings",
    "TrainerSettings": "training.trainer_settings",
    "TrainingFailed": "errors",
    "UnsuitableAdapter": "errors",
    "UnsupportedModel": "errors",
    "answers": "evaluation.answers",
    "evaluate": "evaluation.compare",
    "load_head": "models.checkpoint_head",
    "precompute": "capture.worker",
    "records_from_hidden": "capture.records",
    "records_from_logits": "capture.records",
    "sample_id": "storage",
    "sweep": "sweeps.run",
    "train": "training.run",
}
"""Where each public name lives."""

__all__ = [*_HOMES, "__version__"]

if TYPE_CHECKING:
    from .adapters.settings import AdapterSettings as AdapterSettings
    from .capture.loaded import OwnEngine as OwnEngine
    from .capture.records import records_from_hidden as records_from_hidden
    from .capture.records import records_from_logits as records_from_logits
    from .capture.settings import CaptureSettings as CaptureSettings
    from .capture.settings import EngineSettings as EngineSettings
    from .capture.worker import precompute as precompute
    from .data.samples import Sample as Sample
    from .data.settings import DataSettings as DataSettings
    from .errors import FolderInUse as FolderInUse
    from .errors import InputNotFound as InputNotFound
    from .errors import InvalidData as InvalidData
    from .errors import InvalidSettings as InvalidSettings
    from .errors import NotTheBase as NotTheBase
    from .errors import PipelineError as PipelineError
    from .errors import TrainingFailed as TrainingFailed
    from .errors import UnsuitableAdapter as UnsuitableAdapter
    from .errors import UnsupportedModel as UnsupportedModel
    from .evaluation.answers import answers as answers
    from .evaluation.compare import evaluate as evaluate
    from .evaluation.held_out import HeldOut as HeldOut
    from .evaluation.settings import AnswerSettings as AnswerSettings
    from .losses.objective import Objective as Objective
    from .models.checkpoint_head import load_head as load_head
    from .models.settings import LoadSettings as LoadSettings
    from .pairing.settings import PairingRules as PairingRules
    from .pairing.view import CacheView as CacheView
    from .storage import CacheError as CacheError
    from .storage import CacheWriter as CacheWriter
    from .storage import CorruptCache as CorruptCache
    from .storage import IdentityMismatch as IdentityMismatch
    from .storage import IncompleteCache as IncompleteCache
    from .storage import LogitCache as LogitCache
    from .storage import PositionNotCaptured as PositionNotCaptured
    from .storage import SampleNotCached as SampleNotCached
    from .storage import sample_id as sample_id
    from .sweeps.run import sweep as sweep
    from .training.anchors import Anchor as Anchor
    from .training.custom_loop import CachedLoss as CachedLoss
    from .training.reference import CachedReference as CachedReference
    from .training.run import train as train
    from .training.settings import AnchorSettings as AnchorSettings
    from .training.settings import EvalSettings as EvalSettings
    from .training.settings import PenaltySettings as PenaltySettings
    from .training.settings import TrainSettings as TrainSettings
    from .training.trainer import CachedKL as CachedKL
    from .training.trainer import CachedKLTrainer as CachedKLTrainer
    from .training.trainer_settings import TrainerSettings as TrainerSettings

    __version__: str


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("logitcache")
    if name not in _HOMES:
        raise AttributeError(f"module 'logitcache' has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
