"""The weight of the regulariser, adapted so that its mean meets a budget of nats a position.

minimise CE subject to KL <= X: the weight is the multiplier of the constraint. It is moved in the log, by the log of
the ratio, as a proportional-integral controller: log w = i + p, where i gains INTEGRAL * log(KL / X) every step (dual
ascent) and p = PROPORTIONAL * log(KL / X) answers at once, which dual ascent alone, slow and swinging, would not within
a short run. KL is smoothed over a few steps. It starts at 0, whatever the weight: until it has met the budget once, i
falls slowly and p is left out, so that the start does not push the weight down. Tensors and models are unknown here.
"""

import math
from dataclasses import dataclass

SMOOTHING = 0.7
INTEGRAL, INTEGRAL_BEFORE = 0.15, 0.02
PROPORTIONAL = 0.5
MAX_RATIO = 4.0
LEAST_WEIGHT, GREATEST_WEIGHT = 1e-4, 1e4


@dataclass
class BudgetedWeight:
    """kl_budget: nats a position; weight: loss per nat, now; smoothed: running mean of KL, 0 before the first step."""

    kl_budget: float
    weight: float
    smoothed: float = 0.0
    log_integral: float | None = None
    was_met: bool = False

    def update(self, kl_nats: float) -> float:
        """The weight of the next step, after one whose mean KL was this."""
        if not math.isfinite(kl_nats):  # the trainer stops such a run
            return self.weight
        if self.log_integral is None:
            self.log_integral = math.log(max(self.weight, LEAST_WEIGHT))
        self.smoothed = SMOOTHING * self.smoothed + (1 - SMOOTHING) * max(kl_nats, 0.0)
        error = math.log(max(self.smoothed, 1e-12) / self.kl_budget)
        error = min(max(error, -math.log(MAX_RATIO)), math.log(MAX_RATIO))
        least, greatest = math.log(LEAST_WEIGHT), math.log(GREATEST_WEIGHT)
        self.was_met = self.was_met or error >= 0
        gain, answer = (INTEGRAL, PROPORTIONAL * error) if self.was_met else (INTEGRAL_BEFORE, 0.0)
        self.log_integral = min(max(self.log_integral + gain * error, least), greatest)
        self.weight = math.exp(min(max(self.log_integral + answer, least), greatest))
        return self.weight
