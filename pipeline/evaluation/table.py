"""Tables of what runs came to. Owns their presentation; measures nothing and prints nothing."""

from collections.abc import Callable, Mapping, Sequence

from logitcache.storage.plain_text import escaped

from .metrics import Comparison, Metrics, Prevented, TaskScore

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
    results: Mapping[str, Comparison],
    prevented: Prevented | None = None,
    scores: Sequence[TaskScore] = (),
    texts: Mapping[str, str] | None = None,
) -> list[list[str]]:
    """Heading and rows (what and in which unit, before, after, change, its 95 % interval).

    results: data sets, named by the keys. "prior" leads with how far the adapted model moved from the base, since text
    may be as likely as before while the answers are others; the rest with the cross-entropy. prevented: what
    this adapter has not of what plain cross-entropy did to "prior". scores: of benchmark tasks, below them. texts: what
    the data sets are called.
    """
    rows = [["", "before", "after", "change", "95 % interval of the change"]]
    for name, result in results.items():
        share = prevented if prevented is not None and name == "prior" else Prevented(None, None)
        moved, ce = _moved_rows(result, share.kl), _ce_rows(result, share.drift)
        both = [*moved, *ce] if name == "prior" else [*ce, *moved]
        rows += [[f"{name}: {what}", *cells] for what, *cells in (*both, *_rest_rows(result))]
        size = f"{result.before.num_positions:,}"
        documents = f" in {result.num_documents:,} documents" if result.num_documents else ""
        of = f" of {texts[name]}" if texts is not None else ""
        rows.append([f"{name}: positions{documents}{of}", size, "", "", ""])
    return rows + [_score_row(score) for score in scores]


def curve_rows(points: Sequence[tuple[float, Mapping[str, Comparison]]]) -> list[list[str]]:
    """Heading and rows of the curve between base and adapted model, a row a scale; of the texts that there are."""
    columns: list[tuple[str, str, Callable[[Comparison], str]]] = [
        ("learnt", "new", lambda r: _number(-(r.ce_change_nats or 0.0), ".3f")),
        ("forgot (KL)", "prior", lambda r: _number(r.kl_nats or 0.0, ".3f")),
        ("first tokens changed", "prior", lambda r: f"{r.num_first_changed:,} of {r.num_documents:,}"),
        ("new CE", "new", lambda r: "" if r.after is None else _number(r.after.ce_nats, ".3f")),
        ("prior CE", "prior", lambda r: "" if r.after is None else _number(r.after.ce_nats, ".3f")),
    ]
    shown = [column for column in columns if all(column[1] in results for _, results in points)]
    rows = [["scale", *(title for title, _, _ in shown)]]
    return rows + [[f"{scale:g}", *(cell(results[name]) for _, name, cell in shown)] for scale, results in points]


def closing_sentence(results: Mapping[str, Comparison], texts: Mapping[str, str]) -> str:
    """`outcome_words` as a sentence, or that there is no adapter to say it of."""
    words = outcome_words(results, texts)
    if not words:
        return "The base alone was measured. With --adapter this says what it learnt and forgot."
    return f"{words[0].upper()}{words[1:]}."


def outcome_words(results: Mapping[str, Comparison], texts: Mapping[str, str] | None = None) -> str:
    """What was learnt on "new" and forgotten on "prior", whichever of them there is, as the words of a sentence.

    Learnt: the fall of cross-entropy. Forgot: the KL to the base; the cross-entropy stands beside it. texts: what the
    data sets are called.
    """
    on = {name: f" on {(texts or {}).get(name, f'{name} text')}" for name in results}
    said = []
    if (new := results.get("new")) is not None and new.ce_change_nats is not None:
        said.append(f"learnt {_number(-new.ce_change_nats, '.3f')} nats a token{on['new']}")
    if (prior := results.get("prior")) is not None and prior.kl_nats is not None:
        least = "" if prior.before_from == "base" else "at least "
        change = _number(prior.ce_change_nats or 0.0, "+.3f")
        said.append(
            f"forgot {least}{_number(prior.kl_nats, '.3f')} nats a token{on['prior']} (KL to the base; cross-entropy "
            f"{change})"
        )
        said.append(_first_tokens(prior))
    return "; ".join(said)


def _first_tokens(result: Comparison) -> str:
    left_open = f", {result.num_first_undecided:,} left open by the cache's rounding"
    return (
        f"{result.num_first_changed:,} of {result.num_documents:,} first tokens changed"
        f"{left_open if result.num_first_undecided else ''}"
    )


def _ce_rows(result: Comparison, prevented: float | None) -> list[list[str]]:
    """How well the text is predicted."""
    rows = []
    for what, digits, factor, key, value in _METRICS:
        old = factor * value(result.before)
        if result.after is None:
            rows.append([what, _number(old, digits), "-", "-", ""])
            continue
        new = factor * value(result.after)
        change, spread = _number(new - old, f"+{digits}"), _interval(result, key, f"+{digits}", factor)
        rows.append([what, _number(old, digits), _number(new, digits), change, spread])
    if result.drift_percent is not None:
        spread = _interval(result, "drift_percent", "+.1f")
        rows.append(["drift of perplexity, %", "", "", _number(result.drift_percent, "+.1f"), spread])
    if prevented is not None:
        rows.append(["drift of the plain adapter that is prevented, %", "", "", f"{100 * prevented:.1f}", ""])
    return rows


def _moved_rows(result: Comparison, prevented: float | None) -> list[list[str]]:
    """How far the adapted model is from the base, whether the text is likely or not."""
    if result.kl_nats is None or result.num_first_changed is None or result.agreement is None:
        return []
    kl, changed, count = f"{result.kl_nats:.3f}", f"{result.num_first_changed:,}", result.num_documents
    shared = 100 * result.agreement
    rows = [[f"KL(base || adapted), nats a token{_least(result)}", "0", kl, kl, _interval(result, "kl", ".3f")]]
    if prevented is not None:
        rows.append(["KL of the plain adapter that is prevented, %", "", "", f"{100 * prevented:.1f}", ""])
    return [
        *rows,
        [
            f"first token changed, of {count:,} documents",
            "0",
            changed,
            changed,
            _interval(result, "first_changed", ".0f", count),
        ],
        [
            "same first token as the base at all positions, %",
            "100",
            f"{shared:.1f}",
            _number(shared - 100, "+.1f"),
            _interval(result, "agreement", "+.1f", 100, -100),
        ],
    ]


def _rest_rows(result: Comparison) -> list[list[str]]:
    rows = []
    if result.kl_nats is not None and result.base_ce_nats is not None:
        entropy, kl = f"{result.base_ce_nats - result.kl_nats:.3f}", f"{result.kl_nats:.3f}"
        what = f"cross-entropy to the base's own prediction{_least(result)}"
        rows.append([what, entropy, f"{result.base_ce_nats:.3f}", kl, _interval(result, "kl", ".3f")])
    if result.undecided:
        rows.append(["first token left open by the cache's rounding, %", "", f"{100 * result.undecided:.1f}", "", ""])
    if result.num_first_undecided:
        rows.append(["the same of the first of a document, documents", "", f"{result.num_first_undecided:,}", "", ""])
    return rows


def _least(result: Comparison) -> str:
    return "" if result.before_from == "base" else ", at least"


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
