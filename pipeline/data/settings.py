"""How the rows of a data set are found, read and rendered, in plain values without torch.

Owns the settings that every verb with data has. Must not read files or know tokenizers.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from logitcache.settings import Settings, option

Supervise = Literal["assistant", "last", "all"]


@dataclass(frozen=True)
class DataSettings(Settings):
    """Which rows of the data, and what of a chat is learnt."""

    heading: ClassVar[str] = "Rows of the data"

    split: str = option("", "Split to read of data that have several.  [default: train]", metavar="NAME")
    config_name: str = option("", "Configuration to read of a hub data set that has several.", metavar="NAME")
    streaming: bool = option(False, "Read a hub data set as it comes, and keep nothing of it on the disk.")
    skip_bad_rows: bool = option(False, "Count and list rows that cannot be used, and go on without them.")
    skipped_file: str = option("", "Where they are listed; from Python only. The verbs name it.", on_line=False)
    supervise: Supervise = option(
        "assistant", "What of a chat is learnt: every assistant turn, the last one alone, or every token."
    )
    chat_template: str = option("", "Jinja file to render chats with, instead of the tokenizer's own.", metavar="FILE")
    chat_template_kwargs: str = option(
        "", "What the chat template is given besides the messages, a JSON object.", metavar="JSON"
    )

    def determining(self) -> dict[str, Any]:
        """What decides which samples there are: all but how they are fetched."""
        return {name: value for name, value in self.plain().items() if name not in ("streaming", "skipped_file")}


OF_TEMPLATE = ("chat_template", "chat_template_kwargs")
"""Those that say what renders chats, and so with what those of a cache must have been rendered."""

DEFAULT = DataSettings()
"""All rows of the one split there is, none skipped; of a chat every assistant turn."""
