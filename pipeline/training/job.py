"""The job of a run: what is trained, on what, against which cache, into which folder, and how.

Owns the names that become a job: what is refused before weights are read, and what a `Job` refuses once they are. Must
not know the trainer, nor write to the folder.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from logitcache.adapters.attach import AdapterSettings, check_attachable, target_layers
from logitcache.adapters.of_base import check_adapter
from logitcache.adapters.registry import KINDS, NO_ADAPTER
from logitcache.adapters.start_from import check_start_kind, check_start_weights
from logitcache.data.places import are_names
from logitcache.data.rows import NamedRows, read_rows
from logitcache.data.samples import Sample
from logitcache.data.settings import DEFAULT, DataSettings
from logitcache.errors import InputNotFound, PipelineError, TrainingFailed
from logitcache.events import OnMessage
from logitcache.losses.formula_checks import check_formulas
from logitcache.losses.formulas import Objective
from logitcache.models.checkpointing import check_checkpointable
from logitcache.models.device_map import is_spread, offloaded_parts
from logitcache.models.head import check_head, check_length
from logitcache.models.loading import Base
from logitcache.models.quantization import held_in
from logitcache.pairing.identity_checks import PairingRules, check_tail
from logitcache.pairing.samples import DEFAULT_MAX_LENGTH, check_max_length, check_weights
from logitcache.pairing.view import CacheView
from logitcache.storage import LogitCache

from .anchors import Anchor, Anchors, AnchorTerm
from .full_weights import check_unpacked, computes_in_bfloat16
from .penalties import check_penalised
from .run_folder import check_out
from .settings import EvalSettings, PenaltySettings, TrainSettings
from .trainer_settings import TrainerSettings


class Probes(Protocol):
    """Held-out text that fits a model (`evaluation.held_out.Probes`)."""

    def measured(self, model: nn.Module) -> dict[str, float]:
        """What there is to know of a model, by its names."""
        ...

    def described(self) -> dict[str, Any]:
        """Which texts they are, as JSON: new and prior, None where there is none, and what else is to be said."""
        ...


class HeldOut(Protocol):
    """Held-out text, opened and not yet held against a model (`evaluation.held_out.OpenHeldOut`)."""

    def paired(
        self,
        base: Base,
        tokenizer: PreTrainedTokenizerBase | None,
        max_length: int,
        batch_tokens: int,
        other_precision: bool,
    ) -> Probes:
        """max_length: tokens a sample of rows; batch_tokens: of a forward, with padding; other_precision: whether the
        base of the cache may hold its weights in another format."""
        ...


MAX_EVAL_TOKENS = 8192
"""Of a forward of held-out text."""


class HeldOutText(Protocol):
    """Held-out text as it is given (`evaluation.held_out.HeldOut`)."""

    def opened(self, how: DataSettings, output: str, on_message: OnMessage) -> HeldOut:
        """What can be read without a model. output: what the run writes."""
        ...


@dataclass(frozen=True)
class Job:
    """A run as it was asked for; whoever holds one knows that its settings go together.

    Raises `TrainingFailed` where they would train something else than they say, or on devices that cannot.
    """

    base: Base
    samples: Sequence[Sample]
    #: None: the run has no cache.
    cache: LogitCache | None
    #: The folder that the run writes.
    out: Path
    adapter: AdapterSettings
    objective: Objective
    settings: TrainSettings
    #: On the change of the weights, in addition to the objective.
    penalty: PenaltySettings | None
    pairing: PairingRules
    #: The base's, held against the cache's; None: the base has none.
    tokenizer: PreTrainedTokenizerBase | None
    #: Whether the samples are those of the cache's data sets.
    of_cache: bool = False
    #: How the rows of the data were read, where the samples are of rows.
    how: DataSettings = DEFAULT
    #: Caches of what the base says elsewhere, opened (`Anchor.opened`).
    anchors: Sequence[Anchor] = ()
    #: What is measured while it is trained; None: nothing.
    held_out: HeldOut | None = None
    #: When, and what follows from it.
    evaluation: EvalSettings = field(default_factory=EvalSettings)
    #: What the Trainer is told beside.
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    #: Folder of an adapter whose weights it starts from; None: as the kind starts.
    start_from: Path | None = None

    def __post_init__(self) -> None:
        if self.start_from is not None:
            check_start_kind(self.adapter, self.start_from)
        self.evaluation.check_budget(self.objective.kl_budget)
        self.trainer.check_budget(self.evaluation.budget_of_steps(self.objective.kl_budget))
        _check_combination(self)
        _check_placement(self)

    @property
    def mixed(self) -> bool:
        """Whether what is trained, in float32, is computed with in bfloat16, as the base is. Ask before the model is
        made the student."""
        return computes_in_bfloat16(self.base.model)

    @property
    def reads_cache(self) -> bool:
        """Whether the loss of the new data reads the cache; else it may be there for its samples alone."""
        return self.cache is not None and self.objective.reads_base

    def paired(self) -> CacheView | None:
        """The cache as the run reads it; None where its loss reads none. Raises as `CacheView.paired`."""
        if self.cache is None:
            return None
        view = CacheView.paired(
            self.cache,
            self.base,
            self.objective,
            tokenizer=self.tokenizer,
            top_k=self.settings.top_k,
            rules=self.pairing,
            how=self.how,
        )
        return view if self.reads_cache else None  # also one of samples alone must be of this base

    def paired_anchors(self) -> Anchors:
        """The anchor caches, each held against the base itself, whoever the teacher of the new data is.

        Raises as `AnchorTerm.paired`.
        """
        seed, rules = self.settings.seed, self.pairing
        found = (
            AnchorTerm.paired(anchor, self.base, seed, tokenizer=self.tokenizer, rules=rules, how=self.how)
            for anchor in self.anchors
        )
        return Anchors(tuple(found))

    def paired_held_out(self) -> Probes | None:
        """The held-out text, held against the base; None without any.

        A forward of it has at most the tokens of a micro-batch, so that measuring takes no more memory than training.
        Raises as `OpenHeldOut.paired`, and `InvalidSettings` where the evaluation needs a text that is not there.
        """
        if self.held_out is None:
            self.evaluation.check_texts(has_new=False, has_prior=False)
            return None
        longest = max(len(sample.token_ids) for sample in self.samples)
        length = DEFAULT_MAX_LENGTH if self.cache is None else self.cache.manifest.capture.max_length
        batch_tokens = min(
            MAX_EVAL_TOKENS, max(longest, min(self.settings.batch_tokens, self.settings.batch_size * longest))
        )
        found = self.held_out.paired(self.base, self.tokenizer, length, batch_tokens, self.pairing.other_precision)
        texts = found.described()
        self.evaluation.check_texts(texts["new"] is not None, texts["prior"] is not None)
        return found


def check_before_loading(
    data: object,
    cache: LogitCache | None,
    out: Path,
    objective: Objective,
    *,
    top_k: int | None,
    max_length: int | None = None,
    resume: bool = False,
    how: DataSettings = DEFAULT,
    on_message: OnMessage = lambda _: None,
) -> NamedRows | None:
    """Raise what can be told of a run before weights are read. Its rows, lazily, if data are given by their names.

    max_length: tokens a sample, for rows; with a cache at most its own, so that each is a causal prefix of what is
    there. on_message is told what a person should know of the data. Raises `TrainingFailed`, `IdentityMismatch`, and
    what opening the data raises.
    """
    if cache is None and objective.reads_base:
        raise TrainingFailed(f"training with {objective.reader}: a cache is needed. Give --cache.")
    if cache is None and data is None:
        raise TrainingFailed("training without a cache: expected data to train on, found none. Give --data.")
    check_tail(cache, objective, top_k)
    for sentence in check_formulas(objective):
        on_message(sentence)
    check_out(out, resume)
    if not are_names(data):
        return None
    check_max_length(cache, max_length)
    return read_rows(data, how, on_message)


def check_model(job: Job, view: CacheView | None, anchors: Anchors) -> None:
    """Raise what can be told of a job's model, samples and adapter before its folder is claimed.

    view, anchors: as the job pairs them. Raises `UnsupportedModel`, `SampleNotCached`, `PositionNotCaptured`,
    `UnsuitableAdapter`, `NotTheBase` (of an adapter to start from), `InputNotFound` (no layer of the names to adapt).
    Takes from torch's generator.
    """
    base = job.base
    if job.start_from is not None:
        check_adapter(str(job.start_from), base)
        check_start_weights(job.start_from)
    check_head(base.model)
    if job.settings.gradient_checkpointing:
        check_checkpointable(base.model)
    check_length(base.model, max(len(s.token_ids) for s in [*job.samples, *anchors.samples]))
    if view is not None:
        view.require(job.samples)
    if job.adapter.kind == NO_ADAPTER:
        check_unpacked(base.model)
        return
    with names_of_layers(base.source.name, job.adapter):
        check_attachable(base.model, job.adapter, job.samples)
    if job.penalty is not None:
        check_penalised(base.model, target_layers(base.model, job.adapter), job.penalty.kind)


@contextmanager
def names_of_layers(model: str, adapter: AdapterSettings) -> Iterator[None]:
    """Raise `InputNotFound` for the ValueError of names within, those of no layer of the model that can be adapted."""
    try:
        yield
    except PipelineError:
        raise
    except ValueError as error:
        raise InputNotFound(
            f"attaching {adapter.kind} to {model}: target modules {adapter.target_modules!r}, or one of "
            "them, name no layer that can be adapted. Use all-linear, or names of linear layers separated by commas."
        ) from error


def _check_combination(job: Job) -> None:
    """Raise `TrainingFailed` for settings that would train something else than they say."""
    penalty, model = job.penalty, job.base.model
    check_weights(job.samples, job.objective)
    if model.dtype == torch.float16:
        raise TrainingFailed(
            f"training {job.base.source.name} in float16: the gradients of one position among thousands are too small "
            "for it and would be lost. Use --dtype bfloat16 or float32; the cache may stay as it is."
        )
    if penalty is not None and job.adapter.modules_to_save:
        raise TrainingFailed(
            f"training with {penalty.kind} and whole modules ({job.adapter.modules_to_save}): the penalty is of what "
            "an adapter changes, and would not hold these. Use another regulariser, or leave them out."
        )
    if penalty is not None and (job.adapter.kind == NO_ADAPTER or held_in(model) is not None):
        raise TrainingFailed(
            f"training with {penalty.kind}: it is of what an adapter changes of weights that can be read. Use an "
            "adapter on weights that are not quantised, or another regulariser."
        )


def _check_placement(job: Job) -> None:
    """Raise `TrainingFailed` for what a model on several devices, or beyond them, cannot be trained with."""
    base, adapter, penalty = job.base, job.adapter, job.penalty
    offloaded = offloaded_parts(base.model)
    if offloaded:
        raise TrainingFailed(
            f"training {base.source.name}: {len(offloaded)} of its parts do not fit on the devices and would be "
            f"fetched from main memory or the disk ({offloaded[0]}, ...). The backward pass would hold them all at "
            "once. Use more or larger devices, or --load-in 4bit."
        )
    if not is_spread(base.model):
        return
    if penalty is not None or (adapter.kind != NO_ADAPTER and not KINDS[adapter.kind].quantized):
        what = adapter.kind if penalty is None else penalty.kind
        raise TrainingFailed(
            f"training {base.source.name} on several devices with {what}: it computes with the weights of many layers "
            "on one. Use lora, or another kind that stands on quantised weights (docs/adapters.md)."
        )
