"""Tables and pictures of what runs came to. Owns presentation; measures nothing and prints nothing."""

from collections.abc import Callable, Sequence
from pathlib import Path

from logitcache.storage.statistics import Statistics

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


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """The same rows in Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    rule = "|" + "|".join([" --- ", *(" ---: " for _ in rows[0][1:])]) + "|"
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


def frontier_picture(points: dict[str, list[tuple[float, float]]], path: Path, title: str) -> None:
    """Learning against forgetting as a picture: one marker a method, a small point a seed, a large one the mean.

    points: per method, (learning, forgetting) of each seed, both in nats a token.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 5.0), dpi=130, layout="constrained")
    styles = zip(("#444444", "#3b78b8", "#d1672b", "#3d8f4f", "#8a4fa3"), "sovD^", strict=True)
    for (method, seeds), (colour, marker) in zip(points.items(), styles, strict=False):
        xs, ys = [x for x, _ in seeds], [y for _, y in seeds]
        mean = (sum(xs) / len(xs), sum(ys) / len(ys))
        axes.scatter(*mean, s=150, color=colour, marker=marker, alpha=0.35, linewidths=0, zorder=2)
        axes.scatter(*mean, s=150, facecolors="none", edgecolors=colour, marker=marker, zorder=3)
        axes.scatter(xs, ys, s=20, color=colour, marker=marker, linewidths=0, label=method, zorder=4)
    axes.axhline(0, color="#999999", linewidth=0.8)
    axes.annotate("no forgetting", (1, 0), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="#666666")
    axes.set_xlabel("learning: fall of cross-entropy on new text, nats a token  (further right is better)")
    axes.set_ylabel("forgetting: rise of cross-entropy on prior text,\nnats a token  (lower is better)")
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25)
    axes.margins(0.18)
    axes.legend(frameon=False, title="small: one seed; large: mean over seeds")
    figure.savefig(path)
    plt.close(figure)


def plot_cache(statistics: Statistics, num_positions: int, title: str, path: Path) -> None:
    """What a cache kept, and what its bytes are spent on: kept mass, alternatives a row, bytes a position by column."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (mass, count, size) = plt.subplots(1, 3, figsize=(13, 4.2), dpi=130, layout="constrained")
    mass.hist(statistics.kept_mass, bins=50, range=(0, 1), color="#3b78b8")
    mass.set_xlabel("share of the non-target mass that a row keeps")
    mass.set_ylabel(f"positions (of {statistics.num_positions:,} read)")
    highest = int(statistics.num_alternatives.max(initial=1))
    count.hist(statistics.num_alternatives, bins=min(64, highest + 1), range=(-0.5, highest + 0.5), color="#3d8f4f")
    count.set_xlabel("alternatives that a row keeps")
    count.set_ylabel("positions")
    columns = {n: b / max(num_positions, 1) for n, b in statistics.bytes_by_column.items() if b >= 0.01 * num_positions}
    bars = size.barh(list(columns), list(columns.values()), color="#d1672b")
    size.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    size.set_xlabel("bytes a position")
    size.invert_yaxis()
    size.margins(x=0.18)
    for axes in (mass, count, size):
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)
    plt.close(figure)
