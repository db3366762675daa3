"""What a trainer may not be set to, since the loss of `CachedKL` would then be silently another one.

Owns the settings of trainers, of parallelism and of TRL that are refused, and what is said of those that cut documents.
What a batch, a model or a trainer's class may not bring is `pairing.inputs`', `own_loss`'s and `replaced`'s. Must not
import `trainer`.
"""

from collections.abc import Callable
from typing import Any

from peft import PeftModel
from torch import nn

from logitcache.errors import TrainingFailed
from logitcache.models.head import causal_lm_of
from logitcache.models.sharding import is_sharded

from .normalisation import num_replicas, parallelism
from .own_loss import ROUTER, check_own_loss


def check_supported(trainer: Any) -> None:
    """Raise `TrainingFailed` for settings under which this loss would be silently another one."""
    args, model = trainer.args, trainer.model
    refused: tuple[tuple[Callable[[], bool], str], ...] = (
        (
            lambda: args.n_gpu > 1,
            f"{args.n_gpu} GPUs in one process (DataParallel) split a batch without its targets. "
            "Start one process a GPU with torchrun, or show one GPU with CUDA_VISIBLE_DEVICES",
        ),
        (
            lambda: bool(args.label_smoothing_factor) or getattr(trainer, "label_smoother", None) is not None,
            "label smoothing by the trainer would be ignored, as the loss is made here. "
            'Set label_smoothing_factor=0; Objective("none", label_smoothing=...) smooths labels',
        ),
        (
            lambda: parallelism(trainer, "cp") > 1 or parallelism(trainer, "sp") > 1,
            "context or sequence parallelism cuts sequences across processes, and the targets would not be cut with "
            "them. Set cp_size=1 and sp_size=1",
        ),
        (
            lambda: num_replicas(trainer) > 1 and isinstance(model, PeftModel) and not _is_divided(model),
            f"{num_replicas(trainer)} processes hold it together, and each would train an adapter of its own on its "
            "part. Use LoRA with PEFT 0.21 and transformers 5.17 or later, which divide it with the model",
        ),
        (
            lambda: trainer.compute_loss_func is not None or getattr(args, "loss_type", None) not in (None, "nll"),
            "another loss is set (compute_loss_func, or loss_type other than nll), which would be ignored. "
            "Leave it at its default",
        ),
        (lambda: bool(getattr(trainer, "aux_loss_enabled", False)), ROUTER),
        (
            lambda: bool(getattr(args, "neftune_noise_alpha", None)) and trainer.step_budget is not None,
            "neftune_noise_alpha puts noise on the embeddings, which is in the KL that kl_budget is of, and the weight "
            "would follow the noise. Leave one of them out",
        ),
        (
            lambda: trainer.accelerator.num_processes > 1 and trainer.accelerator.distributed_type == "NO",
            "several processes were started that do not see one another, and each would train a model of its own by "
            "that many times its gradient. Set use_cpu=True where there is no GPU, or start one process",
        ),
    )
    for holds, why in refused:
        if holds():
            raise TrainingFailed(f"training {type(causal_lm_of(model)).__name__}: {why}.")
    check_own_loss(model)


def in_pieces(trainer: Any) -> bool:
    """Whether the weights are, or will be once the trainer has wrapped the model, in pieces between forwards."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    zero = plugin is not None and plugin.zero_stage == 3
    return bool(trainer.is_fsdp_enabled) or zero or is_sharded(trainer.model)


def divided_by(trainer: Any) -> str:
    """What divides the model over processes, or will place it later, so that it is not whole here before training; ""
    where each process has its own."""
    if num_replicas(trainer) > 1:
        return "tensor parallelism"
    if trainer.is_deepspeed_enabled:
        return "DeepSpeed"
    return "FSDP" if in_pieces(trainer) else ""


def check_in_pieces(*, penalised: bool, anchored: bool) -> None:
    """Raise `TrainingFailed` for terms of the loss that a model in pieces cannot have."""
    for has, what, why in (
        (
            penalised,
            "a penalty on the weights (AdaLoRA has one)",
            "each process would pull on its part alone",
        ),
        (
            anchored,
            "anchors",
            "the wrapper expects one forward before a backward, and theirs is another",
        ),
    ):
        if has:
            raise TrainingFailed(
                f"training with {what} under FSDP or ZeRO-3: {why}. Use DistributedDataParallel, or leave them out."
            )


def _is_divided(model: nn.Module) -> bool:
    """Whether something that is trained is a part of a whole that knows its other parts."""
    return any(hasattr(p, "to_local") for p in model.parameters() if p.requires_grad)


def what_cuts(args: Any) -> str:
    """What settings of TRL cut documents where the cache did not."""
    packing = getattr(args, "packing_strategy", None) if getattr(args, "packing", False) else None
    if packing in ("wrapped", "bfd_split"):
        return f" packing_strategy={packing!r} cuts documents anywhere: use 'bfd', which keeps their beginnings whole."
    if getattr(args, "truncation_mode", "keep_start") == "keep_end":
        return " truncation_mode='keep_end' cuts off beginnings: use 'keep_start'."
    return ""
