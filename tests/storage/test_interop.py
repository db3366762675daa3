"""The format as a stranger meets it: a reader written from docs/format.md alone (tests/support/format_reader.py)
agrees with what was written and with `LogitCache`, and zarr, pyarrow, pandas, DuckDB, datasets and NumPy read the files
by themselves, with the page's own snippets."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest
import zarr
from numpy.typing import NDArray
from support import format_reader
from support.format_reader import FormatError, Sample, open_cache
from support.storage_forging import body_of, canonical, forge
from support.storage_samples import NO_TOKEN, STORES, TOP_K, VOCAB, make_manifest, make_sample, with_record

from logitcache.storage import (
    BaseLogprobs,
    CachedSample,
    CacheError,
    CacheWriter,
    LogitCache,
    Manifest,
    convert,
    export_parquet,
    merge,
)

pytestmark = pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3 specification")

MAX_ERROR = {"exact": 0.0, "fine": 1 / 64, "compact": 1 / 32}
LABEL_ERROR = {"exact": 0.0, "fine": 1 / 2048, "compact": 1 / 2048}
MASS_ERROR = {precision: np.expm1(error) + 1e-4 for precision, error in MAX_ERROR.items()}
DROPS_PER_NAT = {"fine": 32, "compact": 16}
NUM_GROUPS, NUM_DRAWS = 3, 7
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "format.md").read_text(encoding="utf-8")


class Case(NamedTuple):
    """What a cache of these tests is like."""

    store: str
    precision: str
    groups: int = 0
    draws: int = 0
    top_k: int = TOP_K
    steps: int = 1

    @property
    def group_error(self) -> float:
        """What the page promises of a tail group."""
        return 0.0 if self.precision == "exact" else 1 / (2 * self.steps) + 1 / 2048


EXTRAS = ((0, 0), (NUM_GROUPS, 0), (0, NUM_DRAWS), (NUM_GROUPS, 0, TOP_K, 4), (0, 0, 0), (NUM_GROUPS, NUM_DRAWS, 0, 4))
CASES = [Case(store, precision, *extra) for store in STORES for precision in MAX_ERROR for extra in EXTRAS]


def token_groups(vocab_size: int) -> NDArray[np.uint8]:
    return (np.arange(vocab_size) % NUM_GROUPS).astype(np.uint8)


def manifest_of(case: Case, vocab_size: int = VOCAB) -> Manifest:
    groups = token_groups(vocab_size) if case.groups else None
    kept = {"precision": case.precision, "num_draws": case.draws, "group_steps": case.steps}
    return make_manifest(case.store, vocab_size, case.top_k, token_groups=groups, **kept)  # type: ignore[arg-type]


def with_groups(rng: np.random.Generator, sample: CachedSample, groups: int) -> CachedSample:
    """The tail split at random; sometimes a group has nothing of it."""
    if not groups:
        return sample
    tail = sample.logprobs.tail_logprobs.astype(np.float64)
    share = rng.dirichlet(np.ones(groups), size=len(tail))
    share[:, 0] *= rng.random(len(tail)) < 0.8
    with np.errstate(divide="ignore"):
        split = tail[:, None] + np.log(share / share.sum(axis=1, keepdims=True))
    return with_record(sample, tail_group_logprobs=split.astype(np.float32))


def make_shards(case: Case, vocab_size: int = VOCAB) -> list[list[CachedSample]]:
    """Three shards; the second sample is captured twice, at overlapping positions and with other numbers."""
    rng = np.random.default_rng(0)
    twice = rng.integers(0, vocab_size, size=40, dtype=np.uint32)

    def sample(num_tokens: int, **capture: Any) -> CachedSample:
        return make_sample(rng, num_tokens, vocab_size, case.top_k, num_draws=case.draws, **capture)

    shards = [
        [sample(700), sample(0, token_ids=twice, positions=range(5, 25))],
        [sample(n) for n in range(2, 25)],
        [sample(0, token_ids=twice, positions=range(15, 35)), sample(9)],
    ]
    return [[with_groups(rng, sample, case.groups) for sample in shard] for shard in shards]


def write(path: Path, case: Case, shards: list[list[CachedSample]], vocab_size: int = VOCAB) -> Path:
    with CacheWriter(path, manifest_of(case, vocab_size), token_groups(vocab_size) if case.groups else None) as writer:
        for shard in shards:
            writer.commit(shard)
        writer.finalize()
    return path


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Path]:
    """A cache of every case."""
    root = tmp_path_factory.mktemp("interop")
    return {case: write(root / "-".join(map(str, case)), case, make_shards(case)) for case in CASES}


def body(path: Path) -> Any:
    return json.loads(path.read_bytes())["body"]


def shard_folders(cache: Path) -> list[Path]:
    """In the order of the contents, as the page names them."""
    folders = []
    for listed in body(cache / "contents.json")["shards"]:
        files = body(cache / "shards" / f"{listed['unit']}.json")["files"]
        text = json.dumps(files, sort_keys=True, separators=(",", ":")).encode()
        folders.append(cache / "shards" / f"{listed['unit']}-{hashlib.blake2b(text, digest_size=16).hexdigest()[:16]}")
    return folders


def assert_near(found: NDArray[Any], written: NDArray[Any], error: float) -> None:
    empty = np.isneginf(written)
    np.testing.assert_array_equal(np.isneginf(found), empty)
    np.testing.assert_array_less(np.abs(found[~empty] - written[~empty].astype(np.float64)), np.nextafter(error, 1))


def assert_holds(sample: Sample, written: CachedSample, case: Case) -> None:
    """The independent reader gives what was written, within the errors of the page."""
    record, precision = written.logprobs, case.precision
    np.testing.assert_array_equal(sample.token_ids, written.token_ids)
    np.testing.assert_array_equal(sample.positions, record.positions)
    assert sample.num_tokens_cut == written.num_tokens_cut
    present = ~np.isneginf(record.alternative_logprobs)
    np.testing.assert_array_equal(sample.alternative_ids[present], record.alternative_ids[present])
    assert_near(sample.alternative_logprobs, record.alternative_logprobs, MAX_ERROR[precision])
    assert_near(sample.label_logprobs, record.label_logprobs, LABEL_ERROR[precision])
    assert_near(sample.tail_logprobs, record.tail_logprobs, LABEL_ERROR[precision])
    if record.tail_group_logprobs is None:
        assert sample.tail_group_logprobs is None
    else:
        assert sample.tail_group_logprobs is not None
        assert_near(sample.tail_group_logprobs, record.tail_group_logprobs, case.group_error)
    assert_same_draws(sample, record)
    if sample.tail_sample_logprobs is not None and record.tail_sample_logprobs is not None:
        assert_near(sample.tail_sample_logprobs, record.tail_sample_logprobs, MAX_ERROR[precision])


def assert_same_draws(sample: Sample, record: BaseLogprobs) -> None:
    """The same tokens were drawn, where there is a tail."""
    assert (sample.tail_sample_ids is None) == (record.tail_sample_ids is None)
    if sample.tail_sample_ids is not None and record.tail_sample_ids is not None:
        present = np.isfinite(record.tail_logprobs)
        np.testing.assert_array_equal(sample.tail_sample_ids[present], record.tail_sample_ids[present])


def assert_same(sample: Sample, cached: CachedSample) -> None:
    """The independent reader and `LogitCache` give the same numbers, rounded to float32."""
    record = cached.logprobs
    np.testing.assert_array_equal(sample.token_ids, cached.token_ids)
    np.testing.assert_array_equal(sample.positions, record.positions)
    np.testing.assert_array_equal(sample.token_ids[sample.positions + 1], record.label_ids)
    assert sample.num_tokens_cut == cached.num_tokens_cut
    present = ~np.isneginf(sample.alternative_logprobs)
    np.testing.assert_array_equal(sample.alternative_ids[present], record.alternative_ids[present])
    for name in ("label_logprobs", "alternative_logprobs", "tail_logprobs"):
        np.testing.assert_array_equal(getattr(sample, name).astype(np.float32), getattr(record, name))
    if record.tail_group_logprobs is None:
        assert sample.tail_group_logprobs is None
    else:
        assert sample.tail_group_logprobs is not None
        np.testing.assert_array_equal(sample.tail_group_logprobs.astype(np.float32), record.tail_group_logprobs)
    assert_same_draws(sample, record)
    if sample.tail_sample_logprobs is not None and record.tail_sample_logprobs is not None:
        np.testing.assert_array_equal(sample.tail_sample_logprobs.astype(np.float32), record.tail_sample_logprobs)


# The independent reader


@pytest.mark.parametrize("case", CASES, ids=str)
def test_independent_reader_gives_what_was_written(caches: dict[Case, Path], case: Case) -> None:
    cache = open_cache(caches[case])
    captures = list(cache.captures())
    shards = {tuple(s.token_ids.tobytes() for s in shard): shard for shard in make_shards(case)}
    written = []
    for number in range(len(cache.contents["shards"])):  # shards stand in the order of the contents
        ids = [c.token_ids.tobytes() for c, i in zip(captures, cache.index["shard"], strict=True) if i == number]
        written += shards.pop(tuple(ids))
    assert not shards
    for capture, sample in zip(captures, written, strict=True):
        assert_holds(capture, sample, case)
    rows = np.concatenate([c.alternative_logprobs for c in captures])
    assert len(rows) > 256 and rows.shape[1] == case.top_k
    assert not case.top_k or (np.isneginf(rows).any() and np.isfinite(rows).any())
    if case.groups:
        np.testing.assert_array_equal(cache.token_groups, token_groups(VOCAB))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_independent_reader_agrees_with_the_package(caches: dict[Case, Path], case: Case) -> None:
    samples = list(open_cache(caches[case]).samples())
    with_package = list(LogitCache.open(caches[case]).samples())
    for sample, cached in zip(samples, with_package, strict=True):
        assert_same(sample, cached)
    assert max(len(s.positions) for s in samples if len(s.token_ids) == 40) == 30  # both captures of it


def with_sure_labels(sample: CachedSample) -> CachedSample:
    """Every seventh label has all of the mass."""
    record = sample.logprobs
    sure = np.arange(len(record)) % 7 == 0
    columns = {"label_logprobs": np.where(sure, np.float32(0), record.label_logprobs)}
    columns["tail_logprobs"] = np.where(sure, np.float32(-np.inf), record.tail_logprobs)
    if record.tail_sample_ids is not None and record.tail_sample_logprobs is not None:
        columns["tail_sample_ids"] = np.where(sure[:, None], np.uint32(NO_TOKEN), record.tail_sample_ids)
        columns["tail_sample_logprobs"] = np.where(sure[:, None], np.float32(-np.inf), record.tail_sample_logprobs)
    return with_record(sample, **columns)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_empty_tails(tmp_path: Path, case: Case) -> None:
    """With K = V - 1 a full row leaves nothing to the tail; where nothing is kept a sure label does."""
    rng = np.random.default_rng(1)
    vocab = TOP_K + 1
    sample = make_sample(rng, 60, vocab, case.top_k, num_draws=case.draws)
    if not case.top_k:
        sample = with_sure_labels(sample)
    written = [with_groups(rng, sample, case.groups)]
    path = write(tmp_path / "cache", case, [written], vocab)
    (sample,) = open_cache(path).samples()
    assert np.isneginf(sample.tail_logprobs).any() and np.isfinite(sample.tail_logprobs).any()
    assert_holds(sample, written[0], case)
    assert_same(sample, LogitCache.open(path).sample(0))


@pytest.mark.parametrize("store", STORES)
def test_converted_and_merged_caches_are_of_the_format_too(
    tmp_path: Path, caches: dict[Case, Path], store: str
) -> None:
    other = "arrow" if store == "zarr" else "zarr"
    convert(caches[Case(store, "exact", NUM_GROUPS)], tmp_path / "fine", store=other, precision="fine")
    convert(tmp_path / "fine", tmp_path / "compact", precision="compact")
    assert open_cache(tmp_path / "compact").manifest["capture"]["max_error"] > MAX_ERROR["fine"]
    case = Case(other, "fine", NUM_GROUPS)
    write(
        tmp_path / "more", case, [[with_groups(np.random.default_rng(2), make_sample(np.random.default_rng(2), 11), 3)]]
    )
    merge([tmp_path / "fine", tmp_path / "more"], tmp_path / "merged")
    for name in ("fine", "compact", "merged"):
        samples = list(open_cache(tmp_path / name).samples())
        for sample, cached in zip(samples, LogitCache.open(tmp_path / name).samples(), strict=True):
            assert_same(sample, cached)


@pytest.mark.parametrize("store", STORES)
def test_independent_reader_sees_any_damage(tmp_path: Path, store: str) -> None:
    """One bit of any file, and any file that is missing; so what it accepts it has compared."""
    case = Case(store, "fine", NUM_GROUPS)
    rng = np.random.default_rng(3)
    path = write(tmp_path / "cache", case, [[with_groups(rng, make_sample(rng, 12), NUM_GROUPS)]])
    assert len(list(open_cache(path).samples())) == 1
    files = [p for p in path.rglob("*") if p.is_file() and p.name != "writer.lock"]
    for file in files:
        data = file.read_bytes()
        place = -1 if file.name == "token_groups.npy" else len(data) // 2
        damaged = bytearray(data)
        damaged[place] ^= 1
        file.write_bytes(damaged)
        with pytest.raises((FormatError, ValueError)):
            list(open_cache(path).samples())
        file.unlink()
        with pytest.raises((FormatError, FileNotFoundError)):
            list(open_cache(path).samples())
        file.write_bytes(data)
    assert len(list(open_cache(path).samples())) == 1
    for block in ([0, 3, 1], [1, 3, 0]):
        with pytest.raises(FormatError, match="short or damaged"):
            list(format_reader.blocks_of(b"abc", [block]))


Forgery = tuple[str, str, Any]
"""A file, a field of it, and what it says instead, under checksums that match."""

NO_STRINGS = [" a", "a ", "a  b", "a\n", "a\u200b", "a\ue000", "x" * 1001]
NO_STRINGS += ["s3://b/x?y", "x://h/a#b", "a?b=c", "u:p@h/x", "https://t@h/x"]
STRINGS = ["", "é" * 1000, "a?b", "a@b", "git@h:a/b", "hf://a@b", "x://h a?b"]
NO_MANIFEST: dict[str, list[Any]] = {
    "format_version": [1, 3, 2.0, True, "2"],
    "reader_features": [[], ["tail-groups", "x"], ["tail-groups", "tail-samples"], "tail-groups"],
    "writer_features": [[" a"], ["a\n"], [1], None],
    "store": ["Zarr", "", None],
    "model.weights": ["A" * 32, "a" * 31, "a" * 32 + "\n"],
    "model.vocab_size": [1, 2**24, 40.0],
    "model.dtype": ["", "_a", "a" * 65, "a\n"],
    "model.tf32": [0, None],
    "model.config": ["", "[]", '{"a": 1}', '{"b":1,"a":1}', '{"a":1,"a":1}', '{"a":1.50}', '{"a":"é"}'],
    "model.config ": ['{"a":"%s"}' % ("x" * (2**18 - 7)), *('{"a":"%s"}' % (mark * 1500) for mark in "[{:,")],
    "tokenizer.fingerprint": ["", "x" * 32],
    "capture.top_k": [-1, 40, 2**18, 5.0],
    "capture.max_length": [1, 2**32],
    "capture.min_mass": [0.0, 1.5, 1],
    "capture.precision": ["Fine", "exact"],
    "capture.max_error": [0.0, 0.01, 0.51, 0],
    "capture.num_tail_groups": [0, 1, 257],
    "capture.tail_partition": ["", "x"],
    "capture.group_steps_per_nat": [0, 2, 5, True],
    "model_name": NO_STRINGS,
    "created_with": [{" a": "b"}, {"a": "b  c"}, {"a": 1}, {f"a{i}": "" for i in range(33)}],
}
REFUSED: list[Forgery] = [("manifest", field, value) for field, values in NO_MANIFEST.items() for value in values]
REFUSED += [("commit", "kept_mass", value) for value in (-1.0, 1e9, 1)]
REFUSED += [("commit", "num_samples", 0), ("commit", "num_positions", 1), ("commit", "num_tokens", 1)]
REFUSED += [("commit", "identity", "a" * 32), ("commit", "unit", "a" * 32), ("commit", "chat_template", "x")]
REFUSED += [("commit", "blocks.positions", blocks) for blocks in ([], [[0, 1, 1]], [[0, 1]], [[-1, 1, 1]])]
REFUSED += [("contents", "manifest", "a" * 32), ("contents", "num_samples", 1), ("contents", "shards", [])]
TAKEN: list[Forgery] = [("manifest", "model_name", text) for text in STRINGS]
TAKEN += [("manifest", "writer_features", ["b", "a"]), ("manifest", "created_with", {f"a{i}": "" for i in range(32)})]
TAKEN += [("commit", "kept_mass", value) for value in (0.0, 1e-5, 1.0)]
OPENED: list[Forgery] = [
    *(("manifest", "model.config", text) for text in ("{}", '{"a":Infinity}', '{"a":"%s"}' % ("[" * 1100))),
    *[("manifest", "capture.min_mass", 1e-5), ("manifest", "capture.max_error", 0.5), ("manifest", "tokenizer", None)],
]
"""With another identity: opened, though no record is of it."""


def forged(tmp_path: Path, cache: Path, forgery: Forgery) -> Path:
    path = Path(shutil.copytree(cache, tmp_path / "forged"))
    file, field, value = forgery
    found = body_of(path, file)
    *groups, last = field.strip().split(".")
    target = found
    for group in groups:
        target = target[group]
    target[last] = value
    forge(path, file, canonical(found))
    return path


@pytest.mark.parametrize("forgery", REFUSED, ids=lambda f: f"{f[0]}-{f[1]}-{f[2]!r:.20}")
def test_both_readers_refuse_what_the_page_refuses(tmp_path: Path, caches: dict[Case, Path], forgery: Forgery) -> None:
    path = forged(tmp_path, caches[Case("zarr", "fine", NUM_GROUPS)], forgery)
    with pytest.raises(FormatError):
        list(open_cache(path).samples())
    with pytest.raises(CacheError):
        list(LogitCache.open(path).samples())


@pytest.mark.parametrize("forgery", TAKEN + OPENED, ids=lambda f: f"{f[0]}-{f[1]}-{f[2]!r:.20}")
def test_both_readers_take_what_the_page_allows(tmp_path: Path, caches: dict[Case, Path], forgery: Forgery) -> None:
    path = forged(tmp_path, caches[Case("zarr", "fine", NUM_GROUPS)], forgery)
    cache, other = LogitCache.open(path), open_cache(path)
    if forgery in TAKEN:
        assert len(list(other.samples())) == len(list(cache.samples()))


# Other tools


def snippets() -> dict[str, str]:
    """The two halves of the page's Python, by store."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    halves = re.split(r"\n\n", code)
    return {"zarr" if "zarr.open_group" in half else "arrow": half for half in halves}


def captures_by_shard(cache: Path) -> Iterator[tuple[Path, list[Sample]]]:
    opened = open_cache(cache)
    captures = list(opened.captures())
    for number, folder in enumerate(shard_folders(cache)):
        yield folder, [c for c, i in zip(captures, opened.index["shard"], strict=True) if i == number]


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("precision", ["fine", "compact"])
def test_snippets_of_the_page(caches: dict[Case, Path], store: str, precision: str) -> None:
    code = snippets()[store]
    if precision == "compact" and store == "arrow":
        assert " / -32 " in code and "compact: -16" in code
        code = code.replace(" / -32 ", " / -16 ")
    for folder, samples in captures_by_shard(caches[Case(store, precision, NUM_GROUPS)]):
        scope: dict[str, Any] = {"np": np, "zarr": zarr, "pyarrow": pa, "shard": str(folder)}
        exec(code, scope)
        expected = np.concatenate([s.alternative_logprobs for s in samples])
        present = np.isfinite(expected)
        np.testing.assert_array_equal(scope["logprobs"][present], expected[present])
        ids = scope["ids"] if "ids" in scope else scope["group"]["alternative_ids"][:]
        np.testing.assert_array_equal(ids, np.concatenate([s.alternative_ids for s in samples]))


@pytest.mark.parametrize("store", STORES)
def test_snippets_of_the_page_read_draws_in_the_same_way(caches: dict[Case, Path], store: str) -> None:
    code = snippets()[store].replace("alternative_", "tail_sample_")
    for folder, samples in captures_by_shard(caches[Case(store, "fine", 0, NUM_DRAWS)]):
        scope: dict[str, Any] = {"np": np, "zarr": zarr, "pyarrow": pa, "shard": str(folder)}
        exec(code, scope)
        expected = np.concatenate([s.tail_sample_logprobs for s in samples])
        present = np.isfinite(expected)
        np.testing.assert_array_equal(scope["logprobs"][present], expected[present])
        ids = scope["ids"] if "ids" in scope else scope["group"]["tail_sample_ids"][:]
        np.testing.assert_array_equal(ids, np.concatenate([s.tail_sample_ids for s in samples]))


@pytest.mark.parametrize("precision", MAX_ERROR)
@pytest.mark.parametrize("extra", EXTRAS)
def test_zarr_reads_every_array(caches: dict[Case, Path], precision: str, extra: tuple[int, int]) -> None:
    cache = caches[Case("zarr", precision, *extra)]
    capture = open_cache(cache).manifest["capture"]
    for folder in shard_folders(cache):
        commit = body(folder.parent / f"{folder.name.split('-')[0]}.json")
        files = {listed["name"]: (folder / listed["name"]).read_bytes() for listed in commit["files"]}
        columns = format_reader.decode_zarr(files, commit, capture)
        arrays = dict(zarr.open_group(str(folder), mode="r").arrays())
        assert arrays.keys() == columns.keys()
        for name, values in columns.items():
            array = arrays[name]
            assert array.dtype == values.dtype
            np.testing.assert_array_equal(np.asarray(array[:]), values)
            steps = {"label_steps": 1024, "tail_steps": 1024, "tail_group_steps": capture["group_steps_per_nat"]}
            steps |= dict.fromkeys(("alternative_drops", "tail_sample_drops"), DROPS_PER_NAT.get(precision, 0))
            assert array.attrs.get("steps_per_nat") == steps.get(name)


def row_masses(samples: list[Sample]) -> tuple[NDArray[Any], NDArray[Any], list[int | None]]:
    """p(label), p of the alternatives and the tail, and the top alternative, of every row."""
    label = np.concatenate([np.exp(s.label_logprobs) for s in samples])
    others = np.concatenate([np.exp(s.alternative_logprobs).sum(axis=1) + np.exp(s.tail_logprobs) for s in samples])
    if not samples[0].alternative_ids.shape[1]:
        return label, others, [None] * len(label)
    first = np.concatenate([s.alternative_logprobs[:, 0] for s in samples])
    ids = np.concatenate([s.alternative_ids[:, 0] for s in samples])
    return label, others, [int(i) if np.isfinite(x) else None for i, x in zip(ids, first, strict=True)]


def assert_masses(found: NDArray[Any], samples: list[Sample], precision: str, float32: bool = False) -> None:
    """found: a row each of p(label), the rest, and the top alternative or None."""
    label, others, top = row_masses(samples)
    error = 1e-6 if float32 else 1e-12
    np.testing.assert_allclose([row[0] for row in found], label, atol=error)
    np.testing.assert_allclose([row[1] for row in found], others, atol=error)
    np.testing.assert_allclose([row[0] + row[1] for row in found], 1.0, atol=MASS_ERROR[precision])
    assert [row[2] for row in found] == top


@pytest.mark.parametrize("precision", MAX_ERROR)
def test_pyarrow_and_pandas_read_the_rows(caches: dict[Case, Path], precision: str) -> None:
    for folder, samples in captures_by_shard(caches[Case("arrow", precision)]):
        rows = pa.ipc.open_file(folder / "logprobs.arrow").read_all().to_pandas()
        tokens = pa.ipc.open_file(folder / "samples.arrow").read_all().to_pandas()
        assert [t.tolist() for t in tokens["token_ids"]] == [s.token_ids.tolist() for s in samples]
        assert [p.tolist() for p in tokens["positions"]] == [s.positions.tolist() for s in samples]
        assert list(tokens["sample_id"]) == [format_reader.sample_id(s.token_ids) for s in samples]
        found = []
        for row in rows.itertuples():
            if precision == "exact":
                label, tail = np.exp(np.float64(row.label_logprobs)), np.exp(np.float64(row.tail_logprobs))
                logprobs = row.alternative_logprobs.astype(np.float64)
            else:
                label, tail = (0 if x == 2**32 - 1 else np.exp(-x / 1024) for x in (row.label_steps, row.tail_steps))
                drops = row.alternative_drops_low + 256 * row.alternative_drops_high.astype(np.int64)
                logprobs = -np.cumsum(drops) / DROPS_PER_NAT[precision]
                logprobs[drops == 65535] = -np.inf
            ids = row.alternative_ids_low + 65536 * row.alternative_ids_high.astype(np.uint32)
            top = int(ids[0]) if np.isfinite(logprobs[0]) else None
            found.append((label, np.exp(logprobs).sum() + tail, top))
        assert_masses(found, samples, precision)


STEPS_QUERY = """
with numbered as (select *, row_number() over () as row_number from rows),
drops as (
    select row_number, j, alternative_ids_low[j] + 65536 * alternative_ids_high[j]::bigint as id,
        alternative_drops_low[j] + 256 * alternative_drops_high[j]::bigint as fall
    from numbered, range(1, {k} + 1) as places(j)
),
alternatives as (
    select row_number, j, id, exp(-sum(fall) over (partition by row_number order by j) / {steps}.0) as p
    from drops where fall <> 65535
),
sums as (select row_number, sum(p) as mass, min_by(id, j) as top from alternatives group by row_number)
select case when label_steps = 4294967295 then 0 else exp(label_steps / -1024.0) end as label,
    coalesce(mass, 0) + case when tail_steps = 4294967295 then 0 else exp(tail_steps / -1024.0) end as others,
    top
from numbered left join sums using (row_number) order by row_number
"""
EXACT_QUERY = """
select exp(label_logprobs::double) as label,
    list_sum([exp(x::double) for x in alternative_logprobs::float[]]) + exp(tail_logprobs::double) as others,
    case when alternative_logprobs[1] = '-infinity' then null
        else alternative_ids_low[1] + 65536 * alternative_ids_high[1]::bigint end as top
from rows
"""


@pytest.mark.parametrize("precision", MAX_ERROR)
def test_duckdb_reads_the_rows(caches: dict[Case, Path], precision: str) -> None:
    duckdb = pytest.importorskip("duckdb")
    steps = DROPS_PER_NAT.get(precision)
    query = EXACT_QUERY if steps is None else STEPS_QUERY.format(k=TOP_K, steps=steps)
    for folder, samples in captures_by_shard(caches[Case("arrow", precision)]):
        with duckdb.connect() as connection:
            connection.register("rows", pa.ipc.open_file(folder / "logprobs.arrow").read_all())
            assert_masses(connection.sql(query).fetchall(), samples, precision)


EXPORT_QUERY = """
with rows as (
    select row_number() over () as place, unnest(label_logprobs) as label, unnest(alternative_ids) as ids,
        unnest(alternative_logprobs) as logprobs, unnest(tail_logprobs) as tail
    from read_parquet($file)
)
select exp(label::double), coalesce(list_sum([exp(x::double) for x in logprobs]), 0) + exp(tail::double), ids[1]
from rows
"""


def assert_draws_of_table(row: dict[str, Any], sample: Sample) -> None:
    """The columns are there exactly where the cache has draws, with empty lists where there is no tail."""
    names = {"tail_sample_ids", "tail_sample_logprobs"}
    if sample.tail_sample_ids is None or sample.tail_sample_logprobs is None:
        assert not names & row.keys()
        return
    for name, values in (("ids", sample.tail_sample_ids), ("logprobs", sample.tail_sample_logprobs.astype(np.float32))):
        drawn = zip(sample.tail_logprobs, values.tolist(), strict=True)
        assert row[f"tail_sample_{name}"] == [v if np.isfinite(tail) else [] for tail, v in drawn]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_exported_parquet_is_read_by_other_tools(tmp_path: Path, caches: dict[Case, Path], case: Case) -> None:
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    file = tmp_path / "cache.parquet"
    samples = list(open_cache(caches[case]).samples())
    assert export_parquet(caches[case], file) == len(samples)

    frame = pandas.read_parquet(file)
    assert list(frame["sample_id"]) == [format_reader.sample_id(s.token_ids).hex() for s in samples]
    found = []
    for row, sample in zip(frame.itertuples(), samples, strict=True):
        np.testing.assert_array_equal(row.token_ids, sample.token_ids)
        np.testing.assert_array_equal(row.positions, sample.positions)
        np.testing.assert_array_equal(row.label_ids, sample.token_ids[sample.positions + 1])
        for label, ids, logprobs, tail in zip(
            row.label_logprobs, row.alternative_ids, row.alternative_logprobs, row.tail_logprobs, strict=True
        ):
            mass = np.exp(logprobs.astype(np.float64)).sum() + np.exp(np.float64(tail))
            found.append((np.exp(np.float64(label)), mass, int(ids[0]) if len(ids) else None))
    assert_masses(found, samples, case.precision, float32=True)

    as_dataset = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "datasets"))
    for row, sample in zip(as_dataset, samples, strict=True):
        assert row["token_ids"] == sample.token_ids.tolist()
        assert row["positions"] == sample.positions.tolist()
        np.testing.assert_array_equal(np.float32(row["label_logprobs"]), sample.label_logprobs.astype(np.float32))
        assert [len(r) for r in row["alternative_ids"]] == np.isfinite(sample.alternative_logprobs).sum(axis=1).tolist()
        assert_draws_of_table(row, sample)

    duckdb = pytest.importorskip("duckdb")
    with duckdb.connect() as connection:
        found = connection.execute(EXPORT_QUERY, {"file": str(file)}).fetchall()
    assert_masses(found, samples, case.precision, float32=True)


@pytest.mark.parametrize("store", STORES)
def test_index_finds_a_sample(caches: dict[Case, Path], store: str) -> None:
    """NumPy finds the shard and the rows of a sample by its tokens; nothing but those rows need be read."""
    cache = caches[Case(store, "exact")]
    index = np.load(cache / body(cache / "contents.json")["index"]["name"], allow_pickle=False)
    wanted = make_shards(Case(store, "exact"))[1][7]
    key = np.frombuffer(hashlib.blake2b(wanted.token_ids.astype("<u4").tobytes(), digest_size=16).digest(), "<u8")
    (place,) = np.flatnonzero((index["sample_id"] == key).all(axis=1))
    same_shard = np.flatnonzero(index["shard"][:place] == index["shard"][place])
    start = int(index["num_positions"][same_shard].sum())
    rows = slice(start, start + int(index["num_positions"][place]))
    folder = shard_folders(cache)[index["shard"][place]]
    if store == "zarr":
        found = zarr.open_group(str(folder), mode="r")["label_logprobs"][rows]
    else:
        found = pa.ipc.open_file(folder / "logprobs.arrow").read_all()["label_logprobs"].to_numpy()[rows]
    np.testing.assert_array_equal(found, wanted.logprobs.label_logprobs)
    assert index["num_tokens"][place] == len(wanted.token_ids)
    assert index["num_cut"][place] == wanted.num_tokens_cut
