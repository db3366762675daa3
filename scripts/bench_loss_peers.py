"""The loss steps of other projects, re-implemented from reading them, for scripts/bench_loss.py to time beside ours.

Owns what each does between the last hidden states and the gradient into them: which tensors of [N, V] live at once, in
what order, chunked how. Nothing is copied and the projects are not run; options have their defaults there unless a
docstring says so. Weights are 1 on both terms and both are means over N, so that losses can be compared; the head is
frozen. Must not import `logitcache`.
Shapes: N positions, n of a chunk, D hidden, V vocabulary, K tokens of the teacher.

    mirrors                 file                                                       read at
    live_full_kl            what one writes first                                      -
    trl_jsd                 trl/experimental/gkd/gkd_trainer.py                        release 1.16.0
    torchtune_chunked_kl    torchtune/modules/loss/{kd_losses,ce_chunked_output_loss}  a398d547, 10ff7cd2
    liger_fused_jsd         liger_kernel/chunked_loss/{fused_linear_distillation,jsd}  449f5cba, fadb9202
    axolotl_fused_top_k     axolotl/integrations/kd/kernels/liger.py                   c4e9197a and pull request 3660
    distillkit_sparse_kl    distillkit/lossfuncs/{kl,common}.py                        bf942070, a61c2e7d
    bare_slices             nobody: a floor of what slices can cost                    -
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_OUTPUT_CHUNKS = 8
FUSED_CHUNK = 1024
BARE_SLICE = 128
LEAST_REST = 1e-4


@dataclass(frozen=True)
class Teacher:
    """What a peer is given of the teacher at N positions: a live one its hidden states (its head is the student's), an
    offline one the K most probable tokens whether the label is among them or not, int64 and float32 [N, K]."""

    hidden: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


@dataclass(frozen=True)
class Peer:
    """name; loss: (hidden [N, D], weight [V, D], labels [N], teacher, compiled) -> float scalar, mean CE + mean
    regulariser; regularizer: the same by definition, (log q, log p, teacher) -> [n] from dense float64 [n, V];
    copies: tensors of [N, V] alive at its peak, about, to tell beforehand where memory will not do."""

    name: str
    loss: Callable[[Tensor, Tensor, Tensor, Teacher, bool], Tensor]
    regularizer: Callable[[Tensor, Tensor, Teacher], Tensor] | None
    quantity: str
    copies: int


def plain_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, _teacher: Teacher, _compiled: bool) -> Tensor:
    """What transformers' models do with labels: all logits, float32, cross-entropy."""
    return F.cross_entropy((hidden @ weight.T).float(), labels)


def live_full_kl(hidden: Tensor, weight: Tensor, labels: Tensor, teacher: Teacher, _compiled: bool) -> Tensor:
    """Both sides' logits, log_softmax of both, in float32."""
    logits = hidden @ weight.T
    with torch.no_grad():
        teacher_logits = teacher.hidden @ weight.T
    ce = F.cross_entropy(logits.float(), labels)
    log_q = F.log_softmax(logits.float(), dim=-1)
    log_p = F.log_softmax(teacher_logits.float(), dim=-1)
    return ce + (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()


def trl_jsd(hidden: Tensor, weight: Tensor, labels: Tensor, teacher: Teacher, _compiled: bool, beta: float) -> Tensor:
    """GKD's generalised Jensen-Shannon divergence, temperature 1, in the logits' own dtype; plus CE, which GKD itself
    has not. beta 0 is forward KL, 0.5 the default. Divides by the temperature, stacks both sides for the mixture and
    selects the labelled rows."""
    temperature = 1.0
    logits = hidden @ weight.T
    with torch.no_grad():
        teacher_logits = teacher.hidden @ weight.T
    ce = F.cross_entropy(logits.float(), labels)
    scaled, teacher_scaled = logits / temperature, teacher_logits / temperature
    log_q, log_p = F.log_softmax(scaled, dim=-1), F.log_softmax(teacher_scaled, dim=-1)
    if beta == 0:
        each = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    else:
        share = torch.tensor(beta, dtype=log_q.dtype, device=log_q.device)
        log_m = torch.logsumexp(torch.stack([log_q + torch.log1p(-share), log_p + torch.log(share)]), dim=0)
        of_teacher = F.kl_div(log_m, log_p, reduction="none", log_target=True)
        of_student = F.kl_div(log_m, log_q, reduction="none", log_target=True)
        each = share * of_teacher + (1 - share) * of_student
    labelled = labels != -100
    each = each[labelled]
    return ce + each.sum() / labelled.sum()


def torchtune_chunked_kl(hidden: Tensor, weight: Tensor, labels: Tensor, teacher: Teacher, _compiled: bool) -> Tensor:
    """The recipe's two losses with 8 output chunks: both heads' logits exist as a list of chunks, float32 and softmax
    are made chunk by chunk, and kept for the backward. The value is KL plus the teacher's entropy."""
    parts = [part @ weight.T for part in hidden.chunk(NUM_OUTPUT_CHUNKS)]
    with torch.no_grad():
        teacher_parts = [part @ weight.T for part in teacher.hidden.chunk(NUM_OUTPUT_CHUNKS)]
    label_parts = labels.chunk(NUM_OUTPUT_CHUNKS)
    kl = ce = torch.zeros((), device=hidden.device)
    for logits, teacher_logits, label_part in zip(parts, teacher_parts, label_parts, strict=True):
        p = F.softmax(teacher_logits, dim=-1, dtype=torch.float32)
        infinite = torch.isinf(logits)
        log_q = F.log_softmax(logits, dim=-1, dtype=torch.float32)
        each = torch.masked_fill(p * log_q, infinite, 0).sum(dim=-1)
        kl = kl - (each * (label_part != -100)).sum()
    for logits, label_part in zip(parts, label_parts, strict=True):
        ce = ce + F.cross_entropy(logits.float(), label_part, reduction="sum")
    return (ce + kl) / (labels != -100).sum()


def liger_fused_jsd(
    hidden: Tensor, weight: Tensor, labels: Tensor, teacher: Teacher, compiled: bool, beta: float
) -> Tensor:
    """Chunks of 1,024 positions, each differentiated in the forward with respect to hidden states *and* head, whose
    gradient is made although the head is frozen. Teacher logits a chunk at a time. beta 0 is forward KL, 0.5 the
    default; weights 1 and 1 (there 0.5 and 0.5). Compiled there by default."""
    num = len(labels)

    def chunk_loss(h: Tensor, w: Tensor, teacher_h: Tensor, label: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        logits = h @ w.T
        hard = F.nll_loss(F.log_softmax(logits.float(), dim=-1), label, reduction="sum") / num
        with torch.no_grad():
            teacher_logits = teacher_h @ weight.T
        logits /= 1.0  # the temperature
        teacher_logits /= 1.0
        log_q, log_p = F.log_softmax(logits, dim=-1), F.log_softmax(teacher_logits, dim=-1)
        if beta == 0:
            soft = F.kl_div(log_q, log_p, reduction="sum", log_target=True) / num
        else:
            log_m = ((1 - beta) * log_q.exp() + beta * log_p.exp()).log()
            of_student = F.kl_div(log_m, log_q, reduction="sum", log_target=True)
            of_teacher = F.kl_div(log_m, log_p, reduction="sum", log_target=True)
            soft = (beta * of_teacher + (1 - beta) * of_student) / num
        loss = hard + soft
        return loss, (loss, soft, hard, logits, teacher_logits)

    others = (teacher.hidden, labels)
    loss: Tensor = _GradientInForward.apply(hidden, weight, others, chunk_loss, compiled)
    return loss


def axolotl_fused_top_k(hidden: Tensor, weight: Tensor, labels: Tensor, teacher: Teacher, compiled: bool) -> Tensor:
    """The same skeleton over the teacher's renormalised top-k: forward KL, the student renormalised on the k tokens
    too. Its cross-entropy had no gradient before pull request 3660 (it was returned as an auxiliary value); here it
    has. Weights 1 and 1; sums, divided by N outside, which scales both kept gradients. Compiled there by default."""
    log_p = teacher.top_logprobs - teacher.top_logprobs.logsumexp(dim=-1, keepdim=True)

    def chunk_loss(
        h: Tensor, w: Tensor, ids: Tensor, log_p: Tensor, mask: Tensor, label: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        logits = F.linear(h, w)
        hard = F.cross_entropy(logits, label, reduction="sum")
        scaled = (logits / 1.0).float()  # the temperature
        of_top = scaled.gather(-1, ids) - scaled.logsumexp(dim=-1, keepdim=True)
        q = (of_top - of_top.logsumexp(dim=-1, keepdim=True)).exp()
        log_q = (q / q.sum(dim=-1, keepdim=True)).log()
        zero = torch.zeros((), device=h.device)
        soft = torch.where(mask, log_p.exp() * (log_p - log_q), zero).sum()  # there by mask indices, dynamic shapes
        return hard + soft, (hard + soft, soft, hard)

    others = (teacher.top_ids, log_p, torch.ones_like(log_p, dtype=torch.bool), labels)
    loss: Tensor = _GradientInForward.apply(hidden, weight, others, chunk_loss, compiled)
    return loss / len(labels)


class _GradientInForward(torch.autograd.Function):
    """chunk_loss(hidden, weight, *others) -> (loss, (loss, *kept)), over chunks of 1,024 rows, with its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        others: tuple[Tensor, ...],
        chunk_loss: Callable[..., tuple[Tensor, tuple[Tensor, ...]]],
        compiled: bool,
    ) -> Tensor:
        weight_gradient, total = torch.zeros_like(weight), torch.zeros((), device=hidden.device)

        def one_chunk(h: Tensor, *rest: Tensor) -> Tensor:
            gradient_of = torch.func.grad_and_value(chunk_loss, argnums=(0, 1), has_aux=True)
            (of_hidden, of_weight), (loss, _kept) = gradient_of(h, weight, *rest)
            weight_gradient.add_(of_weight)
            total.add_(loss)
            return of_hidden

        step = torch.compile(one_chunk) if compiled else one_chunk
        num_chunks = max(1, len(hidden) // FUSED_CHUNK)
        parts = zip(*(t.chunk(num_chunks) for t in (hidden, *others)), strict=True)
        hidden_gradient = torch.cat([step(*part) for part in parts])
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_weight = ctx.saved_tensors
        if grad != 1:
            of_hidden, of_weight = of_hidden * grad, of_weight * grad
        return of_hidden, of_weight, None, None, None


def distillkit_sparse_kl(hidden: Tensor, weight: Tensor, labels: Tensor, teacher: Teacher, _compiled: bool) -> Tensor:
    """The model's own loss and KL from the teacher's top-k, missing mass `zero` (the teacher is renormalised, the
    student is not), over all positions at once: its chunks only slice logits that exist. There the weighted sum is
    divided by the sum of the weights; here not."""
    logits = hidden @ weight.T
    ce = F.cross_entropy(logits.float(), labels)
    normaliser = logits.float().logsumexp(dim=-1, keepdim=True).to(logits.dtype)
    log_q = logits.gather(-1, teacher.top_ids) - normaliser
    with torch.no_grad():
        values = teacher.top_logprobs.float()
        log_p = (values - values.logsumexp(dim=-1, keepdim=True)).to(logits.dtype)
    each = (log_p.float().exp() * (log_p - log_q.float())).sum(dim=-1)
    mask = labels >= 0
    return ce + (each * mask).sum() / mask.sum()


def bare_slices(hidden: Tensor, weight: Tensor, labels: Tensor, teacher: Teacher, _compiled: bool) -> Tensor:
    """Slices of 128: logits, softmax in place, gradient by hand, no tail: both sides renormalised on the top-k."""
    loss: Tensor = _BareSlices.apply(hidden, weight, labels, teacher)
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


# By definition, from dense log-probabilities


def full_kl(log_q: Tensor, log_p: Tensor, _teacher: Teacher) -> Tensor:
    """KL(p || q), [n]."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def cross_entropy_of_teacher(log_q: Tensor, log_p: Tensor, _teacher: Teacher) -> Tensor:
    """KL(p || q) + H(p), [n]."""
    return -(log_p.exp() * log_q).sum(dim=1)


def jensen_shannon(log_q: Tensor, log_p: Tensor, teacher: Teacher) -> Tensor:
    """Half KL(p || m) and half KL(q || m), m their mean, [n]."""
    log_m = (log_p.exp() / 2 + log_q.exp() / 2).log()
    return full_kl(log_m, log_p, teacher) / 2 + full_kl(log_m, log_q, teacher) / 2


def top_k_both_renormalised(log_q: Tensor, log_p: Tensor, teacher: Teacher) -> Tensor:
    """KL over the top-k, each side renormalised on it, [n]."""
    p, q = (log.gather(1, teacher.top_ids).log_softmax(dim=1) for log in (log_p, log_q))
    return (p.exp() * (p - q)).sum(dim=1)


def top_k_zero_tail(log_q: Tensor, log_p: Tensor, teacher: Teacher) -> Tensor:
    """KL from the teacher renormalised on its top-k to the student as it is, [n]."""
    p = log_p.gather(1, teacher.top_ids).log_softmax(dim=1)
    return (p.exp() * (p - log_q.gather(1, teacher.top_ids))).sum(dim=1)


def masked_kl(log_q: Tensor, log_p: Tensor, targets: Any, tail: str) -> Tensor:
    """KL(p without y || q without y) over the outcomes of ours, [n]; targets: the columns of `SparseTargets`, of which
    only ids are read; 0 where the teacher leaves the label less than 1e-4."""
    labels, kept = targets.label_ids.long()[:, None], targets.alternative_ids.long()
    p, q = (log.scatter(1, labels, -torch.inf).log_softmax(dim=1).exp() for log in (log_p, log_q))
    p_kept, q_kept = p.gather(1, kept), q.gather(1, kept)
    p_tail, q_tail = (x.scatter(1, kept, 0.0) for x in (p, q))
    if tail == "renormalize":
        p_kept, q_kept = (x / x.sum(dim=1, keepdim=True) for x in (p_kept, q_kept))
    values = _kl(p_kept, q_kept)
    if tail == "bucket":
        values = values + _kl(p_tail.sum(dim=1, keepdim=True), q_tail.sum(dim=1, keepdim=True))
    if tail == "groups":
        index = targets.token_groups.long()
        zero = p.new_zeros(len(p), targets.tail_group_logprobs.shape[1])
        values = values + _kl(zero.index_add(1, index, p_tail), zero.index_add(1, index, q_tail))
    if tail == "sampled":
        draws = targets.draw_ids.long()
        values = values + p_tail.sum(dim=1) * (p.gather(1, draws) / q.gather(1, draws)).log().mean(dim=1)
    rest = log_p.scatter(1, labels, -torch.inf).logsumexp(dim=1).exp()
    return torch.where(rest >= LEAST_REST, values, 0.0)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """sum p log(p / q), of probabilities, [n]."""
    return torch.where(p > 0, p * (p / q).log(), 0.0).sum(dim=1)


_TOP_K, _ZERO = "CE + top-k KL, both renormalised", "CE + top-k KL, zero tail"
PEERS = (
    Peer("plain CE", plain_cross_entropy, None, "CE", 3),
    Peer("CE + KL, live full logits", live_full_kl, full_kl, "CE + full KL", 8),
    Peer("TRL generalized_jsd + CE, beta 0", partial(trl_jsd, beta=0.0), full_kl, "CE + full KL", 10),
    Peer("TRL generalized_jsd + CE, beta 0.5", partial(trl_jsd, beta=0.5), jensen_shannon, "CE + JSD", 18),
    Peer("torchtune chunked forward KL + CE", torchtune_chunked_kl, cross_entropy_of_teacher, "CE + full KL + H(p)", 7),
    Peer("Liger fused JSD, beta 0", partial(liger_fused_jsd, beta=0.0), full_kl, "CE + full KL", 6),
    Peer("Liger fused JSD, beta 0.5", partial(liger_fused_jsd, beta=0.5), jensen_shannon, "CE + JSD", 8),
    Peer("axolotl fused top-k", axolotl_fused_top_k, top_k_both_renormalised, _TOP_K, 4),
    Peer("DistillKit sparse KL + CE", distillkit_sparse_kl, top_k_zero_tail, _ZERO, 6),
    Peer("bare slices of 128", bare_slices, top_k_both_renormalised, _TOP_K, 1),
)
"""The first is what the others are compared with."""
