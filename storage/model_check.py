"""What was found when a sample of a cache was captured again by the model that it says it is of: kept beside the cache.

Owns the file against-model.json and whether it is of these contents and this model. It decides nothing: a reader may
ignore it, and one that is damaged, or of another cache, is as none. Must not run models; who made it is not proved by
it, since whoever can write the cache can write the file. `verify --against-model` makes it anew.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from .cache import LogitCache
from .errors import CorruptCache
from .files import open_files
from .identity import digest_json
from .layout import AGAINST_MODEL
from .manifest import Manifest, read_json, to_bytes

MAX_RATIO = 4.0
"""Times the model's own noise. Other kernels and machines differ by more than other batches do: attention by eager
against sdpa .2 to 2 times; another model, or another dtype, by thousands of times (docs/log.md)."""

MIN_OVERLAP = 0.8
"""Mean share of the alternatives that both keep: where they share nothing, nothing differs either."""


@dataclass(frozen=True)
class ModelCheck:
    """A cache against its model, on a sample of it. All differences are of log-probabilities, of label, alternatives
    and tail alike, in nats, after the cache's own rounding; those of 1000 nats or more are 1000."""

    #: `contents_checksum` of the cache.
    contents: str
    #: `model_digest` of what the cache says it is of, which the model that ran is.
    model: str
    #: How many samples were captured again.
    num_samples: int
    #: How many positions of theirs.
    num_positions: int
    #: Mean difference between cache and model.
    mean_nats: float
    #: Mean difference of the model from itself, each sample beside others and alone; at least 1e-6.
    mean_noise_nats: float
    #: Largest difference between cache and model.
    worst_nats: float
    #: What the largest may be: a step of the cache's precision, and the model's own largest as often as the mean's.
    worst_allowed_nats: float
    #: Mean share of the cache's alternatives that the model keeps too.
    overlap: float

    @property
    def ratio(self) -> float:
        """How many times the model's own noise the cache differs from it."""
        return self.mean_nats / self.mean_noise_nats

    @property
    def is_within(self) -> bool:
        """Whether that is noise: on the mean, at the worst position, and by the same alternatives."""
        close = self.ratio <= MAX_RATIO and self.worst_nats <= self.worst_allowed_nats
        return close and self.overlap >= MIN_OVERLAP

    def sentence(self) -> str:
        """The answer in words, the middle of a sentence."""
        where = f"on {self.num_positions:,} positions of {self.num_samples:,} samples"
        if self.is_within:
            return f"within the model's own noise: {self.ratio:.2g} x ({self.mean_noise_nats:.2g} nats) {where}"
        return (
            f"not the model's: {self.ratio:,.3g} x its own noise ({self.mean_noise_nats:.2g} nats), at worst "
            f"{self.worst_nats:.3g} nats (allowed {self.worst_allowed_nats:.3g}), {100 * self.overlap:.0f} % of the "
            f"alternatives shared, {where}"
        )


def model_digest(manifest: Manifest) -> str:
    """Of the model's identity, as a cache states it."""
    return digest_json(asdict(manifest.model))


def write_model_check(path: str | Path, check: ModelCheck) -> None:
    """Put it beside the cache, in place of an earlier one. Raises OSError where the cache cannot be written to."""
    open_files(path).replace(AGAINST_MODEL, to_bytes(check))


def read_model_check(cache: LogitCache) -> ModelCheck | None:
    """What lies beside this cache and is of these contents and this model; None where there is nothing such."""
    files = open_files(cache.path)
    try:
        found = read_json(ModelCheck, files, AGAINST_MODEL) if files.exists(AGAINST_MODEL) else None
    except CorruptCache:
        return None
    mine = (cache.contents_checksum, model_digest(cache.manifest))
    is_of_it = found is not None and (found.contents, found.model) == mine and found.mean_noise_nats > 0
    return found if is_of_it else None
