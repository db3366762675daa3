"""Seconds and memory of the loss step alone: hidden states -> loss -> gradient into them, ours and other projects'.

Owns the measurements behind docs/benchmarks/loss.csv; what the others do is in bench_loss_peers.py. The head is frozen,
the teacher is the same head on nearby hidden states, labels are drawn from it. Every method runs in a fresh process,
and the repeats go round the methods, so that a machine that drifts drifts for all. Peak growth is over the inputs.
What counts are the ratios to plain CE of the same run. Errors: the largest difference from the same quantity by its
definition in float64, of the loss and of the gradient of the mean loss, on the first 64 positions. A method whose
tensors of [N, V] would not fit into what is free is not run, and its row says so.

    python scripts/bench_loss.py                         V = 32,000 and 151,936, N = 2,048, D = 512; needs 13 GB, or 24
    python scripts/bench_loss.py --quick                 a taste, which writes nothing
    python scripts/bench_loss.py --preset 7b             on a GPU: D = 3,584, V = 152,064, bfloat16
    python scripts/bench_loss.py --preset 7b --compile   the same, with those peers compiled that are so by default
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from bench_common import BENCHMARKS, LOGIT_STD, PeakMemory, provenance, run_child, set_up, timed, write_csv
from bench_loss_peers import PEERS, Teacher, masked_kl
from torch import Tensor, nn

from logitcache.losses.formulas import Objective, SparseTargets
from logitcache.losses.fused import linear_loss

DEFAULT_OUT = BENCHMARKS / "loss.csv"
TOP_K, NUM_GROUPS, NUM_DRAWS = 64, 64, 32
TEACHER_NOISE = 0.3
CHECKED_ROWS = 64

OURS = {f"logitcache {tail}": Objective(tail=tail) for tail in ("bucket", "renormalize", "groups", "sampled")}
OURS = {"logitcache CE only": Objective(regularizer="none")} | OURS
METHODS = [*(peer.name for peer in PEERS), *OURS]


@dataclass(frozen=True)
class Size:
    """tokens N, hidden_size D, vocab V; dtype of hidden states and head."""

    tokens: int
    hidden_size: int
    vocab: int
    dtype: str
    device: str


@dataclass(frozen=True)
class Inputs:
    """hidden [N, D] and weight [V, D] in the run's dtype; labels int64 [N]; the teacher as peers and as we get it."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    teacher: Teacher
    targets: SparseTargets

    def first(self, num: int) -> Inputs:
        """The first positions."""
        teacher = replace(self.teacher, **_first(self.teacher, num))
        targets = replace(self.targets, **_first(self.targets, num))
        return Inputs(self.hidden[:num], self.weight, self.labels[:num], teacher, targets)


def _first(table: Teacher | SparseTargets, num: int) -> dict[str, Tensor]:
    columns = {f.name: getattr(table, f.name) for f in fields(table) if f.name != "token_groups"}
    return {name: column[:num] for name, column in columns.items() if column is not None}


# Inputs


@torch.no_grad()
def make_inputs(size: Size, seed: int) -> Inputs:
    """Random hidden states and head (logits of standard deviation 4), and what a cache would hold of the teacher."""
    generator = torch.Generator(size.device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=size.device)

    dtype = getattr(torch, size.dtype)
    weight = (normal(size.vocab, size.hidden_size) * (LOGIT_STD / size.hidden_size**0.5)).to(dtype)
    hidden = normal(size.tokens, size.hidden_size)
    teacher_hidden = (hidden + TEACHER_NOISE * normal(*hidden.shape)).to(dtype)
    groups = torch.randint(NUM_GROUPS, (size.vocab,), generator=generator, device=size.device)
    parts = [_say(h, weight, groups, generator) for h in teacher_hidden.split(64)]
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    teacher = Teacher(teacher_hidden, columns.pop("top_ids"), columns.pop("top_logprobs"))
    targets = SparseTargets(**columns, token_groups=groups.int())
    return Inputs(hidden.to(dtype), weight, targets.label_ids.long(), teacher, targets)


def _say(hidden: Tensor, weight: Tensor, groups: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Columns of `SparseTargets`, and the best tokens with the label among them, at some of the positions."""
    logprobs = (hidden @ weight.T).float().log_softmax(dim=1)
    top_logprobs, top_ids = logprobs.topk(TOP_K, dim=1)
    labels = torch.multinomial(logprobs.exp(), 1, generator=generator)
    label_logprobs = logprobs.gather(1, labels)
    rest = logprobs.scatter(1, labels, -torch.inf)
    alternative_logprobs, ids = rest.topk(TOP_K, dim=1)
    tail = rest.scatter(1, ids, -torch.inf)
    by_group = torch.zeros(len(tail), NUM_GROUPS, device=tail.device)
    by_group = by_group.index_add(1, groups, tail.exp())
    draws = torch.multinomial(tail.exp(), NUM_DRAWS, replacement=True, generator=generator)
    return {
        "top_ids": top_ids,
        "top_logprobs": top_logprobs,
        "label_ids": labels.squeeze(1).int(),
        "label_logprobs": label_logprobs.squeeze(1),
        "alternative_ids": ids.int(),
        "alternative_logprobs": alternative_logprobs,
        "tail_logprobs": tail.logsumexp(dim=1),
        "tail_group_logprobs": by_group.log(),
        "draw_ids": draws.int(),
        "draw_logprobs": tail.gather(1, draws),
    }


def load_inputs(path: Path, device: str) -> Inputs:
    """What was saved `asdict`, on the device."""
    made: dict[str, Any] = torch.load(path, map_location=device)
    return Inputs(**made | {"teacher": Teacher(**made["teacher"]), "targets": SparseTargets(**made["targets"])})


# Methods


def loss_of(method: str, inputs: Inputs, compiled: bool) -> Callable[[Tensor], Tensor]:
    """hidden [N, D] -> mean CE + mean regulariser; what does not depend on the hidden states is made here."""
    if method not in OURS:
        peer = next(peer for peer in PEERS if peer.name == method)
        return lambda hidden: peer.loss(hidden, inputs.weight, inputs.labels, inputs.teacher, compiled)
    objective, head = OURS[method], nn.Linear(*inputs.weight.T.shape, bias=False, device="meta")
    head.weight = nn.Parameter(inputs.weight, requires_grad=False)
    targets = None if objective.regularizer == "none" else inputs.targets
    return lambda hidden: linear_loss(hidden, head, inputs.labels, targets, objective, 1.0).loss / len(hidden)


def by_definition(method: str, inputs: Inputs) -> tuple[float, Tensor]:
    """The loss and its gradient [n, D] in float64, from dense log-probabilities."""
    hidden, weight = inputs.hidden.double().requires_grad_(), inputs.weight.double()
    log_q = (hidden @ weight.T).log_softmax(dim=1)
    log_p = (inputs.teacher.hidden.double() @ weight.T).log_softmax(dim=1)
    values = F.nll_loss(log_q, inputs.labels, reduction="none")
    if method in OURS and OURS[method].regularizer != "none":
        values = values + masked_kl(log_q, log_p, inputs.targets, OURS[method].tail)
    for regularizer in (peer.regularizer for peer in PEERS if peer.name == method):
        values = values if regularizer is None else values + regularizer(log_q, log_p, inputs.teacher)
    loss = values.mean()
    loss.backward()
    assert hidden.grad is not None
    return loss.item(), hidden.grad


# Measurement, in the child


def child(job: dict[str, Any]) -> dict[str, float]:
    """Measure one method once: {seconds, growth}, and the errors where the job asks for them."""
    device, method, compiled = job["device"], job["method"], job["compiled"]
    set_up(job["threads"])
    inputs = load_inputs(Path(job["path"]), device)
    tiny = make_inputs(Size(8, 16, 256, job["dtype"], device), 0)

    def step(loss: Callable[[Tensor], Tensor], hidden: Tensor) -> tuple[Tensor, Tensor]:
        hidden.grad = None
        value = loss(hidden)
        value.backward()
        assert hidden.grad is not None
        return value.detach(), hidden.grad

    step(loss_of(method, tiny, compiled), tiny.hidden.requires_grad_())
    loss, hidden = loss_of(method, inputs, compiled), inputs.hidden.requires_grad_()
    for _ in range(2 if device == "cuda" or compiled else 0):  # kernels are chosen or compiled by shape
        step(loss, hidden)
    hidden.grad = None
    with PeakMemory(device) as peak:
        seconds = [timed(lambda: step(loss, hidden), device) for _ in range(job["inner"])]
    result = {"seconds": median(seconds), "growth": peak.growth}
    if job["check"]:
        few = replace(inputs, hidden=hidden.detach()).first(CHECKED_ROWS)
        value, gradient = step(loss_of(method, few, False), few.hidden.requires_grad_())
        expected, expected_gradient = by_definition(method, replace(few, hidden=few.hidden.detach()))
        result["loss_error"] = abs(value.item() - expected)
        result["gradient_error"] = (gradient.double() - expected_gradient).abs().max().item()
        result["largest_gradient"] = expected_gradient.abs().max().item()
    return result


# Report


def fits(method: str, size: Size) -> bool:
    """Whether the tensors of [N, V] that a method keeps fit into what is free, so that nobody else is killed for it."""
    found = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").exists() else ""
    if size.device == "cuda" or "MemAvailable" not in found:
        return True  # a GPU's allocator refuses by itself
    free = int(found.split("MemAvailable:")[1].split()[0]) * 1024
    copies = next((peer.copies for peer in PEERS if peer.name == method), 1)
    return copies * size.tokens * size.vocab * 4 < 0.9 * free


def measure(size: Size, args: argparse.Namespace, folder: Path) -> list[dict[str, str]]:
    """Every method at one size, the repeats going round the methods."""
    path = folder / f"inputs{size.vocab}.pt"
    torch.save(asdict(make_inputs(size, args.seed)), path)
    if size.device == "cuda":
        torch.cuda.empty_cache()  # what this process keeps, its children could not have
    job = {"path": str(path), "device": size.device, "dtype": size.dtype, "threads": args.threads, "inner": args.inner}
    found: dict[str, list[dict[str, Any] | None]] = {method: [] for method in args.methods}
    for repeat in range(args.repeats):
        for method in args.methods:
            each = job | {"method": method, "compiled": args.compile, "check": repeat == 0}
            found[method].append(run_child(__file__, each, args.threads) if fits(method, size) else None)
            print(f"V {size.vocab:,}, repeat {repeat + 1}: {method}: {found[method][-1]}", file=sys.stderr, flush=True)
    path.unlink()
    base = [run for run in found.get(PEERS[0].name, []) if run]
    quantities = {peer.name: peer.quantity for peer in PEERS} | dict.fromkeys(OURS, "CE + masked KL")
    quantities["logitcache CE only"] = "CE"
    return [
        {"method": method, "quantity": quantities[method]}
        | {name: str(value) for name, value in (asdict(size) | {"threads": args.threads}).items()}
        | _columns([run for run in runs if run], base)
        for method, runs in found.items()
    ]


def _columns(runs: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, str]:
    """Medians, spread, ratios to plain CE and errors; empty where a method ran out of memory."""
    names = ("seconds", "seconds_min", "seconds_max", "peak_growth_mib", "seconds_ratio", "memory_ratio")
    names += ("loss_error", "gradient_error", "largest_gradient")
    if not runs:
        return dict.fromkeys(names, "") | {"remark": "not enough memory"}
    seconds, growth = [r["seconds"] for r in runs], median(r["growth"] for r in runs)
    ratios = ["", ""]
    if base:
        of = (median(r["seconds"] for r in base), median(r["growth"] for r in base))
        ratios = [f"{x / y:.3f}" if y else "" for x, y in zip((median(seconds), growth), of, strict=True)]
    errors = [f"{runs[0][name]:.2e}" if name in runs[0] else "" for name in names[-3:]]
    shown = [f"{median(seconds):.4g}", f"{min(seconds):.4g}", f"{max(seconds):.4g}", f"{growth:.0f}", *ratios, *errors]
    return dict(zip(names, shown, strict=True)) | {"remark": ""}


def print_table(rows: list[dict[str, str]]) -> None:
    """Seconds, MiB and their ratios, by V."""
    for vocab in dict.fromkeys(row["vocab"] for row in rows):
        print(f"\n{f'V = {int(vocab):,}':36}{'s':>8}{'ratio':>8}{'MiB':>8}{'ratio':>8}{'loss err':>10}{'grad err':>10}")
        for row in (row for row in rows if row["vocab"] == vocab):
            cells = f"{row['seconds']:>8}{row['seconds_ratio']:>8}{row['peak_growth_mib']:>8}{row['memory_ratio']:>8}"
            print(f"{row['method']:36}{cells}{row['loss_error']:>10}{row['gradient_error']:>10} {row['remark']}")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["cpu", "7b"], default="cpu", help="defaults of what follows")
    parser.add_argument("--vocab", type=int, nargs="+")
    parser.add_argument("--hidden-size", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="processes a method")
    parser.add_argument("--inner", type=int, help="timed steps a process, of which the median counts (1; GPU: 5)")
    parser.add_argument("--compile", action="store_true", help="compile the peers that are compiled by default")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="tiny sizes; nothing is written")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(child(args.job)))
        return
    presets = {
        "cpu": ([32_000, 151_936], 512, 2048, "float32", "cpu"),
        "7b": ([152_064], 3584, 4096, "bfloat16", "cuda"),
    }
    names = ("vocab", "hidden_size", "tokens", "dtype", "device")
    defaults = dict(zip(names, presets[args.preset], strict=True))
    if args.quick:
        defaults |= {"vocab": [1000], "hidden_size": 32, "tokens": 256}
    chosen = {name: getattr(args, name) or default for name, default in defaults.items()}
    args.inner = args.inner or (5 if chosen["device"] == "cuda" else 1)
    set_up(args.threads)
    about = provenance(__file__, chosen["device"], ["torch", "logitcache"]) | {"seed": str(args.seed)}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for vocab in chosen.pop("vocab"):
            rows += measure(Size(vocab=vocab, **chosen), args, Path(folder))
    print_table(rows)
    print(about)
    if not args.quick:
        write_csv([row | about for row in rows], args.out)


if __name__ == "__main__":
    main()
