"""Two optimizer steps and what they logged: a rank of `test_normalisation`, or the process that is compared with them.

    torchrun --nproc-per-node 2 tensor_parallel_training_rank.py FOLDER

FOLDER: m (a model), c (a cache of the same samples by another one). Writes FOLDER/<rank>.json.
accelerate knows tensor parallelism on accelerators only; what it does with it is the same here.
"""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
from accelerate import Accelerator, ParallelismConfig
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from support.tiny_runs import make_samples

from logitcache.data.batches import pad_samples
from logitcache.losses.formulas import Objective
from logitcache.models.loading import find_model, load_base
from logitcache.storage import LogitCache
from logitcache.training.custom_loop import CachedLoss
from logitcache.training.run import TrainSettings, trainer_arguments
from logitcache.training.trainer import CachedKLTrainer

WORLD = int(os.environ.get("WORLD_SIZE", "1"))
CPU = torch.device("cpu")
NUM_SAMPLES = 16


def student(folder: Path, kind: str) -> Any:
    """All weights; or LoRA on layers whose outputs are divided (PEFT 0.21 fails in the forward of the others)."""
    model = load_base(find_model(str(folder / "m")), "float32", CPU, tensor_parallel=WORLD > 1).model
    if kind == "full":
        return model.requires_grad_(True)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_A" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 6)
        if "lora_B" in name:
            parameter.data.fill_(0.05)
    return adapted


def logs_of(folder: Path, kind: str) -> list[dict[str, float]]:
    """Of two steps of 4 x 2 samples. The first has a learning rate of 0, so that the second is of the same weights."""
    args = trainer_arguments(folder / f"out-{kind}-{WORLD}", TrainSettings(lr=1e-2, batch_size=4, max_steps=2), CPU)
    args.save_strategy, args.gradient_accumulation_steps, args.logging_steps = "no", 2, 1
    args.optim = "sgd"  # AdamW's fused step takes no mixture of whole and divided weights
    if WORLD > 1:
        args.parallelism_config = ParallelismConfig(tp_size=WORLD)  # transformers 5.16 does not see it in the model
    trainer = CachedKLTrainer(
        model=student(folder, kind),
        args=args,
        train_dataset=make_samples(NUM_SAMPLES),
        data_collator=pad_samples,
        cache=LogitCache.open(folder / "c"),
        objective=Objective(weight=2.0, kl_budget=0.01),
        check=False,  # it is not the base
    )
    trainer.train()
    names = ("loss", "grad_norm", "ce", "kl", "kl_weight")
    logs = [{name: float(entry[name]) for name in names} for entry in trainer.state.log_history if "ce" in entry]
    return [*logs, {"kl_weight": trainer.kl_weight}]


def loop_of(folder: Path) -> dict[str, float]:
    """The same in a loop of one's own: a batch's loss and the norm of its gradient."""
    model = student(folder, "full")
    anchored = CachedLoss(folder / "c", Objective(weight=2.0), check=False)
    loss = anchored(model, pad_samples(make_samples(NUM_SAMPLES)))
    loss.loss.backward()
    gradients: list[Any] = [p.grad for p in model.parameters() if p.grad is not None]
    whole = (g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients)
    norm = math.sqrt(sum(float(g.square().sum()) for g in whole))
    return {"loss": float(loss.loss.detach()), "ce": float(loss.ce), "kl": float(loss.kl), "grad_norm": norm}


def found_in(folder: Path) -> dict[str, list[dict[str, float]]]:
    """What each kind of training came to."""
    kinds = ("full", "lora") if Version(peft.__version__) >= Version("0.21") else ("full",)  # which is refused
    return {kind: logs_of(folder, kind) for kind in kinds} | {"loop": [loop_of(folder)]}


def main(folder: Path) -> None:
    """Write it, where accelerate takes this CPU for an accelerator."""
    torch.set_num_threads(1)
    Accelerator.multi_device = property(lambda self: self.use_distributed)
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found_in(folder)))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
