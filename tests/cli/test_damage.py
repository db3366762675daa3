"""Damaged and half-written caches on the command line: the status, one sentence, and a way back."""

import fcntl
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.cli_fixtures import SHARDS
from support.cli_fixtures import cache as cache
from support.cli_fixtures import caches as caches
from support.cli_fixtures import data as data
from support.cli_harness import (
    Edit,
    cache_bytes,
    commits,
    copy_of,
    cut_short,
    done,
    facts,
    flip_byte,
    logitcache,
    precompute,
    precompute_line,
    refused,
    shard_folders,
    snapshot,
    train_line,
    unchanged,
    unit_of,
)
from support.tiny_model import text_rows

from logitcache.storage.files import open_files
from logitcache.storage.heads import read_manifest
from logitcache.storage.manifest import to_bytes

WriteRows = Callable[..., Path]


@pytest.mark.parametrize("store", ["zarr", "arrow"])
@pytest.mark.parametrize("lost", ["contents", "contents and a commit"])
def test_a_half_written_cache_is_5_and_completes(
    store: str, lost: str, tmp_path: Path, tiny_model: Path, data: Path, caches: dict[str, Path]
) -> None:
    half = copy_of(caches[store], tmp_path / "c")
    (half / "contents.json").unlink()
    if lost != "contents":
        commits(half)[1].unlink()
    with unchanged(tmp_path):
        for line in (["inspect", half], ["verify", half], train_line(tiny_model, half, tmp_path / "o")):
            assert "what writes it was interrupted after " in refused(5, *line)
    outcome = precompute(tiny_model, data, half, *SHARDS, "--store", store)
    assert "samples were there already" in outcome.out
    assert cache_bytes(half) == cache_bytes(caches[store])


def data_files(store: str) -> list[str]:
    """Files of log-probabilities, by store."""
    names = ("label_steps/c/0", "alternative_ids/c/0/0", "alternative_drops/c/0/0", "tail_steps/c/0")
    return list(names) if store == "zarr" else ["logprobs.arrow"]


@pytest.mark.parametrize(("store", "name"), [(s, name) for s in ("zarr", "arrow") for name in data_files(s)])
def test_a_flipped_bit_is_3(store: str, name: str, tmp_path: Path, tiny_model: Path, caches: dict[str, Path]) -> None:
    bad = copy_of(caches[store], tmp_path / "c")
    shard = shard_folders(bad)[-1]
    flip_byte(shard / name)
    outcome = logitcache("verify", bad)
    assert outcome.status == 3 and outcome.err == ""
    *problems, verdict = outcome.out.splitlines()
    unit = unit_of(shard)
    assert any(p.startswith(f"shard {unit}: ") and f"{shard / name}: expected checksum " in p for p in problems)
    assert any(p.startswith(f"shard {unit}, sample ") for p in problems)
    assert (
        verdict.startswith(f"{bad} is corrupt: ")
        and "`logitcache repair`, which drops them, and precompute again" in verdict
    )
    found = logitcache("verify", bad, "--json")
    assert found.status == 3
    report = json.loads(found.out)
    assert report["intact"] is False and {p["shard"] for p in report["problems"]} == {unit}
    message = refused(3, *train_line(tiny_model, bad, tmp_path / "o", "--batch-size", 12))
    assert shard.name in message


def test_a_flipped_bit_found_in_the_middle_of_training_is_3(
    tmp_path: Path, tiny_model: Path, write_rows: WriteRows
) -> None:
    """The probe before step 1 reads 8 samples; the bad one is not among them."""
    precompute(tiny_model, write_rows(text_rows(24)), tmp_path / "c", "--shard-positions", 1, "--batch-tokens", 1)
    bad = shard_folders(tmp_path / "c")[-1]
    flip_byte(bad / "logprobs.arrow")
    line = train_line(tiny_model, tmp_path / "c", tmp_path / "o", "--batch-size", 1, "--max-steps", 24)
    message = refused(3, *line)
    assert bad.name in message
    run = json.loads((tmp_path / "o" / "run.json").read_text(encoding="utf-8"))
    assert run["status"] == "started"
    assert not (tmp_path / "o" / "adapter_model.safetensors").exists()


def missing_commit(cache: Path) -> None:
    commits(cache)[0].unlink()


BAD_CACHES: dict[str, Edit] = {
    "the folder of a shard is missing": lambda c: shutil.rmtree(shard_folders(c)[0]),
    "all shards are missing": lambda c: shutil.rmtree(c / "shards"),
    "a commit is missing": missing_commit,
    "a commit is cut short": lambda c: commits(c)[0].write_bytes(b'{"body":'),
    "a commit is altered": lambda c: flip_byte(commits(c)[0]),
    "a file is missing": lambda c: (shard_folders(c)[0] / "logprobs.arrow").unlink(),
    "a file is cut short": lambda c: cut_short("logprobs.arrow", 100)(shard_folders(c)[0]),
    "a file has lost its last block": lambda c: cut_short("logprobs.arrow", -2000)(shard_folders(c)[0]),
    "a sample table is altered": lambda c: flip_byte(shard_folders(c)[0] / "samples.arrow"),
    "the manifest is altered": lambda c: flip_byte(c / "manifest.json"),
    "the manifest is empty": lambda c: (c / "manifest.json").write_bytes(b""),
    "the manifest is another JSON": lambda c: (c / "manifest.json").write_text("{}", encoding="utf-8"),
    "the index is missing": lambda c: next(c.glob("index-*")).unlink(),
    "the contents are altered": lambda c: flip_byte(c / "contents.json"),
    "the contents are empty": lambda c: (c / "contents.json").write_bytes(b""),
}


@pytest.mark.parametrize("name", BAD_CACHES)
def test_a_damaged_cache_is_3_everywhere(name: str, tmp_path: Path, tiny_model: Path, cache: Path) -> None:
    bad = copy_of(cache, tmp_path / "c", BAD_CACHES[name])
    with unchanged(bad):
        verified = logitcache("verify", bad)
        assert verified.status == 3 and "Traceback" not in verified.err
        assert str(bad) in verified.out + verified.err
        for line in (["inspect", bad], train_line(tiny_model, bad, tmp_path / "o", "--batch-size", 12)):
            message = refused(3, *line)
            assert str(bad) in message and "`logitcache repair`" in message
    assert not (tmp_path / "o" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("name", ["manifest.json", "contents.json", "the index"])
def test_training_is_refused_before_it_begins_where_opening_fails(
    name: str, tmp_path: Path, tiny_model: Path, cache: Path
) -> None:
    bad = copy_of(cache, tmp_path / "c")
    flip_byte(next(bad.glob("index-*")) if name == "the index" else bad / name)
    with unchanged(tmp_path):
        refused(3, *train_line(tiny_model, bad, tmp_path / "o"))
        refused(3, "inspect", bad)


def test_bytes_that_no_reader_needs_are_told_by_verify_alone(tmp_path: Path, cache: Path) -> None:
    """The last byte of an Arrow file is of its footer; every block is whole and is read as it was."""
    bad = copy_of(cache, tmp_path / "c", lambda c: cut_short("logprobs.arrow", -1)(shard_folders(c)[0]))
    assert facts(bad) == facts(cache)
    outcome = logitcache("verify", bad)
    assert outcome.status == 3 and "logprobs.arrow: expected " in outcome.out


MADE_AGAIN = {"a commit is missing", "all shards are missing", "the index is missing"}


@pytest.mark.parametrize("name", sorted(BAD_CACHES.keys() - MADE_AGAIN))
def test_precompute_into_a_damaged_cache_is_3_and_keeps_it(
    name: str, tmp_path: Path, tiny_model: Path, data: Path, cache: Path
) -> None:
    bad = copy_of(cache, tmp_path / "c", BAD_CACHES[name])
    with unchanged(bad):
        refused(3, *precompute_line(tiny_model, data, bad, *SHARDS))


@pytest.mark.parametrize("name", sorted(MADE_AGAIN))
def test_precompute_again_makes_what_is_gone(
    name: str, tmp_path: Path, tiny_model: Path, data: Path, cache: Path
) -> None:
    bad = copy_of(cache, tmp_path / "c", BAD_CACHES[name])
    precompute(tiny_model, data, bad, *SHARDS)
    assert cache_bytes(bad) == cache_bytes(cache)


def test_the_advice_for_a_bad_shard_works(tmp_path: Path, tiny_model: Path, data: Path, cache: Path) -> None:
    bad = copy_of(cache, tmp_path / "c")
    shard = shard_folders(bad)[0]
    flip_byte(shard / "logprobs.arrow")
    message = refused(3, *train_line(tiny_model, bad, tmp_path / "o"))
    assert "`logitcache repair` to drop it, and precompute again" in message
    assert "1 bad shard dropped" in done("repair", bad).out
    refused(5, "inspect", bad)
    precompute(tiny_model, data, bad, *SHARDS)
    assert cache_bytes(bad) == cache_bytes(cache)


@pytest.mark.parametrize("groups", [0, 4])
def test_the_same_precompute_writes_a_lost_manifest_again_and_no_other_one_does(
    groups: int, tmp_path: Path, tiny_model: Path, other_model: Path, data: Path
) -> None:
    line = [*SHARDS, "--tail-groups", groups]
    precompute(tiny_model, data, tmp_path / "c", *line)
    before = cache_bytes(tmp_path / "c")
    (tmp_path / "c" / "manifest.json").unlink()
    with unchanged(tmp_path / "c"):
        assert "`logitcache precompute`, which writes it again" in refused(2, "inspect", tmp_path / "c")
        for model, more in ((other_model, line), (tiny_model, [*line, "--top-k", 7])):
            message = refused(4, *precompute_line(model, data, tmp_path / "c", *more))
            assert "manifest.json again: expected shards of identity " in message
    precompute(tiny_model, data, tmp_path / "c", *line)
    assert cache_bytes(tmp_path / "c") == before


def test_a_shard_of_another_base_never_answers(
    tmp_path: Path, tiny_model: Path, other_model: Path, data: Path, cache: Path
) -> None:
    """Before, precompute listed it after repair, and verify called the cache intact."""
    precompute(other_model, data, tmp_path / "other", *SHARDS)
    mixed = copy_of(cache, tmp_path / "c")
    (record, *_), (folder, *_) = commits(tmp_path / "other"), shard_folders(tmp_path / "other")
    shutil.copy(record, mixed / "shards")
    shutil.copytree(folder, mixed / "shards" / folder.name)
    (mixed / "shards" / commits(cache)[0].name).unlink()  # and not the stranger's, whose name may come first
    assert record.name in refused(3, *precompute_line(tiny_model, data, mixed, *SHARDS))
    assert record.stem in logitcache("verify", mixed).out
    assert f"dropped shard {record.stem}" in done("repair", mixed).out
    precompute(tiny_model, data, mixed, *SHARDS)
    assert cache_bytes(mixed) == cache_bytes(cache)
    shutil.rmtree(mixed / "shards")
    shutil.copytree(tmp_path / "other" / "shards", mixed / "shards")
    with unchanged(mixed):
        assert record.name in refused(4, "repair", mixed)
    refused(3, *precompute_line(tiny_model, data, mixed, *SHARDS))


def test_what_a_killed_worker_left_is_counted_by_status_and_removed_by_repair(cache: Path, tmp_path: Path) -> None:
    mine = copy_of(cache, tmp_path / "c")
    names = [f"contents.json.{'0' * 32}.new", f"shards/{'0' * 32}-{'1' * 16}"]
    assert "left over" not in done("status", mine).out
    (mine / names[0]).write_bytes(b"half")
    (mine / names[1]).mkdir()
    assert "left over    2 files or folders" in done("status", mine).out
    assert json.loads(done("status", mine, "--json").out)["leftovers"] == names
    said = done("repair", mine).out
    assert "removed 2 files or folders" in said and "is intact; only that was removed" in said
    assert snapshot(mine).keys() - {"writer.lock"} == snapshot(cache).keys() - {"writer.lock"}
    assert "nothing was changed" in done("repair", mine).out and "left over" not in done("status", mine).out


def test_a_cache_of_a_later_format_is_1(tmp_path: Path, tiny_model: Path, data: Path, cache: Path) -> None:
    later = copy_of(cache, tmp_path / "c")
    manifest = replace(read_manifest(open_files(later)), format_version=3)
    (later / "manifest.json").write_bytes(to_bytes(manifest))
    with unchanged(later):
        for line in (["inspect", later], ["verify", later], precompute_line(tiny_model, data, later)):
            assert "Install a newer logitcache" in refused(1, *line)


def test_two_writers_may_work(tmp_path: Path, tiny_model: Path, data: Path, cache: Path) -> None:
    mine = copy_of(cache, tmp_path / "c")
    with (mine / "writer.lock").open("r+") as lock, unchanged(mine):
        fcntl.flock(lock, fcntl.LOCK_SH)
        done(*precompute_line(tiny_model, data, mine, *SHARDS))
        done("verify", mine)  # a reader needs no lock
