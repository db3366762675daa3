"""The weight of the regulariser, adapted so that its mean meets a budget of nats a position.

minimise CE subject to KL <= X: the weight is the multiplier of the constraint. It is moved in the log, by the log of
the ratio, as a proportional-integral controller: log w = i + p, where i gains integral * log(KL / X) every time (dual
ascent) and p = proportional * log(KL / X) answers at once, which dual ascent alone, slow and swinging, would not within
a short run. The KL of steps is smoothed over a few of them. It starts at 0, whatever the weight: until it has met the
budget once, i falls slowly and p is left out, so that the start does not push the weight down. Tensors and models are
unknown here.
"""

import math
from dataclasses import dataclass

MAX_RATIO = 4.0
LEAST_WEIGHT, GREATEST_WEIGHT = 1e-4, 1e4


@dataclass(frozen=True)
class Gains:
    """How a weight answers to a KL."""

    #: Share of the mean of the KLs before in their mean with the next one.
    smoothing: float
    #: Of the log of the ratio, every time, once the budget has been met, and before.
    integral: float
    integral_before: float
    #: Of the log of the ratio now.
    proportional: float


EVERY_STEP = Gains(smoothing=0.7, integral=0.15, integral_before=0.02, proportional=0.5)
"""For the KL of a batch: it is noisy, and comes often."""

EVERY_EVALUATION = Gains(smoothing=0.0, integral=0.5, integral_before=0.1, proportional=0.5)
"""For the KL of an evaluation: it is of the same text every time, and a run has ten of them."""


@dataclass
class BudgetedWeight:
    """kl_budget: nats a position; weight: loss per nat, now; smoothed: running mean of KL, 0 before the first one."""

    kl_budget: float
    weight: float
    gains: Gains = EVERY_STEP
    smoothed: float = 0.0
    log_integral: float | None = None
    was_met: bool = False

    def update(self, kl_nats: float) -> float:
        """The weight from here on, after a KL of this was found."""
        if not math.isfinite(kl_nats):  # the trainer stops such a run
            return self.weight
        if self.log_integral is None:
            self.log_integral = math.log(max(self.weight, LEAST_WEIGHT))
        kept = self.gains.smoothing
        self.smoothed = kept * self.smoothed + (1 - kept) * max(kl_nats, 0.0)
        error = math.log(max(self.smoothed, 1e-12) / self.kl_budget)
        error = min(max(error, -math.log(MAX_RATIO)), math.log(MAX_RATIO))
        least, greatest = math.log(LEAST_WEIGHT), math.log(GREATEST_WEIGHT)
        self.was_met = self.was_met or error >= 0
        gain, answer = self.gains.integral_before, 0.0
        if self.was_met:
            gain, answer = self.gains.integral, self.gains.proportional * error
        self.log_integral = min(max(self.log_integral + gain * error, least), greatest)
        self.weight = math.exp(min(max(self.log_integral + answer, least), greatest))
        return self.weight
