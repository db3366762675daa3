"""What anchors hold and what they cost: learning against drift on SmolLM2-135M, by anchors, weights and domains.

Owns the measurements behind docs/study/anchors.md. The cells were written down before any of them was run: see `cells`.
Base, German pages, prompts and answers are those of `logitcache demo --real`. An anchor's prompts are of the part
"anchor" of the everyday ones, the tests' of the part "test"; the kind "code" is in no anchor. One line of JSON a
finished run in --out; the same command goes on with what is not there, and a run that was killed from its checkpoint.

    python scripts/study_anchors.py --work FOLDER            all cells, some 5 hours on 2 cores
    python scripts/study_anchors.py --work FOLDER --list     what there is to do
    python scripts/study_anchors.py --table                  means over seeds of what is there, and the picture
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from bench_common import ROOT
from filelock import FileLock
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from logitcache import (
    Anchor,
    AnchorSettings,
    CacheWriter,
    LogitCache,
    Objective,
    PairingRules,
    TrainSettings,
    precompute,
    train,
)
from logitcache.adapters.settings import AdapterSettings
from logitcache.capture.settings import CaptureSettings
from logitcache.data.rows import read_rows
from logitcache.data.samples import Sample, make_samples
from logitcache.demo.manpages import NewText, new_text
from logitcache.demo.real_base import unpacked_base
from logitcache.demo.run import spread, write_documents
from logitcache.demo.text import Document, prose_documents, split
from logitcache.evaluation.answers import answers, answers_of
from logitcache.evaluation.compare import compare_cached, load_adapter
from logitcache.evaluation.prompts import Prompt, everyday_prompts
from logitcache.evaluation.settings import AnswerSettings
from logitcache.models.loading import find_model, load_base, load_tokenizer
from logitcache.models.settings import LoadSettings
from logitcache.storage import BaseLogprobs
from logitcache.storage.manifest import features_of
from logitcache.storage.records import NO_TOKEN

OUT = ROOT / "docs" / "study" / "anchors.jsonl"
LENGTH, MAX_CHARS, NUM_HELD_OUT = 256, 640, 64
REPLAY = "replay"
"""What the name of a set of anchors begins with that are learnt, by cross-entropy, and not compared."""
MOST_CE = 3.0
"""Cross-entropy of the base's own answers above which a replay is of something else."""
ANSWER_TOKENS, LONG_ANSWER_TOKENS = 64, 220
FEW = ("facts", "lists")
"""Kinds of the anchors that are of a few kinds only: the tests have eight others beside."""

FRANCE = Prompt(({"role": "user", "content": "What is the capital of France?"},), "question")


@dataclass(frozen=True)
class Cell:
    """A run of the study; anchors: the name of a set of `Study.anchor_set`, "" without."""

    domain: str = "far"
    regularizer: str = "none"
    weight: float = 1.0
    anchors: str = ""
    anchor_weight: float = 4.0
    every: int = 1
    lr: float = 1e-3
    seed: int = 0

    @property
    def name(self) -> str:
        """Its folder, and its name in the lines."""
        held = f"-{self.anchors}-w{self.anchor_weight:g}-e{self.every}" if self.anchors else ""
        weight = "" if self.regularizer == "none" else f"{self.weight:g}"
        lr = "" if self.lr == 1e-3 else f"-lr{self.lr:g}"
        return f"{self.domain}-{self.regularizer}{weight}{held}{lr}-s{self.seed}"


def cells() -> list[Cell]:
    """Each seed whole before the next: the six objectives, plain at a lower learning rate (the honest competitor), then
    what is varied beside plain + anchor, then the near domain. Those of replay were added when the others had been
    looked at, and before any of them was run; that of sampled answers when greedy ones had been, one seed of it."""
    held = Cell(anchors="greedy")
    plain, masked, full = Cell(), Cell(regularizer="masked-kl"), Cell(regularizer="full-kl")
    found = [plain, masked, full, *(replace(cell, anchors="greedy") for cell in (plain, masked, full))]
    found += [replace(plain, lr=2e-4)]
    found += [
        replace(held, anchors=name) for name in ("greedy-9", "greedy-18", "long", "sampled", "few-kinds", "prose")
    ]
    found += [replace(held, anchor_weight=weight) for weight in (1.0, 16.0)]
    found += [replace(held, every=every) for every in (2, 4)]
    found += [replace(held, regularizer="masked-kl", weight=0.3)]
    found += [replace(cell, domain="near") for cell in (plain, masked, held, replace(held, regularizer="masked-kl"))]
    found += [replace(held, anchors="replay", anchor_weight=weight) for weight in (4.0, 1.0)]
    both = [replace(cell, seed=seed) for seed in (0, 1) for cell in found]
    return [*both, replace(held, anchors="replay-sampled", anchor_weight=1.0)]


class Study:
    """The folder of the study: what is made once for all runs. Everything in it is made where it is missing."""

    def __init__(self, work: Path, base: Path | None, steps: int, batch_size: int) -> None:
        self.work, self.steps, self.batch_size = work, steps, batch_size
        self.base = work / "base" if base is None else base
        self._far: NewText | None = None
        work.mkdir(parents=True, exist_ok=True)
        if not self.base.is_dir():
            print(unpacked_base(self.base), flush=True)
        self.tokenizer = load_tokenizer(find_model(str(self.base)))
        self.loading = LoadSettings(device="cpu")

    def kept(self, name: str, make: Callable[[Path], object]) -> Path:
        """A file or folder of the study, as a whole or not at all."""
        path, unfinished = self.work / name, self.work / f"{name}.new"
        with FileLock(self.work / f"{name}.lock"):  # several of these commands may divide the cells by --only
            if not path.exists():
                if unfinished.is_dir():
                    shutil.rmtree(unfinished)
                unfinished.unlink(missing_ok=True)
                make(unfinished)
                unfinished.rename(path)
        return path

    def cache(self, name: str, rows: Path, **settings: Any) -> Path:
        """Of rows, as `precompute` makes it."""
        job = CaptureSettings(max_length=LENGTH, **settings)
        return self.kept(name, lambda path: precompute(str(self.base), rows, path, job, loading=self.loading))

    def documents(self, domain: str) -> tuple[list[Document], list[Document]]:
        """To train on and held out: German pages far from the base, English prose about Python near it."""
        if domain == "far":
            if self._far is None:
                self._far, said = new_text()
                print(said, flush=True)
            return split(self._far.documents)
        train_on, held_out = split(prose_documents())
        return cut(train_on), cut(held_out)

    def new(self, domain: str) -> tuple[Path, Path]:
        """The rows of the new data, and those held out."""
        num = self.steps * self.batch_size
        parts = {"train": (0, num), "heldout": (1, NUM_HELD_OUT)}
        found = [
            self.kept(f"{domain}-{part}.jsonl", lambda path, at=at: _write(path, self.documents(domain)[at[0]], at[1]))
            for part, at in parts.items()
        ]
        return found[0], found[1]

    def answered(self, name: str, prompts: list[Prompt], max_new_tokens: int) -> Path:
        """The base's own greedy answers, as rows."""
        asked = AnswerSettings(max_new_tokens=max_new_tokens, batch_size=25)
        return self.kept(
            f"{name}.jsonl", lambda path: answers(str(self.base), prompts, path, settings=asked, loading=self.loading)
        )

    def anchor_set(self, name: str) -> Path:
        """The cache of a set of anchors. Of 92,000 new tokens, 9 prompts are about .5 %, 18 1 %, 50 3 %, long 10 %."""
        prompts = [prompt for prompt in everyday_prompts() if prompt.part == "anchor"]
        if name.startswith(REPLAY):
            of = name.removeprefix(REPLAY).lstrip("-") or "greedy"
            return self.kept(f"anchors-{name}", lambda path: self.replayed(path, of))
        if name == "prose":
            rows = self.kept("prose.jsonl", lambda path: _write(path, cut(split(prose_documents())[0]), 14))
        elif name == "sampled":
            rows = self.kept("sampled.jsonl", lambda path: self.sample(path, prompts))
        elif name == "long":
            rows = self.answered(name, prompts, LONG_ANSWER_TOKENS)
        elif name == "few-kinds":
            few = [prompt for prompt in prompts if prompt.kind in FEW]
            rows = self.answered(name, few, LONG_ANSWER_TOKENS)
        else:
            num = int(name.partition("-")[2] or len(prompts))
            rows = self.answered(name, spread(prompts, num), ANSWER_TOKENS)
        return self.cache(f"anchors-{name}", rows)

    def replayed(self, path: Path, of: str) -> None:
        """The answers of another set, by a base that is certain of each token: the KL to it is the cross-entropy."""
        cache = LogitCache.open(self.anchor_set(of))
        (template,) = cache.chat_templates()
        kept = cache.manifest
        other = replace(kept.model, quantization="4bit")  # not the base that is trained: what lies between is measured
        manifest = replace(kept, model=other, reader_features=features_of(kept.capture, other))
        with CacheWriter(path, manifest) as writer:
            writer.commit([replace(sample, logprobs=certain(sample.logprobs)) for sample in cache.samples()], template)
            writer.finalize([cache.data_set(entry) for entry in cache.data_sets])

    def sample(self, path: Path, prompts: list[Prompt]) -> None:
        """Answers drawn from the base at temperature 1, instead of its most probable tokens."""
        base = load_base(find_model(str(self.base)), "auto", torch.device("cpu")).model
        torch.manual_seed(0)
        rows = []
        for prompt in prompts:
            ids = self.tokenizer.apply_chat_template(  # type: ignore[union-attr]
                list(prompt.messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            made = base.generate(
                **ids, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=ANSWER_TOKENS
            )
            text = self.tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)  # type: ignore[union-attr]
            rows += [prompt.answered(text)] if text.strip() else []
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")

    def probes(self, domain: str) -> dict[str, tuple[LogitCache, list[Sample]]]:
        """What is measured after a run, with what the base says of it."""
        tests = [prompt for prompt in everyday_prompts() if prompt.part == "test"]
        rows = {
            f"new-{domain}": self.new(domain)[1],
            "same": self.answered("test-same", [p for p in tests if p.kind != "code"], ANSWER_TOKENS),
            "code": self.answered("test-code", [p for p in tests if p.kind == "code"], ANSWER_TOKENS),
            "prose": self.new("near")[1],
        }
        found = {}
        for name, path in rows.items():
            vocab_size = find_vocab(self.base)
            samples = make_samples(read_rows(str(path)), self.tokenizer, LENGTH, vocab_size).samples
            cache = self.cache(f"probe-{name}", path, top_k=min(256, vocab_size - 1), precision="exact")
            found[name.partition("-")[0]] = (LogitCache.open(cache), samples)
        return found

    def run(self, cell: Cell) -> dict[str, Any]:
        """Train and measure a cell."""
        cache = self.cache(f"cache-{cell.domain}", self.new(cell.domain)[0])
        settings = AnchorSettings(cell.anchor_weight, every=cell.every)
        anchors = [Anchor(self.anchor_set(cell.anchors), settings)] if cell.anchors else []
        plain = cell.regularizer == "none"
        objective = Objective(cell.regularizer, weight=1.0 if plain else cell.weight)  # type: ignore[arg-type]
        out = self.work / "runs" / cell.name
        job = TrainSettings(lr=cell.lr, batch_size=self.batch_size, max_steps=self.steps, seed=cell.seed)
        is_replay = cell.anchors.startswith(REPLAY)  # the KL before step 1 is a cross-entropy
        rules = PairingRules(other_precision=True, max_start_kl=MOST_CE) if is_replay else PairingRules()
        report = train(
            *(str(self.base), None, cache, out, AdapterSettings(rank=16), objective, job),
            resume=True,
            anchors=anchors,
            pairing=rules,
        )
        adapted = load_adapter(load_base(find_model(str(self.base)), "auto", torch.device("cpu")).model, str(out))
        measured = {}
        for name, (probe, samples) in self.probes(cell.domain).items():
            found = compare_cached(adapted, probe, samples)
            measured[name] = {
                "ce_rise": found.ce_change_nats,
                "kl": found.kl_nats,
                "first_changed": found.num_first_changed,
                "documents": found.num_documents,
            }
        said = answers_of(adapted, self.tokenizer, [FRANCE], AnswerSettings(max_new_tokens=24)).answers[0].text
        final = {k: v for k, v in report.final.items() if k in ("ce", "kl", "anchor_kl")}
        share = sum(len(s.token_ids) for s in _samples(self, cell)) / report.num_tokens if anchors else 0.0
        return {
            **{"name": cell.name, **asdict(cell), "steps": self.steps, "learnt": -measured["new"]["ce_rise"]},
            **{"anchor_share": round(share, 4), "measured": measured, "france": said, "final": final},
            "seconds": report.seconds,
        }


def certain(said: BaseLogprobs) -> BaseLogprobs:
    """A record in which every label has probability 1."""
    labels = {"label_ids": said.label_ids, "label_logprobs": np.zeros_like(said.label_logprobs)}
    others = {name: column for name, column in said.columns().items() if name not in ("positions", *labels)}
    none = {name: np.full_like(column, NO_TOKEN if "_ids" in name else -np.inf) for name, column in others.items()}
    return replace(said, **labels, **none)


def _samples(study: Study, cell: Cell) -> list[Sample]:
    from logitcache.pairing.anchors import anchor_samples

    return anchor_samples(LogitCache.open(study.anchor_set(cell.anchors)))


def find_vocab(base: Path) -> int:
    """V, of the configuration."""
    return int(json.loads((base / "config.json").read_text(encoding="utf-8"))["vocab_size"])


def cut(documents: list[Document]) -> list[Document]:
    """Documents in pieces of about `MAX_CHARS` characters, at the ends of paragraphs."""
    return [Document(f"{d.name}#{i}", piece) for d in documents for i, piece in enumerate(_pieces(d.text))]


def _pieces(text: str) -> Iterator[str]:
    piece = ""
    for paragraph in text.split("\n\n"):
        if piece and len(piece) + len(paragraph) > MAX_CHARS:
            yield piece
            piece = ""
        piece = f"{piece}\n\n{paragraph}".strip()[:MAX_CHARS]
    if piece:
        yield piece


def _write(path: Path, documents: list[Document], num: int) -> None:
    assert len(documents) >= num, f"{path}: expected {num} documents, found {len(documents)}"
    write_documents(path, spread(documents, num))


def read_lines(out: Path) -> list[dict[str, Any]]:
    """What is finished."""
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []


PROBES = {
    "same": "answers, kinds that anchors have",
    "code": "answers, the kind left out",
    "prose": "prose about Python",
}


@dataclass(frozen=True)
class Row:
    """A cell, means over its seeds: learning in nats a token, KL to the base by probe, all beside plain training
    with the same seeds."""

    name: str
    domain: str
    num_seeds: int
    learnt: float
    kl: dict[str, float]
    changed: float
    plain: Row | None

    def cells(self) -> list[str]:
        """One line of the table: shares are of plain training on the same domain at the same learning rate."""
        of = self.plain
        share = f"{self.learnt / of.learnt:.2f}" if of else ""
        found = [f"{kl:.4f}" + (f" ({kl / of.kl[probe]:.2f})" if of else "") for probe, kl in self.kl.items()]
        return [self.name, str(self.num_seeds), f"{self.learnt:.3f}", share, *found, f"{self.changed:.3g}"]


def rows_of(lines: list[dict[str, Any]]) -> list[Row]:
    """One a cell, in the order in which cells were written down."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        grouped.setdefault(line["name"].rpartition("-s")[0], []).append(line)
    names = dict.fromkeys(cell.name.rpartition("-s")[0] for cell in cells())
    return [_row(name, grouped[name], grouped) for name in names if name in grouped]


def _row(name: str, runs: list[dict[str, Any]], grouped: dict[str, list[dict[str, Any]]]) -> Row:
    kl = {probe: mean(run["measured"][probe]["kl"] for run in runs) for probe in PROBES}
    changed = mean(sum(run["measured"][probe]["first_changed"] for probe in ("same", "code")) for run in runs)
    domain, seeds = runs[0]["domain"], {run["seed"] for run in runs}
    plain = [run for run in grouped.get(f"{domain}-none", []) if run["seed"] in seeds]
    beside = _row("", plain, {}) if len(plain) == len(runs) and name != f"{domain}-none" else None
    return Row(name, domain, len(runs), mean(run["learnt"] for run in runs), kl, changed, beside)


def print_table(rows: list[Row]) -> None:
    """As Markdown: learning, and the drift of each probe, both also as a share of plain's."""
    head = [
        "cell",
        "seeds",
        "learnt",
        "of plain's",
        *(f"KL, {what}" for what in PROBES.values()),
        "first tokens changed",
    ]
    for line in (head, ["---"] * len(head), *(row.cells() for row in rows)):
        print(f"| {' | '.join(line)} |")


ANCHORS = {
    "greedy": "anchors",
    "long": "long answers",
    "sampled": "sampled answers",
    "few-kinds": "two kinds, long",
    "prose": "prose",
    "replay": "replay",
    "replay-sampled": "replay of samples",
}
"""Sets of anchors, as the picture calls them."""


def called(cell: Cell) -> str:
    """A cell of the far domain in words."""
    kind = {"none": "plain", "masked-kl": "masked KL", "full-kl": "full KL"}[cell.regularizer]
    kind += "" if cell.weight == 1.0 else f" {cell.weight:g}"
    kind += "" if cell.lr == 1e-3 else f", lr {cell.lr:g}"
    if not cell.anchors:
        return kind
    held = ANCHORS.get(cell.anchors) or f"{cell.anchors.partition('-')[2]} anchors"
    weight = "" if cell.anchor_weight == 4.0 else f", weight {cell.anchor_weight:g}"
    return f"{kind} + {held}{weight}" + ("" if cell.every == 1 else f", every {cell.every} steps")


SIDES = (
    *((6, 0, "left", "center"), (-6, 0, "right", "center"), (0, 7, "center", "bottom"), (0, -7, "center", "top")),
    *((-6, 4, "right", "bottom"), (6, 4, "left", "bottom"), (-6, -4, "right", "top"), (6, -4, "left", "top")),
    *((6, -8, "left", "top"), (6, 8, "left", "bottom")),
)
"""Of a point where its words may stand: how far from it, in points, and which end of them is there."""


def write_beside(axes: Any, points: dict[str, tuple[float, float]]) -> None:
    """The words of each point at the first side where they hide no point and no other words, or at the last."""
    axes.figure.draw_without_rendering()  # or nothing knows its place
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in axes.transData.transform(list(points.values()))]
    for words, point in points.items():
        for side in SIDES:
            *apart, ha, va = side
            text = axes.annotate(words, point, apart, textcoords="offset points", fontsize=8, ha=ha, va=va)
            box = text.get_window_extent()
            if side is SIDES[-1] or not box.count_overlaps(taken):
                taken.append(box)
                break
            text.remove()


def draw(rows: list[Row], path: Path) -> None:
    """Learning against the KL on the kind of prompts that no anchor has, every cell of the far domain by its name."""
    words = {cell.name.rpartition("-s")[0]: called(cell) for cell in cells()}
    figure = Figure(figsize=(9.0, 6.0), dpi=130, layout="constrained")
    axes: Any = figure.subplots()
    shown = [row for row in rows if row.domain == "far"]
    for row in shown:
        marker = "s" if REPLAY in row.name else "^" if "+" in words[row.name] else "o"
        axes.scatter(row.learnt, row.kl["code"], marker=marker, color="C1" if "kl" in row.name else "C0")
    axes.set_xlim(0.5, 0.95)
    axes.set_xlabel("learning: fall of cross-entropy on new text, nats a token (right is better)")
    axes.set_ylabel("drift: KL(base || adapted) on answers of the kind left out, nats a token")
    axes.set_yscale("log")
    axes.set_title("Anchors (triangles), their answers learnt (squares) and a KL on the new text (orange)", fontsize=11)
    write_beside(axes, {words[row.name]: (row.learnt, row.kl["code"]) for row in shown})
    figure.savefig(path)


def main() -> None:
    """Do what is left, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for models, caches and runs, 3 GB")
    parser.add_argument("--base", type=Path, help="another base with a chat template; nothing is unpacked then")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--only", default="*", help="cells whose name is so, a pattern: far-none*-s0")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--list", action="store_true", help="say what is left, and stop")
    parser.add_argument("--table", action="store_true", help="only print and draw what is in --out")
    args = parser.parse_args()
    done = {line["name"] for line in read_lines(args.out)}
    left = [cell for cell in cells() if cell.name not in done and fnmatch(cell.name, args.only)]
    if args.list:
        print("\n".join(cell.name for cell in left))
        return
    if not args.table:
        if args.work is None:
            parser.error("--work is needed to run anything")
        torch.set_num_threads(args.threads)
        study = Study(args.work, args.base, args.steps, args.batch_size)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        for number, cell in enumerate(left, 1):
            line = study.run(cell)
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            print(f"{number}/{len(left)} {cell.name}: learnt {line['learnt']:.3f}, {line['seconds']:.0f} s", flush=True)
    rows = rows_of(read_lines(args.out))
    print_table(rows)
    if rows:
        draw(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
