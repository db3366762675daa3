"""Fixtures of the tests of the command line: text rows, and finished caches of them in each store."""

from pathlib import Path

import pytest
from support.cli_harness import precompute, text_data

SHARDS = ["--shard-positions", 60, "--batch-tokens", 64]
"""Several shards of `data`, of several samples each."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text rows of growing length."""
    return text_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, data: Path) -> dict[str, Path]:
    """A finished cache of `data` in each store, of several shards, to be read only."""
    folder = tmp_path_factory.mktemp("caches")
    for store in ("zarr", "arrow"):
        precompute(tiny_model, data, folder / store, *SHARDS, "--store", store)
    return {store: folder / store for store in ("zarr", "arrow")}


@pytest.fixture(scope="module")
def cache(caches: dict[str, Path]) -> Path:
    """The one in the Arrow store."""
    return caches["arrow"]
