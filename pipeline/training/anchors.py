"""Anchors of a run: the KL to the base on samples of other caches, far from the new data, a term of the loss.

    loss = that of the new data + sum over anchor caches of weight * mean KL over the anchor's positions of the step

Owns which steps have anchors, the mean over the whole step however it is divided, and what an anchor cache is held
against before step 1. The samples are `pairing.anchors`', the way from batch to loss is `batch_loss`'s. Trade-off: new
and anchor samples are two forwards and one backward. One padded forward was slower wherever the two differ in length
(docs/log.md), and cannot be had of packed batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from logitcache.data.samples import Sample
from logitcache.data.settings import DEFAULT, DataSettings
from logitcache.errors import TrainingFailed
from logitcache.losses.formulas import Objective, Tail
from logitcache.models.head import unwrapped
from logitcache.models.loading import Base
from logitcache.pairing.anchors import AnchorSamples, anchor_samples, drawn, looked_up
from logitcache.pairing.identity_checks import PairingRules
from logitcache.pairing.inputs import opened
from logitcache.pairing.step_zero import StepZero
from logitcache.pairing.view import CacheView
from logitcache.storage import LogitCache

from .batch_loss import batch_loss
from .settings import AnchorSettings as AnchorSettings


@dataclass(frozen=True)
class Anchor:
    """A cache of what the base says far from the new data, and how much it counts."""

    #: A path, or an opened one. Its data sets say which samples it has; of a cache without any, all of it.
    cache: LogitCache | str | Path
    settings: AnchorSettings = field(default_factory=AnchorSettings)

    @property
    def open_cache(self) -> LogitCache:
        """The cache, opened anew where it is a path."""
        return LogitCache.open(self.cache) if isinstance(self.cache, (str, Path)) else self.cache

    def opened(self) -> "Anchor":
        """With its cache open, and what can be told without a model checked. Raises `TrainingFailed`, and what opening
        a cache raises."""
        cache = self.open_cache
        if self.settings.weight == 0:
            raise TrainingFailed(
                f"anchoring by {cache.path} with a weight of 0: it would be read and pull at nothing. Leave the anchor "
                "cache out, or give a weight above 0."
            )
        masked, kept = self.settings.regularizer != "full-kl", cache.manifest.capture
        if masked and not kept.top_k and not kept.num_tail_groups:
            raise TrainingFailed(
                f"anchoring by {cache.path} with {self.settings.regularizer}: expected alternatives to the true token "
                "in the cache, found none. Nothing would be compared. Use --anchor-regularizer full-kl, or a cache "
                "with a larger --top-k."
            )
        return replace(self, cache=cache)


@dataclass(frozen=True, eq=False)
class AnchorTerm:
    """An anchor that fits a model: one term of the loss. Make it with `AnchorTerm.paired`."""

    view: CacheView
    samples: Sequence[Sample]
    settings: AnchorSettings
    #: Of the order of the samples.
    seed: int
    _last: dict[int, AnchorSamples] = field(default_factory=dict, repr=False)

    @classmethod
    def paired(
        cls,
        anchor: Anchor,
        model: nn.Module | Base,
        seed: int,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        rules: PairingRules | None = None,
        how: DataSettings = DEFAULT,
    ) -> "AnchorTerm":
        """An anchor held against the model's own base, also where another teacher's cache goes with the new data.

        rules: of the run; in which number format the base may have been held is the anchor's too. how: with which chat
        template the run's chats are rendered, and the anchor's must have been.

        Raises what `CacheView.paired` and `Anchor.opened` raise, and `TrainingFailed` for a cache with fewer samples
        than a step is to have.
        """
        opened = anchor.opened().open_cache
        asked = rules or PairingRules()
        own = PairingRules(other_precision=asked.other_precision, max_start_kl=asked.max_start_kl)
        objective = _objective_of(opened, anchor.settings)
        view = CacheView.paired(opened, model, objective, tokenizer=tokenizer, rules=own, how=how)
        samples = anchor_samples(opened)
        if len(samples) < anchor.settings.batch:
            raise TrainingFailed(
                f"anchoring by {opened.path} with {anchor.settings.batch} samples a step: expected as many in the "
                f"cache, found {len(samples)}. A step would have a sample twice. Use a smaller --anchor-batch, or add "
                "samples by `logitcache precompute`."
            )
        view.require(samples)
        return cls(view, samples, anchor.settings, seed)

    def of_step(self, step: int) -> AnchorSamples | None:
        """What the step has of this anchor; None where it has nothing. step: of the optimizer, from 0."""
        if step % self.settings.every:
            return None
        if step not in self._last:
            numbers = drawn(len(self.samples), step // self.settings.every, self.settings.batch, self.seed)
            found = looked_up(self.view, [self.samples[i] for i in numbers.tolist()])
            self._last.clear()
            self._last[step] = found
        return self._last[step]

    def step_zero(self, model: nn.Module) -> StepZero:
        """KL(base || model) on a few of the samples. Raises `NotTheBase` where it is more than noise."""
        causal_lm = unwrapped(model)
        view = self.view if self.view.is_verified else self.view.held_against(causal_lm)
        return view.step_zero(causal_lm, self.samples)


@dataclass(frozen=True)
class AnchorLoss:
    """The part of a micro-batch in the term of each anchor, by the order of the anchors; all zero where it has none."""

    #: float32 scalar with gradient: the sum of weight * mean KL over the anchors, this part of it.
    loss: Tensor
    #: float32 [anchors]: KL summed over the positions of this part, in nats.
    sums: Tensor
    #: float32 [anchors]: the positions of the whole step that count, 1 where there are none.
    counts: Tensor
    #: float32 [anchors]: those of this part.
    counted: Tensor


class Anchors:
    """The anchors of a run, as terms of its loss."""

    def __init__(self, terms: Sequence[AnchorTerm] = ()) -> None:
        self.terms = tuple(terms)
        #: Whether the model needs the mask of padding, which here is on the right (`models.causal.needs_mask`).
        self.masked = True

    def __len__(self) -> int:
        return len(self.terms)

    @property
    def samples(self) -> list[Sample]:
        """Of all anchors."""
        return [sample for term in self.terms for sample in term.samples]

    @property
    def weights(self) -> list[float]:
        """Of the terms, in their order."""
        return [term.settings.weight for term in self.terms]

    def due(self, step: int) -> NDArray[np.int64]:
        """1 for each of the terms that a step has, else 0. step: of the optimizer, from 0."""
        return np.array([step % term.settings.every == 0 for term in self.terms], dtype=np.int64)

    def step_zero(self, model: nn.Module) -> list[StepZero]:
        """KL(base || model) on a few samples of each. Raises `NotTheBase` where it is more than noise."""
        return [term.step_zero(model) for term in self.terms]

    def loss(self, model: nn.Module, step: int, index: int, of: int, device: torch.device) -> AnchorLoss:
        """The share of one micro-batch in the terms of its step: the samples index, index + of, ... of each anchor.

        step: of the optimizer, from 0; index and of: which of all micro-batches of the step this is, over all
        processes. The model inside its distributed wrapper is run: that one prepares for one forward a backward, which
        the new data's is. Raises as `batch_loss`, and ValueError for a part that there is not.
        """
        inner, num = unwrapped(model), len(self)
        loss = torch.zeros((), device=device)
        sums, counts, counted = (torch.zeros(num, device=device) for _ in range(3))
        for i, term in enumerate(self.terms):
            whole = term.of_step(step)
            if whole is None:
                continue
            num_counted, part = max(whole.num_counted, 1), whole.part(index, of)
            counts[i].fill_(num_counted)  # assigned, each would be copied from the host
            counted[i].fill_(part.num_counted)
            if not part.samples:
                continue
            batch = part.batch(device, term.view.objective.tail)
            batch = batch if self.masked else opened(batch)
            found = batch_loss(inner, batch, term.view.objective, term.settings.weight, term.view)
            loss, sums[i] = loss + found.loss / num_counted, found.kl
        return AnchorLoss(loss, sums, counts.clamp(min=1), counted)


def anchors_of(
    anchor: "Anchor | Anchors | Sequence[Anchor]", model: nn.Module, seed: int, rules: PairingRules | None
) -> Anchors:
    """What a trainer or a loop was given, held against its model. rules: how the cache of the new data belongs to it.

    Raises as `AnchorTerm.paired`.
    """
    if isinstance(anchor, Anchors):
        return anchor
    given = [anchor] if isinstance(anchor, Anchor) else anchor
    return Anchors([AnchorTerm.paired(each, model, seed, rules=rules) for each in given])


def named_means(totals: Sequence[float], num_steps: NDArray[np.int64]) -> dict[str, float]:
    """What the logs have of the anchors: `anchor_kl`, of several the mean of theirs, and then each as anchor_kl_1, ...

    totals: the sums of each one's means over num_steps steps. An anchor that no step had has no value.
    """
    means = {i: total / num for i, (total, num) in enumerate(zip(totals, num_steps.tolist(), strict=True), 1) if num}
    named = {"anchor_kl": sum(means.values()) / len(means)} if means else {}
    return named if len(totals) < 2 else {**named, **{f"anchor_kl_{i}": value for i, value in means.items()}}


def _objective_of(cache: LogitCache, settings: AnchorSettings) -> Objective:
    tail: Tail = "groups" if cache.manifest.capture.num_tail_groups else "bucket"
    return Objective(settings.regularizer, tail, settings.weight)
