"""Logits of two widths over one vocabulary: what a cache says of the first V tokens, where its base had more.

Models pad their output embedding, each to a width of its own; no tokenizer knows the tokens there. Owns what becomes of
them: kept ones are absent, what is left renormalises in `formulas.base_outcomes`. What nobody can see is their share of
a tail that also holds known tokens; it stays there. Numpy only. Shapes: N positions, K alternatives, G groups, V common
tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.errors import InvalidBatch


@dataclass(frozen=True)
class VocabCut:
    """The first vocab_size tokens of a cache's wider vocabulary."""

    vocab_size: int
    #: uint8 [V], where it has tail groups.
    token_groups: NDArray[np.uint8] | None = None


def cut_columns(
    columns: Mapping[str, NDArray[Any]], label_ids: NDArray[np.int32], cut: VocabCut
) -> dict[str, NDArray[Any]]:
    """The columns of records (see `targets.target_columns`) as a base without the tokens from V on would have them.

    An alternative beyond V becomes absent: the label's id, log p -inf. A tail, or a group of it, in which no token
    below V is left becomes empty, and the whole tail loses what its groups lose. Draws are left out. Raises
    `InvalidBatch` for a label beyond V.
    """
    if len(label_ids) and int(label_ids.max()) >= cut.vocab_size:
        raise InvalidBatch(
            f"cutting a cache to {cut.vocab_size} tokens: found the label {int(label_ids.max())}, which is padding. "
            "No tokenizer makes it: look at where these token ids come from."
        )
    found = {name: column for name, column in columns.items() if not name.startswith("draw_")}
    ids, labels = columns["alternative_ids"], label_ids[:, None]
    beyond = ids >= cut.vocab_size
    ids = np.where(beyond, labels, ids)
    found["alternative_ids"] = ids
    found["alternative_logprobs"] = np.where(beyond, -np.inf, columns["alternative_logprobs"]).astype(np.float32)
    num_left = cut.vocab_size - 1 - (ids != labels).sum(axis=1)
    tail = columns["tail_logprobs"]
    if "tail_group_logprobs" in columns:
        assert cut.token_groups is not None
        groups = columns["tail_group_logprobs"]
        empty = _left_in_groups(ids, label_ids, cut.token_groups, groups.shape[1]) == 0
        kept = np.where(empty, -np.inf, groups)
        whole = np.logaddexp.reduce(groups.astype(np.float64), axis=1)
        share = np.logaddexp.reduce(kept.astype(np.float64), axis=1) - np.where(whole == -np.inf, 0.0, whole)
        tail = np.where(empty.any(axis=1), tail + np.minimum(share, 0.0), tail)  # else to the last bit what it was
        found["tail_group_logprobs"] = kept.astype(np.float32)
    found["tail_logprobs"] = np.where(num_left == 0, -np.inf, tail).astype(np.float32)
    return found


def _left_in_groups(
    ids: NDArray[Any], label_ids: NDArray[Any], token_groups: NDArray[np.uint8], num_groups: int
) -> NDArray[np.int64]:
    """How many tokens of each group are neither label nor kept, [N, G]; absent alternatives have the label's id."""
    left = np.broadcast_to(np.bincount(token_groups, minlength=num_groups), (len(ids), num_groups)).copy()
    rows = np.arange(len(ids))
    left[rows, token_groups[label_ids]] -= 1
    present = ids != label_ids[:, None]
    np.subtract.at(left, (np.nonzero(present)[0], token_groups[ids[present]]), 1)
    return left
