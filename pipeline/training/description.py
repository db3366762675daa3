"""What determines a run, as run.json and its checkpoints say it, and by which a resumed run knows that it is the same.

Owns which facts these are: contents of the model, the cache, the data and the adapter's files, and all settings. Must
not know where it is written, nor the trainer.
"""

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from logitcache.adapters.attach import AdapterSettings
from logitcache.adapters.null_space import NullSpace, check_null_space
from logitcache.adapters.registry import NO_ADAPTER
from logitcache.adapters.start_from import start_digest
from logitcache.data.samples import Sample
from logitcache.events import OnMessage
from logitcache.losses.formula_checks import check_formulas
from logitcache.losses.formula_files import formula
from logitcache.losses.objective import Objective
from logitcache.models.device_map import devices_of
from logitcache.models.loading import Base
from logitcache.models.quantization import quantization_of
from logitcache.pairing.targets import digests_of
from logitcache.storage import IdentityMismatch, LogitCache, sample_id
from logitcache.storage.identity import digest, digest_json
from logitcache.storage.model_check import read_model_check
from logitcache.storage.plain_text import without_secrets

from .anchors import Anchor
from .job import Job, Probes

_PACKAGES = ("logitcache", "torch", "transformers", "peft", "accelerate", "zarr", "pyarrow", "numpy")


def describe(job: Job, probes: Probes | None = None) -> dict[str, Any]:
    """What determines a run, as JSON: a resumed run must agree in all of it but the versions.

    probes: what is measured while it is trained.
    """
    base, samples, cache, penalty = job.base, job.samples, job.cache, job.penalty
    return {
        "model": {"name": without_secrets(base.source.name), **_of_revision(base), **asdict(base.identity)},
        "cache": None if cache is None else {"path": str(cache.path), "contents": cache.contents_checksum},
        "against_model": _describe_check(cache),
        "data": {
            "num_samples": len(samples),
            "num_tokens": sum(len(s.token_ids) for s in samples),
            "num_positions": sum(len(s.positions) for s in samples),
            "fingerprint": data_fingerprint(samples),
            "data_sets": digests_of(cache) if cache is not None and job.of_cache else None,
            "how": None if job.of_cache else job.how.determining(),
        },
        "pairing": {**asdict(job.pairing), "load_in": quantization_of(base.model)},
        "adapter": _describe_adapter(base, job.adapter),
        "objective": asdict(job.objective),
        "formulas": {name: _describe_formula(name) for name in job.objective.own_formulas},
        "penalty": None if penalty is None else asdict(penalty),
        "anchors": [_describe_anchor(anchor) for anchor in job.anchors],
        "settings": asdict(job.settings),
        "start_from": None if job.start_from is None else start_digest(job.start_from),
        "trainer": job.trainer.fields,
        "evaluation": None if probes is None else {**asdict(job.evaluation), **probes.described()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "device": ", ".join(str(device) for device in devices_of(base.model)),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),  # torchrun's; the batch of a step grows with it
    }


def _of_revision(base: Base) -> dict[str, str]:
    """Which one of a hub id, where it is not its main branch: for people, since the identity decides."""
    return {} if base.source.revision is None else {"revision": base.source.revision}


def _describe_check(cache: LogitCache | None) -> dict[str, Any] | None:
    """What `verify --against-model` found of these very contents, where it was asked."""
    check = None if cache is None else read_model_check(cache)
    return None if check is None else {"within": check.is_within, "ratio": check.ratio, **asdict(check)}


def tried_formulas(objectives: Iterable[Objective], on_message: OnMessage = lambda _: None) -> dict[str, str]:
    """Try the formulas of the user's own in these objectives, as their files are now: digests by their names.

    on_message is told what is to be known of them. Raises what `check_formulas` raises.
    """
    different = {objective.own_formulas: objective for objective in objectives}
    said = [sentence for objective in different.values() for sentence in check_formulas(objective)]
    for sentence in dict.fromkeys(said):
        on_message(sentence)
    return {name: formula(name).digest for names in different for name in names}


def check_unchanged(known: Mapping[str, str], found: Mapping[str, str], out: Path) -> None:
    """Raise `IdentityMismatch` where the file of a formula is not what it was: digests by the names of the formulas."""
    for name, now in found.items():
        then = known.get(name, now)
        if then != now:
            raise IdentityMismatch(
                f"going on with {out}: the file of the formula {name} has changed since (SHA-256 {then[:12]}... then, "
                f"{now[:12]}... now). Runs under one name would have different losses. Give the new formula "
                "another name or file, or choose another --out."
            )


def _describe_formula(name: str) -> dict[str, str]:
    """A formula of the user's own, word for word."""
    return {"sha256": formula(name).digest, "text": formula(name).text}


def _describe_anchor(anchor: Anchor) -> dict[str, Any]:
    cache = anchor.open_cache
    contents = {"contents": cache.contents_checksum, "data_sets": digests_of(cache)}
    return {"path": str(cache.path), **contents, **asdict(anchor.settings)}


def data_fingerprint(samples: Sequence[Sample]) -> str:
    """Of the samples, their order, their supervised tokens and the weights of these; two data sets with one fingerprint
    are the same."""
    return digest_json(
        [
            [sample_id(s.token_ids).hex(), digest(s.supervised.tobytes())]
            + ([] if s.weights is None else [digest(s.weights.tobytes())])
            for s in samples
        ]
    )


def _describe_adapter(base: Base, adapter: AdapterSettings) -> dict[str, Any]:
    """With the null space's content, where there is one. Raises `NotTheBase` where it is another model's."""
    if adapter.kind == NO_ADAPTER:
        return {"kind": NO_ADAPTER}
    described = adapter.described()
    if adapter.kind != "lora-null":
        return described
    space = NullSpace.open(Path(adapter.nullspace))
    check_null_space(space, base, adapter.rank, adapter.nullspace)
    return {**described, "nullspace": space.checksum, "path": adapter.nullspace}
