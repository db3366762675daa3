"""Tables of what runs came to. Owns their presentation; measures nothing and prints nothing."""

from collections.abc import Callable, Sequence

from .evaluate import Comparison, Metrics

_METRICS: list[tuple[str, str, str, Callable[[Metrics], float]]] = [
    ("cross-entropy, nats a token", "{:.3f}", "{:+.3f}", lambda m: m.ce_nats),
    ("perplexity", "{:.2f}", "{:+.2f}", lambda m: m.perplexity),
    ("token accuracy, %", "{:.1f}", "{:+.1f}", lambda m: 100 * m.token_accuracy),
]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length as aligned text: the first is the heading, the first column is left-aligned."""
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


def evaluation_rows(results: dict[str, Comparison]) -> list[list[str]]:
    """Heading and rows (metric, before, after, change) of data sets, named by the keys."""
    rows = [["", "before", "after", "change"]]
    for name, result in results.items():
        for label, plain, signed, value in _METRICS:
            old = value(result.before)
            new = None if result.after is None else value(result.after)
            change = ["-", "-"] if new is None else [plain.format(new), signed.format(new - old)]
            rows.append([f"{name}: {label}", plain.format(old), *change])
        if result.kl_nats is not None:
            rows.append([f"{name}: KL(base || adapted), nats a token", "0", f"{result.kl_nats:.3f}", ""])
        rows.append([f"{name}: positions", f"{result.before.num_positions:,}", "", ""])
    return rows
