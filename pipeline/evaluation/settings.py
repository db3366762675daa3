"""Settings of `answers`, in plain values without torch. Must not know models or files."""

from dataclasses import dataclass

from logitcache.settings import Settings, option


@dataclass(frozen=True)
class AnswerSettings(Settings):
    """How long a model may answer, and how many prompts it answers at a time."""

    max_new_tokens: int = option(128, "Tokens an answer; a longer one ends there, is kept and counted.", at_least=1)
    batch_size: int = option(16, "Prompts at a time, those of similar length together.", at_least=1)
