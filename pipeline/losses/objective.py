"""What the loss is: every setting that decides it, without the tensors.

Owns the names of the regularisers, tails and weightings, and which of them go together. `formulas` and `fused` compute
what stands here; docs/loss.md derives it. Must not import torch: the command line reads its options from these fields.
"""

from dataclasses import dataclass
from typing import Literal

from logitcache.errors import InvalidSettings
from logitcache.settings import Settings, option

Regularizer = Literal["masked-kl", "masked-reverse-kl", "masked-js", "full-kl", "none"]
Tail = Literal["bucket", "groups", "renormalize", "sampled"]
Weighting = Literal["uniform", "non-target-mass"]
KLPositions = Literal["supervised", "all"]


@dataclass(frozen=True)
class Objective(Settings):
    """loss = mean cross-entropy + weight * mean regulariser; all that decides it.

    regularizer: masked-kl is KL(p || q) over V without y (arXiv 2605.29498, eq. 1); masked-reverse-kl is KL(q || p)
    there; masked-js their Jensen-Shannon divergence; full-kl is KL(p || q) with y. tail: bucket is T as one outcome;
    groups T's part in each group of the vocabulary; renormalize nothing, each side renormalised on S; sampled draws
    from the base's own tail. temperature: of both sides, the value times its square (Hinton et al. 2015).
    kl_positions: where the regulariser counts, at the supervised positions or at all of a document that has some; the
    cross-entropy counts at the supervised ones. min_base_rest leaves positions out of value and count (1e-4 in the
    paper); min_adapted_rest makes them 0 (the paper clamps at 1e-6; log space needs none).
    """

    regularizer: Regularizer = option(
        "masked-kl",
        "masked-*: to the base without the true token, KL, reverse KL or Jensen-Shannon; full-kl: with it; l2-sp: "
        "half the squared change of the adapted weights; ewc: the same weighted by their Fisher information from the "
        "new data; none: plain cross-entropy.",
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

    @property
    def masked(self) -> bool:
        """Whether the label is no outcome."""
        return self.regularizer.startswith("masked")

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
        if self.tail == "sampled" and self.regularizer in ("masked-reverse-kl", "masked-js"):
            raise InvalidSettings(
                f"{self.regularizer} with tail sampled: draws from the base estimate forward KL only. Use another tail."
            )
