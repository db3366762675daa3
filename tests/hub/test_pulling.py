"""CACHE.pulling: only a folder that `pull` made is downloaded to, and only what `pull` wrote is removed."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.cli_harness import done, refused, snapshot, unchanged
from support.storage_samples import SHARDS, cache_bits, write_cache
from support.stub_hub import Hub

from logitcache.hub import pulling
from logitcache.hub import transfer as hub_module
from logitcache.storage import VerifyReport, verify

pytest_plugins = ["support.hub_fixtures"]

REPO = "someone/a-cache"
MARKER = ".logitcache-pull.json"

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")
"""huggingface_hub 2.4's own, of how it calls its HTTP client."""


@pytest.fixture
def pushed(tmp_path: Path, hub: Hub) -> Path:
    """A cache that is on the Hub."""
    assert hub.url
    path = write_cache(tmp_path / "cache", "arrow", SHARDS)
    done("push", path, REPO)
    return path


@pytest.fixture
def interrupted(pushed: Path, tmp_path: Path, hub: Hub) -> Path:
    """CACHE.pulling of a pull that lacks a file."""
    assert pushed.is_dir()
    last = sorted(n for n in hub.files(REPO) if n.endswith("samples.arrow"))[-1]
    hub.failing.add(last)
    refused(1, "pull", REPO, tmp_path / "back")
    hub.failing.clear()
    return tmp_path / "back.pulling"


def files_of(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}


# --- somebody else's folder ------------------------------------------------------------------------------------------


def thesis(folder: Path) -> Path:
    (folder / "shards").mkdir(parents=True)
    (folder / "thesis.tex").write_text("ten years of work")
    (folder / "shards" / "notes.txt").write_text("more of it")
    (folder / "manifest.json").write_text("of something else")
    return folder


def test_a_folder_with_files_is_refused_and_they_stay(pushed: Path, tmp_path: Path) -> None:
    """Before, every file in it was removed."""
    thesis(tmp_path / "back.pulling")
    with unchanged(tmp_path / "back.pulling"):
        message = refused(2, "pull", REPO, tmp_path / "back")
    assert f"{tmp_path}/back.pulling" in message and "Move it away" in message and MARKER in message
    assert not (tmp_path / "back").exists() and pushed.is_dir()


@pytest.mark.usefixtures("pushed")
def test_a_link_is_refused_and_nothing_behind_it_is_touched(tmp_path: Path) -> None:
    """Before, the client wrote through it, and everything else behind it was removed."""
    mine = thesis(tmp_path / "mine")
    for target in (mine, tmp_path / "empty", tmp_path / "nowhere"):
        if target.name == "empty":
            target.mkdir()
        (tmp_path / "back.pulling").symlink_to(target)
        with unchanged(mine):
            assert f"a symbolic link to {target}" in refused(2, "pull", REPO, tmp_path / "back")
        assert not target.exists() or target == mine or not any(target.iterdir())
        (tmp_path / "back.pulling").unlink()


@pytest.mark.usefixtures("pushed")
def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "back.pulling").write_text("mine")
    assert "found a file" in refused(2, "pull", REPO, tmp_path / "back")
    assert (tmp_path / "back.pulling").read_text() == "mine"


def test_another_users_folder_is_refused(interrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, unchanged(interrupted):
        me = os.geteuid()
        patch.setattr(os, "geteuid", lambda: me + 1)
        assert f"a folder of another user, {me}" in refused(2, "pull", REPO, tmp_path / "back")
    done("pull", REPO, tmp_path / "back")


def test_a_whole_cache_without_the_mark_is_refused(pushed: Path, tmp_path: Path) -> None:
    shutil.copytree(pushed, tmp_path / "back.pulling")
    with unchanged(tmp_path / "back.pulling"):
        assert f"without {MARKER}" in refused(2, "pull", REPO, tmp_path / "back")


FORGERIES: dict[str, Callable[[Path, Path], object]] = {
    "a link": lambda marker, mine: (shutil.move(marker, mine / "marker"), marker.symlink_to(mine / "marker")),
    "empty": lambda marker, _: marker.write_text(""),
    "another JSON": lambda marker, _: marker.write_text('{"names": ["thesis.tex"]}'),
    "names that are none": lambda marker, _: marker.write_text('{"format": "logitcache pull 1", "names": [1]}'),
    "a list": lambda marker, _: marker.write_text("[]"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_mark_that_no_pull_wrote_is_refused(interrupted: Path, tmp_path: Path, forgery: str) -> None:
    (tmp_path / "mine").mkdir()
    FORGERIES[forgery](interrupted / MARKER, tmp_path / "mine")
    with unchanged(interrupted), unchanged(tmp_path / "mine"):
        assert f"whose {MARKER} no pull wrote" in refused(2, "pull", REPO, tmp_path / "back")


# --- a pull that goes on ---------------------------------------------------------------------------------------------


def test_an_interrupted_pull_is_marked_and_taken_up(interrupted: Path, pushed: Path, tmp_path: Path, hub: Hub) -> None:
    there = files_of(interrupted)
    assert MARKER in there
    assert set(json.loads((interrupted / MARKER).read_text())["names"]) == set(hub.files(REPO)) - {".gitattributes"}
    done("pull", REPO, tmp_path / "back")
    assert cache_bits(tmp_path / "back") == cache_bits(pushed)
    assert files_of(tmp_path / "back") == set(hub.files(REPO)) - {".gitattributes"}
    assert not interrupted.exists()


@pytest.mark.usefixtures("pushed")
def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    """A pull that was killed between making it and marking it leaves no more."""
    (tmp_path / "back.pulling").mkdir()
    (tmp_path / "back.pulling" / f"{MARKER}.{'0' * 32}.new").write_bytes(b"half")
    done("pull", REPO, tmp_path / "back")
    assert not {name for name in files_of(tmp_path / "back") if name.startswith(".")}


@pytest.mark.parametrize("name", ["notes.txt", "shards/notes.txt", ".cache/mine.txt", "empty/"])
def test_what_was_put_beside_the_download_is_refused_and_stays(interrupted: Path, tmp_path: Path, name: str) -> None:
    if name.endswith("/"):
        (interrupted / name).mkdir()
    else:
        (interrupted / name).write_text("mine")
    with unchanged(interrupted):
        assert f"({name.rstrip('/')})" in refused(2, "pull", REPO, tmp_path / "back")
    shutil.move(interrupted / name.rstrip("/"), tmp_path / "elsewhere")
    done("pull", REPO, tmp_path / "back")


@pytest.mark.parametrize("name", ["shards", "manifest.json", ".cache", ".cache/huggingface"])
def test_a_link_in_the_download_is_refused_and_nothing_behind_it_is_touched(
    interrupted: Path, tmp_path: Path, name: str
) -> None:
    """Under its own name too: shards/ may be a link in a cache, not in a download."""
    mine = tmp_path / "mine"
    shutil.move(interrupted / name, mine)
    (interrupted / name).symlink_to(mine)
    before = {"": mine.read_bytes()} if mine.is_file() else snapshot(mine)
    assert f"a symbolic link in it ({name})" in refused(2, "pull", REPO, tmp_path / "back")
    assert ({"": mine.read_bytes()} if mine.is_file() else snapshot(mine)) == before
    assert (interrupted / name).is_symlink()


@pytest.mark.usefixtures("pushed")
def test_only_what_was_pulled_is_removed_of_a_damaged_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, the whole folder of a damaged shard went, and what began with the unit of its name."""

    def damaged(folder: Path) -> VerifyReport:
        (shard,) = sorted(p for p in (folder / "shards").iterdir() if p.is_dir())[:1]
        (shard / "mine.txt").write_text("mine")
        data = bytearray((shard / "logprobs.arrow").read_bytes())
        data[len(data) // 2] ^= 1
        (shard / "logprobs.arrow").write_bytes(data)
        return verify(folder)

    with monkeypatch.context() as patch:
        patch.setattr(hub_module, "verify", damaged)
        assert "Nothing was put at" in refused(3, "pull", REPO, tmp_path / "back")
    (mine,) = (tmp_path / "back.pulling").rglob("mine.txt")
    assert not (mine.parent / "logprobs.arrow").exists()
    assert "mine.txt" in refused(2, "pull", REPO, tmp_path / "back")
    mine.unlink()
    done("pull", REPO, tmp_path / "back")


@pytest.mark.usefixtures("pushed")
def test_what_comes_into_the_folder_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def meanwhile(folder: Path) -> VerifyReport:
        report = verify(folder)
        (folder / "thesis.tex").write_text("mine")
        return report

    with monkeypatch.context() as patch:
        patch.setattr(hub_module, "verify", meanwhile)
        assert "(thesis.tex)" in refused(2, "pull", REPO, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    shutil.move(tmp_path / "back.pulling" / "thesis.tex", tmp_path)
    done("pull", REPO, tmp_path / "back")


def die(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def remove_half(folder: Path, names: set[str]) -> None:
    removing(folder, sorted(names)[: len(names) // 2])
    raise KeyboardInterrupt


removing = pulling._remove
STEPS: dict[str, tuple[object, str, Callable[..., None]]] = {
    "made, not marked": (pulling.LocalFiles, "replace", die),
    "marked": (hub_module, "snapshot_download", die),
    "downloaded": (hub_module, "verify", die),
    "half cleared": (pulling, "_remove", remove_half),
    "cleared": (Path, "rename", die),
    "has its name, and the mark": (pulling, "release", die),
}


@pytest.mark.parametrize("step", STEPS)
def test_killed_at_a_step_of_its_own_it_goes_on(
    step: str, pushed: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, name, act = STEPS[step]
    back = tmp_path / "back"
    with monkeypatch.context() as patch:
        patch.setattr(place, name, act)
        assert "interrupted" in refused(130, "pull", REPO, back)
    assert (back / MARKER).exists() == (name == "release")
    done("pull", REPO, back)
    assert cache_bits(back) == cache_bits(pushed)
    assert files_of(back) == set(hub.files(REPO)) - {".gitattributes"}
    assert not (tmp_path / "back.pulling").exists()


# --- a link at CACHE itself ------------------------------------------------------------------------------------------


def test_a_link_to_an_empty_folder_is_pulled_into(pushed: Path, tmp_path: Path) -> None:
    """Before, everything was downloaded, and then could not be renamed."""
    (tmp_path / "disk" / "cache").mkdir(parents=True)
    (tmp_path / "back").symlink_to(tmp_path / "disk" / "cache")
    done("pull", REPO, tmp_path / "back")
    assert (tmp_path / "back").is_symlink() and cache_bits(tmp_path / "back") == cache_bits(pushed)
    assert sorted(p.name for p in (tmp_path / "disk").iterdir()) == ["cache"]
    assert "holds someone/a-cache already" in done("pull", REPO, tmp_path / "back").out


def test_a_cache_there_whose_disk_is_away_is_not_called_another(pushed: Path, tmp_path: Path) -> None:
    shutil.move(pushed / "shards", tmp_path / "disk")
    (pushed / "shards").symlink_to(tmp_path / "disk")
    assert "holds someone/a-cache already" in done("pull", REPO, pushed).out
    (tmp_path / "disk").rename(tmp_path / "unmounted")
    assert f"a symbolic link to {tmp_path}/disk" in refused(2, "pull", REPO, pushed)


@pytest.mark.usefixtures("pushed")
def test_a_link_that_leads_nowhere_is_refused_before_the_download(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "back").symlink_to(tmp_path / "nowhere")
    hub.requests.clear()
    assert f"a symbolic link to {tmp_path}/nowhere" in refused(2, "pull", REPO, tmp_path / "back")
    assert not any("samples.arrow" in path for _, path in hub.requests)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "cache"]
