"""The closed table of adapters: PEFT's configuration of each, and what it does to the base.

Owns the rows; `settings` has what a user chooses, `attach` attaches and saves what they describe. First values that
PEFT does not have are `start`'s. Trade-off: one table for kinds that share little, so that what differs is a column and
not a branch.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    EvaConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    RandLoraConfig,
    VeraConfig,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import CordaConfig
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from logitcache.data.samples import Sample
from logitcache.errors import InputNotFound
from logitcache.models.quantization import LOAD_IN

from .null_space import NullSpace
from .settings import NO_ADAPTER as NO_ADAPTER
from .settings import AdapterSettings as AdapterSettings
from .start import calibrate_corda, calibrate_eva, calibrate_loraga, minor_components, projected_factors

NAME = "default"
"""Of the adapter inside PEFT's model."""

EVA_REDISTRIBUTION = 2.0
"""Largest rank of a layer over the mean rank, PEFT's default."""

Layers = dict[str, Any]


@dataclass(frozen=True)
class AdapterKind:
    """A row of the table."""

    #: PEFT's configuration for settings and the layers' names.
    config: Callable[[AdapterSettings, Layers], PeftConfig]
    #: W becomes W - s B A, so that `disable_adapter()` is no longer the base.
    rewrites_base: bool = False
    #: Done to the model before PEFT's own initialisation.
    before: Callable[[PreTrainedModel, PeftConfig, Sequence[Sample]], None] | None = None
    #: Done to the model after PEFT's own initialisation.
    after: Callable[[PeftModel, AdapterSettings, Sequence[Sample]], None] | None = None
    needs_samples: bool = False
    #: r times this is at most the smaller side of every layer; 0 where r is no rank of the change, and a larger one
    #: says more (randlora, vera), or is none (oft).
    rank_sides: int = 1
    #: Its first values are made from each weight, or its inputs.
    decomposes: bool = False
    #: Rows of `quantization.LOAD_IN`, weights that it may stand on.
    quantized: tuple[str, ...] = ()
    #: The first PEFT whose layer stands on them.
    quantized_since: str = "0.18"
    #: The first PEFT that has it, where that is a later one than plug-ins run with.
    since: str = "0.18"


def targets_of(settings: AdapterSettings) -> Any:
    """What PEFT is told to adapt: 'all-linear', or a list of names."""
    names = settings.target_modules
    return names if names == "all-linear" else [name.strip() for name in names.split(",")]


def _lora(init: bool | str = True, **changes: Any) -> Callable[[AdapterSettings, Layers], PeftConfig]:
    def config(settings: AdapterSettings, layers: Layers) -> PeftConfig:
        return LoraConfig(
            r=settings.rank,
            lora_alpha=settings.scale,
            lora_dropout=settings.dropout,
            target_modules=list(layers) if init in ("corda", "lora_ga") else targets_of(settings),
            init_lora_weights=init,
            task_type="CAUSAL_LM",
            **{name: value() if callable(value) else value for name, value in changes.items()},
        )

    return config


def _lora_ga_config() -> Any:
    from peft import LoraGAConfig  # not in every PEFT that plug-ins run with: `since`

    return LoraGAConfig()


def _eva(settings: AdapterSettings, layers: Layers) -> PeftConfig:
    return _lora("eva", eva_config=EvaConfig(rho=_eva_redistribution(layers, settings.rank)))(settings, layers)


def _eva_redistribution(layers: Layers, rank: int) -> float:
    width = min((matrix_shape(layer)[1] for layer in layers.values()), default=rank)
    return max(1.0, min(EVA_REDISTRIBUTION, width / rank))


def _randlora(settings: AdapterSettings, _: Layers) -> PeftConfig:
    return RandLoraConfig(
        r=settings.rank,
        randlora_alpha=settings.scale,
        randlora_dropout=settings.dropout,
        target_modules=targets_of(settings),
        projection_prng_key=_drawn_key(),
        task_type="CAUSAL_LM",
    )


def _vera(settings: AdapterSettings, _: Layers) -> PeftConfig:
    return VeraConfig(
        r=settings.rank,
        vera_dropout=settings.dropout,
        target_modules=targets_of(settings),
        projection_prng_key=_drawn_key(),
        task_type="CAUSAL_LM",
    )


def _adalora(settings: AdapterSettings, _: Layers) -> PeftConfig:
    return AdaLoraConfig(
        init_r=math.ceil(1.5 * settings.rank),  # arXiv 2303.10512: the budget falls from 1.5 times to once the rank
        target_r=settings.rank,
        lora_alpha=settings.scale,
        lora_dropout=settings.dropout,
        target_modules=targets_of(settings),
        total_step=1,  # `AdaLoraCallback` knows it
        task_type="CAUSAL_LM",
    )


def _oft(settings: AdapterSettings, _: Layers) -> PeftConfig:
    assert settings.block_size is not None
    return OFTConfig(
        oft_block_size=settings.block_size,
        use_cayley_neumann=settings.cayley == "neumann",
        num_cayley_neumann_terms=5,
        target_modules=targets_of(settings),
        task_type="CAUSAL_LM",
    )


def _drawn_key() -> int:
    return int(torch.randint(2**31 - 1, ()))


def _start_eva(adapted: PeftModel, settings: AdapterSettings, samples: Sequence[Sample]) -> None:
    rho = adapted.peft_config[NAME].eva_config.rho
    calibrate_eva(adapted, round(settings.rank * rho), samples)


def _start_milora(adapted: PeftModel, settings: AdapterSettings, _: Sequence[Sample]) -> None:
    for _name, layer in lora_layers(adapted):
        _set_factors(layer, *minor_components(_weight(layer), settings.rank, layer.scaling[NAME]))


def _start_null(adapted: PeftModel, settings: AdapterSettings, _: Sequence[Sample]) -> None:
    directions = NullSpace.open(Path(settings.nullspace)).directions
    for name, layer in lora_layers(adapted):
        if name not in directions:
            raise InputNotFound(
                f"attaching lora-null: the null space {settings.nullspace} has no directions for {name}. "
                "It covers every linear layer but the output head: leave others out of --target-modules."
            )
        weight = _weight(layer)
        rows = directions[name].to(weight.device)
        if settings.variant == "base-intact":
            _set_factors(layer, torch.zeros(len(weight), len(rows)), rows)
        else:
            _set_factors(layer, *projected_factors(weight, rows, layer.scaling[NAME]))


KINDS: dict[str, AdapterKind] = {
    "lora": AdapterKind(_lora(), quantized=LOAD_IN),
    "dora": AdapterKind(_lora(use_dora=True), quantized=("4bit",)),
    "rslora": AdapterKind(_lora(use_rslora=True), quantized=LOAD_IN),
    "gaussian": AdapterKind(_lora("gaussian"), quantized=LOAD_IN),
    "orthogonal": AdapterKind(_lora("orthogonal")),
    "mica": AdapterKind(_lora("mica"), decomposes=True, since="0.20"),
    "pissa": AdapterKind(_lora("pissa"), rewrites_base=True, decomposes=True),
    "olora": AdapterKind(_lora("olora"), rewrites_base=True, decomposes=True),
    "milora": AdapterKind(_lora(), rewrites_base=True, after=_start_milora, decomposes=True),
    "corda": AdapterKind(
        _lora("corda", corda_config=CordaConfig),
        rewrites_base=True,
        before=calibrate_corda,
        needs_samples=True,
        decomposes=True,
    ),
    "lora-ga": AdapterKind(
        _lora("lora_ga", lora_ga_config=_lora_ga_config),
        rewrites_base=True,
        before=calibrate_loraga,
        needs_samples=True,
        rank_sides=2,
        decomposes=True,
        since="0.19",
    ),
    "lora-null": AdapterKind(_lora(), rewrites_base=True, after=_start_null, decomposes=True),
    "eva": AdapterKind(_eva, after=_start_eva, needs_samples=True, decomposes=True, quantized=LOAD_IN),
    "randlora": AdapterKind(_randlora, rank_sides=0, quantized=LOAD_IN),
    "vera": AdapterKind(_vera, rank_sides=0, quantized=LOAD_IN),
    "adalora": AdapterKind(_adalora, quantized=LOAD_IN),
    "oft": AdapterKind(_oft, rank_sides=0, quantized=LOAD_IN, quantized_since="0.21"),
}


def rewrites_base(settings: AdapterSettings) -> bool:
    """Whether `disable_adapter()` is another model than the base."""
    if settings.kind == NO_ADAPTER:
        return False
    return KINDS[settings.kind].rewrites_base and settings.variant != "base-intact"


def keeps_start(settings: AdapterSettings) -> bool:
    """Whether a run needs its first factors again: to be resumed, or to be saved."""
    return settings.kind != NO_ADAPTER and (rewrites_base(settings) or KINDS[settings.kind].needs_samples)


def lora_layers(adapted: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    """The layers with A and B, by their names in the base."""
    for name, module in adapted.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def matrix_shape(layer: Any) -> tuple[int, int]:
    """[out, in]."""
    if not layer.weight.is_floating_point() and hasattr(layer, "out_features"):  # quantised: packed
        return layer.out_features, layer.in_features
    rows, columns = layer.weight.shape
    return (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)


def _weight(layer: LoraLayer) -> Tensor:
    """W [out, in] of the layer below."""
    base = layer.get_base_layer()
    weight: Tensor = base.weight.detach()
    return weight.T if isinstance(base, Conv1D) else weight


def _set_factors(layer: LoraLayer, b: Tensor, a: Tensor) -> None:
    layer.lora_B[NAME].weight.data.copy_(b)
    layer.lora_A[NAME].weight.data.copy_(a)
