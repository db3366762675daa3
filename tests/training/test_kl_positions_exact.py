"""Prompt positions without cross-entropy, to 1e-6: every regulariser and weight, every layout, every accumulation.

Base, capture and student are in float64; the oracle is `oracles_positions`, of each document run alone.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.cli_harness import done, facts
from support.cli_harness import precompute as precompute_verb
from support.oracles_positions import Scored, StepMeans, step_means
from support.plug_ins import on_the_left, packed_by_hand, rows_of
from support.tiny_model import make_model
from support.tiny_runs import V, gradients_after_one_step, make_base, make_samples, make_trainer, moved_adapter

from logitcache.capture.settings import CaptureSettings
from logitcache.capture.worker import precompute
from logitcache.data.batches import pad_samples
from logitcache.data.samples import Sample
from logitcache.errors import InvalidBatch, InvalidData
from logitcache.losses.formulas import Objective
from logitcache.pairing.targets import samples_of
from logitcache.storage import LogitCache, PositionNotCaptured
from logitcache.training.anchors import Anchor
from logitcache.training.custom_loop import CachedLoss
from logitcache.training.settings import AnchorSettings

WEIGHT, LABEL_WEIGHT = 2.0, 0.7
PERPLEXITY = 500.0
"""At which stm keeps some tokens of a random base and drops others."""

REGULARIZERS = ("masked-kl", "masked-reverse-kl", "masked-js", "full-kl", "dkd")
WEIGHTS = ("dft", "stm", "eaft", "eaft-base", "rho1")
LAYOUTS: dict[str, Callable[[Sequence[Sample]], Any]] = {
    "padded": pad_samples,
    "left": lambda samples: on_the_left(rows_of(samples)),
    "packed": lambda samples: packed_by_hand(rows_of(samples)),
}
UNLABELLED = Sample(np.arange(3, 16, dtype=np.uint32), np.zeros(13, dtype=np.bool_), "nothing to learn")


def double_base() -> Any:
    base = make_base()
    return replace(base, model=base.model.double())


def captured(folder: Path, samples: Sequence[Sample], **changes: Any) -> LogitCache:
    settings = {"top_k": V - 1, "max_length": 64, "precision": "exact", "kl_positions": "all", **changes}
    precompute(double_base(), samples, folder, CaptureSettings(**settings))  # type: ignore[arg-type]
    return LogitCache.open(folder)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """Among them one of a single supervised token at its end, after a long prompt."""
    found = make_samples(6)
    longest = max(range(6), key=lambda i: len(found[i].token_ids))
    alone = np.zeros(len(found[longest].token_ids), dtype=np.bool_)
    alone[-1] = True
    found[longest] = replace(found[longest], supervised=alone)
    return found


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, samples: list[Sample]) -> LogitCache:
    return captured(tmp_path_factory.mktemp("positions") / "c", samples)


@torch.no_grad()
def scored(student: Any, sample: Sample) -> Scored:
    ids = torch.from_numpy(sample.token_ids.astype(np.int64))[None]
    base, found = (model(input_ids=ids).logits[0, :-1].numpy() for model in (make_model().double(), student.eval()))
    return Scored(base, found, sample.token_ids[1:].astype(np.int64), sample.supervised[1:])


@pytest.fixture(scope="module")
def student() -> Any:
    return moved_adapter().double().eval()


@pytest.fixture(scope="module")
def documents(student: Any, samples: list[Sample]) -> list[Scored]:
    return [scored(student, sample) for sample in samples]


def objective_of(regularizer: str, ce_weight: str = "none") -> Objective:
    own = {"label_weight": LABEL_WEIGHT} if regularizer == "dkd" else {}
    own |= {"ce_weight_value": PERPLEXITY} if ce_weight == "stm" else {}
    return Objective(regularizer, weight=WEIGHT, kl_positions="all", ce_weight=ce_weight, **own)  # type: ignore[arg-type]


def check(found: Any, expected: StepMeans) -> None:
    """Both means and the loss, within 1e-6 nats or as much of the value."""
    assert found.ce.item() == pytest.approx(expected.ce, rel=1e-6, abs=1e-6)
    assert found.kl.item() == pytest.approx(expected.regularizer, rel=1e-6, abs=1e-6)
    assert found.loss.item() == pytest.approx(expected.ce + WEIGHT * expected.regularizer, rel=1e-6, abs=1e-6)


CASES = [(r, "none", layout) for r in REGULARIZERS for layout in LAYOUTS]
CASES += [(r, w, layout) for w in WEIGHTS for r, layout in (("masked-kl", "packed"), ("dkd", "left"))]


@pytest.mark.parametrize(("regularizer", "ce_weight", "layout"), CASES)
def test_both_means_are_the_oracles(
    regularizer: str,
    ce_weight: str,
    layout: str,
    samples: list[Sample],
    cache: LogitCache,
    student: Any,
    documents: list[Scored],
) -> None:
    """In one batch, and in three whose counts are added up first. A document without labels changes nothing."""
    expected = step_means(documents, regularizer, ce_weight, LABEL_WEIGHT, PERPLEXITY)
    num_supervised = sum(int(d.supervised.sum()) for d in documents)
    assert expected.num_regularizer > num_supervised + 40 and expected.regularizer > 1e-2
    assert (0 < expected.num_ce < num_supervised) is (ce_weight in ("stm", "rho1"))
    loss = CachedLoss(cache, objective_of(regularizer, ce_weight), check=False)
    made = LAYOUTS[layout]
    whole = made([*samples[:3], UNLABELLED, *samples[3:]])
    assert loss.count(whole).tolist() == [expected.num_ce, expected.num_regularizer]
    check(loss(student, whole), expected)

    parts = [made([UNLABELLED, *samples[:1]]), made(samples[1:3]), made(samples[3:])]
    counts = sum(loss.count(part) for part in parts)
    assert isinstance(counts, torch.Tensor)
    sums = [loss(student, part, counts) for part in parts]
    total = sum(part.loss.item() for part in sums)
    assert total == pytest.approx(expected.ce + WEIGHT * expected.regularizer, rel=1e-6)


@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_the_gradient_is_that_of_both_means(regularizer: str, samples: list[Sample], cache: LogitCache) -> None:
    """Along itself, against differences of the oracle of the fourth order: Llama's norms round to float32."""
    model = moved_adapter().double().eval()
    CachedLoss(cache, objective_of(regularizer), check=False)(model, on_the_left(rows_of(samples))).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = [p.grad.detach().clone() for p in trained if p.grad is not None]
    assert len(gradients) == len(trained)
    norm = float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt())

    def at(distance: float) -> float:
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.data += distance * gradient / norm
        means = step_means([scored(model, s) for s in samples], regularizer, "none", LABEL_WEIGHT)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.data -= distance * gradient / norm
        return means.ce + WEIGHT * means.regularizer

    near, far = (at(h) - at(-h) for h in (2e-3, 4e-3))
    assert (8 * near - far) / (12 * 2e-3) == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(("regularizer", "ce_weight"), [("dkd", "stm"), ("masked-kl", "dft"), ("full-kl", "none")])
def test_the_trainer_logs_the_means_of_the_step(
    accumulate: int,
    regularizer: str,
    ce_weight: str,
    tmp_path: Path,
    samples: list[Sample],
    cache: LogitCache,
    documents: list[Scored],
) -> None:
    sizes = {"per_device_train_batch_size": 6 // accumulate, "gradient_accumulation_steps": accumulate}
    trainer = make_trainer(tmp_path, samples, cache, objective_of(regularizer, ce_weight), **sizes)
    trainer.model.double()
    assert gradients_after_one_step(trainer)
    expected = step_means(documents, regularizer, ce_weight, LABEL_WEIGHT, PERPLEXITY)
    log = trainer.state.log_history[0]
    assert log["ce"] == pytest.approx(expected.ce, rel=1e-6)
    assert log["kl"] == pytest.approx(expected.regularizer, rel=1e-6)
    assert log["loss"] == pytest.approx(expected.ce + WEIGHT * expected.regularizer, rel=1e-6)


# --- what might make it wrong without a word --------------------------------------------------------------------------


def test_a_document_without_labels_is_captured_nowhere(tmp_path: Path, samples: list[Sample]) -> None:
    """Given by itself it is refused; of rows it is left out, as where the supervised positions alone are captured."""
    with pytest.raises(InvalidData, match="no supervised token"):
        captured(tmp_path / "c", [*samples, UNLABELLED])
    rows = tmp_path / "rows.jsonl"
    parts = [*rows_of(samples), *rows_of([UNLABELLED])]
    rows.write_text("".join(json.dumps(row) + "\n" for row in parts), encoding="utf-8")
    settings = CaptureSettings(top_k=8, max_length=64, kl_positions="all")
    assert precompute(double_base(), str(rows), tmp_path / "c", settings).num_samples == len(samples)
    learnt = {s.token_ids.tobytes(): s.supervised.tolist() for s in samples_of(LogitCache.open(tmp_path / "c"))}
    assert learnt == {s.token_ids.tobytes(): [False, *s.supervised[1:].tolist()] for s in samples}


def test_a_cache_of_supervised_positions_alone_is_refused_in_every_layout(
    tmp_path: Path, samples: list[Sample], student: Any
) -> None:
    few = captured(tmp_path / "few", samples, kl_positions="supervised")
    loss = CachedLoss(few, objective_of("dkd"), check=False)
    for made in LAYOUTS.values():
        with pytest.raises(PositionNotCaptured):
            loss(student, made(samples))


def test_one_document_of_many_that_lacks_its_prompt_is_refused(
    tmp_path: Path, samples: list[Sample], student: Any
) -> None:
    """A cache that was begun with prompts and went on without: the mean is not over what happens to be there."""
    folder = tmp_path / "mixed"
    captured(folder, samples[:5])
    few = CaptureSettings(top_k=V - 1, max_length=64, precision="exact")
    precompute(double_base(), samples[5:], folder, few, data_name="rest")
    loss = CachedLoss(LogitCache.open(folder), objective_of("masked-kl"), check=False)
    loss(student, pad_samples(samples[:5]))
    with pytest.raises(PositionNotCaptured):
        loss(student, pad_samples(samples))


def test_a_beginning_of_a_document_has_the_prompt_positions_of_it(samples: list[Sample], cache: LogitCache) -> None:
    """Cut shorter than it was captured: a causal prefix, whose positions are the same ones."""
    partly = (s for s in samples if 0 < s.supervised[1:-1].sum() < len(s.token_ids) - 2)
    longest = max(partly, key=lambda s: len(s.token_ids))
    cut = int(np.flatnonzero(longest.supervised[1:-1])[-1]) + 2
    short = Sample(longest.token_ids[:cut], longest.supervised[:cut], "cut")
    model = moved_adapter().double().eval()
    found = CachedLoss(cache, objective_of("masked-kl"), check=False)(model, pad_samples([short]))
    expected = step_means([scored(model, short)], "masked-kl")
    assert expected.num_regularizer > expected.num_ce
    check(found, expected)


def test_labels_at_the_prompt_that_are_not_its_tokens_are_refused(samples: list[Sample], cache: LogitCache) -> None:
    batch = packed_by_hand(rows_of(samples))
    batch["labels"][0, 1] = (batch["input_ids"][0, 1] + 1) % 200
    with pytest.raises(InvalidBatch, match="expected labels equal to input_ids"):
        CachedLoss(cache, objective_of("masked-kl"), check=False).count(batch)


@pytest.mark.parametrize("regularizer", ["full-kl", "masked-kl"])
def test_anchors_count_at_the_prompts_that_their_cache_has(
    regularizer: str, tmp_path: Path, samples: list[Sample], cache: LogitCache, student: Any, documents: list[Scored]
) -> None:
    """And at the supervised positions alone where it has no others; the new data's own means stay as they are."""
    few = captured(tmp_path / "few", samples, kl_positions="supervised")
    settings = AnchorSettings(weight=0.5, batch=len(samples), regularizer=regularizer)  # type: ignore[arg-type]
    plain, new = Objective("none"), pad_samples(samples[:2])
    expected = step_means(documents, regularizer)
    supervised = [
        Scored(*(part[d.supervised] for part in (d.base, d.student, d.labels, d.supervised))) for d in documents
    ]
    for anchors, means in ((cache, expected), (few, step_means(supervised, regularizer))):
        loss = CachedLoss(None, plain, check=False, anchor=[Anchor(anchors, settings)])
        found = loss(student, new, step=0)
        assert loss.anchor_kl.tolist() == pytest.approx([means.regularizer], rel=1e-6)
        assert found.ce.item() == pytest.approx(step_means(documents[:2], regularizer).ce, rel=1e-6)
    assert expected.num_regularizer > sum(len(d.labels) for d in supervised) + 40


def test_evaluate_measures_the_supervised_positions_of_such_a_cache(tmp_path: Path, tiny_model: Path) -> None:
    """The same numbers as with a cache without prompts; inspect counts what each holds."""
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": "where does the river end", "completion": " in the sea"}, {"text": "a row of text alone"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    moved_adapter().save_pretrained(str(tmp_path / "a"), save_embedding_layers=False)
    line = ["evaluate", "--model", tiny_model, "--adapter", tmp_path / "a", "--json"]
    measured, held = [], []
    for positions in ("supervised", "all"):
        precompute_verb(tiny_model, data, tmp_path / positions, "--kl-positions", positions, "--precision", "exact")
        measured.append(json.loads(done(*line, "--new-cache", tmp_path / positions).out)["new"])
        held.append(LogitCache.open(tmp_path / positions).num_positions)
        (data_set,) = facts(tmp_path / positions)["data_sets"]
        assert data_set["num_positions"] == held[-1]
    for side in ("before", "after"):
        few, every = (found[side] for found in measured)
        assert few["num_positions"] == every["num_positions"] == held[0]
        assert few["ce_nats"] == pytest.approx(every["ce_nats"], abs=1e-5)
    assert measured[0]["kl_nats"] == pytest.approx(measured[1]["kl_nats"], rel=1e-4) and measured[0]["kl_nats"] > 1e-2
    assert held[1] == held[0] + len("where does the river end") - 1
