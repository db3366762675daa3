"""What tells a base from its near relatives before step 1: its weights, its configuration, or the KL?

Owns the measurement behind docs/benchmarks/right_base.csv and docs/adr/0009-right-base.md: the base itself in every
dtype, attention and format of weights, and models that are nearly it, each against a cache of the base. A row has what
the weights in memory say, the configuration, the KL to the cache, the model's own noise, the bound where every weight
was compared and where not, and what refuses it in the end. Models: the demo's base, and any Llama in a folder.

    python scripts/study_right_base.py --model SmolLM2-135M-Instruct=FOLDER
    python scripts/study_right_base.py --table                             only print what is in the CSV

10 minutes with SmolLM2-135M on one core (`scripts/bench_groups.py --from-gguf` unpacks it).
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from importlib.resources import as_file
from pathlib import Path
from typing import Any

import torch
from bench_common import BENCHMARKS, Line, check_models, demo_base, provenance, read_csv, set_up, write_csv
from torch import nn
from transformers import AutoModelForCausalLM

from logitcache import CaptureSettings, Objective, PairingRules, precompute
from logitcache.data.batches import pad_samples
from logitcache.data.rows import read_rows
from logitcache.data.samples import Sample, make_samples
from logitcache.demo.run import DemoSettings, write_data
from logitcache.errors import NotTheBase
from logitcache.models.loading import Source, load_base, load_tokenizer
from logitcache.models.weights_in_memory import compare_weights
from logitcache.pairing.base_in_memory import check_config
from logitcache.pairing.step_zero import Probe, measure, tolerance_of
from logitcache.pairing.targets import with_targets
from logitcache.storage import LogitCache

OUT = BENCHMARKS / "right_base.csv"
LENGTH, NUM_SAMPLES = 96, 8
LEARNING_RATE, RANK = 2e-4, 16
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A model against a cache: how each is held, and what was done to the model."""

    name: str
    cache: tuple[str, str | None] = ("bfloat16", None)
    dtype: str = "bfloat16"
    load_in: str | None = None
    attention: str = "sdpa"
    autocast: bool = False
    change: Callable[[Any], object] | None = None
    #: Of the config, as it is loaded.
    fields: tuple[tuple[str, Any], ...] = ()


def noisy(share: float) -> Callable[[Any], None]:
    """Noise of this share of their spread on every matrix of the layers."""

    def change(model: Any) -> None:
        draws = torch.Generator().manual_seed(0)
        for layer in linear(model):
            spread = share * layer.weight.float().std()
            write(layer, layer.weight.float() + spread * torch.randn(layer.weight.shape, generator=draws))

    return change


def one_step_merged(model: Any) -> None:
    """The first step of AdamW moves every entry of B by the learning rate; alpha is twice the rank."""
    draws = torch.Generator().manual_seed(0)
    for layer in linear(model):
        a = (torch.rand(RANK, layer.in_features, generator=draws) * 2 - 1) / layer.in_features**0.5
        b = LEARNING_RATE * torch.randn(layer.out_features, RANK, generator=draws).sign()
        write(layer, layer.weight.float() + 2 * b @ a)


def rounded_to_8_bits(model: Any) -> None:
    """A scale a row, as LLM.int8() has it, and back."""
    for layer in linear(model):
        scale = layer.weight.float().abs().amax(1, keepdim=True) / 127
        write(layer, (layer.weight.float() / scale).round() * scale)


def swapped(model: Any) -> None:
    """Two layers in each other's place."""
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]


def linear(model: Any) -> list[Any]:
    """The linear layers below the head."""
    return [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n]


def write(layer: Any, weight: torch.Tensor) -> None:
    """The weight, in the layer's own dtype."""
    layer.weight.data.copy_(weight.to(layer.weight.dtype))


def cases(config: Any) -> list[Case]:
    """Every row of a model. config: its own, of which some fields are changed."""
    eps, rope = config.rms_norm_eps, config.rope_parameters
    plain, packed = ("float32", None), [(dtype, how) for dtype in ("float32", "bfloat16") for how in ("8bit", "4bit")]
    return [
        Case("the base", plain, "float32"),
        Case("the base"),
        Case("the base", plain),
        Case("the base, float32 weights", dtype="float32"),
        Case("the base, float32 weights in autocast", dtype="float32", autocast=True),
        Case("the base, eager attention", attention="eager"),
        Case("the base in 4bit", ("float32", "4bit"), "bfloat16", "4bit"),
        *(Case(f"noise of {share:.1%}", change=noisy(share)) for share in (0.001, 0.003, 0.01, 0.03)),
        Case("LoRA merged after one step", change=one_step_merged),
        Case("weights rounded to 8 bits", change=rounded_to_8_bits),
        *(Case(f"eps x {k}", fields=(("rms_norm_eps", k * eps),)) for k in (0.1, 10)),
        Case("rope_theta x 2", fields=(("rope_parameters", {**rope, "rope_theta": 2 * rope["rope_theta"]}),)),
        Case("two layers swapped", change=swapped),
        *(Case(f"the base in {how}", (dtype, None), dtype, how) for dtype, how in packed),
        *(Case(f"the base in {how}", (dtype, how), dtype, how) for dtype, how in packed),
        Case("the base", ("bfloat16", "4bit")),
    ]


def shortened(sample: Sample, length: int) -> Sample:
    """Its first tokens."""
    return Sample(sample.token_ids[:length], sample.supervised[:length], sample.origin)


class Bench:
    """A model, its texts, and its caches, each made when it is first asked for."""

    def __init__(self, name: str, folder: Path, data: Path, work: Path) -> None:
        self.name, self.source, self.work = name, Source(str(folder), folder), work
        base = load_base(self.source, "float32", CPU)
        rows = read_rows(str(data / "new_train.jsonl"))
        tokenizer = load_tokenizer(self.source)
        found = make_samples(rows, tokenizer, LENGTH, base.identity.vocab_size).samples[:NUM_SAMPLES]
        self.samples = [shortened(sample, LENGTH - 7 * i) for i, sample in enumerate(found)]  # batches have padding
        self.config = base.model.config

    def cache(self, dtype: str, load_in: str | None) -> LogitCache:
        path = self.work / f"{dtype}-{load_in}"
        if not path.exists():
            settings = CaptureSettings(top_k=64, max_length=LENGTH, precision="exact")
            precompute(load_base(self.source, dtype, CPU, load_in), self.samples, path, settings)
        return LogitCache.open(path)

    def load(self, case: Case) -> Any:
        if case.load_in is not None:
            return load_base(self.source, case.dtype, CPU, case.load_in).model
        model = AutoModelForCausalLM.from_pretrained(
            self.source.folder,
            dtype=getattr(torch, case.dtype),
            attn_implementation=case.attention,
            **dict(case.fields),
        )
        if case.change is not None:
            with torch.no_grad():
                case.change(model)
        return model.eval()

    def row(self, case: Case) -> dict[str, Any]:
        """What each check says of a model, and what refuses it."""
        model, cache = self.load(case), self.cache(*case.cache)
        compared = compare_weights(model, self.source.folder)
        try:
            check_config(cache, model)
            config = ""
        except NotTheBase as error:
            config = str(error).partition("config.")[2].partition(";")[0].partition(". ")[0]
        batches = [with_targets(pad_samples([sample]), cache) for sample in self.samples]
        rules = PairingRules(other_precision=True)
        unseen = Probe(cache, Objective(), rules=rules)
        probe = replace(unseen, is_verified=not compared.left_out)
        autocast = torch.autocast("cpu", torch.bfloat16) if case.autocast else nullcontext()
        with autocast:
            found, _ = measure(model, batches, unseen, [s.token_ids for s in self.samples])
            noise = found.own_noise_nats
            bound = tolerance_of(probe, model, noise if case.load_in == "8bit" or compared.left_out else None)
        refused = "weights" if compared.differing else "configuration" if config else ""
        return {
            "model": self.name,
            "case": case.name,
            "dtype": case.dtype,
            "format": case.load_in or "",
            "cache": " ".join(part for part in case.cache if part),
            "compared": compared.num_compared,
            "differing": len(compared.differing),
            "not_compared": compared.said,
            "config": config,
            "kl_nats": f"{found.kl_nats:.3g}",
            "own_noise_nats": "" if noise is None else f"{noise:.3g}",
            "bound_nats": f"{bound:.3g}",
            "bound_unseen_nats": f"{found.tolerance_nats:.3g}",
            "refused_by": refused or ("" if found.kl_nats <= bound else "KL"),
        }


def show(lines: list[Line]) -> None:
    """The table, as docs/adr/0009 has it."""
    heads = ("cache", "differing", "kl_nats", "own_noise_nats", "bound_nats", "bound_unseen_nats", "refused_by")
    print(f"{'':60}" + "".join(f"{head:>18}" for head in heads))
    for line in lines:
        name = f"{line['model']}: {line['case']}, {line['dtype']}"
        print(f"{name:60}" + "".join(f"{line[head]:>18}" for head in heads))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FOLDER", help="beside the demo's base")
    parser.add_argument("--table", action="store_true", help="only print what is in the CSV")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    given = {name: Path(folder) for name, _, folder in (model.partition("=") for model in args.model)}
    if not args.table:
        check_models(parser, args.out, ["demo base", *given])
        set_up(threads=1)
        about = provenance(__file__, "cpu", ["torch", "transformers", "peft", "bitsandbytes", "logitcache"])
        rows = []
        with ExitStack() as stack:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_data(work / "data", DemoSettings(max_steps=4, num_held_out=16))
            models = {"demo base": stack.enter_context(as_file(demo_base()))}
            for number, (name, folder) in enumerate((models | given).items()):
                (work / str(number)).mkdir()
                bench = Bench(name, folder, work / "data", work / str(number))
                for case in cases(bench.config):
                    rows.append({**bench.row(case), **about})
                    show([rows[-1]])
        write_csv(rows, args.out)
    show(read_csv(args.out))


if __name__ == "__main__":
    main()
