"""`logitcache evaluate`: what was learnt, what was forgotten."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from logitcache.data.settings import OF_TEMPLATE, DataSettings
from logitcache.evaluation.settings import ScaleSettings
from logitcache.storage.plain_text import without_secrets

from .common import (
    CachePath,
    batch_options,
    check_device_map,
    config_option,
    data_option,
    device_map_option,
    model_option,
    note,
    quiet_libraries,
    runtime_options,
    say,
    say_lines,
    token_bar,
)
from .help_page import heading, verb
from .options import check_has_rows, options_of, settings_from, was_given
from .terminal import terminated_softly

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from logitcache.data.rows import NamedRows
    from logitcache.data.samples import Sample
    from logitcache.evaluation.against import PlainDrift
    from logitcache.evaluation.compare import Comparison
    from logitcache.evaluation.metrics import Prevented
    from logitcache.models.loading import Base
    from logitcache.pairing.view import CacheView
    from logitcache.storage import LogitCache


@dataclass(frozen=True)
class _Side:
    """New or prior text: its rows, and the cache that stands for the base; one of them, or both."""

    name: str
    rows: "NamedRows | None"
    cache: "LogitCache | None"
    how: DataSettings
    view: "CacheView | None" = None


@verb(
    "Learning on new text and forgetting on prior text, in one table.",
    example="logitcache evaluate --model base/ --adapter adapter/ --data new.jsonl --prior prior.jsonl",
)
@config_option
@heading("Model and text")
@model_option
@click.option(
    "--adapter", metavar="DIR", help="Folder of the trained adapter, or model; without it only the base is measured."
)
@data_option("Held-out text of the new task; by default the samples of --new-cache.", metavar="NEW")
@data_option(
    "Text of what the base knew, to measure forgetting; by default the samples of --prior-cache.", "prior", "PRIOR"
)
@click.option(
    "--new-cache", type=CachePath(), metavar="DIR", help="Cache of the new text, to stand for the base: it is not run."
)
@click.option(
    "--prior-cache", type=CachePath(), metavar="DIR", help="Cache of the prior text, to stand for the base: likewise."
)
@heading("Also in the table")
@click.option(
    "--against",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="What --json printed for an adapter of plain cross-entropy: adds the shares of its KL and drift prevented.",
)
@options_of(
    ScaleSettings,
    scales={
        "default": None,
        "show_default": False,
        "help": "Also measure the model at these parts of the adapter's change, 0 the base and 1 the whole: such as "
        "0,.25,.5,.75,1. Needs memory for a second model and for the change.",
    },
)
@click.option(
    "--tasks", metavar="A,B", help="Tasks of lm-evaluation-harness, for base and adapter (needs the extra `tasks`)."
)
@click.option(
    "--tasks-path",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder with YAML files of tasks of your own.",
)
@options_of(DataSettings)
@batch_options
@device_map_option
@runtime_options
@heading("Other")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(
    model: str,
    adapter: str | None,
    data: tuple[str, ...] | None,
    prior: tuple[str, ...] | None,
    new_cache: str | None,
    prior_cache: str | None,
    against: Path | None,
    scales: tuple[float, ...] | None,
    tasks: str | None,
    tasks_path: Path | None,
    max_length: int,
    batch_tokens: int,
    device_map: str | None,
    dtype: str,
    device: str,
    as_json: bool,
    **values: Any,
) -> None:
    """Measure base and adapted model on prior text (forgetting), on new text (learning), or both, in one table.

    "Before" is the untouched base: a second model in memory, unlike in training, or a cache that it made of the text.
    The table ends with what was learnt and forgotten in one sentence.
    docs/how-to/evaluate.md says what each number means.
    """
    click.get_current_context().with_resource(terminated_softly("Nothing was written", "the same command begins anew"))
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    given = {"prior": (prior, prior_cache), "new": (data, new_cache)}
    how = settings_from(DataSettings, values)
    check_device_map(device_map, device)
    _check_usage(adapter, given, against, tasks, names, tasks_path)
    parts = _scales_of(scales, adapter, given)
    quiet_libraries()
    from logitcache.adapters.reloadable import check_reloadable
    from logitcache.data.places import settings_for
    from logitcache.evaluation.compare import check_adapter, load_adapter, plain_drift, probe_view
    from logitcache.evaluation.lm_eval import check_harness, run_tasks
    from logitcache.evaluation.metrics import finite_or_none
    from logitcache.evaluation.scales import check_in_memory, curve
    from logitcache.evaluation.table import closing_sentence, curve_rows, evaluation_rows, table
    from logitcache.models.loading import find_model, load_base, load_tokenizer, pick_device

    if names:
        check_harness()
    source, where = find_model(model), pick_device(device)
    tokenizer = load_tokenizer(source)
    hows = settings_for({name: text for name, (text, _) in given.items()}, how)
    sides = [
        _side(name, text, hows.get(name, how), cache)
        for name, (text, cache) in given.items()
        if (text, cache) != (None, None)
    ]
    if names and tokenizer is None:
        raise click.UsageError(f"--tasks are text, and {source.folder} has no tokenizer. Save it there.")
    if adapter is not None:
        check_reloadable(adapter)  # before a model is loaded for nothing
    base = load_base(source, dtype, where, device_map=device_map)
    if parts:
        check_in_memory(base.model)
    sides = [s if s.cache is None else replace(s, view=probe_view(s.cache, base, tokenizer, how)) for s in sides]
    for side in sides:
        if side.cache is not None:
            _tell_dtype(side, base)
    given_length = max_length if was_given(click.get_current_context(), "max_length") else None
    samples = {side.name: _samples_of(side, base, tokenizer, given_length) for side in sides}
    plain = None if against is None else plain_drift(against, samples["prior"], base.identity)
    adapted: Any = None
    if adapter is not None:
        check_adapter(adapter, base)
        needs_base = bool(names or parts) or any(side.cache is None for side in sides)
        second = load_base(source, dtype, where, device_map=device_map) if needs_base else base
        adapted = load_adapter(second.model, adapter, device_map)
    texts = {side.name: _text_name(*given[side.name]) for side in sides}
    kept = {s.name: None if s.cache is None else s.cache.manifest.capture.top_k for s in sides}
    results = {side.name: _compared(side, base, adapted, samples[side.name], batch_tokens) for side in sides}
    found: dict[str, Any] = {
        "model": {"name": source.name, "weights": base.identity.weights, "config": base.identity.config},
        **{n: {"text": texts[n], "top_k": kept[n], **result.as_dict()} for n, result in results.items()},
    }
    prevented = None
    if plain is not None:
        prevented = _prevented(results["prior"], plain, kept["prior"])
        found["kl_prevented"] = prevented.kl
        found["drift_prevented"] = None if prevented.drift is None else finite_or_none(prevented.drift)
    scores = []
    if names:
        assert tokenizer is not None
        with _no_bars_in_files():
            scores = run_tasks(
                [base.model] if adapted is None else [base.model, adapted],
                tokenizer,
                names,
                tasks_path,
                max(1, batch_tokens // max_length),
            )
        found["tasks"] = [score.as_dict() for score in scores]
    if not as_json:  # before the curve, which not every adapter has
        say_lines(table(evaluation_rows(results, prevented, scores, texts)))
        if results:
            say_lines("")
            say(closing_sentence(results, texts))
    points = []
    if parts:
        points = curve(
            base.model,
            adapted,
            parts,
            lambda model: {side.name: _compared(side, base, model, samples[side.name], batch_tokens) for side in sides},
        )
        found["scales"] = [point.as_dict() for point in points]
    if as_json:
        say_lines(json.dumps(found, indent=2))
    elif points:
        say_lines("\n" + table(curve_rows([(point.scale, point.results) for point in points])))


def _check_usage(
    adapter: str | None,
    given: dict[str, tuple[tuple[str, ...] | None, str | None]],
    against: Path | None,
    tasks: str | None,
    names: list[str],
    tasks_path: Path | None,
) -> None:
    flags = {"new": ("--data", "--new-cache"), "prior": ("--prior", "--prior-cache")}
    if tasks is None and all(sources == (None, None) for sources in given.values()):
        raise click.UsageError(
            "Give text to measure on: --prior for what was forgotten, --data for what was learnt, or a cache of either."
        )
    for name, (_, cache) in given.items():
        if cache is not None and adapter is None:
            raise click.UsageError(f"{flags[name][1]} stands for the base beside an adapter. Give --adapter.")
    if all(text is None for text, _ in given.values()):
        check_has_rows(click.get_current_context(), "--data or --prior", OF_TEMPLATE)
    if against is not None and (adapter is None or given["prior"] == (None, None)):
        raise click.UsageError("--against compares the drift of two adapters on prior text: give --adapter and it.")
    if tasks is not None and not names:
        raise click.UsageError("--tasks names no task. Give names separated by commas.")
    if tasks_path is not None and not names:
        raise click.UsageError("--tasks-path is where --tasks are looked up. Give --tasks.")


def _scales_of(
    scales: tuple[float, ...] | None,
    adapter: str | None,
    given: dict[str, tuple[tuple[str, ...] | None, str | None]],
) -> tuple[float, ...]:
    """The numbers of --scales, in their order; none where it was not given."""
    if scales is None:
        return ()
    if adapter is None or all(sources == (None, None) for sources in given.values()):
        raise click.UsageError("--scales are parts of an adapter's change, measured on text: give --adapter and text.")
    return settings_from(ScaleSettings, {"scales": scales}).scales


def _side(name: str, text: tuple[str, ...] | None, how: DataSettings, cache: str | None) -> _Side:
    from logitcache.data.rows import read_rows
    from logitcache.data.skipped import listed_beside
    from logitcache.storage import LogitCache

    how = listed_beside(how, f"evaluate-{name}")
    rows = None if text is None else read_rows(text, how, lambda sentence: note(f"{name}: {sentence}"))
    return _Side(name, rows, None if cache is None else LogitCache.open(cache), how)


def _samples_of(
    side: _Side,
    base: "Base",
    tokenizer: "PreTrainedTokenizerBase | None",
    max_length: int | None,
) -> "list[Sample]":
    from logitcache.pairing.samples import samples_for

    def say(sentence: str) -> None:
        note(f"{side.name}: {sentence}")

    return samples_for(side.rows, side.cache, tokenizer, base.identity.vocab_size, max_length, say, side.how)


def _text_name(text: tuple[str, ...] | None, cache: str | None) -> str:
    """What a text is called: the last parts of its paths, or hub ids as they are."""
    if text is not None:
        return " + ".join(map(_last_part, text))
    return f"the cache {_last_part(str(cache))}"


def _last_part(given: str) -> str:
    name = without_secrets(given)
    return Path(name).name if "://" in name or Path(given).exists() else name


def _tell_dtype(side: _Side, base: "Base") -> None:
    assert side.cache is not None
    theirs, ours = side.cache.manifest.model, base.identity
    if theirs.dtype != ours.dtype:
        note(
            f"{side.name}: the cache was made in {theirs.dtype}, the model runs in {ours.dtype}; that alone moves "
            f"the numbers a little. --dtype {theirs.dtype} avoids it."
        )
    if theirs.tf32 != ours.tf32:
        how = "with TF32, the model runs without" if theirs.tf32 else "without TF32, the model runs with"
        note(f"{side.name}: the cache was made {how} it; that alone moves the numbers a little.")


def _compared(side: _Side, base: "Base", adapted: Any, samples: "list[Sample]", batch_tokens: int) -> "Comparison":
    from logitcache.evaluation.compare import compare, compare_cached

    with token_bar(f"evaluate {side.name}", sum(len(s.token_ids) for s in samples)) as progress:
        if side.view is not None:
            return compare_cached(adapted, side.view, samples, batch_tokens, progress)
        return compare(base.model, adapted, samples, batch_tokens, progress)


def _prevented(prior: "Comparison", plain: "PlainDrift", top_k: int | None) -> "Prevented":
    """Of what the plain adapter did, what this one did not; a note where that means nothing."""
    from logitcache.evaluation.metrics import Prevented, drift_prevented

    assert prior.drift_percent is not None and prior.kl_nats is not None
    drift = drift_prevented(prior.drift_percent, plain.percent)
    if drift is None:
        note(f"The plain adapter's perplexity did not drift on this text ({plain.percent:+.1f} %): none was prevented.")
    if top_k == plain.top_k:
        return Prevented(drift_prevented(prior.kl_nats, plain.kl_nats), drift)
    ours, theirs = ("the whole vocabulary" if k is None else f"{k:,} alternatives" for k in (top_k, plain.top_k))
    note(f"The KL here is over {ours}, the plain adapter's over {theirs}: the share that is prevented is left out.")
    return Prevented(None, drift)


@contextlib.contextmanager
def _no_bars_in_files() -> Iterator[None]:
    """The harness draws its bars on any stderr; here only on a terminal."""
    if sys.stderr.isatty():
        yield
        return
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield
