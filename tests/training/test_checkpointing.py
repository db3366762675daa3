"""Checkpointed layers: the same step in less memory, wherever else a step may differ."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import FAMILIES, make_family
from support.saved_bytes import saved_bytes
from support.tiny_model import make_model
from support.tiny_runs import (
    Step,
    Stop,
    assert_same_step,
    make_base,
    make_cache,
    make_samples,
    make_trainer,
    run,
    step_of,
)
from support.two_processes import in_two_processes
from torch import Tensor
from transformers import TrainerCallback

from logitcache.adapters.attach import AdapterSettings, attach
from logitcache.data.batches import pad_samples
from logitcache.data.samples import Sample
from logitcache.errors import UnsupportedModel
from logitcache.losses.formulas import Objective
from logitcache.models.checkpointing import checkpoint_layers
from logitcache.pairing.targets import CachedCollator
from logitcache.storage import LogitCache
from logitcache.training.anchors import Anchor
from logitcache.training.batch_loss import batch_loss
from logitcache.training.settings import AnchorSettings

LOGGED = ("loss", "ce", "kl")


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Sample], LogitCache]:
    samples = make_samples()
    return samples, make_cache(tmp_path_factory.mktemp("checkpointing") / "c", samples)


def student(family: str, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    model = make_model() if family == "tiny" else make_family(family)
    return attach(model, AdapterSettings(rank=4, alpha=8, dropout=dropout), "tiny").train()


def of_plain_ce(model: Any, samples: list[Sample]) -> Tensor:
    vocab = model.config.vocab_size
    kept = [Sample(s.token_ids % vocab, s.supervised, s.origin) for s in samples]
    batch = CachedCollator(pad_samples, None)(kept)
    return batch_loss(model, batch, Objective("none"), 0.0, None).loss


def gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["tiny", *FAMILIES])
def test_the_gradient_is_the_same_and_less_is_kept(family: str) -> None:
    """With dropout, whose mask is drawn again."""
    samples = make_samples(6)
    plain, kept = student(family, dropout=0.3), {}
    torch.manual_seed(5)
    of_plain_ce(plain, samples).backward()
    checkpointed = student(family, dropout=0.3)
    checkpoint_layers(checkpointed)
    torch.manual_seed(5)
    of_plain_ce(checkpointed, samples).backward()
    expected = gradients(plain)
    assert len(expected) > 4 and gradients(checkpointed).keys() == expected.keys()
    for name, gradient in gradients(checkpointed).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-3
    for name, model in (("plain", plain), ("checkpointed", checkpointed)):
        kept[name] = saved_bytes(model, lambda model=model: of_plain_ce(model, samples))
    assert kept["checkpointed"] < 0.35 * kept["plain"]


def test_what_is_kept_is_the_input_of_each_layer() -> None:
    """[B, T, D] in float32 for each of two layers; the last layer's output, the loss and a mask are the rest."""
    samples = make_samples(6)
    model = student("tiny")
    checkpoint_layers(model)
    batch = CachedCollator(pad_samples, None)(samples)
    rows, width = batch["input_ids"].shape
    size = 4 * rows * width * 32
    found = saved_bytes(model, lambda: of_plain_ce(model, samples))
    assert 2 * size <= found < 4 * size + 64 * 1024


def test_anchors_and_accumulation_have_the_same_step(cached: tuple[list[Sample], LogitCache], tmp_path: Path) -> None:
    samples, cache = cached
    anchor = Anchor(make_cache(tmp_path / "a", make_samples(9, seed=5)), AnchorSettings(2.0, 5))
    steps: list[Step] = []
    for checkpointed in (False, True):
        trainer = make_trainer(
            *(tmp_path / "o", samples, cache, Objective(weight=2.0), [anchor]),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
        )
        if checkpointed:
            checkpoint_layers(trainer.model)
        steps.append(step_of(trainer))
    assert_same_step(steps[1], steps[0], (*LOGGED, "anchor_kl"))
    assert steps[0][1]["anchor_kl"] > 1e-3


def _step_of_a_rank(_rank: int, folder: str) -> Step:
    samples = make_samples()
    cache = LogitCache.open(Path(folder) / "c")
    trainer = make_trainer(Path(folder) / "o", samples, cache, Objective(weight=2.0), per_device_train_batch_size=8)
    checkpoint_layers(trainer.model)
    return step_of(trainer)


def test_two_processes_have_the_step_of_one(tmp_path: Path) -> None:
    samples = make_samples()
    cache = make_cache(tmp_path / "c", samples)
    trainer = make_trainer(tmp_path / "one", samples, cache, Objective(weight=2.0), per_device_train_batch_size=16)
    expected = step_of(trainer)
    assert_same_step(in_two_processes(_step_of_a_rank, str(tmp_path))[0], expected, LOGGED)


def test_a_stopped_run_ends_with_the_same_bytes(cached: tuple[list[Sample], LogitCache], tmp_path: Path) -> None:
    samples, cache = cached
    settings: dict[str, Any] = {"max_steps": 8, "batch_size": 4, "lr": 1e-2, "log_every": 1}
    settings |= {"adapter": AdapterSettings(rank=4, dropout=0.1), "gradient_checkpointing": True}
    run(make_base(), samples, cache, tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        run(make_base(), samples, cache, tmp_path / "o", callbacks=[Stop(5)], **settings)
    run(make_base(), samples, cache, tmp_path / "o", resume=True, **settings)
    for name in ("adapter_model.safetensors", "train_log.jsonl"):
        assert (tmp_path / "o" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_the_setting_of_a_run_checkpoints_its_layers(cached: tuple[list[Sample], LogitCache], tmp_path: Path) -> None:
    samples, cache = cached
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            layers = kwargs["model"].get_base_model().model.layers
            seen.append([layer.gradient_checkpointing for layer in layers])

    for name, on in (("off", False), ("on", True)):
        run(make_base(), samples, cache, tmp_path / name, max_steps=1, gradient_checkpointing=on, callbacks=[Look()])
    assert seen == [[False, False], [True, True]]


def test_a_model_whose_layers_cannot_be_run_again_is_refused(
    cached: tuple[list[Sample], LogitCache], tmp_path: Path
) -> None:
    samples, cache = cached
    base = make_base()
    base.model.supports_gradient_checkpointing = False
    with pytest.raises(UnsupportedModel, match="Leave --gradient-checkpointing out"):
        run(base, samples, cache, tmp_path / "o", max_steps=1, gradient_checkpointing=True)
    assert not (tmp_path / "o").exists()
