"""Positions without cross-entropy: the KL at prompt positions too, if both capture and training ask for it.

The oracle is `oracles.cross_entropy_oracle` over the supervised positions and `oracles.masked_kl_full_oracle` over all
of the document, of dense logits of a live base, each a mean over its own positions.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import oracles
from support.cli_harness import done, facts, precompute, refused, train_line
from support.plug_ins import packed_by_hand, rows_of, trl
from support.tiny_model import make_model
from support.tiny_runs import V, gradients_after_one_step, make_base, make_samples, make_trainer

from logitcache.adapters.attach import AdapterSettings, attach
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.worker import precompute as capture
from logitcache.data.batches import pad_samples
from logitcache.data.samples import Sample
from logitcache.errors import InvalidSettings
from logitcache.losses.formulas import Objective, SparseTargets, cross_entropy, regularizer_mask, regularizer_values
from logitcache.losses.fused import linear_loss
from logitcache.storage import LogitCache, PositionNotCaptured, data_samples
from logitcache.training.custom_loop import CachedLoss

WEIGHT = 2.0
EVERY = Objective(weight=WEIGHT, kl_positions="all")
ROWS: list[dict[str, Any]] = [
    {"prompt": "where does the river end", "completion": " in the sea"},
    {"prompt": "who", "completion": " keeps the lighthouse now"},
    {"text": "a row of text alone"},
]


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return make_samples(8)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, samples: list[Sample]) -> dict[str, LogitCache]:
    """By what was captured: every alternative in float32, so that nothing is left for the tail."""
    folder = tmp_path_factory.mktemp("caches")
    found = {}
    for kl_positions in ("supervised", "all"):
        job = CaptureSettings(top_k=V - 1, max_length=64, precision="exact", kl_positions=kl_positions)
        capture(make_base(), samples, folder / kl_positions, job)
        found[kl_positions] = LogitCache.open(folder / kl_positions)
    return found


def moved() -> Any:
    """An adapter that does not start as identity."""
    torch.manual_seed(0)
    model = attach(make_model(), AdapterSettings(rank=4, alpha=8), "tiny")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


@torch.no_grad()
def expected(model: Any, samples: Sequence[Sample]) -> tuple[float, float, int, int]:
    """Means of CE and KL of the documents alone, and their numbers of positions."""
    ces, kls = [], []
    base = make_model().eval()
    for s in samples:
        ids = torch.from_numpy(s.token_ids.astype(np.int64))[None]
        p, q = (m(ids).logits[0, :-1].double().numpy() for m in (base, model.eval()))
        labels = s.token_ids[1:].astype(np.int64)
        ces += oracles.cross_entropy_oracle(q[s.positions], labels[s.positions])[0].tolist()
        counts = [math.exp(oracles.log_softmax(row)[y]) <= 1 - 1e-4 for row, y in zip(p, labels, strict=True)]
        kls += oracles.masked_kl_full_oracle(p[counts], q[counts], labels[counts])[0].tolist()
    return float(np.mean(ces)), float(np.mean(kls)), len(ces), len(kls)


COLLATORS: dict[str, Callable[[Sequence[Sample]], Any]] = {
    "padded": pad_samples,
    "right": lambda samples: trl(rows_of(samples)),
    "packed": lambda samples: packed_by_hand(rows_of(samples)),
}


@pytest.mark.parametrize("layout", COLLATORS)
def test_the_loss_is_that_of_the_oracle(layout: str, samples: list[Sample], caches: dict[str, LogitCache]) -> None:
    """It fails where prompt positions count for the cross-entropy, or the supervised ones alone for the KL."""
    model, used = moved(), samples[:5]
    ce, kl, num_ce, num_kl = expected(model, used)
    assert num_kl > num_ce + 20
    anchored = CachedLoss(caches["all"], EVERY, check=False)
    batch = COLLATORS[layout](used)
    assert anchored.count(batch).tolist() == [num_ce, num_kl]
    found = anchored(model.eval(), batch)
    assert found.ce.item() == pytest.approx(ce, rel=1e-5)
    assert found.kl.item() == pytest.approx(kl, rel=1e-4)
    assert found.loss.item() == pytest.approx(ce + WEIGHT * kl, rel=1e-5)


def test_micro_batches_have_the_counts_of_the_step(samples: list[Sample], caches: dict[str, LogitCache]) -> None:
    model = moved().eval()
    anchored = CachedLoss(caches["all"], EVERY, check=False)
    parts = [pad_samples(samples[:2]), pad_samples(samples[2:5])]
    counts = sum(anchored.count(part) for part in parts)
    assert isinstance(counts, torch.Tensor)
    total = sum(anchored(model, part, counts).loss.item() for part in parts)
    assert total == pytest.approx(anchored(model, pad_samples(samples[:5])).loss.item(), rel=1e-5)


def test_the_trainer_has_the_gradient_of_the_loop(
    tmp_path: Path, samples: list[Sample], caches: dict[str, LogitCache]
) -> None:
    """Over micro-batches, through the check of its first step."""
    steps = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainer = make_trainer(tmp_path, samples, caches["all"], EVERY, **steps)
    found = gradients_after_one_step(trainer)
    model = moved().train()
    CachedLoss(caches["all"], EVERY, check=False)(model, pad_samples(samples)).loss.backward()
    assert found
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_prompt_positions_count_only_where_asked(samples: list[Sample], caches: dict[str, LogitCache]) -> None:
    """A cache that has them gives the very loss of one that has them not."""
    batch, model, default = pad_samples(samples[:4]), moved().eval(), Objective(weight=WEIGHT)
    losses = [CachedLoss(cache, default, check=False)(model, batch) for cache in caches.values()]
    torch.testing.assert_close(losses[0], losses[1])
    asked = CachedLoss(caches["all"], EVERY, check=False)(model, batch)
    torch.testing.assert_close(asked.ce, losses[0].ce)
    assert abs(float(asked.kl - losses[0].kl)) > 1e-3


def test_positions_that_were_not_captured_are_refused(
    tmp_path: Path, samples: list[Sample], caches: dict[str, LogitCache]
) -> None:
    with pytest.raises(PositionNotCaptured):
        CachedLoss(caches["supervised"], EVERY, check=False)(moved(), pad_samples(samples))
    trainer = make_trainer(tmp_path, samples, caches["supervised"], EVERY)
    trainer._check = True
    with pytest.raises(PositionNotCaptured, match="precompute with --kl-positions all"):
        trainer.train()


def test_a_document_without_labels_is_left_out(caches: dict[str, LogitCache], samples: list[Sample]) -> None:
    """As everywhere: nothing of it was captured."""
    nothing = Sample(np.arange(7, dtype=np.uint32), np.zeros(7, dtype=np.bool_), "nothing to learn")
    anchored = CachedLoss(caches["all"], EVERY, check=False)
    assert torch.equal(anchored.count(pad_samples([nothing, samples[0]])), anchored.count(pad_samples([samples[0]])))


def test_a_data_set_says_where_cross_entropy_counts(samples: list[Sample], caches: dict[str, LogitCache]) -> None:
    for name, cache in caches.items():
        found = {s.token_ids.tobytes(): s for s in data_samples(cache).samples}
        for s in samples:
            part = found[s.token_ids.tobytes()]
            assert part.positions[part.cross_entropy].tolist() == s.positions.tolist()
            whole = len(s.token_ids) - 1 if name == "all" else len(s.positions)
            assert len(part.positions) == whole


def test_nothing_is_regularised_nowhere() -> None:
    with pytest.raises(InvalidSettings, match="kl-positions"):
        Objective("none", kl_positions="all")


FORMS = [
    *(("masked-kl", tail) for tail in ("bucket", "groups", "renormalize", "sampled")),
    *((name, "bucket") for name in ("masked-reverse-kl", "masked-js", "full-kl")),
]


@pytest.mark.parametrize("chunk", [1, 3, None])
@pytest.mark.parametrize(("regularizer", "tail"), FORMS)
def test_the_sliced_loss_is_that_of_the_formulas(regularizer: Any, tail: Any, chunk: int | None) -> None:
    """Value and gradient, and the count of labels with the largest logit."""
    generator = torch.Generator().manual_seed(3)
    n, d, v, k, m = 9, 6, 30, 4, 3
    hidden = torch.randn(n, d, generator=generator)
    weight = torch.randn(v, d, generator=generator)
    order = torch.stack([torch.randperm(v, generator=generator) for _ in range(n)])
    logprobs = torch.randn(n, v, generator=generator).log_softmax(1)
    labels, kept, rest = order[:, 0], order[:, 1 : k + 1], order[:, k + 1 :]
    groups = (torch.arange(v) % 2).to(torch.uint8)
    of_rest = logprobs.gather(1, rest)
    of_groups = [of_rest.where(groups[rest] == g, -torch.inf).logsumexp(1) for g in (0, 1)]
    targets = SparseTargets(
        labels,
        logprobs.gather(1, labels[:, None]).squeeze(1),
        kept,
        logprobs.gather(1, kept),
        of_rest.logsumexp(1),
        torch.stack(of_groups, dim=1),
        groups,
        rest[:, :m],
        of_rest[:, :m],
    )
    supervised = torch.arange(n) % 3 == 0
    objective = Objective(regularizer, tail, kl_positions="all", tokens_per_loss_chunk=chunk)
    grown = hidden.clone().requires_grad_()
    top1 = torch.zeros((), dtype=torch.int64)
    found = linear_loss(
        grown, lambda h: h @ weight.T, labels, targets, objective, 0.7, top1=top1, supervised=supervised
    )
    found.loss.backward()
    plain = hidden.clone().requires_grad_()
    z = plain @ weight.T
    ce = cross_entropy(z, labels)[supervised].sum()
    kl = regularizer_values(z, targets, objective)[regularizer_mask(targets, objective)].sum()
    (ce + 0.7 * kl).backward()
    torch.testing.assert_close(found.ce, ce.detach())
    torch.testing.assert_close(found.kl, kl.detach())
    torch.testing.assert_close(grown.grad, plain.grad, rtol=1e-4, atol=1e-5)
    assert int(top1) == int((z.argmax(1) == labels)[supervised].sum())


def test_without_a_regulariser_there_are_no_such_positions() -> None:
    nowhere = torch.zeros(1, dtype=torch.bool)
    with pytest.raises(ValueError, match="supervised"):
        linear_loss(torch.zeros(1, 2), torch.nn.Linear(2, 3), nowhere, None, Objective("none"), 0.0, supervised=nowhere)


def logged(out: Path) -> list[dict[str, Any]]:
    lines = (out / "train_log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "checksum"} for line in lines]


def test_from_rows_to_training(tmp_path: Path, tiny_model: Path, write_rows: Callable[..., Path]) -> None:
    """With --data, and without it by what the data set says; the same cache without the flag is one without prompts."""
    data, cache = write_rows(ROWS), tmp_path / "all"
    precompute(tiny_model, data, cache, "--kl-positions", "all")
    precompute(tiny_model, data, tmp_path / "few")
    (all_of_it,), (few,) = facts(cache)["data_sets"], facts(tmp_path / "few")["data_sets"]
    prompts = sum(len(row["prompt"]) - 1 for row in ROWS if "prompt" in row)
    assert all_of_it["num_positions"] == few["num_positions"] + prompts
    found = {}
    for name, of, more in (
        ("data", cache, ["--data", data, "--kl-positions", "all"]),
        ("set", cache, ["--kl-positions", "all"]),
        ("plain", cache, []),
        ("few", tmp_path / "few", []),
    ):
        out = tmp_path / f"run-{name}"
        done(*train_line(tiny_model, of, out, "--batch-size", 3, "--lr", "1e-3", "--max-steps", 3, *more))
        found[name] = logged(out)
        run = json.loads((out / "run.json").read_text())
        assert run["objective"]["kl_positions"] == ("all" if more else "supervised")
        assert run["data"]["num_positions"] == few["num_positions"]
    assert found["data"][-1]["kl"] == pytest.approx(found["set"][-1]["kl"], rel=1e-4)
    assert [entry["ce"] for entry in found["plain"]] == pytest.approx([entry["ce"] for entry in found["few"]], rel=1e-5)
    assert found["plain"][-1]["kl"] == pytest.approx(found["few"][-1]["kl"], rel=1e-3)
    assert found["set"][-1]["kl"] != pytest.approx(found["plain"][-1]["kl"], rel=1e-3)
    said = refused(4, *train_line(tiny_model, tmp_path / "few", tmp_path / "no", "--kl-positions", "all"))
    assert "precompute with --kl-positions all" in said


def test_asked_again_without_prompts_they_are_left_out(
    tmp_path: Path, tiny_model: Path, write_rows: Callable[..., Path]
) -> None:
    """And asked for again: nothing is computed, the data set changes."""
    data, cache = write_rows(ROWS), tmp_path / "c"
    precompute(tiny_model, data, cache)
    few = facts(cache)["data_sets"]
    precompute(tiny_model, data, cache, "--kl-positions", "all")
    assert facts(cache)["data_sets"] != few
    outcome = precompute(tiny_model, data, cache)
    assert "Cached 0 positions" in outcome.out and facts(cache)["data_sets"] == few
