"""Joins a batch with what the cache says of it: documents of a batch -> records -> `SparseTargets`.

Owns alignment: which tokens of a batch are one sample, which of its positions are supervised, and that row i of the
targets is position i of these. Works on what any collator of a causal language model makes (input_ids, labels, and an
attention mask or position ids), so padding, packing and padding-free batches are all found by content. Must not know
models or losses' formulas.
Shapes: B rows, T time, N supervised positions of the batch, K alternatives.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitcache.data.batches import moved
from logitcache.data.files import IGNORED
from logitcache.data.samples import Sample
from logitcache.data.tokenize import WEIGHTS
from logitcache.errors import InvalidBatch
from logitcache.losses.formulas import Objective, SparseTargets, Tail, regularizer_mask
from logitcache.losses.weights import num_weighed
from logitcache.storage import BaseLogprobs, DataSamples, LogitCache, PositionNotCaptured, data_samples
from logitcache.storage.records import NO_TOKEN

from .vocab_cut import VocabCut, cut_columns

PREFIX = "base_"
_IDS = ("alternative_ids", "draw_ids")
_LOGPROBS = ("label_logprobs", "alternative_logprobs", "tail_logprobs", "tail_group_logprobs", "draw_logprobs")

_OF_TAIL: dict[Tail, tuple[str, ...]] = {"groups": ("tail_group_logprobs",), "sampled": ("draw_ids", "draw_logprobs")}
"""Columns that are read where the tail is compared so, and nowhere else."""

Batch = dict[str, Any]
Collator = Callable[[Sequence[Any]], Batch]


BESIDE_TOKENS = (
    *("pixel_values", "pixel_values_videos", "images", "input_features", "input_values", "audio_values"),
    "inputs_embeds",
)
"""What models of images and sound read beside tokens, or in place of them: a cache knows samples by their tokens alone,
and was made from them alone."""

OWN_TOKENS = (
    " The trainer learns other tokens of a row than precompute supervised: precompute with the --supervise that it "
    "learns by (assistant, last or all), or give its own input_ids and labels as --data (docs/how-to/plug-in.md)."
)
"""What is added to a refusal of positions, of a trainer that makes its tokens and labels itself."""


@dataclass(frozen=True)
class Document:
    """A sample inside a batch: its row and first column, tokens uint32 [L], positions int32 [P] within that count, and
    which of them are supervised, bool [P]."""

    row: int
    column: int
    token_ids: NDArray[np.uint32]
    positions: NDArray[np.int32]
    supervised: NDArray[np.bool_]

    def sample(self, origin: str) -> Sample:
        """The same by itself, its labels where they are supervised."""
        labels = np.zeros(len(self.token_ids), dtype=np.bool_)
        labels[self.positions[self.supervised] + 1] = True
        return Sample(self.token_ids, labels, origin)


@dataclass(frozen=True)
class CachedCollator:
    """Any collator, and then the rows of the cache for every position of its batch that counts.

    Those are the supervised ones; every: all of each document that has some, and base_supervised (bool [N]) says where
    the cross-entropy counts. Adds base_rows (int64 [N], places in the flattened [B * T]), base_label_ids (int32 [N]),
    base_preceded (int64, where documents begin that do not begin their row: behind another, or behind padding),
    base_laid_out ([B, T, 0], a shape that costs nothing to compare), base_for_ce (int32 [N], where ce_weight, of the
    objective, reads of a batch what `weights.weigher_of` says) and, with a cache, base_*:
    ids as int32, log-probabilities as the bits of float16 where these lose nothing, else of float32, in integers, which
    nothing casts on the way to a device. top_k: read fewer alternatives than the cache has; cut: of its vocabulary, the
    first tokens only. tail: how the objective compares the tail; what it does not read stays behind, None: nothing.
    Runs in the workers of a `DataLoader`, ahead of the step. Raises `SampleNotCached`, `PositionNotCaptured`,
    `CorruptCache`, `InvalidBatch`.
    """

    collator: Collator
    cache: LogitCache | None
    top_k: int | None = None
    cut: VocabCut | None = None
    every: bool = False
    ce_weight: str = "none"
    tail: Tail | None = None

    def __call__(self, features: Sequence[Any]) -> Batch:
        return self._with_targets(self.collator(features))

    def looked_up(self, batch: Batch) -> Batch:
        """A batch that has been collated, with its targets, on its device; as it is where they are there already."""
        if f"{PREFIX}rows" in batch:
            return batch
        found = self._with_targets(on_cpu(batch))
        added = {name: value for name, value in found.items() if name.startswith(PREFIX)}
        kept = {name: value for name, value in batch.items() if name in found}
        return {**kept, **sent(added, batch["input_ids"].device)}

    def _with_targets(self, batch: Batch) -> Batch:
        return with_targets(batch, self.cache, self.top_k, self.cut, self.every, self.ce_weight, self.tail)


def on_cpu(batch: Batch) -> Batch:
    """The batch with its tensors in main memory, where it is looked up."""
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in batch.items()}


def sent(batch: Batch, device: torch.device) -> Batch:
    """The batch, whose tensors are in main memory, on a device."""
    return {name: moved(value, device) for name, value in batch.items()}


def collated(batch: Any) -> Batch:
    """The collator of a batch that is one already."""
    found: Batch = batch
    return found


def with_targets(
    batch: Batch,
    cache: LogitCache | None,
    top_k: int | None = None,
    cut: VocabCut | None = None,
    every: bool = False,
    ce_weight: str = "none",
    tail: Tail | None = None,
) -> Batch:
    """A collated batch on the CPU with the base_* columns of `CachedCollator`, and without the weights it brought."""
    documents = list(documents_of(batch, every))
    width = batch["input_ids"].shape[1]
    rows = [d.row * width + d.column + d.positions.astype(np.int64) for d in documents]
    labels = [d.token_ids[d.positions + 1].astype(np.int32) for d in documents]
    preceded = [np.array([d.row * width + d.column]) for d in documents if d.column]
    added: dict[str, NDArray[Any]] = {"rows": _joined(rows, np.int64), "label_ids": _joined(labels, np.int32)}
    added["preceded"] = _joined(preceded, np.int64)
    added["laid_out"] = np.empty((*batch["input_ids"].shape, 0), dtype=np.uint8)
    if every:
        added["supervised"] = _joined([d.supervised for d in documents], np.bool_)
    if ce_weight == "rho1":
        numbers = [np.full(len(d.positions), i, dtype=np.int32) for i, d in enumerate(documents)]
        added["for_ce"] = _joined(numbers, np.int32)
    if ce_weight == "data":
        name, weights = _weights_of(batch)
        batch = {key: value for key, value in batch.items() if key != name}
        taken = [weights[d.row, d.column + d.positions + 1] for d in documents]
        added["for_ce"] = _joined(taken, np.float32).view(np.int32)  # bits, which nothing casts on the way to a device
    if cache is not None and documents:
        try:
            found = cache.lookup_batch([d.token_ids for d in documents], [d.positions for d in documents], top_k)
        except PositionNotCaptured as error:
            raise PositionNotCaptured(f"{error}{'' if every else OWN_TOKENS}") from error
        added |= target_columns(found, cut, tail)
    return {**batch, **{f"{PREFIX}{name}": torch.from_numpy(column) for name, column in added.items()}}


def _weights_of(batch: Batch) -> tuple[str, NDArray[np.float32]]:
    """The weights that a batch brings, [B, T], aligned as its labels are, and their name."""
    named = [name for name in WEIGHTS if batch.get(name) is not None]
    if len(named) != 1:
        raise InvalidBatch(
            f"looking up a batch for the weight 'data': expected loss_scale or weights in it, found "
            f"{' and '.join(named) or ', '.join(sorted(batch))}. Have the collator pad one of them, and "
            "remove_unused_columns=False keep it."
        )
    weights, learnt = batch[named[0]].float().numpy(), batch["labels"].numpy() != IGNORED
    if weights.shape != learnt.shape or not np.isfinite(weights[learnt]).all() or (weights[learnt] < 0).any():
        raise InvalidBatch(
            f"looking up a batch for the weight 'data': expected a number of 0 or more in {named[0]} for every token "
            f"that is learnt, in the shape of labels {learnt.shape}, found {weights.shape} or other numbers. Repair "
            "the weights."
        )
    return named[0], weights


def documents_of(batch: Batch, every: bool = False) -> Iterator[Document]:
    """The samples of a batch that have supervised positions, row by row; every: with all of their positions.

    A row is split where position_ids start again at 0; padding is where attention_mask is 0. The label of position t is
    labels[t + 1], as everywhere in transformers; a document's first token is nobody's label.
    """
    for name in ("input_ids", "labels"):
        if name not in batch:
            raise InvalidBatch(f"looking up a batch: expected {name} in it, found {', '.join(sorted(batch))}.")
    beside = [name for name in BESIDE_TOKENS if batch.get(name) is not None]
    if beside:
        raise InvalidBatch(
            f"looking up a batch: expected tokens alone, found {', '.join(beside)} too. The cache knows samples by "
            "their tokens, and the base was run on these alone. Leave out the rows with images or sound."
        )
    for name in ("input_ids", "labels", "attention_mask", "position_ids"):
        shape = None if batch.get(name) is None else tuple(batch[name].shape)
        if shape is not None and (len(shape) != 2 or shape != tuple(batch["input_ids"].shape)):
            raise InvalidBatch(
                f"looking up a batch: expected input_ids [rows, time] and {name} of that shape, found "
                f"{tuple(batch['input_ids'].shape)} and {shape}. Give a mask of padding or position_ids."
            )
    tokens, labels = batch["input_ids"].numpy(), batch["labels"].numpy()
    mask, position_ids = batch.get("attention_mask"), batch.get("position_ids")
    for row in range(len(tokens)):
        present = np.ones(tokens.shape[1], dtype=np.int64) if mask is None else mask[row].numpy().astype(np.int64)
        starts = present.copy()
        starts[1:] = np.diff(present)
        if not np.isin(present, (0, 1)).all() or (starts == 1).sum() > 1:
            raise InvalidBatch(
                f"looking up row {row} of a batch: expected an attention mask of ones with padding at the ends, found "
                "something else. Packed rows need position_ids that start again at 0 with each document."
            )
        if ((labels[row] != IGNORED) & (present == 0)).any():
            raise InvalidBatch(
                f"looking up row {row} of a batch: expected labels of {IGNORED} where attention_mask is 0, found a "
                "token to be learnt there. A mask made by `input_ids != pad` hides the end-of-text token where that "
                "is the padding too: make it from the lengths."
            )
        first, end = int(present.argmax()), int(present.sum())
        places = None if position_ids is None else position_ids[row].numpy()[first : first + end]
        begins = [0] if places is None else _beginnings(places, row)
        if mask is not None and len(begins) > 1:
            raise InvalidBatch(
                f"looking up row {row} of a batch: found {len(begins)} documents (position_ids start again at 0) and "
                "an attention mask, with which a document would see those before it. Leave attention_mask out of "
                "packed batches."
            )
        for begin, stop in zip(begins, [*begins[1:], end], strict=True):
            span = slice(first + begin, first + stop)
            found = _document(row, span, tokens[row, span], labels[row, span], every)
            if found is not None:
                yield found


def samples_in(batch: Batch, origin: str) -> list[Sample]:
    """The documents of a batch on the CPU as samples, those that have supervised positions. Raises `InvalidBatch`."""
    return [document.sample(origin) for document in documents_of(batch)]


def sparse_targets(records: Sequence[BaseLogprobs], token_groups: Tensor | None = None) -> SparseTargets:
    """Records one after the other as tensors on the CPU. token_groups: [V], where the records have tail groups."""
    labels = np.concatenate([r.label_ids for r in records]).astype(np.int32)
    columns = {f"{PREFIX}{name}": torch.from_numpy(c) for name, c in target_columns(records).items()}
    targets = targets_of({f"{PREFIX}label_ids": torch.from_numpy(labels), **columns}, token_groups)
    assert targets is not None
    return targets


def target_columns(
    records: Sequence[BaseLogprobs], cut: VocabCut | None = None, tail: Tail | None = None
) -> dict[str, NDArray[Any]]:
    """Records one after the other as compact columns; see `CachedCollator`. Raises `InvalidBatch` as `cut_columns`."""
    labels = np.concatenate([r.label_ids for r in records]).astype(np.int32)
    names = {"draw_ids": "tail_sample_ids", "draw_logprobs": "tail_sample_logprobs"}
    columns: dict[str, NDArray[Any]] = {}
    for name in (*_IDS, *_LOGPROBS):
        parts = [getattr(r, names.get(name, name)) for r in records]
        if parts[0] is None:
            continue
        column = np.concatenate(parts)
        columns[name] = (
            np.where(column == NO_TOKEN, labels[:, None], column.astype(np.int32)) if name in _IDS else column
        )
    if cut is not None:  # which reads the groups, whatever the tail
        columns = cut_columns(columns, labels, cut)
    unread = [name for of, names in _OF_TAIL.items() if tail not in (None, of) for name in names]
    return {n: column if n in _IDS else _as_bits(column) for n, column in columns.items() if n not in unread}


def targets_of(batch: Batch, token_groups: Tensor | None = None) -> SparseTargets | None:
    """The targets that are in a batch, on its device; None where it was made without a cache.

    token_groups: [V], the tail group of each token, on the same device.
    """
    if f"{PREFIX}alternative_ids" not in batch:
        return None
    columns: dict[str, Tensor] = {}
    for name in (*_IDS, *_LOGPROBS):
        column = batch.get(f"{PREFIX}{name}")
        if column is not None:
            floats = torch.float16 if column.dtype == torch.int16 else torch.float32
            columns[name] = column if name in _IDS else column.view(floats)
    return SparseTargets(batch[f"{PREFIX}label_ids"], **columns, token_groups=token_groups)


def placed(batch: Batch, device: torch.device) -> Batch:
    """The batch with its base_* columns on this device, where the head of the model is; the rest as it was."""
    return {name: value.to(device) if name.startswith(PREFIX) else value for name, value in batch.items()}


def count_positions(batch: Batch, objective: Objective) -> Tensor:
    """Positions of a batch that count for the cross-entropy and for the regulariser, int64 [2], on its device.

    Of a weighted cross-entropy, those that are supervised or those that the weight keeps: see `weights`.
    """
    targets, supervised = targets_of(batch), batch.get(f"{PREFIX}supervised")
    if supervised is None:
        supervised = torch.ones_like(batch[f"{PREFIX}label_ids"], dtype=torch.bool)
    num_ce = num_weighed(objective, supervised, targets, batch.get(f"{PREFIX}for_ce"))
    if targets is None or objective.regularizer == "none":
        return torch.stack([num_ce, torch.zeros_like(num_ce)])
    return torch.stack([num_ce, regularizer_mask(targets, objective).sum()])


def num_supervised(batch: Batch) -> Tensor:
    """Positions of a batch at which the cross-entropy counts, an int64 scalar on its device."""
    labels: Tensor = batch[f"{PREFIX}label_ids"]
    supervised: Tensor | None = batch.get(f"{PREFIX}supervised")
    if supervised is None:
        return torch.full((), len(labels), dtype=torch.int64, device=labels.device)
    return supervised.sum()


def samples_of(cache: LogitCache) -> list[Sample]:
    """The samples of the data sets of a cache, or all of one that has none: see `data_samples`."""
    return samples_named(cache, data_samples(cache))


def samples_named(cache: LogitCache, found: DataSamples) -> list[Sample]:
    """Samples as they are learnt, those positions supervised at which cross-entropy counts."""
    samples = []
    for i, part in enumerate(found.samples):
        supervised = np.zeros(len(part.token_ids), dtype=np.bool_)
        supervised[part.positions[part.cross_entropy] + 1] = True
        origin = f"{cache.path}, sample {i}"
        samples.append(Sample(part.token_ids, supervised, origin, chat_template=part.chat_template))
    return samples


def said_of(cache: LogitCache, found: DataSamples) -> str:
    """Which data sets of a cache the samples are of, and what else it holds, in a sentence or two."""
    names = [f"{d.name!r} ({d.num_samples:,} samples, {d.num_positions:,} positions)" for d in found.data_sets]
    if not names:
        return f"{cache.path} has no data sets: the samples are all that it holds, {len(found.samples):,}."
    rest = ""
    if found.num_other_positions:
        ids = f"{found.num_other_samples:,} more sample{'s' * (found.num_other_samples != 1)}"
        at = f"{found.num_other_positions:,} more position{'s' * (found.num_other_positions != 1)}"
        rest = f" It holds {ids} and {at}, which are in none of them and are left out."
    return f"The samples are those of the data sets of {cache.path}: {', '.join(names)}.{rest}"


def digests_of(cache: LogitCache) -> dict[str, str]:
    """Of the data sets of a cache, by their names: what a run that learnt them says."""
    return {entry.name: entry.file.checksum for entry in cache.data_sets}


def groups_of(cache: LogitCache | None, vocab_size: int | None = None) -> Tensor | None:
    """The tail group of each token (of the first vocab_size), uint8 [V], on the CPU; None where the cache has none."""
    groups = None if cache is None else cache.token_groups()
    return None if groups is None else torch.from_numpy(groups[:vocab_size].copy())


def cut_of(cache: LogitCache, vocab_size: int | None) -> VocabCut | None:
    """What to take of a cache where the first vocab_size tokens are compared; None where that is all it has."""
    if vocab_size is None or cache.manifest.model.vocab_size <= vocab_size:
        return None
    groups = cache.token_groups()
    return VocabCut(vocab_size, None if groups is None else groups[:vocab_size].copy())


def _beginnings(places: NDArray[Any], row: int) -> list[int]:
    """Where the documents of a row begin: position_ids count up by one, from 0 in each."""
    if not ((places[1:] == places[:-1] + 1) | (places[1:] == 0)).all() or np.any(places[:1] != 0):
        raise InvalidBatch(
            f"looking up row {row} of a batch: expected position_ids that count up by one, from 0 at the first token "
            "of each document, found others. Let the collator make them so, or leave them out where nothing is packed."
        )
    return [0, *(np.flatnonzero(places[1:] == 0) + 1).tolist()]


def _document(row: int, span: slice, tokens: NDArray[Any], labels: NDArray[Any], every: bool) -> Document | None:
    supervised = labels[1:] != IGNORED
    if not supervised.any():
        return None
    if np.any(supervised & (labels[1:] != tokens[1:])):
        at = int(np.flatnonzero(supervised & (labels[1:] != tokens[1:]))[0]) + 1
        raise InvalidBatch(
            f"looking up row {row} of a batch: expected labels equal to input_ids (or {IGNORED}), found "
            f"{labels[at]} for {tokens[at]} at column {span.start + at}. Labels are not shifted here."
        )
    counts = np.ones_like(supervised) if every else supervised
    positions = np.flatnonzero(counts).astype(np.int32)
    return Document(row, span.start, tokens.astype(np.uint32), positions, supervised[positions])


def _joined(parts: list[NDArray[Any]], dtype: type) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)


def _as_bits(logprobs: NDArray[np.float32]) -> NDArray[Any]:
    """As float16 where that is exact, which steps of 1/32 nat are down to -64; the bits as integers."""
    with np.errstate(over="ignore"):
        halves = logprobs.astype(np.float16)
    exact = np.array_equal(halves.astype(np.float32), logprobs)
    return halves.view(np.int16) if exact else np.ascontiguousarray(logprobs).view(np.int32)
