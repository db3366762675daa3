"""The base in the memory of a trainer, below what is to be trained: which one it is, proved, and the model run as it.

Owns what must hold before what such a model says may be stored as the base's: it is whole, under the configuration of
its checkpoint, every parameter is the checkpoint's, its modules compute as that says, and nothing was trained. Stricter
than `base_in_memory`, which holds a model against a cache that is there: here nobody else has seen the base. Must not
know caches, nor train.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from logitcache.errors import NotTheBase, TrainingFailed
from logitcache.models.as_configured import unlike_configured
from logitcache.models.device_map import head_device, input_device
from logitcache.models.head import OutputHead, causal_lm_of, hidden_states, unwrapped
from logitcache.models.loading import Base, Source, identity_of
from logitcache.models.quantization import held_in
from logitcache.models.sharding import is_sharded
from logitcache.models.weights_in_memory import base_parameters, compare_weights, has_weights, own_checkpoint

from .base_in_memory import config_said
from .step_zero import KL_FLOAT32_NATS, KL_RUN_OTHERWISE_NATS, probing

NUM_DOCUMENTS = 4
"""By which an adapter is held against the model below it, with the bounds of step zero. What this does not see does no
harm: the adapter is off while the base runs."""

MAX_TOKENS = 64
"""Of each of them."""

OTHERWISE = (
    "Nothing was captured. Fill the cache before training, with the base as it was saved, or run "
    "`logitcache precompute`."
)
"""What to do where the model in memory cannot be vouched for."""


@contextmanager
def base_below(model: nn.Module, documents: Sequence[NDArray[np.uint32]]) -> Iterator[Base]:
    """Within, the base as `load_base` would give it: without adapters, in evaluation mode, outside autocast.

    After it the model is as it was, in modes, gradients and adapters. documents: a few, to see by whether the adapter
    is untrained. Raises `NotTheBase` where weights, configuration or adapter say that it is another model,
    `TrainingFailed` where they cannot say, `UnsupportedModel`.
    """
    base = _proved(model)
    _check_untrained(model, documents)
    kind = head_device(base.model).type
    with probing(model), adapters_off(base.model), torch.autocast(kind, enabled=False):
        yield base


@contextmanager
def adapters_off(causal_lm: PreTrainedModel) -> Iterator[None]:
    """Every layer of PEFT's passes on what the layer below it says; what is trained stays so."""
    layers = [m for m in causal_lm.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    layers = [layer for layer in layers if not layer.disable_adapters]
    trained = [(parameter, parameter.requires_grad) for parameter in causal_lm.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


def _proved(model: nn.Module) -> Base:
    """The base with the identity of its checkpoint, once all that is in memory is that of the checkpoint."""
    causal_lm = causal_lm_of(model)
    filling = f"filling a cache with {type(causal_lm).__name__} {causal_lm.name_or_path or ''}".rstrip()
    parameters = dict(base_parameters(causal_lm))
    if is_sharded(model) or any(hasattr(p, "to_local") for p in parameters.values()):
        raise TrainingFailed(
            f"{filling}: the model is divided over processes (FSDP, ZeRO-3, tensor parallelism), and none has it "
            "whole. Nothing was captured. Fill the cache in one process first, or run `logitcache precompute`."
        )
    if held := held_in(causal_lm):
        raise TrainingFailed(
            f"{filling}: expected unquantised weights, which can be held against the checkpoint, found {held}. Nothing "
            f"was captured. Run `logitcache precompute`, which loads the base itself (--load-in)."
        )
    folder = own_checkpoint(causal_lm)
    if folder is None or not has_weights(folder):
        raise TrainingFailed(
            f"{filling}: expected the checkpoint that the model was loaded from, found none by that name here. Nothing "
            "says which base a cache of it would be of. Nothing was captured. Save the base in a folder, and load it "
            "from there."
        )
    source = Source(causal_lm.name_or_path, folder)
    identity = identity_of(source, causal_lm)
    said, why_not = config_said(identity.config, f"in {folder}", causal_lm)
    if said or why_not:
        raise NotTheBase(
            f"{filling}: expected the configuration of {folder}, found another "
            f"({'; '.join(said) or why_not}). {OTHERWISE}"
        )
    _check_weights(model, source, filling)
    if unlike := unlike_configured(causal_lm):
        raise NotTheBase(
            f"{filling}: expected modules that compute what its configuration says, found {len(unlike)} otherwise "
            f"(the first: {unlike[0]}). {OTHERWISE}"
        )
    if len(dtypes := {p.dtype for p in parameters.values()}) > 1:
        raise TrainingFailed(
            f"{filling}: expected weights of one dtype, as a cache names it, found "
            f"{', '.join(sorted(str(dtype).removeprefix('torch.') for dtype in dtypes))}. {OTHERWISE}"
        )
    return Base(source, causal_lm, identity)


def _check_weights(model: nn.Module, source: Source, filling: str) -> None:
    """Raise `NotTheBase` unless every parameter of the base in memory is the checkpoint's, bit for bit."""
    compared = compare_weights(model, source.folder, exact=True)
    if compared.differing:
        raise NotTheBase(
            f"{filling}: expected the weights of {source.folder}, found others in {len(compared.differing)} of "
            f"{compared.num_compared} tensors (the first: {compared.differing[0]}): something was trained, merged or "
            f"taken out of them by the adapter. {OTHERWISE}"
        )
    if compared.said or compared.not_stored:
        found = compared.said or f"{len(compared.not_stored)} that it has not (the first: {compared.not_stored[0]})"
        raise NotTheBase(
            f"{filling}: expected every parameter to be that of {source.folder}, found {found}. What it says cannot "
            f"be vouched for as the base's. {OTHERWISE}"
        )


def _check_untrained(model: nn.Module, documents: Sequence[NDArray[np.uint32]]) -> None:
    """Raise `NotTheBase` where the model differs from the one below its adapter by more than noise."""
    causal_lm, called = causal_lm_of(model), unwrapped(model)
    expected = (
        f"filling a cache with {type(causal_lm).__name__} {causal_lm.name_or_path}: expected an adapter that is "
        "untrained and starts as the identity, found"
    )
    if isinstance(called, PeftModel) and called.active_peft_config.is_prompt_learning:
        raise NotTheBase(f"{expected} one that adds virtual tokens or states. {OTHERWISE}")
    if not any(isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for m in causal_lm.modules()):
        return
    kl_nats = _kl_of_adapter(called, [tokens[:MAX_TOKENS] for tokens in documents[:NUM_DOCUMENTS]])
    bound = KL_FLOAT32_NATS if causal_lm.dtype == torch.float32 else KL_RUN_OTHERWISE_NATS
    if not kl_nats <= bound:
        raise NotTheBase(
            f"{expected} KL(base || adapted) of {kl_nats:.4g} nats, of which {bound:.2g} may be noise. Missing samples "
            f"are captured before anything is trained. {OTHERWISE}"
        )


@torch.no_grad()
def _kl_of_adapter(called: nn.Module, documents: Sequence[NDArray[np.uint32]]) -> float:
    """Mean KL, nats a position, of the model below its adapter to the adapted one."""
    causal_lm, kls = causal_lm_of(called), list[Tensor]()
    head, where = OutputHead(causal_lm), input_device(causal_lm)

    def logprobs(tokens: NDArray[np.uint32]) -> Tensor:
        ids = torch.from_numpy(tokens.astype(np.int64))[None].to(where)
        hidden = hidden_states(called, input_ids=ids, attention_mask=torch.ones_like(ids))
        return head(hidden).float().log_softmax(-1)

    with probing(called):
        for tokens in documents:
            adapted = logprobs(tokens)
            with adapters_off(causal_lm):
                base = logprobs(tokens)
            kls.append((base.exp() * (base - adapted)).sum(-1).flatten())
    return float(torch.cat(kls).mean())
