"""Shares of a precompute job handed out by Ray Data to actors, each of which loads the base once.

Owns that arrangement: how many shares and actors there are, what each may use, and how a refusal in an actor comes out
as it would without Ray. An item of the data set is the number of a share and its row is what came of it, refusals too,
so that Ray repeats only what died. Ray is imported when it is used. Must not know units, nor print.
"""

import logging
import math
import os
import pickle
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from logitcache.capture.loaded import Loaded, load
from logitcache.capture.plan import Counts
from logitcache.capture.shard_pipeline import failed_text
from logitcache.capture.worker import WORKERS_A_WINDOW, JobReport, JobSpec, Share, work
from logitcache.data.samples import check_samples_left
from logitcache.data.settings import DataSettings
from logitcache.data.skipped import listed_beside
from logitcache.errors import EngineFailed, InputNotFound, NonFiniteLogits, PipelineError, install_line
from logitcache.events import Event, OnEvent, RayStarted, ShardFailed, ShareDone
from logitcache.models.loading import first_line
from logitcache.storage import CacheError, CacheWriter, DataSet, NotACache
from logitcache.storage.data_sets import joined
from logitcache.storage.files import open_files
from logitcache.storage.heads import read_manifest, stored_token_groups
from logitcache.storage.job_status import Status, remove_records, status

SHARES_AN_ACTOR = 4
"""More: a late actor holds up the others less, and a killed one loses less. Fewer: the data are read less often."""

MAX_SHARES = 64
"""But for as many actors: each share reads all of the data once, though it parses its own windows only."""

DEATHS_A_SHARE = 8
"""How often a share is begun again after its actor or its machine died: a row that kills its process ends the job."""

T = TypeVar("T")


@dataclass(frozen=True)
class Actors:
    """How many there are, and what each takes of the cluster: cores (a part of one where there are few), GPUs, and
    threads of torch."""

    num: int
    num_cpus: float
    num_gpus: int
    num_threads: int

    @property
    def num_shares(self) -> int:
        """Into how many shares the job is cut."""
        return max(min(self.num * SHARES_AN_ACTOR, MAX_SHARES), self.num)


@dataclass(frozen=True)
class ShareResult:
    """What came of a share: its report or its refusal, and the events on the way."""

    share: int
    report: JobReport | None
    error: Exception | None
    events: tuple[Event, ...]


def run_on_ray(spec: JobSpec, num_workers: int | None, on_event: OnEvent) -> JobReport:
    """Do a whole job on Ray's actors, and finalise the cache: on the cluster of RAY_ADDRESS, or on one of this machine.

    num_workers: actors; None: one a GPU of the cluster, or one a core but one. A share whose actor dies is begun again
    by another one, and units that are committed are skipped. Raises what `work` raises, as it does; `InputNotFound`
    where Ray or its cluster is not there, `EngineFailed` where Ray gives up.
    """
    ray = import_ray()
    spec = absolute(spec)
    before = _status(spec.cache)
    with _cluster(ray):
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        actors = divide(nodes, spec.loading.device, num_workers, spec.running.num_gpus)
        on_event(RayStarted(actors.num, actors.num_shares, len(ray.nodes())))
        outcomes = _collect(ray, spec, actors, on_event)
    report = _sum([o.report for o in outcomes if o.report is not None], actors.num_shares)
    if any(o.error for o in outcomes):
        raise NonFiniteLogits(failed_text([e.why for o in outcomes for e in o.events if isinstance(e, ShardFailed)]))
    check_samples_left(report.planned.num_rows, report.planned.num_samples, spec.settings.max_length)
    reports = [o.report for o in outcomes if o.report and o.report.part is not None]
    parts = [r.part for r in reports if r.part is not None]
    finish(spec.cache, joined(spec.name, parts), reports[0].job)
    return _with_commits(report, before, _status(spec.cache))


def divide(nodes: Sequence[dict[str, float]], device: str, num_workers: int | None, gpus_each: int = 1) -> Actors:
    """Actors for a cluster of machines with these resources (`ray.nodes()`), so that a core stays free for Ray.

    gpus_each: that hold one copy of the model, all of one machine. Raises `InputNotFound` where no machine has so many,
    and a GPU is asked for.
    """
    cpus = sum(node.get("CPU", 0.0) for node in nodes)
    gpus = [int(node.get("GPU", 0.0)) for node in nodes]
    copies = sum(num // gpus_each for num in gpus)
    if device == "cuda" and not any(gpus):
        raise InputNotFound("choosing device 'cuda': Ray's cluster has no GPU. Use --device cpu, or add machines.")
    if device != "cpu" and gpus_each > 1 and not copies:
        raise InputNotFound(
            f"dividing a model over {gpus_each} GPUs (--tensor-parallel): the machines of Ray's cluster have "
            f"{max(gpus, default=0)} at most. Divide it over fewer, or add machines."
        )
    free = max(cpus - 1, cpus / 2)
    num_gpus = gpus_each if device != "cpu" and any(gpus) else 0
    num = num_workers or (copies if num_gpus else max(1, int(free)))
    num_cpus = min(1.0, max(0.01, math.floor(100 * free / num) / 100))
    return Actors(num, num_cpus, num_gpus, max(1, int(free // num)))


class ShareActor:
    """The base, loaded once, and any number of shares done with it one after the other."""

    def __init__(self, spec: JobSpec, num_shares: int, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self._spec, self._num_shares = spec, num_shares
        self._loaded: Loaded | Exception
        try:
            self._loaded = load(spec)
        except Exception as error:  # told with the first share: Ray would start this actor again and again
            self._loaded = carried(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Of a batch of one share: its outcome."""
        index = int(batch["item"][0])
        events: list[Event] = []
        report, refusal = None, None
        try:
            if isinstance(self._loaded, Exception):
                raise self._loaded
            share = Share(index, self._num_shares)
            report = work(self._spec, self._loaded, share, on_event=events.append)
        except Exception as error:  # Ray would wrap it, and its text would be a traceback
            refusal = carried(error)
        outcome = pickle.dumps(ShareResult(index, report, refusal, tuple(events)))
        return {"outcome": np.array([outcome], dtype=object)}


def _collect(ray: Any, spec: JobSpec, actors: Actors, on_event: OnEvent) -> list[ShareResult]:
    """Every share's outcome. Raises the first refusal but `NonFiniteLogits`, which holds up no other share."""
    done = outcomes_of(ray, spec, actors)
    outcomes: list[ShareResult] = []
    try:
        for row in done.iter_rows():
            outcome: ShareResult = pickle.loads(row["outcome"])
            for event in outcome.events:
                on_event(event)
            if outcome.error is not None and not isinstance(outcome.error, NonFiniteLogits):
                raise outcome.error
            outcomes.append(outcome)
            on_event(ShareDone(outcome.share, len(outcomes), actors.num_shares))
    except ray.exceptions.RayError as error:
        raise EngineFailed(
            f"running Ray: a share could not be done ({first_line(error)}). What was committed is kept. Ray's own logs "
            "say more; then run the same command again."
        ) from error
    return outcomes


def outcomes_of(ray: Any, spec: JobSpec, actors: Actors) -> Any:
    """The data set of outcomes, which is computed as it is read."""
    # items, not a range: what reads a range needs a core of its own, and waits for one that the actors hold
    shares = ray.data.from_items(list(range(actors.num_shares)), override_num_blocks=actors.num_shares)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the last two arguments will go, in Ray 2.64
        return shares.map_batches(
            ShareActor,
            fn_constructor_args=(spec, actors.num_shares, actors.num_threads),
            batch_size=1,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(
                min_size=1, max_size=actors.num, initial_size=actors.num, max_tasks_in_flight_per_actor=1
            ),
            num_cpus=actors.num_cpus,
            num_gpus=actors.num_gpus,
            max_restarts=-1,
            max_task_retries=DEATHS_A_SHARE,
        )


def carried(error: Exception) -> Exception:
    """An error as it can be sent from an actor: itself, with its traceback as a note where it is no plain refusal."""
    if not isinstance(error, (PipelineError, CacheError)):
        error.add_note(f"In one of Ray's actors:\n{traceback.format_exc()}")
    try:
        survives = str(pickle.loads(pickle.dumps(error))) == str(error)
    except Exception:  # of a library, with arguments of its own
        survives = False
    return error if survives else RuntimeError(f"{type(error).__name__}: {error}")


def _sum(reports: Sequence[JobReport], num_shares: int) -> JobReport:
    """The report of the whole. A window is read by each share that may have a unit of it: always the same number."""
    readers = min(num_shares, WORKERS_A_WINDOW)
    planned = sum((r.planned for r in reports), Counts())
    return JobReport(
        replace(
            planned,
            num_rows=planned.num_rows // readers,
            num_truncated=planned.num_truncated // readers,
            num_tokens_cut=planned.num_tokens_cut // readers,
            num_without_labels=planned.num_without_labels // readers,
            num_unlabelled=planned.num_unlabelled // readers,
            num_skipped=planned.num_skipped // readers,
        ),
        is_final=True,
        skipped_files=tuple(file for r in reports for file in r.skipped_files),
    )


def _with_commits(report: JobReport, before: Status | None, after: Status | None) -> JobReport:
    """What was added, from the commits: of an actor that died there is no report."""
    samples, positions, tokens = (
        getattr(after, name, 0) - getattr(before, name, 0) for name in ("num_samples", "num_positions", "num_tokens")
    )
    return replace(
        report,
        num_samples=samples,
        num_positions=positions,
        num_tokens=tokens,
        num_samples_found=report.planned.num_samples - samples,
    )


def _status(path: str) -> Status | None:
    try:
        return status(path)
    except NotACache:  # not yet, or the writer says what is wrong with it
        return None


def finish(path: str, data_set: DataSet, job: str) -> None:
    """Finalise where no share did: the record of one that finished was lost. job: whose records go."""
    manifest = read_manifest(open_files(path))
    with CacheWriter(path, manifest, stored_token_groups(path)) as writer:
        if not writer.holds(data_set):
            writer.finalize([data_set])
        remove_records(writer.files, job)


def absolute(spec: JobSpec) -> JobSpec:
    """With whole paths for what is on this machine: actors work in folders of their own. Raises `NotACache`."""
    files = open_files(spec.cache)
    return replace(
        spec,
        model=_whole(spec.model),
        data=tuple(_whole(name) for name in spec.data),
        how=_listed_here(spec),
        data_name=spec.name,
        cache=str(Path(files.root).absolute()) if files.is_local else spec.cache,
        samples_from=_whole(spec.samples_from),
        calibration=_whole(spec.calibration),
    )


def _listed_here(spec: JobSpec) -> DataSettings:
    """With whole paths too, and the list of skipped rows of a cache at a URL in the folder of the driver."""
    how = replace(spec.how, chat_template=_whole(spec.how.chat_template))
    if not how.skip_bad_rows or "://" not in spec.cache:
        return how
    return replace(how, skipped_file=str(Path.cwd() / listed_beside(how, spec.cache).skipped_file))


def _whole(path: T) -> T | str:
    """A path that exists, from the root; else what it is: a hub id, a URL, or a mistake to be told as written."""
    return str(Path(path).absolute()) if isinstance(path, str) and path and Path(path).exists() else path


def import_ray() -> Any:
    """Ray with its data sets, quiet. Raises `InputNotFound` where it is not installed."""
    if find_spec("ray") is None:
        raise InputNotFound(f"running on Ray: the package ray is not installed. Install it by `{install_line('ray')}`.")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own settings, which it calls deprecated
        import ray
        import ray.data
        import ray.exceptions

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what goes wrong is raised too
    return ray


@contextmanager
def _cluster(ray: Any) -> Iterator[None]:
    """Connected: to the cluster that this process is connected to, else that of RAY_ADDRESS, else one of its own."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    own = {} if address else {"address": "local", "include_dashboard": False}
    before = signal.getsignal(signal.SIGTERM)
    try:
        with _without_stderr():
            ray.init(log_to_driver=False, logging_level=logging.CRITICAL, **own)
    except (ray.exceptions.RayError, OSError, RuntimeError, ValueError) as error:
        where = f"the cluster at RAY_ADDRESS={address}" if address else "a cluster on this machine"
        raise EngineFailed(f"starting Ray on {where}: {first_line(error)}. Nothing was run.") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)  # Ray's own would end the program without a word
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Ray's native part says there how loud it is, whatever it is told."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
