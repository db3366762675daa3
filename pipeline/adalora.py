"""AdaLoRA under this project's trainer: the term and the schedule that PEFT leaves to a model's own loss and loop.

delta W = B diag(E) A / rank; triplets with little importance are masked until `target_r` a layer are left
(arXiv 2303.10512). Owns two things. The term: PEFT adds orth_reg_weight * mean ||P P^T - I||_F over all A and B^T to
the loss that the model's forward returns, which does not exist here, since the head is skipped; its gradient is added
to that of the loss instead, once an optimizer step and before gradients are clipped. The schedule: PEFT's own
allocator, called after every optimizer step. Trade-off: the pruned triplets stay in memory and in
the saved file, with E = 0, so that checkpoints keep their shapes; what training needs to go on exactly lies in the
optimizer's state.
"""

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback

WARM_UP, FINAL = 0.04, 0.1
"""Shares of all steps before pruning begins and after it ended, as in PEFT's method comparison (200, 500 of 5,000)."""

_KEPT = ("exp_avg_ipt", "exp_avg_unc")


class AdaLoraCallback(TrainerCallback):
    """The term's gradient and the allocation of ranks, for a model that `adapters.attach` has given AdaLoRA."""

    def __init__(self, model: PeftModel) -> None:
        self._tuner: Any = model.base_model
        self._name = self._tuner.trainable_adapter_name
        self._config = self._tuner.peft_config[self._name]
        self._named = {n: p for n, p in self._tuner.model.named_parameters() if "lora_" in n and p.requires_grad}
        self._factors = {p: ".lora_A." in n for n, p in self._named.items() if ".lora_E." not in n}
        self._pending: set[nn.Parameter] = set()
        self._pattern: dict[str, list[bool]] | None = None
        for factor in self._factors:
            factor.register_post_accumulate_grad_hook(self._add_term)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        total, config = state.max_steps, self._config
        config.total_step, config.tinit, config.tfinal = total, round(WARM_UP * total), round(FINAL * total)
        if state.global_step >= total - config.tfinal:  # resumed after the last allocation: what is masked is 0
            energies = {n: p for n, p in self._named.items() if ".lora_E." in n}
            self._pattern = {n: (p != 0).view(-1).tolist() for n, p in energies.items()}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pending = set(self._factors)

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

    def _add_term(self, factor: Tensor) -> None:
        if factor not in self._pending or not isinstance(factor, nn.Parameter) or factor.grad is None:
            return
        self._pending.discard(factor)
        weight = self._config.orth_reg_weight / len(self._factors)
        factor.grad.add_(orthogonality_gradient(factor.detach(), self._factors[factor]), alpha=weight)


def orthogonality_gradient(factor: Tensor, by_rows: bool) -> Tensor:
    """Gradient of ||P P^T - I||_F by the factor: P = A [r, D], or (by_rows False) P = B^T for B [D, r].

    2 (P P^T - I) P / ||P P^T - I||_F, and 0 where P P^T = I.
    """
    rows = factor if by_rows else factor.T
    off = rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    gradient: Tensor = 2 * off @ rows / off.norm().clamp(min=torch.finfo(rows.dtype).tiny)
    return gradient if by_rows else gradient.T
