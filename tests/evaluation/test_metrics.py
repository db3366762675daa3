"""The numbers of an evaluation from sums a document, and their bootstrap intervals."""

import json
import math

import numpy as np
import pytest

from logitcache.evaluation.metrics import NUM_RESAMPLES, Comparison, Metrics, comparison_of, drift_prevented

FloatArray = np.ndarray


def make_sums(count: int, seed: int = 0) -> dict[str, FloatArray]:
    """Documents of very different length whose means differ, as sums over their positions."""
    rng = np.random.default_rng(seed)
    positions = rng.integers(1, 200, count).astype(np.float64)
    means = {
        "ce_before": 3 + 0.4 * rng.standard_normal(count),
        "ce_after": 3.2 + 0.4 * rng.standard_normal(count),
        "hits_before": rng.random(count),
        "hits_after": rng.random(count),
        "kl": 0.1 + 0.1 * rng.random(count),
        "base_ce": 2 + rng.random(count),
        "agreement": rng.random(count),
        "undecided": np.zeros(count),
    }
    firsts = {"first_changed": (rng.random(count) < 0.4).astype(float), "first_undecided": np.zeros(count)}
    return {"positions": positions, **{name: mean * positions for name, mean in means.items()}, **firsts}


def test_means_are_over_positions_not_over_documents() -> None:
    sums = make_sums(7)
    found = comparison_of(sums, "cache", "print")
    n = sum(sums["positions"])
    assert found.before == Metrics(int(n), *(pytest.approx(sum(sums[c]) / n) for c in ("ce_before", "hits_before")))
    assert found.after == Metrics(int(n), *(pytest.approx(sum(sums[c]) / n) for c in ("ce_after", "hits_after")))
    assert found.kl_nats == pytest.approx(sum(sums["kl"]) / n)
    assert found.base_ce_nats == pytest.approx(sum(sums["base_ce"]) / n)
    assert found.agreement == pytest.approx(sum(sums["agreement"]) / n)
    assert found.num_first_changed == sum(sums["first_changed"]) > 0
    assert (found.num_documents, found.before_from, found.samples) == (7, "cache", "print")


def test_perplexity_and_drift() -> None:
    found = Comparison(Metrics(10, math.log(20), 0.5), Metrics(10, math.log(23), 0.5))
    assert found.before.perplexity == pytest.approx(20)
    assert found.ce_change_nats == pytest.approx(math.log(23 / 20))
    assert found.drift_percent == pytest.approx(15)
    assert Comparison(found.before).drift_percent is None


def test_a_perplexity_beyond_floats_is_null_in_json() -> None:
    sums = make_sums(5)
    sums["ce_after"] = 1e4 * sums["positions"]
    found = comparison_of(sums)
    assert found.after is not None and found.after.perplexity == math.inf and found.drift_percent == math.inf
    plain = found.as_dict()
    json.dumps(plain, allow_nan=False)
    assert plain["drift_percent"] is None and plain["after"]["perplexity"] is None
    assert "drift_percent" not in plain["intervals"] and "ce_change" in plain["intervals"]


def test_json_has_the_keys_that_readers_rely_on() -> None:
    found = comparison_of(make_sums(5)).as_dict()
    assert found.keys() == {
        *("before", "after", "kl_nats", "base_ce_nats", "agreement", "drift_percent", "undecided", "num_documents"),
        *("before_from", "samples", "intervals", "num_first_changed", "num_first_undecided"),
    }
    for side in ("before", "after"):
        assert found[side].keys() == {"num_positions", "ce_nats", "token_accuracy", "perplexity"}
    wanted = {"ce_before", "ce_after", "ce_change", "kl", "base_ce", "agreement", "drift_percent", "accuracy_change"}
    wanted |= {"first_changed"}
    assert wanted <= found["intervals"].keys()
    base_alone = {n: c for n, c in make_sums(5).items() if n in ("positions", "ce_before", "hits_before")}
    assert comparison_of(base_alone).intervals.keys() == {"ce_before", "perplexity_before", "accuracy_before"}


def test_intervals_are_those_of_resampled_documents() -> None:
    """Written plainly: lists of documents, drawn with replacement, and their ratios."""
    sums = make_sums(9)
    rng = np.random.default_rng(0)
    drawn = [[int(i) for i in rng.integers(0, 9, 9)] for _ in range(NUM_RESAMPLES)]

    def ratio(name: str, rows: list[int]) -> float:
        return math.fsum(sums[name][i] for i in rows) / math.fsum(sums["positions"][i] for i in rows)

    changes = [ratio("ce_after", rows) - ratio("ce_before", rows) for rows in drawn]
    before = [math.exp(ratio("ce_before", rows)) for rows in drawn]
    after = [math.exp(ratio("ce_after", rows)) for rows in drawn]
    expected = {
        "ce_change": changes,
        "kl": [ratio("kl", rows) for rows in drawn],
        "agreement": [ratio("agreement", rows) for rows in drawn],
        "first_changed": [math.fsum(sums["first_changed"][i] for i in rows) / 9 for rows in drawn],
        "perplexity_change": [b - a for a, b in zip(before, after, strict=True)],
        "drift_percent": [100 * (b / a - 1) for a, b in zip(before, after, strict=True)],
    }
    found = comparison_of(sums).intervals
    for name, values in expected.items():
        ordered = sorted(values)
        for end, share in zip(found[name], (0.025, 0.975), strict=True):
            at = share * (NUM_RESAMPLES - 1)
            low, high = ordered[math.floor(at)], ordered[math.ceil(at)]
            assert end == pytest.approx(low + (high - low) * (at - math.floor(at)), rel=1e-9), name


def test_intervals_are_the_same_every_time_and_hold_the_estimate() -> None:
    sums = make_sums(30)
    first, second = comparison_of(sums), comparison_of({n: c.copy() for n, c in sums.items()})
    assert first == second
    assert first.kl_nats is not None and first.ce_change_nats is not None and first.drift_percent is not None
    for name, value in (
        ("kl", first.kl_nats),
        ("ce_change", first.ce_change_nats),
        ("drift_percent", first.drift_percent),
    ):
        low, high = first.intervals[name]
        assert low < value < high


def test_one_document_has_no_interval() -> None:
    found = comparison_of(make_sums(1))
    assert found.intervals == {} and found.kl_nats is not None
    assert comparison_of(make_sums(2)).intervals


def test_more_documents_make_narrower_intervals() -> None:
    widths = [np.ptp(comparison_of(make_sums(count)).intervals["ce_change"]) for count in (20, 2000)]
    assert widths[1] < widths[0] / 4  # about a tenth


def test_intervals_cover_the_truth_about_95_times_in_100() -> None:
    """Documents of random length whose mean depends on the length, so that a mean of means would be wrong.

    With lengths n uniform in 1..40 and change n/40 + noise a position, the truth is E[n * n/40] / E[n].
    """
    lengths = np.arange(1, 41)
    truth = float((lengths * lengths / 40).mean() / lengths.mean())
    rng = np.random.default_rng(1)
    covered, runs = 0, 200
    for _ in range(runs):
        n = rng.integers(1, 41, 60).astype(np.float64)
        before = 2 * n
        after = before + n * (n / 40 + 0.5 * rng.standard_normal(60))
        names = ("hits_before", "hits_after", "kl", "base_ce", "agreement", "undecided", "first_changed")
        rest = {name: np.zeros(60) for name in (*names, "first_undecided")}
        sums = {"positions": n, "ce_before": before, "ce_after": after, **rest}
        low, high = comparison_of(sums).intervals["ce_change"]
        covered += low <= truth <= high
    assert 0.88 <= covered / runs <= 0.99


def test_drift_prevented() -> None:
    assert drift_prevented(4.0, 40.0) == pytest.approx(0.9)
    assert drift_prevented(-2.0, 40.0) == pytest.approx(1.05)  # better than before
    assert drift_prevented(60.0, 40.0) == pytest.approx(-0.5)
    assert drift_prevented(4.0, 0.0) is None and drift_prevented(4.0, -1.0) is None
