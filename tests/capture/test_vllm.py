"""The adapter to vLLM's outputs, on constructed ones (tests/support/like_vllm.py): vLLM itself has not run here."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.cli_harness import done, facts, train_line
from support.format_reader import open_cache
from support.like_vllm import LikeFlatLogprobs, LikeLLM, LikeLogprob, LikeRequestOutput, like_vllm, output_of
from support.tiny_model import make_model

from logitcache.capture.engines.vllm import (
    REMAINDER_ERROR,
    check_tail,
    record_of,
    remainder,
    start_vllm,
    vllm_identity,
    vllm_version,
)
from logitcache.capture.teacher import TransformersTeacher
from logitcache.data.samples import Sample
from logitcache.errors import EngineFailed, InputNotFound, InvalidSettings, NonFiniteLogits, PipelineError, install_line
from logitcache.models.loading import find_model, load_base
from logitcache.storage import (
    BaseLogprobs,
    CachedSample,
    CacheWriter,
    CaptureIdentity,
    CorruptCache,
    LogitCache,
    Manifest,
    ModelIdentity,
    verify,
)
from logitcache.storage.manifest import features_of, from_bytes, to_bytes
from logitcache.storage.records import check_positions, check_rows

VOCAB = 260
SAMPLES = [
    Sample(np.arange(3, 43, dtype=np.uint32) * 5 % 250, np.ones(40, dtype=np.bool_), "row 1"),
    Sample(np.array([7, 7, 9, 200, 7], dtype=np.uint32), np.array([0, 1, 0, 1, 1], dtype=np.bool_), "row 2"),
]


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", like_vllm())


def output(model: Any, sample: Sample, top_k: int, flat: bool = False) -> LikeRequestOutput:
    tokens = sample.token_ids.tolist()
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0]
    return output_of(logits, tokens, top_k + 1, flat)


def assert_close(ours: BaseLogprobs, theirs: BaseLogprobs) -> None:
    """Of distributions without ties: the same tokens; log-probabilities to float32; the tail to 1e-6 of probability."""
    assert np.array_equal(ours.positions, theirs.positions) and np.array_equal(ours.label_ids, theirs.label_ids)
    assert np.array_equal(ours.alternative_ids, theirs.alternative_ids)
    assert np.allclose(ours.label_logprobs, theirs.label_logprobs, rtol=0, atol=2e-5)
    assert np.allclose(ours.alternative_logprobs, theirs.alternative_logprobs, rtol=0, atol=2e-5)
    assert np.allclose(np.exp(ours.tail_logprobs), np.exp(theirs.tail_logprobs), rtol=0, atol=2 * REMAINDER_ERROR)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("top_k", [0, 1, 8, 200, VOCAB - 1])
def test_record_is_that_of_transformers(model: Any, top_k: int, flat: bool) -> None:
    """top_k 0, 1 and 8: labels outside and inside the entries; V - 1: no tail."""
    expected = TransformersTeacher(model, top_k)(SAMPLES)
    for sample, theirs in zip(SAMPLES, expected, strict=True):
        ours = record_of(output(model, sample, top_k, flat), sample, top_k, VOCAB)
        check_positions(ours, sample.token_ids, sample.origin)
        check_rows(ours, VOCAB, sample.origin)
        assert_close(ours, theirs)
        assert bool(np.all((ours.tail_logprobs == -np.inf) == (top_k == VOCAB - 1)))


def test_labels_stand_inside_and_outside_the_entries(model: Any) -> None:
    """Else the test above would not have seen both."""
    widths = {len(e) for s in SAMPLES for e in output(model, s, 100).prompt_logprobs[1:]}
    assert widths == {101, 102}


# --- one position, by hand: V = 8, K = 2, so three entries are asked for ----------------------------------------------

TWO = Sample(np.array([1, 4], dtype=np.uint32), np.array([False, True]), "row 1")
Entry = dict[int, LikeLogprob]


def entry(*rows: tuple[int, float, int | None]) -> Entry:
    return {token: LikeLogprob(float(np.log(np.float32(p))), rank) for token, p, rank in rows}


def read(*entries: Any, tokens: Sequence[int] = (1, 4), vocab_size: int = 8) -> BaseLogprobs:
    return record_of(LikeRequestOutput(list(tokens), [None, *entries]), TWO, 2, vocab_size)


@pytest.mark.parametrize(
    ("rows", "ids", "masses"),
    [
        ([(4, 0.1, 3), (0, 0.4, 1), (2, 0.3, 2)], [0, 2], (0.1, 0.4, 0.3, 0.2)),  # the label is the third
        ([(4, 0.4, 1), (0, 0.3, 2), (2, 0.2, 3)], [0, 2], (0.4, 0.3, 0.2, 0.1)),  # the label is the first
        ([(4, 0.05, 4), (0, 0.4, 1), (2, 0.3, 2), (7, 0.2, 3)], [0, 2], (0.05, 0.4, 0.3, 0.25)),  # it comes on top
        ([(4, 0.05, 8), (7, 0.2, 1), (2, 0.2, 2), (0, 0.2, 3)], [0, 2], (0.05, 0.2, 0.2, 0.55)),  # ties: ascending id
        ([(4, 0.2, 3), (7, 0.2, 1), (2, 0.2, 2), (0, 0.2, 3)], [0, 2], (0.2, 0.2, 0.2, 0.4)),  # and of one rank
        ([(4, 0.2, 3), (7, 0.2, 2), (2, 0.3, 1)], [2, 7], (0.2, 0.3, 0.2, 0.3)),
        ([(4, 0.2, None), (7, 0.2, 2), (2, 0.3, 1)], [2, 7], (0.2, 0.3, 0.2, 0.3)),  # the label's rank decides nothing
    ],
)
def test_entries_by_hand(rows: list[Any], ids: list[int], masses: tuple[float, ...]) -> None:
    record = read(entry(*rows))
    assert record.alternative_ids.tolist() == [ids]
    found = [record.label_logprobs[0], *record.alternative_logprobs[0], record.tail_logprobs[0]]
    assert np.allclose(np.exp(found), masses, atol=1e-6)


GOOD = ((4, 0.1, 3), (0, 0.4, 1), (2, 0.3, 2))
WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "no prompt_logprobs": (lambda: record_of(LikeRequestOutput([1, 4], None), TWO, 2, 8), "found None"),
    "too few tokens": (lambda: read(), "prompt_logprobs of 2 tokens, found of 1"),
    "too many tokens": (lambda: read(entry(*GOOD), entry(*GOOD)), "prompt_logprobs of 2 tokens, found of 3"),
    "another prompt": (lambda: read(entry(*GOOD), tokens=[1, 5]), "found other tokens"),
    "no prompt": (lambda: record_of(LikeRequestOutput(None, []), TWO, 2, 8), "found other tokens"),
    "nothing of a position": (lambda: read(None), "position 0: expected the label among the entries"),
    "no label": (lambda: read(entry(*GOOD[1:])), "position 0: expected the label among the entries"),
    "an entry is missing": (lambda: read(entry(*GOOD[:2])), "2 tokens beside the label"),
    "a rank twice": (lambda: read(entry(GOOD[0], GOOD[1], (2, 0.3, 1))), "2 tokens beside the label"),
    "no rank": (lambda: read(entry(*GOOD[:2], (2, 0.3, None))), "ranks from 1 to 3"),
    "rank 0": (lambda: read(entry(*GOOD[:2], (2, 0.3, 0))), "ranks from 1 to 3"),
    "more than was asked for": (lambda: read(entry(*GOOD, (7, 0.05, 4))), "ranks from 1 to 3"),
    "an id beyond V": (lambda: read(entry(*GOOD[:2], (8, 0.3, 2))), "token ids below 8"),
    "a negative id": (lambda: read(entry(*GOOD[:2], (-1, 0.3, 2))), "token ids below 8"),
    "logits": (lambda: read(entry((4, 2.0, 3), (0, 9.0, 1), (2, 5.0, 2))), "numbers above 0"),
    "too much mass": (lambda: read(entry((4, 0.2, 3), (0, 0.5, 1), (2, 0.4, 2))), "masses that can sum to 1"),
    "not the top": (lambda: read(entry((4, 0.1, 3), (0, 0.03, 1), (2, 0.02, 2))), "masses that can sum to 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_was_not_asked_for_is_refused(name: str) -> None:
    call, said = WRONG[name]
    with pytest.raises(EngineFailed) as caught:
        call()
    message = str(caught.value)
    assert said in message and message.startswith("reading vLLM's output for row 1") and "Nothing" in message
    assert caught.value.reason == "engine-failed"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_values_that_are_not_finite_are_refused(value: float, place: int) -> None:
    rows = entry(*GOOD)
    list(rows.values())[place].logprob = value
    with pytest.raises(NonFiniteLogits, match="row 1, position 0"):
        read(rows)


def test_flat_entries_without_the_last_two_are_refused(model: Any) -> None:
    damaged = output(model, SAMPLES[0], 8, flat=True)
    assert isinstance(damaged.prompt_logprobs, LikeFlatLogprobs)
    damaged.prompt_logprobs.end_indices[20] -= 2
    with pytest.raises(EngineFailed, match="position 19"):
        record_of(damaged, SAMPLES[0], 8, VOCAB)


# --- the tail ---------------------------------------------------------------------------------------------------------


def tail_of(label: float, alternatives: Sequence[float], vocab_size: int) -> float:
    """By `remainder`, from probabilities."""
    with np.errstate(divide="ignore"):
        logs = np.log(np.array([label])), np.log(np.array([alternatives]))
    return float(remainder(*logs, vocab_size)[0])


def test_tail_is_what_is_left() -> None:
    assert np.isclose(tail_of(0.5, [0.2, 0.1], 100), np.log(0.2), rtol=0, atol=1e-12)
    assert tail_of(0.7, [0.2, 0.1], 3) == -np.inf
    assert tail_of(0.7, [0.2, 0.1], 4) == np.log(REMAINDER_ERROR)


def test_tail_is_never_less_than_what_cannot_be_seen_nor_more_than_there_can_be() -> None:
    """What is left of 1 is noise there: an engine's sum may be 1e-6 off, to either side."""
    for noise in (-1e-6, 0, 1e-6):
        assert tail_of(0.9 + noise, [0.0999, 1e-4], 100) == np.log(REMAINDER_ERROR)
        assert np.isclose(tail_of(0.9 + noise, [0.1, 1e-20], 100), np.log(97e-20), rtol=0, atol=1e-9)
    record = remainder(np.array([0.0]), np.array([[-50.0, -2000.0]]), 1000)
    assert np.isclose(record[0], np.log(997) - 2000)


@pytest.mark.parametrize("spread", [0.3, 2.0, 6.0])
def test_tail_of_a_large_vocabulary_is_within_the_error_that_is_stated(spread: float) -> None:
    rng = np.random.default_rng(0)
    vocab_size, top_k = 100_000, 64
    for _ in range(5):
        logits = (rng.standard_normal(vocab_size) * spread).astype(np.float32)
        z = logits.astype(np.float64) - logits.max()
        exact = z - np.log(np.exp(z).sum())
        order = np.argsort(-exact)[: top_k + 1]
        shown = (logits - logits.max() - np.log(np.exp(logits - logits.max()).sum(dtype=np.float32))).astype(np.float32)
        kept = shown[order].astype(np.float64)
        found = remainder(kept[:1], kept[None, 1:], vocab_size)[0]
        rest = np.delete(exact, order)
        assert abs(np.exp(found) - np.exp(rest).sum()) <= REMAINDER_ERROR
        assert found > -np.inf


# --- the engine -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("vllm")
def test_engine_is_told_what_the_record_needs(tiny_model: Path) -> None:
    source = find_model(str(tiny_model))
    identity = vllm_identity(source, "auto")
    base = load_base(source, "auto", torch.device("cpu"))
    assert identity == replace(base.identity, attention="vllm")
    teacher = start_vllm(source, identity, 8, 100)
    assert LikeLLM.told["dtype"] == "float32"  # vLLM's own auto would be 16 bits
    assert LikeLLM.told["logprobs_mode"] == "raw_logprobs" and not LikeLLM.told["enable_prefix_caching"]
    assert (LikeLLM.told["max_logprobs"], LikeLLM.told["max_model_len"]) == (9, 101)
    assert teacher.params.prompt_logprobs == 9 and teacher.params.flat_logprobs and not teacher.params.detokenize
    for ours, theirs in zip(teacher(SAMPLES), TransformersTeacher(base.model, 8)(SAMPLES), strict=True):
        assert_close(ours, theirs)
    assert f"expected at most {VOCAB - 1}" in refusal(InvalidSettings, lambda: start_vllm(source, identity, 1000, 100))
    assert vllm_version() == "0.33.0"


def out_of_memory(*_: object, **__: object) -> None:
    raise RuntimeError("CUDA out of memory. Tried to allocate")


def refusal(kind: type[PipelineError], call: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


@pytest.mark.usefixtures("vllm")
def test_engine_that_is_absent_does_not_start_or_breaks_off(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = find_model(str(tiny_model))
    identity = vllm_identity(source, "bfloat16")
    assert identity.dtype == "bfloat16"
    message = refusal(EngineFailed, lambda: start_vllm(source, identity, 8, 256))
    assert "is greater than the derived 256. Nothing was run" in message
    teacher = start_vllm(source, identity, 8, 30)
    assert "lower --max-length" in refusal(EngineFailed, lambda: teacher(SAMPLES))
    monkeypatch.setattr(LikeLLM, "generate", out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):  # the command line has a sentence for it
        teacher(SAMPLES)
    monkeypatch.setattr(LikeLLM, "generate", lambda *_, **__: [])
    assert "expected 1 outputs, found 0" in refusal(EngineFailed, lambda: teacher(SAMPLES[1:]))
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert install_line("vllm") in refusal(InputNotFound, lambda: start_vllm(source, identity, 8, 30))


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("store", ["zarr", "arrow"])
@pytest.mark.parametrize("precision", ["exact", "fine"])
def test_cache_says_where_its_tail_is_from_and_trains(
    tiny_model: Path, tmp_path: Path, store: str, precision: str
) -> None:
    source = find_model(str(tiny_model))
    identity = vllm_identity(source, "float32")
    teacher = start_vllm(source, identity, 8, 100)
    capture = CaptureIdentity(
        8, 100, precision=precision, max_error=1 / 64 if precision == "fine" else 0.0, tail_from_remainder=True
    )
    manifest = Manifest(store, identity, None, capture, "tiny", {"vllm": "0.33.0"}, features_of(capture))
    assert manifest.reader_features == ("tail-from-remainder",)
    path = tmp_path / "cache"
    records = teacher(SAMPLES)
    with CacheWriter(path, manifest) as writer:
        writer.commit([CachedSample(s.token_ids, r) for s, r in zip(SAMPLES, records, strict=True)])
        writer.finalize()

    assert verify(path).is_intact
    opened = LogitCache.open(path)
    assert opened.manifest == manifest
    assert np.allclose(opened.lookup(SAMPLES[0].token_ids).tail_logprobs, records[0].tail_logprobs, atol=1e-3)
    assert len(list(open_cache(path).samples())) == 2  # by a reader written from docs/format.md alone
    assert "tail as 1 minus the rest" in done("inspect", path).out
    assert facts(path)["capture"]["tail_from_remainder"] and facts(path)["model"]["attention"] == "vllm"
    done(*train_line(tiny_model, path, tmp_path / "adapter"))
    result = json.loads((tmp_path / "adapter" / "run.json").read_text())["result"]["step_zero"]
    assert result["kl_nats"] < 1e-4 and result["tolerance_nats"] >= 0.01


@pytest.mark.parametrize(
    "more", [{"num_tail_samples": 4}, {"num_tail_groups": 2, "tail_partition": "0" * 32, "group_steps_per_nat": 1}]
)
def test_neither_groups_nor_draws_of_such_a_tail(more: dict[str, Any]) -> None:
    capture = CaptureIdentity(8, 100, tail_from_remainder=True, **more)
    manifest = Manifest("zarr", ModelIdentity("a" * 32, "{}", 260, "float32", "vllm"), None, capture, "", {})
    data = to_bytes(replace(manifest, reader_features=features_of(capture)))
    with pytest.raises(CorruptCache, match="neither groups of such a tail nor draws"):
        from_bytes(Manifest, data, "here")


def test_tails_that_vllm_cannot_give_are_refused() -> None:
    check_tail(0, 0)
    for groups, draws, said in ((64, 0, "64 tail groups"), (0, 8, "8 draws")):
        message = refusal(EngineFailed, lambda g=groups, d=draws: check_tail(g, d))  # type: ignore[misc]
        assert said in message and "--engine transformers" in message


def test_field_is_not_written_where_it_is_false() -> None:
    """So the bytes of other caches are what they were."""
    manifest = Manifest(
        "zarr", ModelIdentity("a" * 32, "{}", 260, "float32", "sdpa"), None, CaptureIdentity(8, 100), "", {}
    )
    assert b"tail_from_remainder" not in to_bytes(manifest)
    stated = replace(manifest, capture=replace(manifest.capture, tail_from_remainder=True))
    for odd in (stated, replace(manifest, reader_features=("tail-from-remainder",))):
        with pytest.raises(CorruptCache, match="exactly where the capture says so"):
            from_bytes(Manifest, to_bytes(odd), "here")
