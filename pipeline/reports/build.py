"""The report on a sweep: which words, tables and pictures stand on the page, and the files it is written to.

Owns the wording: it says of every number over how many runs and seeds it is taken, and what speaks for a method in the
same form as what speaks against it. The rows are `tables`', the drawing is `plots`'; must not print.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitcache.storage.files import replace_file

from .answer import answer_blocks, answer_lines
from .csv_file import COLUMNS, write_csv
from .page import Block, Bullets, Heading, Paragraph, Picture, Table, as_html, as_markdown
from .pareto import (
    CURVE_SHARE,
    SEED,
    Budgets,
    Setting,
    Spent,
    by_cross_entropy,
    representative,
    scaled_settings,
    spent_on,
)
from .plots import CE_RISE, FORGETTING, cost_picture, curves_picture, sweep_frontier_picture
from .results import Sweep, read_sweep
from .tables import (
    Rows,
    View,
    budget_rows,
    count,
    counts_sentence,
    equal_learning_sentences,
    front_rows,
    main_rows,
    method_rows,
    run_rows,
    scaled_rows,
    setting_rows,
    value_text,
    view_of,
)

PICTURES = (".png", ".svg")
MAX_LABEL = 40
"""Characters of the prior text's name beside an axis."""


@dataclass(frozen=True)
class SweepReport:
    """What was written, and of it what fits a terminal: the answer, the main table and some sentences."""

    answer: tuple[str, ...]
    rows: Rows
    sentences: tuple[str, ...]
    files: tuple[Path, ...]


def write_sweep_report(folder: Path, out: Path) -> SweepReport:
    """report.html, report.md, results.csv and the pictures, into the folder `out`.

    Raises what `results.read_sweep` raises; nothing is written then.
    """
    sweep = read_sweep(folder)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(sweep, out / "results.csv")
    blocks = _opening(sweep)
    rows: Rows = []
    sentences: list[str] = []
    answer: list[str] = []
    if sweep.finished:
        view = view_of(sweep)
        rows, sentences, answer = main_rows(view), equal_learning_sentences(view), answer_lines(view)
        blocks[1:1] = answer_blocks(view)
        blocks += [*_comparison(view, rows, sentences, out), *_scaled(view), *_cost(sweep, out), *_settings(view)]
    else:
        blocks.append(Paragraph("No run has finished: there is nothing to compare yet."))
    blocks += [*_runs(sweep), *_csv_columns()]
    for name, text in (("report.html", as_html(blocks)), ("report.md", as_markdown(blocks))):
        replace_file(out / name, text.encode())
    stems = [block.stem for block in blocks if isinstance(block, Picture)]
    files = [out / "report.html", out / "report.md", out / "results.csv"]
    files += [stem.with_name(stem.name + kind) for stem in stems for kind in PICTURES]
    return SweepReport(tuple(answer), rows, (counts_sentence(sweep), *sentences), tuple(files))


def _opening(sweep: Sweep) -> list[Block]:
    seeds = sorted({str(run.settings[SEED]) for run in sweep.runs}, key=lambda s: (len(s), s))
    trained = f"{sweep.num_train_tokens:,} tokens ({sweep.num_train_positions:,} predicted positions)"
    return [
        Heading("Learning against forgetting: what the sweep came to", 1),
        Heading("What was compared"),
        Paragraph(
            f"{count(len(sweep.methods), 'method')} of fine-tuning {sweep.model} are compared, each trained on "
            f"{trained} with seeds {', '.join(seeds)}. Learning is measured on {sweep.new}, forgetting on "
            f"{sweep.prior}, the prior text. {counts_sentence(sweep)}"
        ),
        Bullets(
            (
                "Learning: by how much the cross-entropy on new text is lower than the untouched base's, in nats a "
                "token. More is better.",
                "Forgetting: how far the adapted model is from the untouched base on prior text, as the mean "
                "KL(base || adapted) in nats a token, over the base's most probable tokens with the rest as one "
                "outcome. Less is better; 0 is the base itself.",
                "First tokens changed: the documents of prior text at whose first supervised position base and adapted "
                "model predict another token first. Greedy answers part there at once.",
                "The cross-entropy on prior text stands beside them, as its change. It may fall while every answer "
                "changes, where the text is not what the base itself would say; logitcache answers makes prior text "
                "of the base's own answers.",
                "A setting is a method with all its settings but the seed. Only means over a setting's seeds are "
                "compared, and nothing is interpolated between settings.",
                "[low, high] is the 95 % t-interval of a mean over seeds. It tells how far other seeds may lie, not "
                "how far other text may.",
            )
        ),
        *_failed(sweep),
        Heading("Methods"),
        Table(method_rows(sweep), num_text=4),
    ]


def _failed(sweep: Sweep) -> list[Block]:
    failed = [run for run in sweep.runs if run.status == "failed"]
    if not failed:
        return []
    steps = ["" if run.error_step is None else f" at step {run.error_step}" for run in failed]
    items = (f"{r.name} ({r.method}) failed{step}: {r.error}" for r, step in zip(failed, steps, strict=True))
    return [Heading("Failed runs"), Bullets(tuple(items))]


def _comparison(view: View, rows: Rows, sentences: Sequence[str], out: Path) -> list[Block]:
    budgets, limit, methods = view.budgets, view.limit, view.sweep.methods
    text = view.sweep.prior.rstrip("/").rsplit("/", 1)[-1][-MAX_LABEL:]
    paths = {name: [out / f"{name}{kind}" for kind in PICTURES] for name in ("frontier", "frontier-ce")}
    found = {m: [curve for s in members if (curve := scaled_settings(s))] for m, members in view.groups.items()}
    curves = {m: of_method for m, of_method in found.items() if of_method}
    points = {m: [[(p.learning.mean, p.forgetting.mean) for p in c] for c in each] for m, each in curves.items()}
    sweep_frontier_picture(view.settings, methods, paths["frontier"], FORGETTING.format(text=text), points)
    beside = by_cross_entropy(view.settings)
    points = {m: [[(p.learning.mean, p.ce_rise.mean) for p in c] for c in each] for m, each in curves.items()}
    sweep_frontier_picture(beside, methods, paths["frontier-ce"], CE_RISE.format(text=text), points)
    return [
        Heading("The methods in one table"),
        Paragraph(
            "Most learning of any setting whose mean forgetting is at most a budget, in nats a token. "
            f"{_budget_rule(budgets)} A dash: no setting of the method forgets so little."
        ),
        Table(rows),
        Paragraph(
            "Hypervolume: the area of all (learning, forgetting) that some setting of the method equals or betters, "
            f"from the reference point (learning 0, forgetting {limit:.2f} nats). That is the worst mean forgetting, "
            "rounded up to .01, of any setting that learns and that no other of its method betters in both. More is "
            "better. It compares methods of this sweep only."
        ),
        *_caveats(view),
        Heading("Frontier"),
        Picture(
            out / "frontier",
            "learning against forgetting, every setting",
            f"Learning against forgetting (KL to the base) of {count(len(view.settings), 'setting')}: right and down "
            "is better. Faint signs are seeds, those with a white rim their mean, bars the 95 % interval of the mean "
            "(none with one seed; a bar that ends at the frame goes on beyond it). A line joins settings of a method "
            "that differ in one field only: the learning rate where it was varied. The grey steps are the front."
            + _dotted(points),
        ),
        Paragraph(
            "The front, from the least learning to the most: no setting learns more and forgets less than these."
        ),
        Table(front_rows(view), num_text=2),
        Picture(
            out / "frontier-ce",
            "learning against the change of cross-entropy, every setting",
            "The same settings against the change of the cross-entropy on prior text. A method may stand well here and "
            "badly above: text that is as likely as before does not say that the model would still say it.",
        ),
        Heading("The best setting at each budget of forgetting"),
        Table(budget_rows(view)),
        Heading("At equal learning"),
        Paragraph(
            f"Each method in turn sets how much is to be learnt: by its best setting within {100 * CURVE_SHARE:.0f} % "
            f"of {max(budgets.largest, 0.0):.3g} nats, or the one that forgets least where none stays within. The "
            "others answer with their least forgetting among settings that learn as much or more."
        ),
        Bullets(tuple(sentences)),
        *_curves(view, out),
    ]


def _dotted(points: dict[str, Any]) -> str:
    """What the dotted lines are, where there are any."""
    if not points:
        return ""
    return (
        " A dotted line leads from the base, at 0, to a run over parts of the run's change of the weights (open "
        "circles): nothing was trained for these."
    )


def _budget_rule(budgets: Budgets) -> str:
    whose = "plain cross-entropy" if budgets.of_reference else "any setting (there is no plain cross-entropy here)"
    if len(budgets.nats) == 1:
        return f"The only budget is 0, since the largest mean forgetting of {whose} is {budgets.largest:.3g}."
    shares = ", ".join(f"{100 * share:.0f}" for share in budgets.shares)
    return f"Budgets are {shares} % of {budgets.largest:.3g}, the largest mean forgetting of {whose}."


def _caveats(view: View) -> list[Block]:
    """What a reader must know before believing a difference."""
    settings, items = view.settings, []
    seeds = [s.learning.num_seeds for s in settings]
    if (single := seeds.count(1)) > 0:
        items.append(
            f"{single} of {count(len(settings), 'setting')} {'has' if single == 1 else 'have'} one seed: nothing says "
            "how much of these numbers is chance, and no interval is given."
        )
    if 2 in seeds:
        items.append("With two seeds an interval is wide: 12.7 standard errors to each side.")
    lacking = [s for s in settings if s.learning.num_seeds < s.num_planned]
    if lacking:
        which = "; ".join(f"{s.method}{view.of(s)}: {s.learning.num_seeds} of {s.num_planned}" for s in lacking)
        items.append(f"Seeds are missing (failed or not finished), and means are over the others: {which}.")
    counts = {m: len(view.groups.get(m, [])) for m in view.sweep.methods}
    if len(set(counts.values())) > 1:
        tried = ", ".join(f"{m} {n}" for m, n in counts.items())
        items.append(f"The methods have different numbers of settings ({tried}): the best of more tries looks better.")
    items.append(
        "The best setting is chosen by the same text and seeds that it is measured on. That flatters every method with "
        "several settings."
    )
    return [Bullets(tuple(items))]


def _curves(view: View, out: Path) -> list[Block]:
    chosen = {m: representative(settings, view.budgets) for m, settings in view.groups.items()}
    drawn = [s for s in chosen.values() if any(run.curve for run in s.runs)]
    if not drawn:
        return []
    labels = {f"{s.method}, {_with_rate(view, s)}": s for s in drawn}
    curves_picture(labels, view.sweep.methods, [out / f"curves{kind}" for kind in PICTURES])
    seeds = ", ".join(f"{label} ({count(len(s.runs), 'seed')})" for label, s in labels.items())
    differ = len({s.values.get("lr") for s in drawn}) > 1
    rates = " The learning rates differ, so that a curve is of this setting, not of its method." if differ else ""
    return [
        Heading("Learning curves"),
        Picture(
            out / "curves",
            "cross-entropy and regulariser against the step",
            "Cross-entropy on training text, and the regulariser, against the optimizer step: means since the last "
            f"logged step. One setting a method, chosen as above: {seeds}.{rates} Plain cross-entropy has no "
            "regulariser, and methods may have different ones: the right side compares seeds and shapes, not heights.",
        ),
    ]


def _with_rate(view: View, setting: Setting) -> str:
    """In which settings a method's runs differ, with their values, the learning rate always among them."""
    label = view.label(setting.values, setting.method)
    rate = f"lr {value_text(setting.values.get('lr'))}"
    return label if rate in label.split(", ") else ", ".join(filter(None, (rate, label)))


def _scaled(view: View) -> list[Block]:
    """The curves between the base and runs, and why some runs have none."""
    rows, runs = scaled_rows(view), view.sweep.finished
    lacking = [f"{run.name}: {run.not_scaled}" for run in runs if run.not_scaled is not None]
    head = Heading("Between the base and a run, for nothing")
    if len(rows) == 1:
        return [head, Bullets(tuple(lacking))] if lacking else []
    return [
        head,
        Paragraph(
            "The model at a part s of a run's change of the weights, W_base + s (W_adapted - W_base), the curve of "
            "WiSE-FT (arXiv 2109.01903): measured after training, at the cost of an evaluation each. 0 is the base and "
            "1 the run. A regulariser is worth its training where it lies below and to the right of this curve."
        ),
        Table(rows, num_text=2),
        *([Bullets(tuple(lacking))] if lacking else []),
    ]


def _cost(sweep: Sweep, out: Path) -> list[Block]:
    """Seconds a step and in all, of the runs that read the base, and of those that need none apart from them."""
    reading, plain = spent_on(sweep.finished)
    head = Heading("What it cost, against a live base")
    if reading is None and plain is None:
        return [head, Paragraph("Not measured in this sweep.")]
    unit, size = _time_unit(max(_longest(spent) for spent in (reading, plain) if spent is not None))
    heads = ["seconds a step", f"all steps, {unit}", f"the base once, {unit}", "against a live base"]
    rows = [["", "runs", "steps", *heads]]
    pictures: list[Block] = []
    if reading is not None:
        rows += _reading_rows(reading, size)
        pictures = _cost_picture(reading, unit, size, out)
    if plain is not None:
        rows.append(["runs that need no base", *_spent_cells(plain, plain.step_seconds, size), "-", "-"])
    return [head, Paragraph(_how_measured(reading, plain)), Table(rows), *pictures]


def _reading_rows(spent: Spent, size: float) -> Rows:
    once, live = (spent.base_once_seconds or 0.0), (spent.live_total or 0.0)
    ratio = f"{(spent.total + once) / live:.2f}" if live > 0 else "-"
    with_cache = [*_spent_cells(spent, spent.step_seconds, size), f"{once / size:.3g}", ratio]
    with_live = [*_spent_cells(spent, spent.step_seconds + (spent.base_step_seconds or 0.0), size), "-", "1.00"]
    return [["runs that read the cache", *with_cache], ["the same with a live base", *with_live]]


def _spent_cells(spent: Spent, step_seconds: float, size: float) -> list[str]:
    steps = spent.num_steps
    return [f"{spent.num_runs:,}", f"{steps:,}", f"{step_seconds:.3g}", f"{steps * step_seconds / size:.3g}"]


def _longest(spent: Spent) -> float:
    return spent.live_total if spent.live_total is not None else spent.total


def _cost_picture(spent: Spent, unit: str, size: float, out: Path) -> list[Block]:
    if not spent.live_total or spent.base_once_seconds is None:
        return []
    bars = {
        "with the cache": {"training": spent.total / size, "the base, once": spent.base_once_seconds / size},
        "with a live base": {
            "training": spent.total / size,
            "the base, in every step": (spent.live_total - spent.total) / size,
        },
    }
    cost_picture(bars, unit, [out / f"cost{kind}" for kind in PICTURES])
    caption = f"The runs that read the cache, as bars, in {unit}; those that need no base are not in them."
    return [Picture(out / "cost", "time with the cache and with a live base", caption)]


def _how_measured(reading: Spent | None, plain: Spent | None) -> str:
    kinds = {"that read the cache": reading, "that need no base": plain}
    where = " ".join(_where_measured(spent, kind) for kind, spent in kinds.items() if spent is not None)
    return (
        f"{where} Seconds a step are the median over runs of each run's median step, batches and lookups included, "
        "saving and evaluation not. What a live base would have added, its forward over the same batches up to its "
        "log-softmax, was timed right after each run in the same process, and so was the base once over all that a run "
        "reads, scaled by tokens. The memory that a live base takes is in neither."
    )


def _where_measured(spent: Spent, kind: str) -> str:
    """Whether runs of a kind had the machine to themselves, and which of them the seconds are of."""
    num, alone = spent.num_runs, spent.num_alone
    if alone == num:
        return f"All {count(num, 'run')} {kind} were alone on the machine while they were measured."
    seen = f" (a load of {min(spent.loads):.1f} to {max(spent.loads):.1f})" if spent.loads else ""
    if alone:
        return (
            f"Of {count(num, 'run')} {kind}, {alone:,} {'was' if alone == 1 else 'were'} alone on the machine, and the "
            f"seconds are {'its' if alone == 1 else 'theirs'}; the others shared it with other work{seen}."
        )
    return (
        f"Not measured alone: the {count(num, 'run')} {kind} shared the machine with other work{seen}, so the seconds "
        "are longer than they need be, and only their ratios within a row's own run say something."
    )


def _settings(view: View) -> list[Block]:
    return [
        Heading("Every setting"),
        Paragraph(
            "Means over seeds. Learning, forgetting and cross-entropy in nats a token. Prevented: 1 - forgetting / "
            "forgetting of plain cross-entropy in the same setting but for the objective (adapter, rank, learning "
            "rate, ...); a dash where there is no such setting, or where it does not forget. Prior perplexity: its "
            "change on prior text. KL on new: mean KL(base || adapted) on new text, nats. Same first token: share of "
            "all positions of prior text where base and adapted model predict the same token first."
        ),
        Table(setting_rows(view), num_text=2),
    ]


def _runs(sweep: Sweep) -> list[Block]:
    base = ""
    if sweep.finished and (first := sweep.finished[0].outcome) is not None:
        base = (
            f" The untouched base has a perplexity of {first.new.perplexity_before:.4g} on new text "
            f"({first.new.num_positions:,} positions) and {first.prior.perplexity_before:.4g} on prior text "
            f"({first.prior.num_positions:,} positions in {count(first.prior.num_documents, 'document')})."
        )
    return [
        Heading("Every run"),
        Paragraph(f"Learning, forgetting and cross-entropy in nats a token; perplexities of the adapted model.{base}"),
        Table(run_rows(sweep), num_text=3),
    ]


def _csv_columns() -> list[Block]:
    listed = ((name, meaning) for name, (meaning, _) in COLUMNS.items())
    return [
        Heading("Columns of results.csv"),
        Paragraph(
            "One row a run, whatever its status; between error_step and learning_nats a column for each setting."
        ),
        Table([["column", "meaning"], *map(list, listed)], num_text=2),
    ]


def _time_unit(seconds: float) -> tuple[str, float]:
    return ("seconds", 1) if seconds < 600 else ("minutes", 60) if seconds < 7200 else ("hours", 3600)
