"""What `evaluate --json` printed for another adapter, read again to be compared with.

Owns that nothing but a whole such file is taken: a share of a drift that was misread would be a wrong number. Must not
import torch.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from logitcache.errors import InvalidData
from logitcache.storage.plain_text import one_line, shown

MAX_BYTES = 2**20


@dataclass(frozen=True)
class PlainDrift:
    """The drift of an adapter on prior text, and of what it is."""

    #: Fingerprint of the base's tensors.
    weights: object
    #: Fingerprint of the base's config.json.
    config: object
    #: Fingerprint of the prior text.
    samples: object
    #: Of perplexity.
    percent: float
    #: KL(base || adapted), nats a token.
    kl_nats: float
    #: Alternatives of the cache that stood for the base, the rest being one outcome; None: the whole vocabulary.
    top_k: int | None


def read_plain(path: Path) -> PlainDrift:
    """The drift in a file. Raises OSError, and `InvalidData` where it is no such file, or of no adapter."""
    where = f"comparing with {path}"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} bytes")
        found = json.loads(data.decode())
        model, theirs = found["model"], found["prior"]
        weights, config = model["weights"], model["config"]
        samples, drift = theirs["samples"], theirs["drift_percent"]
        kl, top_k = theirs["kl_nats"], theirs["top_k"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        said = one_line(str(error).split("\n", maxsplit=1)[0], 200).rstrip(".")
        raise InvalidData(
            f"{where}: expected what `logitcache evaluate --json` prints, with prior text, found something else "
            f"({type(error).__name__}: {said}). Evaluate the plain adapter again with --json."
        ) from error
    for number in (drift, kl):
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not abs(number) <= sys.float_info.max:
            raise InvalidData(
                f"{where}: expected the drift and the KL of an adapter, found {shown(number)}. "
                "Evaluate the plain adapter with --adapter."
            )
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int)):
        raise InvalidData(
            f"{where}: expected a number of alternatives at top_k, or none, found {shown(top_k)}. "
            "Evaluate the plain adapter again with --json."
        )
    return PlainDrift(weights, config, samples, float(drift), float(kl), top_k)
