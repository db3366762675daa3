"""What pulls the weights, and not the predictions, to the base: L2-SP and EWC on the change of the adapted weights.

Baselines of the cached KL: they need no cache, and no forward of the base in a step. Owns what change DeltaW of its
weight each kind of adapter is, its square, and the Fisher information of the base. Must not know the trainer.
Trade-off: as in `fused`, the gradient is made together with the value, layer by layer, so that no [out, in] of one
layer is alive with another's; it cannot be differentiated twice.
Shapes: W [out, in] base weight; DeltaW = L R with L [out, k] and R [k, in], which is s B A for LoRA; F [out, in].
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer, variants
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.oft.layer import OFTLayer
from peft.tuners.randlora import RandLoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.tuners.vera import VeraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from logitcache.adapters.covariances import spread
from logitcache.data.batches import pad_batch
from logitcache.data.samples import Sample
from logitcache.errors import TrainingFailed, UnsuitableAdapter
from logitcache.losses.formulas import Objective
from logitcache.losses.fused import linear_loss
from logitcache.models.head import OutputHead, evaluation_mode, hidden_states

from .settings import PENALTIES as PENALTIES
from .settings import PenaltySettings as PenaltySettings

Factors = tuple[Tensor, Tensor]

_KNOWN_VARIANTS: tuple[type, ...] = (
    DoraLinearVariant,
    *((variants.MiCALinearVariant,) if hasattr(variants, "MiCALinearVariant") else ()),  # since PEFT 0.20
)
"""Variants of LoRA whose change of the weight is s B A, or made of it here."""


@dataclass(frozen=True)
class _Change:
    """DeltaW of a layer as its parameters are now. factors: L [out, k] and R [k, in]; None where there are none."""

    name: str
    shape: tuple[int, int]
    parameters: Callable[[], list[nn.Parameter]]
    factors: Callable[[], Factors] | None
    whole: Callable[[], Tensor]


class Penalty:
    """1/2 ||DeltaW||_F^2, or with fisher 1/2 sum F DeltaW^2, over the layers of an adapter. weight: loss per unit.

    adapted: with its adapter untrained. rewritten: its weights are W - s B0 A0 and not W (PiSSA and its like), so that
    DeltaW = s (B A - B0 A0), with the factors as they are now for B0 and A0. fisher: [out, in] by the layers' names in
    the base. With factors the norm is tr(L^T L R R^T), in [k, k]; for DoRA, and with fisher, a layer's DeltaW is made
    at a time. Raises `UnsuitableAdapter` where the change of a weight is not known, or something else is trained too.
    """

    def __init__(
        self,
        adapted: nn.Module,
        weight: float = 1.0,
        fisher: Mapping[str, Tensor] | None = None,
        rewritten: bool = False,
    ) -> None:
        self.weight = weight
        self._changes = _changes(adapted, rewritten)
        self._fisher = None if fisher is None else dict(fisher)
        covered = {id(p) for change in self._changes for p in change.parameters()}
        other = next((n for n, p in adapted.named_parameters() if p.requires_grad and id(p) not in covered), None)
        if other is not None:
            raise _unknown(other, "it is trained beside the adapter's factors, and nothing would pull it to the base")
        for change in self._changes if self._fisher is not None else []:
            found = self._fisher.get(change.name) if self._fisher is not None else None
            if found is None or tuple(found.shape) != change.shape:
                raise _unknown(change.name, f"there is no Fisher information of its {list(change.shape)} weights")

    def __call__(self) -> Tensor:
        """Without the weight; float32 scalar, with gradient where gradients are enabled."""
        if torch.is_grad_enabled():
            parameters = [p for change in self._changes for p in change.parameters()]
            total: Tensor = _Sum.apply(self, *parameters)  # type: ignore[no-untyped-call]
            return total
        return torch.stack([self.part(change) for change in self._changes]).sum()

    def part(self, change: _Change) -> Tensor:
        """Of one layer."""
        device = change.parameters()[0].device
        with torch.autocast(device.type, enabled=False):
            if self._fisher is None and change.factors is not None:
                left, right = change.factors()
                return ((left.T @ left) * (right @ right.T)).sum() / 2
            squares = change.whole().square()
            if self._fisher is not None:
                squares = squares * self._fisher_of(change.name, device)
            return squares.sum() / 2

    def _fisher_of(self, name: str, device: torch.device) -> Tensor:
        assert self._fisher is not None
        if self._fisher[name].device != device:  # a trainer may have moved the model since
            self._fisher[name] = self._fisher[name].to(device)
        return self._fisher[name]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, penalty: Penalty, *parameters: Tensor) -> Tensor:
        """The sum over layers; keeps its gradients."""
        total = torch.zeros((), device=parameters[0].device)
        gradients: list[Tensor] = []
        for change in penalty._changes:
            with torch.enable_grad():
                part = penalty.part(change)
                gradients += torch.autograd.grad(part, change.parameters())
            total = total + part.detach()
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        """Those, times the gradient of the sum."""
        return (None, *(g * grad_total for g in ctx.saved_tensors))


def fisher_diagonal(
    model: PreTrainedModel, names: Sequence[str], samples: Sequence[Sample], num_samples: int = 64
) -> dict[str, Tensor]:
    """Diagonal of the empirical Fisher information of the weights W of these layers: float32 [out, in] each, by name.

    F = sum over samples (d NLL / d W)^2 / (all their positions), NLL the sum of -log q(label) over a sample's
    positions: the mean over samples of its squared score, by the mean number of positions, so that 1/2 sum F DeltaW^2
    is in nats a position, as the KL is, of which it is the diagonal second-order form where the labels are the base's
    own. samples: at most num_samples of them, distinct and spread over the data, one a backward. model: the base, with
    no adapter; its `requires_grad` are as before afterwards, and no gradient is left. Beside the model this takes one
    float32 copy of these weights, and one sample's activations and largest gradient.
    Raises `UnsuitableAdapter` where a weight has no gradient of its own, `TrainingFailed` where one is not finite.
    """
    layers = {name: model.get_submodule(name) for name in names}
    check_penalised(model, layers, "ewc")
    fisher = {name: torch.zeros(layer.weight.shape, device=layer.weight.device) for name, layer in layers.items()}
    head, plain, num_positions = OutputHead(model), Objective("none"), 0
    with _squares_added_up({layer.weight: fisher[name] for name, layer in layers.items()}, model):
        for sample in spread(samples, num_samples) if layers else []:
            padded = pad_batch([sample], model.device)
            num_positions += len(padded.rows)
            hidden = hidden_states(model, input_ids=padded.input_ids, attention_mask=padded.attention_mask)
            selected = hidden.flatten(0, 1).index_select(0, padded.rows)
            linear_loss(selected, head, padded.label_ids, None, plain, 0.0, head.parameters()).loss.backward()
    for name, layer in layers.items():
        fisher[name] /= max(num_positions, 1)
        if not torch.isfinite(fisher[name]).all():
            raise TrainingFailed(
                f"computing the Fisher information of {name}: expected finite gradients of the base, found others. "
                "EWC would pull nowhere. Try --dtype float32."
            )
        if isinstance(layer, Conv1D):
            fisher[name] = fisher[name].T
    return fisher


@contextmanager
def _squares_added_up(sums: Mapping[nn.Parameter, Tensor], model: nn.Module) -> Iterator[None]:
    """Only these weights have gradients; each is squared, added and dropped as soon as a backward has made it."""

    def add(weight: Tensor, total: Tensor) -> None:
        assert weight.grad is not None
        gradient = weight.grad.float()
        total.addcmul_(gradient, gradient)
        weight.grad = None

    before = {p: p.requires_grad for p in model.parameters()}
    handles = []
    try:
        for parameter in before:
            parameter.requires_grad_(parameter in sums)
        for weight, total in sums.items():
            handles.append(weight.register_post_accumulate_grad_hook(partial(add, total=total)))
        with evaluation_mode(model), torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, required in before.items():
            parameter.requires_grad_(required)


def check_penalised(model: nn.Module, layers: Mapping[str, Any], kind: str) -> None:
    """Raise `UnsuitableAdapter` for layers to be adapted, by their names in the model, of which there is no penalty."""
    for name, layer in layers.items():
        if kind == "ewc":
            _check_differentiable(model, name, layer)
        elif not isinstance(layer, (nn.Linear, Conv1D)):
            raise _unknown(name, "it is no linear layer")


def _check_differentiable(model: nn.Module, name: str, layer: Any) -> None:
    what = f"computing the Fisher information of {name}"
    if not isinstance(layer, (nn.Linear, Conv1D)):
        raise UnsuitableAdapter(f"{what}: it is no linear layer. Leave it out of --target-modules, or use l2-sp.")
    if layer.weight.dtype not in (torch.float32, torch.bfloat16):
        raise UnsuitableAdapter(
            f"{what}: expected weights in float32 or bfloat16, found {layer.weight.dtype}, in which gradients are "
            "lost. Load the base in one of these, or use l2-sp."
        )
    if sum(m._parameters.get("weight") is layer.weight for m in model.modules()) > 1:
        raise UnsuitableAdapter(
            f"{what}: its weight is another module's too (tied embeddings), whose gradient would be in the sum. "
            "Leave it out of --target-modules, or use l2-sp."
        )


def _changes(adapted: nn.Module, rewritten: bool) -> list[_Change]:
    """The adapted layers by their names in the base. Raises `UnsuitableAdapter`."""
    adapter = getattr(adapted, "active_adapter", None)
    layers: dict[str, Any] = {}
    if isinstance(adapted, PeftModel) and isinstance(adapter, str):
        modules = adapted.get_base_model().named_modules()
        layers = {name: module for name, module in modules if isinstance(module, BaseTunerLayer)}
    changes = [_change(name, layer, str(adapter), rewritten) for name, layer in layers.items()]
    trained = [change for change in changes if change.parameters()]
    if not trained:
        raise _unknown(type(adapted).__name__, "it has no layers that one active adapter of PEFT changes and trains")
    return trained


def _change(name: str, layer: Any, adapter: str, rewritten: bool) -> _Change:
    if not isinstance(layer.get_base_layer(), (nn.Linear, Conv1D)):
        raise _unknown(name, "it is no linear layer")
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    if variant is not None and not isinstance(variant, _KNOWN_VARIANTS):
        raise _unknown(name, f"{type(variant).__name__} does more than to add s B A")
    if rewritten and (variant is not None or isinstance(layer, AdaLoraLayer) or not isinstance(layer, LoraLayer)):
        raise _unknown(name, f"{type(layer).__name__} is not known to start from rewritten weights")
    names: tuple[str, ...]
    factors: Callable[[], Factors]
    if isinstance(layer, AdaLoraLayer):
        names, factors = ("lora_A", "lora_B", "lora_E"), partial(_adalora_factors, layer, adapter)
    elif isinstance(layer, LoraLayer):
        start = tuple(f.detach().clone() for f in _lora_factors(layer, adapter)) if rewritten else None
        names, factors = ("lora_A", "lora_B"), partial(_lora_factors, layer, adapter, start)
    elif isinstance(layer, VeraLayer):
        names, factors = ("vera_lambda_b", "vera_lambda_d"), partial(_vera_factors, layer, adapter)
    elif isinstance(layer, RandLoraLayer):
        names, factors = ("randlora_lambda", "randlora_gamma"), partial(_randlora_factors, layer, adapter)
    elif isinstance(layer, OFTLayer):
        return _rotation(name, layer, adapter)
    else:
        raise _unknown(name, f"of {type(layer).__module__}.{type(layer).__name__} it is not known here")
    shape = (int(layer.out_features), int(layer.in_features))
    if isinstance(variant, DoraLinearVariant):
        if not layer.get_base_layer().weight.is_floating_point():
            raise _unknown(name, "the weights that DoRA scales are quantised")
        trained = partial(_trained, layer, adapter, (*names, "lora_magnitude_vector"))
        return _Change(name, shape, trained, None, partial(_dora_change, layer, adapter, factors))
    return _Change(name, shape, partial(_trained, layer, adapter, names), factors, partial(_product, factors))


def _trained(layer: Any, adapter: str, names: Sequence[str]) -> list[nn.Parameter]:
    held = [getattr(layer, name)[adapter] for name in names]
    weights: list[Any] = [entry.weight if isinstance(entry, nn.Module) else entry for entry in held]
    return [weight for weight in weights if weight.requires_grad]


def _lora_factors(layer: Any, adapter: str, start: tuple[Tensor, ...] | None = None) -> Factors:
    """s B and A; with start s B0, A0: s [B - B0 | B0] and [A; A - A0], where nothing cancels near the start."""
    b, a = layer.lora_B[adapter].weight.float() * layer.scaling[adapter], layer.lora_A[adapter].weight.float()
    if start is None:
        return b, a
    b0, a0 = (f.to(a.device) for f in start)
    return torch.cat([b - b0, b0], dim=1), torch.cat([a, a - a0])


def _adalora_factors(layer: Any, adapter: str) -> Factors:
    scale = layer.scaling[adapter] / (layer.ranknum[adapter] + 1e-5)  # as PEFT has it
    return layer.lora_B[adapter].float() * scale, (layer.lora_A[adapter] * layer.lora_E[adapter]).float()


def _vera_factors(layer: Any, adapter: str) -> Factors:
    b, d = layer.vera_lambda_b[adapter].float(), layer.vera_lambda_d[adapter].float()
    left = layer.vera_B[adapter][: layer.out_features].to(b)
    return b[:, None] * left, d[:, None] * layer.vera_A[adapter][:, : layer.in_features].to(d)


def _randlora_factors(layer: Any, adapter: str) -> Factors:
    right, left = layer.get_scaled_bases(adapter, device=layer.randlora_lambda[adapter].device)
    return left.float() * layer.scaling[adapter], right.float()


def _product(factors: Callable[[], Factors]) -> Tensor:
    left, right = factors()
    return left @ right


def _dora_change(layer: Any, adapter: str, factors: Callable[[], Factors]) -> Tensor:
    """m (W + s B A) / ||W + s B A|| - W, the norm by rows; with its gradient, which DoRA's own forward leaves out."""
    base = layer.get_base_layer()
    weight = (base.weight.T if isinstance(base, Conv1D) else base.weight).detach().float()
    moved = weight + _product(factors)
    magnitude = layer.lora_magnitude_vector[adapter].weight.float()
    change: Tensor = (magnitude / moved.norm(dim=1))[:, None] * moved - weight
    return change


def _rotation(name: str, layer: Any, adapter: str) -> _Change:
    """Of OFT: W R^T - W, which has no factors smaller than W."""
    if not layer.get_base_layer().weight.is_floating_point():
        raise _unknown(name, "the weights that OFT rotates are quantised")
    if layer.oft_R[adapter].coft:
        raise _unknown(name, "COFT sets its parameters back in every forward, whatever the gradient of a penalty did")
    shape = (int(layer.out_features), int(layer.in_features))
    return _Change(
        name, shape, partial(_trained, layer, adapter, ("oft_R",)), None, partial(_oft_change, layer, adapter)
    )


def _oft_change(layer: Any, adapter: str) -> Tensor:
    """W (R^T - I) block by block, R as PEFT's own forward makes it: it turns an input x, a row, into x R."""
    rotation = layer.oft_R[adapter]
    made: Tensor = rotation._cayley_batch(
        rotation.weight.float(), rotation.block_size, rotation.use_cayley_neumann, rotation.num_cayley_neumann_terms
    )
    off = made - torch.eye(rotation.block_size, device=made.device)  # [blocks, c, c]; one for all where they share it
    weight = layer.get_base_layer().weight.detach().float()
    blocks = weight.view(len(weight), -1, rotation.block_size).transpose(0, 1)  # [blocks, out, c]
    change: Tensor = (blocks @ off.mT).transpose(0, 1).reshape(weight.shape)
    return change


def _unknown(where: str, why: str) -> UnsuitableAdapter:
    return UnsuitableAdapter(
        f"making a penalty on the change of the weights, {where}: {why}. The base would not be what it pulls to. "
        "Use another --adapter, or --regularizer masked-kl, which knows predictions only."
    )
