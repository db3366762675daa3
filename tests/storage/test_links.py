"""Symbolic links: followed at a cache's root and at its shards/, refused everywhere below, and never called missing."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support.cli_harness import done, logitcache
from support.cli_harness import refused as told
from support.storage_samples import (
    SHARDS,
    cache_bits,
    flat,
    lasting,
    make_groups,
    make_manifest,
    make_sample,
    make_shards,
    refused,
    tree,
    write_cache,
)

from logitcache.storage import (
    CacheWriter,
    CorruptCache,
    LinkRefused,
    LogitCache,
    Manifest,
    NotACache,
    convert,
    export_parquet,
    merge,
    prune,
    repair,
    sample_id,
    verify,
)
from logitcache.storage import local_files as local_module
from logitcache.storage.files import open_files
from logitcache.storage.inventory import take_inventory
from logitcache.storage.job_status import WorkerRecord, status, write_record

pytest_plugins = ["support.storage_fixtures"]
pytestmark = pytest.mark.usefixtures("no_fsync")

RECORD = WorkerRecord("running", "j", "host", 1, 0.0, 0.0, 0, 0, 0, 0, 1)


@pytest.fixture(params=["the same disk", "another disk"])
def elsewhere(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder outside the cache; on another file system, where a rename from the cache's folder is refused."""
    if request.param == "the same disk":
        (tmp_path / "larger disk").mkdir()
        yield tmp_path / "larger disk"
        return
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system; test_nothing_is_renamed_from_one_folder_to_another stands for it")
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


def move(source: Path, target: Path) -> Path:
    """Move a file or folder and leave a link, as people do who need room."""
    shutil.move(source, target)
    source.symlink_to(target)
    return source


def units(path: Path) -> list[str]:
    return sorted(p.stem for p in path.glob("shards/*.json"))


# --- where a link is allowed -----------------------------------------------------------------------------------------


def test_moved_shards_are_read_as_before_and_repair_touches_nothing(written: Path, elsewhere: Path, store: str) -> None:
    before, files = cache_bits(written), tree(written)
    move(written / "shards", elsewhere / "shards")
    assert cache_bits(written) == before
    assert verify(written).is_intact
    assert repair(written).dropped == ()
    assert cache_bits(written) == before and tree(elsewhere) == {
        name: data for name, data in files.items() if name.startswith("shards/")
    }
    with CacheWriter(written, make_manifest(store)) as writer:
        assert writer.is_final and writer.captured()
    assert (written / "shards").is_symlink()


def test_a_cache_whose_shards_were_moved_goes_on_and_ends_with_the_same_bytes(
    path: Path, elsewhere: Path, store: str, pristine: Path
) -> None:
    with CacheWriter(path, make_manifest(store)) as writer:
        writer.commit(SHARDS[0])
    move(path / "shards", elsewhere / "shards")
    write_cache(path, store, SHARDS)
    assert (path / "shards").is_symlink()
    shards = {f"shards/{name}": data for name, data in tree(elsewhere / "shards").items()}
    assert {n: d for n, d in lasting(path).items() if not n.startswith("shards/")} | shards == lasting(pristine)
    assert cache_bits(path) == cache_bits(pristine)


def test_a_new_cache_is_written_into_a_link_that_was_there_first(path: Path, elsewhere: Path, store: str) -> None:
    path.mkdir()
    (path / "shards").symlink_to(elsewhere)
    write_cache(path, store, SHARDS)
    assert len(cache_bits(path)) == 5 and verify(path).is_intact
    assert {p.suffix for p in elsewhere.iterdir()} == {".json", ""}


def test_what_a_killed_writer_left_behind_the_link_is_removed_by_repair(
    written: Path, elsewhere: Path, store: str
) -> None:
    move(written / "shards", elsewhere / "shards")
    before = tree(elsewhere)
    unit, digits = "0" * 32, "1" * 16
    (elsewhere / "shards" / f"{unit}-{digits}.{unit}.new" / "c").mkdir(parents=True)
    (elsewhere / "shards" / f"{unit}.json.{unit}.new").write_bytes(b"half")
    (elsewhere / "shards" / f"{unit}-{digits}").mkdir()
    CacheWriter(written, make_manifest(store)).close()
    assert tree(elsewhere) != before and len(repair(written).leftovers) == 3
    assert tree(elsewhere) == before
    assert {p.name for p in (elsewhere / "shards").iterdir() if "." in p.name} == {f"{u}.json" for u in units(written)}


def test_moved_shards_are_pruned_merged_converted_exported_and_listed(
    written: Path, elsewhere: Path, store: str, tmp_path: Path
) -> None:
    before = tree(written)
    move(written / "shards", elsewhere / "shards")
    sizes = take_inventory(written).sizes
    assert sizes == {name: len(before[name]) for name in sizes} and len(sizes) > 4
    convert(written, tmp_path / "converted", precision="compact")
    merge([written], tmp_path / "merged")
    assert cache_bits(tmp_path / "merged") == cache_bits(written)
    assert not (tmp_path / "merged" / "shards").is_symlink()
    assert export_parquet(written, tmp_path / "all.parquet") == 5
    more = write_cache(tmp_path / "more", store, make_shards(8, [[12]]))
    merge([more], written)
    assert len(LogitCache.open(written)) == 6
    kept = LogitCache.open(more).sample(0)
    assert prune(written, {sample_id(kept.token_ids)}).num_samples == 5
    assert len(cache_bits(written)) == 1 and (written / "shards").is_symlink()
    assert status(written).num_shards == 1
    assert units(written) == units(more)


def test_damage_behind_an_allowed_link_is_damage(written: Path, elsewhere: Path, store: str) -> None:
    before = cache_bits(written)
    move(written / "shards", elsewhere / "shards")
    lost = units(written)[0]
    shutil.rmtree(next((elsewhere / "shards").glob(f"{lost}-*")))
    assert {p.reason for p in verify(written).problems} == {"corrupt"}
    assert repair(written).dropped == (lost,)
    write_cache(written, store, SHARDS)
    assert cache_bits(written) == before and (written / "shards").is_symlink()


def test_the_root_may_be_a_link(written: Path, tmp_path: Path, store: str) -> None:
    before = cache_bits(written)
    root = tmp_path / "link"
    root.symlink_to(written)
    assert cache_bits(root) == before and verify(root).is_intact and repair(root).dropped == ()
    write_cache(root, store, make_shards(8, [[12]]))
    assert root.is_symlink() and len(cache_bits(written)) == 6


def test_nothing_is_renamed_from_one_folder_to_another(
    path: Path, store: str, monkeypatch: pytest.MonkeyPatch, pristine: Path
) -> None:
    """Any two folders of a cache may be on different file systems."""
    rename, link = os.rename, os.link

    def within(call: Callable[..., None]) -> Callable[..., None]:
        def checked(source: str, target: str, *, src_dir_fd: int, dst_dir_fd: int, **more: bool) -> None:
            assert "/" not in source + target
            assert os.path.samestat(os.fstat(src_dir_fd), os.fstat(dst_dir_fd))
            call(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd, **more)

        return checked

    for name, call in (("rename", rename), ("replace", os.replace), ("link", link)):
        monkeypatch.setattr(os, name, within(call))
    write_cache(path, store, SHARDS)
    monkeypatch.undo()
    assert lasting(path) == lasting(pristine)


# --- and where not ---------------------------------------------------------------------------------------------------


def below(path: Path) -> list[str]:
    """Every file and folder of a cache that a reader or verify needs, but shards/ itself."""
    found = [p.relative_to(path).as_posix() for p in sorted(path.rglob("*"))]
    return [name for name in found if name not in ("shards", "writer.lock")]


@pytest.fixture
def grouped(path: Path, store: str) -> Path:
    """A cache that has every kind of file."""
    groups = make_groups(np.random.default_rng(27), 40, 4)
    rng = np.random.default_rng(28)
    shards = [[make_sample(rng, 30, token_groups=groups)], [make_sample(rng, 9, token_groups=groups)]]
    return write_cache(path, store, shards, make_manifest(store, token_groups=groups), groups)


def test_a_link_below_is_refused_by_all_and_named_by_verify(grouped: Path, tmp_path: Path) -> None:
    """Before, readers called what is behind it missing, and repair dropped it."""
    groups = LogitCache.open(grouped).token_groups()
    manifest = LogitCache.open(grouped).manifest
    before, files = cache_bits(grouped), tree(grouped)
    for name in below(grouped):
        move(grouped / name, tmp_path / "kept")
        message = refused(LinkRefused, "link-refused", lambda: repair(grouped))
        assert f"{grouped}/{name}" in message and str(tmp_path / "kept") in message and "missing" not in message
        if name in ("manifest.json", "contents.json"):
            refused(LinkRefused, "link-refused", lambda: verify(grouped))
        else:
            problems = verify(grouped).problems
            assert [p.reason for p in problems] == ["link-refused"], problems
            assert f"{grouped}/{name}" in problems[0].what and "missing" not in problems[0].what
        assert _reads(grouped) in (before, "link-refused")
        assert _extends(grouped, manifest, groups) == "link-refused"
        (grouped / name).unlink()
        shutil.move(tmp_path / "kept", grouped / name)
        assert tree(grouped) == files, name
    assert cache_bits(grouped) == before


def _reads(path: Path) -> object:
    """Everything that reading gives; the reason where a link is refused, which not every reader meets."""
    try:
        LogitCache.open(path).token_groups()
        return cache_bits(path)
    except LinkRefused as error:
        return error.reason


def _extends(path: Path, manifest: Manifest, groups: NDArray[np.uint8] | None) -> str:
    """The reason why a writer that has to know what is there, and to finish it, refuses to."""
    try:
        with CacheWriter(path, manifest, groups) as writer:
            writer.captured()
            writer.finalize()
    except LinkRefused as error:
        return error.reason
    return "it goes on"


@pytest.mark.parametrize("name", ["writer.lock", "contents.json", "worker-0-of-2-j.json"])
def test_a_writer_writes_through_no_link(path: Path, tmp_path: Path, store: str, name: str) -> None:
    """Also where nothing is behind the link yet."""
    with CacheWriter(path, make_manifest(store)) as writer:
        writer.commit(SHARDS[0])
    (path / name).unlink(missing_ok=True)
    (path / name).symlink_to(tmp_path / "mine")
    before = tree(path)

    def write() -> None:
        with CacheWriter(path, make_manifest(store)) as writer:
            write_record(writer.files, 0, 2, RECORD)
            writer.finalize()

    assert f"{path}/{name}" in refused(LinkRefused, "link-refused", write)
    assert not (tmp_path / "mine").exists() and (path / name).is_symlink()
    if name == "contents.json":
        refused(LinkRefused, "link-refused", lambda: LogitCache.open(path))  # it is not unfinished
    (path / name).unlink()
    assert {n: d for n, d in lasting(path).items() if n.startswith("shards")} == {
        n: d for n, d in before.items() if n.startswith("shards")
    }


def test_a_shard_that_would_be_written_through_a_link_is_refused(path: Path, tmp_path: Path, store: str) -> None:
    other = write_cache(tmp_path / "other", store, SHARDS[:1])
    (folder,) = (p.name for p in (other / "shards").iterdir() if p.is_dir())
    (tmp_path / "mine").mkdir()
    with CacheWriter(path, make_manifest(store)) as writer:
        (path / "shards").mkdir()
        (path / "shards" / folder).symlink_to(tmp_path / "mine")
        refused(LinkRefused, "link-refused", lambda: writer.commit(SHARDS[0]))
    assert tree(tmp_path / "mine") == {} and (path / "shards" / folder).is_symlink()


def test_the_records_of_workers_are_not_read_through_a_link(written: Path, tmp_path: Path) -> None:
    files = open_files(written)
    write_record(files, 0, 2, RECORD)
    move(written / "worker-0-of-2-j.json", tmp_path / "kept")
    refused(LinkRefused, "link-refused", lambda: status(written))
    (written / "contents.json").unlink()
    refused(LinkRefused, "link-refused", lambda: repair(written))
    assert (tmp_path / "kept").is_file()


# --- an allowed link that leads nowhere, or into another cache --------------------------------------------------------

WRONG: dict[str, Callable[[Path, Path], object]] = {
    "nowhere": lambda shards, _: shards.symlink_to("/nowhere/at/all"),
    "to itself": lambda shards, _: shards.symlink_to("shards"),
    "to a file": lambda shards, other: shards.symlink_to(other / "manifest.json"),
    "to another cache's shards": lambda shards, other: shards.symlink_to(other / "shards"),
    "to another cache": lambda shards, other: shards.symlink_to(other),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_link_that_leads_wrong_is_refused_and_nothing_is_changed(
    kind: str, written: Path, tmp_path: Path, store: str
) -> None:
    other = write_cache(tmp_path / "other", store, make_shards(8, [[12], [13]]))
    shutil.move(written / "shards", tmp_path / "kept")
    WRONG[kind](written / "shards", other)
    before, theirs = tree(written), tree(other)
    open_cache: Callable[[], object] = lambda: cache_bits(written)  # noqa: E731
    for call in (
        open_cache,
        lambda: repair(written),
        lambda: CacheWriter(written, make_manifest(store)),
        lambda: prune(written, set()),
        lambda: status(written),
        lambda: take_inventory(written),
        lambda: merge([other], written),
    ):
        message = refused(LinkRefused, "link-refused", call)
        assert f"{written}/shards" in message and "missing" not in message
    assert {p.reason for p in verify(written).problems} == {"link-refused"}
    assert (written / "shards").is_symlink()
    assert tree(other) == theirs
    assert {n: d for n, d in tree(written).items() if not n.startswith("shards/")} == {
        n: d for n, d in before.items() if not n.startswith("shards/")
    }
    (written / "shards").unlink()
    (written / "shards").symlink_to(tmp_path / "kept")
    assert len(cache_bits(written)) == len(flat(SHARDS))


def test_a_root_that_leads_nowhere_is_refused_by_readers_and_writers(tmp_path: Path, store: str) -> None:
    root = tmp_path / "cache"
    root.symlink_to(tmp_path / "nowhere")
    for call in (lambda: LogitCache.open(root), lambda: CacheWriter(root, make_manifest(store)), lambda: repair(root)):
        assert str(tmp_path / "nowhere") in refused(LinkRefused, "link-refused", call)
    assert not (tmp_path / "nowhere").exists()
    refused(NotACache, "not-a-cache", lambda: LogitCache.open(tmp_path / "not even a link"))


# --- a name that comes to mean something else meanwhile ---------------------------------------------------------------


def test_a_disk_that_goes_away_while_a_cache_is_read_is_not_called_missing_files(written: Path, tmp_path: Path) -> None:
    move(written / "shards", tmp_path / "shards")
    cache = LogitCache.open(written)
    cache.sample(0)
    (tmp_path / "shards").rename(tmp_path / "unmounted")
    refused(LinkRefused, "link-refused", lambda: list(cache.samples()))
    (tmp_path / "unmounted").rename(tmp_path / "shards")
    assert len(list(cache.samples())) == 5


def test_a_folder_that_becomes_a_link_while_it_is_removed_from_is_not_followed(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between looking at shards/ and removing from it, it is moved away, and a link to other files takes its place."""
    victim = Path(shutil.copytree(written / "shards", tmp_path / "victim"))
    before = tree(victim)
    files, opened = open_files(written), local_module.opened
    folder = next(p.name for p in victim.iterdir() if p.is_dir())

    def swap(*arguments: object) -> object:
        found = opened(*arguments)  # type: ignore[arg-type]
        entered = found.__enter__

        def enter() -> int:
            at = entered()
            if not (written / "shards").is_symlink():
                move(written / "shards", tmp_path / "real")
                (written / "shards").unlink()
                (written / "shards").symlink_to(victim)
            return at

        found.__enter__ = enter  # type: ignore[method-assign]
        return found

    monkeypatch.setattr(local_module, "opened", swap)
    files.remove(f"shards/{folder}")
    assert tree(victim) == before
    assert not (tmp_path / "real" / folder).exists()


# --- on the command line ---------------------------------------------------------------------------------------------


def test_the_command_line_says_what_it_is_and_what_to_do(written: Path, tmp_path: Path) -> None:
    unit = units(written)[0]
    move(next(written.glob(f"shards/{unit}-*")), tmp_path / "kept")
    outcome = logitcache("verify", written)
    assert outcome.status == 2 and "symbolic link" in outcome.out and "missing" not in outcome.out
    assert "logitcache repair`, which drops them" not in outcome.out
    for line in (["repair", written], ["merge", tmp_path / "to", written]):
        message = told(2, *line)
        assert "symbolic link" in message and str(tmp_path / "kept") in message
    assert len(list((tmp_path / "kept").iterdir())) > 1
    (written / "shards" / f"{units(written)[1]}.json").write_bytes(b"{")
    assert logitcache("verify", written).status == 3


def test_the_command_line_takes_moved_shards(written: Path, tmp_path: Path) -> None:
    move(written / "shards", tmp_path / "shards")
    assert "is intact" in done("verify", written).out
    assert "nothing was changed" in done("repair", written).out
    next((tmp_path / "shards").glob("*.json")).unlink()
    refused(CorruptCache, "corrupt", lambda: cache_bits(written))
