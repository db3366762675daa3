"""What lasts: the cache of base log-probabilities, as bytes on a disk.

Owns the record, its identity, the manifest, the encodings and the stores.
Must not import torch, transformers, peft, datasets, click or anything above it:
a cache is readable where no model can be loaded.
"""

from .cache import LogitCache
from .data_samples import DataSample, DataSamples, data_samples
from .data_sets import DataSet
from .errors import (
    AmbiguousData,
    CacheError,
    CorruptCache,
    IdentityMismatch,
    IncompleteCache,
    InvalidRecord,
    LinkRefused,
    NotACache,
    PositionNotCaptured,
    SampleNotCached,
    UnsupportedFormat,
)
from .identity import CaptureIdentity, ModelIdentity, TokenizerIdentity, sample_id
from .manifest import Manifest
from .prune import PruneReport, prune
from .records import BaseLogprobs, CachedSample
from .transfer import Copied, check_same_capture, convert, copy_samples, export_parquet, merge
from .verify import RepairReport, VerifyReport, repair, verify
from .writer import CacheWriter

__all__ = [
    "AmbiguousData",
    "BaseLogprobs",
    "CacheError",
    "CacheWriter",
    "CachedSample",
    "CaptureIdentity",
    "Copied",
    "CorruptCache",
    "DataSample",
    "DataSamples",
    "DataSet",
    "IdentityMismatch",
    "IncompleteCache",
    "InvalidRecord",
    "LinkRefused",
    "LogitCache",
    "Manifest",
    "ModelIdentity",
    "NotACache",
    "PositionNotCaptured",
    "PruneReport",
    "RepairReport",
    "SampleNotCached",
    "TokenizerIdentity",
    "UnsupportedFormat",
    "VerifyReport",
    "check_same_capture",
    "convert",
    "copy_samples",
    "data_samples",
    "export_parquet",
    "merge",
    "prune",
    "repair",
    "sample_id",
    "verify",
]
