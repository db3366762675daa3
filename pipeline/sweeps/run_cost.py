"""What a run of a sweep cost, as its result.json keeps it: for who measures it (`cost`) and for the report alike.

Owns when a run counts as measured alone. Must not import torch.
"""

from dataclasses import asdict, dataclass
from typing import Any

SOME_LOAD = 0.5
"""What a machine may have to do beside a run that counts as measured alone."""


@dataclass(frozen=True)
class RunCost:
    """Seconds of a run, and of the base beside it, measured in one process; None where they were not, or are none."""

    #: Of the run itself, a step.
    step_seconds: float | None
    #: What a live base would have added to a step.
    base_step_seconds: float | None
    #: The base once over all that the run reads of it.
    base_once_seconds: float | None
    #: Processes that wanted a core, on average over the run's last minute; None where the system does not say.
    load: float | None
    #: How many of them may have been the run's own.
    own_threads: int

    @property
    def alone(self) -> bool:
        """Whether nothing else wanted a core of the machine; not, where the system does not say."""
        return self.load is not None and self.load <= self.own_threads + SOME_LOAD

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
