"""Does a document get the same predictions wherever it stands in a batch? The model itself is asked, once a layout.

A cache holds what the base says of a document that stands alone. Behind another document in a packed row, or behind
padding on its left, a model says the same only if it keeps apart what it is given: Mamba's state runs on, learned
positions count the padding. A batch whose documents all begin their rows does not show it. Owns the arrangement of two
short cached documents in the layout of a batch, and what is noise there. Must not compare with records: the model is
held against itself, so that one that is trained already, or is not the base, can be asked too.
Shapes: B rows, T time, D hidden, L tokens of a document.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from logitcache.errors import TrainingFailed
from logitcache.models.head import causal_lm_of, evaluation_mode, num_tokens
from logitcache.models.head_layer import HeadLayer
from logitcache.models.inside_forward import inside_forward
from logitcache.models.quantization import held_in
from logitcache.models.sharding import called_in_checks, dtype_as_called, is_sharded
from logitcache.storage import LogitCache

from .inputs import model_inputs
from .targets import PREFIX, Batch

PROBED_TOKENS = 16
"""Of each of the two documents, at most."""

_PADDING = 0
"""Stands for whatever pads, where all processes must ask the same: a mask hides any token."""

SEEN, MOVED = "seen", "moved"

TOLERANCE = {
    "float32": {SEEN: 1e-5, MOVED: 1e-3},
    "16bit": {SEEN: 1e-3, MOVED: 0.02},
    "8bit": {SEEN: 0.02, MOVED: 0.05},
}
"""Relative change of hidden states, mean over tokens, that is noise in any case. SEEN: by exchanging the tokens before
a document, in one shape. In float32 and bfloat16 on a CPU 0 bit for bit for the families that keep documents apart, at
least 1.2e-4 and 1.9e-3 for those that do not, at their initial random weights (docs/log.md). MOVED: by having something
before it at all, which is another shape: at most 3e-7 and 7e-3. LLM.int8() rounds by what else is in the batch."""

NOISE_FACTOR, MOST_NOISE = 4.0, 0.05
"""What stands behind a document changes nothing in a causal model: what it does change is the noise, and what stands
before it may change so many times as much. More than MOST_NOISE is no noise."""


@dataclass(frozen=True)
class Layout:
    """What a batch tells a model of where documents stand: the names of its inputs, and whether it has several rows."""

    names: frozenset[str]
    several_rows: bool
    attention: str

    @property
    def padded(self) -> bool:
        """By a mask; else packed, or as if."""
        return "attention_mask" in self.names


PRECOMPUTE = Layout(frozenset({"input_ids", "attention_mask"}), False, "")
"""How a sample was run alone, when the cache was made."""


class LayoutCheck:
    """Refuses batches in which a document stands behind something, where the model does not keep the two apart.

    Called with every batch that is trained on. Packed batches, and such as might be (position_ids and no mask), are
    probed when the first of their layout comes, whatever it holds, so that all processes probe in the same step; padded
    ones when a document stands behind padding. Costs six forwards of 32 tokens or less, once a model and layout. A
    model in pieces, which all processes must run together, is asked at the first batch about all that later ones of the
    same inputs may be.
    """

    def __init__(self, cache: LogitCache) -> None:
        self._cache = cache
        self._found: WeakKeyDictionary[nn.Module, dict[Layout, str | None]] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type["LayoutCheck"], tuple[LogitCache]]:
        return LayoutCheck, (self._cache,)  # models are not compared across processes

    def __call__(self, model: nn.Module, batch: Batch) -> None:
        """batch: with targets. Raises `TrainingFailed`."""
        causal_lm, preceded = causal_lm_of(model), batch[f"{PREFIX}preceded"]
        layout = _layout_of(batch, model)
        if layout is None or (layout.padded and not len(preceded) and not is_sharded(model)):
            return
        found = self._found.setdefault(causal_lm, {})
        if layout not in found and is_sharded(model):
            for several in (False, True):
                sort = replace(layout, several_rows=several)
                found[sort] = self._probe(model, sort, _PADDING if layout.padded else None)
        elif layout not in found:
            padding = int(batch["input_ids"].flatten()[preceded[0] - 1]) if layout.padded else None
            found[layout] = self._probe(model, layout, padding)
        fault = found[layout]
        if fault is None or not len(preceded):
            return
        row, column = divmod(int(preceded[0]), batch["input_ids"].shape[1])
        where, advice = _PADDED if layout.padded else _PACKED
        raise TrainingFailed(
            f"training {type(causal_lm).__name__} on {where}: expected a document to be the same to it wherever it "
            f"stands, found that {fault} (two short documents of {self._cache.path}). In row {row} of this batch one "
            f"begins at column {column}. The cache holds predictions for documents that stand alone, and the KL would "
            f"be from something else. {advice}"
        )

    def _probe(self, model: nn.Module, layout: Layout, padding: int | None) -> str | None:
        """What is wrong with documents behind others, or behind this token, in this layout; None where nothing is."""
        causal_lm = causal_lm_of(model)
        vocab_size = num_tokens(causal_lm)
        ends = [self._cache.sample(i).token_ids[:PROBED_TOKENS] for i in (len(self._cache) - 1, 0)]
        document, other = (ids.astype(np.int64) % vocab_size for ids in ends)
        others = [other, (other + 1) % vocab_size] if padding is None else [np.full_like(other, padding)]
        tolerance = TOLERANCE[_format(model)]
        for what, change in _changes(model, layout, document, others).items():
            noise = min(change.noise, MOST_NOISE)
            if not change.size <= NOISE_FACTOR * noise + tolerance[what]:
                return f"its hidden states change by {change.size:.2%} (noise: {change.noise:.2%}) {_CAUSES[what]}"
        return None


_CAUSES = {SEEN: "with the tokens that stand before it", MOVED: "where something stands before it"}
_PACKED = (
    "packed rows",
    "Give each row one document (TRL: packing=False, padding_free=False), or use an attention implementation that "
    "reads position_ids (attn_implementation='sdpa', or flash attention).",
)
_PADDED = (
    "padding on the left",
    "Pad on the right (padding_side='right'), or have the collator give position_ids, 0 where the document begins.",
)


@dataclass(frozen=True)
class _Change:
    """Mean relative change of a document's hidden states by what stands before it; and by what stands behind it."""

    size: float
    noise: float


def _layout_of(batch: Batch, model: nn.Module) -> Layout | None:
    """None where every document begins its row, since nothing says otherwise."""
    names = frozenset(model_inputs(model, batch))
    if not names & {"attention_mask", "position_ids"}:
        return None
    attention = str(getattr(causal_lm_of(model).config, "_attn_implementation", ""))
    return Layout(names, len(batch["input_ids"]) > 1, attention)


def _format(model: nn.Module) -> str:
    """Which tolerance is that of the model's arithmetic."""
    held = held_in(causal_lm_of(model))
    if held == "8bit":
        return "8bit"
    return "16bit" if held is not None or dtype_as_called(model).itemsize < 4 else "float32"


@torch.no_grad()
def _changes(
    model: nn.Module, layout: Layout, document: NDArray[np.int64], others: Sequence[NDArray[np.int64]]
) -> dict[str, _Change]:
    """Of a document behind one of the others, from alone as precompute runs it (MOVED); from one to the next (SEEN).

    Not through a distributed or compiling wrapper: nothing is sent to other processes or compiled for these shapes;
    but a model in pieces is whole only there.
    """
    inner, device = called_in_checks(model), next(model.parameters()).device

    def states(layout: Layout, *parts: NDArray[np.int64]) -> Tensor:
        begin = 0 if parts[0] is document else len(parts[0])
        present = [part is document or layout is not padded for part in parts]
        inputs = _inputs(layout, parts, present)
        found = list[Tensor]()

        def keep(hidden: Tensor, _layer: HeadLayer) -> Tensor:
            found.append(hidden)
            return hidden.new_zeros(())

        placed = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        inside_forward(inner, placed, None, keep)
        rows: Tensor = found[0].unflatten(0, tuple(inputs["input_ids"].shape))
        return rows[:, begin : begin + len(document)].float()

    padded = layout if layout.padded else None
    with evaluation_mode(inner):
        alone, followed = states(PRECOMPUTE, document), states(PRECOMPUTE, document, others[0])
        before = [states(layout, part, document) for part in others]
        found = {MOVED: _Change(_relative(before[0], alone), _relative(followed, alone))}
        if len(others) > 1:
            behind = [states(layout, document, part) for part in others]
            found[SEEN] = _Change(_relative(before[1], before[0]), _relative(behind[1], behind[0]))
    torch.clear_autocast_cache()  # torch < 2.11 keeps casts made without gradient
    return found


def _inputs(layout: Layout, parts: Sequence[NDArray[np.int64]], present: Sequence[bool]) -> Batch:
    """These parts in one row, or in two equal ones: documents, or by a mask those that are present between padding.

    Named and typed as the collators of transformers and TRL do; what else a batch may hold is left out.
    """
    lengths = [len(part) for part in parts]
    ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    mask = torch.cat([torch.full((n,), int(p)) for n, p in zip(lengths, present, strict=True)])
    counted = torch.cat([torch.arange(n) for n in lengths])
    numbers = torch.cat([torch.full((n,), i, dtype=torch.int32) for i, n in enumerate(lengths)])
    rows = {
        "input_ids": torch.from_numpy(np.concatenate(parts)),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(0) - 1).clamp(min=0) if layout.padded else counted,
        "seq_idx": numbers,
    }
    boundaries: Batch = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    boundaries |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    available = {name: row.expand(1 + layout.several_rows, -1) for name, row in rows.items()} | boundaries
    return {name: value for name, value in available.items() if name in layout.names}


def _relative(found: Tensor, expected: Tensor) -> float:
    """Mean over tokens of |found - expected| / |expected|; [B, L, D]."""
    sizes = expected.norm(dim=-1).clamp(min=torch.finfo(expected.dtype).tiny)
    return float(((found - expected).norm(dim=-1) / sizes).mean())
