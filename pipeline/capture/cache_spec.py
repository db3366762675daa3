"""What a cache is to hold of every position: its manifest, and the partition of the vocabulary that this names.

Owns the manifest that goes with a base and settings, and that manifest and partition travel together. Must not know
which samples there are, nor run the base.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from logitcache.data.samples import Sample
from logitcache.models.loading import tokenizer_identity
from logitcache.models.same_base import config_differences
from logitcache.storage import BaseLogprobs, CachedSample, CacheWriter, CaptureIdentity, Manifest, ModelIdentity
from logitcache.storage.encoding import PRECISIONS
from logitcache.storage.identity import digest
from logitcache.storage.manifest import MAX_TEXT, features_of
from logitcache.storage.plain_text import one_line
from logitcache.storage.records import keep_mass

from .settings import CaptureSettings, Precision, Store

PACKAGES = ("logitcache", "torch", "transformers", "zarr", "pyarrow", "numcodecs", "pcodec")
"""Whose versions a manifest names, and the engine's where there is one."""


@dataclass(frozen=True)
class CacheSpec:
    """The manifest of a cache, and the tail group of each token, uint8 [V], exactly where it has tail groups."""

    manifest: Manifest
    token_groups: NDArray[np.uint8] | None = None

    def writer(self, path: str | Path) -> CacheWriter:
        """A writer of the cache at `path`, which may be there with the base's config in another spelling.

        Raises what `CacheWriter` raises."""
        return CacheWriter(path, self.manifest, self.token_groups, config_differences)

    def stored(self, captured: Iterable[tuple[Sample, BaseLogprobs]]) -> list[CachedSample]:
        """Samples and their records as they are stored: with the fewest alternatives that hold the mass asked for."""
        min_mass = self.manifest.capture.min_mass
        return [
            CachedSample(sample.token_ids, keep_mass(record, min_mass, self.token_groups), sample.num_tokens_cut)
            for sample, record in captured
        ]


def settings_of(manifest: Manifest) -> CaptureSettings:
    """The settings of a cache that is there. How its work was cut, and at which positions, no manifest says: those are
    the defaults."""
    kept = manifest.capture
    steps = kept.group_steps_per_nat
    return CaptureSettings(
        top_k=kept.top_k,
        max_length=kept.max_length,
        store=cast(Store, manifest.store),
        precision=cast(Precision, kept.precision),
        min_mass=kept.min_mass,
        tail_groups=kept.num_tail_groups,
        tail_group_step=1 / steps if steps else CaptureSettings.tail_group_step,
        tail_samples=kept.num_tail_samples,
    )


def cache_spec(
    model_name: str,
    identity: ModelIdentity,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: CaptureSettings,
    token_groups: NDArray[np.uint8] | None = None,
    engine: tuple[str, str] | None = None,
) -> CacheSpec:
    """What a cache of this base with these settings holds.

    token_groups: as `vocab_groups.groups_for` gives them. engine: name and version of what ran the base, where that is
    not transformers. Raises `InvalidSettings` for more alternatives or groups than the base has tokens.
    """
    settings.check_vocabulary(identity.vocab_size)
    precision = PRECISIONS[settings.precision]
    manifest = Manifest(
        store=settings.store,
        model=identity,
        tokenizer=tokenizer_identity(tokenizer),
        capture=CaptureIdentity(
            top_k=settings.top_k,
            max_length=settings.max_length,
            min_mass=settings.min_mass,
            precision=settings.precision,
            max_error=precision.max_error if precision else 0.0,
            num_tail_groups=0 if token_groups is None else settings.tail_groups,
            tail_partition="" if token_groups is None else digest(token_groups.tobytes()),
            group_steps_per_nat=0 if token_groups is None else round(1 / settings.tail_group_step),
            num_tail_samples=settings.tail_samples,
        ),
        model_name=one_line(model_name, MAX_TEXT),
        created_with={**{name: version(name) for name in PACKAGES}, **dict([engine] if engine else [])},
    )
    manifest = replace(manifest, reader_features=features_of(manifest.capture, manifest.model))
    return CacheSpec(manifest, token_groups)
