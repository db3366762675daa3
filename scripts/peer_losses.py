"""The loss steps of other projects, each by its own public function, for scripts/bench_loss_peers.py to list.

Owns which function is called with which arguments. A project that has options is called with its own defaults unless an
argument here says otherwise; both terms have weight 1 and are means over N, so that values can be compared, and what
computes one term alone is left at that. The head is frozen. A project is imported when its function is first called.
Must not import `logitcache`.
Shapes: N positions, D hidden, V vocabulary, K tokens of the teacher.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_loss_step import Inputs, Loss, Teacher
from torch import Tensor

BARE_SLICE = 128


# torch


def plain_cross_entropy(inputs: Inputs) -> Loss:
    """What transformers' models do with labels: all logits, float32, cross-entropy."""
    return lambda hidden: F.cross_entropy((hidden @ inputs.weight.T).float(), inputs.labels)


def torch_linear_cross_entropy(inputs: Inputs, options: dict[str, Any] | None = None) -> Loss:
    """options: of `LinearCrossEntropyOptions`; None is its reference path."""
    chosen = None if options is None else torch.nn.LinearCrossEntropyOptions(**options)
    return lambda hidden: F.linear_cross_entropy(hidden, inputs.weight, inputs.labels, options=chosen)


def live_full_kl(inputs: Inputs) -> Loss:
    """What one writes first: both sides' logits, log_softmax of both, in float32."""

    def loss(hidden: Tensor) -> Tensor:
        logits = hidden @ inputs.weight.T
        with torch.no_grad():
            teacher_logits = inputs.teacher.hidden @ inputs.weight.T
        ce = F.cross_entropy(logits.float(), inputs.labels)
        log_q = F.log_softmax(logits.float(), dim=-1)
        log_p = F.log_softmax(teacher_logits.float(), dim=-1)
        return ce + (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()

    return loss


# TRL


def trl_fused_head(inputs: Inputs, outputs: tuple[str, ...] = ("log_probs", "entropy", "is_top1")) -> Loss:
    """What the forward of `add_fused_lm_head` calls; outputs: as SFTTrainer asks for, which logs the other two."""
    from trl.trainer import utils

    def loss(hidden: Tensor) -> Tensor:
        each = utils._ChunkedLogProbFunction.apply(
            hidden, inputs.weight, None, inputs.labels, 1.0, utils._CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, outputs
        )
        mean: Tensor = -each[0].sum() / len(hidden)
        return mean

    return loss


def trl_chunked_divergence(inputs: Inputs, beta: float) -> Loss:
    """What DistillationTrainer's compute_loss calls (its own beta is 1, the reverse KL)."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    mask, teacher, weight = torch.ones_like(inputs.labels)[None], inputs.teacher.hidden[None], inputs.weight

    def loss(hidden: Tensor) -> Tensor:
        mean: Tensor = _chunked_divergence_loss(hidden[None], teacher, weight, weight, mask, beta)[0]
        return mean

    return loss


def trl_generalized_jsd(inputs: Inputs, beta: float) -> Loss:
    """GKDTrainer.compute_loss from the two models' logits on."""
    from trl.experimental.gkd import GKDTrainer

    def loss(hidden: Tensor) -> Tensor:
        logits = (hidden @ inputs.weight.T)[None]
        with torch.no_grad():
            teacher_logits = (inputs.teacher.hidden @ inputs.weight.T)[None]
        mean: Tensor = GKDTrainer.generalized_jsd_loss(
            logits, teacher_logits, inputs.labels[None], beta=beta, num_items_in_batch=len(hidden)
        )
        return mean

    return loss


# torchtune


def torchtune_chunked_kl(inputs: Inputs) -> Loss:
    """The distillation recipe's two losses, over logits in chunks as its decoder gives them."""
    from torchtune.modules.loss import CEWithChunkedOutputLoss, ForwardKLWithChunkedOutputLoss

    of_labels, of_teacher = CEWithChunkedOutputLoss(), ForwardKLWithChunkedOutputLoss()
    num_chunks, labels = of_labels.num_output_chunks, inputs.labels[None]

    def loss(hidden: Tensor) -> Tensor:
        logits = [part @ inputs.weight.T for part in hidden[None].chunk(num_chunks, dim=1)]
        with torch.no_grad():
            parts = [part @ inputs.weight.T for part in inputs.teacher.hidden[None].chunk(num_chunks, dim=1)]
        kl: Tensor = of_teacher(logits, parts, labels)
        return kl + of_labels(logits, labels)

    return loss


# Liger


def liger_scaled(inputs: Inputs) -> Loss:
    """Its own kernel on compute capability 9.0; chunks of 512 in torch elsewhere."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    return lambda hidden: Function.apply(hidden, inputs.weight, inputs.labels).mean()


def liger_fused_linear(inputs: Inputs) -> Loss:
    """Triton."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    of_labels = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden: of_labels(inputs.weight, hidden, inputs.labels)


def liger_fused_kl(inputs: Inputs) -> Loss:
    """Triton; the teacher's probabilities [N, V] are made in the step, since nobody keeps them."""
    from liger_kernel.transformers import LigerFusedLinearKLDivLoss

    of_teacher = LigerFusedLinearKLDivLoss()

    def loss(hidden: Tensor) -> Tensor:
        with torch.no_grad():
            p = (inputs.teacher.hidden @ inputs.weight.T).float().softmax(dim=-1)
        kl: Tensor = of_teacher(hidden, inputs.weight, p)
        return kl

    return loss


def liger_fused_jsd(inputs: Inputs) -> Loss:
    """Triton, beta 0.5."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    jsd = LigerFusedLinearJSD()
    return lambda hidden: jsd(hidden, inputs.weight, inputs.teacher.hidden, inputs.weight, inputs.labels)


def liger_chunked_jsd(inputs: Inputs, beta: float, compiled: bool) -> Loss:
    """Chunks of 1,024, each differentiated in the forward, with respect to the frozen head too; compiled by default."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    of_both = LigerFusedLinearJSDLoss(1.0, 1.0, beta=beta, compiled=compiled)
    weight, teacher = inputs.weight, inputs.teacher.hidden
    return lambda hidden: of_both(hidden, weight, teacher, weight, inputs.labels)


# cut-cross-entropy


def cut_cross_entropy(inputs: Inputs, impl: str | None = None) -> Loss:
    """impl: None for its own default, the Triton kernel."""
    from cut_cross_entropy import linear_cross_entropy

    if impl is None:
        return lambda hidden: linear_cross_entropy(hidden, inputs.weight, inputs.labels)
    return lambda hidden: linear_cross_entropy(hidden, inputs.weight, inputs.labels, impl=impl)


# axolotl


def axolotl_top_k(inputs: Inputs, compiled: bool) -> Loss:
    """The loss of its distillation trainer, kd_beta 0; teacher and student renormalised on the top-k. It shifts labels
    itself, so that the last position has none, and compute_loss divides by num_items_in_batch."""
    from axolotl.integrations.kd.kernels import LigerFusedLinearKLTopKLogprobLoss

    of_both = LigerFusedLinearKLTopKLogprobLoss(1.0, 1.0, beta=0.0, compiled=compiled)
    labels = F.pad(inputs.labels, (1, 0))[None, :-1]
    ids, log_p = inputs.teacher.top_ids[None], inputs.teacher.top_logprobs.log_softmax(dim=1)[None]
    mask = torch.ones_like(log_p)

    def loss(hidden: Tensor) -> Tensor:
        total: Tensor = of_both(inputs.weight, hidden[None], ids, log_p, mask, labels)
        return total / len(hidden)

    return loss


def axolotl_chunked(inputs: Inputs) -> Loss:
    """`chunked_cross_entropy: true`: all logits, cross-entropy compiled and in 8 chunks."""
    from axolotl.monkeypatch.loss.chunked import get_causal_lm_loss

    of_labels, labels = get_causal_lm_loss(), inputs.labels[None]

    def loss(hidden: Tensor) -> Tensor:
        mean: Tensor = of_labels((hidden @ inputs.weight.T)[None], labels, shift_labels=labels)
        return mean

    return loss


# unsloth


def _import_unsloth(inputs: Inputs) -> None:
    """unsloth_zoo asks for a GPU when it is imported, unless it is told that there is none."""
    os.environ["UNSLOTH_IS_PRESENT"] = "1"  # it will not be imported without unsloth, which says so
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(Path(tempfile.gettempdir()) / "unsloth_compiled_cache"))
    if inputs.hidden.device.type == "cpu":
        os.environ["UNSLOTH_ZOO_DISABLE_GPU_INIT"] = "1"


def unsloth_fused(inputs: Inputs) -> Loss:
    """What its patched models call with labels."""
    _import_unsloth(inputs)
    from unsloth_zoo.fused_losses import unsloth_fused_ce_loss

    labels, weight = inputs.labels[None], inputs.weight
    return lambda hidden: unsloth_fused_ce_loss(None, hidden[None], weight, None, labels, shift_labels=False)


def unsloth_jsd(inputs: Inputs, beta: float) -> Loss:
    """What stands for GKDTrainer.generalized_jsd_loss there."""
    _import_unsloth(inputs)
    from unsloth_zoo.fused_losses.fused_linear import fused_linear_jsd

    teacher, weight = inputs.teacher.hidden, inputs.weight
    return lambda hidden: fused_linear_jsd(hidden, weight, teacher, weight, labels=inputs.labels, beta=beta)


# Written here


def distillkit_sparse_kl(inputs: Inputs) -> Loss:
    """distillkit/lossfuncs/{kl,common}.py, which no index serves, at bf942070 and a61c2e7d: the model's own loss and KL
    from the teacher's top-k, missing mass `zero` (the teacher is renormalised, the student is not), over all positions
    at once: its chunks only slice logits that exist. There the weighted sum is divided by the sum of the weights; here
    not."""
    teacher = inputs.teacher

    def loss(hidden: Tensor) -> Tensor:
        logits = hidden @ inputs.weight.T
        ce = F.cross_entropy(logits.float(), inputs.labels)
        normaliser = logits.float().logsumexp(dim=-1, keepdim=True).to(logits.dtype)
        log_q = logits.gather(-1, teacher.top_ids) - normaliser
        with torch.no_grad():
            values = teacher.top_logprobs.float()
            log_p = (values - values.logsumexp(dim=-1, keepdim=True)).to(logits.dtype)
        each = (log_p.float().exp() * (log_p - log_q.float())).sum(dim=-1)
        mask = inputs.labels >= 0
        return ce + (each * mask).sum() / mask.sum()

    return loss


def bare_slices(inputs: Inputs) -> Loss:
    """A floor of what slices can cost, 128 rows each: logits, softmax in place, gradient by hand, no tail."""

    def loss(hidden: Tensor) -> Tensor:
        mean: Tensor = _BareSlices.apply(hidden, inputs.weight, inputs.labels, inputs.teacher)
        return mean

    return loss


class _BareSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, teacher: Teacher) -> Tensor:
        gradient, total = torch.empty_like(hidden), torch.zeros((), device=hidden.device)
        for start in range(0, len(labels), BARE_SLICE):
            rows = slice(start, start + BARE_SLICE)
            ids, label = teacher.top_ids[rows], labels[rows, None]
            z = (hidden[rows] @ weight.T).float()
            log_q = (at_top := z.gather(1, ids)) - at_top.logsumexp(dim=1, keepdim=True)
            log_p = teacher.top_logprobs[rows] - teacher.top_logprobs[rows].logsumexp(dim=1, keepdim=True)
            of_label, normaliser = z.gather(1, label), z.logsumexp(dim=1, keepdim=True)
            total += (normaliser - of_label).sum() + (log_p.exp() * (log_p - log_q)).sum()
            z.sub_(normaliser).exp_()
            z.scatter_add_(1, label, -torch.ones_like(of_label))
            z.scatter_add_(1, ids, log_q.exp() - log_p.exp())
            gradient[rows] = z.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        ctx.num = len(labels)
        return total / len(labels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0] * (grad / ctx.num), None, None, None
