"""What plugs into TRL's preference trainers: the reference's log-probabilities from a cache, and no reference model.

    class CachedDPOTrainer(CachedReference, DPOTrainer): ...

DPO, IPO and KTO compare log p(answer | prompt) of what is trained with that of the base, a sum over the answer's
tokens. Owns which of TRL's trainers are known, what of their settings is refused, and that the model in hand is the
base of the cache. The loss, and every number that is made of the sums, stay TRL's own: of its trainers the one method
is replaced that runs the reference over a data set. Must not import TRL, which need not be installed.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer

from logitcache.errors import InvalidSettings, NotTheBase, TrainingFailed
from logitcache.losses.formulas import Objective
from logitcache.models.head import causal_lm_of
from logitcache.pairing.identity_checks import PairingRules
from logitcache.pairing.step_zero import NUM_PROBED, StepZero
from logitcache.pairing.view import CacheView
from logitcache.storage import LogitCache
from logitcache.storage.encoding import PRECISIONS

from .fill import FILLED, CaptureSettings, Filling, JobReport
from .preference_rows import FromCache, PreferenceRows
from .rows import tokenizer_of
from .supported import divided_by

logger = logging.getLogger(__name__)

_AnyTrainer: Any = Trainer if TYPE_CHECKING else object

COLUMNS = {
    ("trl.trainer.dpo_trainer", "DPOTrainer"): ("ref_chosen_logps", "ref_rejected_logps"),
    ("trl.trainer.kto_trainer", "KTOTrainer"): ("ref_logps", "ref_KL_logps"),
}
"""Module and class of the known trainers, and the columns in which their losses read the reference's sums, in the
order in which their `compute_ref_log_probs` returns them."""

_METHODS = ("_precompute_ref_logps", "compute_ref_log_probs", "_compute_loss", "compute_loss")
"""Of a trainer, by which it gets those sums and uses them."""

LABELS_ALONE = CaptureSettings(top_k=0, precision="exact")
"""What a cache keeps that is made here, where nobody says: all that a reference is asked, and unrounded."""

_OBJECTIVE = Objective("full-kl")
"""By which the model is held against the cache before training: also a cache of labels alone has its two outcomes."""


class CachedReference(_AnyTrainer):
    """Mixin before TRL's DPOTrainer or KTOTrainer: the reference is read from a cache of the base, by content.

        class CachedDPOTrainer(CachedReference, DPOTrainer): ...
        args = DPOConfig(..., precompute_ref_log_probs=True)
        CachedDPOTrainer(cache="cache/", fill=True, model=..., args=args, train_dataset=..., peft_config=...)

    When the trainer is made, and where `evaluate` is given data, each sequence of its data is looked up by the tokens
    that its collator makes, and log p of its completion's tokens is summed by TRL's own code, `ld_alpha` too. No
    reference model is loaded, and the base does not run: whatever the rank, the seed or the kind of adapter.
    cache: of the base, with any number of alternatives, 0 too. fill: what it lacks of the data is captured here and
    now, before anything is trained, with the model below its adapter; a cache that is not there is made, with capture
    in place of `--top-k 0 --precision exact`. `filled` has what this process captured, by the name of the data set.
    rules: how the cache may belong to another number format, or to another model, which is then the reference.
    Configuration and weights are held against the checkpoint of the base. check: the untrained model is held against
    the cache on a few samples (`step_zero`); False where an adapter is not meant to start as the base.
    Raises `TrainingFailed` for trainers and settings that are not known or would be without effect, `NotTheBase`,
    `SampleNotCached`, `PositionNotCaptured`, and what opening and filling a cache raise.
    """

    def __init__(
        self,
        *args: Any,
        cache: LogitCache | str | Path,
        rules: PairingRules | None = None,
        check: bool = True,
        fill: bool = False,
        capture: CaptureSettings | None = None,
        **kwargs: Any,  # of the trainer that this is mixed into
    ) -> None:
        self._columns = columns_of(type(self))
        self._cache, self._rules, self._check = cache, rules, check
        self._filling = Filling.asked(cache, fill, capture, _OBJECTIVE, None, rules, LABELS_ALONE)
        self.filled: dict[str, JobReport] = {}
        self.cache_view: CacheView | None = None
        self.step_zero: StepZero | None = None  # what the untrained model showed
        _check_rules(type(self).__name__, rules)
        super().__init__(*args, **kwargs)
        if not self.args.precompute_ref_log_probs:
            raise TrainingFailed(
                f"training with {type(self).__name__}: expected precompute_ref_log_probs=True, by which TRL reads the "
                "reference's log-probabilities instead of running it in every step, found False. The cache would be "
                "without effect. Set it in the trainer's args."
            )

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """The data set with the reference's sums, a column for each kind; TRL's own runs the model to make them.

        name: of the data set. batch_size: rows that are looked up together.
        """
        self._check_setup(dataset, name)
        rows = PreferenceRows(dataset, self.data_collator, name)
        if self._filling is not None:
            data_name = FILLED if name == "train" else f"{FILLED} ({name})"
            report = self._filling.fill(self.model, rows, tokenizer_of(self), data_name=data_name)
            self.filled |= {} if report is None else {name: report}
        reference = FromCache(self._opened(rows).cache)
        sums: dict[str, list[float]] = {column: [] for column in self._columns}
        for start in range(0, len(rows), batch_size):
            batch = rows.batch(range(start, min(start + batch_size, len(rows))))
            placed = {k: v.to(self.args.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            with torch.no_grad():
                found = self.compute_ref_log_probs(reference, placed)
            for column, values in zip(self._columns, found, strict=True):
                sums[column] += [] if values is None else values.tolist()
        for column, numbers in sums.items():
            if numbers:  # KTO has no mismatched pairs where its loss has no KL
                dataset = dataset.add_column(column, numbers)
        return dataset

    def _check_setup(self, dataset: Any, name: str) -> None:
        """Raise `TrainingFailed` for what a reference that is looked up cannot be right for, or would leave unread."""
        divided = divided_by(self)
        if self.ref_model is not None:
            why = "a ref_model, which nobody would run. Leave it out; precompute a cache of it if it is the reference"
        elif divided:
            why = f"{divided}, under which nobody has tried it. Use DistributedDataParallel, or one process"
        elif not hasattr(dataset, "__len__"):
            why = (
                f"{name} data that are a stream ({type(dataset).__name__}). Give a Dataset, whose rows can be looked up"
            )
        elif there := sorted(set(self._columns) & set(dataset.column_names)):
            why = f"{name} data that bring {' and '.join(there)}, which are made here. Remove the columns"
        else:
            return
        raise TrainingFailed(f"training with {type(self).__name__}: expected a reference from the cache, found {why}.")

    def _opened(self, rows: PreferenceRows) -> CacheView:
        """The cache as it is now, with all of these rows in it, and of the base of this model."""
        view = CacheView.paired(self._cache, self.model, _OBJECTIVE, rules=self._rules)
        is_first = self.cache_view is None
        if is_first:  # nothing has been trained yet
            view = view.held_against(self.model, untrained=True)
        rows.check(view.cache)
        if is_first and self._check:
            self._check_start(view, rows)
        if is_first and self.is_world_process_zero():
            self._tell(view, rows)
        self.cache_view = view
        return view

    def _check_start(self, view: CacheView, rows: PreferenceRows) -> None:
        """Raise `NotTheBase` unless the untrained model says of a few samples what the cache says."""
        spread = range(0, len(rows), max(1, len(rows) // NUM_PROBED))[:NUM_PROBED]
        samples = rows.samples(spread)
        if not samples or not view.rules.teacher_is_base:
            return
        try:
            self.step_zero = view.step_zero(self.model, samples)
        except NotTheBase as error:
            if "ref" not in getattr(self.model, "peft_config", {}):
                raise
            raise NotTheBase(
                f"{error} TRL's own reference would be the adapter that came with the model, as it is now. To train "
                "from there, merge it into the base, save that, and use a cache of it."
            ) from error

    def _computed_in(self) -> str:
        """The dtype of what is trained, and of the autocast that it is under where that is another."""
        held = str(causal_lm_of(self.model).dtype).removeprefix("torch.")
        autocast = {"bf16": "bfloat16", "fp16": "float16"}.get(self.accelerator.mixed_precision, held)
        return held if autocast == held else f"{held} under {autocast} autocast"

    def _tell(self, view: CacheView, rows: PreferenceRows) -> None:
        """Say once what could not be compared, and by what the sums differ from those that TRL would make."""
        said = [f"not compared: {'; '.join(view.left_out)}."] if view.left_out else []
        kept, computed = view.cache.manifest, self._computed_in()
        if computed != kept.model.dtype and view.rules.teacher_is_base:
            said.append(
                f"it is of the base in {kept.model.dtype}, and what is trained computes in {computed}, which moves "
                "every sum a little before the first step. Make a cache of the base as it is trained, or train as the "
                "cache was made (bf16=False, fp16=False, and a model in that dtype)."
            )
        if (rounded := PRECISIONS[kept.capture.precision]) is not None:
            longest = max((len(sample.positions) for sample in rows[:]), default=0)
            said.append(
                f"its log-probabilities are rounded to 1/{rounded.scalars} nat, which may put the sum of the longest "
                f"completion, {longest} tokens, off by {longest * rounded.max_scalar_error:.2g} nats, and as a rule by "
                f"{(longest / 3) ** 0.5 * rounded.max_scalar_error:.1g}. A cache of --precision exact does not."
            )
        for sentence in said:
            logger.warning("CachedReference with %s: %s", view.cache.path, sentence)


def _check_rules(trainer: str, rules: PairingRules | None) -> None:
    """Raise `InvalidSettings` for a vocabulary that is cut: the sums of both sides are over all of their own tokens."""
    if rules is not None and rules.ignore_padding:
        raise InvalidSettings(
            f"training with {trainer}: expected log-probabilities over one vocabulary, found PairingRules("
            "ignore_padding=True). TRL sums those of the model over its whole width, the cache has those over another, "
            "and every reward would be off by the difference. Use a model as wide as the base of the cache, or "
            "precompute a cache of the model as it is now, saved."
        )


def columns_of(trainer: type[Any]) -> tuple[str, ...]:
    """The columns of the TRL trainer below the mixin. Raises `TrainingFailed` for one that is not known, or changed."""
    below = trainer.__mro__[trainer.__mro__.index(CachedReference) + 1 :]
    of_trl = next((c for c in below if c.__module__.split(".")[0] == "trl"), None)
    known = None if of_trl is None else COLUMNS.get((of_trl.__module__, of_trl.__name__))
    owners = [next((c for c in below if method in vars(c)), None) for method in _METHODS]
    changed = [
        f"{owner.__module__}.{owner.__name__}.{method}" if owner is not None else f"no {method}"
        for method, owner in zip(_METHODS, owners, strict=True)
        if owner is not of_trl or getattr(vars(owner)[method], "__module__", None) != owner.__module__
    ]
    if known is not None and not changed:
        return known
    found = changed[0] if known is not None else "none of TRL" if of_trl is None else _named(of_trl)
    raise TrainingFailed(
        f"training with {trainer.__name__}: expected DPOTrainer or KTOTrainer of TRL 1.16 or later below "
        f"{CachedReference.__name__}, which read the reference's sums from their data, found {found}. What is read of "
        f"the cache there, and how, is not known. Put classes of your own above {CachedReference.__name__}."
    )


def _named(trainer: type[Any]) -> str:
    return f"{trainer.__module__}.{trainer.__name__}"
