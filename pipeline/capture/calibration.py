"""Does another engine say what transformers says? Two records of the same positions, compared; a bound; a file.

Owns the bounds, and the calibration file that `precompute` asks of an engine. Must not start engines. All differences
are in nats. Shapes: P positions, K alternatives.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from logitcache.data.samples import Sample, distinct
from logitcache.errors import NotCalibrated, UnreadableSweep
from logitcache.json_files import CheckedJson, write_checked
from logitcache.models.same_base import base_differences, base_of
from logitcache.storage import BaseLogprobs, LogitCache, ModelIdentity, sample_id
from logitcache.storage.identity import differing, digest
from logitcache.storage.model_check import MIN_OVERLAP as MIN_OVERLAP

from .differences import differences
from .teacher import Teacher

MIN_POSITIONS = 1000

LEAST_TAIL = 1e-4
"""Probability of a tail below which its logarithm is not compared: less of it moves no gradient, and float32 keeps few
digits of it."""

ADVICE = "Nothing was cached. Run `logitcache calibrate` again."


@dataclass(frozen=True)
class Bounds:
    """What two engines may differ by, in nats: the largest and the mean difference of a log-probability, of labels,
    alternatives and tails alike, and the mean KL."""

    max_nats: float
    mean_nats: float
    mean_kl_nats: float


BOUNDS = {
    "float32": Bounds(1e-3, 1e-4, 5e-6),
    "float16": Bounds(0.25, 0.02, 5e-4),
    "bfloat16": Bounds(1.0, 0.08, 5e-3),
}
"""By the coarser dtype of the two. What transformers differs by from itself on three models, in another attention or
against float32 (docs/log.md), at most: float32 2e-5, 2e-6 and 1e-12; float16 .07, .006 and 1.2e-5; bfloat16 .75,
.051 and 1.2e-3. Another model of random weights: 5, 1.2 and .06; a tenth of noise on every weight: 1.8, .28 and .04.
All KLs are at most what the check of step 0 lets pass where a cache was run otherwise
(`step_zero.KL_RUN_OTHERWISE_NATS`)."""


@dataclass(frozen=True)
class Differences:
    """What was found over `num_positions`: differences of log p(label); of the log-probabilities of the alternatives
    that both keep (by token id); of log p(tail), where it is `LEAST_TAIL` or more; the mean share of alternatives that
    both keep; and KL(reference || engine) over the outcomes that both tell apart: the label, those alternatives,
    everything else."""

    num_samples: int
    num_positions: int
    max_label_nats: float
    mean_label_nats: float
    max_alternative_nats: float
    mean_alternative_nats: float
    max_tail_nats: float
    mean_tail_nats: float
    mean_overlap: float
    max_kl_nats: float
    mean_kl_nats: float


@dataclass(frozen=True)
class Run:
    """How a model was run: the engine, its version, what the model is with it."""

    engine: str
    version: str
    model: ModelIdentity
    #: What the engine was told beside.
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Calibration:
    """An engine against the reference, on the same samples with the same top_k."""

    engine: Run
    reference: Run
    top_k: int
    found: Differences
    #: What a log-probability of the engine may be off by alone because a cache stores it in steps.
    rounding_nats: float = 0.0


@dataclass(frozen=True)
class HeldRecords:
    """Of a cache, in place of an engine: some of its samples and their records, in one order."""

    cache: LogitCache
    samples: list[Sample]
    records: list[BaseLogprobs]

    @property
    def run(self) -> Run:
        """How the cache was made, as far as it says so."""
        made_with = self.cache.manifest.created_with
        return Run("cache", made_with.get("vllm", made_with.get("transformers", "unknown")), self.cache.manifest.model)


def choose(samples: Sequence[Sample], num_positions: int, where: str) -> list[Sample]:
    """Distinct samples of at least so many supervised positions in all, drawn by their content. where: for the message.

    Raises `NotCalibrated` where there are not enough.
    """
    chosen, count = [], 0
    for sample in sorted(distinct(samples), key=lambda s: sample_id(s.token_ids)):
        if count >= num_positions:
            break
        chosen.append(sample)
        count += len(sample.positions)
    if count < num_positions:
        raise _too_few(where, num_positions, count)
    return chosen


def choose_cached(cache: LogitCache, num_positions: int, at_least: int | None = None) -> HeldRecords:
    """Samples of a cache with so many positions in all or a few more, drawn by the content of sample and cache.

    So whoever changes a cache cannot know beforehand which of its samples will be looked at. at_least: positions, by
    default as many as are asked for. Raises `NotCalibrated` where it holds fewer, and what reading a cache raises.
    """
    contents = bytes.fromhex(cache.contents_checksum)
    order = sorted(range(len(cache)), key=lambda i: digest(contents + cache.sample_id(i)))
    samples, records, count = [], [], 0
    for i in order:
        if count >= num_positions:
            break
        held = cache.sample(i)
        supervised = np.zeros(len(held.token_ids), dtype=np.bool_)
        supervised[held.logprobs.positions + 1] = True
        samples.append(Sample(held.token_ids, supervised, f"sample {i} of {cache.path}"))
        records.append(held.logprobs)
        count += len(held.logprobs)
    least = num_positions if at_least is None else at_least
    if count < least:
        raise _too_few(str(cache.path), least, count)
    return HeldRecords(cache, samples, records)


def records_of(teacher: Teacher, samples: Sequence[Sample], batch_tokens: int) -> list[BaseLogprobs]:
    """The records of the samples, in their order, by batches of at most so many tokens, padding included."""
    return [record for batch in _batches(samples, batch_tokens) for record in teacher(batch)]


def compare(reference: Sequence[BaseLogprobs], engine: Sequence[BaseLogprobs]) -> Differences:
    """The differences of two engines' records of the same positions. Raises ValueError where they are of others."""
    parts = [differences(a, b) for a, b in zip(reference, engine, strict=True)]
    label, alternative = np.concatenate([p.label for p in parts]), np.concatenate([p.alternatives for p in parts])
    kl = np.concatenate([p.kl for p in parts])
    counted = [record.tail_logprobs >= np.log(LEAST_TAIL) for record in reference]
    tail = np.concatenate([p.tail[rows] for p, rows in zip(parts, counted, strict=True)])
    return Differences(
        num_samples=len(parts),
        num_positions=len(label),
        max_label_nats=float(label.max()),
        mean_label_nats=float(label.mean()),
        max_alternative_nats=float(alternative.max(initial=0)),
        mean_alternative_nats=float(alternative.mean()) if len(alternative) else 0.0,
        max_tail_nats=float(tail.max(initial=0)),
        mean_tail_nats=float(tail.mean()) if len(tail) else 0.0,
        mean_overlap=float(np.concatenate([p.overlap for p in parts]).mean()),
        max_kl_nats=float(kl.max()),
        mean_kl_nats=float(kl.mean()),
    )


def bounds_of(calibration: Calibration) -> Bounds:
    """By the coarser dtype, a dtype that is not known being a coarse one; and the rounding of a cache, whose errors,
    spread evenly over [-e, e], make a KL of about e^2 / 6."""
    dtypes = (calibration.engine.model.dtype, calibration.reference.model.dtype)
    bounds = max((BOUNDS.get(d, BOUNDS["bfloat16"]) for d in dtypes), key=lambda b: b.max_nats)
    e = calibration.rounding_nats
    return Bounds(bounds.max_nats + e, bounds.mean_nats + e, bounds.mean_kl_nats + e**2 / 3)


def check_bounds(calibration: Calibration) -> None:
    """Raise `NotCalibrated`, naming each difference above its bound, or where too few positions were compared."""
    found, bounds = calibration.found, bounds_of(calibration)
    wrong = [
        f"{what} {value:.4g}, at most {bound:g}"
        for what, value, bound in (
            ("max difference of log p(label)", found.max_label_nats, bounds.max_nats),
            ("mean difference of log p(label)", found.mean_label_nats, bounds.mean_nats),
            ("max difference of alternatives", found.max_alternative_nats, bounds.max_nats),
            ("mean difference of alternatives", found.mean_alternative_nats, bounds.mean_nats),
            ("max difference of log p(tail)", found.max_tail_nats, bounds.max_nats),
            ("mean difference of log p(tail)", found.mean_tail_nats, bounds.mean_nats),
            ("mean KL", found.mean_kl_nats, bounds.mean_kl_nats),
        )
        if not value <= bound
    ]
    if not found.mean_overlap >= MIN_OVERLAP:
        wrong.append(f"shared alternatives {found.mean_overlap:.2f}, at least {MIN_OVERLAP:g}")
    if found.num_positions < MIN_POSITIONS:
        wrong.append(f"positions {found.num_positions}, at least {MIN_POSITIONS}")
    if wrong:
        engine, reference = calibration.engine, calibration.reference
        raise NotCalibrated(
            f"comparing {engine.engine} ({engine.model.dtype}, {engine.model.attention} attention) with "
            f"{reference.engine} ({reference.model.dtype}, {reference.model.attention} attention) on "
            f"{found.num_positions:,} positions: found {'; '.join(wrong)}. A cache made by it would not be of the base "
            "that is trained. Run both in one dtype, or use --engine transformers."
        )


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write a calibration as JSON, as a whole or not at all."""
    write_checked(path, asdict(calibration))


def read_calibration(path: Path) -> Calibration:
    """The calibration in a file. Raises `NotCalibrated` where it is missing, damaged or of something else."""
    try:
        body = CheckedJson.of(path, ADVICE).only(_names(Calibration))
        parts = {name: body.part(name).only(_names(Run)) for name in ("engine", "reference")}
        runs = {
            n: Run(p.text("engine"), p.text("version"), _identity(p.part("model")), tuple(p.texts("arguments")))
            for n, p in parts.items()
        }
        found = body.part("found").only(_names(Differences))
        counts = {n: found.whole(n) for n in ("num_samples", "num_positions")}
        others = {f.name: found.number(f.name) for f in fields(Differences) if f.name not in counts}
        differences = Differences(**counts, **others)  # type: ignore[arg-type]
        top_k, rounding = body.whole("top_k"), body.number("rounding_nats")
        return Calibration(runs["engine"], runs["reference"], top_k, differences, rounding)
    except OSError as error:
        raise NotCalibrated(f"reading {path}: {error.strerror or error}. {ADVICE}") from error
    except UnreadableSweep as error:
        raise NotCalibrated(str(error)) from error


def check_calibration(path: Path, run: Run) -> Calibration:
    """The calibration in a file, if it is of this engine, this version, told the same, and this very model as the
    engine runs it.

    run: the model with the engine's dtype and attention. The bounds are those of today. Raises `NotCalibrated`.
    """
    calibration = read_calibration(path)
    identity = run.model
    stated, wanted = (
        {"engine": of.engine, "version": of.version, "what it is told": ", ".join(of.arguments)}
        for of in (calibration.engine, run)
    )
    differs = differing(stated, wanted, "there", "here")
    differs += [f"model.{said}" for said in base_differences(asdict(calibration.engine.model), identity)]
    differs += [f"reference {said}" for said in base_differences(base_of(calibration.reference.model), identity)]
    if differs:
        raise NotCalibrated(
            f"using the calibration in {path}: it differs in {'; '.join(differs)}. It says nothing of this engine with "
            f"this model. {ADVICE}"
        )
    check_bounds(calibration)
    return calibration


def _too_few(where: str, expected: int, found: int) -> NotCalibrated:
    return NotCalibrated(
        f"calibrating on {where}: expected at least {expected:,} supervised positions, found {found:,}. Fewer say too "
        "little. Give more data."
    )


def _batches(samples: Sequence[Sample], batch_tokens: int) -> Iterator[list[Sample]]:
    batch: list[Sample] = []
    for sample in samples:
        longest = max(len(s.token_ids) for s in [*batch, sample])
        if batch and (len(batch) + 1) * longest > batch_tokens:
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


def _names(of: type[Calibration | Run | Differences | ModelIdentity]) -> list[str]:
    return [f.name for f in fields(of)]


def _identity(part: CheckedJson) -> ModelIdentity:
    part.only(_names(ModelIdentity))
    texts = {name: part.text(name) for name in ("weights", "config", "dtype", "attention")}
    quantization, tf32 = part.text_or_empty("quantization"), part.switch("tf32")
    return ModelIdentity(vocab_size=part.whole("vocab_size"), quantization=quantization, tf32=tf32, **texts)
