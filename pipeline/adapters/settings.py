"""Which adapter: every setting of it, and of the null space that one kind starts from, without PEFT.

Owns the names of the kinds and which settings each of them has; `registry` has their configurations. Must not import
torch or peft: the command line reads its options from these fields.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

from logitcache.errors import InvalidSettings
from logitcache.settings import Derived, Settings, option, settings_of

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
    "oft",
    "loftq",
    "none",
]
"""The kinds, those of PEFT that are refused with a reason, and none: every weight of the model is trained."""

NO_ADAPTER = "none"
"""The kind by which every weight of the model is trained; no row of `registry.KINDS`, see `training.full_weights`."""

Variant = Literal["v1", "v2", "base-intact"]
"""Of lora-null: train A and B; train B only; leave W as it is, with B = 0 and A = U, the null space."""

VARIANTS: tuple[Variant, ...] = get_args(Variant)

Cayley = Literal["neumann", "exact"]
"""Of oft: how a rotation R is made of a skew-symmetric matrix Q. neumann: (I + Q)(I + Q + Q^2 + Q^3), PEFT's default,
whose R R^T is (I - Q^4)^2; exact: (I - Q)(I + Q)^-1, by a solve a block and forward."""

EVEN_RANK = frozenset({"orthogonal"})
"""Kinds of even rank only."""

_EVERY_WEIGHT = "which trains every weight"

NO_PLACE: dict[str, dict[str, str]] = {
    NO_ADAPTER: dict.fromkeys(("rank", "alpha", "dropout", "target_modules"), _EVERY_WEIGHT),
    "vera": {"alpha": "whose scale is trained"},
    "oft": {
        "rank": "whose size is --block-size",
        "alpha": "whose rotations have no scale",
        "dropout": "for which PEFT makes a dropout that no forward applies",
    },
}
"""Settings of adapters that a kind does not have, and why."""

OWN: dict[str, tuple[str, ...]] = {"lora-null": ("nullspace", "variant"), "oft": ("block_size", "cayley")}
"""Settings that one kind alone has."""

REFUSED = {
    "loftq": "LoftQ replaces the weights by quantised ones, which differ from the original in full rank: it does not "
    "start at the base, and no adapter of the original weights computes what it trains. Use lora, or pissa",
}
"""Kinds of PEFT that are left out, and why."""


@dataclass(frozen=True)
class AdapterSettings(Settings):
    """The adapter on a model. alpha, variant, block_size and cayley, where not given, follow from kind and rank."""

    heading: ClassVar[str] = "Adapter"

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
    block_size: int | None = option(
        None,
        "Of oft: inputs of a layer that are rotated together; it divides those of every adapted layer.  [default: 32]",
        at_least=2,
    )
    cayley: Cayley | None = option(
        None,
        "Of oft: rotations by PEFT's sum of five terms, orthogonal to the fourth order, or exactly by a solve in every "
        "forward.  [default: neumann]",
    )

    modules_to_save: str = option(
        "",
        "Modules that are trained whole beside the adapter and saved with it, names separated by commas: lm_head, say.",
        on_line=False,
        metavar="NAMES",
    )

    @property
    def whole_modules(self) -> list[str]:
        """The names of modules_to_save."""
        return [name.strip() for name in self.modules_to_save.split(",")] if self.modules_to_save else []

    @property
    def scale(self) -> float:
        """alpha as a number."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    def derived(self) -> dict[str, object]:
        """alpha is twice the rank, and what one kind alone has is its first or PEFT's, where they were not given."""
        found: dict[str, object] = {}
        if (self.alpha is None or isinstance(self.alpha, Derived)) and "alpha" not in self.no_place:
            found["alpha"] = Derived(2.0 * self.rank)
        if self.variant is None and self.kind == "lora-null":
            found["variant"] = "v1"
        if self.kind == "oft":
            found["block_size"] = 32 if self.block_size is None else self.block_size  # PEFT's, and PEFT-Arena's
            found["cayley"] = "neumann" if self.cayley is None else self.cayley
        return found

    def described(self) -> dict[str, Any]:
        """The settings that this kind has, by their names."""
        foreign = {name for kind, names in OWN.items() if kind != self.kind for name in names}
        return {k: v for k, v in asdict(self).items() if k not in foreign and k not in self.no_place}

    @property
    def no_place(self) -> dict[str, str]:
        """Settings that this kind does not have, and why."""
        return NO_PLACE.get(self.kind, {})

    def check_together(self) -> None:
        """Raise `InvalidSettings` for an adapter that no model could be given."""
        what = f"preparing adapter {self.kind}"
        if self.kind in REFUSED:
            raise InvalidSettings(f"{what}: {REFUSED[self.kind]}.")
        for kind, (one, other) in OWN.items():
            if self.kind != kind and (getattr(self, one) or getattr(self, other) is not None):
                one, other = (f"--{name.replace('_', '-')}" for name in (one, other))
                raise InvalidSettings(f"{one} and {other} are for --adapter {kind}, not for {self.kind}.")
        self._check_nothing_without_place()
        if self.modules_to_save and not all(self.whole_modules):
            raise InvalidSettings(
                f"--modules-to-save {self.modules_to_save!r:.200}: expected names separated by commas, found an empty "
                "one. Take a comma out."
            )
        if self.modules_to_save and self.kind == NO_ADAPTER:
            raise InvalidSettings("--modules-to-save has no place in --adapter none, which trains every weight.")
        if self.kind == "lora-null" and not self.nullspace:
            raise InvalidSettings(
                "--adapter lora-null needs --nullspace: it starts from a null space. Make one with "
                "`logitcache nullspace`."
            )
        if self.kind in EVEN_RANK and self.rank % 2:
            raise InvalidSettings(f"{what}: expected an even rank, found {self.rank}. Use --rank {self.rank + 1}.")

    def _check_nothing_without_place(self) -> None:
        for setting in settings_of(type(self)):
            if setting.name in self.no_place and getattr(self, setting.name) != setting.default:
                raise InvalidSettings(without_place(self.kind, setting.name))


def without_place(kind: str, name: str) -> str:
    """What is said of a setting that a kind does not have."""
    return f"--{name.replace('_', '-')} has no place in --adapter {kind}, {NO_PLACE[kind][name]}. Leave it out."


Products = Literal["float64", "float32"]


@dataclass(frozen=True)
class NullSpaceSettings(Settings):
    """How the directions that a model's layers leave unused are found."""

    heading: ClassVar[str] = "Null spaces"

    rank: int = option(16, "Directions an input; that of training.", at_least=1)
    max_samples: int = option(256, "Samples, spread over the data.", at_least=1)
    max_length: int = option(1024, "Tokens a sample; the rest is cut.", at_least=2)
    batch_tokens: int = option(8192, "Tokens a forward, with padding.", at_least=1)
    memory_limit: float = option(
        4.0, "GiB of covariances at a time; what does not fit takes another pass over the text.", above=0
    )
    products: Products = option(
        "float64",
        "Number format in which inputs are multiplied; sums are float64 in both. float32 is 32 to 64 times as fast on "
        "a GPU made for games, and cannot tell energies below 1e-7 of a layer's largest apart (docs/adapters.md).",
    )

    @property
    def memory_bytes(self) -> int:
        """memory_limit in bytes."""
        return int(self.memory_limit * 2**30)
