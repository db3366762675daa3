"""The right base, whatever the precision: weights and configuration in memory first, then the KL; and what is said of
what could not be compared. Near relatives are made by hand, each as a user comes by it."""

import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.families import make_family
from support.plug_ins import arguments, lora, mixture
from support.tiny_model import make_model, make_tokenizer
from support.tiny_runs import V, make_samples
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from logitcache.capture.settings import CaptureSettings
from logitcache.capture.worker import precompute
from logitcache.data.batches import pad_samples
from logitcache.errors import NotTheBase
from logitcache.losses.formulas import Objective
from logitcache.models import weights_in_memory
from logitcache.models.loading import find_model, load_base
from logitcache.models.same_base import config_differences
from logitcache.models.weights_in_memory import compare_weights, local_checkpoint
from logitcache.pairing.settings import PairingRules
from logitcache.pairing.step_zero import Probe, own_noise, probe_step_zero, tolerance_of
from logitcache.pairing.view import CacheView
from logitcache.storage import LogitCache
from logitcache.storage.configs import config_text, read_config
from logitcache.training.custom_loop import CachedLoss
from logitcache.training.trainer import CachedKLTrainer

CPU = torch.device("cpu")
SAMPLES = make_samples(12)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in float32."""
    path = tmp_path_factory.mktemp("right-base") / "base"
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> dict[str, LogitCache]:
    """Of the base, run in each dtype; to be read only."""
    root = tmp_path_factory.mktemp("right-base-caches")
    for dtype in DTYPES:
        base = load_base(find_model(str(folder)), dtype, CPU)
        precompute(base, SAMPLES, root / dtype, CaptureSettings(top_k=V - 1, max_length=64, precision="exact"))
    return {dtype: LogitCache.open(root / dtype) for dtype in DTYPES}


def load(folder: Path, dtype: str = "bfloat16", **how: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], **how)


def train_in_a_loop(cache: LogitCache, model: Any, **rules: Any) -> CachedLoss:
    anchored = CachedLoss(cache, rules=PairingRules(**rules) if rules else None)
    anchored(model, pad_samples(SAMPLES[:6]))
    return anchored


def train_in_a_trainer(out: Path, cache: LogitCache, model: Any, **changes: Any) -> CachedKLTrainer:
    args = arguments(out, remove_unused_columns=False, max_steps=1, **changes)
    trainer = CachedKLTrainer(model=model, args=args, train_dataset=SAMPLES, data_collator=pad_samples, cache=cache)
    trainer.train()
    return trainer


def noisy(share: float) -> Callable[[Any], Any]:
    """Noise of this share of their spread on the matrices of the layers."""

    def spoil(model: Any) -> Any:
        draws = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() == 2 and "layers" in name:
                    noise = share * weight.float().std() * torch.randn(weight.shape, generator=draws)
                    weight.copy_((weight.float() + noise).to(weight.dtype))
        return model

    return spoil


def merged(model: Any) -> Any:
    """What one step of LoRA at a learning rate of 2e-4 leaves, merged; the name of the folder stays."""
    torch.manual_seed(0)
    adapted = get_peft_model(model, lora())
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(2e-4 * torch.randn_like(parameter).sign())
    found = adapted.merge_and_unload()
    assert found.name_or_path
    return found


def other_eps(model: Any) -> Any:
    """In the modules alone."""
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.3
    return model


NEAR: dict[str, tuple[Callable[[Path], Any], str]] = {
    "noise of 1 %": (lambda f: noisy(0.01)(load(f)), "found others in 14 of 21 tensors"),
    "noise of 3 %": (lambda f: noisy(0.03)(load(f)), "found others in 14 of 21 tensors"),
    "one step, merged": (lambda f: merged(load(f)), "found others in 14 of 21 tensors"),
    "another eps in the config": (
        lambda f: load(f, rms_norm_eps=1e-5),
        r"config.rms_norm_eps: 1e-06 in the cache, 1e-05",
    ),
    "another rope_theta": (
        lambda f: load(f, rope_parameters={"rope_theta": 2e4, "rope_type": "default"}),
        r"config.rope_parameters.rope_theta: 10000.0 in the cache, 20000.0 in memory",
    ),
    "another eps in the modules": (lambda f: other_eps(load(f)), "checking step 0 against"),
}


@pytest.mark.parametrize("near", NEAR)
@pytest.mark.parametrize("where", ["loop", "loop, all weights", "trainer"])
def test_near_relatives_are_refused_in_bfloat16(
    near: str, where: str, tmp_path: Path, folder: Path, caches: dict[str, LogitCache]
) -> None:
    make, said = NEAR[near]
    model, cache = make(folder), caches["bfloat16"]
    trained = model.requires_grad_(True) if where == "loop, all weights" else get_peft_model(model, lora())

    def start() -> object:
        return train_in_a_trainer(tmp_path, cache, trained) if where == "trainer" else train_in_a_loop(cache, trained)

    with pytest.raises(NotTheBase, match=said):
        start()


@pytest.mark.parametrize("ours", DTYPES)
@pytest.mark.parametrize("theirs", DTYPES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_base_is_taken_in_every_dtype_and_attention(
    ours: str, theirs: str, attention: str, folder: Path, caches: dict[str, LogitCache]
) -> None:
    model = get_peft_model(load(folder, ours, attn_implementation=attention), lora())
    found = train_in_a_loop(caches[theirs], model).step_zero
    assert found is not None and found.own_noise_nats is None
    assert found.tolerance_nats == (1e-5 if ours == theirs == "float32" else 5e-3)
    assert abs(found.kl_nats) < found.tolerance_nats


def test_a_trainer_under_autocast_probes_float32_weights_outside_it(
    tmp_path: Path, folder: Path, caches: dict[str, LogitCache]
) -> None:
    model = get_peft_model(load(folder, "float32"), lora())
    trainer = train_in_a_trainer(tmp_path, caches["float32"], model, bf16=True)
    assert trainer.step_zero is not None and trainer.step_zero.tolerance_nats == 1e-5
    assert abs(trainer.step_zero.kl_nats) < 1e-6
    assert hasattr(trainer.model, "_original_forward")  # accelerate's autocast stands there, and stays
    assert trainer.model.forward is not trainer.model._original_forward


@pytest.fixture
def lost(tmp_path: Path, folder: Path) -> tuple[Path, LogitCache]:
    """A cache in bfloat16 whose base is no longer where it was, and that place."""
    here = Path(shutil.copytree(folder, tmp_path / "here"))
    base = load_base(find_model(str(here)), "bfloat16", CPU)
    precompute(base, SAMPLES, tmp_path / "c", CaptureSettings(top_k=V - 1, max_length=64, precision="exact"))
    shutil.rmtree(here)
    return here, LogitCache.open(tmp_path / "c")


def test_a_model_of_another_checkpoint_is_refused_by_its_name(
    tmp_path: Path, folder: Path, caches: dict[str, LogitCache], lost: tuple[Path, LogitCache]
) -> None:
    noisy(0.01)(load(folder, "float32")).save_pretrained(tmp_path / "near")
    for cache, said in (
        (caches["bfloat16"], "found others in 14 of 21"),
        (lost[1], "near, which is another checkpoint"),
    ):
        with pytest.raises(NotTheBase, match=said):
            train_in_a_loop(cache, get_peft_model(load(tmp_path / "near"), lora()))
    train_in_a_loop(lost[1], get_peft_model(load(tmp_path / "near"), lora()), teacher_is_not_base=True)


def test_the_base_found_elsewhere_by_the_cache_s_own_name(
    folder: Path, caches: dict[str, LogitCache], caplog: pytest.LogCaptureFixture
) -> None:
    """A copy in bfloat16 without a name, loaded and widened: the checkpoint is where the cache says."""
    model = load(folder)
    model.config._name_or_path = model.name_or_path = ""
    with caplog.at_level(logging.WARNING):
        train_in_a_loop(caches["bfloat16"], get_peft_model(model.float(), lora()))
    assert [
        r.getMessage().partition("not compared: ")[2] for r in caplog.records if "not compared" in r.getMessage()
    ] == ["the tokenizer (a model in memory has none)."]


def test_without_a_checkpoint_the_model_s_own_noise_is_the_bound_and_that_is_said(
    folder: Path, lost: tuple[Path, LogitCache], caplog: pytest.LogCaptureFixture
) -> None:
    here, cache = lost
    plain, near = load(folder), noisy(0.1)(load(folder))
    for model in (plain, near):
        model.config._name_or_path = model.name_or_path = str(here)
    with caplog.at_level(logging.WARNING):
        found = train_in_a_loop(cache, get_peft_model(plain, lora())).step_zero
    assert found is not None and found.own_noise_nats is not None
    assert found.tolerance_nats == pytest.approx(1e-5 + 5 * found.own_noise_nats)
    assert found.kl_nats <= found.tolerance_nats < 5e-3
    assert f"weights (no checkpoint of the base is here by the name of '{here}'" in caplog.text
    with pytest.raises(NotTheBase, match="5 times its own noise of"):
        train_in_a_loop(cache, get_peft_model(near, lora()))


def test_own_noise_is_that_of_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """0 where padding changes nothing; what a layer adds to padded rows otherwise."""
    model = make_model()
    documents = [s.token_ids for s in SAMPLES[:2]]
    assert own_noise(model, documents) < 1e-7
    inner = model.model.norm.forward
    monkeypatch.setattr(model.model.norm, "forward", lambda x: inner(x) * (1.0 if len(x) == 1 else 1.1))
    assert own_noise(model, documents) > 1e-3


@pytest.mark.parametrize("start", ["pissa", "olora", True, "gaussian", "orthogonal"])
def test_what_an_adapter_rewrites_is_left_out_and_the_rest_compared(start: Any, folder: Path) -> None:
    model = get_peft_model(load(folder, "float32"), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=start))
    found = compare_weights(model, folder)
    rewrites = start in ("pissa", "olora")
    assert found.differing == () and found.num_compared == (19 if rewrites else 21)
    assert found.said == ("2 rewritten by the adapter (of 21 tensors of the checkpoint)" if rewrites else "")
    with torch.no_grad():
        model.base_model.model.model.norm.weight[3] += 1
    assert compare_weights(model, folder).differing == ("model.norm.weight",)


MADE: dict[str, Callable[[], Any]] = {
    "transposed": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4)),
    "experts": mixture,
    **{name: partial(make_family, name) for name in ("Gemma2", "GPTNeoX", "Cohere")},
}


@pytest.mark.parametrize("made", MADE)
def test_names_of_checkpoints_are_found_in_memory(made: str, tmp_path: Path) -> None:
    """Nothing of the base differs from itself, what is changed is named; experts are fused while they are loaded."""
    MADE[made]().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    texts = [config_text(read_config(tmp_path)), config_text(model.config.to_dict())]
    assert not config_differences(*texts)
    found = compare_weights(model, tmp_path)
    assert not found.differing and found.num_compared > 5
    assert found.left_out.keys() == ({"of other names in memory"} if made == "experts" else set())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    assert len(compare_weights(model, tmp_path).differing) == found.num_compared


def test_a_body_s_checkpoint_has_its_names_without_the_body_s_own(tmp_path: Path, folder: Path) -> None:
    shutil.copytree(folder, tmp_path / "body")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {n.removeprefix("model."): t for n, t in tensors.items()},
        tmp_path / "body" / "model.safetensors",
        {"format": "pt"},
    )
    assert compare_weights(load(folder), tmp_path / "body").num_compared == len(tensors)


def test_what_cannot_be_compared_is_counted_by_its_reason(folder: Path) -> None:
    model = load(folder, "float32")
    model.model.norm.weight = nn.Parameter(torch.ones(65))
    model.model.embed_tokens.weight = nn.Parameter(torch.ones(V, 64, device="meta"))
    del model.model.layers[0].input_layernorm.weight
    found = compare_weights(model, folder)
    assert found.left_out == {"of other shapes in memory": 1, "not in memory": 1, "of other names in memory": 1}
    assert found.num_compared == 18


def test_rounding_on_the_way_to_float32_is_no_difference_and_anything_else_is(folder: Path) -> None:
    assert not compare_weights(load(folder).float(), folder).differing
    model = load(folder, "float32")
    with torch.no_grad():
        model.lm_head.weight[-1, -1] = torch.nextafter(model.lm_head.weight[-1, -1], torch.tensor(9.0))
    assert compare_weights(model, folder).differing == ("lm_head.weight",)
    assert not compare_weights(model.bfloat16(), folder).differing  # rounded, it is the base's


def test_a_checkpoint_that_is_not_here_is_not_looked_for_elsewhere(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def snapshot(name: str, **how: Any) -> str:
        asked.append((name, how["revision"], how["local_files_only"]))
        if name == "some/model":
            return str(folder)
        raise OSError("not in the cache")

    monkeypatch.setattr(weights_in_memory, "snapshot_download", snapshot)
    assert local_checkpoint("some/model", "abc") == folder and local_checkpoint("other/model") is None
    assert local_checkpoint("") is None and local_checkpoint(str(tmp_path)) == tmp_path
    assert local_checkpoint("x" * 5000) is None  # no name of a file either
    assert asked == [("some/model", "abc", True), ("other/model", None, True)]


def test_the_command_line_s_base_is_compared_as_it_is_in_memory(folder: Path, caches: dict[str, LogitCache]) -> None:
    base = load_base(find_model(str(folder)), "bfloat16", CPU)
    view = CacheView.paired(caches["bfloat16"], base, Objective())
    assert view.is_verified and view.left_out == ()
    merged(base.model)
    with pytest.raises(NotTheBase, match="an adapter was merged into it, or it was trained"):
        CacheView.paired(caches["bfloat16"], base, Objective())


@pytest.mark.parametrize(("asked", "expected"), [(None, 5e-3), (0.02, 5e-3)])
def test_max_start_kl_is_of_other_formats_alone(
    asked: float | None, expected: float, folder: Path, caches: dict[str, LogitCache]
) -> None:
    rules = PairingRules(other_precision=True, max_start_kl=asked)
    probe = Probe(caches["float32"], Objective(), rules=rules)
    assert tolerance_of(probe, load(folder), None) == expected


def test_the_message_says_what_the_kl_is_with_the_adapter_off(folder: Path, caches: dict[str, LogitCache]) -> None:
    model = get_peft_model(load(folder, "float32"), lora(init_lora_weights=False))
    with pytest.raises(NotTheBase, match=r"adapter: with it off the KL is -?[\d.e-]+ nats, so it does not start as"):
        probe_step_zero(model, Probe(caches["float32"], Objective()), SAMPLES)
