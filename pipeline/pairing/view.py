"""`CacheView`: a cache as one model and one objective read it; whoever holds one knows that they fit.

Owns the order of all checks of a pairing, so that the command line, the plug-ins and the integrations make the same
ones, and what follows from a pairing: how many tokens and alternatives are compared, and the tail groups. The checks
themselves are in `identity_checks` and `step_zero`. Must not train.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from logitcache.data.chat_templates import template_digests
from logitcache.data.samples import Sample
from logitcache.data.settings import DEFAULT, DataSettings
from logitcache.losses.formulas import Objective
from logitcache.models.head import causal_lm_of
from logitcache.models.loading import Base
from logitcache.models.sharding import is_sharded
from logitcache.storage import LogitCache

from .base_in_memory import check_config, check_weights
from .identity_checks import (
    PairingRules,
    check_identity,
    check_precision,
    check_samples,
    check_tail,
    check_templates,
    check_tokens,
    check_width,
    common_width,
)
from .step_zero import Probe, StepZero, check_first_batch, probe_step_zero
from .targets import Batch, CachedCollator, Collator, collated, cut_of, groups_of
from .vocab_cut import VocabCut

NO_TOKENIZER = "the tokenizer (a model in memory has none)"
IN_PIECES = "weights (FSDP or ZeRO-3 divides them over processes)"


@dataclass(frozen=True, eq=False)
class CacheView:
    """A cache that fits a model and an objective. Make one with `CacheView.paired`."""

    cache: LogitCache
    objective: Objective
    rules: PairingRules
    top_k: int | None
    """Alternatives read a position; None: all that the cache has."""
    vocab_size: int | None
    """The first tokens of both vocabularies, which are compared; None: all, and both have the same."""
    left_out: tuple[str, ...]
    """What could not be compared, and why, a phrase each."""
    is_verified: bool
    """Whether the configuration and every weight were held against the checkpoint of the base (of a model in memory:
    every frozen one, by `held_against`)."""
    _cut: VocabCut | None = field(repr=False)
    _groups: dict[torch.device, Tensor] = field(repr=False)
    _templates: Callable[[], frozenset[str]] | None = field(repr=False)

    @classmethod
    def paired(
        cls,
        cache: LogitCache | str | Path,
        model: nn.Module | Base,
        objective: Objective,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        top_k: int | None = None,
        rules: PairingRules | None = None,
        how: DataSettings = DEFAULT,
    ) -> "CacheView":
        """The cache, held against a model and an objective.

        model: a `Base`, whose folder says which weights, configuration and tokenizer it has; or a module as a trainer
        has it, of which none of these is known. how: with which template the model's chats are rendered.
        Raises `IdentityMismatch`, `NotTheBase` (another number of logits),
        `TrainingFailed` (the objective asks for what the cache does not hold), and what opening a cache raises.
        """
        rules = PairingRules() if rules is None else rules
        opened = LogitCache.open(cache) if isinstance(cache, (str, Path)) else cache
        check_tail(opened, objective, top_k)
        module: nn.Module = model.model if isinstance(model, Base) else model
        left_out: tuple[str, ...] = (NO_TOKENIZER,)
        if isinstance(model, Base):
            check_identity(opened, model, tokenizer, rules)
            left_out = check_weights(opened, module, model.source.folder) if rules.teacher_is_base else ()
        if rules.teacher_is_base:
            check_precision(module, opened, rules.other_precision)
        vocab_size = common_width(module, opened) if rules.ignore_padding else None
        check_width(module, opened, objective, vocab_size)
        groups = groups_of(opened, vocab_size) if objective.tail == "groups" else None
        places = {} if groups is None else {groups.device: groups}
        has_templates = tokenizer is not None and rules.teacher_is_base
        templates = partial(template_digests, tokenizer, how) if has_templates else None
        cut = cut_of(opened, vocab_size)
        return cls(opened, objective, rules, top_k, vocab_size, left_out, not left_out, cut, places, templates)

    @classmethod
    def of(
        cls, cache: "AnyCache", model: nn.Module, objective: Objective, top_k: int | None, rules: PairingRules | None
    ) -> "CacheView":
        """The view itself, if it is one, held against the model's width; else `paired`."""
        if not isinstance(cache, CacheView):
            return cls.paired(cache, model, objective, top_k=top_k, rules=rules)
        cache.check_width(model)
        return cache

    def held_against(self, model: nn.Module, in_pieces: bool = False, untrained: bool = False) -> "CacheView":
        """The view, once configuration and frozen weights of a model in memory are those of the cache's base.

        in_pieces: the model is, or will be, divided over processes, which may hold no weights of it until then.
        untrained: nothing of it has been trained yet, so that the base's weights which will be are compared as well.
        Raises `NotTheBase`. What could not be compared is in `left_out`; nothing is compared with another teacher.
        """
        if not self.rules.teacher_is_base:
            return self
        said = check_config(self.cache, model, self.vocab_size is not None)
        if in_pieces or is_sharded(model):
            said += (IN_PIECES,)
        else:
            said += check_weights(self.cache, model, chosen=lambda tensor: untrained or not tensor.requires_grad)
        return replace(self, left_out=(*self.left_out, *said), is_verified=not said)

    def token_groups(self, device: torch.device) -> Tensor | None:
        """The tail group of each token, uint8 [V], copied to a device once; None where the objective reads none."""
        if self._groups and device not in self._groups:
            self._groups[device] = next(iter(self._groups.values())).to(device)
        return self._groups.get(device)

    def collator(self, collator: Collator = collated) -> CachedCollator:
        """A collator whose batches bring their targets; `looked_up` of it is for batches that are made already."""
        every, chosen = self.objective.kl_positions == "all", self.objective
        return CachedCollator(collator, self.cache, self.top_k, self._cut, every, chosen.ce_weight, chosen.tail)

    def require(self, samples: Sequence[Sample]) -> None:
        """Raise `SampleNotCached`, `PositionNotCaptured` or `InvalidData` unless every sample can be looked up.

        `IdentityMismatch` where chats were rendered by another template than the tokenizer that the view was given has.
        """
        if self.vocab_size is not None:
            check_tokens(samples, self.vocab_size)
        if self._templates is not None:
            check_templates(self.cache, samples, self._templates)
        check_samples(self.cache, samples, every=self.objective.kl_positions == "all")

    def check_width(self, model: nn.Module) -> None:
        """Raise `NotTheBase` for another model than was paired, with another number of logits."""
        check_width(model, self.cache, self.objective, self.vocab_size)

    def step_zero(self, model: nn.Module, samples: Sequence[Sample]) -> StepZero:
        """KL(base || model) on a few samples. Raises `NotTheBase` where it is above its tolerance."""
        return probe_step_zero(model, self._probe(self.is_verified), samples)

    def check_first_batch(self, model: nn.Module, batch: Batch) -> StepZero | None:
        """The same on a batch with targets, and the weights of the base that are to be trained, as they are now.

        None where the teacher is another model, which it need not equal, and where this process has no position of a
        batch that all run together. Weights in pieces are not compared.
        """
        if not self.rules.teacher_is_base:
            return None
        said: tuple[str, ...] = ()
        if not is_sharded(model) and any(p.requires_grad for p in causal_lm_of(model).parameters()):
            said = check_weights(self.cache, model, chosen=lambda tensor: tensor.requires_grad)
        return check_first_batch(model, self._probe(self.is_verified and not said), batch)

    def _probe(self, is_verified: bool) -> Probe:
        return Probe(self.cache, self.objective, self.vocab_size, self.rules, is_verified)


AnyCache: TypeAlias = CacheView | LogitCache | str | Path
"""What plug-ins take for a cache: a view, an opened cache, or a path."""


def objective_of(
    cache: AnyCache | None, objective: Objective | None, top_k: int | None, rules: PairingRules | None
) -> Objective:
    """The objective of a view, or the one given, or the default. Raises ValueError where a view comes with others."""
    if not isinstance(cache, CacheView):
        return Objective() if objective is None else objective
    if (objective, top_k, rules) != (None, None, None):
        raise ValueError("a CacheView has an objective, a top_k and rules of its own: give it without them")
    return cache.objective
