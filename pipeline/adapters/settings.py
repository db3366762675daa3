"""Which adapter: every setting of it, and of the null space that one kind starts from, without PEFT.

Owns the names of the kinds and which settings each of them has; `registry` has their configurations. Must not import
torch or peft: the command line reads its options from these fields.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from logitcache.errors import InvalidSettings
from logitcache.settings import Derived, Settings, option

AdapterKind = Literal[
    "lora",
    "dora",
    "rslora",
    "gaussian",
    "orthogonal",
    "mica",
    "pissa",
    "olora",
    "milora",
    "corda",
    "lora-ga",
    "lora-null",
    "eva",
    "randlora",
    "vera",
    "adalora",
    "loftq",
    "none",
]
"""The kinds, those of PEFT that are refused with a reason, and none: every weight of the model is trained."""

NO_ADAPTER = "none"
"""The kind by which every weight of the model is trained; no row of `registry.KINDS`, see `training.full_weights`."""

Variant = Literal["v1", "v2", "base-intact"]
"""Of lora-null: train A and B; train B only; leave W as it is, with B = 0 and A = U, the null space."""

VARIANTS: tuple[Variant, ...] = get_args(Variant)

EVEN_RANK = frozenset({"orthogonal"})
"""Kinds of even rank only."""

NO_ALPHA = frozenset({"vera"})
"""Kinds whose scale is trained."""

REFUSED = {
    "loftq": "LoftQ replaces the weights by quantised ones, which differ from the original in full rank: it does not "
    "start at the base, and no adapter of the original weights computes what it trains. Use lora, or pissa",
}
"""Kinds of PEFT that are left out, and why."""


@dataclass(frozen=True)
class AdapterSettings(Settings):
    """The adapter on a model. alpha and variant, where they are not given, are what the kind and the rank make them."""

    kind: AdapterKind = option(
        "lora",
        "Kind of adapter (docs/adapters.md); none: every weight of the model is trained.",
        flag="adapter",
    )
    rank: int = option(16, "Rank of the adapter.", at_least=1)
    alpha: float | None = option(None, "Scale of the adapter is alpha / rank.  [default: 2 * rank]", above=0)
    dropout: float = option(0.0, "Dropout on the adapter's input.", at_least=0, at_most=1)
    target_modules: str = option(
        "all-linear",
        "Layers to adapt: all-linear (all but the output head), or names separated by commas.",
    )
    nullspace: str = option("", "Null spaces made by `logitcache nullspace`; for --adapter lora-null.", metavar="DIR")
    variant: Variant | None = option(
        None, "Of lora-null: train A and B; B only; leave the base's weights as they are.  [default: v1]"
    )

    @property
    def scale(self) -> float:
        """alpha as a number."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    def derived(self) -> dict[str, object]:
        """alpha is twice the rank, and lora-null's variant the first, where they were not given."""
        found: dict[str, object] = {}
        if (self.alpha is None or isinstance(self.alpha, Derived)) and self.kind not in NO_ALPHA | {NO_ADAPTER}:
            found["alpha"] = Derived(2.0 * self.rank)
        if self.variant is None and self.kind == "lora-null":
            found["variant"] = "v1"
        return found

    def check_together(self) -> None:
        """Raise `InvalidSettings` for an adapter that no model could be given."""
        what = f"preparing adapter {self.kind}"
        if self.kind in REFUSED:
            raise InvalidSettings(f"{what}: {REFUSED[self.kind]}.")
        if self.kind != "lora-null" and (self.nullspace or self.variant is not None):
            raise InvalidSettings(f"--nullspace and --variant are for --adapter lora-null, not for {self.kind}.")
        if self.kind == NO_ADAPTER:
            self._check_nothing_given()
        if self.kind == "lora-null" and not self.nullspace:
            raise InvalidSettings(
                "--adapter lora-null needs --nullspace: it starts from a null space. Make one with "
                "`logitcache nullspace`."
            )
        if self.kind in EVEN_RANK and self.rank % 2:
            raise InvalidSettings(f"{what}: expected an even rank, found {self.rank}. Use --rank {self.rank + 1}.")
        if self.kind in NO_ALPHA and self.alpha is not None:
            raise InvalidSettings(
                f"--alpha has no place in --adapter {self.kind}, whose scale is trained. Leave it out."
            )

    def _check_nothing_given(self) -> None:
        for name, default in (("rank", 16), ("alpha", None), ("dropout", 0.0), ("target_modules", "all-linear")):
            if getattr(self, name) != default:
                raise InvalidSettings(
                    f"--{name.replace('_', '-')} has no place in --adapter none, which trains every weight. "
                    "Leave it out."
                )


@dataclass(frozen=True)
class NullSpaceSettings(Settings):
    """How the directions that a model's layers leave unused are found."""

    rank: int = option(16, "Directions an input; that of training.", at_least=1)
    max_samples: int = option(256, "Samples, spread over the data.", at_least=1)
    max_length: int = option(1024, "Tokens a sample; the rest is cut.", at_least=2)
    batch_tokens: int = option(8192, "Tokens a forward, with padding.", at_least=1)
    memory_limit: float = option(
        4.0, "GiB of covariances at a time; what does not fit takes another pass over the text.", above=0
    )

    @property
    def memory_bytes(self) -> int:
        """memory_limit in bytes."""
        return int(self.memory_limit * 2**30)
