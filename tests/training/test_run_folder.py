"""The folder of a training run: half a checkpoint gives the right end or a sentence, and one run at a time."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.breadth import some_of
from support.cli_harness import copy_of, edit_json, flip_byte, snapshot, unchanged
from support.tiny_model import make_model
from support.tiny_runs import Stop, make_base, make_cache, make_samples
from support.two_processes import in_two_processes
from transformers import TrainerCallback

from logitcache.adapters.attach import AdapterSettings
from logitcache.errors import FolderInUse, TrainingFailed, UnsupportedModel, release_of
from logitcache.evaluation.compare import check_adapter
from logitcache.evaluation.held_out import HeldOut
from logitcache.losses.formulas import Objective
from logitcache.models.loading import Source
from logitcache.storage import IdentityMismatch, LogitCache
from logitcache.training import run_folder
from logitcache.training.run import TrainSettings, check_resumable, train
from logitcache.training.settings import EvalSettings

STEPS = 4
ADAPTER = "adapter_model.safetensors"
Damage = Callable[[Path], object]


def go(cache: LogitCache, out: Path, *callbacks: TrainerCallback, resume: bool = True, **changes: Any) -> list[str]:
    """Train with dropout, so that what is drawn matters. Returns what was told."""
    told: list[str] = []
    base = replace(make_base(), source=Source("tiny", out.parent / "tiny"))
    base.model.config.save_pretrained(out.parent / "tiny")  # PEFT looks at it when it saves
    adapter = changes.pop("adapter", AdapterSettings(rank=2, alpha=4, dropout=0.2))
    asked = {"on_step_zero": changes.pop("on_step_zero", lambda _: None), "on_message": told.append}
    asked |= {name: changes.pop(name) for name in ("held_out", "evaluation") if name in changes}
    settings = TrainSettings(**{"lr": 2e-2, "max_steps": STEPS, "batch_size": 4, "log_every": 1, **changes})
    train(base, make_samples(), cache, out, adapter, Objective(weight=0.5), settings, resume, callbacks, **asked)
    return told


def ends(out: Path) -> tuple[bytes, str]:
    """What two runs with the same end have in common."""
    return (out / ADAPTER).read_bytes(), (out / "train_log.jsonl").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    return make_cache(tmp_path_factory.mktemp("run") / "cache", make_samples())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: LogitCache) -> Path:
    """A run that nothing interrupted, to be read only."""
    out = tmp_path_factory.mktemp("whole") / "o"
    go(cache, out)
    return out


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, cache: LogitCache) -> Path:
    """The same run, stopped in its last step: checkpoints 2 and 3 are there. To be read only."""
    out = tmp_path_factory.mktemp("stopped") / "o"
    with pytest.raises(KeyboardInterrupt):
        go(cache, out, Stop(STEPS))
    return out


def in_newest(name: str, damage: Damage) -> Damage:
    return lambda out: damage(out / "checkpoints" / "checkpoint-3" / name)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def flip_moment(path: Path) -> None:
    """One bit of Adam's first moment, where the file holds it: a factor of 4 in one number."""
    moment = torch.load(path, weights_only=True)["state"][0]["exp_avg"]
    data = bytearray(path.read_bytes())
    at = data.index(moment.numpy().tobytes()) + 4 * int(moment.abs().argmax()) + 3
    data[at] ^= 1
    path.write_bytes(data)


def set_back(path: Path) -> None:
    """The schedule of another step, in a file of the same size."""
    data = path.read_bytes()
    at = data.index(b"K\x03", data.index(b"last_epoch"))
    path.write_bytes(data[: at + 1] + b"\x00" + data[at + 2 :])


def only_weights(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != ADAPTER:
            path.unlink()


def other_step(path: Path) -> None:
    edit_json(path, lambda state: state.update(global_step=2))


HALF: dict[str, tuple[Damage, str]] = {
    "optimizer gone": (in_newest("optimizer.pt", Path.unlink), "optimizer.pt is missing"),
    "optimizer flipped": (in_newest("optimizer.pt", flip_moment), "optimizer.pt is not what was written"),
    "adapter empty": (in_newest(ADAPTER, empty), f"{ADAPTER} has 0 bytes"),
    "optimizer empty": (in_newest("optimizer.pt", empty), "optimizer.pt has 0 bytes"),
    "state cut short": (in_newest("trainer_state.json", cut), "trainer_state.json has 100 bytes"),
    "state of another step": (in_newest("trainer_state.json", other_step), "trainer_state.json"),
    "random numbers gone": (in_newest("rng_state.pth", Path.unlink), "rng_state.pth is missing"),
    "schedule of another step": (in_newest("scheduler.pt", set_back), "scheduler.pt is not what was written"),
    "killed before the list": (in_newest("files.json", Path.unlink), "files.json is missing"),
    "list flipped": (in_newest("files.json", flip_byte), "files.json is damaged"),
    "killed in the middle": (in_newest("", only_weights), "files.json is missing"),
}


@pytest.mark.parametrize("what", some_of(HALF, 5))
def test_half_a_checkpoint_is_left_for_the_one_before(
    what: str, tmp_path: Path, cache: LogitCache, whole: Path, stopped: Path
) -> None:
    damage, why = HALF[what]
    out = copy_of(stopped, tmp_path / "o", damage)
    told = " ".join(go(cache, out))
    assert ends(out) == ends(whole)
    assert "checkpoint-3 was left" in told and why in told
    assert "checkpoint-2" in told


def test_a_whole_checkpoint_is_gone_on_from(tmp_path: Path, cache: LogitCache, whole: Path, stopped: Path) -> None:
    """The tests above would pass if every run began again."""
    out = copy_of(stopped, tmp_path / "o")
    begun: list[int] = []

    class Begins(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            begun.append(state.global_step)

    told = " ".join(go(cache, out, Begins()))
    assert begun == [3] and ends(out) == ends(whole)
    assert "checkpoint-3" in told and "left" not in told


def test_without_a_whole_checkpoint_a_run_begins_again_and_says_so(
    tmp_path: Path, cache: LogitCache, whole: Path, stopped: Path
) -> None:
    def damage(out: Path) -> None:
        for folder in (out / "checkpoints").glob("checkpoint-*"):
            flip_byte(folder / ADAPTER)

    out = copy_of(stopped, tmp_path / "o", damage)
    told = " ".join(go(cache, out))
    assert ends(out) == ends(whole)
    assert "checkpoint-3 was left" in told and "checkpoint-2 was left" in told and "from the beginning" in told


@pytest.mark.parametrize("damage", [empty, flip_byte, Path.unlink])
@pytest.mark.parametrize("name", [ADAPTER, "adapter_config.json", "files.json"])
def test_a_damaged_adapter_is_not_called_finished(
    name: str, damage: Damage, tmp_path: Path, cache: LogitCache, whole: Path
) -> None:
    out = copy_of(whole, tmp_path / "o")
    damage(out / name)
    with unchanged(out), pytest.raises(TrainingFailed, match=f"{name} (is|has)"):
        go(cache, out)


def test_a_damaged_adapter_is_made_again_where_a_checkpoint_is_left(
    tmp_path: Path, cache: LogitCache, whole: Path, stopped: Path
) -> None:
    """As after a kill between the last two steps of a run: finished, and the checkpoints still there."""
    out = copy_of(whole, tmp_path / "o")
    shutil.copytree(stopped / "checkpoints", out / "checkpoints")
    empty(out / ADAPTER)
    told = " ".join(go(cache, out))
    assert f"{ADAPTER} has 0 bytes" in told and "checkpoint-3" in told
    assert ends(out) == ends(whole)


def test_a_model_card_of_ones_own_does_not_undo_a_run(tmp_path: Path, cache: LogitCache, whole: Path) -> None:
    out = copy_of(whole, tmp_path / "o")
    (out / "README.md").write_text("mine", encoding="utf-8")
    with unchanged(out):
        go(cache, out)


def garbage(path: Path) -> None:
    path.write_text('{"model": {"na', encoding="utf-8")


@pytest.mark.parametrize("state", ["stopped", "finished"])
@pytest.mark.parametrize(
    "damage", [empty, garbage, Path.unlink, lambda path: edit_json(path, lambda run: run["settings"].update(lr=1.0))]
)
def test_a_damaged_run_json_is_written_again(
    damage: Damage, state: str, tmp_path: Path, cache: LogitCache, whole: Path, stopped: Path
) -> None:
    out = copy_of(stopped if state == "stopped" else whole, tmp_path / "o")
    damage(out / "run.json")
    told = " ".join(go(cache, out))
    assert "run.json" in told and "written again" in told
    assert ends(out) == ends(whole)
    found, expected = (json.loads((folder / "run.json").read_text()) for folder in (out, whole))
    for run in (found, expected):
        del run["result"]["seconds"], run["result"]["peak_memory_bytes"], run["checksum"]
    assert found == expected


@pytest.mark.parametrize("state", ["stopped", "finished"])
def test_a_lost_run_json_lets_no_other_settings_go_on(
    state: str, tmp_path: Path, cache: LogitCache, whole: Path, stopped: Path
) -> None:
    out = copy_of(stopped if state == "stopped" else whole, tmp_path / "o")
    (out / "run.json").unlink()
    with unchanged(out):
        with pytest.raises(IdentityMismatch, match=r"differs in settings \(--lr: 0\.02 there, 0\.01 here\) \(see"):
            go(cache, out, lr=1e-2)
        with pytest.raises(
            IdentityMismatch, match=r"differs in adapter \(--rank: 2 there, 4 here\), settings \(--lr: "
        ):
            go(cache, out, lr=1e-2, adapter=AdapterSettings(rank=4, alpha=4, dropout=0.2))
        with pytest.raises(TrainingFailed, match="it holds a run"):
            go(cache, out, resume=False)


# --- what else is read back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [flip_byte, empty, Path.unlink])
def test_first_factors_that_are_damaged_are_not_gone_on_with(damage: Damage, tmp_path: Path, cache: LogitCache) -> None:
    settings = AdapterSettings("pissa", 2, 4.0)
    with pytest.raises(KeyboardInterrupt):
        go(cache, tmp_path / "o", Stop(STEPS), adapter=settings)
    damage(tmp_path / "o" / "checkpoints" / "start" / ADAPTER)
    with (
        unchanged(tmp_path / "o" / "checkpoints"),
        pytest.raises(TrainingFailed, match=f"first factors of this run are missing or damaged \\({ADAPTER}"),
    ):
        go(cache, tmp_path / "o", adapter=settings)


def test_a_damaged_adapter_is_not_evaluated(tmp_path: Path, whole: Path) -> None:
    base = make_base()
    out = copy_of(whole, tmp_path / "o")
    check_adapter(str(out), base)
    flip_byte(out / ADAPTER)
    with pytest.raises(UnsupportedModel, match=f"{ADAPTER} is not what was written"):
        check_adapter(str(out), base)
    (out / "files.json").unlink()  # as it says, for those who changed it
    check_adapter(str(out), base)


def test_a_whole_model_in_pieces_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: LogitCache) -> None:
    """Training every weight: the pieces of the model, and what is left when the run is over."""
    original = type(make_model()).save_pretrained

    def in_pieces(self: Any, folder: Any, **kwargs: Any) -> None:
        original(self, folder, **{**kwargs, "max_shard_size": "40KB"})

    monkeypatch.setattr(type(make_model()), "save_pretrained", in_pieces)
    whole, out = tmp_path / "whole", tmp_path / "o"
    settings: dict[str, Any] = {"adapter": AdapterSettings("none"), "lr": 1e-3}
    go(cache, whole, **settings)
    with pytest.raises(KeyboardInterrupt):
        go(cache, out, Stop(STEPS), **settings)
    pieces = sorted((out / "checkpoints" / "checkpoint-3").glob("model-*.safetensors"))
    assert len(pieces) > 1
    pieces[0].unlink()
    assert f"{pieces[0].name} is missing" in " ".join(go(cache, out, **settings))
    names = [path.name for path in whole.glob("model*")]
    assert len(names) > 2 and all((out / name).read_bytes() == (whole / name).read_bytes() for name in names)
    flip_byte(out / pieces[-1].name)
    with pytest.raises(TrainingFailed, match=f"{pieces[-1].name} is not what was written"):
        go(cache, out, **settings)


def test_a_finished_run_keeps_no_checkpoints(whole: Path) -> None:
    names = {path.name for path in whole.iterdir()}
    assert names == {
        *("adapter_config.json", ADAPTER, "README.md", "files.json", "run.json", "run.lock"),
        *("tensorboard", "train_log.jsonl"),
    }
    listed = json.loads((whole / "files.json").read_text(encoding="utf-8"))["files"]
    assert sorted(listed) == ["adapter_config.json", ADAPTER]
    assert listed[ADAPTER][0] == (whole / ADAPTER).stat().st_size


def test_two_checkpoints_are_kept(stopped: Path) -> None:
    folders = {path.name for path in (stopped / "checkpoints").iterdir()}
    assert folders == {"checkpoint-2", "checkpoint-3"}
    listed = json.loads((stopped / "checkpoints" / "checkpoint-3" / "files.json").read_text())["files"]
    assert {ADAPTER, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= listed.keys()


# --- killed between any two steps on the disk ------------------------------------------------------------------------


class Killed(BaseException):
    """What nobody catches."""


class PowerCut:
    """From the n-th file that is put in its place, folder that is removed, or optimizer that is saved on, nothing is
    written any more. n 0: never. `count` says how many there were."""

    def __init__(self, patch: pytest.MonkeyPatch, n: int) -> None:
        self.count, self._n = 0, n
        for name in ("replace", "rename", "rmdir", "unlink", "mkdir", "fsync"):
            patch.setattr(os, name, self._cut(getattr(os, name), name in ("replace", "rename", "rmdir")))
        patch.setattr(torch, "save", self._cut(torch.save, False))

    def _cut(self, function: Callable[..., Any], counts: bool) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            self.count += counts or str(args[-1]).endswith("optimizer.pt")
            if self._n and self.count >= self._n:
                raise Killed
            return function(*args, **kwargs)

        return called


@pytest.mark.parametrize("evaluated", [False, True])
def test_killed_between_any_two_writes_it_ends_the_same(
    evaluated: bool, tmp_path: Path, cache: LogitCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """evaluated: with weights of a best evaluation, which are not the last step's."""
    settings: dict[str, Any] = {"adapter": AdapterSettings("pissa", 2, 4.0), "max_steps": 2}
    if evaluated:
        settings |= {"held_out": HeldOut(make_samples(4, seed=1), cache)}
        settings |= {"evaluation": EvalSettings(eval_steps=1, best_by="prior-kl")}
    monkeypatch.setattr(run_folder, "KEPT", 1)  # so that the second checkpoint has one to remove

    def cut_at(n: int, out: Path) -> int:
        with monkeypatch.context() as patch:
            cut = PowerCut(patch, n)
            go(cache, out, **settings)
        return cut.count

    count = cut_at(0, tmp_path / "whole")
    assert count > 15
    for n in some_of(range(1, count + 1), 6):
        out = tmp_path / str(n)
        with pytest.raises(Killed):
            cut_at(n, out)
        go(cache, out, **settings)
        assert ends(out) == ends(tmp_path / "whole"), n
        assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}, n


def test_an_older_checkpoint_is_removed_when_the_newer_is_on_the_disk(
    tmp_path: Path, cache: LogitCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file of a checkpoint is synced, then its list is put in its place, and its name synced, then one goes."""
    done: list[str] = []
    opened: dict[int, str] = {}
    fsync, replace_, rmtree, open_ = os.fsync, os.replace, shutil.rmtree, os.open

    def short(path: Any) -> str:
        return Path(path).as_posix().partition("/checkpoints/")[2]

    def opens(path: Any, *args: Any, **kwargs: Any) -> int:
        handle = open_(path, *args, **kwargs)
        opened[handle] = short(path) if isinstance(path, (str, Path)) else ""
        return handle

    def syncs(handle: int) -> None:
        done.append(f"sync {opened.get(handle, '')}")
        fsync(handle)

    def replaces(source: Any, target: Any, **kwargs: Any) -> None:
        folder = opened.get(kwargs.get("dst_dir_fd", -1), "")
        done.append(f"place {folder}/{target}" if folder else f"place {short(target)}")
        replace_(source, target, **kwargs)

    def removes(path: Any, *args: Any, **kwargs: Any) -> None:
        done.append(f"remove {short(path)}")
        rmtree(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", opens)
    monkeypatch.setattr(os, "fsync", syncs)
    monkeypatch.setattr(os, "replace", replaces)
    monkeypatch.setattr(shutil, "rmtree", removes)
    go(cache, tmp_path / "o", max_steps=3)
    monkeypatch.undo()
    placed, removed = done.index("place checkpoint-3/files.json"), done.index("remove checkpoint-1")
    for name in (ADAPTER, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        assert done.index(f"sync checkpoint-3/{name}") < placed
    assert placed < removed and "sync checkpoint-3" in done[placed:removed]


# --- one run at a time -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_run_is_refused(resume: bool, tmp_path: Path, cache: LogitCache, whole: Path) -> None:
    out, refusals = tmp_path / "o", list[str]()

    def second(_: Any) -> None:
        with pytest.raises(FolderInUse) as refusal:
            go(cache, out, resume=resume)
        refusals.append(str(refusal.value))

    class Beside(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            with pytest.raises(FolderInUse), run_folder.held(out):
                pass

    go(cache, out, Beside(), on_step_zero=second)
    assert ends(out) == ends(whole)
    (refusal,) = refusals
    assert f"found process {os.getpid()} on {socket.gethostname()} " in refusal and refusal.endswith("another --out.")
    assert (out / "run.lock").read_bytes() == b""


HOLDER = """
import os, sys, time
from pathlib import Path
from logitcache.training.run_folder import held
with held(Path(sys.argv[1])):
    child = os.fork()  # as a worker of a data loader
    if child:
        os.write(1, f"{os.getpid()} {child}\\n".encode())  # one write: the other process writes too
    else:
        os.write(1, b"the child is up, and has let go of what it inherited\\n")
    time.sleep(600)
"""


def test_a_killed_run_leaves_no_lock(tmp_path: Path, cache: LogitCache) -> None:
    """Even where a process that it forked lives on."""
    out = tmp_path / "o"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    lines = sorted(holder.stdout.readline() for _ in range(2))  # digits before letters
    process, child = (int(number) for number in lines[0].split()[:2])
    try:
        with pytest.raises(FolderInUse, match=f"found process {process} on"):
            go(cache, out)
        holder.kill()
        holder.wait()
        with run_folder.held(out):
            assert str(os.getpid()) in (out / "run.lock").read_text(encoding="utf-8")
    finally:
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()


def test_a_foreign_folder_is_not_locked(tmp_path: Path, cache: LogitCache) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "notes.txt").write_text("mine", encoding="utf-8")
    before = snapshot(tmp_path / "o")
    for resume in (False, True):
        with pytest.raises(TrainingFailed, match="expected an empty folder"):
            go(cache, tmp_path / "o", resume=resume)
    assert snapshot(tmp_path / "o") == before


def test_an_occupied_folder_is_found_before_weights_are_read(tmp_path: Path, cache: LogitCache, whole: Path) -> None:
    """A model of this name does not exist, which is what the run would find next."""
    with unchanged(whole), pytest.raises(TrainingFailed, match="it holds a run"):
        train("no/such/model", None, cache, whole)
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with unchanged(tmp_path), pytest.raises(TrainingFailed, match="expected an empty folder"):
        train("no/such/model", None, cache, tmp_path)


def test_a_folder_that_was_filled_meanwhile_is_found_under_the_lock(tmp_path: Path, whole: Path) -> None:
    """While weights were read, another run came and went, or somebody wrote there."""
    out = copy_of(whole, tmp_path / "o")
    with pytest.raises(TrainingFailed, match="it holds a run"), run_folder.claimed(out, {}, resume=False):
        raise AssertionError("the folder of another run was claimed")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine", encoding="utf-8")
    with (
        pytest.raises(TrainingFailed, match="expected an empty folder"),
        run_folder.claimed(tmp_path / "other", {}, resume=True),
    ):
        raise AssertionError("a folder with other files was claimed")


# --- two processes ---------------------------------------------------------------------------------------------------


def test_a_part_that_is_not_seen_makes_no_whole_checkpoint(
    tmp_path: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where machines do not share the folder."""
    out = copy_of(stopped, tmp_path / "o")
    monkeypatch.setattr(run_folder, "PATIENCE_SECONDS", 0.0)
    newest = out / "checkpoints" / "checkpoint-3"
    (newest / "files.json").unlink()
    (newest / "rng_state.pth").rename(newest / "rng_state_0.pth")
    with unchanged(out), pytest.raises(TrainingFailed, match=r"rng_state_1\.pth of another process"):
        run_folder.seal_checkpoint(out, 3, {}, 2)
    (out / "run.lock").unlink()
    with pytest.raises(TrainingFailed, match="that all machines share"):
        run_folder.check_shared(out)


def _rank(rank: int, folder: str) -> tuple[list[str], list[str]]:
    cache, out = LogitCache.open(Path(folder) / "cache"), Path(folder) / "o"
    go(cache, Path(folder) / "whole")
    with pytest.raises(KeyboardInterrupt):
        go(cache, out, Stop(STEPS))
    torch.distributed.barrier()
    newest = out / "checkpoints" / "checkpoint-3"
    listed = json.loads((newest / "files.json").read_text(encoding="utf-8"))["files"]
    if rank == 0:
        shutil.copyfile(newest / "rng_state_0.pth", newest / "rng_state_1.pth")
        with pytest.raises(IdentityMismatch, match="settings"):
            run_folder.look(out, {"settings": 1})
    torch.distributed.barrier()
    told = go(cache, out)
    with pytest.raises(TrainingFailed, match="it holds a run"):  # on both, or one waits for ever
        go(cache, out, resume=False)
    go(cache, out)  # finished
    return sorted(listed), told


@pytest.mark.parametrize(
    ("installed", "num", "device"), [("5.16.1", 1, "cpu"), ("5.17.0", 2, "cuda"), ("5.18.0", 2, "cpu")]
)
def test_an_optimizer_that_can_be_read_again_is(
    installed: str, num: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logitcache.training.run.version", lambda _: installed)
    found: Any = SimpleNamespace(world_size=num, device=torch.device(device))
    check_resumable(found, Path("o"))


def test_several_processes_on_a_cpu_go_on_where_transformers_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logitcache.training.run.version", lambda _: "5.17.2")
    found: Any = SimpleNamespace(world_size=2, device=torch.device("cpu", 0))
    with pytest.raises(TrainingFailed, match=r"expected transformers 5\.18 or later, .* found 5\.17\.2"):
        check_resumable(found, Path("o"))


@pytest.mark.skipif(release_of(version("transformers")) < (5, 18), reason="reads no optimizer in two processes")
def test_two_processes_go_on_from_what_is_whole_for_both(tmp_path: Path) -> None:
    make_cache(tmp_path / "cache", make_samples())
    found = in_two_processes(_rank, str(tmp_path))
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(found[0][0])
    assert "checkpoint-3 was left: rng_state_1.pth is not what was written." in found[0][1] and found[1][1] == []
    assert ends(tmp_path / "o") == ends(tmp_path / "whole")
