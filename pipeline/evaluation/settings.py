"""Settings of `answers` and of the curve between base and adapter, in plain values without torch.

Must not know models or files.
"""

from dataclasses import dataclass
from typing import ClassVar

from logitcache.errors import InvalidSettings
from logitcache.settings import Settings, option


@dataclass(frozen=True)
class AnswerSettings(Settings):
    """How long a model may answer, and how many prompts it answers at a time."""

    heading: ClassVar[str] = "Answers"

    max_new_tokens: int = option(128, "Tokens an answer; a longer one ends there, is kept and counted.", at_least=1)
    batch_size: int = option(16, "Prompts at a time, those of similar length together.", at_least=1)


@dataclass(frozen=True)
class ScaleSettings(Settings):
    """Where the curve between base and adapted model is measured (`evaluation.scales`)."""

    heading: ClassVar[str] = "Between base and adapter"

    scales: tuple[float, ...] = option(
        (0.0, 0.25, 0.5, 0.75, 1.0),
        "Parts of the adapter's change at which the model is measured too, 0 the base and 1 the whole.",
        at_least=0,
        at_most=2,
        metavar="S,S,...",
    )

    def check_together(self) -> None:
        """Raise `InvalidSettings` where a part stands twice."""
        if len(set(self.scales)) < len(self.scales):
            listed = ",".join(f"{scale:g}" for scale in self.scales)
            raise InvalidSettings(f"--scales {listed}: expected different numbers. Each would be measured twice.")
