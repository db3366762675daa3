"""How a cache belongs to the model that is trained: what of it is checked, without torch."""

from dataclasses import dataclass
from typing import ClassVar

from logitcache.errors import InvalidSettings
from logitcache.settings import Settings, option


@dataclass(frozen=True)
class PairingRules(Settings):
    """By default the cache is of the very model that is trained, which is where training starts; that is checked.

    teacher_is_not_base: it is of another one with the same tokenizer. ignore_padding: where the two have logits of
    different widths, what lies beyond the narrower is no token of either. other_precision: the base may have been held
    in another format than the model is (8bit, 4bit or neither); then what that costs is measured before step 1, and
    refused above max_start_kl.
    """

    heading: ClassVar[str] = "How the cache belongs to the model"

    teacher_is_not_base: bool = option(
        False, "The cache is of another model with the same tokenizer: its weights and step 0 are not checked."
    )
    ignore_padding: bool = option(
        False, "Teacher and student pad their vocabularies to different widths: compare the tokens that both have."
    )
    other_precision: bool = option(
        False,
        "The cache is of the base with its weights in another format than --load-in: what that costs is measured.",
    )
    max_start_kl: float | None = option(
        None,
        "Largest KL to the base before step 1 with --other-precision, nats a position.  [default: .1 where the "
        "formats are 8bit and none, else 1]",
        above=0,
    )

    @property
    def teacher_is_base(self) -> bool:
        """Whether training starts at the distributions of the cache."""
        return not self.teacher_is_not_base

    def check_together(self) -> None:
        """Raise `InvalidSettings` for a rule that is of the other kind of teacher."""
        if self.other_precision and self.teacher_is_not_base:
            raise InvalidSettings("--other-precision is for the cache of the student's own base.")
        if self.max_start_kl is not None and not self.other_precision:
            raise InvalidSettings(
                "--max-start-kl goes with --other-precision: where weights are held alike, only noise lies between a "
                "model and its cache. Leave it out."
            )
