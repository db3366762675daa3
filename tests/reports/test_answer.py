"""The answer that a report begins with: which setting it is, and that its words are those of the numbers."""

from pathlib import Path

import pytest
from support.cli_harness import done, edit_sealed
from support.sweep_folders import FULL_KL, MASKED, MASKED_KL, PLAIN, Method, write_sweep

from logitcache.reports.answer import NO_FORGETTING_NATS, answers, for_nothing, knee_of
from logitcache.reports.build import write_sweep_report
from logitcache.reports.pareto import Setting
from logitcache.reports.results import read_sweep
from logitcache.reports.tables import View, view_of

ALL = (PLAIN, MASKED_KL, FULL_KL)


def view(folder: Path, *methods: Method, **how: object) -> View:
    write_sweep(folder, methods or ALL, **how)  # type: ignore[arg-type]
    return view_of(read_sweep(folder))


def named(setting: Setting) -> tuple[str, object]:
    return setting.method, setting.values["lr"]


def test_the_best_without_forgetting_learns_most_of_those(tmp_path: Path) -> None:
    found = view(tmp_path)
    first, *_ = answers(found)
    within = [s for s in found.settings if s.forgetting.mean <= NO_FORGETTING_NATS]
    assert 1 < len(within) < len(found.settings)
    assert first.setting.learning.mean == max(s.learning.mean for s in within)
    assert first.why.startswith("Without forgetting (a mean KL to the base of at most 0.01 nats a token on prior text)")
    assert f"{first.setting.method} at lr {first.setting.values['lr']:g}: it learns" in first.why


def test_where_none_is_without_forgetting_it_is_the_least(tmp_path: Path) -> None:
    found = view(tmp_path, PLAIN, Method("kl", MASKED, 0.5, 0.05))
    assert min(s.forgetting.mean for s in found.settings) > NO_FORGETTING_NATS
    first, *_ = answers(found)
    assert first.setting.forgetting.mean == min(s.forgetting.mean for s in found.settings)
    assert first.why.startswith("No setting is without forgetting")


def test_the_knee_lies_furthest_below_the_line_from_the_base(tmp_path: Path) -> None:
    """By the definition, over every setting; and as the answer's second part where it is another."""
    found = view(tmp_path, *ALL, Method("between", {**MASKED, "weight": 0.1}, 0.58, 0.03))
    knee, most = knee_of(found.settings)
    assert most.learning.mean == max(s.learning.mean for s in found.settings)

    def below(s: Setting) -> float:
        return most.forgetting.mean * s.learning.mean / most.learning.mean - s.forgetting.mean

    assert below(knee) == max(below(s) for s in found.settings)
    first, second = answers(found)
    assert named(second.setting) == named(knee) != named(first.setting)
    share = 100 * knee.learning.mean / most.learning.mean
    assert f"That is {share:.0f} % of the most learning" in second.why


def test_one_setting_is_the_answer_and_the_knee(tmp_path: Path) -> None:
    found = view(tmp_path, MASKED_KL, lrs=(1e-3,), seeds=(3,))
    (only,) = answers(found)
    assert "It is the knee of the front too: 100 % of the most learning" in only.why and only.seed == "seed 3"


def test_where_nothing_learns_there_is_no_answer(tmp_path: Path) -> None:
    found = view(tmp_path, Method("bad", MASKED, -0.5, 0.01))
    assert answers(found) == []
    write_sweep_report(tmp_path, tmp_path)
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "No setting learns anything on the new text: there is none to take." in page


def test_page_and_terminal_begin_with_it(tmp_path: Path) -> None:
    """The page cuts absolute paths, which the terminal does not; neither is left out of the other."""
    write_sweep(tmp_path / "sweep", ALL, scaled=(PLAIN.name,))
    edit_sealed(tmp_path / "sweep" / "sweep.json", lambda v: v["given"].update(model="/home/me/base"))
    out = done("report", tmp_path / "sweep").out.splitlines()
    page = (tmp_path / "sweep" / "report.md").read_text(encoding="utf-8")
    first, *_ = answers(view_of(read_sweep(tmp_path / "sweep")))
    assert out[0] == first.why and out[2] == f"  {first.command}"
    assert out[1] == f"  adapter ({first.seed}): {tmp_path / 'sweep' / 'runs' / first.run.name}"
    assert "--model /home/me/base" in first.command and "/home/me" not in page
    assert page.index("## The answer") < page.index("## What was compared")
    assert first.command.replace("/home/me/", "") in page.splitlines()
    assert f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('base'), 'runs/{first.run.name}')" in page


def test_parts_of_a_plain_run_are_weighed_against_the_answer(tmp_path: Path) -> None:
    """A part s of the fabricated plain runs learns as s and forgets as s^2."""
    found = view(tmp_path, scaled=(PLAIN.name,))
    plain = found.groups[PLAIN.name]
    points = [(s.learning.mean * p, s.forgetting.mean * p * p, s, p) for s in plain for p in (0.25, 0.5, 0.75)]
    learning, forgetting, setting, part = max(p for p in points if p[1] <= NO_FORGETTING_NATS)
    said = for_nothing(found)
    assert said is not None and said.startswith(
        f"For nothing: {PLAIN.name} at lr {setting.values['lr']:g} at {part:g} of its change"
    )
    assert f"learns {learning:.3f} and forgets {forgetting:.3f}" in said
    gap = learning - answers(found)[0].setting.learning.mean
    assert f"{abs(gap):.3f} {'more' if gap > 0 else 'less'} learning than" in said
    assert for_nothing(view(tmp_path / "without")) is None


@pytest.mark.parametrize(
    ("load", "said"),
    [(1.2, "All 12 runs that read the cache were alone on the machine"), (2.4, "Not measured alone: the 12 runs that")],
)
def test_cost_is_told_one_way_with_plain_runs_apart(tmp_path: Path, load: float, said: str) -> None:
    write_sweep(tmp_path, ALL, load=load)
    write_sweep_report(tmp_path, tmp_path)
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert said in page
    rows = [line for line in page.splitlines() if line.startswith(("| runs that", "| the same with"))]
    assert rows == [
        "| runs that read the cache | 12 | 600 | 0.42 | 252 | 9.5 | 0.79 |",
        "| the same with a live base | 12 | 600 | 0.55 | 330 | - | 1.00 |",
        "| runs that need no base | 6 | 300 | 0.4 | 120 | - | - |",
    ]


def test_curves_name_their_learning_rates(tmp_path: Path) -> None:
    write_sweep(tmp_path, (PLAIN, MASKED_KL))
    write_sweep_report(tmp_path, tmp_path)
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "plain LoRA, lr 0.0005 (2 seeds), masked KL, lr 0.002 (2 seeds). The learning rates differ" in page


def test_the_curve_between_base_and_run_is_drawn_and_told(tmp_path: Path) -> None:
    for name, scaled in (("with", (PLAIN.name,)), ("without", ())):
        write_sweep(tmp_path / name, ALL, scaled=scaled)
        write_sweep_report(tmp_path / name, tmp_path / name)
    pages = {name: (tmp_path / name / "report.md").read_text(encoding="utf-8") for name in ("with", "without")}
    for told in ("## Between the base and a run, for nothing", "A dotted line leads", "parts of its change"):
        assert told in pages["with"] and told not in pages["without"]
    assert "| plain LoRA | lr 0.001 | 0 | 0.000 | 0.000 | 0 of 60 | +0.000 |" in pages["with"]
    pictures = [(tmp_path / name / "frontier.png").read_bytes() for name in pages]
    assert pictures[0] != pictures[1]
