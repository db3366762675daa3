"""Weighted cross-entropy from batch to step: the oracle's loss and gradient, however documents and steps are arranged.

The oracle makes full logits of a live base and of the student, in float64, one document at a time; weights, means and
gradients are `oracles_weights`' and `oracles`'.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.oracles import FloatArray, IntArray, log_softmax
from support.oracles_weights import (
    OVER_KEPT,
    dft_oracle,
    eaft_oracle,
    num_of_mean,
    rho1_oracle,
    stm_oracle,
    weighted_sums,
)
from support.plug_ins import make_exact_cache, on_the_left, packed_by_hand, rows_of, trl
from support.tiny_model import make_model
from support.tiny_runs import (
    V,
    gradients_after_one_step,
    make_base,
    make_cache,
    make_samples,
    make_trainer,
    moved_adapter,
    run,
    step_of,
)
from support.two_processes import in_two_processes

from logitcache.adapters.attach import AdapterSettings, attach
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.worker import precompute as capture
from logitcache.data.batches import pad_samples, pad_weighted
from logitcache.data.samples import Sample
from logitcache.errors import InvalidBatch, NotTheBase, TrainingFailed
from logitcache.losses.formulas import Objective
from logitcache.storage import LogitCache
from logitcache.training.anchors import Anchor
from logitcache.training.custom_loop import CachedLoss
from logitcache.training.settings import AnchorSettings

FORMS = ("dft", "stm", "eaft", "eaft-base", "rho1", "data")
WEIGHT = 1.5
PERPLEXITY = 400.0
"""Above which stm drops: a half of these random tokens."""


def weighted_samples(count: int = 12) -> list[Sample]:
    """Samples of uneven lengths, each with a weight a token, some of them 0."""
    rng = np.random.default_rng(3)
    return [
        replace(s, weights=np.where(rng.random(n) < 0.3, 0, rng.random(n) * 2).astype(np.float32))
        for s in make_samples(count)
        for n in [len(s.token_ids)]
    ]


def for_form(name: str, samples: Sequence[Sample]) -> list[Sample]:
    return list(samples) if name == "data" else [replace(s, weights=None) for s in samples]


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return weighted_samples()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, samples: list[Sample]) -> LogitCache:
    """Of every alternative in float32."""
    return make_cache(tmp_path_factory.mktemp("weights") / "c", samples, top_k=V - 1)


def objective_of(name: str, regularizer: str = "full-kl") -> Objective:
    value = PERPLEXITY if name == "stm" else None
    weight = 1.0 if regularizer == "none" else WEIGHT
    return Objective(regularizer, weight=weight, ce_weight=name, ce_weight_value=value)


# --- the oracle ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """Of a step: the loss, its means, N, and the gradient of the student's parameters."""

    loss: float
    ce: float
    kl: float
    num_ce: int
    by_parameter: dict[str, FloatArray]


def dense(model: Any, sample: Sample) -> torch.Tensor:
    ids = torch.from_numpy(sample.token_ids.astype(np.int64))[None]
    return model(input_ids=ids).logits[0, sample.positions]


def weights_of(name: str, b: FloatArray, z: FloatArray, y: IntArray, samples: Sequence[Sample]) -> FloatArray:
    log_p = np.array([log_softmax(row)[label] for row, label in zip(b, y, strict=True)])
    if name == "dft":
        return dft_oracle(z, y)
    if name == "stm":
        return stm_oracle(log_p, PERPLEXITY)
    if name in ("eaft", "eaft-base"):
        return eaft_oracle(list(z if name == "eaft" else b), 1.0)
    if name == "rho1":
        return rho1_oracle(log_p, z, y, [i for i, s in enumerate(samples) for _ in s.positions], 0.6)
    found = [s.weights[s.positions + 1] for s in samples if s.weights is not None]
    return np.concatenate(found).astype(np.float64)


def expected_step(name: str, samples: Sequence[Sample], kl_weight: float, student: Any) -> Expected:
    """mean w * CE + kl_weight * mean KL(p || q) over all positions, in float64."""
    student, base = student.double(), make_model().double()
    graphs = [dense(student, s) for s in samples]
    z = torch.cat(graphs).detach().numpy()
    with torch.no_grad():
        b = torch.cat([dense(base, s) for s in samples]).numpy()
    y = np.concatenate([s.token_ids[s.positions + 1] for s in samples]).astype(np.int64)
    weights = weights_of(name, b, z, y, samples)
    ce, gradient = weighted_sums(z, y, weights)
    num_ce = num_of_mean(name, weights)
    log_p, log_q = np.array([log_softmax(row) for row in b]), np.array([log_softmax(row) for row in z])
    kl = math.fsum((np.exp(log_p) * (log_p - log_q)).sum(axis=1)) / len(y)
    gradient = gradient / num_ce + kl_weight * (np.exp(log_q) - np.exp(log_p)) / len(y)
    student.zero_grad()
    torch.cat(graphs).backward(torch.from_numpy(gradient))
    by_parameter = {n: p.grad.numpy() for n, p in student.named_parameters() if p.grad is not None}
    return Expected(ce / num_ce + kl_weight * kl, ce / num_ce, kl, num_ce, by_parameter)


def assert_gradients(found: dict[str, Any], expected: Expected) -> None:
    assert found.keys() == expected.by_parameter.keys()
    for name, gradient in expected.by_parameter.items():
        size = max(1.0, float(np.abs(gradient).max()))
        np.testing.assert_allclose(np.asarray(found[name]), gradient, rtol=0, atol=3e-6 * size, err_msg=name)


# --- layouts ---------------------------------------------------------------------------------------------------------


def with_weights(collated: dict[str, Any], samples: Sequence[Sample], name: str) -> dict[str, Any]:
    """The batch with the weights of each document, found by its tokens, wherever it stands."""
    if any(s.weights is None for s in samples):
        return collated
    ids = collated["input_ids"].numpy()
    weights = np.zeros(ids.shape, dtype=np.float32)
    for sample in samples:
        n = len(sample.token_ids)
        for row, column in np.ndindex(len(ids), ids.shape[1] - n + 1):
            if np.array_equal(ids[row, column : column + n], sample.token_ids):
                weights[row, column : column + n] = sample.weights
    return {**collated, name: torch.from_numpy(weights)}


LAYOUTS: dict[str, Callable[[Sequence[Sample]], dict[str, Any]]] = {
    "padded": lambda samples: with_weights(pad_samples(samples), samples, "loss_scale"),
    "left": lambda samples: with_weights(on_the_left(rows_of(samples)), samples, "weights"),
    "padding-free": lambda samples: with_weights(trl(rows_of(samples), padding_free=True), samples, "loss_scale"),
    "packed": lambda samples: with_weights(packed_by_hand(rows_of(samples)), samples, "weights"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FORMS)
def test_a_loop_has_the_loss_of_the_oracle(name: str, layout: str, samples: list[Sample], cache: LogitCache) -> None:
    used = for_form(name, samples[:7])
    expected = expected_step(name, used, WEIGHT, moved_adapter())
    student = moved_adapter()
    anchored = CachedLoss(cache, objective_of(name), check=False)
    batch = LAYOUTS[layout](used)
    assert anchored.count(batch).tolist() == [expected.num_ce, sum(len(s.positions) for s in used)]
    found = anchored(student, batch)
    assert found.loss.item() == pytest.approx(expected.loss, rel=1e-6)
    assert found.ce.item() == pytest.approx(expected.ce, rel=1e-6)
    assert found.kl.item() == pytest.approx(expected.kl, rel=1e-5)
    found.loss.backward()
    assert_gradients({n: p.grad for n, p in student.named_parameters() if p.grad is not None}, expected)


@pytest.mark.parametrize("sizes", [(12, 1), (5, 3), (2, 6)], ids=["at once", "uneven", "accumulated"])
@pytest.mark.parametrize("regularizer", ["none", "full-kl"])
@pytest.mark.parametrize("name", FORMS)
def test_a_step_has_the_loss_of_the_oracle(
    name: str, regularizer: str, sizes: tuple[int, int], samples: list[Sample], cache: LogitCache, tmp_path: Path
) -> None:
    """Through the check of the first step, however it is divided: 5 + 5 + 2 samples, each a document of its own."""
    used, weight = for_form(name, samples), 0.0 if regularizer == "none" else WEIGHT
    given = dict(zip(("per_device_train_batch_size", "gradient_accumulation_steps"), sizes, strict=True))
    trainer = make_trainer(tmp_path, used, cache, objective_of(name, regularizer), **given)
    trainer.data_collator = pad_weighted if name == "data" else pad_samples
    found = gradients_after_one_step(trainer)
    expected = expected_step(name, used, weight, moved_adapter())
    log = trainer.state.log_history[0]
    assert log["ce"] == pytest.approx(expected.ce, rel=1e-6) and log["loss"] == pytest.approx(expected.loss, rel=1e-5)
    if regularizer != "none":
        assert log["kl"] == pytest.approx(expected.kl, rel=1e-5)
    assert_gradients(found, expected)


UNEVEN = ("stm", "rho1", "data")
"""Forms of which a process keeps another number of tokens than the other."""


def _steps_of_a_rank(_rank: int, folder: str) -> Any:
    cache = LogitCache.open(Path(folder) / "c")
    sizes = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    found = {}
    for name in UNEVEN:
        used = for_form(name, weighted_samples())
        trainer = make_trainer(Path(folder) / name, used, cache, objective_of(name), **sizes)
        trainer.data_collator = pad_weighted if name == "data" else pad_samples
        found[name] = step_of(trainer)
    return found


def test_two_processes_make_one_step(tmp_path: Path, samples: list[Sample]) -> None:
    make_cache(tmp_path / "c", samples, top_k=V - 1)
    ranks = in_two_processes(_steps_of_a_rank, str(tmp_path))
    for name in UNEVEN:
        expected = expected_step(name, for_form(name, samples), WEIGHT, moved_adapter())
        for gradients, log in (found[name] for found in ranks):
            assert log["ce"] == pytest.approx(expected.ce, rel=1e-6) and log["kl"] == pytest.approx(
                expected.kl, rel=1e-5
            )
            assert_gradients(gradients, expected)


def test_every_form_has_a_loss_of_its_own(samples: list[Sample]) -> None:
    """So that the comparisons above mean something; and dropped tokens are not counted as 0 in a mean."""
    found = {name: expected_step(name, for_form(name, samples), 0.0, moved_adapter()) for name in FORMS}
    values = [step.ce for step in found.values()]
    assert min(abs(a - b) for i, a in enumerate(values) for b in values[:i]) > 0.001
    num = sum(len(s.positions) for s in samples)
    assert {name for name, step in found.items() if step.num_ce < num} == set(OVER_KEPT)


# --- beside other terms ----------------------------------------------------------------------------------------------


def test_anchors_stand_beside_a_weight_as_they_do_without(
    tmp_path: Path, samples: list[Sample], cache: LogitCache
) -> None:
    """What they add to the gradient is the same."""
    anchor = Anchor(make_cache(tmp_path / "a", make_samples(6, seed=5), top_k=V - 1), AnchorSettings(3.0, 4))
    used, sizes = for_form("dft", samples), {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}

    def gradients(name: str, anchors: Sequence[Anchor]) -> dict[str, torch.Tensor]:
        out = tmp_path / f"{name}-{len(anchors)}"
        return gradients_after_one_step(make_trainer(out, used, cache, objective_of(name), anchors, **sizes))

    added = []
    for name in ("none", "dft"):
        without = gradients(name, [])
        added.append({n: g - without[n] for n, g in gradients(name, [anchor]).items()})
    assert max(float(g.abs().max()) for g in added[0].values()) > 0.01
    for name, gradient in added[0].items():
        torch.testing.assert_close(added[1][name], gradient, rtol=0, atol=1e-5)


def test_a_budget_moves_the_weight_beside_a_weighted_loss(
    tmp_path: Path, samples: list[Sample], cache: LogitCache
) -> None:
    objective = Objective("full-kl", weight=1.0, ce_weight="stm", ce_weight_value=PERPLEXITY, kl_budget=0.01)
    trainer = make_trainer(tmp_path, for_form("stm", samples), cache, objective, max_steps=3, logging_steps=1)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "ce" in log]
    assert len({log["kl_weight"] for log in logs}) == 3
    for log in logs:
        assert log["loss"] == pytest.approx(log["ce"] + log["kl_weight"] * log["kl"], rel=1e-5)


def test_everything_dropped_is_a_step_without_cross_entropy(tmp_path: Path) -> None:
    """And not a mean over nothing: the regulariser goes on alone."""
    samples = [Sample(np.array([1, 2, 3], dtype=np.uint32), np.array([False, True, True]), "row")] * 2
    cache = make_cache(tmp_path / "c", samples[:1], top_k=V - 1)
    objective = Objective("full-kl", ce_weight="stm", ce_weight_value=1.0)
    trainer = make_trainer(tmp_path / "t", samples, cache, objective)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["ce"] == 0 and log["kl"] > 0 and log["loss"] == pytest.approx(log["kl"], rel=1e-6)


# --- ASFT against a live base ----------------------------------------------------------------------------------------


def live_asft(model: Any, base: Any, samples: Sequence[Sample]) -> torch.Tensor:
    """sg(q(y)) CE + .05 KL(p || q), each a mean over the supervised tokens, of full logits in float32."""
    z = torch.cat([dense(model, s) for s in samples])
    with torch.no_grad():
        b = torch.cat([dense(base, s) for s in samples])
    y = torch.from_numpy(np.concatenate([s.token_ids[s.positions + 1] for s in samples]).astype(np.int64))
    log_p, log_q = b.log_softmax(1), z.log_softmax(1)
    ce = -log_q.gather(1, y[:, None]).squeeze(1)
    kl = (log_p.exp() * (log_p - log_q)).sum(1)
    return (torch.exp(-ce).detach() * ce + 0.05 * kl).mean()


def test_twelve_steps_of_asft_are_those_with_a_live_base(tmp_path: Path) -> None:
    """From a cache of k = V - 1: each loss within 1e-5 of the one of full vocabularies, while the loss falls."""
    samples, base = make_samples(12), make_model()
    cache = make_exact_cache(tmp_path / "c", make_model(), samples)
    torch.manual_seed(0)
    cached = attach(make_model(), AdapterSettings(rank=4, alpha=8), "tiny").train()
    live = copy.deepcopy(cached)
    anchored = CachedLoss(cache, Objective("full-kl", weight=0.05, ce_weight="dft"), check=False)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=5e-3) for m in (cached, live)]
    losses: list[tuple[float, float]] = []
    for step in range(12):
        batch = [samples[(4 * step + i) % 12] for i in range(4)]
        found = anchored(cached, pad_samples(batch)).loss, live_asft(live, base, batch)
        for loss, optimizer in zip(found, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append((float(found[0].detach()), float(found[1].detach())))
    assert max(abs(a - b) for a, b in losses) < 1e-5
    assert len({round(a, 4) for a, _ in losses}) == 12


# --- what is refused, and by which name ------------------------------------------------------------------------------


def test_weights_that_nobody_reads_are_refused(samples: list[Sample], cache: LogitCache) -> None:
    plain, asked = CachedLoss(cache, check=False), CachedLoss(cache, objective_of("data"), check=False)
    batch = pad_weighted(samples[:3])
    with pytest.raises(TrainingFailed, match=r"brings loss_scale, which .*ce_weight=\"data\""):
        plain(moved_adapter(), batch)
    with pytest.raises(InvalidBatch, match="expected loss_scale or weights in it, found attention_mask, input_ids"):
        asked(moved_adapter(), pad_samples(samples[:3]))
    with pytest.raises(InvalidBatch, match="found loss_scale and weights"):
        asked(moved_adapter(), {**batch, "weights": batch["loss_scale"]})
    for wrong in (-batch["loss_scale"] - 1, batch["loss_scale"] / 0, batch["loss_scale"][:, :-1]):
        with pytest.raises(InvalidBatch, match="a number of 0 or more in loss_scale for every token that is learnt"):
            asked(moved_adapter(), {**batch, "loss_scale": wrong})


def test_a_job_reads_the_weights_of_its_samples_or_refuses_them(
    tmp_path: Path, samples: list[Sample], cache: LogitCache
) -> None:
    base = make_base()
    with pytest.raises(TrainingFailed, match=r"row 0: it brings weights .* does not read"):
        run(base, samples, cache, tmp_path / "no", max_steps=1)
    with pytest.raises(TrainingFailed, match="data on row 0: expected a weight for every token"):
        run(make_base(), for_form("none", samples), cache, tmp_path / "no", objective=objective_of("data"), max_steps=1)


def test_what_a_record_lacks_is_refused_by_name(tmp_path: Path) -> None:
    """Entropy needs the 20 most probable tokens; log p(y) is in every cache, of no alternatives too."""
    samples = make_samples(3)

    def cache_of(name: str, **settings: Any) -> LogitCache:
        path = tmp_path / name
        capture(make_base(), samples, path, CaptureSettings(max_length=256, precision="exact", **settings))
        return LogitCache.open(path)

    few, thin, none = cache_of("few", top_k=19), cache_of("thin", top_k=32, min_mass=0.9), cache_of("none", top_k=0)
    for cache, said in ((few, "which takes 20 alternatives, found 19"), (thin, "fewer in rows where 0.9 of the mass")):
        with pytest.raises(TrainingFailed, match=f"eaft-base: expected the base's 20 most probable .*{said}"):
            CachedLoss(cache, objective_of("eaft-base", "none"))
    with pytest.raises(TrainingFailed, match="found 8 alternatives"):
        CachedLoss(cache_of("wide", top_k=32), objective_of("eaft-base", "none"), top_k=8)
    for name in ("stm", "rho1"):
        expected = expected_step(name, samples, 0.0, moved_adapter())
        found = CachedLoss(none, objective_of(name, "none"), check=False)(moved_adapter(), pad_samples(samples))
        assert found.loss.item() == pytest.approx(expected.ce, rel=1e-6)
    for name in ("stm", "eaft-base", "rho1", "my.py:f"):
        with pytest.raises(TrainingFailed, match="a cache is needed"):
            CachedLoss(None, Objective("none", ce_weight=name))


def test_the_base_is_asked_for_without_a_regulariser_too(tmp_path: Path, samples: list[Sample]) -> None:
    """A weight that reads the cache has it held against the model, and against step zero."""
    cache = make_cache(tmp_path / "c", samples, top_k=24)
    objective, batch = objective_of("stm", "none"), pad_samples(samples[:4])
    anchored = CachedLoss(cache, objective)
    anchored(attach(make_model(), AdapterSettings(rank=4, alpha=8), "tiny"), batch)
    assert anchored.step_zero is not None and anchored.step_zero.kl_nats < 1e-5
    with pytest.raises(NotTheBase, match="checking step 0"):
        CachedLoss(cache, objective)(make_model(seed=1), batch)


def test_a_run_that_learns_of_no_token_says_so_once(
    tmp_path: Path, cache: LogitCache, caplog: pytest.LogCaptureFixture
) -> None:
    for value, said in ((1.0, 1), (PERPLEXITY, 0)):
        caplog.clear()
        objective = Objective(ce_weight="stm", ce_weight_value=value)
        used = for_form("stm", weighted_samples())
        make_trainer(tmp_path / str(said), used, cache, objective, max_steps=3, logging_steps=1).train()
        assert caplog.text.count("the cross-entropy counted at no token") == said
