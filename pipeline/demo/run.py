"""The main job on an embedded default: precompute once, train three ways with two seeds, evaluate, report.

Owns the demo's settings, which were fixed before its first run (docs/log.md), and its output folder. Everything it does
goes through the same functions as the command line. Must not print: it reports through `say`.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from logitcache.adapters.attach import AdapterSettings
from logitcache.capture.plan import PrecomputeSettings, make_plan, manifest_for, precompute
from logitcache.data.rows import read_rows
from logitcache.data.samples import Sample, make_samples
from logitcache.errors import TrainingFailed
from logitcache.evaluation.compare import Comparison, compare, load_adapter
from logitcache.evaluation.table import markdown_table
from logitcache.losses.formulas import Objective, Regularizer
from logitcache.models.loading import Base, Source, find_model, load_base, load_tokenizer
from logitcache.pairing.identity_checks import check_identity
from logitcache.reports.plots import frontier_picture
from logitcache.storage import LogitCache
from logitcache.storage.files import replace_file
from logitcache.training.run import TrainSettings, train

from .text import Document, code_documents, prose_documents, split

Say = Callable[[str], None]
MARKER = "demo.json"


@dataclass(frozen=True)
class Method:
    """One way of training: its name in tables, its regulariser and its peak learning rate."""

    name: str
    regularizer: Regularizer
    lr: float


@dataclass(frozen=True)
class DemoSettings:
    """Sizes and hyperparameters. max_steps * batch_size new samples, each drawn once."""

    seeds: tuple[int, ...] = (0, 1)
    max_steps: int = 50
    batch_size: int = 8
    max_length: int = 256
    num_held_out: int = 64
    rank: int = 16
    weight: float = 1.0
    top_k: int = 64
    methods: tuple[Method, ...] = (
        Method("plain LoRA", "none", 2e-3),
        Method("plain LoRA, lower lr", "none", 5e-4),
        Method("masked KL", "masked-kl", 2e-3),
    )


@dataclass(frozen=True)
class Outcome:
    """What one run came to, beside what it cost."""

    method: str
    seed: int
    new: Comparison
    prior: Comparison
    seconds: float

    @property
    def learning(self) -> float:
        """Fall of cross-entropy on held-out new text, nats a token."""
        assert self.new.after is not None
        return self.new.before.ce_nats - self.new.after.ce_nats

    @property
    def forgetting(self) -> float:
        """Rise of cross-entropy on held-out prior text, nats a token."""
        assert self.prior.after is not None
        return self.prior.after.ce_nats - self.prior.before.ce_nats


def run_demo(out: Path, settings: DemoSettings, say: Say) -> list[Outcome]:
    """Do it all into the folder `out`; finished parts of an interrupted demo are kept. Returns the outcomes.

    Raises `TrainingFailed` where the folder holds something else, `FileNotFoundError` where this Python carries no
    sources to take text from.
    """
    _claim_folder(out, settings)
    say("Writing data: standard-library prose (what the base knows) and source code (the new domain).")
    paths = write_data(out / "data", settings)
    with as_file(files("logitcache.demo").joinpath("base")) as folder:
        source = Source("logitcache demo base", find_model(str(folder)).folder)
        train_set, new, prior = (_load(source, path, settings) for path in paths)
        untouched = _load_float32(source)
        cache = _fill_cache(out / "cache", untouched, train_set, settings, say)
        outcomes = []
        runs = [(seed, method) for seed in settings.seeds for method in settings.methods]
        for number, (seed, method) in enumerate(runs, 1):
            outcome = _run(out, untouched, cache, train_set, new, prior, method, seed, settings, say)
            outcomes.append(outcome)
            say(
                f"{number}/{len(runs)} {method.name}, seed {seed}: new {-outcome.learning:+.3f}, "
                f"prior {outcome.forgetting:+.3f} nats a token, trained in {outcome.seconds:.0f} s"
            )
    write_report(out, outcomes, cache, settings)
    return outcomes


def write_data(folder: Path, settings: DemoSettings) -> tuple[Path, Path, Path]:
    """The three JSONL files: new text to train on, new text held out, prior text held out."""
    folder.mkdir(parents=True, exist_ok=True)
    code_train, code_held_out = split(code_documents())
    _, prose_held_out = split(prose_documents())
    prior = _pieces(prose_held_out)
    parts = {
        "new_train": _spread(code_train, settings.max_steps * settings.batch_size),
        "new_heldout": _spread(code_held_out, settings.num_held_out),
        "prior_heldout": _spread(prior, settings.num_held_out),
    }
    for name, documents in parts.items():
        lines = (json.dumps({"text": d.text, "source": d.name}) + "\n" for d in documents)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    train_set, new, prior_path = (folder / f"{name}.jsonl" for name in parts)
    return train_set, new, prior_path


def summary_rows(outcomes: list[Outcome]) -> list[list[str]]:
    """The demo's table: base first, then each method, means over seeds ± half the range."""
    base = outcomes[0]
    rows = [["", "new CE", "prior CE", "learnt", "forgotten", "KL on prior", "s a run"]]
    rows.append(["base", f"{base.new.before.ce_nats:.3f}", f"{base.prior.before.ce_nats:.3f}", "", "", "", ""])
    for method, runs in _by_method(outcomes).items():
        columns = {
            "new": [r.new.after.ce_nats for r in runs if r.new.after],
            "prior": [r.prior.after.ce_nats for r in runs if r.prior.after],
            "learnt": [r.learning for r in runs],
            "forgotten": [r.forgetting for r in runs],
            "kl": [r.prior.kl_nats for r in runs if r.prior.kl_nats is not None],
        }
        cells = [_mean_and_range(values) for values in columns.values()]
        rows.append([method, *cells, f"{sum(r.seconds for r in runs) / len(runs):.0f}"])
    return rows


def write_report(out: Path, outcomes: list[Outcome], cache: LogitCache, settings: DemoSettings) -> None:
    """results.json, frontier.png and report.md."""
    results = [
        {"method": o.method, "seed": o.seed, "new": o.new.as_dict(), "prior": o.prior.as_dict(), "seconds": o.seconds}
        for o in outcomes
    ]
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    points = {m: [(r.learning, r.forgetting) for r in runs] for m, runs in _by_method(outcomes).items()}
    title = f"{cache.num_positions:,} tokens of source code, {len(settings.seeds)} seeds, one cache"
    frontier_picture(points, out / "frontier.png", title)
    (out / "report.md").write_text(_report(outcomes, cache, settings), encoding="utf-8")


def relative_sentences(outcomes: list[Outcome]) -> list[str]:
    """Each method against the first (plain LoRA), in words: means over seeds."""
    means = {
        method: (sum(r.learning for r in runs) / len(runs), sum(r.forgetting for r in runs) / len(runs))
        for method, runs in _by_method(outcomes).items()
    }
    (first, (learnt, forgotten)), *others = means.items()
    return [
        f"{method}: forgets {100 * (1 - f / forgotten):.0f} % less than {first} and learns "
        f"{100 * x / learnt:.0f} % as much ({_nats(f, '+')} against {_nats(forgotten, '+')} nats on prior text, "
        f"{_nats(-x, '+')} against {_nats(-learnt, '+')} on new text)."
        for method, (x, f) in others
    ]


def _report(outcomes: list[Outcome], cache: LogitCache, settings: DemoSettings) -> str:
    per_position = cache.num_bytes / cache.num_positions
    bullets = "\n".join(f"- {sentence}" for sentence in relative_sentences(outcomes))
    learning_rates = "; ".join(f"{m.name} {m.lr:g}" for m in settings.methods)
    return f"""# logitcache demo: learning and forgetting

A small base model that knows English prose (Python's documentation) is fine-tuned on source code. Every method sees
the same {settings.max_steps} steps of {settings.batch_size} samples. The base ran once over them, into a cache of
{cache.num_positions:,} positions ({cache.num_bytes / 2**20:.1f} MiB, {per_position:.0f} bytes a position),
and never again.

Cross-entropy in nats a token on held-out text; means over {len(settings.seeds)} seeds, ± half the range.

{markdown_table(summary_rows(outcomes))}

{bullets}

![learning against forgetting](frontier.png)

Peak learning rates: {learning_rates}. LoRA rank {settings.rank} on every linear layer but the head, cosine schedule,
weight of the KL {settings.weight:g}, {settings.top_k} alternatives a position with the tail as one outcome.
Methods, learning rates, weight and seeds were fixed before the first run.
"base" is the untouched base; "KL on prior" is KL(base || adapted).
"""


def _run(
    out: Path,
    untouched: Base,
    cache: LogitCache,
    train_set: list[Sample],
    new: list[Sample],
    prior: list[Sample],
    method: Method,
    seed: int,
    settings: DemoSettings,
    say: Say,
) -> Outcome:
    folder = out / "runs" / f"{method.name.replace(',', '').replace(' ', '-')}-seed{seed}"
    report = train(
        _load_float32(untouched.source),
        train_set,
        cache,
        folder,
        AdapterSettings(rank=settings.rank, alpha=2.0 * settings.rank),
        Objective(regularizer=method.regularizer, weight=settings.weight),
        TrainSettings(lr=method.lr, batch_size=settings.batch_size, max_steps=settings.max_steps, seed=seed),
        resume=True,
        tell=say,
    )
    base = untouched.model
    adapted = load_adapter(_load_float32(untouched.source).model, str(folder))
    return Outcome(method.name, seed, compare(base, adapted, new), compare(base, adapted, prior), report.seconds)


def _fill_cache(path: Path, base: Base, samples: list[Sample], settings: DemoSettings, say: Say) -> LogitCache:
    job = PrecomputeSettings(top_k=settings.top_k, max_length=settings.max_length)
    tokenizer = load_tokenizer(base.source)
    started = perf_counter()
    plan = make_plan(samples, job)
    report = precompute(base, manifest_for(base, tokenizer, job), plan, path)
    cache = LogitCache.open(path)
    check_identity(cache, base, tokenizer)
    ran = f"the base ran once over {report.num_tokens:,} tokens in {perf_counter() - started:.0f} s"
    done = ran if report.num_tokens else "nothing left to run"
    say(f"Precompute: {done}; the cache holds {cache.num_positions:,} positions in {cache.num_bytes / 2**20:.1f} MiB.")
    return cache


def _load(source: Source, path: Path, settings: DemoSettings) -> list[Sample]:
    tokenizer = load_tokenizer(source)
    assert tokenizer is not None
    return make_samples(read_rows(str(path)), tokenizer, settings.max_length, len(tokenizer)).samples


def _load_float32(source: Source) -> Base:
    return load_base(source, "float32", torch.device("cpu"))


def _claim_folder(out: Path, settings: DemoSettings) -> None:
    marker, stamp = out / MARKER, json.dumps(asdict(settings), indent=2) + "\n"
    if out.exists() and any(out.iterdir()) and (not marker.exists() or marker.read_text(encoding="utf-8") != stamp):
        raise TrainingFailed(
            f"writing the demo to {out}: the folder holds something else, or a demo with other settings. "
            "Nothing was changed. Choose another --out, or remove it."
        )
    out.mkdir(parents=True, exist_ok=True)
    replace_file(marker, stamp.encode())


def _pieces(documents: list[Document], max_chars: int = 1100) -> list[Document]:
    """Documents cut at blank lines into pieces of about max_chars characters."""
    pieces: list[Document] = []
    for document in documents:
        parts: list[str] = []
        for paragraph in document.text.split("\n\n"):
            if parts and sum(map(len, parts)) + len(paragraph) > max_chars:
                pieces.append(Document(f"{document.name}#{len(pieces)}", "\n\n".join(parts)))
                parts = []
            parts.append(paragraph)
        pieces.append(Document(f"{document.name}#{len(pieces)}", "\n\n".join(parts)))
    return [piece for piece in pieces if len(piece.text) >= 200]


def _spread(documents: list[Document], count: int) -> list[Document]:
    """`count` documents (or all), evenly spread over the list."""
    count = min(count, len(documents))
    return [documents[i * len(documents) // count] for i in range(count)]


def _by_method(outcomes: list[Outcome]) -> dict[str, list[Outcome]]:
    grouped: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        grouped.setdefault(outcome.method, []).append(outcome)
    return grouped


def _mean_and_range(values: list[Any]) -> str:
    mean, half_range = sum(values) / len(values), (max(values) - min(values)) / 2
    return f"{_nats(mean)} ± {half_range:.3f}"


def _nats(value: float, sign: str = "") -> str:
    """Three decimals, and no minus sign on what rounds to zero."""
    return f"{round(value, 3) + 0.0:{sign}.3f}"
