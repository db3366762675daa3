"""`CachedKLTrainer` in the layouts that transformers' Trainer and accelerate make, for `layouts_rank`.

accelerate takes FSDP on CPUs for DDP, and tensor parallelism for one of accelerators only: its state is told otherwise
here; what it then does to a model is its own.
"""

import os
import tempfile
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate import Accelerator, ParallelismConfig
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from support import layouts
from support.layouts import LR, MICRO, WEIGHT, Case, Result
from support.layouts_wrap import student_of
from torch.autograd.graph import save_on_cpu
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback, TrainingArguments, modeling_utils
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from logitcache.losses.formulas import Objective
from logitcache.storage import LogitCache
from logitcache.training.trainer import CachedKLTrainer

OBJECTIVE = Objective(weight=WEIGHT, tokens_per_loss_chunk=3)
FSDP: dict[str, dict[str, Any]] = {
    "fsdp1": {"version": 1, "fsdp_version": 1, "use_orig_params": True, "reshard_after_forward": "FULL_SHARD"},
    "fsdp1 flat": {"version": 1, "fsdp_version": 1, "use_orig_params": False, "reshard_after_forward": "FULL_SHARD"},
    "fsdp2": {"version": 2, "fsdp_version": 2, "reshard_after_forward": True},
}

_init = AcceleratorState.__init__


def _sharded_on_cpus(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin
        if isinstance(fsdp_plugin.cpu_offload, CPUOffloadPolicy):
            fsdp_plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)
        self.device = PartialState._shared_state["device"] = torch.device("cpu")  # FSDP1 would not take cpu:0
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)


def _save_on_cpu(**_: Any) -> Any:
    """transformers' pins memory, for which there must be an accelerator; torch's own copies where there is none."""
    return save_on_cpu(pin_memory=True)


class InOrder(CachedKLTrainer):
    """A row of the data is a micro-batch of one process."""

    def _get_train_sampler(self, *args: Any) -> Any:
        return SequentialSampler(self.train_dataset)


class Notes(TrainerCallback):
    """What is trained, while it is in its wrappers."""

    def __init__(self, trainer: InOrder, layout: str) -> None:
        self.trainer, self.layout, self.trained = trainer, layout, dict[str, torch.Tensor]()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        model: Any = self.trainer.model_wrapped
        first = isinstance(model, FullyShardedDataParallel)
        self.trained = layouts.trained_of(model, "fsdp1" if first else self.layout if self.layout == "zero3" else "")


def settings_of(case: Case) -> dict[str, Any]:
    """The Trainer's settings that make a layout."""
    layout, away = case.layout, "parameters on the CPU" in case.options
    if layout.removeprefix("hsdp, ") in FSDP:
        wrap = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
        more = {"cpu_ram_efficient_loading": False, "sync_module_states": False}  # which want a GPU
        more |= {"activation_checkpointing": "activations" in case.options, "cpu_offload": away}
        config = {**wrap, **more, **FSDP[layout.removeprefix("hsdp, ")]}
        hybrid = ParallelismConfig(dp_replicate_size=2, dp_shard_size=2) if layout.startswith("hsdp") else None
        return {"fsdp": "full_shard auto_wrap", "fsdp_config": config, "parallelism_config": hybrid}
    if layout.startswith("zero"):
        stage: dict[str, Any] = {"stage": int(layout[-1]), "stage3_param_persistence_threshold": 0}
        if away:
            stage |= {"offload_optimizer": {"device": "cpu"}}
            stage |= {"offload_param": {"device": "cpu"}} if layout == "zero3" else {}
        config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": MICRO, "gradient_clipping": 0.0}
        more = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        return {"deepspeed": {**config, **more, "zero_optimization": stage}}
    if layout.startswith("tensor"):
        return {"parallelism_config": ParallelismConfig(tp_size=case.num_replicas)}
    return {}


def train(case: Case, cache: LogitCache) -> Result:
    """Losses and what was trained, of a training by `CachedKLTrainer`."""
    AcceleratorState._reset_state(True)
    set_before = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD")
    for name in set_before:  # by a case before
        os.environ.pop(name, None)
    if {"activations", "offload"} <= set(case.options):
        os.environ["FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD"] = "true"
    divided = "tensor parallel" in case.layout
    several = property(lambda self: self.use_distributed) if divided else Accelerator.multi_device
    with (
        patch.object(AcceleratorState, "__init__", _sharded_on_cpus),
        patch.object(Accelerator, "multi_device", several),
        patch.object(modeling_utils, "save_on_cpu", _save_on_cpu, create=True),  # transformers 5.16 has none
    ):
        try:
            return _train(case, cache)
        finally:
            unset_hf_deepspeed_config()  # or what is loaded after it is taken for ZeRO-3's


def _train(case: Case, cache: LogitCache) -> Result:
    options, student = case.options, student_of(case)
    checkpointed: dict[str, Any] = {}
    if "reentrant" in options:
        checkpointed = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
    elif {"checkpoint", "offload"} <= set(options):
        checkpointed = {"gradient_checkpointing_kwargs": {"use_reentrant": False, "offload": True}}
    args = TrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=MICRO * case.num_parts // (case.num_processes // case.num_replicas),
        num_train_epochs=1,
        learning_rate=LR,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        remove_unused_columns=False,
        save_strategy="no",
        disable_tqdm=True,
        bf16="bf16" in options,
        gradient_checkpointing="checkpoint" in options or "reentrant" in options,
        torch_compile="compile" in options,
        torch_compile_backend="aot_eager" if "compile" in options else None,
        ddp_static_graph=True if "static graph" in options else None,
        **checkpointed,
        **settings_of(case),
    )
    rows = [batch for step in case.steps for parts in step for batch in parts]
    trainer = InOrder(
        model=student,
        args=args,
        train_dataset=rows,
        data_collator=lambda rows: rows[0],
        cache=cache,
        objective=OBJECTIVE,
    )
    notes = Notes(trainer, case.layout)
    trainer.add_callback(notes)
    trainer.train()
    dist.barrier()
    return Result([e["ce"] + WEIGHT * e["kl"] for e in trainer.state.log_history if "ce" in e], notes.trained)
