"""Learning and forgetting: how well base and adapted model predict new text and prior text.

Owns the metrics. "Before" is always measured on a base that no adapter has touched: base and adapted model are two
models in memory here (once, not in every training step). Must not train.
Shapes: N positions, V vocabulary.
"""

import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import InputNotFound, NonFiniteLogits, NotTheBase, UnsupportedModel
from .head import OutputHead, causal_lm_of, check_length, hidden_states, rows_at_once
from .models import Base, first_line
from .precompute import PrecomputeSettings, make_plan
from .samples import PaddedBatch, Sample, pad_batch
from .teacher import SLICE_BYTES

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Metrics:
    """Means over the supervised positions of a data set: cross-entropy in nats, share of tokens predicted first."""

    num_positions: int
    ce_nats: float
    token_accuracy: float

    @property
    def perplexity(self) -> float:
        """exp(cross-entropy)."""
        return math.exp(self.ce_nats)


@dataclass(frozen=True)
class Comparison:
    """One data set before and after; kl_nats: mean KL(base || adapted) over the whole vocabulary. None: no adapter."""

    before: Metrics
    after: Metrics | None = None
    kl_nats: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON, perplexities included."""
        sides = {"before": self.before, "after": self.after}
        flat = {k: None if m is None else {**asdict(m), "perplexity": m.perplexity} for k, m in sides.items()}
        return {**flat, "kl_nats": self.kl_nats}


def check_adapter(folder: str, base: Base) -> None:
    """Raise `InputNotFound` where the folder is no adapter, `NotTheBase` where its run.json names another model."""
    if not (Path(folder) / "adapter_config.json").is_file():
        raise InputNotFound(f"loading adapter {folder!r}: expected adapter_config.json in it, found none.")
    run = Path(folder) / "run.json"
    if not run.is_file():  # an adapter made elsewhere
        return
    try:
        trained_on = json.loads(run.read_text(encoding="utf-8"))["model"]
        name, weights, config = (str(trained_on[key]) for key in ("name", "weights", "config"))
    except (ValueError, KeyError, TypeError) as error:
        raise UnsupportedModel(
            f"loading adapter {folder!r}: its run.json does not say which model it was trained on. "
            "Restore it from a copy; for an adapter made elsewhere, remove it."
        ) from error
    if (weights, config) != (base.identity.weights, base.identity.config):
        raise NotTheBase(
            f"loading adapter {folder!r}: it was trained on {name} (weights {weights}), "
            f"not on {base.source.name} (weights {base.identity.weights}). Give the model it was trained on."
        )


def load_adapter(base: PreTrainedModel, folder: str) -> PeftModel:
    """`base` with a trained adapter, in evaluation mode. `base` itself is changed by it: load it for this.

    Raises `UnsupportedModel` where the adapter is damaged or does not fit; a factor that is missing would be random.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys")
            model: PeftModel = PeftModel.from_pretrained(base, folder)
        places = get_peft_model_state_dict(model, save_embedding_layers=False).keys() | model.state_dict().keys()
        stray = sorted(load_peft_weights(folder, device="cpu").keys() - places)
        if stray:
            raise ValueError(f"{len(stray)} of its tensors have no place in the model: {stray[0]}, ...")
    except Exception as error:  # peft and safetensors raise many kinds
        raise UnsupportedModel(
            f"loading adapter {folder!r}: it is damaged, or of a model of other sizes ({first_line(error)}). "
            "Give the model it was trained on, or train it again."
        ) from error
    return model.eval()


@torch.inference_mode()
def compare(
    base: PreTrainedModel,
    adapted: nn.Module | None,
    samples: Sequence[Sample],
    batch_tokens: int = 8192,
    progress: Progress = lambda _: None,
) -> Comparison:
    """Metrics of both models on the same positions; equal samples count once."""
    check_length(base, max(len(s.token_ids) for s in samples))
    totals: dict[str, Tensor] = {}
    plan = make_plan(samples, PrecomputeSettings(batch_tokens=batch_tokens))
    for batch in (batch for shard in plan.shards for batch in shard):
        padded = pad_batch(batch, base.device)
        for name, value in _sums(base, adapted, padded).items():
            totals[name] = totals.get(name, torch.zeros((), dtype=torch.float64)) + value.double().cpu()
        progress(sum(len(s.token_ids) for s in batch))
    count = plan.num_positions
    mean = {name: float(total) / count for name, total in totals.items()}
    if not all(math.isfinite(value) for value in mean.values()):
        raise NonFiniteLogits(
            f"evaluating on {samples[0].origin} and {len(samples) - 1} more samples: {mean} is not finite. "
            "The base or the adapter is damaged. Try --dtype float32, or train again."
        )
    before = Metrics(count, mean["ce_before"], mean["hits_before"])
    if adapted is None:
        return Comparison(before)
    return Comparison(before, Metrics(count, mean["ce_after"], mean["hits_after"]), mean["kl"])


def _sums(base: PreTrainedModel, adapted: nn.Module | None, batch: PaddedBatch) -> dict[str, Tensor]:
    """Sums over the batch, with one slice of [n, V] alive at a time and model."""
    models: list[nn.Module] = [base] if adapted is None else [base, adapted]
    hidden = [
        hidden_states(m, input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        .flatten(0, 1)
        .index_select(0, batch.rows)
        for m in models
    ]
    heads = [OutputHead(causal_lm_of(m)) for m in models]
    num_rows = rows_at_once(base, SLICE_BYTES)
    sums: dict[str, Tensor] = {}
    for labels, *parts in zip(batch.label_ids.split(num_rows), *(h.split(num_rows) for h in hidden), strict=True):
        logprobs = [head(h).float().log_softmax(dim=1) for head, h in zip(heads, parts, strict=True)]
        slice_sums = {}
        for side, q in zip(("before", "after"), logprobs, strict=False):
            slice_sums[f"ce_{side}"] = -q.gather(1, labels[:, None]).double().sum()
            slice_sums[f"hits_{side}"] = (q.argmax(dim=1) == labels).sum()
        if adapted is not None:
            p, q = logprobs
            slice_sums["kl"] = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).double().sum()
        for name, value in slice_sums.items():
            sums[name] = sums.get(name, torch.zeros_like(value)) + value
    return sums
