"""vLLM as the base -> `BaseLogprobs`, from the `prompt_logprobs` of its outputs.

Owns what is asked of vLLM and how its answer is read; nothing is believed of it that can be checked. vLLM is imported
when an engine is started, and only then. It returns label and alternatives and nothing else of a distribution, so the
tail is what they leave of 1. Written against the source of vLLM 0.33.0 and 0.32.0 (docs/how-to/engines.md); must not
know caches. Shapes: n tokens of a sample, P positions, K alternatives, k = K + 1 entries asked for, V vocabulary.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.capture.settings import CaptureSettings, VllmSettings
from logitcache.data.samples import Sample
from logitcache.errors import EngineFailed, InputNotFound, NonFiniteLogits, install_line, is_out_of_memory
from logitcache.models.loading import Source, checkpoint_identity, first_line
from logitcache.storage import BaseLogprobs, ModelIdentity
from logitcache.storage.records import MASS_TOLERANCE, NO_TOKEN

ATTENTION = "vllm"
"""`model.attention` of what this engine captures: never continued by another one."""

REMAINDER_ERROR = 2e-6
"""Of the mass that 1 - sum leaves: the error of a float32 normaliser, which every probability shares (docs/log.md)."""


@dataclass(frozen=True)
class VllmTeacher:
    """Records by a running vLLM. llm, params: `vllm.LLM` and its `SamplingParams`; top_k: K, at most V - 1."""

    llm: Any
    params: Any
    top_k: int
    vocab_size: int

    def __call__(self, batch: Sequence[Sample]) -> list[BaseLogprobs]:
        """The record of every supervised position of each sample. Raises `EngineFailed` and `NonFiniteLogits`."""
        prompts = [{"prompt_token_ids": sample.token_ids.tolist()} for sample in batch]
        try:
            outputs = self.llm.generate(prompts, self.params, use_tqdm=False)
        except Exception as error:  # vLLM raises many kinds
            if is_out_of_memory(error):
                raise
            raise EngineFailed(
                f"running vLLM on {len(batch)} samples from {batch[0].origin} on: {first_line(error)}. Nothing of "
                "them was cached. It needs room for one token more than a sample has: lower --max-length by one."
            ) from error
        if len(outputs) != len(batch):
            raise EngineFailed(f"running vLLM: expected {len(batch)} outputs, found {len(outputs)}. {NOT_AS_READ}")
        pairs = zip(outputs, batch, strict=True)
        return [record_of(output, sample, self.top_k, self.vocab_size) for output, sample in pairs]


NOT_AS_READ = (
    "This vLLM does not return what the adapter was written for. Nothing of it was cached. Install a version that "
    "docs/how-to/engines.md names, or use --engine transformers."
)


def vllm_identity(source: Source, dtype: str) -> ModelIdentity:
    """Which distributions vLLM will give: the files' fingerprints and the format that they are quantised in (it is not
    told to quantise), the dtype it is told to use, and no other's attention. dtype: auto is that of the checkpoint
    (vLLM's own would turn float32 into 16 bits)."""
    return checkpoint_identity(source, dtype, ATTENTION)


def check_tail(num_tail_groups: int, num_tail_samples: int) -> None:
    """Raise `EngineFailed` where more of the tail is asked for than its mass."""
    asked = [f"{n} {what}" for n, what in ((num_tail_groups, "tail groups"), (num_tail_samples, "draws")) if n]
    if asked:
        raise EngineFailed(
            f"capturing {' and '.join(asked)} with vLLM: it returns nothing of the tail. Nothing was run. "
            "Leave them out, or use --engine transformers."
        )


def vllm_version() -> str:
    """Of the installed vLLM. Raises `InputNotFound` where there is none."""
    return str(_vllm().__version__)


def start_vllm(
    source: Source, identity: ModelIdentity, top_k: int, max_length: int, settings: VllmSettings | None = None
) -> VllmTeacher:
    """vLLM with this model, which takes samples of at most max_length tokens.

    K = top_k; K + 1 entries a position are asked for, since the label may be among them. Raises
    `InvalidSettings` for a K above V - 1, `InputNotFound` where vLLM is not installed, `EngineFailed` where it does not
    start.
    """
    CaptureSettings(top_k=top_k, max_length=max_length).check_vocabulary(identity.vocab_size)
    vllm, chosen = _vllm(), settings or VllmSettings()
    try:
        llm = vllm.LLM(
            model=str(source.folder),
            skip_tokenizer_init=True,  # it is given token ids
            trust_remote_code=False,
            dtype=identity.dtype,
            max_model_len=max_length + 1,
            max_logprobs=top_k + 1,
            logprobs_mode="raw_logprobs",
            enable_prefix_caching=False,  # a position that is not computed has no log-probabilities
            gpu_memory_utilization=chosen.gpu_memory,
            max_num_batched_tokens=max(chosen.batch_tokens, max_length + 1),
            tensor_parallel_size=chosen.num_gpus,
            seed=0,
        )
        flat = {"flat_logprobs": True} if hasattr(vllm.SamplingParams, "flat_logprobs") else {}
        params = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=top_k + 1, detokenize=False, **flat)
    except Exception as error:  # vLLM raises many kinds
        raise EngineFailed(
            f"starting vLLM on {source.name!r}: {first_line(error)}. Nothing was run. Put that right (a --max-length "
            "one below the model's longest, a supported model, a GPU), or use --engine transformers."
        ) from error
    _check_held(llm, source, identity)
    return VllmTeacher(llm, params, top_k, identity.vocab_size)


def _check_held(llm: Any, source: Source, identity: ModelIdentity) -> None:
    """Raise `EngineFailed` where vLLM holds quantised weights otherwise than the identity says.

    It names its kernels, gptq_marlin for gptq, so that only whether it holds any is compared.
    """
    try:
        found = llm.llm_engine.model_config.quantization
    except AttributeError as error:
        raise EngineFailed(f"asking vLLM how it holds {source.name!r}: {first_line(error)}. {NOT_AS_READ}") from error
    if bool(found) != bool(identity.quantization):
        raise EngineFailed(
            f"starting vLLM on {source.name!r}: expected {identity.quantization or 'unquantised'} weights by its "
            f"config.json, found that vLLM holds {found or 'unquantised'} ones. The cache would not say what it is of. "
            "Nothing was run. Use --engine transformers."
        )


def record_of(output: Any, sample: Sample, top_k: int, vocab_size: int) -> BaseLogprobs:
    """The record of a sample from vLLM's `RequestOutput` for it, with k = K + 1 entries a position asked for.

    `prompt_logprobs` has an entry for each token, None for the first; that of token t + 1 is the prediction of position
    t. It holds the k most probable tokens, of ranks 1 to k, and the label wherever it stands: the k - 1 or k tokens
    that are not the label must have different ranks up to k. Kept are the K most probable of them, equal ones by
    ascending id. Raises `EngineFailed` for anything else, `NonFiniteLogits` for a value that is not finite.
    """
    found = _prompt_logprobs(output, sample)
    rows, ids, logprobs, ranks = _entries(found, sample)
    labels = sample.token_ids[sample.positions + 1].astype(np.int64)
    _check_entries(rows, ids, logprobs, sample, vocab_size)
    is_label = ids == labels[rows]
    label_logprobs = np.full(len(labels), np.nan)
    label_logprobs[rows[is_label]] = logprobs[is_label]
    _require(~np.isnan(label_logprobs), sample, "the label among the entries", "none")

    rows, ids, logprobs, ranks = (column[~is_label] for column in (rows, ids, logprobs, ranks))
    in_range = (ranks >= 1) & (ranks <= top_k + 1)  # NaN is in no range
    misplaced = np.bincount(rows[~in_range], minlength=len(labels))
    _require(misplaced == 0, sample, f"ranks from 1 to {top_k + 1}", "others, beside the label's")
    by_rank = np.full((len(labels), top_k + 1), -np.inf)
    by_id = np.full(by_rank.shape, NO_TOKEN, dtype=np.int64)
    by_rank[rows, ranks.astype(np.int64) - 1] = logprobs
    by_id[rows, ranks.astype(np.int64) - 1] = ids
    num_others, num_ranks = np.bincount(rows, minlength=len(labels)), (by_id != NO_TOKEN).sum(axis=1)
    complete = (num_others == num_ranks) & (num_others >= top_k)
    _require(complete, sample, f"{top_k} tokens beside the label, each of its own rank", "fewer, or ranks twice")

    order = np.lexsort((by_id, -by_rank), axis=1)[:, :top_k]
    alternatives = np.take_along_axis(by_rank, order, axis=1)
    return BaseLogprobs(
        positions=sample.positions,
        label_ids=labels.astype(np.uint32),
        label_logprobs=label_logprobs.astype(np.float32),
        alternative_ids=np.take_along_axis(by_id, order, axis=1).astype(np.uint32),
        alternative_logprobs=alternatives.astype(np.float32),
        tail_logprobs=_tail(label_logprobs, alternatives, vocab_size, sample),
    )


def remainder(
    label_logprobs: NDArray[np.float64], alternative_logprobs: NDArray[np.float64], vocab_size: int
) -> NDArray[np.float64]:
    """log of the mass of everything else, [P], from log p(label) [P] and the alternatives [P, K], descending.

    1 - p(label) - sum of p(alternatives), in float64, as far as that is known: its error is that of the normaliser,
    `REMAINDER_ERROR` of probability, so never less than that; and never more than (V - 1 - K) times the last
    alternative, if there is one, for no token is left out that is more probable. -inf where no token is left out, and
    only there.
    """
    num_left = vocab_size - 1 - alternative_logprobs.shape[1]
    if not num_left:
        return np.full(len(label_logprobs), -np.inf)
    left = 1 - (np.exp(label_logprobs) + np.exp(alternative_logprobs).sum(axis=1))
    tail: NDArray[np.float64] = np.log(np.maximum(left, REMAINDER_ERROR))
    if alternative_logprobs.shape[1]:
        tail = np.minimum(tail, np.log(num_left) + alternative_logprobs[:, -1])
    return tail


def _tail(
    label: NDArray[np.float64], alternatives: NDArray[np.float64], vocab_size: int, sample: Sample
) -> NDArray[np.float32]:
    tail = remainder(label, alternatives, vocab_size)
    total = np.exp(label) + np.exp(alternatives).sum(axis=1) + np.exp(tail)
    off = np.abs(total - 1)
    worst = f"{total[off.argmax()]:.6f}" if len(total) else ""
    _require(off <= MASS_TOLERANCE, sample, "masses that can sum to 1", f"{worst}: no distribution, or not the top")
    return tail.astype(np.float32)


def _vllm() -> Any:
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise InputNotFound(
            f"running the base with vLLM: it is not installed ({first_line(error)}). "
            f"{install_line('vllm')} on a machine with a GPU, or use --engine transformers."
        ) from error


def _prompt_logprobs(output: Any, sample: Sample) -> Any:
    """Those of the output, one entry a token of this very sample."""
    tokens, found = getattr(output, "prompt_token_ids", None), getattr(output, "prompt_logprobs", None)
    if tokens is None or list(tokens) != sample.token_ids.tolist():
        raise _not_as_asked(sample, "the prompt that was asked for", "other tokens")
    if found is None:
        raise _not_as_asked(sample, "prompt_logprobs", "None")
    if len(found) != len(sample.token_ids):
        raise _not_as_asked(sample, f"prompt_logprobs of {len(sample.token_ids)} tokens", f"of {len(found)}")
    return found


def _entries(found: Any, sample: Sample) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[Any], NDArray[Any]]:
    """Of the supervised positions, one after the other: row, token id, log-probability, rank (NaN where it is None)."""
    places = sample.positions.astype(np.int64) + 1
    if hasattr(found, "start_indices"):  # vLLM's FlatLogprobs: lists over all entries of all tokens
        starts, ends = np.asarray(found.start_indices)[places], np.asarray(found.end_indices)[places]
        counts = ends - starts
        index = np.arange(counts.sum()) + np.repeat(starts - (np.cumsum(counts) - counts), counts)
        columns = [np.array(c, dtype=np.float64)[index] for c in (found.token_ids, found.logprobs, found.ranks)]
    else:
        entries = [found[place] or {} for place in places.tolist()]
        counts = np.array([len(entry) for entry in entries])
        logprobs = [value for entry in entries for value in entry.values()]
        ids = [token for entry in entries for token in entry]
        raw = (ids, [v.logprob for v in logprobs], [v.rank for v in logprobs])
        columns = [np.array(column, dtype=np.float64) for column in raw]
    return np.repeat(np.arange(len(places)), counts), columns[0].astype(np.int64), columns[1], columns[2]


def _check_entries(
    rows: NDArray[np.int64], ids: NDArray[np.int64], logprobs: NDArray[Any], sample: Sample, vocab_size: int
) -> None:
    bad = rows[~np.isfinite(logprobs)]
    if len(bad):
        raise NonFiniteLogits(
            f"running vLLM on {sample.origin}, position {sample.positions[bad[0]]}: its log-probabilities are not "
            f"finite ({len(np.unique(bad))} positions of this sample). Nothing of it was cached. "
            "Try --dtype float32, or look at this row."
        )
    strange = np.bincount(rows[(ids < 0) | (ids >= vocab_size)], minlength=len(sample.positions))
    _require(strange == 0, sample, f"token ids below {vocab_size}", "others")
    above = np.bincount(rows[logprobs > 1e-6], minlength=len(sample.positions))
    _require(above == 0, sample, "log-probabilities", "numbers above 0 (raw logits?)")


def _require(holds: NDArray[np.bool_], sample: Sample, expected: str, found: str) -> None:
    """holds: bool [P]. Raises `EngineFailed` with the first position where it does not."""
    if not holds.all():
        raise _not_as_asked(sample, expected, found, f", position {sample.positions[int(holds.argmin())]}")


def _not_as_asked(sample: Sample, expected: str, found: str, where: str = "") -> EngineFailed:
    return EngineFailed(
        f"reading vLLM's output for {sample.origin}{where}: expected {expected}, found {found}. {NOT_AS_READ}"
    )
