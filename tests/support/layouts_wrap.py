"""The layouts: a student -> what is called, and DeepSpeed's engine where there is one.

Those of transformers are divided where they are loaded.
"""

import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from support.layouts import LR, MICRO, RANKS, Case, make_base, make_student
from support.quantised_base import quantised
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffload, CPUOffloadPolicy, FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from logitcache.models.head import causal_lm_of


def _alone(model: Any) -> Any:
    return model


def _ddp(model: Any, *, static: bool = False) -> Any:
    return nn.parallel.DistributedDataParallel(model, static_graph=static)


def _fsdp1(
    model: Any,
    *,
    head_alone: bool = False,
    orig: bool = True,
    peft_policy: bool = False,
    offload: bool = False,
    hybrid: bool = False,
) -> Any:
    layer = type(causal_lm_of(model).model.layers[0])
    policy: Any = partial(transformer_auto_wrap_policy, transformer_layer_cls={layer})
    if peft_policy:
        from peft.utils.other import fsdp_auto_wrap_policy

        policy = fsdp_auto_wrap_policy(model)
    if head_alone:
        head, inner = causal_lm_of(model).get_output_embeddings(), policy

        def policy(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
            return inner(module, recurse, nonwrapped_numel) or (not recurse and module is head)

    how: dict[str, Any] = {"device_id": torch.device("cpu"), "cpu_offload": CPUOffload(offload_params=offload)}
    if hybrid:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        how |= {"device_mesh": mesh, "sharding_strategy": ShardingStrategy.HYBRID_SHARD}
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=orig, **how)


def _fsdp2(model: Any, *, head: str = "root", offload: bool = False, mesh: DeviceMesh | None = None) -> Any:
    """head: in the root's unit; a unit of its own, "resharded" or "kept" after the forward; or one with the norm, as
    accelerate and transformers have it, "tail"."""
    mesh = init_device_mesh("cpu", (RANKS,)) if mesh is None else mesh
    policy: dict[str, Any] = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if offload else {}
    shard = partial(fully_shard, mesh=mesh, **policy)
    causal_lm = causal_lm_of(model)
    output, embedding = causal_lm.get_output_embeddings(), causal_lm.get_input_embeddings()
    for layer in causal_lm.model.layers:
        shard(layer)
    if head in ("resharded", "kept"):
        shard(output, reshard_after_forward=head == "resharded")
    if head == "tail":
        tied = [embedding] if causal_lm.config.tie_word_embeddings else []
        shard([causal_lm.model.norm, *tied, output], reshard_after_forward=False)
    shard(model)
    return model


def _hsdp(model: Any) -> Any:
    return _fsdp2(model, head="tail", mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


def _tensor_parallel(model: Any, mesh: DeviceMesh | None = None) -> Any:
    """By torch's own plan, of the parts of an adapter too; a tied head stays whole."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)) if mesh is None else mesh
    causal_lm = causal_lm_of(model)
    linear = [name for name, module in causal_lm.named_modules() if isinstance(module, nn.Linear)]
    plan = {name: _divided(name) for name in linear}
    if causal_lm.config.tie_word_embeddings:
        plan.pop("lm_head")
    parallelize_module(causal_lm, mesh, {name: style for name, style in plan.items() if style is not None})
    return model


def _divided(name: str) -> ParallelStyle | None:
    """How a layer is divided, or the part of an adapter on one; None for those that stay whole."""
    if "lm_head" in name:
        return None if "lora_" in name else ColwiseParallel(output_layouts=Replicate())
    if "o_proj" in name or "down_proj" in name:
        return None if "lora_B" in name else RowwiseParallel()
    return None if "lora_A" in name else ColwiseParallel()


def _in_two_dimensions(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    return _fsdp2(_tensor_parallel(model, mesh["tp"]), head="tail", mesh=mesh["dp"])


def _zero(model: Any, *, stage: int, offload: bool = False, sequence: bool = False) -> Any:
    import deepspeed

    away: dict[str, Any] = {"offload_optimizer": {"device": "cpu"}} if offload else {}
    away |= {"offload_param": {"device": "cpu"}} if offload and stage == 3 else {}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": MICRO,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **away},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
        **({"sequence_parallel_size": 2, "data_parallel_size": 1} if sequence else {}),
    }
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]


LAYOUTS: dict[str, Callable[..., Any]] = {
    "one process": _alone,
    "ddp": _ddp,
    "fsdp1, head in the root": _fsdp1,
    "fsdp1, head alone": partial(_fsdp1, head_alone=True),
    "fsdp1 flat, head in the root": partial(_fsdp1, orig=False),
    "fsdp1 flat, head alone": partial(_fsdp1, orig=False, head_alone=True),
    "fsdp1, PEFT's policy": partial(_fsdp1, peft_policy=True),
    "fsdp2, head in the root": _fsdp2,
    "fsdp2, head alone": partial(_fsdp2, head="resharded"),
    "fsdp2, head alone and kept": partial(_fsdp2, head="kept"),
    "fsdp2, head with the norm": partial(_fsdp2, head="tail"),
    "fsdp2 of transformers": _alone,
    "zero2": partial(_zero, stage=2),
    "zero3": partial(_zero, stage=3),
    "tensor parallel": _alone,
    "tensor parallel, lora on layers split by output": _alone,
    "tensor parallel by hand": _tensor_parallel,
    "tensor parallel by hand, lora on layers split by output": _tensor_parallel,
    "fsdp2 x tensor parallel": _alone,
    "fsdp2 x tensor parallel, lora on layers split by output": _alone,
    "fsdp2 x tensor parallel by hand": _in_two_dimensions,
    "fsdp2 x tensor parallel by hand, lora on layers split by output": _in_two_dimensions,
    "hsdp": _alone,
    "hsdp, fsdp1": partial(_fsdp1, hybrid=True),
    "hsdp, fsdp2": _hsdp,
}
"""By name, for a loop of one's own. Those that begin with fsdp2 x and hsdp need four processes."""

BY_OUTPUT = ", lora on layers split by output"
OF_TWO = tuple(name for name in LAYOUTS if Case("loop", name, "full").num_processes == 2)
"""Layouts of two processes, all of whose cells the table has."""

TRAINER_OF_TWO = (
    *("ddp", "fsdp1", "fsdp1 flat", "fsdp2", "fsdp2 of transformers", "zero2", "zero3"),
    *("tensor parallel", f"tensor parallel{BY_OUTPUT}"),
)
"""Those that transformers' Trainer makes."""

WITH = {"offload": "parameters on the CPU", "static": "static graph", "sequence": "sequence parallel"}
"""Settings of a layout, by the options that ask for them."""

_DIVIDED: dict[str, dict[str, int]] = {
    "fsdp2 of transformers": {"fsdp_size": 2},
    "tensor parallel": {"tp_size": 2},
    "tensor parallel, lora on layers split by output": {"tp_size": 2},
    "fsdp2 x tensor parallel": {"fsdp_size": 2, "tp_size": 2},
    "fsdp2 x tensor parallel, lora on layers split by output": {"fsdp_size": 2, "tp_size": 2},
    "hsdp": {"dp_replicate_size": 2, "fsdp_size": 2},
}
"""What transformers is told."""


def student_of(case: Case) -> Any:
    """The student, not wrapped yet."""
    return make_student(case.parts, _load(case), case.targets)


def wrapped(case: Case, student: Any) -> Any:
    """What is called in a loop of one's own."""
    asked = {name: True for name, option in WITH.items() if option in case.options}
    return LAYOUTS[case.layout](student, **asked)


def _load(case: Case) -> Any:
    """The base: made, or where transformers divides it, loaded."""
    base, divided = make_base(case), _DIVIDED.get(case.layout)
    if case.in_4bit:
        return quantised(base, torch.float32 if "4bit as float" in case.options else torch.uint8)
    if divided is None:
        return base
    from transformers.distributed import DistributedConfig

    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    if dist.get_rank() == 0:
        base.save_pretrained(folder[0])
    dist.barrier()
    if case.with_experts:
        divided = {**divided, "ep_size": 2}
    loaded = type(base).from_pretrained(folder[0], distributed_config=DistributedConfig(**divided))
    dist.barrier()
    shutil.rmtree(folder[0], ignore_errors=True)  # a checkpoint that is not that of the cache is another base
    return loaded
