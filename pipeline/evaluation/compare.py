"""Learning and forgetting: how well base and adapted model predict new text and prior text.

Owns running models over samples, for the sums that `metrics` makes numbers of. "Before" is always a base that no
adapter has touched: either a second model in memory (`compare`), or what a cache says of it (`compare_cached`, with one
model in memory). Must not train.
Shapes: N positions of a batch, V vocabulary, D documents.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from logitcache.adapters.of_base import check_adapter, is_whole
from logitcache.adapters.reloadable import check_reloadable
from logitcache.data.batches import PaddedBatch, batches_by_length, pad_batch, pad_samples
from logitcache.data.places import Named, are_names, settings_for
from logitcache.data.rows import read_rows
from logitcache.data.samples import Sample, distinct
from logitcache.data.settings import DEFAULT, DataSettings
from logitcache.data.skipped import listed_beside
from logitcache.errors import InvalidData, NonFiniteLogits, NotComparable, UnsupportedModel
from logitcache.events import OnMessage, Progress
from logitcache.losses.formulas import Objective, SparseTargets, base_outcomes, cross_entropy, regularizer_values
from logitcache.models.device_map import DeviceMap, head_device, offloaded_parts
from logitcache.models.head import (
    OutputHead,
    causal_lm_of,
    check_length,
    evaluation_mode,
    head_rows,
    hidden_states,
    logits_width,
    rows_at_once,
)
from logitcache.models.loading import Base, find_model, first_line, load_as, load_base, load_tokenizer
from logitcache.models.same_base import base_differences
from logitcache.models.settings import LoadSettings
from logitcache.pairing.identity_checks import PairingRules
from logitcache.pairing.inputs import model_inputs
from logitcache.pairing.samples import DEFAULT_MAX_LENGTH, samples_for
from logitcache.pairing.step_zero import PLAIN_LOSS_BYTES
from logitcache.pairing.targets import PREFIX, placed, targets_of, with_targets
from logitcache.pairing.view import AnyCache, CacheView
from logitcache.storage import LogitCache, ModelIdentity, sample_id
from logitcache.storage.encoding import PRECISIONS
from logitcache.storage.identity import digest

from .against import PlainDrift, read_plain
from .metrics import Comparison, Metrics, comparison_of

Values = dict[str, Tensor]
"""Columns of `metrics.DocumentSums` for every position of a batch, [N]."""

_FULL_KL = Objective("full-kl")


def probe_view(
    cache: LogitCache,
    base: Base,
    tokenizer: PreTrainedTokenizerBase | None,
    how: DataSettings = DEFAULT,
    other_precision: bool = False,
) -> CacheView:
    """A cache of held-out text as an evaluation reads it, held against the base. Raises as `CacheView.paired`, and
    `NotComparable` for one without alternatives."""
    check_alternatives(cache)
    rules = PairingRules(other_precision=other_precision)
    return CacheView.paired(cache, base, _FULL_KL, tokenizer=tokenizer, rules=rules, how=how)


def load_adapter(base: PreTrainedModel, folder: str, device_map: DeviceMap | None = None) -> nn.Module:
    """`base` with a trained adapter, in evaluation mode. `base` itself is changed by it: load it for this.

    Where the folder is a model that was trained as a whole: that one, in the dtype and on the device of `base`, or
    spread by device_map. Raises `UnsuitableAdapter` where loading it would make another model than was trained
    (`reloadable`), `UnsupportedModel` where it is damaged or does not fit; a factor that is missing would be random.
    """
    check_reloadable(folder)
    if is_whole(folder):
        dtype = str(base.dtype).removeprefix("torch.")
        whole: nn.Module = load_base(find_model(folder), dtype, head_device(base), device_map=device_map).model
        if logits_width(whole) != logits_width(base):
            raise UnsupportedModel(
                f"loading {folder!r}: expected logits over {logits_width(base)} tokens as the base has, found "
                f"{logits_width(whole)}. Give the model it was trained from."
            )
        return whole
    offloaded = offloaded_parts(base)
    if offloaded:
        raise UnsupportedModel(
            f"loading adapter {folder!r}: {len(offloaded)} parts of the model do not fit on the devices and are "
            f"fetched from main memory or the disk ({offloaded[0]}, ...). PEFT puts no adapter there. Use more or "
            "larger devices, or merge the adapter into its base."
        )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys")
            model: nn.Module = PeftModel.from_pretrained(base, folder)
        places = get_peft_model_state_dict(model, save_embedding_layers=False).keys() | model.state_dict().keys()
        stray = sorted(load_peft_weights(folder, device="cpu").keys() - places)
        if stray:
            raise ValueError(f"{len(stray)} of its tensors have no place in the model: {stray[0]}, ...")
    except Exception as error:  # peft and safetensors raise many kinds
        raise UnsupportedModel(
            f"loading adapter {folder!r}: it is damaged, or of a model of other sizes ({first_line(error)}). "
            "Give the model it was trained on, or train it again."
        ) from error
    return model.eval()


def evaluate(
    model: str | Path,
    adapter: str | Path | None,
    texts: Mapping[str, Named | Sequence[Sample]],
    *,
    loading: LoadSettings | None = None,
    max_length: int = DEFAULT_MAX_LENGTH,
    batch_tokens: int = 8192,
    how: DataSettings | None = None,
    on_message: OnMessage = lambda _: None,
) -> dict[str, Comparison]:
    """How base and adapted model predict texts: learning on new ones, forgetting on what the base knew.

    model: folder or hub id. adapter: a folder, or None for the base alone. texts: of each name a file, folder, URL or
    hub id of rows, or several, or samples in memory. how: which rows, and what of a chat counts; on_message is
    told what a person should know of them. Both models are in memory; with probe caches one is (`compare_cached`).
    Raises what loading and reading raise, and as `compare`.
    """
    source, held, how = find_model(str(model)), loading or LoadSettings(), how or DataSettings()
    hows = {n: listed_beside(h, f"evaluate-{n}") for n, h in settings_for(texts, how).items()}
    rows = {name: read_rows(text, hows[name], on_message) for name, text in texts.items() if are_names(text)}
    samples = {name: cast("Sequence[Sample]", text) for name, text in texts.items() if not are_names(text)}
    base, tokenizer = load_as(source, held), load_tokenizer(source)
    for name, lines in rows.items():
        samples[name] = samples_for(
            lines, None, tokenizer, base.identity.vocab_size, max_length, on_message, hows[name]
        )
    adapted = None
    if adapter is not None:
        check_adapter(str(adapter), base)
        adapted = load_adapter(load_as(source, held).model, str(adapter), held.device_map)
    return {name: compare(base.model, adapted, samples[name], batch_tokens) for name in texts}


def compare(
    base: PreTrainedModel,
    adapted: nn.Module | None,
    samples: Sequence[Sample],
    batch_tokens: int = 8192,
    progress: Progress = lambda _: None,
) -> Comparison:
    """Both models on the same positions, over the whole vocabulary; equal samples count once.

    Raises `NonFiniteLogits`, `UnsupportedModel` for a sample that is too long, `InvalidData` where nothing is
    supervised.
    """
    models = [base] if adapted is None else [base, adapted]

    def values(batch: Sequence[Sample]) -> Values:
        return _live_values(models, pad_batch(batch, head_device(base)))

    found, samples = _document_sums(models, samples, batch_tokens, values, progress)
    return comparison_of(found, "base", samples_fingerprint(samples))


def compare_cached(
    adapted: nn.Module,
    cache: AnyCache,
    samples: Sequence[Sample],
    batch_tokens: int = 8192,
    progress: Progress = lambda _: None,
) -> Comparison:
    """The same with the base's side from a cache of it, so that only the adapted model is in memory.

    Cross-entropy before is exact, up to the cache's rounding of log p(label). KL and the cross-entropy against the
    base's distribution are over label, alternatives and the tail as one outcome: lower bounds (data processing), equal
    to `compare` at K = V - 1. The base's first token is the label or the first alternative, whichever is recorded as
    more probable; equal values go to the smaller id, as in argmax; where both are within the rounding of each other the
    position counts as `undecided`, and the first one of its document as `num_first_undecided`.
    cache: a view of it (`CacheView.paired` with the base's folder makes every check), or one that is held against the
    model in memory here.
    Raises what `compare` raises, `NotComparable` for a cache without alternatives, `NotTheBase`, `SampleNotCached` and
    `PositionNotCaptured` before anything is run.
    """
    view = CacheView.of(cache, adapted, _FULL_KL, None, None)
    check_alternatives(view.cache)
    samples = [s for s in samples if len(s.positions)]
    view.require(samples)

    def values(batch: Sequence[Sample]) -> Values:
        return _cached_values(adapted, view.cache, batch)

    found, samples = _document_sums([adapted], samples, batch_tokens, values, progress)
    return comparison_of(found, "cache", samples_fingerprint(samples))


def samples_fingerprint(samples: Sequence[Sample]) -> str:
    """Which positions of which token sequences, whatever their order and number of copies."""
    documents = (s for s in distinct(samples) if len(s.positions))
    lines = (f"{sample_id(s.token_ids).hex()} {digest(s.positions.astype('<i4').tobytes())}\n" for s in documents)
    return digest("".join(sorted(lines)).encode())


def plain_drift(path: str | Path, prior: Sequence[Sample], base: ModelIdentity) -> PlainDrift:
    """The drift on prior text in the JSON that `evaluate --json` printed for another adapter.

    prior, base: what it must have been measured on and against. Raises `InvalidData` where it is no such file,
    `NotComparable` where it is of another base or of other prior text.
    """
    found = read_plain(Path(path))
    said = "; ".join(base_differences({"weights": found.weights, "config": found.config}, base))
    differs = [f"base ({said})"] if said else []
    if found.samples != samples_fingerprint(prior):
        differs.append("prior text (tokens, or which of them are supervised)")
    if differs:
        raise NotComparable(
            f"comparing with {path}: it is of another {' and another '.join(differs)}. A ratio of the two drifts would "
            "mean nothing. Evaluate both adapters with the same --model and prior text."
        )
    return found


@torch.no_grad()  # no inference_mode: what a model keeps of a forward, such as longer rotary tables, it is trained with
def _document_sums(
    models: Sequence[nn.Module],
    samples: Sequence[Sample],
    batch_tokens: int,
    values: Callable[[Sequence[Sample]], Values],
    progress: Progress,
) -> tuple[dict[str, NDArray[np.float64]], list[Sample]]:
    """Sums over the positions of each document, [D], and the documents: distinct samples with supervised positions."""
    batches = list(batches_by_length((s for s in samples if len(s.positions)), batch_tokens))
    documents = [sample for batch in batches for sample in batch]
    if not documents:
        raise InvalidData("evaluating: expected a sample with a supervised token at least, found none.")
    for model in models:
        check_length(causal_lm_of(model), len(documents[0].token_ids))
    parts: dict[str, list[NDArray[np.float64]]] = {}
    shared = shared_beginning(documents)
    for batch in batches:
        counts = np.array([len(s.positions) for s in batch])
        starts = np.cumsum(counts) - counts
        columns = {name: column.double().cpu().numpy() for name, column in values(batch).items()}
        sums = {name: np.add.reduceat(column, starts) for name, column in columns.items()}
        if "agreement" in columns:
            sums["first_changed"] = 1 - columns["agreement"][starts + shared]
            sums["first_undecided"] = columns["undecided"][starts + shared]
        for name, column in {**sums, "positions": counts.astype(np.float64)}.items():
            parts.setdefault(name, []).append(column)
        progress(sum(len(s.token_ids) for s in batch))
    found = {name: np.concatenate(columns) for name, columns in parts.items()}
    _check_finite(found, documents)
    return found, documents


def shared_beginning(documents: Sequence[Sample]) -> int:
    """How many labels all documents begin with in common, none of them to its end: such as the <think> that a chat
    template puts before every answer, where no model has anything to decide."""
    labels = [sample.token_ids[sample.positions + 1] for sample in documents]
    length = min(map(len, labels)) - 1 if len(labels) > 1 else 0
    same = np.ones(length, dtype=np.bool_)
    for found in labels:
        same &= found[:length] == labels[0][:length]
    return length if same.all() else int(np.argmin(same))


def _check_finite(sums: dict[str, NDArray[np.float64]], documents: Sequence[Sample]) -> None:
    wrong = [name for name, column in sums.items() if not np.isfinite(column).all()]
    if wrong:
        first = documents[int(np.argmax(~np.isfinite(sums[wrong[0]])))]
        raise NonFiniteLogits(
            f"evaluating on {first.origin}: {', '.join(wrong)} is not finite. "
            "The base or the adapter is damaged. Try --dtype float32, or train again."
        )


def _live_values(models: Sequence[nn.Module], batch: PaddedBatch) -> Values:
    """Of the base, or of the base and the adapted model, with one slice of [n, V] alive at a time and model.

    The two may lie on different devices; they are compared where the base's head is.
    """
    hidden = [_hidden_of(m, batch.rows, input_ids=batch.input_ids, attention_mask=batch.attention_mask) for m in models]
    heads = [OutputHead(causal_lm_of(m)) for m in models]
    num_rows = head_rows(causal_lm_of(models[0]))
    parts = []
    for labels, *rows in zip(batch.label_ids.split(num_rows), *(h.split(num_rows) for h in hidden), strict=True):
        logprobs = [head(h).to(labels.device).float().log_softmax(dim=1) for head, h in zip(heads, rows, strict=True)]
        first = [q.argmax(dim=1) for q in logprobs]
        found: Values = {}
        for side, q, token in zip(("before", "after"), logprobs, first, strict=False):
            found[f"ce_{side}"] = -q.gather(1, labels[:, None]).squeeze(1)
            found[f"hits_{side}"] = token == labels
        if len(models) > 1:
            p, q = logprobs
            mass = p.exp()
            found["kl"] = torch.where(p > -torch.inf, mass * (p - q), 0.0).sum(dim=1, dtype=torch.float64)
            found["base_ce"] = -torch.where(mass > 0, mass * q, 0.0).sum(dim=1, dtype=torch.float64)
            found["agreement"] = first[0] == first[1]
            found["undecided"] = torch.zeros_like(found["agreement"])
        parts.append(found)
    return _joined(parts)


def check_alternatives(cache: LogitCache) -> None:
    """Raise `NotComparable` for a cache without alternatives."""
    if not cache.manifest.capture.top_k:
        raise NotComparable(
            f"evaluating against {cache.path}: expected alternatives, found a cache made with --top-k 0. What the base "
            "predicts first would not be known where it is not the true token. Precompute one with --top-k 1 or more."
        )


def _cached_values(adapted: nn.Module, cache: LogitCache, batch: Sequence[Sample]) -> Values:
    """Of the adapted model against the rows of the cache."""
    causal_lm = causal_lm_of(adapted)
    columns = placed(with_targets(pad_samples(batch), cache), head_device(causal_lm))
    targets = targets_of(columns)
    assert targets is not None
    hidden = _hidden_of(adapted, columns[f"{PREFIX}rows"], **model_inputs(adapted, columns))
    head, num_rows = OutputHead(causal_lm), rows_at_once(causal_lm, PLAIN_LOSS_BYTES)
    precision = PRECISIONS[cache.manifest.capture.precision]
    rounding = 0.0 if precision is None else precision.max_error + 0.5 / precision.scalars
    parts = []
    for start in range(0, len(hidden), num_rows):
        rows = slice(start, start + num_rows)
        logits, part = head(hidden[rows]).float(), targets.rows(rows)
        labels, first = part.label_ids.long(), logits.argmax(dim=1)
        base_first, undecided = _first_tokens(part, rounding)
        kl = regularizer_values(logits, part, _FULL_KL)
        log_p = base_outcomes(part, _FULL_KL)
        entropy = -torch.where(log_p > -torch.inf, log_p.exp() * log_p, 0.0).sum(dim=1)
        parts.append(
            {
                "ce_before": -part.label_logprobs.float(),
                "hits_before": base_first == labels,
                "ce_after": cross_entropy(logits, labels),
                "hits_after": first == labels,
                "kl": kl,
                "base_ce": kl + entropy,
                "agreement": base_first == first,
                "undecided": undecided,
            }
        )
    return _joined(parts)


def _first_tokens(targets: SparseTargets, rounding: float) -> tuple[Tensor, Tensor]:
    """The token that the base predicts first, int64 [N], and whether the rounding, in nats, leaves that open, bool [N].

    Alternatives stand in the base's own order, so that only the label can be taken for the first of them.
    """
    label, other = targets.label_logprobs.float(), targets.alternative_logprobs[:, 0].float()
    label_ids, other_ids = targets.label_ids.long(), targets.alternative_ids[:, 0].long()
    label_first = (label > other) | ((label == other) & (label_ids < other_ids))
    undecided = (label - other).abs() <= rounding if rounding else torch.zeros_like(label_first)
    return torch.where(label_first, label_ids, other_ids), undecided


def _hidden_of(model: nn.Module, rows: Tensor, **inputs: Tensor) -> Tensor:
    """Hidden states [N, D] at these rows of the flattened batch, without dropout."""
    with evaluation_mode(model):
        hidden = hidden_states(model, **inputs).flatten(0, 1)
        return hidden.index_select(0, rows.to(hidden.device))


def _joined(parts: Sequence[Values]) -> Values:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


__all__ = [
    "Comparison",
    "Metrics",
    "check_adapter",
    "compare",
    "compare_cached",
    "load_adapter",
    "plain_drift",
    "samples_fingerprint",
]
