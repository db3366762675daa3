"""AdaLoRA under this project's losses: the term that PEFT adds to a model's own loss, and the schedule of ranks.

delta W = B diag(E) A / rank; triplets with little importance are masked until `target_r` a layer are left
(arXiv 2303.10512). Owns two things. The term: PEFT adds orth_reg_weight * mean ||P P^T - I||_F over all A and B^T to
the loss that the model's forward returns. That loss is not made here, since the head is skipped, so trainers and loops
add `Orthogonality` to theirs, once an optimizer step. The schedule: PEFT's own allocator, called after every
optimizer step, by the callback of `logitcache train` alone; in another trainer it is its user's business, as in
transformers' own. Trade-off: the pruned triplets stay in memory and in the saved file, with E = 0, so that checkpoints
keep their shapes; what training needs to go on exactly lies in the optimizer's state.
"""

from typing import Any

import torch
from peft import AdaLoraModel, PeftModel
from peft.tuners.adalora import AdaLoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import TrainerCallback

WARM_UP, FINAL = 0.04, 0.1
"""Shares of all steps before pruning begins and after it ended, as in PEFT's method comparison (200, 500 of 5,000)."""

_KEPT = ("exp_avg_ipt", "exp_avg_unc")


class Orthogonality:
    """mean ||P P^T - I||_F over all A and B^T of the adapter that is trained; `weight` is its part in the loss.

    A value and a gradient of the weights alone, whatever a batch holds. PEFT computes it in the dtype of the factors;
    here it is float32.
    """

    def __init__(self, tuner: AdaLoraModel, name: str) -> None:
        self._config: Any = tuner.peft_config[name]
        layers = [layer for layer in tuner.modules() if isinstance(layer, AdaLoraLayer) and name in layer.lora_A]
        self._factors = [(layer.lora_A[name], True) for layer in layers]
        self._factors += [(layer.lora_B[name], False) for layer in layers]

    @staticmethod
    def of(model: nn.Module) -> "Orthogonality | None":
        """That of a PEFT model (not of one inside another wrapper); None where no AdaLoRA is trained."""
        tuner = model.base_model if isinstance(model, PeftModel) else None
        if not isinstance(tuner, AdaLoraModel):
            return None
        name = getattr(tuner, "trainable_adapter_name", None)  # absent where all are loaded for inference
        return None if name is None else Orthogonality(tuner, name)

    @property
    def weight(self) -> float:
        """Loss per unit."""
        return float(self._config.orth_reg_weight)

    def __call__(self) -> Tensor:
        """Without the weight; float32 scalar, with gradient where gradients are enabled."""
        factors, by_rows = zip(*self._factors, strict=True)
        mean: Tensor = _MeanNorm.apply(by_rows, *factors)  # type: ignore[no-untyped-call]
        return mean


class _MeanNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, by_rows: tuple[bool, ...], *factors: Tensor) -> Tensor:
        """Mean of ||P P^T - I||_F."""
        ctx.by_rows = by_rows
        ctx.save_for_backward(*factors)
        with torch.autocast(factors[0].device.type, enabled=False):
            norms = [
                _off_identity(_rows(factor, rows)).norm().to(factors[0].device)
                for factor, rows in zip(factors, by_rows, strict=True)
            ]
        return torch.stack(norms).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """`orthogonality_gradient` of each, times grad / their number."""
        share = grad / len(ctx.by_rows)
        pairs = zip(ctx.saved_tensors, ctx.by_rows, strict=True)
        with torch.autocast(grad.device.type, enabled=False):
            return None, *((orthogonality_gradient(f, rows) * share.to(f.device)).to(f.dtype) for f, rows in pairs)


class AdaLoraCallback(TrainerCallback):
    """The allocation of ranks, for a model that `adapters.attach` has given AdaLoRA."""

    def __init__(self, model: PeftModel) -> None:
        self._tuner: Any = model.base_model
        self._name = self._tuner.trainable_adapter_name
        self._config = self._tuner.peft_config[self._name]
        self._named = {n: p for n, p in self._tuner.model.named_parameters() if "lora_" in n and p.requires_grad}
        self._pattern: dict[str, list[bool]] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        total, config = state.max_steps, self._config
        config.total_step, config.tinit, config.tfinal = total, round(WARM_UP * total), round(FINAL * total)
        if state.global_step >= total - config.tfinal:  # resumed after the last allocation: what is masked is 0
            energies = {n: p for n, p in self._named.items() if ".lora_E." in n}
            self._pattern = {n: (p != 0).view(-1).tolist() for n, p in energies.items()}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        allocator, kept = self._tuner.rankallocator, optimizer.state
        for name, parameter in self._named.items():  # a resumed run finds here what the one before it had
            for what in _KEPT:
                if what in kept[parameter] and name not in getattr(allocator, what):
                    getattr(allocator, what)[name] = kept[parameter][what]
                    allocator.ipt[name] = torch.zeros_like(parameter)  # of one step, overwritten before it is read
        if self._config.total_step - self._config.tfinal < 2:  # no step to learn from what is of importance
            return
        self._config.rank_pattern = self._pattern
        self._tuner.update_and_allocate(state.global_step + 1)
        self._pattern, self._config.rank_pattern = self._config.rank_pattern, None  # checkpoints keep every triplet
        for name, parameter in self._named.items():
            for what in _KEPT:
                if name in getattr(allocator, what):
                    kept[parameter][what] = getattr(allocator, what)[name]
                else:
                    kept[parameter].pop(what, None)


def orthogonality_gradient(factor: Tensor, by_rows: bool) -> Tensor:
    """Gradient of ||P P^T - I||_F by the factor, float32: P = A [r, D], or (by_rows False) P = B^T for B [D, r].

    2 (P P^T - I) P / ||P P^T - I||_F, and 0 where P P^T = I.
    """
    rows = _rows(factor, by_rows)
    off = _off_identity(rows)
    gradient: Tensor = 2 * off @ rows / off.norm().clamp(min=torch.finfo(rows.dtype).tiny)
    return gradient if by_rows else gradient.T


def _rows(factor: Tensor, by_rows: bool) -> Tensor:
    """P, float32 [r, D]."""
    return (factor if by_rows else factor.T).float()


def _off_identity(rows: Tensor) -> Tensor:
    """P P^T - I, [r, r]."""
    return rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
