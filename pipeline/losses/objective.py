"""What the loss is: every setting that decides it, without the tensors.

Owns the names of the regularisers, tails and weights, and which of them go together. `formulas`, `weights` and `fused`
compute what stands here; docs/loss.md derives it. Must not import torch: the command line reads its options from these
fields.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from logitcache.errors import InvalidSettings
from logitcache.settings import Derived, Settings, names_function, option

Regularizer = Literal["masked-kl", "masked-reverse-kl", "masked-js", "full-kl", "dkd", "tad", "none"]
Tail = Literal["bucket", "groups", "renormalize", "sampled"]
Weighting = Literal["uniform", "non-target-mass"]
KLPositions = Literal["supervised", "all"]
CEWeight = Literal["none", "dft", "stm", "eaft", "eaft-base", "rho1", "data"]


@dataclass(frozen=True)
class WeightForm:
    """What is to be known of a weight of the cross-entropy beside its formula, which is in `weights`."""

    #: Whether it needs what a cache says of the token.
    reads_base: bool = False
    #: Whether the mean is over the tokens that it keeps; else over all that are supervised.
    over_kept: bool = False
    #: The number in its formula, as published; None where it has none.
    published: float | None = None
    #: Bounds of that number.
    least: float = 0.0
    most: float = float("inf")


WEIGHT_FORMS: dict[str, WeightForm] = {
    "none": WeightForm(),
    "dft": WeightForm(),
    "stm": WeightForm(reads_base=True, over_kept=True, published=2.5, least=1.0),
    "eaft": WeightForm(published=1.0),
    "eaft-base": WeightForm(reads_base=True, published=1.0),
    "rho1": WeightForm(reads_base=True, over_kept=True, published=0.6, most=1.0),
    "data": WeightForm(over_kept=True),
}
"""By the name of the weight."""

OWN_WEIGHT = WeightForm(reads_base=True)
"""Of a formula of the user's own."""


@dataclass(frozen=True)
class Objective(Settings):
    """loss = mean cross-entropy + weight * mean regulariser; all that decides it.

    regularizer: masked-kl is KL(p || q) over V without y (arXiv 2605.29498, eq. 1); masked-reverse-kl is KL(q || p)
    there; masked-js their Jensen-Shannon divergence; full-kl is KL(p || q) with y; dkd is masked-kl + label_weight *
    KL of (p(y), 1 - p(y)) (Decoupled Knowledge Distillation, CVPR 2022); tad is full-kl with its part within T times
    tail_weight (tail-aware distillation, arXiv 2602.20816). tail: bucket is T as one outcome; groups T's part in each
    group of the vocabulary; renormalize nothing, each side renormalised on S; sampled draws from the base's own tail.
    temperature: of both sides, the value times its square (Hinton et al. 2015).
    kl_positions: where the regulariser counts, at the supervised positions or at all of a document that has some; the
    cross-entropy counts at the supervised ones. min_base_rest leaves positions out of value and count (1e-4 in the
    paper); min_adapted_rest makes them 0 (the paper clamps at 1e-6; log space needs none). ce_weight: by what each
    token's cross-entropy is multiplied, a constant for the gradient (`weights`); ce_weight_value: the number in its
    formula. regularizer and ce_weight may name a function of one's own (docs/how-to/your-own-loss.md).
    """

    regularizer: str = option(
        "masked-kl",
        "masked-*: to the base without the true token, KL, reverse KL or Jensen-Shannon; full-kl: with it; dkd: "
        "masked-kl and --label-weight times the KL of the true token against the rest; tad: full-kl with its part "
        "within the tail times --tail-weight; l2-sp: half the squared change of the adapted weights; ewc: the same "
        "weighted by their Fisher information from the new data; none: plain cross-entropy. FILE.py:FUNCTION: a "
        "divergence of your own (docs/how-to/your-own-loss.md).",
        choices=get_args(Regularizer),
        or_function=True,
    )
    tail: Tail = option(
        "bucket",
        "Tokens beyond the top-k: one outcome together; one a group of the vocabulary; left out with the rest "
        "renormalised; by draws. auto: groups where the cache has them, else bucket.",
    )
    weight: float = option(1.0, "Weight of the regulariser.", at_least=0)
    temperature: float = option(1.0, "Of both distributions; other than 1 only with --tail renormalize.", above=0)
    weighting: Weighting = option("uniform", "Weight of a position: the same, or 1 - p(true token).")
    kl_positions: KLPositions = option(
        "supervised",
        "Where the regulariser counts: where the cross-entropy does; all: at prompt positions too, if they are cached "
        "(precompute --kl-positions all).",
    )
    min_base_rest: float = option(
        1e-4,
        "Leave out positions where the base leaves less than this beside the true token (masked-*).",
        at_least=0,
        at_most=1,
    )
    min_adapted_rest: float = option(
        0.0,
        "No regularisation where the adapted model leaves less than this beside the true token (masked-*).",
        at_least=0,
        at_most=1,
    )
    kl_budget: float | None = option(
        None,
        "Nats a position: adapt the weight, from --weight on, so that the mean regulariser meets this.",
        above=0,
    )
    tokens_per_loss_chunk: int | None = option(
        None,
        "Positions whose logits are alive at a time.  [default: as many as fit a fixed size]",
        at_least=1,
        on_line=False,
    )
    label_smoothing: float = option(
        0.0,
        "Share of the true token's mass that is spread over the vocabulary; with --regularizer none.",
        at_least=0,
        below=1,
    )
    ce_weight: str = option(
        "none",
        "Weight of each token's cross-entropy. dft: the student's own probability of it; stm: tokens that the base "
        "finds too unlikely are dropped; eaft: the student's entropy over its 20 best; eaft-base: the base's; rho1: "
        "the share of a sample that is furthest behind the base; data: what the rows bring (loss_scale, weights). "
        "FILE.py:FUNCTION: of your own (docs/how-to/your-own-loss.md).",
        choices=get_args(CEWeight),
        or_function=True,
    )
    ce_weight_value: float | None = option(
        None,
        "Of --ce-weight: the perplexity above which stm drops (2.5), the power of eaft and eaft-base (1), the share "
        "that rho1 keeps (.6).  [default: as published]",
        above=0,
    )

    label_weight: float = option(
        1.0,
        "Of dkd: weight of the part about the true token, KL of (p(y), 1 - p(y)), beside that about the others.",
        at_least=0,
    )
    tail_weight: float | None = option(
        None,
        "Of tad, which has no default: factor of the part within the tail, b over the mean mass of the tail.",
        above=0,
    )

    @property
    def weight_form(self) -> WeightForm:
        """What is known of the weight of the cross-entropy."""
        return WEIGHT_FORMS.get(self.ce_weight, OWN_WEIGHT)

    @property
    def reads_base(self) -> bool:
        """Whether the loss needs what the base says, so that there must be a cache."""
        return self.regularizer != "none" or self.weight_form.reads_base

    @property
    def reader(self) -> str:
        """What of it needs what the base says, by its name."""
        return self.regularizer if self.regularizer != "none" else f"--ce-weight {self.ce_weight}"

    @property
    def own_formulas(self) -> tuple[str, ...]:
        """Functions of the user's own, as FILE.py:FUNCTION."""
        return tuple(name for name in (self.regularizer, self.ce_weight) if names_function(name))

    def derived(self) -> dict[str, object]:
        """The number of a weight is the published one where it was not given."""
        given = self.ce_weight_value is not None and not isinstance(self.ce_weight_value, Derived)
        published = self.weight_form.published
        return {} if given else {"ce_weight_value": None if published is None else Derived(published)}

    @property
    def masked(self) -> bool:
        """Whether the label is no outcome."""
        return self.regularizer.startswith("masked")

    @property
    def compares_rest(self) -> bool:
        """Whether the others are compared as they are without the label, which takes some mass beside it."""
        return self.masked or self.regularizer == "dkd"

    @property
    def part_weight(self) -> float:
        """Of the part of the divergence that has a weight of its own: dkd's label, tad's tail; else 1."""
        return self.label_weight if self.tail_weight is None else self.tail_weight

    def check_together(self) -> None:
        """Raise `InvalidSettings` for a combination that is not defined."""
        none = self.regularizer == "none"
        if none and self.weight not in (0.0, 1.0):
            raise InvalidSettings(
                f"--weight {self.weight:g} with --regularizer none: there is no regulariser to weigh. Leave it out."
            )
        if none and self.kl_budget is not None:
            raise InvalidSettings(
                "--kl-budget needs a KL regularizer; none has none, and an anchor's weight is not moved. Leave it out."
            )
        if none and self.kl_positions != "supervised":
            raise InvalidSettings(
                "--kl-positions all with --regularizer none: there is no regulariser at any position. Leave it out."
            )
        if self.label_smoothing and not none:
            raise InvalidSettings(
                f"--label-smoothing goes with --regularizer none, not with {self.regularizer}: they would be two "
                "answers to what the tokens beside the label should be. Use regularizer none."
            )
        if self.temperature != 1 and self.tail != "renormalize":
            raise InvalidSettings(
                f"temperature {self.temperature:g} with tail {self.tail}: the mass of a tail at another temperature "
                "does not follow from its mass at 1. Use tail renormalize."
            )
        forward_only = self.regularizer in ("masked-reverse-kl", "masked-js") or names_function(self.regularizer)
        if self.tail == "sampled" and forward_only:
            raise InvalidSettings(
                f"{self.regularizer} with tail sampled: draws from the base estimate forward KL only. Use another tail."
            )
        self._check_dkd()
        self._check_tad()
        self._check_weight()

    def _check_dkd(self) -> None:
        if self.regularizer != "dkd":
            if self.label_weight != 1.0:
                raise InvalidSettings(
                    f"--label-weight {self.label_weight:g} with --regularizer {self.regularizer}: it is of dkd. Leave "
                    "it out."
                )
            return
        if self.tail in ("renormalize", "sampled") or self.weighting != "uniform":
            what = f"tail {self.tail}" if self.weighting == "uniform" else f"weighting {self.weighting}"
            raise InvalidSettings(
                f"dkd with {what}: its two parts are of the whole distribution, each with a weight of its own. Use "
                "tail bucket or groups and weighting uniform."
            )

    def _check_tad(self) -> None:
        if self.regularizer != "tad":
            if self.tail_weight is not None:
                raise InvalidSettings(
                    f"--tail-weight {self.tail_weight:g} with --regularizer {self.regularizer}: it is of tad. Leave it "
                    "out."
                )
            return
        if self.tail != "groups" or self.weighting != "uniform":
            what = f"tail {self.tail}" if self.tail != "groups" else f"weighting {self.weighting}"
            raise InvalidSettings(
                f"tad with {what}: it weighs what is within the tail, which only groups tell, as a part of the whole "
                "distribution. Use tail groups (precompute --tail-groups) and weighting uniform."
            )
        if self.tail_weight is None:
            raise InvalidSettings(
                "tad without --tail-weight: 1 is full-kl, and no other number fits every cache. Give b over the mean "
                "mass of the tail."
            )

    def _check_weight(self) -> None:
        form, value = self.weight_form, self.ce_weight_value
        if self.label_smoothing and self.ce_weight != "none":
            raise InvalidSettings(
                f"--label-smoothing with --ce-weight {self.ce_weight}: no weight is defined of a smoothed label. Leave "
                "one of them out."
            )
        if value is not None and form.published is None:
            raise InvalidSettings(
                f"--ce-weight-value {value:g} with --ce-weight {self.ce_weight}, whose formula has no number. Leave it "
                "out."
            )
        if value is not None and not form.least <= value <= form.most:
            bounds = (
                f"from {form.least:g} to {form.most:g}" if form.most < float("inf") else f"of {form.least:g} or more"
            )
            raise InvalidSettings(
                f"--ce-weight-value {value:g} with --ce-weight {self.ce_weight}: expected a number {bounds}. Give "
                "another."
            )
