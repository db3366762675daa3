"""The loss on a card: is it right, how fast beside others', in which slices; and exact top-k.

Owns the sections of scripts/bench_gpu.py that need no model. Inputs are those of bench_loss.py. Every loss goes from
hidden states to the gradient into them, the head is frozen.
Shapes: N positions, D hidden, V vocabulary, K alternatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from bench_gpu_run import ABSENT, FAILED, WRONG, LossSize, Run, is_simulated, said
from bench_loss import BY_NAME, OURS, TOP_K, Inputs, Size, by_definition, make_inputs
from peer_losses import plain_cross_entropy
from torch import Tensor, nn

from logitcache.capture.records import slice_record
from logitcache.capture.top_k import top_k
from logitcache.losses import fused
from logitcache.losses.formulas import Objective, cross_entropy, regularizer_mask, regularizer_values
from logitcache.losses.fused import linear_loss
from logitcache.losses.kernels import choice

PLAIN, GEMMS, COPY = "plain cross-entropy", "the two products alone", "a copy of the logits"
PYTORCH, KERNELS = "PyTorch's slices", "Triton's kernels"
PEERS = (
    *("torch linear_cross_entropy, options by default", "Liger fused linear CE", "cut-cross-entropy"),
    "TRL chunked divergence, beta 0",
)
COMPILED_PEERS = ("Liger chunked JSD + CE, beta 0",)
"""Of `bench_loss_peers`, by their names there: what is compiled takes long before it begins."""

CHECKED_ROWS = 40
"""Of a slice where correctness is looked at: the last slice is a ragged one."""

MOST_LOSS_ERROR, MOST_GRADIENT_ERROR = 1e-5, 1e-4
"""In float32, relative: far above rounding, far below what is wrong."""

MOST_TIMES_PLAIN, HALF_LOSS_ERROR = 2.0, 1e-3
"""In bfloat16: times the error of plain autograd over the same logits, and of the loss at least this much."""

Loss = Callable[[Tensor], Tensor]
"""hidden [N, D] -> float scalar, with gradient."""


# What is measured


def inputs_of(run: Run, size: LossSize, dtype: str) -> Inputs:
    """Hidden states, head and teacher, on the card."""
    made = Size(size.num_positions, size.hidden_size, size.vocab_size, dtype, "cuda")
    return make_inputs(made, run.seed)


def loss_of(inputs: Inputs, objective: Objective) -> Loss:
    """Ours: mean CE + mean regulariser. The weight is a tensor, as a trainer gives it: a number would be copied."""
    head = nn.Linear(*inputs.weight.T.shape, bias=False, device="meta")
    head.weight = nn.Parameter(inputs.weight, requires_grad=False)
    targets = None if objective.regularizer == "none" else inputs.targets
    weight = torch.ones((), device=inputs.weight.device)
    return lambda hidden: linear_loss(hidden, head, inputs.labels, targets, objective, weight).loss / len(hidden)


def step_of(loss: Loss, inputs: Inputs) -> Callable[[], tuple[Tensor, Tensor]]:
    """A call that makes the loss and its gradient."""
    hidden = inputs.hidden.detach().requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        hidden.grad = None
        value = loss(hidden)
        value.backward()
        assert hidden.grad is not None
        return value.detach(), hidden.grad

    return step


def ways(run: Run, dtype: torch.dtype) -> list[str]:
    """Of making a slice: PyTorch's, and Triton's where a card and it are there. Wrong kernels are a wrong line."""
    device = torch.device("cuda", torch.cuda.current_device())
    if not choice.are_there(device):
        run.say(KERNELS, str(dtype), verdict=ABSENT, remark="no Triton, or no card that its kernels are made for")
        return [PYTORCH]
    if not choice.are_usable(device, dtype):
        run.say(KERNELS, str(dtype), verdict=WRONG, remark="their trial on this card failed; the warning says why")
        return [PYTORCH]
    return [PYTORCH, KERNELS]


@contextmanager
def slices_by(way: str) -> Iterator[None]:
    """Within, slices go one way; by the kernels is the product's own choice where they are usable."""
    chosen = fused.are_usable
    if way == PYTORCH:
        fused.are_usable = lambda device, dtype: False
    try:
        yield
    finally:
        fused.are_usable = chosen


# Is it right


def loss_correctness(run: Run) -> None:
    """Loss and gradient of every form against the definition in float64: in float32 to its digits, in bfloat16 as near
    as plain autograd over the same logits comes."""
    for dtype in (torch.float32, torch.bfloat16):
        inputs = with_exact_targets(inputs_of(run, run.sizes.checked, str(dtype).removeprefix("torch.")))
        possible = ways(run, dtype)
        for method, form in OURS.items():
            expected = by_definition(method, inputs)
            allowed = MOST_LOSS_ERROR, MOST_GRADIENT_ERROR
            if dtype != torch.float32:
                plain = errors(step_of(plain_loss(inputs, form), inputs), expected)
                allowed = max(HALF_LOSS_ERROR, MOST_TIMES_PLAIN * plain[0]), MOST_TIMES_PLAIN * plain[1]
            for way in possible:
                with slices_by(way):
                    objective = replace(form, tokens_per_loss_chunk=CHECKED_ROWS)
                    found = errors(step_of(loss_of(inputs, objective), inputs), expected)
                for name, error, most in zip(("loss", "gradient"), found, allowed, strict=True):
                    shape = f"{run.sizes.checked} {dtype}"
                    run.check(f"{method}: {name}, {way}", shape, error, most, "relative error")


def errors(step: Callable[[], tuple[Tensor, Tensor]], expected: tuple[float, Tensor]) -> tuple[float, float]:
    """Relative, of the loss and of the norm of its gradient."""
    value, gradient = step()
    loss, of_hidden = expected
    apart = (gradient.double() - of_hidden).norm() / of_hidden.norm()
    return abs(float(value) - loss) / abs(loss), float(apart)


def plain_loss(inputs: Inputs, objective: Objective) -> Loss:
    """The formulas over all logits at once, which the product's own logits are too, in the same dtype."""

    def loss(hidden: Tensor) -> Tensor:
        logits = (hidden @ inputs.weight.T).float()
        values = cross_entropy(logits, inputs.labels)
        if objective.regularizer != "none":
            counts = regularizer_mask(inputs.targets, objective)
            values = values + torch.where(counts, regularizer_values(logits, inputs.targets, objective), 0.0)
        return values.mean()

    return loss


@torch.no_grad()
def with_exact_targets(inputs: Inputs) -> Inputs:
    """The teacher's log-probabilities anew, of logits in float64: of half precision, its rounding would hide ours."""
    targets = inputs.targets
    log_p = (inputs.teacher.hidden.double() @ inputs.weight.double().T).log_softmax(dim=1)
    labels, kept = targets.label_ids.long()[:, None], targets.alternative_ids.long()
    tail = log_p.scatter(1, labels, -torch.inf).scatter(1, kept, -torch.inf)
    assert targets.token_groups is not None and targets.tail_group_logprobs is not None
    assert targets.draw_ids is not None
    by_group = torch.zeros_like(targets.tail_group_logprobs, dtype=torch.float64)
    by_group = by_group.index_add(1, targets.token_groups.long(), tail.exp())
    exact = replace(
        targets,
        label_logprobs=log_p.gather(1, labels).squeeze(1).float(),
        alternative_logprobs=log_p.gather(1, kept).float(),
        tail_logprobs=tail.logsumexp(dim=1).float(),
        tail_group_logprobs=by_group.log().float(),
        draw_logprobs=tail.gather(1, targets.draw_ids.long()).float(),
    )
    return replace(inputs, targets=exact)


# How fast beside others


def losses(run: Run) -> None:
    """What nobody can do without, plain cross-entropy, ours, and others' losses: ratios to plain cross-entropy. What is
    compiled comes last, and at one size: it takes long before it begins."""
    for size in run.sizes.losses:
        inputs = inputs_of(run, size, "bfloat16")
        measure_loss(run, PLAIN, size, plain_cross_entropy(inputs), inputs)
        run.measure(GEMMS, size, two_products(inputs), PLAIN)
        run.measure(COPY, size, logits_copied(inputs), PLAIN)
        for way in ways(run, torch.bfloat16):
            for method, objective in OURS.items():
                with slices_by(way):
                    measure_loss(run, f"{method}, {way}", size, loss_of(inputs, objective), inputs)
        measure_peers(run, size, inputs, PEERS)
        if size == run.sizes.losses[0]:
            if not is_simulated():  # for which nothing is compiled
                measure_loss(run, f"{PLAIN}, compiled", size, torch.compile(plain_cross_entropy(inputs)), inputs)
            measure_peers(run, size, inputs, COMPILED_PEERS)
        del inputs


def measure_peers(run: Run, size: LossSize, inputs: Inputs, names: Sequence[str]) -> None:
    """Of `bench_loss_peers.PEERS`, those that import here; each says what it computes."""
    for name in names:
        try:
            loss = BY_NAME[name].loss_of(inputs)
        except Exception as error:  # of a project that may raise what it likes; ours are measured all the same
            verdict = ABSENT if isinstance(error, ImportError | AttributeError) else FAILED
            run.say(name, size, verdict=verdict, remark=said(error))
            continue
        measure_loss(run, name, size, loss, inputs, BY_NAME[name].quantity)


def measure_loss(run: Run, name: str, size: LossSize, loss: Loss, inputs: Inputs, remark: str = "") -> None:
    """Its time beside plain cross-entropy, and its value, which tells whether two computed the same."""
    step = step_of(loss, inputs)
    if run.measure(name, size, step, PLAIN, remark) is not None:
        run.say(f"{name}: value", size, value=float(step()[0]), unit="nats a position")


def logits_copied(inputs: Inputs) -> Callable[[], object]:
    """[N, V] in bfloat16, read and written once: the card's bandwidth."""
    source = torch.empty(len(inputs.hidden), len(inputs.weight), dtype=inputs.weight.dtype, device=inputs.weight.device)
    source.normal_()
    return source.clone


def two_products(inputs: Inputs) -> Callable[[], object]:
    """Logits, and a gradient of theirs into hidden states, in bfloat16, with nothing in between: the card's rate."""
    return lambda: (inputs.hidden @ inputs.weight.T) @ inputs.weight


# Slices


def slices(run: Run) -> None:
    """Rows a slice, beside what the product takes by itself."""
    size = run.sizes.losses[0]
    inputs = inputs_of(run, size, "bfloat16")
    for way in ways(run, torch.bfloat16):
        for tail in ("bucket", "groups"):
            form = OURS[f"logitcache {tail}"]
            with slices_by(way):
                default = f"{tail}, {way}, rows by default"
                run.measure(default, size, step_of(loss_of(inputs, form), inputs))
                for rows in run.sizes.slice_rows:
                    cut = replace(form, tokens_per_loss_chunk=rows)
                    run.measure(f"{tail}, {way}, {rows} rows", size, step_of(loss_of(inputs, cut), inputs), default)


# Top-k


def top_ks(run: Run) -> None:
    """Of a slice of capture's logits: torch's, ours in two stages, and the whole record. Values must be equal."""
    vocab_size = run.sizes.losses[0].vocab_size
    for num_rows in run.sizes.top_k_rows:
        generator = torch.Generator("cuda").manual_seed(run.seed)
        logits = 4 * torch.randn(num_rows, vocab_size, generator=generator, device="cuda")
        labels = torch.zeros(num_rows, dtype=torch.int64, device="cuda")
        shape = f"{num_rows} x {vocab_size}, K {TOP_K}"
        values, ids = top_k(logits, TOP_K)
        apart = (values - logits.topk(TOP_K, dim=1).values).abs().max() + (values - logits.gather(1, ids)).abs().max()
        run.check("two stages: values, and those at their ids", shape, float(apart), 0.0, "difference to torch.topk")
        run.measure("torch.topk", shape, lambda z=logits: z.topk(TOP_K, dim=1))
        run.measure("two stages", shape, lambda z=logits: top_k(z, TOP_K), "torch.topk")
        copy = logits.clone()
        run.measure("a copy", shape, lambda z=logits, to=copy: to.copy_(z), "torch.topk")
        record = lambda z=logits, to=copy, y=labels: slice_record(to.copy_(z), y, TOP_K)  # noqa: E731
        run.measure("the record, with a copy", shape, record, "torch.topk")
