"""What a cache does when its disk lies, its files are exchanged, or its writer dies.

A damaged cache gives a `CacheError` or exactly what was written, never other numbers. A writer that fails or is killed
at any step leaves what was committed before, and started again it ends with the bytes of an undisturbed run.
"""

from __future__ import annotations

import errno
import io
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from storage_samples import (
    STORES,
    Shards,
    cache_bits,
    lasting,
    make_manifest,
    make_sample,
    make_shards,
    sample_bits,
    write_cache,
)

from logitcache.storage import (
    CacheError,
    CacheWriter,
    CorruptCache,
    IncompleteCache,
    LogitCache,
    NotACache,
    verify,
)
from logitcache.storage.cache import BACKENDS
from logitcache.storage.encoding import POSITION_DTYPES

SHARDS = make_shards(20, [[9, 14], [620]])
NUM_FLIPS = 420


@pytest.fixture(params=STORES, scope="module")
def store(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pristine(store: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache of SHARDS, to be left as it is."""
    return write_cache(tmp_path_factory.mktemp("pristine") / "cache", store, SHARDS)


@pytest.fixture
def written(tmp_path: Path, pristine: Path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(pristine, tmp_path / "cache"))


@pytest.fixture
def lookalikes(tmp_path: Path, store: str) -> Path:
    """Three shards of one short sample each, whose files of one name are of one size in all of them."""
    rng = np.random.default_rng(21)
    shards = [[make_sample(rng, 6, top_k=1, positions=[n])] for n in (1, 2, 3)]
    return write_cache(tmp_path / "cache", store, shards, make_manifest(store, top_k=1))


def parts(path: Path) -> list[Path]:
    """Every file that a finished cache consists of."""
    return [path / name for name in sorted(lasting(path))]


def data_files(path: Path) -> list[Path]:
    """Those that a commit lists."""
    return [file for file in parts(path) if file.parent not in (path, path / "shards")]


def holds_records(file: Path) -> bool:
    """Whether log-probabilities are read from this file, and so at every lookup."""
    is_column = file.name != "zarr.json" and not POSITION_DTYPES.keys().isdisjoint(file.parts)
    return is_column or file.name == "logprobs.arrow"


def is_refused(path: Path, expected: list[tuple[object, ...]]) -> bool:
    """Whether opening or reading raises a `CacheError`; if not, everything read is as it was written."""
    try:
        found = cache_bits(path)
    except CacheError:
        return True
    assert found == expected
    return False


def verify_refuses(path: Path) -> bool:
    """Whether verify raises or reports a problem."""
    try:
        return not verify(path).is_intact
    except CacheError:
        return True


def flips(file: Path, count: int, seed: int) -> Iterator[int]:
    """Flip one bit of a file, differently each time; put it back after each."""
    data = file.read_bytes()
    bits = np.random.default_rng(seed).choice(8 * len(data), size=min(count, 8 * len(data)), replace=False)
    for bit in bits.tolist():
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        yield bit
    file.write_bytes(data)


def exchange(a: Path, b: Path) -> None:
    kept = a.with_name("exchanged")
    a.rename(kept)
    b.rename(a)
    kept.rename(b)


# --- altered bytes ----------------------------------------------------------------------------------------------------


def test_no_flipped_bit_gives_another_number(written: Path, store: str) -> None:
    expected, files = cache_bits(written), parts(written)
    refused, harmless = 0, set()
    for i, file in enumerate(files):
        for _ in flips(file, -(-NUM_FLIPS // len(files)), seed=i):
            if is_refused(written, expected):
                refused += 1
            else:
                harmless.add(file.name)
    assert refused >= NUM_FLIPS // 2
    # Arrow's own header and footer of logprobs.arrow are not read: the schema is the manifest's
    assert harmless == ({"logprobs.arrow"} if store == "arrow" else set())
    assert not is_refused(written, expected)


def test_verify_reports_every_flipped_bit_of_a_data_file(written: Path) -> None:
    files = data_files(written)
    count = -(-90 // len(files))
    for i, file in enumerate(files):
        for _ in flips(file, count, seed=1000 + i):
            report = verify(written)
            assert file.relative_to(written / "shards").parts[0] in {p.shard for p in report.problems}
    assert verify(written).is_intact


def test_verify_refuses_every_flipped_bit_of_a_json_file(written: Path) -> None:
    for i, file in enumerate([f for f in parts(written) if f not in data_files(written)]):
        for _ in flips(file, 20, seed=2000 + i):
            with pytest.raises(CacheError):
                verify(written)


def test_no_file_can_be_truncated_or_emptied_or_zeroed_or_grown_or_deleted(written: Path) -> None:
    expected = cache_bits(written)
    for file in parts(written):
        data = file.read_bytes()
        for change in [b"", data[: len(data) // 2], data[:-1], data + b"\0", bytes(len(data))]:
            file.write_bytes(change)
            if change == data[:-1] and file == written / "contents.json":  # only its line end is gone
                assert not is_refused(written, expected)
                continue
            assert is_refused(written, expected), (file, len(change))
        assert verify_refuses(written), file
        file.unlink()
        assert is_refused(written, expected), file
        assert verify_refuses(written), file
        file.write_bytes(data)
    assert not is_refused(written, expected)


def test_a_whole_shard_folder_is_missing(written: Path) -> None:
    expected = cache_bits(written)
    for folder in [p for p in (written / "shards").iterdir() if p.is_dir()]:
        kept = folder.rename(written / "kept")
        assert is_refused(written, expected) and verify_refuses(written)
        folder.mkdir()
        assert is_refused(written, expected) and verify_refuses(written)
        folder.rmdir()
        kept.rename(folder)


def test_damage_done_after_opening_is_seen_when_a_record_is_read(written: Path) -> None:
    expected = cache_bits(written)
    cache = LogitCache.open(written)
    for file in data_files(written):
        data = file.read_bytes()
        for damage in (b"", data[: len(data) // 2], bytes(len(data)), None):
            file.unlink()
            if damage is not None:
                file.write_bytes(damage)
            try:
                found = [sample_bits(sample) for sample in cache.samples()]
            except CorruptCache:
                assert holds_records(file)
            else:  # it was read at open already
                assert found == expected
                assert not holds_records(file)
        file.write_bytes(data)


# --- exchanged files --------------------------------------------------------------------------------------------------


def test_the_lookalikes_are_of_equal_sizes(lookalikes: Path) -> None:
    sizes: dict[str, set[int]] = {}
    for file in data_files(lookalikes):
        if file.name != "zarr.json":
            sizes.setdefault(file.relative_to(lookalikes / "shards").as_posix()[33:], set()).add(file.stat().st_size)
    assert sizes and all(len(of_one_name) == 1 for of_one_name in sizes.values())


def test_files_of_two_shards_cannot_be_exchanged(lookalikes: Path) -> None:
    expected = cache_bits(lookalikes)
    first, second, _ = sorted(p for p in (lookalikes / "shards").iterdir() if p.is_dir())
    for file in [f for f in data_files(lookalikes) if f.is_relative_to(first)]:
        other = second / file.relative_to(first)
        if file.read_bytes() == other.read_bytes():
            continue
        for swap in (exchange, shutil.copyfile):
            kept = file.read_bytes(), other.read_bytes()
            swap(other, file)
            assert is_refused(lookalikes, expected), (swap, file)
            assert verify_refuses(lookalikes), (swap, file)
            file.write_bytes(kept[0])
            other.write_bytes(kept[1])
    assert not is_refused(lookalikes, expected)


def test_columns_of_one_shard_cannot_be_exchanged(lookalikes: Path) -> None:
    expected = cache_bits(lookalikes)
    shard = next(p for p in sorted((lookalikes / "shards").iterdir()) if p.is_dir())
    files = [f for f in data_files(lookalikes) if f.is_relative_to(shard)]
    for a, b in [(a, b) for a in files for b in files if a < b and a.stat().st_size == b.stat().st_size]:
        if a.read_bytes() != b.read_bytes():
            exchange(a, b)
            assert is_refused(lookalikes, expected), (a, b)
            assert verify_refuses(lookalikes), (a, b)
            exchange(a, b)
    assert not is_refused(lookalikes, expected)


def test_an_exchange_after_opening_is_seen_when_a_record_is_read(lookalikes: Path) -> None:
    cache = LogitCache.open(lookalikes)
    first, second, _ = sorted(p for p in (lookalikes / "shards").iterdir() if p.is_dir())
    for file in [f for f in data_files(lookalikes) if f.is_relative_to(first)]:
        other = second / file.relative_to(first)
        if holds_records(file) and file.read_bytes() != other.read_bytes():
            exchange(file, other)
            with pytest.raises(CorruptCache):
                list(cache.samples())
            exchange(file, other)
    assert len(list(cache.samples())) == 3


def test_a_shard_cannot_be_exchanged_for_another(lookalikes: Path) -> None:
    expected = cache_bits(lookalikes)
    first, second, third = sorted(p for p in (lookalikes / "shards").iterdir() if p.is_dir())
    exchange(first, second)
    assert is_refused(lookalikes, expected) and verify_refuses(lookalikes)
    exchange(first, second)
    kept = first.rename(lookalikes / "kept")
    shutil.copytree(third, first)
    assert is_refused(lookalikes, expected) and verify_refuses(lookalikes)
    shutil.copyfile(third.with_suffix(".json"), first.with_suffix(".json"))
    assert is_refused(lookalikes, expected) and verify_refuses(lookalikes)
    assert kept.is_dir()


def test_a_commit_that_differs_from_the_contents_is_refused(lookalikes: Path, tmp_path: Path, store: str) -> None:
    """A shard of the same unit from another cache, whole and with its own commit: not the one that was finalized."""
    expected = cache_bits(lookalikes)
    rng = np.random.default_rng(22)
    again = []
    for sample in LogitCache.open(lookalikes).samples():
        positions = sample.logprobs.positions.tolist()
        again.append([make_sample(rng, 0, top_k=1, positions=positions, token_ids=sample.token_ids)])
    other = write_cache(tmp_path / "other", store, again, make_manifest(store, top_k=1))
    for commit in sorted((lookalikes / "shards").glob("*.json")):
        for name in (commit.name, commit.stem):
            assert (other / "shards" / name).exists()
        shutil.rmtree(commit.with_suffix(""))
        shutil.copytree(other / "shards" / commit.stem, commit.with_suffix(""))
        assert is_refused(lookalikes, expected) and verify_refuses(lookalikes)
        shutil.copyfile(other / "shards" / commit.name, commit)
        assert is_refused(lookalikes, expected) and verify_refuses(lookalikes)


# --- writers that fail or die -----------------------------------------------------------------------------------------

Fail = Callable[[], None]


def no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def surprise() -> None:
    raise MemoryError


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(patch: pytest.MonkeyPatch, store: str, at: int, fail: Fail) -> Callable[[], int]:
    """Let the at-th step of a writer fail instead of being done. Returns a function that counts the steps so far.

    Steps: each call that changes a folder, syncs a file, or opens one for writing, that file's being there and empty,
    and the end of a backend's write.
    """
    steps = iter(range(1, 10**9))
    count = 0

    def step() -> None:
        nonlocal count
        count = next(steps)
        if count == at:
            fail()

    def before(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        step()
        return original(*args, **kwargs)

    def opened(original: Callable[..., Any], file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode.strip("bt") == "r":
            return original(file, mode, *args, **kwargs)
        step()
        handle = original(file, mode, *args, **kwargs)
        try:
            step()  # the file is there, and empty
        except BaseException:
            handle.close()
            raise
        return handle

    def after(original: Callable[..., Any], *args: Any) -> Any:
        result = original(*args)
        step()
        return result

    for name in ("open", "mkdir", "rename", "replace", "link", "unlink", "rmdir"):
        patch.setattr(os, name, partial(before, getattr(os, name)))
    patch.setattr(os, "fsync", lambda _: step())  # whether it reached the disk, a test cannot see
    patch.setattr(io, "open", partial(opened, io.open))
    patch.setattr(BACKENDS[store], "write", partial(after, BACKENDS[store].write), raising=True)
    return lambda: count


def raised(path: Path, store: str, shards: Shards, at: int, fail: Fail) -> int:
    """Run a writer with a failing step in this process. Returns the number of steps it took."""
    with pytest.MonkeyPatch.context() as patch:
        count = arm(patch, store, at, fail)
        try:
            write_cache(path, store, shards)
        except (OSError, MemoryError):
            assert at
        return count()


def in_child(call: Callable[[], None]) -> int:
    """The exit status of a forked process that makes a call: 0, 1 where it raises, or minus a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            call()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed(path: Path, store: str, shards: Shards, at: int, fail: Fail) -> int:
    """The same in a child process."""

    def run() -> None:
        raised(path, store, shards, at, fail)

    assert in_child(run) == -signal.SIGKILL
    return 0


def crash_points(total: int) -> list[int]:
    """Every step of a short run; of a long one, the first and the last, and some of the many like ones between."""
    return [n for n in range(1, total + 1) if n <= 3 or n > total - 16 or n % 43 == 0 or total < 80]


def state(path: Path) -> list[tuple[object, ...]] | None:
    """What a reader finds; None where it is told that there is no finished cache."""
    try:
        return cache_bits(path)
    except (NotACache, IncompleteCache):
        return None


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("store", "run", "fail", "grows"),
    [
        ("arrow", raised, no_space, False),
        ("arrow", raised, no_space, True),
        ("arrow", raised, surprise, False),
        ("arrow", raised, surprise, True),
        ("arrow", killed, die, False),
        ("arrow", killed, die, True),
        ("zarr", raised, no_space, True),
        ("zarr", killed, die, False),
    ],
)
def test_a_writer_that_fails_at_any_step_loses_nothing_and_ends_with_the_same_bytes(
    tmp_path: Path, store: str, run: Callable[[Path, str, Shards, int, Fail], int], fail: Fail, grows: bool
) -> None:
    shards = make_shards(23, [[5], [7]])[: 1 + grows]
    start, path = tmp_path / "start", tmp_path / "cache"
    if grows:
        write_cache(start, store, shards[:1])
    old = state(start)
    undisturbed = shutil.copytree(start, tmp_path / "undisturbed") if grows else tmp_path / "undisturbed"
    total = raised(undisturbed, store, shards, 0, fail)
    expected, new = lasting(undisturbed), cache_bits(undisturbed)
    for n in crash_points(total):
        if grows:
            shutil.copytree(start, path)
        run(path, store, shards, n, fail)
        assert state(path) in (old, new), n
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", lambda _: None)
            write_cache(path, store, shards)
        assert lasting(path) == expected, n
        shutil.rmtree(path)


@pytest.mark.parametrize(("store", "fail"), [("arrow", no_space), ("arrow", surprise), ("zarr", no_space)])
def test_a_writer_can_try_again_after_a_step_failed(tmp_path: Path, store: str, fail: Fail) -> None:
    shards = make_shards(24, [[5]])
    undisturbed = tmp_path / "undisturbed"
    total = raised(undisturbed, store, shards, 0, fail)
    for n in crash_points(total):
        path = tmp_path / str(n)
        with CacheWriter(path, make_manifest(store)) as writer:
            for call in (partial(writer.commit, shards[0]), writer.finalize):
                with pytest.MonkeyPatch.context() as patch:
                    arm(patch, store, n, fail)
                    with suppress(OSError, MemoryError):
                        call()
                call()
        assert lasting(path) == lasting(undisturbed), n


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_disk_that_takes_only_part_of_a_file_leaves_no_trace(tmp_path: Path, store: str) -> None:
    """Real short writes, also inside the libraries: the system refuses files beyond a size."""
    shards = make_shards(25, [[5, 400]])
    undisturbed = write_cache(tmp_path / "undisturbed", store, shards)
    sizes = sorted({len(data) for data in lasting(undisturbed).values()})
    path = tmp_path / "cache"

    def run(limit: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        write_cache(path, store, shards)

    for limit in {1, sizes[0] - 1, sizes[len(sizes) // 2] - 1, sizes[-1] // 2, sizes[-1] - 1}:
        assert in_child(partial(run, limit)) == 1
        assert state(path) is None
    write_cache(path, store, shards)
    assert lasting(path) == lasting(undisturbed)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_writer_killed_again_and_again_ends_with_the_same_bytes(tmp_path: Path, store: str) -> None:
    """kill -9 from outside at random moments of a run with real fsync, then a run to the end."""
    shards = make_shards(26, [[5, 9], [600], [7, 7, 7], [2], [30], [90, 3]])
    start = time.perf_counter()
    undisturbed = write_cache(tmp_path / "undisturbed", store, shards)
    duration = time.perf_counter() - start
    path, rng = tmp_path / "cache", np.random.default_rng(27)
    new = cache_bits(undisturbed)
    for _ in range(8):
        child = os.fork()
        if child == 0:
            try:
                write_cache(path, store, shards)
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0, 0.3 * duration))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert state(path) in (None, new)
    write_cache(path, store, shards)
    assert lasting(path) == lasting(undisturbed)
    assert verify(path).is_intact


def test_a_manifest_of_another_cache_is_refused(written: Path, tmp_path: Path, store: str) -> None:
    """Valid by itself, and of the same vocabulary and top_k: only the contents know that it is not theirs."""
    other = replace(make_manifest(store), model=replace(make_manifest(store).model, weights="another"))
    write_cache(tmp_path / "other", store, SHARDS, other)
    shutil.copy(tmp_path / "other" / "manifest.json", written / "manifest.json")
    with pytest.raises(CorruptCache, match=r"manifest\.json"):
        LogitCache.open(written)
