"""Pictures of what runs came to, and of what a cache kept.

Owns everything that is drawn: sizes, colours, markers, legends. Draws on figures of its own, never through pyplot, so
that no global state is left and no display is needed. Computes nothing but where things lie on the page.
"""

import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from logitcache.storage.statistics import Statistics

from .pareto import Estimate, Setting, by_method, pareto_front, varying
from .results import CurvePoint
from .tables import SCALED

COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#c45fa0", "#e69f00", "#3fa7e0", "#7a4f2b")
MARKERS = "osD^vPX*"
LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2, 2, 2)))
ORDERS = ("lr", "weight", "kl_budget", "rank", "temperature", "label_smoothing", "top_k")
"""What a line through a method's settings follows: the first of these in which they differ."""

LEARNING = "learning: fall of cross-entropy on new text, nats a token  (right is better)"
FORGETTING = "forgetting: KL(base || adapted) on {text},\nnats a token  (lower is better, 0 is the base itself)"
CE_RISE = "rise of cross-entropy on {text},\nnats a token  (lower is better, below 0 there is none)"
"""What is forgotten, by the distance from the base and by cross-entropy; text: which prior text it is measured on."""


@dataclass(frozen=True)
class Style:
    """How a method is drawn in every picture: no two of the first 64 share colour and marker."""

    colour: str
    marker: str
    line: Any
    is_hollow: bool = False


def styles_of(methods: Sequence[str]) -> dict[str, Style]:
    """A style a method, by its place in the list."""
    n = len(COLOURS)
    return {m: Style(COLOURS[i % n], MARKERS[(i + i // n) % n], LINES[(i + i // n) % n]) for i, m in enumerate(methods)}


def frontier_picture(points: dict[str, list[tuple[float, float]]], path: Path, title: str) -> None:
    """Learning against forgetting as a picture: one marker a method, a small point a seed, a large one the mean.

    points: per method, (learning, forgetting) of each seed, both in nats a token; forgetting is the KL to the base.
    """
    figure = Figure(figsize=(7.2, 5.0), dpi=130, layout="constrained")
    axes: Any = figure.subplots()
    for (method, seeds), style in zip(points.items(), styles_of(list(points)).values(), strict=True):
        xs, ys = [x for x, _ in seeds], [y for _, y in seeds]
        mean = (sum(xs) / len(xs), sum(ys) / len(ys))
        look = {"marker": style.marker, "zorder": 3}
        axes.scatter(*mean, s=150, color=style.colour, alpha=0.35, linewidths=0, **look)
        axes.scatter(*mean, s=150, facecolors="none", edgecolors=style.colour, **look)
        axes.scatter(xs, ys, s=20, color=style.colour, linewidths=0, label=method, **look)
    _frontier_axes(axes, FORGETTING.format(text="prior text"))
    axes.annotate("no forgetting", (1, 0), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="#666666")
    axes.set_title(title, fontsize=11, parse_math=False)
    axes.margins(0.18)
    axes.legend(frameon=False, title="small: one seed; large: mean over seeds")
    _save(figure, path)


Scaled = Sequence[Sequence[tuple[float, float]]]
"""Curves between the base and an adapted model: (learning, forgetting) from the base on."""


def sweep_frontier_picture(
    settings: Sequence[Setting],
    methods: Sequence[str],
    paths: Sequence[Path],
    forgetting: str,
    scaled: Mapping[str, Scaled],
) -> None:
    """Every setting of a sweep: seeds small, the mean large with its 95 % interval in both directions.

    forgetting: what it is here, beside its axis. Lines join a method's settings (see `ORDERS`); the step line is the
    Pareto front of all means. scaled: curves between the base and settings of a method, as dotted lines. Where most
    settings lie in the lowest quarter of the forgetting, a second panel shows that part.
    """
    near = _nearest(settings)
    width = 12.4 if near else 7.6
    groups, styles = by_method(settings, methods), styles_of(methods)
    legend = {**{m: styles[m] for m in groups}, **{f"{m}, {SCALED}": _scaled_style(styles[m]) for m in scaled}}
    sizes, grown = _sizes_of(settings)
    figure = Figure(figsize=(width, 5.0 + _legend_inches(list(legend), width)), dpi=130, layout="constrained")
    panels: Any = figure.subplots(1, 2 if near else 1, squeeze=False)[0]
    for axes, shown in zip(panels, (settings, near), strict=False):
        _front_line(axes, settings)
        for method, members in groups.items():
            _draw_method(axes, members, styles[method], sizes)
        for method, curves in scaled.items():
            _draw_scaled(axes, curves, _scaled_style(styles[method]))
        _frontier_axes(axes, forgetting)
        _fit(axes.set_xlim, [(s.learning, [o.learning for o in s.outcomes]) for s in shown])
        _fit(axes.set_ylim, [(s.forgetting, [0.0, *s.forgot]) for s in shown])
    if near:
        panels[0].set_title("all settings", fontsize=10)
        panels[1].set_title("only the lowest quarter of the forgetting", fontsize=10)
        panels[1].set_ylabel("")
    note = "faint: one seed; white rim: mean over seeds; bars: 95 % interval of the mean"
    _legend(figure, legend, width, f"{note}\ngrey steps: front of all means{grown}")
    _save(figure, *paths)


def curves_picture(curves: dict[str, Setting], methods: Sequence[str], paths: Sequence[Path]) -> None:
    """Cross-entropy and KL against the step, of settings by their labels: thin each seed, thick their mean."""
    of_method, width = styles_of(methods), 12.4
    styles = {label: of_method[setting.method] for label, setting in curves.items()}
    figure = Figure(figsize=(width, 4.4 + _legend_inches(list(curves), width)), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    for label, setting in curves.items():
        _draw_curves(left, [run.curve for run in setting.runs], lambda p: p.ce, styles[label])
        _draw_curves(right, [run.curve for run in setting.runs], lambda p: p.kl, styles[label])
    left.set_ylabel("cross-entropy on training text, nats a position")
    right.set_ylabel("regulariser (KL to the base), nats a position")
    if not right.lines:
        right.text(0.5, 0.5, "no run logged a KL", transform=right.transAxes, ha="center", color="#555555")
    for axes in (left, right):
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.25)
    _legend(figure, styles, width, "thin: one seed; thick: mean over seeds")
    _save(figure, *paths)


def cost_picture(bars: dict[str, dict[str, float]], unit: str, paths: Sequence[Path]) -> None:
    """Stacked bars: per bar, the time that each part took, in `unit`."""
    figure = Figure(figsize=(7.6, 2.4), dpi=130, layout="constrained")
    axes: Any = figure.subplots()
    parts = list(dict.fromkeys(part for bar in bars.values() for part in bar))
    left = [0.0] * len(bars)
    for part, colour, hatch in zip(parts, ("#c8d8e8", "#0072b2", "#d55e00"), ("", "..", "//"), strict=False):
        sizes = [bar.get(part, 0.0) for bar in bars.values()]
        axes.barh(list(bars), sizes, left=left, color=colour, hatch=hatch, edgecolor="#222222", label=part)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for place, total in enumerate(left):
        axes.text(total, place, f" {total:.3g}", va="center")
    axes.set_xlim(0, 1.12 * max(left))
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=len(parts), frameon=False, fontsize=9)
    _save(figure, *paths)


def plot_cache(statistics: Statistics, num_positions: int, title: str, path: Path) -> None:
    """What a cache kept, and what its bytes are spent on: kept mass, alternatives a row, bytes a position by column."""
    figure = Figure(figsize=(13, 4.2), dpi=130, layout="constrained")
    mass, count, size = figure.subplots(1, 3)
    mass.hist(statistics.kept_mass, bins=50, range=(0, 1), color="#3b78b8")
    mass.set_xlabel("share of the non-target mass that a row keeps")
    mass.set_ylabel(f"positions (of {statistics.num_positions:,} read)")
    _plot_alternatives(count, statistics)
    columns = {n: b / max(num_positions, 1) for n, b in statistics.bytes_by_column.items() if b >= 0.01 * num_positions}
    bars = size.barh(list(columns), list(columns.values()), color="#d1672b")
    size.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    size.set_xlabel("bytes a position")
    size.invert_yaxis()
    size.margins(x=0.18)
    for axes in (mass, count, size):
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    figure.suptitle(title, fontsize=11, parse_math=False)
    _save(figure, path)


def _plot_alternatives(axes: Any, statistics: Statistics) -> None:
    """How many alternatives rows keep; where all keep the same number, what the first of them would have kept."""
    found = statistics.num_alternatives
    highest = int(found.max(initial=1))
    if len(found) and found.min() == found.max() > 0:
        kept = statistics.mass_by_rank.cumsum()
        axes.plot(range(1, len(kept) + 1), kept, color="#3d8f4f", marker="." if len(kept) < 80 else "")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_ylim(0, 1)
        axes.set_xlabel(f"first so many of the alternatives (every row keeps {highest:,})")
        axes.set_ylabel("share of the non-target mass in them, mean")
        return
    axes.hist(found, bins=min(64, highest + 1), range=(-0.5, highest + 0.5), color="#3d8f4f")
    axes.set_xlabel("alternatives that a row keeps" if found.any() else "no row keeps alternatives")
    axes.set_ylabel("positions")


def chains_of(settings: Sequence[Setting]) -> list[list[Setting]]:
    """A method's settings as lines, each along the first field of `ORDERS` that varies, rising; the rest is equal."""
    differing = varying([s.runs[0] for s in settings])
    order = next((name for name in ORDERS if name in differing), None)
    if order is None:
        return [[s] for s in settings]
    chains: dict[tuple[object, ...], list[Setting]] = {}
    for setting in settings:
        chains.setdefault(tuple(setting.values.get(k) for k in differing if k != order), []).append(setting)
    return [sorted(chain, key=lambda s: _number(s.values.get(order))) for chain in chains.values()]


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else float("-inf")


def _sizes_of(settings: Sequence[Setting]) -> tuple[dict[float, float], str]:
    """The size of a mean's sign by its learning rate, and how the legend says it; all the same where none varies."""
    rates = sorted({_number(s.values.get("lr")) for s in settings})
    if len(rates) < 2:
        return {}, ""
    sizes = {rate: 40 + 80 * i / (len(rates) - 1) for i, rate in enumerate(rates)}
    return sizes, f"\nsigns grow with the learning rate: {', '.join(f'{rate:g}' for rate in rates)}"


def _scaled_style(style: Style) -> Style:
    return Style(style.colour, "o", (0, (1, 1.5)), is_hollow=True)


def _draw_scaled(axes: Any, curves: Scaled, style: Style) -> None:
    for curve in curves:
        xs, ys = zip(*curve, strict=True)
        axes.plot(xs, ys, color=style.colour, linestyle=style.line, linewidth=1.2, zorder=3)
        axes.scatter(xs[:-1], ys[:-1], s=22, facecolors="#ffffff", edgecolors=style.colour, linewidths=0.9, zorder=4)


def _draw_method(axes: Any, settings: Sequence[Setting], style: Style, sizes: dict[float, float]) -> None:
    for chain in chains_of(settings):
        means = [(s.learning.mean, s.forgetting.mean) for s in chain]
        axes.plot(
            *zip(*means, strict=True), color=style.colour, linestyle=style.line, linewidth=1.0, alpha=0.8, zorder=3
        )
    for s in settings:
        seeds = [(o.learning, forgot) for o, forgot in zip(s.outcomes, s.forgot, strict=True)]
        x, y = s.learning, s.forgetting
        look = {"color": style.colour, "marker": style.marker}
        if len(seeds) > 1:
            axes.scatter(*zip(*seeds, strict=True), s=14, alpha=0.55, linewidths=0, zorder=4, **look)
        bars = {"xerr": _ends(x), "yerr": _ends(y), "ecolor": style.colour, "elinewidth": 0.8, "capsize": 2}
        container = axes.errorbar(x.mean, y.mean, fmt="none", zorder=2, **bars)
        for part in (*container.lines[1], *container.lines[2]):
            part.set_alpha(0.45)
        size = sizes.get(_number(s.values.get("lr")), 62) * (1.4 if style.marker in "*X" else 1)
        axes.scatter(x.mean, y.mean, s=size, edgecolors="#ffffff", linewidths=0.8, zorder=5, **look)


def _ends(value: Estimate) -> list[list[float]] | None:
    if value.low is None or value.high is None:
        return None
    return [[value.mean - value.low], [value.high - value.mean]]


def _front_line(axes: Any, settings: Sequence[Setting]) -> None:
    front = [(s.learning.mean, s.forgetting.mean) for s in pareto_front(settings)]
    if len(front) > 1:  # between two of them the least forgetting is that of the one that learns more
        axes.step(
            *zip(*front, strict=True), where="pre", color="#cccccc", linewidth=3.5, zorder=1, solid_capstyle="round"
        )


def _frontier_axes(axes: Any, forgetting: str) -> None:
    axes.axhline(0, color="#777777", linewidth=0.8, zorder=1)
    axes.set_xlabel(LEARNING, fontsize=9)
    axes.set_ylabel(forgetting, fontsize=9, parse_math=False)
    axes.grid(alpha=0.25)


def _nearest(settings: Sequence[Setting]) -> list[Setting]:
    """The settings in the lowest quarter of the forgetting, if they are three or more and at least half; else none."""
    means = [s.forgetting.mean for s in settings]
    cut = min(means) + (max(means) - min(means)) / 4
    near = [s for s in settings if s.forgetting.mean <= cut]
    return near if max(3, len(settings) / 2) <= len(near) < len(settings) else []


def _fit(set_limits: Callable[[float, float], object], values: Sequence[tuple[Estimate, list[float]]]) -> None:
    """Limits around these values and means; intervals may add at most 30 % at each end, and are cut there."""
    points = [v for estimate, seeds in values for v in (estimate.mean, *seeds)]
    low, high = min(points), max(points)
    room = (high - low) or max(0.2 * abs(high), 0.01)
    lows = [e.low for e, _ in values if e.low is not None]
    highs = [e.high for e, _ in values if e.high is not None]
    low_end = max(min([low, *lows]), low - 0.3 * room)
    high_end = min(max([high, *highs]), high + 0.3 * room)
    set_limits(low_end - 0.1 * room, high_end + 0.1 * room)


def _draw_curves(
    axes: Any, curves: Sequence[tuple[CurvePoint, ...]], value: Callable[[CurvePoint], float | None], style: Style
) -> None:
    """Every curve thin, and where there is more than one, their mean at the steps that all of them have, thick."""
    found = [{p.step: v for p in curve if (v := value(p)) is not None} for curve in curves]
    found = [curve for curve in found if any(curve.values())]  # plain cross-entropy logs a KL of 0
    for curve in found if len(found) > 1 else []:
        axes.plot(curve.keys(), curve.values(), color=style.colour, linewidth=0.6, alpha=0.4)
    steps = sorted(set.intersection(*map(set, found))) if found else []
    if steps:
        mean = [sum(curve[step] for curve in found) / len(found) for step in steps]
        every = max(1, len(steps) // 7)
        look = {"marker": style.marker, "markersize": 5, "markevery": every, "linewidth": 1.6}
        axes.plot(steps, mean, color=style.colour, linestyle=style.line, **look)


LEGEND_WRAP = 44


def _columns(methods: Sequence[str], width: float) -> int:
    """As many as fit the width, at most 4: .9 inches for the line, .08 a letter."""
    longest = max((len(line) for m in methods for line in textwrap.wrap(m, LEGEND_WRAP)), default=1)
    return max(1, min(4, int(width // (0.9 + 0.08 * longest))))


def _legend_inches(methods: Sequence[str], width: float) -> float:
    """Height of the legend: its tallest column, a line of text being .19 inches."""
    lines = [len(textwrap.wrap(m, LEGEND_WRAP)) for m in methods]
    rows = -(-len(lines) // _columns(methods, width))
    return 0.5 + 0.19 * max((sum(lines[i : i + rows]) for i in range(0, len(lines), rows)), default=0)


def _legend(figure: Any, styles: dict[str, Style], width: float, title: str) -> None:
    """Below the axes: names of any length, wrapped; nothing in them is read as mathematics."""
    look = [
        {
            **{"color": s.colour, "marker": s.marker, "linestyle": s.line},
            "markerfacecolor": "#ffffff" if s.is_hollow else s.colour,
        }
        for s in styles.values()
    ]
    handles = [Line2D([], [], markersize=6, linewidth=1.2, **kind) for kind in look]
    legend = figure.legend(
        handles=handles,
        labels=[" "] * len(handles),  # set below: a label that begins with _ would be left out
        loc="outside lower center",
        ncols=_columns(list(styles), width),
        frameon=False,
        fontsize=9,
        handlelength=4,
        title=title,
        title_fontsize=8.5,
    )
    legend.get_title().set_multialignment("center")
    for text, method in zip(legend.get_texts(), styles, strict=True):
        text.set_parse_math(False)
        text.set_text("\n".join(textwrap.wrap(method, LEGEND_WRAP)))


def _save(figure: Any, *paths: Path) -> None:
    """Writes the figure in the formats of the names; the same figure gives the same SVG."""
    with mpl.rc_context({"svg.hashsalt": "logitcache", "svg.fonttype": "path"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a name in a script that it lacks
        for path in paths:
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
