"""A cache that fills itself: killed and started again, and by several processes, each its part."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from support.cli_harness import cache_bytes
from support.filling import SAMPLES, SMALL, load, make_trainer, moved, precomputed
from support.plug_ins import logs_of, lora
from support.preferences import CachedDPO, PlainDPO, text_pairs
from support.preferences import make as make_preferences
from support.two_processes import in_two_processes
from torch.distributed.fsdp import fully_shard

from logitcache import CachedLoss, CaptureSettings, Objective
from logitcache.data.batches import pad_samples
from logitcache.data.samples import Sample
from logitcache.errors import NotTheBase, TrainingFailed
from logitcache.storage import IncompleteCache, LogitCache, NotACache
from logitcache.training import fill as fill_module
from logitcache.training.fill import FILLED, work

# TRL's SFTConfig sets gradient_checkpointing, whose name transformers 5.23 has changed
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


def _killed(folder: str, out: str, cache: str) -> None:
    from logitcache.capture.shard_pipeline import ShardPipeline

    write = ShardPipeline._write

    def once(self: Any, captured: Any) -> Any:
        write(self, captured)
        os._exit(9)

    ShardPipeline._write = once  # type: ignore[method-assign]
    make_trainer(Path(out), Path(folder), cache, capture=CaptureSettings(**SMALL))


def test_killed_while_filling_and_started_again(tiny_model: Path, tmp_path: Path) -> None:
    arguments_ = (str(tiny_model), str(tmp_path / "o"), str(tmp_path / "c"))
    process = torch.multiprocessing.get_context("spawn").Process(target=_killed, args=arguments_)
    process.start()
    process.join()
    assert process.exitcode == 9
    with pytest.raises(IncompleteCache):
        LogitCache.open(tmp_path / "c")
    trainer = make_trainer(tmp_path / "o", tiny_model, str(tmp_path / "c"), capture=CaptureSettings(**SMALL))
    assert 0 < trainer.filled.num_samples < len(SAMPLES)
    assert cache_bytes(tmp_path / "c") == cache_bytes(precomputed(tiny_model, SAMPLES, tmp_path / "expected", **SMALL))


def _trained_on_a_rank(_rank: int, folder: str, out: str, capture: CaptureSettings) -> tuple[int, int, list[float]]:
    trainer = make_trainer(
        Path(out) / "o", Path(folder), f"{out}/c", capture=capture, max_steps=2, gradient_checkpointing=False
    )
    trainer.train()
    return trainer.filled.num_samples, trainer.filled.num_positions, [entry["kl"] for entry in logs_of(trainer)]


def test_two_processes_each_fill_their_part(tiny_model: Path, tmp_path: Path) -> None:
    capture = CaptureSettings(**SMALL)
    found = in_two_processes(_trained_on_a_rank, str(tiny_model), str(tmp_path), capture)
    assert all(samples for samples, _, _ in found) and sum(samples for samples, _, _ in found) == len(SAMPLES)
    assert sum(positions for _, positions, _ in found) == sum(len(s.positions) for s in SAMPLES)
    assert found[0][2] == found[1][2] and found[0][2][0] <= 5e-5
    expected = precomputed(tiny_model, SAMPLES, tmp_path / "expected", **SMALL)
    assert cache_bytes(tmp_path / "c") == cache_bytes(expected)


def _preferences_on_a_rank(_rank: int, folder: str, out: str) -> tuple[int, list[float], list[float]]:
    settings: dict[str, Any] = {"per_device_train_batch_size": 2, "max_steps": 2}
    filling = {"fill": True, "capture": CaptureSettings(top_k=0, precision="exact", **SMALL), **settings}
    trainers = [
        make_preferences(CachedDPO, Path(folder), Path(out) / "o", text_pairs(), f"{out}/c", **filling),
        make_preferences(PlainDPO, Path(folder), Path(out) / "o", text_pairs(), **settings),
    ]
    for trainer in trainers:
        trainer.train()
    return trainers[0].filled["train"].num_samples, trainers[0].losses, trainers[1].losses


def test_two_processes_of_preferences_fill_their_parts_and_read_all(tiny_model: Path, tmp_path: Path) -> None:
    """DPO: each process's losses are those with the reference that TRL runs in it."""
    found = in_two_processes(_preferences_on_a_rank, str(tiny_model), str(tmp_path))
    assert all(samples for samples, _, _ in found) and sum(samples for samples, _, _ in found) == 2 * len(text_pairs())
    for _, cached, plain in found:
        assert len(cached) == 2 and max(abs(a - b) for a, b in zip(cached, plain, strict=True)) <= 1e-5
    assert found[0][1] != found[1][1]


def _refused_on_a_rank(rank: int, folder: str, out: str) -> str:
    dist.init_process_group("gloo")
    model = load(Path(folder))
    model = moved(model) if rank else get_peft_model(model, lora())
    try:
        CachedLoss(f"{out}/c", fill=True).fill(model, [pad_samples(SAMPLES)])
    except (NotTheBase, TrainingFailed) as error:
        return str(error)
    return ""


def test_what_one_process_refuses_all_refuse(tiny_model: Path, tmp_path: Path) -> None:
    told = in_two_processes(_refused_on_a_rank, str(tiny_model), str(tmp_path))
    assert "process 1 could not do its part: NotTheBase" in told[0] and "untrained" in told[1]


def _sharded_on_a_rank(_rank: int, folder: str, out: str) -> str:
    dist.init_process_group("gloo")
    model = load(Path(folder))
    for layer in model.model.layers:
        fully_shard(layer)
    with pytest.raises(TrainingFailed) as told:
        CachedLoss(f"{out}/c", fill=True).fill(fully_shard(model), [pad_samples(SAMPLES)])
    return str(told.value)


def test_a_model_in_pieces_fills_nothing(tiny_model: Path, tmp_path: Path) -> None:
    told = in_two_processes(_sharded_on_a_rank, str(tiny_model), str(tmp_path))
    assert all("divided over processes (FSDP, ZeRO-3, tensor parallelism)" in each for each in told)
    assert all("Fill the cache in one process first" in each for each in told) and not (tmp_path / "c").exists()


def _loop_on_a_rank(rank: int, folder: str, out: str, late: int) -> tuple[int, list[float]]:
    """Each process has a part of its own, with one sample in both; one comes when the other has captured its part."""
    dist.init_process_group("gloo")
    model = get_peft_model(load(Path(folder)), lora())
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    mine = [*SAMPLES[rank::2], SAMPLES[0]]
    if rank == late:
        fill_module.work = _after_the_other(f"{out}/c")  # type: ignore[attr-defined]
    cached = CachedLoss(f"{out}/c", fill=True)
    cached.fill(wrapped, [pad_samples(mine[:4]), pad_samples(mine[4:])])
    assert cached.filled is not None
    return cached.filled.num_samples, [float(cached(wrapped, pad_samples(mine[i : i + 3])).kl) for i in (0, 3, 6)]


def _after_the_other(cache: str) -> Any:
    def late(*args: Any) -> Any:
        while True:
            try:
                LogitCache.open(cache)
            except (NotACache, IncompleteCache):
                time.sleep(0.1)
            else:
                return work(*args)

    return late


def test_a_loop_of_two_processes_fills_the_part_of_each(tiny_model: Path, tmp_path: Path) -> None:
    """Which process captures what both have does not depend on which is faster, so neither do the bytes."""
    for late in (0, 1):
        out = tmp_path / str(late)
        found = in_two_processes(_loop_on_a_rank, str(tiny_model), str(out), late)
        assert [samples for samples, _ in found] == [8, 8]
        assert all(kl <= 5e-5 for _, kls in found for kl in kls)
        cache = LogitCache.open(out / "c")
        assert len(cache) == len(SAMPLES)
        parts = [(f"{FILLED}, part 1 of 2", 8), (f"{FILLED}, part 2 of 2", 8)]
        assert [(e.name, e.num_samples) for e in cache.data_sets] == parts
    assert cache_bytes(tmp_path / "0" / "c") == cache_bytes(tmp_path / "1" / "c")


def _all_of_the_other_on_a_rank(rank: int, folder: str, out: str) -> int:
    """The second process has nothing that the first has not."""
    dist.init_process_group("gloo")
    model = get_peft_model(load(Path(folder)), lora())
    cached = CachedLoss(f"{out}/c", fill=True)
    cached.fill(model, [pad_samples(SAMPLES[: 3 - rank])])
    return 0 if cached.filled is None else cached.filled.num_samples


def test_a_process_whose_samples_another_has_captures_nothing(tiny_model: Path, tmp_path: Path) -> None:
    assert in_two_processes(_all_of_the_other_on_a_rank, str(tiny_model), str(tmp_path)) == [3, 0]


def _labelled(sample: Sample, first: int, end: int) -> Sample:
    labels = np.zeros(len(sample.token_ids), dtype=np.bool_)
    labels[first:end] = True
    return Sample(sample.token_ids, labels, sample.origin)


def _same_tokens_on_a_rank(rank: int, folder: str, out: str) -> list[tuple[int, float]]:
    """Both processes have the same documents, at positions of their own."""
    dist.init_process_group("gloo")
    found = []
    for case, (kl_positions, *spans) in enumerate(SPANS):
        mine = [_labelled(sample, *spans[rank]) for sample in LONG]
        model = get_peft_model(load(Path(folder)), lora())
        cached = CachedLoss(f"{out}/{case}", Objective(kl_positions=kl_positions), fill=True)
        cached.fill(model, [pad_samples(mine)])
        captured = 0 if cached.filled is None else cached.filled.num_positions
        found.append((captured, float(cached(model, pad_samples(mine)).kl)))
    return found


LONG = [sample for sample in SAMPLES if len(sample.token_ids) >= 16]
SPANS: list[Any] = [
    ("supervised", (1, 6), (6, 11)),
    ("supervised", (1, 9), (5, 11)),
    ("supervised", (1, 11), (4, 8)),
    ("all", (1, 9), (5, 11)),
]
"""Where the KL counts, and the first label of each process and the one behind its last."""


def test_the_same_tokens_at_other_positions(tiny_model: Path, tmp_path: Path) -> None:
    """Each position is captured once, by the first process that has it, and nothing that one learns is missing."""
    first, second = in_two_processes(_same_tokens_on_a_rank, str(tiny_model), str(tmp_path))
    assert all(kl <= 5e-5 for _, kl in [*first, *second])
    num = len(LONG)
    captured = list(zip((n for n, _ in first), (n for n, _ in second), strict=True))
    assert captured[:3] == [(5 * num, 5 * num), (8 * num, 2 * num), (10 * num, 0)]
    own = [10 * num] * 3 + [sum(len(sample.token_ids) - 1 for sample in LONG)]
    assert [sum(each) for each in captured] == own
    assert [LogitCache.open(tmp_path / str(case)).num_positions for case in range(4)] == own
