"""What is learnt of a chat in ChatML, from the definition: each turn is a header, what is said, and an end; of an
assistant's turn all but the header is learnt. Written without the code that it is held against.

For a tokenizer whose tokens are bytes, so that each byte's label is known by hand.
"""

from typing import Any

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""By prefixes: an assistant's turn is learnt to the end of its line."""

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""By markers: an assistant's turn is learnt to its end mark."""


def chatml_bytes(messages: list[dict[str, Any]], line_is_learnt: bool) -> tuple[bytes, list[bool]]:
    """The bytes of a chat whose contents are strings, and for each whether it is learnt."""
    text, learnt = b"", []
    for message in messages:
        said = [
            (f"<|im_start|>{message['role']}\n", False),
            (message["content"] + "<|im_end|>", message["role"] == "assistant"),
            ("\n", message["role"] == "assistant" and line_is_learnt),
        ]
        for piece, counts in said:
            text += piece.encode()
            learnt += [counts] * len(piece.encode())
    return text, learnt
