"""Fixtures of the tests of push and pull: a plugin, which a test file names in `pytest_plugins` and must not import."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import stub_hub
from support.storage_samples import make_groups, make_manifest, make_sample, write_cache
from support.stub_hub import Hub


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running stub, which huggingface_hub in this process takes for the Hub."""
    from huggingface_hub import close_session, constants

    home = tmp_path_factory.mktemp("hf-home")
    with stub_hub.running() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setenv("HF_TOKEN", stub_hub.TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        close_session()
        yield found
        close_session()


@pytest.fixture(params=["zarr", "arrow"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A finished cache of two shards with tail groups, and in it what must not go out."""
    groups = make_groups(np.random.default_rng(3), 40, 4)
    manifest = replace(
        make_manifest(request.param, token_groups=groups), model_name="/home/me/secret-project/models/llama-8b"
    )
    rng = np.random.default_rng(4)
    shards = [[make_sample(rng, n, token_groups=groups) for n in lengths] for lengths in ([30, 2, 9], [17, 40])]
    path = write_cache(tmp_path / "cache", request.param, shards, manifest, groups)
    (path / "work").mkdir()
    for name in ("work/left", "writer.lock", "notes.txt", f"shards/{'0' * 32}-{'1' * 16}", f"x.{'0' * 32}.new"):
        (path / name).write_text("private")
    return path
