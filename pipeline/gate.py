"""Before the first step: does the model start where the cache says it does?

Owns the checks that make a wrong pairing of model, cache and data an error instead of a bad run. Must not train.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from logitcache.storage import IdentityMismatch, LogitCache, PositionNotCaptured, SampleNotCached

from .errors import NotTheBase
from .head import OutputHead, causal_lm_of, hidden_states
from .losses import Regularizer, Tail, regularizer_mask, regularizer_values
from .models import Base, tokenizer_identity
from .samples import Sample
from .targets import TrainingSet, collate, targets_of

NUM_PROBED = 8
KL_TOLERANCE_NATS = {"float32": 1e-5, "bfloat16": 0.05, "float16": 0.05}
"""Largest mean KL(base || base + untrained adapter) by the coarser dtype of cache and model (docs/log.md has the
measured floors: 2e-8 in float32, 1e-4 in bfloat16). To it comes max_error^2 / 3 of a quantised cache: rounding errors
spread evenly over [-e, e] make a KL of about e^2 / 6 (measured 3e-5 to 4e-5 at 1/64)."""


@dataclass(frozen=True)
class StepZero:
    """What the probe found: the noise floor of the regulariser, and of log p(label), in nats."""

    num_samples: int
    num_positions: int
    kl_nats: float
    label_error_nats: float
    tolerance_nats: float


def check_identity(cache: LogitCache, base: Base, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Raise `IdentityMismatch` unless the cache is of this model and, where both have one, this tokenizer.

    dtype and attention implementation may differ: `probe_step_zero` measures what they change.
    """
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
            "Use the model it was made from, or precompute a cache for this one."
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


@torch.no_grad()
def probe_step_zero(
    model: nn.Module, cache: LogitCache, samples: Sequence[Sample], regularizer: Regularizer, tail: Tail
) -> StepZero:
    """The regulariser of an untrained adapter on a few samples spread over the data; 0 but for numerical noise.

    Raises `NotTheBase` where its mean is above the tolerance of the dtypes, naming the worst position.
    """
    step = max(1, len(samples) // NUM_PROBED)
    dataset = TrainingSet(samples[::step][:NUM_PROBED], cache)
    causal_lm = causal_lm_of(model)
    training = model.training
    model.eval()
    try:
        values, errors, where = [], [], []
        for i in range(len(dataset)):
            batch = {k: v.to(causal_lm.device) for k, v in collate([dataset[i]]).items()}
            targets = targets_of(batch)
            assert targets is not None
            hidden = hidden_states(model, batch["input_ids"], batch["attention_mask"]).flatten(0, 1)
            logits = OutputHead(causal_lm)(hidden.index_select(0, batch["rows"])).float()
            keep = regularizer_mask(targets, regularizer)
            values.append(regularizer_values(logits, targets, regularizer, tail)[keep])
            label = logits.log_softmax(dim=1).gather(1, targets.label_ids[:, None]).squeeze(1)
            errors.append((label - targets.label_logprobs).abs())
            where += [(dataset.samples[i], int(p)) for p in dataset.samples[i].positions]
    finally:
        model.train(training)
    kl, error = torch.cat(values), torch.cat(errors)
    dtypes = {cache.manifest.model.dtype, str(causal_lm.dtype).removeprefix("torch.")}
    tolerance = max(KL_TOLERANCE_NATS.get(dtype, 0.05) for dtype in dtypes) + cache.manifest.capture.max_error**2 / 3
    found = StepZero(len(dataset), len(error), float(kl.mean()) if len(kl) else 0.0, float(error.mean()), tolerance)
    if not found.kl_nats <= tolerance:
        worst = int(error.argmax())
        sample, position = where[worst]
        raise NotTheBase(
            f"checking step 0 against {cache.path}: expected KL(base || adapted) of at most {tolerance:g} nats with an "
            f"untrained adapter, found {found.kl_nats:.4g}; log p(label) differs most in {sample.origin} at position "
            f"{position}, by {float(error[worst]):.4g} nats. The model does not start from the distributions of the "
            "cache. Use the dtype and attention implementation of the cache, and an adapter that starts as identity."
        )
    return found
