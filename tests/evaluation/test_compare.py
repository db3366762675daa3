"""Evaluation against an oracle from full float64 logits, and with the base's side from a cache."""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_model import make_model

from logitcache.adapters.attach import AdapterSettings, attach
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.worker import precompute
from logitcache.data.samples import Sample
from logitcache.errors import (
    InputNotFound,
    InvalidData,
    NonFiniteLogits,
    NotComparable,
    NotTheBase,
    UnsupportedModel,
)
from logitcache.evaluation.compare import (
    Comparison,
    compare,
    compare_cached,
    evaluate,
    samples_fingerprint,
    shared_beginning,
)
from logitcache.models.loading import Base, Source
from logitcache.pairing.targets import samples_of
from logitcache.storage import LogitCache, ModelIdentity, PositionNotCaptured, SampleNotCached

V = 260


def make_adapted(seed: int = 0) -> Any:
    """The tiny base with LoRA that has moved away from it."""
    model = attach(make_model(), AdapterSettings(rank=4, alpha=8), "tiny")
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def make_samples(count: int = 7, seed: int = 0) -> list[Sample]:
    """Documents of very different length, supervised in part; the first comes twice, with other supervised tokens."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(count):
        n = int(rng.integers(3, 50))
        supervised = rng.random(n) < (0.3 if i % 3 else 1.0)
        supervised[-1] = True
        samples.append(Sample(rng.integers(0, 256, n).astype(np.uint32), supervised, f"row {i}"))
    again = np.zeros_like(samples[1].supervised)
    again[1:3] = True
    return [*samples, samples[0], Sample(samples[1].token_ids, again, "again")]


def make_cache(
    path: Path, samples: Sequence[Sample], top_k: int, precision: str = "exact", model: Any = None, **more: Any
) -> LogitCache:
    identity = ModelIdentity("a" * 32, "{}", V, "float32", "sdpa")
    base = Base(Source("tiny", Path("tiny")), model or make_model(), identity)
    settings = CaptureSettings(top_k=top_k, max_length=64, precision=precision, **more)
    precompute(base, samples, path, settings)
    return LogitCache.open(path)


def oracle(base: Any, adapted: Any, samples: Sequence[Sample], top_k: int = V - 1) -> dict[str, Any]:
    """Every number from full float64 logits, document by document and position by position.

    top_k: how many tokens other than the label are told apart; the others are one outcome.
    """
    documents: dict[tuple[int, ...], set[int]] = {}
    for sample in samples:
        labels = {t for t in range(1, len(sample.token_ids)) if sample.supervised[t]}
        documents.setdefault(tuple(int(t) for t in sample.token_ids), set()).update(labels)
    doubles = [copy.deepcopy(model).double().eval() for model in (base, adapted)]
    rows: list[dict[str, float]] = []
    flips: list[float] = []
    for tokens, labels in documents.items():
        with torch.no_grad():
            logits = [m(input_ids=torch.tensor([tokens])).logits[0].numpy() for m in doubles]
        first = min(labels) - 1
        flips.append(float(logits[0][first].argmax() != logits[1][first].argmax()))
        for t in sorted(labels):
            y = tokens[t]
            p, q = (_softmax(z[t - 1]) for z in logits)
            others = sorted((c for c in range(V) if c != y), key=lambda c: -p[c])
            kept, rest = [y, *others[:top_k]], others[top_k:]
            pairs = [(p[c], q[c]) for c in kept]
            if rest:
                pairs.append((math.fsum(p[c] for c in rest), math.fsum(q[c] for c in rest)))
            rows.append(
                {
                    "ce_before": -math.log(p[y]),
                    "ce_after": -math.log(q[y]),
                    "hits_before": float(p.argmax() == y),
                    "hits_after": float(q.argmax() == y),
                    "kl": math.fsum(a * math.log(a / b) for a, b in pairs),
                    "base_ce": math.fsum(-a * math.log(b) for a, b in pairs),
                    "agreement": float(p.argmax() == q.argmax()),
                }
            )
    means = {name: math.fsum(row[name] for row in rows) / len(rows) for name in rows[0]}
    ratio = math.exp(means["ce_after"]) / math.exp(means["ce_before"])
    counts = {"num_positions": len(rows), "num_documents": len(documents), "num_first_changed": sum(flips)}
    return means | counts | {"drift": ratio - 1}


def _softmax(z: Any) -> Any:
    e = np.exp(z - z.max())
    return e / e.sum()


def numbers(found: Comparison) -> dict[str, Any]:
    """A comparison under the oracle's names."""
    assert found.after is not None and found.drift_percent is not None
    return {
        "ce_before": found.before.ce_nats,
        "ce_after": found.after.ce_nats,
        "hits_before": found.before.token_accuracy,
        "hits_after": found.after.token_accuracy,
        "kl": found.kl_nats,
        "base_ce": found.base_ce_nats,
        "agreement": found.agreement,
        "num_positions": found.after.num_positions,
        "num_documents": found.num_documents,
        "num_first_changed": found.num_first_changed,
        "drift": found.drift_percent / 100,
    }


@pytest.mark.parametrize("batch_tokens", [1, 60, 8192])
def test_two_models_equal_the_oracle(batch_tokens: int) -> None:
    base, adapted, samples = make_model(), make_adapted(), make_samples()
    expected = oracle(base, adapted, samples)
    found = compare(base, adapted, samples, batch_tokens)
    assert expected["kl"] > 0.05 and 0 < expected["agreement"] < 1 and abs(expected["drift"]) > 1e-3
    assert 0 < expected["num_first_changed"] < expected["num_documents"]
    assert numbers(found) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert found.before_from == "base" and found.undecided == 0


def test_the_first_token_is_that_of_the_answer_and_not_the_templates(tmp_path: Path) -> None:
    """Chat templates begin every answer alike (Qwen3: <think>, an empty line): no model has to decide there."""
    base, adapted, rng = make_model(), make_adapted(), np.random.default_rng(3)
    whole, answers = [], []
    for i in range(12):
        tokens = np.concatenate([rng.integers(0, V, 3), [5, 6], rng.integers(0, V, 4)]).astype(np.uint32)
        for found, start in ((whole, 3), (answers, 5)):
            found.append(Sample(tokens, np.arange(9) >= start, f"row {i}"))
    changed = compare(base, adapted, answers).num_first_changed
    at_the_templates = sum(compare(base, adapted, [sample]).num_first_changed or 0 for sample in whole)
    assert changed != at_the_templates
    assert compare(base, adapted, whole).num_first_changed == changed
    cache = make_cache(tmp_path, whole, V - 1, model=base)
    assert compare_cached(adapted, cache, whole).num_first_changed == changed
    assert shared_beginning(whole) == 2 and shared_beginning(whole[:1]) == 0
    assert shared_beginning([whole[0], whole[0]]) == 5  # none is passed over to its end


def test_the_base_alone_has_its_own_numbers_only() -> None:
    base, samples = make_model(), make_samples()
    both, alone = compare(base, make_adapted(), samples), compare(base, None, samples)
    assert alone.before == both.before and alone.samples == both.samples
    assert (alone.after, alone.kl_nats, alone.base_ce_nats, alone.agreement, alone.num_first_changed) == (None,) * 5
    assert alone.intervals == {name: both.intervals[name] for name in alone.intervals} != {}


def test_an_adapter_that_changes_nothing_changes_no_number() -> None:
    base, samples = make_model(), make_samples()
    found = compare(base, attach(make_model(), AdapterSettings(rank=4), "tiny"), samples)
    assert found.after == found.before and found.drift_percent == 0 and found.agreement == 1
    assert found.num_first_changed == 0 and found.intervals["first_changed"] == (0, 0)
    assert abs(found.kl_nats or 0) < 1e-9 and found.intervals["agreement"] == (1, 1)


@pytest.mark.parametrize("batch_tokens", [1, 60, 8192])
def test_a_complete_cache_equals_two_models(tmp_path: Path, batch_tokens: int) -> None:
    base, adapted, samples = make_model(), make_adapted(), make_samples()
    cache = make_cache(tmp_path / "c", samples, V - 1)
    live, cached = compare(base, adapted, samples, 8192), compare_cached(adapted, cache, samples, batch_tokens)
    assert numbers(cached) == pytest.approx(numbers(live), rel=1e-6, abs=1e-6)
    assert cached.samples == live.samples and cached.before_from == "cache" and cached.undecided == 0
    assert cached.intervals.keys() == live.intervals.keys()
    for name, ends in live.intervals.items():
        scale = 100 if name == "drift_percent" else 1
        assert cached.intervals[name] == pytest.approx(ends, rel=1e-6, abs=2e-6 * scale), name


@pytest.mark.parametrize("more", [{}, {"tail_groups": 4}, {"tail_samples": 3}, {"store": "arrow"}], ids=str)
def test_a_small_cache_is_the_bucket_and_a_lower_bound(tmp_path: Path, more: dict[str, Any]) -> None:
    base, adapted, samples = make_model(), make_adapted(), make_samples()
    full = oracle(base, adapted, samples)
    if "tail_groups" in more:
        cache = make_grouped_cache(tmp_path / "c", samples, 8)
    else:
        cache = make_cache(tmp_path / "c", samples, 8, **more)
    found = numbers(compare_cached(adapted, cache, samples))
    assert found == pytest.approx(oracle(base, adapted, samples, top_k=8), rel=1e-5, abs=1e-6)
    assert 0 < found["kl"] < full["kl"] - 0.01 and found["base_ce"] < full["base_ce"] - 0.01
    exact = ("ce_before", "ce_after", "hits_before", "hits_after", "agreement", "drift", "num_first_changed")
    assert {n: found[n] for n in exact} == pytest.approx({n: full[n] for n in exact}, rel=1e-5, abs=1e-6)


def make_grouped_cache(path: Path, samples: Sequence[Sample], top_k: int) -> LogitCache:
    identity = ModelIdentity("a" * 32, "{}", V, "float32", "sdpa")
    base = Base(Source("tiny", Path("tiny")), make_model(), identity)
    settings = CaptureSettings(top_k=top_k, max_length=64, precision="exact", tail_groups=4)
    precompute(base, samples, path, settings)
    return LogitCache.open(path)


@pytest.mark.parametrize("precision", ["fine", "compact"])
def test_a_rounded_cache_is_within_its_rounding(tmp_path: Path, precision: str) -> None:
    base, adapted, samples = make_model(), make_adapted(), make_samples(12)
    cache = make_cache(tmp_path / "c", samples, V - 1, precision)
    live, cached = compare(base, adapted, samples), compare_cached(adapted, cache, samples)
    assert live.kl_nats is not None and cached.kl_nats is not None
    assert live.agreement is not None and cached.agreement is not None
    assert cached.before.ce_nats == pytest.approx(live.before.ce_nats, abs=1 / 2048 + 1e-6)
    assert cached.after == live.after
    assert cached.kl_nats == pytest.approx(live.kl_nats, abs=cache.manifest.capture.max_error)
    assert abs(cached.agreement - live.agreement) <= cached.undecided
    assert cached.num_first_changed is not None and live.num_first_changed is not None
    assert abs(cached.num_first_changed - live.num_first_changed) <= cached.num_first_undecided
    assert abs(cached.before.token_accuracy - live.before.token_accuracy) <= cached.undecided


def make_tied_model() -> Any:
    """A base whose tokens 2 i and 2 i + 1 always have the same logit."""
    model = make_model()
    weight = model.lm_head.weight.data
    weight[1::2] = weight[::2]
    return model


def greedy_samples(model: Any, count: int = 6, length: int = 20) -> list[Sample]:
    """What the model itself would say, so that labels are among its first tokens; of a tie, either one."""
    rng = np.random.default_rng(0)
    samples = []
    for i in range(count):
        tokens = [int(rng.integers(0, 256))]
        while len(tokens) < length:
            with torch.no_grad():
                z = model(input_ids=torch.tensor([tokens])).logits[0, -1]
            tokens.append(int(z.argmax()) // 2 * 2 + int(rng.integers(0, 2)))
        samples.append(Sample(np.array(tokens, dtype=np.uint32), np.ones(length, dtype=np.bool_), f"row {i}"))
    return samples


def test_of_equal_probabilities_the_smaller_id_is_first(tmp_path: Path) -> None:
    base = make_tied_model()
    samples = greedy_samples(base)
    labels = np.concatenate([s.token_ids[1:] for s in samples])
    cache = make_cache(tmp_path / "c", samples, V - 1, model=base)
    live, cached = compare(base, base, samples), compare_cached(base, cache, samples)
    assert live.before.token_accuracy == np.mean(labels % 2 == 0)  # the even one of each pair
    assert numbers(cached) == pytest.approx(numbers(live), abs=1e-6)
    assert cached.agreement == 1 and cached.undecided == 0


def test_ties_within_the_rounding_are_told(tmp_path: Path) -> None:
    base = make_tied_model()
    samples = greedy_samples(base)
    found = compare_cached(base, make_cache(tmp_path / "c", samples, V - 1, "fine", model=base), samples)
    assert found.undecided == 1  # every label ties with its neighbour
    assert found.num_first_undecided == found.num_documents == len(samples)
    distinct = make_model()
    cache = make_cache(tmp_path / "d", make_samples(), V - 1, "fine", model=distinct)
    assert compare_cached(distinct, cache, make_samples()).undecided < 0.1


def test_samples_of_the_cache_itself_and_prefixes(tmp_path: Path) -> None:
    base, adapted, samples = make_model(), make_adapted(), make_samples()
    cache = make_cache(tmp_path / "c", samples, V - 1)
    whole = compare_cached(adapted, cache, samples)
    assert compare_cached(adapted, cache, samples_of(cache)) == whole
    prefix = [Sample(samples[0].token_ids[:3], np.ones(3, dtype=np.bool_), "prefix")]
    found = numbers(compare_cached(adapted, cache, prefix))
    assert found == pytest.approx(oracle(base, adapted, prefix), rel=1e-5, abs=1e-6)


def test_the_mode_of_a_model_in_training_is_kept(tmp_path: Path) -> None:
    samples, adapted = make_samples(), make_adapted()
    cache = make_cache(tmp_path / "c", samples, 8)
    expected = compare_cached(adapted, cache, samples)
    noisy = attach(make_model(), AdapterSettings(rank=4, alpha=8, dropout=0.5), "tiny")
    noisy.load_state_dict(adapted.state_dict())
    noisy.train()
    assert compare_cached(noisy, cache, samples) == expected
    assert noisy.training and any(p.requires_grad for p in noisy.parameters())
    assert compare(make_model(), noisy, samples).after == expected.after


def test_the_fingerprint_is_of_positions_and_not_of_order() -> None:
    samples = make_samples()
    assert samples_fingerprint(samples) == samples_fingerprint(list(reversed(samples)))
    assert samples_fingerprint(samples) == samples_fingerprint([*samples, samples[3]])
    fewer = Sample(samples[0].token_ids, samples[0].supervised.copy(), "row 0")
    fewer.supervised[-1] = False
    others = [samples[1:-2], [fewer, *samples[1:-2], samples[-1]]]
    assert len({samples_fingerprint(s) for s in (samples, *others)}) == 3


def test_progress_counts_every_token_once(tmp_path: Path) -> None:
    samples = make_samples()
    cache = make_cache(tmp_path / "c", samples, 8)
    for run in (
        lambda say: compare(make_model(), None, samples, 60, say),
        lambda say: compare_cached(make_adapted(), cache, samples, 60, say),
    ):
        told: list[int] = []
        run(told.append)
        assert sum(told) == sum(len(s.token_ids) for s in samples[:-2])


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_is_not_cached_is_refused_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, adapted = make_samples(), make_adapted()
    cache = make_cache(tmp_path / "c", samples[:2], 8)
    monkeypatch.setattr(adapted, "forward", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(SampleNotCached, match=r"^row 2: .*not cached"):
        compare_cached(adapted, cache, samples[:4])
    more = Sample(samples[1].token_ids, np.ones_like(samples[1].supervised), "all of row 1")
    with pytest.raises(PositionNotCaptured, match=r"^all of row 1: .*were not captured"):
        compare_cached(adapted, cache, [samples[0], more])


def test_missing_text_is_found_before_weights_are_read(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("logitcache.evaluation.compare.load_as", never)
    with pytest.raises(InputNotFound, match=r"nowhere\.jsonl"):
        evaluate(tiny_model, None, {"new": "nowhere.jsonl"})


def test_a_cache_without_alternatives_is_refused(tmp_path: Path) -> None:
    """What the base predicts first is not in it."""
    samples = make_samples()
    cache = make_cache(tmp_path / "c", samples, top_k=0)
    with pytest.raises(NotComparable, match="--top-k 0"):
        compare_cached(make_adapted(), cache, samples)


def test_a_model_of_another_width_is_refused(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", make_samples(), 8)
    with pytest.raises(NotTheBase, match="expected logits over 260 tokens, found 300"):
        compare_cached(make_model(vocab_size=300), cache, make_samples())


def test_nothing_to_evaluate_is_refused(tmp_path: Path) -> None:
    empty = Sample(np.arange(4, dtype=np.uint32), np.zeros(4, dtype=np.bool_), "row 0")
    cache = make_cache(tmp_path / "c", make_samples(), 8)
    for samples in ([], [empty]):
        with pytest.raises(InvalidData, match="expected a sample with a supervised token"):
            compare(make_model(), None, samples)
        with pytest.raises(InvalidData, match="expected a sample with a supervised token"):
            compare_cached(make_adapted(), cache, samples)


def test_a_sample_longer_than_the_models_positions_is_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=8, n_embd=16, n_layer=1, n_head=2)).eval()
    with pytest.raises(UnsupportedModel, match="it learned 8 positions"):
        compare(model, None, make_samples())
    cache = make_cache(tmp_path / "c", make_samples(), 8)
    with pytest.raises(UnsupportedModel, match="it learned 8 positions"):
        compare_cached(model, cache, make_samples())


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    samples = make_samples()
    broken = make_adapted()
    next(p for n, p in broken.named_parameters() if "lora_B" in n).data.fill_(float("nan"))
    with pytest.raises(NonFiniteLogits, match="is not finite"):
        compare(make_model(), broken, samples)
    with pytest.raises(NonFiniteLogits, match="is not finite"):
        compare_cached(broken, make_cache(tmp_path / "c", samples, 8), samples)
