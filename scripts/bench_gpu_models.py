"""Whole models on a card: what capture records, rounding noise, training steps, lookups beside them, and the batch job.

Owns the sections of scripts/bench_gpu.py that run a model: of random weights, in memory, with the shapes of
Qwen2.5-0.5B and 7B, on random tokens; for noise the demo's own base too. A step is a plain loop: forward, loss,
backward, AdamW, in bfloat16 under autocast, layers checkpointed; `bench_step.py` has the Trainer's.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.resources import as_file
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_common import Shape, demo_base, random_model, timed
from bench_gpu_run import Run, is_simulated
from bench_loss import TOP_K
from bench_precompute import bare, captured, fastest_rows
from bench_step import RANK, TAIL_GROUPS, masked_kl
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import default_data_collator

from logitcache.adapters.attach import AdapterSettings, attach
from logitcache.capture.plan import make_plan
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.teacher import TransformersTeacher, capture
from logitcache.capture.worker import precompute
from logitcache.data.batches import pad_batch
from logitcache.data.samples import Sample
from logitcache.demo.text import code_documents
from logitcache.losses.formulas import Objective
from logitcache.models.causal import needs_mask
from logitcache.models.checkpointing import checkpoint_layers
from logitcache.models.head import hidden_states
from logitcache.models.loading import Base, Source, load_base, load_tokenizer
from logitcache.pairing.targets import Batch, sent
from logitcache.pairing.view import CacheView
from logitcache.storage import ModelIdentity
from logitcache.storage.configs import config_text
from logitcache.training.batch_loss import batch_loss

PLAIN, CACHED, GROUPS = "plain cross-entropy", "cached, bucket", "cached, groups"
LIVE, SECOND = "live base, adapter disabled", "live base, second model"
BARE = "bare forward"
LOADER_WORKERS = 2
LONGEST_WAIT = 60.0
"""Seconds, for a batch of theirs."""
NOISE_ROWS = 64
"""Of logits that are compared at a time, in float64."""

CHECKED_LAYERS = 2
"""Of the model whose capture is looked at: the body is transformers'."""


# Models and data


def model_of(run: Run, shape: Shape, dtype: torch.dtype) -> Any:
    """On the card, for inference."""
    return random_model(shape, run.sizes.length, run.seed, "cuda", dtype).eval()


def base_of(run: Run, shape: Shape) -> Base:
    """In bfloat16, as `load_base` would give it, but for the fingerprint: it is on no disk."""
    model = model_of(run, shape, torch.bfloat16)
    config = config_text(json.loads(model.config.to_json_string(use_diff=False)))
    identity = ModelIdentity("0" * 32, config, shape.vocab_size, "bfloat16", "sdpa")
    return Base(Source(shape.name, Path(shape.name)), model, identity)


def samples_of(run: Run, shape: Shape, number: int) -> list[Sample]:
    """Random tokens, all supervised."""
    rng = np.random.default_rng(run.seed)
    rows = rng.integers(shape.vocab_size, size=(number, run.sizes.length)).astype(np.uint32)
    return [Sample(row, np.ones(len(row), dtype=np.bool_), f"row {i}") for i, row in enumerate(rows)]


def features_of(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """As a data set of a trainer has them."""
    rows = [sample.token_ids.astype(np.int64).tolist() for sample in samples]
    return [{"input_ids": row, "labels": row} for row in rows]


def round_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model, its weights in this dtype; buffers stay, as a checkpoint that is loaded in this dtype has them."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


# Is capture right


@torch.inference_mode()
def capture_correctness(run: Run) -> None:
    """What `capture` records against log-softmax in float64 of the same hidden states: log-probabilities to the digits
    of the logits' dtype, and ids that are among the best k but for as much."""
    sizes = run.sizes.checked
    width, heads = sizes.hidden_size, max(2, sizes.hidden_size // 64)
    small = Shape("checked", "qwen2", sizes.vocab_size, width, 2 * width, CHECKED_LAYERS, heads, 2, True)
    samples = samples_of(run, small, 2)
    for dtype in (torch.float32, torch.bfloat16):
        model = model_of(run, small, dtype)
        masked = needs_mask(model)
        records = capture(model, samples, TOP_K, masked=masked)
        padded = pad_batch(samples, "cuda")
        hidden = hidden_states(model, **padded.inputs(masked)).flatten(0, 1).index_select(0, padded.rows)
        check_records(run, f"{sizes} {dtype}", records, hidden, model.get_output_embeddings().weight, padded.label_ids)


def check_records(run: Run, shape: str, records: Sequence[Any], hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    """Lines for the label's log-probability, the alternatives', their ids, and the tail."""
    column = {
        name: torch.from_numpy(np.concatenate([getattr(r, name) for r in records]).astype(np.float64)).to(hidden.device)
        for name in ("label_logprobs", "alternative_ids", "alternative_logprobs", "tail_logprobs")
    }
    apart: dict[str, list[Tensor]] = {"label": [], "alternatives": [], "tail": []}
    most_logit, num_outside, start, exact = 0.0, 0, 0, weight.double().T
    for h, y in zip(hidden.split(NOISE_ROWS), labels.split(NOISE_ROWS), strict=True):
        rows, start = slice(start, start + len(h)), start + len(h)
        logits = h.double() @ exact
        most_logit = max(most_logit, float(logits.abs().max()))
        allowed = 1e-4 + torch.finfo(hidden.dtype).eps * most_logit
        log_p, ids = logits.log_softmax(dim=1), column["alternative_ids"][rows].long()
        rest = log_p.scatter(1, y[:, None], -torch.inf)
        found = rest.gather(1, ids)
        tail = rest.scatter(1, ids, -torch.inf).logsumexp(dim=1)
        for name, recorded, expected in (
            ("label", "label_logprobs", log_p.gather(1, y[:, None]).squeeze(1)),
            ("alternatives", "alternative_logprobs", found),
            ("tail", "tail_logprobs", tail),
        ):
            apart[name].append((column[recorded][rows] - expected).abs().max())
        least = rest.topk(ids.shape[1], dim=1).values[:, -1:]
        num_outside += int((~(found >= least - 2 * allowed)).sum())
        num_outside += int((ids.sort(dim=1).values.diff(dim=1) == 0).sum())
    for name, errors in apart.items():  # torch's maximum, of which what is no number is the largest
        run.check(f"capture: {name}", shape, float(torch.stack(errors).max()), allowed, "nats")
    run.check("capture: ids that are not among the best k, or twice there", shape, float(num_outside), 0.0, "ids")


# Noise


@torch.inference_mode()
def noise(run: Run) -> None:
    """Mean KL of a float32 model to itself in bfloat16, and to itself with TF32 products: what no student is below."""
    with as_file(demo_base()) as folder:
        base = load_base(Source("demo", folder), "float32", torch.device("cuda", torch.cuda.current_device()))
        compare_dtypes(run, "demo's base, its own text", base.model, demo_tokens(base, run.sizes.noise_tokens))
    del base
    shape = run.sizes.small
    tokens = torch.randint(shape.vocab_size, (1, run.sizes.noise_tokens), device="cuda")
    compare_dtypes(run, shape.name, model_of(run, shape, torch.float32), tokens)


def demo_tokens(base: Base, number: int) -> Tensor:
    """int64 [1, number], of source code, in one row."""
    tokenizer = load_tokenizer(base.source)
    assert tokenizer is not None
    ids: list[int] = []
    for document in code_documents():
        ids += tokenizer(document.text, truncation=False, verbose=False)["input_ids"]
        if len(ids) >= number:
            break
    return torch.tensor([ids[:number]], device="cuda")


def compare_dtypes(run: Run, name: str, model: nn.Module, tokens: Tensor) -> None:
    """Lines of one model in float32, with its own noise where the same forward is run again; then it is rounded."""
    logits = model(input_ids=tokens, use_cache=False).logits[0]
    run.say(f"{name}: float32, again", tokens.shape[1], **kl_between(logits, model, tokens))
    torch.set_float32_matmul_precision("high")
    try:
        run.say(f"{name}: float32, TF32 products", tokens.shape[1], **kl_between(logits, model, tokens))
    finally:
        torch.set_float32_matmul_precision("highest")
    run.say(f"{name}: bfloat16", tokens.shape[1], **kl_between(logits, round_weights(model, torch.bfloat16), tokens))


def kl_between(logits: Tensor, model: nn.Module, tokens: Tensor) -> dict[str, Any]:
    """Cells of a line: mean KL(p || q), p of the logits [T, V] and q the model's, by float64; and the largest."""
    others = model(input_ids=tokens, use_cache=False).logits[0]
    values = []
    for one, other in zip(logits.split(NOISE_ROWS), others.split(NOISE_ROWS), strict=True):
        log_p, log_q = (z.double().log_softmax(dim=1) for z in (one, other))
        values.append((log_p.exp() * (log_p - log_q)).sum(dim=1))
    each = torch.cat(values)
    return {"value": float(each.mean()), "unit": "nats a position", "remark": f"largest {float(each.max()):.3g}"}


# Training steps


@dataclass(frozen=True)
class Student:
    """An adapter to be trained, its optimizer, and the cache that it was prepared for."""

    model: Any
    optimizer: torch.optim.Optimizer
    view: CacheView
    grouped: CacheView
    weight: Tensor

    def step(self, loss: Callable[[], Tensor]) -> Tensor:
        """Forward, backward, update."""
        with torch.autocast("cuda", torch.bfloat16):
            value = loss()
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value.detach()

    def cached(self, batch: Batch, view: CacheView) -> Tensor:
        """CE + masked KL towards what the batch brings of the cache."""
        sums = batch_loss(self.model, batch, view.objective, self.weight, view, scale=1 / len(batch["base_rows"]))
        return sums.loss

    def live(self, ids: Tensor, teacher: Any) -> Tensor:
        """The same towards a base that runs now, written plainly; None: this one without its adapter."""
        output = self.model(input_ids=ids, labels=ids, use_cache=False)
        with torch.no_grad(), self.model.disable_adapter() if teacher is None else nullcontext():
            logits = (teacher or self.model)(input_ids=ids, use_cache=False).logits
        loss: Tensor = output.loss + masked_kl(output.logits, logits, ids)
        return loss


def student_of(run: Run, base: Base, samples: Sequence[Sample], folder: Path) -> Student:
    """LoRA on all linear layers, layers checkpointed; the cache is made by the base before it is adapted."""
    settings = CaptureSettings(top_k=TOP_K, max_length=run.sizes.length, tail_groups=TAIL_GROUPS)
    precompute(base, samples, folder / "cache", settings)
    torch.manual_seed(run.seed)
    model = attach(base.model, AdapterSettings(rank=RANK), base.source.name).train()
    checkpoint_layers(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=not is_simulated())
    bucket, groups = (
        CacheView.paired(folder / "cache", model, objective) for objective in (Objective(), Objective(tail="groups"))
    )
    return Student(model, optimizer, bucket, groups, torch.ones((), device="cuda"))


def small_steps(run: Run) -> None:
    """Of the smaller shape."""
    steps(run, run.sizes.small)


def large_steps(run: Run) -> None:
    """Of the larger one."""
    steps(run, run.sizes.large)


def steps(run: Run, shape: Shape) -> None:
    """One batch, again and again; what a cache adds is there already. Looking up is `loader`'s."""
    samples = samples_of(run, shape, run.sizes.batch_size)
    label = f"{shape.name}, {run.sizes.batch_size} x {run.sizes.length}"
    with tempfile.TemporaryDirectory() as folder:
        student = student_of(run, base_of(run, shape), samples, Path(folder))
        device, features = torch.device("cuda", torch.cuda.current_device()), features_of(samples)
        batches = [sent(v.collator(default_data_collator)(features), device) for v in (student.view, student.grouped)]
        ids, model = batches[0]["input_ids"], student.model
        plain = lambda: model(input_ids=ids, labels=ids, use_cache=False).loss  # noqa: E731
        run.measure(PLAIN, label, lambda: student.step(plain))
        run.measure(CACHED, label, lambda: student.step(lambda: student.cached(batches[0], student.view)), PLAIN)
        run.measure(GROUPS, label, lambda: student.step(lambda: student.cached(batches[1], student.grouped)), PLAIN)
        run.measure(LIVE, label, lambda: student.step(lambda: student.live(ids, None)), PLAIN)
        second = model_of(run, shape, torch.bfloat16)
        run.measure(SECOND, label, lambda: student.step(lambda: student.live(ids, second)), PLAIN)


# Lookups beside a step


def loader(run: Run) -> None:
    """Positions a second that reach a step: with a batch that is ready, looked up in the process, and by workers."""
    shape, size = run.sizes.small, run.sizes.batch_size
    num_steps = run.sizes.loader_steps
    samples = samples_of(run, shape, size * num_steps)
    label, num_positions = f"{shape.name}, {size} x {run.sizes.length}", size * (run.sizes.length - 1)
    with tempfile.TemporaryDirectory() as folder:
        student = student_of(run, base_of(run, shape), samples, Path(folder))
        collator, features = student.view.collator(default_data_collator), features_of(samples)
        device = torch.device("cuda", torch.cuda.current_device())
        collator(features[:size])  # opens the shards
        began = time.perf_counter()
        made = [collator(features[i : i + size]) for i in range(0, len(features), size)]
        seconds = (time.perf_counter() - began) / num_steps
        run.time("looked up alone", label, [seconds], value=num_positions / seconds, unit="positions a second")
        ready = [sent(batch, device) for batch in made]
        loaders: dict[str, Any] = {"batches that are ready": ready}
        for workers in (0, LOADER_WORKERS):
            name = f"looked up by {workers} workers" if workers else "looked up in the process"
            longest = LONGEST_WAIT if workers else 0
            loaders[name] = DataLoader(
                features, size, collate_fn=collator, num_workers=workers, pin_memory=True, timeout=longest
            )
        for name, batches in loaders.items():
            found = epoch_seconds(student, batches, device)
            speed = {"value": num_positions / found, "unit": "positions a second"}
            run.time(f"steps, {name}", label, [found], "steps, batches that are ready", **speed)


def epoch_seconds(student: Student, batches: Any, device: torch.device) -> float:
    """Of a step, data included, over an epoch without its first step."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for number, batch in enumerate(batches):
        if number == 1:
            start.record()
        placed = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        student.step(lambda batch=placed: student.cached(batch, student.view))
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1000 / number


# The batch job


def capture_speed(run: Run) -> None:
    """The job, and what it captures alone, against the cheapest forward that makes every logit."""
    shape = run.sizes.small
    base, samples = base_of(run, shape), samples_of(run, shape, run.sizes.capture_samples)
    settings = CaptureSettings(top_k=TOP_K, max_length=run.sizes.length)
    batches = [batch for shard in make_plan(samples, settings).shards for batch in shard]
    teacher = TransformersTeacher(base.model, TOP_K, masked=needs_mask(base.model))
    label, num_tokens = f"{shape.name}, {len(samples)} x {run.sizes.length}", sum(len(s.token_ids) for s in samples)
    for name, work in jobs(base, samples, settings, batches, teacher):
        torch.cuda.synchronize()
        found = timed(work, "cuda")
        run.time(name, label, [found], BARE, value=num_tokens / found, unit="tokens a second")


def jobs(
    base: Base,
    samples: Sequence[Sample],
    settings: CaptureSettings,
    batches: Sequence[Sequence[Sample]],
    teacher: TransformersTeacher,
) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is timed once each, after a batch that warms up."""
    num_rows = fastest_rows(base.model, batches[0], teacher.masked)
    teacher(batches[0])
    yield BARE, lambda: bare(base.model, batches, teacher.masked, num_rows)
    yield "capture, nothing written", lambda: captured(teacher, batches)
    with tempfile.TemporaryDirectory() as folder:
        yield "precompute, the whole job", lambda: precompute(base, samples, Path(folder) / "cache", settings)
