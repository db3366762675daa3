"""Tail groups and tail samples from a real model: what is captured, stored, looked up and compared."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.cli_harness import done, precompute, refused, text_data, train_line
from support.tiny_model import make_model
from support.tiny_runs import V, make_base, make_samples

from logitcache.capture.records import slice_record
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.teacher import capture
from logitcache.capture.vocab_groups import token_groups
from logitcache.capture.worker import precompute as fill
from logitcache.data.samples import Sample
from logitcache.errors import NotTheBase
from logitcache.losses.formulas import Objective, regularizer_values
from logitcache.models.head import hidden_states
from logitcache.pairing.step_zero import Probe, probe_step_zero
from logitcache.pairing.targets import sparse_targets
from logitcache.storage import LogitCache
from logitcache.storage.records import NO_TOKEN


def make_tails_cache(path: Path, samples: list[Sample], **settings: Any) -> LogitCache:
    chosen = CaptureSettings(top_k=8, max_length=64, precision="exact", **settings)
    fill(make_base(), samples, path, chosen)
    return LogitCache.open(path)


def logprobs_of(sample: Sample) -> np.ndarray:
    """log p of the base at the supervised positions, [P, V], from the model's own logits."""
    ids = torch.from_numpy(sample.token_ids.astype(np.int64))[None]
    with torch.no_grad():
        logits = make_model()(input_ids=ids).logits[0].double()
    return logits.log_softmax(-1)[sample.positions.astype(np.int64)].numpy()


# --- the partition ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_groups", [2, 7, 64, 256])
def test_every_token_has_a_group_and_every_group_a_token(num_groups: int) -> None:
    groups = token_groups(make_model(), num_groups)
    assert groups.shape == (V,) and groups.dtype == np.uint8
    assert sorted(np.unique(groups).tolist()) == list(range(num_groups))
    np.testing.assert_array_equal(groups, token_groups(make_model(), num_groups))


def test_tokens_of_one_direction_share_a_group() -> None:
    """Rows along 5 directions, of any length: spherical k-means finds them."""
    model = make_model()
    directions = torch.linalg.qr(torch.randn(32, 5, generator=torch.Generator().manual_seed(0)))[0].T
    which = torch.arange(V) % 5
    lengths = torch.linspace(0.1, 9.0, V)[:, None]
    model.get_output_embeddings().weight.data.copy_(directions[which] * lengths)
    groups = token_groups(model, 5)
    assert len({(int(w), int(g)) for w, g in zip(which, groups, strict=True)}) == 5


def test_more_groups_than_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 2 to"):
        token_groups(make_model(), V + 1)
    with pytest.raises(ValueError, match="expected 2 to"):
        token_groups(make_model(), 1)


# --- capture ---------------------------------------------------------------------------------------------------------


def test_group_masses_are_those_of_the_model(tmp_path: Path) -> None:
    samples = make_samples(12)
    cache = make_tails_cache(tmp_path / "c", samples, tail_groups=6)
    groups = cache.token_groups()
    assert groups is not None
    for sample in samples[:5]:
        record, logprobs = cache.lookup(sample.token_ids, sample.positions), logprobs_of(sample)
        assert record.tail_group_logprobs is not None
        for row in range(len(record)):
            mass = np.exp(logprobs[row])
            mass[[record.label_ids[row], *record.alternative_ids[row]]] = 0
            expected = [mass[groups == g].sum() for g in range(6)]
            np.testing.assert_allclose(np.exp(record.tail_group_logprobs[row]), expected, rtol=1e-4, atol=1e-9)


def test_draws_are_from_the_tail_with_its_probabilities(tmp_path: Path) -> None:
    """Each draw is beyond the alternatives, with its own log p; frequencies are within 5 standard errors of p."""
    samples = make_samples(3)
    cache = make_tails_cache(tmp_path / "c", samples, tail_samples=4000)
    record, logprobs = cache.lookup(samples[0].token_ids, samples[0].positions), logprobs_of(samples[0])
    assert record.tail_sample_ids is not None and record.tail_sample_logprobs is not None
    for row in range(len(record)):
        ids = record.tail_sample_ids[row].astype(np.int64)
        kept = {int(record.label_ids[row]), *map(int, record.alternative_ids[row])}
        assert not kept & set(ids.tolist())
        np.testing.assert_allclose(record.tail_sample_logprobs[row], logprobs[row][ids], rtol=0, atol=1e-4)
        p = np.exp(logprobs[row] - record.tail_logprobs[row])
        p[list(kept)] = 0
        frequency = np.bincount(ids, minlength=V) / 4000
        assert np.all(np.abs(frequency - p) <= 5 * np.sqrt(p * (1 - p) / 4000) + 2 / 4000)


def test_draws_do_not_depend_on_the_batch() -> None:
    samples = make_samples(6)
    model = make_model()
    together = capture(model, samples, 8, num_tail_samples=16)
    alone = [capture(model, [sample], 8, num_tail_samples=16)[0] for sample in samples]
    for a, b in zip(together, alone, strict=True):
        assert a.tail_sample_ids is not None and b.tail_sample_ids is not None
        assert (a.tail_sample_ids == b.tail_sample_ids).mean() > 0.99  # but for rounding at a boundary
    assert not np.array_equal(alone[0].tail_sample_ids[0], alone[1].tail_sample_ids[0])  # type: ignore[index]


def test_a_row_without_a_tail_draws_nothing() -> None:
    logits = torch.randn(4, 9)
    labels = torch.zeros(4, dtype=torch.long)
    found = slice_record(logits, labels, 8, uniforms=torch.rand(4, 3, dtype=torch.float64))
    assert (found["tail_sample_ids"].numpy().astype(np.uint32) == NO_TOKEN).all()
    assert (found["tail_sample_logprobs"] == -torch.inf).all()


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2**-53])
def test_the_ends_of_the_range_draw_tokens_that_have_mass(uniform: float) -> None:
    logits = torch.full((1, 50), -torch.inf)
    logits[0, 10:20] = torch.linspace(0, 5, 10)
    found = slice_record(
        logits.clone().nan_to_num(neginf=-200.0), torch.tensor([12]), 2, uniforms=torch.tensor([[uniform]])
    )
    assert 10 <= int(found["tail_sample_ids"][0, 0]) < 18
    assert float(found["tail_sample_logprobs"][0, 0]) > -20


# --- compared --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"tail_groups": 12}, {"tail_samples": 300}])
def test_values_approach_the_exact_ones(tmp_path: Path, settings: dict[str, int]) -> None:
    """Of another model's logits: bucket <= groups <= exact, and draws near exact, on cached records."""
    samples = make_samples(20)
    cache = make_tails_cache(tmp_path / "c", samples, **settings)
    groups = cache.token_groups()
    records = cache.lookup_batch([s.token_ids for s in samples], [s.positions for s in samples])
    targets = sparse_targets(records, None if groups is None else torch.from_numpy(groups.copy()))
    student = make_model(seed=1)
    logits, exact = [], []
    for sample in samples:
        ids = torch.from_numpy(sample.token_ids.astype(np.int64))[None]
        with torch.no_grad():
            hidden = hidden_states(student, input_ids=ids, attention_mask=torch.ones_like(ids))
            z = student.lm_head(hidden)[0][sample.positions.astype(np.int64)]
        labels = torch.from_numpy(sample.token_ids.astype(np.int64))[sample.positions + 1, None]
        p, q = (x.scatter(1, labels, -torch.inf) for x in (torch.from_numpy(logprobs_of(sample)), z.double()))
        p, q = p.log_softmax(1), q.log_softmax(1)
        logits.append(z)
        exact.append(torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(1))
    whole, z = torch.cat(exact).float(), torch.cat(logits)
    bucket = regularizer_values(z, targets, Objective())
    found = regularizer_values(z, targets, Objective(tail="groups" if groups is not None else "sampled"))
    if groups is not None:
        assert torch.all(bucket <= found + 1e-4) and torch.all(found <= whole + 1e-4)
        assert float((whole - found).mean()) < 0.9 * float((whole - bucket).mean())
    else:
        error = (found - whole).mean() / ((found - whole).std() / len(whole) ** 0.5)
        assert abs(float(error)) < 4.5


# --- the command line ------------------------------------------------------------------------------------------------


def test_the_cache_keeps_the_partition_it_was_begun_with(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine's k-means may differ in a token; whoever goes on with a cache takes the partition from it."""
    precompute(tiny_model, text_data(tmp_path, 0, 6), tmp_path / "c", "--tail-groups", 4)
    before = LogitCache.open(tmp_path / "c").token_groups()
    import logitcache.capture.vocab_groups as job

    def refuse(*_: Any) -> Any:
        raise AssertionError("a partition was made again")

    monkeypatch.setattr(job, "token_groups", refuse)
    precompute(tiny_model, text_data(tmp_path, 0, 12), tmp_path / "c", "--tail-groups", 4)
    after = LogitCache.open(tmp_path / "c")
    assert len(after) == 12
    np.testing.assert_array_equal(after.token_groups(), before)


@pytest.mark.parametrize(
    ("made", "trained"),
    [
        (("--tail-groups", 4), ("--tail", "groups")),
        (("--tail-groups", 4), ()),
        (("--tail-groups", 4, "--min-mass", 0.5), ("--tail", "auto")),
        (("--tail-samples", 8), ("--tail", "sampled")),
        (("--tail-samples", 8, "--tail-groups", 4), ("--tail", "sampled", "--regularizer", "full-kl")),
        ((), ()),
        (("--tail-groups", 0), ()),
        (("--tail-groups", 4, "--tail-group-step", 0.25), ()),
        (("--tail-groups", 0, "--top-k", 0), ("--regularizer", "full-kl")),
        (("--top-k", 0, "--tail-groups", 4, "--tail-group-step", 0.25), ("--tail", "groups")),
        (("--tail-groups", 0, "--top-k", 0, "--tail-samples", 8), ("--tail", "sampled")),
        ((), ("--tail", "renormalize", "--temperature", 2)),
        ((), ("--regularizer", "masked-js", "--weighting", "non-target-mass")),
        (
            ("--tail-groups", 0),
            ("--regularizer", "masked-reverse-kl", "--min-adapted-rest", 1e-6, "--min-base-rest", 1e-3),
        ),
    ],
)
def test_every_form_trains(
    tmp_path: Path, tiny_model: Path, made: tuple[object, ...], trained: tuple[object, ...]
) -> None:
    precompute(tiny_model, text_data(tmp_path), tmp_path / "c", *made)
    done(*train_line(tiny_model, tmp_path / "c", tmp_path / "o", *trained, "--max-steps", 3, "--lr", 1e-2))
    import json

    run = json.loads((tmp_path / "o" / "run.json").read_text())
    assert run["status"] == "finished" and run["result"]["final"]["kl"] > 0
    expected = "groups" if "--tail-groups" in made and made[:2] != ("--tail-groups", 0) else "bucket"
    if "--tail" not in trained:
        assert run["objective"]["tail"] == expected


@pytest.mark.parametrize(
    ("status", "flags", "words"),
    [
        (1, ("--tail", "groups"), "--tail-groups"),
        (1, ("--tail", "sampled"), "--tail-samples"),
        (2, ("--temperature", 2), "renormalize"),
        (2, ("--tail", "sampled", "--regularizer", "masked-js"), "forward KL"),
    ],
)
def test_what_the_cache_or_the_formula_does_not_have_is_refused(
    tmp_path: Path, tiny_model: Path, status: int, flags: tuple[object, ...], words: str
) -> None:
    precompute(tiny_model, text_data(tmp_path), tmp_path / "c", "--tail-groups", 0)
    assert words in refused(status, *train_line(tiny_model, tmp_path / "c", tmp_path / "o", *flags))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "--regularizer full-kl"),
        (("--tail", "renormalize"), "--regularizer full-kl"),
        (("--regularizer", "full-kl", "--tail", "renormalize"), "--regularizer full-kl"),
        (("--regularizer", "masked-js"), "--regularizer full-kl"),
        (("--tail", "groups"), "--tail-groups"),
        (("--top-k", 1, "--regularizer", "full-kl"), "holds 0 alternatives"),
    ],
)
def test_label_and_tail_alone_are_no_masked_anchor(
    tmp_path: Path, tiny_model: Path, flags: tuple[object, ...], words: str
) -> None:
    """One outcome agrees with any model: such a run would train on cross-entropy alone and say otherwise."""
    precompute(tiny_model, text_data(tmp_path), tmp_path / "c", "--tail-groups", 0, "--top-k", 0)
    assert words in refused(1, *train_line(tiny_model, tmp_path / "c", tmp_path / "o", *flags))
    wide = tmp_path / "wide"
    precompute(tiny_model, text_data(tmp_path), wide, "--tail-groups", 0)
    if "--top-k" not in flags and flags != ("--tail", "groups"):
        assert words in refused(1, *train_line(tiny_model, wide, tmp_path / "o", "--top-k", 0, *flags))


def test_another_model_is_no_base_of_labels_alone(tmp_path: Path) -> None:
    """Step zero is measured with the label as an outcome, where no alternative is."""
    samples = make_samples(8)
    chosen = CaptureSettings(top_k=0, max_length=64, tail_groups=4)
    fill(make_base(), samples, tmp_path / "c", chosen)
    cache, objective = LogitCache.open(tmp_path / "c"), Objective(tail="groups")
    assert probe_step_zero(make_model(), Probe(cache, objective), samples).kl_nats < 1e-5
    with pytest.raises(NotTheBase):
        probe_step_zero(make_model(seed=1), Probe(cache, objective), samples)


@pytest.mark.parametrize(
    "flags",
    [
        ("--tail-groups", 1),
        ("--tail-samples", 4, "--min-mass", 0.5),
        ("--top-k", 0, "--min-mass", 0.5),
        ("--tail-group-step", 0.25),
        ("--tail-groups", 4, "--tail-group-step", 0.5),
    ],
)
def test_precompute_refuses_tails_that_say_nothing(tmp_path: Path, tiny_model: Path, flags: tuple[object, ...]) -> None:
    data, cache = text_data(tmp_path), tmp_path / "c"
    refused(2, "precompute", "--model", tiny_model, "--data", data, "--cache", cache, *flags)
    assert not cache.exists()
