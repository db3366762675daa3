"""A synthetic teacher: next-token distributions over a large vocabulary, for measuring records without a model.

Owns the distributions the size and speed benchmarks are run on, and nothing of how they are stored: no file is
written, and `logitcache.storage` is imported only inside `samples`. With V tokens the logits of a row are

    z(token) = 1.6 log u(token) + sigma g(token) [+ 1.5 o(group of token)],    g, o ~ N(0, 1), sigma ~ U(2, 6) a row
    u(token) = 1 / (rank + 2.7),    rank = argsort(argsort(log(id + 10) + 0.7 N(0, 1)))

and the label is drawn from softmax(z). u and the groups belong to the teacher: they are the same for every seed.
Row i depends on seed and i alone, so fewer rows are a prefix of more, and another `top_k` keeps more of the same rows.
The price of independent noise on every token: neighbouring rows share no more than u, where a text's are correlated.

    python scripts/synthetic_teacher.py        prints the constants and 2.46 nats mean entropy, mass .944 of the best 64
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from logitcache.storage import CachedSample

VOCABULARY_SIZE = 151_936
UNIGRAM_EXPONENT, RANK_OFFSET = 1.6, 2.7
ID_OFFSET, RANK_JITTER = 10, 0.7
MIN_SIGMA, MAX_SIGMA = 2.0, 6.0
GROUP_STD_NATS, GROUP_CONCENTRATION, MAX_GROUPS = 1.5, 2.0, 256
VOCABULARY_SEED = 20_260
SLICE_ROWS = 64
MASS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Rows:
    """What the teacher predicts at N positions, in nats. N rows, K alternatives, G tail groups, V vocabulary.

    label_ids:             uint32 [N], drawn from the row's distribution
    label_logprobs:        float32 [N]
    alternative_ids:       uint32 [N, K], the most probable tokens other than the label, most probable first
    alternative_logprobs:  float32 [N, K]
    tail_logprobs:         float32 [N], the mass of everything else; -inf where there is nothing else
    tail_group_logprobs:   float32 [N, G], the tail's mass by group; -inf where a group has none. G may be 0
    token_groups:          uint8 [V], group of each token; [0] where G is 0
    vocab_size:            V
    """

    label_ids: NDArray[np.uint32]
    label_logprobs: NDArray[np.float32]
    alternative_ids: NDArray[np.uint32]
    alternative_logprobs: NDArray[np.float32]
    tail_logprobs: NDArray[np.float32]
    tail_group_logprobs: NDArray[np.float32]
    token_groups: NDArray[np.uint8]
    vocab_size: int

    def __len__(self) -> int:
        return len(self.label_ids)


@dataclass(frozen=True)
class Vocabulary:
    """What all rows share: the scaled log-unigram, float32 [V], and the group of each token, uint8 [V] or [0]."""

    unigram_nats: NDArray[np.float32]
    token_groups: NDArray[np.uint8]
    num_groups: int

    @classmethod
    def of(cls, vocab_size: int, num_groups: int) -> Vocabulary:
        """The teacher's vocabulary; groups are of unequal size, categorical with Dirichlet(2) weights."""
        jittered = np.log(np.arange(vocab_size) + ID_OFFSET)
        jittered += RANK_JITTER * np.random.default_rng(VOCABULARY_SEED).standard_normal(vocab_size)
        unigram = -UNIGRAM_EXPONENT * np.log(np.argsort(np.argsort(jittered)) + RANK_OFFSET)
        groups = np.empty(0, np.uint8)
        if num_groups:
            rng = np.random.default_rng((VOCABULARY_SEED, num_groups))
            weights = rng.dirichlet(np.full(num_groups, GROUP_CONCENTRATION))
            groups = rng.choice(num_groups, size=vocab_size, p=weights).astype(np.uint8)
        return cls(unigram.astype(np.float32), groups, num_groups)


def rows(num_rows: int, top_k: int, seed: int, vocab_size: int = VOCABULARY_SIZE, num_groups: int = 0) -> Rows:
    """Rows of the synthetic teacher: label, the best `top_k` others, and the tail, which is summed, never 1 - sum.

    Raises ValueError for sizes that do not fit, and where a row's masses do not sum to 1 within 1e-4 in float32.
    """
    if not (num_rows > 0 and 0 < top_k < vocab_size and 0 <= num_groups <= MAX_GROUPS):
        raise ValueError(
            f"Sizes of the synthetic teacher: expected at least one row, 0 < top_k < vocab_size = {vocab_size} and at "
            f"most {MAX_GROUPS} groups, found {num_rows} rows, top_k {top_k}, {num_groups} groups. Change the sizes."
        )
    vocabulary = Vocabulary.of(vocab_size, num_groups)
    parts = [_record(probs, labels, top_k, vocabulary) for probs, labels in slices(num_rows, seed, vocabulary)]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    result = Rows(**columns, token_groups=vocabulary.token_groups, vocab_size=vocab_size)
    _check_masses(result)
    return result


def slices(num_rows: int, seed: int, vocabulary: Vocabulary) -> Iterator[tuple[NDArray[np.float64], NDArray[np.int64]]]:
    """Probabilities float64 [n, V] and labels int64 [n], n at most 64 rows at a time."""
    vocab_size = len(vocabulary.unigram_nats)
    for start in range(0, num_rows, SLICE_ROWS):
        num = min(SLICE_ROWS, num_rows - start)
        by_row = np.random.default_rng((seed, start // SLICE_ROWS, 0))
        sigma = by_row.uniform(MIN_SIGMA, MAX_SIGMA, SLICE_ROWS).astype(np.float32)[:num]
        uniform = by_row.random(SLICE_ROWS)[:num]
        offsets = by_row.standard_normal((SLICE_ROWS, vocabulary.num_groups), dtype=np.float32)[:num]
        by_token = np.random.default_rng((seed, start // SLICE_ROWS, 1))
        logits = by_token.standard_normal((num, vocab_size), dtype=np.float32)
        logits *= sigma[:, None]
        logits += vocabulary.unigram_nats
        if vocabulary.num_groups:
            logits += (np.float32(GROUP_STD_NATS) * offsets)[:, vocabulary.token_groups]
        probs = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
        probs /= probs.sum(axis=1, keepdims=True)
        yield probs, _draw(probs, uniform)


def samples(rows: Rows, rows_a_sample: int, seed: int = 0) -> list[CachedSample]:
    """Consecutive rows as samples of P = `rows_a_sample` positions and P + 1 tokens; the last may be shorter.

    Token t+1 is the label of row t, token 0 is random. Positions are 0..P-1.
    """
    from logitcache.storage import BaseLogprobs, CachedSample

    first_tokens = np.random.default_rng(seed)
    result = []
    for start in range(0, len(rows), rows_a_sample):
        part = slice(start, start + rows_a_sample)
        labels = rows.label_ids[part]
        first = first_tokens.integers(rows.vocab_size, size=1, dtype=np.uint32)
        record = BaseLogprobs(
            positions=np.arange(len(labels), dtype=np.int32),
            label_ids=labels,
            label_logprobs=rows.label_logprobs[part],
            alternative_ids=rows.alternative_ids[part],
            alternative_logprobs=rows.alternative_logprobs[part],
            tail_logprobs=rows.tail_logprobs[part],
            **({"tail_group_logprobs": rows.tail_group_logprobs[part]} if rows.tail_group_logprobs.size else {}),
        )
        result.append(CachedSample(np.concatenate([first, labels]), record))
    return result


def _draw(probs: NDArray[np.float64], uniform: NDArray[np.float64]) -> NDArray[np.int64]:
    """One token a row by inversion, int64 [n]; a token without probability is never drawn."""
    cumulative = np.cumsum(probs, axis=1)
    drawn = [np.searchsorted(row, u * row[-1], side="right") for row, u in zip(cumulative, uniform, strict=True)]
    return np.asarray(drawn, dtype=np.int64)


def _record(
    probs: NDArray[np.float64], labels: NDArray[np.int64], top_k: int, vocabulary: Vocabulary
) -> dict[str, NDArray[np.generic]]:
    """The record's columns of one slice. Takes `probs` over: what is kept becomes 0 in it."""
    num, groups = len(probs), vocabulary.num_groups
    label_probs = probs[np.arange(num), labels]
    probs[np.arange(num), labels] = -1.0  # the label is no alternative, and comes last
    best = np.argpartition(probs, probs.shape[1] - top_k, axis=1)[:, -top_k:]
    best = np.take_along_axis(best, np.argsort(-np.take_along_axis(probs, best, axis=1), axis=1, kind="stable"), axis=1)
    best_probs = np.take_along_axis(probs, best, axis=1)
    probs[np.arange(num), labels] = 0.0
    np.put_along_axis(probs, best, 0.0, axis=1)
    by_group = np.zeros((num, groups))
    for row in range(num if groups else 0):
        by_group[row] = np.bincount(vocabulary.token_groups, weights=probs[row], minlength=groups)
    with np.errstate(divide="ignore"):  # log 0 is -inf: no mass
        return {
            "label_ids": labels.astype(np.uint32),
            "label_logprobs": np.log(label_probs).astype(np.float32),
            "alternative_ids": best.astype(np.uint32),
            "alternative_logprobs": np.log(best_probs).astype(np.float32),
            "tail_logprobs": np.log(probs.sum(axis=1)).astype(np.float32),
            "tail_group_logprobs": np.log(by_group).astype(np.float32),
        }


def _check_masses(rows: Rows) -> None:
    """Raises ValueError unless label + alternatives + tail, and label + alternatives + groups, are 1 in float32."""
    kept = np.exp(rows.label_logprobs) + np.exp(rows.alternative_logprobs).sum(axis=1)
    totals = [kept + np.exp(rows.tail_logprobs)]
    if rows.tail_group_logprobs.size:
        totals.append(kept + np.exp(rows.tail_group_logprobs).sum(axis=1))
    for what, total in zip(("tail", "tail groups"), totals, strict=False):
        worst = int(np.argmax(np.abs(total - 1)))
        if not abs(float(total[worst]) - 1) <= MASS_TOLERANCE:
            raise ValueError(
                f"Masses of label, alternatives and {what} in row {worst} of the synthetic teacher: expected 1 within "
                f"{MASS_TOLERANCE}, found {total[worst]}. The rows are no distributions. Check the generator."
            )


def main() -> None:
    """Print the constants and what the distributions are like."""
    parser = argparse.ArgumentParser(description="What the synthetic teacher's distributions are like.")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab-size", type=int, default=VOCABULARY_SIZE)
    parser.add_argument("--groups", type=int, default=0)
    args = parser.parse_args()
    vocabulary = Vocabulary.of(args.vocab_size, args.groups)
    every_slice = slices(args.rows, args.seed, vocabulary)
    parts = [-(probs * np.log(np.where(probs > 0, probs, 1))).sum(axis=1) for probs, _ in every_slice]
    entropy = np.concatenate(parts)
    made = rows(args.rows, args.top_k, args.seed, args.vocab_size, args.groups)
    kept = np.exp(np.column_stack([made.label_logprobs, made.alternative_logprobs]))
    best = np.sort(kept, axis=1)[:, -args.top_k :].sum(axis=1)  # of label and K others, the best K of all
    outside = np.mean(made.label_logprobs < made.alternative_logprobs[:, -1])
    print(
        f"V {args.vocab_size:,}, {args.rows:,} rows, seed {args.seed}; {args.groups} groups, std {GROUP_STD_NATS} nats"
    )
    print(
        f"logits {UNIGRAM_EXPONENT} log(1 / (rank + {RANK_OFFSET})) + sigma N(0, 1), sigma {MIN_SIGMA} to {MAX_SIGMA}"
    )
    print(f"rank of log(id + {ID_OFFSET}) + {RANK_JITTER} N(0, 1), vocabulary seed {VOCABULARY_SEED}")
    print(f"mean entropy {entropy.mean():.3f} nats (standard error {entropy.std() / np.sqrt(args.rows):.3f})")
    print(f"mean -log p(label) {-made.label_logprobs.mean():.3f} nats")
    print(f"mass of the best {args.top_k} {best.mean():.4f}, labels outside them {outside:.2%}")


if __name__ == "__main__":
    main()
