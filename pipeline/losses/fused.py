"""The loss of hidden states without [N, V] memory: slice by slice through the head, gradient in the same pass.

Owns memory and the closed-form gradient; the formulas are those of `formulas`, which the tests hold this against.
Tensors only. Trade-off: the gradient is made in the forward, so that a slice of logits is computed once and never kept;
it cannot be differentiated twice. What the head does is autograd's own: any head is right, trained, adapted or scaled.

With g_j the gradient at the logit of outcome j, the gradient at a token c of the tail is g_T e_c / sum_T e, with
e_c = exp(z_c - max_T z): one exp, one sum and one row-wise product over the slice, for cross-entropy and regulariser
together. The maximum is the tail's own, so a tail far below its label loses no digits.
Shapes: N positions, n of a slice, D hidden, V vocabulary, K alternatives, G groups, J outcomes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from logitcache.errors import TrainingFailed

from .formulas import (
    Objective,
    Regularizer,
    SparseTargets,
    base_outcomes,
    base_rest,
    cross_entropy,
    divergence,
    regularizer_mask,
    regularizer_values,
    sampled_kl,
)

LOSS_SLICE_BYTES = {"cpu": 128 * 2**20, "cuda": 512 * 2**20}
"""Size of a slice of float32 logits, by the kind of device."""

LEAST_GROUP_SUM = 1e-30
"""Of exp(z - max): below it a group's sum has lost digits, and the slice goes the plain way."""

_COLUMNS = 16_384
"""Of a slice whose gradient is made at a time, where it differs by group."""

Head = Callable[[Tensor], Tensor]


class LinearLoss(NamedTuple):
    """float32 scalars. loss = ce + kl_weight * kl, with gradient; ce, kl: sums over positions in nats, without."""

    loss: Tensor
    ce: Tensor
    kl: Tensor


@torch.compiler.disable  # type: ignore[untyped-decorator]
def linear_loss(
    hidden: Tensor,
    head: Head,
    label_ids: Tensor,
    targets: SparseTargets | None,
    objective: Objective,
    kl_weight: float | Tensor,
    head_parameters: Sequence[Tensor] = (),
    top1: Tensor | None = None,
    supervised: Tensor | None = None,
) -> LinearLoss:
    """Cross-entropy plus kl_weight times the regulariser, each summed over positions.

    hidden: [N, D]; head: [n, D] -> logits [n, V], with V as its vocab_size or found by a call; label_ids: [N];
    targets: of the same positions, None for the regulariser `none`; head_parameters: the tensors inside the head that
    are trained, each of which must have a part in the logits (`leaves.trained_in` finds them).
    kl_weight stands for `objective.weight`; a 0-dimensional tensor costs no synchronisation. top1: an integer scalar,
    to which the number of labels that have the largest logit is added (the first of equal ones, as argmax has it);
    costs a synchronisation a slice, and no pass over its logits. supervised: bool [N], the positions at which the
    cross-entropy (and top1) counts, with targets; None: all. Equals the sums of
    `formulas.cross_entropy` (smoothed as the objective says) and `formulas.regularizer_values` (where
    `formulas.regularizer_mask` is true) over the whole [N, V]. Raises `TrainingFailed` where the head computes without
    one of these.
    """
    parameters = [p for p in head_parameters if p.requires_grad]
    if objective.regularizer == "none":
        targets = None
    with_gradient = torch.is_grad_enabled() and (hidden.requires_grad or bool(parameters))
    if targets is None and supervised is not None:
        raise ValueError("supervised: expected None without a regulariser, which is what counts elsewhere")
    call = _Call(head, label_ids, targets, objective, kl_weight, with_gradient, top1, supervised)
    return LinearLoss(*_LinearLoss.apply(call, hidden, *parameters))  # type: ignore[no-untyped-call]


@dataclass
class _Call:
    """The arguments that autograd need not see."""

    head: Head
    label_ids: Tensor
    targets: SparseTargets | None
    objective: Objective
    kl_weight: float | Tensor
    with_gradient: bool
    top1: Tensor | None = None
    supervised: Tensor | None = None
    _groups: tuple[Tensor, Tensor] | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """The head's, [n, V]. What its backward needs stays where it is: the graph of a slice lives for a moment, and
        who keeps saved tensors elsewhere (activation offloading) would move the head's weights once a slice."""
        with torch.set_grad_enabled(self.with_gradient), saved_tensors_hooks(_kept, _as_kept):
            return self.head(hidden)

    def groups(self) -> tuple[Tensor, Tensor]:
        """The group of each token, int64 [V], and the same as one-hot rows, float32 [V, G]."""
        if self._groups is None:
            assert self.targets is not None
            assert self.targets.token_groups is not None and self.targets.tail_group_logprobs is not None
            groups = self.targets.token_groups.long()
            one_hot = torch.zeros(len(groups), self.targets.tail_group_logprobs.shape[1], device=groups.device)
            self._groups = groups, one_hot.scatter_(1, groups[:, None], 1.0)
        return self._groups


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, hidden: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """loss, ce, kl; keeps the gradients of the loss."""
        ce, kl = (torch.zeros((), device=hidden.device) for _ in range(2))
        gradients = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        by_hidden = torch.zeros_like(hidden)
        num_rows = _num_rows(call, hidden)
        for start in range(0, len(hidden), num_rows):
            rows = slice(start, start + num_rows)
            targets = None if call.targets is None else call.targets.rows(rows)
            h = hidden.detach()[rows].requires_grad_(call.with_gradient)
            supervised = None if call.supervised is None else call.supervised[rows]
            part = _slice(call, h, call.label_ids[rows], targets, supervised)
            ce, kl = ce + part.ce, kl + part.kl
            if part.gradient is not None:
                with torch.autocast(hidden.device.type, enabled=False):
                    by_h, *found = torch.autograd.grad(part.logits, (h, *parameters), part.gradient, allow_unused=True)
                if by_h is not None:  # a head may detach what it is given
                    by_hidden[rows] += by_h
                for total, gradient in zip(gradients, found, strict=True):
                    total.add_(_found(gradient, total))
                del by_h, found
            del part  # before the next slice is made
        ctx.save_for_backward(by_hidden, *gradients)
        ctx.dtypes = [t.dtype for t in (hidden, *parameters)]
        loss = ce + _times(call.kl_weight, kl)
        ctx.mark_non_differentiable(ce, kl)
        return loss, ce, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _ce: Tensor, _kl: Tensor) -> tuple[Tensor | None, ...]:
        """Those, times the gradient of the loss."""
        saved = zip(ctx.saved_tensors, ctx.dtypes, strict=True)  # a scale in half precision would lose digits
        return (None, *((g.float() * grad_loss).to(dtype) for g, dtype in saved))


def _kept(tensor: Tensor) -> tuple[Tensor, int]:
    """A saved tensor, and its version: autograd counts writes to what it saves by itself alone."""
    return tensor.detach(), tensor._version


def _as_kept(kept: tuple[Tensor, int]) -> Tensor:
    tensor, version = kept
    if tensor._version != version:
        raise RuntimeError("making the loss: a tensor that the backward of the output head reads was overwritten")
    return tensor


def _found(gradient: Tensor | None, total: Tensor) -> Tensor:
    """It, if it was found. total: the sum that it belongs to, of its shape."""
    if gradient is None:
        raise TrainingFailed(
            "making the loss: expected the head to compute with every tensor that is given as trained in it, found no "
            f"gradient for one of shape {list(total.shape)}, which would stay as it is. Leave it out."
        )
    return gradient


class _Slice(NamedTuple):
    """logits [n, V] as the head made them, d loss / d logits or None, and the sums of the slice."""

    logits: Tensor
    gradient: Tensor | None
    ce: Tensor
    kl: Tensor


def _num_rows(call: _Call, hidden: Tensor) -> int:
    if call.objective.tokens_per_loss_chunk is not None:
        return call.objective.tokens_per_loss_chunk
    if not len(hidden):
        return 1
    vocab_size = getattr(call.head, "vocab_size", None)
    if vocab_size is None:
        with torch.set_grad_enabled(call.with_gradient):  # autocast keeps what it casts under no_grad
            vocab_size = call.head(hidden.detach()[:1]).shape[1]
    return max(1, LOSS_SLICE_BYTES.get(hidden.device.type, LOSS_SLICE_BYTES["cuda"]) // (4 * vocab_size))


def _slice(
    call: _Call, hidden: Tensor, label_ids: Tensor, targets: SparseTargets | None, supervised: Tensor | None
) -> _Slice:
    logits = call.logits(hidden)
    overwrites = _are_unshared(logits, call.head)
    buffer = logits.detach().float()
    if buffer.data_ptr() == logits.data_ptr() and not overwrites:
        buffer = buffer.clone()
    found = _losses_and_gradient(buffer, call, label_ids, targets, supervised)
    if found is None:
        logits = call.logits(hidden)  # the first are overwritten
        return _plain_slice(logits, call, label_ids, targets, supervised)
    ce, kl = found
    if not call.with_gradient:
        return _Slice(logits, None, ce, kl)
    if buffer.dtype == logits.dtype:
        return _Slice(logits, buffer, ce, kl)
    return _Slice(logits, logits.detach().copy_(buffer) if overwrites else buffer.to(logits.dtype), ce, kl)


def _are_unshared(logits: Tensor, head: Head) -> bool:
    """Whether logits may be overwritten: nothing but a plain linear layer made them, whose backward does not read them.

    That layer is the head itself, or what the head calls its `plain_layer`. Any other head falls back to a copy: one
    that computes more than a product, is a subclass, is compiled, packed or patched, or has hooks. Autograd counts
    writes: were logits that a backward reads overwritten, it would refuse, and not compute something else.
    """
    layer = head if isinstance(head, nn.Module) else getattr(head, "plain_layer", None)
    if type(layer) is not nn.Linear or type(layer.weight) not in (Tensor, nn.Parameter):
        return False
    if layer is head:  # who has a `plain_layer` calls its forward, and knows whether that is its own
        is_patched = "forward" in vars(layer) or getattr(layer, "_compiled_call_impl", None) is not None
        if is_patched or layer._forward_hooks or nn.modules.module._global_forward_hooks:
            return False
    return not logits._is_view()


def _plain_slice(
    logits: Tensor, call: _Call, label_ids: Tensor, targets: SparseTargets | None, supervised: Tensor | None
) -> _Slice:
    """The general way, by autograd over `losses`; several times the memory of a slice."""
    assert targets is not None
    z = logits.detach().float().requires_grad_(call.with_gradient)
    with torch.set_grad_enabled(call.with_gradient):
        values = cross_entropy(z, label_ids)
        ce = (values if supervised is None else torch.where(supervised, values, 0.0)).sum()
        counts = regularizer_mask(targets, call.objective)
        kl = torch.where(counts, regularizer_values(z, targets, call.objective), 0.0).sum()
        gradient = (
            torch.autograd.grad(ce + _times(call.kl_weight, kl), z)[0].to(logits.dtype) if call.with_gradient else None
        )
    return _Slice(logits, gradient, ce.detach(), kl.detach())


@torch.no_grad()
def _losses_and_gradient(
    buffer: Tensor, call: _Call, label_ids: Tensor, targets: SparseTargets | None, supervised: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """The sums of the slice. None where digits would be lost.

    buffer: float32 [n, V], the only memory of that size: logits z, then e = exp(z - max z) of `_Tail`, then d loss/d z.
    """
    labels, smoothing = label_ids.long()[:, None], call.objective.label_smoothing
    if smoothing:
        z_mean = buffer.sub_(buffer.amax(dim=1, keepdim=True)).mean(dim=1, keepdim=True)
    if targets is None:
        kept_ids, kept_logits = labels, buffer.gather(1, labels)
    else:
        ids = targets.alternative_ids.long()
        kept_ids = torch.cat([labels, ids], dim=1)
        alternatives = torch.where(ids != labels, buffer.gather(1, ids), -torch.inf)
        kept_logits = torch.cat([buffer.gather(1, labels), alternatives], dim=1)
    drawn_ids = None if targets is None or targets.draw_ids is None else targets.draw_ids.long()
    drawn_logits = None if drawn_ids is None else buffer.gather(1, drawn_ids)
    tail = _Tail(buffer.scatter_(1, kept_ids, -torch.inf))
    if call.top1 is not None:  # also where the slice goes the plain way after this
        call.top1 += _num_largest(kept_logits, kept_ids, tail, supervised).to(call.top1)
    largest = torch.cat([tail.top, kept_logits[:, 1:]], dim=1).amax(dim=1, keepdim=True)
    origin = torch.where(largest == -torch.inf, 0.0, largest)  # the logits' size costs no digits
    z_kept = kept_logits - origin
    z_drawn = None if drawn_logits is None else drawn_logits - origin
    tail.measure_from(origin)
    every = torch.cat([z_kept, tail.log_sum], dim=1)
    log_all, log_rest = every.logsumexp(dim=1, keepdim=True), every[:, 1:].logsumexp(dim=1, keepdim=True)
    values = (log_all - z_kept[:, :1]).squeeze(1)
    kept_gradient = (z_kept - log_all).exp()
    kept_gradient[:, :1] = -(log_rest - log_all).exp()  # q(y) - 1, not as a difference
    beyond = (tail.log_sum - log_all).exp()
    if supervised is not None:
        values, kept_gradient, beyond = (_only(supervised, value) for value in (values, kept_gradient, beyond))
    ce = values.sum()
    if targets is None:
        tail.scale(beyond)
        if smoothing:  # the gradient is q - (1 - e) 1_y - e / V
            ce = (1 - smoothing) * ce + smoothing * (log_all + origin - z_mean).sum()
            buffer.sub_(smoothing / buffer.shape[1])
            kept_gradient += smoothing - smoothing / buffer.shape[1]
        buffer.scatter_(1, kept_ids, kept_gradient)
        return ce, torch.zeros_like(ce)
    found = _Compared.of(z_kept, tail, z_drawn, (log_rest - log_all).squeeze(1), targets, call)
    if found is None:
        return None
    first = 1 if call.objective.masked else 0
    last = z_kept.shape[1] - first
    kept_gradient[:, first:] += found.gradient[:, :last]
    tail.scale(beyond, found.gradient[:, last:])
    if found.drawn is not None and drawn_ids is not None:
        buffer.scatter_add_(1, drawn_ids, found.drawn.expand(drawn_ids.shape))
    buffer.scatter_(1, kept_ids[:, 1:], kept_gradient[:, 1:])
    buffer.scatter_(1, labels, kept_gradient[:, :1])  # after what absent alternatives wrote there
    return ce, found.values.sum()


def _only(supervised: Tensor, value: Tensor) -> Tensor:
    """The rows [n, ...] at which the cross-entropy counts, 0 elsewhere."""
    return torch.where(supervised if value.dim() == 1 else supervised[:, None], value, 0.0)


def _num_largest(kept_logits: Tensor, kept_ids: Tensor, tail: "_Tail", supervised: Tensor | None) -> Tensor:
    """How many labels, the first of the kept, have the largest logit, where cross-entropy counts; of equal ones the
    first id has it."""
    label, label_id, others = kept_logits[:, :1], kept_ids[:, :1], kept_logits[:, 1:]
    largest = ((label > others) | ((label == others) & (label_id < kept_ids[:, 1:]))).all(dim=1)
    largest &= (label >= tail.top).squeeze(1)
    (tied,) = (largest & (label == tail.top).squeeze(1)).nonzero(as_tuple=True)
    if len(tied):
        first = (tail.buffer[tied] == 1).int().argmax(dim=1)
        largest[tied] = label_id[tied, 0] < first
    return (largest if supervised is None else largest & supervised).sum()


class _Tail:
    """The tokens of a slice that are neither label nor kept: e = exp(z - max z), [n, V], in the buffer of z."""

    def __init__(self, buffer: Tensor) -> None:
        self.top = buffer.amax(dim=1, keepdim=True)  # the largest logit; -inf where there is no tail
        self.buffer = buffer.sub_(torch.where(self.top == -torch.inf, 0.0, self.top)).exp_()
        self.sum = self.buffer.sum(dim=1, keepdim=True)
        self.top_from_origin = self.top
        self.groups: Tensor | None = None
        self.group_sums: Tensor | None = None

    def measure_from(self, origin: Tensor) -> None:
        """Give logarithms of sums of exp(z - origin) from now on; origin: [n, 1]."""
        self.top_from_origin = self.top - origin

    @property
    def log_sum(self) -> Tensor:
        """log sum of exp(z), [n, 1]; -inf where there is no tail."""
        return self.top_from_origin + self.sum.log()

    def split(self, groups: Tensor, one_hot: Tensor) -> Tensor:
        """log of the sum in each group, [n, G]."""
        with torch.autocast(self.buffer.device.type, enabled=False):
            self.group_sums = self.buffer @ one_hot
        self.groups = groups
        return self.top_from_origin + self.group_sums.log()

    def scale(self, gradient: Tensor, parts: Tensor | None = None) -> None:
        """e becomes the gradient: `gradient` [n, 1] of T shared out by e, and `parts` of T [n, 1] or its groups."""
        of_tail = _share(gradient, self.sum)
        if parts is None or (self.group_sums is None and not parts.shape[1]):
            self.buffer.mul_(of_tail)
            return
        if self.group_sums is None or self.groups is None:
            self.buffer.mul_(of_tail + _share(parts, self.sum))
            return
        of_groups = of_tail + _share(parts, self.group_sums)
        for start in range(0, self.buffer.shape[1], _COLUMNS):
            columns = slice(start, start + _COLUMNS)
            self.buffer[:, columns].mul_(of_groups.index_select(1, self.groups[columns]))


@dataclass
class _Compared:
    """The regulariser of a slice: values [n], its gradient at the logit of each outcome [n, J] and at each draw [n, 1],
    times kl_weight; 0 where a position does not count."""

    values: Tensor
    gradient: Tensor
    drawn: Tensor | None

    @staticmethod
    def of(
        z_kept: Tensor, tail: _Tail, z_drawn: Tensor | None, log_rest: Tensor, targets: SparseTargets, call: _Call
    ) -> "_Compared | None":
        """None where digits would be lost."""
        objective = call.objective
        log_p = base_outcomes(targets, objective)
        parts = [z_kept[:, 1:] if objective.masked else z_kept]
        if objective.tail == "groups":
            parts.append(tail.split(*call.groups()))
            if objective.regularizer in ("masked-kl", "full-kl") and tail.group_sums is not None:
                counted = log_p[:, -tail.group_sums.shape[1] :] > -torch.inf
                if bool((counted & (tail.group_sums < LEAST_GROUP_SUM)).any()):
                    return None
        elif objective.tail != "renormalize":
            parts.append(tail.log_sum)
        heated = torch.cat(parts, dim=1) / objective.temperature
        norm = heated.logsumexp(dim=1, keepdim=True)
        log_q = heated - torch.where(norm == -torch.inf, 0.0, norm)
        if objective.tail == "sampled":
            assert z_drawn is not None
            values = sampled_kl(log_p, log_q, z_drawn - norm, targets)
            gradient, drawn = log_q.exp(), -log_p[:, -1:].exp() / z_drawn.shape[1]
            gradient[:, :-1] -= log_p[:, :-1].exp()
        else:
            values = divergence(log_p, log_q, objective.regularizer) * objective.temperature**2
            gradient = outcome_gradient(log_p, log_q, objective.regularizer) * objective.temperature
            drawn = None
        counts = regularizer_mask(targets, objective)
        if objective.masked and objective.min_adapted_rest > 0:
            counts = counts & (log_rest >= math.log(objective.min_adapted_rest))
        weights = base_rest(targets).exp() if objective.weighting == "non-target-mass" else torch.ones_like(values)
        scale = (weights * call.kl_weight)[:, None]
        return _Compared(
            torch.where(counts, values * weights, 0.0),
            torch.where(counts[:, None], _times(scale, gradient), 0.0),
            None if drawn is None else torch.where(counts[:, None], _times(scale, drawn), 0.0),
        )


def outcome_gradient(log_p: Tensor, log_q: Tensor, regularizer: Regularizer) -> Tensor:
    """d divergence / d (logit of each outcome), [n, J], Q being the softmax of these logits.

    KL(P || Q): Q - P. KL(Q || P): Q (log Q/P - KL(Q || P)). JS: Q (log Q/m - KL(Q || m)) / 2, m = (P + Q) / 2.
    """
    q = log_q.exp()
    if regularizer in ("masked-kl", "full-kl"):
        return q - log_p.exp()
    against, factor = log_p, 1.0
    if regularizer == "masked-js":
        against, factor = torch.logaddexp(log_p, log_q) - math.log(2), 0.5
    ratio = torch.where(q > 0, log_q - against, 0.0)
    return factor * q * (ratio - (q * ratio).sum(dim=1, keepdim=True))


def _times(weight: float | Tensor, value: Tensor) -> Tensor:
    """weight * value, 0 where the weight is: without a weight an infinite value is nobody's business."""
    weight = torch.as_tensor(weight, dtype=value.dtype, device=value.device)
    return torch.where(weight == 0, 0.0, weight * value)


def _share(gradient: Tensor, total: Tensor) -> Tensor:
    """gradient / total, 0 where there is nothing to share it out to."""
    return torch.where(total > 0, gradient / torch.where(total > 0, total, 1.0), 0.0)
