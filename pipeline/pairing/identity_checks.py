"""Do a cache and a model belong together? Weights, configuration, tokenizer, number formats, widths, tails, samples.

Owns the refusals of what cannot fit. What can only be measured is in `step_zero`; who asks for all of it is `view`.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase

from logitcache.data.samples import Sample
from logitcache.errors import InvalidData, NotTheBase, TrainingFailed
from logitcache.losses.formulas import Objective
from logitcache.losses.weights import TOP
from logitcache.models.head import causal_lm_of, logits_width
from logitcache.models.loading import Base, tokenizer_identity
from logitcache.models.quantization import LOAD_IN, held_in
from logitcache.models.same_base import base_differences, base_of
from logitcache.storage import (
    IdentityMismatch,
    LogitCache,
    Manifest,
    PositionNotCaptured,
    SampleNotCached,
    sample_id,
)
from logitcache.storage.identity import differing

from .settings import PairingRules as PairingRules

EVERY = " Here every position of a sample is asked for (--kl-positions all): precompute with --kl-positions all too."
"""What is added to a refusal of positions that were not captured."""


def check_identity(
    cache: LogitCache, base: Base, tokenizer: PreTrainedTokenizerBase | None, pairing: PairingRules | None = None
) -> None:
    """Raise `IdentityMismatch` unless the cache is of this model and, where both have one, this tokenizer.

    dtype, attention implementation and TF32 may differ: `probe_step_zero` measures what they change. So may the format
    of quantised weights, if the pairing says so; chat templates count for samples (`check_templates`). Where the
    teacher is not the base: unless both have one tokenizer, and logits of one width or, padding ignored, for every
    token of it.
    """
    if pairing is not None and not pairing.teacher_is_base:
        _check_teacher(cache, base, tokenizer, pairing)
        return
    found, where = base.identity, ("in the cache", "in the model")
    differs = base_differences(base_of(cache.manifest.model), found, *where)
    theirs, ours = cache.manifest.tokenizer, tokenizer_identity(tokenizer)
    tokenizers: list[str] = []
    if theirs is not None and ours is not None:
        tokenizers = [f"tokenizer {said}" for said in differing(asdict(theirs), asdict(ours), *where)]
    if differs or tokenizers:
        # another tokenizer is refused of a teacher too
        other = "" if tokenizers else " If it is meant to learn from another, say so (train: --teacher-is-not-base)."
        raise IdentityMismatch(
            f"pairing {cache.path} with {base.source.name}: the cache was made from {cache.manifest.model_name} and "
            f"differs in {'; '.join(differs + tokenizers)}. Its distributions are not this model's. "
            f"Use the model it was made from, or precompute a cache for this one.{other}"
        )
    _check_precision(cache, found.quantization, base.source.name, pairing)


def check_precision(model: nn.Module, cache: LogitCache, other_precision: bool = False) -> None:
    """Raise `IdentityMismatch` unless the model's weights are held as the cache's base held them, or may differ."""
    causal_lm = causal_lm_of(model)
    name = f"{type(causal_lm).__name__} {getattr(causal_lm, 'name_or_path', '')}".strip()
    _check_precision(cache, held_in(causal_lm) or "", name, PairingRules(other_precision=other_precision))


def _check_precision(cache: LogitCache, ours: str, name: str, pairing: PairingRules | None) -> None:
    theirs = cache.manifest.model.quantization
    if theirs == ours or (pairing is not None and pairing.other_precision):
        return
    raise IdentityMismatch(
        f"pairing {cache.path} with {name}: the cache was made from {_weights(theirs, ours)}, the model has "
        f"{_weights(ours, theirs)}. Before training they differ by what quantisation costs, and training would undo "
        "that too. If that is meant, say so (train --other-precision); it is then measured before step 1. Or hold both "
        "alike (--load-in)."
    )


def _weights(quantization: str, other: str) -> str:
    """other: what they are compared with. A checkpoint's own format may be unpacked while it is loaded, where the
    device does not compute with it."""
    if quantization:
        return f"{quantization} weights"
    return "unquantised weights" if other in LOAD_IN else "unquantised weights, or unpacked ones"


def _check_teacher(
    cache: LogitCache, base: Base, tokenizer: PreTrainedTokenizerBase | None, pairing: PairingRules
) -> None:
    what = f"teaching {base.source.name} by {cache.path}, made from {cache.manifest.model_name}"
    theirs, ours = cache.manifest.tokenizer, tokenizer_identity(tokenizer)
    if theirs is None or ours is None or tokenizer is None:
        where = "the model's folder" if ours is None else "the folder the cache was made from"
        raise IdentityMismatch(
            f"{what}: expected the same tokenizer beside both models, found none in {where}. Without it nothing says "
            "that an id means the same to both. Save the tokenizer there."
        )
    if theirs.fingerprint != ours.fingerprint:
        raise IdentityMismatch(
            f"{what}: expected one tokenizer, found {theirs.fingerprint} in the cache and {ours.fingerprint} beside "
            "the model. An id may mean one token to the teacher and another to the student. Use a teacher with the "
            "student's tokenizer; where only special tokens differ, save the teacher's beside the student."
        )
    width, stored, longest = base.identity.vocab_size, cache.manifest.model.vocab_size, _num_ids(tokenizer)
    if width != stored and not pairing.ignore_padding:
        raise IdentityMismatch(
            f"{what}: expected logits over as many tokens, found {stored:,} in the cache and {width:,} in the model "
            f"(the tokenizer has {longest:,}). If what lies beyond is padding, leave it out with --ignore-padding."
        )
    if width != stored and longest > min(width, stored):
        raise IdentityMismatch(
            f"{what}: expected logits for all {longest:,} ids of the tokenizer, found {stored:,} in the cache and "
            f"{width:,} in the model. What one of them lacks is no padding. Use another teacher, or another tokenizer."
        )


def _num_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the highest id it can make, added tokens included."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def check_tail(cache: LogitCache | None, objective: Objective, top_k: int | None = None) -> None:
    """Raise `TrainingFailed` where the cache, read with top_k alternatives, does not hold what the loss reads of it."""
    if cache is not None:
        check_kept(cache.manifest, cache.path, objective, top_k)


def check_kept(manifest: Manifest, path: str, objective: Objective, top_k: int | None = None) -> None:
    """`check_tail` of what a cache at this path keeps, or will."""
    if not objective.reads_base:
        return
    kept = manifest.capture
    if top_k is not None and top_k > kept.top_k:
        raise TrainingFailed(
            f"training with --top-k {top_k}: {path} holds {kept.top_k} alternatives a position, and no more "
            "can be read. Use a smaller one, or precompute a cache with more."
        )
    if top_k is not None and top_k < kept.top_k and kept.num_tail_samples:
        raise TrainingFailed(
            f"training with --top-k {top_k}: the draws in {path} are from the tail beyond {kept.top_k} "
            "alternatives, and say nothing of a larger one. Leave --top-k out, or use a cache without draws."
        )
    if objective.ce_weight == "eaft-base":
        _check_entropy(manifest, path, kept.top_k if top_k is None else top_k)
    if objective.regularizer == "none":
        return
    if objective.tail == "groups" and not kept.num_tail_groups:
        raise TrainingFailed(
            f"training with tail groups: {path} holds the tail as one mass. "
            "Use --tail bucket, or precompute a cache with --tail-groups."
        )
    if objective.tail == "sampled" and not kept.num_tail_samples:
        raise TrainingFailed(
            f"training with tail sampled: {path} holds no draws from the tail. "
            "Use --tail bucket, or precompute a cache with --tail-samples."
        )
    width = kept.top_k if top_k is None else top_k
    outcomes = width + (not objective.compares_rest) + (objective.tail != "renormalize")
    if outcomes < 2 and objective.tail in ("bucket", "renormalize"):
        raise TrainingFailed(
            f"training with {objective.regularizer} and tail {objective.tail}: {'one' if width else 'no'} alternative "
            f"a position is read from {path}. One outcome alone always has probability 1, and nothing would be "
            f"compared. {_MORE_OUTCOMES[width > 0]}"
        )


def _check_entropy(manifest: Manifest, path: str, top_k: int) -> None:
    """Raise `TrainingFailed` unless the most probable tokens over which EAFT takes the entropy are all recorded."""
    needed, min_mass = min(TOP, manifest.model.vocab_size - 1), manifest.capture.min_mass
    if top_k >= needed and min_mass == 1:
        return
    found = f"{top_k} alternatives" if top_k < needed else f"fewer in rows where {min_mass:g} of the mass is kept"
    raise TrainingFailed(
        f"training with --ce-weight eaft-base: expected the base's {TOP} most probable tokens at every position, which "
        f"takes {needed} alternatives, found {found} read from {path}. The entropy would be of others. "
        f"Precompute a cache with --top-k {needed} or more and no --min-mass, or use --ce-weight eaft."
    )


_MORE_OUTCOMES = {
    False: "Use --regularizer full-kl (the true token against the rest) or none, or a cache with a larger --top-k.",
    True: "Use --tail bucket, or a cache with a larger --top-k.",
}
"""What to do about too few, by whether there is an alternative."""


def check_samples(cache: LogitCache, samples: Sequence[Sample], every: bool = False) -> None:
    """Raise `SampleNotCached` or `PositionNotCaptured` unless every sample is found; names the first that is not.

    every: at all of its positions, not only the supervised ones.
    """

    def positions(sample: Sample) -> NDArray[np.int32]:
        return np.arange(len(sample.token_ids) - 1, dtype=np.int32) if every else sample.positions

    try:
        cache.require_all([s.token_ids for s in samples], [positions(s) for s in samples])
    except (SampleNotCached, PositionNotCaptured):
        for sample in samples:  # again, one by one, for the first in the order of the data
            try:
                cache.require(sample.token_ids, positions(sample))
            except (SampleNotCached, PositionNotCaptured) as error:
                raise type(error)(f"{sample.origin}: {error}{EVERY if every else ''}") from error
        raise


def check_templates(cache: LogitCache, samples: Sequence[Sample], templates: Callable[[], frozenset[str]]) -> None:
    """Raise `IdentityMismatch` where samples that a chat template renders meet a cache that another one rendered.

    samples: of data, or of the cache. templates: gives the digests of what renders the model's chats. Samples that none
    rendered go with any.
    """
    rendered = [sample for sample in samples if sample.chat_template]
    if not rendered:
        return
    ours, known = {sample.chat_template for sample in rendered}, templates()
    found = cache.chat_templates(sample_id(sample.token_ids) for sample in rendered)
    if not found:  # not one of them is there: those that are may say why
        found = cache.chat_templates()
    others = sorted((found - ours) | ((ours | found) - known))
    if others:
        here = ", ".join(sorted((known & ours) or known)) or "none"
        raise IdentityMismatch(
            f"pairing {cache.path} with {len(rendered):,} chats, from {rendered[0].origin} on: chat_template: "
            f"{others[0]} in the cache, {here} in the model. What another template renders are other samples. Use the "
            "tokenizer with the template of the cache, and the same --chat-template and --chat-template-kwargs (and "
            "TRL, if its training template rendered them), or precompute a cache with this one."
        )


def common_width(model: nn.Module, cache: LogitCache) -> int:
    """The lesser number of logits, of the model and of the cache's base."""
    return min(logits_width(causal_lm_of(model)), cache.manifest.model.vocab_size)


def check_width(
    model: nn.Module, cache: LogitCache, objective: Objective | None = None, vocab_size: int | None = None
) -> None:
    """Raise `NotTheBase` unless the model has as many logits as the cache's base.

    vocab_size: of both, the first tokens only; `NotTheBase` where one has fewer, `TrainingFailed` for draws from a tail
    that is cut.
    """
    width, stored = logits_width(causal_lm_of(model)), cache.manifest.model.vocab_size
    pair = f"pairing {cache.path} with {type(causal_lm_of(model)).__name__}"
    if vocab_size is None and width != stored:
        raise NotTheBase(
            f"{pair}: expected logits over {stored} tokens, found {width}. Use the model the cache was made from, its "
            "vocabulary not resized; or, where what lies beyond the lesser is padding, have it ignored "
            "(docs/how-to/distil.md)."
        )
    if vocab_size is not None and vocab_size > min(width, stored):
        raise NotTheBase(
            f"{pair}: expected logits over {vocab_size} tokens in both, found {stored} in the cache and {width} in the "
            "model, which is not the one that the cache was paired with. Pair it with this one anew."
        )
    if vocab_size is not None and vocab_size < stored and objective is not None and objective.tail == "sampled":
        raise TrainingFailed(
            f"training with tail sampled on {vocab_size} of the {stored} tokens of {cache.path}: a draw beyond them "
            "says nothing of those below. Use --tail bucket."
        )


def check_tokens(samples: Sequence[Sample], vocab_size: int) -> None:
    """Raise `InvalidData`, naming the sample, for a token from vocab_size on."""
    for sample in samples:
        if len(sample.token_ids) and int(sample.token_ids.max()) >= vocab_size:
            raise InvalidData(
                f"reading {sample.origin}: token id {int(sample.token_ids.max())} is beyond the {vocab_size} tokens "
                "that student and teacher share. No tokenizer makes padding. Remove the row."
            )
