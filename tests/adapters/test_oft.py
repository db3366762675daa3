"""OFT: its weights are those of the formula, how near R is to a rotation, and where it may stand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import OFTConfig, get_peft_model
from support.adapter_cases import SAMPLES, logits, sized
from support.filling import load
from support.oracles_oft import rotated, rotation, skew
from support.tiny_model import make_model
from support.tiny_runs import V, make_cache, run
from torch import Tensor

from logitcache.adapters.attach import attach, save
from logitcache.adapters.registry import NAME
from logitcache.data.batches import pad_samples
from logitcache.errors import NotTheBase, TrainingFailed, UnsuitableAdapter
from logitcache.evaluation.compare import load_adapter
from logitcache.evaluation.scales import models_between
from logitcache.losses.formulas import Objective
from logitcache.pairing.targets import with_targets
from logitcache.storage import LogitCache
from logitcache.training import supported
from logitcache.training.batch_loss import batch_loss
from logitcache.training.custom_loop import CachedLoss
from logitcache.training.penalties import Penalty

SIZE = 4
cayleys = pytest.mark.parametrize(("cayley", "last_power"), [("neumann", 3), ("exact", None)])


def moved(cayley: str = "neumann", by: float = 0.1, make: Any = make_model, **changes: Any) -> Any:
    """Its parameters are drawn; by: their standard deviation, tan of half an angle in radians."""
    model = attach(make(), sized("oft", SIZE, cayley=cayley, **changes), "tiny").eval()
    torch.manual_seed(1)
    for parameter in rotations(model).values():
        parameter.data.normal_(std=by)
    return model


def rotations(model: Any) -> dict[str, Tensor]:
    """The parameters of each adapted layer, by its name in the base."""
    layers = model.get_base_model().named_modules()
    return {name: layer.oft_R[NAME].weight for name, layer in layers if NAME in getattr(layer, "oft_R", {})}


def by_formula(model: Any, last_power: int | None, make: Any = make_model) -> Any:
    """The base with each adapted weight rotated, in float64."""
    plain = make().double()
    for name, parameters in rotations(model).items():
        weight = plain.get_submodule(name).weight
        weight.data = torch.from_numpy(
            rotated(weight.detach().numpy(), parameters.detach().double().numpy(), SIZE, last_power)
        )
    return plain


@cayleys
@pytest.mark.parametrize("config", [{}, {"attention_bias": True}], ids=["plain", "biased"])
def test_the_model_has_the_weights_of_the_formula(cayley: str, last_power: int | None, config: dict[str, Any]) -> None:
    """Biases stay. Each rotation is seen: with one of them left out the logits are others."""

    def make() -> Any:
        model = make_model(**config)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter)
        return model

    model = moved(cayley, make=make)
    assert len(rotations(model)) == 14
    plain = by_formula(model, last_power, make)
    expected = logits(plain)
    torch.testing.assert_close(logits(model).double(), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    torch.testing.assert_close(logits(model.double()), expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
    name = "model.layers.0.self_attn.v_proj"
    plain.get_submodule(name).weight.data = make().get_submodule(name).weight.detach().double()
    assert (logits(plain) - expected).abs().max() > 1e-2


@cayleys
def test_the_change_that_a_penalty_pulls_on_is_the_formulas(cayley: str, last_power: int | None) -> None:
    """1/2 ||W R^T - W||^2 over the layers, near the start and away from it."""
    for by in (1e-5, 0.1):
        model = moved(cayley, by)
        base, plain = make_model(), by_formula(model, last_power)
        changes = [
            (plain.get_submodule(name).weight - base.get_submodule(name).weight.double()).detach().square()
            for name in rotations(model)
        ]
        expected = float(sum(change.sum() for change in changes)) / 2
        assert float(Penalty(model)().detach()) == pytest.approx(expected, rel=1e-4 if by > 1e-3 else 1e-2)


def test_a_rotation_for_all_blocks_has_a_known_change_too() -> None:
    """block_share, of a configuration of somebody else's."""
    config = OFTConfig(oft_block_size=SIZE, block_share=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(make_model(), config)
    for parameters in rotations(model).values():
        assert len(parameters) == 1
        parameters.data.normal_(std=0.1)
    expected = 0.0
    for name, parameters in rotations(model).items():
        weight = make_model().get_submodule(name).weight.detach().double().numpy()
        every = np.repeat(parameters.detach().double().numpy(), weight.shape[1] // SIZE, axis=0)
        expected += float(np.square(rotated(weight, every, SIZE, 3) - weight).sum()) / 2
    assert float(Penalty(model)().detach()) == pytest.approx(expected, rel=1e-4)


def test_a_change_that_every_forward_sets_back_is_not_known() -> None:
    config = OFTConfig(oft_block_size=SIZE, coft=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(UnsuitableAdapter, match="COFT sets its parameters back"):
        Penalty(get_peft_model(make_model(), config))


def test_how_near_the_sum_is_to_a_rotation() -> None:
    """As docs/adapters.md has it: R R^T = (I - Q^4)^2, so 2 t^4 for the largest t of an eigenvalue i t; or I."""
    entries = np.random.default_rng(0).normal(scale=0.2, size=6)
    q = skew(entries, SIZE)
    by_peft = {}
    for cayley in ("neumann", "exact"):
        layer = dict(attach(make_model(), sized("oft", SIZE, cayley=cayley), "tiny").named_modules())[
            "base_model.model.model.layers.0.self_attn.q_proj"
        ].double()
        layer.oft_R[NAME].weight.data[0] = torch.from_numpy(entries)
        by_peft[cayley] = layer.get_delta_weight(NAME).detach().numpy()[:SIZE, :SIZE]
    one, fourth = np.eye(SIZE), np.linalg.matrix_power(q, 4)
    found = by_peft["neumann"]
    np.testing.assert_allclose(found, rotation(q, 3), atol=1e-14)
    np.testing.assert_allclose(found @ found.T, (one - fourth) @ (one - fourth), atol=1e-14)
    largest = np.abs(np.linalg.eigvals(q)).max()
    off = np.linalg.norm(found @ found.T - one, 2)
    assert off == pytest.approx(1 - (1 - largest**4) ** 2, rel=1e-6) and off > 1e-3
    exact = by_peft["exact"]
    np.testing.assert_allclose(exact @ exact.T, one, atol=1e-14)
    np.testing.assert_allclose(exact, rotation(-q, 99), atol=1e-12)  # the other way round


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    return make_cache(tmp_path_factory.mktemp("oft-cache") / "c", SAMPLES, top_k=V - 1)


def test_the_gradient_through_a_rotated_head_is_autograds(cache: LogitCache) -> None:
    """In slices of the head, against the cross-entropy of whole logits."""
    used, found = SAMPLES[:3], []
    for chunk in (3, None):
        model = moved(target_modules="q_proj,lm_head").train()
        if chunk is None:
            parts = []
            for sample in used:
                ids = torch.from_numpy(sample.token_ids.astype(np.int64))
                rows = torch.from_numpy(sample.positions.astype(np.int64))
                logits_of = model(input_ids=ids[None]).logits[0, rows]
                parts.append(torch.nn.functional.cross_entropy(logits_of, ids[rows + 1], reduction="sum"))
            torch.stack(parts).sum().backward()
        else:
            batch, objective = with_targets(pad_samples(used), cache), Objective(tokens_per_loss_chunk=chunk)
            batch_loss(model, batch, objective, 0.0, None).loss.backward()
        found.append({name: parameter.grad.clone() for name, parameter in rotations(model).items()})  # type: ignore[union-attr]
    assert found[1]["lm_head"].abs().max() > 1e-2
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_an_embedding_is_rotated_saved_and_scaled(tmp_path: Path) -> None:
    settings = sized("oft", SIZE, target_modules="embed_tokens,q_proj")
    model = attach(make_model(), settings, "tiny").eval()
    assert torch.equal(logits(model), logits(make_model()))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    expected = logits(model)
    save(model, tmp_path / "o", settings, "tiny")
    assert torch.equal(logits(load_adapter(make_model(), str(tmp_path / "o"))), expected)
    for _, whole in models_between(make_model(), model, [1]):
        torch.testing.assert_close(logits(whole), expected, rtol=0, atol=1e-4)


def test_half_of_a_rotation_is_half_of_its_change() -> None:
    """What lies between base and merged model is on the straight line, and no rotation by half the angle."""
    model = moved("exact").double()
    middle = by_formula(model, None)
    for name in rotations(model):
        weight = middle.get_submodule(name).weight
        weight.data = (weight.data + make_model().get_submodule(name).weight.detach().double()) / 2
    for _, found in models_between(make_model().double().eval(), model, [0.5]):
        torch.testing.assert_close(logits(found), logits(middle), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("saved_by", "neumann", "is_taken"),
    [
        ("0.17.1", True, False),
        (None, True, False),
        ("0.17.1", False, True),
        ("0.18.0@abc", True, True),
    ],
)
def test_rotations_by_an_earlier_sum_are_refused(
    saved_by: str | None, neumann: bool, is_taken: bool, tmp_path: Path
) -> None:
    """PEFT 0.18 changed the sum, and says so by a warning alone."""
    model = moved("neumann" if neumann else "exact")
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_version": saved_by}), encoding="utf-8")
    if is_taken:
        assert torch.equal(logits(load_adapter(make_model(), str(tmp_path))), logits(model))
        return
    with pytest.raises(UnsuitableAdapter, match="another sum of the same parameters") as caught:
        load_adapter(make_model(), str(tmp_path))
    assert caught.value.reason == "unsuitable-adapter"


def test_one_model_over_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT divides no rotation with the layer below it: each process would train one of its own."""
    monkeypatch.setattr(supported, "num_replicas", lambda _: 2)
    trainer: Any = type("Trainer", (), {"args": type("Args", (), {"n_gpu": 1, "label_smoothing_factor": 0.0})()})()
    trainer.model = moved()
    monkeypatch.setattr(supported, "parallelism", lambda *_: 1)
    with pytest.raises(TrainingFailed, match="each would train an adapter of its own on its part"):
        supported.check_supported(trainer)


def test_a_run_says_what_it_has_and_nothing_else(tmp_path: Path, cache: LogitCache) -> None:
    from support.tiny_runs import make_base

    run(make_base(), SAMPLES, cache, tmp_path / "o", max_steps=1, adapter=sized("oft", SIZE))
    described = json.loads((tmp_path / "o" / "run.json").read_text(encoding="utf-8"))["adapter"]
    expected = {"kind": "oft", "target_modules": "all-linear", "block_size": SIZE, "cayley": "neumann"}
    assert described == expected | {"modules_to_save": ""}
    config = json.loads((tmp_path / "o" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["oft_block_size"], config["r"], config["use_cayley_neumann"]) == (SIZE, 0, True)
    assert (config["num_cayley_neumann_terms"], config["block_share"], config["coft"]) == (5, False, False)


def test_a_cache_is_filled_below_it(tiny_model: Path, tmp_path: Path) -> None:
    """By the base, and not where a rotation has moved."""
    config = OFTConfig(oft_block_size=SIZE, target_modules="all-linear", task_type="CAUSAL_LM")
    for place, moves in (("moved", True), ("whole", False)):
        model = get_peft_model(load(tiny_model), config)
        batches = [pad_samples(SAMPLES[:4])]
        anchored = CachedLoss(tmp_path / place, Objective(), fill=True)
        if moves:
            for parameters in rotations(model).values():
                parameters.data.normal_(std=0.1)
            with pytest.raises(NotTheBase, match="expected an adapter that is untrained"):
                anchored.fill(model, batches)
            continue
        anchored.fill(model, batches)
        assert abs(float(anchored(model, batches[0]).kl)) <= 5e-5  # the steps of 1/64 nat of what was stored
    assert len(LogitCache.open(tmp_path / "whole")) == 4
