"""What runs on the card: two Triton programs over a slice of logits, which stay in the dtype of the head.

Owns the passes over [n, V] alone: `stats` reads the logits once, `apply` reads them and writes the gradient in their
place. What is made of [n, outcomes] in between is `fused`'s and `compared`'s. Imports Triton, so that only `tail`
imports this, and only where `choice` has found it; must not import torch. Annotated is what Triton needs to be
annotated: a compile-time constant.
Shapes: n rows of V columns; a program has `height` rows and one part of the columns, `width` of them at a time.
"""

import triton
import triton.language as tl


@triton.jit
def stats(
    z,
    groups,
    tops,
    sums,
    group_sums,
    num_rows,
    vocab,
    part,
    stride,
    height: tl.constexpr,
    width: tl.constexpr,
    num_groups: tl.constexpr,
):
    """Of each row's columns of a part: the largest logit, and the sum of e = exp(z - it), all and by group, online.

    z: [n, V], rows `stride` apart; groups: int32 [V]; tops, sums: float32 [parts, n]; group_sums: float32 [parts, n,
    num_groups]. num_groups 0: none are asked for. A logit of -inf counts for nothing; one that is not a number makes
    the sums none.
    """
    rows = tl.program_id(0) * height + tl.arange(0, height)
    start = tl.program_id(1) * part
    end = tl.minimum(start + part, vocab)
    live = rows < num_rows
    of_rows = z + rows.to(tl.int64)[:, None] * stride
    top = tl.full([height], float("-inf"), tl.float32)
    total = tl.zeros([height], tl.float32)
    if num_groups > 0:
        by_group = tl.zeros([height, num_groups], tl.float32)
    for first in range(start, end, width):
        columns = first + tl.arange(0, width)
        inside = columns < end
        x = tl.load(of_rows + columns[None, :], mask=live[:, None] & inside[None, :], other=float("-inf"))
        x = x.to(tl.float32)
        larger = tl.maximum(top, tl.max(x, 1))
        origin = tl.where(larger == float("-inf"), 0.0, larger)
        before = tl.exp(top - origin)
        e = tl.exp(x - origin[:, None])
        total = total * before + tl.sum(e, 1)
        if num_groups > 0:
            group = tl.load(groups + columns, mask=inside, other=-1)
            one_hot = (group[:, None] == tl.arange(0, num_groups)[None, :]).to(tl.float32)
            # 22 bits of e, in three products on the tensor cores; a one is exact
            by_group = tl.dot(e, one_hot, acc=by_group * before[:, None], input_precision="tf32x3")
        top = larger
    at = tl.program_id(1) * num_rows + rows
    tl.store(tops + at, top, mask=live)
    tl.store(sums + at, total, mask=live)
    if num_groups > 0:
        of_groups = at.to(tl.int64)[:, None] * num_groups + tl.arange(0, num_groups)[None, :]
        tl.store(group_sums + of_groups, by_group, mask=live[:, None])


@triton.jit
def apply(
    z,
    groups,
    tops,
    factors,
    num_rows,
    vocab,
    part,
    stride,
    num_factors,
    height: tl.constexpr,
    width: tl.constexpr,
    by_group: tl.constexpr,
):
    """z becomes exp(z - top) times its row's factor, or that of its row and group, rounded to the dtype of z.

    tops: float32 [n], the largest logit of each row; factors: float32 [n, num_factors].
    """
    rows = tl.program_id(0) * height + tl.arange(0, height)
    start = tl.program_id(1) * part
    end = tl.minimum(start + part, vocab)
    live = rows < num_rows
    of_rows = z + rows.to(tl.int64)[:, None] * stride
    top = tl.load(tops + rows, mask=live, other=0.0)
    top = tl.where(top == float("-inf"), 0.0, top)
    of_factors = factors + rows.to(tl.int64)[:, None] * num_factors
    for first in range(start, end, width):
        columns = first + tl.arange(0, width)
        inside = live[:, None] & (columns < end)[None, :]
        x = tl.load(of_rows + columns[None, :], mask=inside, other=float("-inf")).to(tl.float32)
        if by_group:
            group = tl.load(groups + columns, mask=columns < end, other=0)
            factor = tl.load(of_factors + group[None, :], mask=inside, other=0.0)
        else:
            factor = tl.load(of_factors, mask=live[:, None], other=0.0)
        gradient = tl.exp(x - top[:, None]) * factor
        tl.store(of_rows + columns[None, :], gradient.to(z.dtype.element_ty), mask=inside)
