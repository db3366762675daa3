"""Seconds and memory of the loss step alone: hidden states -> loss -> gradient into them, ours and other projects'.

Owns the measurements behind docs/benchmarks/loss.csv and loss_peers.csv. The others are those of bench_loss_peers.py,
as they are installed, each in the environment that scripts/make-peers made, or in this one; a row says what is missing,
or what a project answered where it does not run. The head is frozen, the teacher is the same head on nearby hidden
states, labels are drawn from it. Every method runs in a fresh process, and the repeats go round the methods, so that a
machine that drifts drifts for all. Peak growth is over the inputs. What counts are the ratios to plain CE of the same
run. Errors: the largest difference from the same quantity by its definition in float64, of the loss and of the gradient
of the mean loss, on the first 64 positions. A method whose tensors of [N, V] would not fit into what is free is not
run, and its row says so.

    scripts/make-peers                                   the others' environments; 8 GB of disk
    python scripts/bench_loss.py --check                 who runs here and computes what: errors alone, loss_peers.csv
    python scripts/bench_loss.py                         V = 32,000 and 151,936, N = 2,048, D = 512; needs 13 GB, or 24
    python scripts/bench_loss.py --quick                 a taste, which writes nothing
    python scripts/bench_loss.py --preset 7b --out F     on a GPU: D = 3,584, V = 152,064, bfloat16
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_common import BENCHMARKS, LOGIT_STD, ROOT, ChildFailed, out_of, provenance, run_child, set_up, write_csv
from bench_loss_peers import MOST_SAID, PEERS
from bench_loss_step import (
    Inputs,
    Loss,
    Regularizer,
    Teacher,
    definition,
    is_another_quantity,
    load_inputs,
    masked_kl,
    measure_step,
)
from torch import Tensor, nn

from logitcache.losses.formulas import Objective, SparseTargets
from logitcache.losses.fused import linear_loss

DEFAULT_OUT, CHECK_OUT = BENCHMARKS / "loss.csv", BENCHMARKS / "loss_peers.csv"
TOP_K, NUM_GROUPS, NUM_DRAWS = 64, 64, 32
TEACHER_NOISE = 0.3
CHECKED_SIZE = {"vocab": [33_003], "hidden_size": 64, "tokens": 2101}
"""More than one chunk of everybody who has chunks, and the last a ragged one."""
LONGEST = 1800.0
"""Seconds of a process, compiling too, after which its row says that it did not answer."""
NO_MEMORY = "not enough memory"
PEERS_SCRIPT = Path(__file__).with_name("bench_loss_peers.py")

OURS = {f"logitcache {tail}": Objective(tail=tail) for tail in ("bucket", "renormalize", "groups", "sampled")}
OURS = {"logitcache CE only": Objective(regularizer="none")} | OURS
METHODS = [*(peer.name for peer in PEERS), *OURS]
BY_NAME = {peer.name: peer for peer in PEERS}


@dataclass(frozen=True)
class Size:
    """tokens N, hidden_size D, vocab V; dtype of hidden states and head."""

    tokens: int
    hidden_size: int
    vocab: int
    dtype: str
    device: str


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


# Ours, in the child


def loss_of(method: str, inputs: Inputs) -> Loss:
    """hidden [N, D] -> mean CE + mean regulariser; what does not depend on the hidden states is made here."""
    if method not in OURS:
        return BY_NAME[method].loss_of(inputs)
    objective, head = OURS[method], nn.Linear(*inputs.weight.T.shape, bias=False, device="meta")
    head.weight = nn.Parameter(inputs.weight, requires_grad=False)
    targets = None if objective.regularizer == "none" else inputs.targets
    return lambda hidden: linear_loss(hidden, head, inputs.labels, targets, objective, 1.0).loss / len(hidden)


def by_definition(method: str, inputs: Inputs) -> tuple[float, Tensor]:
    """The loss and its gradient [n, D] in float64, from dense log-probabilities."""
    if method not in OURS:
        return BY_NAME[method].expected(inputs)
    objective = OURS[method]
    regularizer: Regularizer = lambda log_q, log_p, part: masked_kl(log_q, log_p, part.targets, objective.tail)  # noqa: E731
    return definition(inputs, True, None if objective.regularizer == "none" else regularizer)


def child(job: dict[str, Any]) -> dict[str, Any]:
    """`measure_step` of one of our forms."""
    set_up(job["threads"])
    method = job["method"]
    inputs, tiny = (load_inputs(Path(job[name]), job["device"], SparseTargets) for name in ("inputs", "tiny"))
    found = measure_step(job, inputs, tiny, partial(loss_of, method), partial(by_definition, method))
    return found | {"by": "logitcache"}


# Report


def shortage(method: str, size: Size) -> str:
    """Where the tensors of [N, V] that a method keeps do not fit into what is free, so that nobody else is killed for
    it: what it needs."""
    found = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").exists() else ""
    if size.device == "cuda" or "MemAvailable" not in found:
        return ""  # a GPU's allocator refuses by itself
    free = int(found.split("MemAvailable:")[1].split()[0]) * 1024
    needs = (1 if method in OURS else BY_NAME[method].copies) * size.tokens * size.vocab * 4
    return "" if needs < 0.9 * free else f"{NO_MEMORY}: about {needs / 1e9:.1f} GB, free {free / 1e9:.1f}"


def run_method(method: str, job: dict[str, Any], size: Size) -> dict[str, Any]:
    """What its process found, or {refused}: why there is nothing. Whatever it is, the others keep their rows."""
    if missing := shortage(method, size):
        return {"refused": missing}
    script, python = __file__, Path(sys.executable)
    if method not in OURS:
        script, python = str(PEERS_SCRIPT), BY_NAME[method].home.python
    try:
        found = run_child(script, job | {"method": method}, job["threads"], python, LONGEST)
    except ChildFailed as error:
        print(error, file=sys.stderr)
        return {"refused": error.said[:MOST_SAID]}
    return {"refused": NO_MEMORY} if found is None else found


def measure(size: Size, args: argparse.Namespace, folder: Path) -> list[dict[str, str]]:
    """Every method at one size, the repeats going round the methods; who refused once, but for want of memory, is not
    asked again."""
    paths = {"inputs": folder / f"inputs{size.vocab}.pt", "tiny": folder / "tiny.pt"}
    torch.save(asdict(make_inputs(size, args.seed)), paths["inputs"])
    torch.save(asdict(make_inputs(replace(size, tokens=8, hidden_size=16, vocab=256), 0)), paths["tiny"])
    if size.device == "cuda":
        torch.cuda.empty_cache()  # what this process keeps, its children could not have
    job = {name: str(path) for name, path in paths.items()}
    job |= {"device": size.device, "dtype": size.dtype, "threads": args.threads, "inner": args.inner}
    found: dict[str, list[dict[str, Any]]] = {method: [] for method in args.methods}
    for repeat in range(args.repeats):
        for method, runs in found.items():
            if runs and not runs[-1].get("refused", NO_MEMORY).startswith(NO_MEMORY):
                continue
            is_checked = any("loss_error" in run for run in runs)
            runs.append(run_method(method, job | {"check": not is_checked}, size))
            print(f"V {size.vocab:,}, repeat {repeat + 1}: {method}: {runs[-1]}", file=sys.stderr, flush=True)
    paths["inputs"].unlink()
    base = [run for run in found.get(PEERS[0].name, []) if "seconds" in run]
    return [
        {"method": method, "by": next((run["by"] for run in runs if "by" in run), ""), "quantity": quantity(method)}
        | {name: str(value) for name, value in (asdict(size) | {"threads": args.threads}).items()}
        | (_times(runs, base) if args.inner else {})
        | _errors(runs, size)
        for method, runs in found.items()
    ]


def quantity(method: str) -> str:
    """What a method computes, in words."""
    if method not in OURS:
        return BY_NAME[method].quantity
    return "CE" if OURS[method].regularizer == "none" else "CE + masked KL"


def _times(runs: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, str]:
    """Medians, spread and ratios to plain CE; empty where a method did not run."""
    names = ("seconds", "seconds_min", "seconds_max", "peak_growth_mib", "seconds_ratio", "memory_ratio")
    runs = [run for run in runs if "seconds" in run]
    if not runs:
        return dict.fromkeys(names, "")
    seconds, growth = [r["seconds"] for r in runs], median(r["growth"] for r in runs)
    ratios = ["", ""]
    if base:
        of = (median(r["seconds"] for r in base), median(r["growth"] for r in base))
        ratios = [f"{x / y:.3f}" if y else "" for x, y in zip((median(seconds), growth), of, strict=True)]
    shown = [f"{median(seconds):.4g}", f"{min(seconds):.4g}", f"{max(seconds):.4g}", f"{growth:.0f}", *ratios]
    return dict(zip(names, shown, strict=True))


def _errors(runs: list[dict[str, Any]], size: Size) -> dict[str, str]:
    """Of the run that was checked; remark: that they are another quantity's, and why the last run gave nothing."""
    names = ("loss_error", "gradient_error", "largest_gradient")
    refused, checked = runs[-1].get("refused", ""), next((run for run in runs if "loss_error" in run), None)
    if checked is None:
        return dict.fromkeys(names, "") | {"remark": refused}
    remarks = ["computes another quantity" if is_another_quantity(checked, size.dtype) else "", refused]
    return {name: f"{checked[name]:.2e}" for name in names} | {"remark": "; ".join(filter(None, remarks))}


def print_table(rows: list[dict[str, str]]) -> None:
    """Seconds, MiB, their ratios and errors where there are any, by V."""
    columns = {"seconds": "s", "seconds_ratio": "ratio", "peak_growth_mib": "MiB", "memory_ratio": "ratio"}
    columns |= {"loss_error": "loss err", "gradient_error": "grad err"}
    for vocab in dict.fromkeys(row["vocab"] for row in rows):
        print(f"\n{f'V = {int(vocab):,}':48}" + "".join(f"{columns[c]:>10}" for c in columns if c in rows[0]))
        for row in (row for row in rows if row["vocab"] == vocab):
            print(f"{row['method']:48}" + "".join(f"{row[c]:>10}" for c in columns if c in row), row["remark"])


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
    parser.add_argument("--repeats", type=int, default=2, help="processes a method")
    parser.add_argument("--inner", type=int, help="timed steps a process, of which the median counts (1; GPU: 5)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="who runs, and the errors at all positions; no times")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; nothing is written")
    parser.add_argument("--out", type=Path, help="docs/benchmarks/loss.csv, or loss_peers.csv with --check")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(child(args.job)))
        return
    out = out_of(parser, args, CHECK_OUT if args.check else DEFAULT_OUT, ["check"], args.quick)
    asked = {BY_NAME[method].home.venv for method in args.methods if method not in OURS} - {""}
    if out and args.out is None and asked and not any((ROOT / venv).is_dir() for venv in asked):
        parser.error(f"expected the others' environments for {out}, found none. Run scripts/make-peers, or give --out")
    presets = {
        "cpu": ([32_000, 151_936], 512, 2048, "float32", "cpu"),
        "7b": ([152_064], 3584, 4096, "bfloat16", "cuda"),
    }
    names = ("vocab", "hidden_size", "tokens", "dtype", "device")
    defaults = dict(zip(names, presets[args.preset], strict=True))
    if args.check:
        defaults |= CHECKED_SIZE
    if args.quick:
        defaults |= {"vocab": [1000], "hidden_size": 32, "tokens": 256}
    chosen = {name: getattr(args, name) or default for name, default in defaults.items()}
    args.inner = args.inner or (5 if chosen["device"] == "cuda" else 1)
    if args.check:
        args.inner, args.repeats = 0, 1
    set_up(args.threads)
    about = provenance(__file__, chosen["device"], ["torch", "logitcache"]) | {"seed": str(args.seed)}
    rows: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        for vocab in chosen.pop("vocab"):
            rows += [row | about for row in measure(Size(vocab=vocab, **chosen), args, Path(folder))]
            if out:
                write_csv(rows, out.with_name(f"{out.name}.part"))  # of the sizes so far: the next takes long
    if out:
        out.with_name(f"{out.name}.part").replace(out)
    print_table(rows)
    print(about)
    if failed := [row["method"] for row in rows if row["method"] in OURS and row["remark"]]:
        sys.exit(f"ours that did not run, or computed something else: {', '.join(failed)}")


if __name__ == "__main__":
    main()
