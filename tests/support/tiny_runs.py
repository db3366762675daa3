"""A tiny base, samples, caches and trainers of them, and a run of a few steps: what tests of training share."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel
from support.tiny_model import make_model
from transformers import TrainerCallback

from logitcache.adapters.attach import AdapterSettings, attach
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.worker import precompute
from logitcache.data.batches import pad_samples, pad_weighted
from logitcache.data.samples import Sample
from logitcache.losses.formulas import Objective
from logitcache.models.loading import Base, Source
from logitcache.storage import LogitCache, ModelIdentity
from logitcache.training.anchors import Anchor
from logitcache.training.run import TrainSettings, train
from logitcache.training.trainer import CachedKLTrainer

V = 260


def make_base() -> Base:
    """The tiny base as `load_base` would give it."""
    identity = ModelIdentity("a" * 32, "{}", V, "float32", "sdpa")
    return Base(Source("tiny", Path("tiny")), make_model(), identity)


def make_samples(count: int = 16, seed: int = 0) -> list[Sample]:
    """Samples of very different numbers of supervised positions, so that wrong normalisation shows."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(count):
        n = int(rng.integers(4, 40))
        supervised = rng.random(n) < (0.2 if i % 3 else 1.0)
        supervised[-1] = True
        samples.append(Sample(rng.integers(0, 256, n).astype(np.uint32), supervised, f"row {i}"))
    return samples


def make_cache(path: Path, samples: Sequence[Sample], top_k: int = 16, of: ModelIdentity | None = None) -> LogitCache:
    """of: the identity that it states, in place of the tiny base's."""
    settings = CaptureSettings(top_k=top_k, max_length=256, precision="exact")
    base = make_base() if of is None else replace(make_base(), identity=of)
    precompute(base, samples, path, settings)
    return LogitCache.open(path)


def moved_adapter(**config: Any) -> PeftModel:
    """The tiny model with an adapter that does not start as identity; config: changes of the model's."""
    torch.manual_seed(0)
    model = attach(make_model(**config), AdapterSettings(rank=4, alpha=8), "tiny")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def make_trainer(
    out: Path,
    samples: Sequence[Sample],
    cache: LogitCache | None,
    objective: Objective,
    anchor: Sequence[Anchor] = (),
    batch_tokens: int | None = None,
    **changes: Any,
) -> CachedKLTrainer:
    """A trainer whose adapter does not start as identity, so that the KL has a gradient at once."""
    from logitcache.training.run import trainer_arguments

    model = moved_adapter()
    args = trainer_arguments(out, TrainSettings(lr=1e-2, max_steps=1), torch.device("cpu"))
    args.save_strategy = "no"
    for name, value in changes.items():
        setattr(args, name, value)
    return CachedKLTrainer(
        model=model,
        args=args,
        train_dataset=list(samples),
        data_collator=pad_weighted if objective.ce_weight == "data" else pad_samples,
        cache=cache,
        objective=objective,
        check=False,  # it is not the base any more
        anchor=anchor,
        batch_tokens=batch_tokens,
    )


def gradients_after_one_step(trainer: CachedKLTrainer) -> dict[str, torch.Tensor]:
    """Gradients of the first optimizer step, before clipping, in the data's own order."""
    found: dict[str, torch.Tensor] = {}

    class Grab(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for name, parameter in trainer.model.named_parameters():
                if parameter.grad is not None:
                    found[name.replace("module.", "")] = parameter.grad.detach().clone()

    trainable = [p for p in trainer.model.parameters() if p.requires_grad]
    trainer.optimizer = Grab(trainable, lr=0.0)
    trainer.args.max_grad_norm = 0.0
    trainer.train()
    return found


Step = tuple[dict[str, NDArray[np.float32]], dict[str, float]]
"""Of a first step: the gradients before clipping, by parameter, and what was logged."""


def step_of(trainer: CachedKLTrainer) -> Step:
    found = gradients_after_one_step(trainer)
    return {name: gradient.numpy() for name, gradient in found.items()}, trainer.state.log_history[0]


def assert_same_step(found: Step, expected: Step, logged: Sequence[str]) -> None:
    """Equal gradients, and equal values of these names in the log, up to the order of sums in float32."""
    assert found[0].keys() == expected[0].keys()
    for name, gradient in expected[0].items():
        np.testing.assert_allclose(found[0][name], gradient, rtol=1e-5, atol=1e-5)
    for name in logged:
        assert found[1][name] == pytest.approx(expected[1][name], rel=1e-5)


def run(base: Base, samples: Sequence[Sample], cache: LogitCache | None, out: Path, **settings: Any) -> Any:
    objective = settings.pop("objective", Objective())
    adapter = settings.pop("adapter", AdapterSettings(rank=4, alpha=8))
    more = {name: settings.pop(name) for name in ("anchors", "resume", "callbacks") if name in settings}
    base.model.config.save_pretrained(out.parent / "tiny")  # PEFT looks at it when it saves
    base = replace(base, source=Source("tiny", out.parent / "tiny"))
    return train(base, samples, cache, out, adapter, objective, TrainSettings(**settings), **more)


class Stop(TrainerCallback):
    """Ends a run as ctrl-c does, at the end of a step, before its evaluation and its checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt
