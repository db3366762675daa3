"""What a cache is to hold and how it is cut into shards: the settings of a capture.

Must not know models or data.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class PrecomputeSettings:
    """top_k: alternatives a position; max_length: tokens a sample; batch_tokens: padded tokens a
    forward; shard_positions: positions a shard, the most that a kill can lose; store: zarr or arrow; precision: exact,
    fine or compact; min_mass: keep the fewest alternatives with this share of the non-target mass (1: all top_k);
    tail_groups: parts of the vocabulary to split the tail by (0: none); tail_samples: draws from the tail (0: none)."""

    top_k: int = 64
    max_length: int = 1024
    batch_tokens: int = 8192
    shard_positions: int = 32_768
    store: str = "zarr"
    precision: str = "fine"
    min_mass: float = 1.0
    tail_groups: int = 0
    tail_samples: int = 0

    def fitted(self, vocab_size: int) -> "PrecomputeSettings":
        """top_k and tail_groups no larger than the vocabulary allows; no groups where there is no tail."""
        top_k = min(self.top_k, vocab_size - 1)
        groups = min(self.tail_groups, vocab_size) if top_k < vocab_size - 1 else 0
        return replace(self, top_k=top_k, tail_groups=groups)
