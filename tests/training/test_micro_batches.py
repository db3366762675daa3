"""A step in micro-batches of tokens: the same samples, the same gradient, in forwards that are never larger."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
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

from logitcache.adapters.attach import AdapterSettings
from logitcache.data.batches import cut_by_length, pad_samples
from logitcache.data.samples import Sample
from logitcache.errors import TrainingFailed
from logitcache.losses.formulas import Objective
from logitcache.pairing.targets import CachedCollator
from logitcache.storage import LogitCache
from logitcache.training.anchors import Anchor
from logitcache.training.micro_batches import MicroBatches, parts_of
from logitcache.training.settings import AnchorSettings

LOGGED = ("loss", "ce", "kl")
MASKED = Objective(weight=2.0)


def weighted(samples: list[Sample]) -> list[Sample]:
    """With a weight for each token that is learnt."""
    rng = np.random.default_rng(3)
    return [replace(s, weights=rng.random(len(s.token_ids)).astype(np.float32)) for s in samples]


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Sample], LogitCache]:
    samples = make_samples()
    return samples, make_cache(tmp_path_factory.mktemp("micro") / "c", samples)


@pytest.mark.parametrize("batch_tokens", [1, 40, 100, 10_000])
def test_every_sample_is_in_one_micro_batch_and_none_is_larger(batch_tokens: int) -> None:
    samples = [*make_samples(), *make_samples(3)]  # equal ones count as often as they stand there
    parts = list(cut_by_length(samples, batch_tokens))
    assert sorted(id(s) for part in parts for s in part) == sorted(map(id, samples))
    lengths = [[len(s.token_ids) for s in part] for part in parts]
    assert all(len(part) * max(part) <= batch_tokens or len(part) == 1 for part in lengths)
    assert (flat := [n for part in lengths for n in part]) == sorted(flat, reverse=True)
    for part in lengths[:-1]:  # and no more of them than need be
        assert (len(part) + 1) * max(part) > batch_tokens


def test_the_batch_of_a_step_has_its_tokens_and_its_parts(cached: tuple[list[Sample], LogitCache]) -> None:
    samples, cache = cached
    batch = MicroBatches(CachedCollator(pad_samples, cache), 100)(samples)
    parts = parts_of(batch)
    assert len(parts) > 3 and parts_of(parts[0]) == [parts[0]]
    assert int(batch["attention_mask"].sum()) == sum(len(s.token_ids) for s in samples)
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert sum(len(part["base_rows"]) for part in parts) == sum(len(s.positions) for s in samples)


OBJECTIVES = {
    "masked-kl": MASKED,
    "rho1": replace(MASKED, ce_weight="rho1"),
    "data": replace(MASKED, ce_weight="data"),
    "plain": Objective("none"),
}


@pytest.mark.parametrize("batch_tokens", [1, 90])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_is_that_of_one_batch(
    name: str, batch_tokens: int, cached: tuple[list[Sample], LogitCache], tmp_path: Path
) -> None:
    samples, cache = cached
    objective = OBJECTIVES[name]
    given = weighted(samples) if name == "data" else samples
    steps = [
        step_of(
            make_trainer(
                *(tmp_path, given, None if name == "plain" else cache, objective),
                batch_tokens=tokens,
                per_device_train_batch_size=16,
            )
        )
        for tokens in (None, batch_tokens)
    ]
    assert_same_step(steps[1], steps[0], LOGGED)
    assert steps[0][1]["ce"] > 0.1


def test_accumulation_and_anchors_keep_the_step(cached: tuple[list[Sample], LogitCache], tmp_path: Path) -> None:
    """4 batches of 4 samples, each in micro-batches; 5 and 3 samples of anchors, which no number of them divides."""
    samples, cache = cached
    anchors = [
        Anchor(make_cache(tmp_path / "a", make_samples(9, seed=5)), AnchorSettings(2.0, 5)),
        Anchor(make_cache(tmp_path / "b", make_samples(7, seed=6)), AnchorSettings(0.7, 3)),
    ]
    sizes = ((None, 16, 1), (90, 16, 1), (60, 4, 4))
    steps = [
        step_of(
            make_trainer(
                *(tmp_path / "o", samples, cache, MASKED, anchors, tokens),
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulated,
            )
        )
        for tokens, batch, accumulated in sizes
    ]
    for step in steps[1:]:
        assert_same_step(step, steps[0], (*LOGGED, "anchor_kl", "anchor_kl_1", "anchor_kl_2"))


def _step_of_a_rank(rank: int, folder: str) -> tuple[Step, int]:
    """The samples of one process are long, those of the other short: 7 micro-batches or so beside 2."""
    samples, made = make_samples(), []

    trainer = make_trainer(
        *(Path(folder) / "o", by_turns(samples), LogitCache.open(Path(folder) / "c"), MASKED),
        anchor=[Anchor(LogitCache.open(Path(folder) / "a"), AnchorSettings(2.0, 5))],
        batch_tokens=80,
        per_device_train_batch_size=8,
    )
    inner = trainer.accelerator.backward

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(rank)
        return inner(*args, **kwargs)

    trainer.accelerator.backward = counted
    return step_of(trainer), len(made)


def by_turns(samples: list[Sample]) -> list[Sample]:
    """In the order in which a sampler of this seed gives process 0 the long ones: as they are, sorted by length."""
    return sorted(samples, key=lambda s: len(s.token_ids))


def test_processes_with_different_numbers_of_micro_batches_make_one_step(tmp_path: Path) -> None:
    samples = make_samples()
    cache, of_anchor = make_cache(tmp_path / "c", samples), make_cache(tmp_path / "a", make_samples(9, seed=5))
    trainer = make_trainer(
        *(tmp_path / "one", by_turns(samples), cache, MASKED, [Anchor(of_anchor, AnchorSettings(2.0, 5))]),
        per_device_train_batch_size=16,
    )
    expected = step_of(trainer)
    found = in_two_processes(_step_of_a_rank, str(tmp_path))
    assert found[0][1] != found[1][1], "expected other numbers of micro-batches on the two processes"
    for step, _ in found:
        assert_same_step((step[0], expected[1]), expected, ())
    assert_same_step(found[0][0], expected, (*LOGGED, "anchor_kl"))


def test_a_stopped_run_ends_with_the_same_bytes(cached: tuple[list[Sample], LogitCache], tmp_path: Path) -> None:
    samples, cache = cached
    settings: dict[str, Any] = {"max_steps": 8, "batch_size": 3, "grad_accum": 2, "batch_tokens": 50, "lr": 1e-2}
    settings |= {"adapter": AdapterSettings(rank=4, dropout=0.1), "log_every": 1}
    whole = run(make_base(), samples, cache, tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        run(make_base(), samples, cache, tmp_path / "o", callbacks=[Stop(5)], **settings)
    assert run(make_base(), samples, cache, tmp_path / "o", resume=True, **settings).num_steps == whole.num_steps == 8
    for name in ("adapter_model.safetensors", "train_log.jsonl"):
        assert (tmp_path / "o" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_run_sees_the_same_samples_whatever_the_micro_batches(
    cached: tuple[list[Sample], LogitCache], tmp_path: Path
) -> None:
    """As many steps and tokens, the same losses; and no forward of more tokens than was said."""
    samples, cache = cached
    seen: dict[int, list[int]] = {}
    reports, logs = {}, {}
    for tokens in (60, 10_000):
        base = make_base()
        shapes: list[int] = []
        base.model.model.register_forward_pre_hook(
            lambda module, args, kwargs, shapes=shapes: shapes.append(kwargs["input_ids"].numel() * module.training),
            with_kwargs=True,
        )
        out = tmp_path / str(tokens)
        settings = {"epochs": 2, "batch_size": 6, "log_every": 1, "lr": 1e-3, "batch_tokens": tokens}
        reports[tokens] = run(base, samples, cache, out, **settings)
        logs[tokens] = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
        seen[tokens] = shapes
    assert max(seen[60]) <= 60 < max(seen[10_000])
    assert reports[60].num_steps == reports[10_000].num_steps == 6
    assert reports[60].num_tokens == reports[10_000].num_tokens == 2 * sum(len(s.token_ids) for s in samples)
    assert len(logs[60]) == len(logs[10_000]) == 6
    for one, other in zip(logs[60], logs[10_000], strict=True):
        assert [one[name] for name in LOGGED] == pytest.approx([other[name] for name in LOGGED], rel=1e-4, abs=1e-6)


def test_deepspeed_is_refused(cached: tuple[list[Sample], LogitCache], tmp_path: Path) -> None:
    """As far as the trainer's own word for it goes."""
    samples, cache = cached
    trainer = make_trainer(tmp_path, samples, cache, MASKED, batch_tokens=100)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(TrainingFailed, match="one backward a batch"):
        trainer.get_train_dataloader()
