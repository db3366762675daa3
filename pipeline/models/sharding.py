"""Models whose weights are in pieces between forwards (FSDP, ZeRO-3): known, called for checks, refused where wrong.

The weights of such a model are whole only while a wrapper runs it, on all processes together. So a check goes through
the wrapper, at a time that all processes agree on; any other model is checked without one, so that nothing is sent and
nothing compiled for it. Must not make losses.
"""

from typing import Any

import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard

from logitcache.errors import TrainingFailed

from .device_map import head_device
from .head import causal_lm_of, unwrapped

_AUTO_TP = "deepspeed.module_inject"
"""Where DeepSpeed has the layers that it puts in the place of a model's own."""


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights are in pieces between forwards."""
    if any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules()):
        return True
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def local_part(parameter: Any) -> Tensor:
    """What this process holds of a parameter."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    part: Tensor = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter
    return part.detach()


def called_in_checks(model: nn.Module) -> Any:
    """What a check calls: the model in its wrappers where they put its weights together, else without them."""
    return model if is_sharded(model) else unwrapped(model)


def dtype_as_called(model: nn.Module) -> torch.dtype:
    """What a model computes in where it is called now: that of autocast, what FSDP casts weights to, or their own."""
    if (autocast := autocast_dtype(model)) is not None:
        return autocast
    causal_lm = causal_lm_of(model)
    cast = {_cast_to(module) for module in model.modules()} - {None}
    own: torch.dtype = causal_lm.dtype
    return min((dtype for dtype in cast if dtype is not None), key=lambda dtype: dtype.itemsize, default=own)


def autocast_dtype(model: nn.Module) -> torch.dtype | None:
    """That of autocast where a model is called now, if it is on. Of a model in pieces, whose parameters may wait in
    main memory, on the accelerator too."""
    kinds = [head_device(causal_lm_of(model)).type]
    if is_sharded(model) and (accelerator := torch.accelerator.current_accelerator()) is not None:
        kinds.append(accelerator.type)
    return next((torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)), None)


def _cast_to(module: nn.Module) -> torch.dtype | None:
    """What a unit of FSDP casts its parameters to while it runs."""
    if isinstance(module, FullyShardedDataParallel):
        flat: torch.dtype | None = module.mixed_precision.param_dtype
        return flat
    if isinstance(module, FSDPModule):
        policy: torch.dtype | None = module._get_fsdp_state()._mp_policy.param_dtype
        return policy
    return None


def on_any_process(model: nn.Module, here: bool) -> bool:
    """Whether something holds here; of a model in pieces, on any process. All of its processes must call it."""
    if not (dist.is_initialized() and is_sharded(model)):
        return here
    told = torch.tensor(int(here), device="cuda" if "nccl" in str(dist.get_backend_config()) else "cpu")
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return bool(told)


def check_parts(model: nn.Module) -> None:
    """Raise `TrainingFailed` where a model in pieces would be trained wrongly, or fail without saying why.

    Where the pieces are stages of a pipeline, between which no gradient passes, or parts of sequences or layers that
    DeepSpeed has made. Where FSDP1 has put a tied head into a unit of its own. Where tensor parallelism has divided
    layers whose adapters PEFT does not divide with them. Where something is trained on each process by itself: of a
    model that transformers has sharded at load (or of whose parts some were sharded by hand), an adapter that is added
    later is not sharded with it, and nothing averages its gradients.
    """
    causal_lm = causal_lm_of(model)
    training = f"training {type(causal_lm).__name__} in pieces"
    _check_kinds(model, causal_lm, training)
    tied = getattr(causal_lm.config.get_text_config(), "tie_word_embeddings", False)
    if tied and isinstance(causal_lm.get_output_embeddings(), FullyShardedDataParallel):
        raise TrainingFailed(
            f"{training}: expected the output head in one FSDP unit with the input embedding, whose weights it shares, "
            "found it in a unit of its own. The embedding would find no weights. Leave the head out of the policy."
        )
    if any(isinstance(module, FSDPModule) for module in model.modules()) and (alone := _unsharded(model)):
        raise TrainingFailed(
            f"{training}: expected fully_shard to have divided all that is trained, found {len(alone)} parameters "
            f"that it has not, the first {alone[0]}. Nothing would average their gradients, and each process "
            "would train another model. Add the adapter before the model is sharded, and shard all of it."
        )
    _check_divided_layers(model, causal_lm, training)


def _check_kinds(model: nn.Module, causal_lm: Any, training: str) -> None:
    """Refuse what makes the forward of a part, or logits of a part of the vocabulary."""
    if getattr(causal_lm, "_pp_stage", None) is not None:
        raise TrainingFailed(
            f"{training}: found the stages of a pipeline (DistributedConfig(pp_size=...)), of which transformers runs "
            "forwards only: no gradient passes from one stage to the one before. Divide it by fsdp_size or tp_size."
        )
    if getattr(model, "sequence_parallel_size", 1) > 1:
        raise TrainingFailed(
            f"{training}: found DeepSpeed's sequence parallelism (sequence_parallel_size and data_parallel_size in its "
            "configuration), for which it multiplies gradients by the number of processes that a sequence is cut over, "
            "and none is cut here. Leave both out."
        )
    if any(kind.__module__.startswith(_AUTO_TP) for module in model.modules() for kind in type(module).__mro__):
        raise TrainingFailed(
            f"{training}: found layers that DeepSpeed has divided (tensor_parallel.autotp_size), whose head may make "
            "logits of a part of the vocabulary. Leave autotp_size out and shard by ZeRO, or divide the model by "
            "transformers (DistributedConfig(tp_size=...))."
        )


def _unsharded(model: nn.Module) -> list[str]:
    """Names of what is trained and FSDP2 has not divided. By the places that it knows: what stands there may be whole
    (after a forward without a backward), and what tensor parallelism alone has divided is a DTensor too."""
    places = [p._module_info for group in _groups_of_fsdp2(model) for p in group.fsdp_params]
    sharded = {id(getattr(place.module, place.param_name)) for place in places}
    return [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in sharded]


def _groups_of_fsdp2(model: nn.Module) -> list[Any]:
    """What FSDP2 gathers together, each with its parameters and its mesh."""
    states: list[Any] = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
    groups: list[Any] = []
    for state in states:
        groups += state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def _check_divided_layers(model: nn.Module, causal_lm: Any, training: str) -> None:
    """PEFT 0.21 divides LoRA of layers that are divided by their outputs, whose inputs are whole, and no other."""
    head, num_sharding = causal_lm.get_output_embeddings(), _dimensions_of_fsdp2(model)
    for name, module in model.named_modules():
        copied = isinstance(module, ModulesToSaveWrapper)
        if not copied and not isinstance(module, BaseTunerLayer):
            continue
        weight = getattr(module.original_module if copied else module.get_base_layer(), "weight", None)
        divided = weight.placements[num_sharding:] if isinstance(weight, DTensor) else ()
        if divided and (copied or module is head or Shard(1) in divided):
            raise TrainingFailed(
                f"{training} by tensor parallelism: expected an adapter that PEFT divides with its layers, found one "
                f"on {name}, which it would leave whole beside a part of the layer. Adapt layers that are divided by "
                "their outputs (q_proj, k_proj, v_proj, gate_proj, up_proj), or train all weights."
            )


def _dimensions_of_fsdp2(model: nn.Module) -> int:
    """Dimensions of the mesh that FSDP2 shards over, which come first in that of a sharded parameter; 0 without it."""
    return max((group.mesh_info.mesh.ndim for group in _groups_of_fsdp2(model)), default=0)
