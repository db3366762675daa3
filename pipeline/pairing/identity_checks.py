"""Before the first step: does the model start where the cache says it does?

Owns the checks that make a wrong pairing of model, cache and data an error instead of a bad run. Must not train.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from logitcache.data.batches import pad_samples
from logitcache.data.samples import Sample
from logitcache.errors import InvalidData, NotTheBase, TrainingFailed
from logitcache.losses.formulas import Objective, cross_entropy, regularizer_mask, regularizer_values
from logitcache.models.device_map import head_device
from logitcache.models.head import (
    OutputHead,
    causal_lm_of,
    evaluation_mode,
    hidden_states,
    logits_width,
    rows_at_once,
    unwrapped,
)
from logitcache.models.loading import Base, tokenizer_identity
from logitcache.models.quantization import LOAD_IN, held_in
from logitcache.storage import IdentityMismatch, LogitCache, PositionNotCaptured, SampleNotCached

from .inputs import model_inputs
from .settings import PairingRules as PairingRules
from .targets import PREFIX, Batch, cut_of, placed, targets_of, with_targets

NUM_PROBED = 8
PLAIN_LOSS_BYTES = 16 * 2**20
"""Of float32 logits; the plain forms hold several times that."""

KL_TOLERANCE_NATS = {"float32": 1e-5, "bfloat16": 0.05, "float16": 0.05}
"""Largest mean KL(base || base + untrained adapter) by the coarser dtype of cache and model (docs/log.md has the
measured floors: 2e-8 in float32, 1e-4 in bfloat16). To it comes max_error^2 / 3 of a quantised cache: rounding errors
spread evenly over [-e, e] make a KL of about e^2 / 6 (measured 3e-5 to 4e-5 at 1/64)."""

KL_TOLERANCE_QUANTIZED_NATS = {"8bit": 0.02, "4bit": 0.3}
"""Comes to it where cache and model hold their weights in different formats, for each that is quantised. Measured
(docs/log.md): 8 bits .0003 on the demo's base, at most .0015 on narrow models of random weights; 4 bits .008 and .21.
Another model of random weights: 2.0. The demo's base with two layers swapped .09 to .14, with a tenth of noise on every
weight .03: what is that near, 4 bits hide, and only the fingerprint refuses."""

DIFFERS_FROM_ITSELF = frozenset({"8bit"})
"""Formats that need it against a cache of the same too: LLM.int8() casts inputs to float16 and rounds them to a grid,
and another batch is another result: .0002 to .0005 nats in float32 (4 bits: 3e-8)."""

KL_TOLERANCE_REMAINDER_NATS = 0.01
"""Comes to it for a cache whose tail is 1 minus the rest: wrong by 1e-6 of probability, a hundredth of what is compared
where 1 - p(label) is 1e-4, the least that counts by default. With 1 - p(label) spread evenly
in the logarithm from 1e-4 to 1: KL 1e-4 where the tail is a hundredth of that, .007 where it is 1e-4 (docs/log.md)."""


@dataclass(frozen=True)
class StepZero:
    """What the probe found: the noise floor of the regulariser, and of log p(label), in nats."""

    num_batches: int
    num_positions: int
    kl_nats: float
    label_error_nats: float
    worst_label_error_nats: float
    tolerance_nats: float


def check_identity(
    cache: LogitCache, base: Base, tokenizer: PreTrainedTokenizerBase | None, pairing: PairingRules | None = None
) -> None:
    """Raise `IdentityMismatch` unless the cache is of this model and, where both have one, this tokenizer.

    dtype and attention implementation may differ: `probe_step_zero` measures what they change. So may the format of
    quantised weights, if the pairing says so. Where the teacher is not
    the base: unless both have one tokenizer, and logits of one width or, padding ignored, for every token of it.
    """
    if pairing is not None and not pairing.teacher_is_base:
        _check_teacher(cache, base, tokenizer, pairing)
        return
    expected, found = cache.manifest.model, base.identity
    differs = [
        f"{name}: {getattr(expected, name)} in the cache, {getattr(found, name)} in the model"
        for name in ("weights", "config", "vocab_size")
        if getattr(expected, name) != getattr(found, name)
    ]
    theirs, ours = cache.manifest.tokenizer, tokenizer_identity(tokenizer)
    if theirs is not None and ours is not None:
        differs += [
            f"tokenizer {name}: {getattr(theirs, name)} in the cache, {getattr(ours, name)} in the model"
            for name in ("fingerprint", "chat_template")
            if getattr(theirs, name) != getattr(ours, name)
        ]
    if differs:
        raise IdentityMismatch(
            f"pairing {cache.path} with {base.source.name}: the cache was made from {cache.manifest.model_name} and "
            f"differs in {'; '.join(differs)}. Its distributions are not this model's. "
            "Use the model it was made from, or precompute a cache for this one. If it is meant to learn from "
            "another, say so (train: --teacher-is-not-base)."
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
    """Raise `TrainingFailed` where the cache, read with top_k alternatives, does not hold what is to be compared."""
    if cache is None or objective.regularizer == "none":
        return
    kept = cache.manifest.capture
    if top_k is not None and top_k > kept.top_k:
        raise TrainingFailed(
            f"training with --top-k {top_k}: {cache.path} holds {kept.top_k} alternatives a position, and no more "
            "can be read. Use a smaller one, or precompute a cache with more."
        )
    if top_k is not None and top_k < kept.top_k and kept.num_tail_samples:
        raise TrainingFailed(
            f"training with --top-k {top_k}: the draws in {cache.path} are from the tail beyond {kept.top_k} "
            "alternatives, and say nothing of a larger one. Leave --top-k out, or use a cache without draws."
        )
    if objective.tail == "groups" and not kept.num_tail_groups:
        raise TrainingFailed(
            f"training with tail groups: {cache.path} holds the tail as one mass. "
            "Use --tail bucket, or precompute a cache with --tail-groups."
        )
    if objective.tail == "sampled" and not kept.num_tail_samples:
        raise TrainingFailed(
            f"training with tail sampled: {cache.path} holds no draws from the tail. "
            "Use --tail bucket, or precompute a cache with --tail-samples."
        )
    if objective.masked and objective.tail == "renormalize" and min(top_k or kept.top_k, kept.top_k) == 1:
        raise TrainingFailed(
            f"training with {objective.regularizer} and the tail renormalised: one alternative a position is read from "
            f"{cache.path}, and one outcome alone always has probability 1. Use --tail bucket, or a cache with a "
            "larger --top-k."
        )


def check_samples(cache: LogitCache, samples: Sequence[Sample]) -> None:
    """Raise `SampleNotCached` or `PositionNotCaptured` unless every sample is found; names the first that is not."""
    try:
        cache.require_all([s.token_ids for s in samples], [s.positions for s in samples])
    except (SampleNotCached, PositionNotCaptured):
        for sample in samples:  # again, one by one, for the first in the order of the data
            try:
                cache.require(sample.token_ids, sample.positions)
            except (SampleNotCached, PositionNotCaptured) as error:
                raise type(error)(f"{sample.origin}: {error}") from error
        raise


def probe_step_zero(
    model: nn.Module,
    cache: LogitCache,
    samples: Sequence[Sample],
    objective: Objective,
    vocab_size: int | None = None,
) -> StepZero:
    """`measure` on a few samples spread over the data. Raises `NotTheBase` where it is above the noise."""
    step = max(1, len(samples) // NUM_PROBED)
    probed = samples[::step][:NUM_PROBED]
    device = head_device(causal_lm_of(model))
    cut = cut_of(cache, vocab_size)
    batches = ({k: v.to(device) for k, v in with_targets(pad_samples([s]), cache, cut=cut).items()} for s in probed)
    found, (batch, place) = measure(model, batches, cache, objective, vocab_size)
    check_step_zero(found, cache, f"{probed[batch].origin} at position {int(probed[batch].positions[place])}")
    return found


def check_first_batch(
    model: nn.Module, batch: Batch, cache: LogitCache, objective: Objective, vocab_size: int | None = None
) -> None:
    """`measure` on a batch with targets. Raises `NotTheBase` where it is above the noise, naming row and column.

    Not through a distributed wrapper: the first batch of another process may have nothing to measure.
    """
    found, (_, place) = measure(unwrapped(model), [batch], cache, objective, vocab_size)
    row, column = divmod(int(batch[f"{PREFIX}rows"][place]), batch["input_ids"].shape[1])
    check_step_zero(found, cache, f"row {row} of the first batch at column {column}")


def check_step_zero(found: StepZero, cache: LogitCache, worst: str) -> None:
    """Raise `NotTheBase` unless what `measure` found is noise. worst: where log p(label) differs most."""
    if found.kl_nats <= found.tolerance_nats:
        return
    raise NotTheBase(
        f"checking step 0 against {cache.path}: expected KL(base || adapted) of at most {found.tolerance_nats:g} nats "
        f"with an untrained adapter, found {found.kl_nats:.4g}; log p(label) differs most in {worst}, by "
        f"{found.worst_label_error_nats:.4g} nats. The model does not start from the distributions of the "
        "cache. Use the dtype and attention implementation of the cache, and an adapter that starts as identity."
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
            f"model. Give vocab_size={min(width, stored)}, if what lies beyond is padding."
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


def computed_in(causal_lm: PreTrainedModel) -> torch.dtype:
    """Of the model, or of autocast."""
    kind = head_device(causal_lm).type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else causal_lm.dtype


@torch.no_grad()
def measure(
    model: nn.Module,
    batches: Iterable[Batch],
    cache: LogitCache,
    objective: Objective,
    vocab_size: int | None = None,
) -> tuple[StepZero, tuple[int, int]]:
    """KL(base || model) on batches with targets, in evaluation mode, and where log p(label) differs most: (batch, row).

    Always with the tail as a bucket, which holds the whole distribution against the cache and is stored most exactly;
    without the label where the objective is without it, unless nothing is left there. 0 but for numerical noise where
    the model is the base. vocab_size: the first tokens only, as the batches have it.
    """
    causal_lm = causal_lm_of(model)
    form = Objective("masked-kl" if objective.masked else "full-kl", min_base_rest=objective.min_base_rest)
    head = OutputHead(causal_lm, vocab_size)
    num_rows = rows_at_once(causal_lm, PLAIN_LOSS_BYTES)
    values, errors = [], []
    with evaluation_mode(model):
        for batch in batches:
            hidden = hidden_states(model, **model_inputs(model, batch)).flatten(0, 1)
            batch = placed(batch, hidden.device)
            targets = targets_of(batch)
            assert targets is not None
            hidden = hidden.index_select(0, batch[f"{PREFIX}rows"])
            errors.append(torch.zeros(len(hidden), device=hidden.device))
            for start in range(0, len(hidden), num_rows):  # the loss holds no more of the logits either
                rows = slice(start, start + num_rows)
                logits, part = head(hidden[rows]).float(), targets.rows(rows)
                kl, counts = regularizer_values(logits, part, form), regularizer_mask(part, form)
                if not bool(counts.all()):  # where masked KL says nothing, full KL does
                    kl = torch.where(counts, kl, regularizer_values(logits, part, Objective("full-kl")))
                values.append(kl)
                errors[-1][rows] = (part.label_logprobs.float() + cross_entropy(logits, part.label_ids)).abs()
    torch.clear_autocast_cache()  # torch < 2.11 keeps casts made without gradient
    kls, error = torch.cat(values), torch.cat(errors)
    dtypes = {cache.manifest.model.dtype, str(computed_in(causal_lm)).removeprefix("torch.")}
    tolerance = max(KL_TOLERANCE_NATS.get(dtype, 0.05) for dtype in dtypes) + cache.manifest.capture.max_error**2 / 3
    if cache.manifest.capture.tail_from_remainder:
        tolerance += KL_TOLERANCE_REMAINDER_NATS
    formats = {cache.manifest.model.quantization, held_in(causal_lm) or ""}
    counted = formats if len(formats) > 1 else formats & DIFFERS_FROM_ITSELF
    tolerance += sum(KL_TOLERANCE_QUANTIZED_NATS.get(name, 0.0) for name in counted)
    mean_kl = float(kls.mean())
    worst = int(error.nan_to_num(torch.inf).argmax())
    found = StepZero(len(errors), len(error), mean_kl, float(error.mean()), float(error[worst]), tolerance)
    batch_of = [(i, j) for i, e in enumerate(errors) for j in range(len(e))]
    return found, batch_of[worst]
