"""First values of A and B that PEFT does not have, or has not without samples.

Owns MiLoRA's and LoRA-Null's decompositions (float64, whatever the weight), and the samples, batches and limits under
which PEFT computes those of EVA, CorDA and LoRA-GA. Must not choose among kinds: `registry` does. Trade-off: the
samples are the training samples themselves, spread over the data; what was drawn is reproducible and needs no second
data set. Shapes: W [out, in] base weight, U [r, in] orthonormal rows, A [r, in], B [out, r]; s: the adapter's scale.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from logitcache.data.batches import pad_batch, pad_samples
from logitcache.data.samples import Sample
from logitcache.errors import UnsuitableAdapter
from logitcache.models.head import OutputHead, causal_lm_of, hidden_states

from .covariances import spread

NUM_SAMPLES = 256
"""Of the training samples; LoRA-GA, which runs backwards too, takes a quarter of them."""

MIN_BATCH_POSITIONS = 512
MAX_FORWARDS = 2000


def minor_components(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """B, A of MiLoRA: s B A are the r smallest singular components of W (arXiv 2406.09044).

    W = U S V^T; B = U_r sqrt(S_r / s), A = sqrt(S_r / s) V_r^T. weight: [out, in] with r <= min(out, in); float64 out.
    """
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    root = (s[-rank:] / scale).sqrt()
    return u[:, -rank:] * root, root[:, None] * vt[-rank:]


def projected_factors(weight: Tensor, directions: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """B, A of LoRA-Null: s B A = P = W U^T U, W projected on the least used directions of its input.

    P = X S Y^T; B = X sqrt(S / s), A = sqrt(S / s) Y^T (arXiv 2503.02659). Of W U^T = X S Z^T [out, r] alone, since
    Y^T = Z^T U. directions: [r, in], r <= out; float64 out.
    """
    rows = directions.double()
    x, s, zt = torch.linalg.svd(weight.double() @ rows.T, full_matrices=False)
    root = (s / scale).sqrt()
    return x * root, root[:, None] * (zt @ rows)


def calibrate_corda(model: PreTrainedModel, config: LoraConfig, samples: Sequence[Sample]) -> None:
    """Leave on the layers what PEFT's CorDA starts from: decompositions of W times the covariance of its inputs."""
    from peft.tuners.lora.corda import preprocess_corda

    def run() -> None:
        for sample in spread(samples, NUM_SAMPLES):  # one by one: PEFT's hook knows no padding
            padded = pad_batch([sample], model.device)
            hidden_states(model, input_ids=padded.input_ids, attention_mask=padded.attention_mask)

    preprocess_corda(model, config, run_model=run)


def calibrate_loraga(model: PreTrainedModel, config: LoraConfig, samples: Sequence[Sample]) -> None:
    """Leave on the layers what PEFT's LoRA-GA starts from: the gradient of the cross-entropy by W.

    That of the whole objective too: the gradient of KL(base || adapted) is 0 where training starts.
    """
    from peft.tuners.lora.loraga import preprocess_loraga

    head = OutputHead(model)

    def step() -> None:
        for sample in spread(samples, NUM_SAMPLES // 4):
            padded = pad_batch([sample], model.device)
            hidden = hidden_states(model, input_ids=padded.input_ids, attention_mask=padded.attention_mask)
            logits = head(hidden.flatten(0, 1).index_select(0, padded.rows))
            F.cross_entropy(logits.float(), padded.label_ids).backward()

    with warnings.catch_warnings():  # PEFT counts by hooks that the first layer's input has no gradient for
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        preprocess_loraga(model, config, train_step=step)


def calibrate_eva(adapted: PeftModel, num_components: int, samples: Sequence[Sample]) -> None:
    """Fill A with what PEFT's EVA finds: principal components of the layers' inputs at labels, ranks redistributed.

    num_components: of the largest rank that a layer may get. Raises `UnsuitableAdapter` where the samples have fewer
    labels than that, or PEFT's iteration does not settle.
    """
    from peft import initialize_lora_eva_weights

    batches = list(_eva_batches(adapted, samples, num_components))
    count = 0

    def forward(model: Any, inputs: dict[str, Tensor]) -> None:
        nonlocal count
        count += 1
        if count > MAX_FORWARDS:
            raise UnsuitableAdapter(
                f"initialising eva: its components have not settled after {MAX_FORWARDS} batches. Use a lower --rank."
            )
        hidden_states(model, input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])

    initialize_lora_eva_weights(
        adapted, batches, forward_fn=forward, gather_distributed_inputs=False, show_progress_bar=False
    )


def _eva_batches(adapted: PeftModel, samples: Sequence[Sample], num_components: int) -> Iterator[dict[str, Tensor]]:
    """Batches with labels enough: PEFT's iteration passes over smaller ones, for ever where all are."""
    least, device = max(4 * num_components, MIN_BATCH_POSITIONS), causal_lm_of(adapted).device
    parts: list[list[Sample]] = [[]]
    used = spread(samples, NUM_SAMPLES)
    for sample in used:
        parts[-1].append(sample)
        if sum(len(s.positions) for s in parts[-1]) >= least:
            parts.append([])
    total = sum(len(s.positions) for s in used)
    if total < num_components:
        raise UnsuitableAdapter(
            f"initialising eva: expected at least {num_components} labels in the samples, found {total}. "
            "Train on more text, or use a lower --rank."
        )
    for part in parts[:-1] or parts:
        yield pad_samples(part, device)
