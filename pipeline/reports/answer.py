"""The answer that a report begins with: which setting to take, its adapter, and the line that makes it again.

Owns what "without forgetting" and "the knee" are, and how the answer is said, on the page and at the terminal alike.
Compares by `pareto`; must not draw.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from logitcache.sweeps.command import train_command
from logitcache.sweeps.config import NO_ADAPTER

from .page import Block, Code, Heading, Paragraph
from .pareto import SEED, ScaledSetting, Setting, best_within, is_reference, pareto_front, scaled_settings
from .results import RUNS, Run, without_folders
from .tables import View, count, nats

NO_FORGETTING_NATS = 0.01
"""A setting whose mean forgetting (KL to the base on prior text, nats a token) is at most this is without forgetting.

By Pinsker's inequality a KL of .01 moves at most 7 % of the probability of a token, on the average position.
"""

NOTHING_LEARNT = "No setting learns anything on the new text: there is none to take."


@dataclass(frozen=True)
class Answer:
    """A setting to take, and why."""

    setting: Setting
    #: As a sentence.
    why: str
    #: Of its first seed.
    run: Run
    #: Which that is, in words.
    seed: str
    #: The `logitcache train` that makes it again.
    command: str


def answers(view: View) -> list[Answer]:
    """The best setting without forgetting, or that which forgets least; and the knee of the front, where it is another.

    Empty where no setting learns anything.
    """
    learning = [s for s in view.settings if s.learning.mean > 0]
    if not learning:
        return []
    best = best_within(learning, NO_FORGETTING_NATS)
    limit = f"a mean KL to the base of at most {NO_FORGETTING_NATS:g} nats a token on prior text"
    if best is not None:
        first, why = best, f"Without forgetting ({limit}), the setting that learns most is"
    else:
        first = min(learning, key=lambda s: (s.forgetting.mean, -s.learning.mean))
        why = f"No setting is without forgetting ({limit}). The one that forgets least is"
    knee, most = knee_of(learning)
    shares = _shares(knee, most)
    trade = (
        f"{100 * shares[0]:.0f} % of the most learning ({most.method}{view.of(most)}) for {100 * shares[1]:.0f} % of "
        "its forgetting (the setting of the front at which the first share exceeds the second by most)"
    )
    if knee is first:
        return [_answer(view, first, f"{why} {_named(view, first)} It is the knee of the front too: {trade}.")]
    return [
        _answer(view, first, f"{why} {_named(view, first)}"),
        _answer(view, knee, f"The best trade, the knee of the front, is {_named(view, knee)} That is {trade}."),
    ]


def knee_of(settings: Sequence[Setting]) -> tuple[Setting, Setting]:
    """The setting of the front at which learning's share exceeds forgetting's by most, and the one that learns most.

    Shares are of what the setting that learns most learns and forgets, so that the straight line from the base to it
    has a difference of 0: the knee lies furthest below it (Satopaa et al. 2011, "Finding a Kneedle in a Haystack").
    """
    front = pareto_front(settings)
    most = front[-1]
    return max(front, key=lambda s: _shares(s, most)[0] - _shares(s, most)[1]), most


def _shares(setting: Setting, most: Setting) -> tuple[float, float]:
    forgetting = setting.forgetting.mean / most.forgetting.mean if most.forgetting.mean > 0 else 1.0
    return setting.learning.mean / most.learning.mean, forgetting


def _named(view: View, setting: Setting) -> str:
    changed = setting.mean(lambda o: o.prior.num_first_changed) or 0
    documents = count(setting.outcomes[0].prior.num_documents, "document")
    return (
        f"{setting.method}{view.of(setting)}: it learns {nats(setting.learning.mean)} nats a token, forgets "
        f"{nats(setting.forgetting.mean)}, and changes the first token of {changed:.4g} of {documents}."
    )


def _answer(view: View, setting: Setting, why: str) -> Answer:
    run = setting.runs[0]
    seed = f"seed {run.settings[SEED]}" + ("" if len(setting.runs) == 1 else f", the first of {len(setting.runs)}")
    return Answer(setting, why, run, seed, train_command(view.sweep.given, run.settings, "adapter"))


def load_line(model: str, run: Run, folder: str) -> str:
    """The line of Python that loads a run with PEFT, or with transformers where every weight was trained."""
    if run.settings.get("adapter") == NO_ADAPTER:
        return f"model = AutoModelForCausalLM.from_pretrained({folder!r})"
    return f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({model!r}), {folder!r})"


def for_nothing(view: View) -> str | None:
    """The part of a plain run's change that learns most without forgetting, which cost no training and no base; None:
    none was measured."""
    plain = [setting for setting in view.settings if is_reference(setting)]
    points = [point for setting in plain for point in scaled_settings(setting) if point.scale not in (0, 1)]
    within = [p for p in points if p.forgetting.mean <= NO_FORGETTING_NATS and p.learning.mean > 0]
    if not points:
        return None
    if not within:
        return (
            "Between the base and a plain run (nothing is trained for it), no part that was measured is without "
            "forgetting."
        )
    best = max(within, key=lambda p: p.learning.mean)
    trained = best_within(view.settings, NO_FORGETTING_NATS)
    against = "" if trained is None else _against(best, trained)
    return (
        f"For nothing: {best.setting.method}{view.of(best.setting)} at {best.scale:g} of its change (WiSE-FT, nothing "
        f"is trained for it) learns {nats(best.learning.mean)} and forgets {nats(best.forgetting.mean)}{against}."
    )


def _against(point: ScaledSetting, trained: Setting) -> str:
    gap = point.learning.mean - trained.learning.mean
    return f": {nats(abs(gap))} {'more' if gap > 0 else 'less'} learning than the best setting without forgetting"


def answer_blocks(view: View) -> list[Block]:
    """The answer as the first part of a page. Absolute paths are cut to their last part: pages go to others."""
    found = answers(view)
    blocks: list[Block] = [Heading("The answer")]
    if not found:
        return [*blocks, Paragraph(NOTHING_LEARNT)]
    for answer in found:
        folder, command = f"{RUNS}/{answer.run.name}", without_folders(answer.command)
        cut = (
            "" if command == answer.command else " (of absolute paths the last part; logitcache report has them whole)"
        )
        blocks += [
            Paragraph(answer.why),
            Paragraph(f"Its adapter ({answer.seed}) is in the sweep's folder, and is loaded from there by"),
            Code((load_line(without_folders(view.sweep.given["model"]), answer.run, folder),)),
            Paragraph(f"The line that makes it again{cut}:"),
            Code((command,)),
        ]
    nothing = for_nothing(view)
    chosen = "The setting is chosen by the same text that it is measured on, which flatters it."
    return [*blocks, *([] if nothing is None else [Paragraph(nothing)]), Paragraph(chosen)]


def answer_lines(view: View) -> list[str]:
    """The answer at a terminal, with paths as they are."""
    found = answers(view)
    lines = [] if found else [NOTHING_LEARNT]
    for answer in found:
        folder = view.sweep.folder / RUNS / answer.run.name
        lines += [answer.why, f"  adapter ({answer.seed}): {folder}", f"  {answer.command}"]
    nothing = for_nothing(view)
    return [*lines, *([] if nothing is None else [nothing])]
