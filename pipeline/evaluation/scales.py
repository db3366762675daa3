"""The curve from the base to an adapted model: what is learnt and forgotten at a part of the change of the weights.

    W(s) = W_base + s (W_adapted - W_base)      WiSE-FT (Wortsman et al., arXiv 2109.01903), of any adapter that merges

Owns the weights in between; measuring them is `compare`. Nothing is trained: a point of the curve is a setting that
was had for nothing, and the competitor of every regulariser. Trade-off: two models are in memory, and the change in
float32.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from logitcache.errors import UnsupportedModel
from logitcache.models.device_map import offloaded_parts
from logitcache.models.loading import first_line
from logitcache.models.quantization import held_in

from .metrics import Comparison


@dataclass(frozen=True)
class Point:
    """A part of the way, and what the model there came to on each text."""

    scale: float
    results: dict[str, Comparison]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"scale": self.scale, **{name: result.as_dict() for name, result in self.results.items()}}


def curve(
    base: PreTrainedModel,
    adapted: nn.Module,
    scales: Sequence[float],
    measured: Callable[[nn.Module], dict[str, Comparison]],
) -> list[Point]:
    """What `measured` says at each scale. adapted: an adapter on a second model, which is merged and changed by this;
    base: the untouched one, which must be another model in memory. Raises as `models_between`."""
    return [Point(scale, measured(model)) for scale, model in models_between(base, adapted, scales)]


@torch.no_grad()
def models_between(
    base: PreTrainedModel, adapted: nn.Module, scales: Sequence[float]
) -> Iterator[tuple[float, nn.Module]]:
    """The model at each scale, one after the other in the same memory: each is good until the next.

    0 is the base, 1 the adapted model with its adapter merged. Raises `UnsupportedModel` where the adapter cannot be
    merged, the weights of the two are not of the same names and shapes, or are not numbers in memory.
    """
    check_in_memory(base)
    merged = _merged(adapted)
    ours, theirs = (dict(m.named_parameters(remove_duplicate=False)) for m in (base, merged))
    strange = [n for n, p in theirs.items() if n not in ours or ours[n].shape != p.shape] or sorted(
        ours.keys() - theirs
    )
    if strange:
        raise UnsupportedModel(
            f"scaling an adapter: expected the merged model to have the weights of its base, found {len(strange)} that "
            f"only one has or that are of another size, the first {strange[0]}. There is nothing in between. Leave "
            "--scales out."
        )
    changes = {n: _wide(p) - _wide(ours[n]).to(p.device) for n, p in theirs.items() if not _same(p, ours[n])}
    for scale in scales:
        for name, change in changes.items():
            theirs[name].copy_(_wide(ours[name]).to(change.device) + scale * change)
        yield scale, merged


def check_in_memory(base: PreTrainedModel) -> None:
    """Raise `UnsupportedModel` where a weight is packed, so that its bytes are no numbers, or is not here."""
    held, elsewhere = held_in(base), offloaded_parts(base)
    if held is None and not elsewhere:
        return
    found = f"a base held in {held}" if held else f"{len(elsewhere)} parts offloaded, the first {elsewhere[0]}"
    raise UnsupportedModel(
        f"scaling an adapter: expected the weights of the base as numbers in memory, found {found}. What lies between "
        "base and adapter cannot be made of them. Leave --scales out, or give the base unquantised and on a device."
    )


def _merged(adapted: nn.Module) -> nn.Module:
    """The adapter in the weights of its model; a model that was trained as a whole as it is."""
    if not isinstance(adapted, PeftModel):
        return adapted
    _untie(adapted)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Model with `tie_word_embeddings=True`")  # asks for what `_untie` did
            merged: nn.Module = adapted.merge_and_unload(safe_merge=True)
    except Exception as error:  # peft raises many kinds
        raise UnsupportedModel(
            f"scaling an adapter of kind {adapted.active_peft_config.peft_type.value}: PEFT does not merge it into "
            f"this model ({first_line(error)}). What lies between base and adapter cannot be had. Leave --scales out."
        ) from error
    return merged.eval()


def _untie(adapted: PeftModel) -> None:
    """Give every adapted layer a weight of its own: merged into one that another module has too (a tied head and its
    embedding), the change would be both modules'."""
    owners = Counter(id(p) for _, p in adapted.named_parameters(remove_duplicate=False))
    for layer in adapted.modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        adapted_layer = layer.get_base_layer()
        for name, parameter in list(adapted_layer.named_parameters(recurse=False)):
            if owners[id(parameter)] > 1:
                setattr(adapted_layer, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other.to(one.device))
