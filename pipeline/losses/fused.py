"""The loss of hidden states without [N, V] memory: slice by slice through the head, gradient in the same pass.

Owns memory and the gradient of cross-entropy and regulariser together; the formulas are those of `formulas` and
`weights`, which the tests hold this against, and the regulariser's own gradient is `compared`'s.
Tensors only. Trade-off: the gradient is made in the forward, so that a slice of logits is computed once and never kept;
it cannot be differentiated twice. What the head does is autograd's own: any head is right, trained, adapted or scaled.

With g_j the gradient at the logit of outcome j, the gradient at a token c of the tail is g_T e_c / sum_T e, with
e_c = exp(z_c - max_T z): one exp, one sum and one row-wise product over the slice, for cross-entropy and regulariser
together. The maximum is the tail's own, so a tail far below its label loses no digits.
Shapes: N positions, n of a slice, D hidden, V vocabulary, K alternatives, G groups, J outcomes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from logitcache.errors import TrainingFailed

from .compared import Compared, Tail, times
from .formulas import Objective, SparseTargets, cross_entropy, regularizer_mask, regularizer_values
from .kernels.choice import are_usable, kernel_tail, num_rows, serve
from .weights import Weigher, top_logits, weigher_of

LOSS_SLICE_BYTES = {"cpu": 128 * 2**20, "cuda": 512 * 2**20}
"""Size of a slice of float32 logits, by the kind of device."""

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
    for_ce: Tensor | None = None,
) -> LinearLoss:
    """Cross-entropy plus kl_weight times the regulariser, each summed over positions.

    hidden: [N, D]; head: [n, D] -> logits [n, V], with V as its vocab_size or found by a call; label_ids: [N];
    targets: of the same positions, None where the objective reads no base; head_parameters: the tensors inside the
    head that are trained, each of which must have a part in the logits (`leaves.trained_in` finds them).
    kl_weight stands for `objective.weight`; a 0-dimensional tensor costs no synchronisation. top1: an integer scalar,
    to which the number of labels that have the largest logit is added (the first of equal ones, as argmax has it);
    costs a synchronisation a slice, and no pass over its logits. supervised: bool [N], the positions at which the
    cross-entropy (and top1) counts, with targets; None: all. for_ce: [N], what `weights.weigher_of` reads of a batch.
    Equals the sums of `formulas.cross_entropy` (smoothed or weighted as the objective says; a weight is a constant for
    the gradient) and `formulas.regularizer_values` (where `formulas.regularizer_mask` is true) over the whole [N, V].
    Raises `TrainingFailed` where the head computes without one of these, and as `weights.weigher_of`.
    """
    parameters = [p for p in head_parameters if p.requires_grad]
    with_gradient = torch.is_grad_enabled() and (hidden.requires_grad or bool(parameters))
    compared = None if objective.regularizer == "none" else targets
    if compared is None and supervised is not None:
        raise ValueError("supervised: expected None without a regulariser, which is what counts elsewhere")
    call = _Call(head, label_ids, compared, objective, kl_weight, with_gradient, top1, supervised)
    call.weigher = weigher_of(objective, label_ids, targets, supervised, for_ce, lambda: _label_logprobs(call, hidden))
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
    weigher: Weigher | None = None
    _groups: tuple[Tensor, Tensor] | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """The head's, [n, V]. What its backward needs stays where it is: the graph of a slice lives for a moment, and
        who keeps saved tensors elsewhere (activation offloading) would move the head's weights once a slice."""
        with torch.set_grad_enabled(self.with_gradient), saved_tensors_hooks(_saved, _as_saved):
            return self.head(hidden)

    def rows(self, rows: slice) -> "_Rows":
        """These positions."""
        targets = None if self.targets is None else self.targets.rows(rows)
        return _Rows(rows, self.label_ids[rows], targets, None if self.supervised is None else self.supervised[rows])

    def ce_factors(self, part: "_Rows", log_q: Tensor, top: Tensor | None) -> Tensor | None:
        """By what the cross-entropy of each position is multiplied, float32 [n]; None: by 1 at all of them.

        log_q: log q(y), [n]; top: as `weights.top_logits` has it.
        """
        weights = None if self.weigher is None else self.weigher.of(part.rows, log_q, top)
        if part.supervised is None:
            return weights
        return torch.where(part.supervised, 1.0 if weights is None else weights, 0.0)

    def kernels_serve(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether a slice of logits goes through `kernels`, in this its own dtype."""
        num_groups = 0 if self.targets is None else self.targets.num_groups
        return serve(self.objective, num_groups) and are_usable(device, dtype)

    def tail(self, buffer: Tensor) -> Tail:
        """Of logits [n, V] that are -inf at label and kept, in the buffer of `_slice`."""
        if buffer.stride(1) != 1 or not self.kernels_serve(buffer.device, buffer.dtype):
            return Tail(buffer)
        if self.targets is None or self.objective.tail != "groups":
            return kernel_tail(buffer, None, 0)
        groups, one_hot = self.groups()
        return kernel_tail(buffer, groups, one_hot.shape[1])

    def groups(self) -> tuple[Tensor, Tensor]:
        """The group of each token, int64 [V], and the same as one-hot rows, float32 [V, G]."""
        if self._groups is None:
            assert self.targets is not None
            assert self.targets.token_groups is not None and self.targets.tail_group_logprobs is not None
            groups = self.targets.token_groups.long()
            size = len(groups), self.targets.tail_group_logprobs.shape[1]
            one_hot = torch.zeros(size, device=groups.device, dtype=torch.float32)  # whatever the default dtype is
            self._groups = groups, one_hot.scatter_(1, groups[:, None], 1.0)
        return self._groups


class _Rows(NamedTuple):
    """What belongs to the positions of a slice."""

    rows: slice
    label_ids: Tensor
    targets: SparseTargets | None
    supervised: Tensor | None


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, hidden: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """loss, ce, kl; keeps the gradients of the loss."""
        ce, kl = (torch.zeros((), device=hidden.device, dtype=torch.float32) for _ in range(2))
        gradients = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        by_hidden = torch.zeros_like(hidden)
        num_rows = _num_rows(call, hidden)
        for start in range(0, len(hidden), num_rows):
            rows = slice(start, start + num_rows)
            h = hidden.detach()[rows].requires_grad_(call.with_gradient)
            part = _slice(call, h, call.rows(rows))
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
        loss = ce + times(call.kl_weight, kl)
        ctx.mark_non_differentiable(ce, kl)
        return loss, ce, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _ce: Tensor, _kl: Tensor) -> tuple[Tensor | None, ...]:
        """Those, times the gradient of the loss."""
        saved = zip(ctx.saved_tensors, ctx.dtypes, strict=True)  # a scale in half precision would lose digits
        return (None, *((g.float() * grad_loss).to(dtype) for g, dtype in saved))


def _saved(tensor: Tensor) -> tuple[Tensor, int]:
    """A saved tensor, and its version: autograd counts writes to what it saves by itself alone."""
    return tensor.detach(), tensor._version


def _as_saved(saved: tuple[Tensor, int]) -> Tensor:
    tensor, version = saved
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


def _label_logprobs(call: _Call, hidden: Tensor) -> Tensor:
    """log q(y) of all positions, float32 [N], without a gradient: another pass over the head's slices."""
    found, num_rows = [], _num_rows(call, hidden)
    for start in range(0, len(hidden), num_rows):
        z = call.logits(hidden.detach()[start : start + num_rows]).detach().float()
        labels = call.label_ids[start : start + num_rows].long()[:, None]
        found.append(z.gather(1, labels).squeeze(1) - z.logsumexp(dim=1))
    return torch.cat(found) if found else torch.zeros(0, device=hidden.device)


def _num_rows(call: _Call, hidden: Tensor) -> int:
    if call.objective.tokens_per_loss_chunk is not None:
        return call.objective.tokens_per_loss_chunk
    if not len(hidden):
        return 1
    vocab_size = getattr(call.head, "vocab_size", None)
    if vocab_size is None:
        with torch.set_grad_enabled(call.with_gradient):  # autocast keeps what it casts under no_grad
            vocab_size = call.head(hidden.detach()[:1]).shape[1]
    num_bytes, device = LOSS_SLICE_BYTES.get(hidden.device.type, LOSS_SLICE_BYTES["cuda"]), hidden.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else hidden.dtype
    if call.kernels_serve(device, dtype):  # of the head's logits, most likely
        return num_rows(num_bytes, vocab_size, dtype)
    return max(1, num_bytes // (4 * vocab_size))


def _slice(call: _Call, hidden: Tensor, part: _Rows) -> _Slice:
    logits = call.logits(hidden)
    overwrites = _are_unshared(logits, call.head)
    by_kernels = logits.stride(1) == 1 and call.kernels_serve(logits.device, logits.dtype)
    buffer = logits.detach() if by_kernels else logits.detach().float()
    if buffer.dtype == logits.dtype and not overwrites:  # then it is no copy
        buffer = buffer.clone()
    found = _losses_and_gradient(buffer, call, part)
    if found is None:
        logits = call.logits(hidden)  # the first are overwritten
        return _plain_slice(logits, call, part)
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


def _plain_slice(logits: Tensor, call: _Call, part: _Rows) -> _Slice:
    """The general way, by autograd over `losses`; several times the memory of a slice."""
    targets = part.targets
    assert targets is not None
    z = logits.detach().float().requires_grad_(call.with_gradient)
    with torch.set_grad_enabled(call.with_gradient):
        values = cross_entropy(z, part.label_ids)
        factors = call.ce_factors(part, -values.detach(), top_logits(z.detach(), call.objective))
        ce = (values if factors is None else times(factors, values)).sum()
        counts = regularizer_mask(targets, call.objective)
        kl = torch.where(counts, regularizer_values(z, targets, call.objective), 0.0).sum()
        gradient = (
            torch.autograd.grad(ce + times(call.kl_weight, kl), z)[0].to(logits.dtype) if call.with_gradient else None
        )
    return _Slice(logits, gradient, ce.detach(), kl.detach())


@torch.no_grad()
def _losses_and_gradient(buffer: Tensor, call: _Call, part: _Rows) -> tuple[Tensor, Tensor] | None:
    """The sums of the slice. None where digits would be lost.

    buffer: [n, V], the only memory of that size: logits z, then e = exp(z - max z) of `Tail`, then d loss/d z; float32,
    or the head's dtype where kernels do what is done to it. What is made of it is float32.
    """
    targets, labels, smoothing = part.targets, part.label_ids.long()[:, None], call.objective.label_smoothing
    top = top_logits(buffer, call.objective)
    if smoothing:
        z_mean = buffer.sub_(buffer.amax(dim=1, keepdim=True)).mean(dim=1, keepdim=True)
    kept_ids, kept_logits = _kept(buffer, labels, targets)
    drawn_ids = None if targets is None or targets.draw_ids is None else targets.draw_ids.long()
    drawn_logits = None if drawn_ids is None else buffer.gather(1, drawn_ids).float()
    tail = call.tail(buffer.scatter_(1, kept_ids, -torch.inf))
    if call.top1 is not None:  # also where the slice goes the plain way after this
        call.top1 += _num_largest(kept_logits, kept_ids, tail, part.supervised).to(call.top1)
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
    factors = call.ce_factors(part, -values, top)
    if factors is not None:
        values = times(factors, values)
        kept_gradient, beyond = (times(factors[:, None], gradient) for gradient in (kept_gradient, beyond))
    ce = values.sum()
    if targets is None:
        tail.scale(beyond)
        if smoothing:  # the gradient is q - (1 - e) 1_y - e / V
            ce = (1 - smoothing) * ce + smoothing * (log_all + origin - z_mean).sum()
            buffer.sub_(smoothing / buffer.shape[1])
            kept_gradient += smoothing - smoothing / buffer.shape[1]
        buffer.scatter_(1, kept_ids, kept_gradient.to(buffer.dtype))
        return ce, torch.zeros_like(ce)
    log_rest = (log_rest - log_all).squeeze(1)
    found = Compared.of(z_kept, tail, z_drawn, log_rest, targets, call.objective, call.kl_weight, call.groups)
    if found is None:
        return None
    first = 1 if call.objective.masked else 0
    last = z_kept.shape[1] - first
    kept_gradient[:, first:] += found.gradient[:, :last]
    tail.scale(beyond, found.gradient[:, last:])
    if found.drawn is not None and drawn_ids is not None and drawn_logits is not None:
        tail.add(drawn_ids, found.drawn, drawn_logits)
    kept_gradient = kept_gradient.to(buffer.dtype)
    buffer.scatter_(1, kept_ids[:, 1:], kept_gradient[:, 1:])
    buffer.scatter_(1, labels, kept_gradient[:, :1])  # after what absent alternatives wrote there
    return ce, found.values.sum()


def _kept(buffer: Tensor, labels: Tensor, targets: SparseTargets | None) -> tuple[Tensor, Tensor]:
    """Label and alternatives: their ids and float32 logits, [n, 1 + K]; -inf where an alternative is absent."""
    of_labels = buffer.gather(1, labels).float()
    if targets is None:
        return labels, of_labels
    ids = targets.alternative_ids.long()
    alternatives = torch.where(ids != labels, buffer.gather(1, ids).float(), -torch.inf)
    return torch.cat([labels, ids], dim=1), torch.cat([of_labels, alternatives], dim=1)


def _num_largest(kept_logits: Tensor, kept_ids: Tensor, tail: "Tail", supervised: Tensor | None) -> Tensor:
    """How many labels, the first of the kept, have the largest logit, where cross-entropy counts; of equal ones the
    first id has it."""
    label, label_id, others = kept_logits[:, :1], kept_ids[:, :1], kept_logits[:, 1:]
    largest = ((label > others) | ((label == others) & (label_id < kept_ids[:, 1:]))).all(dim=1)
    largest &= (label >= tail.top).squeeze(1)
    (tied,) = (largest & (label == tail.top).squeeze(1)).nonzero(as_tuple=True)
    if len(tied):
        first = tail.first_of_top(tied)
        largest[tied] = label_id[tied, 0] < first
    return (largest if supervised is None else largest & supervised).sum()
