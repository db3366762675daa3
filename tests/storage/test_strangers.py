"""Whose a shard is: records carry the identity of their cache, and no other cache's are read, listed or kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.cli_harness import done
from support.storage_forging import body_of, canonical, forge, sealed
from support.storage_samples import (
    SHARDS,
    cache_bits,
    identity_of,
    lasting,
    make_groups,
    make_manifest,
    make_sample,
    make_shards,
    refused,
    tree,
    unit_of,
    write_cache,
)

from logitcache.storage import (
    CacheError,
    CacheWriter,
    CorruptCache,
    IdentityMismatch,
    IncompleteCache,
    LogitCache,
    Manifest,
    NotACache,
    convert,
    merge,
    prune,
    repair,
    verify,
)
from logitcache.storage.files import open_files
from logitcache.storage.heads import stored_token_groups
from logitcache.storage.inventory import take_inventory
from logitcache.storage.job_status import status

pytest_plugins = ["support.storage_fixtures"]
pytestmark = pytest.mark.usefixtures("no_fsync")


def of_another_base(store: str) -> Manifest:
    manifest = make_manifest(store)
    return replace(manifest, model=replace(manifest.model, weights="e" * 32))


@pytest.fixture
def other(tmp_path: Path, store: str) -> Path:
    """A cache of another base, of the same samples and more."""
    return write_cache(tmp_path / "other", store, [*SHARDS, make_shards(8, [[12]])[0]], of_another_base(store))


def put(source: Path, target: Path, number: int = 0) -> str:
    """Copy a shard, as it is, into another cache."""
    record = sorted((source / "shards").glob("*.json"))[number]
    for path in (source / "shards").glob(f"{record.stem}*"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, target / "shards" / path.name)
    return record.stem


def records(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (path / "shards").glob("*.json")}


# --- the identity -----------------------------------------------------------------------------------------------------


def test_a_record_and_its_name_carry_the_identity(written: Path, other: Path, store: str) -> None:
    for path, manifest in ((written, make_manifest(store)), (other, of_another_base(store))):
        assert manifest.identity_digest == identity_of(manifest)
        bodies = {name: json.loads(data)["body"] for name, data in records(path).items()}
        assert {body["identity"] for body in bodies.values()} == {identity_of(manifest)}
        assert {f"{body['unit']}.json" for body in bodies.values()} == bodies.keys()
    assert {f"{unit_of(shard, store)}.json" for shard in SHARDS} == records(written).keys()
    assert not records(written).keys() & records(other).keys()


def test_the_identity_is_what_differences_compares(store: str) -> None:
    manifest = make_manifest(store)
    named = replace(manifest, model_name="another name", created_with={"logitcache": "9"})
    assert named.differences(manifest) == [] and named.identity_digest == manifest.identity_digest
    for changed in (
        replace(manifest, store="arrow" if store == "zarr" else "zarr"),
        replace(manifest, model=replace(manifest.model, quantization="4bit")),
        replace(manifest, tokenizer=None),
        replace(manifest, capture=replace(manifest.capture, top_k=manifest.capture.top_k - 1)),
    ):
        assert changed.differences(manifest) and changed.identity_digest != manifest.identity_digest
        assert changed.identity_digest == identity_of(changed)


# --- a stranger's shard -----------------------------------------------------------------------------------------------


def test_a_strangers_shard_is_named_by_all_who_meet_it_and_listed_by_none(
    written: Path, other: Path, store: str
) -> None:
    before, whole = lasting(written), cache_bits(written)
    unit = put(other, written)
    assert cache_bits(written) == whole  # which the contents fix
    (problem,) = verify(written).problems
    assert problem.shard == unit and identity_of(of_another_base(store)) in problem.what

    def resume() -> None:
        with CacheWriter(written, make_manifest(store)) as writer:
            writer.captured()

    def finish() -> None:
        with CacheWriter(written, make_manifest(store)) as writer:
            writer.finalize()

    for call in (resume, finish, lambda: status(written), lambda: prune(written, set())):
        message = refused(CorruptCache, "corrupt", call)
        assert (
            f"{written}/shards/{unit}.json" in message and message.count("`") == 2 and "`logitcache repair`" in message
        )
    report = repair(written)
    assert report.dropped == (unit,) and not report.is_incomplete
    assert cache_bits(written) == whole and verify(written).is_intact
    write_cache(written, store, SHARDS)
    assert lasting(written) == before


def test_a_listed_record_of_another_identity_is_refused_when_its_shard_is_opened(written: Path, tmp_path: Path) -> None:
    body = body_of(written, "commit")
    forge(written, "commit", canonical(body | {"identity": "0" * 32}))
    calls: tuple[Callable[[], object], ...] = (
        lambda: cache_bits(written),
        lambda: LogitCache.open(written).num_bytes,
        lambda: merge([written], tmp_path / "merged"),
        lambda: convert(written, tmp_path / "converted", precision="compact"),
        lambda: take_inventory(written),
    )
    for call in calls:
        assert f"{body['unit']}.json" in refused(CorruptCache, "corrupt", call)
    assert {problem.shard for problem in verify(written).problems} == {body["unit"]}


def test_a_shard_of_other_samples_than_its_unit_says_is_a_problem(written: Path) -> None:
    """Before, only the independent reader compared them."""
    body, unit = body_of(written, "commit"), "0" * 32
    folder = next((written / "shards").glob(f"{body['unit']}-*"))
    folder.rename(folder.with_name(folder.name.replace(body["unit"], unit)))
    (written / "shards" / f"{unit}.json").write_bytes(sealed(canonical(body | {"unit": unit})))
    (written / "shards" / f"{body['unit']}.json").unlink()
    assert set(repair(written).dropped) == {unit}


def test_repair_keeps_what_an_interrupted_run_committed(written: Path, store: str) -> None:
    """Whole, of this identity, and not listed yet: no reader sees it. What is damaged of that run goes."""
    whole, shards = cache_bits(written), make_shards(8, [[12], [14]])
    with CacheWriter(written, make_manifest(store)) as writer:
        kept, lost = (writer.commit(shard) for shard in shards)
    files = [path for path in written.glob(f"shards/{lost.folder}/**/*") if path.is_file()]
    files[0].write_bytes(files[0].read_bytes()[:-1])
    report = repair(written)
    assert report.dropped == (lost.unit,) and not report.is_incomplete
    assert cache_bits(written) == whole and (written / "shards" / f"{kept.unit}.json").exists()
    with CacheWriter(written, make_manifest(store)) as writer:
        assert not writer.is_final
        writer.finalize()
    assert len(cache_bits(written)) == len(whole) + 1 and verify(written).is_intact


def test_the_contents_tell_a_record_that_was_exchanged_with_all_its_checksums(
    written: Path, store: str, tmp_path: Path
) -> None:
    """Noise of another machine: the same identity, samples and positions, other numbers. Before, repair kept it."""
    whole, unit = cache_bits(written), unit_of(SHARDS[0], store)
    rng = np.random.default_rng(9)
    again = [make_sample(rng, 0, positions=s.logprobs.positions.tolist(), token_ids=s.token_ids) for s in SHARDS[0]]
    source = write_cache(tmp_path / "again", store, [again])
    assert records(source).keys() == {f"{unit}.json"}
    put(source, written)
    refused(CorruptCache, "corrupt", lambda: cache_bits(written))

    def finish() -> None:
        with CacheWriter(written, make_manifest(store)) as writer:
            writer.finalize()

    assert unit in refused(CorruptCache, "corrupt", finish)
    assert repair(written).dropped == (unit,)
    refused(IncompleteCache, "incomplete", lambda: LogitCache.open(written))
    assert cache_bits(write_cache(written, store, SHARDS)) == whole


def test_nothing_is_dropped_where_no_shard_is_the_caches_own(written: Path, other: Path, store: str) -> None:
    """All of shards/ may have come from elsewhere, or the manifest: who repairs cannot know which."""
    shutil.rmtree(written / "shards")
    shutil.copytree(other / "shards", written / "shards")
    before = tree(written)
    message = refused(IdentityMismatch, "identity-mismatch", lambda: repair(written))
    first = min(records(written))
    assert str(written) in message and first in message and identity_of(of_another_base(store)) in message
    refused(CorruptCache, "corrupt", lambda: cache_bits(written))
    assert tree(written) == before
    shutil.copy(other / "manifest.json", written / "manifest.json")
    assert not repair(written).dropped  # they are of one cache now


def test_two_caches_whose_shards_link_to_one_folder_are_told_apart(tmp_path: Path, store: str) -> None:
    """By the mark in the records: nothing else on the disk says that there are two."""
    (tmp_path / "disk").mkdir()
    manifests = {"a": make_manifest(store), "b": of_another_base(store)}
    for name, manifest in manifests.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "shards").symlink_to(tmp_path / "disk")
        CacheWriter(tmp_path / name, manifest).close()
    write_cache(tmp_path / "a", store, SHARDS)
    whole = cache_bits(tmp_path / "a")

    def resume() -> None:
        with CacheWriter(tmp_path / "b", manifests["b"]) as writer:
            writer.captured()

    assert identity_of(manifests["a"]) in refused(CorruptCache, "corrupt", resume)
    with CacheWriter(tmp_path / "b", manifests["b"]) as writer:
        writer.commit(SHARDS[0])
        refused(CorruptCache, "corrupt", writer.finalize)
    before = tree(tmp_path / "disk")
    for name in manifests:
        message = refused(IdentityMismatch, "identity-mismatch", lambda n=name: repair(tmp_path / n))  # type: ignore[misc]
        assert "symbolic link" in message and "folder of its own" in message
    assert tree(tmp_path / "disk") == before
    assert cache_bits(tmp_path / "a") == whole
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "shards").symlink_to(tmp_path / "disk")
    refused(IdentityMismatch, "identity-mismatch", lambda: CacheWriter(tmp_path / "c", manifests["b"]))


# --- merge ------------------------------------------------------------------------------------------------------------


def test_caches_of_one_identity_merge_byte_for_byte_whoever_made_them(tmp_path: Path, store: str) -> None:
    mine, theirs = SHARDS[:1], make_shards(8, [[12], [30, 4]])
    named = replace(make_manifest(store), model_name="elsewhere/base", created_with={"logitcache": "9", "torch": "3"})
    write_cache(tmp_path / "a", store, mine)
    write_cache(tmp_path / "b", store, theirs, named)
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "all")
    assert records(tmp_path / "all") == records(tmp_path / "a") | records(tmp_path / "b")
    assert cache_bits(tmp_path / "all") == cache_bits(write_cache(tmp_path / "at once", store, [*mine, *theirs]))
    assert verify(tmp_path / "all").is_intact


def test_where_two_spellings_of_an_identity_agree_the_targets_digest_is_written(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one rule that compares more loosely than bytes; files stay as they are, records get the other name."""
    mine, theirs = SHARDS[:1], make_shards(8, [[12], [30, 4]])
    spelt = replace(
        make_manifest(store), model=replace(make_manifest(store).model, config='{"model_type":"tiny","spelt":true}')
    )
    write_cache(tmp_path / "a", store, mine)
    write_cache(tmp_path / "b", store, theirs, spelt)
    refused(IdentityMismatch, "identity-mismatch", lambda: merge([tmp_path / "a", tmp_path / "b"], tmp_path / "no"))
    monkeypatch.setattr(Manifest, "differences", lambda *_, **__: [])
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "all")
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "all")  # again: everything is there
    at_once = write_cache(tmp_path / "at once", store, [*mine, *theirs])
    assert lasting(tmp_path / "all") == lasting(at_once)
    (tmp_path / "all" / "contents.json").unlink()
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "all")  # killed before the end
    assert lasting(tmp_path / "all") == lasting(at_once) and verify(tmp_path / "all").is_intact


# --- a manifest that was lost -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_lost_manifest_is_written_again_by_the_same_writer(
    path: Path, store: str, is_finished: bool, pristine: Path
) -> None:
    with CacheWriter(path, make_manifest(store)) as writer:
        writer.commit(SHARDS[0])
        if is_finished:
            writer.finalize()
    (path / "manifest.json").unlink()
    assert "`logitcache precompute`" in refused(NotACache, "not-a-cache", lambda: LogitCache.open(path))
    before = tree(path)
    message = refused(IdentityMismatch, "identity-mismatch", lambda: CacheWriter(path, of_another_base(store)))
    assert unit_of(SHARDS[0], store) in message and identity_of(of_another_base(store)) in message
    assert tree(path) == before
    write_cache(path, store, SHARDS)
    assert lasting(path) == lasting(pristine)


def test_a_lost_manifest_of_another_day_finishes_the_cache_again(written: Path, store: str) -> None:
    """With other names for people it is another file, which the contents have to name."""
    whole = cache_bits(written)
    (written / "manifest.json").unlink()
    today = replace(make_manifest(store), created_with={"logitcache": "tomorrow"})
    with CacheWriter(written, today) as writer:
        assert not writer.is_final
        writer.finalize()
        assert writer.is_final
    assert cache_bits(written) == whole and verify(written).is_intact


def test_a_writer_with_its_own_partition_finds_that_of_the_cache_whose_manifest_is_lost(path: Path, store: str) -> None:
    groups = make_groups(np.random.default_rng(27), 40, 4)
    manifest = make_manifest(store, token_groups=groups)
    shards = [[make_sample(np.random.default_rng(28), 30, token_groups=groups)]]
    write_cache(path, store, shards, manifest, groups)
    (path / "manifest.json").unlink()
    found = stored_token_groups(path)
    assert found is not None and np.array_equal(found, groups)
    (path / "token_groups.npy").write_bytes(b"\x93NUMPY")
    assert stored_token_groups(path) is None


def damaged(path: Path) -> None:
    (path / "manifest.json").write_bytes(b"{")


def exchanged(path: Path) -> None:
    manifest = of_another_base(json.loads((path / "manifest.json").read_bytes())["body"]["store"])
    CacheWriter(path.with_name("stranger"), manifest).close()
    shutil.copy(path.with_name("stranger") / "manifest.json", path / "manifest.json")


@pytest.mark.parametrize("lose", [lambda p: (p / "manifest.json").unlink(), damaged, exchanged])
@pytest.mark.parametrize("is_named_alike", [True, False])
def test_a_lost_manifest_is_taken_from_another_cache_of_that_identity(
    written: Path, store: str, lose: Callable[[Path], None], is_named_alike: bool, tmp_path: Path, other: Path
) -> None:
    whole, before = cache_bits(written), lasting(written)
    theirs = make_manifest(store)
    if not is_named_alike:
        theirs = replace(theirs, created_with={"logitcache": "another"})
    source = write_cache(tmp_path / "source", store, make_shards(8, [[12]]), theirs)
    lose(written)
    damage = tree(written)
    with pytest.raises(CacheError):
        repair(written)
    refused(IdentityMismatch, "identity-mismatch", lambda: repair(written, other))
    assert lasting(written) == {n: d for n, d in damage.items() if n != "writer.lock"}
    said = done("repair", written, "--manifest-from", source).out
    assert "wrote manifest.json again" in said and "is intact" in said
    assert cache_bits(written) == whole and verify(written).is_intact
    assert (lasting(written) == before) == is_named_alike
    assert "wrote" not in done("repair", written, "--manifest-from", source).out


def test_a_manifest_is_not_written_for_shards_that_say_nothing_or_disagree(
    written: Path, other: Path, store: str, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(written, tmp_path / "source"))
    put(other, written)
    (written / "manifest.json").unlink()
    before = tree(written)
    refused(IdentityMismatch, "identity-mismatch", lambda: repair(written, source))
    refused(IdentityMismatch, "identity-mismatch", lambda: CacheWriter(written, make_manifest(store)))
    assert tree(written) == before
    for name in records(written):
        (written / "shards" / name).write_bytes(b"{")
    assert "can be read" in refused(IdentityMismatch, "identity-mismatch", lambda: repair(written, source))
    refused(IdentityMismatch, "identity-mismatch", lambda: repair(tmp_path / "nothing", source))
    assert not (tmp_path / "nothing").exists()
    assert not open_files(written).exists("manifest.json")
