"""The fault suite of storage/: what is tallied, the caches it damages, and how it reads them.

A case is a cache to which something was done. It is *refused* (`CacheError`), or *without effect* (everything read is
what was written), or *wrong*: a number, token or position differs, or a writer that reported success lost what it had
committed. Anything else that should not be (an exception of another kind, a crash, an unclear message, verify calling
intact what cannot be read) is a *defect*. The faults are in storage_faults_damage (files altered and exchanged),
storage_faults_strangers (files of another cache), storage_faults_writers (writers that die and fail),
storage_faults_crowds (several at once), storage_faults_locks (that see no lock of one another) and
storage_faults_hostile (well sealed caches that lie); the drivers are tests/storage/test_faults.py, test_locks_off.py
and scripts/fault_suite.py.
"""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from logitcache.storage import (
    BaseLogprobs,
    CachedSample,
    CacheError,
    CacheWriter,
    CaptureIdentity,
    LogitCache,
    Manifest,
    ModelIdentity,
    verify,
)
from logitcache.storage.identity import digest

STORES = ("zarr", "arrow")
VOCAB, TOP_K, NUM_GROUPS = 40, 5, 3
NO_TOKEN = 2**32 - 1
GROUPS = (np.arange(VOCAB) * 7 % NUM_GROUPS).astype(np.uint8)
LENGTHS = ((9, 14), (300,), (5, 5, 8))
"""Tokens of the samples of each shard; 300 tokens are more rows than a block."""

MAX_ERROR = {"exact": 0.0, "fine": 1 / 64, "compact": 1 / 32}
KINDS = (("exact", False), ("fine", True), ("compact", False))
"""Precision, and whether the tail is split."""

ACTION = re.compile(r"\b([Rr]un|[Pp]recompute|Choose|[Ii]nstall|Make|Merge|Use|Copy|Write|Give)\b")
Bits = tuple[object, ...]


@dataclass(frozen=True)
class Counts:
    """How many cases a driver wants of each fault; `stride`: one in so many of the steps of a writer."""

    flips: int
    kills: int
    rounds: int
    mutations: int
    stride: int
    jobs: int


# --- outcomes ---------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """The cases of one fault on one store. `wrong` and `defects`: what was done -> what was seen."""

    fault: str
    store: str
    refused: int = 0
    without_effect: int = 0
    wrong: dict[str, str] = field(default_factory=dict)
    defects: dict[str, str] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)
    messages: dict[str, str] = field(default_factory=dict)

    @property
    def cases(self) -> int:
        return self.refused + self.without_effect + len(self.wrong) + len(self.defects)

    def add(self, label: str, seen: Seen) -> None:
        label = label if label not in self.wrong.keys() | self.defects.keys() else f"{label} ({self.cases})"
        if seen.kind == "wrong":
            self.wrong[label] = seen.what
        elif seen.kind == "defect":
            self.defects[label] = seen.what
        elif seen.kind == "refused":
            self.refused += 1
            self.messages |= seen.messages
        else:
            self.without_effect += 1

    def merge(self, other: Tally) -> None:
        """Add the cases of another tally of the same fault."""
        self.refused, self.without_effect = self.refused + other.refused, self.without_effect + other.without_effect
        self.wrong |= {k if k not in self.wrong else f"{k} (again)": v for k, v in other.wrong.items()}
        self.defects |= {k if k not in self.defects else f"{k} (again)": v for k, v in other.defects.items()}
        self.notes += other.notes
        self.messages |= other.messages

    @property
    def bad_messages(self) -> dict[str, str]:
        """Refusals that do not say what to look at or what to do."""
        return {text: problem for text, problem in self.messages.items() if problem}

    @property
    def remark(self) -> str:
        parts = [f"{count} {name}" for name, count in sorted(self.notes.items()) if count]
        for kind, found in (("wrong", self.wrong), ("defects", self.defects)):
            parts += [f"{len(found)} {kind} such as {'; '.join(list(grouped(found))[:3])}"] if found else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Seen:
    """What became of a case: refused, same, wrong or defect; and the messages of refusals, with what they lack."""

    kind: str
    what: str = ""
    messages: dict[str, str] = field(default_factory=dict)


REFUSED, SAME = Seen("refused"), Seen("same")


def attempt(call: Callable[[], object], path: Path) -> tuple[Seen, object]:
    """Run something that reads a cache. `same` where it returns, which says nothing of what it returned."""
    try:
        return SAME, call()
    except CacheError as error:
        return Seen("refused", f"{error.reason}: {error}", lacks(str(error), path)), None
    except OSError as error:
        return Seen("refused", f"OSError: {error!r}"), None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever it is, PanicException of a Rust library too
        return Seen("defect", f"{type(error).__name__}: {error}"[:300]), None


def grouped(found: dict[str, str]) -> list[str]:
    """Cases by what was seen, without numbers and paths: how often, and the first of them."""
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for label, what in found.items():
        key = re.sub(r"/[\w./-]+|[0-9a-f]{32}|\d+", "#", what)[:80]
        counts[key] += 1
        first.setdefault(key, f"{label}: {what}")
    return [f"{counts[key]} x {example}" for key, example in first.items()]


def lacks(message: str, path: Path) -> dict[str, str]:
    """{the message without numbers and paths: what it lacks, "" where nothing}."""
    lacking = [] if str(path) in message or re.search("[0-9a-f]{32}", message) else ["the file or shard"]
    lacking += [] if ACTION.search(message) else ["an action"]
    plain = re.sub(r"[0-9a-f]{32}|-?\d[\d.e+-]*", "#", message.replace(str(path), "CACHE"))
    return {re.sub(r"(#[,/ ]*)+", "# ", plain)[:240]: " and ".join(lacking)}


# --- caches -----------------------------------------------------------------------------------------------------------


def manifest_for(store: str, precision: str = "exact", groups: bool = False, weights: str = "a" * 32) -> Manifest:
    capture = CaptureIdentity(
        top_k=TOP_K,
        max_length=4096,
        precision=precision,
        max_error=MAX_ERROR[precision],
        num_tail_groups=NUM_GROUPS if groups else 0,
        tail_partition=digest(GROUPS.tobytes()) if groups else "",
        group_steps_per_nat=1 if groups else 0,
    )
    return Manifest(
        store=store,
        model=ModelIdentity(weights, '{"model_type":"test"}', VOCAB, "bfloat16", "sdpa"),
        tokenizer=None,
        capture=capture,
        model_name="tests/faults",
        created_with={"logitcache": "0"},
        reader_features=("tail-groups",) if groups else (),
    )


def samples_of(
    seed: int, version: int = 0, groups: bool = False, lengths: Sequence[Sequence[int]] = LENGTHS
) -> list[list[CachedSample]]:
    """Shards of random samples. Versions have the same tokens and positions, and slightly other numbers."""
    rng, noise = np.random.default_rng(seed), np.random.default_rng([seed, version])
    return [[_sample(rng, noise, n, 1e-3 * (version > 0), groups) for n in shard] for shard in lengths]


def _sample(
    rng: np.random.Generator, noise: np.random.Generator, num_tokens: int, spread: float, groups: bool
) -> CachedSample:
    token_ids = rng.integers(0, VOCAB, size=num_tokens, dtype=np.uint32)
    positions = np.flatnonzero(rng.random(num_tokens - 1) < 0.9).astype(np.int32)
    positions = positions if len(positions) else np.zeros(1, np.int32)
    logits = rng.normal(size=(len(positions), VOCAB)) * 2
    num_kept = np.where(rng.random(len(positions)) < 0.2, rng.integers(0, TOP_K, len(positions)), TOP_K)
    cut = int(rng.integers(0, 3))
    logits += spread * noise.normal(size=logits.shape)
    return CachedSample(token_ids, _record(logits, token_ids, positions, num_kept, groups), cut)


def _record(
    logits: NDArray[np.float64],
    token_ids: NDArray[np.uint32],
    positions: NDArray[np.int32],
    num_kept: NDArray[np.int64],
    groups: bool,
) -> BaseLogprobs:
    """The record of the float64 softmax of logits [P, V]; row i keeps num_kept[i] alternatives."""
    rows, labels = np.arange(len(positions)), token_ids[positions + 1]
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    others = logprobs.copy()
    others[rows, labels] = -np.inf
    order = np.argsort(-others, axis=1, kind="stable")[:, :TOP_K]
    kept = np.arange(TOP_K) < num_kept[:, None]
    rest = np.exp(others)
    np.put_along_axis(rest, order, np.where(kept, 0, np.take_along_axis(rest, order, axis=1)), axis=1)
    parts = np.stack([rest[:, group == GROUPS].sum(axis=1) for group in range(NUM_GROUPS)], axis=1)
    return BaseLogprobs(
        positions=positions,
        label_ids=labels,
        label_logprobs=logprobs[rows, labels].astype(np.float32),
        alternative_ids=np.where(kept, order, NO_TOKEN).astype(np.uint32),
        alternative_logprobs=np.where(kept, np.take_along_axis(others, order, axis=1), -np.inf).astype(np.float32),
        tail_logprobs=np.log(rest.sum(axis=1)).astype(np.float32),
        tail_group_logprobs=np.log(parts).astype(np.float32) if groups else None,
    )


def write(path: Path, manifest: Manifest, shards: Sequence[Sequence[CachedSample]]) -> Path:
    """A finished cache of these shards, or one that gains them."""
    with CacheWriter(path, manifest, GROUPS if manifest.capture.num_tail_groups else None) as writer:
        for shard in shards:
            writer.commit(shard)
        writer.finalize()
    return path


def make_cache(path: Path, store: str, precision: str = "exact", groups: bool = False, seed: int = 1) -> Path:
    return write(path, manifest_for(store, precision, groups), samples_of(seed, groups=groups))


# --- reading ----------------------------------------------------------------------------------------------------------


def sample_bits(sample: CachedSample) -> Bits:
    """Equal exactly where two samples are the same, bit for bit."""
    arrays = [getattr(sample.logprobs, f.name) for f in fields(sample.logprobs)]
    bits = [None if a is None else (a.dtype.str, a.shape, a.tobytes()) for a in arrays]
    return (sample.token_ids.dtype.str, sample.token_ids.tobytes(), sample.num_tokens_cut, *bits)


def read_all(path: Path) -> Bits:
    """Everything that reading a cache gives, in three ways that must agree: samples, stored samples, lookups."""
    cache = LogitCache.open(path)
    groups = cache.token_groups()
    samples = list(cache.samples())
    stored = [(s.token_ids.tobytes(), s.positions.tobytes()) for s in cache.stored_samples()]
    if stored != [(s.token_ids.tobytes(), s.logprobs.positions.tobytes()) for s in samples]:
        raise AssertionError("stored_samples gives other samples than samples")
    found = cache.lookup_batch([s.token_ids for s in samples])
    for sample, record in zip(samples, found, strict=True):
        if sample_bits(replace(sample, logprobs=record)) != sample_bits(sample):
            raise AssertionError("lookup gives another record than samples")
    return (None if groups is None else groups.tobytes(), *(sample_bits(s) for s in samples))


def read_each(path: Path) -> list[Bits]:
    """The samples that can be read one by one, where not all of them can."""
    cache = attempt(lambda: LogitCache.open(path), path)[1]
    if not isinstance(cache, LogitCache):
        return []
    each = [attempt(lambda i=i: cache.sample(i), path)[1] for i in range(min(len(cache), 100))]  # type: ignore[misc]
    return [sample_bits(sample) for sample in each if isinstance(sample, CachedSample)]


def judge(path: Path, *accepted: Bits) -> Seen:
    """Read a cache that something was done to, whole, then what remains of it, and ask verify."""
    seen, found = attempt(lambda: read_all(path), path)
    if seen.kind == "defect":
        return seen
    if seen is SAME and found not in accepted:
        return Seen("wrong", "other numbers were read")
    right = {bits for state in accepted for bits in state}
    if seen.kind == "refused" and any(bits not in right for bits in read_each(path)):
        return Seen("wrong", "other numbers were read of one sample")
    said, problems = attempt(lambda: verify(path).problems, path)
    if said.kind == "defect":
        return Seen("defect", f"verify: {said.what}")
    if said is SAME and not problems and seen.kind == "refused":
        return Seen("defect", f"verify calls it intact, reading says {seen.what}"[:300])
    reported = [p.what for p in problems] if isinstance(problems, tuple) else []  # what to do is said once, for all
    messages = {key: lack for what in reported for key, lack in lacks(f"{what} Run", path).items()}
    return Seen(
        seen.kind, "intact" if said is SAME and not problems else "bad", seen.messages | said.messages | messages
    )


def tree(path: Path) -> dict[str, bytes]:
    """Every file of a cache but the lock, which holds nothing."""
    files = (p for p in path.rglob("*") if p.is_file() and p.name != "writer.lock")
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in files}


def fork(call: Callable[[], None]) -> int:
    """Start a child that makes a call and exits: with 0, or 1 where it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, from Python 3.12
        child = os.fork()
    if child:
        return child
    status = 1
    try:
        call()
        status = 0
    finally:
        os._exit(status)


def status_of(child: int) -> int:
    """How a child ended: its exit status, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
