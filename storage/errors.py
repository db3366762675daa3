"""Every way a cache can refuse: one class each, with a `reason` code that does not change.

A message reads: what failed where: expected X, found Y. Consequence. One thing to do.
Programs and tests match `reason`; people read the message.
"""

from typing import ClassVar


class CacheError(Exception):
    """Base of all refusals of a cache."""

    reason: ClassVar[str] = "cache-error"


class NotACache(CacheError):
    """The path holds no cache at all."""

    reason = "not-a-cache"


class UnsupportedFormat(CacheError):
    """A format version or feature flag that this version of the program does not know."""

    reason = "unsupported-format"


class CorruptCache(CacheError):
    """Stored bytes are missing, truncated, altered or contradict each other. `fact`: where and what, without advice."""

    reason = "corrupt"

    def __init__(self, message: str, fact: str = "") -> None:
        super().__init__(message)
        self.fact = fact or message


class LinkRefused(CacheError):
    """A symbolic link where none is followed, or one that leads to no folder or into another cache.

    What is behind it was neither read nor changed, and is not called missing. `fact`: where and what, without advice.
    """

    reason = "link-refused"

    def __init__(self, message: str, fact: str = "") -> None:
        super().__init__(message)
        self.fact = fact or message


class IncompleteCache(CacheError):
    """Precompute was interrupted: committed shards may exist, the contents were never finalised."""

    reason = "incomplete"


class IdentityMismatch(CacheError):
    """The cache belongs to another model, tokenizer or capture setting."""

    reason = "identity-mismatch"


class SampleNotCached(CacheError):
    """No cached sample equals, or starts with, the token ids asked for."""

    reason = "sample-not-cached"


class PositionNotCaptured(CacheError):
    """The sample is cached, but not at a position asked for."""

    reason = "position-not-captured"


class AmbiguousData(CacheError):
    """Data sets of one cache that contradict one another: the same tokens, supervised at other positions."""

    reason = "ambiguous-data"


class InvalidRecord(CacheError):
    """A record breaks an invariant of `BaseLogprobs`; it is neither written nor returned."""

    reason = "invalid-record"


class PackingStopped(CacheError):
    """The process that packs shards ended before it answered. Nothing of the shard was written."""

    reason = "packing-stopped"
