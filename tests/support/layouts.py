"""A training that an oracle can repeat, of models divided and sharded in every way that trainers know.

Owns what is trained on what, and how far a result is from that of one process; `layouts_wrap` makes the layouts. The
student is the base with an adapter that starts as identity, or all of the base; STEPS steps of SGD, each of MICRO
micro-batches on each of the processes that do not see one batch together, whose shapes and numbers of positions differ,
and one of which has none. So the check of step zero runs in every layout, and the KL counts from the second step.
"""

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, OFTConfig, get_peft_model
from support.quantised_base import dequantised, quantised
from support.tiny_model import make_model
from support.tiny_runs import V, make_samples
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor

from logitcache.capture.settings import CaptureSettings
from logitcache.capture.worker import precompute
from logitcache.data.batches import pad_samples
from logitcache.data.samples import Sample
from logitcache.models.loading import Base, Source
from logitcache.storage import LogitCache, ModelIdentity

STEPS, MICRO, RANKS, LR, WEIGHT = 3, 2, 2, 0.2, 2.0
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SPLIT_BY_OUTPUT = [name for name in LINEAR if name not in ("o_proj", "down_proj")]
PARTS = ("lora", "lora + head", "lora on head", "full", "full, tied")
"""What is trained: an adapter, with a copy of the head, with LoRA on the head too, or all; with a head of its own, or
that of the input embedding."""

Step = list[list[dict[str, Any]]]
"""[micro-batch][process]: a collated batch without targets."""

IN_BOTH = ("tensor parallel", "one process")
"""Beginnings of layouts in which every one of the processes sees all of the data."""


@dataclass(frozen=True)
class Case:
    """A row of the table: "wrapper | layout | parts | options", options with commas."""

    wrapper: str
    layout: str
    parts: str
    options: tuple[str, ...] = ()

    @classmethod
    def of(cls, text: str) -> "Case":
        wrapper, layout, parts, *rest = (part.strip() for part in text.split("|"))
        return cls(wrapper, layout, parts, tuple(o.strip() for o in "".join(rest).split(",") if o.strip()))

    @property
    def num_processes(self) -> int:
        return 4 if self.layout.startswith(("hsdp", "fsdp2 x")) else RANKS

    @property
    def num_replicas(self) -> int:
        """Processes that see one batch together."""
        return 2 if self.layout.startswith((*IN_BOTH, "fsdp2 x")) else 1

    @property
    def num_parts(self) -> int:
        """Parts that the data are in: one each for the processes that do not see one batch together, if several."""
        return max(RANKS, self.num_processes // self.num_replicas)

    @property
    def targets(self) -> list[str]:
        """The layers that an adapter is on."""
        return SPLIT_BY_OUTPUT if self.layout.endswith("by output") else LINEAR

    @property
    def in_4bit(self) -> bool:
        return any(option.startswith("4bit") for option in self.options)

    @property
    def steps(self) -> list[Step]:
        return make_steps("even" in self.options, self.num_parts)

    @property
    def with_experts(self) -> bool:
        return "experts" in self.options

    def cache_in(self, folder: Path) -> Path:
        """Of the cache that a student with these parts is trained against; another base has another."""
        kind = "4bit" if self.in_4bit else "experts" if self.with_experts else ""
        return folder / (kind or ("tied" if self.parts.endswith("tied") else "plain"))


def make_student(parts: str, base: Any, targets: list[str]) -> Any:
    """The base with what is trained: one of `PARTS`, or oft. LoRA starts at values that follow from the names of its
    parameters."""
    if parts.startswith("full"):
        return base.requires_grad_(True)
    if parts == "oft":
        config = OFTConfig(oft_block_size=4, target_modules=list(targets), task_type="CAUSAL_LM")
        return get_peft_model(base, config)
    layers = [*targets, "lm_head"] if parts == "lora on head" else list(targets)
    copied = ["lm_head"] if parts == "lora + head" else None
    config = LoraConfig(r=4, lora_alpha=8, target_modules=layers, modules_to_save=copied, task_type="CAUSAL_LM")
    student = get_peft_model(base, config)
    for name, parameter in student.named_parameters():
        if "lora_A" in name:
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            value = torch.randn(parameter.shape, generator=generator) / 6
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
            with torch.no_grad():
                parameter.copy_(value)
    return student


def make_base(case: Case) -> Any:
    """Of a 4-bit one, rows of whole blocks of weights, which make larger logits: smaller weights, for as much noise."""
    if case.with_experts:
        return _with_experts()
    wide = {"hidden_size": 64} if case.in_4bit else {}
    model = make_model(tie_word_embeddings=case.parts.endswith("tied"), **wide)
    for parameter in model.parameters() if case.in_4bit else ():
        parameter.data.mul_(2 / 3)
    return model


def _with_experts() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=V, sliding_window=None, **sizes, **heads))
    for parameter in model.parameters():
        parameter.data.mul_(3.0)
    return model.eval()


def make_steps(even: bool = False, num_parts: int = RANKS) -> list[Step]:
    """The batches of a training. even: as many positions, and so slices, on every process."""
    samples = samples_of_all()
    steps, taken = [], 0
    for step in range(STEPS):
        micros = []
        for micro in range(MICRO):
            ranks = []
            for rank in range(num_parts):
                count = 1 if even else 1 + (taken + rank) % 3
                batch = pad_samples([samples[(taken + i) % len(samples)] for i in range(count)])
                taken += count
                if even:
                    batch["labels"][0, 3:] = -100  # two positions
                elif (step, micro, rank) == (0, 1, 1):
                    batch["labels"][:] = -100
                ranks.append(batch)
            micros.append(ranks)
        steps.append(micros)
    return steps


def make_caches(folder: Path) -> None:
    """Of every base; of one in 4 bits where bitsandbytes is installed."""
    settings = CaptureSettings(top_k=16, max_length=256, precision="exact")
    texts = ["loop | ddp | full", "loop | ddp | full, tied", "loop | ddp | full | experts"]
    for case in map(Case.of, [*texts, "loop | ddp | lora | 4bit"] if find_spec("bitsandbytes") else texts):
        model = dequantised(quantised(make_base(case))) if case.in_4bit else make_base(case)
        held = "4bit" if case.in_4bit else ""
        identity = ModelIdentity("a" * 32, "{}", V, "float32", "sdpa", quantization=held)
        precompute(
            Base(Source("tiny", Path("tiny")), model, identity), samples_of_all(), case.cache_in(folder), settings
        )


def samples_of_all() -> list[Sample]:
    return [Sample(s.token_ids, np.ones_like(s.supervised), s.origin) for s in make_samples(12)]


@dataclass(frozen=True)
class Result:
    """Loss of each step, and what was trained by name after the last; before: at the start, of the oracle."""

    losses: list[float]
    trained: dict[str, Tensor]
    before: dict[str, Tensor] = field(default_factory=dict)


def oracle(case: Case, cache: LogitCache) -> Result:
    """The training on one process in float64, by autograd over [T, V], from the formula."""
    base = make_base(case)
    model = make_student(case.parts, dequantised(quantised(base)) if case.in_4bit else base, case.targets).double()
    if case.with_experts:
        model.set_experts_implementation("eager")  # the default knows no float64
    before, losses = trained_of(model), []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    for step in case.steps:
        batches = [batch for ranks in step for batch in ranks]
        count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        loss = sum((_summed_loss(model, batch, cache) for batch in batches), torch.zeros(())) / count
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return Result(losses, trained_of(model), before)


def _summed_loss(model: Any, batch: dict[str, Any], cache: LogitCache) -> Tensor:
    """Sum of -log q(y) + WEIGHT * KL(p without y || q without y), the tail as one outcome."""
    total = torch.zeros((), dtype=torch.float64)
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        tokens = ids[mask.bool()]
        places = (labels[1:] != -100).nonzero()[:, 0]
        record = cache.lookup(tokens.numpy().astype(np.uint32), places.numpy().astype(np.int32))
        z = model(input_ids=tokens[None]).logits[0, places]
        y, kept = tokens[places + 1][:, None], torch.from_numpy(record.alternative_ids.astype(np.int64))
        p = torch.from_numpy(np.c_[record.alternative_logprobs, record.tail_logprobs]).double().log_softmax(1)
        rest = z.scatter(1, y, -torch.inf)
        q = torch.cat([rest.gather(1, kept), rest.scatter(1, kept, -torch.inf).logsumexp(1, keepdim=True)], 1)
        kl = (p.exp() * (p - q.log_softmax(1))).sum()
        total = total + nn.functional.cross_entropy(z, y[:, 0], reduction="sum") + WEIGHT * kl
    return total


def trained_of(model: Any, layout: str = "") -> dict[str, Tensor]:
    """Whole values of what is trained, by the names it has without wrappers."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if "fsdp1" in layout:
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return {_plain(n): p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    if layout == "zero3":
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(named.values())):
            return {_plain(n): p.detach().clone() for n, p in named.items()}
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in named.items()}
    return {_plain(n): p.detach().clone() for n, p in whole.items()}


def _plain(name: str) -> str:
    for part in ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module."):
        name = name.replace(part, "")
    return name.removeprefix("module.")


def errors(found: Result, expected: Result) -> dict[str, float]:
    """The largest errors of the loss, of what is trained, and of the head within it; and how far these moved."""
    missing = expected.trained.keys() - found.trained.keys()
    assert not missing, f"not trained: {sorted(missing)}"
    error = {n: float((found.trained[n].double() - e).abs().max()) for n, e in expected.trained.items()}
    moved = {n: float((e - expected.before[n]).abs().max()) for n, e in expected.trained.items()}
    head = [n for n in error if "lm_head" in n] or [n for n in error if "embed_tokens" in n]
    of_loss = max(abs(a - b) for a, b in zip(found.losses, expected.losses, strict=True))
    return {
        "loss_error": of_loss,
        "parameter_error": max(error.values()),
        "head_error": max((error[n] for n in head), default=0.0),
        "moved": max(moved.values()),
        "head_moved": max((moved[n] for n in head), default=0.0),
    }
