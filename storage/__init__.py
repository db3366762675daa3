"""What lasts: the cache of base log-probabilities, as bytes on a disk.

Owns the record, its identity, the manifest, the encodings and the stores.
Must not import torch, transformers, peft, datasets, click or logitcache.pipeline:
a cache is readable where no model can be loaded.
"""

from .cache import LogitCache
from .errors import (
    CacheError,
    CorruptCache,
    IdentityMismatch,
    IncompleteCache,
    InvalidRecord,
    NotACache,
    PositionNotCaptured,
    SampleNotCached,
    UnsupportedFormat,
)
from .identity import CaptureSettings, ModelIdentity, TokenizerIdentity, sample_id
from .manifest import Manifest
from .records import BaseLogprobs, CachedSample
from .transfer import convert, export_parquet, merge
from .verify import RepairReport, VerifyReport, repair, verify
from .writer import CacheWriter

__all__ = [
    "BaseLogprobs",
    "CacheError",
    "CacheWriter",
    "CachedSample",
    "CaptureSettings",
    "CorruptCache",
    "IdentityMismatch",
    "IncompleteCache",
    "InvalidRecord",
    "LogitCache",
    "Manifest",
    "ModelIdentity",
    "NotACache",
    "PositionNotCaptured",
    "RepairReport",
    "SampleNotCached",
    "TokenizerIdentity",
    "UnsupportedFormat",
    "VerifyReport",
    "convert",
    "export_parquet",
    "merge",
    "repair",
    "sample_id",
    "verify",
]
