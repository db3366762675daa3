"""`precompute --engine ray`: actors on a local cluster make, bit for bit, the cache that one process makes.

One cluster of 2 cores for the module. What is awaited is a state on the disk, never a time.
"""

import json
import os
import pickle
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.cli_harness import CliResult, Rows, cache_bytes, commits, done, logitcache, precompute_line, refused
from support.tiny_model import make_tokenizer, text_rows

from logitcache.capture.engines import ray as ray_engine
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.worker import JobSpec
from logitcache.errors import InputNotFound, InvalidData, install_line
from logitcache.storage import LogitCache
from logitcache.storage.errors import CorruptCache
from logitcache.storage.files import open_files
from logitcache.storage.job_status import RUNNING, read_records, status

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""Ray 2.50 leaves /dev/null open and does not wait for its own processes, which Python tells when it finds them."""

NUM_ROWS = 120
SMALL = ["--top-k", 8, "--batch-tokens", 64, "--shard-positions", 80, "--window-rows", 25]
ON_RAY = ["--engine", "ray", "--num-workers", 2]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster of 2 cores, which the jobs of this process use."""
    ray = ray_engine.import_ray()
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five windows of different texts, about 80 units in all."""
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in text_rows(NUM_ROWS)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, data: Path) -> Path:
    """The cache that one process makes of them."""
    path = tmp_path_factory.mktemp("reference") / "cache"
    done(*precompute_line(tiny_model, data, path, *SMALL))
    return path


def check_same(cache: Path, reference: Path) -> None:
    """Every file of the cache is that of the reference, so every unit is there once; and nothing else is there."""
    assert cache_bytes(cache) == cache_bytes(reference)
    found = status(cache)
    there = {p.name for p in cache.iterdir()} - {*found.leftovers}  # half a file of an actor that was killed
    assert there == {p.name for p in reference.iterdir()}  # no record of a worker
    assert found.is_final and found.num_shards > 40 and found.num_samples == NUM_ROWS
    pairs = list(zip(LogitCache.open(cache).samples(), LogitCache.open(reference).samples(), strict=True))
    assert len(pairs) == NUM_ROWS
    for one, other in pairs:
        assert one.token_ids.tobytes() == other.token_ids.tobytes()
        for name, column in vars(one.logprobs).items():
            expected = getattr(other.logprobs, name)
            assert column is expected is None or column.tobytes() == expected.tobytes()


@pytest.mark.usefixtures("cluster")
def test_two_actors_on_two_cores_make_the_cache_of_one_process(
    tmp_path: Path, tiny_model: Path, data: Path, reference: Path
) -> None:
    outcome = done(*precompute_line(tiny_model, data, tmp_path / "c", *SMALL, *ON_RAY, "--log-json"))
    check_same(tmp_path / "c", reference)
    assert f"of {NUM_ROWS} samples" in outcome.out and "already" not in outcome.out
    events = [json.loads(line) for line in outcome.err.splitlines()]  # and nothing of Ray's
    assert next(e for e in events if e["event"] == "ray")["actors"] == 2
    shares = [e["share"] for e in events if e["event"] == "share-done"]
    assert sorted(shares) == list(range(2 * ray_engine.SHARES_AN_ACTOR))
    units = [e["unit"] for e in events if e["event"] == "unit-done"]
    assert sorted(units) == [p.stem for p in commits(reference)]


@pytest.mark.usefixtures("cluster")
def test_an_actor_killed_in_the_middle_costs_nothing(
    tmp_path: Path, tiny_model: Path, data: Path, reference: Path
) -> None:
    cache, num_units = tmp_path / "c", len(commits(reference))
    killed: list[tuple[int, int]] = []
    stop = threading.Event()

    def kill() -> None:
        while not stop.is_set() and not killed:
            for pid in running(cache):
                found = len(commits(cache))
                if 3 <= found < num_units // 2:
                    os.kill(pid, signal.SIGKILL)
                    killed.append((pid, found))
                    break
            time.sleep(0.001)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        outcome = done(*precompute_line(tiny_model, data, cache, *SMALL, *ON_RAY, "--log-json"))
    finally:
        stop.set()
        thread.join()
    ((pid, at_kill),) = killed
    assert pid != os.getpid() and 3 <= at_kill < num_units // 2
    check_same(cache, reference)
    assert f"of {NUM_ROWS} samples" in outcome.out and "already" not in outcome.out
    events = [json.loads(line) for line in outcome.err.splitlines()]
    units = [e["unit"] for e in events if e["event"] == "unit-done"]
    assert len(set(units)) == len(units) < num_units  # of the units that the dead one committed no actor told


def running(cache: Path) -> list[int]:
    """Processes of workers that say they have committed something."""
    records = read_records(open_files(cache)).values()
    return [r.pid for r in records if r.state == RUNNING and r.num_units]


@pytest.mark.usefixtures("cluster")
def test_a_broken_row_is_refused_as_without_ray(
    tmp_path: Path, tiny_model: Path, write_rows: Callable[..., Path]
) -> None:
    rows: Rows = text_rows(30)
    rows[20] = {"text": 5}
    data = write_rows(rows)
    line = [*SMALL, "--window-rows", 8]
    alone = refused(1, *precompute_line(tiny_model, data, tmp_path / "a", *line))
    assert f"{data}:21" in alone
    on_ray = logitcache(*precompute_line(tiny_model, data, tmp_path / "b", *line, *ON_RAY[:2]))
    # Ray may have its own word on stdout where the machine is busy
    assert on_ray.status == 1 and on_ray.err.splitlines()[-1] == alone and "Traceback" not in on_ray.err, on_ray.err


def test_ray_that_is_not_installed_is_named(
    tmp_path: Path, tiny_model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_engine, "find_spec", lambda name: None)
    line = precompute_line(tiny_model, data, tmp_path / "c", *ON_RAY)
    assert install_line("ray") in refused(2, *line)
    assert not (tmp_path / "c").exists()


class Here:
    """Ray, as far as the engine asks it, with one actor, in this process."""

    exceptions = SimpleNamespace(RayError=ZeroDivisionError)

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 4.0}}, {"Alive": False, "Resources": {"CPU": 4.0}}]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine with `Here` in Ray's place."""

    def outcomes(_ray: Any, spec: JobSpec, actors: ray_engine.Actors) -> Any:
        actor = ray_engine.ShareActor(spec, actors.num_shares, 1)
        rows = ({"outcome": actor({"item": [i]})["outcome"][0]} for i in range(actors.num_shares))
        return SimpleNamespace(iter_rows=lambda: rows)

    monkeypatch.setattr(ray_engine, "import_ray", Here)
    monkeypatch.setattr(ray_engine, "outcomes_of", outcomes)


def both(*arguments: object, at: Path) -> tuple[CliResult, CliResult]:
    """The same job without Ray and with it, into caches of the same path, one after the other."""
    line = ["precompute", *arguments, "--cache", at]
    alone = logitcache(*line)
    shutil.rmtree(at, ignore_errors=True)
    return alone, logitcache(*line, "--engine", "ray", "--num-workers", 3)


@pytest.mark.usefixtures("here")
def test_the_report_is_that_of_one_process(tmp_path: Path, tiny_model: Path, data: Path) -> None:
    """12 shares: of every window 8 of them read it, and are told apart from 8 times as many rows."""
    line = ["--model", tiny_model, "--data", data, *SMALL, "--shard-positions", 600, "--max-length", 40]
    alone, on_ray = both(*line, at=tmp_path / "c")
    assert (on_ray.status, on_ray.out, on_ray.err) == (0, alone.out, alone.err)
    assert f"{NUM_ROWS} rows" in on_ray.err and "were cut" in on_ray.err
    again = logitcache("precompute", *line, "--cache", tmp_path / "c", "--engine", "ray")
    assert f"Cached 0 positions of 0 samples in {tmp_path / 'c'}. {NUM_ROWS} samples were there already." in again.out


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("rows", "more"),
    [
        ([{"text": "a"}], ["--max-length", 2]),
        ([{"prompt": "abc", "completion": "d"}] * 3, ["--max-length", 3]),
        ([{"text": "ab"}, {"text": None}], []),
    ],
    ids=["fine", "nothing is supervised", "broken"],
)
def test_data_are_refused_as_without_ray(
    rows: Rows, more: list[object], tmp_path: Path, tiny_model: Path, write_rows: Callable[..., Path]
) -> None:
    alone, on_ray = both("--model", tiny_model, "--data", write_rows(rows), *more, at=tmp_path / "c")
    assert (on_ray.status, on_ray.out) == (alone.status, alone.out)
    assert on_ray.err.splitlines()[-1:] == alone.err.splitlines()[-1:]


@pytest.mark.usefixtures("here")
def test_a_model_that_is_not_there_is_refused_as_without_ray(tmp_path: Path, data: Path) -> None:
    """An actor says so with its first share: it must not die of it, and be started again for ever."""
    alone, on_ray = both("--model", tmp_path / "nowhere", "--data", data, at=tmp_path / "c")
    assert (on_ray.status, on_ray.err) == (alone.status, alone.err)
    assert alone.status == 2


@pytest.mark.usefixtures("here")
def test_a_unit_that_cannot_be_computed_holds_up_no_other(
    tmp_path: Path, tiny_model: Path, write_rows: Callable[..., Path]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][make_tokenizer()("Z")["input_ids"][0]].fill_(float("nan"))
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    rows: Rows = text_rows(40)
    rows[3], rows[30] = {"text": "Z first"}, {"text": "Z second"}
    line = ["--model", model, "--data", write_rows(rows), *SMALL]
    alone, on_ray = both(*line, at=tmp_path / "c")
    assert alone.status == on_ray.status == 1
    assert "logits are not finite" in on_ray.err and "1 more shards could not be computed either" in on_ray.err
    assert "1 more shards could not be computed either" in alone.err
    assert not (tmp_path / "c" / "contents.json").exists()
    found = status(tmp_path / "c").num_shards
    shutil.rmtree(tmp_path / "c")
    logitcache("precompute", *line, "--cache", tmp_path / "c")
    assert found == status(tmp_path / "c").num_shards > 10


@pytest.mark.usefixtures("here")
def test_when_ray_gives_up_it_is_said(
    tmp_path: Path, tiny_model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dead() -> Iterator[dict[str, bytes]]:
        raise Here.exceptions.RayError("The actor died.\nof many things")
        yield {}

    monkeypatch.setattr(ray_engine, "outcomes_of", lambda *_: SimpleNamespace(iter_rows=dead))
    said = refused(1, *precompute_line(tiny_model, data, tmp_path / "c", *ON_RAY))
    assert "a share could not be done (The actor died)" in said


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_job(
    number: signal.Signals, expected: int, tmp_path: Path, tiny_model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped() -> Iterator[dict[str, bytes]]:
        os.kill(os.getpid(), number)
        yield {}

    monkeypatch.setattr(ray_engine, "outcomes_of", lambda *_: SimpleNamespace(iter_rows=stopped))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        assert logitcache(*precompute_line(tiny_model, data, tmp_path / "c", *ON_RAY)).status == expected
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_lost_record_of_a_worker_does_not_leave_the_cache_open(
    tmp_path: Path, tiny_model: Path, data: Path, reference: Path
) -> None:
    cache = tmp_path / "c"
    for index in range(2):
        done(*precompute_line(tiny_model, data, cache, *SMALL, "--shard-index", index, "--num-shards", 2))
        for record in cache.glob(f"worker-{index}-of-2-*.json"):
            record.unlink()
    assert not status(cache).is_final
    whole = LogitCache.open(reference)
    (entry,) = whole.data_sets
    ray_engine.finish(str(cache), whole.data_set(entry), "job")
    check_same(cache, reference)


def test_a_core_is_left_for_ray() -> None:
    divide = ray_engine.divide
    assert divide([{"CPU": 2.0}], "auto", 2) == ray_engine.Actors(2, 0.5, 0, 1)
    assert divide([{"CPU": 2.0}], "auto", None) == ray_engine.Actors(1, 1.0, 0, 1)
    assert divide([{"CPU": 1.0}], "auto", None) == ray_engine.Actors(1, 0.5, 0, 1)
    assert divide([{"CPU": 17.0}], "auto", None) == ray_engine.Actors(16, 1.0, 0, 1)
    assert divide([{"CPU": 17.0}], "auto", 4) == ray_engine.Actors(4, 1.0, 0, 4)
    assert divide([{"CPU": 64.0, "GPU": 8.0}], "auto", None) == ray_engine.Actors(8, 1.0, 1, 7)
    assert divide([{"CPU": 64.0, "GPU": 8.0}], "cpu", None).num_gpus == 0
    nodes = [{"CPU": 32.0, "GPU": 9.0}, {"CPU": 32.0, "GPU": 3.0}]  # a copy stands on one machine
    assert divide(nodes, "auto", None, 4) == ray_engine.Actors(2, 1.0, 4, 31)
    assert divide([{"CPU": 2.0}], "cpu", None, 4).num_gpus == 0
    with pytest.raises(InputNotFound, match="over 4 GPUs"):
        divide([{"CPU": 64.0, "GPU": 3.0}, {"GPU": 3.0}], "auto", None, 4)
    for cpus in (1, 2, 3, 7, 64):
        for num in (1, 2, 5, 100):
            found = divide([{"CPU": cpus}], "auto", num)
            assert found.num_cpus > 0 and found.num * found.num_cpus <= max(cpus - 1, cpus / 2, num / 100)
    with pytest.raises(InputNotFound, match="no GPU"):
        divide([{"CPU": 4.0}], "cuda", None)


def test_every_unit_is_one_share_s_and_shares_are_bounded() -> None:
    assert [ray_engine.Actors(n, 1, 0, 1).num_shares for n in (1, 2, 16, 40, 200)] == [4, 8, 64, 64, 200]


class Odd(Exception):
    """As libraries have them: cannot be rebuilt from its message."""

    def __init__(self, code: int, where: str) -> None:
        super().__init__(f"{code} at {where}")


def test_errors_come_out_of_an_actor_as_they_went_in() -> None:
    refusals: list[Exception] = [InvalidData("row 3."), CorruptCache("in x: bad.", "bad"), OSError(28, "full", "/x")]
    for error in refusals:
        found = pickle.loads(pickle.dumps(ray_engine.carried(error)))
        assert (type(found), str(found)) == (type(error), str(error))
        assert getattr(found, "fact", None) == getattr(error, "fact", None)
    assert str(ray_engine.carried(Odd(3, "here"))) == "Odd: 3 at here"


def test_paths_of_this_machine_become_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "d.jsonl").touch()
    found = ray_engine.absolute(JobSpec("m", "d.jsonl", "c", CaptureSettings()))
    assert (found.model, found.data, found.cache) == (
        str(tmp_path / "m"),
        (str(tmp_path / "d.jsonl"),),
        str(tmp_path / "c"),
    )
    given = JobSpec("org/model", "org/data", "s3://bucket/cache", CaptureSettings())
    assert ray_engine.absolute(given) == replace(given, data_name="org/data")
