"""What each form of the tail is worth: how true its gradient is for the bytes it takes.

Owns the measurements behind docs/benchmarks/tails.csv, on the demo's base (V = 4,096; it knows prose) and the demo's
new domain (source code), and the same of any base and rows (tails_smollm2.csv: V = 49,152), of fewer forms. The exact
masked KL and the zero-tail forms are written here from their formulas, dense; every other form is the project's own, of
what a real cache at precision fine gives back. What training makes of the forms is study_frontier.py's.
Shapes: N positions of a batch of samples, V vocabulary, K alternatives, G groups, M draws, D hidden.

    python scripts/study_tails.py                     on adapted models, against the exact gradient; 10 minutes
    python scripts/study_tails.py --model NAME=FOLDER --data ROWS.jsonl --batch-size 2 --samples 8 --out FILE.csv
    python scripts/study_tails.py --table             only print what is in the CSV

Data, models and caches of training are kept in --work, so that a second run is quicker.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import as_file
from itertools import groupby
from pathlib import Path
from statistics import mean

import numpy as np
import torch
import torch.nn.functional as F
from bench_common import BENCHMARKS, Line, demo_base, out_of, read_csv, write_csv
from numpy.typing import NDArray
from peft import PeftModel
from study_demo import PLAIN, REFERENCE, Arm, Demo, Given, Material, arguments, bytes_a_position, start
from torch import Tensor

from logitcache.capture.settings import CaptureSettings
from logitcache.capture.vocab_groups import token_groups
from logitcache.data.batches import pad_batch
from logitcache.data.samples import Sample
from logitcache.demo.run import DemoSettings
from logitcache.losses.formulas import Objective, SparseTargets, base_rest, regularizer_values
from logitcache.models.head import OutputHead, causal_lm_of, hidden_states
from logitcache.models.loading import Base, Source
from logitcache.pairing.targets import groups_of, sparse_targets
from logitcache.storage import LogitCache
from logitcache.storage.statistics import describe

MIN_REST = 1e-4
KEPT = (8, 16, 32, 64, 128, 256)
WIDTHS = (7, 8, 8, 9, 13, 13, 6, 9)
MODELS = ((PLAIN, 1), (REFERENCE, 1), (REFERENCE, 10))
"""That the forms are compared on: how they are trained, and by what --steps is divided."""


@dataclass(frozen=True)
class Kept:
    """What a cache keeps of a position; group_steps: a nat, of the groups' shares."""

    top_k: int
    tail_groups: int = 0
    partition: str = ""
    group_steps: int = 1
    tail_samples: int = 0

    def settings(self, max_length: int) -> CaptureSettings:
        """What captures it."""
        step = 1 / self.group_steps
        job = CaptureSettings(self.top_k, max_length, tail_groups=self.tail_groups, tail_samples=self.tail_samples)
        return replace(job, tail_group_step=step) if self.tail_groups else job

    def cache(self, given: Material, samples: Sequence[Sample], path: Path) -> LogitCache:
        """Written and opened."""
        job = self.settings(given.settings.max_length)
        named = self.tail_groups, self.partition
        if self.tail_groups and named not in given.partitions:
            given.partitions[named] = self.groups(given.untouched)
        return given.fill(path, samples, job, given.partitions.get(named))

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
    yield from (Form("groups", Kept(k, count, "k-means", 4)) for k in KEPT[:4] for count in (16, 64))
    for k in (1, *KEPT):
        yield from (Form("sampled", Kept(k, tail_samples=count)) for count in (8, 16, 32, 64))


def planned_forms() -> Iterator[Form]:
    """What `precompute --plan` chooses among; and other forms of 64 alternatives, finer groups, draws."""
    for k in KEPT:
        others = ("renormalize", "zero") if k == 64 else ()
        yield from (Form(tail, Kept(k)) for tail in ("bucket", *others))
        yield from (Form("groups", Kept(k, count, "k-means")) for count in (16, 64))
    yield Form("groups", Kept(32, 64, "k-means", 4))
    yield Form("sampled", Kept(16, tail_samples=32))


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
    """A batch of samples through an adapted model, its graph kept, with the exact value and gradients.

    Only positions with 1 - p(y) >= 1e-4 count, in every form alike. Raises ValueError for a head that is more than a
    product with its weight.
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
        with torch.no_grad():
            if not torch.allclose(OutputHead(causal_lm_of(adapted))(self._hidden[:8]), logits[:8], atol=1e-3):
                raise ValueError(f"{base.source.name}: its head is more than a product with its weight")
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
    row["adapter_cosine"] = mean(
        float(F.cosine_similarity(a.adapter.double(), b.adapter.double(), dim=0)) for a, b in pairs
    )
    row["adapter_norm_ratio"] = mean(float(a.adapter.norm() / b.adapter.norm()) for a, b in pairs)
    return row


def fidelity(args: argparse.Namespace, out: Path) -> None:
    """Measure every form on every model, write the table and print it."""
    started = time.perf_counter()
    if not args.table:
        with as_file(demo_base()) as folder, tempfile.TemporaryDirectory() as scratch:
            given, measured = material(args, folder, args.steps), list(planned_forms() if args.model else forms())
            samples = given.new[:: max(1, len(given.new) // args.samples)][: args.samples]
            caches = {
                kept: kept.cache(given, samples, Path(tempfile.mkdtemp(dir=scratch)) / "cache")
                for kept, _ in groupby(measured, lambda f: f.kept)
            }
            print(f"data and caches: {time.perf_counter() - started:.0f} s", flush=True)
            lines: list[Line] = []
            for arm, part in MODELS:
                steps = max(1, args.steps // part)
                probes = probes_of(arm, material(args, folder, steps), samples)
                lines += (row_of(form, caches[form.kept], f"{arm.name}, {steps} steps", probes) for form in measured)
                print(f"{arm.name}, {steps} steps: {time.perf_counter() - started:.0f} s", flush=True)
                del probes
        lines.sort(key=lambda line: (-float(line["exact_nats"]), line["model"], float(line["bytes_a_position"])))
        write_csv(lines, out)
    for model, group in groupby(read_csv(out), lambda line: line["model"]):
        print_fidelity(model, list(group))
    print(f"{time.perf_counter() - started:.0f} s")


def material(args: argparse.Namespace, demo_folder: Path, steps: int) -> Material:
    """The base and rows that are asked for, else the demo's, with so many steps of training."""
    settings = DemoSettings(max_steps=steps, batch_size=args.batch_size)
    if not args.model:
        return Demo(demo_folder, args.work, settings)
    name, folder = args.model.split("=", 1)
    return Given(Source(name, Path(folder)), args.data, args.work, settings)


def probes_of(arm: Arm, given: Material, samples: Sequence[Sample]) -> list[Probe]:
    """The samples, batch by batch, through a model that was trained this way, weight 1, seed 0."""
    size, folder = given.settings.batch_size, given.work / f"{arm.regularizer}-{given.settings.max_steps}"
    adapted, _ = given.train(arm, given.cache(arm), 1.0, 0, folder)
    return [Probe(given.untouched, adapted, samples[i : i + size]) for i in range(0, len(samples), size)]


def row_of(form: Form, cache: LogitCache, model: str, probes: Sequence[Probe]) -> Line:
    """The line of a form on an adapted model."""
    about = {name: str(value) for name, value in asdict(form.kept).items()}
    about["kept_mass"] = f"{describe(cache).kept_mass.mean():.3f}"
    about["bytes_a_position"] = f"{bytes_a_position(cache):.1f}"
    row = {name: f"{value:.4f}" for name, value in measures(probes, form, cache).items()}
    count = str(sum(len(probe.p_label) for probe in probes))
    return {"model": model, "positions": count, "form": str(form), "tail": form.tail} | about | row


def front(lines: Sequence[Line], by: str) -> set[str]:
    """The forms of which none with as few bytes has as high a cosine."""
    best, found = -1.0, set()
    for line in sorted(lines, key=lambda line: (float(line["bytes_a_position"]), -float(line[by]))):
        if float(line[by]) > best:
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


def main() -> None:
    """Measure, print and write."""
    parser = arguments(__doc__)
    parser.add_argument("--samples", type=int, default=16, help="held-out samples, of some 210 positions each")
    parser.add_argument("--batch-size", type=int, default=8, help="samples a step of training, and measured together")
    parser.add_argument("--model", metavar="NAME=FOLDER", help="instead of the demo's base; with --data and --out")
    parser.add_argument("--data", type=Path, help="rows that are new to --model; the last fifth is held out")
    args = start(parser)
    if (args.model is None) != (args.data is None):
        parser.error("--model and --data go together")
    out = out_of(parser, args, BENCHMARKS / "tails.csv", ["work", "threads", "table"])
    assert out is not None
    fidelity(args, out)


if __name__ == "__main__":
    main()
