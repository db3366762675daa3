"""Over which processes the loss of a step is a mean, and proof, at a run's first step, that the trainer keeps to it.

Owns how many processes see one batch together, what keeps a Trainer of any version from dividing a loss that is
normalised already, and the check of the first step. Must not compute losses, nor import `trainer`.
Trade-off: the check asks the device for numbers, once a run; a trainer that changes its mind later is not noticed.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from logitcache.errors import TrainingFailed

TOLERANCE = 1e-3
"""Relative: of what a step's loss is from what it should be."""

_NORMALISED = {"loss_is_scaled_for_ga": True, "model_accepts_loss_kwargs": True}
"""What a Trainer reads before it divides the loss of a micro-batch by their number: the first since transformers 5.19,
which goes before the second; versions before know the second alone."""


@contextmanager
def already_normalised(trainer: Any) -> Iterator[None]:
    """Inside, no version of the Trainer divides what `compute_loss` returns.

    Outside, all is as the trainer has set it, since its own evaluation reads the second too, and TRL's `__init__` the
    first: with transformers before 5.19 it then sets a `compute_loss_func` that is none.
    """
    own = vars(trainer)
    before = {name: own[name] for name in _NORMALISED if name in own}
    own.update(_NORMALISED)
    try:
        yield
    finally:
        for name in _NORMALISED:
            own.pop(name, None)
        own.update(before)


def parallelism(trainer: Any, kind: str) -> int:
    """Processes of a group that runs one batch together: kind tp, cp or sp.

    Of the trainer's own method and of what accelerate was told: not every version of the one knows the other.
    """
    size = getattr(trainer, f"get_{kind}_size", None)
    told = getattr(getattr(trainer.accelerator, "parallelism_config", None), f"{kind}_size", None)
    return max(1 if size is None else int(size()), told or 1)


def num_replicas(trainer: Any) -> int:
    """Processes that hold one model together, see one batch, and each find the same loss: of tensor parallelism."""
    return parallelism(trainer, "tp")


def over_processes(trainer: Any, sums: Tensor) -> Tensor:
    """The sum over all processes; those that see one batch together count as one."""
    total: Tensor = trainer.accelerator.reduce(sums.clone(), reduction="sum")
    return total / num_replicas(trainer) if total.is_floating_point() else total // num_replicas(trainer)


class FirstStep:
    """The loss of a run's first optimizer step, told three ways, which must agree before it is made.

    What `training_step` returned, averaged over processes; what is logged; and sums over positions by their number,
    which know nothing of how the step was divided. A step without positions proves nothing, so the next one is asked.
    """

    def __init__(self, device: torch.device, num_means: int) -> None:
        """num_means: terms of the loss that are each a mean over positions: CE, regulariser, then every anchor's."""
        self.pending = True
        self._number, self._num_means = 1, num_means
        self._sums = torch.zeros(2 + 2 * num_means, device=device)
        self._made = torch.zeros((), device=device)

    def begin(self, number: int) -> None:
        """What comes is of another step, or of another try of the same. number: from 1."""
        self._number = number
        self._sums.zero_()

    def add_returned(self, loss: Tensor) -> None:
        """Of a micro-batch, as `backward` had it."""
        self._sums[0] += loss.detach().to(self._sums)

    @contextmanager
    def watching(self, trainer: Any) -> Iterator[None]:
        """Inside, what is added to `compute_loss` counts as a term of its own: by a class above the mixin, or by a
        function that was set on the trainer itself, which stays."""
        outermost, own = trainer.compute_loss, vars(trainer).get("compute_loss")

        def compute_loss(*args: Any, **kwargs: Any) -> Any:
            found = outermost(*args, **kwargs)
            loss = found[0] if isinstance(found, tuple) else found
            self._sums[1] += (loss.detach() - self._made).to(self._sums)
            return found

        vars(trainer)["compute_loss"] = compute_loss
        try:
            yield
        finally:
            vars(trainer).pop("compute_loss", None)
            if own is not None:
                trainer.compute_loss = own

    def add_terms(self, sums: Sequence[Tensor], counts: Sequence[Tensor], others: Tensor, loss: Tensor) -> None:
        """Of a micro-batch: the sum of each mean's values, the positions of each, and what else this process's share of
        the loss has, weighted (a penalty, the same on every process); and that share, all of it."""
        self._made = loss.detach()
        self._sums[1:] += torch.stack([part.detach().to(self._sums) for part in (others, *sums, *counts)])

    def check(self, trainer: Any, logged: Tensor, weights: Sequence[float]) -> None:
        """Raise `TrainingFailed` where the three differ. logged: this process's share of each mean; weights: of each.

        All processes must call it, and all raise together.
        """
        if not self.pending:
            return
        found = trainer.accelerator.reduce(torch.cat([self._sums, logged]), reduction="sum").tolist()
        returned, others = (value / trainer.accelerator.num_processes for value in found[:2])
        sums, counts, in_logs = (found[2 + i * self._num_means :][: self._num_means] for i in range(3))
        self.pending = counts[0] == 0
        means = [total / max(count, 1) for total, count in zip(sums, counts, strict=True)]
        in_logs = [value / num_replicas(trainer) for value in in_logs]
        weighted, logged_weighted = (
            [w * value if w else 0.0 for w, value in zip(weights, values, strict=True)] for values in (means, in_logs)
        )
        expected, in_log = sum(weighted) + others, sum(logged_weighted) + others
        tolerance = TOLERANCE * (sum(map(abs, weighted)) + abs(others)) + 1e-6
        if not math.isfinite(expected) or all(abs(value - expected) <= tolerance for value in (returned, in_log)):
            return  # `trainer` stops a run whose loss is not finite
        terms = f"CE {means[0]:.6g} + {weights[1]:g} * KL {means[1]:.6g}"
        terms += "".join(f" + {w:g} * anchor KL {kl:.6g}" for w, kl in zip(weights[2:], means[2:], strict=True))
        raise TrainingFailed(
            f"training, step {self._number}: expected a loss of {expected:.6g} ({terms}"
            f"{f' + {others:.6g}' if others else ''}), found {returned:.6g} in what "
            f"{type(trainer).__name__}.training_step returned and {in_log:.6g} in the log. Every gradient is off by "
            "as much. Nothing was saved. Put CachedKL before transformers' Trainer or TRL's SFTTrainer itself: "
            "what lies between scales the loss, or hides the positions of the whole step."
        )
