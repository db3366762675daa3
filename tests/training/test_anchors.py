"""Anchors: loss and gradient are the oracle's, however a step is divided; a run that was killed ends the same."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.oracles import FloatArray
from support.oracles_anchors import AnchoredStep, Positions, Regularized, anchored_step
from support.tiny_model import make_model
from support.tiny_runs import (
    Step,
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
from torch import Tensor
from transformers import TrainerCallback

from logitcache import CachedLoss, NotTheBase, TrainingFailed
from logitcache.adapters.attach import AdapterSettings
from logitcache.data.batches import pad_samples
from logitcache.data.samples import Sample
from logitcache.losses.formulas import Objective
from logitcache.models.head import OutputHead
from logitcache.pairing.anchors import anchor_samples, drawn
from logitcache.storage import IdentityMismatch, LogitCache
from logitcache.training.anchors import Anchor, Anchors
from logitcache.training.settings import AnchorSettings

WEIGHT = 1.5
ANCHORED = (AnchorSettings(4.0, 5), AnchorSettings(0.7, 3, regularizer="masked-kl"))
"""5 and 3 samples a step, which no 3 micro-batches nor 2 processes divide evenly."""

SIZES = {"per_device_train_batch_size": 12, "gradient_accumulation_steps": 1}


def new_samples() -> list[Sample]:
    return make_samples(12)


def make_caches(folder: Path) -> list[LogitCache]:
    """Of the new samples and of two anchors, with every alternative, so that nothing is a bound."""
    of = {"new": new_samples(), "first": make_samples(9, seed=5), "second": make_samples(7, seed=6)}
    return [make_cache(folder / name, samples, top_k=V - 1) for name, samples in of.items()]


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> list[LogitCache]:
    return make_caches(tmp_path_factory.mktemp("anchors"))


def anchors_of(caches: Sequence[LogitCache], settings: Sequence[AnchorSettings] = ANCHORED) -> list[Anchor]:
    return [Anchor(cache, each) for cache, each in zip(caches[1:], settings, strict=True)]


# --- the oracle ------------------------------------------------------------------------------------------------------


def dense(model: Any, samples: Sequence[Sample]) -> tuple[Tensor, list[int]]:
    """Full logits at the supervised positions of the samples, one after the other, [N, V], and the labels."""
    rows, labels = [], []
    for sample in samples:
        ids = torch.from_numpy(sample.token_ids.astype(np.int64))[None]
        rows.append(model(input_ids=ids).logits[0, sample.positions])
        labels += sample.token_ids[sample.positions + 1].tolist()
    return torch.cat(rows), labels


def step_samples(caches: Sequence[LogitCache], settings: Sequence[AnchorSettings], step: int) -> list[list[Sample]]:
    found = []
    for cache, each in zip(caches[1:], settings, strict=True):
        samples = anchor_samples(cache)
        found.append([samples[i] for i in drawn(len(samples), step, each.batch, 0)])
    return found


def expected_step(
    student: Any, new: Sequence[Sample], regularizer: str, anchored: Sequence[tuple[Sequence[Sample], AnchorSettings]]
) -> tuple[AnchoredStep, dict[str, FloatArray]]:
    """The oracle's loss of a step, and the gradient of the student's parameters that follows from its own."""
    base, graphs = make_model(), []

    def term(samples: Sequence[Sample], kind: str, weight: float) -> Regularized:
        z, labels = dense(student, samples)
        graphs.append(z)
        with torch.no_grad():
            b, _ = dense(base, samples)
        as_64 = [t.detach().double().numpy() for t in (b, z)]
        return Regularized(Positions(as_64[0], as_64[1], np.array(labels)), kind, weight)

    first = term(new, regularizer, WEIGHT)
    found = anchored_step(first, [term(s, settings.regularizer, settings.weight) for s, settings in anchored])
    student.zero_grad()
    by_z = [found.new_gradient, *found.anchor_gradients]
    torch.autograd.backward(graphs, [torch.from_numpy(g).float() for g in by_z])
    return found, {n: p.grad.numpy().copy() for n, p in student.named_parameters() if p.grad is not None}


def assert_equals(found: Step, expected: tuple[AnchoredStep, dict[str, FloatArray]]) -> None:
    gradients, log = found
    oracle, by_parameter = expected
    assert log["ce"] == pytest.approx(oracle.ce, rel=1e-6) and log["kl"] == pytest.approx(oracle.kl, rel=1e-6)
    means = [log[f"anchor_kl_{i}"] for i in (1, 2)]
    assert means == pytest.approx(oracle.anchor_kl, rel=1e-6) and min(means) > 0.01
    assert log["anchor_kl"] == pytest.approx(sum(oracle.anchor_kl) / 2, rel=1e-6)
    assert log["loss"] == pytest.approx(oracle.loss, abs=1e-6)
    assert gradients.keys() == by_parameter.keys()
    for name, gradient in by_parameter.items():
        np.testing.assert_allclose(gradients[name], gradient, rtol=1e-4, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("regularizer", ["none", "masked-kl", "full-kl"])
@pytest.mark.parametrize("sizes", [(12, 1), (4, 3)], ids=["at once", "accumulated"])
def test_the_loss_is_that_of_the_oracle(
    sizes: tuple[int, int], regularizer: Any, caches: list[LogitCache], tmp_path: Path
) -> None:
    """Loss, means and gradient of a step, of caches of uneven samples, plain and beside a regulariser."""
    objective = Objective(regularizer, weight=1.0 if regularizer == "none" else WEIGHT)
    cache = None if regularizer == "none" else caches[0]
    given = dict(zip(SIZES, sizes, strict=True))
    trainer = make_trainer(tmp_path, new_samples(), cache, objective, anchors_of(caches), **given)
    of_step = zip(step_samples(caches, ANCHORED, 0), ANCHORED, strict=True)
    expected = expected_step(moved_adapter(), new_samples(), regularizer, list(of_step))
    assert_equals(step_of(trainer), expected)


def _step_of_a_rank(_rank: int, folder: str, accumulate: int) -> Step:
    caches = [LogitCache.open(Path(folder) / name) for name in ("new", "first", "second")]
    sizes = {"per_device_train_batch_size": 6 // accumulate, "gradient_accumulation_steps": accumulate}
    objective = Objective("masked-kl", weight=WEIGHT)
    return step_of(make_trainer(Path(folder) / "out", new_samples(), caches[0], objective, anchors_of(caches), **sizes))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_two_processes_have_the_loss_of_the_oracle(accumulate: int, tmp_path: Path) -> None:
    """Of 5 and 3 samples in 2 or 6 parts: some parts have one more than others, and some have none."""
    caches = make_caches(tmp_path)
    of_step = list(zip(step_samples(caches, ANCHORED, 0), ANCHORED, strict=True))
    expected = expected_step(moved_adapter(), new_samples(), "masked-kl", of_step)
    found = in_two_processes(_step_of_a_rank, str(tmp_path), accumulate)
    assert_equals(found[0], expected)
    for name, gradient in found[1][0].items():
        np.testing.assert_array_equal(gradient, found[0][0][name])


def test_a_loop_of_ones_own_has_the_loss_of_the_oracle(caches: list[LogitCache]) -> None:
    """At a later step, whole and in three parts."""
    samples, step, model = new_samples(), 3, moved_adapter().eval()
    of_step = list(zip(step_samples(caches, ANCHORED, step), ANCHORED, strict=True))
    oracle, by_parameter = expected_step(model, samples, "masked-kl", of_step)
    anchored = CachedLoss(caches[0], Objective(weight=WEIGHT), anchor=anchors_of(caches), check=False)
    whole = anchored(model, pad_samples(samples), step=step)
    assert whole.loss.item() == pytest.approx(oracle.loss, abs=1e-6)
    assert anchored.anchor_kl.tolist() == pytest.approx(oracle.anchor_kl, rel=1e-6)
    batches = [pad_samples(samples[i : i + 4]) for i in (0, 4, 8)]
    counts = sum(anchored.count(batch) for batch in batches)
    assert isinstance(counts, Tensor)
    model.zero_grad()
    total, means = 0.0, torch.zeros(2)
    for i, batch in enumerate(batches):
        found = anchored(model, batch, counts, step=step, part=(i, 3))
        found.loss.backward()
        total, means = total + found.loss.item(), means + anchored.anchor_kl
    assert total == pytest.approx(oracle.loss, abs=1e-6)
    assert means.tolist() == pytest.approx(oracle.anchor_kl, rel=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            np.testing.assert_allclose(parameter.grad.numpy(), by_parameter[name], rtol=1e-4, atol=2e-6)


def test_a_loop_needs_no_cache_of_the_new_data(caches: list[LogitCache]) -> None:
    anchored = CachedLoss(None, Objective("none"), anchor=Anchor(caches[1].path, AnchorSettings(2.0, 4)), check=False)
    model, batch = moved_adapter().eval(), pad_samples(new_samples())
    found = anchored(model, batch, step=0)
    assert found.loss.item() == pytest.approx(found.ce.item() + 2.0 * float(anchored.anchor_kl), rel=1e-6)
    assert float(anchored.anchor_kl) > 0.01 and float(found.kl) == 0


def test_anchors_run_under_the_autocast_of_the_new_data(
    caches: list[LogitCache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With bf16=True the head that the anchors are given computes in bfloat16, as the new data's does."""
    seen: list[torch.dtype] = []
    original = OutputHead.__call__

    def watched(self: OutputHead, hidden: Tensor) -> Tensor:
        logits = original(self, hidden)
        seen.append(logits.dtype)
        return logits

    monkeypatch.setattr(OutputHead, "__call__", watched)
    trainer = make_trainer(tmp_path, new_samples(), caches[0], Objective(), anchors_of(caches))
    trainer.accelerator.autocast = lambda: torch.autocast("cpu", torch.bfloat16)  # type: ignore[method-assign]
    trainer.train()
    assert len(seen) >= 3 and set(seen) == {torch.bfloat16}


# --- which steps have them -------------------------------------------------------------------------------------------


def test_steps_between_have_no_anchors(caches: list[LogitCache], tmp_path: Path) -> None:
    """Every third step from the first: their losses are without the term, and their logs without its mean."""
    settings = [replace(ANCHORED[0], every=3), replace(ANCHORED[1], every=2)]
    run(
        *(make_base(), new_samples(), caches[0], tmp_path / "o"),
        **{"anchors": anchors_of(caches, settings), "max_steps": 6, "batch_size": 4, "log_every": 1, "lr": 1e-2},
    )
    log = log_of(tmp_path / "o")
    assert [entry["step"] for entry in log if "anchor_kl_1" in entry] == [1, 4]
    assert [entry["step"] for entry in log if "anchor_kl_2" in entry] == [1, 3, 5]
    assert [entry["step"] for entry in log if "anchor_kl" not in entry] == [2, 6]
    for entry in log:
        anchors = 4.0 * entry.get("anchor_kl_1", 0.0) + 0.7 * entry.get("anchor_kl_2", 0.0)
        assert entry["loss"] == pytest.approx(entry["ce"] + entry["kl"] + anchors, rel=1e-5)
    assert log[3]["anchor_kl_1"] > 1e-3


def log_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "train_log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_means_in_a_log_are_over_the_steps_that_had_anchors(caches: list[LogitCache], tmp_path: Path) -> None:
    every = {
        "max_steps": 4,
        "batch_size": 4,
        "lr": 1e-2,
        "anchors": anchors_of(caches[:2], [replace(ANCHORED[0], every=2)]),
    }
    run(make_base(), new_samples(), caches[0], tmp_path / "a", log_every=1, **every)
    run(make_base(), new_samples(), caches[0], tmp_path / "b", log_every=4, **every)
    found = [entry["anchor_kl"] for entry in log_of(tmp_path / "a") if "anchor_kl" in entry]
    assert len(found) == 2 and found[1] > 0
    first, last = log_of(tmp_path / "b")  # the first step is logged for itself, and has the first of them
    assert first["anchor_kl"] == pytest.approx(found[0], abs=1e-9) and last["anchor_kl"] == pytest.approx(found[1])


def test_the_order_of_the_anchors_does_not_follow_the_new_data(caches: list[LogitCache]) -> None:
    """Other data, other batches: the same anchors. Another seed: others."""
    found = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        terms = Anchors([*map_terms(caches, seed)]).terms
        found[name] = [[s.origin for s in part.samples] for t in terms for part in [t.of_step(4)] if part is not None]
    assert found["a"] == found["b"] != found["c"]


def map_terms(caches: Sequence[LogitCache], seed: int) -> list[Any]:
    from logitcache.training.anchors import AnchorTerm

    return [AnchorTerm.paired(anchor, make_base(), seed) for anchor in anchors_of(caches)]


# --- a whole run -----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What nobody catches."""


class KilledAfter(TrainerCallback):
    """Ends the process, as far as Python can, after a step's checkpoint is on the disk."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            raise Killed


SETTINGS = {
    "max_steps": 8,
    "batch_size": 4,
    "log_every": 1,
    "lr": 1e-2,
    "adapter": AdapterSettings(rank=4, dropout=0.1),
}


@pytest.mark.parametrize("every", [1, 3])
def test_a_killed_run_ends_with_the_same_bytes(every: int, caches: list[LogitCache], tmp_path: Path) -> None:
    """Plain training with two anchors, with dropout; and other anchors, or none, are another run."""
    anchors = anchors_of(caches, [replace(each, every=every) for each in ANCHORED])
    line = (new_samples(), None)
    plain = {**SETTINGS, "objective": Objective("none")}
    run(make_base(), *line, tmp_path / "whole", anchors=anchors, **plain)
    with pytest.raises(Killed):
        run(make_base(), *line, tmp_path / "o", anchors=anchors, callbacks=[KilledAfter(5)], **plain)
    for others in ([], anchors[:1], anchors[::-1], anchors_of(caches, [ANCHORED[0], AnchorSettings(0.7, 2)])):
        with pytest.raises(IdentityMismatch, match="differs in anchors"):
            run(make_base(), *line, tmp_path / "o", anchors=others, resume=True, **plain)
    run(make_base(), *line, tmp_path / "o", anchors=anchors, resume=True, **plain)
    for name in ("adapter_model.safetensors", "train_log.jsonl"):
        assert (tmp_path / "o" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    without = {**plain, "anchors": []}
    run(make_base(), *line, tmp_path / "plain", **without)
    weights = "adapter_model.safetensors"
    assert (tmp_path / "plain" / weights).read_bytes() != (tmp_path / "whole" / weights).read_bytes()


def test_what_was_run_is_said(caches: list[LogitCache], tmp_path: Path) -> None:
    told: list[Any] = []
    report = run(
        *(make_base(), new_samples(), caches[0], tmp_path / "o"),
        **{**SETTINGS, "max_steps": 2, "anchors": anchors_of(caches)},
    )
    assert len(report.anchors_step_zero) == 2
    for found in (report.step_zero, *report.anchors_step_zero):
        assert abs(found.kl_nats) < 1e-6 and found.num_positions > 20
    said = json.loads((tmp_path / "o" / "run.json").read_text(encoding="utf-8"))
    assert [each["contents"] for each in said["anchors"]] == [cache.contents_checksum for cache in caches[1:]]
    settings = [{name: each[name] for name in ("weight", "batch", "every", "regularizer")} for each in said["anchors"]]
    assert [AnchorSettings(**each) for each in settings] == list(ANCHORED)
    assert len(said["result"]["anchors_step_zero"]) == 2 and "anchor_kl_2" in said["result"]["final"]
    again = run(
        *(make_base(), new_samples(), caches[0], tmp_path / "o"),
        **{**SETTINGS, "max_steps": 2, "anchors": anchors_of(caches), "resume": True},
    )
    assert again.anchors_step_zero == report.anchors_step_zero and not told


def test_anchors_hold_the_base_where_they_are(caches: list[LogitCache], tmp_path: Path) -> None:
    """The KL on the anchors at the end of a run is a part of what it is with a weight near 0."""
    last = {}
    for weight in (1e-6, 10.0):
        anchors = [Anchor(caches[1], AnchorSettings(weight, 9))]
        out = tmp_path / str(weight)
        settings = {"max_steps": 30, "batch_size": 4, "log_every": 30, "lr": 1e-2, "objective": Objective("none")}
        run(make_base(), new_samples(), None, out, anchors=anchors, **settings)
        last[weight] = log_of(out)[-1]["anchor_kl"]
    assert 0 < last[10.0] < 0.3 * last[1e-6]


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_the_base_of_an_anchor_is_refused(caches: list[LogitCache], tmp_path: Path) -> None:
    """By the weights' fingerprint where they have one; else before step 1, by what the model says."""
    base = make_base()
    other = replace(base, identity=replace(base.identity, weights="b" * 32))
    with pytest.raises(IdentityMismatch):
        run(other, new_samples(), None, tmp_path / "o", objective=Objective("none"), anchors=anchors_of(caches))
    swapped = replace(base, model=make_model(seed=1))
    with pytest.raises(NotTheBase, match="first"):
        run(swapped, new_samples(), None, tmp_path / "p", objective=Objective("none"), anchors=anchors_of(caches))
    trainer = make_trainer(tmp_path, new_samples(), None, Objective("none"), anchors_of(caches))
    trainer._check_anchors = True
    with pytest.raises(NotTheBase, match="first"):
        trainer.train()
    anchored = CachedLoss(None, Objective("none"), anchor=anchors_of(caches))
    with pytest.raises(NotTheBase, match="first"):
        anchored(moved_adapter(), pad_samples(new_samples()), step=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (AnchorSettings(0.0), "with a weight of 0"),
        (AnchorSettings(batch=10), "10 samples a step: expected as many in the cache, found 9"),
    ],
)
def test_what_an_anchor_cannot_be(
    settings: AnchorSettings, message: str, caches: list[LogitCache], tmp_path: Path
) -> None:
    anchor = [Anchor(caches[1], settings)]
    with pytest.raises(TrainingFailed, match=message):
        run(make_base(), new_samples(), caches[0], tmp_path / "o", anchors=anchor)
    assert not (tmp_path / "o").exists()
    with pytest.raises(TrainingFailed, match=message):
        make_trainer(tmp_path, new_samples(), caches[0], Objective(), anchor)


def test_a_masked_anchor_needs_alternatives(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", make_samples(8), top_k=0)
    assert Anchor(cache).opened().cache is cache
    with pytest.raises(TrainingFailed, match="Use --anchor-regularizer full-kl"):
        Anchor(cache, AnchorSettings(regularizer="masked-kl")).opened()


def test_a_loop_says_which_step_it_is_at(caches: list[LogitCache]) -> None:
    batch, model = pad_samples(new_samples()), moved_adapter().eval()
    anchored = CachedLoss(caches[0], anchor=anchors_of(caches), check=False)
    with pytest.raises(ValueError, match="Give step="):
        anchored(model, batch)
    with pytest.raises(ValueError, match="expected one from 0 to 1"):
        anchored(model, batch, step=0, part=(2, 2))
    plain = CachedLoss(caches[0], check=False)
    for named in ({"step": 0}, {"part": (0, 2)}):
        with pytest.raises(ValueError, match="nothing reads them"):
            plain(model, batch, **named)
    with pytest.raises(TrainingFailed, match="a cache is needed"):
        CachedLoss(None, anchor=anchors_of(caches))


def test_an_anchor_that_is_counted_wrong_stops_the_run_before_its_first_step(
    caches: list[LogitCache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of an anchor's loss, or the samples of one micro-batch twice: the positions of the step tell."""
    original = Anchors.loss

    def halved(self: Anchors, *args: Any) -> Any:
        found = original(self, *args)
        return replace(found, loss=found.loss / 2)

    def twice(self: Anchors, model: Any, step: int, _index: int, of: int, device: Any) -> Any:
        return original(self, model, step, 0, of, device)

    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    for wrong in (halved, twice):
        with monkeypatch.context() as patch:
            patch.setattr(Anchors, "loss", wrong)
            trainer = make_trainer(tmp_path, new_samples(), caches[0], Objective(), anchors_of(caches), **sizes)
            with pytest.raises(TrainingFailed, match=r"step 1: expected a loss of .* 4 \* anchor KL"):
                trainer.train()
    assert gradients_after_one_step(
        make_trainer(tmp_path, new_samples(), caches[0], Objective(), anchors_of(caches), **sizes)
    )
