"""One rank of `test_trained_head`: a step of a model that FSDP2 shards in some way, against one process."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from support.tiny_model import make_model
from support.tiny_runs import make_samples
from torch.distributed.fsdp import fully_shard

from logitcache.data.batches import pad_samples
from logitcache.errors import TrainingFailed
from logitcache.losses.formulas import Objective
from logitcache.storage import LogitCache
from logitcache.training.custom_loop import CachedLoss


def shard_head(model: Any, **options: Any) -> None:
    """The output head alone."""
    fully_shard(model.lm_head, **options)


def shard_all(model: Any) -> None:
    """Layers, and the rest with the head as the root."""
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)


LAYOUTS: dict[str, Callable[[Any], None]] = {
    "the head alone": shard_head,
    "the head alone, resharded": lambda model: shard_head(model, reshard_after_forward=True),
    "layers and root": shard_all,
}


def step(cache: LogitCache, rank: int, size: int, shard: Callable[[Any], None] | None) -> dict[str, Any]:
    """Loss over all processes, and the norms of the gradients of the head and of the rest."""
    model, samples = make_model(seed=1), make_samples(8)  # not the base, so that the KL counts
    if shard is not None:
        shard(model)
    anchored = CachedLoss(cache, Objective(weight=2.0), check=False)
    batch = anchored.looked_up(pad_samples(samples[rank::size]))
    counts = anchored.count(pad_samples(samples))
    found = anchored(model, batch, counts)
    (found.loss * size).backward()  # FSDP2 averages gradients over processes
    loss = found.loss.detach().clone()
    if size > 1:
        dist.all_reduce(loss)
    squares = {"head": 0.0, "rest": 0.0}
    for name, parameter in model.named_parameters():
        gradient: Any = parameter.grad
        if gradient is None:
            continue
        if hasattr(gradient, "full_tensor"):
            gradient = gradient.full_tensor()
        elif size > 1:
            dist.all_reduce(gradient)
            gradient /= size
        squares["head" if name.startswith("lm_head") else "rest"] += float(gradient.square().sum())
    return {"loss": float(loss), **{name: square**0.5 for name, square in squares.items()}}


def main(folder: Path) -> None:
    """Write folder/<rank>.json: what each layout came to, or how it was refused."""
    dist.init_process_group("gloo")
    cache, results = LogitCache.open(folder / "c"), {}
    for name, shard in LAYOUTS.items():
        try:
            results[name] = step(cache, dist.get_rank(), dist.get_world_size(), shard)
        except TrainingFailed as error:
            results[name] = {"refused": str(error)}
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(results), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
