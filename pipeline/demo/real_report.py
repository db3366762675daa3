"""report.md and frontier.png of the real demo: the table, the same questions side by side, and what it took.

Owns their words. Must not run a model: it is given what the sweep came to.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from logitcache.reports.page import Block, Bullets, Heading, Paragraph, Table, as_markdown
from logitcache.reports.results import Sweep
from logitcache.storage import LogitCache
from logitcache.storage.files import replace_file

from .kept import Clock
from .run import MEASURED, DemoSettings, by_method, frontier, relative_sentences, summary_rows, what_was_run

Answered = Mapping[str, Mapping[str, str]]
"""By method, then question: the answer."""


def write_real_report(
    out: Path,
    sweep: Sweep,
    cache: LogitCache,
    anchors: LogitCache,
    settings: DemoSettings,
    about: Mapping[str, Any],
    answered: Answered,
    clock: Clock,
) -> None:
    """frontier.png and report.md."""
    page = [
        *_results(out, sweep, cache, anchors, settings, about),
        *_questions(answered),
        *_cost(sweep, cache, clock),
    ]
    replace_file(out / "report.md", as_markdown(page).encode())


def _results(
    out: Path, sweep: Sweep, cache: LogitCache, anchors: LogitCache, settings: DemoSettings, about: Mapping[str, Any]
) -> list[Block]:
    text, num_seeds = about["new text"], len(settings.seeds)
    prior = next(iter(by_method(sweep).values()))[0].prior
    seeds = "One seed" if num_seeds == 1 else f"Means over {num_seeds} seeds, ± half the range"
    title = f"{cache.num_positions:,} tokens of {text['what']}, one cache"
    fixed = "The settings are those of a trial of one seed, fixed before this demo was first run."
    weights = sorted({f"{method.anchor_weight:g}" for method in settings.methods if method.anchor_weight})
    return [
        Heading("logitcache demo --real: a language model learns, and forgets", 1),
        Paragraph(
            f"Base: {about['base']}. New text: {text['what']} from {text['source']} ({text['licence']}). Prior text: "
            f"the base's own greedy answers to everyday prompts, {prior.num_positions:,} tokens; nothing is trained on "
            "them."
        ),
        Paragraph(what_was_run(cache, settings)),
        Paragraph(
            "Methods with anchors hold the base by its own answers to other everyday prompts as well, of other "
            f"subjects: a second cache of {anchors.num_positions:,} positions ({anchors.num_bytes / 2**20:.1f} MiB). "
            f"Each step compares a few of them with the base (full KL, weight {', '.join(weights)})."
        ),
        Paragraph(
            f"{MEASURED} First tokens changed: answers of which the first token is predicted otherwise. {seeds}."
        ),
        Table(summary_rows(sweep)),
        Bullets(tuple(relative_sentences(sweep))),
        frontier(out, sweep, settings, title, fixed),
    ]


def _questions(answered: Answered) -> list[Block]:
    """One row a question, one column a model."""
    questions = list(next(iter(answered.values())))
    rows = [["question", *answered]]
    rows += [[question, *(told[question] or "(nothing)" for told in answered.values())] for question in questions]
    return [
        Heading("The same questions"),
        Paragraph(
            "Greedy answers of the base and of each method's adapter (the first seed's), whole or cut at the limit, as "
            "they came out."
        ),
        Table(rows, num_text=len(rows[0])),
    ]


def _cost(sweep: Sweep, cache: LogitCache, clock: Clock) -> list[Block]:
    rows = [["part", "seconds"], *([part, f"{seconds:,.0f}"] for part, seconds in clock.seconds.items())]
    rows.append(["in all", f"{sum(clock.seconds.values()):,.0f}"])
    steps = "; ".join(
        f"{method} {sum(r.seconds for r in runs) / sum(r.num_steps for r in runs):.2f}"
        for method, runs in by_method(sweep).items()
    )
    return [
        Heading("What it took"),
        Table(rows),
        Paragraph(
            f"On {os.cpu_count()} cores without a GPU, in {cache.manifest.model.dtype}; at most "
            f"{clock.peak_memory_bytes / 2**20:,.0f} MiB of memory. Seconds a step of training: {steps}."
        ),
    ]
