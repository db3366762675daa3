"""Many runs from one cache: each trained, evaluated and kept in a folder of its own, and none done twice.

A run is claimed by a lock on its folder while it is trained, so that any number of processes may work on one sweep, and
the claim of a killed one is gone with it. The base is loaded once a process and stays untouched: every run gets a copy.
Must not print; what a run is comes from `config`, what is checked before the first from `prepare`, and tables and
pictures are the report's.
"""

import gc
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from logitcache.errors import FolderInUse, PipelineError, UnreadableSweep, is_file_failure
from logitcache.evaluation.compare import compare_cached, load_adapter
from logitcache.evaluation.metrics import Comparison
from logitcache.events import OnMessage, StopRequest
from logitcache.json_files import CheckedJson, read_lines, write_checked
from logitcache.models.loading import pick_device
from logitcache.storage import CacheError
from logitcache.storage.plain_text import one_line, safe
from logitcache.training.description import check_unchanged, tried_formulas
from logitcache.training.run import run
from logitcache.training.run_folder import LOG, clear

from .config import RunSpec, SweepConfig, read_config
from .cost import StepClock, cost_of
from .folder import FAILED, RESULT, RUNS, locked, state_of
from .prepare import Prepared, prepare
from .scaled import measure_scales

MAX_ERROR = 2000
"""Characters of the error of a run that are kept."""


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
    return list(run_all(prepared, retry_failed))


def run_all(prepared: Prepared, retry_failed: bool = False, stop: StopRequest | None = None) -> Iterator[Done]:
    """Every run that nobody has done or is doing, in the order of the configuration. stop: as of `training.run.run`."""
    for spec in prepared.config.runs:
        done = run_one(prepared, spec, retry_failed, stop)
        if done is not None:
            yield done


def run_one(
    prepared: Prepared, spec: RunSpec, retry_failed: bool = False, stop: StopRequest | None = None
) -> Done | None:
    """Train and evaluate a run; None where it is done already, or another process is at it.

    stop: asks it to stop; a run that is being trained has a checkpoint then. Raises `Terminated`.

    What is wrong with this run alone (a loss that is not finite, a rank that a layer does not allow, no memory) is
    recorded in failed.json. What would stop every run (a full disk) is raised.
    """
    folder = prepared.out / RUNS / spec.name
    with locked(prepared.out / RUNS / f"{spec.name}.lock", wait=False) as mine:
        if not mine or (state_of(folder) == "failed" and not retry_failed):
            return None
        try:
            if state_of(folder) == "finished":
                measure_scales(prepared, spec, folder)  # of a configuration that asks for more of them
                return None
            done = _train_and_evaluate(prepared, spec, folder, stop)
            return replace(done, told=(*done.told, *measure_scales(prepared, spec, folder)))
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


def _train_and_evaluate(prepared: Prepared, spec: RunSpec, folder: Path, stop: StopRequest | None) -> Done:
    if state_of(folder) == "failed":
        clear(folder)
    settings = prepared.settings_of(spec)
    told: list[str] = []
    check_unchanged(prepared.formulas, tried_formulas([settings.objective]), prepared.out)
    clock = StepClock()
    report = run(prepared.job(spec, prepared.fresh()), True, [clock], on_message=told.append, stop=stop)
    base = prepared.fresh()
    cost = cost_of(prepared.job(spec, base), clock, base.model)
    adapted = load_adapter(base.model, str(folder), settings.loading.device_map)
    found = {name: compare_cached(adapted, cache, prepared.texts[name]) for name, cache in prepared.probes.items()}
    result = {
        "name": spec.name,
        "method": spec.method,
        "settings": spec.settings,
        "seconds": report.seconds,
        "num_steps": report.num_steps,
        "num_tokens": report.num_tokens,
        "peak_memory_bytes": report.peak_memory_bytes,
        "cost": cost.as_dict(),
        **{name: comparison.as_dict() for name, comparison in found.items()},
    }
    write_checked(folder / RESULT, result)
    return Done(spec, found, report.seconds, told=tuple(told))


def _record_failure(spec: RunSpec, folder: Path, error: Exception) -> Done:
    said = one_line(str(error), MAX_ERROR) or type(error).__name__
    if state_of(folder) == "finished":  # the next command measures it again
        return Done(spec, None, None, f"the curve between base and adapter, not the run: {said}")
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
