"""The closed table of adapters: PEFT's configuration of each, and what it does to the base.

Owns the rows and the settings; `adapters` attaches and saves what they describe. First values that PEFT does not have
are `factors`'. Trade-off: one table for kinds that share little, so that what differs is a column and not a branch.
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
    LoraGAConfig,
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
from logitcache.errors import InputNotFound, UnsuitableAdapter
from logitcache.models.quantization import LOAD_IN

from .null_space import NullSpace
from .start import calibrate_corda, calibrate_eva, calibrate_loraga, minor_components, projected_factors

NAME = "default"
"""Of the adapter inside PEFT's model."""

NO_ADAPTER = "none"
"""The kind of settings by which every weight of the model is trained; no row of `KINDS`, see `full`."""

VARIANTS = ("v1", "v2", "base-intact")
"""Of lora-null: train A and B; train B only; leave W as it is, with B = 0 and A = U, the null space."""

EVA_REDISTRIBUTION = 2.0
"""Largest rank of a layer over the mean rank, PEFT's default."""

Layers = dict[str, Any]


@dataclass(frozen=True)
class AdapterSettings:
    """kind: a row of `KINDS`; rank r; alpha (scale = alpha / rank); dropout on the adapter's input; target_modules as
    PEFT understands it: 'all-linear' (every linear layer but the output head) or names separated by commas; nullspace:
    folder of a null space, and variant: one of `VARIANTS`, both for lora-null only."""

    kind: str = "lora"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str = "all-linear"
    nullspace: str = ""
    variant: str = "v1"


@dataclass(frozen=True)
class Kind:
    """A row of the table.

    config: PEFT's configuration for settings and the layers' names. rewrites_base: W becomes W - s B A, so that
    `disable_adapter()` is no longer the base. before, after: done to the model around PEFT's own initialisation.
    rank_sides: r times this is at most the smaller side of every layer. even: of even rank only. has_alpha: whether
    alpha counts. quantized: rows of `quantized.LOAD_IN`, weights that it may stand on.
    """

    config: Callable[[AdapterSettings, Layers], PeftConfig]
    rewrites_base: bool = False
    before: Callable[[PreTrainedModel, PeftConfig, Sequence[Sample]], None] | None = None
    after: Callable[[PeftModel, AdapterSettings, Sequence[Sample]], None] | None = None
    needs_samples: bool = False
    rank_sides: int = 0
    even: bool = False
    has_alpha: bool = True
    quantized: tuple[str, ...] = ()


def targets_of(settings: AdapterSettings) -> Any:
    """What PEFT is told to adapt: 'all-linear', or a list of names."""
    names = settings.target_modules
    return names if names == "all-linear" else [name.strip() for name in names.split(",")]


def _lora(init: bool | str = True, **changes: Any) -> Callable[[AdapterSettings, Layers], PeftConfig]:
    def config(settings: AdapterSettings, layers: Layers) -> PeftConfig:
        return LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=list(layers) if init in ("corda", "lora_ga") else targets_of(settings),
            init_lora_weights=init,
            task_type="CAUSAL_LM",
            **{name: value() if callable(value) else value for name, value in changes.items()},
        )

    return config


def _eva(settings: AdapterSettings, layers: Layers) -> PeftConfig:
    return _lora("eva", eva_config=EvaConfig(rho=_eva_redistribution(layers, settings.rank)))(settings, layers)


def _eva_redistribution(layers: Layers, rank: int) -> float:
    width = min((matrix_shape(layer)[1] for layer in layers.values()), default=rank)
    return max(1.0, min(EVA_REDISTRIBUTION, width / rank))


def _randlora(settings: AdapterSettings, _: Layers) -> PeftConfig:
    return RandLoraConfig(
        r=settings.rank,
        randlora_alpha=settings.alpha,
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
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets_of(settings),
        total_step=1,  # `AdaLoraCallback` knows it
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


KINDS: dict[str, Kind] = {
    "lora": Kind(_lora(), quantized=LOAD_IN),
    "dora": Kind(_lora(use_dora=True), quantized=("4bit",)),
    "rslora": Kind(_lora(use_rslora=True), quantized=LOAD_IN),
    "gaussian": Kind(_lora("gaussian"), quantized=LOAD_IN),
    "orthogonal": Kind(_lora("orthogonal"), even=True),
    "mica": Kind(_lora("mica"), rank_sides=1),
    "pissa": Kind(_lora("pissa"), rewrites_base=True, rank_sides=1),
    "olora": Kind(_lora("olora"), rewrites_base=True, rank_sides=1),
    "milora": Kind(_lora(), rewrites_base=True, after=_start_milora, rank_sides=1),
    "corda": Kind(
        _lora("corda", corda_config=CordaConfig),
        rewrites_base=True,
        before=calibrate_corda,
        needs_samples=True,
        rank_sides=1,
    ),
    "lora-ga": Kind(
        _lora("lora_ga", lora_ga_config=LoraGAConfig),
        rewrites_base=True,
        before=calibrate_loraga,
        needs_samples=True,
        rank_sides=2,
    ),
    "lora-null": Kind(_lora(), rewrites_base=True, after=_start_null, rank_sides=1),
    "eva": Kind(_eva, after=_start_eva, needs_samples=True, rank_sides=1, quantized=LOAD_IN),
    "randlora": Kind(_randlora, quantized=LOAD_IN),
    "vera": Kind(_vera, has_alpha=False, quantized=LOAD_IN),
    "adalora": Kind(_adalora, quantized=LOAD_IN),
}

REFUSED = {
    "loftq": "LoftQ replaces the weights by quantised ones, which differ from the original in full rank: it does not "
    "start at the base, and no adapter of the original weights computes what it trains. Use lora, or pissa",
}
"""Kinds of PEFT that are left out, and why."""


def rewrites_base(settings: AdapterSettings) -> bool:
    """Whether `disable_adapter()` is another model than the base."""
    if settings.kind == NO_ADAPTER:
        return False
    return KINDS[settings.kind].rewrites_base and not (settings.kind == "lora-null" and settings.variant == VARIANTS[2])


def keeps_start(settings: AdapterSettings) -> bool:
    """Whether a run needs its first factors again: to be resumed, or to be saved."""
    return settings.kind != NO_ADAPTER and (rewrites_base(settings) or KINDS[settings.kind].needs_samples)


def check_settings(settings: AdapterSettings) -> None:
    """Raise `UnsuitableAdapter` for settings that no model could be given."""
    if settings.kind == NO_ADAPTER:
        if settings != AdapterSettings(NO_ADAPTER):
            raise UnsuitableAdapter(
                "training every weight (adapter none): rank, alpha, dropout, target modules and null space are an "
                "adapter's. Leave them out."
            )
        return
    what = f"preparing adapter {settings.kind}"
    if settings.kind in REFUSED:
        raise UnsuitableAdapter(f"{what}: {REFUSED[settings.kind]}.")
    if settings.kind not in KINDS:
        raise UnsuitableAdapter(f"{what}: expected one of {', '.join(KINDS)}.")
    if KINDS[settings.kind].even and settings.rank % 2:
        raise UnsuitableAdapter(
            f"{what}: expected an even rank, found {settings.rank}. Use --rank {settings.rank + 1}."
        )
    if settings.kind == "lora-null" and not settings.nullspace:
        raise UnsuitableAdapter(
            f"{what}: it needs a null space. Make one with `logitcache nullspace`, give --nullspace."
        )
    if settings.kind != "lora-null" and settings.nullspace:
        raise UnsuitableAdapter(f"{what}: only lora-null takes a null space. Leave --nullspace out.")
    if settings.variant not in VARIANTS:
        raise UnsuitableAdapter(f"{what}: expected variant {', '.join(VARIANTS)}, found {settings.variant!r}.")


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
