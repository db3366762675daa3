"""What each form of the tail is worth: how true its gradient is for the bytes it takes, and what training makes of it.

Owns the measurements behind docs/benchmarks/tails.csv and tail_frontier.csv, on the demo's base (V = 4,096; it knows
prose) and the demo's new domain (source code). The exact masked KL and the zero-tail forms are written here from their
formulas, dense; every other form is the project's own, of what a real cache at precision fine gives back. Trade-off:
what is small enough to compare with the whole vocabulary says little about ids of a large one, which take more bytes.
Shapes: N positions of a batch of 8 samples, V vocabulary, K alternatives, G groups, M draws, D hidden.

    python scripts/study_tails.py fidelity            on adapted models, against the exact gradient; 10 minutes
    python scripts/study_tails.py frontier            the demo's training: learning and forgetting, tail by tail
    python scripts/study_tails.py frontier --table    only print what is in the CSV

Both keep data, models and caches of training in --work, so that a second run is quicker; `frontier` goes on where it
was stopped.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.resources import as_file, files
from itertools import groupby, product
from pathlib import Path
from statistics import mean

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor
from transformers.utils import logging

from logitcache.pipeline.adapters import AdapterSettings
from logitcache.pipeline.demo.run import DemoSettings, Outcome, write_data
from logitcache.pipeline.evaluate import compare, load_adapter
from logitcache.pipeline.head import OutputHead, causal_lm_of, hidden_states
from logitcache.pipeline.losses import Objective, Regularizer, SparseTargets, Tail, base_rest, regularizer_values
from logitcache.pipeline.models import Base, Source, load_base, load_tokenizer
from logitcache.pipeline.partition import token_groups
from logitcache.pipeline.precompute import PrecomputeSettings, make_plan, manifest_for, precompute
from logitcache.pipeline.rows import read_rows
from logitcache.pipeline.samples import Sample, make_samples, pad_batch
from logitcache.pipeline.targets import groups_of, sparse_targets
from logitcache.pipeline.training import TrainSettings, train
from logitcache.storage import LogitCache
from logitcache.storage.encoding import PRECISIONS, columns_of
from logitcache.storage.statistics import describe

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
WORK = Path(tempfile.gettempdir()) / "logitcache-study-tails"
BASE = files("logitcache.pipeline.demo").joinpath("base")
BATCH, LEARNING_RATE, MIN_REST = 8, 2e-3, 1e-4
KEPT = (8, 16, 32, 64, 128, 256)
WIDTHS = (7, 8, 8, 9, 13, 13, 6, 9)
SAID = ("arm", "weight", "seed", "learning", "forgetting", "kl_prior", "seconds")
Line = dict[str, str]


# The demo, with any tail


@dataclass(frozen=True)
class Arm:
    """A tail that is trained with, and the cache it needs; top_k 0: every other token."""

    name: str
    top_k: int = 64
    tail: Tail = "bucket"
    tail_groups: int = 0
    tail_samples: int = 0
    regularizer: Regularizer = "masked-kl"
    precision: str = "fine"


PLAIN = Arm("plain CE", regularizer="none")
REFERENCE = Arm("bucket k=64")
ARMS = (
    REFERENCE,
    Arm("groups k=32 G=64", 32, "groups", 64),
    Arm("groups k=16 G=64", 16, "groups", 64),
    Arm("renormalize k=64", 64, "renormalize"),
    Arm("sampled k=16 M=32", 16, "sampled", 0, 32),
    Arm("exact", 0, precision="exact"),
    Arm("full KL, bucket k=64", regularizer="full-kl"),
    Arm("masked JS, bucket k=64", regularizer="masked-js"),
    Arm("masked reverse KL, bucket k=64", regularizer="masked-reverse-kl"),
    Arm("bucket k=16", 16),
    Arm("groups k=64 G=64", 64, "groups", 64),
)
WEIGHTS = (0.3, 1.0, 3.0)
MODELS = ((PLAIN, 1), (REFERENCE, 1), (REFERENCE, 10))
"""That the forms are compared on: how they are trained, and by what --steps is divided."""


class Demo:
    """The demo's base and data; `steps` decides how much there is to train on. work: where everything is kept."""

    def __init__(self, folder: Path, work: Path, steps: int) -> None:
        self.source, self.work, self.settings = Source("demo base", folder), work, DemoSettings(max_steps=steps)
        self.tokenizer = load_tokenizer(self.source)
        self.untouched = self._base()
        data = work / f"data-{steps}"
        if not data.exists():
            write_data(data.with_suffix(".new"), self.settings)
            data.with_suffix(".new").rename(data)
        self.train_set, self.new, self.prior = (
            self._samples(data / f"{name}.jsonl") for name in ("new_train", "new_heldout", "prior_heldout")
        )

    def fill(
        self, path: Path, samples: Sequence[Sample], job: PrecomputeSettings, groups: NDArray[np.uint8] | None = None
    ) -> LogitCache:
        """A cache as `logitcache precompute` makes it. groups: uint8 [V], any partition."""
        manifest = manifest_for(self.untouched, self.tokenizer, job, groups)
        precompute(self.untouched, manifest, make_plan(samples, job), path, partition=groups)
        return LogitCache.open(path)

    def cache(self, arm: Arm) -> LogitCache | None:
        """What the arm is trained with, made once."""
        if arm.regularizer == "none":
            return None
        k = arm.top_k or self.untouched.identity.vocab_size - 1
        rows = 32_768 if arm.top_k else 2_048  # a shard is made in memory
        job = PrecomputeSettings(k, self.settings.max_length, shard_positions=rows, precision=arm.precision)
        job = replace(job, tail_groups=arm.tail_groups, tail_samples=arm.tail_samples)
        name = f"cache-{self.settings.max_steps}-k{k}-g{arm.tail_groups}-m{arm.tail_samples}-{arm.precision}"
        groups = token_groups(self.untouched.model, arm.tail_groups) if arm.tail_groups else None
        return self.fill(self.work / name, self.train_set, job, groups)

    def train(
        self, arm: Arm, cache: LogitCache | None, weight: float, seed: int, folder: Path
    ) -> tuple[PeftModel, float]:
        """The adapted model and the seconds its training took, as the demo trains; a finished run is only loaded."""
        rank, steps = self.settings.rank, self.settings.max_steps
        adapter = AdapterSettings(rank=rank, alpha=2.0 * rank)
        objective = Objective(regularizer=arm.regularizer, tail=arm.tail, weight=weight)
        settings = TrainSettings(lr=LEARNING_RATE, batch_size=BATCH, max_steps=steps, seed=seed)
        again = (folder / "run.json").exists()
        report = train(self._base(), self.train_set, cache, folder, adapter, objective, settings, resume=again)
        return load_adapter(self._base().model, str(folder)), report.seconds

    def _base(self) -> Base:
        """Loaded anew: an adapter changes the model it is attached to."""
        return load_base(self.source, "float32", torch.device("cpu"))

    def _samples(self, path: Path) -> list[Sample]:
        vocab_size = self.untouched.identity.vocab_size
        return make_samples(read_rows(str(path)), self.tokenizer, self.settings.max_length, vocab_size).samples


def bytes_a_position(cache: LogitCache) -> float:
    """Of the record's columns as they lie on disk, without the sample table."""
    sizes = describe(cache, max_positions=1).bytes_by_column
    return sum(sizes[column.name] for column in columns_of(cache.manifest.capture)) / cache.num_positions


# Fidelity: the forms


@dataclass(frozen=True)
class Kept:
    """What a cache keeps of a position; group_steps: a nat, of the groups' shares (1 in precision fine)."""

    top_k: int
    tail_groups: int = 0
    partition: str = ""
    group_steps: int = 1
    tail_samples: int = 0

    def cache(self, demo: Demo, samples: Sequence[Sample], path: Path) -> LogitCache:
        """Written and opened."""
        job = PrecomputeSettings(self.top_k, demo.settings.max_length, tail_groups=self.tail_groups)
        job = replace(job, tail_samples=self.tail_samples)
        return demo.fill(path, samples, job, self.groups(demo.untouched) if self.tail_groups else None)

    def groups(self, base: Base) -> NDArray[np.uint8]:
        """The group of each token: of the project's own partition, or of one of two controls."""
        vocab_size = base.identity.vocab_size
        if self.partition == "k-means":
            return token_groups(base.model, self.tail_groups)
        ids = (
            np.arange(vocab_size) if self.partition == "id ranges" else np.random.default_rng(0).permutation(vocab_size)
        )
        return (ids * self.tail_groups // vocab_size).astype(np.uint8)


@dataclass(frozen=True)
class Form:
    """A tail of `losses.Objective`, or one of those here: zero, zero-renormalized."""

    tail: str
    kept: Kept

    def __str__(self) -> str:
        kept = self.kept
        step = f" 1/{kept.group_steps} nat" if kept.group_steps > 1 else ""
        groups = f" + {kept.tail_groups} {kept.partition}{step}" if kept.tail_groups else ""
        return f"{self.tail} k={kept.top_k}{groups}" + (f" + {kept.tail_samples} draws" if kept.tail_samples else "")


def forms() -> Iterator[Form]:
    """Every form that is measured, those of one cache one after the other."""
    for k in KEPT:
        yield from (Form(tail, Kept(k)) for tail in ("bucket", "renormalize", "zero", "zero-renormalized"))
        yield from (Form("groups", Kept(k, count, "k-means")) for count in (16, 32, 64, 128))
        yield from (Form("groups", Kept(k, 64, partition)) for partition in ("random", "id ranges"))
    for steps in (2, 4):
        yield from (Form("groups", Kept(k, count, "k-means", steps)) for k in KEPT[:4] for count in (16, 64))
    for k in (1, *KEPT):
        yield from (Form("sampled", Kept(k, tail_samples=count)) for count in (8, 16, 32, 64))


def exact(base_logits: Tensor, logits: Tensor, label_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Masked KL over the whole vocabulary, float64 [N], and its gradient by the logits, [N, V].

    p'(c) = p(c) / (1 - p(y)), q' likewise: value sum_{c != y} p' log(p'/q'), gradient q'_c - p'_c, 0 at y.
    """
    y = label_ids[:, None]
    log_p, log_q = (z.double().scatter(1, y, -torch.inf).log_softmax(dim=1) for z in (base_logits, logits))
    p, q = log_p.exp(), log_q.exp()
    return torch.where(log_p > -torch.inf, p * (log_p - log_q), 0.0).sum(dim=1), q - p


def zero_tail(logits: Tensor, targets: SparseTargets, renormalized: bool) -> Tensor:
    """sum_S p' (log p' - log q'), [N], q' exact over V without y: the base's missing mass taken for none.

    renormalized: p' made to sum to 1 over S; if not, as it is in the whole.
    """
    kept = targets.alternative_logprobs.float()
    log_p = kept - (kept.logsumexp(dim=1) if renormalized else base_rest(targets))[:, None]
    log_q = logits.scatter(1, targets.label_ids.long()[:, None], -torch.inf).log_softmax(dim=1)
    return (log_p.exp() * (log_p - log_q.gather(1, targets.alternative_ids.long()))).sum(dim=1)


def form_values(form: Form, logits: Tensor, targets: SparseTargets) -> Tensor:
    """The form at each position, [N]."""
    if form.tail.startswith("zero"):
        return zero_tail(logits, targets, renormalized=form.tail == "zero-renormalized")
    return regularizer_values(logits, targets, Objective(tail=form.tail))  # type: ignore[arg-type]


# Fidelity: the gradients


@dataclass(frozen=True)
class Gradients:
    """Values [N], and the gradient of their sum by logits [N, V], by hidden states [N, D], by all LoRA factors [P]."""

    values: Tensor
    logits: Tensor
    hidden: Tensor
    adapter: Tensor


class Probe:
    """A batch of 8 samples through an adapted model, its graph kept, with the exact value and gradients.

    Only positions with 1 - p(y) >= 1e-4 count, in every form alike.
    """

    def __init__(self, base: Base, adapted: PeftModel, samples: Sequence[Sample]) -> None:
        self.samples = samples
        self._head = causal_lm_of(adapted).get_output_embeddings().weight.detach()
        self._parameters = [p.requires_grad_(True) for name, p in adapted.named_parameters() if "lora_" in name]
        padded = pad_batch(samples)
        inputs = {"input_ids": padded.input_ids, "attention_mask": padded.attention_mask}
        with torch.no_grad():
            base_logits = OutputHead(base.model)(hidden_states(base.model, **inputs).flatten(0, 1)[padded.rows])
            p_label = base_logits.double().softmax(dim=1).gather(1, padded.label_ids[:, None]).squeeze(1)
        self._counts = 1 - p_label >= MIN_REST
        self.p_label, self._base_logits = p_label[self._counts], base_logits[self._counts]
        self._hidden = hidden_states(adapted, **inputs).flatten(0, 1)[padded.rows][self._counts]
        logits = self._hidden.detach() @ self._head.T
        self._logits = logits.requires_grad_(True)
        labels = padded.label_ids[self._counts]
        self.exact = self._gradients(*exact(self._base_logits, logits.detach(), labels))

    def of(self, form: Form, cache: LogitCache) -> tuple[Gradients, Tensor]:
        """The form's, of what the cache gives back; and its values where the model is the base, which should be 0."""
        records = cache.lookup_batch([s.token_ids for s in self.samples], [s.positions for s in self.samples])
        parts = self._counts.split([len(record) for record in records])
        counted = [record.take(part.numpy()) for record, part in zip(records, parts, strict=True)]
        targets = sparse_targets(counted, groups_of(cache))
        values = form_values(form, self._logits, targets)
        (gradient,) = torch.autograd.grad(values.sum(), self._logits)
        return self._gradients(values.detach(), gradient), form_values(form, self._base_logits, targets)

    def _gradients(self, values: Tensor, by_logits: Tensor) -> Gradients:
        by_logits = by_logits.float()
        by_hidden = by_logits @ self._head
        found = torch.autograd.grad(self._hidden, self._parameters, by_hidden, retain_graph=True)
        return Gradients(values.double(), by_logits, by_hidden, torch.cat([g.flatten() for g in found]))


def measures(probes: Sequence[Probe], form: Form, cache: LogitCache) -> dict[str, float]:
    """A form against the exact one: cosine of each position, averaged, and of the sum over all; ratio of the norms.

    adapter: of the gradient by all LoRA factors, batch by batch, which is what a step is made of. at_base: q = p.
    """
    found, at_base = zip(*(probe.of(form, cache) for probe in probes), strict=True)
    pairs = [(ours, probe.exact) for ours, probe in zip(found, probes, strict=True)]
    truth = torch.cat([theirs.values for _, theirs in pairs])
    error = torch.cat([ours.values for ours, _ in pairs]) - truth
    row: dict[str, float] = {
        "exact_nats": float(truth.mean()),
        "value_nats": float((truth + error).mean()),
        "value_error_nats": float(error.mean()),
        "value_rms_error_nats": float(error.square().mean().sqrt()),
        "value_at_base_nats": float(torch.cat(at_base).mean()),
    }
    for what in ("logits", "hidden"):
        sides = [(getattr(ours, what), getattr(theirs, what)) for ours, theirs in pairs]
        a, b = (torch.stack([side.sum(dim=0) for side in column]).sum(dim=0) for column in zip(*sides, strict=True))
        norms = [sum(float(side.norm(dim=1).sum()) for side in column) for column in zip(*sides, strict=True)]
        row[f"{what}_cosine_mean"] = float(torch.cat([F.cosine_similarity(a, b, eps=1e-30) for a, b in sides]).mean())
        row[f"{what}_cosine_total"] = float(F.cosine_similarity(a, b, dim=0))
        row[f"{what}_norm_ratio"] = norms[0] / norms[1]
    row["adapter_cosine"] = mean(float(F.cosine_similarity(a.adapter, b.adapter, dim=0)) for a, b in pairs)
    row["adapter_norm_ratio"] = mean(float(a.adapter.norm() / b.adapter.norm()) for a, b in pairs)
    return row


def fidelity(args: argparse.Namespace) -> None:
    """Measure every form on every model, write the table and print it."""
    started, out = time.perf_counter(), args.out or OUT / "tails.csv"
    if not args.table:
        with as_file(BASE) as folder, tempfile.TemporaryDirectory() as scratch:
            demo = Demo(folder, args.work, args.steps)
            samples = demo.new[:: max(1, len(demo.new) // args.samples)][: args.samples]
            models = {}
            for arm, part in MODELS:
                steps = max(1, args.steps // part)
                models[f"{arm.name}, {steps} steps"] = probes_of(arm, Demo(folder, args.work, steps), samples)
            print(f"data and models: {time.perf_counter() - started:.0f} s", flush=True)
            lines = [
                line for kept in groupby(forms(), lambda f: f.kept) for line in rows_of(*kept, demo, models, scratch)
            ]
        lines.sort(key=lambda line: (-float(line["exact_nats"]), line["model"], float(line["bytes_a_position"])))
        write_csv(lines, out)
    for model, group in groupby(read_csv(out), lambda line: line["model"]):
        print_fidelity(model, list(group))
    print(f"{time.perf_counter() - started:.0f} s")


def probes_of(arm: Arm, demo: Demo, samples: Sequence[Sample]) -> list[Probe]:
    """The samples, batch by batch, through a model that was trained this way, weight 1, seed 0."""
    adapted, _ = demo.train(arm, demo.cache(arm), 1.0, 0, demo.work / f"{arm.regularizer}-{demo.settings.max_steps}")
    batches = (samples[i : i + BATCH] for i in range(0, len(samples), BATCH))
    return [Probe(demo.untouched, adapted, batch) for batch in batches]


def rows_of(
    kept: Kept, group: Iterator[Form], demo: Demo, models: dict[str, list[Probe]], scratch: str
) -> Iterator[Line]:
    """The lines of the forms that one cache serves."""
    samples = [sample for probe in next(iter(models.values())) for sample in probe.samples]
    with group_steps(kept.group_steps):
        cache = kept.cache(demo, samples, Path(tempfile.mkdtemp(dir=scratch)) / "cache")
        about = {name: str(value) for name, value in asdict(kept).items()}
        about["kept_mass"] = f"{describe(cache).kept_mass.mean():.3f}"
        about["bytes_a_position"] = f"{bytes_a_position(cache):.1f}"
        for form, (model, probes) in product(group, models.items()):
            row = {name: f"{value:.4f}" for name, value in measures(probes, form, cache).items()}
            count = str(sum(len(probe.p_label) for probe in probes))
            yield {"model": model, "positions": count, "form": str(form), "tail": form.tail} | about | row


@contextmanager
def group_steps(steps: int) -> Iterator[None]:
    """Precision fine with other steps of the groups' shares: the format has one, and this shows what it costs."""
    usual = PRECISIONS["fine"]
    assert usual is not None
    PRECISIONS["fine"] = replace(usual, groups=steps)
    try:
        yield
    finally:
        PRECISIONS["fine"] = usual


def front(lines: Sequence[Line], by: str) -> set[str]:
    """The forms, of those that the format can store, of which none with as few bytes has as high a cosine."""
    best, found = -1.0, set()
    for line in sorted(lines, key=lambda line: (float(line["bytes_a_position"]), -float(line[by]))):
        if line["group_steps"] == "1" and float(line[by]) > best:
            found.add(line["form"])
            best = float(line[by])
    return found


def print_fidelity(model: str, lines: Sequence[Line]) -> None:
    """By bytes, * and + on the fronts by hidden state and by adapter; cosines: mean over positions / of the sum."""
    print(f"\n{model}: {lines[0]['positions']} positions, exact {lines[0]['exact_nats']} nats\n{'':38}", end="")
    heads = ["bytes", "value", "error", "at base", "logits", "hidden", "norm", "adapter"]
    print("".join(f"{head:>{w}}" for head, w in zip(heads, WIDTHS, strict=True)))
    by_hidden, by_adapter = front(lines, "hidden_cosine_mean"), front(lines, "adapter_cosine")
    for line in lines:
        marks = f"{'*' * (line['form'] in by_hidden)}{'+' * (line['form'] in by_adapter)}"
        cells = [line[name] for name in ("bytes_a_position", "value_nats", "value_error_nats", "value_at_base_nats")]
        cells += [
            "/".join(f"{float(line[f'{w}_cosine_{of}']):.3f}" for of in ("mean", "total")) for w in ("logits", "hidden")
        ]
        cells += [f"{float(line['hidden_norm_ratio']):.2f}", line["adapter_cosine"]]
        print(f"{marks:3}{line['form']:35}" + "".join(f"{c:>{w}}" for c, w in zip(cells, WIDTHS, strict=True)))


# Frontier


def frontier(args: argparse.Namespace) -> None:
    """Train what is not in the CSV yet, a whole sweep of one seed before the next, and compare."""
    out = args.out or OUT / "tail_frontier.csv"
    lines, steps = read_csv(out), str(args.steps)
    done = {(line["arm"], line["weight"], line["seed"], line["steps"]) for line in lines}
    sweep = [(PLAIN, 0.0), *product(ARMS, WEIGHTS)]
    runs = [(arm, weight, seed) for seed in range(args.seeds) for arm, weight in sweep]
    missing = [run for run in runs if (run[0].name, f"{run[1]:g}", str(run[2]), steps) not in done]
    if missing and not args.table:
        with as_file(BASE) as folder:
            demo = Demo(folder, args.work, args.steps)
            for number, run in enumerate(missing, 1):
                started = time.perf_counter()
                lines.append(trained(demo, *run))
                write_csv(lines, out)
                said = "  ".join(f"{name} {value}" for name, value in lines[-1].items() if name in SAID)
                print(f"{number}/{len(missing)} {said}  {time.perf_counter() - started:.0f} s in all", flush=True)
    print_frontier([line for line in lines if line["steps"] == steps])


def trained(demo: Demo, arm: Arm, weight: float, seed: int) -> Line:
    """One run: cache, training, learning and forgetting as the demo has them."""
    cache, folder = demo.cache(arm), demo.work / "run"
    shutil.rmtree(folder, ignore_errors=True)
    adapted, seconds = demo.train(arm, cache, weight, seed, folder)
    shutil.rmtree(folder)
    new, prior = (compare(demo.untouched.model, adapted, samples) for samples in (demo.new, demo.prior))
    found = Outcome(arm.name, seed, new, prior, seconds)
    assert prior.kl_nats is not None
    kept = {"top_k": "", "bytes_a_position": ""}
    if cache is not None:
        kept = {"top_k": str(cache.manifest.capture.top_k), "bytes_a_position": f"{bytes_a_position(cache):.1f}"}
    return {
        "arm": arm.name,
        "regularizer": arm.regularizer,
        "tail": arm.tail if cache is not None else "",
        "tail_groups": str(arm.tail_groups),
        "tail_samples": str(arm.tail_samples),
        **kept,
        "weight": f"{weight:g}",
        "seed": str(seed),
        "steps": str(demo.settings.max_steps),
        "learning": f"{found.learning:.4f}",
        "forgetting": f"{found.forgetting:.4f}",
        "kl_prior": f"{prior.kl_nats:.4f}",
        "seconds": f"{seconds:.1f}",
    }


def print_frontier(lines: list[Line]) -> None:
    """Learning and forgetting of every arm, and its learning where it forgets what the reference does at each weight.

    Between its weights (and plain CE, weight 0) an arm's learning is interpolated linearly in its forgetting, seed by
    seed; `-` where its sweep does not reach. Means over seeds ± half the range.
    """
    levels = [_mean(lines, REFERENCE, weight, "forgetting") for weight in WEIGHTS]
    seeds = sorted({line["seed"] for line in lines})
    titles = [*(f"weight {weight:g}" for weight in WEIGHTS), *(f"at {level:+.3f}" for level in levels)]
    print(f"\nlearning/forgetting; then learning interpolated at a forgetting\n{'':32}", end="")
    print("".join(f"{title:17}" for title in titles))
    for arm in (PLAIN, *ARMS):
        weights = (0.0,) if arm == PLAIN else WEIGHTS
        cells = [f"{_mean(lines, arm, w, 'learning'):.3f}/{_mean(lines, arm, w, 'forgetting'):+.3f}" for w in weights]
        if arm != PLAIN:
            cells += [_mean_and_range([learning_at(lines, arm, level, seed) for seed in seeds]) for level in levels]
        print(f"{arm.name:32}" + "".join(f"{cell:17}" for cell in cells))


def learning_at(lines: list[Line], arm: Arm, forgetting: float, seed: str) -> float:
    """Interpolated along the arm's sweep; NaN outside."""
    sweep = [line for line in lines if line["arm"] in (arm.name, PLAIN.name) and line["seed"] == seed]
    points = sorted((float(line["forgetting"]), float(line["learning"])) for line in sweep)
    if len(points) < 2:
        return float("nan")
    forgot, learnt = ([point[i] for point in points] for i in (0, 1))
    return float(np.interp(forgetting, forgot, learnt, left=np.nan, right=np.nan))


def _mean(lines: list[Line], arm: Arm, weight: float, what: str) -> float:
    found = [float(line[what]) for line in lines if line["arm"] == arm.name and line["weight"] == f"{weight:g}"]
    return mean(found) if found else float("nan")


def _mean_and_range(values: list[float]) -> str:
    reached = [value for value in values if not np.isnan(value)]
    if not reached:
        return "-"
    return f"{mean(reached):.3f}" + (f" ± {(max(reached) - min(reached)) / 2:.3f}" if len(values) > 1 else "")


# Files


def read_csv(path: Path) -> list[Line]:
    """The lines of a CSV, none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_csv(lines: list[Line], path: Path) -> None:
    """One line a measurement; all of them, or the file stays as it was."""
    unfinished = path.with_name(f"{path.name}.new")
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, lines[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    unfinished.replace(path)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first, second = commands.add_parser("fidelity"), commands.add_parser("frontier")
    for command in (first, second):
        command.add_argument("--steps", type=int, default=50, help="of training")
        command.add_argument("--work", type=Path, default=WORK, help="folder for data, models and caches of training")
        command.add_argument("--out", type=Path, help="the CSV, by default in docs/benchmarks")
        command.add_argument("--threads", type=int, help="of torch")
        command.add_argument("--table", action="store_true", help="only print what is in the CSV")
    first.add_argument("--samples", type=int, default=16, help="held-out samples, of some 210 positions each")
    second.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)
    args.work.mkdir(parents=True, exist_ok=True)
    {"fidelity": fidelity, "frontier": frontier}[args.command](args)


if __name__ == "__main__":
    main()
