"""What a writer refuses: another identity, a folder that is not its own, records that are no distributions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import format_reader
from support.storage_forging import body_of, canonical, forge
from support.storage_samples import (
    NO_TOKEN,
    SHARDS,
    TOP_K,
    VOCAB,
    cache_bits,
    lasting,
    make_groups,
    make_manifest,
    make_shards,
    refused,
    sample_bits,
    tree,
    with_record,
    write_cache,
)

from logitcache.storage import (
    BaseLogprobs,
    CachedSample,
    CacheWriter,
    CaptureIdentity,
    CorruptCache,
    IdentityMismatch,
    InvalidRecord,
    LogitCache,
    Manifest,
    ModelIdentity,
    NotACache,
    TokenizerIdentity,
    verify,
)
from logitcache.storage.files import LocalFiles

pytest_plugins = ["support.storage_fixtures"]
pytestmark = pytest.mark.usefixtures("no_fsync")

# --- identity ---------------------------------------------------------------------------------------------------------


GROUPS = make_groups(np.random.default_rng(25), VOCAB, 4)


def groups_of(manifest: Manifest) -> NDArray[np.uint8] | None:
    return GROUPS if manifest.capture.num_tail_groups else None


def test_not_a_cache(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name in ("missing", "empty", "file"):
        for call in (LogitCache.open, verify):
            assert name in refused(NotACache, "not-a-cache", lambda n=name, c=call: c(tmp_path / n))  # type: ignore[misc]


def quantized(manifest: Manifest, how: str = "4bit") -> Manifest:
    features = (*manifest.reader_features, "quantized-base")
    return replace(manifest, model=replace(manifest.model, quantization=how), reader_features=features)


def other_identities(store: str) -> dict[str, Manifest]:
    base = make_manifest(store)
    model, tokenizer = base.model, base.tokenizer
    assert tokenizer is not None
    return {
        "store": replace(base, store="arrow" if store == "zarr" else "zarr"),
        "model.weights": replace(base, model=replace(model, weights="0" * 32)),
        "model.config": replace(base, model=replace(model, config='{"model_type":"other"}')),
        "model.vocab_size": replace(base, model=replace(model, vocab_size=VOCAB + 1)),
        "model.dtype": replace(base, model=replace(model, dtype="float32")),
        "model.attention": replace(base, model=replace(model, attention="eager")),
        "model.quantization": quantized(base),
        "model.tf32": replace(base, model=replace(model, tf32=True)),
        "tokenizer": replace(base, tokenizer=None),
        "tokenizer.fingerprint": replace(base, tokenizer=replace(tokenizer, fingerprint="0" * 32)),
        "capture.top_k": replace(base, capture=replace(base.capture, top_k=TOP_K + 1)),
        "capture.max_length": replace(base, capture=replace(base.capture, max_length=4097)),
        "capture.min_mass": replace(base, capture=replace(base.capture, min_mass=0.5)),
        "capture.precision": make_manifest(store, precision="fine"),
        "capture.max_error": replace(base, capture=replace(base.capture, precision="compact", max_error=3 / 64)),
        "capture.num_tail_groups": make_manifest(store, token_groups=GROUPS),
        "capture.tail_partition": make_manifest(store, token_groups=GROUPS),
        "capture.group_steps_per_nat": make_manifest(store, token_groups=GROUPS, group_steps=4),
        "capture.num_tail_samples": make_manifest(store, num_draws=4),
    }


IDENTITY_FIELDS = [
    "store",
    *(f"model.{name}" for name in ModelIdentity.__dataclass_fields__),
    "tokenizer",
    *(f"tokenizer.{name}" for name in TokenizerIdentity.__dataclass_fields__),
    *(f"capture.{name}" for name in CaptureIdentity.__dataclass_fields__),
]


@pytest.mark.parametrize("field", IDENTITY_FIELDS)
def test_another_identity_is_refused_and_nothing_changes(written: Path, store: str, field: str) -> None:
    before = tree(written)
    other = other_identities(store)[field]
    message = refused(IdentityMismatch, "identity-mismatch", lambda: CacheWriter(written, other, groups_of(other)))
    assert field in message
    assert tree(written) == before


def test_another_identity_is_refused_by_an_unfinished_cache(path: Path, store: str) -> None:
    with CacheWriter(path, make_manifest(store)) as writer:
        writer.commit(SHARDS[0])
    before = tree(path)
    for other in other_identities(store).values():
        refused(IdentityMismatch, "identity-mismatch", lambda o=other: CacheWriter(path, o, groups_of(o)))  # type: ignore[misc]
    assert tree(path) == before


def test_a_cache_of_a_quantised_base_says_so_and_another_s_file_stays_as_it_was(path: Path, store: str) -> None:
    manifest = quantized(make_manifest(store))
    write_cache(path, store, SHARDS, manifest)
    assert body_of(path, "manifest")["model"]["quantization"] == "4bit"
    assert LogitCache.open(path).manifest == manifest and verify(path).is_intact
    assert len(list(format_reader.open_cache(path).samples())) == len(LogitCache.open(path))
    told = refused(IdentityMismatch, "identity-mismatch", lambda: CacheWriter(path, make_manifest(store)))
    assert "model.quantization: " in told and "4bit" in told and "none" in told
    refused(IdentityMismatch, "identity-mismatch", lambda: CacheWriter(path, quantized(make_manifest(store), "8bit")))
    write_cache(path.with_name("plain"), store, SHARDS)
    assert "quantization" not in body_of(path.with_name("plain"), "manifest")["model"]


def test_the_feature_of_a_quantised_base_is_there_exactly_with_the_field(path: Path, store: str) -> None:
    write_cache(path, store, SHARDS, quantized(make_manifest(store)))
    honest = body_of(path, "manifest")
    plain = {k: v for k, v in honest["model"].items() if k != "quantization"}
    forgeries: list[dict[str, Any]] = [honest | {"reader_features": []}, honest | {"model": plain}]
    forgeries += [honest | {"model": plain | {"quantization": how}} for how in ("", "4 bit", "../x", "4" * 33, 4, None)]
    for body in forgeries:
        forge(path, "manifest", canonical(body))
        refused(CorruptCache, "corrupt", lambda: LogitCache.open(path))
        with pytest.raises(format_reader.FormatError):
            format_reader.open_cache(path)


def test_what_is_for_people_is_not_identity(written: Path, store: str) -> None:
    renamed = replace(make_manifest(store), model_name="another/name", created_with={"logitcache": "9"})
    before = lasting(written)
    with CacheWriter(written, renamed) as writer:
        assert writer.manifest == make_manifest(store)
        writer.finalize()
    assert lasting(written) == before


def test_a_writer_that_loses_the_race_to_create_a_cache_checks_the_identity(
    path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    join = LocalFiles.join

    def late(files: LocalFiles) -> Callable[[], None]:
        monkeypatch.undo()
        write_cache(path, store, SHARDS)  # another process, between the check and the lock
        return join(files)

    other = other_identities(store)["model.weights"]
    monkeypatch.setattr(LocalFiles, "join", late)
    refused(IdentityMismatch, "identity-mismatch", lambda: CacheWriter(path, other))
    with CacheWriter(path, make_manifest(store)):
        pass


@pytest.mark.parametrize("name", ["notes.txt", "contents.json", "staging/mine.txt", "shards/mine.txt", ".hidden"])
def test_a_folder_with_foreign_files_is_refused_and_nothing_changes(path: Path, store: str, name: str) -> None:
    (path / name).parent.mkdir(parents=True)
    (path / name).write_text("mine")
    refused(NotACache, "not-a-cache", lambda: CacheWriter(path, make_manifest(store)))
    assert tree(path) == {name: b"mine"}


def test_a_cache_that_lost_its_manifest_is_not_given_another(path: Path, store: str) -> None:
    with CacheWriter(path, make_manifest(store)) as writer:
        writer.commit(SHARDS[0])
    (path / "manifest.json").unlink()
    before = tree(path)
    for other in other_identities(store).values():
        refused(IdentityMismatch, "identity-mismatch", lambda o=other: CacheWriter(path, o))  # type: ignore[misc]
    assert tree(path) == before


def test_an_empty_folder_is_welcome(path: Path, store: str) -> None:
    path.mkdir()
    assert len(cache_bits(write_cache(path, store, SHARDS))) == 5


def test_a_writer_that_fails_to_start_lets_the_lock_go(path: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LocalFiles, "create", full)
    with pytest.raises(OSError, match="No space"):
        CacheWriter(path, make_manifest(store))
    monkeypatch.undo()
    assert len(cache_bits(write_cache(path, store, SHARDS))) == 5


# --- records that are not distributions -------------------------------------------------------------------------------


def valid_sample() -> CachedSample:
    """Positions 0, 3, 7 of 9 tokens, K full alternatives in each row, all masses finite."""
    token_ids = np.arange(9, dtype=np.uint32)
    ids = np.tile(np.arange(20, 20 + TOP_K, dtype=np.uint32), (3, 1))
    positions = np.array([0, 3, 7], dtype=np.int32)
    kept = np.array([0.2, 0.15, 0.1, 0.05, 0.05])
    record = BaseLogprobs(
        positions=positions,
        label_ids=token_ids[positions + 1],
        label_logprobs=np.log(np.full(3, 0.25)).astype(np.float32),
        alternative_ids=ids,
        alternative_logprobs=np.log(np.tile(kept, (3, 1))).astype(np.float32),
        tail_logprobs=np.log(np.full(3, 0.2)).astype(np.float32),
    )
    return CachedSample(token_ids, record)


def put(field: str, where: Any, value: Any) -> Callable[[CachedSample], CachedSample]:
    """Change some elements of a field of the record."""

    def change(sample: CachedSample) -> CachedSample:
        array = getattr(sample.logprobs, field).copy()
        array[where] = value
        return with_record(sample, **{field: array})

    return change


def cast(field: str, dtype: str) -> Callable[[CachedSample], CachedSample]:
    return lambda s: with_record(s, **{field: getattr(s.logprobs, field).astype(dtype)})


def shape(field: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Callable[[CachedSample], CachedSample]:
    return lambda s: with_record(s, **{field: change(getattr(s.logprobs, field))})


def narrower(sample: CachedSample) -> CachedSample:
    """K - 1 alternatives, the last one's mass in the tail: a valid record of another top_k."""
    record = sample.logprobs
    return with_record(
        sample,
        alternative_ids=record.alternative_ids[:, :-1],
        alternative_logprobs=record.alternative_logprobs[:, :-1],
        tail_logprobs=np.log(np.full(3, 0.25)).astype(np.float32),
    )


def without_mass(sample: CachedSample) -> CachedSample:
    """An alternative of a known id and no mass, which is in the tail instead."""
    kept, tail = sample.logprobs.alternative_logprobs.copy(), sample.logprobs.tail_logprobs.copy()
    kept[1, 4], tail[1] = -np.inf, np.log(0.25)
    return with_record(sample, alternative_logprobs=kept, tail_logprobs=tail)


def label_outside_vocabulary(sample: CachedSample) -> CachedSample:
    tokens, labels = sample.token_ids.copy(), sample.logprobs.label_ids.copy()
    tokens[4] = labels[1] = VOCAB
    return replace(with_record(sample, label_ids=labels), token_ids=tokens)


FIELDS = [field.name for field in fields(BaseLogprobs) if field.default is MISSING]
FLOATS = ["label_logprobs", "alternative_logprobs", "tail_logprobs"]
INVALID: dict[str, Callable[[CachedSample], CachedSample]] = {
    **{f"{name} of another type": cast(name, "<i8" if "log" not in name else "<f8") for name in FIELDS},
    **{f"{name} of half precision": cast(name, "<f2") for name in FLOATS},
    **{f"{name} one row short": shape(name, lambda a: a[:-1]) for name in FIELDS},
    **{f"{name} of one dimension more": shape(name, lambda a: a[..., None]) for name in FIELDS},
    "alternative_ids flat": shape("alternative_ids", lambda a: a[:, 0]),
    "alternative_logprobs one column short": shape("alternative_logprobs", lambda a: a[:, :-1]),
    "fewer columns than top_k": narrower,
    "no positions": lambda s: replace(s, logprobs=s.logprobs.take(np.array([], dtype=np.intp))),
    "a negative position": put("positions", 0, -1),
    "the position of the last token": put("positions", 2, 8),
    "a position beyond the sample": put("positions", 2, 10**6),
    "the largest position": put("positions", 2, 2**31 - 1),
    "a middle position beyond the sample": put("positions", 1, 2**31 - 1),
    "positions whose differences overflow": put("positions", slice(None), [7, -(2**31) + 5, 3]),
    "positions that descend": put("positions", slice(None), [3, 0, 7]),
    "a position twice": put("positions", slice(None), [0, 7, 7]),
    "a label that is not the next token": put("label_ids", 1, 5),
    "a label outside the vocabulary": label_outside_vocabulary,
    "an id outside the vocabulary": put("alternative_ids", (1, 2), VOCAB),
    "an id of almost 2^32": put("alternative_ids", (1, 2), NO_TOKEN - 1),
    "the label among the alternatives": put("alternative_ids", (1, 4), 4),
    "an id twice": put("alternative_ids", (1, slice(0, 5, 4)), 30),
    "an absent id with mass": put("alternative_ids", (1, 4), NO_TOKEN),
    "an id without mass": without_mass,
    "alternatives that ascend": put("alternative_logprobs", (1, slice(0, 2)), np.log([0.15, 0.2])),
    **{f"NaN in {name}": put(name, (1, ...), np.nan) for name in FLOATS},
    **{f"{name} above 0": put(name, (1, ...), 1e-3) for name in FLOATS},
    **{f"infinite {name}": put(name, (1, ...), np.inf) for name in FLOATS},
    "a mass too large": put("tail_logprobs", 2, np.log(0.2 + 2e-4)),
    "a mass too small": put("label_logprobs", 2, np.log(0.25 - 2e-4)),
    "no mass": put("label_logprobs", 1, -np.inf),
}


def test_the_sample_that_the_invalid_ones_are_made_from_is_valid(path: Path, store: str) -> None:
    write_cache(path, store, [[valid_sample()]])
    assert cache_bits(path) == [sample_bits(valid_sample())]


@pytest.mark.parametrize("change", INVALID.values(), ids=INVALID.keys())
def test_an_invalid_record_is_refused_and_nothing_is_written(
    path: Path, store: str, change: Callable[[CachedSample], CachedSample]
) -> None:
    good = make_shards(17, [[12]])[0]
    with CacheWriter(path, make_manifest(store)) as writer:
        before = tree(path)
        refused(InvalidRecord, "invalid-record", lambda: writer.commit([*good, change(valid_sample())]))
        assert tree(path) == before
        assert not list(path.rglob("*.new"))


def test_a_shard_of_no_samples_is_refused_and_nothing_is_written(path: Path, store: str) -> None:
    with CacheWriter(path, make_manifest(store)) as writer:
        before = tree(path)
        refused(InvalidRecord, "invalid-record", lambda: writer.commit([]))
        assert tree(path) == before


# --- tail groups ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "groups",
    [None, GROUPS[:-1], GROUPS.astype(np.int64), (GROUPS + 1).astype(np.uint8), GROUPS[::-1].copy(), GROUPS[:, None]],
    ids=["none", "short", "int64", "beyond", "another", "2d"],
)
def test_tail_groups_other_than_the_manifest_names_are_refused(
    path: Path, store: str, groups: NDArray[Any] | None
) -> None:
    manifest = make_manifest(store, token_groups=GROUPS)
    with pytest.raises(ValueError, match="token_groups"):
        CacheWriter(path, manifest, groups)
    assert tree(path) == {}


def test_tail_groups_that_the_manifest_does_not_name_are_refused(path: Path, store: str) -> None:
    with pytest.raises(ValueError, match="token_groups"):
        CacheWriter(path, make_manifest(store), GROUPS)
    assert tree(path) == {}


def test_the_partition_is_stored_once_and_given_back(path: Path, store: str) -> None:
    shards = [[replace_groups(valid_sample())]]
    write_cache(path, store, shards, make_manifest(store, token_groups=GROUPS), GROUPS)
    assert np.array_equal(np.load(path / "token_groups.npy"), GROUPS)
    found = LogitCache.open(path).token_groups()
    assert found is not None and np.array_equal(found, GROUPS)
    assert cache_bits(path) == [sample_bits(shards[0][0])]


def replace_groups(sample: CachedSample, *groups: float) -> CachedSample:
    """The sample with its tail split into four groups in these parts."""
    parts = np.log(np.array(groups or (0.4, 0.3, 0.2, 0.1)))[None] + sample.logprobs.tail_logprobs[:, None]
    return with_record(sample, tail_group_logprobs=parts.astype(np.float32))


def groups_as(change: Callable[[NDArray[Any]], NDArray[Any]]) -> Callable[[CachedSample], CachedSample]:
    """The sample with valid tail groups, changed."""
    return lambda s: shape("tail_group_logprobs", change)(replace_groups(s))


BAD_GROUPS: dict[str, Callable[[CachedSample], CachedSample]] = {
    "none": lambda s: s,
    "of another sum": lambda s: replace_groups(s, 0.4, 0.3, 0.2, 0.1002),
    "of no mass": lambda s: with_record(s, tail_group_logprobs=np.full((3, 4), -np.inf, dtype=np.float32)),
    "three": groups_as(lambda groups: groups[:, 1:]),
    "NaN": lambda s: with_record(s, tail_group_logprobs=np.full((3, 4), np.nan, dtype=np.float32)),
    "above 0": lambda s: with_record(s, tail_group_logprobs=np.full((3, 4), 0.1, dtype=np.float32)),
    "float64": groups_as(lambda groups: groups.astype(np.float64)),
    "a row short": groups_as(lambda groups: groups[1:]),
    "flat": groups_as(lambda groups: groups[:, 0]),
}


@pytest.mark.parametrize("precision", ["exact", "fine"])
@pytest.mark.parametrize("change", BAD_GROUPS.values(), ids=BAD_GROUPS.keys())
def test_invalid_tail_groups_are_refused_and_nothing_is_written(
    path: Path, store: str, change: Callable[[CachedSample], CachedSample], precision: str
) -> None:
    manifest = make_manifest(store, token_groups=GROUPS, precision=precision)
    with CacheWriter(path, manifest, GROUPS) as writer:
        before = tree(path)
        refused(InvalidRecord, "invalid-record", lambda: writer.commit([change(valid_sample())]))
        assert tree(path) == before


def test_tail_groups_where_the_manifest_has_none_are_refused(path: Path, store: str) -> None:
    with CacheWriter(path, make_manifest(store)) as writer:
        refused(InvalidRecord, "invalid-record", lambda: writer.commit([replace_groups(valid_sample())]))
