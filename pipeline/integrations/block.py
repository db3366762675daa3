"""What a framework's own configuration says of the cache: a mapping -> the arguments of `CachedKL`.

    cache: cache/                 where it is, or will be
    fill: true                    capture what it lacks of the training data before step 1
    regularizer, weight, ...      every field of `Objective` and `PairingRules`, by its own name
    capture: {top_k: 64}          what a cache that is not there yet keeps: fields of `CaptureSettings`
    anchors: [{cache: anchors/}]  caches of what the base says elsewhere, with fields of `AnchorSettings`

Owns these names. They are those of the settings dataclasses, so that a field added there is a key here, and what is no
key is refused by name. Must not know any framework, nor import torch before `keywords`: axolotl swallows the
ImportError of a plug-in, and would then train without it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from logitcache.capture.settings import CaptureSettings
from logitcache.errors import InvalidSettings
from logitcache.settings import Settings, check_known, option, settings_of
from logitcache.training.settings import PARTS, AnchorSettings
from logitcache.yaml_files import read_as

OTHER_LOSS = "it makes the loss another one, which would not be used. Leave it out"
"""Why most options of a framework are refused; the end of a sentence."""

OBJECTIVE, RULES = PARTS["objective"], PARTS["pairing"]
Made = TypeVar("Made", bound=Settings)


@dataclass(frozen=True)
class CacheSettings(Settings):
    """Which cache, and what is done with it: keys of a framework's own configuration."""

    cache: str | None = option(None, "The cache: a folder or a URL.", on_line=False)
    fill: bool = option(False, "Capture what it lacks of the training data, before step 1.", on_line=False)
    top_k: int | None = option(
        None, "Alternatives a position to read.  [default: all that the cache has]", at_least=0, on_line=False
    )
    check: bool = option(
        True, "Hold model, rows and first batch against it; off for an adapter trained already.", on_line=False
    )


@dataclass(frozen=True)
class Block:
    """All that a configuration says of the cache."""

    of_cache: CacheSettings
    #: An `Objective`.
    objective: Any
    #: `PairingRules`.
    rules: Any
    #: What a cache that is not there yet keeps; None: the defaults.
    capture: CaptureSettings | None
    #: The path of each anchor cache, and how it counts.
    anchors: tuple[tuple[str, AnchorSettings], ...]

    def keywords(self) -> dict[str, Any]:
        """The arguments of `CachedKL`."""
        from logitcache.training.anchors import Anchor

        anchor = [Anchor(path, how) for path, how in self.anchors]
        said = {"objective": self.objective, "rules": self.rules, "capture": self.capture, "anchor": anchor}
        return {**self.of_cache.plain(), **said}


def refusal(option: str, why: str) -> InvalidSettings:
    """An option of a framework's that is refused. option: with its value, as its user writes it."""
    return InvalidSettings(f"training with logitcache: {option} is refused: {why}. Nothing was trained.")


def read_block(values: Any, where: str) -> Block:
    """What a mapping says. where: the key that it stands under, for messages.

    Raises `InvalidSettings` for what is no mapping, a key that is none, a value that is none of its key, and no cache
    where the loss reads one.
    """
    given = _mapping(values, where)
    names = {owner: [s.name for s in settings_of(owner)] for owner in (CacheSettings, OBJECTIVE, RULES)}
    check_known(given, [*(name for some in names.values() for name in some), "capture", "anchors"], where)
    parts = [_made(owner, {n: given[n] for n in some if n in given}, where) for owner, some in names.items()]
    of_cache, objective, rules = parts
    if objective.reads_base and not of_cache.cache:
        raise InvalidSettings(
            f"{where}: expected cache, the path of one, as {objective.reader} reads it, found none. Nothing was "
            "started. Give it."
        )
    capture = _made(CaptureSettings, given["capture"], f"{where}.capture") if "capture" in given else None
    return Block(of_cache, objective, rules, capture, _anchors(given.get("anchors", []), f"{where}.anchors"))


def _mapping(values: Any, where: str) -> dict[str, Any]:
    """The keys that have a value."""
    if not isinstance(values, Mapping):
        raise InvalidSettings(
            f"{where}: expected a mapping of names and values, found {values!r:.80}. Nothing was started. Write one."
        )
    return {name: value for name, value in values.items() if value is not None}


def _made(owner: type[Made], values: Any, where: str) -> Made:
    """A settings dataclass of what a mapping says."""
    given, kinds = _mapping(values, where), {s.name: s.kind for s in settings_of(owner)}
    check_known(given, list(kinds), where)
    read = {}
    for name, value in given.items():
        try:
            read[name] = read_as(kinds[name], value)
        except ValueError as error:
            raise InvalidSettings(
                f"{where}.{name}: {error}, found {value!r:.80}. Nothing was started. Give another {name}."
            ) from error
    return owner(**read)


def _anchors(values: Any, where: str) -> tuple[tuple[str, AnchorSettings], ...]:
    if not isinstance(values, list | tuple):
        raise InvalidSettings(
            f"{where}: expected a list, found {values!r:.80}. Nothing was started. Write - cache: PATH."
        )
    found = []
    for number, value in enumerate(values):
        said = _mapping(value, f"{where}[{number}]")
        path = said.pop("cache", None)
        if not isinstance(path, str):
            raise InvalidSettings(
                f"{where}[{number}]: expected cache, the path of one, found {path!r:.80}. Nothing was started. Give it."
            )
        found.append((path, _made(AnchorSettings, said, f"{where}[{number}]")))
    return tuple(found)
