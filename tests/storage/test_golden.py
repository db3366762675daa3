"""The committed caches of format version 2 stay readable, byte for byte as they are: golden*/README.md."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.format_reader import FormatError, Sample, open_cache
from support.storage_samples import NO_TOKEN, refused, tree

from logitcache.storage import (
    BaseLogprobs,
    CachedSample,
    CacheWriter,
    LogitCache,
    UnsupportedFormat,
    data_samples,
    export_parquet,
    merge,
    repair,
    sample_id,
    verify,
)
from logitcache.storage.data_sets import positions_of
from logitcache.storage.job_status import status

FOLDERS = [Path(__file__).resolve().parents[1] / name for name in ("golden", "golden_draws", "golden_label")]
CACHES = {"zarr": "fine", "arrow": "fine", "zarr-exact": "exact", "arrow-exact": "exact"}
ERRORS = {"exact": (0.0, 0.0, 0.0), "fine": (1 / 64, 1 / 2048, 1 / 2048)}
"""Of alternatives, draws; label, tail; tail groups, but for their own rounding."""
GROUP_ERRORS = {"golden": 1 / 2, "golden_draws": 1 / 8}
"""That rounding, of steps of 1 and 1/4 nat."""
NOT_SUMMED = {"SHA256SUMS", "README.md", ".gitattributes"}

VERSION_1 = FOLDERS[0].with_name("golden_v1")

every_folder = pytest.mark.parametrize("golden", FOLDERS, ids=lambda folder: folder.name)
every_cache = pytest.mark.parametrize("name", CACHES)


def expected(golden: Path) -> Any:
    return json.loads((golden / "expected.json").read_text(encoding="utf-8"))


def expected_rows(golden: Path) -> dict[tuple[int, ...], dict[int, dict[str, Any]]]:
    """By tokens and position: what was given to the writer. The sample that was captured twice is one here."""
    samples: dict[tuple[int, ...], dict[int, dict[str, Any]]] = {}
    for capture in [capture for shard in expected(golden)["shards"] for capture in shard]:
        rows = samples.setdefault(tuple(capture["token_ids"]), {})
        names = {"label_logprobs", "alternatives", "tail_logprobs", "tail_group_logprobs", "draws"} & capture.keys()
        for row, position in enumerate(capture["positions"]):
            found = {name: capture[name][row] for name in names}
            assert rows.setdefault(position, found) == found
    return samples


def assert_near(found: NDArray[Any], numbers: list[float | None], error: float) -> None:
    written = np.array([-np.inf if x is None else x for x in numbers])
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(written))
    present = np.isfinite(written)
    assert (np.abs(found[present].astype(np.float64) - written[present]) <= error).all()


def assert_rows(sample: Any, rows: dict[int, dict[str, Any]], precision: str, golden: Path) -> None:
    """sample: of either reader, with positions and log-probabilities."""
    for_alternatives, for_masses, for_groups = ERRORS[precision]
    for_groups += GROUP_ERRORS.get(golden.name, 0.0) if precision != "exact" else 0.0
    assert sample.positions.tolist() == sorted(rows)
    for i, position in enumerate(sorted(rows)):
        row = rows[position]
        assert_near(sample.label_logprobs[i : i + 1], [row["label_logprobs"]], for_masses)
        assert_near(sample.tail_logprobs[i : i + 1], [row["tail_logprobs"]], for_masses)
        if "tail_group_logprobs" in row:
            assert_near(sample.tail_group_logprobs[i], row["tail_group_logprobs"], for_groups)
        else:
            assert sample.tail_group_logprobs is None
        count = len(row["alternatives"])
        assert sample.alternative_ids[i, :count].tolist() == [token for token, _ in row["alternatives"]]
        absent: list[float | None] = [None] * (sample.alternative_ids.shape[1] - count)
        assert_near(sample.alternative_logprobs[i], [x for _, x in row["alternatives"]] + absent, for_alternatives)
        if "draws" not in row:
            assert sample.tail_sample_ids is None
        elif row["draws"]:
            assert sample.tail_sample_ids[i].tolist() == [token for token, _ in row["draws"]]
            assert_near(sample.tail_sample_logprobs[i], [x for _, x in row["draws"]], for_alternatives)
        else:
            assert np.isneginf(sample.tail_sample_logprobs[i]).all()


@every_folder
def test_bytes_are_those_committed(golden: Path) -> None:
    """The sums list every file and no other, and nothing has changed one: no rewrite, no line endings."""
    lines = (golden / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    listed = {name: digest for digest, name in (line.split("  ") for line in lines)}
    files = {p.relative_to(golden).as_posix(): p for p in golden.rglob("*") if p.is_file()}
    assert listed.keys() == files.keys() - NOT_SUMMED
    assert {name.split("/")[0] for name in listed} == {"expected.json", *CACHES}
    for name, digest in listed.items():
        assert hashlib.sha256(files[name].read_bytes()).hexdigest() == digest, name


@every_folder
def test_expected_rows_have_every_kind(golden: Path) -> None:
    """Captured twice, full, short and without alternatives, an empty tail, an empty group of a tail that is not; in
    draws a token alone, and one that was drawn again."""
    captures = [capture for shard in expected(golden)["shards"] for capture in shard]
    assert len(expected(golden)["shards"]) == 2 and len(expected_rows(golden)) == len(captures) - 1
    rows = [row for sample in expected_rows(golden).values() for row in sample.values()]
    assert {len(row["alternatives"]) for row in rows} == set(range(expected(golden)["top_k"] + 1))
    assert any(row["tail_logprobs"] is None for row in rows)
    if expected(golden)["top_k"]:
        assert any(row["tail_logprobs"] is not None and None in row["tail_group_logprobs"] for row in rows)
    else:
        assert "tail_group_logprobs" not in rows[0]
    assert ("draws" in rows[0]) == (golden.name == "golden_draws")
    if "draws" in rows[0]:
        assert {len({token for token, _ in row["draws"]}) for row in rows} == set(range(7))
        assert all(bool(row["draws"]) == (row["tail_logprobs"] is not None) for row in rows)


@every_folder
@every_cache
def test_package_reads_golden_cache(golden: Path, name: str) -> None:
    cache = LogitCache.open(golden / name)
    rows = expected_rows(golden)
    assert len(cache) == len(rows) and cache.num_shards == 2
    np.testing.assert_array_equal(cache.token_groups(), expected(golden)["token_groups"])
    seen = set()
    for sample in cache.samples():
        tokens = tuple(sample.token_ids.tolist())
        assert_rows(sample.logprobs, rows[tokens], CACHES[name], golden)
        np.testing.assert_array_equal(sample.logprobs.label_ids, sample.token_ids[sample.logprobs.positions + 1])
        assert cache.lookup(sample.token_ids).equals(sample.logprobs)
        seen.add(tokens)
    assert seen == rows.keys()


@every_folder
@every_cache
def test_independent_reader_reads_golden_cache(golden: Path, name: str) -> None:
    cache = open_cache(golden / name)
    np.testing.assert_array_equal(cache.token_groups, expected(golden)["token_groups"])
    samples: list[Sample] = list(cache.samples())
    rows = expected_rows(golden)
    assert sorted(tuple(s.token_ids.tolist()) for s in samples) == sorted(rows)
    for sample in samples:
        assert_rows(sample, rows[tuple(sample.token_ids.tolist())], CACHES[name], golden)
    captures = [capture for shard in expected(golden)["shards"] for capture in shard]
    written = sorted((c["token_ids"], c["positions"], c["num_tokens_cut"]) for c in captures)
    assert written == sorted((c.token_ids.tolist(), c.positions.tolist(), c.num_tokens_cut) for c in cache.captures())


@every_folder
@every_cache
def test_both_readers_read_the_data_sets(golden: Path, name: str) -> None:
    """Names, samples, positions, and where cross-entropy does not count; and what the two of them name together."""
    written = {
        data_set["name"]: {
            sample_id(np.array(s["token_ids"], dtype=np.uint32)): dict(
                zip(s["positions"], s["cross_entropy"], strict=True)
            )
            for s in data_set["samples"]
        }
        for data_set in expected(golden)["data_sets"]
    }
    assert len(written) == 2 and any(not all(p.values()) for s in written.values() for p in s.values())
    other = open_cache(golden / name)
    assert other.data_sets() == other.recorded_data_sets() == written
    assert other.learnt() == {key: runs for samples in written.values() for key, runs in samples.items()}
    cache = LogitCache.open(golden / name)
    found = {entry.name: dict(cache.data_set(entry).samples()) for entry in cache.data_sets}
    pairs = {n: {key: positions_of(runs) for key, runs in samples.items()} for n, samples in found.items()}
    assert {n: {k: dict(zip(*map(list, p), strict=True)) for k, p in s.items()} for n, s in pairs.items()} == written
    named = data_samples(cache)
    assert (len(named.samples), named.num_other_samples, named.num_other_positions) == (4, 0, 0)


@every_folder
@every_cache
def test_golden_cache_is_intact(golden: Path, name: str, tmp_path: Path) -> None:
    report = verify(golden / name)
    assert report.problems == ()
    captures = [capture for shard in expected(golden)["shards"] for capture in shard]
    assert report.num_positions == sum(len(capture["positions"]) for capture in captures)
    assert export_parquet(golden / name, tmp_path / "golden.parquet") == len(expected_rows(golden))
    assert not (golden / name / "writer.lock").exists()  # reading leaves nothing behind


@every_folder
@every_cache
def test_writer_goes_on_with_a_golden_cache(golden: Path, name: str, tmp_path: Path) -> None:
    """A copy gains a shard; what was there stays and is still read."""
    shutil.copytree(golden / name, tmp_path / "cache")
    before = LogitCache.open(golden / name)
    token_ids = np.array([1, 2, 3], dtype=np.uint32)
    nothing = np.full((1, expected(golden)["top_k"]), -np.inf, dtype=np.float32)
    certain = BaseLogprobs(
        positions=np.array([1], dtype=np.int32),
        label_ids=token_ids[2:],
        label_logprobs=np.zeros(1, dtype=np.float32),
        alternative_ids=np.full(nothing.shape, NO_TOKEN, dtype=np.uint32),
        alternative_logprobs=nothing,
        tail_logprobs=np.full(1, -np.inf, dtype=np.float32),
        tail_group_logprobs=nothing[:, :2] if nothing.shape[1] else None,
    )
    if num_draws := before.manifest.capture.num_tail_samples:
        no_draws = np.full((1, num_draws), -np.inf, dtype=np.float32)
        ids = np.full(no_draws.shape, NO_TOKEN, dtype=np.uint32)
        certain = replace(certain, tail_sample_ids=ids, tail_sample_logprobs=no_draws)
    with CacheWriter(tmp_path / "cache", before.manifest, before.token_groups()) as writer:
        writer.commit([CachedSample(token_ids, certain)])
        writer.finalize()
    after = LogitCache.open(tmp_path / "cache")
    assert len(after) == len(before) + 1 and token_ids in after
    rows = expected_rows(golden)
    for cached in open_cache(tmp_path / "cache").samples():
        tokens = tuple(cached.token_ids.tolist())
        if tokens != (1, 2, 3):
            assert_rows(cached, rows.pop(tokens), CACHES[name], golden)
    assert not rows


@pytest.mark.parametrize("name", ["zarr", "arrow"])
def test_a_cache_of_version_1_is_refused_by_name_and_left_as_it_is(name: str, tmp_path: Path) -> None:
    """By every way in; the message says which version and the one thing to do."""
    path, own = Path(shutil.copytree(VERSION_1 / name, tmp_path / "old")), LogitCache.open(FOLDERS[0] / name)
    for call in (
        lambda: LogitCache.open(path),
        lambda: verify(path),
        lambda: repair(path),
        lambda: status(path),
        lambda: merge([path], tmp_path / "merged"),
        lambda: CacheWriter(path, own.manifest, own.token_groups()),
    ):
        message = refused(UnsupportedFormat, "unsupported-format", call)
        assert f"{path}/manifest.json" in message and "found version 1" in message
        assert "`logitcache precompute` into a new folder" in message
    assert tree(path) == tree(VERSION_1 / name)
    with pytest.raises(FormatError):
        open_cache(path)
