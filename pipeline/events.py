"""What jobs tell while they work: the types of the functions that they call, which print or count as they like.

Must not know any job, nor print.
"""

from collections.abc import Callable

Progress = Callable[[int], None]
"""Called with the number of tokens done since the last call."""

OnEvent = Callable[[str, dict[str, object]], None]
"""Called with the name of an event and what is known of it."""

OnMessage = Callable[[str], None]
"""Called with a sentence for people."""
