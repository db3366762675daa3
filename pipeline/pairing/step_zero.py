"""Before the first step: does the model start where the cache says it does?

Owns the measurement, KL(base || adapted) with an untrained adapter, and how much of it is noise. What weights and
configuration say is `base_in_memory`'s, and comes first: several near relatives of a base are nearer to it than another
attention is (docs/adr/0009-right-base.md). Must not train.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from logitcache.data.batches import pad_samples
from logitcache.data.samples import Sample
from logitcache.errors import NotTheBase
from logitcache.losses.formulas import Objective, cross_entropy, regularizer_mask, regularizer_values
from logitcache.models.device_map import head_device
from logitcache.models.head import OutputHead, causal_lm_of, evaluation_mode, hidden_states, rows_at_once, unwrapped
from logitcache.models.quantization import LOAD_IN, held_in
from logitcache.models.tf32 import tf32_is_on
from logitcache.storage import LogitCache
from logitcache.storage.identity import differing

from .inputs import model_inputs
from .settings import PairingRules
from .targets import PREFIX, Batch, cut_of, documents_of, placed, targets_of, with_targets

NUM_PROBED = 8
NUM_NOISE = 4
"""Documents by which the model's own noise is measured."""

PADDING = 7
"""Tokens behind the longest of them, where they are run a second time, in one batch."""

PLAIN_LOSS_BYTES = 16 * 2**20
"""Of float32 logits; the plain forms hold several times that."""

KL_FLOAT32_NATS = 1e-5
"""Bound of the mean KL(base || base + untrained adapter) where cache and model are float32 (measured 2e-8), and added
to the others. To each comes max_error^2 / 3 of a quantised cache: rounding errors spread evenly over [-e, e] make a KL
of about e^2 / 6 (measured 3e-5 to 4e-5 at 1/64)."""

KL_RUN_OTHERWISE_NATS = 5e-3
"""Where one is of another dtype or attention, or is in 16 bits and all its weights are those of the checkpoint.
Measured on SmolLM2-135M: float32 against bfloat16 1.5e-3, eager against sdpa in bfloat16 2.2e-3."""

SAME_SHARE = 0.01
"""By which the KL may change, relative, where an adapter that is the identity is switched off."""

TIMES_OWN_NOISE = 5
"""In 16 bits, and of 8-bit weights, where not every weight could be compared: so many times what the model differs by
from itself, alone and padded in a batch (SmolLM2-135M in bfloat16: 1.2e-4, and 1.9e-4 to its cache)."""

MAX_START_KL_NATS = {"8bit": 0.1, "fp8": 0.1}
"""`PairingRules.max_start_kl` by default, where cache and model hold their weights in different formats: the largest of
those that are quantised. SmolLM2-135M: 8 bits .032, NormalFloat .32 (docs/how-to/distil.md)."""

MAX_START_KL_OTHERS_NATS = 1.0
"""The same of 4 bits, and of formats that are not named."""

DIFFERS_FROM_ITSELF = frozenset({"8bit"})
"""Formats whose own noise counts in float32 too: LLM.int8() casts inputs to float16 and rounds them to a grid, and
another batch is another result: .0002 to .0005 nats (4 bits: 3e-8)."""

KL_TOLERANCE_REMAINDER_NATS = 0.01
"""Comes to it for a cache whose tail is 1 minus the rest: wrong by 1e-6 of probability, a hundredth of what is compared
where 1 - p(label) is 1e-4, the least that counts by default. With 1 - p(label) spread evenly
in the logarithm from 1e-4 to 1: KL 1e-4 where the tail is a hundredth of that, .007 where it is 1e-4 (docs/log.md)."""


@dataclass(frozen=True)
class StepZero:
    """What the probe found, in nats."""

    num_batches: int
    num_positions: int
    #: The regulariser, a mean over positions: noise, or what another format of the weights costs.
    kl_nats: float
    #: Mean and largest difference of log p(label).
    label_error_nats: float
    worst_label_error_nats: float
    #: What kl_nats may be at most.
    tolerance_nats: float
    #: KL of the model alone against itself padded; None where the tolerance does not depend on it.
    own_noise_nats: float | None


@dataclass(frozen=True)
class Probe:
    """What a model is held against: a cache as an objective reads it, and what is known of the model already."""

    cache: LogitCache
    objective: Objective
    #: The first tokens of both vocabularies; None: all.
    vocab_size: int | None = None
    rules: PairingRules = field(default_factory=PairingRules)
    #: Whether the configuration and every weight in memory are those of the checkpoint.
    is_verified: bool = False


def probe_step_zero(model: nn.Module, probe: Probe, samples: Sequence[Sample]) -> StepZero:
    """`measure` on a few samples spread over the data. Raises `NotTheBase` where it is above the tolerance."""
    step = max(1, len(samples) // NUM_PROBED)
    probed = samples[::step][:NUM_PROBED]
    device = head_device(causal_lm_of(model))
    cut = cut_of(probe.cache, probe.vocab_size)
    made = (with_targets(pad_samples([s]), probe.cache, cut=cut) for s in probed)
    batches = [{k: v.to(device) for k, v in batch.items()} for batch in made]
    found, (batch, place) = measure(model, batches, probe, [s.token_ids for s in probed])
    worst = f"{probed[batch].origin} at position {int(probed[batch].positions[place])}"
    check_step_zero(model, found, probe, batches, worst)
    return found


def check_first_batch(model: nn.Module, probe: Probe, batch: Batch) -> StepZero:
    """`measure` on a batch with targets. Raises `NotTheBase` where it is above the tolerance, naming row and column.

    Not through a distributed wrapper: the first batch of another process may have nothing to measure.
    """
    inner = unwrapped(model)
    on_cpu = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in batch.items()}
    found, (_, place) = measure(inner, [batch], probe, [d.token_ids for d in documents_of(on_cpu)])
    row, column = divmod(int(batch[f"{PREFIX}rows"][place]), batch["input_ids"].shape[1])
    check_step_zero(inner, found, probe, [batch], f"row {row} of the first batch at column {column}")
    return found


def check_step_zero(model: nn.Module, found: StepZero, probe: Probe, batches: Sequence[Batch], worst: str) -> None:
    """Raise `NotTheBase` unless what `measure` found on the batches is noise, or as near as it was asked to be.

    worst: where log p(label) differs most. What may be the cause is measured and listed. Where the bound is as wide as
    another format of the weights needs, an adapter that leads further away is refused within it too.
    """
    cache, causal_lm = probe.cache, causal_lm_of(model)
    is_near, is_wide = found.kl_nats <= found.tolerance_nats, len(_formats(cache, causal_lm)) > 1
    if is_near and not is_wide:
        return
    off, slack = _kl_with_adapter_off(model, batches, probe), SAME_SHARE * found.kl_nats + KL_FLOAT32_NATS
    if is_near and (off is None or found.kl_nats <= off + slack):
        return
    how = _run_otherwise(cache, causal_lm)
    if off is not None:
        starts = (
            "it starts as the identity" if abs(off - found.kl_nats) <= slack else "it does not start as the identity"
        )
        how.append(f"adapter: with it off the KL is {off:.4g} nats, so {starts}")
    otherwise = f"What differs: {'; '.join(how)}. " if how else ""
    why = "that of the model below it" if is_near else _bound_said(found, probe, causal_lm)
    at_most = off if is_near and off is not None else found.tolerance_nats
    raise NotTheBase(
        f"checking step 0 against {cache.path}: expected KL(base || adapted) of at most {at_most:.4g} "
        f"nats with an untrained adapter ({why}), found {found.kl_nats:.4g}; log p(label) differs "
        f"most in {worst}, by {found.worst_label_error_nats:.4g} nats. The model does not start from the "
        f"distributions of the cache. {otherwise}{_advice(cache, causal_lm)}"
    )


def _advice(cache: LogitCache, causal_lm: PreTrainedModel) -> str:
    ours = held_in(causal_lm) or ""
    if len(_formats(cache, causal_lm)) == 1:
        return "Use the dtype, attention implementation and TF32 of the cache, and an adapter that starts as identity."
    how = (
        f"--load-in {ours}" if ours in LOAD_IN else "the checkpoint that is trained" if ours else "unquantised weights"
    )
    return (
        f"Precompute a cache of the base as the student holds it (precompute with {how}), or, if the student is meant "
        "to start so far away, allow it by --max-start-kl."
    )


def _bound_said(found: StepZero, probe: Probe, causal_lm: PreTrainedModel) -> str:
    """Why the tolerance is what it is."""
    if len(_formats(probe.cache, causal_lm)) > 1:
        return "--max-start-kl"
    if found.own_noise_nats is not None:
        return f"{TIMES_OWN_NOISE} times its own noise of {found.own_noise_nats:.2g}"
    if found.tolerance_nats < KL_RUN_OTHERWISE_NATS:
        return "float32 on both sides"
    return "with the same weights" if _is_run_alike(probe.cache, causal_lm) else "in another dtype or attention"


def _kl_with_adapter_off(model: nn.Module, batches: Sequence[Batch], probe: Probe) -> float | None:
    """The same KL of the model below the adapter; None where there is no adapter that PEFT can switch off."""
    if not isinstance(model, PeftModel):
        return None
    if model.active_peft_config.is_prompt_learning:  # of which PEFT switches off more than the adapter: its forward
        kls, _ = _values(model.get_base_model(), batches, probe)
        return float(kls.mean())
    with model.disable_adapter():
        kls, _ = _values(model, batches, probe)
    return float(kls.mean())


def computed_in(causal_lm: PreTrainedModel) -> torch.dtype:
    """Of float32 weights that, as they are probed outside autocast; of others their own, or that of autocast."""
    kind = head_device(causal_lm).type
    if causal_lm.dtype == torch.float32 or not torch.is_autocast_enabled(kind):
        own: torch.dtype = causal_lm.dtype
        return own
    return torch.get_autocast_dtype(kind)


def _is_float32(cache: LogitCache, causal_lm: PreTrainedModel) -> bool:
    return {cache.manifest.model.dtype, str(computed_in(causal_lm)).removeprefix("torch.")} == {"float32"}


def _formats(cache: LogitCache, causal_lm: PreTrainedModel) -> set[str]:
    """In which the weights of cache and model are held; one where they are held alike."""
    return {cache.manifest.model.quantization, held_in(causal_lm) or ""}


def _run_otherwise(cache: LogitCache, causal_lm: PreTrainedModel) -> list[str]:
    """How the model is run otherwise than the cache's base was, a phrase each: what may make more than noise."""
    theirs = cache.manifest.model
    ours = {
        "dtype": str(computed_in(causal_lm)).removeprefix("torch."),
        "attention": str(causal_lm.config._attn_implementation),
        "quantization": held_in(causal_lm) or "",
        "tf32": tf32_is_on(),
    }
    stated = {name: getattr(theirs, name) for name in ours}
    return differing(stated, ours, "in the cache", "in the model")


@torch.no_grad()
def measure(
    model: nn.Module, batches: Sequence[Batch], probe: Probe, documents: Sequence[NDArray[np.uint32]]
) -> tuple[StepZero, tuple[int, int]]:
    """KL(base || model) on batches with targets, in evaluation mode, and where log p(label) differs most: (batch, row).

    0 but for numerical noise where the model is the base and its weights are held alike. documents: of the batches, to
    measure the model's own noise on.
    """
    kls, errors = _values(model, batches, probe)
    noise = own_noise(model, documents[:NUM_NOISE]) if _needs_noise(probe, causal_lm_of(model)) else None
    error, tolerance = torch.cat(errors), tolerance_of(probe, causal_lm_of(model), noise)
    worst = int(error.nan_to_num(torch.inf).argmax())
    found = StepZero(
        len(errors), len(error), float(kls.mean()), float(error.mean()), float(error[worst]), tolerance, noise
    )
    batch_of = [(i, j) for i, e in enumerate(errors) for j in range(len(e))]
    return found, batch_of[worst]


def tolerance_of(probe: Probe, causal_lm: PreTrainedModel, own_noise_nats: float | None) -> float:
    """The largest mean KL with which a model is the base, or is near enough, in nats."""
    kept, formats = probe.cache.manifest.capture, _formats(probe.cache, causal_lm)
    if len(formats) > 1:
        asked = probe.rules.max_start_kl
        names = formats - {""}
        return max(MAX_START_KL_NATS.get(n, MAX_START_KL_OTHERS_NATS) for n in names) if asked is None else asked
    stored = kept.max_error**2 / 3 + (KL_TOLERANCE_REMAINDER_NATS if kept.tail_from_remainder else 0.0)
    if own_noise_nats is not None:
        return KL_FLOAT32_NATS + TIMES_OWN_NOISE * own_noise_nats + stored
    is_exact = _is_float32(probe.cache, causal_lm) and not formats & DIFFERS_FROM_ITSELF
    return (KL_FLOAT32_NATS if is_exact else KL_RUN_OTHERWISE_NATS) + stored


def _needs_noise(probe: Probe, causal_lm: PreTrainedModel) -> bool:
    """Whether the model's own noise is the measure: it is run as the cache's base was, and that has noise."""
    formats = _formats(probe.cache, causal_lm)
    if len(formats) > 1 or not _is_run_alike(probe.cache, causal_lm):
        return False
    if formats & DIFFERS_FROM_ITSELF:
        return True
    return not (_is_float32(probe.cache, causal_lm) or probe.is_verified)


def _is_run_alike(cache: LogitCache, causal_lm: PreTrainedModel) -> bool:
    stated = cache.manifest.model
    ours = (str(computed_in(causal_lm)).removeprefix("torch."), str(causal_lm.config._attn_implementation))
    return (stated.dtype, stated.attention) == ours


@torch.no_grad()
def own_noise(model: nn.Module, documents: Sequence[NDArray[np.uint32]]) -> float:
    """Mean KL, nats a position, between what a model says of documents alone and padded, together in a batch."""
    causal_lm, values = causal_lm_of(model), []
    head, num_rows = OutputHead(causal_lm), rows_at_once(causal_lm, PLAIN_LOSS_BYTES)
    with _probing(model):
        together = _hidden_of(model, documents, max(map(len, documents)) + PADDING)
        for tokens, padded in zip(documents, together, strict=True):
            runs = (_hidden_of(model, [tokens], len(tokens))[0], padded[: len(tokens)])
            for start in range(0, len(tokens), num_rows):
                p, q = (head(run[start : start + num_rows]).float().log_softmax(-1) for run in runs)
                values.append((p.exp() * (p - q)).sum(-1))
    return max(0.0, float(torch.cat(values).mean()))


def _hidden_of(model: nn.Module, documents: Sequence[NDArray[np.uint32]], length: int) -> Tensor:
    """Hidden states of documents, padded on the right to this length."""
    ids, mask = torch.zeros(2, len(documents), length, dtype=torch.int64, device=head_device(causal_lm_of(model)))
    for row, tokens in enumerate(documents):
        ids[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
        mask[row, : len(tokens)] = 1
    return hidden_states(model, input_ids=ids, attention_mask=mask)


@torch.no_grad()
def _values(model: nn.Module, batches: Sequence[Batch], probe: Probe) -> tuple[Tensor, list[Tensor]]:
    """KL of every position, and by batch how far log p(label) is off.

    Always with the tail as a bucket, which holds the whole distribution against the cache and is stored most exactly;
    without the label where the objective is without it, unless nothing or one outcome is left there.
    """
    causal_lm, objective = causal_lm_of(model), probe.objective
    head = OutputHead(causal_lm, probe.vocab_size)
    num_rows = rows_at_once(causal_lm, PLAIN_LOSS_BYTES)
    values, errors = [], []
    with _probing(model):
        for batch in batches:
            hidden = hidden_states(model, **model_inputs(model, batch)).flatten(0, 1)
            batch = placed(batch, hidden.device)
            targets = targets_of(batch)
            assert targets is not None
            masked = objective.masked and targets.alternative_ids.shape[1] > 0  # the tail alone would agree with any
            form = Objective("masked-kl" if masked else "full-kl", min_base_rest=objective.min_base_rest)
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
    return torch.cat(values), errors


@contextmanager
def _probing(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and float32 weights outside autocast: also outside the one that accelerate puts around an
    instance's forward."""
    inner, causal_lm = unwrapped(model), causal_lm_of(model)
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        if causal_lm.dtype == torch.float32:
            stack.enter_context(torch.autocast(head_device(causal_lm).type, enabled=False))
            if "forward" in vars(inner) and hasattr(inner, "_original_forward"):
                stack.enter_context(_forward_of(inner, inner._original_forward))
        yield


@contextmanager
def _forward_of(inner: Any, forward: Any) -> Iterator[None]:
    patched, inner.forward = inner.forward, forward
    try:
        yield
    finally:
        inner.forward = patched
