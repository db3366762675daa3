"""Learning against forgetting as numbers: means over seeds, the Pareto front, budgets, hypervolume, drift prevented.

Owns what is compared with what. A *setting* is a method with all its settings but the seed; every comparison is between
means of settings, never between single runs, and nothing is interpolated between settings. Knows no files and makes no
pictures; numpy at most.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import median

from logitcache.evaluation.metrics import drift_prevented
from logitcache.sweeps.config import OBJECTIVE, is_plain

from .results import Outcome, Run, RunCost, RunOutcome, Scalar

SEED = "seed"
BUDGET_SHARES = (0.05, 0.1, 0.25, 0.5, 1.0)
CURVE_SHARE = 0.25
"""The budget at which one setting stands for a method, in learning curves and at equal learning."""


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds, and the ends of the 95 % t-interval of the mean; None with one seed."""

    mean: float
    low: float | None
    high: float | None
    num_seeds: int


@dataclass(frozen=True)
class Setting:
    """A method at one combination of settings, over the seeds that finished."""

    method: str
    #: All settings but the seed.
    values: dict[str, Scalar]
    runs: tuple[Run, ...]
    outcomes: tuple[RunOutcome, ...]
    #: What each of its runs forgot, nats a token.
    forgot: tuple[float, ...]
    #: Of its runs, nats a token.
    learning: Estimate
    #: Of `forgot`.
    forgetting: Estimate
    #: Of the rise of cross-entropy on prior text, nats a token.
    ce_rise: Estimate
    #: Its runs, finished or not.
    num_planned: int

    def mean(self, value: Callable[[RunOutcome], float | None]) -> float | None:
        """Mean over seeds of anything that a run came to; None where a seed lacks it."""
        found = [v for v in map(value, self.outcomes) if v is not None]
        return math.fsum(found) / len(found) if len(found) == len(self.outcomes) else None


@dataclass(frozen=True)
class Budgets:
    """Budgets of forgetting in nats a token, and the largest mean forgetting that they are shares of."""

    nats: tuple[float, ...]
    shares: tuple[float, ...]
    largest: float
    of_reference: bool


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and mean +- t(.975, n - 1) s / sqrt(n), with s the sample standard deviation (n - 1)."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, None, None, 1)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = t_quantile(n - 1) * deviation / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


@cache
def t_quantile(degrees: int, share: float = 0.95) -> float:
    """t with P(|T| <= t) = share, for Student's distribution with `degrees` >= 1 degrees of freedom."""
    low, high = 0.0, 1.0
    while _within(high, degrees) < share:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if _within(middle, degrees) < share else (low, middle)
    return high


def _within(t: float, degrees: int) -> float:
    """P(|T| <= t): the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(1 + odd, degrees, 2):  # even degrees: 1, 3, ..., n - 1; odd: 2, 4, ..., n - 1
        total += term
        term *= cosine**2 * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def settings_of(runs: Sequence[Run]) -> list[Setting]:
    """The settings of which at least one seed finished, in the order of the runs."""
    groups: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        rest = sorted((k, v) for k, v in run.settings.items() if k != SEED)
        groups.setdefault((run.method, *rest), []).append(run)
    return [_setting(members) for members in groups.values() if any(run.outcome is not None for run in members)]


def _setting(members: list[Run]) -> Setting:
    finished = [(run, run.outcome) for run in members if run.outcome is not None]
    learning, forgetting, ce_rise = _estimates([outcome for _, outcome in finished])
    return Setting(
        method=members[0].method,
        values={k: v for k, v in members[0].settings.items() if k != SEED},
        runs=tuple(run for run, _ in finished),
        outcomes=tuple(outcome for _, outcome in finished),
        forgot=tuple(outcome.forgetting for _, outcome in finished),
        learning=learning,
        forgetting=forgetting,
        ce_rise=ce_rise,
        num_planned=len(members),
    )


@dataclass(frozen=True)
class ScaledSetting:
    """A setting at a part of its change, over its seeds: nothing was trained for it. 0 is the base, 1 the setting."""

    setting: Setting
    scale: float
    learning: Estimate
    forgetting: Estimate
    ce_rise: Estimate
    #: Documents of prior text whose first token changed, mean over seeds.
    first_changed: float


def scaled_settings(setting: Setting) -> list[ScaledSetting]:
    """The curve of a setting from the base on, by rising scale; empty where no scale was measured for all its seeds."""
    at = [{point.scale: point for point in run.scaled} for run in setting.runs]
    scales = sorted(set.intersection(*map(set, at)))
    if not scales:
        return []
    points: dict[float, Sequence[Outcome]] = {scale: [found[scale] for found in at] for scale in scales}
    points[1.0] = setting.outcomes
    nothing = Estimate(0.0, None, None, len(setting.runs))
    found = [ScaledSetting(setting, s, *_estimates(points[s]), _first_changed(points[s])) for s in sorted(points)]
    return [ScaledSetting(setting, 0.0, nothing, nothing, nothing, 0.0), *found]


def _estimates(outcomes: Sequence[Outcome]) -> tuple[Estimate, Estimate, Estimate]:
    """Learning, forgetting, and the rise of cross-entropy on prior text."""
    values = ([o.learning for o in outcomes], [o.forgetting for o in outcomes], [o.prior.ce_rise for o in outcomes])
    learning, forgetting, ce_rise = map(estimate, values)
    return learning, forgetting, ce_rise


def _first_changed(outcomes: Sequence[Outcome]) -> float:
    return math.fsum(o.prior.num_first_changed for o in outcomes) / len(outcomes)


def by_cross_entropy(settings: Sequence[Setting]) -> list[Setting]:
    """The same settings with the rise of cross-entropy on prior text for forgetting, to be looked at beside them."""
    return [replace(s, forgot=tuple(o.prior.ce_rise for o in s.outcomes), forgetting=s.ce_rise) for s in settings]


def dominates(a: Setting, b: Setting) -> bool:
    """Whether a learns at least as much as b, forgets at most as much, and is better in one of them."""
    (x, y), (u, v) = _point(a), _point(b)
    return x >= u and y <= v and (x, y) != (u, v)


def pareto_front(settings: Sequence[Setting]) -> list[Setting]:
    """The settings that no other dominates, from the least learning to the most."""
    front = [s for s in settings if not any(dominates(other, s) for other in settings)]
    return sorted(front, key=_point)


def is_reference(setting: Setting) -> bool:
    """Plain cross-entropy (`sweeps.config.is_plain`)."""
    return is_plain(setting.values)


def budgets_of(settings: Sequence[Setting]) -> Budgets:
    """Fixed shares of the largest mean forgetting of plain cross-entropy, or of any setting where there is none.

    Where that is not above 0, the only budget is 0.
    """
    reference = [s for s in settings if is_reference(s)]
    largest = max(s.forgetting.mean for s in reference or settings)
    shares = BUDGET_SHARES if largest > 0 else (0.0,)
    return Budgets(tuple(share * max(largest, 0.0) for share in shares), shares, largest, bool(reference))


def best_within(settings: Sequence[Setting], budget_nats: float) -> Setting | None:
    """The setting that learns most among those whose mean forgetting is at most the budget; None: there is none."""
    within = [s for s in settings if s.forgetting.mean <= budget_nats]
    return max(within, key=lambda s: (s.learning.mean, -s.forgetting.mean), default=None)


def representative(settings: Sequence[Setting], budgets: Budgets) -> Setting:
    """What stands for a method: the best within `CURVE_SHARE` of the largest forgetting, else the least forgetting."""
    best = best_within(settings, CURVE_SHARE * max(budgets.largest, 0.0))
    return best or min(settings, key=lambda s: (s.forgetting.mean, -s.learning.mean))


def least_forgetting_at(settings: Sequence[Setting], learning_nats: float) -> Setting | None:
    """The setting that forgets least among those that learn at least so much; None: none learns so much."""
    enough = [s for s in settings if s.learning.mean >= learning_nats]
    return min(enough, key=lambda s: (s.forgetting.mean, -s.learning.mean), default=None)


def reference_forgetting(settings: Sequence[Setting]) -> float:
    """Where hypervolume begins: the worst mean forgetting of the settings that count in it, rounded up to .01 nats.

    Those learn something, and no setting of the same method dominates them; a setting that went astray in both moves
    nothing. Over all settings where none learns.
    """
    counting = [s for group in by_method(settings).values() for s in pareto_front(group) if s.learning.mean > 0]
    worst = max(s.forgetting.mean for s in counting or settings)
    return math.ceil(round(worst * 100, 9)) / 100


def hypervolume(points: Sequence[tuple[float, float]], forgetting_limit: float) -> float:
    """Area in nats^2 that points (learning, forgetting) dominate, from (0, forgetting_limit); exact.

    The union of the rectangles [0, learning] x [forgetting, forgetting_limit]. A point with no learning, or with
    forgetting beyond the limit, has none. Summed in slabs of forgetting, by falling learning.
    """
    area, level = 0.0, forgetting_limit
    for learning, forgetting in sorted(points, key=lambda p: (-p[0], p[1])):
        if learning > 0 and forgetting < level:
            area += learning * (level - forgetting)
            level = forgetting
    return area


def prevented_by(setting: Setting, settings: Sequence[Setting]) -> float | None:
    """`drift_prevented` against plain cross-entropy with the same adapter, rank, learning rate and data.

    "The same": equal in everything but `OBJECTIVE`. None where there is no such setting or not one alone, where it
    does not forget, and for itself.
    """
    same = [s for s in settings if is_reference(s) and s is not setting and _frame(s) == _frame(setting)]
    if is_reference(setting) or len(same) != 1:
        return None
    return drift_prevented(setting.forgetting.mean, same[0].forgetting.mean)


@dataclass(frozen=True)
class Spent:
    """What runs of one kind cost: their steps, and medians of the seconds that each of them measured; of those alone
    that had the machine to themselves, where some had."""

    num_runs: int
    num_alone: int
    #: Loads of the machine that were measured beside the runs that were not alone.
    loads: tuple[float, ...]
    num_steps: int
    step_seconds: float
    #: What a live base would have added to a step; None of runs that read nothing of the base.
    base_step_seconds: float | None
    #: The base once over all that such a run reads.
    base_once_seconds: float | None

    @property
    def total(self) -> float:
        """Of all steps."""
        return self.num_steps * self.step_seconds

    @property
    def live_total(self) -> float | None:
        """The same with a live base in every step."""
        return None if self.base_step_seconds is None else self.total + self.num_steps * self.base_step_seconds


def spent_on(runs: Sequence[Run]) -> tuple[Spent | None, Spent | None]:
    """What the finished runs cost whose steps were measured: those that read the base, and those that do not."""
    outcomes = [run.outcome for run in runs if run.outcome is not None and run.outcome.cost.step_seconds is not None]
    reading = [o for o in outcomes if o.cost.base_step_seconds is not None]
    return _spent(reading), _spent([o for o in outcomes if o.cost.base_step_seconds is None])


def _spent(outcomes: Sequence[RunOutcome]) -> Spent | None:
    if not outcomes:
        return None
    costs = [outcome.cost for outcome in outcomes]

    measured = [cost for cost in costs if cost.alone] or costs

    def middle(value: Callable[[RunCost], float | None]) -> float | None:
        found = [v for v in map(value, measured) if v is not None]
        return median(found) if found else None

    step = middle(lambda c: c.step_seconds)
    assert step is not None
    return Spent(
        num_runs=len(costs),
        num_alone=sum(cost.alone for cost in costs),
        loads=tuple(cost.load for cost in costs if cost.load is not None and not cost.alone),
        num_steps=sum(outcome.num_steps for outcome in outcomes),
        step_seconds=step,
        base_step_seconds=middle(lambda c: c.base_step_seconds),
        base_once_seconds=middle(lambda c: c.base_once_seconds),
    )


def by_method(settings: Sequence[Setting], methods: Sequence[str] = ()) -> dict[str, list[Setting]]:
    """The settings of each method that has any, in the order of `methods` or else of the settings."""
    order = methods or list(dict.fromkeys(s.method for s in settings))
    return {m: found for m in order if (found := [s for s in settings if s.method == m])}


def varying(runs: Sequence[Run]) -> list[str]:
    """Fields other than the seed in which these runs differ, in the order of their settings."""
    names = dict.fromkeys(k for run in runs for k in run.settings if k != SEED)
    return [k for k in names if len({run.settings.get(k) for run in runs}) > 1]


def _frame(setting: Setting) -> dict[str, Scalar]:
    return {k: v for k, v in setting.values.items() if k not in OBJECTIVE}


def _point(setting: Setting) -> tuple[float, float]:
    return setting.learning.mean, setting.forgetting.mean
