"""The main job on a real language model: SmolLM2-135M-Instruct, fine-tuned on German manual pages on a CPU.

Owns the real demo's settings, which were fixed before its first run (docs/log.md), and its output folder. Beside what
`logitcache demo` writes (`run`) it holds

    base/                       the model as an ordinary checkpoint
    about.json                  what base and new text are, where they are from, and their licences
    data/prior_heldout.jsonl    the base's own greedy answers to everyday prompts, on which forgetting shows
    data/anchors.jsonl          those to other everyday prompts, by which two of the methods hold the base
    anchors/                    the cache of these
    answers.json                what base and adapted models answer to the same questions
    cost.json                   seconds by part, and memory

As the small demo it is a sweep's configuration and its table. Must not print: it reports through `on_message`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from logitcache.errors import TrainingFailed
from logitcache.evaluation.answers import answers, answers_of
from logitcache.evaluation.compare import load_adapter
from logitcache.evaluation.prompts import Prompt, everyday_prompts
from logitcache.evaluation.settings import AnswerSettings
from logitcache.models.loading import find_model, load_base, load_tokenizer
from logitcache.models.settings import LoadSettings
from logitcache.reports.results import Sweep
from logitcache.storage.files import replace_file
from logitcache.sweeps.folder import RUNS

from .kept import Clock, read_kept, write_kept
from .manpages import PACKAGE, NewText, new_text
from .real_base import check_installed, unpacked_base
from .real_report import write_real_report
from .run import (
    ANCHORS,
    DemoSettings,
    Method,
    claim_folder,
    fill_cache,
    spread,
    sweep_config,
    train_and_evaluate,
    write_documents,
)
from .text import split

BASE, ABOUT, ANSWERS = "base", "about.json", "answers.json"
PRIOR, ANCHOR_ROWS = "prior_heldout.jsonl", "anchors.jsonl"

QUESTIONS = (
    "What is the capital of France?",
    "Who painted the Mona Lisa?",
    "Why does ice float on water?",
    "Multiply 8 by 7.",
    "Give me tips for saving money on groceries.",
    "Translate 'good morning' into Italian.",
    "Are you a person or a machine?",
    "Write a Python function that reverses a string.",
)
"""One a kind. All but the first are among the prompts whose answers are the prior text."""


@dataclass(frozen=True)
class RealDemoSettings(DemoSettings):
    """Sizes and hyperparameters: those of a trial of one seed (docs/log.md), before the demo was run; of its 100 steps
    as many as five methods can do in half an hour."""

    seeds: tuple[int, ...] = (0,)
    max_steps: int = 60
    batch_size: int = 4
    methods: tuple[Method, ...] = (
        Method("plain LoRA", "none", 1e-3),
        Method("plain LoRA, lower lr", "none", 2e-4),
        Method("masked KL", "masked-kl", 1e-3),
        Method("plain LoRA + anchors", "none", 1e-3, anchor_weight=4.0),
        Method("masked KL + anchors", "masked-kl", 1e-3, anchor_weight=4.0),
    )
    #: Everyday prompts that the base answers: of the part "test" for the prior text, of the part "anchor" for anchors.
    num_prior: int = 50
    num_anchors: int = 50
    max_answer_tokens: int = 64
    questions: tuple[str, ...] = QUESTIONS


def run_real_demo(
    out: Path,
    settings: RealDemoSettings,
    on_message: Callable[[str], None],
) -> Sweep:
    """Do it all into the folder `out`; finished parts of an interrupted demo are kept. Returns what the sweep came to.

    Raises `InputNotFound` where a package is not installed, and as `run_demo`.
    """
    if not (out / BASE).is_dir():
        check_installed()  # before anything is written
    claim_folder(out, settings)
    clock = Clock(out)
    _make_inputs(out, settings, clock, on_message)
    config = sweep_config(out / BASE, out, settings)
    with clock.part("precompute"):
        data = out / "data"
        cache = fill_cache(out / BASE, data / "new_train.jsonl", out / "cache", settings, on_message, "auto")
        anchors = fill_cache(
            out / BASE, data / ANCHOR_ROWS, out / ANCHORS, settings, on_message, "auto", what="Anchors"
        )
    on_message(f"Training: {len(config.runs)} runs of {settings.max_steps} steps, each told when it is done.")
    with clock.part("training and evaluation"):
        sweep = train_and_evaluate(config, out, "auto", on_message)
    with clock.part("questions"):
        answered = answer_questions(out, sweep, settings)
    write_real_report(out, sweep, cache, anchors, settings, read_kept(out / ABOUT), answered, clock)
    return sweep


def _make_inputs(out: Path, settings: RealDemoSettings, clock: Clock, on_message: Callable[[str], None]) -> None:
    """The base, the new text and the prior text, each unless it is there."""
    about = read_kept(out / ABOUT)
    if "base" not in about:
        with clock.part("unpacking the base"):
            about["base"] = unpacked_base(out / BASE)
            write_kept(out / ABOUT, about)
    on_message(f"Base: {about['base']}; {torch.get_num_threads()} threads.")
    if "new text" not in about:
        with clock.part("new text"):
            text, told = new_text()
            write_new_text(out / "data", text, settings)
            about["new text"] = {"what": text.what, "source": text.source, "licence": text.licence, "told": told}
            write_kept(out / ABOUT, about)
    on_message(about["new text"]["told"])
    parts = {
        "Prior text": (PRIOR, "test", settings.num_prior),
        "Anchors": (ANCHOR_ROWS, "anchor", settings.num_anchors),
    }
    for what, (name, part, num_prompts) in parts.items():
        if not (out / "data" / name).is_file():
            with clock.part(f"the base's answers: {what.lower()}"):
                told = write_answers(out / BASE, out / "data" / name, part, num_prompts, settings.max_answer_tokens)
            on_message(f"{what}: {told}")


def write_new_text(folder: Path, text: NewText, settings: RealDemoSettings) -> None:
    """new_train.jsonl and new_heldout.jsonl, pages apart, and whose text it is."""
    train, held_out = split(text.documents)
    wanted = settings.max_steps * settings.batch_size
    if len(train) < wanted or not held_out:
        raise TrainingFailed(
            f"writing the demo's data to {folder}: expected {wanted:,} pieces of {text.what} to train on and some to "
            f"hold out, found {len(train):,} and {len(held_out):,}. The demo would not be what it says. Use another "
            f"version of {text.source}."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_documents(folder / "new_train.jsonl", spread(train, wanted))
    write_documents(folder / "new_heldout.jsonl", spread(held_out, settings.num_held_out))
    if text.copyright:
        replace_file(folder / f"copyright-{PACKAGE}", text.copyright.encode())


def write_answers(base: Path, path: Path, part: str, num_prompts: int, max_tokens: int) -> str:
    """The base's own answers to everyday prompts of a part, as rows; returns a sentence about them."""
    prompts = spread([p for p in everyday_prompts() if p.part == part], num_prompts)
    asked = AnswerSettings(max_new_tokens=max_tokens, batch_size=25)
    answered = answers(base, prompts, path, settings=asked, loading=LoadSettings(device="cpu"))
    num_tokens = sum(answer.num_tokens for answer in answered.kept)
    return f"the base's own greedy answers to {len(answered.kept)} everyday prompts, {num_tokens:,} tokens."


def answer_questions(out: Path, sweep: Sweep, settings: RealDemoSettings) -> dict[str, dict[str, str]]:
    """What the base and each method's first adapter answer to each question, by method, then question; kept."""
    answered: dict[str, dict[str, str]] = read_kept(out / ANSWERS)
    adapters: dict[str, Path | None] = {"base": None}
    for run in sweep.runs:
        adapters.setdefault(run.method, out / "sweep" / RUNS / run.name)
    source = find_model(str(out / BASE))
    tokenizer = load_tokenizer(source)
    prompts = [
        Prompt(({"role": "user", "content": question},), f"question {number}")
        for number, question in enumerate(settings.questions, 1)
    ]
    asked = AnswerSettings(max_new_tokens=settings.max_answer_tokens, batch_size=max(len(prompts), 1))
    for method, folder in adapters.items():
        if method not in answered:
            base = load_base(source, "auto", torch.device("cpu")).model
            model = base if folder is None else load_adapter(base, str(folder))
            found = answers_of(model, tokenizer, prompts, asked).answers
            answered[method] = dict(zip(settings.questions, (answer.text for answer in found), strict=True))
            write_kept(out / ANSWERS, answered)
    return answered
