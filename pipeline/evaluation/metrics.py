"""The numbers of an evaluation: sums a document -> means, perplexity, drift, and how sure they are.

Owns what each number means; docs/how-to/evaluate.md has every formula and where it is from. Numpy only: must not know
models or caches. The same function makes a number and its interval, from totals of the documents or of a resample.
Shapes: D documents, R resamples. Nats a position, unless said otherwise.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

DocumentSums = Mapping[str, FloatArray]
"""Sums over the supervised positions of each document, float64 [D]: `positions`; `ce_before` and `hits_before`; with an
adapter `ce_after`, `hits_after`, `kl`, `base_ce`, `agreement` and `undecided` (see `Comparison`). hits: positions whose
label is predicted first; agreement: those where both predict the same token first. Of the first of these positions
whose label is not the same in all documents alone, also 0 or 1 each: `first_changed`, where they predict another token
first, and `first_undecided`."""

NUM_RESAMPLES = 1_000
SEED = 0
COVERAGE_PERCENT = 95.0


@dataclass(frozen=True)
class Metrics:
    """Means over the supervised positions of a data set: cross-entropy in nats, share of tokens predicted first."""

    num_positions: int
    ce_nats: float
    token_accuracy: float

    @property
    def perplexity(self) -> float:
        """exp(cross-entropy); inf beyond the range of a float."""
        return _exp(self.ce_nats)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON, the perplexity included."""
        return {**asdict(self), "perplexity": finite_or_none(self.perplexity)}


@dataclass(frozen=True)
class Comparison:
    """One data set before and after. What needs an adapted model is None without one.

    kl_nats and base_ce_nats are over the whole vocabulary, or, where before_from is "cache", over label, alternatives
    and the tail as one outcome, and then lower bounds.
    """

    before: Metrics
    after: Metrics | None = None
    #: Mean KL(base || adapted).
    kl_nats: float | None = None
    #: Mean of -sum_c p_base(c) log q(c), the adapted model's cross-entropy against the base's distribution (arXiv
    #: 2401.05605), which is kl_nats above the base's own entropy.
    base_ce_nats: float | None = None
    #: Share of positions where both predict the same token first.
    agreement: float | None = None
    #: Documents at whose first supervised position they predict another token first: where greedy answers part at once.
    #: What all documents begin with, such as a template's <think>, is passed over.
    num_first_changed: int | None = None
    #: Share of positions where the cache's rounding leaves open which token that is for the base.
    undecided: float = 0.0
    #: Documents at whose first supervised position it leaves that open; they count as the cache records them.
    num_first_undecided: int = 0
    num_documents: int = 0
    before_from: Literal["base", "cache"] = "base"
    #: Fingerprint of the token sequences and their supervised positions.
    samples: str = ""
    #: 95 % bootstrap intervals by the names of `statistics_of`; empty for a single document, which resampling cannot
    #: vary.
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def ce_change_nats(self) -> float | None:
        """Cross-entropy after less before: forgetting on prior text, learning (negative) on new text."""
        return None if self.after is None else self.after.ce_nats - self.before.ce_nats

    @property
    def drift_percent(self) -> float | None:
        """100 (perplexity after / perplexity before - 1)."""
        change = self.ce_change_nats
        return None if change is None else float(_drift(np.float64(change)))

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON, perplexities and drift included; null where a number is beyond the range of a float."""
        sides = {"before": self.before, "after": self.after}
        flat = {
            k: None if m is None else {**asdict(m), "perplexity": finite_or_none(m.perplexity)}
            for k, m in sides.items()
        }
        drift = self.drift_percent
        return {
            **flat,
            "kl_nats": self.kl_nats,
            "base_ce_nats": self.base_ce_nats,
            "agreement": self.agreement,
            "num_first_changed": self.num_first_changed,
            "drift_percent": None if drift is None else finite_or_none(drift),
            "undecided": self.undecided,
            "num_first_undecided": self.num_first_undecided,
            "num_documents": self.num_documents,
            "before_from": self.before_from,
            "samples": self.samples,
            "intervals": {name: list(ends) for name, ends in self.intervals.items()},
        }


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task, in the metric's own unit (accuracies are shares, 0 to 1)."""

    task: str
    #: The harness's name, with its filter where it has one.
    metric: str
    before: float
    #: None without an adapter.
    after: float | None
    #: Of after - before, over the task's documents; None where the metric is not a mean over these.
    interval: tuple[float, float] | None
    #: How many the task has.
    num_documents: int

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def comparison_of(sums: DocumentSums, before_from: Literal["base", "cache"] = "base", samples: str = "") -> Comparison:
    """The comparison that these sums make, intervals included."""
    totals = {name: column.sum(keepdims=True) for name, column in sums.items()}
    num_documents = len(sums["positions"])
    found = {name: float(values[0]) for name, values in statistics_of(totals, num_documents).items()}
    num_positions = round(float(totals["positions"][0]))
    before = Metrics(num_positions, found["ce_before"], found["accuracy_before"])
    drawn = statistics_of(resampled_totals(sums), num_documents) if num_documents > 1 else {}
    intervals = intervals_of(drawn)
    facts: dict[str, Any] = {
        "num_documents": num_documents,
        "before_from": before_from,
        "samples": samples,
        "intervals": intervals,
    }
    if "ce_after" not in sums:
        return Comparison(before, **facts)
    after = Metrics(num_positions, found["ce_after"], found["accuracy_after"])
    return Comparison(
        before,
        after,
        found["kl"],
        found["base_ce"],
        found["agreement"],
        round(float(totals["first_changed"][0])),
        undecided=found["undecided"],
        num_first_undecided=round(float(totals["first_undecided"][0])),
        **facts,
    )


def statistics_of(totals: DocumentSums, num_documents: int) -> dict[str, FloatArray]:
    """Every number from totals over so many documents, each of the same shape as they, by its name in `intervals`."""
    mean = {name: total / totals["positions"] for name, total in totals.items() if name != "positions"}
    found = {
        "ce_before": mean["ce_before"],
        "perplexity_before": _exp_array(mean["ce_before"]),
        "accuracy_before": mean["hits_before"],
    }
    if "ce_after" not in mean:
        return found
    change = mean["ce_after"] - mean["ce_before"]
    after = _exp_array(mean["ce_after"])
    with np.errstate(invalid="ignore"):  # inf - inf
        perplexity_change = after - found["perplexity_before"]
    return found | {
        "ce_after": mean["ce_after"],
        "ce_change": change,
        "perplexity_after": after,
        "perplexity_change": perplexity_change,
        "drift_percent": _drift(change),
        "accuracy_after": mean["hits_after"],
        "accuracy_change": mean["hits_after"] - mean["hits_before"],
        **{name: mean[name] for name in ("kl", "base_ce", "agreement", "undecided")},
        "first_changed": totals["first_changed"] / num_documents,
    }


def resampled_totals(sums: DocumentSums) -> dict[str, FloatArray]:
    """Totals of D documents drawn from these with replacement, float64 [R]; the same draws for every column.

    Whole documents, since the positions of one depend on each other (Efron and Tibshirani 1993, ch. 8).
    """
    matrix = np.stack(list(sums.values()), axis=1)
    rng, count = np.random.default_rng(SEED), len(matrix)
    totals = np.empty((NUM_RESAMPLES, matrix.shape[1]))
    for row in totals:
        row[:] = np.bincount(rng.integers(0, count, count), minlength=count) @ matrix
    return {name: totals[:, i] for i, name in enumerate(sums)}


def intervals_of(statistics: Mapping[str, FloatArray]) -> dict[str, tuple[float, float]]:
    """The percentile interval of each statistic [R]; none of one that is not finite everywhere."""
    outer = (100 - COVERAGE_PERCENT) / 2
    found = {}
    for name, values in statistics.items():
        if np.isfinite(values).all():
            low, high = np.percentile(values, [outer, 100 - outer])
            found[name] = (float(low), float(high))
    return found


def drift_prevented(drift: float, plain_drift: float) -> float | None:
    """1 - drift / drift of plain cross-entropy, in one unit: per cent of perplexity, or nats of forgetting.

    None where the plain one did not drift upwards: nothing was to be prevented.
    """
    return None if plain_drift <= 0 else 1 - drift / plain_drift


@dataclass(frozen=True)
class Prevented:
    """What an adapter has not of what plain cross-entropy did to prior text, as shares; None where none can be told."""

    #: Of the KL to the base.
    kl: float | None
    #: Of the drift of perplexity.
    drift: float | None


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _exp_array(values: FloatArray) -> FloatArray:
    with np.errstate(over="ignore"):
        found: FloatArray = np.exp(values)
        return found


def _drift(change: Any) -> Any:
    with np.errstate(over="ignore"):
        return 100 * np.expm1(change)


def finite_or_none(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None
