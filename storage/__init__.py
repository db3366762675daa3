"""What lasts: the cache of base log-probabilities, as bytes on a disk.

Owns the record, its identity, the manifest, the encodings and the stores.
Must not import torch, transformers, peft, datasets, click or logitcache.pipeline:
a cache is readable where no model can be loaded.
"""

from .cache import LogitCache
from .errors import (
    CacheError,
    CacheLocked,
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
from .verify import VerifyReport, verify
from .writer import CacheWriter

__all__ = [
    "BaseLogprobs",
    "CacheError",
    "CacheLocked",
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
    "SampleNotCached",
    "TokenizerIdentity",
    "UnsupportedFormat",
    "VerifyReport",
    "sample_id",
    "verify",
]
