"""Anchor samples: which they are, in which order they come, and what a step has of them."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_runs import make_base, make_cache, make_samples

from logitcache.capture.settings import CaptureSettings
from logitcache.capture.worker import precompute
from logitcache.data.samples import Sample
from logitcache.losses.formulas import Objective
from logitcache.pairing.anchors import anchor_samples, drawn, looked_up
from logitcache.pairing.targets import targets_of, with_targets
from logitcache.pairing.view import CacheView
from logitcache.storage import AmbiguousData, LogitCache, data_samples


def test_every_sample_comes_as_often_as_any_other() -> None:
    """7 samples, 3 a step: after 7 steps each was there 3 times, in 3 orders."""
    steps = [drawn(7, step, 3, seed=5).tolist() for step in range(14)]
    seen = [number for step in steps for number in step]
    assert set(Counter(seen[:21]).values()) == {3}
    rounds = [tuple(seen[i : i + 7]) for i in range(0, 42, 7)]
    assert all(sorted(each) == list(range(7)) for each in rounds) and len(set(rounds)) == 6


def test_a_step_is_drawn_by_its_number_and_the_seed_alone() -> None:
    assert drawn(50, 31, 4, 0).tolist() == drawn(50, 31, 4, 0).tolist()
    assert drawn(50, 31, 4, 0).tolist() != drawn(50, 31, 4, 1).tolist()
    whole = np.concatenate([drawn(50, step, 2, 3) for step in range(60)])
    assert whole.tolist() == np.concatenate([drawn(50, step, 4, 3) for step in range(30)]).tolist()


def test_positions_of_a_prompt_count_where_they_were_captured(tmp_path: Path) -> None:
    samples = make_samples(4)
    settings = CaptureSettings(top_k=8, max_length=256, precision="exact", kl_positions="all")
    precompute(make_base(), samples, tmp_path / "c", settings)
    found = anchor_samples(LogitCache.open(tmp_path / "c"))
    assert sorted(len(s.positions) for s in found) == sorted(len(s.token_ids) - 1 for s in samples)


def test_a_sample_of_two_data_sets_has_the_positions_of_both(tmp_path: Path) -> None:
    """Nothing is learnt of it, so there is nothing to choose between: `train` without --data refuses the same cache."""
    tokens = np.arange(12, dtype=np.uint32)
    ways = {"a": [3, 4], "b": [4, 9]}
    for name, places in ways.items():
        supervised = np.zeros(12, dtype=np.bool_)
        supervised[places] = True
        settings = CaptureSettings(top_k=8, max_length=256, precision="exact")
        precompute(make_base(), [Sample(tokens, supervised, name)], tmp_path / "c", settings, data_name=name)
    cache = LogitCache.open(tmp_path / "c")
    with pytest.raises(AmbiguousData):
        data_samples(cache)
    (found,) = anchor_samples(cache)
    assert found.positions.tolist() == [2, 3, 8]


@pytest.mark.parametrize("regularizer", ["full-kl", "masked-kl"])
def test_a_part_of_a_step_is_a_batch_of_its_samples(regularizer: str, tmp_path: Path) -> None:
    """The columns of `with_targets`, of every third sample; and no cross-entropy anywhere."""
    samples = make_samples(8)
    cache = make_cache(tmp_path / "c", samples)
    view = CacheView.paired(cache, make_base(), Objective(regularizer))  # type: ignore[arg-type]
    step = looked_up(view, samples)
    assert step.num_counted == sum(len(s.positions) for s in samples)
    assert [len(step.part(i, 3).samples) for i in range(3)] == [3, 3, 2] and not step.part(8, 9).samples
    batch = step.part(1, 3).batch(torch.device("cpu"))
    expected = with_targets({**batch, "labels": labels_of(batch, samples[1::3])}, cache)
    assert not batch["base_supervised"].any() and len(batch["base_supervised"]) == len(batch["base_rows"])
    for name in ("base_rows", "base_label_ids", "base_alternative_ids", "base_alternative_logprobs"):
        assert torch.equal(batch[name], expected[name]), name
    targets = targets_of(batch)
    assert targets is not None and len(targets) == sum(len(s.positions) for s in samples[1::3])
    with pytest.raises(ValueError, match="expected one from 0 to 2"):
        step.part(3, 3)


def labels_of(batch: dict[str, torch.Tensor], samples: list[Sample]) -> torch.Tensor:
    labels = torch.full_like(batch["input_ids"], -100)
    for row, sample in enumerate(samples):
        at = torch.from_numpy(sample.positions.astype(np.int64)) + 1
        labels[row, at] = batch["input_ids"][row, at]
    return labels
