"""What all runs of a sweep share: read and checked, and then the folder claimed and the base captured on held-out text.

Owns that every run is checked before the first one starts, by the functions that the run itself calls (`job`,
`training.job`), and that `--dry-run` makes the same checks and writes nothing. Must not train.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from logitcache.capture.settings import CaptureSettings
from logitcache.capture.worker import precompute
from logitcache.data.places import settings_for
from logitcache.data.rows import read_rows
from logitcache.data.samples import Sample, distinct
from logitcache.data.settings import DEFAULT
from logitcache.data.skipped import listed_beside
from logitcache.evaluation.settings import ScaleSettings
from logitcache.events import OnMessage
from logitcache.json_files import write_checked
from logitcache.models.head import check_length
from logitcache.models.loading import Base, find_model, load_base, load_tokenizer
from logitcache.models.settings import LoadSettings
from logitcache.pairing.samples import check_weights, samples_for
from logitcache.pairing.targets import digests_of
from logitcache.pairing.view import CacheView
from logitcache.settings import line_settings
from logitcache.storage import LogitCache
from logitcache.storage.plain_text import without_secrets
from logitcache.training.anchors import Anchor
from logitcache.training.description import check_unchanged, data_fingerprint, describe, tried_formulas
from logitcache.training.job import Job, check_model
from logitcache.training.run_folder import check_out, look
from logitcache.training.settings import RunSettings

from .config import CurveSettings, ProbeSettings, RunSpec, SweepConfig
from .folder import PROBE, RUNS, SWEEP, VERSION, check_folder, check_same, locked, state_of, stored


@dataclass(frozen=True)
class Prepared:
    """What all runs of a process share."""

    config: SweepConfig
    out: Path
    #: On the CPU, untouched.
    base: Base
    tokenizer: PreTrainedTokenizerBase | None
    #: Where runs are trained.
    device: torch.device
    cache: LogitCache
    samples: Sequence[Sample]
    #: Held-out samples, new and prior, each once.
    texts: dict[str, Sequence[Sample]]
    anchors: Sequence[LogitCache] = ()
    #: Digests of the formulas of the user's own, by their names.
    formulas: dict[str, str] = field(default_factory=dict)
    #: What the base says of `texts`; empty until the folder is claimed.
    probes: dict[str, LogitCache] = field(default_factory=dict)

    def settings_of(self, spec: RunSpec) -> RunSettings:
        """A run as `training` takes it."""
        return self.config.run_of(spec, self.cache.manifest.capture.num_tail_groups > 0)

    def samples_of(self, run: RunSettings) -> Sequence[Sample]:
        """Those of a run, with the weights that rows bring where it reads them."""
        if run.objective.ce_weight == "data":
            return self.samples
        return [s if s.weights is None else replace(s, weights=None) for s in self.samples]

    def fresh(self) -> Base:
        """The base for a run, which may rewrite it: a copy, or loaded again where it cannot be copied."""
        held, base = self.config.common.loading, self.base
        if not _stays(held):
            return _copy_of(base, self.device)
        return load_base(base.source, base.identity.dtype, self.device, held.load_in, held.device_map)

    def untouched(self) -> Base:
        """The base on the device, for what only runs it."""
        return self.base if _stays(self.config.common.loading) else _copy_of(self.base, self.device)

    def job(self, spec: RunSpec, base: Base) -> Job:
        """A run on a base. Raises as `Job`, and `TrainingFailed` for anchors that cannot be."""
        run = self.settings_of(spec)
        return Job(
            base,
            self.samples_of(run),
            self.cache,
            self.out / RUNS / spec.name,
            run.adapter,
            run.objective,
            run.training,
            run.penalty,
            run.pairing,
            self.tokenizer,
            how=self.config.how,
            anchors=[Anchor(cache, run.anchor).opened() for cache in self.anchors] if run.anchor.weight else [],
        )


def check(
    config: SweepConfig, out: Path, dtype: str, device: torch.device, on_message: OnMessage = lambda _: None
) -> Prepared:
    """Read what the runs of a sweep share, and hold every run against it. Writes nothing to `out`.

    Raises what a run would raise before its first step, `IdentityMismatch` where the sweep that is in `out` is of
    another model, cache or text, `TrainingFailed` where the folder holds something else, and what reading raises.
    """
    check_folder(out)
    names = {"data": config.data, "new": config.new, "prior": config.prior}
    hows = {n: listed_beside(h, f"{out}-{n}") for n, h in settings_for(names, config.how).items()}
    rows = {n: None if paths is None else read_rows(paths, hows[n], on_message) for n, paths in names.items()}
    cache, anchors = LogitCache.open(config.cache), [LogitCache.open(path) for path in config.anchor_cache]
    runs = [config.run_of(spec, cache.manifest.capture.num_tail_groups > 0) for spec in config.runs]
    formulas = tried_formulas((run.objective for run in runs), on_message)
    source = find_model(config.model)
    tokenizer, held = load_tokenizer(source), config.common.loading
    base = load_base(source, dtype, device if _stays(held) else torch.device("cpu"), held.load_in, held.device_map)

    def read(name: str) -> list[Sample]:
        def tell(sentence: str) -> None:
            on_message(sentence if name == "data" else f"{name}: {sentence}")

        return samples_for(rows[name], cache, tokenizer, base.identity.vocab_size, None, tell, hows.get(name, DEFAULT))

    samples = read("data")
    weighed = [run.objective for run in runs if run.objective.ce_weight == "data"]
    check_weights(samples, (weighed or [run.objective for run in runs])[0])
    texts: dict[str, Sequence[Sample]] = {name: list(distinct(read(name))) for name in ("new", "prior")}
    found = Prepared(config, out, base, tokenizer, device, cache, samples, texts, anchors, formulas)
    _check_texts(found)
    _check_runs(found)
    there = stored(out)
    check_same(there, _description(found), out)
    check_unchanged(there.get("formulas", {}), formulas, out)
    return found


def prepare(
    config: SweepConfig, out: Path, dtype: str, device: torch.device, on_message: OnMessage = lambda _: None
) -> Prepared:
    """The same, and then capture the base on the held-out text, and claim the folder `out` for this sweep.

    A sweep that is there already is gone on with: other runs may be asked for, but of the same model, cache and text.
    """
    found = check(config, out, dtype, device, on_message)
    with locked(out / f"{SWEEP}.lock"):
        there, described = stored(out), _description(found)  # again: another process may have begun it
        check_same(there, described, out)
        check_unchanged(there.get("formulas", {}), found.formulas, out)
        asked = {**_runs_of(config, out, there), "formulas": {**there.get("formulas", {}), **found.formulas}}
        write_checked(out / SWEEP, {**described, **asked})
        return replace(found, probes=_captured(found, on_message))


def _captured(found: Prepared, on_message: OnMessage) -> dict[str, LogitCache]:
    """What the base says of the held-out texts, run where it was not before."""
    base, probes = found.untouched(), {}
    for name, text in found.texts.items():
        path = found.out / PROBE / name
        report = precompute(base, text, path, _probe_settings(found), tokenizer=found.tokenizer)
        if report.num_samples:
            on_message(f"The base ran over {name}, {report.num_tokens:,} tokens of held-out text, into {path}.")
        probes[name] = LogitCache.open(path)
    return probes


def _probe_settings(found: Prepared) -> CaptureSettings:
    top_k = found.config.probe.top_k(found.base.identity.vocab_size)
    return CaptureSettings(top_k, found.cache.manifest.capture.max_length, precision="exact")


def _check_texts(found: Prepared) -> None:
    """Raise what capturing and measuring the held-out texts would."""
    _probe_settings(found).check_vocabulary(found.base.identity.vocab_size)
    for text in found.texts.values():
        check_length(found.base.model, max(len(sample.token_ids) for sample in text))


def _check_runs(found: Prepared) -> None:
    """Raise what a run would before its first step: whatever runs have in common is checked once."""
    base = found.untouched()
    seen: set[object] = set()
    starts: set[object] = set()
    for spec in found.config.runs:
        run, folder = found.settings_of(spec), found.out / RUNS / spec.name
        check_out(folder, resume=True)
        loss = (run.objective, run.penalty, run.training.top_k, run.pairing, run.anchor)
        adapted = (run.adapter, None if run.penalty is None else run.penalty.kind)
        is_begun = state_of(folder) == "begun"
        if {loss, adapted} <= seen and not is_begun:
            continue
        job = found.job(spec, base)
        if loss not in seen:
            _check_loss(job, starts)
        if adapted not in seen:
            check_model(job, None, job.paired_anchors())
        described = describe(job)
        if is_begun:
            look(folder, described)
        seen |= {loss, adapted}


def _check_loss(job: Job, measured: set[object]) -> None:
    """Raise where cache and anchors do not fit, or the base itself is further from them than noise.

    measured: what the base has been measured by, which weights of a loss do not change; added to.
    """
    view, model, anchors = job.paired(), job.base.model, job.paired_anchors()
    if view is not None:
        view.require(job.samples)
        if job.pairing.teacher_is_base and _is_new(view, measured):
            view.step_zero(model, job.samples)
    for term in anchors.terms:
        if _is_new(term.view, measured):
            term.step_zero(model)


def _is_new(view: CacheView, measured: set[object]) -> bool:
    """Whether the base has not been measured yet as this view does it (`step_zero`); it has been from now on."""
    start = (view.cache.path, view.objective.masked, view.objective.min_base_rest, view.rules)
    is_new = start not in measured
    measured.add(start)
    return is_new


def _stays(held: LoadSettings) -> bool:
    """Whether a base is where it was loaded: packed weights and spread layers can be neither copied nor moved."""
    return held.load_in is not None or held.device_map is not None


def _copy_of(base: Base, device: torch.device) -> Base:
    """The untouched base again, on the device: a run may rewrite it."""
    return Base(base.source, copy.deepcopy(base.model).to(device), base.identity)


def _description(found: Prepared) -> dict[str, Any]:
    """What decides every run's result besides its own settings."""
    config, base, cache, samples = found.config, found.base, found.cache, found.samples
    return {
        "format": VERSION,
        "given": _given(found),
        "model": without_secrets(config.model),
        "identity": asdict(base.identity),
        "cache": without_secrets(config.cache),
        "contents": cache.contents_checksum,
        "anchors": [{"contents": c.contents_checksum, "data_sets": digests_of(c)} for c in found.anchors],
        "data": data_fingerprint(samples),
        "data_sets": digests_of(cache) if config.data is None else None,
        **{name: " + ".join(map(without_secrets, getattr(config, name))) for name in found.texts},
        "texts": {name: data_fingerprint(text) for name, text in found.texts.items()},
        "pairing": config.common.pairing.plain(),
        "probe_top_k": config.probe.top_k(base.identity.vocab_size),
        "num_train_tokens": sum(len(s.token_ids) for s in samples),
        "num_train_positions": sum(len(s.positions) for s in samples),
    }


def _given(found: Prepared) -> dict[str, Any]:
    """What a `logitcache train` of a run is given beside the run's settings, by the names of its flags."""
    config = found.config
    own = {s.key for s in line_settings(ProbeSettings, ScaleSettings, CurveSettings)}
    return {
        "model": without_secrets(config.model),
        "cache": without_secrets(config.cache),
        "data": None if config.data is None else list(map(without_secrets, config.data)),
        "anchor_cache": list(map(without_secrets, config.anchor_cache)),
        "dtype": found.base.identity.dtype,
        **{name: value for name, value in config.shared.items() if name not in own},
    }


def _runs_of(config: SweepConfig, out: Path, there: dict[str, Any]) -> dict[str, Any]:
    """The methods and runs that are asked for, and those that an earlier configuration asked for and that are done."""
    runs = {run.name: asdict(run) for run in config.runs}
    earlier = [r for r in there.get("runs", []) if state_of(out / RUNS / r["name"]) in ("finished", "failed")]
    runs |= {r["name"]: r for r in earlier if r["name"] not in runs}
    return {"methods": list(dict.fromkeys(r["method"] for r in runs.values())), "runs": list(runs.values())}
