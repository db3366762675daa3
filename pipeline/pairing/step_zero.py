"""Before the first step: does the model start where the cache says it does?

Owns the measurement, KL(base || adapted) with an untrained adapter, and how much of it is noise. Must not train.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from logitcache.data.batches import pad_samples
from logitcache.data.samples import Sample
from logitcache.errors import NotTheBase
from logitcache.losses.formulas import Objective, cross_entropy, regularizer_mask, regularizer_values
from logitcache.models.device_map import head_device
from logitcache.models.head import OutputHead, causal_lm_of, evaluation_mode, rows_at_once
from logitcache.models.head_layer import HeadLayer
from logitcache.models.inside_forward import inside_forward
from logitcache.models.quantization import held_in
from logitcache.models.sharding import called_in_checks
from logitcache.models.tf32 import tf32_is_on
from logitcache.storage import LogitCache
from logitcache.storage.identity import differing

from .inputs import model_inputs
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
    check_step_zero(model, found, cache, f"{probed[batch].origin} at position {int(probed[batch].positions[place])}")
    return found


def check_first_batch(
    model: nn.Module, batch: Batch, cache: LogitCache, objective: Objective, vocab_size: int | None = None
) -> None:
    """`measure` on a batch with targets. Raises `NotTheBase` where it is above the noise, naming row and column.

    Not through a distributed wrapper, since the first batch of another process may have nothing to measure; but of a
    model in pieces by all processes together, of which one without positions says nothing.
    """
    found, (_, place) = measure(called_in_checks(model), [batch], cache, objective, vocab_size)
    if not found.num_positions:
        return
    row, column = divmod(int(batch[f"{PREFIX}rows"][place]), batch["input_ids"].shape[1])
    check_step_zero(model, found, cache, f"row {row} of the first batch at column {column}")


def check_step_zero(model: nn.Module, found: StepZero, cache: LogitCache, worst: str) -> None:
    """Raise `NotTheBase` unless what `measure` found is noise. worst: where log p(label) differs most."""
    if found.kl_nats <= found.tolerance_nats:
        return
    how = _run_otherwise(cache, causal_lm_of(model))
    otherwise = f"It is run otherwise: {'; '.join(how)}. " if how else ""
    raise NotTheBase(
        f"checking step 0 against {cache.path}: expected KL(base || adapted) of at most {found.tolerance_nats:g} nats "
        f"with an untrained adapter, found {found.kl_nats:.4g}; log p(label) differs most in {worst}, by "
        f"{found.worst_label_error_nats:.4g} nats. The model does not start from the distributions of the "
        f"cache. {otherwise}Use the dtype, attention implementation and TF32 of the cache, and an adapter that starts "
        "as identity."
    )


def computed_in(causal_lm: PreTrainedModel) -> torch.dtype:
    """Of the model, or of autocast."""
    kind = head_device(causal_lm).type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else causal_lm.dtype


def _run_otherwise(cache: LogitCache, causal_lm: PreTrainedModel) -> list[str]:
    """How the model is run otherwise than the cache's base was, a phrase each: what may make more than noise."""
    theirs = cache.manifest.model
    ours = {
        "dtype": str(computed_in(causal_lm)).removeprefix("torch."),
        "attention": str(causal_lm.config._attn_implementation),
        "tf32": tf32_is_on(),
    }
    stated = {name: getattr(theirs, name) for name in ours}
    return differing(stated, ours, "in the cache", "in the model")


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
    without the label where the objective is without it, unless nothing or one outcome is left there. 0 but for
    numerical noise where the model is the base. vocab_size: the first tokens only, as the batches have it.
    """
    causal_lm = causal_lm_of(model)
    values, errors = list[Tensor](), list[Tensor]()
    with evaluation_mode(model):
        for batch in batches:
            kl, error = _differences(model, batch, objective, vocab_size)
            values.append(kl)
            errors.append(error)
    torch.clear_autocast_cache()  # torch < 2.11 keeps casts made without gradient
    kls, error = torch.cat(values), torch.cat(errors)
    dtypes = {cache.manifest.model.dtype, str(computed_in(causal_lm)).removeprefix("torch.")}
    tolerance = max(KL_TOLERANCE_NATS.get(dtype, 0.05) for dtype in dtypes) + cache.manifest.capture.max_error**2 / 3
    if cache.manifest.capture.tail_from_remainder:
        tolerance += KL_TOLERANCE_REMAINDER_NATS
    formats = {cache.manifest.model.quantization, held_in(causal_lm) or ""}
    counted = formats if len(formats) > 1 else formats & DIFFERS_FROM_ITSELF
    tolerance += sum(KL_TOLERANCE_QUANTIZED_NATS.get(name, 0.0) for name in counted)
    if not len(error):
        return StepZero(len(errors), 0, 0.0, 0.0, 0.0, tolerance), (0, 0)
    mean_kl = float(kls.mean())
    worst = int(error.nan_to_num(torch.inf).argmax())
    found = StepZero(len(errors), len(error), mean_kl, float(error.mean()), float(error[worst]), tolerance)
    batch_of = [(i, j) for i, e in enumerate(errors) for j in range(len(e))]
    return found, batch_of[worst]


def _differences(model: nn.Module, batch: Batch, objective: Objective, vocab_size: int | None) -> tuple[Tensor, Tensor]:
    """KL(base || model) and the error of log p(label) at each position of a batch with targets, float32 [N]."""
    causal_lm = causal_lm_of(model)
    found: list[tuple[Tensor, Tensor]] = []

    def compare(hidden: Tensor, layer: HeadLayer) -> Tensor:
        targets, head = targets_of(placed(batch, hidden.device)), OutputHead(causal_lm, vocab_size, layer)
        if targets is None:  # no document: the head runs as it does on other processes
            nothing = head(hidden)[:, 0].float()
            found.append((nothing, nothing))
            return hidden.new_zeros(())
        masked = objective.masked and targets.alternative_ids.shape[1] > 0  # the tail alone would agree with any
        form = Objective("masked-kl" if masked else "full-kl", min_base_rest=objective.min_base_rest)
        num_rows = max(1, len(hidden)) if layer.has_parts else rows_at_once(causal_lm, PLAIN_LOSS_BYTES)
        kls, errors = (torch.zeros(len(hidden), device=hidden.device) for _ in range(2))
        for start in range(0, max(1, len(hidden)), num_rows):  # the loss holds no more of the logits either
            rows = slice(start, start + num_rows)
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
