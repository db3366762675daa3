"""Tables of what runs came to. Owns their presentation; measures nothing and prints nothing."""

from collections.abc import Callable, Sequence

from logitcache.storage.plain_text import escaped

from .metrics import Comparison, Metrics, TaskScore

_METRICS: list[tuple[str, str, float, str, Callable[[Metrics], float]]] = [
    ("cross-entropy, nats a token", ".3f", 1, "ce_change", lambda m: m.ce_nats),
    ("perplexity", ".2f", 1, "perplexity_change", lambda m: m.perplexity),
    ("token accuracy, %", ".1f", 100, "accuracy_change", lambda m: m.token_accuracy),
]
"""Name, format, factor of what is shown, key of the interval of the change, value."""


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length as aligned text: the first is the heading, the first column is left-aligned."""
    rows = [[escaped(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join([line(rows[0]), "  ".join("-" * w for w in widths), *(line(row) for row in rows[1:])])


def markdown_table(rows: Sequence[Sequence[str]], num_text: int = 1) -> str:
    """The same rows in Markdown; so many first columns are left-aligned."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    rule = "|" + "|".join(" --- " if i < num_text else " ---: " for i in range(len(rows[0]))) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def evaluation_rows(
    results: dict[str, Comparison], prevented: float | None = None, scores: Sequence[TaskScore] = ()
) -> list[list[str]]:
    """Heading and rows (what and in which unit, before, after, change, its 95 % interval).

    results: data sets, named by the keys. prevented: share of the drift on "prior" that plain cross-entropy had and
    this adapter has not. scores: of benchmark tasks, below them.
    """
    rows = [["", "before", "after", "change", "95 % interval of the change"]]
    for name, result in results.items():
        share = prevented if name == "prior" else None
        rows += [[f"{name}: {what}", *cells] for what, *cells in _comparison_rows(result, share)]
        size = f"{result.before.num_positions:,}"
        documents = f" in {result.num_documents:,} documents" if result.num_documents else ""
        rows.append([f"{name}: positions{documents}", size, "", "", ""])
    return rows + [_score_row(score) for score in scores]


def _comparison_rows(result: Comparison, prevented: float | None) -> list[list[str]]:
    rows = []
    for what, digits, factor, key, value in _METRICS:
        old = factor * value(result.before)
        if result.after is None:
            rows.append([what, _number(old, digits), "-", "-", ""])
            continue
        new = factor * value(result.after)
        change, spread = _number(new - old, f"+{digits}"), _interval(result, key, f"+{digits}", factor)
        rows.append([what, _number(old, digits), _number(new, digits), change, spread])
    if result.after is None or result.kl_nats is None or result.base_ce_nats is None or result.agreement is None:
        return rows
    drift, shared = result.drift_percent or 0.0, 100 * result.agreement
    least = "" if result.before_from == "base" else ", at least"
    kl, entropy = f"{result.kl_nats:.3f}", f"{result.base_ce_nats - result.kl_nats:.3f}"
    kl_interval = _interval(result, "kl", ".3f")
    rows.append(["drift of perplexity, %", "", "", _number(drift, "+.1f"), _interval(result, "drift_percent", "+.1f")])
    if prevented is not None:
        rows.append(["drift of the plain adapter that is prevented, %", "", "", f"{100 * prevented:.1f}", ""])
    rows += [
        [f"KL(base || adapted), nats a token{least}", "0", kl, kl, kl_interval],
        [f"cross-entropy to the base's own prediction{least}", entropy, f"{result.base_ce_nats:.3f}", kl, kl_interval],
        [
            "same first token as the base, %",
            "100",
            f"{shared:.1f}",
            _number(shared - 100, "+.1f"),
            _interval(result, "agreement", "+.1f", 100, -100),
        ],
    ]
    if result.undecided:
        rows.append(["first token left open by the cache's rounding, %", "", f"{100 * result.undecided:.1f}", "", ""])
    return rows


def _score_row(score: TaskScore) -> list[str]:
    what = f"{score.task}: {score.metric}, {score.num_documents:,} documents"
    if score.after is None:
        return [what, _number(score.before, ".4f"), "-", "-", ""]
    spread = "" if score.interval is None else " to ".join(_number(end, "+.4f") for end in score.interval)
    change = _number(score.after - score.before, "+.4f")
    return [what, _number(score.before, ".4f"), _number(score.after, ".4f"), change, spread]


def _interval(result: Comparison, key: str, digits: str, factor: float = 1, offset: float = 0) -> str:
    ends = result.intervals.get(key)
    return "" if ends is None else " to ".join(_number(factor * end + offset, digits) for end in ends)


def _number(value: float, digits: str) -> str:
    """Formatted; without a minus sign on what rounds to zero, and short where it is huge."""
    if abs(value) >= 1e7:
        return f"{value:.3g}"
    decimals = int(digits.rstrip("f").rpartition(".")[2])
    return f"{round(value, decimals) + 0.0:{digits}}"
