"""What is compared in a sweep, against oracles written from the definitions."""

import math
from dataclasses import replace
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.sweep_folders import AXES, MASKED

from logitcache.reports.pareto import (
    best_within,
    budgets_of,
    by_cross_entropy,
    estimate,
    hypervolume,
    is_reference,
    least_forgetting_at,
    pareto_front,
    prevented_by,
    reference_forgetting,
    representative,
    scaled_settings,
    settings_of,
    spent_on,
    t_quantile,
    varying,
)
from logitcache.reports.results import HeldOut, Run, RunCost, RunOutcome, ScaledOutcome
from logitcache.training.settings import without_base

GRID = st.integers(-8, 8).map(lambda n: n / 8)
POINTS = st.lists(st.tuples(GRID, GRID), min_size=1, max_size=9)
PRINTED_T = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 9: 2.2622, 10: 2.2281, 30: 2.0423, 120: 1.9799}
"""t(.975) as tables print it."""


def held_out(before: float, after: float, kl: float) -> HeldOut:
    return HeldOut(100, before, after, math.exp(before), math.exp(after), 0.3, 0.4, kl, 3.0, 0.9, 5, 60, None)


def run(learning: float, forgetting: float, method: str = "a", finished: bool = True, **settings: object) -> Run:
    """A run that forgets so much by its KL, and by its cross-entropy half as much less .1."""
    prior = held_out(0.0, forgetting / 2 - 0.1, forgetting)
    base = (None, None) if without_base({**AXES, **settings}) else (0.2, 7.0)
    cost = RunCost(0.1 * (1 + int(str(settings.get("seed", 0)))), *base, 1.2, 1)
    outcome = RunOutcome(held_out(0.0, -learning, 0.2), prior, 10.0, 50, 1000, 1, cost)
    name = f"{method} {sorted(settings.items())}"
    status = "finished" if finished else "failed"
    return Run(name, method, {**AXES, **settings}, status, outcome if finished else None)  # type: ignore[dict-item]


def settings_at(points: list[tuple[float, float]]) -> list:
    return settings_of([run(x, y, lr=float(i)) for i, (x, y) in enumerate(points)])


def means(settings: list) -> list[tuple[float, float]]:
    return [(s.learning.mean, s.forgetting.mean) for s in settings]


@pytest.mark.parametrize("degrees", PRINTED_T)
def test_t_quantile_is_that_of_the_tables(degrees: int) -> None:
    assert t_quantile(degrees) == pytest.approx(PRINTED_T[degrees], abs=6e-5)


@pytest.mark.parametrize("degrees", [1, 2, 3, 6, 11])
def test_t_quantile_holds_95_percent_of_the_density(degrees: int) -> None:
    """Against the integral of Student's density, by Simpson's rule."""
    scale = math.gamma((degrees + 1) / 2) / math.sqrt(degrees * math.pi) / math.gamma(degrees / 2)
    t = np.linspace(0, t_quantile(degrees), 20_001)
    density = scale * (1 + t**2 / degrees) ** (-(degrees + 1) / 2)
    weights = np.array([1, *([4, 2] * 9_999), 4, 1])
    assert 2 * float(weights @ density) * t[1] / 3 == pytest.approx(0.95, abs=1e-9)


def test_interval_by_hand() -> None:
    found = estimate([1.0, 2.0, 3.0])  # s = 1, s / sqrt(3) = .57735, t(2) = 4.30265
    assert (found.mean, found.num_seeds) == (2.0, 3)
    assert (found.low, found.high) == pytest.approx((2 - 2.48414, 2 + 2.48414), abs=1e-5)
    one = estimate([7.0])
    assert (one.mean, one.low, one.high, one.num_seeds) == (7.0, None, None, 1)


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(4000):
        found = estimate(rng.normal(3.0, 2.0, size=3).tolist())
        assert found.low is not None and found.high is not None
        covered += found.low <= 3.0 <= found.high
    assert covered / 4000 == pytest.approx(0.95, abs=0.012)  # 3.5 standard errors


def test_a_setting_is_everything_but_the_seed() -> None:
    runs = [run(x, 0.1, lr=lr, seed=seed) for x, lr, seed in [(0.1, 1.0, 0), (0.3, 1.0, 1), (0.5, 2.0, 0)]]
    runs += [run(0.7, 0.1, "b", lr=1.0), run(0, 0, lr=2.0, seed=1, finished=False), run(0, 0, lr=3.0, finished=False)]
    found = settings_of(runs)
    assert [(s.method, s.values["lr"], len(s.runs), s.num_planned) for s in found] == [
        ("a", 1.0, 2, 2),
        ("a", 2.0, 1, 2),
        ("b", 1.0, 1, 1),
    ]
    assert [s.learning.mean for s in found] == pytest.approx([0.2, 0.5, 0.7])
    assert "seed" not in found[0].values
    assert found[0].mean(lambda o: o.seconds) == 10
    assert found[0].mean(lambda o: o.prior.drift_percent) is None


@given(POINTS)
def test_pareto_front_is_what_nothing_dominates(points: list[tuple[float, float]]) -> None:
    front = means(pareto_front(settings_at(points)))
    expected = [
        (x, y)
        for x, y in points
        if not any(u >= x and v <= y and (u > x or v < y) for u, v in points if (u, v) != (x, y))
    ]
    assert front == sorted(expected)


@given(POINTS, GRID)
def test_hypervolume_is_the_number_of_dominated_cells(points: list[tuple[float, float]], limit: float) -> None:
    """Counting by definition: cells of 1/8 x 1/8 whose centre some point dominates, within the reference point."""
    cells = 0
    for i, j in product(range(8), range(-8, 8)):
        x, y = (i + 0.5) / 8, (j + 0.5) / 8
        cells += y < limit and any(u > x and v < y for u, v in points)
    assert Fraction(hypervolume(points, limit)) == Fraction(cells, 64)


@pytest.mark.parametrize(
    ("points", "area"),
    [
        ([(2.0, 1.0)], 2 * 3),
        ([(2.0, 1.0), (2.0, 1.0)], 2 * 3),
        ([(2.0, 1.0), (3.0, 2.0)], 2 * 1 + 3 * 2),
        ([(3.0, 2.0), (2.0, 1.0), (1.0, 3.0)], 2 * 1 + 3 * 2),  # the third is dominated
        ([(2.0, -1.0)], 2 * 5),
        ([(-1.0, 0.0)], 0),  # learns nothing
        ([(2.0, 4.0), (9.0, 5.0)], 0),  # at and beyond the reference point
        ([], 0),
    ],
)
def test_hypervolume_by_hand(points: list[tuple[float, float]], area: float) -> None:
    assert hypervolume(points, 4.0) == area


def test_hypervolume_is_that_of_random_draws() -> None:
    rng = np.random.default_rng(1)
    points = list(zip(rng.uniform(0, 1, 12), rng.uniform(-0.5, 1, 12), strict=True))
    draws = rng.uniform((0, -0.5), (1, 0.8), size=(400_000, 2))
    hit = np.zeros(len(draws), dtype=bool)
    for x, y in points:
        hit |= (draws[:, 0] < x) & (draws[:, 1] > y)
    assert hypervolume(points, 0.8) == pytest.approx(hit.mean() * 1.3, abs=0.005)


def test_reference_point_is_rounded_up_and_not_moved_by_what_went_astray() -> None:
    assert reference_forgetting(settings_at([(0.5, 0.1234), (0.2, 0.05)])) == 0.13
    assert reference_forgetting(settings_at([(0.5, 0.13)])) == 0.13
    assert reference_forgetting(settings_at([(0.5, -0.128)])) == -0.12
    assert reference_forgetting(settings_at([(0.5, 0.1234), (0.4, 7.0), (-1.0, 9.0)])) == 0.13
    assert reference_forgetting(settings_at([(-1.0, 9.0), (-2.0, 9.5)])) == 9.5
    two = settings_of([run(0.5, 0.1), run(0.4, 7.0, "b")])  # of another method it is the best there is
    assert reference_forgetting(two) == 7.0


def test_budgets_are_shares_of_what_plain_cross_entropy_forgets() -> None:
    runs = [run(0.1, 0.2, lr=1.0), run(0.2, 0.4, lr=2.0), run(0.1, 5.0, "kl", **MASKED)]
    runs.append(run(0.1, 8.0, "smooth", label_smoothing=0.1))
    found = budgets_of(settings_of(runs))
    assert found.nats == pytest.approx((0.02, 0.04, 0.1, 0.2, 0.4))
    assert (found.largest, found.of_reference) == (0.4, True)
    without = budgets_of(settings_of(runs[2:]))
    assert (without.largest, without.of_reference) == (8.0, False)
    below = budgets_of(settings_of([run(0.1, -0.2)]))
    assert (below.nats, below.largest) == ((0.0,), -0.2)


@given(POINTS, GRID)
def test_best_within_a_budget_by_trying_all(points: list[tuple[float, float]], budget: float) -> None:
    best = best_within(settings_at(points), budget)
    within = [(x, y) for x, y in points if y <= budget]
    if best is None:
        assert not within
    else:
        most = max(x for x, _ in within)
        assert means([best]) == [(most, min(y for x, y in within if x == most))]


@given(POINTS, GRID)
def test_least_forgetting_at_a_learning_by_trying_all(points: list[tuple[float, float]], learning: float) -> None:
    best = least_forgetting_at(settings_at(points), learning)
    enough = [(y, -x) for x, y in points if x >= learning]
    assert best is None if not enough else means([best]) == [(-min(enough)[1], min(enough)[0])]


def test_the_same_by_cross_entropy_is_of_the_same_runs() -> None:
    found = settings_of([run(0.5, 0.2, seed=0), run(0.3, 0.4, seed=1), run(0.2, 0.02, "kl", **MASKED)])
    beside = by_cross_entropy(found)
    assert [s.forgot for s in found] == [(0.2, 0.4), (0.02,)]
    assert [s.forgot for s in beside] == [pytest.approx((0.0, 0.1)), pytest.approx((-0.09,))]
    for one, other in zip(found, beside, strict=True):
        assert other.forgetting == one.ce_rise == other.ce_rise == estimate(other.forgot)
        assert (other.runs, other.outcomes, other.learning) == (one.runs, one.outcomes, one.learning)


def test_what_stands_for_a_method() -> None:
    plain = settings_of([run(0.9, 0.4, lr=2.0), run(0.5, 0.3, lr=1.0)])
    masked = settings_of([run(0.3, 0.05, "kl", lr=1.0, **MASKED), run(0.6, 0.1, "kl", lr=2.0, **MASKED)])
    budgets = budgets_of(plain + masked)  # 25 % of .4
    assert representative(masked, budgets).values["lr"] == 2.0
    assert representative(plain, budgets).values["lr"] == 1.0  # none within: the one that forgets least


def test_drift_prevented_compares_with_the_same_adapter_rank_and_learning_rate() -> None:
    runs = [run(0.5, 0.2, lr=1.0), run(0.5, 0.4, lr=2.0), run(0.5, 0.8, lr=2.0, rank=8)]
    runs += [run(0.4, 0.05, "kl", lr=1.0, **MASKED), run(0.4, 0.1, "kl", lr=2.0, **MASKED)]
    runs += [run(0.4, -0.1, "kl", lr=2.0, rank=8, **MASKED), run(0.4, 0.1, "kl", lr=3.0, **MASKED)]
    runs += [
        run(0.4, 0.3, "smooth", lr=2.0, label_smoothing=0.1),
        run(0.4, 0.3, "kl", lr=2.0, adapter="dora", **MASKED),
    ]
    found = settings_of(runs)
    prevented = [prevented_by(s, found) for s in found]
    assert prevented[:3] == [None] * 3
    assert prevented[3:6] == pytest.approx([0.75, 0.75, 1.125])
    assert prevented[6] is None
    assert prevented[7] == pytest.approx(0.25)
    assert prevented[8] is None


def test_drift_prevented_of_nothing_forgotten_is_not_a_number() -> None:
    found = settings_of([run(0.5, -0.01), run(0.4, 0.1, "kl", **MASKED)])
    assert [prevented_by(s, found) for s in found] == [None, None]


def test_what_was_spent_charges_a_live_base_to_regularised_steps_only() -> None:
    runs = [run(0.1, 0.1, seed=s) for s in (0, 1)] + [run(0.1, 0.1, "kl", seed=s, **MASKED) for s in (0, 1, 2)]
    runs.append(run(0.1, 0.1, "kl", seed=3, finished=False, **MASKED))
    reading, plain = spent_on(runs)
    assert reading is not None and plain is not None
    assert (reading.num_runs, reading.num_steps, plain.num_runs, plain.num_steps) == (3, 150, 2, 100)
    assert (reading.step_seconds, plain.step_seconds) == (0.2, pytest.approx(0.15))  # medians of .1, .2, .3 and .1, .2
    assert (reading.total, reading.live_total) == (pytest.approx(30), pytest.approx(60))
    assert reading.base_once_seconds == 7.0 and plain.live_total is None
    assert reading.num_alone == 3 and reading.loads == ()
    busy = [replace(r, outcome=replace(r.outcome, cost=replace(r.outcome.cost, load=2.1))) for r in runs if r.outcome]
    found = [spent for spent in spent_on(busy) if spent is not None]
    assert [(spent.num_alone, spent.loads) for spent in found] == [(0, (2.1,) * 3), (0, (2.1,) * 2)]
    assert spent_on([]) == (None, None)
    mixed, _ = spent_on([*busy, *(replace(r, name=f"{r.name}-again") for r in runs[:3])])
    assert mixed is not None and (mixed.num_runs, mixed.num_alone, mixed.step_seconds) == (4, 1, 0.1)  # of that one


def test_a_weighted_cross_entropy_is_not_plain_and_may_need_the_base() -> None:
    """It is no reference for the drift of others, and a live base would be run for one that reads it."""
    runs = [run(0.5, 0.1, method=name, ce_weight=name) for name in ("none", "dft", "stm", "my.py:f")]
    plain, *weighed = settings_of(runs)
    assert budgets_of([plain, *weighed]).of_reference
    assert [prevented_by(s, [plain, *weighed]) for s in weighed] == [0.0, 0.0, 0.0]
    assert [prevented_by(s, weighed) for s in weighed] == [None, None, None]
    reading, without = spent_on(runs)
    assert reading is not None and without is not None
    assert (reading.num_runs, without.num_runs) == (2, 2)


def test_a_curve_has_the_base_the_parts_that_all_seeds_have_and_the_setting() -> None:
    def scaled(learning: float, seed: int, *scales: float) -> Run:
        parts = [ScaledOutcome(held_out(0.0, -s * learning, 0.1), held_out(0.0, 0.1, s * s), s) for s in scales]
        return replace(run(learning, 1.0, seed=seed), scaled=tuple(parts))

    (setting,) = settings_of([scaled(0.4, 0, 0.25, 0.5, 2.0), scaled(0.6, 1, 0.5, 2.0)])
    found = scaled_settings(setting)
    assert [point.scale for point in found] == [0, 0.5, 1, 2]
    assert [point.learning.mean for point in found] == pytest.approx([0, 0.25, 0.5, 1.0])
    assert [point.forgetting.mean for point in found] == pytest.approx([0, 0.25, 1.0, 4.0])
    assert found[2].learning == setting.learning and found[2].forgetting == setting.forgetting
    assert [point.first_changed for point in found] == [0, 5, 5, 5]
    (alone,) = settings_of([scaled(0.4, 0, 0.5), run(0.6, 1.0, seed=1)])
    assert scaled_settings(alone) == []  # one of its seeds was not measured


def test_anchors_are_no_plain_training() -> None:
    plain, anchored = settings_of([run(0.5, 0.3, anchor_weight=w) for w in (0.0, 4.0)])
    assert is_reference(plain) and not is_reference(anchored)
    assert budgets_of([plain, anchored]).of_reference and not budgets_of([anchored]).of_reference


def test_varying_names_what_differs_but_the_seed() -> None:
    assert varying([run(0, 0, lr=1.0, seed=0, weight=1.0), run(0, 0, lr=2.0, seed=1, weight=1.0)]) == ["lr"]
    assert varying([]) == []
