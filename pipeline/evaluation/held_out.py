"""Held-out text that is measured while a model is trained: cross-entropy on new text, drift from the base on prior one.

Owns what is read before training starts, and the numbers of one evaluation, which are those of `evaluate`. The base is
not in memory for it: a probe cache says what it predicts. Must not know the trainer, nor what follows from the numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedTokenizerBase

from logitcache.data.places import Named, are_names, settings_for
from logitcache.data.rows import NamedRows, read_rows
from logitcache.data.samples import Sample
from logitcache.data.settings import DEFAULT, DataSettings
from logitcache.data.skipped import listed_beside
from logitcache.errors import InvalidData
from logitcache.events import OnMessage
from logitcache.models.head import causal_lm_of
from logitcache.models.loading import Base
from logitcache.pairing.samples import samples_for
from logitcache.pairing.view import CacheView
from logitcache.storage import LogitCache

from .compare import check_alternatives, compare, compare_cached, probe_view, samples_fingerprint


@dataclass(frozen=True)
class HeldOut:
    """New text, a probe cache of prior text, or both, as they are given: nothing is read of them before `opened`."""

    #: Rows by their names, or samples in memory, which are not learnt.
    new: Named | Sequence[Sample] | None = None
    #: A cache of what the base says of prior text: a path, or an opened one. Its data sets say which samples it has.
    prior: LogitCache | str | Path | None = None
    #: Tokens a sample of rows; None: as of the training data.
    max_length: int | None = None
    #: Of `new`; "": the one that is asked for of the training data.
    split: str = ""

    def opened(
        self, how: DataSettings = DEFAULT, output: str = "", on_message: OnMessage = lambda _: None
    ) -> "OpenHeldOut":
        """What can be read and refused before there is a model. output: what the run writes, beside which skipped rows
        are listed. Raises what reading rows and opening a cache raise, and `NotComparable`."""

        def tell(sentence: str) -> None:
            on_message(f"eval-data: {sentence}")

        rows: NamedRows | None = None
        samples: tuple[Sample, ...] = ()
        if self.split:
            how = replace(how, split=self.split)
        if are_names(self.new):
            how = listed_beside(settings_for({"new": self.new}, how)["new"], f"{output}-eval")
            rows = read_rows(self.new, how, tell)
        elif self.new is not None:
            samples = tuple(cast("Sequence[Sample]", self.new))
        prior = LogitCache.open(self.prior) if isinstance(self.prior, (str, Path)) else self.prior
        if prior is not None:
            check_alternatives(prior)
        return OpenHeldOut(rows, samples, prior, self.max_length, how, on_message)


@dataclass(frozen=True)
class OpenHeldOut:
    """The same, read as far as it can be without a model."""

    rows: NamedRows | None
    samples: tuple[Sample, ...]
    prior: LogitCache | None
    max_length: int | None
    how: DataSettings
    on_message: OnMessage

    def paired(
        self,
        base: Base,
        tokenizer: PreTrainedTokenizerBase | None,
        max_length: int,
        batch_tokens: int,
        other_precision: bool = False,
    ) -> "Probes":
        """Held against the model, which no adapter is on yet.

        max_length: tokens a sample of rows, unless it is said otherwise; batch_tokens: of a forward; other_precision:
        as of `PairingRules`. Raises what `CacheView.paired` and reading rows raise, `SampleNotCached`,
        `PositionNotCaptured`, `InvalidData` where nothing is supervised.
        """

        def told(name: str) -> Callable[[str], None]:
            return lambda sentence: self.on_message(f"{name}: {sentence}")

        new, length = list(self.samples), self.max_length or max_length
        if self.rows is not None:
            vocab_size = base.identity.vocab_size
            new = samples_for(self.rows, None, tokenizer, vocab_size, length, told("eval-data"), self.how)
        if (self.rows is not None or self.samples) and not any(len(sample.positions) for sample in new):
            raise InvalidData("evaluating while training: expected a supervised token in --eval-data, found none.")
        if self.prior is None:
            return Probes(tuple(new), None, (), batch_tokens)
        view = probe_view(self.prior, base, tokenizer, self.how, other_precision)
        found = samples_for(None, self.prior, tokenizer, base.identity.vocab_size, None, told("eval-prior"), self.how)
        prior = tuple(sample for sample in found if len(sample.positions))
        view.require(prior)
        return Probes(tuple(new), view, prior, batch_tokens)


@dataclass(frozen=True)
class Probes:
    """Texts to measure a model on, as often as is wanted."""

    new: tuple[Sample, ...]
    #: What the base says of `prior`.
    view: CacheView | None
    prior: tuple[Sample, ...]
    #: Tokens a forward, with padding.
    batch_tokens: int

    def measured(self, model: nn.Module) -> dict[str, float]:
        """new_ce; prior_ce, prior_kl and prior_first_changed: nats a token, and documents whose first token changed.

        Of the model as it is now, without dropout; nothing is drawn at random, so that training goes on as if nothing
        had been measured. Raises as `compare` and `compare_cached`.
        """
        found: dict[str, float] = {}
        if self.new:
            found["new_ce"] = compare(causal_lm_of(model), None, self.new, self.batch_tokens).before.ce_nats
        if self.view is not None:
            prior = compare_cached(model, self.view, self.prior, self.batch_tokens)
            assert prior.after is not None and prior.kl_nats is not None and prior.num_first_changed is not None
            found |= {"prior_ce": prior.after.ce_nats, "prior_kl": prior.kl_nats}
            found["prior_first_changed"] = float(prior.num_first_changed)
        return found

    def described(self) -> dict[str, Any]:
        """Which texts they are, as JSON."""
        view = self.view
        return {
            "new": samples_fingerprint(self.new) if self.new else None,
            "num_new": len(self.new),
            "prior": None if view is None else {"path": str(view.cache.path), "contents": view.cache.contents_checksum},
            "num_prior": len(self.prior),
        }
