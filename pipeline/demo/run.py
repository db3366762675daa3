"""The main job on an embedded default: texts, a cache of the base, a sweep of three methods and two seeds, its table.

Owns the demo's settings, which were fixed before its first run (docs/log.md), and its output folder:

    demo.json                what it was begun with
    data/                    new_train.jsonl, new_heldout.jsonl, prior_heldout.jsonl
    cache/                   what the base says of new_train
    sweep/                   what `logitcache sweep` writes of any sweep, and `logitcache report` reads
    report.md, frontier.png  the table, in words, and the picture

Trains and evaluates nothing itself, and must not print: it reports through `on_message`.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from time import perf_counter
from typing import TypeVar

import torch

from logitcache.capture.settings import CaptureSettings
from logitcache.capture.worker import precompute
from logitcache.errors import TrainingFailed
from logitcache.models.settings import Dtype, LoadSettings
from logitcache.reports.page import Block, Bullets, Heading, Paragraph, Picture, Table, as_markdown
from logitcache.reports.plots import frontier_picture
from logitcache.reports.results import RunOutcome, Sweep, read_sweep
from logitcache.storage import LogitCache
from logitcache.storage.files import replace_file
from logitcache.sweeps.config import SweepConfig, make_config
from logitcache.sweeps.prepare import prepare
from logitcache.sweeps.run import run_one

from .text import Document, code_documents, prose_documents, split

MARKER, ANCHORS = "demo.json", "anchors"

MEASURED = (
    "Nats a token on held-out text: learnt is the fall of cross-entropy (CE) on new text, forgot the "
    "KL(base || adapted) on prior text, over the base's most probable tokens with the rest as one outcome."
)
"""What the columns of a demo's table are."""

T = TypeVar("T")


@dataclass(frozen=True)
class Method:
    """One way of training: its name in tables, its regulariser, its peak learning rate and the weight of anchors."""

    name: str
    regularizer: str
    lr: float
    #: 0: without anchors.
    anchor_weight: float = 0.0


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


def run_demo(out: Path, settings: DemoSettings, on_message: Callable[[str], None]) -> Sweep:
    """Do it all into the folder `out`; finished parts of an interrupted demo are kept. Returns what the sweep came to.

    Raises `TrainingFailed` where the folder holds something else, or a run fails or is done by another process now,
    `FileNotFoundError` where this Python carries no sources to take text from.
    """
    claim_folder(out, settings)
    on_message("Writing data: standard-library prose (what the base knows) and source code (the new domain).")
    new_train, _, _ = write_data(out / "data", settings)
    with as_file(files("logitcache.demo").joinpath("base")) as base:
        config = sweep_config(base, out, settings)
        cache = fill_cache(base, new_train, out / "cache", settings, on_message)
        sweep = train_and_evaluate(config, out, "float32", on_message)
    write_report(out, sweep, cache, settings)
    return sweep


def train_and_evaluate(config: SweepConfig, out: Path, dtype: str, on_message: Callable[[str], None]) -> Sweep:
    """Every run that is not done yet, one after the other, into `out`/sweep; what the sweep came to.

    Raises `TrainingFailed` where a run fails, or is done by another process now.
    """
    prepared = prepare(config, out / "sweep", dtype, torch.device("cpu"))
    for number, run in enumerate(config.runs, 1):
        run_one(prepared, run, retry_failed=True)
        found = next(r for r in read_sweep(out / "sweep").runs if r.name == run.name)
        if found.outcome is None:
            why = found.error or "another process is at it"
            raise TrainingFailed(f"training {run.method} of the demo in {out}: {why}. The other runs are kept.")
        on_message(
            f"{number}/{len(config.runs)} {run.method}, seed {run.settings['seed']}: learnt "
            f"{found.outcome.learning:.3f}, forgot {found.outcome.forgetting:.3f} nats a token, trained in "
            f"{found.outcome.seconds:.0f} s"
        )
    return read_sweep(out / "sweep")


def sweep_config(base: Path, out: Path, settings: DemoSettings) -> SweepConfig:
    """The demo as a sweep: every method with the first seed, then with the next."""
    data = out / "data"
    anchored = any(method.anchor_weight for method in settings.methods)
    config = make_config(
        {
            "model": str(base),
            "cache": str(out / "cache"),
            **({"anchor_cache": str(out / ANCHORS)} if anchored else {}),
            "data": str(data / "new_train.jsonl"),
            "new": str(data / "new_heldout.jsonl"),
            "prior": str(data / "prior_heldout.jsonl"),
            "scales_of": "none",  # a demo is over soon
            "grid": {
                "seed": list(settings.seeds),
                "max_steps": settings.max_steps,
                "batch_size": settings.batch_size,
                "rank": settings.rank,
                "weight": settings.weight,
            },
            "methods": {
                m.name: {"regularizer": m.regularizer, "lr": m.lr}
                | ({"anchor_weight": m.anchor_weight} if anchored else {})
                for m in settings.methods
            },
        },
        "the demo",
    )
    return replace(config, runs=tuple(sorted(config.runs, key=lambda run: settings.seeds.index(run.settings["seed"]))))


def fill_cache(
    model: str | Path,
    data: Path,
    path: Path,
    settings: DemoSettings,
    on_message: Callable[[str], None],
    dtype: Dtype = "float32",
    what: str = "Precompute",
) -> LogitCache:
    """A cache that the demo's runs are trained with. what: its name in the message."""
    started = perf_counter()
    job = CaptureSettings(top_k=settings.top_k, max_length=settings.max_length)
    report = precompute(model, data, path, job, loading=LoadSettings(dtype=dtype, device="cpu"))
    cache = LogitCache.open(path)
    ran = f"the base ran once over {report.num_tokens:,} tokens in {perf_counter() - started:.0f} s"
    done = ran if report.num_tokens else "nothing left to run"
    on_message(
        f"{what}: {done}; the cache holds {cache.num_positions:,} positions in {cache.num_bytes / 2**20:.1f} MiB."
    )
    return cache


def write_data(folder: Path, settings: DemoSettings) -> tuple[Path, Path, Path]:
    """The three JSONL files: new text to train on, new text held out, prior text held out."""
    folder.mkdir(parents=True, exist_ok=True)
    code_train, code_held_out = split(code_documents())
    _, prose_held_out = split(prose_documents())
    prior = _pieces(prose_held_out)
    parts = {
        "new_train": spread(code_train, settings.max_steps * settings.batch_size),
        "new_heldout": spread(code_held_out, settings.num_held_out),
        "prior_heldout": spread(prior, settings.num_held_out),
    }
    for name, documents in parts.items():
        write_documents(folder / f"{name}.jsonl", documents)
    train_set, new, prior_path = (folder / f"{name}.jsonl" for name in parts)
    return train_set, new, prior_path


def write_documents(path: Path, documents: Sequence[Document]) -> None:
    """Rows of `text`, with the name of the document as `source`."""
    lines = (json.dumps({"text": d.text, "source": d.name}, ensure_ascii=False) + "\n" for d in documents)
    replace_file(path, "".join(lines).encode())


def summary_rows(sweep: Sweep) -> list[list[str]]:
    """The demo's table: base first, then each method, means over seeds ± half the range where there are several."""
    found = by_method(sweep)
    base = next(iter(found.values()))[0]
    rows = [["", "learnt", "forgot (KL)", "first tokens changed", "new CE", "prior CE", "s a run"]]
    rows.append(["base", "", "", "", f"{base.new.ce_before:.3f}", f"{base.prior.ce_before:.3f}", ""])
    for method, runs in found.items():
        changed = sum(r.prior.num_first_changed for r in runs) / len(runs)
        cells = [
            _mean_and_range([r.learning for r in runs]),
            _mean_and_range([r.forgetting for r in runs]),
            f"{changed:.4g} of {base.prior.num_documents}",
            _mean_and_range([r.new.ce_after for r in runs]),
            _mean_and_range([r.prior.ce_after for r in runs]),
        ]
        rows.append([method, *cells, f"{sum(r.seconds for r in runs) / len(runs):.0f}"])
    return rows


def relative_sentences(sweep: Sweep) -> list[str]:
    """Each method against the first (plain LoRA), in words: means over seeds."""
    means = {
        method: (sum(r.learning for r in runs) / len(runs), sum(r.forgetting for r in runs) / len(runs))
        for method, runs in by_method(sweep).items()
    }
    (first, (learnt, forgotten)), *others = means.items()
    return [
        f"{method}: forgets {100 * (1 - f / forgotten):.0f} % less than {first} and learns "
        f"{100 * x / learnt:.0f} % as much (KL to the base on prior text {_nats(f)} against {_nats(forgotten)} nats, "
        f"fall of cross-entropy on new text {_nats(x)} against {_nats(learnt)})."
        for method, (x, f) in others
    ]


def write_report(out: Path, sweep: Sweep, cache: LogitCache, settings: DemoSettings) -> None:
    """frontier.png and report.md."""
    title = f"{cache.num_positions:,} tokens of source code, {len(settings.seeds)} seeds, one cache"
    fixed = "Methods, learning rates, weight and seeds were fixed before the first run."
    page: list[Block] = [
        Heading("logitcache demo: learning and forgetting", 1),
        Paragraph(
            "A small base model that knows English prose (Python's documentation) is fine-tuned on source code. "
            f"{what_was_run(cache, settings)}"
        ),
        Paragraph(
            f"{MEASURED} First tokens changed: documents of prior text whose first token is predicted otherwise. "
            f"Means over {len(settings.seeds)} seeds, ± half the range."
        ),
        Table(summary_rows(sweep)),
        Bullets(tuple(relative_sentences(sweep))),
        frontier(out, sweep, settings, title, fixed),
    ]
    (out / "report.md").write_text(as_markdown(page), encoding="utf-8")


def what_was_run(cache: LogitCache, settings: DemoSettings) -> str:
    """Sentences on the work of a demo: that of every method, and that of the base."""
    return (
        f"Every method sees the same {settings.max_steps} steps of {settings.batch_size} samples. The base ran once "
        f"over them, into a cache of {cache.num_positions:,} positions ({cache.num_bytes / 2**20:.1f} MiB, "
        f"{cache.num_bytes / cache.num_positions:.0f} bytes a position), and never again."
    )


def frontier(out: Path, sweep: Sweep, settings: DemoSettings, title: str, fixed: str) -> Picture:
    """Draw frontier.png; the picture with a demo's hyperparameters below it. fixed: when they were, a sentence."""
    points = {method: [(r.learning, r.forgetting) for r in runs] for method, runs in by_method(sweep).items()}
    frontier_picture(points, out / "frontier.png", title)
    learning_rates = "; ".join(f"{method.name} {method.lr:g}" for method in settings.methods)
    return Picture(
        out / "frontier",
        "learning against forgetting",
        f"Peak learning rates: {learning_rates}. LoRA rank {settings.rank} on every linear layer but the head, "
        f"cosine schedule, weight of the KL {settings.weight:g}, {settings.top_k} alternatives a position with the "
        f"tail as one outcome. {fixed}",
    )


def claim_folder(out: Path, settings: DemoSettings) -> None:
    """Write demo.json into a folder that is empty, or this demo's own. Raises `TrainingFailed` for any other."""
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


def spread(items: Sequence[T], count: int) -> list[T]:
    """`count` items (or all), evenly spread over the list."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def by_method(sweep: Sweep) -> dict[str, list[RunOutcome]]:
    """The outcomes of each method, in the order of the seeds. Every run is finished."""
    grouped: dict[str, list[RunOutcome]] = {}
    for run in sweep.runs:
        assert run.outcome is not None
        grouped.setdefault(run.method, []).append(run.outcome)
    return grouped


def _mean_and_range(values: list[float]) -> str:
    mean, half_range = sum(values) / len(values), (max(values) - min(values)) / 2
    return _nats(mean) + (f" ± {half_range:.3f}" if len(values) > 1 else "")


def _nats(value: float) -> str:
    """Three decimals, and no minus sign on what rounds to zero."""
    return f"{round(value, 3) + 0.0:.3f}"
