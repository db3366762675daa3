"""Null spaces: covariances against plain ones, what is reported, the folder, and what makes LoRA-Null LoRA-Null."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.cli_harness import done, edit_json, flip_byte, logitcache, precompute, refused, text_data, train_line
from support.tiny_model import make_model
from support.tiny_runs import make_base, make_samples
from torch import Tensor

from logitcache.adapters.attach import AdapterSettings, attach
from logitcache.adapters.covariances import energy_ratio, input_covariances, input_groups, linear_layers, num_passes
from logitcache.adapters.null_space import (
    MANIFEST,
    TENSORS,
    NullSpace,
    NullSpaceSettings,
    check_null_space,
    claim_folder,
    compute_null_space,
)
from logitcache.adapters.registry import NAME, lora_layers
from logitcache.adapters.settings import VARIANTS
from logitcache.adapters.start import minor_components, projected_factors
from logitcache.data.samples import Sample
from logitcache.errors import InputNotFound, NotTheBase, TrainingFailed, UnsuitableAdapter, UnsupportedModel
from logitcache.models.loading import Base
from logitcache.storage import CorruptCache

RANK = 4
LAYER = "model.layers.{}."
SHARED = [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",)]
SHARED += [("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return make_samples(40, seed=3)


@pytest.fixture(scope="module")
def space(samples: list[Sample]) -> NullSpace:
    return compute_null_space(make_base(), samples, NullSpaceSettings(rank=RANK))


def planted_base(width: int = 6) -> Base:
    """A base whose attention inputs are 0 in their first `width` dimensions: a null space that is known."""
    base = make_base()
    for layer in base.model.model.layers:
        layer.input_layernorm.weight.data[:width] = 0.0
    return base


def inputs_of(model: Any, samples: Sequence[Sample], name: str) -> Tensor:
    """Every input of a layer, float64 [N, D], sample by sample without padding."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0][0].double()))
    for sample in {s.token_ids.tobytes(): s for s in samples}.values():
        with torch.no_grad():
            model(input_ids=torch.from_numpy(sample.token_ids.astype(np.int64))[None])
    handle.remove()
    return torch.cat(seen)


# --- covariances -----------------------------------------------------------------------------------------------------


def test_layers_are_those_of_all_linear() -> None:
    adapted = attach(make_model(), AdapterSettings(rank=2), "tiny")
    assert set(linear_layers(make_model())) == set(adapted.targeted_module_names)


def test_layers_that_share_an_input_are_one_group(samples: list[Sample]) -> None:
    groups = input_groups(make_model(), samples[0])
    expected = [tuple(LAYER.format(i) + name for name in names) for i in range(2) for names in SHARED]
    assert [g.layers for g in groups] == expected
    assert [g.width for g in groups] == [32, 32, 32, 64] * 2


def test_covariances_are_those_of_the_inputs_without_padding(samples: list[Sample]) -> None:
    model, count = make_model(), 0
    for group, covariance in input_covariances(model, samples, batch_tokens=100):
        x = inputs_of(model, samples, group.layers[-1])
        torch.testing.assert_close(covariance, x.T @ x, rtol=1e-5, atol=1e-6 * float(covariance.diagonal().max()))
        assert covariance.dtype == torch.float64
        count += 1
    assert count == 8


@pytest.mark.parametrize(("memory", "passes"), [(1, 8), (8 * 32**2 * 3, 4), (8 * 64**2 * 2, 2), (2**30, 1)])
def test_a_memory_limit_takes_more_passes_to_the_same_result(memory: int, passes: int, samples: list[Sample]) -> None:
    model, used = make_model(), samples[:6]
    assert num_passes(model, used[0], memory) == passes
    tokens: list[int] = []
    found = list(input_covariances(model, used, memory_bytes=memory, progress=tokens.append))
    expected = list(input_covariances(model, used))
    assert [g for g, _ in found] == [g for g, _ in expected]
    for (_, mine), (_, theirs) in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert sum(tokens) == passes * sum(len(s.token_ids) for s in used)


def test_a_pass_runs_no_deeper_than_it_must(samples: list[Sample]) -> None:
    model, runs = make_model(), [0, 0]
    for i, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.register_forward_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    found = input_covariances(model, samples[:1], memory_bytes=1)
    runs[:] = [0, 0]
    next(found)  # the probe, and a pass for the first input only
    assert runs == [1, 1]


def test_a_layer_that_does_not_run_is_refused(samples: list[Sample]) -> None:
    model = make_model()
    model.model.unused = torch.nn.Linear(32, 32)
    with pytest.raises(UnsupportedModel, match=r"0 runs of model\.unused"):
        input_groups(model, samples[0])


# --- null spaces -----------------------------------------------------------------------------------------------------


def test_directions_are_those_with_least_energy(space: NullSpace, samples: list[Sample]) -> None:
    model = make_model()
    for found in space.spaces:
        x = inputs_of(model, samples, found.group.layers[0])
        values, vectors = torch.linalg.eigh(x.T @ x / len(x))
        rows = found.directions.double()
        torch.testing.assert_close(rows @ rows.T, torch.eye(RANK, dtype=torch.float64), rtol=0, atol=1e-6)
        torch.testing.assert_close(found.eigenvalues, values, rtol=1e-4, atol=1e-6 * float(values[-1]))
        projector = vectors[:, :RANK] @ vectors[:, :RANK].T
        torch.testing.assert_close(rows.T @ rows, projector, rtol=0, atol=1e-3)
        assert found.energy_share < RANK / found.group.width / 1.5
    assert space.num_tokens == sum(len(s.token_ids) for s in {s.token_ids.tobytes(): s for s in samples}.values())
    assert space.directions.keys() == linear_layers(model).keys()


def test_a_planted_null_space_is_found(samples: list[Sample]) -> None:
    found = compute_null_space(planted_base(), samples, NullSpaceSettings(rank=6))
    attention = [s for s in found.spaces if s.group.layers[0].endswith("q_proj")]
    assert [s.null_dimension(torch.float32) for s in attention] == [6, 6]
    for s in attention:
        assert s.directions[:, 6:].abs().max() < 1e-6 and s.energy_share < 1e-12
        assert not s.is_tied(torch.float32)


def test_products_in_float32_find_the_same_directions_to_a_rounding_of_the_largest(samples: list[Sample]) -> None:
    model = make_model()
    exact = dict(input_covariances(model, samples, batch_tokens=100))
    for group, covariance in input_covariances(model, samples, batch_tokens=100, products=torch.float32):
        off = torch.linalg.matrix_norm(covariance - exact[group], 2) / torch.linalg.eigvalsh(exact[group])[-1]
        assert covariance.dtype == torch.float64 and 0 < off < torch.finfo(torch.float32).eps


def test_products_in_float32_are_of_float32_under_autocast_too(samples: list[Sample]) -> None:
    model = make_model()
    with torch.autocast("cpu", torch.bfloat16):  # of the forward, in both
        exact = dict(input_covariances(model, samples, batch_tokens=100))
        found = dict(input_covariances(model, samples, batch_tokens=100, products=torch.float32))
    for group, covariance in found.items():
        off = torch.linalg.matrix_norm(covariance - exact[group], 2) / torch.linalg.eigvalsh(exact[group])[-1]
        assert off < torch.finfo(torch.float32).eps


def test_a_planted_null_space_is_found_by_products_in_float32(samples: list[Sample], tmp_path: Path) -> None:
    found = compute_null_space(planted_base(), samples, NullSpaceSettings(rank=6, products="float32"))
    attention = [s for s in found.spaces if s.group.layers[0].endswith("q_proj")]
    assert [s.null_dimension(torch.float32) for s in attention] == [6, 6]
    for s in attention:
        assert s.directions[:, 6:].abs().max() < 1e-3 and not s.is_tied(torch.float32)
    found.save(tmp_path / "n")
    again = NullSpace.open(tmp_path / "n")
    assert again.settings["products"] == "float32" and all(s.products == torch.float32 for s in again.spaces)
    assert again.findings() == found.findings() and again.checksum == found.checksum
    exact = compute_null_space(planted_base(), samples, NullSpaceSettings(rank=6))
    assert exact.checksum != found.checksum


def test_a_rank_within_the_null_space_is_tied(samples: list[Sample]) -> None:
    found = compute_null_space(planted_base(), samples, NullSpaceSettings(rank=4))
    said = found.findings()
    assert any("2 of 8 inputs: directions are tied at the cut" in text for text in said)
    assert any(text.startswith("6 of 8 inputs: rank 4 is larger than the null space (0 ") for text in said)
    assert len(said) == 2


def test_a_rank_beyond_the_null_space_is_told(samples: list[Sample]) -> None:
    (said,) = compute_null_space(planted_base(), samples, NullSpaceSettings(rank=7)).findings()
    assert said.startswith("8 of 8 inputs: rank 7 is larger than the null space (0 to 6 directions at the noise floor")


def test_too_little_text_is_told(samples: list[Sample]) -> None:
    few = [s for s in samples if len(s.token_ids) < 12][:2]
    found = compute_null_space(make_base(), few, NullSpaceSettings(rank=RANK))
    assert found.num_tokens < 32
    said = found.findings()
    assert said[0].startswith(f"8 of 8 inputs: {found.num_tokens} calibration tokens are fewer than the width (")
    assert any("tied" in text for text in said)


def test_a_rank_wider_than_an_input_is_refused(samples: list[Sample]) -> None:
    with pytest.raises(UnsuitableAdapter, match="has 32 dimensions"):
        compute_null_space(make_base(), samples, NullSpaceSettings(rank=33))


def test_max_samples_are_spread_over_the_data(samples: list[Sample]) -> None:
    found = compute_null_space(make_base(), samples, NullSpaceSettings(rank=RANK, max_samples=10))
    assert found.num_samples == 10 and found.num_tokens == sum(len(s.token_ids) for s in samples[::4])


# --- the folder ------------------------------------------------------------------------------------------------------


def test_a_folder_gives_back_what_was_saved(space: NullSpace, tmp_path: Path) -> None:
    space.save(tmp_path / "n")
    again = NullSpace.open(tmp_path / "n")
    assert sorted(p.name for p in (tmp_path / "n").iterdir()) == [MANIFEST, TENSORS]
    assert again.checksum == space.checksum
    for mine, theirs in zip(again.spaces, space.spaces, strict=True):
        assert mine.group == theirs.group
        assert torch.equal(mine.directions, theirs.directions) and torch.equal(mine.eigenvalues, theirs.eigenvalues)
    assert replace(again, spaces=()) == replace(space, spaces=())
    assert again.findings() == space.findings()


def test_saving_overwrites_nothing_else_and_follows_no_link(space: NullSpace, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("ten years of work")
    (tmp_path / "n").mkdir()
    (tmp_path / "n" / f"{MANIFEST}.new").symlink_to(tmp_path / "thesis.tex")
    (tmp_path / "n" / f"{TENSORS}.new").write_text("mine")
    with pytest.raises(TrainingFailed, match="expected an empty folder"):
        claim_folder(tmp_path / "n")
    space.save(tmp_path / "n")
    assert (tmp_path / "thesis.tex").read_text() == "ten years of work"
    assert (tmp_path / "n" / f"{TENSORS}.new").read_text() == "mine"
    assert NullSpace.open(tmp_path / "n").checksum == space.checksum


def test_what_a_killed_process_left_unfinished_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / f"{TENSORS}.{'0' * 32}.new").write_bytes(b"half")
    claim_folder(tmp_path)
    (tmp_path / f"notes.{'0' * 32}.new").write_text("mine")
    with pytest.raises(TrainingFailed):
        claim_folder(tmp_path)


def test_the_same_text_gives_the_same_null_space(space: NullSpace, samples: list[Sample]) -> None:
    again = compute_null_space(make_base(), samples, NullSpaceSettings(rank=RANK, memory_limit=1e-9))
    assert again.checksum == space.checksum
    other = compute_null_space(make_base(), samples[1:], NullSpaceSettings(rank=RANK))
    assert other.checksum != space.checksum and other.data != space.data


DAMAGE = {
    "tensors flipped": lambda f: flip_byte(f / TENSORS),
    "tensors gone": lambda f: (f / TENSORS).unlink(),
    "manifest changed": lambda f: edit_json(f / MANIFEST, lambda m: m.update(rank=3)),
    "manifest cut short": lambda f: (f / MANIFEST).write_text("{"),
    "manifest of nothing": lambda f: (f / MANIFEST).write_text("[]"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_refused(name: str, space: NullSpace, tmp_path: Path) -> None:
    space.save(tmp_path / "n")
    DAMAGE[name](tmp_path / "n")
    with pytest.raises(CorruptCache, match="Make it again"):
        NullSpace.open(tmp_path / "n")


def test_another_model_or_rank_is_refused(space: NullSpace, tmp_path: Path) -> None:
    base = make_base()
    check_null_space(space, base, RANK, "n")
    with pytest.raises(NotTheBase, match="computed from tiny"):
        check_null_space(space, replace(base, identity=replace(base.identity, weights="others")), RANK, "n")
    with pytest.raises(InputNotFound, match=f"Use --rank {RANK}"):
        check_null_space(space, base, RANK + 1, "n")
    with pytest.raises(InputNotFound, match="logitcache nullspace"):
        NullSpace.open(tmp_path)


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    claim_folder(tmp_path / "new")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TrainingFailed, match="expected an empty folder"):
        claim_folder(tmp_path)


# --- what defines LoRA-Null ------------------------------------------------------------------------------------------


def attached(space: NullSpace, folder: Path, variant: str) -> Any:
    space.save(folder)
    settings = AdapterSettings("lora-null", RANK, 8.0, nullspace=str(folder), variant=variant)
    return attach(make_model(), settings, "tiny")


@pytest.mark.parametrize("variant", VARIANTS)
def test_factors_are_the_projected_weight(variant: str, space: NullSpace, tmp_path: Path) -> None:
    """s B A = W U^T U and the layer keeps W - W U^T U; or B = 0, A = U and the layer keeps W."""
    weights = {n: m.weight.detach().double() for n, m in linear_layers(make_model()).items()}
    names = set()
    for name, layer in lora_layers(attached(space, tmp_path / "n", variant)):
        rows, weight = space.directions[name].double(), weights[name]
        b, a = (m[NAME].weight.detach().double() for m in (layer.lora_B, layer.lora_A))
        kept = layer.get_base_layer().weight.detach().double()
        if variant == "base-intact":
            assert not b.any() and torch.equal(kept, weight) and torch.equal(a, rows)
        else:
            projected = weight @ rows.T @ rows
            scale = float(projected.abs().max())
            torch.testing.assert_close(layer.scaling[NAME] * b @ a, projected, rtol=0, atol=1e-6 * scale)
            torch.testing.assert_close(kept, weight - projected, rtol=0, atol=1e-6 * float(weight.abs().max()))
            torch.testing.assert_close(b.T @ b, a @ a.T, rtol=1e-4, atol=1e-6 * scale)  # sqrt(S) in both
        assert layer.lora_A[NAME].weight.requires_grad is (variant != "v2")
        assert layer.lora_B[NAME].weight.requires_grad
        names.add(name)
    assert names == set(weights)


def test_factors_in_one_piece_are_those_of_the_whole_decomposition() -> None:
    """The thin SVD of W U^T against the SVD of P itself."""
    torch.manual_seed(0)
    weight, rows = torch.randn(20, 12), torch.linalg.qr(torch.randn(12, RANK))[0].T.contiguous()
    b, a = projected_factors(weight, rows, 2.0)
    x, s, yt = torch.linalg.svd(weight.double() @ rows.double().T @ rows.double())
    torch.testing.assert_close(2.0 * b @ a, x[:, :RANK] * s[:RANK] @ yt[:RANK], rtol=0, atol=1e-6)
    torch.testing.assert_close(b.norm(dim=0), (s[:RANK] / 2.0).sqrt())
    torch.testing.assert_close(a.norm(dim=1), (s[:RANK] / 2.0).sqrt())


def test_inputs_have_least_energy_where_the_adapter_writes(samples: list[Sample]) -> None:
    """||A x||^2 by layer, over that of random directions: LoRA-Null, MiLoRA, random; at the noise floor if planted."""
    base = planted_base()
    found = compute_null_space(base, samples, NullSpaceSettings(rank=RANK))
    layers = linear_layers(base.model)
    generator = torch.Generator().manual_seed(0)
    for group, covariance in input_covariances(base.model, samples):
        for name in group.layers:
            weight = layers[name].weight.detach()
            random = torch.randn(RANK, group.width, generator=generator)
            _, null = projected_factors(weight, found.directions[name], 2.0)
            _, minor = minor_components(weight, RANK, 2.0)
            ratios = [energy_ratio(a, covariance) for a in (null, minor, random)]
            assert ratios[0] < 0.5 * min(ratios[1:])
            if name.endswith(("q_proj", "k_proj", "v_proj")):
                assert ratios[0] < 1e-12 and min(ratios[1:]) > 1e-2


def test_energy_ratio_is_one_for_random_directions() -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 16, dtype=torch.float64) * torch.linspace(0.1, 3, 16)
    assert energy_ratio(torch.randn(4000, 16), x.T @ x) == pytest.approx(1, abs=0.05)
    a = torch.randn(3, 16)
    unit = (a / a.norm(dim=1, keepdim=True)).double()
    expected = float((x @ unit.T).square().mean() / x.square().mean())
    assert energy_ratio(5 * a, x.T @ x) == pytest.approx(expected, rel=1e-6)


# --- the verb --------------------------------------------------------------------------------------------------------


def nullspace_line(model: Path, data: Path, out: Path, *more: object) -> list[object]:
    return ["nullspace", "--model", model, "--data", data, "--out", out, "--rank", 2, *more]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_data(tmp_path_factory.mktemp("null-data"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, data: Path) -> Path:
    path = tmp_path_factory.mktemp("null-cache") / "cache"
    precompute(tiny_model, data, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, data: Path) -> Path:
    path = tmp_path_factory.mktemp("null") / "n"
    done(*nullspace_line(tiny_model, data, path))
    return path


def test_the_verb_says_what_it_kept_and_what_is_doubtful(tmp_path: Path, tiny_model: Path, data: Path) -> None:
    outcome = done(*nullspace_line(tiny_model, data, tmp_path / "n", "--memory-limit", 1e-6))
    tokens = NullSpace.open(tmp_path / "n").num_tokens
    expected = f"Kept 2 directions of each of 8 inputs of 14 layers, from {tokens} tokens in 8 passes: {tmp_path / 'n'}"
    assert outcome.out == f"{expected}\n"
    assert "rank 2 is larger than the null space" in outcome.err and "\r" not in outcome.err
    again = refused(1, *nullspace_line(tiny_model, data, tmp_path / "n"))
    assert again.endswith("Choose another --out.")


def test_train_takes_a_null_space(tmp_path: Path, tiny_model: Path, cache: Path, folder: Path) -> None:
    more = ["--adapter", "lora-null", "--nullspace", folder]
    done(*train_line(tiny_model, cache, tmp_path / "o", *more, "--variant", "v2"))
    run = json.loads((tmp_path / "o" / "run.json").read_text(encoding="utf-8"))
    assert run["adapter"]["variant"] == "v2" and run["adapter"]["nullspace"] == NullSpace.open(folder).checksum
    moved = folder.rename(folder.with_name("moved"))
    try:  # content decides
        line = train_line(tiny_model, cache, tmp_path / "o", "--adapter", "lora-null", "--nullspace", moved)
        done(*line, "--variant", "v2", "--resume")
        assert "differs in adapter" in refused(4, *line, "--resume")
    finally:
        moved.rename(folder)


def test_train_refuses_what_does_not_fit(
    tmp_path: Path, tiny_model: Path, other_model: Path, data: Path, cache: Path, folder: Path
) -> None:
    line = train_line(tiny_model, cache, tmp_path / "o", "--adapter", "lora-null")
    assert "needs --nullspace" in refused(2, *line)
    assert "expected nullspace.json" in refused(2, *line, "--nullspace", tmp_path / "none")
    assert "Use --rank 2" in refused(2, *line, "--nullspace", folder, "--rank", 3)
    assert "'--variant'" in refused(2, *line, "--nullspace", folder, "--variant", "v3")
    for more in (["--nullspace", folder], ["--variant", "v1"]):
        assert "for --adapter lora-null" in refused(2, *train_line(tiny_model, cache, tmp_path / "o", *more))
    done(*nullspace_line(other_model, data, tmp_path / "other"))
    assert "not from this model" in refused(4, *line, "--nullspace", tmp_path / "other")
    flip_byte(tmp_path / "other" / TENSORS)
    assert "Make it again." in refused(3, *line, "--nullspace", tmp_path / "other")
    head = ["--nullspace", folder, "--target-modules", "q_proj,lm_head"]
    assert "no directions for lm_head" in refused(2, *line, *head)
    assert not (tmp_path / "o" / "run.json").exists()


def test_the_verb_refuses_bad_input(tmp_path: Path, tiny_model: Path, data: Path) -> None:
    assert "'--rank'" in refused(2, *nullspace_line(tiny_model, data, tmp_path / "n", "--rank", 0))
    assert "'--memory-limit'" in refused(2, *nullspace_line(tiny_model, data, tmp_path / "n", "--memory-limit", 0))
    assert "32 dimensions" in refused(2, *nullspace_line(tiny_model, data, tmp_path / "n", "--rank", 40))
    assert logitcache("nullspace").status == 2
    assert not (tmp_path / "n").exists()
