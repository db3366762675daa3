"""The report on a sweep: its page in both forms, its pictures, its words, and the verb."""

import base64
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import image
from support.cli_harness import done, edit_sealed, refused, snapshot
from support.sweep_folders import FULL_KL, MASKED, MASKED_KL, PLAIN, Method, write_sweep

from logitcache.reports.build import write_sweep_report
from logitcache.reports.page import Bullets, Heading, Paragraph, Table, as_html, as_markdown
from logitcache.reports.plots import chains_of, frontier_picture, styles_of
from logitcache.reports.results import read_sweep
from logitcache.reports.tables import main_rows, setting_rows, view_of

FAILED, RUNNING = "m1-lr0.0005-seed1", "m2-lr0.002-seed0"
ODD = '<b>&"x"'
LONG = "masked KL of a name that goes on and on " * 3 + "and_then_has_a_part_without_any_space_" * 3 + "$x^{2"
EIGHT = [PLAIN, MASKED_KL, FULL_KL] + [
    Method(f"method {i}", {**MASKED, "weight": float(i)}, 0.5 - i / 20, 0.01 * i) for i in (2, 3, 4)
]
EIGHT += [Method("_smooth", {"label_smoothing": 0.1}, 0.5, 0.06), Method("漢字", {"adapter": "dora"}, 0.4, 0.05)]
FILES = {"report.html", "report.md", "results.csv"} | {
    f"{name}{kind}" for name in ("frontier", "frontier-ce", "curves", "cost") for kind in (".png", ".svg")
}
VOID = {"meta", "img", "br", "hr", "link"}


class Page(HTMLParser):
    """Collects tags, attributes and text; fails on a tag that is closed out of turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in VOID, f"<{tag}> is not closed"
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def parsed(text: str) -> Page:
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    return page


def text_of(markdown: str) -> str:
    """Markdown without its escapes."""
    return re.sub(r"\\([^\w\s]|_)", r"\1", markdown)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep with a method of an odd name, a failed run and one that goes on, and its report beside it."""
    path = tmp_path_factory.mktemp("report") / "sweep"
    odd = Method(ODD, {**MASKED, "regularizer": "full-kl"}, 0.45, 0.002)
    write_sweep(path, (PLAIN, MASKED_KL, odd), failed=[FAILED], in_progress=[RUNNING])
    before = snapshot(path)
    write_sweep_report(path, path.parent / "out")
    assert snapshot(path) == before
    return path


def page_of(folder: Path) -> Page:
    return parsed((folder.parent / "out" / "report.html").read_text(encoding="utf-8"))


def test_files_are_those_that_it_says(folder: Path, tmp_path: Path) -> None:
    written = write_sweep_report(folder, tmp_path / "deep" / "out")
    assert {p.relative_to(tmp_path / "deep" / "out").as_posix() for p in written.files} == FILES
    assert {p.name for p in (tmp_path / "deep" / "out").iterdir()} == FILES
    assert snapshot(tmp_path / "deep" / "out") == snapshot(folder.parent / "out")  # the same sweep, the same bytes


def test_html_is_whole_and_needs_nothing_else(folder: Path) -> None:
    html = (folder.parent / "out" / "report.html").read_text(encoding="utf-8")
    page = parsed(html)
    assert not re.search(r"https?:|//[a-z]", html.replace("data:image/svg+xml;base64,", ""))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "embed", "b"})
    attributes = [(name, value) for _, attrs in page.tags for name, value in attrs.items()]
    assert {name for name, _ in attributes} <= {"lang", "charset", "name", "content", "class", "alt", "src"}
    pictures = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(pictures) == 4 and all(p["alt"] for p in pictures)
    for picture in pictures:
        kind, data = str(picture["src"]).split(",", 1)
        assert kind == "data:image/svg+xml;base64"
        svg = base64.b64decode(data, validate=True)
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        assert not re.search(rb'href="(?!#)|<image|<script|@import|url\((?!#)', svg)


def test_both_pages_say_the_same(folder: Path) -> None:
    cells = {" ".join(text.split()) for text in page_of(folder).texts} - {""}
    markdown = text_of((folder.parent / "out" / "report.md").read_text(encoding="utf-8"))
    for text in cells:
        if "{" not in text:  # the style sheet
            assert text in markdown, text


def test_every_run_is_named_with_how_it_ended(folder: Path) -> None:
    texts = [" ".join(text.split()) for text in page_of(folder).texts]
    sweep = read_sweep(folder)
    assert len(sweep.runs) == 18
    for run in sweep.runs:
        place = texts.index(run.name)
        assert texts[place + 1 : place + 3] == [run.method, run.status]
    said = " ".join(texts)
    assert "18 runs: 16 finished, 1 failed, 1 in progress. Only finished runs count." in said
    assert f"{FAILED} (masked KL) failed at step 21: training, step 21: the loss is not finite." in said
    assert "2 of 9 settings have one seed" in said
    assert f"masked KL at lr 0.0005: 1 of 2; {ODD} at lr 0.002: 1 of 2" in said
    assert "reference point (learning 0, forgetting 0.23 nats)" in said


def test_odd_names_come_out_as_they_are(folder: Path) -> None:
    html = (folder.parent / "out" / "report.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;&amp;&quot;x&quot;" in html and "<b>" not in html
    assert ODD in page_of(folder).texts
    markdown = (folder.parent / "out" / "report.md").read_text(encoding="utf-8")
    assert r"\<b\>" in markdown and not re.search(r"(?<!\\)<", markdown)


def test_markup_in_a_text_is_text() -> None:
    odd = "a|b *c* _d_ <e> `f` [g](h) &amp; ~~i~~ x_y \\ $z$\nnext"
    blocks = [Heading("T", 1), Paragraph(f"- {odd}"), Bullets((f"1. {odd}",)), Table([["x", "y"], [odd, "-"]])]
    line = " ".join(odd.split())
    markdown = as_markdown(blocks)
    assert text_of(markdown).count(line) == 3
    for row in [row for row in markdown.splitlines() if row.startswith("|")]:
        assert len(re.findall(r"(?<!\\)\|", row)) == 3
    for sign in "*`<[$~":
        assert not re.search(rf"(?<!\\){re.escape(sign)}", markdown)
    assert r"\- a" in markdown and r"- 1\. a" in markdown and "x_y" in markdown and "| - |" in markdown
    assert line in parsed(as_html(blocks)).texts


def test_main_table_against_the_definitions(folder: Path) -> None:
    """Budgets, best learning and hypervolume, again from the runs."""
    view = view_of(read_sweep(folder))
    by_setting: dict[tuple[str, object], list[tuple[float, float]]] = {}
    for run in view.sweep.runs:
        if run.outcome is not None:
            key = (run.method, run.settings["lr"])
            by_setting.setdefault(key, []).append((run.outcome.learning, run.outcome.forgetting))
    means = {key: np.mean(points, axis=0) for key, points in by_setting.items()}
    largest = max(y for (method, _), (_, y) in means.items() if method == "plain LoRA")
    head, *rows = main_rows(view)
    assert [cell.split("(")[1] for cell in head[3:-1]] == ["5 %)", "10 %)", "25 %)", "50 %)", "100 %)"]
    assert [row[:3] for row in rows] == [[PLAIN.name, "3", "2"], [MASKED_KL.name, "3", "1 to 2"], [ODD, "3", "1 to 2"]]
    for row in rows:
        mine = [point for (method, _), point in means.items() if method == row[0]]
        for share, cell in zip((0.05, 0.1, 0.25, 0.5, 1), row[3:-1], strict=True):
            within = [x for x, y in mine if y <= share * largest + 1e-12]
            assert cell == (f"{max(within):.3f}" if within else "-")
        levels = np.linspace(-0.1, 0.23, 200_001)
        reach = np.max([np.where(levels >= y, x, 0) for x, y in mine], axis=0)
        assert float(row[-1]) == pytest.approx(float(reach.mean()) * 0.33, abs=2e-4)


def test_equal_learning_is_told_of_every_method_alike(folder: Path) -> None:
    sentences = write_sweep_report(folder, folder.parent / "again").sentences
    assert len(sentences) == 1 + 3
    for method, sentence in zip((PLAIN.name, MASKED_KL.name, ODD), sentences[1:], strict=True):
        assert f"or more ({method} at lr " in sentence
        for other in (PLAIN.name, MASKED_KL.name, ODD):
            assert f"{other} 0." in sentence or f"setting: {other}" in sentence


def test_settings_table_has_dashes_for_what_was_not_measured(tmp_path: Path) -> None:
    write_sweep(tmp_path, (PLAIN, MASKED_KL), seeds=(0,))
    for path in tmp_path.glob("runs/*/result.json"):
        edit_sealed(path, lambda v: v["prior"].update(drift_percent=None))
    head, *rows = setting_rows(view_of(read_sweep(tmp_path)))
    for row in rows:
        cells = dict(zip(head, row, strict=True))
        assert cells["prior perplexity"] == "-"
        assert "[" not in cells["learning"]  # no interval of one seed
        assert (cells["prevented"] == "-") == (cells["method"] == PLAIN.name)


def test_a_sweep_without_finished_runs_is_reported_too(tmp_path: Path) -> None:
    names = write_sweep(tmp_path, (PLAIN,), lrs=(1e-3,), failed=["m0-lr0.001-seed0"], in_progress=["m0-lr0.001-seed1"])
    written = write_sweep_report(tmp_path, tmp_path)
    assert [p.name for p in written.files] == ["report.html", "report.md", "results.csv"] and written.rows == []
    texts = parsed((tmp_path / "report.html").read_text()).texts
    assert set(names) < set(texts) and "No run has finished: there is nothing to compare yet." in texts


def test_cost_is_left_out_where_it_was_not_measured(tmp_path: Path) -> None:
    write_sweep(tmp_path, (PLAIN, MASKED_KL), cost=False)
    assert not any("cost" in p.name for p in write_sweep_report(tmp_path, tmp_path).files)
    assert "Not measured in this sweep." in (tmp_path / "report.md").read_text(encoding="utf-8")


SHAPES = {
    "one method, one setting, one seed": ([MASKED_KL], (1e-3,), (0,)),
    "one method, one seed": ([MASKED_KL], (5e-4, 1e-3, 2e-3), (0,)),
    "eight methods, five seeds": (EIGHT, (5e-4, 1e-3, 2e-3), (0, 1, 2, 3, 4)),
    "long and odd names": ([PLAIN, Method(LONG, MASKED, 0.5, 0.01), Method(ODD, MASKED, 0.4, 0.02)], (1e-3,), (0, 1)),
    "far off": ([PLAIN, MASKED_KL, Method("far off", MASKED, -0.3, 3.0)], (5e-4, 1e-3), (0, 1, 2)),
    "the same everywhere": ([Method("still", {}, 0.0, 0.0)], (0.0,), (0,)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_pictures_of_sweeps_of_any_shape(tmp_path: Path, name: str) -> None:
    """Drawn, with ink inside their frame, different from one another, and with nothing left open."""
    methods, lrs, seeds = SHAPES[name]
    write_sweep(tmp_path, methods, lrs, seeds)
    files = write_sweep_report(tmp_path, tmp_path).files
    pictures = [image.imread(p) for p in files if p.suffix == ".png"]
    assert len(pictures) == (3 if name == "the same everywhere" else 4)  # plain runs alone are held against no base
    for pixels in pictures:
        white = (pixels[..., :3] > 0.99).all(axis=2)
        assert 0.5 < white.mean() < 0.99
        assert white[0].all() and white[:, 0].all() and white[:, -1].all(), "something is cut off"
    assert all(a.shape != b.shape or (a != b).any() for a, b in combinations(pictures, 2))


def test_pictures_leave_no_figure_and_load_no_window_system() -> None:
    code = "import sys, logitcache.reports.plots; print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_pictures_change_no_setting_of_matplotlib(tmp_path: Path) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    frontier_picture({"a": [(0.1, 0.2), (0.2, 0.1)], "b": [(0.3, 0.0)]}, tmp_path / "p.png", "title")
    assert dict(mpl.rcParams) == before
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_methods_differ_in_colour_marker_and_line() -> None:
    styles = list(styles_of([str(i) for i in range(64)]).values())
    assert len({(s.colour, s.marker) for s in styles}) == 64
    first = styles[:8]
    assert len({s.colour for s in first}) == len({s.marker for s in first}) == len({str(s.line) for s in first}) == 8


def test_a_line_follows_one_field(tmp_path: Path) -> None:
    """Learning rate varied with two weights: a line for each weight, by rising learning rate."""
    light, heavy = (Method("kl", {**MASKED, "weight": w}, 0.5, 0.01) for w in (0.3, 3.0))
    write_sweep(tmp_path, (light, heavy), lrs=(2e-3, 5e-4, 1e-3), seeds=(0,))
    head = tmp_path / "sweep.json"
    edit_sealed(head, lambda v: v.update(methods=["kl"]))
    lines = [
        [(s.values["weight"], s.values["lr"]) for s in c] for c in chains_of(view_of(read_sweep(tmp_path)).settings)
    ]
    assert lines == [[(w, lr) for lr in (5e-4, 1e-3, 2e-3)] for w in (0.3, 3.0)]


def test_verb_prints_the_table_and_the_paths(folder: Path, tmp_path: Path) -> None:
    out = done("report", folder, "--out", tmp_path / "out").out
    assert all(name in out for name in (PLAIN.name, MASKED_KL.name, ODD))
    assert "18 runs: 16 finished, 1 failed, 1 in progress." in out
    assert all(str(tmp_path / "out" / name) in out for name in FILES)
    head, *rows = main_rows(view_of(read_sweep(folder)))
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert all(" ".join(" ".join(row).split()) in lines for row in [head, *rows])


def test_verb_writes_beside_the_sweep_by_default(tmp_path: Path) -> None:
    write_sweep(tmp_path, (PLAIN,), lrs=(1e-3,))
    done("report", tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {*FILES, "sweep.json", "runs"} - {"cost.png", "cost.svg"}
    done("report", tmp_path)  # again, over its own files


def test_verb_refuses_with_the_status_of_what_is_wrong(tmp_path: Path) -> None:
    assert "expected sweep.json in it, found none" in refused(2, "report", tmp_path / "none")
    names = write_sweep(tmp_path / "sweep", (PLAIN,))
    (tmp_path / "sweep" / "runs" / names[1] / "result.json").write_text('{"half')
    assert f"{names[1]}/result.json" in refused(3, "report", tmp_path / "sweep", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
