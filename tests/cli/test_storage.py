"""The verbs that work on caches: inspect, verify, repair, merge, convert, export; and caches at a URL."""

import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
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
    text_data,
    train_line,
    unchanged,
    unit_of,
)
from support.storage_samples import (
    MAX_ERRORS,
    SHARDS,
    VOCAB,
    by_tokens,
    cache_bits,
    make_groups,
    make_manifest,
    make_sample,
    record_bits,
    stored,
    within,
    write_cache,
)

from logitcache.storage import LogitCache, sample_id

ALONE = ["--shard-positions", 60, "--batch-tokens", 1]
"""Several shards, and every sample a batch of its own: so its record does not depend on what is beside it."""


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, data: Path) -> dict[tuple[str, str], Path]:
    """A finished cache of `data` in each store and precision, to be read only."""
    folder, found = tmp_path_factory.mktemp("storage-caches"), {}
    for store in ("zarr", "arrow"):
        for precision in MAX_ERRORS:
            found[store, precision] = folder / f"{store}-{precision}"
            more = ["--store", store, "--precision", precision]
            precompute(tiny_model, data, found[store, precision], *ALONE, *more)
    return found


@pytest.fixture(scope="module")
def cache(caches: dict[tuple[str, str], Path]) -> Path:
    """The one in the Arrow store at the default precision."""
    return caches["arrow", "fine"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Path]:
    """Caches of parts of `data` that make up the whole; first and last overlap in two samples."""
    folder = tmp_path_factory.mktemp("storage-parts")
    for name, (start, stop) in {"first": (0, 7), "second": (7, 12), "last": (5, 12)}.items():
        precompute(tiny_model, text_data(folder, start, stop), folder / name, *ALONE)
    return {name: folder / name for name in ("first", "second", "last")}


@pytest.fixture
def memory_url() -> Iterator[str]:
    """A prefix of memory://, emptied afterwards."""
    yield "memory://cli-test/cache"
    fsspec.filesystem("memory").rm("/cli-test", recursive=True)


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_as_text_and_as_json(cache: Path, tiny_model: Path) -> None:
    found = facts(cache)
    contents, text = found["contents"], done("inspect", cache).out
    assert found["model_name"] == str(tiny_model)
    assert set(found["model"]) == {"weights", "config", "vocab_size", "dtype", "attention", "quantization", "tf32"}
    assert found["capture"] == {
        "top_k": 8,
        "max_length": 1024,
        "min_mass": 1.0,
        "precision": "fine",
        "max_error": 1 / 64,
        "num_tail_groups": 0,
        "tail_partition": "",
        "group_steps_per_nat": 0,
        "num_tail_samples": 0,
    }
    assert contents["num_samples"] == 12 and contents["num_tokens"] == contents["num_positions"] + 12
    assert contents["num_tokens_cut"] == 0 and contents["num_shards"] == len(commits(cache)) > 1
    assert contents["num_bytes"] == sum(p.stat().st_size for f in shard_folders(cache) for p in f.rglob("*.arrow"))
    assert contents["bytes_a_position"] == pytest.approx(contents["num_bytes"] / contents["num_positions"])
    assert 0 < contents["mean_kept_mass"] < 1
    for fact in (found["model"]["weights"], found["tokenizer"]["fingerprint"], f"{contents['num_positions']:,} pos"):
        assert fact in text
    assert "precision    fine: log-probabilities within 0.015625 nats" in text
    assert "capture      top 8 alternatives; samples of at most 1024 tokens" in text


def test_keys_of_inspect_as_json(cache: Path) -> None:
    """What scripts may rely on."""
    found = facts(cache)
    assert set(found) == {
        "store",
        "model",
        "tokenizer",
        "capture",
        "model_name",
        "created_with",
        "reader_features",
        "writer_features",
        "format_version",
        "max_group_error",
        "contents",
        "data_sets",
        "bytes_a_position_by_column",
        "is_sampled",
        "kept_mass",
        "mean_tail_mass",
        "num_alternatives",
    }
    assert set(found["contents"]) == {
        "num_samples",
        "num_tokens",
        "num_positions",
        "num_shards",
        "num_tokens_cut",
        "num_bytes",
        "bytes_a_position",
        "mean_kept_mass",
        "num_positions_read",
        "checksum",
    }
    percentiles = ["1%", "5%", "25%", "50%", "75%", "95%", "99%"]
    assert list(found["kept_mass"]) == percentiles == list(found["num_alternatives"])
    assert (found["format_version"], found["reader_features"]) == (2, [])


def test_percentiles_of_inspect_are_those_of_the_records(cache: Path) -> None:
    found, opened = facts(cache), LogitCache.open(cache)
    kept = np.concatenate([s.logprobs.kept_mass() for s in opened.samples()])
    assert found["contents"]["num_positions_read"] == len(kept) == opened.num_positions
    for name, value in found["kept_mass"].items():
        assert value == pytest.approx(np.percentile(kept, float(name[:-1])))
    assert found["contents"]["mean_kept_mass"] == pytest.approx(kept.mean(), abs=0.02)  # of exact numbers
    tail = np.concatenate([np.exp(s.logprobs.tail_logprobs.astype(np.float64)) for s in opened.samples()]).mean()
    assert found["mean_tail_mass"] == pytest.approx(tail)
    assert set(found["num_alternatives"].values()) == {8}
    lines = [line.split() for line in done("inspect", cache).out.splitlines()]
    assert ["percentile", *found["kept_mass"]] in lines
    assert ["kept", "mass", *(f"{v:.4f}" for v in found["kept_mass"].values())] in lines
    assert ["kept", *["8"] * 7] in lines
    assert ["tail", f"{100 * tail:.3g}", "%", "of", "the", "whole", "mass", "on", "average"] in lines


def bytes_by_column(text: str) -> tuple[float, dict[str, float]]:
    """Bytes a position in all, and by column, as `inspect` prints them."""
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("  size  "))
    total = float(lines[at].split(", ")[1].split()[0])
    columns = {}
    for line in lines[at + 1 :]:
        if not line.startswith("    "):
            break
        size, name = line.split(maxsplit=1)
        columns[name] = float(size)
    return total, columns


@pytest.mark.parametrize("store", ["zarr", "arrow"])
@pytest.mark.parametrize("precision", MAX_ERRORS)
def test_bytes_by_column_sum_to_the_size(store: str, precision: str, caches: dict[tuple[str, str], Path]) -> None:
    total, columns = bytes_by_column(done("inspect", caches[store, precision]).out)
    assert sum(columns.values()) == pytest.approx(total, rel=0.01)


@pytest.mark.parametrize("store", ["zarr", "arrow"])
def test_bytes_by_column_name_every_column(store: str, caches: dict[tuple[str, str], Path]) -> None:
    total, columns = bytes_by_column(done("inspect", caches[store, "fine"]).out)
    expected = {"token_ids", "positions", "num_tokens_cut", "label_steps", "tail_steps"}
    if store == "zarr":
        expected |= {"sample_ids", "num_tokens", "num_positions", "alternative_ids", "alternative_drops"}
    else:
        expected |= {"sample_id", *(f"alternative_{n}_{half}" for n in ("ids", "drops") for half in ("low", "high"))}
    assert expected <= set(columns)
    assert all(size > 0 for size in columns.values()) and sum(columns.values()) < total + 0.01 * len(columns)
    found = facts(caches[store, "fine"])["bytes_a_position_by_column"]
    assert {name: f"{size:.2f}" for name, size in found.items()} == {n: f"{s:.2f}" for n, s in columns.items()}


def test_inspect_reads_no_more_than_it_is_told(cache: Path) -> None:
    whole, some = facts(cache), json.loads(done("inspect", cache, "--json", "--max-positions", 200).out)
    assert some["contents"]["num_positions_read"] < whole["contents"]["num_positions"]
    assert some.pop("is_sampled") and not whole.pop("is_sampled")
    del some["contents"]["num_positions_read"], whole["contents"]["num_positions_read"]
    assert some["contents"] == whole["contents"]  # the counts are of everything
    assert some["kept_mass"] != whole["kept_mass"]
    assert "see --max-positions" in done("inspect", cache, "--max-positions", 200).out
    assert "see --max-positions" not in done("inspect", cache).out


def test_inspect_plots(tmp_path: Path, cache: Path) -> None:
    plain = done("inspect", cache).out
    with unchanged(cache):
        outcome = done("inspect", cache, "--plot", tmp_path / "p.png")
    assert outcome.out == f"{plain}  picture      {tmp_path / 'p.png'}\n" and outcome.err == ""
    picture = (tmp_path / "p.png").read_bytes()
    width, height = struct.unpack(">II", picture[16:24])
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and picture[12:16] == b"IHDR"
    assert width > 1000 and height > 300 and len(picture) > 20_000
    found = json.loads(done("inspect", cache, "--plot", tmp_path / "p.svg", "--json").out)
    assert found == facts(cache)
    svg = (tmp_path / "p.svg").read_text(encoding="utf-8")
    assert "<svg" in svg and svg.rstrip().endswith("</svg>")


def test_a_picture_of_an_unknown_kind_is_2(tmp_path: Path, cache: Path) -> None:
    with unchanged(tmp_path):
        assert "p.xyz" in refused(2, "inspect", cache, "--plot", tmp_path / "p.xyz")


def test_a_picture_is_written_where_it_is_said_to_be(tmp_path: Path, cache: Path) -> None:
    outcome = logitcache("inspect", cache, "--plot", tmp_path / "p")
    assert outcome.status == 2 or (tmp_path / "p").exists()


def test_a_picture_into_no_folder_is_1(tmp_path: Path, cache: Path) -> None:
    assert "No such file or directory" in refused(1, "inspect", cache, "--plot", tmp_path / "none" / "p.png")


def test_verify_as_json(cache: Path) -> None:
    outcome = done("verify", cache, "--json")
    found = json.loads(outcome.out)
    assert found["intact"] is True and found["problems"] == []
    assert found["num_positions"] == facts(cache)["contents"]["num_positions"]
    assert outcome.err == ""


@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_readers_leave_no_trace(verb: str, cache: Path) -> None:
    with unchanged(cache):
        done(verb, cache)
        done(verb, cache, "--json")


# --- precompute --min-mass -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["zarr", "arrow"])
def test_min_mass_keeps_fewer_alternatives_and_says_so(
    store: str, tmp_path: Path, tiny_model: Path, data: Path
) -> None:
    more = [*ALONE, "--top-k", 100, "--store", store]
    precompute(tiny_model, data, tmp_path / "all", *more)
    precompute(tiny_model, data, tmp_path / "some", *more, "--min-mass", 0.4)
    whole, some = facts(tmp_path / "all"), facts(tmp_path / "some")
    assert (whole["capture"]["min_mass"], some["capture"]["min_mass"]) == (1.0, 0.4)
    assert set(whole["num_alternatives"].values()) == {100}
    assert (
        all(1 <= k < 60 for k in some["num_alternatives"].values()) and len(set(some["num_alternatives"].values())) > 1
    )
    assert some["contents"]["num_bytes"] < whole["contents"]["num_bytes"]
    text = "capture      the fewest alternatives with 40 % of the non-target mass, top 100 alternatives at most; "
    assert text in done("inspect", tmp_path / "some").out
    everything, fewer = LogitCache.open(tmp_path / "all"), LogitCache.open(tmp_path / "some")
    assert len(fewer) == len(everything)
    for sample in fewer.samples():
        mine, other = everything.lookup(sample.token_ids), sample.logprobs
        present = other.alternative_logprobs > -np.inf
        assert np.array_equal(np.sort(~present, axis=1), ~present)  # what is absent stands at the end
        assert np.array_equal(other.alternative_ids[present], mine.alternative_ids[present])
        np.testing.assert_array_equal(other.alternative_logprobs[present], mine.alternative_logprobs[present])
        kept = other.kept_mass()
        assert kept.min() > 0.4 - 0.01
        last = np.exp(np.where(present, other.alternative_logprobs, np.inf).min(axis=1))
        assert np.all(kept - last / (1 - np.exp(other.label_logprobs)) < 0.4 + 0.01)  # the fewest: one less is short
    done("verify", tmp_path / "some")
    done(*train_line(tiny_model, tmp_path / "some", tmp_path / "o"))


def test_another_min_mass_or_precision_is_another_cache(
    tmp_path: Path, tiny_model: Path, data: Path, cache: Path
) -> None:
    mine = copy_of(cache, tmp_path / "c")
    for more, named in (
        (["--min-mass", 0.5], "capture.min_mass: 0.5 here, 1.0 there"),
        (["--precision", "exact"], "capture.precision: exact here, fine there"),
        (["--precision", "compact"], "capture.max_error: 0.03125 here, 0.015625 there"),
    ):
        with unchanged(mine):
            assert named in refused(4, *precompute_line(tiny_model, data, mine, *ALONE, *more))


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--min-mass", "0"], "'--min-mass'"),
        (["--min-mass", "1.01"], "'--min-mass'"),
        (["--min-mass", "nan"], "'--min-mass'"),
        (["--precision", "float16"], "'--precision'"),
        (["--store", "parquet"], "'--store'"),
    ],
)
def test_what_precompute_cannot_store_is_2(
    more: list[str], named: str, tmp_path: Path, tiny_model: Path, data: Path
) -> None:
    with unchanged(tmp_path):
        assert named in refused(2, *precompute_line(tiny_model, data, tmp_path / "c", *more))


# --- repair ----------------------------------------------------------------------------------------------------------


def damage_one(edit: Edit) -> Callable[[Path], list[str]]:
    """An edit of the folder of the second shard; gives the units that it damages."""

    def damage(cache: Path) -> list[str]:
        folder = shard_folders(cache)[1]
        edit(folder)
        return [unit_of(folder)]

    return damage


def flip_two(cache: Path) -> list[str]:
    """A flipped bit in the first shard and in the last."""
    folders = shard_folders(cache)
    for folder in (folders[0], folders[-1]):
        flip_byte(max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size))
    return [unit_of(folders[0]), unit_of(folders[-1])]


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def cut_commit(cache: Path) -> list[str]:
    cut_short(commits(cache)[0].name, 50)(cache / "shards")
    return [commits(cache)[0].stem]


def no_contents(cache: Path) -> list[str]:
    (cache / "contents.json").unlink()
    return []


def bad_contents(cache: Path) -> list[str]:
    flip_byte(cache / "contents.json")
    return []


def bad_index(cache: Path) -> list[str]:
    flip_byte(next(cache.glob("index-*")))
    return []


DAMAGE: dict[str, Callable[[Path], list[str]]] = {
    "flipped bits": flip_two,
    "a commit is cut short": cut_commit,
    "the folder of a shard is missing": damage_one(shutil.rmtree),
    "the folder of a shard is empty": damage_one(empty),
    "a file is missing": damage_one(lambda f: next(p for p in sorted(f.rglob("*")) if p.is_file()).unlink()),
    "contents are missing": no_contents,
    "contents are altered": bad_contents,
    "the index is altered": bad_index,
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("store", ["zarr", "arrow"])
def test_repair_and_precompute_give_the_undamaged_cache(
    name: str, store: str, tmp_path: Path, tiny_model: Path, data: Path, caches: dict[tuple[str, str], Path]
) -> None:
    bad = copy_of(caches[store, "fine"], tmp_path / "c")
    damaged = DAMAGE[name](bad)
    kept = {p.name: p.read_bytes() for p in commits(bad) if p.stem not in damaged}
    outcome = done("repair", bad)
    *dropped, verdict = outcome.out.splitlines()
    assert sorted(dropped) == sorted(f"dropped shard {unit}" for unit in damaged)
    assert "dropped. The cache is incomplete now: " in verdict
    assert {p.name: p.read_bytes() for p in commits(bad)} == kept  # no other shard is lost
    refused(5, "inspect", bad)
    again = precompute(tiny_model, data, bad, *ALONE, "--store", store)
    assert "samples were there already" in again.out
    assert cache_bytes(bad) == cache_bytes(caches[store, "fine"])
    done("verify", bad)


@pytest.mark.parametrize("store", ["zarr", "arrow"])
def test_repair_of_an_intact_cache_changes_nothing(
    store: str, tmp_path: Path, caches: dict[tuple[str, str], Path]
) -> None:
    mine = copy_of(caches[store, "fine"], tmp_path / "c")
    before = {p: p.stat().st_mtime_ns for p in mine.rglob("*")}
    with unchanged(mine):
        assert done("repair", mine).out == f"{mine} is intact; nothing was changed.\n"
    assert {p: p.stat().st_mtime_ns for p in mine.rglob("*")} == before


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[]", b"\xff"])
def test_repair_with_a_bad_manifest_is_3(content: bytes | None, tmp_path: Path, cache: Path) -> None:
    """What a cache belongs to cannot be made up."""
    bad = copy_of(cache, tmp_path / "c")
    if content is None:
        flip_byte(bad / "manifest.json")
    else:
        (bad / "manifest.json").write_bytes(content)
    with unchanged(bad):
        assert str(bad / "manifest.json") in refused(3, "repair", bad)


@pytest.mark.parametrize("kind", ["none", "empty", "other", "file"])
@pytest.mark.parametrize("verb", ["repair", "merge", "convert", "export"])
def test_what_is_no_cache_is_2_and_not_touched(verb: str, kind: str, tmp_path: Path, cache: Path) -> None:
    path = tmp_path / kind
    if kind == "file":
        path.write_text("mine", encoding="utf-8")
    elif kind != "none":
        path.mkdir()
    if kind == "other":
        (path / "notes.txt").write_text("mine", encoding="utf-8")
    lines: dict[str, list[object]] = {
        "repair": ["repair", path],
        "merge": ["merge", tmp_path / "target", cache, path],
        "convert": ["convert", path, tmp_path / "target"],
        "export": ["export", path, "--out", tmp_path / "table.parquet"],
    }
    with unchanged(tmp_path, cache):
        assert str(path) in refused(2, *lines[verb])


# --- merge -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("first", "second"), ("first", "last"), ("last", "first", "second", "first")])
def test_merged_parts_are_the_whole(
    names: tuple[str, ...], tmp_path: Path, tiny_model: Path, data: Path, cache: Path, parts: dict[str, Path]
) -> None:
    sources = [parts[name] for name in names]
    with unchanged(*sources):
        outcome = done("merge", tmp_path / "c", *sources)
    assert outcome.out.startswith(f"Merged {len(names)} caches: {tmp_path / 'c'} holds 12 samples, ")
    assert outcome.err == ""
    assert stored(tmp_path / "c") == stored(cache)
    assert len(commits(tmp_path / "c")) == len({p.name for source in sources for p in commits(source)})
    done("verify", tmp_path / "c")
    with unchanged(tmp_path / "c"):  # again, and precompute finds all there
        done("merge", tmp_path / "c", *sources)
    assert "Cached 0 positions" in precompute(tiny_model, data, tmp_path / "c", *ALONE).out
    done(*train_line(tiny_model, tmp_path / "c", tmp_path / "o", "--data", data))


def test_the_order_of_sources_decides_nothing(tmp_path: Path, parts: dict[str, Path]) -> None:
    done("merge", tmp_path / "a", parts["first"], parts["last"])
    done("merge", tmp_path / "b", parts["last"], parts["first"])
    assert cache_bytes(tmp_path / "a") == cache_bytes(tmp_path / "b")


def test_a_cache_gains_from_another(tmp_path: Path, cache: Path, parts: dict[str, Path]) -> None:
    mine = copy_of(parts["first"], tmp_path / "c")
    with unchanged(parts["second"]):
        outcome = done("merge", mine, parts["second"])
    assert f"{mine} holds 12 samples, {facts(cache)['contents']['num_positions']} positions in " in outcome.out
    assert stored(mine) == stored(cache)
    done("verify", mine)


OTHERS: dict[str, list[object]] = {
    "another precision": ["--precision", "exact"],
    "another store": ["--store", "zarr"],
    "another top-k": ["--top-k", 9],
    "another min-mass": ["--min-mass", 0.5],
    "another length": ["--max-length", 512],
}


@pytest.mark.parametrize("name", OTHERS)
def test_merging_caches_of_different_identities_is_4(
    name: str, tmp_path: Path, tiny_model: Path, data: Path, parts: dict[str, Path]
) -> None:
    precompute(tiny_model, data, tmp_path / "other", *OTHERS[name])
    key = str(OTHERS[name][0]).removeprefix("--").replace("-", "_")
    mine = copy_of(parts["second"], tmp_path / "mine")
    with unchanged(tmp_path, parts["first"]):
        message = refused(4, "merge", tmp_path / "new", parts["first"], tmp_path / "other")
        assert key in message and "Nothing was written" in message
        assert str(tmp_path / "other") in message and str(parts["first"]) in message
        message = refused(4, "merge", mine, tmp_path / "other")
        assert key in message and "Nothing was changed" in message and str(mine) in message


def test_merging_caches_of_other_models_is_4(
    tmp_path: Path, other_model: Path, data: Path, parts: dict[str, Path]
) -> None:
    precompute(other_model, data, tmp_path / "other")
    with unchanged(tmp_path, parts["first"]):
        assert "model.weights: " in refused(4, "merge", tmp_path / "new", parts["first"], tmp_path / "other")


def test_merging_into_other_files_is_2(tmp_path: Path, parts: dict[str, Path]) -> None:
    (tmp_path / "notes.txt").write_text("precious", encoding="utf-8")
    with unchanged(tmp_path):
        assert "Nothing was changed" in refused(2, "merge", tmp_path, parts["first"])


def test_merging_unfinished_caches_is_5(tmp_path: Path, parts: dict[str, Path]) -> None:
    half = copy_of(parts["second"], tmp_path / "half", lambda c: (c / "contents.json").unlink())
    with unchanged(tmp_path):
        assert str(half) in refused(5, "merge", tmp_path / "new", parts["first"], half)


@pytest.mark.parametrize("verb", ["merge", "convert"])
def test_a_damaged_source_is_3_and_makes_no_cache(
    verb: str, tmp_path: Path, cache: Path, parts: dict[str, Path]
) -> None:
    bad = copy_of(cache, tmp_path / "bad")
    folder = shard_folders(bad)[-1]
    flip_byte(folder / "logprobs.arrow")
    line = ["merge", tmp_path / "c", parts["first"], bad] if verb == "merge" else ["convert", bad, tmp_path / "c"]
    with unchanged(bad, parts["first"]):
        assert str(folder / "logprobs.arrow") in refused(3, *line)
    refused(5, "inspect", tmp_path / "c")
    shutil.copytree(cache, bad, dirs_exist_ok=True)  # restored from a copy, the same command goes on
    done(*line)
    assert stored(tmp_path / "c") == stored(cache)
    done("verify", tmp_path / "c")


# --- convert ---------------------------------------------------------------------------------------------------------

PRECISIONS = list(MAX_ERRORS)
ALLOWED = [(old, new) for i, old in enumerate(PRECISIONS) for new in PRECISIONS[i:]]


@pytest.mark.parametrize("stores", [("zarr", "arrow"), ("arrow", "zarr"), ("zarr", "zarr")], ids="-".join)
@pytest.mark.parametrize(("old", "new"), ALLOWED)
def test_convert(
    old: str, new: str, stores: tuple[str, str], tmp_path: Path, caches: dict[tuple[str, str], Path]
) -> None:
    source, target = caches[stores[0], old], tmp_path / "c"
    with unchanged(source):
        outcome = done("convert", source, target, "--store", stores[1], "--precision", new)
    added = MAX_ERRORS[new] if new != old else 0
    expected = MAX_ERRORS[old] + added
    found, before = facts(target), facts(source)
    assert (found["store"], found["capture"]["precision"]) == (stores[1], new)
    assert found["capture"]["max_error"] == expected
    assert {**found["capture"], "precision": old, "max_error": MAX_ERRORS[old]} == before["capture"]
    assert {n: found[n] for n in ("model", "tokenizer", "model_name")} == {
        n: before[n] for n in ("model", "tokenizer", "model_name")
    }
    num_positions = before["contents"]["num_positions"]
    assert outcome.out.startswith(
        f"Converted {num_positions} positions to {target}: {stores[1]}, {new} (within {expected:g} nats), "
    )
    done("verify", target)
    given, got = LogitCache.open(source), LogitCache.open(target)
    before_them = {s.token_ids.tobytes(): s for s in given.samples()}
    assert len(before_them) == len(given) == len(got)
    for theirs in got.samples():  # in another order: units have other names
        mine = before_them[theirs.token_ids.tobytes()]
        assert mine.num_tokens_cut == theirs.num_tokens_cut
        if added:
            within(theirs.logprobs, mine.logprobs, added)
        else:
            assert record_bits(theirs.logprobs) == record_bits(mine.logprobs)


@pytest.mark.parametrize("precision", ["fine", "compact"])
@pytest.mark.parametrize("store", ["zarr", "arrow"])
def test_exact_numbers_made_coarser_are_what_precompute_makes_of_them(
    precision: str, store: str, tmp_path: Path, caches: dict[tuple[str, str], Path]
) -> None:
    done("convert", caches["zarr", "exact"], tmp_path / "c", "--store", store, "--precision", precision)
    assert cache_bytes(tmp_path / "c") == cache_bytes(caches[store, precision])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_there_and_back_gives_the_same_bytes(
    precision: str, tmp_path: Path, caches: dict[tuple[str, str], Path]
) -> None:
    done("convert", caches["zarr", precision], tmp_path / "a", "--store", "arrow")
    done("convert", tmp_path / "a", tmp_path / "z", "--store", "zarr")
    assert cache_bytes(tmp_path / "z") == cache_bytes(caches["zarr", precision])


def test_convert_without_a_flag_copies(tmp_path: Path, cache: Path) -> None:
    done("convert", cache, tmp_path / "c")
    assert cache_bytes(tmp_path / "c") == cache_bytes(cache)
    with unchanged(tmp_path):
        done("convert", cache, tmp_path / "c")


@pytest.mark.parametrize(("old", "new"), [(o, n) for o in PRECISIONS for n in PRECISIONS if (o, n) not in ALLOWED])
def test_converting_to_a_finer_precision_is_2(
    old: str, new: str, tmp_path: Path, caches: dict[tuple[str, str], Path]
) -> None:
    with unchanged(tmp_path):
        message = refused(2, "convert", caches["arrow", old], tmp_path / "c", "--precision", new)
    assert f"converting from precision {old} to {new}: " in message and "cannot be made finer" in message


def test_converting_into_another_cache_is_4(tmp_path: Path, cache: Path, parts: dict[str, Path]) -> None:
    mine = copy_of(parts["first"], tmp_path / "c")
    with unchanged(mine, cache):
        for more in (["--precision", "compact"], ["--store", "zarr"]):
            assert "Nothing was changed" in refused(4, "convert", cache, mine, *more)
    with unchanged(cache):
        refused(4, "convert", cache, cache, "--store", "zarr")  # not in place


# --- export ----------------------------------------------------------------------------------------------------------

SCHEMA = {
    "sample_id": pa.string(),
    "token_ids": pa.list_(pa.uint32()),
    "num_tokens_cut": pa.int64(),
    "positions": pa.list_(pa.int32()),
    "label_ids": pa.list_(pa.uint32()),
    "label_logprobs": pa.list_(pa.float32()),
    "alternative_ids": pa.list_(pa.list_(pa.uint32())),
    "alternative_logprobs": pa.list_(pa.list_(pa.float32())),
    "tail_logprobs": pa.list_(pa.float32()),
    "tail_group_logprobs": pa.list_(pa.list_(pa.float32())),
}


def check_table(path: Path, cache: Path) -> None:
    """The table holds every number of the cache, and nothing else."""
    table = pq.read_table(path)
    assert {field.name: field.type for field in table.schema} == SCHEMA
    rows, opened = table.to_pylist(), LogitCache.open(cache)
    assert len(rows) == len(opened)
    for row, sample in zip(rows, opened.samples(), strict=True):
        record = sample.logprobs
        assert row["token_ids"] == sample.token_ids.tolist()
        assert row["sample_id"] == sample_id(sample.token_ids).hex()
        assert row["num_tokens_cut"] == sample.num_tokens_cut
        for name in ("positions", "label_ids", "label_logprobs", "tail_logprobs"):
            assert row[name] == getattr(record, name).tolist(), name
        for i, present in enumerate(record.alternative_logprobs > -np.inf):
            assert row["alternative_ids"][i] == record.alternative_ids[i, present].tolist()
            assert row["alternative_logprobs"][i] == record.alternative_logprobs[i, present].tolist()
        groups = record.tail_group_logprobs
        assert row["tail_group_logprobs"] == ([[]] * len(record) if groups is None else groups.tolist())


@pytest.mark.parametrize("store", ["zarr", "arrow"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_exported_table_holds_the_cache(
    store: str, precision: str, tmp_path: Path, caches: dict[tuple[str, str], Path]
) -> None:
    source, out = caches[store, precision], tmp_path / "table.parquet"
    with unchanged(source):
        outcome = done("export", source, "--to", "parquet", "--out", out)
    assert outcome.out.startswith(f"Wrote 12 samples to {out} (parquet, ") and outcome.err == ""
    check_table(out, source)


def test_an_exported_table_leaves_out_what_is_absent(tmp_path: Path, tiny_model: Path, data: Path) -> None:
    precompute(tiny_model, data, tmp_path / "c", "--top-k", 100, "--min-mass", 0.4)
    done("export", tmp_path / "c", "--out", tmp_path / "table.parquet")
    check_table(tmp_path / "table.parquet", tmp_path / "c")
    lists = pq.read_table(tmp_path / "table.parquet")["alternative_ids"].to_pylist()
    assert len({len(row) for rows in lists for row in rows}) > 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_exported_table_holds_tail_groups_and_what_was_cut(precision: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    groups = make_groups(rng, VOCAB, 5)
    samples = [make_sample(rng, n, token_groups=groups) for n in (20, 2, 9, 30)]
    manifest = make_manifest("zarr", precision=precision, token_groups=groups)
    write_cache(tmp_path / "c", "zarr", [samples], manifest, groups)
    assert sum(s.num_tokens_cut for s in samples) > 0
    done("export", tmp_path / "c", "--out", tmp_path / "table.parquet")
    check_table(tmp_path / "table.parquet", tmp_path / "c")
    assert ", tail in 5 groups; " in done("inspect", tmp_path / "c").out


def test_exporting_to_a_file_that_is_there_is_2(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "table.parquet").write_text("precious", encoding="utf-8")
    with unchanged(tmp_path):
        message = refused(2, "export", cache, "--out", tmp_path / "table.parquet")
    assert f"{tmp_path / 'table.parquet'} exists" in message


def test_exporting_to_no_folder_is_1(tmp_path: Path, cache: Path) -> None:
    with unchanged(tmp_path):
        assert "No such file" in refused(1, "export", cache, "--out", tmp_path / "none" / "table.parquet")


def test_exporting_to_another_format_is_2(tmp_path: Path, cache: Path) -> None:
    with unchanged(tmp_path):
        assert "'--to'" in refused(2, "export", cache, "--to", "csv", "--out", tmp_path / "table.csv")


def test_exporting_a_damaged_cache_is_3_and_leaves_no_file(tmp_path: Path, cache: Path) -> None:
    bad = copy_of(cache, tmp_path / "c")
    flip_byte(shard_folders(bad)[-1] / "logprobs.arrow")
    with unchanged(tmp_path):
        refused(3, "export", bad, "--out", tmp_path / "table.parquet")


# --- caches at a URL -------------------------------------------------------------------------------------------------


def test_a_cache_that_a_writer_made_at_a_url_can_be_inspected(memory_url: str) -> None:
    write_cache(memory_url, "zarr", SHARDS, make_manifest("zarr", precision="fine"))
    found = facts(memory_url)
    assert found["contents"]["num_samples"] == sum(map(len, SHARDS)) and found["contents"]["num_shards"] == len(SHARDS)
    assert done("inspect", memory_url).out.startswith(f"{memory_url}: zarr cache, format version 2\n")
    assert done("verify", memory_url).out.startswith(f"{memory_url} is intact: {len(SHARDS)} shards, ")
    assert done("repair", memory_url).out == f"{memory_url} is intact; nothing was changed.\n"


@pytest.mark.parametrize("store", ["zarr", "arrow"])
def test_every_verb_takes_a_url(
    store: str, memory_url: str, tmp_path: Path, tiny_model: Path, data: Path, caches: dict[tuple[str, str], Path]
) -> None:
    local = caches[store, "fine"]
    line: list[Any] = [*precompute_line(tiny_model, data, local, *ALONE), "--store", store]
    line[line.index(local)] = memory_url
    num_positions = facts(local)["contents"]["num_positions"]
    assert done(*line).out == f"Cached {num_positions} positions of 12 samples in {memory_url}.\n"
    assert cache_bits(memory_url) == cache_bits(local)
    assert "12 samples were there already" in done(*line).out
    fs = fsspec.filesystem("memory")
    name = fs.find("/cli-test/cache/shards", withdirs=False)[-1]
    fs.pipe_file(name, fs.cat_file(name)[:-1] + b"!")
    assert logitcache("verify", memory_url).status == 3
    assert "1 bad shard dropped" in done("repair", memory_url).out
    refused(5, "inspect", memory_url)
    done(*line)
    assert cache_bits(memory_url) == cache_bits(local)
    done("merge", tmp_path / "merged", memory_url)
    done("convert", memory_url, tmp_path / "converted")
    for copy in (tmp_path / "merged", tmp_path / "converted"):
        assert cache_bytes(copy) == cache_bytes(local)
    done("export", memory_url, "--out", tmp_path / "table.parquet")
    check_table(tmp_path / "table.parquet", local)
    train = train_line(tiny_model, local, tmp_path / "o")
    done(*(memory_url if a is local else a for a in train))


def test_a_file_url_is_a_folder(tmp_path: Path, tiny_model: Path, data: Path, cache: Path) -> None:
    line: list[Any] = [*precompute_line(tiny_model, data, tmp_path, *ALONE)]
    line[line.index(tmp_path)] = f"file://{tmp_path}/c"
    done(*line)
    assert cache_bytes(tmp_path / "c") == cache_bytes(cache)
    assert facts(f"file://{tmp_path}/c") == facts(cache)


LINES: dict[str, list[object]] = {
    "inspect": ["inspect", "URL"],
    "verify": ["verify", "URL"],
    "repair": ["repair", "URL"],
    "merge from": ["merge", "NEW", "URL"],
    "merge to": ["merge", "URL", "CACHE"],
    "convert from": ["convert", "URL", "NEW"],
    "convert to": ["convert", "CACHE", "URL"],
    "export": ["export", "URL", "--out", "NEW"],
}


@pytest.mark.parametrize("name", LINES)
def test_an_unknown_protocol_is_2(name: str, tmp_path: Path, cache: Path) -> None:
    places = {"URL": "foo://x", "CACHE": cache, "NEW": tmp_path / "new"}
    with unchanged(tmp_path, cache):
        message = refused(2, *(places.get(str(a), a) for a in LINES[name]))
    assert "foo://x" in message and "Protocol not known: foo" in message


def test_precompute_and_train_with_an_unknown_protocol_are_2(tmp_path: Path, tiny_model: Path, data: Path) -> None:
    for line in (precompute_line(tiny_model, data, tmp_path), train_line(tiny_model, tmp_path, tmp_path / "o")):
        with unchanged(tmp_path):
            assert "Protocol not known: foo" in refused(2, *("foo://x" if a is tmp_path else a for a in line))


@pytest.mark.parametrize("known", [True, False], ids=["no server", "no credentials"])
@pytest.mark.parametrize("verb", ["inspect", "repair", "convert to"])
def test_a_bucket_that_cannot_be_reached_is_one_sentence(verb: str, known: bool, tmp_path: Path, cache: Path) -> None:
    pytest.importorskip("s3fs")
    environment = {n: v for n, v in os.environ.items() if not n.startswith("AWS_")} | {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "HOME": str(tmp_path),
    }
    if known:
        environment |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    places = {"URL": "s3://bucket/cache", "CACHE": cache, "NEW": tmp_path / "new"}
    line = [str(places.get(str(a), a)) for a in LINES[verb]]
    outcome = subprocess.run(
        [sys.executable, "-m", "logitcache", *line],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,  # it must not hang; this is no measurement
    )
    assert outcome.returncode in (1, 2), outcome.stderr
    assert outcome.stdout == "" and "Traceback" not in outcome.stderr
    (message,) = outcome.stderr.splitlines()
    assert message.startswith("logitcache: ") and message.endswith(".")


# --- shards on another disk ------------------------------------------------------------------------------------------


@pytest.fixture
def larger_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system where there is one: a rename to it would be refused."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as name:
        yield Path(name)


def test_a_job_whose_shards_are_moved_to_a_larger_disk_goes_on(
    tmp_path: Path, tiny_model: Path, data: Path, cache: Path, larger_disk: Path
) -> None:
    mine = tmp_path / "mine"
    half = text_data(tmp_path, 0, 6)
    precompute(tiny_model, half, mine, *ALONE)
    shutil.move(mine / "shards", larger_disk / "cache-shards")
    (mine / "shards").symlink_to(larger_disk / "cache-shards")
    assert "Cached" in precompute(tiny_model, data, mine, *ALONE).out
    assert by_tokens(list(LogitCache.open(mine).samples())) == by_tokens(list(LogitCache.open(cache).samples()))
    assert "is intact" in done("verify", mine).out
    assert "done" in done("status", mine).out
    done(*train_line(tiny_model, mine, tmp_path / "adapter"))
    flip_byte(shard_folders(mine)[0] / "logprobs.arrow")
    assert "1 bad shard dropped" in done("repair", mine).out
    precompute(tiny_model, data, mine, *ALONE)
    done("prune", mine, "--data", half, "--model", tiny_model)
    assert "is intact" in done("verify", mine).out and (mine / "shards").is_symlink()


@pytest.mark.parametrize("name", ["shards", "shard", "contents.json"])
def test_a_link_that_is_not_followed_is_2_for_every_verb_and_nothing_changes(
    name: str, tmp_path: Path, tiny_model: Path, data: Path, cache: Path
) -> None:
    mine, kept = copy_of(cache, tmp_path / "mine"), tmp_path / "kept"
    moved = {"shards": mine / "shards", "shard": shard_folders(mine)[0]}.get(name, mine / name)
    shutil.move(moved, kept)
    moved.symlink_to(tmp_path / "nowhere" if name == "shards" else kept)
    lines = [
        precompute_line(tiny_model, text_data(tmp_path), mine, "--shard-positions", 70),
        train_line(tiny_model, mine, tmp_path / "adapter", "--data", data),
        *(["repair", mine], ["merge", mine, cache], ["merge", tmp_path / "m", mine], ["convert", mine, tmp_path / "c"]),
        ["export", mine, "--to", "parquet", "--out", tmp_path / "x.parquet"],
        ["prune", mine, "--data", data, "--model", tiny_model],
        ["push", mine, "owner/name"],
    ]
    with unchanged(kept) if kept.is_dir() else nullcontext():
        for line in lines:
            message = refused(2, *line)
            assert "symbolic link" in message and str(moved) in message and "missing" not in message, line
    assert moved.is_symlink()
