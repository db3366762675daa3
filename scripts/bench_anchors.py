"""A training step with anchors: new and anchor samples in one forward, padded or packed, or in two.

Owns the measurements behind docs/benchmarks/anchors.csv. Every way makes the same loss, cross-entropy on 4 new samples
plus the full KL on 4 anchors, which is checked (loss and gradient norm) before anything is timed; then the ways take
turns, step by step, in one process. A step is forward, backward and AdamW on LoRA of rank 16; its memory is what it
needs at its peak beyond what stays between steps. Seconds on a CPU are those of the process, which other work on the
machine changes little. Anchors are short (20 to 90 tokens, as answers to everyday prompts are) or as long as the new
samples. `new alone` is the step without anchors.

    python scripts/bench_anchors.py                      the demo's base, one core
    python scripts/bench_anchors.py --model FOLDER       another one
    python scripts/bench_anchors.py --quick              a taste, which writes nothing
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.resources import as_file
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from bench_common import BENCHMARKS, Line, PeakMemory, demo_base, provenance, read_csv, set_up, timed, write_csv
from torch import Tensor, nn

from logitcache.adapters.attach import AdapterSettings, attach
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.worker import precompute
from logitcache.data.batches import pad_samples
from logitcache.data.samples import Sample
from logitcache.losses.formulas import Objective
from logitcache.losses.fused import linear_loss
from logitcache.models.head import OutputHead, causal_lm_of, hidden_states
from logitcache.models.loading import Base, Source, load_base
from logitcache.pairing.anchors import anchor_samples, looked_up
from logitcache.pairing.targets import Batch, targets_of, with_targets
from logitcache.pairing.view import CacheView
from logitcache.training.batch_loss import batch_loss

OUT = BENCHMARKS / "anchors.csv"
NUM_SAMPLES, RANK, WEIGHT = 4, 16, 4.0
SHORT = (20, 90)
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.03}
PLAIN, HELD = Objective("none"), Objective("full-kl", weight=WEIGHT)
Way = Callable[[nn.Module, Batch, Batch, CacheView], Tensor]


def new_alone(model: nn.Module, new: Batch, _anchors: Batch, _view: CacheView) -> Tensor:
    """No anchors at all."""
    return batch_loss(model, new, PLAIN, 0.0, None).loss / len(new["base_rows"])


def two_forwards(model: nn.Module, new: Batch, anchors: Batch, view: CacheView) -> Tensor:
    """A forward for each, one backward for both: what training does."""
    held = batch_loss(model, anchors, HELD, WEIGHT, view).loss / len(anchors["base_rows"])
    return new_alone(model, new, anchors, view) + held


def one_padded(model: nn.Module, new: Batch, anchors: Batch, view: CacheView) -> Tensor:
    """Rows under rows, all padded to the longest."""
    width = max(batch["input_ids"].shape[1] for batch in (new, anchors))

    def wide(name: str) -> Tensor:
        return torch.cat([F.pad(b[name], (0, width - b[name].shape[1])) for b in (new, anchors)])

    hidden = hidden_states(model, input_ids=wide("input_ids"), attention_mask=wide("attention_mask"))
    parts = hidden.split([len(batch["input_ids"]) for batch in (new, anchors)])
    trimmed = [h[:, : b["input_ids"].shape[1]].flatten(0, 1) for h, b in zip(parts, (new, anchors), strict=True)]
    return of_hidden(model, trimmed, new, anchors, view)


def one_packed(model: nn.Module, new: Batch, anchors: Batch, view: CacheView) -> Tensor:
    """All documents in one row, told apart by position_ids that start again."""
    masks = [batch["attention_mask"].bool() for batch in (new, anchors)]
    ids = torch.cat([b["input_ids"][mask] for b, mask in zip((new, anchors), masks, strict=True)])
    places = torch.cat([mask.cumsum(1)[mask] - 1 for mask in masks])
    packed = hidden_states(model, input_ids=ids[None], position_ids=places[None])[0]
    parts = packed.split([int(mask.sum()) for mask in masks])
    spread = []
    for part, mask in zip(parts, masks, strict=True):
        whole = part.new_zeros(mask.numel(), part.shape[1])
        spread.append(whole.index_put((mask.flatten().nonzero()[:, 0],), part))
    return of_hidden(model, spread, new, anchors, view)


def of_hidden(model: nn.Module, hidden: Sequence[Tensor], new: Batch, anchors: Batch, view: CacheView) -> Tensor:
    """The loss of hidden states [B * T, D] of both."""
    head = OutputHead(causal_lm_of(model), view.vocab_size)
    rows = [h.index_select(0, b["base_rows"]) for h, b in zip(hidden, (new, anchors), strict=True)]
    ce = linear_loss(rows[0], head, new["base_label_ids"], None, PLAIN, 0.0).loss / len(rows[0])
    targets, none = targets_of(anchors), anchors["base_supervised"]
    held = linear_loss(rows[1], head, anchors["base_label_ids"], targets, HELD, WEIGHT, supervised=none)
    return ce + held.loss / len(rows[1])


WAYS: dict[str, Way] = {
    "new alone": new_alone,
    "two forwards": two_forwards,
    "one forward, padded": one_padded,
    "one forward, packed": one_packed,
}


def random_samples(vocab_size: int, lengths: Sequence[int], seed: int) -> list[Sample]:
    """Random tokens, all of them supervised."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(vocab_size, size=n).astype(np.uint32) for n in lengths]
    return [Sample(tokens, np.ones(len(tokens), dtype=np.bool_), f"sample {i}") for i, tokens in enumerate(ids)]


class Steps:
    """A model with an adapter that has moved, its optimizer, and batches of both kinds; one way after the other."""

    def __init__(self, base: Base, folder: Path, args: argparse.Namespace, anchor_lengths: tuple[int, int]) -> None:
        vocab_size, num = base.identity.vocab_size, NUM_SAMPLES * args.steps
        draws = np.random.default_rng(args.seed).integers(*anchor_lengths, size=num, endpoint=True)
        anchors = random_samples(vocab_size, draws.tolist(), args.seed + 1)
        precompute(base, anchors, folder, CaptureSettings(top_k=64, max_length=max(512, args.length)))
        self.view = CacheView.paired(folder, base, HELD)
        cached = anchor_samples(self.view.cache)
        order = np.random.default_rng(args.seed).permutation(len(cached))  # the cache has the longest first
        new = random_samples(vocab_size, [args.length] * num, args.seed + 2)
        device = torch.device(args.device)
        self.batches = []
        for i in range(0, num, NUM_SAMPLES):
            held = looked_up(self.view, [cached[n] for n in order[i : i + NUM_SAMPLES]]).batch(device)
            plain = with_targets(pad_samples(new[i : i + NUM_SAMPLES]), None)
            self.batches.append(({k: v.to(device) for k, v in plain.items()}, held))
        torch.manual_seed(args.seed)
        self.model = attach(base.model, AdapterSettings(rank=RANK), base.source.name).train()
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5)

    def make(self, way: Way, number: int) -> None:
        """One step."""
        loss = way(self.model, *self.batches[number], self.view)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def found(self, way: Way) -> tuple[float, float]:
        """Loss and norm of the gradient at the first batch."""
        loss = way(self.model, *self.batches[0], self.view)
        loss.backward()
        norm = torch.stack([p.grad.square().sum() for p in self.trained if p.grad is not None]).sum().sqrt()
        self.optimizer.zero_grad()
        return float(loss.detach()), float(norm)


def check(steps: Steps, tolerance: float) -> None:
    """The ways with anchors make one loss and one gradient."""
    expected = steps.found(two_forwards)
    for name in list(WAYS)[2:]:
        found = steps.found(WAYS[name])
        ratios = [a / b for a, b in zip(found, expected, strict=True)]
        assert all(abs(ratio - 1) < tolerance for ratio in ratios), f"{name}: {found} instead of {expected}"


def seconds_of(function: Callable[[], None], device: str) -> float:
    """Of the process on a CPU, of the device on a GPU."""
    if device == "cuda":
        return timed(function, device)
    began = time.process_time()
    function()
    return time.process_time() - began


def measure(steps: Steps, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds and memory of a step, by way; the first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    memory: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(args.steps):
        for name, way in WAYS.items():
            with PeakMemory(args.device) as peak:
                took = seconds_of(lambda way=way, number=number: steps.make(way, number), args.device)
            if number:
                seconds[name].append(took)
                memory[name].append(peak.growth)
    return {
        name: {
            "seconds": median(seconds[name]),
            "seconds_min": min(seconds[name]),
            "seconds_max": max(seconds[name]),
            "step_growth_mib": median(memory[name]),
        }
        for name in WAYS
    }


def rows_of(args: argparse.Namespace, lengths: tuple[int, int], what: str) -> list[Line]:
    """All ways with anchors of these lengths, as lines."""
    opened = as_file(demo_base()) if args.model is None else nullcontext(args.model)
    with opened as folder, tempfile.TemporaryDirectory() as work:
        base = load_base(Source(args.model_name, folder), args.dtype, torch.device(args.device))
        steps = Steps(base, Path(work) / "anchors", args, lengths)
        check(steps, TOLERANCE[args.dtype])
        found = measure(steps, args)
    plain, two = (found[name]["seconds"] for name in ("new alone", "two forwards"))
    return [
        {
            **{"model": args.model_name, "new": f"{NUM_SAMPLES} x {args.length}", "anchors": f"{NUM_SAMPLES} x {what}"},
            "way": name,
            **{key: f"{value:.4g}" for key, value in numbers.items()},
            "against_new_alone": f"{numbers['seconds'] / plain:.3f}",
            "against_two_forwards": f"{numbers['seconds'] / two:.3f}",
            **{"dtype": args.dtype, "device": args.device, "threads": str(args.threads), "seed": str(args.seed)},
        }
        for name, numbers in found.items()
    ]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a base; default: the demo's")
    parser.add_argument("--model-name", default="demo", help="what the lines call it")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--length", type=int, default=230, help="tokens of a new sample")
    parser.add_argument("--steps", type=int, default=11, help="of each way, of which the first does not count")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="three steps; nothing is written")
    parser.add_argument("--out", type=Path, default=OUT)
    args: Any = parser.parse_args()
    args.steps = 3 if args.quick else args.steps
    set_up(args.threads)
    about = provenance(__file__, args.device, ["torch", "transformers", "peft", "logitcache"])
    lines = []
    for what, lengths in ((f"{SHORT[0]} to {SHORT[1]}", SHORT), (str(args.length), (args.length, args.length))):
        lines += rows_of(args, lengths, what)
    for line in lines:
        shown = f"{line['anchors']:14}{line['way']:22}{line['seconds']:>8} s {line['step_growth_mib']:>7} MiB"
        print(f"{shown}  {line['against_new_alone']} of new alone, {line['against_two_forwards']} of two forwards")
    print(about)
    if not args.quick:
        kept = [line for line in read_csv(args.out) if line["model"] != args.model_name]
        write_csv([*kept, *(line | about for line in lines)], args.out)


if __name__ == "__main__":
    main()
