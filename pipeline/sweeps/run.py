"""Many runs from one cache: each trained, evaluated and kept in a folder of its own, and none done twice.

Owns the sweep's folder: sweep.json, probe/new and probe/prior (what the base says of the held-out text, captured once),
runs/NAME/ (what `training` writes, and result.json or failed.json). What has one of these is done. A run is claimed by
a lock on its folder while it is trained, so that any number of processes may work on one sweep, and the claim of a
killed one is gone with it. The base is loaded once a process and stays untouched: every run gets a copy.
Must not print; what a run is comes from `config`, tables and pictures are the report's.
"""

import copy
import gc
import json
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from filelock import FileLock, Timeout
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from logitcache.capture.settings import CaptureSettings
from logitcache.capture.worker import precompute
from logitcache.data.batches import pad_batch
from logitcache.data.places import settings_for
from logitcache.data.rows import read_rows
from logitcache.data.samples import Sample, distinct
from logitcache.data.settings import DEFAULT
from logitcache.data.skipped import listed_beside
from logitcache.errors import FolderInUse, PipelineError, TrainingFailed, UnreadableSweep, is_file_failure
from logitcache.evaluation.compare import compare_cached, load_adapter
from logitcache.evaluation.metrics import Comparison
from logitcache.events import OnMessage
from logitcache.json_files import CheckedJson, read_lines, write_checked
from logitcache.models.head import LOGITS_BYTES, OutputHead, hidden_states, rows_at_once
from logitcache.models.loading import Base, find_model, load_base, load_tokenizer, pick_device
from logitcache.models.same_base import described_differences
from logitcache.models.settings import LoadSettings
from logitcache.pairing.samples import check_weights, samples_for
from logitcache.pairing.targets import digests_of
from logitcache.pairing.view import CacheView
from logitcache.storage import CacheError, IdentityMismatch, LogitCache
from logitcache.storage.files import is_unfinished
from logitcache.storage.plain_text import one_line, safe, without_secrets
from logitcache.training.anchors import Anchor, AnchorTerm
from logitcache.training.description import check_unchanged, data_fingerprint, tried_formulas
from logitcache.training.run import train
from logitcache.training.run_folder import LOG, RUN, clear
from logitcache.training.settings import RunSettings

from .config import MAX_METHOD, RunSpec, SweepConfig, read_config

SWEEP, RESULT, FAILED, RUNS, PROBE = "sweep.json", "result.json", "failed.json", "runs", "probe"
VERSION = 2
MAX_ERROR = 2000
"""Characters of the error of a run that are kept."""

COST_BATCHES = 9
"""Of the training data, by which the cost of a live base is measured."""


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
    probes: dict[str, tuple[LogitCache, Sequence[Sample]]]
    #: Of the runs that have anchors.
    anchors: Sequence[LogitCache] = ()
    #: Digests of the formulas of the user's own, by their names.
    formulas: dict[str, str] = field(default_factory=dict)

    def anchors_of(self, run: RunSettings) -> list[Anchor]:
        """Those of a run."""
        return _anchors(self.anchors, run)

    def samples_of(self, run: RunSettings) -> Sequence[Sample]:
        """Those of a run, with the weights that rows bring where it reads them."""
        if run.objective.ce_weight == "data":
            return self.samples
        return [s if s.weights is None else replace(s, weights=None) for s in self.samples]


@dataclass(frozen=True)
class Done:
    """How a run ended."""

    spec: RunSpec
    #: On "new" and on "prior" text; None where it failed.
    found: dict[str, Comparison] | None
    seconds: float | None
    error: str | None = None
    #: What a run that was begun before left aside when it went on, and why.
    told: tuple[str, ...] = ()


def prepare(
    config: SweepConfig, out: Path, dtype: str, device: torch.device, on_message: OnMessage = lambda _: None
) -> Prepared:
    """Load what the runs share, capture the base on the held-out text, and claim the folder `out` for this sweep.

    A sweep that is there already is gone on with: other runs may be asked for, but of the same model, cache and text.
    Raises `IdentityMismatch` where these differ, `TrainingFailed` where the folder holds something else, and whatever
    reading them raises.
    """
    _check_folder(out)
    names = {"data": config.data, "new": config.new, "prior": config.prior}
    hows = {n: listed_beside(h, f"{out}-{n}") for n, h in settings_for(names, config.how).items()}
    rows = {n: None if paths is None else read_rows(paths, hows[n], on_message) for n, paths in names.items()}
    source = find_model(config.model)
    tokenizer = load_tokenizer(source)
    common = config.common
    held = common.loading
    base = load_base(source, dtype, device if _stays(held) else torch.device("cpu"), held.load_in, held.device_map)
    cache, anchors = LogitCache.open(config.cache), [LogitCache.open(path) for path in config.anchor_cache]
    max_length = cache.manifest.capture.max_length

    def read(name: str) -> list[Sample]:
        def tell(sentence: str) -> None:
            on_message(sentence if name == "data" else f"{name}: {sentence}")

        return samples_for(rows[name], cache, tokenizer, base.identity.vocab_size, None, tell, hows.get(name, DEFAULT))

    samples = read("data")
    runs = [config.run_of(spec, _has_groups(cache)) for spec in config.runs]
    for objective, top_k, rules in dict.fromkeys((run.objective, run.training.top_k, run.pairing) for run in runs):
        CacheView.paired(cache, base, objective, tokenizer=tokenizer, top_k=top_k, rules=rules, how=config.how).require(
            samples
        )
    weighed = [run.objective for run in runs if run.objective.ce_weight == "data"]
    check_weights(samples, (weighed or [run.objective for run in runs])[0])
    formulas = tried_formulas((run.objective for run in runs), on_message)
    for anchor in dict.fromkeys(anchor for run in runs for anchor in _anchors(anchors, run)):
        AnchorTerm.paired(anchor, base, 0, tokenizer=tokenizer, rules=common.pairing, how=config.how)
    texts = {name: read(name) for name in ("new", "prior")}
    described = _description(config, base, cache, anchors, samples, texts)
    with _locked(out / f"{SWEEP}.lock"):
        stored = _stored(out)
        _check_same(stored, described, out)
        known = {**stored.get("formulas", {}), **formulas}
        check_unchanged(stored.get("formulas", {}), formulas, out)
        asked = {**_runs_of(config, out, stored), "formulas": known, "cost": stored.get("cost")}
        write_checked(out / SWEEP, {**described, **asked})
        on_device = base if _stays(held) else _copy_of(base, device)
        top_k = config.probe.top_k(base.identity.vocab_size)
        probes: dict[str, tuple[LogitCache, Sequence[Sample]]] = {}
        for name, text in texts.items():
            path = out / PROBE / name
            job = CaptureSettings(top_k, max_length, precision="exact")
            report = precompute(on_device, text, path, job, tokenizer=tokenizer)
            if report.num_samples:
                on_message(f"The base ran over {name}, {report.num_tokens:,} tokens of held-out text, into {path}.")
            probes[name] = (LogitCache.open(path), list(distinct(text)))
    return Prepared(config, out, base, tokenizer, device, cache, samples, probes, anchors, formulas)


def sweep(
    config: str | Path | SweepConfig,
    out: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    retry_failed: bool = False,
    on_message: OnMessage = lambda _: None,
) -> list[Done]:
    """Do every run of a sweep that is not done, one after the other, in the folder `out`; `logitcache report` reads it.

    config: a YAML file, or what `make_config` made. Returns the runs done here. Raises as `prepare` and `run_one`.
    """
    asked = config if isinstance(config, SweepConfig) else read_config(Path(config))
    prepared = prepare(asked, Path(out), dtype, pick_device(device), on_message)
    done = list(run_all(prepared, retry_failed))
    measure_cost(prepared)
    return done


def run_all(prepared: Prepared, retry_failed: bool = False) -> Iterator[Done]:
    """Every run that nobody has done or is doing, in the order of the configuration."""
    for spec in prepared.config.runs:
        done = run_one(prepared, spec, retry_failed)
        if done is not None:
            yield done


def run_one(prepared: Prepared, spec: RunSpec, retry_failed: bool = False) -> Done | None:
    """Train and evaluate a run; None where it is done already, or another process is at it.

    What is wrong with this run alone (a loss that is not finite, a rank that a layer does not allow, no memory) is
    recorded in failed.json. What would stop every run (a full disk) is raised.
    """
    folder = prepared.out / RUNS / spec.name
    with _locked(prepared.out / RUNS / f"{spec.name}.lock", wait=False) as mine:
        if not mine or state_of(folder) == "finished" or (state_of(folder) == "failed" and not retry_failed):
            return None
        try:
            return _train_and_evaluate(prepared, spec, folder)
        except FolderInUse:  # by `logitcache train`, started by hand
            return None
        except Exception as error:
            if is_file_failure(error) or not _only_this_run(error):
                raise
            return _record_failure(spec, folder, error)
        finally:
            gc.collect()
            if prepared.device.type == "cuda":
                torch.cuda.empty_cache()


def state_of(folder: Path) -> str:
    """Of a run's folder: finished, failed, begun, or waiting."""
    for name, state in ((RESULT, "finished"), (FAILED, "failed"), (RUN, "begun")):
        if (folder / name).is_file():
            return state
    return "waiting"


def _train_and_evaluate(prepared: Prepared, spec: RunSpec, folder: Path) -> Done:
    if state_of(folder) == "failed":
        clear(folder)
    run = prepared.config.run_of(spec, _has_groups(prepared.cache))
    told: list[str] = []
    check_unchanged(prepared.formulas, tried_formulas([run.objective]), prepared.out)
    report = train(
        _fresh(prepared),
        prepared.samples_of(run),
        prepared.cache,
        folder,
        run.adapter,
        run.objective,
        run.training,
        resume=True,
        penalty=run.penalty,
        pairing=run.pairing,
        tokenizer=prepared.tokenizer,
        on_message=told.append,
        anchors=prepared.anchors_of(run),
    )
    adapted = load_adapter(_fresh(prepared).model, str(folder), run.loading.device_map)
    found = {name: compare_cached(adapted, cache, samples) for name, (cache, samples) in prepared.probes.items()}
    result = {
        "name": spec.name,
        "method": spec.method,
        "settings": spec.settings,
        "seconds": report.seconds,
        "num_steps": report.num_steps,
        "num_tokens": report.num_tokens,
        "peak_memory_bytes": report.peak_memory_bytes,
        **{name: comparison.as_dict() for name, comparison in found.items()},
    }
    write_checked(folder / RESULT, result)
    return Done(spec, found, report.seconds, told=tuple(told))


def _record_failure(spec: RunSpec, folder: Path, error: Exception) -> Done:
    said = one_line(str(error), MAX_ERROR) or type(error).__name__
    folder.mkdir(parents=True, exist_ok=True)
    failure = {"name": spec.name, "method": spec.method, "settings": spec.settings, "error": said}
    if not isinstance(error, (PipelineError, CacheError)):
        failure["traceback"] = safe("".join(traceback.format_exception(error)))
    write_checked(folder / FAILED, {**failure, "step": _last_step(folder)})
    return Done(spec, None, None, said)


def _only_this_run(error: Exception) -> bool:
    """Whether the other runs may do better. A cache that is damaged, or is not this model's, stops them too."""
    return not isinstance(error, CacheError)


def _last_step(folder: Path) -> int | None:
    """The last step that was logged; None where there is none, or the log is damaged."""
    try:
        lines = enumerate(read_lines(folder / LOG, unfinished=True), 1)
        return max((CheckedJson(folder / LOG, v, f"line {i}, ").whole("step") for i, v in lines), default=None)
    except (FileNotFoundError, ValueError, UnreadableSweep):
        return None


def _stays(held: LoadSettings) -> bool:
    """Whether a base is where it was loaded: packed weights and spread layers can be neither copied nor moved."""
    return held.load_in is not None or held.device_map is not None


def _anchors(caches: Sequence[LogitCache], run: RunSettings) -> list[Anchor]:
    """The anchors of a run: a weight of 0 is none."""
    return [Anchor(cache, run.anchor) for cache in caches] if run.anchor.weight else []


def _has_groups(cache: LogitCache) -> bool:
    return cache.manifest.capture.num_tail_groups > 0


def _fresh(prepared: Prepared) -> Base:
    """The base for a run, which may rewrite it: a copy, or loaded again where it cannot be copied."""
    held, base = prepared.config.common.loading, prepared.base
    if not _stays(held):
        return _copy_of(base, prepared.device)
    return load_base(base.source, base.identity.dtype, prepared.device, held.load_in, held.device_map)


def _copy_of(base: Base, device: torch.device) -> Base:
    """The untouched base again, on the device: a run may rewrite it."""
    return Base(base.source, copy.deepcopy(base.model).to(device), base.identity)


def _description(
    config: SweepConfig,
    base: Base,
    cache: LogitCache,
    anchors: Sequence[LogitCache],
    samples: Sequence[Sample],
    texts: dict[str, list[Sample]],
) -> dict[str, Any]:
    """What decides every run's result besides its own settings."""
    return {
        "format": VERSION,
        "model": without_secrets(config.model),
        "identity": asdict(base.identity),
        "cache": without_secrets(config.cache),
        "contents": cache.contents_checksum,
        "anchors": [{"contents": c.contents_checksum, "data_sets": digests_of(c)} for c in anchors],
        "data": data_fingerprint(samples),
        "data_sets": digests_of(cache) if config.data is None else None,
        **{name: " + ".join(map(without_secrets, getattr(config, name))) for name in texts},
        "texts": {name: data_fingerprint(text) for name, text in texts.items()},
        "pairing": config.common.pairing.plain(),
        "probe_top_k": config.probe.top_k(base.identity.vocab_size),
        "num_train_tokens": sum(len(s.token_ids) for s in samples),
        "num_train_positions": sum(len(s.positions) for s in samples),
    }


def _runs_of(config: SweepConfig, out: Path, stored: dict[str, Any]) -> dict[str, Any]:
    """The methods and runs that are asked for, and those that an earlier configuration asked for and that are done."""
    runs = {run.name: asdict(run) for run in config.runs}
    earlier = [r for r in stored.get("runs", []) if state_of(out / RUNS / r["name"]) in ("finished", "failed")]
    runs |= {r["name"]: r for r in earlier if r["name"] not in runs}
    return {"methods": list(dict.fromkeys(r["method"] for r in runs.values())), "runs": list(runs.values())}


def _check_same(stored: dict[str, Any], described: dict[str, Any], out: Path) -> None:
    """Raise `IdentityMismatch` where the sweep that is there was of something else; paths may differ."""
    parts = ("format", "identity", "contents", "anchors", "data", "texts", "pairing", "probe_top_k")
    mine = json.loads(json.dumps({part: described[part] for part in parts}))
    differs = described_differences(mine, stored, "identity") if stored else []
    if differs:
        raise IdentityMismatch(
            f"going on with {out}: the sweep there differs in {', '.join(differs)} (see its {SWEEP}). Its results and "
            "new ones could not be compared. Choose another --out, or use the model, cache and text it was begun with."
        )


def _check_folder(out: Path) -> None:
    """Raise `TrainingFailed` where `out` holds something else than a sweep, begun or done."""
    ours = {SWEEP, f"{SWEEP}.lock", PROBE, RUNS}
    names = [path.name for path in out.iterdir()] if out.exists() else []
    stray = sorted(name for name in names if name not in ours and not is_unfinished(name, SWEEP))
    if stray and not (out / SWEEP).is_file():
        raise TrainingFailed(
            f"writing to {out}: expected an empty folder or a sweep, found {stray[0]}. Choose another --out."
        )


def _stored(out: Path) -> dict[str, Any]:
    """sweep.json of a sweep that was begun; empty where there is none. Raises `UnreadableSweep`."""
    path = out / SWEEP
    if not path.is_file():
        return {}
    found = CheckedJson.of(path, "It is not what `logitcache sweep` wrote. Restore the file, or choose another --out.")
    for run in found.parts("runs"):
        name = run.text("name")
        if Path(name).name != name or run.text("method") != one_line(run.text("method"), MAX_METHOD):
            raise run.wrong("name", "the name of a folder, and of a method")
    return found.values


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Whether this process alone holds the lock file within; the system lets go of it however the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, blocking=wait, fallback_to_soft=False)  # a soft one would outlive a killed process
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def measure_cost(prepared: Prepared) -> None:
    """What a live base would have cost, into sweep.json: its forward over the batches of one of the runs.

    The least that a live base adds to a step: body, head and log-softmax at the supervised positions, slice by slice;
    not the copy of its logits that most trainers keep. The run is the first finished one that read the cache.
    """
    path = prepared.out / SWEEP
    config = prepared.config
    finished = [r for r in config.runs if state_of(prepared.out / RUNS / r.name) == "finished"]
    regularized = [r for r in finished if config.run_of(r).objective.reads_base]
    if not regularized or config.common.pairing.teacher_is_not_base:  # the teacher that was not run is not here
        return
    spec, settings = regularized[0], config.run_of(regularized[0]).training
    results = [CheckedJson.of(prepared.out / RUNS / r.name / RESULT).values for r in finished]
    (result,) = (r for r in results if r["name"] == spec.name)
    base = _copy_of(prepared.base, prepared.device).model
    size, tokens, seconds = settings.batch_size, 0, []
    for start in range(0, min(len(prepared.samples), size * COST_BATCHES), size):
        batch = prepared.samples[start : start + size]
        tokens += sum(len(s.token_ids) for s in batch)
        seconds.append(_seconds_of(base, batch))
    counted = seconds[1:] or seconds  # the first warms up
    a_batch = sum(counted) / len(counted)
    all_tokens = sum(len(s.token_ids) for s in prepared.samples)
    cost = {
        "run": spec.name,
        "step_seconds": result["seconds"] / max(result["num_steps"], 1),
        "live_extra_seconds_a_step": a_batch * settings.grad_accum,
        "capture_seconds": a_batch * len(seconds) * all_tokens / tokens,
        "steps": sum(r["num_steps"] for r in results),
    }
    with _locked(prepared.out / f"{SWEEP}.lock"):
        write_checked(path, {**_stored(prepared.out), "cost": cost})


@torch.inference_mode()
def _seconds_of(base: PreTrainedModel, batch: Sequence[Sample]) -> float:
    _wait_for(base.device)
    started = perf_counter()
    padded = pad_batch(batch, base.device)
    hidden = hidden_states(base, input_ids=padded.input_ids, attention_mask=padded.attention_mask).flatten(0, 1)
    head, num_rows = OutputHead(base), rows_at_once(base, LOGITS_BYTES)
    for rows in hidden.index_select(0, padded.rows).split(num_rows):
        head(rows).float().log_softmax(dim=1)
    _wait_for(base.device)
    return perf_counter() - started


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
