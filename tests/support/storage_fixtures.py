"""Fixtures of the tests of storage/: a plugin, which a test file names in `pytest_plugins` and must not import."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.storage_samples import SHARDS, STORES, write_cache

PLACES = ("local", "memory", "s3")


@pytest.fixture(params=STORES, scope="module")
def store(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def no_fsync() -> Iterator[None]:
    """A test cannot see whether bytes have reached a disk, and waiting for it is slow; test_storage_faults does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def pristine(store: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache of SHARDS, to be left as it is."""
    return write_cache(tmp_path_factory.mktemp("pristine") / "cache", store, SHARDS)


@pytest.fixture
def written(path: Path, pristine: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(pristine, path))


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """A bucket of a local S3 server, and the environment that leads to it."""
    import s3fs  # type: ignore[import-untyped]
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        s3fs.S3FileSystem(use_listings_cache=False).mkdir("caches")
        yield "s3://caches"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture(params=PLACES)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a cache can be written: a path, or a URL of a store that has no folders."""
    if request.param == "local":
        return str(tmp_path / "cache")
    return f"{request.getfixturevalue('s3') if request.param == 's3' else 'memory:/'}/{uuid.uuid4().hex}/cache"
