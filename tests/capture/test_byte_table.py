"""What other settings would take and keep, made of one wide capture, against captures of those settings."""

import csv
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch
from support.oracles import entropy_oracle, log_softmax
from support.tiny_model import text_rows

from logitcache.capture.base_distance import distance, entropies
from logitcache.capture.byte_table import (
    GRADIENT_COSINES,
    GROUPS,
    KEPT,
    Choice,
    best_within,
    bytes_per_position,
    capture_wide,
    choices_of,
    with_choice,
)
from logitcache.capture.cache_spec import CacheSpec, cache_spec
from logitcache.capture.estimate import Spread, estimate
from logitcache.capture.settings import CaptureSettings, JobSpec
from logitcache.capture.teacher import capture, teacher_of
from logitcache.capture.vocab_groups import groups_for
from logitcache.capture.worker import load, precompute
from logitcache.data.batches import batches_by_length
from logitcache.data.samples import Sample, make_samples
from logitcache.models.head import OutputHead, hidden_states
from logitcache.models.loading import Base, Source, load_base, load_tokenizer
from logitcache.storage import LogitCache
from logitcache.storage.encoding import encode
from logitcache.storage.records import concatenate

TAIL_COLUMNS = {"tail_steps", "tail_group_steps"}
"""Those that are summed over a smaller tail and what moved into it, in place of one sum."""

CSVS = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> Base:
    return load_base(Source("tiny", tiny_model), "float32", torch.device("cpu"))


@pytest.fixture(scope="module")
def samples(tiny_model: Path) -> list[Sample]:
    tokenizer = load_tokenizer(Source("tiny", tiny_model))
    rows = [(f"row {i}", row) for i, row in enumerate(text_rows(12, longest=80))]
    return list(make_samples(rows, tokenizer, 256, 260).samples)


def spec_of(base: Base, settings: CaptureSettings, path: Path) -> CacheSpec:
    return cache_spec("tiny", base.identity, None, settings, groups_for(base, settings, path))


@pytest.mark.parametrize("store", ["zarr", "arrow"])
@pytest.mark.parametrize(("top_k", "groups"), [(8, 0), (8, 64), (32, 16), (256, 64)])
def test_a_slice_of_the_wide_capture_is_stored_as_a_capture_of_so_many(
    top_k: int, groups: int, store: str, base: Base, samples: list[Sample], tmp_path: Path
) -> None:
    settings = with_choice(CaptureSettings(store=store), top_k, groups)  # type: ignore[arg-type]
    spec, batches = spec_of(base, settings, tmp_path / "none"), list(batches_by_length(samples, 512))
    wide = capture_wide(base, batches, spec)
    sliced = spec.stored(zip(wide.samples, wide.kept(top_k, groups), strict=True))
    teacher = teacher_of(base, spec)
    captured = spec.stored((s, r) for batch in batches for s, r in zip(batch, teacher(batch), strict=True))
    ours, theirs = (
        encode(concatenate([c.logprobs for c in cached]), spec.manifest.capture) for cached in (sliced, captured)
    )
    assert ours.keys() == theirs.keys()
    for name, column in theirs.items():
        if name not in TAIL_COLUMNS:
            assert np.array_equal(ours[name], column), name
            continue
        off = np.abs(ours[name].astype(np.int64) - column.astype(np.int64))
        assert off.max() <= 1 and (off > 0).mean() <= 0.01, name  # a float32 sum at the edge of a step
    size = len(concatenate([c.logprobs for c in captured]))
    assert bytes_per_position(sliced, spec, size) == pytest.approx(bytes_per_position(captured, spec, size), rel=1e-3)


def test_the_table_says_what_caches_of_these_settings_take(tiny_model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "{row["text"]}"}}\n' for row in text_rows(12)))
    settings = CaptureSettings(top_k=4, store="arrow")
    job = JobSpec(str(tiny_model), (str(rows),), str(tmp_path / "none"), settings)
    found = estimate(job, load(job))
    assert found.sampled_positions == found.planned.num_positions and found.is_rough
    by_setting = {(c.top_k, c.tail_groups): c for c in found.choices}
    assert list(by_setting) == list(product(KEPT, GROUPS))
    for top_k, groups in ((8, 0), (64, 16)):
        choice = by_setting[top_k, groups]
        path = tmp_path / f"{top_k}-{groups}"
        precompute(str(tiny_model), str(rows), path, with_choice(job.settings, top_k, groups))
        cache = LogitCache.open(path)
        assert found.total_of(choice.bytes_per_position) == pytest.approx(cache.num_bytes, rel=1e-3)
        kept = np.concatenate([cache.sample(i).logprobs.kept_mass() for i in range(len(cache))])
        assert choice.kept_mass == pytest.approx(kept.mean(), abs=1e-3)


@pytest.mark.parametrize("store", ["zarr", "arrow"])
@pytest.mark.parametrize("top_k", [8, 64])
def test_the_headers_of_a_file_are_not_taken_for_positions(
    store: str, top_k: int, base: Base, tiny_model: Path, tmp_path: Path
) -> None:
    """A tenth of the positions of a cache of one shard says what it takes to 8 %, and nearer than a shard of so few."""
    tokenizer = load_tokenizer(Source("tiny", tiny_model))
    rows = [(f"row {i}", row) for i, row in enumerate(text_rows(200, longest=60))]
    samples = list(make_samples(rows, tokenizer, 256, 260).samples)
    settings = CaptureSettings(top_k=top_k, store=store)  # type: ignore[arg-type]
    precompute(base, samples, tmp_path / "c", settings)
    cache, spec = LogitCache.open(tmp_path / "c"), spec_of(base, settings, tmp_path / "none")
    teacher, few = teacher_of(base, spec), samples[::10]
    assert cache.num_shards == 1
    cached = spec.stored(zip(few, teacher(few), strict=True))
    sizes = [bytes_per_position(cached, spec, n) for n in (cache.num_positions, sum(len(s.positions) for s in few))]
    off, naive = (abs(size * cache.num_positions - cache.num_bytes) / cache.num_bytes for size in sizes)
    assert off < 0.08 and off < naive / 2


def test_more_takes_more_and_keeps_more(base: Base, samples: list[Sample], tmp_path: Path) -> None:
    settings = CaptureSettings(min_mass=0.5, precision="compact", store="arrow")
    wide = capture_wide(base, list(batches_by_length(samples, 512)), spec_of(base, settings, tmp_path))
    found = choices_of(wide, base, None, settings, 32_768)
    for groups in GROUPS:
        of_these = [c for c in found if c.tail_groups == groups]
        sizes, masses = [c.bytes_per_position for c in of_these], [c.kept_mass for c in of_these]
        assert sizes == sorted(set(sizes)) and masses == sorted(set(masses)) and 0 < masses[0] < masses[-1] <= 1


def test_the_partition_of_the_planned_cache_is_used(base: Base, samples: list[Sample]) -> None:
    settings = CaptureSettings(tail_groups=16)
    spec = cache_spec("tiny", base.identity, None, settings, np.arange(260, dtype=np.uint8) % 16)
    wide = capture_wide(base, [samples[:2]], spec)
    assert wide.partitions[16] is spec.token_groups
    record = wide.kept(8, 16)[0]
    direct = capture(base.model, samples[:2], 8, torch.from_numpy(spec.token_groups.copy()))[0]  # type: ignore[union-attr]
    assert record.tail_group_logprobs == pytest.approx(direct.tail_group_logprobs, abs=1e-5)


# The advice


def test_the_cosines_are_those_that_were_measured() -> None:
    measured: dict[tuple[int, int], list[float]] = {}
    for name in ("tails.csv", "tails_smollm2.csv"):
        for line in csv.DictReader((CSVS / name).read_text(encoding="utf-8").splitlines()):
            plain = line["tail"] == "bucket" or (line["partition"], line["group_steps"]) == ("k-means", "1")
            if line["tail"] in ("bucket", "groups") and plain:
                setting = int(line["top_k"]), int(line["tail_groups"])
                measured.setdefault(setting, []).append(float(line["adapter_cosine"]))
    assert list(GRADIENT_COSINES) == list(product(KEPT, GROUPS))
    for setting, cosine in GRADIENT_COSINES.items():
        assert cosine == pytest.approx(mean(measured[setting]), abs=6e-4), setting


def test_the_advice_is_the_truest_gradient_that_fits() -> None:
    sizes = {(8, 0): 20.0, (16, 0): 36.0, (64, 0): 137.0, (16, 64): 60.0, (32, 64): 94.0}
    choices = [Choice(k, groups, size, 0.5) for (k, groups), size in sizes.items()]
    for most, setting in ((19.9, None), (20, (8, 0)), (59, (16, 0)), (60, (16, 64)), (137, (32, 64)), (9999, (32, 64))):
        best = best_within(choices, most)
        assert (None if best is None else (best.top_k, best.tail_groups)) == setting
    same = [Choice(32, 64, 94.0, 0.5), Choice(32, 64, 93.0, 0.5)]
    assert best_within(same, 100) == same[1]


# How far the data lie from the base


def test_the_numbers_are_those_of_the_whole_distribution(base: Base, samples: list[Sample]) -> None:
    sample = samples[-1]
    (record,) = capture(base.model, [sample], base.identity.vocab_size - 1)
    with torch.no_grad():
        hidden = hidden_states(base.model, input_ids=torch.from_numpy(sample.token_ids.astype(np.int64))[None])
        logits = OutputHead(base.model)(hidden)[0].numpy()[sample.positions]
    assert entropies(record) == pytest.approx(entropy_oracle(logits), abs=1e-5)
    labels = sample.token_ids[sample.positions + 1]
    expected = np.mean([log_softmax(row)[label] for row, label in zip(logits.astype(np.float64), labels, strict=True)])
    found = distance([record])
    assert found.own is None and found.num_alternatives == 259
    assert found.data.label_logprob == pytest.approx(expected, abs=1e-5)
    assert found.data.entropy == pytest.approx(entropy_oracle(logits).mean(), abs=1e-5)
    (coarse,) = capture(base.model, [sample], 4)
    assert np.all(entropies(coarse) <= entropies(record) + 1e-6)


@pytest.mark.parametrize("kept", [{"top_k": 8}, {"top_k": 0}, {"top_k": 32, "min_mass": 0.7}, {"tail_samples": 4}])
def test_data_that_are_the_probe_are_as_far_as_it(
    kept: dict[str, float], base: Base, samples: list[Sample], tmp_path: Path
) -> None:
    settings = replace(CaptureSettings(store="arrow", precision="exact"), **kept)  # type: ignore[arg-type]
    precompute(base, samples, tmp_path / "c", settings)
    wide = capture(base.model, samples, 256)
    found = distance(wide, LogitCache.open(tmp_path / "c"))
    assert found.own is not None and found.num_alternatives == settings.top_k
    assert found.own.num_positions == found.data.num_positions
    assert found.own.label_logprob == pytest.approx(found.data.label_logprob, abs=1e-5)
    assert found.own.entropy == pytest.approx(found.data.entropy, abs=1e-5)


# The sample


def numbered(count: int) -> Iterator[Sample]:
    for i in range(count):
        yield Sample(np.array([i, 1, 2], dtype=np.uint32), np.array([False, True, True]), f"row {i}")


@pytest.mark.parametrize("count", [1, 5, 1000, 100_000])
def test_the_sample_is_spread_over_all_data(count: int) -> None:
    spread, rows = Spread(most=512), list(numbered(count))
    for start in range(0, count, 7000):
        spread.add(rows[start : start + 7000])
    chosen = [int(s.token_ids[0]) for s in spread.chosen(num_positions=400, num_samples=64)]
    assert len(chosen) == min(count, 64) and chosen == sorted(set(chosen))
    gaps = np.diff([0, *chosen, count])
    assert gaps.max() <= 3 * count / len(chosen)
    assert len(spread.chosen(num_positions=100)) == min(count, 50)  # of two positions each
