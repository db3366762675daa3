"""Covariances of the inputs of a model's linear layers: C = sum over positions of x x^T.

Owns which samples are run, which layers share an input, so that their work is done once, and how much is held at a
time. Sums are float64, since the smallest eigenvalues are what counts: in float32 they would be the rounding errors of
the largest. Products are float64 too where they are not asked for in float32, whose error is half a rounding of the
largest eigenvalue (docs/adapters.md). Must not know what the covariances are for.
Shapes: N positions, D width of a layer's input, r directions, B rows, T time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from logitcache.data.batches import PaddedBatch, batches_by_length, pad_batch
from logitcache.data.samples import Sample, distinct
from logitcache.errors import NonFiniteLogits, UnsupportedModel
from logitcache.events import Progress
from logitcache.models.head import check_length, hidden_states

PROBE_TOKENS = 8


@dataclass(frozen=True)
class InputGroup:
    """Layers that are given the same tensor (q, k and v; gate and up), by name, and its width D."""

    layers: tuple[str, ...]
    width: int


def linear_layers(model: PreTrainedModel) -> dict[str, Any]:
    """Every linear layer but the output head, by name: what PEFT adapts under 'all-linear'."""
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head}


def spread(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Distinct samples, at most `count`, evenly spread over the data."""
    found = list(distinct(samples))
    count = min(count, len(found))
    return [found[i * len(found) // count] for i in range(count)]


@torch.no_grad()
def input_covariances(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    batch_tokens: int = 8192,
    memory_bytes: int = 4 * 2**30,
    progress: Progress = lambda _: None,
    products: torch.dtype = torch.float64,
) -> Iterator[tuple[InputGroup, Tensor]]:
    """C = sum of x x^T over all positions that are no padding, float64 [D, D], input by input.

    As many at once as memory_bytes holds (at least one), the others in further passes, each of which runs the model no
    deeper than it must. The caller drops one before it takes the next.
    """
    check_length(model, max(len(s.token_ids) for s in samples))
    groups = input_groups(model, samples[0])
    batches = list(batches_by_length(samples, batch_tokens))
    for part in _passes(groups, memory_bytes):
        found = _accumulate(model, part, batches, progress, products)
        for group in part:
            covariance = found.pop(group)
            if not torch.isfinite(covariance).all():
                raise NonFiniteLogits(
                    f"computing covariances: inputs of {group.layers[0]} are not finite. Try --dtype float32."
                )
            yield group, covariance
            del covariance


def num_passes(model: PreTrainedModel, sample: Sample, memory_bytes: int) -> int:
    """How often the text is run."""
    return len(_passes(input_groups(model, sample), memory_bytes))


def input_groups(model: PreTrainedModel, sample: Sample) -> list[InputGroup]:
    """Which layers are given the very same tensor, in the order in which they run.

    Found by running a few tokens. Raises `UnsupportedModel` where a layer does not run, or runs more than once.
    """
    seen: dict[str, list[Tensor]] = {}
    layers = linear_layers(model)

    def look(name: str, x: Tensor) -> None:
        seen.setdefault(name, []).append(x)  # kept alive: two tensors never share an id

    few = Sample(sample.token_ids[:PROBE_TOKENS], sample.supervised[:PROBE_TOKENS], sample.origin)
    with _watched(layers, look):
        _run(model, pad_batch([few], model.device))
    odd = next((name for name in layers if len(seen.get(name, [])) != 1), None)
    if odd is not None:
        raise UnsupportedModel(
            f"computing covariances of {type(model).__name__}: expected every linear layer to run once a forward, "
            f"found {len(seen.get(odd, []))} runs of {odd}. Its inputs are not those of all tokens."
        )
    groups: dict[int, list[str]] = {}
    for name, (x,) in seen.items():
        if x.dim() != 3 or x.shape[:2] != (1, len(few.token_ids)):
            raise UnsupportedModel(
                f"computing covariances of {type(model).__name__}: the input of {name} has shape {tuple(x.shape)}, "
                "in which padding cannot be told from text."
            )
        groups.setdefault(id(x), []).append(name)
    return [InputGroup(tuple(names), seen[names[0]][0].shape[-1]) for names in groups.values()]


def num_operations(groups: Sequence[InputGroup], num_tokens: int) -> int:
    """Multiplications and additions of all products, 2 N D^2 an input."""
    return sum(2 * num_tokens * group.width**2 for group in groups)


def energy_ratio(directions: Tensor, covariance: Tensor) -> float:
    """Mean energy of inputs along the rows of A, over that along a random direction: 1 for random rows.

    (1 / r) sum_i a_i^T C a_i / |a_i|^2, over tr C / D. directions: [r, D]; covariance: float64 [D, D].
    """
    rows = nn.functional.normalize(directions.to(covariance), dim=1)
    along = ((rows @ covariance) * rows).sum(dim=1).mean()
    return float(along / covariance.diagonal().mean())


class _Enough(Exception):
    """The deepest layer of a pass has run."""


def _accumulate(
    model: PreTrainedModel,
    part: Sequence[InputGroup],
    batches: Sequence[Sequence[Sample]],
    progress: Progress,
    products: torch.dtype,
) -> dict[InputGroup, Tensor]:
    """One pass: C of each group, float64 [D, D] on the model's device."""
    by_layer, last = {g.layers[0]: g for g in part}, part[-1].layers[0]
    found = {g: torch.zeros(g.width, g.width, dtype=torch.float64, device=model.device) for g in part}
    mask = torch.ones(0, dtype=torch.bool)

    def add(name: str, x: Tensor) -> None:
        rows = x[mask].to(products)
        if products == torch.float64:
            found[by_layer[name]].addmm_(rows.T, rows)
        else:
            with torch.autocast(rows.device.type, enabled=False):  # it would multiply in half precision
                found[by_layer[name]] += rows.T @ rows
        if name == last:
            raise _Enough

    layers = linear_layers(model)
    with _watched({name: layers[name] for name in by_layer}, add):
        for batch in batches:
            padded = pad_batch(batch, model.device)
            mask = padded.attention_mask.bool()
            _run(model, padded)
            progress(int(mask.sum()))
    return found


@contextmanager
def _watched(layers: dict[str, nn.Module], see: Any) -> Iterator[None]:
    """Calls see(name, input) before each of these layers runs."""

    def hook(name: str) -> Any:
        return lambda _, inputs: see(name, inputs[0])

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(model: PreTrainedModel, batch: PaddedBatch) -> None:
    try:
        hidden_states(model, input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    except _Enough:
        return


def _passes(groups: Sequence[InputGroup], memory_bytes: int) -> list[list[InputGroup]]:
    """The groups in their order, as many a pass as fit, at least one."""
    parts: list[list[InputGroup]] = []
    used = 0
    for group in groups:
        size = 8 * group.width**2
        if not parts or used + size > memory_bytes:
            parts.append([])
            used = 0
        parts[-1].append(group)
        used += size
    return parts
