"""A cache that fills itself: what it lacks of the samples that are about to be learnt, captured before step 1.

Owns when that may be done, which process captures what, and that it leaves no trace in the run but the cache: no
random number is drawn, and the model is as it was. That the model in memory is the base is `pairing.base_below`'s to
vouch for; the work is `capture.worker`'s, so the bytes are those of `precompute`. No other file of this package imports
`capture`. Must not know trainers.
"""

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase

from logitcache.capture.cache_spec import cache_spec, settings_of
from logitcache.capture.loaded import Loaded
from logitcache.capture.settings import CaptureSettings as CaptureSettings
from logitcache.capture.settings import JobSpec
from logitcache.capture.teacher import teacher_of
from logitcache.capture.vocab_groups import groups_for
from logitcache.capture.windows import SampleRows
from logitcache.capture.worker import JobReport as JobReport
from logitcache.capture.worker import Share, work
from logitcache.data.samples import Sample, distinct
from logitcache.errors import InvalidSettings, TrainingFailed
from logitcache.losses.formulas import Objective
from logitcache.models.head import check_head
from logitcache.models.loading import load_tokenizer
from logitcache.pairing.base_below import base_below
from logitcache.pairing.identity_checks import PairingRules, check_kept, check_samples
from logitcache.pairing.targets import Batch, on_cpu, samples_in
from logitcache.storage import (
    IdentityMismatch,
    IncompleteCache,
    LogitCache,
    NotACache,
    PositionNotCaptured,
    SampleNotCached,
    sample_id,
)
from logitcache.storage.captured_index import fingerprint64
from logitcache.storage.files import open_files
from logitcache.storage.heads import read_manifest
from logitcache.storage.identity import differing, digest_json
from logitcache.storage.manifest import Manifest

FILLED = "filled before training"
"""The data set of the cache that has the samples of the last run for which it was filled."""

_AT_ONCE = 64
"""Rows that are looked up together, and by which processes know whether they have the same data."""

_NOWHERE: NDArray[np.int32] = np.empty(0, dtype=np.int32)

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Filling:
    """A cache that is to have all that is learnt, as an objective reads it."""

    path: str
    #: What it keeps where it is not there yet; None: the defaults.
    capture: CaptureSettings | None
    objective: Objective
    #: Alternatives read a position.
    top_k: int | None
    #: What a cache that is not there yet keeps, where nobody says.
    default: CaptureSettings

    @classmethod
    def asked(
        cls,
        cache: Any,
        fill: bool,
        capture: CaptureSettings | None,
        objective: Objective,
        top_k: int | None,
        rules: PairingRules | None,
        default: CaptureSettings | None = None,
    ) -> "Filling | None":
        """What a plug-in was asked for; None where that is nothing. Raises `InvalidSettings` for what nobody reads."""
        if not fill:
            if capture is not None:
                raise InvalidSettings(
                    "capture: says what is kept of samples that are captured. Give it with fill=True."
                )
            return None
        if not objective.reads_base:
            raise InvalidSettings(
                "fill=True with regularizer none: the loss reads nothing of the base, and the cache would stay as it "
                "is. Leave fill out, or give a regularizer."
            )
        if not isinstance(cache, (str, Path)):
            raise InvalidSettings(
                f"fill=True: expected the path of a cache, found {type(cache).__name__}: what is open does not change. "
                "Give its path."
            )
        if rules is not None and not rules.teacher_is_base:
            raise InvalidSettings(
                "fill=True with PairingRules(teacher_is_not_base=True): the model that is trained is not what the "
                "cache is of, and cannot fill it. Run `logitcache precompute` with the teacher."
            )
        return cls(str(cache), capture, objective, top_k, default or CaptureSettings())

    def fill(
        self,
        model: nn.Module,
        samples: SampleRows,
        tokenizer: PreTrainedTokenizerBase | None = None,
        divided_by: str = "",
        data_name: str = FILLED,
    ) -> JobReport | None:
        """Capture what the cache lacks of these samples; None where this process captured nothing.

        All processes must call it, with all the samples or each with its own, and leave it together. tokenizer: that
        made them; None is the one beside the model. divided_by: what will divide or place the model later, so that it
        cannot run now. data_name: of the data set that the cache then has. Raises what `base_below` and `precompute`
        raise, on every process where one of them does, and `TrainingFailed` under what divides the model.
        """
        with _randomness_kept():
            every = self.objective.kl_positions == "all"
            told = _of_all(lambda: (self._lacks(samples), _fingerprint(samples, every)))
            if not any(lacks for lacks, _ in told):
                return None
            self._check_whole(divided_by)
            rank = dist.get_rank() if len(told) > 1 else 0
            is_shared = len({fingerprint for _, fingerprint in told}) == 1
            share = Share(rank, len(told)) if is_shared else Share()
            name = data_name if is_shared else f"{data_name}, part {rank + 1} of {len(told)}"
            mine = samples if is_shared else _without_earlier(samples, rank, every)
            reports = list[JobReport]()

            def capture_mine() -> None:
                if is_shared or (told[rank][0] and _first_samples(mine)):
                    reports.append(self._captured(model, mine, tokenizer, share, name))

            if rank == 0:
                logger.warning("Filling %s: the base runs now over what it lacks of the data.", self.path)
            _of_all(capture_mine)
        return reports[0] if reports else None

    def _lacks(self, samples: SampleRows) -> bool:
        """Whether the cache has to be filled before all of these samples are learnt."""
        try:
            cache = LogitCache.open(self.path)
        except (NotACache, IncompleteCache):
            return bool(_first_samples(samples))
        _check_asked(self.capture, cache.manifest, self.path)
        every = self.objective.kl_positions == "all"
        for part in _at_once(samples):
            try:
                check_samples(cache, part, every)
            except (SampleNotCached, PositionNotCaptured):
                return True
        return False

    def _check_whole(self, divided_by: str) -> None:
        if divided_by:
            raise TrainingFailed(
                f"filling {self.path} under {divided_by}: expected a model that each process holds whole, found one "
                "that is divided or placed later. Nothing was captured. Fill it in one process without that first "
                "(making the trainer does it), or run `logitcache precompute`."
            )

    def _captured(
        self,
        model: nn.Module,
        samples: SampleRows,
        tokenizer: PreTrainedTokenizerBase | None,
        share: Share,
        name: str,
    ) -> JobReport:
        """This process's share of the job, done."""
        settings = self._settings()
        with base_below(model, [sample.token_ids for sample in _first_samples(samples)]) as base:
            check_head(base.model)
            groups = groups_for(base, settings, self.path)
            tokenizer = load_tokenizer(base.source) if tokenizer is None else tokenizer
            kept = cache_spec(base.source.name, base.identity, tokenizer, settings, groups)
            check_kept(kept.manifest, self.path, self.objective, self.top_k)
            spec = JobSpec(base.source.name, (name,), self.path, settings, data_name=name)
            return work(spec, Loaded(tokenizer, kept, teacher_of(base, kept), base, samples), share)

    def _settings(self) -> CaptureSettings:
        """Those of the cache, if it was begun, else those asked for; at every position where the objective asks it."""
        try:
            manifest = read_manifest(open_files(self.path))
        except NotACache:
            found = self.default if self.capture is None else self.capture
        else:
            _check_asked(self.capture, manifest, self.path)
            found = settings_of(manifest) if self.capture is None else self.capture
        return replace(found, kl_positions="all") if self.objective.kl_positions == "all" else found


def samples_of(batches: Iterable[Batch]) -> list[Sample]:
    """The different samples of all batches of a loader, whose order next time is as if this had not been asked.

    Raises `TrainingFailed` for an iterator, of which nothing would be left to be learnt.
    """
    if isinstance(batches, Iterator):
        raise TrainingFailed(
            f"filling a cache: expected batches that can be gone through again, found {type(batches).__name__}, of "
            "which nothing would be left for training. Give the DataLoader, or a list of batches."
        )
    found = list[Sample]()
    with _randomness_kept(*(getattr(at, "generator", None) for at in (batches, getattr(batches, "sampler", None)))):
        for number, batch in enumerate(batches):
            found += samples_in(on_cpu(batch), f"batch {number}")
    return list(distinct(found))


def _first_samples(samples: SampleRows) -> list[Sample]:
    """Those of the first rows that have some."""
    return next((part for part in _at_once(samples) if part), [])


def _at_once(samples: SampleRows) -> Iterator[list[Sample]]:
    """The samples of a few rows at a time."""
    return (list(samples[start : start + _AT_ONCE]) for start in range(0, len(samples), _AT_ONCE))


@dataclass(frozen=True)
class _Without:
    """Rows less what other processes capture of them."""

    rows: SampleRows
    every: bool
    #: Samples at these positions, whole.
    left_out: frozenset[tuple[int, int]]
    #: Positions of samples that have others too.
    cut: dict[int, NDArray[np.int32]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice, /) -> list[Sample]:
        left = (self._left(sample) for sample in self.rows[rows])
        return [sample for sample in left if len(sample.positions)]

    def _left(self, sample: Sample) -> Sample:
        known = _known_by(sample, self.every)
        supervised = sample.supervised.copy()
        supervised[self.cut.get(known[0], _NOWHERE) + 1] = False
        if known in self.left_out:
            supervised[:] = False
        return replace(sample, supervised=supervised)


def _without_earlier(samples: SampleRows, rank: int, every: bool) -> SampleRows:
    """The samples, at the positions at which no process before this one has them: what a sampler gives to two processes
    is captured by the first, whichever of them is faster. every: at all their positions, whichever these are. All
    processes must call it."""
    known = _of_all(lambda: {_known_by(sample, every) for rows in _at_once(samples) for sample in rows})
    times = Counter(tokens for tokens, _ in set[tuple[int, int]]().union(*known))
    otherwise = {tokens for tokens, number in times.items() if number > 1}
    positions = _of_all(lambda: _positions_of(samples, otherwise) if otherwise else {})
    cut: dict[int, NDArray[np.int32]] = {}
    for earlier in positions[:rank]:
        cut |= {tokens: np.union1d(cut.get(tokens, places), places) for tokens, places in earlier.items()}
    return _Without(samples, every, frozenset().union(*known[:rank]), cut)


def _positions_of(samples: SampleRows, wanted: set[int]) -> dict[int, NDArray[np.int32]]:
    """At which positions there are samples of these tokens."""
    found: dict[int, NDArray[np.int32]] = {}
    for sample in (sample for rows in _at_once(samples) for sample in rows):
        tokens, _ = _known_by(sample, every=False)
        if tokens in wanted:
            found[tokens] = np.union1d(found.get(tokens, sample.positions), sample.positions)
    return found


def _known_by(sample: Sample, every: bool) -> tuple[int, int]:
    """Its tokens, and its positions where not every one of them is captured."""
    key = sample_id(sample.token_ids)
    tokens = fingerprint64(key, _NOWHERE)
    return tokens, tokens if every else fingerprint64(key, sample.positions)


def _check_asked(capture: CaptureSettings | None, manifest: Manifest, path: str) -> None:
    """Raise `IdentityMismatch` where a cache that is there keeps something else than it is asked to."""
    if capture is None:
        return
    there, asked = asdict(settings_of(manifest)), asdict(capture)
    for name in ("batch_tokens", "shard_positions", "kl_positions"):  # no manifest says them
        del there[name], asked[name]
    if said := differing(asked, there, "asked for", "there"):
        raise IdentityMismatch(
            f"filling {path}: it keeps something else than capture= asks for ({'; '.join(said)}). Nothing was changed. "
            "Choose another folder, or leave capture out."
        )


def _fingerprint(samples: SampleRows, every: bool) -> str:
    """By which processes that have the same samples know it: how many rows, and what the first and last ones are."""
    ends = [*samples[:_AT_ONCE], *samples[max(0, len(samples) - _AT_ONCE) :]]
    return digest_json([len(samples), *(_known_by(sample, every) for sample in ends)])


def _of_all(function: Callable[[], T]) -> list[T]:
    """What the function returns on each process, by rank. Where it raises on one, all raise, each its own error."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [function()]
    value, error = None, None
    try:
        value = function()
    except Exception as found:  # whatever it is: others must not wait for this process
        error = found
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, (value, None if error is None else f"{type(error).__name__}: {error}"))
    if error is not None:
        raise error
    for rank, (_, said) in enumerate(told):
        if said is not None:
            raise TrainingFailed(f"filling a cache: process {rank} could not do its part: {said}")
    return [value for value, _ in told]


@contextmanager
def _randomness_kept(*generators: torch.Generator | None) -> Iterator[None]:
    """Whatever is drawn within, what is drawn after it is as if nothing had been."""
    own = [(generator, generator.get_state()) for generator in generators if generator is not None]
    of_python, of_numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        for generator, state in own:
            generator.set_state(state)
