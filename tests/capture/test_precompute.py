"""`precompute`, the one way to fill a cache: on names, on what is in memory, and as the command line has it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.cli_harness import cache_bytes, done
from support.tiny_model import text_rows

from logitcache.capture.cache_spec import cache_spec
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.worker import precompute
from logitcache.data.rows import read_rows
from logitcache.data.samples import Sample, make_samples
from logitcache.errors import InvalidData, InvalidSettings
from logitcache.models.loading import Base, find_model, load_base, load_tokenizer
from logitcache.models.settings import LoadSettings
from logitcache.storage import CorruptCache, IdentityMismatch, LogitCache

SMALL = CaptureSettings(top_k=8, max_length=32, batch_tokens=64, shard_positions=40)

CASES: dict[str, tuple[CaptureSettings, list[object]]] = {
    "zarr": (SMALL, []),
    "arrow": (replace(SMALL, store="arrow", precision="exact"), ["--store", "arrow", "--precision", "exact"]),
    "groups": (replace(SMALL, tail_groups=4, min_mass=0.7), ["--tail-groups", 4, "--min-mass", 0.7]),
    "draws": (replace(SMALL, tail_samples=3), ["--tail-samples", 3]),
}


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> Base:
    return load_base(find_model(str(tiny_model)), "auto", torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 rows, some of them longer than max_length, and three of them again."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [*text_rows(20, longest=60), *text_rows(3, longest=60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def samples(base: Base, data: Path) -> list[Sample]:
    tokenizer = load_tokenizer(base.source)
    return make_samples(read_rows(str(data)), tokenizer, SMALL.max_length, base.identity.vocab_size).samples


@pytest.mark.parametrize("case", CASES)
def test_names_and_what_is_in_memory_make_the_bytes_of_the_command_line(
    case: str, tmp_path: Path, base: Base, data: Path, samples: list[Sample]
) -> None:
    settings, flags = CASES[case]
    line = ["precompute", "--model", base.source.name, "--data", data, "--cache", tmp_path / "cli", "--top-k", 8]
    done(*line, "--max-length", 32, "--batch-tokens", 64, "--shard-positions", 40, *flags)
    named = precompute(base.source.name, data, tmp_path / "named", settings)
    held = precompute(base, samples, tmp_path / "held", settings, data_name=str(data))
    assert named.is_final and named == held  # truncation is counted for samples in memory too
    expected = cache_bytes(tmp_path / "cli")
    assert len([name for name in expected if name.startswith("shards/") and name.endswith(".json")]) >= 3
    assert cache_bytes(tmp_path / "named") == expected and cache_bytes(tmp_path / "held") == expected


def test_samples_in_memory_are_cut_into_windows_as_rows_are(
    tmp_path: Path, base: Base, data: Path, samples: list[Sample]
) -> None:
    precompute(base, data, tmp_path / "rows", SMALL, window_rows=5)
    precompute(base, samples, tmp_path / "samples", SMALL, window_rows=5, data_name=str(data))
    precompute(base, samples, tmp_path / "whole", SMALL)
    assert cache_bytes(tmp_path / "samples") == cache_bytes(tmp_path / "rows") != cache_bytes(tmp_path / "whole")
    assert len(LogitCache.open(tmp_path / "samples")) == len(LogitCache.open(tmp_path / "whole"))


def test_called_again_it_runs_the_base_on_what_is_new(tmp_path: Path, base: Base, samples: list[Sample]) -> None:
    first = precompute(base, samples[:12], tmp_path / "c", SMALL)
    again = precompute(base, samples, tmp_path / "c", SMALL)
    assert again.num_samples_found == first.num_samples > 0
    assert first.num_samples + again.num_samples == len(LogitCache.open(tmp_path / "c"))
    assert precompute(base, samples, tmp_path / "c", SMALL).num_tokens == 0
    assert not list((tmp_path / "c").glob("worker-*"))


def test_a_partition_travels_with_its_manifest(tmp_path: Path, base: Base, samples: list[Sample]) -> None:
    """A cache that was begun with other groups than the base's own keeps them; a manifest of others is refused."""
    settings = replace(SMALL, tail_groups=4)
    vocab_size = base.identity.vocab_size
    groups = (np.arange(vocab_size) % 4).astype(np.uint8)
    tokenizer = load_tokenizer(base.source)
    begun = cache_spec(base.source.name, base.identity, tokenizer, settings, groups)
    begun.writer(tmp_path / "c").close()
    precompute(base, samples, tmp_path / "c", settings)
    np.testing.assert_array_equal(LogitCache.open(tmp_path / "c").token_groups(), groups)
    with pytest.raises(ValueError, match="expected the partition"):
        replace(begun, token_groups=groups[::-1].copy()).writer(tmp_path / "d")
    own = cache_spec(base.source.name, base.identity, tokenizer, settings, groups[::-1].copy())
    with pytest.raises((IdentityMismatch, CorruptCache)):
        own.writer(tmp_path / "c")


def test_samples_in_memory_are_checked_as_rows_are(tmp_path: Path, base: Base) -> None:
    def sample(ids: list[int], supervised: bool = True) -> Sample:
        return Sample(np.array(ids, dtype=np.uint32), np.full(len(ids), supervised), "mine:3")

    vocab_size = base.identity.vocab_size
    for wrong, said in (
        ([sample([1] * 33)], "reading mine:3: expected at most 32 tokens, found 33"),
        ([sample([1, 2, vocab_size])], f"reading mine:3: token id {vocab_size} is outside the model's vocabulary"),
        ([sample([1, 2, 3], supervised=False)], "reading mine:3: no supervised token"),
        ([], "expected at least one row, found none"),
    ):
        with pytest.raises(InvalidData, match=said):
            precompute(base, wrong, tmp_path / "c", SMALL)
        assert not (tmp_path / "c").exists()


def test_a_loaded_base_is_not_told_how_to_be_loaded(tmp_path: Path, base: Base, samples: list[Sample]) -> None:
    for how in ({"loading": LoadSettings()}, {"engine": "vllm"}):
        with pytest.raises(InvalidSettings, match="the base is loaded already"):
            precompute(base, samples, tmp_path / "c", SMALL, **how)  # type: ignore[arg-type]
    with pytest.raises(InvalidSettings, match="--tail-samples with --min-mass"):
        replace(SMALL, tail_samples=2, min_mass=0.5)
    assert not (tmp_path / "c").exists()
