"""The tail of a slice by kernels: what `compared.Tail` is, over logits that stay in the head's own dtype.

Owns the launches of `programs`: two a slice, nothing of [n, V] made beside it. Imports Triton through `programs`, so
that only `choice` imports this. Trade-off: e = exp(z - max z) is made twice and never kept.
Shapes: n positions of a slice, V vocabulary, G groups, M draws.
"""

import os
from typing import NamedTuple

import torch
from torch import Tensor

from logitcache.losses.compared import Tail

from . import programs

_PROGRAMS_WANTED = 528
"""Four for each of a large card's multiprocessors: with fewer rows, each is divided."""


class Tile(NamedTuple):
    """Rows and columns that a program holds at a time, and its warps."""

    height: int
    width: int
    warps: int


class _Grid(NamedTuple):
    """Programs over the rows, parts that the columns are divided into, and the columns of a part."""

    over_rows: int
    parts: int
    part: int


class KernelTail(Tail):
    """Tokens of a slice that are neither label nor kept, in two passes over their logits."""

    def __init__(self, buffer: Tensor, groups: Tensor | None = None, num_groups: int = 0) -> None:
        """buffer: logits z [n, V], columns 1 apart, -inf at label and kept; groups: [V], each in [0, num_groups)."""
        if groups is not None and groups.shape != buffer.shape[1:]:
            raise ValueError(f"token_groups: expected {buffer.shape[1]}, one a column of logits, found {len(groups)}")
        self.buffer, self.groups, self.group_sums = buffer, None, None
        self._token_groups = None if groups is None else groups.int().contiguous()
        tops, sums, by_group = self._stats(0 if groups is None else _padded(num_groups))
        top = tops.amax(dim=0)
        scale = (tops - torch.where(top == -torch.inf, 0.0, top)).exp()  # 0 of a part without a token
        total = (sums * scale).sum(dim=0)
        self.top = torch.where(total.isnan(), total, top)[:, None]  # a maximum on the card passes by what is no number
        self.sum = total[:, None]
        self.top_from_origin = self.top
        self._sums_of_groups = (by_group * scale[:, :, None]).sum(dim=0)[:, :num_groups].contiguous()

    def first_of_top(self, rows: Tensor) -> Tensor:
        """As `Tail`'s: here the buffer has the logits until `scale`."""
        return (self.buffer[rows] == self.top[rows]).int().argmax(dim=1)

    def split(self, groups: Tensor, one_hot: Tensor) -> Tensor:
        """As `Tail`'s: the sums by group are there already, from the one pass that reads the logits."""
        assert self._token_groups is not None
        self.groups, self.group_sums = groups, self._sums_of_groups
        return self.top_from_origin + self.group_sums.log()

    def scale(self, gradient: Tensor, parts: Tensor | None = None) -> None:
        """As `Tail`'s: the logits become the gradient, in their own dtype."""
        self._factors = self.factors(gradient, parts).contiguous()
        self._apply(self._factors)

    def add(self, ids: Tensor, gradient: Tensor, logits: Tensor) -> None:
        """In float32, and written once: a sum in the dtype of z would be rounded once a draw."""
        e = (logits - torch.where(self.top == -torch.inf, 0.0, self.top)).exp()
        num_drawn = (ids[:, :, None] == ids[:, None, :]).sum(dim=2)
        self.buffer.scatter_(1, ids, (e * self._factors + num_drawn * gradient).to(self.buffer.dtype))

    def _stats(self, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
        z = self.buffer
        tile = stats_tile(num_groups, z.dtype)
        grid = _grid(z, tile)
        shapes = (grid.parts, len(z)), (grid.parts, len(z)), (grid.parts, len(z), num_groups)
        tops, sums, by_group = (torch.empty(s, device=z.device, dtype=torch.float32) for s in shapes)
        groups = z if self._token_groups is None else self._token_groups
        sizes = len(z), z.shape[1], grid.part, z.stride(0)
        with torch.cuda.device_of(z):
            programs.stats[(grid.over_rows, grid.parts)](
                z, groups, tops, sums, by_group, *sizes, tile.height, tile.width, num_groups, num_warps=tile.warps
            )
        return tops, sums, by_group

    def _apply(self, factors: Tensor) -> None:
        z, by_group = self.buffer, self.group_sums is not None
        tile = apply_tile(by_group)
        grid = _grid(z, tile)
        groups = self._token_groups if by_group else z
        sizes = len(z), z.shape[1], grid.part, z.stride(0), factors.shape[1]
        with torch.cuda.device_of(z):
            programs.apply[(grid.over_rows, grid.parts)](
                z, groups, self.top.contiguous(), factors, *sizes, *tile[:2], by_group, num_warps=tile.warps
            )


def is_interpreted() -> bool:
    """Whether Triton runs its programs one after the other, on a CPU; as it was when they were imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _padded(num_groups: int) -> int:
    """The next power of 2, at least what a product on the tensor cores takes."""
    return max(16, 1 << (num_groups - 1).bit_length())


def stats_tile(num_groups: int, dtype: torch.dtype) -> Tile:
    """Of `programs.stats`; num_groups: 0, or a power of 2. None that fits leaves its registers for memory."""
    if num_groups:
        return Tile(16, 64 if num_groups <= 64 and dtype.itemsize == 2 else 32, 4 if num_groups <= 128 else 8)
    return Tile(4, 64, 4) if is_interpreted() else Tile(1, 4096, 8)


def apply_tile(by_group: bool) -> Tile:
    """Of `programs.apply`."""
    if is_interpreted():
        return Tile(4, 64, 4)
    return Tile(4, 1024, 8) if by_group else Tile(1, 4096, 8)


def _grid(z: Tensor, tile: Tile) -> _Grid:
    num_rows, vocab = z.shape
    over_rows = -(-num_rows // tile.height)
    wanted = 3 if is_interpreted() else max(1, min(32, _PROGRAMS_WANTED // over_rows))
    part = -(-vocab // (wanted * tile.width)) * tile.width
    return _Grid(over_rows, -(-vocab // part), part)
