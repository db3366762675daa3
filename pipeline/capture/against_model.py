"""Is a cache what this model says? A sample of it captured again, with the model's own noise as the control.

Owns the comparison, and what of it is the cache's rounding. Must not load models, nor write.
Both sides are rounded as the cache is before they are compared: the mean difference of values rounded to a grid is, on
average over where in a step they lie, that of the values themselves, however small it is against the step. The model's
noise is what it differs by from itself when each sample stands beside others, padded, and when it stands alone; the
cache is compared with both.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from logitcache.models.loading import Base
from logitcache.storage import BaseLogprobs, CaptureIdentity
from logitcache.storage.encoding import PRECISIONS, decode, encode
from logitcache.storage.model_check import MAX_RATIO, ModelCheck, model_digest
from logitcache.storage.records import NO_TOKEN, keep_first

from .calibration import HeldRecords, records_of
from .differences import RecordDifferences, differences
from .teacher import TransformersTeacher

LEAST_NOISE_NATS = 1e-6
"""What the mean noise is taken to be at least: float32 sums in another order differ by that much, also where two
batches happen to be computed alike."""

MOST_NATS = 1000.0
"""What a difference is at most, one of a tail that is there and one that is not included."""


def check_against(held: HeldRecords, base: Base, batch_tokens: int) -> ModelCheck:
    """The samples captured again by the base, beside others and alone, and compared with what the cache holds.

    The base must be the one that the cache says it is of (`identity_checks.check_identity`), held as it was then.
    batch_tokens: in one forward, padding included.
    """
    capture = held.cache.manifest.capture
    teacher = TransformersTeacher(base.model, capture.top_k)
    beside, alone = (records_of(teacher, held.samples, tokens) for tokens in (batch_tokens, 1))
    cached = [plain(record) for record in held.records]
    beside, alone = ([_as_wide(r, c) for r, c in zip(found, cached, strict=True)] for found in (beside, alone))
    pairs = zip([*cached, *cached], [*beside, *alone], strict=True)
    of_cache = [differences(c, _rounded(r, capture)) for c, r in pairs]
    of_model = [differences(a, b) for a, b in zip(beside, alone, strict=True)]
    nats, noise = _values(of_cache), _values(of_model)
    precision = PRECISIONS[capture.precision]
    step = 0.0 if precision is None else 2 * capture.max_error
    return ModelCheck(
        contents=held.cache.contents_checksum,
        model=model_digest(held.cache.manifest),
        num_samples=len(held.samples),
        num_positions=sum(len(record) for record in cached),
        mean_nats=float(nats.mean()),
        mean_noise_nats=max(float(noise.mean()), LEAST_NOISE_NATS),
        worst_nats=float(nats.max()),
        worst_allowed_nats=step + MAX_RATIO * max(float(noise.max()), 100 * LEAST_NOISE_NATS),
        overlap=float(np.concatenate([d.overlap for d in of_cache]).mean()),
    )


def plain(record: BaseLogprobs) -> BaseLogprobs:
    """Label, alternatives and tail as one mass: what is compared."""
    return replace(record, tail_group_logprobs=None, tail_sample_ids=None, tail_sample_logprobs=None)


def _as_wide(record: BaseLogprobs, cached: BaseLogprobs) -> BaseLogprobs:
    """The record with as many alternatives a row as the cache keeps: by --min-mass it may be fewer than top_k."""
    return keep_first(record, (cached.alternative_ids != NO_TOKEN).sum(axis=1))


def _rounded(record: BaseLogprobs, capture: CaptureIdentity) -> BaseLogprobs:
    """The record as the cache would hold it; one that was converted has rounded twice."""
    alike = replace(capture, num_tail_groups=0, tail_partition="", num_tail_samples=0)
    finer = [name for name, p in PRECISIONS.items() if p is not None and p.max_error < capture.max_error]
    last = PRECISIONS[capture.precision]
    twice = last is not None and capture.max_error > last.max_error
    for name in [*(finer[:1] if twice else []), capture.precision]:
        at = replace(alike, precision=name)
        record = decode(encode(record, at), record.positions, record.label_ids, at)
    return record


def _values(parts: Sequence[RecordDifferences]) -> NDArray[np.float64]:
    """All differences."""
    found = [values for p in parts for values in (p.label, p.alternatives, p.tail)]
    return np.minimum(np.concatenate(found), MOST_NATS)
