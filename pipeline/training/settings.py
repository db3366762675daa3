"""A training run as settings: how long and how fast, what holds it to the base, and all parts of a run together.

Owns the flat names by which the command line, `--config` and a sweep set a run (`run_settings`), and the rules between
the parts. Must not import torch, transformers or peft.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, get_args

from logitcache.adapters.settings import NO_ADAPTER as NO_ADAPTER
from logitcache.adapters.settings import NO_PLACE as NO_PLACE
from logitcache.adapters.settings import AdapterSettings
from logitcache.adapters.settings import without_place as without_place
from logitcache.errors import InvalidSettings
from logitcache.losses.objective import OWN_WEIGHT, WEIGHT_FORMS, Objective, Regularizer, Tail
from logitcache.models.settings import LoadSettings
from logitcache.pairing.settings import PairingRules
from logitcache.settings import Setting, Settings, line_settings, option

from .trainer_settings import TrainerSettings

PenaltyKind = Literal["l2-sp", "ewc"]
PENALTIES: tuple[str, ...] = get_args(PenaltyKind)
AnchorRegularizer = Literal["full-kl", "masked-kl", "masked-reverse-kl", "masked-js"]

MEMORY = "Memory"
"""Heading of the help, of what a step may take."""
BestBy = Literal["new-ce", "prior-ce", "prior-kl"]
"""What an evaluation while training finds, by which one of them may be the best: the lowest is."""

BudgetOf = Literal["new", "prior"]

HIGH_LR = 1.0
"""Above this no fine-tuning is known to learn anything."""


@dataclass(frozen=True)
class TrainSettings(Settings):
    """How long and how fast: AdamW, cosine, 3 % warm-up, no weight decay."""

    heading: ClassVar[str] = "Training"

    lr: float = option(2e-4, "Peak learning rate (cosine, 3 % warm-up).", at_least=0)
    epochs: float = option(1.0, "Passes over the samples.", above=0)
    batch_size: int = option(8, "Samples a device and optimizer step, --grad-accum times.", at_least=1)
    grad_accum: int = option(1, "Batches of --batch-size an optimizer step.", at_least=1)
    seed: int = option(0, "Seed of the adapter and of the order of samples.", at_least=0, at_most=2**32 - 1)
    max_steps: int = option(-1, "Optimizer steps; -1: as --epochs says.", at_least=-1)
    log_every: int = option(10, "Steps between log entries.", at_least=1)
    top_k: int | None = option(
        None,
        "Alternatives a position to read; the others join the tail.  [default: all that the cache has]",
        at_least=0,
        heading=Objective.heading,
    )

    batch_tokens: int = option(
        2048,
        "Tokens in one forward, padding included: the samples of --batch-size go in as many micro-batches, sorted "
        "by length; a longer sample goes alone.",
        at_least=1,
        heading=MEMORY,
    )
    gradient_checkpointing: bool = option(
        False,
        "Keep the input of each layer alone and run the layer again in the backward: less memory, a third more time "
        "(docs/how-to/memory.md).",
        heading=MEMORY,
    )

    def check_together(self) -> None:
        """Raise `InvalidSettings` where nothing would be trained."""
        if self.max_steps == 0:
            raise InvalidSettings("--max-steps 0 would train nothing: give a positive number, or -1 for --epochs.")

    def doubts(self) -> list[str]:
        """A learning rate at which training is known to diverge."""
        if self.lr <= HIGH_LR:
            return []
        return [f"--lr {self.lr:g} is above {HIGH_LR:g}: AdamW moves every weight by about that much a step."]


@dataclass(frozen=True)
class PenaltySettings(Settings):
    """loss = mean cross-entropy (+ a regulariser) + weight * penalty.

    l2-sp: 1/2 * sum over adapted layers of ||DeltaW||_F^2 (Li et al. 2018, arXiv 1802.01483).
    ewc: 1/2 * sum F_ij DeltaW_ij^2 (Kirkpatrick et al. 2017, arXiv 1612.00796), F as `fisher_diagonal` says.
    """

    kind: PenaltyKind = option("l2-sp", "What is added up of the change of the weights.", on_line=False)
    weight: float = option(1.0, "Loss per unit of the penalty.", at_least=0, on_line=False)
    num_fisher_samples: int = option(
        64, "Samples of the new data from which ewc's Fisher information is made.", at_least=1, on_line=False
    )


@dataclass(frozen=True)
class AnchorSettings(Settings):
    """loss = that of the new data + weight * mean KL to the base over samples of an anchor cache.

    An anchor cache holds what the base says far from the new data: its samples are those of the cache's data sets, and
    nothing is learnt of them. The mean is over their own positions of the whole optimizer step.
    """

    heading: ClassVar[str] = "Anchors"

    weight: float = option(
        4.0,
        "Weight of the KL on the samples of the anchor cache; given once for each, or once for all. In a sweep 0 is a "
        "run without anchors.",
        at_least=0,
        flag="anchor_weight",
    )
    batch: int = option(
        4,
        "Samples of each anchor cache an optimizer step, over all its micro-batches and processes.",
        at_least=1,
        flag="anchor_batch",
    )
    every: int = option(1, "Optimizer steps from one with anchors to the next.", at_least=1, flag="anchor_every")
    regularizer: AnchorRegularizer = option(
        "full-kl",
        "What is compared with the base on them; masked-*: without the true token.",
        flag="anchor_regularizer",
    )


@dataclass(frozen=True)
class EvalSettings(Settings):
    """What is measured while training, on text that is not learnt, and what follows from it.

    new-ce is the cross-entropy on --eval-data; prior-ce and prior-kl are the cross-entropy and the KL to the base on
    the probe cache --eval-prior.
    """

    heading: ClassVar[str] = "Evaluation while training"

    eval_split: str = option("", "Split of --eval-data.  [default: that of --split]", metavar="NAME")
    eval_steps: int | None = option(
        None,
        "Optimizer steps from one evaluation on --eval-data and --eval-prior to the next; the last step has one too.  "
        "[default: a tenth of the steps]",
        at_least=1,
    )
    best_by: BestBy | None = option(
        None, "Keep the weights of the evaluation at which this was lowest, in place of those of the last step."
    )
    patience: int | None = option(
        None, "Stop after so many evaluations in a row without a new lowest --best-by.", at_least=1
    )
    stop_at_prior_kl: float | None = option(
        None,
        "Stop at the first evaluation whose KL to the base on --eval-prior is at least this, nats a token; of "
        "--best-by, evaluations below it alone count.",
        above=0,
    )

    kl_budget_of: BudgetOf = option(
        "new",
        "What --kl-budget bounds. new: the regulariser on the training data, at every step; prior: the KL to the base "
        "on --eval-prior, at every evaluation.",
    )

    def check_together(self) -> None:
        """Raise `InvalidSettings` for a patience with nothing to wait for."""
        if self.patience is not None and self.best_by is None:
            raise InvalidSettings("--patience waits for a new lowest --best-by: give --best-by, or leave it out.")

    def check_budget(self, kl_budget: float | None) -> None:
        """Raise `InvalidSettings` where a budget is to be of something and there is none."""
        if self.kl_budget_of == "prior" and kl_budget is None:
            raise InvalidSettings(
                "--kl-budget-of prior says what --kl-budget bounds: give --kl-budget, or leave it out."
            )

    def budget_of_steps(self, kl_budget: float | None) -> float | None:
        """The budget, where it is of the KL of the training data."""
        return kl_budget if self.kl_budget_of == "new" else None

    def check_texts(self, has_new: bool, has_prior: bool) -> None:
        """Raise `InvalidSettings` for what needs a text that is not given."""
        if not has_new and self.eval_split:
            raise InvalidSettings("--eval-split is of --eval-data: give --eval-data, or leave it out.")
        if not has_new and self.best_by == "new-ce":
            raise InvalidSettings("--best-by new-ce is measured on --eval-data: give --eval-data, or leave it out.")
        if not has_prior and self.best_by in ("prior-ce", "prior-kl"):
            raise InvalidSettings(f"--best-by {self.best_by} is measured on --eval-prior: give it, or leave it out.")
        if not has_prior and self.stop_at_prior_kl is not None:
            raise InvalidSettings("--stop-at-prior-kl is measured on --eval-prior: give it, or leave it out.")
        if not has_prior and self.kl_budget_of == "prior":
            raise InvalidSettings("--kl-budget-of prior is measured on --eval-prior: give it, or leave it out.")
        if not (has_new or has_prior) and self.eval_steps is not None:
            raise InvalidSettings(
                "--eval-steps is of an evaluation while training: give --eval-data or --eval-prior, or leave it out."
            )


@dataclass(frozen=True)
class RunSettings(Settings):
    """Every setting of a training run. The command line and a sweep make it of flat names: `of`."""

    #: What the loss is.
    objective: Objective = field(default_factory=Objective)
    #: What pulls the weights to the base's, in addition.
    penalty: PenaltySettings | None = None
    #: What holds it to the base on samples of other caches; without effect where there are none.
    anchor: AnchorSettings = field(default_factory=AnchorSettings)
    #: What is trained.
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    #: How long and how fast.
    training: TrainSettings = field(default_factory=TrainSettings)
    #: What the Trainer is told beside.
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    #: What is measured while it is trained.
    evaluation: EvalSettings = field(default_factory=EvalSettings)
    #: How the cache belongs to the model.
    pairing: PairingRules = field(default_factory=PairingRules)
    #: How the model is held.
    loading: LoadSettings = field(default_factory=LoadSettings)

    @classmethod
    def of(cls, values: Mapping[str, Any], has_groups: bool = False) -> "RunSettings":
        """From flat names, those of `run_settings`; what is absent, or None and may not be, has its default.

        regularizer may be a penalty, whose weight is then `weight`; tail may be auto, which is groups where the cache
        has them (has_groups) or the regulariser is of nothing else.
        """
        chosen = {name: value for name, value in values.items() if value is not None}
        regularizer, penalty = chosen.get("regularizer"), None
        if chosen.get("tail") == "auto":
            chosen["tail"] = "groups" if has_groups or regularizer == "tad" else "bucket"
        if regularizer in PENALTIES:
            if chosen.get("label_smoothing"):
                raise InvalidSettings(f"--label-smoothing goes with --regularizer none, not with {regularizer}.")
            if "kl_budget" in chosen:
                raise InvalidSettings(f"--kl-budget needs a KL regularizer; {regularizer} has none. Leave it out.")
            penalty = PenaltySettings(regularizer, chosen.pop("weight", 1.0))
            chosen["regularizer"] = "none"
        made = {
            name: owner(**{s.name: chosen[s.key] for s in line_settings(owner) if s.key in chosen})
            for name, owner in PARTS.items()
        }
        return cls(penalty=penalty, **made)

    def check_together(self) -> None:
        """Raise `InvalidSettings` for parts that do not go together."""
        whole, packed = self.adapter.kind == NO_ADAPTER, self.loading.load_in
        if whole and packed is not None:
            raise InvalidSettings(
                f"--load-in {packed} with --adapter none: quantised weights cannot be trained. Give an adapter."
            )
        if self.penalty is not None and (whole or packed is not None):
            raise InvalidSettings(
                f"--regularizer {self.penalty.kind} is on what an adapter changes of weights that can be read: not "
                "with --adapter none or --load-in."
            )
        self.evaluation.check_budget(self.objective.kl_budget)
        self.trainer.check_budget(self.evaluation.budget_of_steps(self.objective.kl_budget))
        if self.pairing.ignore_padding and not self.pairing.teacher_is_not_base:
            raise InvalidSettings(
                "--ignore-padding is for --teacher-is-not-base: a base has the widths of its own cache."
            )
        if self.pairing.teacher_is_not_base and not self.objective.reads_base:
            named = "none" if self.penalty is None else self.penalty.kind
            raise InvalidSettings(
                f"--teacher-is-not-base with --regularizer {named}: nothing is learnt from the teacher."
            )


PARTS: dict[str, Any] = {
    "pairing": PairingRules,
    "objective": Objective,
    "anchor": AnchorSettings,
    "adapter": AdapterSettings,
    "training": TrainSettings,
    "trainer": TrainerSettings,
    "evaluation": EvalSettings,
    "loading": LoadSettings,
}
"""The parts of a run that have flags, in the order of `train --help`."""


def without_base(values: Mapping[str, Any]) -> bool:
    """Whether the loss of a run without a regulariser, by its flat names, reads nothing of the base at all."""
    weight = WEIGHT_FORMS.get(values.get("ce_weight") or "none", OWN_WEIGHT)
    return values.get("regularizer") == "none" and not weight.reads_base


REGULARIZERS = (*get_args(Regularizer)[:-1], *PENALTIES, "none")
"""Of the loss, or of the weights."""

TAILS = ("auto", *get_args(Tail))

RECIPES: dict[str, dict[str, Any]] = {
    "asft": {"regularizer": "full-kl", "ce_weight": "dft", "weight": 0.05},
}
"""Published methods as settings, by the flat names of a run; what is given beside a recipe wins.

asft: Anchored Supervised Fine-Tuning (arXiv 2509.23753), sg(q(y)) CE + w KL(p || q), each a mean over the supervised
tokens; w as its authors' repository runs it (`--kl_weight 0.05`; LLaMA-Factory's default is .1).
"""


def run_settings(*parts: str) -> dict[str, Setting]:
    """The settings of a run by their flat names: of these parts, or all. A regulariser may be a penalty, a tail auto.

    Raises KeyError for a part that is none.
    """
    found = {s.key: s for part in parts or PARTS for s in line_settings(PARTS[part])}
    for name, choices in (("regularizer", REGULARIZERS), ("tail", TAILS)):
        if name in found:
            found[name] = replace(found[name], choices=choices)
    return found
