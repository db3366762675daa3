"""Models divided and sharded in every way that trainers know, and a training of each that an oracle can repeat.

The student is the base with an adapter that starts as identity, or all of the base; STEPS steps of SGD, each of MICRO
micro-batches on each of RANKS processes, whose shapes and numbers of positions differ, and one of which has none. So
the check of step zero runs in every layout, and the KL counts from the second step.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from support.tiny_model import make_model
from support.tiny_runs import V, make_samples
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from logitcache.capture.settings import CaptureSettings
from logitcache.capture.worker import precompute
from logitcache.data.batches import pad_samples
from logitcache.data.samples import Sample
from logitcache.models.head import causal_lm_of
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


def make_student(parts: str, base: Any, targets: list[str] = LINEAR) -> Any:
    """The base with what is trained. An adapter starts at values that follow from the names of its parameters."""
    if parts.startswith("full"):
        return base.requires_grad_(True)
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


def make_base(parts: str) -> Any:
    return make_model(tie_word_embeddings=parts.endswith("tied"))


def make_steps(even: bool = False) -> list[Step]:
    """The batches of a training. even: as many positions, and so slices, on every process."""
    samples = samples_of_all()
    steps, taken = [], 0
    for step in range(STEPS):
        micros = []
        for micro in range(MICRO):
            ranks = []
            for rank in range(RANKS):
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
    """Of every base."""
    settings = CaptureSettings(top_k=16, max_length=256, precision="exact")
    for parts in ("full", "full, tied"):
        base = Base(Source("tiny", Path("tiny")), make_base(parts), ModelIdentity("a" * 32, "{}", V, "float32", "sdpa"))
        precompute(base, samples_of_all(), cache_path(folder, parts), settings)


def samples_of_all() -> list[Sample]:
    return [Sample(s.token_ids, np.ones_like(s.supervised), s.origin) for s in make_samples(12)]


@dataclass(frozen=True)
class Result:
    """Loss of each step, and what was trained by name after the last; before: at the start, of the oracle."""

    losses: list[float]
    trained: dict[str, Tensor]
    before: dict[str, Tensor] = field(default_factory=dict)


def oracle(layout: str, parts: str, cache: LogitCache, even: bool = False) -> Result:
    """The training on one process in float64, by autograd over [T, V], from the formula."""
    model = make_student(parts, make_base(parts), targets_in(layout)).double()
    before, losses = trained_of(model), []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    for step in make_steps(even):
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
    if layout.startswith("fsdp1"):
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


# --- layouts: a student -> what is called, and DeepSpeed's engine where there is one


def _alone(model: Any) -> Any:
    return model


def _ddp(model: Any) -> Any:
    return nn.parallel.DistributedDataParallel(model)


def _fsdp1(model: Any, *, head_alone: bool = False, orig: bool = True, peft_policy: bool = False) -> Any:
    layer = type(causal_lm_of(model).model.layers[0])
    policy: Any = partial(transformer_auto_wrap_policy, transformer_layer_cls={layer})
    if peft_policy:
        from peft.utils.other import fsdp_auto_wrap_policy

        policy = fsdp_auto_wrap_policy(model)
    if head_alone:
        head, inner = causal_lm_of(model).get_output_embeddings(), policy

        def policy(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
            return inner(module, recurse, nonwrapped_numel) or (not recurse and module is head)

    cpu = torch.device("cpu")
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=orig, device_id=cpu)


def _fsdp2(model: Any, *, head: str = "root") -> Any:
    """head: in the root's unit; a unit of its own, "resharded" or "kept" after the forward; or one with the norm, as
    accelerate and transformers have it, "tail"."""
    shard = partial(fully_shard, mesh=init_device_mesh("cpu", (RANKS,)))
    causal_lm = causal_lm_of(model)
    output, embedding = causal_lm.get_output_embeddings(), causal_lm.get_input_embeddings()
    for layer in causal_lm.model.layers:
        shard(layer)
    if head in ("resharded", "kept"):
        shard(output, reshard_after_forward=head == "resharded")
    if head == "tail":
        tied = [embedding] if causal_lm.config.tie_word_embeddings else []
        shard([causal_lm.model.norm, *tied, output], reshard_after_forward=False)
    shard(model)
    return model


def _zero(model: Any, *, stage: int) -> Any:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": MICRO,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
    }
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]


LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "one process": _alone,
    "ddp": _ddp,
    "fsdp1, head in the root": _fsdp1,
    "fsdp1, head alone": partial(_fsdp1, head_alone=True),
    "fsdp1 flat, head in the root": partial(_fsdp1, orig=False),
    "fsdp1 flat, head alone": partial(_fsdp1, orig=False, head_alone=True),
    "fsdp1, PEFT's policy": partial(_fsdp1, peft_policy=True),
    "fsdp2, head in the root": _fsdp2,
    "fsdp2, head alone": partial(_fsdp2, head="resharded"),
    "fsdp2, head alone and kept": partial(_fsdp2, head="kept"),
    "fsdp2, head with the norm": partial(_fsdp2, head="tail"),
    "fsdp2 of transformers": _alone,
    "zero2": partial(_zero, stage=2),
    "zero3": partial(_zero, stage=3),
    "tensor parallel": _alone,
    "tensor parallel, lora on layers split by output": _alone,
}
"""By name, for a loop of one's own; those of transformers are divided where they are loaded."""
TRAINER_LAYOUTS = ("ddp", "fsdp1", "fsdp1 flat", "fsdp2", "zero2", "zero3", *list(LAYOUTS)[-2:])
"""Those that transformers' Trainer makes."""


def load(parts: str, layout: str) -> Any:
    """The base: made, or where transformers divides it, loaded."""
    base = make_base(parts)
    divided = {"fsdp2 of": {"fsdp_size": RANKS}, "tensor p": {"tp_size": RANKS}}.get(layout[:8])
    if divided is None:
        return base
    from transformers.distributed import DistributedConfig

    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    if dist.get_rank() == 0:
        base.save_pretrained(folder[0])
    dist.barrier()
    return type(base).from_pretrained(folder[0], distributed_config=DistributedConfig(**divided))


def student_in(layout: str, parts: str) -> Any:
    """The student of a layout, not wrapped yet."""
    return make_student(parts, load(parts, layout), targets_in(layout))


def targets_in(layout: str) -> list[str]:
    """The layers that an adapter is on."""
    return SPLIT_BY_OUTPUT if layout.endswith("by output") else LINEAR


def cache_path(folder: Path, parts: str) -> Path:
    """Of the cache that a student with these parts is trained against; a tied base is another."""
    return folder / ("tied" if parts.endswith("tied") else "plain")
