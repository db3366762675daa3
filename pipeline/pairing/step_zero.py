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
from logitcache.models.head import OutputHead, causal_lm_of, evaluation_mode, num_tokens, rows_at_once, unwrapped
from logitcache.models.head_layer import HeadLayer
from logitcache.models.inside_forward import inside_forward
from logitcache.models.quantization import LOAD_IN, held_in
from logitcache.models.sharding import autocast_dtype, called_in_checks, dtype_as_called, is_sharded
from logitcache.models.tf32 import tf32_is_on
from logitcache.storage import LogitCache
from logitcache.storage.identity import differing

from .inputs import model_inputs
from .settings import PairingRules
from .targets import PREFIX, Batch, cut_of, documents_of, on_cpu, placed, targets_of, with_targets

NUM_PROBED = 8
NUM_NOISE = 4
"""Documents by which the model's own noise is measured."""

PADDING = 7
"""Tokens behind the longest of them, where they are run a second time, in one batch."""

NOISE_TOKENS = 512
"""Of each of them at most, where they are not those of the batch."""

PLAIN_LOSS_BYTES = {"cpu": 16 * 2**20, "cuda": 2**28}
"""Of float32 logits, by the kind of device; the plain forms hold several times that."""

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


def check_first_batch(model: nn.Module, probe: Probe, batch: Batch) -> StepZero | None:
    """`measure` on a batch with targets. Raises `NotTheBase` where it is above the tolerance, naming row and column.

    Not through a distributed wrapper, since the first batch of another process may have nothing to measure; but of a
    model in pieces by all processes together, of which one without positions says nothing: None.
    """
    called = called_in_checks(model)
    found, (_, place) = measure(called, [batch], probe, _documents_of(called, probe, batch))
    if not found.num_positions:
        return None
    row, column = divmod(int(batch[f"{PREFIX}rows"][place]), batch["input_ids"].shape[1])
    check_step_zero(called, found, probe, [batch], f"row {row} of the first batch at column {column}")
    return found


def _documents_of(model: nn.Module, probe: Probe, batch: Batch) -> list[NDArray[np.uint32]]:
    """To measure noise on: those of the batch; for a model in pieces the cache's, as many on every process."""
    if not is_sharded(model):
        return [document.token_ids for document in documents_of(on_cpu(batch))]
    vocab_size, step = num_tokens(causal_lm_of(model)), max(1, len(probe.cache) // NUM_NOISE)
    spread = range(0, len(probe.cache), step)[:NUM_NOISE]
    return [probe.cache.sample(i).token_ids[:NOISE_TOKENS] % vocab_size for i in spread]


def check_step_zero(model: nn.Module, found: StepZero, probe: Probe, batches: Sequence[Batch], worst: str) -> None:
    """Raise `NotTheBase` unless what `measure` found on the batches is noise, or as near as it was asked to be.

    worst: where log p(label) differs most. What may be the cause is measured and listed. Where the bound is as wide as
    another format of the weights needs, an adapter that leads further away is refused within it too.
    """
    cache = probe.cache
    is_near, is_wide = found.kl_nats <= found.tolerance_nats, len(_formats(cache, model)) > 1
    if is_near and not is_wide:
        return
    off, slack = _kl_with_adapter_off(model, batches, probe), SAME_SHARE * found.kl_nats + KL_FLOAT32_NATS
    if is_near and (off is None or found.kl_nats <= off + slack):
        return
    how = _run_otherwise(cache, model)
    if off is not None:
        starts = (
            "it starts as the identity" if abs(off - found.kl_nats) <= slack else "it does not start as the identity"
        )
        how.append(f"adapter: with it off the KL is {off:.4g} nats, so {starts}")
    otherwise = f"What differs: {'; '.join(how)}. " if how else ""
    why = "that of the model below it" if is_near else _bound_said(found, probe, model)
    at_most = off if is_near and off is not None else found.tolerance_nats
    raise NotTheBase(
        f"checking step 0 against {cache.path}: expected KL(base || adapted) of at most {at_most:.4g} "
        f"nats with an untrained adapter ({why}), found {found.kl_nats:.4g}; log p(label) differs "
        f"most in {worst}, by {found.worst_label_error_nats:.4g} nats. The model does not start from the "
        f"distributions of the cache. {otherwise}{_advice(cache, model)}"
    )


def _advice(cache: LogitCache, model: nn.Module) -> str:
    ours = held_in(causal_lm_of(model)) or ""
    if len(_formats(cache, model)) == 1:
        return "Use the dtype, attention implementation and TF32 of the cache, and an adapter that starts as identity."
    how = (
        f"--load-in {ours}" if ours in LOAD_IN else "the checkpoint that is trained" if ours else "unquantised weights"
    )
    return (
        f"Precompute a cache of the base as the student holds it (precompute with {how}), or, if the student is meant "
        "to start so far away, allow it by --max-start-kl."
    )


def _bound_said(found: StepZero, probe: Probe, model: nn.Module) -> str:
    """Why the tolerance is what it is."""
    if len(_formats(probe.cache, model)) > 1:
        return "--max-start-kl"
    if found.own_noise_nats is not None:
        return f"{TIMES_OWN_NOISE} times its own noise of {found.own_noise_nats:.2g}"
    if found.tolerance_nats < KL_RUN_OTHERWISE_NATS:
        return "float32 on both sides"
    return "with the same weights" if _is_run_alike(probe.cache, model) else "in another dtype or attention"


def _kl_with_adapter_off(model: nn.Module, batches: Sequence[Batch], probe: Probe) -> float | None:
    """The same KL of the model below the adapter; None where there is no adapter that PEFT can switch off, or a model
    in pieces, which other processes would have to run with this one."""
    if not isinstance(model, PeftModel) or is_sharded(model):
        return None
    if model.active_peft_config.is_prompt_learning:  # of which PEFT switches off more than the adapter: its forward
        kls, _ = _values(model.get_base_model(), batches, probe)
        return float(kls.mean())
    with model.disable_adapter():
        kls, _ = _values(model, batches, probe)
    return float(kls.mean())


def computed_in(model: nn.Module) -> torch.dtype:
    """Of float32 weights that, as they are probed outside autocast; of others, and in pieces, as they are called."""
    own: torch.dtype = causal_lm_of(model).dtype
    return own if own == torch.float32 and not is_sharded(model) else dtype_as_called(model)


def _is_float32(cache: LogitCache, model: nn.Module) -> bool:
    return {cache.manifest.model.dtype, str(computed_in(model)).removeprefix("torch.")} == {"float32"}


def _formats(cache: LogitCache, model: nn.Module) -> set[str]:
    """In which the weights of cache and model are held; one where they are held alike."""
    return {cache.manifest.model.quantization, held_in(causal_lm_of(model)) or ""}


def _run_otherwise(cache: LogitCache, model: nn.Module) -> list[str]:
    """How the model is run otherwise than the cache's base was, a phrase each: what may make more than noise."""
    theirs = cache.manifest.model
    ours = {
        "dtype": str(computed_in(model)).removeprefix("torch."),
        "attention": str(causal_lm_of(model).config._attn_implementation),
        "quantization": held_in(causal_lm_of(model)) or "",
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
    noise = own_noise(model, documents[:NUM_NOISE]) if _needs_noise(probe, model) else None
    error, tolerance = torch.cat(errors), tolerance_of(probe, model, noise)
    if not len(error):
        return StepZero(len(errors), 0, 0.0, 0.0, 0.0, tolerance, noise), (0, 0)
    worst = int(error.nan_to_num(torch.inf).argmax())
    found = StepZero(
        len(errors), len(error), float(kls.mean()), float(error.mean()), float(error[worst]), tolerance, noise
    )
    batch_of = [(i, j) for i, e in enumerate(errors) for j in range(len(e))]
    return found, batch_of[worst]


def tolerance_of(probe: Probe, model: nn.Module, own_noise_nats: float | None) -> float:
    """The largest mean KL with which a model is the base, or is near enough, in nats."""
    kept, formats = probe.cache.manifest.capture, _formats(probe.cache, model)
    if len(formats) > 1:
        asked = probe.rules.max_start_kl
        names = formats - {""}
        return max(MAX_START_KL_NATS.get(n, MAX_START_KL_OTHERS_NATS) for n in names) if asked is None else asked
    stored = kept.max_error**2 / 3
    if own_noise_nats is not None:
        return KL_FLOAT32_NATS + TIMES_OWN_NOISE * own_noise_nats + stored
    is_exact = _is_float32(probe.cache, model) and not formats & DIFFERS_FROM_ITSELF
    return (KL_FLOAT32_NATS if is_exact else KL_RUN_OTHERWISE_NATS) + stored


def _needs_noise(probe: Probe, model: nn.Module) -> bool:
    """Whether the model's own noise is the measure: it is run as the cache's base was, and that has noise."""
    formats = _formats(probe.cache, model)
    if len(formats) > 1 or not _is_run_alike(probe.cache, model):
        return False
    if formats & DIFFERS_FROM_ITSELF:
        return True
    return not (_is_float32(probe.cache, model) or probe.is_verified)


def _is_run_alike(cache: LogitCache, model: nn.Module) -> bool:
    """As the cache's base was; autocast over float32 weights, which a model in pieces keeps, is not as 16 bits are."""
    causal_lm, stated = causal_lm_of(model), cache.manifest.model
    if is_sharded(model) and autocast_dtype(model) is not None and causal_lm.dtype == torch.float32:
        return False
    ours = (str(computed_in(model)).removeprefix("torch."), str(causal_lm.config._attn_implementation))
    return (stated.dtype, stated.attention) == ours


@torch.no_grad()
def own_noise(model: nn.Module, documents: Sequence[NDArray[np.uint32]]) -> float:
    """Mean KL, nats a position, between what a model says of documents alone and padded, together in a batch."""
    together: list[Tensor] = []

    def keep(hidden: Tensor, _layer: HeadLayer) -> Tensor:
        together.append(hidden)
        return hidden.new_zeros(())

    length = max(map(len, documents)) + PADDING
    with probing(model):
        inside_forward(model, _inputs_of(model, documents, length), None, keep)
        padded = together[0].unflatten(0, (len(documents), length))
        values = [_noise_of(model, tokens, padded[i, : len(tokens)]) for i, tokens in enumerate(documents)]
    return max(0.0, float(torch.cat(values).mean()))


def _noise_of(model: nn.Module, tokens: NDArray[np.uint32], padded: Tensor) -> Tensor:
    """KL of each position of a document alone to the same of these hidden states, [T]."""
    causal_lm, values = causal_lm_of(model), list[Tensor]()

    def compare(alone: Tensor, layer: HeadLayer) -> Tensor:
        head = OutputHead(causal_lm, layer=layer)
        for rows in _slices(causal_lm, layer, len(alone)):
            p, q = (head(run[rows]).float().log_softmax(-1) for run in (alone, padded))
            values.append((p.exp() * (p - q)).sum(-1))
        return alone.new_zeros(())

    inside_forward(model, _inputs_of(model, [tokens], len(tokens)), None, compare)
    return torch.cat(values)


def _slices(causal_lm: PreTrainedModel, layer: HeadLayer, num: int) -> list[slice]:
    """Of so many rows of hidden states, one at least; one alone where parts of the head are gathered each time."""
    num_rows = max(1, num) if layer.has_parts else rows_at_once(causal_lm, PLAIN_LOSS_BYTES)
    return [slice(start, start + num_rows) for start in range(0, max(1, num), num_rows)]


def _inputs_of(model: nn.Module, documents: Sequence[NDArray[np.uint32]], length: int) -> dict[str, Tensor]:
    """Documents, padded on the right to this length."""
    device = next(model.parameters()).device
    ids, mask = torch.zeros(2, len(documents), length, dtype=torch.int64, device=device)
    for row, tokens in enumerate(documents):
        ids[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
        mask[row, : len(tokens)] = 1
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def _values(model: nn.Module, batches: Sequence[Batch], probe: Probe) -> tuple[Tensor, list[Tensor]]:
    """KL of every position, and by batch how far log p(label) is off.

    Always with the tail as a bucket, which holds the whole distribution against the cache and is stored most exactly;
    without the label where the objective is without it, unless nothing or one outcome is left there.
    """
    values, errors = list[Tensor](), list[Tensor]()
    with probing(model):
        for batch in batches:
            kl, error = _differences(model, batch, probe)
            values.append(kl)
            errors.append(error)
    torch.clear_autocast_cache()  # torch < 2.11 keeps casts made without gradient
    return torch.cat(values), errors


def _differences(model: nn.Module, batch: Batch, probe: Probe) -> tuple[Tensor, Tensor]:
    """KL(base || model) and the error of log p(label) at each position of a batch with targets, float32 [N]."""
    causal_lm, objective = causal_lm_of(model), probe.objective
    found: list[tuple[Tensor, Tensor]] = []

    def compare(hidden: Tensor, layer: HeadLayer) -> Tensor:
        targets, head = targets_of(placed(batch, hidden.device)), OutputHead(causal_lm, probe.vocab_size, layer)
        if targets is None:  # no document: the head runs as it does on other processes
            nothing = head(hidden)[:, 0].float()
            found.append((nothing, nothing))
            return hidden.new_zeros(())
        masked = objective.masked and targets.alternative_ids.shape[1] > 0  # the tail alone would agree with any
        form = Objective("masked-kl" if masked else "full-kl", min_base_rest=objective.min_base_rest)
        kls, errors = (torch.zeros(len(hidden), device=hidden.device) for _ in range(2))
        for rows in _slices(causal_lm, layer, len(hidden)):  # the loss holds no more of the logits either
            logits, part = head(hidden[rows]).float(), targets.rows(rows)
            kl, counts = regularizer_values(logits, part, form), regularizer_mask(part, form)
            if not bool(counts.all()):  # where masked KL says nothing, full KL does
                kl = torch.where(counts, kl, regularizer_values(logits, part, Objective("full-kl")))
            kls[rows] = kl
            errors[rows] = (part.label_logprobs.float() + cross_entropy(logits, part.label_ids)).abs()
        found.append((kls, errors))
        return hidden.new_zeros(())

    inside_forward(model, model_inputs(model, batch), batch[f"{PREFIX}rows"], compare)
    return found[0]


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and float32 weights outside autocast: also outside the one that accelerate puts around an
    instance's forward. A model in pieces is called as it is trained, since its wrapper casts the weights anyway."""
    inner, causal_lm = unwrapped(model), causal_lm_of(model)
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        if causal_lm.dtype == torch.float32 and not is_sharded(model):
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
