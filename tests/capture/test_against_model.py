"""`verify --against-model`: the model's own noise as the control, what it is of, and who says it on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cli_harness import done, logitcache, precompute, refused
from support.tiny_model import text_rows

from logitcache.capture import against_model
from logitcache.capture.calibration import choose_cached
from logitcache.capture.differences import differences
from logitcache.hub.dataset_card import Licence, make_card
from logitcache.models import loading as models
from logitcache.storage import BaseLogprobs, CachedSample, CacheWriter, CaptureIdentity, LogitCache, convert
from logitcache.storage.model_check import MAX_RATIO, ModelCheck, model_digest, read_model_check, write_model_check


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("against-data") / "text.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in text_rows(30)), encoding="utf-8")
    return path


HOW: dict[str, list[object]] = {
    "exact": ["--precision", "exact"],
    "fine": [],
    "compact, arrow": ["--precision", "compact", "--store", "arrow"],
    "groups": ["--tail-groups", 4],
    "draws": ["--tail-samples", 8],
    "half precision": ["--dtype", "bfloat16"],
    "min mass": ["--min-mass", 0.9],
}


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, data: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("against")
    for name, how in HOW.items():
        precompute(tiny_model, data, root / name, *how, "--top-k", 16)
    convert(root / "fine", root / "rounded twice", precision="compact")
    return {name: root / name for name in [*HOW, "rounded twice"]}


@pytest.fixture
def cache(caches: dict[str, Path], tmp_path: Path) -> Path:
    return copied(caches["fine"], tmp_path / "cache")


def copied(cache: Path, to: Path) -> Path:
    """Without what other tests were told of it."""
    return Path(shutil.copytree(cache, to, ignore=shutil.ignore_patterns("against-model.json")))


def line(cache: Path, model: Path, *more: object) -> list[object]:
    return ["verify", cache, "--against-model", model, "--num-positions", 600, *more]


@pytest.mark.parametrize("name", [*HOW, "rounded twice"])
def test_a_cache_is_within_the_noise_of_its_model(name: str, caches: dict[str, Path], tiny_model: Path) -> None:
    outcome = done(*line(caches[name], tiny_model))
    intact, answer = outcome.out.splitlines()
    assert " is intact: " in intact and " is within the model's own noise: " in answer
    found = read_model_check(LogitCache.open(caches[name]))
    assert found is not None and found.is_within and found.num_positions >= 600
    assert 0 <= found.ratio <= MAX_RATIO and found.overlap > 0.99


def test_half_precision_is_noisier(caches: dict[str, Path], tiny_model: Path) -> None:
    """The control is measured: what would be hundreds of times the noise of float32 is bfloat16's own.

    On a CPU without instructions of its own for bfloat16 few positions differ, so that their mean says little.
    """
    for name in ("exact", "half precision"):
        done(*line(caches[name], tiny_model))
    fine, half = (read_model_check(LogitCache.open(caches[name])) for name in ("exact", "half precision"))
    assert fine is not None and half is not None
    assert half.worst_allowed_nats > 100 * fine.worst_allowed_nats
    assert half.is_within and half.worst_nats > fine.worst_allowed_nats


def test_another_model_is_refused_by_its_fingerprint(cache: Path, other_model: Path) -> None:
    assert "weights" in refused(4, *line(cache, other_model))
    assert read_model_check(LogitCache.open(cache)) is None


def other_weights(other: Path) -> Callable[..., Any]:
    """A cache that claims to be of what it is not of, seen from the model: fingerprints agree, numbers do not."""
    load = models.load_base

    def loaded(source: Any, *how: Any, **more: Any) -> Any:
        return replace(load(source, *how, **more), model=load(models.find_model(str(other)), *how, **more).model)

    return loaded


def test_a_cache_of_others_distributions_is_refused_by_measurement(
    cache: Path, tiny_model: Path, other_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load_base", other_weights(other_model))
    outcome = logitcache(*line(cache, tiny_model))
    assert outcome.status == 4 and "is not the model's: " in outcome.out and "holds other distributions" in outcome.err
    found = read_model_check(LogitCache.open(cache))
    assert found is not None and not found.is_within and found.ratio > 1000


def test_another_dtype_than_the_cache_says_is_not_noise(
    caches: dict[str, Path], tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache = copied(caches["exact"], tmp_path / "cache")
    load = models.load_base
    monkeypatch.setattr(models, "load_base", lambda s, dtype, *how, **more: load(s, "bfloat16", *how, **more))
    assert logitcache(*line(cache, tiny_model)).status == 4


def test_one_position_that_was_changed_is_seen(caches: dict[str, Path], tiny_model: Path, tmp_path: Path) -> None:
    """It is lost in the mean of all, and not in the worst."""
    held = LogitCache.open(caches["exact"])
    samples = list(held.samples())
    record = samples[0].logprobs
    label, tail = record.label_logprobs.copy(), record.tail_logprobs.copy()
    mass = np.exp(label[3]) + np.exp(tail[3])
    label[3], tail[3] = np.log(0.9 * mass), np.log(0.1 * mass)
    changed = replace(record, label_logprobs=label, tail_logprobs=tail)
    samples[0] = CachedSample(samples[0].token_ids, changed, samples[0].num_tokens_cut)
    path = tmp_path / "cache"
    with CacheWriter(path, held.manifest) as writer:
        writer.commit(samples)
        writer.finalize()
    outcome = logitcache("verify", path, "--against-model", tiny_model, "--num-positions", 10**6)
    assert outcome.status == 4
    found = read_model_check(LogitCache.open(path))
    assert found is not None and found.worst_nats > found.worst_allowed_nats


def test_samples_are_chosen_by_the_contents(caches: dict[str, Path]) -> None:
    """The same ones each time; of other contents others, which nobody knows before the contents are written."""
    fine, compact = (LogitCache.open(caches[name]) for name in ("fine", "compact, arrow"))
    ids = [[s.token_ids.tobytes() for s in choose_cached(c, 600).samples] for c in (fine, fine, compact)]
    assert ids[0] == ids[1] != ids[2] and len(ids[0]) < len(fine)
    assert [s.origin for s in choose_cached(fine, 10**9, at_least=1).samples] != []


def test_the_answer_is_of_these_contents_and_this_model(cache: Path, caches: dict[str, Path], tiny_model: Path) -> None:
    done(*line(cache, tiny_model))
    file = cache / "against-model.json"
    found = read_model_check(LogitCache.open(cache))
    assert found is not None and found.contents == LogitCache.open(cache).contents_checksum
    assert found.model == model_digest(LogitCache.open(cache).manifest)
    other = copied(caches["compact, arrow"], cache.parent / "other")
    shutil.copy(file, other)
    assert read_model_check(LogitCache.open(other)) is None
    for changes in ({"contents": "0" * 32}, {"model": "0" * 32}, {"mean_noise_nats": 0.0}):
        write_model_check(cache, replace(found, **changes))  # type: ignore[arg-type]
        assert read_model_check(LogitCache.open(cache)) is None
    for damaged in (b"", b"{}", b'{"body":{},"checksum":"0"}\n', file.read_bytes().replace(b"0.", b"1.", 1)):
        file.write_bytes(damaged)
        assert read_model_check(LogitCache.open(cache)) is None


def test_the_file_changes_nothing_else(cache: Path, data: Path, tiny_model: Path) -> None:
    """Readers, writers and verify itself go on as without it."""
    done(*line(cache, tiny_model))
    assert "is intact" in done("verify", cache).out
    assert "samples were there already" in precompute(tiny_model, data, cache, "--top-k", 16).out
    assert read_model_check(LogitCache.open(cache)) is not None
    assert done("repair", cache).status == 0 and (cache / "against-model.json").exists()


def test_the_data_card_and_run_json_say_it(cache: Path, tiny_model: Path, tmp_path: Path) -> None:
    how = ["--model", tiny_model, "--cache", cache, "--max-steps", 1]
    row = "captured again by the base"
    assert row not in make_card(LogitCache.open(cache), "a/b", "base", Licence(), Licence())
    done("train", *how, "--out", tmp_path / "before")
    done(*line(cache, tiny_model))
    found = read_model_check(LogitCache.open(cache))
    assert found is not None
    card = make_card(LogitCache.open(cache), "a/b", "base", Licence(), Licence())
    (told,) = (text for text in card.splitlines() if row in text)
    assert f"within the model's own noise: {found.ratio:.2g} x" in told
    assert f"`{found.contents}`" in told and f"`{found.model}`" in told
    done("train", *how, "--out", tmp_path / "after")
    before, after = (json.loads((tmp_path / n / "run.json").read_text())["against_model"] for n in ("before", "after"))
    assert before is None
    assert after["within"] is True and (after["contents"], after["model"]) == (found.contents, found.model)
    assert after["ratio"] == found.ratio
    done("train", *how, "--out", tmp_path / "before", "--resume")  # what was found since is no other run


def test_json_says_it_too(cache: Path, tiny_model: Path) -> None:
    found = json.loads(done(*line(cache, tiny_model, "--json")).out)
    assert found["intact"] is True and found["against_model"]["within"] is True
    assert "against_model" not in json.loads(done("verify", cache, "--json").out)


def test_what_is_damaged_is_not_compared(cache: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = max((p for p in (cache / "shards").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    file.write_bytes(file.read_bytes()[:-40] + bytes(40))
    monkeypatch.setattr(models, "load_base", lambda *_: pytest.fail("the model was loaded for nothing"))
    assert logitcache(*line(cache, tiny_model)).status == 3


@pytest.mark.parametrize("more", [["--num-positions", 5], ["--device", "cpu"], ["--batch-tokens", 9]])
def test_how_to_run_a_model_needs_a_model(cache: Path, more: list[object]) -> None:
    assert f"{more[0]} says how to run a model" in refused(2, "verify", cache, *more)


@pytest.mark.parametrize(("precision", "max_error"), [("fine", 1 / 64), ("compact", 1 / 32), ("compact", 3 / 64)])
def test_rounding_is_taken_out(precision: str, max_error: float) -> None:
    """What is off by d from the model before it is rounded is off by d on the mean after, far below a step as d is."""
    rng, off = np.random.default_rng(0), 2e-4
    capture = CaptureIdentity(16, 64, 1.0, precision, max_error)
    logprobs = -np.sort(rng.uniform(2, 12, size=(20_000, 16)).astype(np.float32), axis=1)
    ids = np.broadcast_to(np.arange(1, 17, dtype=np.uint32), logprobs.shape)
    rows = np.arange(len(logprobs), dtype=np.int32)
    label, tail = (-rng.uniform(0.1, 8, size=len(rows)).astype(np.float32) for _ in range(2))
    model = BaseLogprobs(rows, np.zeros(len(rows), np.uint32), label, ids, logprobs, tail)
    shifted = (column - np.float32(off) for column in (label, logprobs, tail))
    moved = BaseLogprobs(*(model.positions, model.label_ids), next(shifted), ids, next(shifted), next(shifted))
    found = differences(against_model._rounded(model, capture), against_model._rounded(moved, capture))
    assert against_model._values([found]).mean() == pytest.approx(off, rel=0.1)
    same = differences(against_model._rounded(model, capture), against_model._rounded(model, capture))
    assert against_model._values([same]).max() == 0


def test_max_ratio_is_what_the_answer_goes_by() -> None:
    check = ModelCheck("c" * 32, "m" * 32, 1, 10, MAX_RATIO * 1e-6, 1e-6, 0.01, 0.02, 1.0)
    assert check.is_within and check.ratio == pytest.approx(MAX_RATIO)
    for worse in ({"mean_nats": 5e-6}, {"worst_nats": 0.03}, {"overlap": 0.7}):
        assert not replace(check, **worse).is_within  # type: ignore[arg-type]
